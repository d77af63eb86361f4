"""Writing: image sources -> webdataset tar shards and their index.

A prepared data set is a folder (any fsspec URL) of plain webdataset tars, `train-000000.tar` and so on, and
`index.json`, written last. The same input gives the same bytes.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

import numpy as np
import webdataset
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.sources import Source

INDEX = "index.json"


class Shard(BaseModel):
    """One tar: its URL relative to the index, its split, and what it must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    url: str
    split: str
    samples: NonNegativeInt
    bytes: PositiveInt
    sha256: str


class Index(BaseModel):
    """What a prepared data set holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[1] = 1
    source: str
    channels: Literal[1, 3]
    height: PositiveInt
    width: PositiveInt
    classes: list[str]
    shards: list[Shard]


def read_index(url: str) -> Index:
    """The index of a prepared data set.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place = storage.join(url, INDEX)
    if not storage.exists(place):
        raise UserError(
            f"{place}: no such file; prepare a data set with `aaae prepare SOURCE --out {url}`, or correct data.url"
        )
    try:
        index = Index.model_validate(storage.read_json(place))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "the whole"
        raise UserError(
            f"{place}: {field}: {problem['msg'].lower()}; it is damaged or not an index: prepare the data set anew"
        ) from None
    if not index.shards:
        raise UserError(f"{place}: it lists no shards; prepare the data set anew")
    return index


def fit(pixels: np.ndarray, *, channels: int, size: int) -> np.ndarray:
    """Pixels as uint8 (size, size) or (size, size, 3): short side resized (antialiased bicubic), middle cut out.

    Smaller grey images, such as MNIST's 28 pixels, are bordered with black instead of blown up.
    """
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    if channels == 1 and max(image.size) < size <= 2 * min(image.size):
        left, top = (size - image.width) // 2, (size - image.height) // 2
        canvas = Image.new("L", (size, size))
        canvas.paste(image, (left, top))
        return np.asarray(canvas)
    return np.asarray(
        image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    )


def encode(pixels: np.ndarray, *, quality: int) -> tuple[str, bytes]:
    """PNG for quality 0, else JPEG of that quality without chroma subsampling: (extension, bytes)."""
    file = io.BytesIO()
    if quality:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    else:
        Image.fromarray(pixels).save(file, "PNG")
    return ("jpg" if quality else "png"), file.getvalue()


def prepare(
    source: Source,
    *,
    name: str,
    out: str,
    size: int,
    channels: Literal[0, 1, 3],
    held_out: int,
    samples_per_shard: int,
    seed: int,
    quality: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[Index, list[int]]:
    """Shuffle a source, cut it into shards, write them and, last, the index.

    Args:
        size, channels: of the images written; 0: what is usual for the source.
        held_out: images of the `test` split where the source has no official one.
        quality: of JPEG; 0 writes PNG.
        progress: wraps the iteration over shards.

    Returns:
        The index, and the numbers of the images that could not be read.

    Raises:
        UserError: `out` already holds a data set, nothing readable is left, or the store fails. Nothing is published
        then.
    """
    if storage.exists(storage.join(out, INDEX)):
        raise UserError(f"{out}: it already holds a data set; remove it first, or choose another --out")
    first = next((found for found in (source.example(i) for i in range(source.count)) if found), None)
    if first is None:
        raise UserError(f"{name}: none of its {source.count} images can be read; check the files")
    size, channels = size or source.size, channels or source.channels
    if not 0 < held_out < source.count:
        raise UserError(
            f"--held-out {held_out}: it must leave some of the {source.count} images to train on, and at least one to "
            "hold out"
        )

    order = np.random.Philox(np.random.SeedSequence(seed)).random_raw(source.count).argsort(kind="stable")
    official = [found.split if (found := source.example(i)) else "" for i in order] if first.split else None
    splits = official or ["test" if i < held_out else "train" for i in range(source.count)]
    members = {
        split: [int(i) for i, of in zip(order, splits, strict=True) if of == split] for split in ("train", "test")
    }
    plan = [
        (split, chosen[k : k + samples_per_shard])
        for split, chosen in members.items()
        for k in range(0, len(chosen), samples_per_shard)
    ]
    numbers = [sum(1 for earlier, _ in plan[:k] if earlier == split) for k, (split, _) in enumerate(plan)]

    there = storage.listing(out)

    def write(split: str, chosen: list[int], number: int) -> tuple[Shard | None, list[int]]:
        data, bad = pack(source, chosen, size=size, channels=channels, quality=quality)
        if len(bad) == len(chosen):
            return None, bad
        url = f"{split}-{number:06d}.tar"
        if url not in there:
            storage.write(storage.join(out, url), data)
        elif storage.read(storage.join(out, url)) != data:  # the same bytes: an earlier attempt was cut short
            raise UserError(f"{storage.join(out, url)}: another file is there already; choose another --out")
        return Shard(
            url=url,
            split=split,
            samples=len(chosen) - len(bad),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        ), bad

    shards, bad = [], []
    with ThreadPoolExecutor(4) as pool:
        work = (
            pool.submit(write, split, chosen, number) for (split, chosen), number in zip(plan, numbers, strict=True)
        )
        waiting = list(islice(work, 8))  # few at a time, so that a failure ends it soon and memory stays bounded
        for _ in progress(range(len(plan))):
            shard, unreadable = waiting.pop(0).result()
            waiting += islice(work, 1)
            shards += [shard] if shard else []
            bad += unreadable
    index = Index(source=name, channels=channels, height=size, width=size, classes=list(source.classes), shards=shards)
    storage.write_json(storage.join(out, INDEX), index.model_dump())
    return index, sorted(bad)


def pack(source: Source, chosen: Sequence[int], *, size: int, channels: int, quality: int) -> tuple[bytes, list[int]]:
    """A shard of these images as a webdataset tar, and the numbers of those that cannot be read."""
    file, bad = io.BytesIO(), []
    with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for i in chosen:
            example = source.example(i)
            if example is None:
                bad.append(i)
                continue
            extension, data = encode(fit(example.pixels, channels=channels, size=size), quality=quality)
            label = {} if example.label is None else {"cls": str(example.label).encode()}
            tar.write({"__key__": example.key, extension: data, **label})
    return file.getvalue(), bad
