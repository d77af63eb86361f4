"""Whether ranks have alike what they must have alike, and whether what was loaded is what was saved."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from aaae_dist import distributed
from aaae_dist.checkpoint import Manifest
from aaae_dist.engine import Engine
from aaae_dist.errors import UserError
from aaae_dist.fingerprint import fingerprints

LATE = 45.0  # seconds for which a rank looks again for what rank 0 sees: NFS may hide new files for 30


def refuse_drift(engine: Engine, run: str, *, images: int) -> None:
    """Compare fingerprints of what all ranks must have alike. All ranks must call it.

    Raises:
        UserError: they differ; the network, the tensor and the rank are named.
    """
    if distributed.world() == 1:
        return
    found = fingerprints(engine.alike())
    numbers = torch.stack(list(found.values())).tolist()
    ranks = [dict(zip(found, each, strict=True)) for each in distributed.gather(numbers)]
    if odd := differing(ranks):
        (state, _, tensor), where = odd[0].partition("/"), " and ".join(map(str, odd[1]))
        where = f"on rank {where}" if len(odd[1]) < len(ranks) else f"between ranks {where}"
        raise UserError(
            f"{run}: after {images:,} images {tensor.partition('.')[0]} is not the same on all ranks: {tensor} "
            f"({state}) differs {where}; look at the memory, network and libraries of their nodes; the same "
            "command again goes on from the last checkpoint, which was saved by equal ranks"
        )


def differing(ranks: Sequence[Mapping[str, int]]) -> tuple[str, list[int]] | None:
    """The first name under which not all ranks have the same, if any, and the ranks that differ from most.

    Where there is no majority, as of two, it is all ranks.
    """
    for name in ranks[0]:
        found = [each[name] for each in ranks]
        if len(set(found)) > 1:
            usual = max(set(found), key=found.count)
            told = 2 * found.count(usual) > len(found)
            return name, [rank for rank, value in enumerate(found) if value != usual or not told]
    return None


def seen_by_all(run: str, look: Callable[[], Any]) -> Any:
    """What rank 0 sees in a run's folder. All ranks must call it.

    Args:
        look: tells what this rank sees there. The others look after rank 0, and for a while: a network's disk may show
            them late what was written.

    Raises:
        UserError: another rank sees something else there; it is named.
    """
    seen, until = distributed.from_rank_0(look), time.monotonic() + LATE
    while True:  # no collective takes long, however late the disk is
        found = distributed.gather((distributed.rank() == 0 or look() == seen, time.monotonic() > until))
        blind = [rank for rank, (alike, _) in enumerate(found) if not alike]
        if not blind:
            return seen
        if found[0][1]:  # by the clock of rank 0
            raise UserError(
                f"{run}: rank {blind[0]} sees other files there than rank 0; put training.run where all nodes see it"
            )
        time.sleep(0.5)


def refuse_other_state(engine: Engine, manifest: Manifest) -> None:
    """Compare fingerprints of what was loaded, over all ranks, with those that were saved. All ranks must call it.

    Raises:
        RuntimeError: they differ: a defect of ours, for every file was verified.
    """
    found, names = fingerprints(engine.to_save()), sorted(manifest.fingerprints)
    nothing = torch.zeros((), dtype=torch.int64, device=engine.device)
    loaded = distributed.sum_over_ranks(torch.stack([found.get(name, nothing) for name in names])).tolist()
    for name, number in zip(names, loaded, strict=True):
        if number != manifest.fingerprints[name]:
            raise RuntimeError(f"{name} is not what was saved: fingerprint {number}, not {manifest.fingerprints[name]}")
