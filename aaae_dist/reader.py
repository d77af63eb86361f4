"""Reading samples by number: an index, and the bytes that `fetching.py` brings -> decoded pixels."""

import hashlib
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.errors import UserError, one_line
from aaae_dist.fetching import Fetcher, Place
from aaae_dist.images import decode_into
from aaae_dist.shards import INDEX, Index, Shard, image_of, label_of, read_index
from aaae_dist.tars import read_sample

log = logging.getLogger(__name__)

KEPT_BYTES = 1 << 26  # a split that takes no more than 64 MB decoded is decoded once
FORGIVEN = 10  # unreadable samples that stop no run, however small the data set


class Told(NamedTuple):
    """What is told of decoded samples; the seconds that it took to get their bytes and to decode them, and the time,
    by the machine's `time.perf_counter()`, when that was done.
    """

    keys: list[str]
    labels: list[int | None]
    fetching: float
    decoding: float
    finished: float


class Bad(NamedTuple):
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    reason: str


class Reader:
    """Samples of one split. Safe to use from several threads."""

    def __init__(self, data: Data, *, split: str, url: str = "", index: Index | None = None) -> None:
        """Read the index and see that the split is there, whole, and of the shape that `data` says.

        Args:
            url: of the data set, if not `data.url`.
            index: of the data set, if it was read and checked before.

        Raises:
            UserError: it is not.
        """
        self.data, self.url, self.split = data, url or data.url, split
        self.index = index or read_index(self.url, patience=data.patience)
        self.shards = [shard for shard in self.index.shards if shard.split == split]
        if not index:
            check(self.index, data=data, url=self.url, split=split)
        self.fingerprint = hashlib.sha256(  # of the split: changes when any shard does
            "\n".join(f"{shard.url} {shard.samples} {shard.sha256}" for shard in self.shards).encode()
        ).hexdigest()[:16]
        self.fetcher = Fetcher(self.url, self.shards, data)

        self.bad: dict[Place, Bad] = {}
        self.keep = len(self) * self.index.height * self.index.width * self.index.channels <= KEPT_BYTES
        self.kept: dict[Place, tuple[np.ndarray, str, int | None]] = {}

    @property
    def counts(self) -> list[int]:
        return [shard.samples for shard in self.shards]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.index.height, self.index.width, self.index.channels

    def read(self, places: Int64[np.ndarray, "n 2"], pixels: UInt8[np.ndarray, "n height width channels"]) -> Told:
        """Decode samples, given by (shard, number), into `pixels`.

        One that cannot be used is counted, noted in `bad`, and replaced by the next usable one of its shard.

        Raises:
            UserError: the store fails, bytes are not what the index promises, or too many samples cannot be used.
        """
        began = time.perf_counter()
        wanted = [(shard, number) for shard, number in places.tolist()]
        chunks = self.fetcher.chunks([place for place in wanted if place not in self.kept])
        fetched = time.perf_counter()
        keys, labels = [], []
        for row, place in zip(pixels, wanted, strict=True):
            if kept := self.kept.get(place):
                row[:], key, label = kept
            else:
                try:
                    key, label = self.decode(row, chunks[place])
                except ValueError as error:
                    key, label = self.substitute(row, place, error)
                if self.keep:
                    self.kept[place] = row.copy(), key, label
            keys.append(key)
            labels.append(label)
        finished = time.perf_counter()
        return Told(keys, labels, fetched - began, finished - fetched, finished)

    # --- from bytes to pixels

    def decode(self, pixels: UInt8[np.ndarray, "height width channels"], chunk: bytes) -> tuple[str, int | None]:
        """Decode the image of a sample into `pixels`; its key and label.

        Raises:
            ValueError: it cannot be used.
        """
        key, members = read_sample(chunk)
        decode_into(pixels, image_of(members))
        return key, label_of(members, self.index.classes)

    def substitute(self, pixels: np.ndarray, place: Place, error: ValueError) -> tuple[str, int | None]:
        """Decode the next usable sample of the shard instead of one that is not."""
        shard, number = place
        count = self.shards[shard].samples
        self.note(place, error)
        for other in ((number + step) % count for step in range(1, count)):
            try:
                return self.decode(pixels, self.fetcher.chunk((shard, other)))
            except ValueError as another:
                self.note((shard, other), another)
        raise UserError(
            f"{self.fetcher.urls[shard]}: none of its {count} samples can be read; prepare the data set anew"
        )

    def note(self, place: Place, error: ValueError) -> None:
        """Remember a sample that cannot be used.

        Raises:
            UserError: there are too many.
        """
        try:
            key = read_sample(self.fetcher.chunk(place))[0]
        except ValueError:
            key = str(place[1])
        self.meet(place, Bad(self.fetcher.urls[place[0]], key, one_line(error)))

    def meet(self, place: Place, found: Bad) -> None:
        """`note` for what a worker noted."""
        if self.bad.setdefault(place, found) is not found:
            return
        log.warning(
            "%s: sample %s cannot be read (%s); its neighbour takes its place", found.shard, found.key, found.reason
        )
        self.refuse_too_many(len(self.bad))

    def refuse_too_many(self, bad: int) -> None:
        """Raise a UserError if so many samples that cannot be used, over all ranks, are too many."""
        if bad > max(FORGIVEN, self.data.bad_share * len(self)):
            raise UserError(
                f"{self.url}: {bad} unreadable samples, more than data.bad_share = {self.data.bad_share} allows; "
                "prepare the data set anew, or raise it"
            )


def check(index: Index, *, data: Data, url: str, split: str) -> None:
    """Raise a UserError unless the index has this split, its images have this shape, and its shards are there."""
    place, splits = storage.join(url, INDEX), sorted({shard.split for shard in index.shards})
    if split not in splits:
        raise UserError(
            f'data.split or data.held_out "{split}": {place} has only {", ".join(splits)}; choose one of these'
        )
    found, wanted = (index.channels, index.height, index.width), (data.channels, data.size, data.size)
    fits = found == wanted or (data.crop and found[0] == wanted[0] and min(found[1:]) > data.size)
    if not fits and url != data.url:
        raise UserError(
            f"data.mix {url}: {index.channels} channels of {index.height} x {index.width} pixels, but {data.url} is "
            f"read as {data.channels} of {data.size} x {data.size}; prepare both alike"
        )
    if not fits:
        raise UserError(
            f"data.channels {data.channels}, data.size {data.size}: {place} says {index.channels} channels of "
            f"{index.height} x {index.width} pixels; set both to what was prepared"
            + (", or data.size lower and data.crop = true" if not data.crop else ", or data.size lower")
        )
    chosen = [shard for shard in index.shards if shard.split == split]
    if not sum(shard.samples for shard in chosen):
        raise UserError(f'{place}: split "{split}" is empty; prepare the data set anew')
    refuse_incomplete(url, chosen, patience=data.patience)


def refuse_incomplete(url: str, shards: Sequence[Shard], *, patience: float) -> None:
    """Raise a UserError unless all shards are there, as long as the index says, as far as one listing tells."""
    there: dict[str, int] = {}
    if not storage.is_web(url):  # a web page is no listing
        try:
            there = storage.listing(url, patience=patience)
        except UserError as problem:
            if not isinstance(problem.__cause__, PermissionError):  # who may read need not be allowed to list
                raise
    chosen = [shard for shard in shards if there and "/" not in shard.url]
    if missing := [shard.url for shard in chosen if shard.url not in there]:
        raise UserError(
            f"{storage.join(url, missing[0])}: no such file, {len(missing)} of {len(chosen)} shards are missing; "
            "bring them back or prepare the data set anew"
        )
    if cut := [shard for shard in chosen if there[shard.url] != shard.bytes]:
        raise UserError(
            f"{storage.join(url, cut[0].url)}: {there[cut[0].url]} bytes, but the index says {cut[0].bytes}; it was "
            "cut short or replaced: prepare the data set anew"
        )
