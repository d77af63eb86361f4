"""Shards: what stock webdataset reads from them, the same bytes every time, and no data set by halves."""

import gc
import hashlib
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from conftest import examples, noise, prepared, refused
from PIL import Image

from aaae_dist import sources, storage
from aaae_dist.errors import UserError
from aaae_dist.shards import INDEX, Index, fit, read_index
from aaae_dist.sources import Example

RNG = np.random.default_rng(0)


def samples(out: str, index: Index, split: str) -> list[dict]:
    """What stock webdataset makes of a split."""
    urls = [storage.join(out, shard.url) for shard in index.shards if shard.split == split]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        stock: Any = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
        found = list(stock)
        gc.collect()
    return found


def contents(out: str) -> dict[str, bytes]:
    return {name: storage.read(storage.join(out, name)) for name in storage.listing(out)}


def test_index_says_what_the_shards_hold(digits):
    index, files = read_index(digits), contents(digits)
    assert {shard.url for shard in index.shards} | {INDEX} == set(files)
    for shard in index.shards:
        assert shard.bytes == len(files[shard.url])
        assert shard.sha256 == hashlib.sha256(files[shard.url]).hexdigest()
        with tarfile.open(Path(digits) / shard.url) as tar:
            assert len(tar.getnames()) == 2 * shard.samples
    assert [shard.samples for shard in index.shards] == [180] * 8 + [178, 179]
    assert [shard.split for shard in index.shards] == ["train"] * 9 + ["test"]
    assert (index.source, index.channels, index.height, index.width) == ("digits", 1, 8, 8)
    assert index.classes == list("0123456789")
    assert json.loads(files[INDEX]) == index.model_dump()


def test_stock_webdataset_reads_every_digit_once(digits):
    source, index = sources.digits(""), read_index(digits)
    found = {sample["__key__"]: sample for split in ("train", "test") for sample in samples(digits, index, split)}
    assert len(found) == source.count
    for example in examples(source):
        assert found[example.key]["cls"] == example.label
        assert np.array_equal(found[example.key]["png"][:, :, 0], example.pixels)
    keys = list(found)  # shuffled before they are cut into shards
    assert abs(np.corrcoef([int(key) for key in keys], np.arange(source.count))[0, 1]) < 0.1
    assert keys[:3] == ["000229", "000674", "001702"]  # the order never changes


@pytest.mark.parametrize(("quality", "extension"), [(0, "png"), (95, "jpg"), (50, "jpg")])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [True, False])
def test_stock_webdataset_reads_pixels_and_labels(tmp_path, quality, extension, channels, labels):
    source, out = noise(11, labels=labels), str(tmp_path / "out")
    index, bad = prepared(source, out, quality=quality, channels=channels)
    found = {sample["__key__"]: sample for split in ("train", "test") for sample in samples(out, index, split)}
    assert (len(found), bad) == (11, [])
    for i, example in enumerate(examples(source)):
        expected = Image.fromarray(example.pixels).convert("RGB" if channels == 3 else "L")
        if quality:
            expected.save(tmp_path / "x.jpg", quality=quality, subsampling=0)
            expected = Image.open(tmp_path / "x.jpg")
        sample = found[f"{i:03d}"]
        assert np.array_equal(sample[extension], np.asarray(expected.convert("RGB")))
        assert sample.get("cls") == (i % 5 if labels else None)
        assert {name for name in sample if not name.startswith("_")} == {extension} | ({"cls"} if labels else set())


def test_names_of_all_kinds_survive_the_tar(tmp_path):
    names = ["a/x.png", "a/x.jpg", "a/v1.0 final.png", "ü 🙂 #%20[x]?/y.png", f"{'d' * 200}/{'x' * 200}.png", "z.png"]
    for shade, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (70, 64), shade).save(tmp_path / "in" / name)
    source, out = sources.folder(str(tmp_path / "in")), str(tmp_path / "out")
    index, _ = prepared(source, out, held_out=1)
    found = {sample["__key__"]: sample for split in ("train", "test") for sample in samples(out, index, split)}
    assert found.keys() == {name.replace(".", "_") for name in names}
    for key, _, label, _ in examples(source):
        assert found[key].get("cls") == label
        assert (found[key]["png"] == names.index(next(n for n in names if n.replace(".", "_") == key))).all()


def test_the_same_input_gives_the_same_bytes_everywhere(tmp_path, s3):
    places = [str(tmp_path / "a"), str(tmp_path / "b"), f"memory://{tmp_path}", f"{s3}/deep/er"]
    for place in places:
        prepared(noise(23), place)
    first, *others = (contents(place) for place in places)
    assert len(first) == 1 + 5 + 1
    assert all(other == first for other in others)
    prepared(noise(23), f"{s3}/seed", seed=1)
    assert contents(f"{s3}/seed") != first


@pytest.mark.parametrize("count", [2, 5, 9, 12])
@pytest.mark.parametrize("samples_per_shard", [1, 4, 1000])
def test_shards_are_full_but_the_last_of_a_split(tmp_path, count, samples_per_shard):
    index, _ = prepared(noise(count), tmp_path, held_out=1, samples_per_shard=samples_per_shard)
    counts = [shard.samples for shard in index.shards if shard.split == "train"]
    assert sum(counts) == count - 1
    assert all(n == samples_per_shard for n in counts[:-1])
    assert [(shard.url, shard.samples) for shard in index.shards if shard.split == "test"] == [("test-000000.tar", 1)]


def test_official_split_is_kept(tmp_path):
    source = noise(12)
    official = [found._replace(split="test" if i in (1, 5, 6) else "train") for i, found in enumerate(examples(source))]
    index, _ = prepared(source._replace(example=lambda i: official[i]), tmp_path, held_out=1)
    assert {sample["__key__"] for sample in samples(str(tmp_path), index, "test")} == {"001", "005", "006"}
    assert len(samples(str(tmp_path), index, "train")) == 9


def test_unreadable_images_are_counted_and_left_out(tmp_path):
    unreadable = {0, 3, 7, 22}
    index, bad = prepared(noise(23, unreadable=unreadable), tmp_path)
    found = [s["__key__"] for split in ("train", "test") for s in samples(str(tmp_path), index, split)]
    assert bad == sorted(unreadable)
    assert sorted(found) == [f"{i:03d}" for i in range(23) if i not in unreadable]
    assert sum(shard.samples for shard in index.shards) == 19


@pytest.mark.parametrize(
    ("source", "changes", "line"),
    [
        (noise(5, unreadable=range(5)), {}, "test: none of its 5 images can be read; check the files"),
        (noise(0), {}, "test: none of its 0 images can be read"),
        (noise(5), {"held_out": 0}, "--held-out 0: it must leave some of the 5 images"),
        (noise(5), {"held_out": 5}, "--held-out 5: it must leave some of the 5 images"),
    ],
)
def test_nothing_to_prepare_is_one_line(tmp_path, source, changes, line):
    with refused(line):
        prepared(source, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_place_that_holds_a_data_set_is_refused_and_untouched(tmp_path, request, kind):
    out = {"local": str(tmp_path), "memory": f"memory://{tmp_path}"}.get(kind) or request.getfixturevalue("s3")
    prepared(noise(9), out)
    before = contents(out)
    with refused(f"{out}/: it already holds a data set; remove it first, or choose another --out$"):
        prepared(noise(9), out + "/", seed=1)
    assert contents(out) == before


def test_a_failure_in_the_middle_publishes_nothing_and_can_be_repeated(tmp_path):
    source, out = noise(23), str(tmp_path)

    def example(i: int) -> Example | None:
        if i == 22:
            raise UserError("the store fails")
        return source.example(i)

    with refused("the store fails"):
        prepared(source._replace(example=example), out)
    assert not (tmp_path / INDEX).exists()
    with refused(f"{out}/{INDEX}: no such file; prepare a data set with `aaae prepare SOURCE --out {out}`, or correct"):
        read_index(out)
    prepared(source, out)
    prepared(source, f"memory://{tmp_path}")
    assert contents(out) == contents(f"memory://{tmp_path}")


def test_full_disk_is_one_line_and_loses_nothing(full_disk):
    storage.write(f"{full_disk}/mine", b"mine" * 1000)
    with refused(rf"{full_disk}/train-\d+\.tar: no space left; free some, or choose another place$"):
        prepared(noise(200), full_disk)
    left = contents(str(full_disk))
    assert left["mine"] == b"mine" * 1000
    assert INDEX not in left
    assert all(name.endswith(".tar") for name in left.keys() - {"mine"})  # no litter


# --- the rule of size


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 9), (40, 30), (30, 41), (5, 3), (1, 300), (300, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_short_side_is_resized_and_the_middle_cut_out(height, width, channels):
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    expected = image.resize((8, 8), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    assert np.array_equal(fit(pixels, channels=channels, size=8), np.asarray(expected))


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 32), (27, 27, 32), (20, 24, 32), (16, 16, 32)])
def test_small_grey_images_are_bordered_with_black(height, width, size):
    pixels = RNG.integers(1, 256, (height, width), dtype=np.uint8)
    bordered = fit(pixels, channels=1, size=size)
    top, left = (size - height) // 2, (size - width) // 2
    assert bordered.shape == (size, size)
    assert np.array_equal(bordered[top : top + height, left : left + width], pixels)
    assert np.count_nonzero(bordered) == pixels.size
    assert np.count_nonzero(fit(pixels, channels=3, size=size)) > 3 * 0.95 * size**2  # colour is resized
    assert np.count_nonzero(fit(pixels[:15], channels=1, size=size)) > 0.95 * size**2  # so is what is too small


# --- the index


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text[:-10], r"not JSON \(\d+ bytes\); it is damaged"),
        (lambda text: b"", r"not JSON \(0 bytes\); it is damaged"),
        (lambda text: b"[]", "the whole: input should be a valid dictionary.*; it is damaged or not an index"),
        (lambda text: b"{}", "source: field required; it is damaged or not an index"),
        (lambda text: text.replace(b'"sha256"', b'"sha1"', 1), r"shards\.0\.sha256: field required; it is damaged"),
        (lambda text: text.replace(b'"version": 1', b'"version": 2'), "version: input should be 1"),
        (
            lambda text: text.replace(b'"samples": ', b'"samples": "many", "n": ', 1),
            r"shards\.0\.samples: input should",
        ),
        (lambda text: json.dumps({**json.loads(text), "shards": []}).encode(), "it lists no shards; prepare"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}).encode(), "extra: extra inputs are not permitted"),
    ],
)
def test_damaged_index_is_one_line(tmp_path, digits, damage, line):
    (tmp_path / INDEX).write_bytes(damage((Path(digits) / INDEX).read_bytes()))
    with refused(rf"{tmp_path}/index\.json: {line}"):
        read_index(str(tmp_path))
