"""What `aaae prepare` reads: official data sets, folders of every kind of picture, and webdataset tars."""

import gzip
import io
import os
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import servers
import webdataset
from conftest import picture, refused
from official import (
    CELEBA_ATTRIBUTES,
    CIFAR_CLASSES,
    cifar_batches,
    cifar_binary,
    cifar_python,
    idx,
    tgz,
    write_celeba,
    write_flowers,
    write_mnist,
)
from PIL import Image
from sklearn.datasets import load_digits

from aaae_dist import storage
from aaae_dist.images import decode
from aaae_dist.sources import SOURCES, Source, celeba, cifar10, digits, flowers102, folder, mnist, tar

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # height, width: no symmetry
WORDS = np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200  # 16 bits
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


def images(source: Source) -> list[np.ndarray]:
    """All images, read by eight threads; a source's promises are checked on the way."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read, range(len(source.keys))))
    assert all(image.dtype == np.uint8 and image.shape[2:] in ((), (3,)) for image in found)
    assert len(set(source.keys)) == len(source.keys)
    assert not any("." in key for key in source.keys)
    for told in (source.labels, source.splits, source.marks):
        assert told is None or len(told) == len(source.keys)
    if source.labels is not None:
        assert set(source.labels) <= set(range(len(source.classes)))
    return found


def pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# --- digits and MNIST


def test_digits_are_those_of_scikit_learn():
    values, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    source = digits("")
    assert (len(source.keys), source.size, source.channels, source.splits) == (1797, 8, 1, None)
    assert source.labels == labels.tolist()
    assert abs(np.stack(images(source)).reshape(1797, 64) / 255 - values / 16).max() <= 0.5 / 255


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("names", "splits"), [(["t10k"], None), (["train"], None), (["train", "t10k"], ["train"] * 12 + ["test"] * 12)]
)
def test_mnist_reads_the_official_files(tmp_path, zipped, names, splits):
    made = write_mnist(tmp_path, *names, zipped=zipped)
    source = mnist(str(tmp_path))
    assert len(source.keys) == 12 * len(names)
    assert (source.size, source.channels, source.classes) == (32, 1, list("0123456789"))
    assert np.array_equal(np.stack(images(source)), np.concatenate([made[name][0] for name in names]))
    assert source.labels == [label for name in names for label in made[name][1]]
    assert source.splits == splits


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
GOOD = idx(np.zeros((12, 28, 28), np.uint8))
ZIPPED = gzip.compress(GOOD)
DAMAGE = {  # files to write over good ones (None: to remove), and the line that follows
    "cut short": (
        {IMAGES: GOOD[:-1]},
        f"{IMAGES}: not an idx file of 3 dimensions, or cut short .*; download it",
    ),
    "too long": ({IMAGES: GOOD + b"x"}, f"{IMAGES}: not an idx file of 3"),
    "header only": ({IMAGES: GOOD[:9]}, f"{IMAGES}: not an idx file of 3"),
    "empty": ({LABELS: b""}, f"{LABELS}: not an idx file of 1"),
    "labels for images": ({LABELS: GOOD}, f"{LABELS}: not an idx file of 1"),
    "other type": ({LABELS: b"\0\0\x0d\1" + idx(np.zeros(12, np.uint8))[4:]}, f"{LABELS}: not an idx file of 1"),
    "a web page": ({IMAGES: b"<html>404</html>"}, f"{IMAGES}: not an idx file of 3"),
    "gz cut short": ({IMAGES: None, f"{IMAGES}.gz": ZIPPED[:-9]}, rf"{IMAGES}\.gz: not an idx file of 3"),
    "gz not zipped": ({IMAGES: None, f"{IMAGES}.gz": GOOD}, rf"{IMAGES}\.gz: not an idx file of 3"),
    "gz damaged": ({IMAGES: None, f"{IMAGES}.gz": ZIPPED[:12] + b"\xff" * 99}, rf"{IMAGES}\.gz: not an idx file of 3"),
    "counts": ({LABELS: idx(np.zeros(11, np.uint8))}, f"{IMAGES}: 12 images but 11 labels; download both"),
    "a label of ten": ({LABELS: idx(np.full(12, 10, np.uint8))}, f"{LABELS}: a label is 10, not 0 to 9; download it"),
    "no labels": ({LABELS: None}, f"{IMAGES}: its labels are missing; download"),
    "no images": ({IMAGES: None}, f"{LABELS}: its images are missing; download"),
    "nothing": ({IMAGES: None, LABELS: None}, "no MNIST here; it must hold train-images"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_mnist_is_one_line(tmp_path, damage):
    files, line = DAMAGE[damage]
    write_mnist(tmp_path, "t10k")
    for name, data in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if data is not None:
            (tmp_path / name).write_bytes(data)
    with refused(f"{tmp_path}(/|: ){line}"):
        mnist(str(tmp_path))


# --- CIFAR-10, CelebA, flowers


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> str:
    """A folder in which to write local files, and where they are read from."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def upload(folder: Path, place: str) -> None:
    if place != str(folder):
        for path in folder.iterdir():
            storage.write(f"{place}/{path.name}", path.read_bytes())


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar10_reads_either_archive(tmp_path, store, kind):
    batches = cifar_batches()
    members = {"binary": cifar_binary, "python": cifar_python}[kind](batches)
    storage.write(archive := f"{store}/cifar-10-{kind}.tar.gz", tgz(members))
    for url in (store, archive):
        source = cifar10(url)
        assert np.array_equal(np.stack(images(source)), np.concatenate([batch[0] for batch in batches.values()]))
        assert source.labels == [label for _, labels in batches.values() for label in labels]
        assert source.splits == ["train"] * 35 + ["test"] * 7
        assert source.keys == [f"{i:06d}" for i in range(42)]
        assert (source.size, source.channels, source.classes, source.crop) == (32, 3, CIFAR_CLASSES, 0)


def test_celeba_reads_the_official_files(tmp_path, store):
    jpegs, marks, parts = write_celeba(tmp_path)
    upload(tmp_path, store)
    source = celeba(store)
    assert all(map(np.array_equal, images(source), map(pil, jpegs)))
    assert source.keys == [f"{i:06d}" for i in range(1, 10)]
    assert (source.attributes, source.labels, source.classes) == (CELEBA_ATTRIBUTES, None, ())
    assert source.marks is not None
    assert np.array_equal(source.marks, marks == 1)
    assert source.splits == [["train", "val", "test"][part] for part in parts]
    assert (source.size, source.channels, source.crop) == (64, 3, 148)


def test_flowers_read_the_official_files(tmp_path, store):
    jpegs, classes, parts = write_flowers(tmp_path)
    upload(tmp_path, store)
    source = flowers102(store)
    assert all(map(np.array_equal, images(source), map(pil, jpegs)))
    assert [source.classes[label] for label in source.labels or ()] == [str(number) for number in classes]
    assert source.classes == [str(i) for i in range(1, 103)]
    splits = {"trnid": "train", "valid": "val", "tstid": "test"}
    assert source.splits == [next(splits[name] for name in parts if i in parts[name]) for i in range(1, 13)]
    assert source.keys[0] == "image_00001"
    assert (source.size, source.channels, source.crop, source.attributes) == (64, 3, 0, ())


def test_a_damaged_image_is_the_only_one_lost(tmp_path):
    """In an archive that is whole."""
    bad = picture(RGB, "JPEG")[:-50]
    write_celeba(tmp_path)
    with zipfile.ZipFile(tmp_path / "img_align_celeba.zip", "w") as archive:
        for i in range(1, 10):
            archive.writestr(f"img_align_celeba/{i:06d}.jpg", bomb() if i == 4 else picture(RGB))
    write_flowers(tmp_path, count=9)
    members = {f"jpg/image_{i:05d}.jpg": bad if i == 4 else picture(RGB) for i in range(1, 10)}
    (tmp_path / "102flowers.tgz").write_bytes(tgz(members))
    for source, words in ((celeba(str(tmp_path)), "more than 100,000,000"), (flowers102(str(tmp_path)), "truncated")):
        for i in range(9):
            if i == 3:
                with pytest.raises(ValueError, match=words):
                    source.read(i)
            else:
                assert np.array_equal(source.read(i), RGB)


def mat(**values: Any) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, {name: np.array(value, np.uint8) for name, value in values.items()})
    return file.getvalue()


PARTITION = "".join(f"{i:06d}.jpg 0\n" for i in range(1, 9))
INCOMPLETE = {  # the source, files to write over good ones (None: to remove), and the line
    "no cifar": ("cifar10", {}, ": no CIFAR-10 here; it must hold cifar-10-binary.tar.gz or cifar-10-python.tar.gz"),
    "cut cifar": ("cifar10", {"cifar-10-python.tar.gz": GOOD}, "/cifar-10-python.tar.gz: not a gzipped tar, or cut"),
    "no celeba": (
        "celeba",
        {"img_align_celeba.zip": None, "list_eval_partition.txt": None},
        ": CelebA is not here, or not whole: img_align_celeba.zip, list_eval_partition.txt missing; it must hold img",
    ),
    "another partition": (
        "celeba",
        {"list_eval_partition.txt": PARTITION.encode()},
        "/list_eval_partition.txt: it names other images than list_attr_celeba.txt; download both again",
    ),
    "another zip": (
        "celeba",
        {"img_align_celeba.zip": b"PK\5\6" + bytes(18)},
        "/img_align_celeba.zip: 9 of 9 images are missing, first img_align_celeba/000001.jpg; download it again",
    ),
    "no flowers": ("flowers102", {"setid.mat": None}, ": Oxford's 102 flowers is not here, or not whole: setid.mat mi"),
    "another tgz": (
        "flowers102",
        {"102flowers.tgz": tgz({f"jpg/image_{i:05d}.jpg": b"" for i in range(2, 13)})},
        "/102flowers.tgz: 1 of 12 images are missing, first jpg/image_00001.jpg; download it again",
    ),
    "another division": (
        "flowers102",
        {"setid.mat": mat(trnid=[1, 2], valid=[3], tstid=[3])},
        "/setid.mat: it does not divide the 12 images of imagelabels.mat; download both again",
    ),
    "classes from 0 on": (
        "flowers102",
        {"imagelabels.mat": mat(labels=range(12))},
        "/imagelabels.mat: class 0, but they begin at 1; download it again",
    ),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_incomplete_data_sets_are_one_line(tmp_path, kind):
    name, files, line = INCOMPLETE[kind]
    {"celeba": write_celeba, "flowers102": write_flowers}.get(name, lambda folder: None)(tmp_path)
    for file, data in files.items():
        (tmp_path / file).write_bytes(data) if data is not None else (tmp_path / file).unlink()
    with refused(re.escape(f"{tmp_path}{line}")):
        SOURCES[name](str(tmp_path))


@pytest.mark.parametrize("name", SOURCES)
def test_needless_and_missing_folders_are_one_line(name):
    with refused(rf"aaae prepare {name}( some/folder)?: .*give"):
        SOURCES[name]("some/folder" if name == "digits" else "")
    if name != "folder":
        with refused(rf"--labels x.csv: {name} brings its own; leave it out"):
            SOURCES[name]("" if name == "digits" else "x", labels="x.csv")


# --- pictures


PALETTE = Image.fromarray(RGB).quantize(64)
BIG_END = Image.frombytes("I;16B", (9, 6), WORDS.astype(">u2").tobytes())
PICTURES = {  # a file, its expected pixels, and how far they may be off
    "grey": (picture(GREY), GREY, 0),
    "rgb": (picture(RGB), RGB, 0),
    "black and white": (picture(GREY > 99), np.where(GREY > 99, 255, 0), 0),
    "grey and alpha": (picture(np.dstack([GREY, 255 - GREY])), GREY, 0),
    "alpha": (picture(np.dstack([RGB, GREY])), RGB, 0),
    "palette": (picture(PALETTE), PALETTE.convert("RGB"), 0),
    "palette and alpha": (picture(PALETTE, transparency=b"\0\x80" * 9), PALETTE.convert("RGB"), 0),
    "gif": (picture(PALETTE, "GIF"), PALETTE.convert("RGB"), 0),
    "16 bits": (picture(WORDS), WORDS // 256, 0),
    "16 bits, big end first": (picture(BIG_END, "TIFF"), WORDS // 256, 0),
    "webp": (picture(RGB, "WEBP", lossless=True), RGB, 0),
    "bmp": (picture(RGB, "BMP"), RGB, 0),
    "cmyk": (picture(RGB, "TIFF", mode="CMYK"), RGB, 1),
    "cmyk jpeg": (picture(RGB, "JPEG", mode="CMYK", quality=100, subsampling=0), RGB, 3),
    "jpeg": (picture(RGB, "JPEG", quality=100, subsampling=0), RGB, 3),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture_becomes_bytes(kind):
    data, expected, tolerance = PICTURES[kind]
    pixels, expected = decode(data), np.asarray(expected)
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert abs(pixels.astype(int) - expected).max() <= tolerance


UPRIGHT = {  # by the EXIF orientation: where the standard says that row 0 and column 0 of the file belong
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.T,  # left, top
    6: lambda a: a.T[:, ::-1],  # right, top
    7: lambda a: a.T[::-1, ::-1],  # right, bottom
    8: lambda a: a.T[::-1],  # left, bottom
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for pixels in (GREY, WORDS) if kind in ("PNG", "TIFF") else (GREY,):
        plain = decode(picture(pixels, kind))
        turned = decode(picture(pixels, kind, exif=exif))
        if plain.ndim == 3:  # WebP knows no grey
            plain, turned = plain[..., 0], turned[..., 0]
        assert np.array_equal(turned, UPRIGHT[orientation](plain))


def bomb() -> bytes:
    """A PNG of a few bytes that claims 30,000 x 30,000 pixels."""
    data = bytearray(picture(Image.new("L", (1, 1))))
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot identify"),
        (b"GIF89a", "."),
        (b"<html>404</html>", "cannot identify"),
        (PICTURES["rgb"][0][:60], "."),
        (PICTURES["jpeg"][0][:-100], "truncated"),
        (picture(GREY.astype(np.float32), "TIFF"), "32 bits"),
        (bomb(), "30000 x 30000 pixels, more than"),
    ],
    ids=["empty", "header", "page", "png", "jpeg", "float", "bomb"],
)
def test_corrupt_pictures_and_bombs_are_refused(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        decode(data)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
@pytest.mark.filterwarnings("ignore")  # PIL's, of damage that it can read on from
def test_no_damage_raises_anything_but_value_error(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    options: dict = {} if kind in ("GIF", "BMP") else {"exif": exif}
    data, chance, unreadable = picture(RGB, kind, **options), random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])])
        for _ in range(min(chance.choice([0, 1, 4]), len(damaged))):
            damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 2, 255, chance.randrange(256)])
        try:
            assert decode(bytes(damaged)).dtype == np.uint8
        except ValueError:
            unreadable += 1
    assert unreadable > 50


# --- folders


def test_folder_takes_classes_from_the_first_sub_folder_and_keys_from_names(tmp_path):
    long = "x" * 200
    names = {
        "b/x.png": "b/x_png",
        "b/x.jpg": "b/x_jpg",
        "b/deep/er/v1.0 final.PNG": "b/deep/er/v1_0 final_PNG",
        "a b/ünï 🙂 #1 [x] 100%.webp": "a b/ünï 🙂 #1 [x] 100%_webp",
        f"b/{long}/{long}.bmp": f"b/{long}/{long}_bmp",
        "10/.hidden.gif": "10/_hidden_gif",
        "9/z.tiff": "9/z_tiff",
    }
    kinds = {"jpg": "JPEG", "PNG": "PNG", "tiff": "TIFF"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        extension = name.rpartition(".")[2]
        (tmp_path / name).write_bytes(picture(GREY, kinds.get(extension, extension.upper())))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    source = folder(f"{tmp_path}/")
    assert source.classes == ["10", "9", "a b", "b"]
    assert (source.size, source.channels, source.splits, source.crop) == (64, 3, None, 0)
    assert set(source.keys) == set(names.values())
    assert source.labels == [source.classes.index(key.split("/")[0]) for key in source.keys]
    assert all(image.shape[:2] == GREY.shape for image in images(source))


def test_images_without_a_class_among_others_are_one_line(tmp_path):
    for name in ("a/1.png", "b/2.png", "3.png", "4.png"):
        storage.write(f"{tmp_path}/{name}", PICTURES["grey"][0])
    with refused(rf"{tmp_path}: 2 of its 4 images lie in no sub-folder, first '3.png', .*; move them .* --labels FILE"):
        folder(str(tmp_path))


def test_folder_without_sub_folders_has_no_classes(tmp_path):
    storage.write(f"{tmp_path}/1.png", PICTURES["grey"][0])
    source = folder(str(tmp_path))
    assert (source.classes, source.labels) == ([], None)


def test_folder_keys_stay_apart_and_do_not_depend_on_other_images(tmp_path):
    write = lambda name: storage.write(f"{tmp_path}/{name}", PICTURES["grey"][0])  # noqa: E731
    for name in ("a.b.png", "a_b.png", "a_b_png.png", "z.png"):
        write(name)
    before = folder(str(tmp_path))
    images(before)
    write("0.png")
    write("a_b.pn_g.png")
    after = folder(str(tmp_path))
    images(after)
    assert set(before.keys) < set(after.keys)
    assert {"z_png", "a_b_png_png"} < set(before.keys)


def test_folder_on_s3_and_in_memory_reads_the_same(tmp_path, s3):
    for place in (str(tmp_path), s3, f"{s3}/deeper", f"memory://{tmp_path}"):
        for number, kind in enumerate(("grey", "rgb", "16 bits")):
            storage.write(f"{place}/kinds/{kind} [x] #?%20.png", PICTURES[kind][0])
            storage.write(f"{place}/{number}/1.png", PICTURES[kind][0])
    storage.write(f"{s3}/deeper2/1.png", PICTURES["grey"][0])  # a neighbour
    local = folder(str(tmp_path))
    for place in (f"{s3}/deeper", f"memory://{tmp_path}"):
        source = folder(place)
        assert (len(source.keys), source.classes) == (6, ["0", "1", "2", "kinds"])
        assert (source.keys, source.labels) == (local.keys, local.labels)
        assert all(map(np.array_equal, images(local), images(source)))
    assert len(folder(s3).keys) == 13


def test_what_is_no_picture_says_why(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "good.png").write_bytes(PICTURES["rgb"][0])
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "nowhere.png").symlink_to("none.png")
    os.mkfifo(tmp_path / "pipe.png")
    source, reasons = folder(str(tmp_path)), {}
    for i, key in enumerate(source.keys):
        try:
            assert np.array_equal(source.read(i), RGB)
        except ValueError as error:
            reasons[key] = str(error)
    nowhere = "a link that leads nowhere"
    assert reasons.keys() == {"bad_png", "bomb_png", "loop_png", "nowhere_png"}
    assert (reasons["loop_png"], reasons["nowhere_png"]) == (nowhere, nowhere)
    assert reasons["bomb_png"].startswith("30000 x 30000 pixels")


def test_a_failing_store_is_not_a_bad_picture(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "b")
    (tmp_path / "b").write_bytes(PICTURES["rgb"][0])
    source = folder(str(tmp_path))
    (tmp_path / "b").unlink()
    (tmp_path / "b").mkdir()
    with refused(f"{tmp_path}/a.png: .*directory"):
        source.read(0)


def test_folder_behind_a_web_server_reads_the_same_whatever_its_names_are(tmp_path):
    names = ("a b/1 2.png", "a b/z.png", "100%/x+y&z.png", "a%20b/#1?.png", "ünï 🙂/~[1].png", "A/'quoted\" <i>.png")
    for name in names:
        storage.write(str(tmp_path / name), PICTURES["grey"][0])
    with servers.files(tmp_path) as url:
        local, there = folder(str(tmp_path)), folder(url)
        assert (there.keys, there.classes, there.labels) == (local.keys, local.classes, local.labels)
        assert len(images(there)) == len(names)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    for name in ("elsewhere/cats/1.png", "elsewhere/cats/more/2.png", "set/dogs/3.png"):
        storage.write(f"{tmp_path}/{name}", PICTURES["grey"][0])
    root = tmp_path / "set"
    (root / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "lynxes").symlink_to("cats")
    (root / "dogs" / "back").symlink_to(root)
    (tmp_path / "elsewhere" / "cats" / "self").symlink_to(".")
    (tmp_path / "linked").symlink_to(root)
    for place in (root, tmp_path / "linked"):
        source = folder(str(place))
        assert source.keys == [
            *("cats/1_png", "cats/more/2_png", "dogs/3_png", "lynxes/1_png", "lynxes/more/2_png"),
        ]
        assert source.classes == ["cats", "dogs", "lynxes"]
        assert len(images(source)) == 5


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["png"]])
def test_empty_folder_is_one_line(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with refused(rf"{tmp_path}: no images here; it must hold jpg, .* files"):
        folder(str(tmp_path))


@pytest.mark.parametrize("kind", [folder, tar])
def test_a_folder_that_is_none_is_one_line(tmp_path, kind):
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "none", tmp_path / "file"):
        with refused(f"{place}: no such folder; correct the URL$"):
            kind(str(place))


def test_a_name_that_is_no_text_is_still_an_image(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(PICTURES["grey"][0])
    source = folder(str(tmp_path))
    assert np.array_equal(images(source)[0], GREY)
    assert source.keys[0].encode() == b"\\udcff_png"


# --- labels from a file

NAMES = ("x/1.png", "x/2.png", "3.png", "a, b.png")
LABEL_FILES = {  # a file's name, its text, and classes with the labels of NAMES
    "names": ("l.csv", 'file,label\nx/1.png,dog\n3.png,cat\n"a, b.png",cat\nx/2.png,dog\n', ["cat", "dog"], "1100"),
    "numbers": ("l.csv", 'label,file\n10,x/1.png\n9,x/2.png\n9,3.png\n-1,"a, b.png"\n', ["-1", "9", "10"], "2110"),
    "from a spreadsheet": (
        "L.CSV",
        '\ufefffile, label, who\r\n./x/1.png, big dog, me\r\nx//2.png,1\r\n3.png,1,\r\n"a, b.png",ünï\r\n',
        ["1", "big dog", "ünï"],
        "1002",
    ),
    "json": (
        "l.jsonl",
        '{"file": "x/1.png", "label": 10}\n\n{"file": "x/2.png", "label": "9", "who": [1]}\n'
        '{"label": 9, "file": "3.png"}\r\n{"file": "a, b.png", "label": 10}',
        ["9", "10"],
        "1001",
    ),
}


@pytest.fixture
def named(tmp_path) -> Path:
    """A folder of images with NAMES."""
    for name in NAMES:
        storage.write(f"{tmp_path}/set/{name}", PICTURES["grey"][0])
    return tmp_path


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_labels_from_a_file(named, kind):
    name, text, classes, labels = LABEL_FILES[kind]
    (named / name).write_bytes(text.encode())
    source = folder(f"{named}/set", labels=f"{named}/{name}")
    assert source.classes == classes
    by_key = dict(zip(source.keys, source.labels or (), strict=True))
    assert [by_key[name.replace(".", "_")] for name in NAMES] == [int(label) for label in labels]


CSV = 'file,label\nx/1.png,0\nx/2.png,0\n3.png,1\n"a, b.png",1\n'
FORMS = "; give a CSV file (.csv) with the columns file and label, or JSON lines (.jsonl) such as {"
WRONG_LABELS = {  # a file's name, its text, and the line
    "one is missing": ("l.csv", CSV.replace("3.png,1\n", ""), "1 images have no label in it, first '3.png'; it must"),
    "two too many": ("l.csv", CSV + "4.png,1\n5.png,1\n", "2 of its files are no images, first '4.png'; it must name"),
    "other folder": ("l.csv", CSV.replace("x/", "y/"), "2 of its files are no images, first 'y/1.png'; it must name"),
    "no header": ("l.csv", CSV[11:], f"its first line does not name the columns file and label{FORMS}"),
    "no label": ("l.csv", CSV + "4.png,\n", f"line 6 has no file with a label that is text or a whole number{FORMS}"),
    "no column": ("l.csv", CSV + "4.png\n", "line 6 has no file with a label"),
    "twice": ("l.csv", CSV + "./3.png,1\n", f"line 6 names '3.png' again{FORMS}"),
    "empty": ("l.csv", "", "its first line does not name"),
    "a quote": ("l.csv", CSV + '"4.png', f"unexpected end of data{FORMS}"),
    "no text": ("l.csv", "\0\udcff", "'utf-8' codec can't decode"),
    "json as csv": ("l.txt", '{"file": "x/1.png", "label": 1}', "',' expected after '\"'; give a CSV file (.csv) with"),
    "no json": ("l.jsonl", '{"file": "x/1.png", "label": 1}\n{"file"\n', f"line 2 is no JSON{FORMS}"),
    "deep json": ("l.jsonl", "[" * 100_000, f"line 1 is no JSON{FORMS}"),
    "a list": ("l.jsonl", '["x/1.png", 1]', "line 1 has no file with a label"),
    "a fraction": ("l.jsonl", '{"file": "x/1.png", "label": 1.5}', "line 1 has no file with a label"),
    "a boolean": ("l.jsonl", '{"file": "x/1.png", "label": true}', "line 1 has no file with a label"),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_wrong_labels_are_one_line(named, kind):
    name, text, line = WRONG_LABELS[kind]
    (named / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused(f"(--labels )?{named}/{name}: {re.escape(line)}"):
        folder(f"{named}/set", labels=f"{named}/{name}")


def test_missing_labels_are_one_line(named):
    with refused(f"{named}/none.csv: no such file; check the URL"):
        folder(f"{named}/set", labels=f"{named}/none.csv")


# --- tars


def tar_of(samples: Mapping[str, Mapping[str, bytes]]) -> bytes:
    """By webdataset."""
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    return file.getvalue()


def samples(count: int, *, first: int = 0, **more: bytes) -> dict[str, dict[str, bytes]]:
    """Labelled by their numbers modulo 3."""
    pixels = np.random.default_rng(first).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return {
        f"{first + i:04d}": {"png": picture(pixels[i]), "cls": str((first + i) % 3).encode(), **more}
        for i in range(count)
    }


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")  # webdataset's
def test_tars_give_what_webdataset_gives(tmp_path, store):
    long = {"deep/" * 40 + f"{i}": {"jpg": picture(RGB, "JPEG"), "cls": b"2\n"} for i in range(3)}  # PAX names
    parts = {"train/b.tar": samples(5), "train/a/0.tar": samples(4, first=5) | long, "train/c.TAR": samples(1, first=9)}
    for name, members in parts.items():
        storage.write(f"{tmp_path}/{name}", data := tar_of(members))
        storage.write(f"{store}/{name}", data)
    source = tar(f"{store}/train")
    names = [f"{tmp_path}/{name}" for name in sorted(parts)]
    theirs = list(webdataset.WebDataset(names, shardshuffle=False, empty_check=False))
    assert source.keys == [sample["__key__"] for sample in theirs]
    assert [source.classes[label] for label in source.labels or ()] == [s["cls"].decode().strip() for s in theirs]
    assert all(map(np.array_equal, images(source), [pil(s.get("png") or s["jpg"]) for s in theirs]))
    assert (source.splits, source.attributes, source.marks) == (None, [], None)


def test_equal_keys_of_tars_stay_apart(tmp_path):
    for name in ("a.tar", "b.tar"):
        storage.write(f"{tmp_path}/{name}", tar_of(samples(2)) if name == "a.tar" else tar_of(samples(3)))
    source = tar(str(tmp_path))
    assert len(images(source)) == 5
    assert [key[:4] for key in source.keys] == ["0000", "0001", "0000", "0001", "0002"]
    assert source.keys[-1] == "0002"


def test_tars_of_a_prepared_data_set_keep_its_splits_names_and_attributes(tmp_path):
    parts = {"train-000000.tar": samples(3), "val-000000.tar": samples(2, first=3), "test-0.tar": samples(1, first=5)}
    for name, members in parts.items():
        marked = {key: {**it, "attributes.json": f"[1, {int(key) % 2}]".encode()} for key, it in members.items()}
        storage.write(f"{tmp_path}/{name}", tar_of(marked))
    plain = tar(str(tmp_path))
    assert (plain.classes, plain.attributes, plain.marks) == (["0", "1", "2"], [], None)
    storage.write_json(
        f"{tmp_path}/index.json", {"classes": ["ant", "bee", "cat", "dog"], "attributes": ["Male", "Odd"]}
    )
    source = tar(str(tmp_path))
    assert source.classes == ["ant", "bee", "cat", "dog"]
    assert source.splits == ["test", "train", "train", "train", "val", "val"]
    assert source.labels == [int(key) % 3 for key in source.keys]
    assert source.attributes == ["Male", "Odd"]
    assert source.marks is not None
    assert source.marks.tolist() == [[1, int(key) % 2] for key in source.keys]
    assert source.marks.dtype == np.uint8
    for wrong in (b"[1]", b'[1, "x"]', b"[1, 2]", b"[1, -1]", b"[1", b"{}", b"[1, null]"):
        storage.write(f"{tmp_path}/val-000000.tar", tar_of(samples(2, first=3, **{"attributes.json": wrong})))
        with refused(rf"{tmp_path}: an attributes.json is no list of 0 and 1 for each of the index's 2 attributes"):
            tar(str(tmp_path))
    storage.write(f"{tmp_path}/val-000000.tar", tar_of(samples(2, first=3, **{"attributes.json": b"[0, 1]"})))
    storage.write_json(f"{tmp_path}/index.json", {"attributes": ["Male", "Odd", "Bald"]})
    with refused(rf"{tmp_path}: an attributes.json is no list of 0 and 1 for each of the index's 3 attributes"):
        tar(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "labels", "classes"),
    [
        ({"classes": ["ant", "bee"]}, "01", ["ant", "bee"]),
        ({"classes": ["ant", "bee", "cat"]}, "20", ["ant", "bee", "cat"]),
        ({"classes": ["ant", "bee"]}, "20", ["0", "2"]),  # another data set's
        ({"classes": ["b", "a"]}, "ba", ["a", "b"]),  # names of their own
        ({"classes": [7, 8]}, "01", ["7", "8"]),
        ({"classes": "ab"}, "01", ["0", "1"]),
        ({"classes": {"0": "ant", "1": "bee"}}, "01", ["0", "1"]),
        ({}, "01", ["0", "1"]),
        (["classes"], "01", ["0", "1"]),
    ],
)
def test_tars_take_the_names_of_classes_from_an_index_that_fits(tmp_path, index, labels, classes):
    storage.write_json(f"{tmp_path}/index.json", index)
    storage.write(f"{tmp_path}/x.tar", tar_of({key: {"cls": key.encode()} for key in labels}))
    source = tar(str(tmp_path))
    assert source.classes == classes
    assert source.labels == [(classes if label in classes else list("012")).index(label) for label in labels]
    assert (source.size, source.channels, source.attributes, source.marks) == (64, 3, [], None)


def test_tars_without_all_attributes_have_none(tmp_path):
    members = samples(4, **{"attributes.json": b"[1, 0]"})
    del members["0002"]["attributes.json"]
    storage.write_json(f"{tmp_path}/index.json", {"attributes": ["Male", "Odd"]})
    storage.write(f"{tmp_path}/x.tar", tar_of(members))
    source = tar(str(tmp_path))
    assert (source.attributes, source.marks, source.labels) == ([], None, [0, 1, 2, 0])


@pytest.mark.parametrize("other", ["x.tar", "val.tar"])
def test_tars_have_splits_only_if_all_names_tell_one(tmp_path, other):
    for number, name in enumerate(("train-0.tar", "test/0.tar", other)):
        storage.write(f"{tmp_path}/{name}", tar_of(samples(1, first=number)))
    source = tar(str(tmp_path))
    assert source.splits == (None if other == "x.tar" else ["test", "train", "val"])


def test_tars_without_all_labels_have_none(tmp_path):
    members = samples(4)
    del members["0002"]["cls"]
    storage.write(f"{tmp_path}/train-0.tar", tar_of(members))
    source = tar(str(tmp_path))
    assert (source.labels, source.classes, source.splits) == (None, [], None)  # all of one split: none is held out


def test_samples_without_a_readable_image_say_why(tmp_path):
    members = {"a": {"png": bomb()}, "b": {"txt": b"words", "cls": b"1"}, "c": {"png": PICTURES["rgb"][0]}}
    storage.write(f"{tmp_path}/x.tar", tar_of(members))
    source = tar(str(tmp_path))
    for number, words in ((0, "30000 x 30000"), (1, "no image, only (cls, txt|txt, cls)")):
        with pytest.raises(ValueError, match=words):
            source.read(number)
    assert np.array_equal(source.read(2), RGB)


DAMAGED_TARS = {
    "cut short": (lambda: tar_of(samples(3))[:1800], "/x.tar: .*; bring it anew, or remove it"),
    "a web page": (lambda: b"<html>404</html>" * 99, "/x.tar: not a tar file: .*; bring it anew, or remove it"),
    "a gzip": (lambda: gzip.compress(tar_of(samples(3))), "/x.tar: not a tar file: .*; bring it anew, or remove it"),
    "nothing in it": (lambda: tar_of({}), ": its 1 tars hold no samples; check the URL"),
    "no text": (lambda: tar_of({"a": {"cls": b"\xff"}}), "/x.tar: 'utf-8' codec can't decode .*; bring it anew"),
}


@pytest.mark.parametrize("kind", DAMAGED_TARS)
def test_damaged_tars_are_one_line(tmp_path, kind):
    make, line = DAMAGED_TARS[kind]
    storage.write(f"{tmp_path}/x.tar", make())
    with refused(f"{tmp_path}{line}"):
        tar(str(tmp_path))


def test_a_folder_without_tars_is_one_line(tmp_path):
    storage.write(f"{tmp_path}/x.tar.gz", b"")
    with refused(f"{tmp_path}: no tars here; it must hold webdataset shards"):
        tar(str(tmp_path))
