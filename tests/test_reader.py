"""Samples by number: what is read, what cannot be used, damage, and stores with their cache."""

import hashlib
import io
import itertools
import json
import logging
import tarfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import noise, picture, prepared, refused
from PIL import Image

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.data import Stream, sweep
from aaae_dist.images import decode
from aaae_dist.reader import Reader, Told
from aaae_dist.shards import INDEX, Index, Shard
from aaae_dist.tars import scan


def reader(url: str, *, split: str = "train", **settings: Any) -> Reader:
    return Reader(Data.model_validate({"url": url, "channels": 1, "size": 8} | settings), split=split)


def read(source: Reader, *places: tuple[int, int]) -> tuple[np.ndarray, Told]:
    pixels = np.zeros((len(places), *source.shape), np.uint8)
    return pixels, source.read(np.array(places), pixels)


def read_all(source: Reader) -> tuple[list[str], bytes]:
    """Keys and pixels of a whole split."""
    batches = list(sweep(source, limit=len(source), batch_size=len(source)))
    return batches[0].keys, batches[0].images.contiguous().numpy().tobytes()


def publish(out: Path, *tars: dict[str, bytes], channels: int = 3, classes: int = 0) -> str:
    """A data set of hand-made tars of such members; a sample's name ends at the first dot."""
    shards = []
    for number, members in enumerate(tars):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        data = file.getvalue()
        found, keys = scan(data)
        url, offsets = f"{number}.tar", f"{number}.offsets"
        storage.write(f"{out}/{url}", data)
        storage.write(f"{out}/{offsets}", found.dump())
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(Shard(url=url, split="train", samples=len(keys), bytes=len(data), sha256=sha256, offsets=offsets))
    names = [str(i) for i in range(classes)]
    index = Index(source="test", channels=channels, height=8, width=8, classes=names, attributes=[], shards=shards)
    storage.write_json(f"{out}/{INDEX}", index.model_dump())
    return str(out)


# --- what is read


KINDS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "JPG": "JPEG", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM"}


@pytest.mark.parametrize("extension", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_foreign_tars(tmp_path, extension, mode, channels):
    ramp = np.add.outer(np.arange(8) * 9, np.arange(8) * 5)[..., None] + np.array([0, 50, 100])
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(KINDS[extension], {})
    data = picture(ramp.astype(np.uint8), KINDS[extension], mode=mode, **options)
    long = "b" * 200  # a name that takes an extended header
    members = {"dir/a.txt": b"no image", f"dir/a.{extension}": data, "dir/a.cls": b"7", f"{long}.{extension}": data}
    labelled = members | {f"{long}.cls": b"0"}
    expected = np.asarray(Image.fromarray(ramp.astype(np.uint8)).convert(mode).convert("RGB" if channels == 3 else "L"))
    for number, (parts, classes, labels) in enumerate([(members, 0, [None, None]), (labelled, 8, [7, 0])]):
        url = publish(tmp_path / str(number), parts, channels=channels, classes=classes)
        pixels, told = read(reader(url, channels=channels), (0, 0), (0, 1))
        difference = pixels.astype(int) - expected.reshape(8, 8, channels)
        assert abs(difference).max() <= (2 if KINDS[extension] == "JPEG" else 0)
        assert (told.keys, told.labels) == (["dir/a", long], labels)


@pytest.mark.parametrize("length", [99, 100, 101, 150, 255])
def test_names_of_any_length(tmp_path, length):
    """A tar's header has room for 100 bytes, and no end mark then."""
    key = "k" * (length - 4)
    _, told = read(reader(publish(tmp_path, sample(key, 10) | sample("other", 20)), channels=3), (0, 0), (0, 1))
    assert told.keys == [key, "other"]


def test_a_name_that_is_no_utf8(tmp_path):
    url = publish(tmp_path, {"\udcff\udcfe.png": picture(shade(9)), "b.png": picture(shade(8))})
    pixels, told = read(reader(url, channels=3), (0, 0), (0, 1))
    assert told.keys == ["\udcff\udcfe", "b"]
    assert pixels[:, 0, 0, 0].tolist() == [9, 8]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_keep_their_range(tmp_path, channels):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(file := io.BytesIO(), "PNG")
    url = publish(tmp_path, {"a.png": file.getvalue()}, channels=channels)
    pixels, _ = read(reader(url, channels=channels), (0, 0))
    assert np.array_equal(pixels[0], np.repeat((values >> 8)[..., None], channels, axis=2))
    assert np.array_equal(decode(file.getvalue()), values >> 8)


def test_time_is_told(tmp_path):
    source = reader(publish(tmp_path, sample("a", 10)), channels=3)
    _, told = read(source, *[(0, 0)] * 100)
    assert 0 < told.fetching < 10
    assert 0 < told.decoding < 10


# --- what cannot be used


def shade(value: int, *, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def bomb(kind: str) -> bytes:
    """A small file whose header promises 60,000 x 60,000 pixels."""
    data = bytearray(picture(shade(9), kind))
    if kind == "PNG":
        data[16:24] = (60_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    else:
        start = data.index(b"\xff\xc0")
        data[start + 5 : start + 9] = (60_000).to_bytes(2, "big") * 2
    return bytes(data)


BROKEN = {
    "empty": {".png": b""},
    "no image": {".png": b"<html>"},
    "cut png": {".png": picture(shade(9))[:50]},
    "cut jpeg": {".jpg": picture(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "JPEG")[:-20]},
    "wrong size": {".png": picture(shade(9, height=9, width=9))},
    "wrong shape": {".jpg": picture(shade(9, height=4, width=16), "JPEG")},  # as many pixels
    "nothing but a label": {".cls": b"1"},
    "a label that is no number": {".png": picture(shade(9)), ".cls": b"cat"},
    "a label of no class": {".png": picture(shade(9)), ".cls": b"100"},
    "no label": {".png": picture(shade(9))},
    "a bomb": {".png": bomb("PNG"), ".cls": b"9"},
    "a bomb of a JPEG": {".jpg": bomb("JPEG"), ".cls": b"9"},
}


def sample(key: str, members: dict[str, bytes] | int) -> dict[str, bytes]:
    """Members of a sample, or of a readable one of this shade."""
    parts = {".png": picture(shade(members)), ".cls": b"%d" % members} if isinstance(members, int) else members
    return {key + extension: data for extension, data in parts.items()}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_unreadable_sample_is_replaced_counted_once_and_reported_once(tmp_path, caplog, broken):
    bad = BROKEN[broken]
    first = sample("a", 10) | sample("b", bad) | sample("c", bad) | sample("d", 40) | sample("e", bad)
    source = reader(publish(tmp_path, first, sample("f", 60), classes=100), channels=3)
    with caplog.at_level(logging.WARNING, "aaae_dist"):
        results = [read(source, *((0, number) for number in range(5)), (1, 0)) for _ in range(3)]
    for pixels, told in results:
        assert told.keys == ["a", "d", "d", "d", "a", "f"]  # the next usable one of the shard, round its end
        assert told.labels == [10, 40, 40, 40, 10, 60]
        assert pixels[:, 0, 0, 0].tolist() == told.labels
    assert sorted(source.bad) == [(0, 1), (0, 2), (0, 4)]
    assert [source.bad[place].key for place in sorted(source.bad)] == ["b", "c", "e"]
    for message, key in zip(caplog.messages, "bce", strict=True):
        assert message.startswith(f"{tmp_path}/0.tar: sample {key} cannot be read (")
        assert message.endswith("); its neighbour takes its place")
        assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_note_bad_samples_too(tmp_path, workers):
    members = {
        name: data for i in range(40) for name, data in sample(f"{i:02d}", {".png": b""} if i == 7 else i).items()
    }
    source = reader(publish(tmp_path, members), channels=3)
    source.keep = False
    stream = iter(Stream([source], seed=0, lanes=1, window=40, batch_size=10, workers=workers))
    keys = [batch.keys for batch in itertools.islice(stream, 4)]
    stream.close()
    assert list(itertools.chain(*keys)).count("08") == 2
    assert {place: tuple(bad)[:2] for place, bad in source.bad.items()} == {(0, 7): (f"{tmp_path}/0.tar", "07")}


@pytest.mark.parametrize(("bad", "good", "share"), [(10, 5, 0.0), (11, 5, 0.0), (11, 89, 0.11), (12, 88, 0.11)])
def test_too_many_unreadable_samples_stop_the_run(tmp_path, bad, good, share):
    parts = [sample(f"good{i}", i) for i in range(good)] + [sample(f"bad{i}", {".png": b""}) for i in range(bad)]
    members = {name: data for part in parts for name, data in part.items()}
    source = reader(publish(tmp_path, members), channels=3, bad_share=share)
    read(source, *[(0, 0)] * 500)  # what is read again and again makes the share no larger
    allowed = max(10, share * (bad + good))  # ten are always forgiven
    line = rf"{tmp_path}: {bad} unreadable samples, more than data\.bad_share = {share} allows; prepare"
    with refused(line) if bad > allowed else nullcontext():
        read_all(source)
    assert len(source.bad) == bad


def test_a_shard_without_readable_samples_is_one_line(tmp_path):
    source = reader(publish(tmp_path, sample("a", {".png": b""}) | sample("b", {".png": b""})), channels=3)
    with refused(rf"{tmp_path}/0\.tar: none of its 2 samples can be read; prepare"):
        read(source, (0, 0))


# --- damage


def flipped(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def edit(index: Path, **changes) -> None:
    """Change fields of the index's first shard."""
    value = json.loads(index.read_text())
    value["shards"][0] |= changes
    index.write_text(json.dumps(value))


def replace(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


FIRST, OFFSETS = "train-000000.tar", "train-000000.offsets"
# What is done to a data set, how it is read, and the line after its place.
DAMAGE: dict[str, tuple[Callable, dict[str, Any], str]] = {
    "missing": (lambda out: (out / FIRST).unlink(), {}, f"/{FIRST}: no such file, 1 of 5 shards are missing; bring"),
    "cut": (lambda out: replace(out / FIRST, lambda d: d[:-1]), {}, rf"/{FIRST}: \d+ bytes, but the index says"),
    "longer": (lambda out: replace(out / FIRST, lambda d: d + bytes(512)), {}, rf"/{FIRST}: \d+ bytes, but the index"),
    "flipped": (
        lambda out: replace(out / FIRST, flipped),
        {},
        rf"/{FIRST}: sample 0 \(bytes 0 to \d+\) is not what was indexed; it was damaged or replaced: prepare",
    ),
    "no tar": (lambda out: replace(out / FIRST, lambda d: bytes(len(d))), {}, f"/{FIRST}: sample . .* is not what was"),
    "no offsets": (lambda out: (out / OFFSETS).unlink(), {}, f"/{OFFSETS}: no such file"),
    "more": (
        lambda out: edit(out / INDEX, samples=5),
        {},
        f"/{OFFSETS}: not the 44 bytes of 5 samples; it was",
    ),
    "fewer": (lambda out: edit(out / INDEX, samples=3), {}, f"/{OFFSETS}: not the 28 bytes of 3 samples; it"),
    "other offsets": (lambda out: replace(out / OFFSETS, lambda d: bytes(len(d))), {}, f"/{OFFSETS}: the samples do"),
    "no index": (lambda out: (out / INDEX).unlink(), {}, f"/{INDEX}: no such file; prepare"),
    "no JSON": (lambda out: (out / INDEX).write_bytes(b"{"), {}, f"/{INDEX}: not JSON"),
    "empty": (lambda out: edit(out / INDEX, split="x", samples=0), {"split": "x"}, f'/{INDEX}: split "x" is empty'),
    "no split": (lambda out: None, {"split": "val"}, f"/{INDEX} has only test, train; choose one of these"),
    "size": (lambda out: None, {"size": 16}, f"/{INDEX} says 1 channels of 8 x 8 pixels; set both to what was"),
    "to be cut": (lambda out: None, {"size": 4}, f"/{INDEX} says .*, or data.size lower and data.crop = true"),
    "too small": (lambda out: None, {"size": 16, "crop": True}, f"/{INDEX} says .*, or data.size lower$"),
    "channels": (lambda out: None, {"channels": 3}, f"/{INDEX} says 1 channels of 8 x 8 pixels; set both to what was"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(small, damage):
    harm, settings, words = DAMAGE[damage]
    harm(small)
    with refused(f"(data.*: )?{small}{words}"):
        read_all(reader(str(small), **settings))


def test_damage_met_by_a_worker_is_one_line(small):
    replace(small / FIRST, flipped)
    source = reader(str(small))
    source.keep = False
    with refused(f"{small}/{FIRST}: sample 0 .* is not what was indexed"):
        list(itertools.islice(Stream([source], seed=0, lanes=4, window=8, batch_size=4, workers=1), 10))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data set of 20 samples in 5 shards to train on, and 3 held out."""
    prepared(noise(23), tmp_path / "small", channels=1)
    return tmp_path / "small"


def test_only_what_is_small_is_kept_in_memory(small, monkeypatch):
    assert reader(str(small)).keep
    monkeypatch.setattr("aaae_dist.reader.KEPT_BYTES", 20 * 64 - 1)
    source = reader(str(small))
    assert not source.keep
    read_all(source)
    assert source.kept == {}


def test_a_mixed_data_set_of_another_size_is_named(small, tmp_path):
    other = publish(tmp_path / "other", sample("a", 10))
    data = Data.model_validate({"url": str(small), "channels": 1, "size": 8})
    with refused(rf"data\.mix {other}: 3 channels of 8 x 8 pixels, but {small} is read as 1 of 8 x 8; prepare both"):
        Reader(data, split="train", url=other)


def test_fingerprint_is_of_the_split(small):
    one, other = reader(str(small)), reader(str(small), split="test")
    assert one.fingerprint == reader(f"{small}/").fingerprint != other.fingerprint
    edit(small / INDEX, sha256="0" * 64)
    assert reader(str(small)).fingerprint != one.fingerprint
    assert reader(str(small), split="test").fingerprint == other.fingerprint
