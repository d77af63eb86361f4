"""Zip and gzipped tar archives, read where they are, on any fsspec filesystem.

Nothing is unpacked to a place that a name in an archive chooses. A damaged archive is one line that names it; a damaged
member, a ValueError.
"""

import errno
import gzip
import io
import os
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from aaae_dist import storage
from aaae_dist.errors import UserError, one_line
from aaae_dist.failures import explained

LARGEST = 1 << 28  # bytes of an unpacked member: no picture has more, a decompression bomb has
CHUNK = 1 << 22  # bytes of a read
HEADER = 30  # bytes before a member of a zip, besides its name and an extra field of at most 65,535 each


def damaged(url: str, what: str, error: BaseException | str) -> UserError:
    reason = error if isinstance(error, str) else one_line(error)
    return UserError(f"{url}: not {what}, or cut short ({reason}); download it again")


class Ranges(io.RawIOBase):
    """A file at any URL, to seek and read in. Every read is one of a range, which storage tries again if need be."""

    def __init__(self, url: str) -> None:
        size = storage.persistently(url, lambda store, path: store.size(path))
        if size is None:
            raise UserError(f"{url}: its server does not tell how long it is; download it first")
        self.url, self.size, self.at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "a place before its beginning")
        self.at = at
        return at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.size)
        data = storage.read(self.url, self.at, stop) if stop > self.at else b""
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Entry(NamedTuple):
    """A member of a zip: its first byte and the one after its last, header and all, and what it unpacks to."""

    start: int
    stop: int
    packed: int
    size: int
    checksum: int
    method: int


class Zip:
    """Members of a zip at any URL, by name. Each is one ranged read; threads need no lock.

    Raises:
        UserError: it is not a zip, or the store fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            with io.BufferedReader(Ranges(url), CHUNK) as file, zipfile.ZipFile(file) as archive:
                members = sorted(archive.infolist(), key=lambda member: member.header_offset)
                bounds = [*(member.header_offset for member in members), archive.start_dir]
            if bounds != sorted(bounds):
                raise ValueError("its directory names places behind itself")
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, struct.error, NotImplementedError) as error:
            raise damaged(url, "a zip file", error) from None
        self.entries = {
            member.filename: Entry(a, b, member.compress_size, member.file_size, member.CRC, member.compress_type)
            for member, (a, b) in zip(members, pairwise(bounds), strict=True)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> bytes:
        """A member, unpacked.

        Raises:
            ValueError: it is damaged, or unpacks to more than 256 MiB.
            UserError: the store fails.
        """
        entry = self.entries[name]
        if max(entry.size, entry.packed) > LARGEST:
            raise ValueError(f"a decompression bomb: {entry.size} bytes")
        stop = min(entry.stop, entry.start + HEADER + 2 * 0xFFFF + entry.packed)
        data = storage.read(self.url, entry.start, stop) if stop > entry.start else b""
        if len(data) < HEADER or not data.startswith(b"PK\3\4"):
            raise ValueError("it is not where the zip's directory says")
        begin = HEADER + sum(struct.unpack_from("<2H", data, HEADER - 4))  # behind the name and the extra field
        data = data[begin : begin + entry.packed]
        if entry.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, entry.size + 1)
            except zlib.error as error:
                raise ValueError(f"damaged in the zip: {error}") from None
        elif entry.method != zipfile.ZIP_STORED:
            raise ValueError(f"packed by method {entry.method} of zip; only stored and deflated members are read")
        if len(data) != entry.size or zlib.crc32(data) != entry.checksum:
            raise ValueError("damaged in the zip: its size or checksum differs")
        return data


class Tgz:
    """Members of a gzipped tar at any URL, by name, from an unpacked copy in an unnamed temporary file.

    A gzip has no random access, so it is unpacked once, to the disk (TMPDIR); the copy ends with this object. Threads
    need no lock.

    Raises:
        UserError: it is not a gzipped tar, the store fails, or the disk is full.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with explained(tempfile.gettempdir()):
            self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  it lives as long as this object
        weakref.finalize(self, self.file.close)
        try:
            with io.BufferedReader(Ranges(url), CHUNK) as packed, gzip.GzipFile(fileobj=packed) as unpacked:
                while chunk := unpacked.read(CHUNK):
                    self.write(chunk)
            self.file.seek(0)
            with tarfile.open(fileobj=self.file, mode="r:") as tar:
                self.spans = {member.name: (member.offset_data, member.size) for member in tar if member.isfile()}
            if any(begin + size > os.fstat(self.file.fileno()).st_size for begin, size in self.spans.values()):
                raise ValueError("its last file is not whole")
        except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
            raise damaged(url, "a gzipped tar", error) from None

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        with explained(f"{tempfile.gettempdir()} (TMPDIR), to unpack {self.url}"):
            while rest:
                rest = rest[self.file.write(rest) :]

    def __contains__(self, name: str) -> bool:
        return name in self.spans

    def read(self, name: str) -> bytes:
        """A member.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.spans:
            raise UserError(f"{self.url}: it holds no {name}; download it again")
        begin, size = self.spans[name]
        with explained(self.url):
            return os.pread(self.file.fileno(), size, begin)


def require(archive: Zip | Tgz, names: Sequence[str]) -> None:
    """Raise a UserError unless the archive has members of all these names."""
    if missing := [name for name in names if name not in archive]:
        raise UserError(
            f"{archive.url}: {len(missing)} of {len(names)} images are missing, first {missing[0]}; download it again"
        )
