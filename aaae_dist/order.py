"""The order of the samples: a pure function of (seed, epoch, position).

It knows nothing of ranks, workers or batch sizes: position p of an epoch is one sample, global batch t is G
consecutive positions, and every rank takes its slice. So a run goes on at the exact sample from two integers, on any
number of ranks.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, UInt64


class Order:
    """The order of one epoch after another: (seed, epoch, position) -> (shard, sample in it).

    The shards are permuted and laid end to end as a ring, which is opened at a random sample and cut into `lanes` equal
    lanes; within a lane every `window` samples, a *block*, are permuted. Every `lanes` positions, a *round*, take one
    sample of each lane, and the lanes in another order every time: a batch is gathered from places far apart, while
    only the shards under one block of every lane are in play at a time. Fewer samples than there are lanes are left
    out, other ones in every epoch.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, lanes: int, window: int) -> None:
        self.counts = np.asarray(counts)
        self.seed, self.lanes, self.window = seed, min(lanes, int(self.counts.sum())), window
        self.lane_length = int(self.counts.sum()) // self.lanes
        self.length = self.lane_length * self.lanes
        self.lines: OrderedDict[int, tuple[np.ndarray, np.ndarray, int]] = OrderedDict()  # of the epochs last asked for
        self.blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def draws(self, count: int, *key: int) -> UInt64[np.ndarray, " count"]:
        """Random numbers that are a pure function of (seed, key). Philox's raw stream never changes with numpy."""
        return np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=key)).random_raw(count)

    def permutation(self, count: int, *key: int) -> Int32[np.ndarray, " count"]:
        """A permutation that is a pure function of (seed, key)."""
        return self.draws(count, *key).argsort(kind="stable").astype(np.int32)

    def line(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The shards of an epoch in their order, where each ends on the ring, and where the ring is opened."""
        if epoch not in self.lines:
            shards = self.permutation(len(self.counts), epoch)
            ends = self.counts[shards].cumsum()
            self.lines[epoch] = shards, ends, int(self.draws(1, epoch, 0)[0]) % int(ends[-1])
            while len(self.lines) > 3:
                self.lines.popitem(last=False)
        return self.lines[epoch]

    def samples(self, epoch: int, start: int, stop: int, share: slice = slice(None)) -> Int64[np.ndarray, "n 2"]:
        """The (shard, sample) at positions start, ..., stop - 1 of an epoch, those of one lane side by side.

        Args:
            share: of them, for instance those of one rank.
        """
        offset, lane = np.divmod(np.arange(start, stop), self.lanes)
        cut = {start // self.lanes, (stop - 1) // self.lanes} if start % self.lanes or stop % self.lanes else ()
        for number in cut:  # what is of a whole round is of all lanes, whatever their order
            here = offset == number
            lane[here] = self.permutation(self.lanes, epoch, 1 + number)[lane[here]]
        chosen = lane.argsort(kind="stable")[share]
        lane, (block, inside) = lane[chosen], np.divmod(offset[chosen], self.window)
        for number in np.unique(block):
            here = block == number
            inside[here] = self.shuffled(epoch, int(number))[lane[here], inside[here]]
        shards, ends, opened = self.line(epoch)
        place = (opened + lane * self.lane_length + block * self.window + inside) % ends[-1]
        at = ends.searchsorted(place, side="right")
        return np.stack([shards[at], place - (ends - self.counts[shards])[at]], axis=1)

    def shuffled(self, epoch: int, block: int) -> Int32[np.ndarray, "lane window"]:
        """The permutations of a block of every lane."""
        if (epoch, block) not in self.blocks:
            size = min(self.window, self.lane_length - block * self.window)
            self.blocks[epoch, block] = np.stack(
                [self.permutation(size, epoch, lane, block) for lane in range(self.lanes)]
            )
            while len(self.blocks) > 3:  # a batch may lie across two, the next one may be asked for already
                self.blocks.popitem(last=False)
        return self.blocks[epoch, block]

    def block(self, position: int) -> int:
        """The block, of every lane, that a position lies in."""
        return position // self.lanes // self.window

    def in_play(self, epoch: int, block: int, share: tuple[float, float] = (0, 1)) -> list[int]:
        """The shards under a block of the lanes in this share of the batch; none behind an epoch's last block."""
        shards, ends, opened = self.line(epoch)
        twice = np.concatenate([ends, ends[-1] + ends])  # a block may go round the ring's end
        first, last = int(share[0] * self.lanes), min(int(np.ceil(share[1] * self.lanes)), self.lanes)
        found: dict[int, None] = {}
        for lane in range(first, last):
            start = lane * self.lane_length + block * self.window
            stop = min(start + self.window, (lane + 1) * self.lane_length)
            if start < stop:
                low, high = twice.searchsorted([opened + start, opened + stop - 1], side="right")
                found |= dict.fromkeys(shards[np.arange(low, high + 1) % len(shards)].tolist())
        return list(found)

    def after(self, batches: int, *, batch_size: int) -> tuple[int, int]:
        """The (epoch, position) at which a stream goes on after so many global batches from the start."""
        epoch, batch = divmod(batches, max(self.length // batch_size, 1))
        return epoch, batch * batch_size
