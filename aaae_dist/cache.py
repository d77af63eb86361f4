"""A node's bounded cache of remote shards: a folder shared by all ranks, runs and data sets of a user.

A shard is fetched once for all processes, in pieces that go on at the byte reached, even after a process that was
killed. Files are named by the sha256 of the shard, hold its offsets behind it, and appear when the shard is right. The
least recently used make room; what a process has open stays. Locks are those of the files themselves (flock), so that
they end with their process, however that ends.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.failures import explained
from aaae_dist.shards import Shard
from aaae_dist.tars import size_of_offsets

log = logging.getLogger(__name__)

PIECE = 1 << 26  # bytes of a request; it shrinks where requests fail
SMALLEST_PIECE = 1 << 16
READ = 1 << 20  # bytes that are taken from an answer at a time
SLOWER = "the other shards' samples are fetched one by one, which is slower"


class Cache:
    """Remote shards as local files, up to `limit` bytes of them."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder, self.limit, self.told = folder, limit, set[str]()

    def get(self, shard: Shard) -> int | None:
        """Descriptor of a shard that is here; it stays until that is closed. None: it is not here."""
        path = self.folder / f"{shard.sha256}.tar"
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != size(shard):
            path.unlink(missing_ok=True)
        elif lock(file, fcntl.LOCK_SH) and os.fstat(file).st_nlink:
            os.utime(file)  # used last of all
            return file
        os.close(file)
        return None

    def drop(self, shard: Shard, file: int) -> None:
        """Forget a copy that turned out to be damaged, if another has not taken its place already."""
        path = self.folder / f"{shard.sha256}.tar"
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                path.unlink()

    def fetch(self, url: str, shard: Shard, offsets: Callable[[], bytes], *, patience: float) -> int | None:
        """Descriptor of a shard, which is fetched unless it is here; None: no room, or another process is at it.

        Args:
            offsets: fetches its offsets.

        Raises:
            UserError: the store fails for longer than `patience` seconds, or its bytes are not what the index says.
        """
        with explained(str(self.folder)), suppress(FileNotFoundError):  # someone emptied the folder: begin anew
            if (file := self.get(shard)) is not None or (file := self.begin(shard)) is None:
                return file
            try:
                if self.complete(file, url, shard, offsets, patience=patience):
                    lock(file, fcntl.LOCK_SH)
                    return file
                os.close(file)
            except BaseException as error:
                os.close(file)
                if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.part(shard).unlink(missing_ok=True)
                self.tell(self.disk_is_full())
        return None

    def part(self, shard: Shard) -> Path:
        """Where a shard grows; the name says how much room it will take."""
        return self.folder / f"{shard.sha256}.{size(shard)}.part"

    def begin(self, shard: Shard) -> int | None:
        """The file that a shard grows in, for this process alone, if there is room."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.part(shard)
        with (self.folder / ".lock").open("ab") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            if (self.folder / f"{shard.sha256}.tar").exists():  # just now, or looked at by who makes room
                return None
            if not part.exists() and (problem := self.make_room(size(shard))):
                self.tell(problem)
                return None
            file = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(FileNotFoundError):  # completed or given up just now, by another process
            if lock(file, fcntl.LOCK_EX) and os.path.samestat(os.fstat(file), part.stat()):
                if not (self.folder / f"{shard.sha256}.tar").exists():
                    return file
                part.unlink()
        os.close(file)
        return None

    def complete(self, file: int, url: str, shard: Shard, offsets: Callable[[], bytes], *, patience: float) -> bool:
        """Fetch what is missing, and give the file its name if the content is right."""
        digest = hashlib.sha256()
        os.truncate(file, min(os.fstat(file).st_size, shard.bytes))
        while part := os.read(file, READ):  # of a process that was killed
            digest.update(part)
        inherited = os.fstat(file).st_size
        for piece in pieces(url, inherited, shard.bytes, patience=patience):
            digest.update(piece)
            append(file, piece)
        if digest.hexdigest() == shard.sha256:
            append(file, offsets())
            os.fsync(file)
            self.part(shard).rename(self.folder / f"{shard.sha256}.tar")
            return True
        self.part(shard).unlink()
        if not inherited:
            raise UserError(
                f"{url}: its sha256 is not the index's; it was damaged or replaced: prepare the data set anew"
            )
        return False

    def make_room(self, wanted: int) -> str:
        """Remove what was not used for longest until so many bytes fit; not what a process has open.

        Returns:
            Why they do not fit, for a user; nothing if they do.
        """
        held, coming = [], 0  # files: when they were used, the bytes that they take; bytes promised and not yet written
        for path in self.folder.glob("*.part"):  # before the tars: what becomes one meanwhile counts twice, not never
            used, written, promised = 0, 0, re.fullmatch(r"\w+\.(\d+)\.part", path.name)
            with suppress(FileNotFoundError):
                about = path.stat()
                used, written = about.st_mtime_ns, about.st_size
            if promised:
                held.append((used, int(promised[1]), path))
                coming += int(promised[1]) - written
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                about = path.stat()
                held.append((about.st_mtime_ns, about.st_size, path))
        total, disk = sum(takes for _, takes, _ in held), os.statvfs(self.folder)
        room, space = self.limit - total, disk.f_bavail * disk.f_frsize - coming
        for remove in (False, True) if min(room, space) + total >= wanted else ():
            freed = 0  # first to see whether it suffices: in vain, nothing goes
            for _, takes, path in sorted(held):
                if min(room, space) + freed >= wanted:
                    break
                # Open for writing, which NFS asks for; what another user put there is not ours to remove.
                with suppress(FileNotFoundError, PermissionError), path.open("rb+") as file:
                    if lock(file.fileno(), fcntl.LOCK_EX):
                        if remove:
                            path.unlink()
                        freed += takes
            if remove or min(room, space) + freed < wanted:
                room, space = room + freed, space + freed
                break
        if room < wanted:
            limit = f"data.cache_gb {self.limit / 1e9:g}"
            return f"{limit}: it does not hold all shards in play; {SLOWER}: raise it, or lower data.window"
        return self.disk_is_full() if space < wanted else ""

    def disk_is_full(self) -> str:
        return f"{self.folder}: no space left; {SLOWER}: free some, or set data.cache to a larger disk"

    def tell(self, problem: str) -> None:
        """Warn of a problem, once."""
        if problem not in self.told:
            log.warning(problem)
        self.told.add(problem)


def size(shard: Shard) -> int:
    """Bytes of the file of a shard in the cache."""
    return shard.bytes + size_of_offsets(shard.samples)


def append(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def lock(file: int, kind: int) -> bool:
    """Lock an open file, or say that another holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def pieces(url: str, start: int, stop: int, *, patience: float) -> Iterator[bytes]:
    """Bytes of a remote file as they come, going on at the byte reached whenever a request ends before its time.

    Raises:
        UserError: no byte came for `patience` seconds.
    """
    answer: Iterator[bytes] = iter(())
    size = PIECE

    def attempt(store: fsspec.AbstractFileSystem, path: str) -> bytes:
        nonlocal answer, size
        if found := next(answer, b""):
            return found
        try:
            answer = request(store, path, start, min(start + size, stop))
            if not (found := next(answer, b"")):
                raise ConnectionError("no bytes arrived")
        except Exception:
            size = max(size // 2, SMALLEST_PIECE)
            raise
        size = min(size * 2, PIECE)
        return found

    while start < stop:
        found = storage.persistently(url, attempt, patience=patience)
        yield found
        start += len(found)


def request(store: fsspec.AbstractFileSystem, path: str, start: int, stop: int) -> Iterator[bytes]:
    """The answer to one request for a range of a file: of S3 as it comes, so that a cut loses nothing; else at once."""
    s3: Any = store if store.protocol in ("s3", ("s3", "s3a")) else None
    if s3 is None:
        yield storage.part(store, path, start, stop)
        return
    bucket, key, _ = s3.split_path(path)
    body = s3.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
    try:
        while found := sync(s3.loop, body.read, READ):
            yield found
    finally:
        body.close()
