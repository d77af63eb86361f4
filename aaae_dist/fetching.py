"""The bytes of samples, by their place: from a disk of this node, the node's cache, or the store."""

import logging
import os
import re
import resource
import threading
import time
import zlib
from collections import deque
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from aaae_dist import storage
from aaae_dist.cache import Cache
from aaae_dist.config import Data
from aaae_dist.errors import UserError
from aaae_dist.failures import explained, reason
from aaae_dist.shards import Shard, url_of
from aaae_dist.tars import Offsets, load_offsets, size_of_offsets

log = logging.getLogger(__name__)

Place = tuple[int, int]  # of a sample: its shard's number, and its own number in the shard

REQUESTS = 32  # at a time, for single samples
DOWNLOADS = 4  # at a time, of whole shards
OPEN_FILES = 1 << 16


class Opened:
    """A file that is closed when its last user lets go of it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class Fetcher:
    """Bytes of samples of some shards. Safe to use from several threads.

    Local shards are read where they are. Those of a store are fetched whole, ahead of their use as `plan` says, into
    the node's cache; until one is there, and if the cache cannot hold it, its samples are fetched one by one. Every
    sample's bytes are checked against the checksum that was made when it was written.
    """

    def __init__(self, url: str, shards: Sequence[Shard], data: Data) -> None:
        """Nothing is opened or fetched yet.

        Args:
            url: of the data set, below which the shards are.
            data: says where the cache is and how large, and for how long a failing store is asked again.
        """
        self.url, self.shards, self.patience = url, shards, data.patience
        self.urls = [url_of(url, shard.url) for shard in shards]
        self.local = [storage.is_local(url) for url in self.urls]
        home = Path(re.sub("^(file|local)://", "", data.cache) or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        self.cache = Cache(home.expanduser() / "aaae_dist", limit=int(data.cache_gb * 1e9))
        if not all(self.local):
            if not storage.is_local(data.cache):
                raise UserError(f"data.cache {data.cache}: not a folder of this machine; name one")
            with explained(f"data.cache {home}"):
                self.cache.folder.mkdir(parents=True, exist_ok=True)

        self.files: dict[int, Opened] = {}  # opened shards
        self.offsets: dict[int, Offsets] = {}
        self.locks = [threading.Lock() for _ in shards]
        allow_open_files()
        self.requests = ThreadPoolExecutor(REQUESTS, thread_name_prefix="samples")

        self.plans: dict[str, list[int]] = {}
        self.underway: set[int] = set()
        self.downloads = 0  # threads at work
        self.asking = 0  # threads that wait for single samples
        self.changed = threading.Condition()
        self.failure: UserError | None = None

    def chunks(self, places: Sequence[Place]) -> dict[Place, bytes]:
        """The bytes of samples; those that are to be fetched, many at a time.

        Raises:
            UserError: the store fails, or they are not what the index promises.
        """
        self.refuse_failure()
        unknown = {shard for shard, _ in places if shard not in self.offsets}
        deque(self.requests.map(self.load_offsets, unknown), maxlen=0)
        there = {place: self.chunk(place) for place in places if place[0] in self.files or self.file(place[0])}
        missing = [place for place in places if place not in there]
        if not missing:
            return there
        with self.changed:
            self.asking += 1
        try:
            return there | dict(zip(missing, self.requests.map(self.chunk, missing), strict=True))
        finally:
            with self.changed:
                self.asking -= 1
                self.changed.notify_all()

    def refuse_failure(self) -> None:
        """Raise the UserError, if any, that ended the fetching of a shard ahead of its use."""
        if self.failure:
            raise self.failure

    def chunk(self, place: Place) -> bytes:
        """The bytes of a sample's members, as they lie in the tar.

        Raises:
            UserError: the store fails, or they are not what the index promises.
        """
        shard, number = place
        offsets = self.offsets.get(shard) or self.load_offsets(shard)
        start, stop = offsets.span(number)
        file = self.files.get(shard) or self.file(shard)
        data = self.from_disk(shard, file, start, stop) if file else self.stored(shard, start, stop)
        if zlib.crc32(data) == offsets.checksums[number]:
            return data
        if not self.local[shard]:
            self.drop_copy(shard, file)
            offsets = load_offsets(self.stored_offsets(shard), samples=self.shards[shard].samples)
            start, stop = offsets.span(number)
            data = self.stored(shard, start, stop)
            if zlib.crc32(data) == offsets.checksums[number]:
                self.offsets[shard] = offsets
                return data
        raise UserError(
            f"{self.urls[shard]}: sample {number} (bytes {start} to {stop}) is not what was indexed; it was damaged "
            "or replaced: prepare the data set anew"
        )

    def from_disk(self, shard: int, file: Opened, start: int, stop: int) -> bytes:
        """A part of a shard, from a disk; nothing, as of a damaged copy, if the cache's disk fails."""
        try:
            return os.pread(file.descriptor, stop - start, start)
        except OSError as error:
            if not self.local[shard]:
                return b""
            raise UserError(f"{self.urls[shard]}: {reason(error)}") from error

    def stored(self, shard: int, start: int, stop: int) -> bytes:
        """A part of a shard, from the store."""
        return storage.read(self.urls[shard], start, stop, patience=self.patience)

    def load_offsets(self, shard: int) -> Offsets:
        """Where the samples of a shard lie, as its cached copy says, or the store."""
        copy, about = None if self.local[shard] else self.file(shard), self.shards[shard]
        with self.locks[shard]:
            if found := self.offsets.get(shard):
                return found
            if copy:
                data = self.from_disk(shard, copy, about.bytes, about.bytes + size_of_offsets(about.samples))
            else:
                data = self.stored_offsets(shard)
            with suppress(ValueError):
                self.offsets[shard] = found = load_offsets(data, samples=about.samples)
                return found
        self.drop_copy(shard, copy)
        return self.load_offsets(shard)

    def stored_offsets(self, shard: int) -> bytes:
        """The file of offsets that lies beside a shard."""
        url, samples = url_of(self.url, self.shards[shard].offsets), self.shards[shard].samples
        data = storage.read(url, 0, size_of_offsets(samples) + 1, patience=self.patience)
        try:
            load_offsets(data, samples=samples)
        except ValueError as error:
            raise UserError(f"{url}: {error}; it was damaged or replaced: prepare the data set anew") from None
        return data

    def drop_copy(self, shard: int, copy: Opened | None) -> None:
        """Forget a copy in the cache that is damaged; the first thread to see it lets it be fetched again."""
        with self.changed:
            if copy and self.files.get(shard) is copy:
                log.warning("%s: its copy in %s is damaged; fetched again", self.urls[shard], self.cache.folder)
                self.cache.drop(self.shards[shard], copy.descriptor)
                self.forget(shard)
                self.bring_missing()

    def file(self, shard: int) -> Opened | None:
        """A shard that is on a disk of this node, opened; none if it is to be fetched."""
        with self.locks[shard], explained(self.urls[shard]):
            if file := self.files.get(shard):
                return file
            if self.local[shard]:
                descriptor = os.open(storage.local_path(self.urls[shard]), os.O_RDONLY)
            elif (descriptor := self.cache.get(self.shards[shard])) is None:
                return None
            self.files[shard] = file = Opened(descriptor)
            return file

    # --- shards ahead of their use

    def plan(self, user: str, shards: Sequence[int]) -> None:
        """Say which shards `user` will need, the first first; those that no user needs any more are let go."""
        with self.changed:
            self.plans[user] = [shard for shard in shards if not self.local[shard]]
            self.let_go(self.planned())
            self.changed.notify_all()
            self.bring_missing()

    def let_go(self, planned: Container[int]) -> None:
        """Forget the other shards of a store, so that they can make room."""
        for shard in {*self.files, *self.offsets}:
            if not self.local[shard] and shard not in planned:
                self.forget(shard)

    def forget(self, shard: int) -> None:
        """Let go of a shard and of what it told; it is closed when its last users are done with it."""
        self.files.pop(shard, None)
        self.offsets.pop(shard, None)

    def bring_missing(self) -> None:
        """Start threads for the planned shards that are not here, or whose copy was dropped, by a worker perhaps."""
        for shard, file in list(self.files.items()):
            if not self.local[shard] and not is_named(file.descriptor):
                self.forget(shard)
        missing = self.planned().keys() - self.files.keys()
        for _ in range(min(DOWNLOADS, len(missing)) - self.downloads):
            threading.Thread(target=self.bring, name="shards", daemon=True).start()
            self.downloads += 1

    def planned(self) -> dict[int, None]:
        return dict.fromkeys(shard for plan in self.plans.values() for shard in plan)

    def bring(self) -> None:
        """Fetch planned shards until all are there."""
        while (shard := self.next_missing()) is not None:
            file = None
            try:
                with self.changed:  # someone waits for single samples: these go first
                    self.changed.wait_for(lambda: not self.asking, timeout=1.0)
                file = self.cache.fetch(
                    self.urls[shard],
                    self.shards[shard],
                    partial(self.stored_offsets, shard),
                    patience=self.patience,
                )
            except UserError as error:
                self.failure = error
            with self.changed:
                self.underway.discard(shard)
                if file is not None and shard in self.planned():
                    self.files[shard] = Opened(file)
                    self.changed.notify_all()
                elif file is not None:
                    os.close(file)
            if file is None and not self.failure:
                time.sleep(1.0)  # for room, or for the process that is at it

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


def is_named(descriptor: int) -> bool:
    """Whether an open file still has a name in its folder."""
    try:
        return os.fstat(descriptor).st_nlink > 0
    except OSError:  # on NFS another node may have removed it
        return False


def allow_open_files() -> None:
    """Raise this process's soft limit of open files, often 1,024, as far as it may: shards in use are kept open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
