"""What is summed up between two lines of the log: on the device, without a word to the host or to other ranks."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from aaae_dist.aaae import Turn
from aaae_dist.data import Batch
from aaae_dist.distributed import gather, sum_over_ranks, world
from aaae_dist.metrics import RunningMoments, effective_rank, moments_of
from aaae_dist.system import Node, by_node, peak_memory_gb

SLOW, NOTICED = 1.5, 0.01  # times the usual forward, and seconds above it, from which a rank is a straggler


class Told(NamedTuple):
    """What a rank tells the others of an interval."""

    node: str
    waits: list[float]  # shares of its time in which it waited for bytes to be fetched, decoded, and handed over
    step: float  # seconds of a step, in the mean
    forward: float  # seconds of a step's forwards, in the mean
    memory: float  # GB at most
    system: dict[str, float]  # of its node


class Interval:
    """Running sums of one rank."""

    def __init__(self, networks: Sequence[str], *, code_size: int, device: torch.device, node: Node) -> None:
        self.networks, self.device, self.node = networks, device, node
        self.reports: dict[str, Float[Tensor, ""]] = {}
        self.forwards, self.steps, self.began = 0, 0, time.perf_counter()
        self.waits = [0.0, 0.0, 0.0]  # seconds for bytes to be fetched, decoded, and handed over
        self.seconds = 0.0  # of all forwards
        self.norms = torch.zeros(len(networks), dtype=torch.float64, device=device)
        self.codes = RunningMoments(code_size, device)

    def add_step(self, turns: Sequence[Turn], norms: Float[Tensor, " network"], *, forward: float) -> None:
        """Count a step: its micro-batches, the gradient norm of every network, and the seconds of its forwards."""
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
        self.seconds += forward

    def add_wait(self, batch: Batch, *, began: float) -> None:
        """Count the time from `began` until now, in which the step waited for a batch, by what the batch waited for."""
        now = time.perf_counter()
        handing = now - max(began, batch.finished)
        making = (now - began - handing) / max(batch.fetching + batch.decoding, 1e-9)
        for i, seconds in enumerate((making * batch.fetching, making * batch.decoding, handing)):
            self.waits[i] += seconds

    def means(self, *, batch_size: int) -> dict[str, float]:
        """Means over the interval and all ranks, by one all-reduce and one copy to the host; none, if it has no steps.

        All ranks must call it. What each rank and node did goes by one more collective, of some hundred bytes a rank.

        Args:
            batch_size: images of a step over all ranks.
        """
        if not self.steps:
            return {}
        elapsed = time.perf_counter() - self.began
        reports = torch.stack(list(self.reports.values())) / self.forwards
        parts = [reports, self.norms / self.steps, self.codes.sums]
        sums = sum_over_ranks(torch.cat(parts)).cpu().split([len(part) for part in parts])
        names = [*self.reports, *(f"gradient_norm/{name}" for name in self.networks)]
        figures = dict(zip(names, (torch.cat(sums[:2]) / world()).tolist(), strict=True))
        figures["speed/images_per_second"] = self.steps * batch_size / elapsed
        codes = moments_of(sums[2], self.codes.size)
        figures["codes/rms"] = (codes.covariance.diagonal() + codes.mean.square()).mean().sqrt().item()
        figures["codes/effective_rank"] = effective_rank(codes.covariance)
        told = gather(
            Told(
                node=self.node.name,
                waits=[seconds / elapsed for seconds in self.waits],
                step=elapsed / self.steps,
                forward=self.seconds / self.steps,
                memory=peak_memory_gb(self.device),
                system=self.node.figures(),
            )
        )
        figures |= describe_waits(torch.tensor([each.waits for each in told]))
        return figures | describe_ranks(told) | by_node((each.node, each.system) for each in told)


def describe_ranks(told: Sequence[Told]) -> dict[str, float]:
    """What is logged of the ranks: least, mean and most of what each has told, and which is slowest.

    Which is slowest its forwards tell: no rank waits for another in them, while steps, which exchange gradients, take
    all ranks as long as the slowest. Under ZeRO-3 and FSDP2 even a forward waits, for weights that the others lend:
    there a slow rank makes all forwards slow, and none can be named.
    """
    columns = {
        "step_seconds": [each.step for each in told],
        "forward_seconds": (forwards := [each.forward for each in told]),
        "data_wait": [sum(each.waits) for each in told],
        "memory_gb": [each.memory for each in told],
    }
    figures = {
        f"ranks/{name}/{kind}": of(column)
        for name, column in columns.items()
        for kind, of in (("min", min), ("mean", fmean), ("max", max))
    }
    slowest = forwards.index(max(forwards))
    others = forwards[:slowest] + forwards[slowest + 1 :]
    figures |= {"ranks/slowest": slowest, "ranks/forward_seconds/usual": median(others or forwards)}
    # So that the figures alone say on which node it is.
    return figures | ({f"system/{told[slowest].node}/slow_rank": slowest} if straggles(figures) else {})


def straggles(metrics: Mapping[str, float]) -> bool:
    """Whether the forward of the slowest rank takes much longer than is usual among the others.

    Half as long again is what a GPU does that is throttled or shared, and more than equal ranks differ by: two on two
    cores with six other processes at work differed by 13 % in 50 steps at most, in 5 steps by as much one time in five.
    Less than 10 ms is noise: what small networks take on a busy machine.
    """
    most, usual = metrics.get("ranks/forward_seconds/max", 0.0), metrics.get("ranks/forward_seconds/usual", 0.0)
    return most >= SLOW * usual and most - usual >= NOTICED


def straggler(metrics: Mapping[str, float]) -> str:
    """A line about the slowest rank, if it holds the others up."""
    if not straggles(metrics):
        return ""
    rank, most, usual = (
        metrics[f"ranks/{name}"] for name in ("slowest", "forward_seconds/max", "forward_seconds/usual")
    )
    node = next(name.split("/")[1] for name in metrics if name.endswith("/slow_rank"))
    return (
        f"rank {rank:.0f} on node {node} is slow: its forward takes {1000 * most:.3g} ms, {1000 * usual:.3g} ms is "
        "usual; look at that node"
    )


def describe_waits(waits: Float[Tensor, "rank 3"]) -> dict[str, float]:
    """What is logged of the shares of their time that ranks waited for data: every rank's, and for the one that waits
    longest how it is made up of fetching, decoding and hand-over.
    """
    slowest = int(waits.sum(1).argmax())
    shares = {f"data/wait_of_rank/{number}": share for number, share in enumerate(waits.sum(1).tolist())}
    parts = dict(zip(("fetching", "decoding", "hand_over"), waits[slowest].tolist(), strict=True))
    return shares | {"data/slowest_rank": slowest} | {f"data/wait/{name}": share for name, share in parts.items()}


def slow_data(metrics: Mapping[str, float]) -> str:
    """A line about the rank that waits longest for its data, if that is a tenth of its time or more."""
    parts = {name: metrics.get(f"data/wait/{name}", 0.0) for name in ("fetching", "decoding", "hand_over")}
    if (share := sum(parts.values())) < 0.1:
        return ""
    where = ", ".join(f"{name.replace('_', '-')} {part:.0%}" for name, part in parts.items())
    return f"rank {metrics['data/slowest_rank']:.0f} waits longest for data, {share:.0%} of its time ({where})"
