"""Sources of images: what `aaae prepare` reads. A new data set is a function here and a line in SOURCES."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from aaae_dist import storage
from aaae_dist.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises at bad bytes
Image.MAX_IMAGE_PIXELS = 100_000_000  # twice as many raise: a small file may claim to be a huge picture


class Example(NamedTuple):
    """One image: its name, pixels (height, width) or (height, width, 3) of uint8, class, and official split if any."""

    key: str
    pixels: np.ndarray
    label: int | None
    split: str = ""


class Source(NamedTuple):
    """Images to prepare: how many, the i-th of them (None: unreadable), the classes, the usual size and channels."""

    count: int
    example: Callable[[int], Example | None]
    classes: Sequence[str]
    size: int
    channels: Literal[1, 3]


def digits(folder: str) -> Source:
    """scikit-learn's copy of the UCI test set of handwritten digits: 1,797 real grey images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    if folder:
        raise UserError(f"aaae prepare digits {folder}: scikit-learn brings these images; give no folder")
    values, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    pixels = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    names = [str(i) for i in range(10)]
    return Source(len(pixels), lambda i: Example(f"{i:06d}", pixels[i], int(labels[i])), names, size=8, channels=1)


def mnist(folder: str) -> Source:
    """The official idx files, gzipped or not: train- and t10k-images-idx3-ubyte with labels, or one of the two."""
    if not folder:
        raise UserError("aaae prepare mnist: give the folder (or fsspec URL) that holds the official files")
    parts = []
    for name, split in (("train", "train"), ("t10k", "test")):
        images, labels = (find_idx(folder, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if bool(images) != bool(labels):
            missing = "labels" if images else "images"
            raise UserError(f"{images or labels}: its {missing} are missing; download them too")
        if images and labels:
            parts.append((split, read_idx(images, dimensions=3), read_idx(labels, dimensions=1), images))
    if not parts:
        raise UserError(
            f"{folder}: no MNIST here; it must hold train-images-idx3-ubyte and train-labels-idx1-ubyte, or the t10k- "
            "ones, gzipped or not"
        )
    for _, images, labels, path in parts:
        if len(images) != len(labels):
            raise UserError(f"{path}: {len(images)} images but {len(labels)} labels; download both files again")
    pixels, labels = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    # One file alone has no official partition: its images are divided like any other source's.
    splits = [split if len(parts) > 1 else "" for split, images, _, _ in parts for _ in images]
    return Source(
        len(pixels),
        lambda i: Example(f"{i:06d}", pixels[i], int(labels[i]), splits[i]),
        [str(i) for i in range(10)],
        size=32,
        channels=1,
    )


def find_idx(folder: str, name: str) -> str | None:
    urls = (storage.join(folder, name + suffix) for suffix in ("", ".gz"))
    return next((url for url in urls if storage.exists(url)), None)


def read_idx(url: str, *, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes (LeCun, Cortes, Burges): 00 00 08 <dimensions>, sizes (uint32), values."""
    data = storage.read(url)
    try:
        data = gzip.decompress(data) if url.endswith(".gz") else data
        header = struct.unpack_from(f">I{dimensions}I", data)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
        if header[0] != 0x0800 + dimensions or values.size != np.prod(header[1:]):
            raise ValueError("sizes and bytes disagree")
        return values.reshape(header[1:])
    except (ValueError, EOFError, OSError, struct.error, zlib.error) as error:
        raise UserError(
            f"{url}: not an idx file of {dimensions} dimensions, or cut short ({storage.one_line(error)}); download "
            "it again"
        ) from None


def folder(url: str) -> Source:
    """Image files below a folder, recursively; the first sub-folder's name is the class."""
    if not url:
        raise UserError("aaae prepare folder: give the folder (or fsspec URL) that holds the images")
    with storage.explained(url):
        store, root = storage.locate(url)
        names = sorted(str(path)[len(root) :].lstrip("/") for path in store.find(root))
    names = [name for name in names if Path(name).suffix.lower() in EXTENSIONS]
    if not names:
        raise UserError(
            f"{url}: no images here; it must hold {', '.join(sorted(EXTENSIONS))} files, in sub-folders by class if "
            "they have classes"
        )
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    keys = [name.replace(".", "_") for name in names]  # webdataset ends a key at its first dot
    if len(set(keys)) < len(keys):
        keys = [f"{key}-{i}" for i, key in enumerate(keys)]

    def example(i: int) -> Example | None:
        try:
            data = storage.read(storage.join(url, names[i]))
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # a link that leads nowhere
                return None
            raise
        try:
            pixels = decode(data)
        except ValueError:
            return None
        return Example(keys[i], pixels, classes.index(names[i].split("/")[0]) if "/" in names[i] else None)

    return Source(len(names), example, classes, size=64, channels=3)


def decode(data: bytes) -> np.ndarray:
    """Pixels of an image file, upright, without alpha: uint8 (height, width) if it is grey, else (height, width, 3).

    Raises:
        ValueError: it cannot be read.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.mode.startswith("I;16"):  # PIL would clip the values above 255
            return (np.asarray(image) >> 8).astype(np.uint8)
        if image.mode in ("I", "F"):
            raise ValueError("values of 32 bits, whose range nobody knows")
        if image.mode == "P":
            image = image.convert("RGBA")  # straight to RGB, PIL would warn of the alpha
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except Exception as error:  # at damaged metadata PIL lets struct.error, TypeError, AttributeError and more through
        raise ValueError(storage.one_line(error)) from error


SOURCES = {"digits": digits, "mnist": mnist, "folder": folder}
