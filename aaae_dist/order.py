"""The order of the samples: a pure function of (seed, epoch, position).

It knows nothing of ranks, workers or batch sizes: position p of an epoch is one sample, global batch t is G
consecutive positions, and every rank takes its slice. So a run goes on at the exact sample from two integers, on any
number of ranks.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class Order:
    """The order of one epoch after another: (seed, epoch, position) -> (shard, sample in it).

    The shards are permuted and laid end to end, the line is cut into `lanes` equal ones, and within a lane every
    `window` samples are permuted. Position p is lane p mod lanes, offset p // lanes: a batch is gathered from places
    far apart, while few shards are needed at a time. Fewer samples than there are lanes are left out, other ones in
    every epoch.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, lanes: int, window: int) -> None:
        self.counts = np.asarray(counts)
        self.seed, self.lanes, self.window = seed, min(lanes, int(self.counts.sum())), window
        self.lane_length = int(self.counts.sum()) // self.lanes
        self.length = self.lane_length * self.lanes
        self.cache: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()

    def permutation(self, count: int, *key: int) -> np.ndarray:
        """A permutation that is a pure function of (seed, key).

        Philox's raw stream never changes between numpy versions.
        """
        if key not in self.cache:
            draws = np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=key)).random_raw(count)
            self.cache[key] = draws.argsort(kind="stable")
            while len(self.cache) > 4 * self.lanes:
                self.cache.popitem(last=False)
        return self.cache[key]

    def samples(self, epoch: int, start: int, stop: int) -> list[tuple[int, int]]:
        """The (shard, sample) at positions start, ..., stop - 1 of an epoch, those of one lane side by side."""
        shards = self.permutation(len(self.counts), epoch)
        ends = self.counts[shards].cumsum()
        found = []
        for position in sorted(range(start, stop), key=lambda p: p % self.lanes):
            lane, offset = position % self.lanes, position // self.lanes
            block, inside = divmod(offset, self.window)
            size = min(self.window, self.lane_length - block * self.window)
            place = lane * self.lane_length + block * self.window + self.permutation(size, epoch, lane, block)[inside]
            at = int(ends.searchsorted(place, side="right"))
            found.append((int(shards[at]), int(place - (ends[at] - self.counts[shards[at]]))))
        return found

    def after(self, batches: int, *, batch_size: int) -> tuple[int, int]:
        """The (epoch, position) at which a stream goes on after so many global batches from the start."""
        epoch, batch = divmod(batches, max(self.length // batch_size, 1))
        return epoch, batch * batch_size
