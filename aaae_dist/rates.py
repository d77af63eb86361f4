"""How fast a store or disk is read and written from here. What is written for it is gone afterwards."""

import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.failures import explained
from aaae_dist.fetching import DOWNLOADS
from aaae_dist.reader import Reader

SECONDS = 3.0  # that it is read for, about
READ_BYTES, READ_PIECE = 1 << 26, 1 << 22
WRITE_BYTES, ENOUGH = (1 << 20, 1 << 23, 1 << 26), 0.5  # one after the other, until one takes so many seconds


def read_rate(reader: Reader) -> float:
    """Bytes a second from where the shards are, as many at a time as training fetches; no cache is used or filled."""
    began, parts, room = time.monotonic(), [], READ_BYTES
    for url, shard in zip(reader.fetcher.urls, reader.shards, strict=True):
        starts = range(0, min(shard.bytes, max(room, 0)), READ_PIECE)
        parts += [(url, start, min(start + READ_PIECE, shard.bytes)) for start in starts]
        room -= shard.bytes

    def fetch(part: tuple[str, int, int]) -> int:
        late = time.monotonic() - began > SECONDS
        return 0 if late else len(storage.read(*part, patience=reader.data.patience))

    with ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="preflight") as pool:
        return sum(pool.map(fetch, parts)) / (time.monotonic() - began)


def write_rate(folder: str, *, most: int) -> float:
    """Bytes a second that one process writes to a folder, durably, in a file of at most so many bytes.

    Raises:
        UserError: nothing can be written there.
    """
    rate = 0.0
    with probe(folder) as url:
        for size in (min(size, most) for size in WRITE_BYTES):
            data = secrets.token_bytes(size)
            began = time.monotonic()
            storage.write(url, data)
            seconds = time.monotonic() - began
            rate = size / max(seconds, 1e-6)
            if seconds > ENOUGH or size == most:
                break
    return rate


def refuse_read_only(folder: str) -> None:
    """Raise a UserError unless a file can be written to a folder, read back and removed."""
    with probe(folder) as url:
        data = secrets.token_bytes(64)
        storage.write(url, data)
        if storage.read(url) != data:
            raise UserError(f"{folder}: what is written there is read back otherwise; choose another store")


@contextmanager
def probe(folder: str) -> Iterator[str]:
    """A URL of a file to be in a folder; that, and folders that were made for it, are gone afterwards."""
    url, missing = storage.join(folder, f".preflight-{secrets.token_hex(4)}"), list[Path]()
    if storage.is_local(folder):
        with explained(folder):
            path = storage.local_path(folder)
            missing = [place for place in (path, *path.parents) if not place.exists()]
    try:
        yield url
        storage.remove(url)
    finally:  # what could not be written is not there
        for place in missing:
            with suppress(OSError):  # it was not made, or another has begun there
                place.rmdir()
