"""Streams of batches: global batch t, and every rank's slice of it, in the order that `order.py` defines."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from aaae_dist.errors import UserError
from aaae_dist.order import Order
from aaae_dist.reader import Reader
from aaae_dist.workers import Answer, Request, answers

Pixels = UInt8[Tensor, "batch channels height width"]

VERSION = 2  # of the state
SHARDS_AHEAD = 4  # of those that a sweep is at
WORTH_FETCHING = 8  # a sweep that reads fewer than one in so many samples fetches these one by one, not whole shards


class Batch(NamedTuple):
    """One rank's part of a global batch.

    `mask` is false for rows that only fill the batch up. Of the seconds that it took: `fetching` and `decoding`;
    `finished` is a time of `time.perf_counter()`.
    """

    images: Pixels
    keys: list[str]
    labels: list[int | None]
    mask: Bool[Tensor, " batch"]
    fetching: float
    decoding: float
    finished: float


def to_float(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes 0..255 to float32 in [-1, 1], contiguous."""
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Values around [-1, 1] to bytes, rounded and clamped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def batch_of(answer: Answer, *, rows: int) -> Batch:
    """An answer as a batch whose first so many rows are samples."""
    told, empty = answer.told, len(answer.pixels) - rows
    return Batch(
        torch.from_numpy(answer.pixels).permute(0, 3, 1, 2),
        told.keys + [""] * empty,
        told.labels + [None] * empty,
        torch.arange(len(answer.pixels)) < rows,
        told.fetching,
        told.decoding,
        told.finished,
    )


def quotas(ends: Sequence[Fraction], *, before: int, count: int) -> list[int]:
    """How many of `count` samples, after `before` earlier ones, come from each of several data sets.

    Of the first n samples, a data set with a share w has w n, to within one, for every n.

    Args:
        ends: 0 and the sums of the first, first two, ... shares; the last is 1. A share is at least 1 / count.
    """
    earlier, later = (
        [(2 * n * end.numerator + end.denominator) // (2 * end.denominator) for end in ends]  # rounded n * end
        for n in (before, before + count)
    )
    taken = [b - a for a, b in zip(earlier, later, strict=True)]
    return [b - a for a, b in pairwise(taken)]


class Stream:
    """This rank's part of every global batch, for ever.

    Global batch t is a pure function of (seed, t): the same samples in the same order for any ranks and workers. No
    sample comes twice in an epoch; an epoch leaves out fewer than a batch and the lanes' remainder; all ranks get the
    same number of batches. Several data sets are mixed by exact quotas, and each has epochs of its own.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        *,
        weights: Sequence[float] = (1.0,),
        seed: int,
        lanes: int,
        window: int,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
        workers: int = 0,
    ) -> None:
        """Check that batches can be made.

        Args:
            batch_size: samples of a global batch.
            workers: processes that fetch and decode ahead; 0: it is done when a batch is asked for.

        Raises:
            UserError: `batch_size` does not divide by `world`, or is too large or too small for a data set; or data
                sets do not go together.
        """
        refuse_unlike(readers)
        self.readers, self.workers = readers, workers
        self.orders = [Order(reader.counts, seed=seed, lanes=lanes, window=window) for reader in readers]
        self.batch_size, self.rows = batch_size, batch_size // world
        self.share = slice(rank * self.rows, (rank + 1) * self.rows)
        shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
        self.ends = list(accumulate(shares, initial=Fraction(0)))
        if (least := float(min(shares) * batch_size)) < 1:
            raise UserError(
                f"data.mix: the smallest weight gives {least:.2g} of the {batch_size} images of a batch; raise it, or "
                "training.batch_size, so that it is at least one"
            )
        if batch_size % world:
            raise UserError(
                f"training.batch_size {batch_size}: not a multiple of the {world} ranks; choose one that is"
            )
        for order, most in zip(self.orders, quotas(self.ends, before=0, count=batch_size), strict=True):
            if most + (len(readers) > 1) > order.length:
                raise UserError(
                    f"training.batch_size {batch_size}: larger than the {order.length} samples of an epoch; choose a "
                    "smaller one, or prepare more images"
                )
        self.begun = False
        self.state: dict[str, Any] = {
            "version": VERSION,
            "order": {"seed": seed, "lanes": lanes, "window": window},
            "samples": 0,
            "sets": [{"fingerprint": reader.fingerprint, "epoch": 0, "position": 0} for reader in readers],
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches that were handed over: a few numbers, equal on all ranks."""
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood, of any ranks, workers and batch size.

        Raises:
            UserError: it is of another order or data set, or this stream has begun.
        """
        if self.begun:
            raise UserError("the stream has begun; load its state before the first batch")
        if state["version"] != VERSION:
            raise UserError(
                f"data: the saved order is of version {state['version']}, this program's is {VERSION}; go on with "
                "the one that saved it, or begin a new run"
            )
        if state["order"] != self.state["order"]:
            raise UserError(f"data: the saved order is {state['order']}, not {self.state['order']}; set it back")
        theirs, ours = ([part["fingerprint"] for part in each["sets"]] for each in (state, self.state))
        if theirs != ours:
            raise UserError(
                f"{', '.join(reader.url for reader in self.readers)}: not the data that the state was saved with, "
                f"its shards differ (fingerprint {', '.join(ours)} instead of {', '.join(theirs)}); bring that back"
            )
        self.state = state

    def skip(self, batches: int) -> None:
        """Go to where the stream stands after so many batches from its start. One data set only."""
        (order,), (part,) = self.orders, self.state["sets"]
        epoch, position = order.after(batches, batch_size=self.batch_size)
        sets = [part | {"epoch": epoch, "position": position}]
        self.load_state_dict(self.state | {"samples": batches * self.batch_size, "sets": sets})

    def __iter__(self) -> Generator[Batch, None, None]:
        self.begun, told = True, deque()
        workers = 0 if all(reader.keep for reader in self.readers) else self.workers  # decoded once, there is no work
        try:
            for answer in answers(self.readers, self.requests(told), rows=self.rows, workers=workers):
                for reader in self.readers:
                    reader.fetcher.refuse_failure()
                self.state, plans = told.popleft()
                for number, shards in plans.items():  # not before: whole shards would delay the first batch
                    self.readers[number].fetcher.plan("stream", shards)
                yield batch_of(answer, rows=self.rows)
        finally:
            for reader in self.readers:
                reader.fetcher.plan("stream", [])

    def requests(self, told: deque[tuple[dict[str, Any], dict[int, list[int]]]]) -> Iterator[Request]:
        """For every batch from here on, what this rank reads; the state after each, and new plans, go to `told`."""
        state, planned = self.state, {}
        while True:
            reads, plans, sets, start = [], {}, [], 0
            for n, quota in enumerate(quotas(self.ends, before=state["samples"], count=self.batch_size)):
                order, at = self.orders[n], state["sets"][n]
                epoch, position = at["epoch"], at["position"]
                if position + quota > order.length:
                    epoch, position = epoch + 1, 0
                sets.append(at | {"epoch": epoch, "position": position + quota})
                mine = slice(*(min(max(edge - start, 0), quota) for edge in (self.share.start, self.share.stop)))
                start += quota
                if mine.start == mine.stop:
                    continue
                reads.append((n, order.samples(epoch, position, position + quota, mine)))
                if planned.get(n) != (now := (epoch, order.block(position), order.block(position + quota - 1))):
                    planned[n] = now
                    plans[n] = shards_ahead(order, *now, self.share_of_lanes(order, position))
            state = state | {"samples": state["samples"] + self.batch_size, "sets": sets}
            told.append((state, plans))
            yield Request(reads, plans)

    def share_of_lanes(self, order: Order, position: int) -> tuple[float, float]:
        """The lanes that this rank reads of: a share of them if batches are whole rounds, else all in turn."""
        if len(self.readers) > 1 or self.batch_size % order.lanes or position % order.lanes:
            return 0.0, 1.0
        return self.share.start / self.batch_size, self.share.stop / self.batch_size


def shards_ahead(order: Order, epoch: int, first: int, last: int, share: tuple[float, float]) -> list[int]:
    """The shards in play in some blocks of an epoch, then those of the block after them."""
    now = [shard for block in range(first, last + 1) for shard in order.in_play(epoch, block, share)]
    following = order.in_play(epoch, last + 1, share) or order.in_play(epoch + 1, 0, share)
    return list(dict.fromkeys(now + following))


def sweep(
    reader: Reader, *, limit: int, batch_size: int, world: int = 1, rank: int = 0, workers: int = 0
) -> Iterator[Batch]:
    """Samples of a split, each once over all ranks, for evaluation, cut to `data.size` in their middle.

    Every rank gets the same number of batches of `batch_size` rows; those that only fill up are masked.

    Args:
        limit: at most so many samples, spread evenly over the split: its shards may be sorted by class.
    """
    places = spread(reader.counts, limit=limit)
    starts = range(rank * batch_size, -(-len(places) // (world * batch_size)) * world * batch_size, world * batch_size)
    parts = [places[start : start + batch_size] for start in starts]
    line = np.unique(np.concatenate([places[:0], *parts])[:, 0])  # the shards that this rank comes by
    if len(places) * WORTH_FETCHING < len(reader):
        line = line[:0]

    def plan(first: int) -> None:
        """Plan for the parts from `first` on that are read next, and a few shards after them."""
        near = np.concatenate([places[:0], *parts[first : first + workers + 2]])[:, 0]
        following = line[line >= near[0]] if len(near) else line[:0]
        reader.fetcher.plan("sweep", following[: len(np.unique(near)) + SHARDS_AHEAD].tolist())

    def read(part: np.ndarray) -> Batch:
        pixels = np.zeros((batch_size, *reader.shape), np.uint8)
        batch = batch_of(Answer(pixels, reader.read(part, pixels[: len(part)])), rows=len(part))
        return batch._replace(images=middle(batch.images, reader.data.size))

    try:
        plan(0)
        for number, batch in enumerate(ahead((lambda part=part: read(part) for part in parts), workers=workers)):
            yield batch
            plan(number + 1)
    finally:
        reader.fetcher.plan("sweep", [])


def spread(counts: Sequence[int], *, limit: int) -> Int64[np.ndarray, "n 2"]:
    """The (shard, number) of at most `limit` samples, evenly spread over shards of so many samples."""
    ends = np.cumsum(counts)
    count = min(limit, int(ends[-1]))
    numbers = np.arange(count) * int(ends[-1]) // max(count, 1)
    shards = ends.searchsorted(numbers, side="right")
    return np.stack([shards, numbers - (ends - counts)[shards]], axis=1)


def refuse_unlike(readers: Sequence[Reader]) -> None:
    """Raise a UserError unless the data sets of a mix have images of one size, and are different ones."""
    first, *others = readers
    for number, other in enumerate(others, start=1):
        if other.shape != first.shape:
            raise UserError(
                f"data.mix {other.url}: images of {other.shape[0]} x {other.shape[1]} pixels, but {first.url} has "
                f"{first.shape[0]} x {first.shape[1]}; prepare both in one size"
            )
        if same := [reader.url for reader in readers[:number] if reader.fingerprint == other.fingerprint]:
            raise UserError(f"data.mix {other.url}: the same shards as in {same[0]}; leave one of them out")


def middle(
    images: UInt8[Tensor, "batch channels height width"], size: int
) -> UInt8[Tensor, "batch channels size size"]:
    """The middle square of images."""
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[:, :, top : top + size, left : left + size]


def ahead(calls: Iterator, *, workers: int) -> Iterator:
    """Results of an iterator of calls in their order, computed by `workers` threads some calls ahead."""
    if workers == 0:
        yield from (call() for call in calls)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    waiting = [pool.submit(call) for call in islice(calls, workers + 1)]
    try:
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(call) for call in islice(calls, 1)]
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
