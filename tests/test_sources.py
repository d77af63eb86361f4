"""What `aaae prepare` reads: files of the official formats, and folders of every kind of picture."""

import gzip
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import examples, picture, refused
from PIL import Image
from sklearn.datasets import load_digits

from aaae_dist import storage
from aaae_dist.sources import SOURCES, decode, digits, folder, mnist

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # height, width: no symmetry
WORDS = np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200  # 16 bits
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


def idx(values: np.ndarray) -> bytes:
    """The format of http://yann.lecun.com/exdb/mnist, from its description."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + bytes(values.ravel().tolist())


def write_mnist(folder: Path, *names: str, count: int = 12, zipped: bool = False) -> dict[str, tuple]:
    """Small official files; images and labels by name."""
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


def test_digits_are_those_of_scikit_learn():
    values, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    source = digits("")
    found = examples(source)
    assert (source.count, source.size, source.channels) == (1797, 8, 1)
    assert [(e.label, e.split) for e in found] == [(label, "") for label in labels]
    assert abs(np.stack([e.pixels for e in found]).reshape(1797, 64) / 255 - values / 16).max() <= 0.5 / 255
    assert len({e.key for e in found}) == 1797


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("names", "splits"), [(["t10k"], [""]), (["train"], [""]), (["train", "t10k"], ["train", "test"])]
)
def test_mnist_reads_the_official_files(tmp_path, zipped, names, splits):
    made = write_mnist(tmp_path, *names, zipped=zipped)
    source = mnist(str(tmp_path))
    found = examples(source)
    assert source.count == 12 * len(names)
    assert (source.size, source.channels, source.classes) == (32, 1, list("0123456789"))
    assert np.array_equal(np.stack([e.pixels for e in found]), np.concatenate([made[name][0] for name in names]))
    assert [e.label for e in found] == [label for name in names for label in made[name][1]]
    assert [e.split for e in found] == [split for split in splits for _ in range(12)]
    assert len({e.key for e in found}) == source.count


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


@pytest.mark.parametrize(("name", "argument"), [("digits", "some/folder"), ("mnist", ""), ("folder", "")])
def test_needless_and_missing_folders_are_one_line(name, argument):
    with refused(rf"aaae prepare {name} ?{argument}: .*give"):
        SOURCES[name](argument)


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
        (bomb(), "decompression bomb"),
    ],
    ids=["empty", "header", "page", "png", "jpeg", "float", "bomb"],
)
def test_corrupt_pictures_and_bombs_are_refused(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


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


def test_folder_takes_labels_from_the_first_sub_folder_and_keys_from_names(tmp_path):
    long = "x" * 200
    names = {
        "b/x.png": "b/x_png",
        "b/x.jpg": "b/x_jpg",
        "b/deep/er/v1.0 final.PNG": "b/deep/er/v1_0 final_PNG",
        "a b/ünï 🙂 #1 [x] 100%.webp": "a b/ünï 🙂 #1 [x] 100%_webp",
        f"b/{long}/{long}.bmp": f"b/{long}/{long}_bmp",
        ".hidden.gif": "_hidden_gif",
        "z.tiff": "z_tiff",
    }
    kinds = {"jpg": "JPEG", "PNG": "PNG", "tiff": "TIFF"}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        extension = name.rpartition(".")[2]
        (tmp_path / name).write_bytes(picture(GREY, kinds.get(extension, extension.upper())))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    source = folder(f"{tmp_path}/")
    found = examples(source)
    assert source.classes == ["a b", "b"]
    assert (source.size, source.channels) == (64, 3)
    assert {example.key for example in found} == set(names.values())
    for example in found:
        first = example.key.split("/")[0]
        assert example.label == {"a b": 0, "b": 1}.get(first)
        assert example.pixels.shape[:2] == GREY.shape


def test_folder_keys_stay_apart(tmp_path):
    for name in ("a.b.png", "a_b.png", "a_b_png.png", "a_b_png-1.png", "a.b.png-1.png"):
        (tmp_path / name).write_bytes(PICTURES["grey"][0])
    source = folder(str(tmp_path))
    keys = [example.key for example in examples(source)]
    assert len(set(keys)) == 5
    assert not any("." in key for key in keys)


def test_folder_on_s3_and_in_memory_reads_the_same(tmp_path, s3):
    for place in (str(tmp_path), s3, f"{s3}/deeper", f"memory://{tmp_path}"):
        for number, kind in enumerate(("grey", "rgb", "16 bits")):
            storage.write(f"{place}/kinds/{kind} [x] #?%20.png", PICTURES[kind][0])
            storage.write(f"{place}/{number}.png", PICTURES[kind][0])
    local = folder(str(tmp_path))
    for place in (f"{s3}/deeper", f"memory://{tmp_path}"):
        source = folder(place)
        assert (source.count, source.classes) == (6, ["kinds"])
        for ours, theirs in zip(examples(local), examples(source), strict=True):
            assert (ours.key, ours.label) == (theirs.key, theirs.label)
            assert np.array_equal(ours.pixels, theirs.pixels)
    assert folder(s3).count == 12


def test_folder_leaves_out_what_is_no_picture(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "good.png").write_bytes(PICTURES["rgb"][0])
    source = folder(str(tmp_path))
    assert [source.example(i) is None for i in range(source.count)] == [True, False]


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["png"]])
def test_empty_folder_is_one_line(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    for place in (tmp_path, tmp_path / "none"):
        with refused(rf"{place}: no images here; it must hold \.bmp, .* files"):
            folder(str(place))


def test_a_name_that_is_no_text_is_still_an_image(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(PICTURES["grey"][0])
    assert np.array_equal(examples(folder(str(tmp_path)))[0].pixels, GREY)
