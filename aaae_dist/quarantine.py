"""The run's list of samples that could not be used: `quarantine.jsonl`, one JSON object a line."""

import json
import re
from collections.abc import Collection, Iterable

from aaae_dist import distributed, storage
from aaae_dist.reader import Bad

QUARANTINE = "quarantine.jsonl"


class Quarantine:
    """What is listed, the same on every rank."""

    def __init__(self, run: str) -> None:
        names = [name for name in storage.listing(run) if re.fullmatch(r"quarantine(\.\d+)?\.jsonl", name)]
        lines = [line for name in names for line in storage.read(storage.join(run, name)).decode().split("\n") if line]
        self.samples = dict.fromkeys(Bad(**json.loads(line)) for line in lines)
        self.run = run

    def add(self, samples: Iterable[Bad], *, alone: bool = False) -> None:
        """List samples, each once. Rank 0 writes.

        Args:
            alone: the run ends for this rank, before the others hear of them: it writes too, to a file of its own.
        """
        known = len(self.samples)
        self.samples |= dict.fromkeys(samples)
        if len(self.samples) > known and (alone or distributed.rank() == 0):
            lines = (json.dumps(sample._asdict()) for sample in self.samples)
            name = f"quarantine.{rank}.jsonl" if (rank := distributed.rank()) else QUARANTINE
            storage.write(storage.join(self.run, name), "".join(f"{line}\n" for line in lines).encode())

    def of(self, shards: Collection[str]) -> list[Bad]:
        """Those that lie in one of these shards."""
        among = set(shards)
        return [sample for sample in self.samples if sample.shard in among]
