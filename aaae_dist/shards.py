"""Writing: image sources -> webdataset tar shards and their index.

A prepared data set is a folder (any fsspec URL) of plain webdataset tars, `train-000000.tar` and so on, and `index.json`,
written last. The same input gives the same bytes.
"""

import gzip
import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, ValidationError

from aaae_dist import storage
from aaae_dist.errors import UserError

INDEX = "index.json"
EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
Image.MAX_IMAGE_PIXELS = 100_000_000  # larger ones raise: a small file may claim to be a huge picture


class Shard(BaseModel):
    """One tar: its URL relative to the index, its split, and what it must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    url: str
    split: str
    samples: int
    bytes: int
    sha256: str


class Index(BaseModel):
    """What a prepared data set holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = 1
    source: str
    channels: int
    height: int
    width: int
    classes: list[str]
    shards: list[Shard]


class Example(NamedTuple):
    """One image of a source: its name, pixels (height, width) or (height, width, 3) of uint8, its class, its official split if any."""

    key: str
    pixels: np.ndarray
    label: int | None
    split: str = ""


class Source(NamedTuple):
    """Images to be prepared: how many, the i-th of them (None: unreadable), the classes, and the usual size and channels."""

    count: int
    example: Callable[[int], Example | None]
    classes: Sequence[str]
    size: int
    channels: int


def read_index(url: str) -> Index:
    """The index of a prepared data set.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place = storage.join(url, INDEX)
    if not storage.exists(place):
        raise UserError(f"{place}: no such file; prepare a data set with `aaae prepare SOURCE --out {url}`, or correct data.url")
    try:
        index = Index.model_validate(storage.read_json(place))
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"{place}: {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}; it is damaged or not an index: prepare the data set anew") from None
    if not index.shards:
        raise UserError(f"{place}: it lists no shards; prepare the data set anew")
    return index


# --- sources


def digits() -> Source:
    """scikit-learn's copy of the UCI test set of handwritten digits: 1,797 real grey images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels, labels = np.rint(found.images * (255 / 16)).astype(np.uint8), found.target
    return Source(len(pixels), lambda i: Example(f"{i:06d}", pixels[i], int(labels[i])), [str(i) for i in range(10)], size=8, channels=1)


def mnist(folder: str) -> Source:
    """The official idx files, gzipped or not: train-images-idx3-ubyte and t10k-images-idx3-ubyte with their labels, or one of the two."""
    parts = []
    for name, split in (("train", "train"), ("t10k", "test")):
        images, labels = (find_idx(folder, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if images and labels:
            parts.append((split, read_idx(images, dimensions=3), read_idx(labels, dimensions=1), images))
    if not parts:
        raise UserError(f"{folder}: no MNIST here; it must hold train-images-idx3-ubyte and train-labels-idx1-ubyte, or the t10k- ones, gzipped or not")
    for _, images, labels, path in parts:
        if len(images) != len(labels):
            raise UserError(f"{path}: {len(images)} images but {len(labels)} labels; download both files again")
    pixels, labels = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    # One file alone has no official partition: its images are divided like any other source's.
    splits = [split if len(parts) > 1 else "" for split, images, _, _ in parts for _ in images]
    return Source(len(pixels), lambda i: Example(f"{i:06d}", pixels[i], int(labels[i]), splits[i]), [str(i) for i in range(10)], size=32, channels=1)


def find_idx(folder: str, name: str) -> str | None:
    return next((url for url in (storage.join(folder, name + suffix) for suffix in ("", ".gz")) if storage.exists(url)), None)


def read_idx(url: str, *, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes: 00 00 08 <dimensions>, sizes as big-endian uint32, values (LeCun, Cortes, Burges)."""
    data = storage.read(url)
    try:
        data = gzip.decompress(data) if url.endswith(".gz") else data
        header = struct.unpack_from(f">I{dimensions}I", data)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
        if header[0] != 0x0800 + dimensions or values.size != np.prod(header[1:]):
            raise ValueError("sizes and bytes disagree")
        return values.reshape(header[1:])
    except (ValueError, EOFError, OSError, struct.error) as error:
        raise UserError(f"{url}: not an idx file of {dimensions} dimensions, or cut short ({storage.one_line(error)}); download it again") from None


def folder(url: str) -> Source:
    """Image files below a folder, recursively; the first sub-folder's name is the class."""
    with storage.explained(url):
        store, root = storage.locate(url)
        paths = sorted(path for path in store.find(root) if Path(path).suffix.lower() in EXTENSIONS)
    if not paths:
        raise UserError(f"{url}: no images here; it must hold {', '.join(sorted(EXTENSIONS))} files, in sub-folders by class if they have classes")
    names = [path[len(root) :].lstrip("/") for path in paths]
    classes = sorted({name.split("/")[0] for name in names if "/" in name})

    def example(i: int) -> Example | None:
        try:
            image = Image.open(io.BytesIO(store.cat_file(paths[i])))
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("L" if image.mode in ("1", "L", "LA", "I;16") else "RGB"))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return None
        label = classes.index(names[i].split("/")[0]) if "/" in names[i] else None
        # webdataset takes a name up to its first dot for the key
        return Example(names[i].rpartition(".")[0].replace(".", "_"), pixels, label)

    return Source(len(paths), example, classes, size=64, channels=3)


SOURCES = {"digits": digits, "mnist": mnist, "folder": folder}


# --- from a source to shards


def fit(pixels: np.ndarray, *, channels: int, size: int) -> np.ndarray:
    """Pixels as uint8 (size, size) or (size, size, 3): the short side resized (antialiased bicubic), the middle cut out.

    Smaller grey images, such as MNIST's 28 pixels, are bordered with black instead of blown up.
    """
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    if channels == 1 and max(image.size) < size <= 2 * min(image.size):
        left, top = (size - image.width) // 2, (size - image.height) // 2
        canvas = Image.new("L", (size, size))
        canvas.paste(image, (left, top))
        return np.asarray(canvas)
    return np.asarray(image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


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
    channels: int,
    held_out: int,
    samples_per_shard: int,
    seed: int,
    quality: int,
    progress: Callable[[Iterator], Iterator] = iter,
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
        UserError: `out` already holds a data set, nothing readable is left, or the store fails. Nothing is published then.
    """
    if storage.exists(storage.join(out, INDEX)):
        raise UserError(f"{out}: it already holds a data set; remove it first, or choose another --out")
    first = next((found for found in (source.example(i) for i in range(source.count)) if found), None)
    if first is None:
        raise UserError(f"{name}: none of its {source.count} images can be read; check the files")
    size, channels = size or source.size, channels or source.channels
    if not 0 < held_out < source.count:
        raise UserError(f"--held-out {held_out}: it must leave some of the {source.count} images to train on, and at least one to hold out")

    order = np.random.Philox(np.random.SeedSequence(seed)).random_raw(source.count).argsort(kind="stable")
    official = [found.split if (found := source.example(i)) else "" for i in order] if first.split else None
    splits = official or ["test" if i < held_out else "train" for i in range(source.count)]
    members = {split: [int(i) for i, of in zip(order, splits, strict=True) if of == split] for split in ("train", "test")}
    plan = [(split, chosen[k : k + samples_per_shard]) for split, chosen in members.items() for k in range(0, len(chosen), samples_per_shard)]
    numbers = [sum(1 for earlier, _ in plan[:k] if earlier == split) for k, (split, _) in enumerate(plan)]

    def write(split: str, chosen: list[int], number: int) -> tuple[Shard | None, list[int]]:
        data, bad = pack(source, chosen, size=size, channels=channels, quality=quality)
        if len(bad) == len(chosen):
            return None, bad
        url = f"{split}-{number:06d}.tar"
        storage.write(storage.join(out, url), data)
        return Shard(url=url, split=split, samples=len(chosen) - len(bad), bytes=len(data), sha256=hashlib.sha256(data).hexdigest()), bad

    shards, bad = [], []
    with ThreadPoolExecutor(4) as pool:
        work = (pool.submit(write, split, chosen, number) for (split, chosen), number in zip(plan, numbers, strict=True))
        waiting = list(islice(work, 8))  # few at a time, so that a failure ends it soon and memory stays bounded
        for _ in progress(iter(range(len(plan)))):
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
    with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for i in chosen:
            example = source.example(i)
            if example is None:
                bad.append(i)
                continue
            extension, data = encode(fit(example.pixels, channels=channels, size=size), quality=quality)
            label = {} if example.label is None else {"cls": str(example.label).encode()}
            tar.write({"__key__": example.key, extension: data, **label})
    return file.getvalue(), bad
