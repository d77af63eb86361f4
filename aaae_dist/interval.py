"""What is summed up between two lines of the log: on the device, without a word to the host or to other ranks."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from aaae_dist.aaae import Turn
from aaae_dist.distributed import sum_over_ranks, world
from aaae_dist.metrics import RunningMoments, effective_rank, moments_of


class Interval:
    """Running sums of one rank."""

    def __init__(self, networks: Sequence[str], *, code_size: int, device: torch.device) -> None:
        self.networks = networks
        self.reports: dict[str, Float[Tensor, ""]] = {}
        self.forwards, self.steps, self.waited, self.began = 0, 0, 0.0, time.perf_counter()
        self.norms = torch.zeros(len(networks), dtype=torch.float64, device=device)
        self.codes = RunningMoments(code_size, device)

    def add_forward(self, turn: Turn) -> None:
        names, values = list(turn.report), [value.double() for value in turn.report.values()]
        if self.reports:
            torch._foreach_add_([self.reports[name] for name in names], values)
        else:
            self.reports = {name: value.clone() for name, value in zip(names, values, strict=True)}
        self.codes.add(turn.codes)
        self.forwards += 1

    def add_step(self, norms: Float[Tensor, " network"]) -> None:
        """Count a step, with the gradient norm of every network."""
        self.norms += norms
        self.steps += 1

    def means(self, *, batch_size: int, bad_samples: int) -> dict[str, float]:
        """Means over the interval and all ranks, by one all-reduce and one copy to the host. All ranks must call it.

        Args:
            batch_size: images of a step over all ranks.
            bad_samples: that this rank has met since its start.
        """
        elapsed = time.perf_counter() - self.began
        reports = torch.stack(list(self.reports.values())) / self.forwards
        own = self.norms.new_tensor([self.waited, bad_samples])
        sums = sum_over_ranks(torch.cat([reports, self.norms / self.steps, own, self.codes.sums])).cpu()
        codes = moments_of(sums[-len(self.codes.sums) :], self.codes.size)
        names = [*self.reports, *(f"gradient_norm/{name}" for name in self.networks), "speed/data_wait_seconds"]
        figures = dict(zip(names, (sums / world()).tolist(), strict=False))
        figures["speed/images_per_second"] = self.steps * batch_size / elapsed
        figures["data/bad_samples"] = sums[len(names)].item()
        figures["codes/rms"] = (codes.covariance.diagonal() + codes.mean.square()).mean().sqrt().item()
        figures["codes/effective_rank"] = effective_rank(codes.covariance)
        return figures
