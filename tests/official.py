"""Small data sets in exactly the official formats: the files of MNIST, CIFAR-10, CelebA and Oxford's flowers."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from conftest import picture

RNG = np.random.default_rng(0)


# --- MNIST


def idx(values: np.ndarray) -> bytes:
    """The format of http://yann.lecun.com/exdb/mnist, from its description."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + bytes(values.ravel().tolist())


def write_mnist(folder: Path, *names: str, count: int = 12, zipped: bool = False) -> dict[str, tuple]:
    """Images and labels by name."""
    made = {}
    for name in names:
        pixels = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, count, dtype=np.uint8)
        for part, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            data = idx(values)
            path = folder / f"{name}-{part}-ubyte{'.gz' * zipped}"
            path.write_bytes(gzip.compress(data) if zipped else data)
        made[name] = pixels, labels
    return made


# --- CIFAR-10

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def tgz(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for name in sorted({name.rpartition("/")[0] for name in members} - {""}):
            folder = tarfile.TarInfo(name)
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def cifar_batches(count: int = 7) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Images (n, 32, 32, 3) and labels by name."""
    return {
        name: (RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), RNG.integers(0, 10, count).tolist())
        for name in CIFAR_BATCHES
    }


def cifar_binary(batches: Mapping[str, tuple[np.ndarray, list[int]]]) -> dict[str, bytes]:
    """Members of cifar-10-binary.tar.gz, from the description on its page."""
    members = {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*CIFAR_CLASSES, "", ""]).encode()}
    for name, (images, labels) in batches.items():
        records = (
            bytes([label]) + b"".join(image[:, :, k].tobytes() for k in range(3))
            for image, label in zip(images, labels, strict=True)
        )
        members[f"cifar-10-batches-bin/{name}.bin"] = b"".join(records)
    return members


def cifar_python(batches: Mapping[str, tuple[np.ndarray, list[int]]]) -> dict[str, bytes]:
    """Members of cifar-10-python.tar.gz."""
    meta = {"num_cases_per_batch": 10_000, "label_names": CIFAR_CLASSES, "num_vis": 3072}
    members = {"cifar-10-batches-py/batches.meta": python2_pickle(meta)}
    for number, (name, (images, labels)) in enumerate(batches.items(), 1):
        batch = {
            "batch_label": f"training batch {number} of 5",
            "labels": labels,
            "data": images.transpose(0, 3, 1, 2).reshape(-1, 3072),
            "filenames": [f"leptodactylus_pentadactylus_s_{i:06d}.png" for i in range(len(labels))],
        }
        members[f"cifar-10-batches-py/{name}"] = python2_pickle(batch)
    return members


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as Python 2's cPickle and its numpy wrote it: text as byte strings, a memo for all but numbers."""
    out, memo = io.BytesIO(), {}

    def remember(what: Any = None) -> None:
        memo[what or object()] = number = len(memo) + 1
        out.write(b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number))

    def name(module: str, function: str) -> None:
        if (module, function) in memo:
            out.write(b"h" + bytes([memo[module, function]]))
        else:
            out.write(f"c{module}\n{function}\n".encode())
            remember((module, function))

    def string(data: bytes) -> None:
        out.write(b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data)))
        out.write(data)
        remember()

    def write(value: Any) -> None:
        if value is None or isinstance(value, bool):
            out.write({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            kind = b"K" if 0 <= value < 256 else b"M" if 0 <= value < 65_536 else b"J"
            out.write(kind + struct.pack({b"K": "<B", b"M": "<H", b"J": "<i"}[kind], value))
        elif isinstance(value, str):
            string(value.encode("latin-1"))
        elif isinstance(value, bytes):
            string(value)
        elif isinstance(value, dict):
            out.write(b"}")
            remember()
            out.write(b"(")
            for pair in value.items():
                write(pair[0])
                write(pair[1])
            out.write(b"u")
        elif isinstance(value, list):
            out.write(b"]")
            remember()
            for start in range(0, len(value), 1000):
                out.write(b"(")
                for item in value[start : start + 1000]:
                    write(item)
                out.write(b"e")
        elif isinstance(value, tuple):
            out.write(b"(" if len(value) > 3 else b"")
            for item in value:
                write(item)
            out.write({0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(value), b"t"))
            remember()
        elif isinstance(value, np.dtype):
            name("numpy", "dtype")
            write((value.str[1:], 0, 1))
            out.write(b"R")
            remember()
            write((3, "|", None, None, None, -1, -1, 0))
            out.write(b"b")
        else:
            name("numpy.core.multiarray", "_reconstruct")
            name("numpy", "ndarray")
            write((0,))
            write("b")
            out.write(b"\x87")
            remember()
            out.write(b"R")
            remember()
            write((1, value.shape, value.dtype, False, value.tobytes()))
            out.write(b"b")

    out.write(b"\x80\x02")
    write(value)
    out.write(b".")
    return out.getvalue()


# --- CelebA

CELEBA_ATTRIBUTES = [
    "5_o_Clock_Shadow",
    "Arched_Eyebrows",
    "Attractive",
    "Bags_Under_Eyes",
    "Bald",
    "Bangs",
    "Big_Lips",
    "Big_Nose",
    "Black_Hair",
    "Blond_Hair",
    "Blurry",
    "Brown_Hair",
    "Bushy_Eyebrows",
    "Chubby",
    "Double_Chin",
    "Eyeglasses",
    "Goatee",
    "Gray_Hair",
    "Heavy_Makeup",
    "High_Cheekbones",
    "Male",
    "Mouth_Slightly_Open",
    "Mustache",
    "Narrow_Eyes",
    "No_Beard",
    "Oval_Face",
    "Pale_Skin",
    "Pointy_Nose",
    "Receding_Hairline",
    "Rosy_Cheeks",
    "Sideburns",
    "Smiling",
    "Straight_Hair",
    "Wavy_Hair",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
    "Young",
]


def write_celeba(folder: Path, *, count: int = 9) -> tuple[list[bytes], np.ndarray, list[int]]:
    """The files as JPEG, their marks of -1 and 1, and their parts 0, 1 and 2."""
    files = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    jpegs = [picture(RNG.integers(0, 256, (218, 178, 3), dtype=np.uint8), "JPEG", quality=90) for _ in files]
    marks = RNG.choice([-1, 1], (count, 40))
    parts = [3 * i // count for i in range(count)]
    rows = [f"{file} {' '.join(f'{mark:2d}' for mark in row)} " for file, row in zip(files, marks, strict=True)]
    text = "\n".join([str(count), " ".join(CELEBA_ATTRIBUTES) + " ", *rows, ""])
    (folder / "list_attr_celeba.txt").write_text(text)
    partition = "".join(f"{file} {part}\n" for file, part in zip(files, parts, strict=True))
    (folder / "list_eval_partition.txt").write_text(partition)
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("img_align_celeba")
        for file, data in zip(files, jpegs, strict=True):
            archive.writestr(f"img_align_celeba/{file}", data)
    return jpegs, marks, parts


# --- Oxford's flowers


def write_flowers(folder: Path, *, count: int = 12) -> tuple[list[bytes], np.ndarray, dict[str, np.ndarray]]:
    """The files as JPEG, their classes from 1 on, and the numbers from 1 on of each part."""
    jpegs = [picture(RNG.integers(0, 256, (20, 16 + i, 3), dtype=np.uint8), "JPEG") for i in range(count)]
    classes = RNG.integers(1, 103, count).astype(np.uint8)
    classes[0] = 102
    numbers = RNG.permutation(count) + 1
    parts = {"trnid": numbers[:3], "valid": numbers[3:6], "tstid": numbers[6:]}
    (folder / "102flowers.tgz").write_bytes(tgz({f"jpg/image_{i:05d}.jpg": data for i, data in enumerate(jpegs, 1)}))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": classes}, do_compression=True)
    scipy.io.savemat(folder / "setid.mat", {name: part.astype(np.uint16) for name, part in parts.items()})
    return jpegs, classes, parts
