"""A webdataset tar as bytes: where its samples lie, and what a sample holds.

A sample is a run of members whose names are equal up to the first dot, its *key*; the rest is the member's
*extension* (webdataset's convention). Beside every shard lies a small file of *offsets*: where each sample begins, and
its checksum. So a sample is one read, at any place of the shard, local or remote, and damage is met where it is.
"""

import io
import struct
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

BLOCK = 512  # bytes: members begin at multiples
PLAIN = b"0\0"  # type of a member that is a file


class Offsets(NamedTuple):
    """Of n samples: where they begin, in blocks, and last where the last one ends (n + 1); their CRC-32 (n)."""

    starts: Sequence[int]
    checksums: Sequence[int]

    def span(self, number: int) -> tuple[int, int]:
        """First byte of a sample, and the one after its last."""
        return self.starts[number] * BLOCK, self.starts[number + 1] * BLOCK

    def dump(self) -> bytes:
        """As the file of offsets: 2 n + 1 little-endian uint32."""
        return struct.pack(f"<{2 * len(self.checksums) + 1}I", *self.starts, *self.checksums)


def size_of_offsets(samples: int) -> int:
    """Bytes of the file of offsets of so many samples."""
    return 4 * (2 * samples + 1)


def load_offsets(data: bytes, *, samples: int) -> Offsets:
    """Offsets from their file.

    Raises:
        ValueError: it is not that of so many samples.
    """
    if len(data) != (size := size_of_offsets(samples)):
        raise ValueError(f"not the {size} bytes of {samples} samples")
    values = array("I", data)  # 4 bytes a number, and faster to look into than numpy's
    if sys.byteorder == "big":
        values.byteswap()
    starts = values[: samples + 1]
    if any(start >= stop for start, stop in pairwise(starts)):
        raise ValueError("the samples do not begin one after another")
    return Offsets(starts, values[samples + 1 :])


def scan(data: bytes) -> tuple[Offsets, list[str]]:
    """Offsets and keys of a whole tar's samples. What belongs to none, such as folders, is passed over.

    Raises:
        ValueError: it is not a tar, or cut short.
    """
    starts, keys, end, last = [], [], 0, 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                last = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isfile() else 0)
                key, extension = split_name(member.name)
                if not member.isfile() or not extension:
                    continue
                if not keys or keys[-1] != key:
                    starts.append(member.offset)
                    keys.append(key)
                end = last
    except tarfile.TarError as error:
        raise ValueError(f"not a tar file: {error}") from None
    if data[last : last + BLOCK] != bytes(BLOCK):
        raise ValueError(f"cut short: {len(data)} bytes, without the empty block at a tar's end")
    bounds = [*starts, end]
    checksums = [zlib.crc32(data[a:b]) for a, b in pairwise(bounds)]
    return Offsets([bound // BLOCK for bound in bounds], checksums), keys


def read_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """Key of a sample, and its members by extension, from the bytes of its span.

    Raises:
        ValueError: these are no members of a tar.
    """
    found: dict[str, bytes] = {}
    first, at, end = "", 0, len(data)
    while at < end:
        # A plain header by hand, a twentieth of what tarfile takes for it: that is more than decoding a small JPEG.
        if data[at + 156] not in PLAIN or data[at + 345]:  # long or foreign names, folders, links
            return read_any_sample(data)
        try:
            size = int(data[at + 124 : at + 135], 8)
            key, extension = split_name(data[at : at + 100].partition(b"\0")[0].decode())
        except ValueError:
            return read_any_sample(data)
        at += BLOCK
        if key == (first or key) and extension:
            first = key
            found[extension] = data[at : at + size]
        at += -(-size // BLOCK) * BLOCK
    return first, found


def members_of(data: bytes, offsets: Offsets) -> Iterator[dict[str, bytes]]:
    """The members of every sample of a whole tar."""
    for number in range(len(offsets.checksums)):
        yield read_sample(data[slice(*offsets.span(number))])[1]


def read_any_sample(data: bytes) -> tuple[str, dict[str, bytes]]:
    """`read_sample` for every kind of tar."""
    found: dict[str, bytes] = {}
    first = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, extension = split_name(member.name)
                if member.isfile() and extension and key == (first or key):
                    first = key
                    found[extension] = data[member.offset_data : member.offset_data + member.size]
    except tarfile.TarError as error:
        raise ValueError(f"not a tar file: {error}") from None
    return first, found


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: `a/b.jpg` is ("a/b", "jpg"), `a/b.seg.png` is ("a/b", "seg.png")."""
    point = name.find(".", name.rfind("/") + 1)
    return (name[:point], name[point + 1 :].lower()) if point >= 0 else (name, "")
