"""Reading: an index -> batches of uint8 images, in the order that `order.py` defines."""

import hashlib
import io
import logging
import os
import resource
import tarfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.errors import UserError
from aaae_dist.order import Order
from aaae_dist.shards import INDEX, Index, Shard, read_index
from aaae_dist.sources import UNREADABLE

log = logging.getLogger(__name__)

Pixels = UInt8[Tensor, "batch channels height width"]
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "pgm", "ppm")
KEPT_BYTES = 1 << 26  # a split that takes no more than 64 MB decoded is decoded once
FORGIVEN = 10  # unreadable samples that stop no run, however small the data set


class Batch(NamedTuple):
    """One rank's part of a global batch, and where the stream goes on after it."""

    images: Pixels
    keys: list[str]
    labels: list[int | None]
    epoch: int
    position: int


def to_float(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes 0..255 to float32 in [-1, 1]."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Values around [-1, 1] to bytes, rounded and clamped."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


class Reader:
    """Samples of one split by (shard, number), from local files or from an object store through a cache folder.

    Safe to use from several threads.
    """

    def __init__(self, data: Data, *, split: str) -> None:
        """Read the index and see that the split is there, whole, and of the shape that `data` says.

        Raises:
            UserError: it is not.
        """
        self.data, self.url, self.index = data, data.url, read_index(data.url)
        self.shards = [shard for shard in self.index.shards if shard.split == split]
        check(self.index, url=data.url, split=split, channels=data.channels, size=data.size)
        self.cache = Path(data.cache or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aaae_dist"
        # Of opened shards: their files, the samples' names, and where their members lie.
        self.files: dict[int, int] = {}
        self.names: dict[int, list[str]] = {}
        self.members: dict[int, list[dict[str, tuple[int, int]]]] = {}
        self.locks = [threading.Lock() for _ in self.shards]
        allow_open_files(len(self.shards))
        self.bad: set[tuple[int, int]] = set()
        self.kept: dict[tuple[int, int], tuple[np.ndarray, str, int | None]] = {}

    @property
    def counts(self) -> list[int]:
        return [shard.samples for shard in self.shards]

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """Of the split: changes when any shard does."""
        return hashlib.sha256(
            "\n".join(f"{shard.url} {shard.samples} {shard.sha256}" for shard in self.shards).encode()
        ).hexdigest()[:16]

    def batch(self, samples: Sequence[tuple[int, int]], *, epoch: int = 0, position: int = 0) -> Batch:
        """Read and decode.

        An unreadable sample is counted, reported, and replaced by the next readable one of its shard.
        """
        images = np.empty((len(samples), self.data.channels, self.data.size, self.data.size), np.uint8)
        keys, labels = [], []
        for row, (shard, number) in enumerate(samples):
            images[row], key, label = self.kept.get((shard, number)) or self.read(shard, number)
            keys.append(key)
            labels.append(label)
        return Batch(torch.from_numpy(images), keys, labels, epoch, position)

    def read(self, shard: int, number: int) -> tuple[np.ndarray, str, int | None]:
        """Pixels (channels, height, width), key and label of a sample, or of the next readable one of its shard."""
        count = self.shards[shard].samples
        pixels = np.empty((self.data.size, self.data.size, self.data.channels), np.uint8)
        self.open(shard)
        for candidate in range(number, number + count):
            member = self.members[shard][candidate % count]
            try:
                self.decode_into(pixels, shard, member)
                label = int(self.bytes_of(shard, member["cls"])) if "cls" in member else None
            except UNREADABLE as error:
                self.note_bad(shard, candidate % count, error)
                continue
            sample = pixels.transpose(2, 0, 1), self.names[shard][candidate % count], label
            if len(self) * pixels.nbytes <= KEPT_BYTES:
                self.kept[shard, number] = sample
            return sample
        raise UserError(f"{self.place(shard)}: none of its {count} samples can be read; prepare the data set anew")

    def note_bad(self, shard: int, number: int, error: Exception) -> None:
        with self.locks[shard]:  # two threads may meet the same one
            new = (shard, number) not in self.bad
            self.bad.add((shard, number))
        if new:
            log.warning(
                "%s: sample %s cannot be read (%s); its neighbour takes its place",
                self.place(shard),
                self.names[shard][number],
                storage.one_line(error),
            )
        if len(self.bad) > max(FORGIVEN, self.data.bad_share * len(self)):
            raise UserError(
                f"{self.url}: {len(self.bad)} unreadable samples, more than data.bad_share = {self.data.bad_share} "
                "allows; prepare the data set anew, or raise it"
            )

    def decode_into(self, pixels: np.ndarray, shard: int, member: dict[str, tuple[int, int]]) -> None:
        extension = next((name for name in IMAGE_EXTENSIONS if name in member), None)
        if extension is None:
            raise ValueError(f"no image among {', '.join(member)}")
        data = self.bytes_of(shard, member[extension])
        if extension in ("jpg", "jpeg"):
            decoded = simplejpeg.decode_jpeg(data, "GRAY" if self.data.channels == 1 else "RGB")
        else:
            decoded = np.asarray(Image.open(io.BytesIO(data)).convert("L" if self.data.channels == 1 else "RGB"))
        if decoded.shape[:2] != (self.data.size, self.data.size):
            raise ValueError(
                f"{decoded.shape[1]} x {decoded.shape[0]} pixels instead of {self.data.size} x {self.data.size}"
            )
        pixels[:] = decoded.reshape(pixels.shape)

    def bytes_of(self, shard: int, member: tuple[int, int]) -> bytes:
        offset, size = member
        data = os.pread(self.files[shard], size, offset)
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes of {size}")
        return data

    def place(self, shard: int) -> str:
        return storage.join(self.url, self.shards[shard].url)

    def open(self, shard: int) -> None:
        """Open a shard once, checked against the index, and list its samples."""
        if shard in self.members:
            return
        with self.locks[shard]:
            if shard in self.members:
                return
            path = obtain(self.place(shard), self.shards[shard], self.cache)
            with storage.explained(self.place(shard)):
                self.files[shard] = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self.files[shard])
                self.names[shard], members = list_samples(path)
            if len(members) != self.shards[shard].samples:
                raise UserError(
                    f"{self.place(shard)}: {len(members)} samples, but the index says {self.shards[shard].samples}; "
                    "prepare the data set anew"
                )
            self.members[shard] = members  # last: other threads take it as a sign that all is there


def allow_open_files(count: int) -> None:
    """Raise this process's soft limit of open files, often 1,024, if a reader of so many shards may need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and 2 * count + 256 > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check(index: Index, *, url: str, split: str, channels: int, size: int) -> None:
    """Raise a UserError unless the index has this split, its images have this shape, and its shards are there."""
    place, splits = storage.join(url, INDEX), sorted({shard.split for shard in index.shards})
    if split not in splits:
        raise UserError(
            f'data.split or data.held_out "{split}": {place} has only {", ".join(splits)}; choose one of these'
        )
    if (index.channels, index.height, index.width) != (channels, size, size):
        raise UserError(
            f"data.channels {channels}, data.size {size}: {place} says {index.channels} channels of {index.height} x "
            f"{index.width} pixels; set both to what was prepared"
        )
    chosen = [shard for shard in index.shards if shard.split == split]
    if not sum(shard.samples for shard in chosen):
        raise UserError(f'{place}: split "{split}" is empty; prepare the data set anew')
    there = storage.listing(url)
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


def find_damage(place: str, shard: Shard, data: bytes) -> str:
    """What is wrong with these bytes, by the index; nothing if they are what it promises."""
    if len(data) != shard.bytes:
        return (
            f"{place}: {len(data)} bytes, but the index says {shard.bytes}; "
            "it was cut short or replaced: prepare the data set anew"
        )
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return f"{place}: its sha256 is not the index's; it was damaged or replaced: prepare the data set anew"
    return ""


def obtain(place: str, shard: Shard, cache: Path) -> Path:
    """Path of a local shard, or of a remote one's local copy, downloaded if need be; as the index promises it."""
    if storage.is_local(place):
        path = storage.local_path(place)
    else:
        path = cache / f"{shard.sha256}.tar"  # named by its content, so that it cannot be another's
        with storage.explained(str(path)):
            if path.exists() and not find_damage(place, shard, path.read_bytes()):
                return path
    data = storage.read(place)
    if damage := find_damage(place, shard, data):
        raise UserError(damage)
    if not storage.is_local(place):
        storage.write(str(path), data)
    return path


def list_samples(path: Path) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """Keys of a tar's samples, grouped as webdataset does, and by extension the (offset, size) of their members."""
    names: list[str] = []
    samples: list[dict[str, tuple[int, int]]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not names or names[-1] != key:
                    names.append(key)
                    samples.append({})
                samples[-1][extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a tar file ({storage.one_line(error)}); prepare the data set anew") from None
    return names, samples


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


def stream(
    reader: Reader,
    *,
    seed: int,
    lanes: int,
    window: int,
    batch_size: int,
    world: int,
    rank: int,
    workers: int,
    epoch: int = 0,
    position: int = 0,
) -> Iterator[Batch]:
    """This rank's part of every global batch, for ever, from `position` of `epoch` on.

    No sample comes twice in an epoch; an epoch leaves out fewer than `batch_size` samples plus the lanes' remainder;
    every rank gets the same number of batches.

    Raises:
        UserError: `batch_size` does not divide by `world`, or is larger than the split.
    """
    order = Order(reader.counts, seed=seed, lanes=lanes, window=window)
    if batch_size % world:
        raise UserError(f"training.batch_size {batch_size}: not a multiple of the {world} ranks; choose one that is")
    if batch_size > order.length:
        raise UserError(
            f"training.batch_size {batch_size}: larger than the {order.length} samples of an epoch; choose a smaller "
            "one, or prepare more images"
        )
    share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)

    def calls(epoch: int, position: int) -> Iterator:
        while True:
            if position + batch_size > order.length:
                epoch, position = epoch + 1, 0
            samples = order.samples(epoch, position, position + batch_size)[share]
            position += batch_size
            yield lambda samples=samples, epoch=epoch, position=position: reader.batch(
                samples, epoch=epoch, position=position
            )

    return ahead(calls(epoch, position), workers=workers)


def sweep(reader: Reader, *, limit: int, batch_size: int, world: int, rank: int, workers: int) -> Iterator[Batch]:
    """The first `limit` samples exactly once over all ranks, each rank every world-th, for evaluation.

    A rank may get none.
    """
    samples = [(shard, number) for shard, count in enumerate(reader.counts) for number in range(count)][:limit][
        rank::world
    ]
    parts = (samples[start : start + batch_size] for start in range(0, len(samples), batch_size))
    return ahead((lambda part=part: reader.batch(part) for part in parts), workers=workers)
