"""Reading samples by number: an index -> bytes from disk, cache or store -> checked, decoded pixels."""

import hashlib
import logging
import os
import resource
import threading
import time
import zlib
from collections import deque
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from aaae_dist import storage
from aaae_dist.cache import Cache
from aaae_dist.config import Data
from aaae_dist.errors import UserError
from aaae_dist.images import decode_into
from aaae_dist.shards import INDEX, Index, Shard, image_of, label_of, read_index
from aaae_dist.shards import place as url_of
from aaae_dist.tars import Offsets, load_offsets, read_sample, size_of_offsets

log = logging.getLogger(__name__)

Place = tuple[int, int]  # of a sample: its shard's number, and its own number in the shard

KEPT_BYTES = 1 << 26  # a split that takes no more than 64 MB decoded is decoded once
FORGIVEN = 10  # unreadable samples that stop no run, however small the data set
REQUESTS = 16  # at a time, for single samples
DOWNLOADS = 4  # at a time, of whole shards


class Told(NamedTuple):
    """What is told of decoded samples, and the seconds that it took to get their bytes and to decode them."""

    keys: list[str]
    labels: list[int | None]
    fetching: float
    decoding: float


class Opened:
    """A file that is closed when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class Bad(NamedTuple):
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    reason: str


class Reader:
    """Samples of one split. Safe to use from several threads.

    Local shards are read where they are. Those of a store are fetched whole, ahead of their use as `plan` says, into
    the node's cache; until one is there, and if the cache cannot hold it, its samples are fetched one by one. Every
    sample's bytes are checked against the checksum that was made when it was written.
    """

    def __init__(self, data: Data, *, split: str, url: str = "", index: Index | None = None) -> None:
        """Read the index and see that the split is there, whole, and of the shape that `data` says.

        Args:
            url: of the data set, if not `data.url`.
            index: of the data set, if it was read and checked before.

        Raises:
            UserError: it is not.
        """
        self.data, self.url, self.split = data, url or data.url, split
        self.index = index or read_index(self.url)
        self.shards = [shard for shard in self.index.shards if shard.split == split]
        if not index:
            check(self.index, data=data, url=self.url, split=split)
        self.fingerprint = hashlib.sha256(  # of the split: changes when any shard does
            "\n".join(f"{shard.url} {shard.samples} {shard.sha256}" for shard in self.shards).encode()
        ).hexdigest()[:16]
        self.places = [url_of(self.url, shard.url) for shard in self.shards]
        self.local = [storage.is_local(place) for place in self.places]
        home = Path(data.cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache = Cache(home / "aaae_dist", limit=int(data.cache_gb * 1e9))

        self.files: dict[int, Opened] = {}  # opened shards
        self.offsets: dict[int, Offsets] = {}
        self.locks = [threading.Lock() for _ in self.shards]
        if any(self.local):
            allow_open_files(len(self.shards))
        self.requests = ThreadPoolExecutor(REQUESTS, thread_name_prefix="samples")

        self.bad: dict[Place, Bad] = {}
        self.keep = len(self) * self.index.height * self.index.width * self.index.channels <= KEPT_BYTES
        self.kept: dict[Place, tuple[np.ndarray, str, int | None]] = {}

        self.plans: dict[str, list[int]] = {}
        self.underway: set[int] = set()
        self.downloads = 0  # threads at work
        self.changed = threading.Condition()
        self.failure: UserError | None = None

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
        if self.failure:
            raise self.failure
        began = time.perf_counter()
        wanted = [(shard, number) for shard, number in places.tolist()]
        chunks = self.chunks([place for place in wanted if place not in self.kept])
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
        return Told(keys, labels, fetched - began, time.perf_counter() - fetched)

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
                return self.decode(pixels, self.chunk((shard, other)))
            except ValueError as another:
                self.note((shard, other), another)
        raise UserError(f"{self.places[shard]}: none of its {count} samples can be read; prepare the data set anew")

    def note(self, place: Place, error: ValueError) -> None:
        """Remember a sample that cannot be used.

        Raises:
            UserError: there are too many.
        """
        try:
            key = read_sample(self.chunk(place))[0]
        except ValueError:
            key = str(place[1])
        self.meet(place, Bad(self.places[place[0]], key, storage.one_line(error)))

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

    # --- from a place to bytes

    def chunks(self, places: Sequence[Place]) -> dict[Place, bytes]:
        """The bytes of samples; those that are to be fetched, many at a time."""
        unknown = {shard for shard, _ in places if shard not in self.offsets}
        deque(self.requests.map(self.load_offsets, unknown), maxlen=0)
        there = {place: self.chunk(place) for place in places if place[0] in self.files or self.file(place[0])}
        missing = [place for place in places if place not in there]
        return there | dict(zip(missing, self.requests.map(self.chunk, missing), strict=True))

    def chunk(self, place: Place) -> bytes:
        """The bytes of a sample's members, as they lie in the tar.

        Raises:
            UserError: the store fails, or they are not what the index promises.
        """
        shard, number = place
        offsets = self.offsets.get(shard) or self.load_offsets(shard)
        start, stop = offsets.span(number)
        checksum = offsets.checksums[number]
        if file := self.files.get(shard) or self.file(shard):
            data = os.pread(file.descriptor, stop - start, start)
            if zlib.crc32(data) == checksum:
                return data
        if not self.local[shard]:
            if file:
                log.warning("%s: its copy in %s is damaged; fetched again", self.places[shard], self.cache.folder)
                self.cache.drop(self.shards[shard])
                self.files.pop(shard, None)
            data = storage.read(self.places[shard], start, stop, patience=self.data.patience)
            if zlib.crc32(data) == checksum:
                return data
        raise UserError(
            f"{self.places[shard]}: sample {number} (bytes {start} to {stop}) is not what was indexed; it was damaged "
            "or replaced: prepare the data set anew"
        )

    def load_offsets(self, shard: int) -> Offsets:
        """Where the samples of a shard lie."""
        with self.locks[shard]:
            if shard not in self.offsets:
                url = url_of(self.url, self.shards[shard].offsets)
                samples = self.shards[shard].samples
                data = storage.read(url, 0, size_of_offsets(samples) + 1, patience=self.data.patience)
                try:
                    self.offsets[shard] = load_offsets(data, samples=samples)
                except ValueError as error:
                    raise UserError(f"{url}: {error}; it was damaged or replaced: prepare the data set anew") from None
            return self.offsets[shard]

    def file(self, shard: int) -> Opened | None:
        """A shard that is on a disk of this node, opened; none if it is to be fetched."""
        with self.locks[shard], storage.explained(self.places[shard]):
            if file := self.files.get(shard):
                return file
            if self.local[shard]:
                descriptor = os.open(storage.local_path(self.places[shard]), os.O_RDONLY)
            elif (descriptor := self.cache.get(self.shards[shard])) is None:
                return None
            self.files[shard] = file = Opened(descriptor)
            return file

    # --- shards ahead of their use

    def plan(self, user: str, shards: Sequence[int]) -> None:
        """Say which shards `user` will need, the first first; those that no user needs any more are let go."""
        with self.changed:
            self.plans[user] = [shard for shard in shards if not self.local[shard]]
            planned = self.planned()
            self.let_go(planned)
            self.changed.notify_all()
            for _ in range(min(DOWNLOADS, len(planned)) - self.downloads):
                threading.Thread(target=self.bring, name="shards", daemon=True).start()
                self.downloads += 1

    def let_go(self, planned: Container[int]) -> None:
        """Close the other cached shards, so that they can make room, when their last users are done with them."""
        for shard in [shard for shard in self.files if not self.local[shard] and shard not in planned]:
            del self.files[shard]

    def planned(self) -> dict[int, None]:
        return dict.fromkeys(shard for plan in self.plans.values() for shard in plan)

    def bring(self) -> None:
        """Fetch planned shards until all are there."""
        while (shard := self.next_missing()) is not None:
            file = None
            try:
                file = self.cache.fetch(self.places[shard], self.shards[shard], patience=self.data.patience)
            except UserError as error:
                self.failure = error
            with self.changed:
                self.underway.discard(shard)
                if file is None:
                    self.changed.wait(1.0)  # for room, or for the process that is at it
                elif shard in self.planned():
                    self.files[shard] = Opened(file)
                else:
                    os.close(file)
                self.changed.notify_all()

    def next_missing(self) -> int | None:
        """The planned shard that a thread is to fetch; none when its work is done."""
        with self.changed:
            missing = (s for s in self.planned() if s not in self.files and s not in self.underway)
            shard = None if self.failure else next(missing, None)
            if shard is None:
                self.downloads -= 1
            else:
                self.underway.add(shard)
            return shard


def allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files, often 1,024, if a reader of so many shards may need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and 2 * count + 256 > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check(index: Index, *, data: Data, url: str, split: str) -> None:
    """Raise a UserError unless the index has this split, its images have this shape, and its shards are there."""
    place, splits = storage.join(url, INDEX), sorted({shard.split for shard in index.shards})
    if split not in splits:
        raise UserError(
            f'data.split or data.held_out "{split}": {place} has only {", ".join(splits)}; choose one of these'
        )
    found, wanted = (index.channels, index.height, index.width), (data.channels, data.size, data.size)
    if found != wanted and not (data.crop and found[0] == wanted[0] and min(found[1:]) > data.size):
        raise UserError(
            f"data.channels {data.channels}, data.size {data.size}: {place} says {index.channels} channels of "
            f"{index.height} x {index.width} pixels; set both to what was prepared"
            + (", or data.size lower and data.crop = true" if not data.crop else ", or data.size lower")
        )
    chosen = [shard for shard in index.shards if shard.split == split]
    if not sum(shard.samples for shard in chosen):
        raise UserError(f'{place}: split "{split}" is empty; prepare the data set anew')
    refuse_incomplete(url, chosen)


def refuse_incomplete(url: str, shards: Sequence[Shard]) -> None:
    """Raise a UserError unless all shards are there, as long as the index says, as far as one listing tells."""
    there = storage.listing(url) if not url.startswith(("http://", "https://")) else {}  # a web page is no listing
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
