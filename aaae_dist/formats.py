"""Files of the official data sets: MNIST's idx, CIFAR-10's batches, CelebA's lists, MATLAB's.

Nothing in a pickle is run. What is damaged is one line that names the file.
"""

import gzip
import io
import pickletools
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np

from aaae_dist import storage
from aaae_dist.archives import Tgz, damaged
from aaae_dist.errors import one_line


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
        raise damaged(url, f"an idx file of {dimensions} dimensions", error) from None


def read_mat(url: str, *names: str) -> list[np.ndarray]:
    """Whole numbers of a MATLAB file by the names of their variables, each int64 (n)."""
    import scipy.io

    data = storage.read(url)
    try:
        found = scipy.io.loadmat(io.BytesIO(data), variable_names=names)
        arrays = [np.asarray(found[name]).reshape(-1) for name in names]
        if not all(array.size and np.issubdtype(array.dtype, np.integer) for array in arrays):
            raise ValueError("no whole numbers")
        return [array.astype(np.int64) for array in arrays]
    except Exception as error:  # at damage scipy lets TypeError, IndexError, zlib.error and more through
        raise damaged(url, f"a MATLAB file of {' and '.join(names)}", error) from None


# --- CIFAR-10


class Cifar(NamedTuple):
    """CIFAR-10: names of the classes, uint8 images (n, 32, 32, 3), labels (n), and how many of them are to train on."""

    classes: list[str]
    images: np.ndarray
    labels: np.ndarray
    train: int


def read_cifar10(url: str) -> Cifar:
    """CIFAR-10 from cifar-10-binary.tar.gz or cifar-10-python.tar.gz; their images come in the same order.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, Learning Multiple Layers of Features from Tiny
    Images, 2009).
    """
    archive = Tgz(url)
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    try:
        if "cifar-10-batches-py/batches.meta" in archive:
            classes = plain_values(archive.read("cifar-10-batches-py/batches.meta"))["label_names"]
            batches = [pickled_batch(archive.read(f"cifar-10-batches-py/{name}")) for name in names]
        else:
            classes = archive.read("cifar-10-batches-bin/batches.meta.txt").decode().split()
            batches = [binary_batch(archive.read(f"cifar-10-batches-bin/{name}.bin")) for name in names]
        images, labels = (np.concatenate([batch[k] for batch in batches]) for k in (0, 1))
        if labels.max() >= len(classes) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"label {labels.max()}, but {len(classes)} names of classes")
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(url, "CIFAR-10", error) from None
    train = len(labels) - len(batches[-1][1])
    return Cifar(classes, images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, train)


def binary_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3072) and labels (n): of each image a byte of label, and the planes red, green and blue."""
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3072)
    return rows[:, 1:], rows[:, 0]


def pickled_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3072) and labels (n) of a dict whose `data` is an array and whose `labels` are a list."""
    match plain_values(data):
        case {
            "data": Built(
                "numpy.core.multiarray _reconstruct",
                _,
                (_, shape, Built("numpy dtype", ("u1", *_)), False, str(pixels)),
            ),
            "labels": list(labels),
        }:
            images = np.frombuffer(pixels.encode("latin-1"), np.uint8).reshape(-1, 3072)
            if shape != (len(labels), 3072) or len(images) != len(labels):
                raise ValueError(f"{len(images)} images, but {len(labels)} labels")
            return images, np.frombuffer(bytes(labels), np.uint8)
    raise ValueError("a batch without an array of bytes, or without labels")


NUMPY = ("numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype")


class Built(NamedTuple):
    """What unpickling would make by calling a function; here it is only told."""

    function: str
    arguments: Any
    state: Any = None


def plain_values(data: bytes) -> Any:
    """What a pickle holds, as Python 2 and its numpy wrote it, without running anything; text is latin-1.

    Dicts, lists, tuples, text, numbers and None come as they are, an array as what it would be built from.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def take(start: int) -> list[Any]:
        taken = stack[start:]
        del stack[start:]
        return taken

    try:
        for opcode, value, _ in pickletools.genops(data):
            match opcode.name:
                case "PROTO" | "STOP":
                    pass
                case "BININT" | "BININT1" | "BININT2" | "SHORT_BINSTRING" | "BINSTRING":
                    stack.append(value)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "GLOBAL" if value in NUMPY:
                    stack.append(value)
                case "GLOBAL":
                    raise ValueError(f"it would run {value}")
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(take(marks.pop())))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(take(-int(opcode.name[-1]))))
                case "APPEND":
                    stack[-2].append(stack.pop())
                case "APPENDS":
                    added = take(marks.pop())
                    stack[-1].extend(added)
                case "SETITEM":
                    key, item = take(-2)
                    stack[-1][key] = item
                case "SETITEMS":
                    added = take(marks.pop())
                    stack[-1].update(zip(added[::2], added[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "REDUCE":
                    stack.append(Built(*take(-2)))
                case "BUILD":
                    made, state = take(-2)
                    stack.append(Built(made.function, made.arguments, state))
                case _:
                    raise ValueError(f"it uses {opcode.name}")
        (whole,) = stack
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"a pickle of other than plain values: {one_line(error)}") from None
    return whole


# --- CelebA


def read_attributes(url: str) -> tuple[list[str], list[str], np.ndarray]:
    """Files, names of attributes, and uint8 marks (files, attributes) of 0 and 1, from CelebA's list_attr_celeba.txt.

    Its first line is the number of images, the second names the attributes; then `000001.jpg -1 1 ...` for each image.
    """
    try:
        count, names, *rows = storage.read(url).decode().splitlines()
        attributes = names.split()
        files, marks = [], bytearray()
        for number, row in enumerate(filter(str.strip, rows), 3):
            file, *values = row.split()
            if len(values) != len(attributes) or not {"-1", "1"} >= set(values):
                raise ValueError(f"line {number} has other than {len(attributes)} values -1 or 1")
            files.append(file)
            marks += bytes(value == "1" for value in values)
        if int(count) != len(files) or not marks:
            raise ValueError(f"{len(files)} images instead of {int(count)}")
        return files, attributes, np.frombuffer(marks, np.uint8).reshape(-1, len(attributes))
    except ValueError as error:
        raise damaged(url, "CelebA's list of attributes", error) from None


def read_partition(url: str) -> dict[str, str]:
    """Split by file, from CelebA's list_eval_partition.txt: `000001.jpg 0` for train, 1 for val, 2 for test."""
    try:
        rows = [line.split() for line in storage.read(url).decode().splitlines() if line.strip()]
        return {file: {"0": "train", "1": "val", "2": "test"}[number] for file, number in rows}
    except (ValueError, KeyError) as error:
        raise damaged(url, "CelebA's partition", error) from None
