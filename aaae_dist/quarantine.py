"""The run's list of samples that could not be used: `quarantine.jsonl`, one JSON object a line."""

import json
from collections.abc import Collection, Iterable

from aaae_dist import distributed, storage
from aaae_dist.reader import Bad

QUARANTINE = "quarantine.jsonl"


class Quarantine:
    """What is listed, the same on every rank."""

    def __init__(self, run: str) -> None:
        self.url = storage.join(run, QUARANTINE)
        self.samples = self.listed()

    def listed(self) -> dict[Bad, None]:
        """What the file says."""
        lines = storage.read(self.url).decode().split("\n") if storage.exists(self.url) else []
        return dict.fromkeys(Bad(**json.loads(line)) for line in lines if line)

    def add(self, samples: Iterable[Bad], *, alone: bool = False) -> None:
        """List samples, each once. Rank 0 writes, or a rank for which the run ends before the others hear of them."""
        if alone:
            self.samples |= self.listed()
        known = len(self.samples)
        self.samples |= dict.fromkeys(samples)
        if len(self.samples) > known and (alone or distributed.rank() == 0):
            lines = (json.dumps(sample._asdict()) for sample in self.samples)
            storage.write(self.url, "".join(f"{line}\n" for line in lines).encode())

    def of(self, shards: Collection[str]) -> list[Bad]:
        """Those that lie in one of these shards."""
        among = set(shards)
        return [sample for sample in self.samples if sample.shard in among]
