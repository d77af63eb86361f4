"""What is summed up between two lines of the log: on the device, without a word to the host or to other ranks."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from aaae_dist.aaae import Turn
from aaae_dist.data import Batch
from aaae_dist.distributed import rank, sum_over_ranks, world
from aaae_dist.metrics import RunningMoments, effective_rank, moments_of


class Interval:
    """Running sums of one rank."""

    def __init__(self, networks: Sequence[str], *, code_size: int, device: torch.device) -> None:
        self.networks = networks
        self.reports: dict[str, Float[Tensor, ""]] = {}
        self.forwards, self.steps, self.began = 0, 0, time.perf_counter()
        self.waits = [0.0, 0.0, 0.0]  # seconds for bytes to be fetched, decoded, and handed over
        self.norms = torch.zeros(len(networks), dtype=torch.float64, device=device)
        self.codes = RunningMoments(code_size, device)

    def add_step(self, turns: Sequence[Turn], norms: Float[Tensor, " network"]) -> None:
        """Count a step: its micro-batches, and the gradient norm of every network."""
        for turn in turns:
            names, values = list(turn.report), [value.double() for value in turn.report.values()]
            if self.reports:
                torch._foreach_add_([self.reports[name] for name in names], values)
            else:
                self.reports = {name: value.clone() for name, value in zip(names, values, strict=True)}
            self.codes.add(turn.codes)
            self.forwards += 1
        self.norms += norms
        self.steps += 1

    def add_wait(self, batch: Batch, *, began: float) -> None:
        """Count the time from `began` until now, in which the step waited for a batch, by what the batch waited for."""
        now = time.perf_counter()
        handing = now - max(began, batch.finished)
        making = (now - began - handing) / max(batch.fetching + batch.decoding, 1e-9)
        for i, seconds in enumerate((making * batch.fetching, making * batch.decoding, handing)):
            self.waits[i] += seconds

    def means(self, *, batch_size: int) -> dict[str, float]:
        """Means over the interval and all ranks, by one all-reduce and one copy to the host; none, if it has no steps.

        All ranks must call it.

        Of the waiting for data: every rank's share of its time, and where it went on the rank that waits longest.

        Args:
            batch_size: images of a step over all ranks.
        """
        if not self.steps:
            return {}
        elapsed = time.perf_counter() - self.began
        reports = torch.stack(list(self.reports.values())) / self.forwards
        waits = self.norms.new_zeros((world(), 3))
        waits[rank()] = waits.new_tensor(self.waits) / elapsed
        parts = [reports, self.norms / self.steps, waits.flatten(), self.codes.sums]
        sums = sum_over_ranks(torch.cat(parts)).cpu().split([len(part) for part in parts])
        names = [*self.reports, *(f"gradient_norm/{name}" for name in self.networks)]
        figures = dict(zip(names, (torch.cat(sums[:2]) / world()).tolist(), strict=True))
        figures["speed/images_per_second"] = self.steps * batch_size / elapsed
        figures |= describe_waits(sums[2].view(-1, 3))
        codes = moments_of(sums[3], self.codes.size)
        figures["codes/rms"] = (codes.covariance.diagonal() + codes.mean.square()).mean().sqrt().item()
        figures["codes/effective_rank"] = effective_rank(codes.covariance)
        return figures


def describe_waits(waits: Float[Tensor, "rank 3"]) -> dict[str, float]:
    """What is logged of the shares of their time that ranks waited for data: fetching, decoding, hand-over."""
    slowest = int(waits.sum(1).argmax())
    shares = {f"data/wait_of_rank/{number}": share for number, share in enumerate(waits.sum(1).tolist())}
    parts = dict(zip(("fetching", "decoding", "hand_over"), waits[slowest].tolist(), strict=True))
    return shares | {"data/slowest_rank": slowest} | {f"data/wait/{name}": share for name, share in parts.items()}


def slow_data(metrics: dict[str, float]) -> str:
    """A line about the rank that waits longest for its data, if that is a tenth of its time or more."""
    parts = {name: metrics.get(f"data/wait/{name}", 0.0) for name in ("fetching", "decoding", "hand_over")}
    if (share := sum(parts.values())) < 0.1:
        return ""
    where = ", ".join(f"{name.replace('_', '-')} {part:.0%}" for name, part in parts.items())
    return f"rank {metrics['data/slowest_rank']:.0f} waits longest for data, {share:.0%} of its time ({where})"
