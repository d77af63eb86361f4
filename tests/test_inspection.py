"""Inspecting and verifying: counts against the source's, and whatever is flipped, cut or gone is found."""

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import examples, noise, prepared, refused
from sklearn.datasets import load_digits

from aaae_dist import inspection, storage
from aaae_dist.errors import UserError
from aaae_dist.inspection import inspect, some_images
from aaae_dist.shards import INDEX, read_index
from aaae_dist.tars import scan

FIRST = "train-000000.tar"


def verify(url: str | Path, *, decode: bool = True) -> list[str]:
    """What is damaged, without the place of the data set."""
    found = list(inspection.verify(str(url), decode=decode, workers=2))
    assert all(line.startswith(f"{url}/") and "\n" not in line for line in found)
    return [line.removeprefix(f"{url}/") for line in found]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """24 images in shards of 4, with labels and two attributes. Copy it before you change it."""
    out, source = tmp_path_factory.mktemp("small") / "shards", noise(24)
    marks = np.array([[i % 2, i % 3 == 0] for i in range(24)], np.uint8)
    prepared(source._replace(attributes=["odd", "third"], marks=marks), out)
    return out


@pytest.fixture
def copy(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


# --- verify


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_what_is_whole_has_no_damage(digits, small, tmp_path, request, kind):
    assert verify(digits) == verify(small) == verify(small, decode=False) == []
    if kind != "local":
        out = f"memory://{tmp_path}" if kind == "memory" else request.getfixturevalue("s3")
        prepared(noise(9), out)
        assert verify(out) == []


@pytest.mark.parametrize("decode", [True, False])
def test_a_flipped_byte_is_found_wherever_it_is(copy, decode):
    """In a tar, its padding and its end too, and in its file of offsets; the sample is named if it is in one."""
    shard = read_index(str(copy)).shards[0]
    entry(copy, lambda index: index.update(shards=index["shards"][:1]))  # for speed
    data, table = (copy / shard.url).read_bytes(), (copy / shard.offsets).read_bytes()
    starts = scan(data)[0].starts
    for at in [*range(0, len(data), 97), len(data) - 1]:
        (copy / shard.url).write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        first, *samples = verify(copy, decode=decode)
        number = int(np.searchsorted(starts, at // 512, side="right")) - 1
        damaged = [f"{FIRST}: sample {number}: its bytes are not those that were written"] if number < 4 else []
        assert (first, samples) == (f"{FIRST}: its sha256 is not the index's", damaged)
    (copy / shard.url).write_bytes(data)
    for at in range(len(table)):
        (copy / shard.offsets).write_bytes(table[:at] + bytes([table[at] ^ 1]) + table[at + 1 :])
        line = f"{FIRST}: its offsets, {shard.offsets}, are not those of its 4 samples"
        assert verify(copy, decode=decode) == [line]


def entry(copy: Path, change: Callable[[dict], object]) -> None:
    """Change the index."""
    found = json.loads((copy / INDEX).read_text())
    change(found)
    (copy / INDEX).write_text(json.dumps(found))


def rewrite(copy: Path, change: Callable[[list[tuple[str, bytes]]], object]) -> None:
    """Change the members of the first tar, and let index and offsets fit."""
    data = (copy / FIRST).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # pyrefly: ignore
    change(members)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    offsets, keys = scan(file.getvalue())
    storage.write(str(copy / FIRST), file.getvalue())
    storage.write(str(copy / "train-000000.offsets"), offsets.dump())
    digest = hashlib.sha256(file.getvalue()).hexdigest()
    fitting = {"samples": len(keys), "bytes": len(file.getvalue()), "sha256": digest}
    entry(copy, lambda index: index["shards"][0].update(fitting))


def member(extension: str, content: bytes | None) -> Callable[[Path], None]:
    """Replace the first member of this extension, or remove it."""

    def change(members: list[tuple[str, bytes]]) -> None:
        at = next(i for i, (name, _) in enumerate(members) if name.endswith(f".{extension}"))
        members[at : at + 1] = [] if content is None else [(members[at][0], content)]

    return lambda copy: rewrite(copy, change)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut": (
        lambda copy: (copy / FIRST).write_bytes((copy / FIRST).read_bytes()[:3000]),
        [r"3000 bytes, but the index says \d+"],
    ),
    "longer": (
        lambda copy: (copy / FIRST).write_bytes((copy / FIRST).read_bytes() + bytes(512)),
        [r"\d+ bytes, but the index says \d+"],
    ),
    "empty": (lambda copy: (copy / FIRST).write_bytes(b""), [r"0 bytes, but the index says \d+"]),
    "another": (lambda copy: shutil.copy(copy / "train-000001.tar", copy / FIRST), [".*"] * 5),
    "gone": (lambda copy: (copy / FIRST).unlink(), ["no such file"]),
    "folder": (lambda copy: ((copy / FIRST).unlink(), (copy / FIRST).mkdir()), [".*Is a directory.*"]),
    "offsets cut": (
        lambda copy: (copy / "train-000000.offsets").write_bytes(b"1234"),
        ["its offsets, train-000000.offsets, are not those of its 4 samples"],
    ),
    "both": (
        lambda copy: ((copy / "train-000000.offsets").write_bytes(b"1234"), (copy / FIRST).write_bytes(b"")),
        [r"0 bytes, but the index says \d+", "not the 36 bytes of 4 samples"],
    ),
    "fewer": (
        lambda copy: entry(copy, lambda index: index["shards"][0].update(samples=3)),
        ["4 samples, but the index says 3"],
    ),
    "no tar": (
        lambda copy: (
            (copy / FIRST).write_bytes(b"x" * 1024),
            entry(
                copy,
                lambda index: index["shards"][0].update(bytes=1024, sha256=hashlib.sha256(b"x" * 1024).hexdigest()),
            ),
        ),
        ["not a tar file: .*"],
    ),
    "no image": (member("png", b"no image"), [r"sample \d+: cannot identify image file"]),
    "without image": (member("png", None), [r"sample \d+: no image, only attributes.json, cls"]),
    "label": (member("cls", b"5"), [r"sample \d+: label 5 of 5 classes"]),
    "attributes": (member("attributes.json", b"[1]"), [r"sample \d+: its attributes are not 2 of 0 and 1"]),
    "size": (
        lambda copy: entry(copy, lambda index: index.update(height=9, width=9)),
        [r"sample \d+: 8 x 8 pixels instead of 9 x 9"] * 24,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_for_each_shard_and_sample(copy, damage):
    change, lines = DAMAGE[damage]
    change(copy)
    found = verify(copy)
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert re.fullmatch(rf"t[a-z]+-00000\d\.tar: {expected}", line), line


def test_a_store_that_fails_is_no_damage(s3, monkeypatch):
    prepared(noise(9), s3)
    storage.remove(f"{s3}/train-000000.tar")
    assert verify(s3) == ["train-000000.tar: no such file"]
    read = storage.read

    def refuse(url: str, *arguments: int, **options: float | None) -> bytes:
        if url.endswith(".tar"):
            raise UserError(f"{url}: access denied; check")
        return read(url, *arguments, **options)

    monkeypatch.setattr(storage, "read", refuse)
    with refused(f"{s3}/.*: access denied; check$"):
        verify(s3)


# --- inspect


def test_counts_are_those_of_the_source(digits):
    labels, found, index = load_digits().target, inspect(digits, workers=2), read_index(digits)
    assert json.loads(json.dumps(found)) == found
    assert [found[name] for name in ("source", "channels", "height", "width")] == ["digits", 1, 8, 8]
    assert {name: sum(row.values()) for name, row in found["classes"].items()} == {
        str(label): count for label, count in sorted(Counter(labels.tolist()).items())
    }
    for split, images in (("train", 1618), ("test", 179)):
        size = sum(Path(digits, shard.url).stat().st_size for shard in index.shards if shard.split == split)
        shards = {"train": 9, "test": 1}[split]
        expected = {"images": images, "shards": shards, "bytes": size, "bytes_per_image": round(size / images, 1)}
        assert found["splits"][split] == expected
        assert sum(row[split] for row in found["classes"].values()) == images
    assert found["attributes"] == {}


def test_attributes_are_counted(small):
    found = inspect(str(small), workers=2)
    assert {name: sum(row.values()) for name, row in found["attributes"].items()} == {"odd": 12, "third": 8}
    assert {name: sum(row.values()) for name, row in found["classes"].items()} == {
        "0": 5,
        "1": 5,
        "2": 5,
        "3": 5,
        "4": 4,
    }


def test_without_labels_nothing_is_read(tmp_path):
    index = prepared(noise(9, labels=False), tmp_path)
    for shard in index.shards:
        (tmp_path / shard.url).unlink()
    found = inspect(str(tmp_path), workers=1)
    assert (found["classes"], found["splits"]["train"]["images"]) == ({}, 6)


def test_random_images_are_those_of_the_data_set(small):
    by_bytes = {image.pixels.tobytes() for image in examples(noise(24)) if image.pixels.ndim == 3}
    images = some_images(str(small), most=10, seed=0, workers=3)
    assert images.shape == (10, 8, 8, 3)
    assert len({image.tobytes() for image in images}) == 10
    assert np.array_equal(images, some_images(str(small), most=10, seed=0, workers=1))
    assert not np.array_equal(images, some_images(str(small), most=10, seed=1, workers=1))
    all_of_them = some_images(str(small), most=64, seed=0, workers=1)
    assert len(all_of_them) == 24
    assert sum(image.tobytes() in by_bytes for image in all_of_them) == 12  # the others are grey


def test_damage_is_one_line_that_names_verify(copy):
    (copy / FIRST).write_bytes(b"x" * 100_000)
    for look in (
        lambda: inspect(str(copy), workers=1),
        lambda: some_images(str(copy), most=64, seed=0, workers=1),
    ):
        with refused(f"{copy}/{FIRST}: .*; see all damage with `aaae shards verify {copy}`$"):
            look()


def test_index_is_needed(tmp_path):
    for look in (inspect, lambda url, workers: list(inspection.verify(url, decode=True, workers=workers))):
        with refused(f"{tmp_path}/{INDEX}: no such file"):
            look(str(tmp_path), workers=1)
