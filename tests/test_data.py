"""Reading: the same batches for any ranks, workers and stores, from any position on; and what damage does."""

import hashlib
import io
import itertools
import json
import logging
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, picture, prepared, refused
from PIL import Image
from sklearn.datasets import load_digits

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.data import Batch, Reader, ahead, stream, sweep, to_float, to_uint8
from aaae_dist.shards import INDEX, Index, Shard

USUAL = {"seed": 0, "lanes": 16, "window": 8, "batch_size": 24}
SMALL = {"lanes": 4, "batch_size": 4}  # 5 batches in an epoch of `small`


def reader(url: str, *, split: str = "train", **settings: Any) -> Reader:
    return Reader(Data.model_validate({"url": url, "channels": 1, "size": 8} | settings), split=split)


def read(source: Reader, count: int, *, world: int = 1, workers: int = 0, **settings) -> list[Batch]:
    """The first batches of a stream, gathered over all its ranks."""
    ranks = [stream(source, **USUAL | settings, world=world, rank=r, workers=workers) for r in range(world)]
    gathered = []
    for parts in itertools.islice(zip(*ranks, strict=True), count):
        assert len({(part.epoch, part.position) for part in parts}) == 1
        assert len({part.images.shape for part in parts}) == 1
        keys, labels = ([value for part in parts for value in part[field]] for field in (1, 2))
        gathered.append(Batch(torch.cat([part.images for part in parts]), keys, labels, *parts[0][3:]))
    return gathered


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch[1:] for batch in found] == [batch[1:] for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


def publish(out: Path, *tars: dict[str, bytes], channels: int = 3) -> str:
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
        url, count = f"{number}.tar", len({name.partition(".")[0] for name in members})
        storage.write(f"{out}/{url}", data)
        sha256 = hashlib.sha256(data).hexdigest()
        shards.append(Shard(url=url, split="train", samples=count, bytes=len(data), sha256=sha256))
    index = Index(source="test", channels=channels, height=8, width=8, classes=[], shards=shards)
    storage.write_json(f"{out}/{INDEX}", index.model_dump())
    return str(out)


# --- the order, read


def test_batches_are_the_digits(digits):
    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    for batch in read(reader(digits), 3):
        numbers = [int(key) for key in batch.keys]
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (24, 1, 8, 8)
        assert np.array_equal(batch.images.flatten(1), np.rint(pixels[numbers] * (255 / 16)))
        assert batch.labels == labels[numbers].tolist()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """URL of a data set of 200 samples in 10 shards."""
    prepared(noise(203), out := tmp_path_factory.mktemp("many"), channels=1, samples_per_shard=20)
    return str(out)


@pytest.fixture(scope="module")
def twenty(many) -> list[Batch]:
    """What every stream of them begins with: 8 batches of each of two epochs, 4 of the next."""
    batches = read(reader(many), 20)
    assert [(batch.epoch, batch.position) for batch in batches] == [(i // 8, i % 8 * 24 + 24) for i in range(20)]
    return batches


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_are_the_same_for_any_ranks_and_workers(many, twenty, world, workers):
    assert_same(read(reader(many), 20, world=world, workers=workers), twenty)


@pytest.mark.parametrize("after", range(1, 20))
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 2), (4, 5)])
def test_a_stream_continues_at_the_exact_sample(many, twenty, after, world, workers):
    begin = {"epoch": twenty[after - 1].epoch, "position": twenty[after - 1].position}
    assert_same(read(reader(many), 20 - after, world=world, workers=workers, **begin), twenty[after:])


def test_a_stream_of_another_batch_size_continues_too(many, twenty):
    keys = [key for batch in twenty[:3] for key in batch.keys]
    changed = read(reader(many), 20, batch_size=10, epoch=0, position=72)
    keys += [key for batch in changed if batch.epoch == 0 for key in batch.keys]
    assert len(set(keys)) == len(keys) == 192  # 3 batches of 24, 12 of 10


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (24, 16), (30, 7), (192, 16), (200, 1)])
def test_an_epoch_has_no_sample_twice_and_leaves_out_few(many, batch_size, lanes):
    source, count = reader(many), 200 // lanes * lanes // batch_size
    batches = read(source, 2 * count, batch_size=batch_size, lanes=lanes)
    for epoch in (0, 1):
        keys = [key for batch in batches if batch.epoch == epoch for key in batch.keys]
        assert len(set(keys)) == len(keys) == count * batch_size > 200 - batch_size - lanes
    assert len({tuple(batch.keys) for batch in (batches[0], batches[count], read(source, 1, seed=1)[0])}) == 3


@pytest.mark.parametrize("samples_per_shard", [9, 1000])  # 2 shards, 1 shard
def test_more_ranks_than_shards(tmp_path, samples_per_shard):
    prepared(noise(18), tmp_path, channels=1, held_out=1, samples_per_shard=samples_per_shard)
    one, eight = (read(reader(str(tmp_path)), 7, world=world, workers=1, batch_size=8) for world in (1, 8))
    assert_same(eight, one)


@pytest.mark.parametrize(
    ("batch_size", "world", "line"),
    [
        (50, 4, "training.batch_size 50: not a multiple of the 4 ranks; choose one that is"),
        (196, 4, "training.batch_size 196: larger than the 192 samples of an epoch; choose a smaller one"),
        (193, 1, "training.batch_size 193: larger than the 192 samples of an epoch; choose a smaller one"),
    ],
)
def test_impossible_batch_size_is_one_line(many, batch_size, world, line):
    with refused(line):
        read(reader(many), 1, batch_size=batch_size, world=world)


def test_many_threads_share_a_reader(many, twenty):
    source = reader(many)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda world: read(source, 20, world=world, workers=5), [1, 2, 3, 4]):
            assert_same(found, twenty)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("limit", [1, 100, 179, 1000])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sweep_sees_every_sample_once(digits, world, batch_size, limit, workers):
    source = reader(digits, split="test")
    everything = source.batch([(0, number) for number in range(179)])
    found = []
    for rank in range(world):
        batches = list(sweep(source, limit=limit, batch_size=batch_size, world=world, rank=rank, workers=workers))
        assert all(len(batch.keys) == batch_size for batch in batches[:-1])
        found.append([key for batch in batches for key in batch.keys])
    assert found == [everything.keys[:limit][rank::world] for rank in range(world)]


# --- what is read


KINDS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "JPG": "JPEG", "webp": "WEBP", "bmp": "BMP", "ppm": "PPM"}


@pytest.mark.parametrize("extension", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_foreign_tars(tmp_path, extension, mode, channels):
    ramp = np.add.outer(np.arange(8) * 9, np.arange(8) * 5)[..., None] + np.array([0, 50, 100])
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(KINDS[extension], {})
    data = picture(ramp.astype(np.uint8), KINDS[extension], mode=mode, **options)
    members = {"dir/a.txt": b"no image", f"dir/a.{extension}": data, "dir/a.cls": b"7", f"b.{extension}": data}
    batch = reader(publish(tmp_path, members, channels=channels), channels=channels).batch([(0, 0), (0, 1)])
    expected = np.asarray(Image.fromarray(ramp.astype(np.uint8)).convert(mode).convert("RGB" if channels == 3 else "L"))
    difference = batch.images.permute(0, 2, 3, 1).numpy().astype(int) - expected.reshape(8, 8, channels)
    assert abs(difference).max() <= (2 if KINDS[extension] == "JPEG" else 0)
    assert (batch.keys, batch.labels) == (["dir/a", "b"], [7, None])


def shade(value: int, *, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


BROKEN = {
    "empty": {".png": b""},
    "no image": {".png": b"<html>"},
    "cut png": {".png": picture(shade(9))[:50]},
    "cut jpeg": {".jpg": picture(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "JPEG")[:-20]},
    "wrong size": {".png": picture(shade(9, height=9, width=9))},
    "wrong shape": {".jpg": picture(shade(9, height=4, width=16), "JPEG")},  # as many pixels
    "nothing but a label": {".cls": b"1"},
    "a label that is no number": {".png": picture(shade(9)), ".cls": b"cat"},
}


def sample(key: str, members: dict[str, bytes] | int) -> dict[str, bytes]:
    """Members of a sample, or of a readable one of this shade."""
    parts = {".png": picture(shade(members)), ".cls": b"%d" % members} if isinstance(members, int) else members
    return {key + extension: data for extension, data in parts.items()}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_unreadable_sample_is_replaced_counted_once_and_reported_once(tmp_path, caplog, broken):
    bad = BROKEN[broken]
    first = sample("a", 10) | sample("b", bad) | sample("c", bad) | sample("d", 40) | sample("e", bad)
    source = reader(publish(tmp_path, first, sample("f", 60)), channels=3)
    with caplog.at_level(logging.WARNING, "aaae_dist"):
        batches = [source.batch([*((0, number) for number in range(5)), (1, 0)]) for _ in range(3)]
    for batch in batches:
        assert batch.keys == ["a", "d", "d", "d", "a", "f"]  # the next readable one of the shard, round its end
        assert batch.labels == [10, 40, 40, 40, 10, 60]
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels
    assert source.bad == {(0, 1), (0, 2), (0, 4)}
    for message, key in zip(caplog.messages, "bce", strict=True):
        assert message.startswith(f"{tmp_path}/0.tar: sample {key} cannot be read (")
        assert message.endswith("); its neighbour takes its place")
        assert "\n" not in message


@pytest.mark.parametrize(("bad", "good", "share"), [(10, 5, 0.0), (11, 5, 0.0), (11, 89, 0.11), (12, 88, 0.11)])
@pytest.mark.parametrize("workers", [0, 3])
def test_too_many_unreadable_samples_stop_the_run(tmp_path, bad, good, share, workers):
    parts = [sample(f"good{i}", i) for i in range(good)] + [sample(f"bad{i}", {".png": b""}) for i in range(bad)]
    members = {name: data for part in parts for name, data in part.items()}
    source = reader(publish(tmp_path, members), channels=3, bad_share=share)
    source.batch([(0, 0)] * 500)  # what is read again and again makes the share no larger
    allowed = max(10, share * (bad + good))  # ten are always forgiven
    line = rf"{tmp_path}: {bad} unreadable samples, more than data\.bad_share = {share} allows; prepare"
    with refused(line) if bad > allowed else nullcontext():
        read(source, 1, batch_size=bad + good, lanes=1, workers=workers)
    assert len(source.bad) == bad


def test_a_shard_without_readable_samples_is_one_line(tmp_path):
    source = reader(publish(tmp_path, sample("a", {".png": b""}) | sample("b", {".png": b""})), channels=3)
    with refused(rf"{tmp_path}/0\.tar: none of its 2 samples can be read; prepare"):
        source.batch([(0, 0)])


# --- damage


def flipped(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def edit(index: Path, **changes) -> None:
    """Change fields of the index's first shard."""
    value = json.loads(index.read_text())
    value["shards"][0] |= changes
    index.write_text(json.dumps(value))


def replace(out: Path, change: Callable[[bytes], bytes], *, known: bool) -> None:
    """Change the first shard, and what the index knows of it."""
    data = change((out / FIRST).read_bytes())
    (out / FIRST).write_bytes(data)
    if known:
        edit(out / INDEX, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


FIRST = "train-000000.tar"
# What is done to a data set, how it is read, and the line after its place.
DAMAGE: dict[str, tuple[Callable, dict[str, Any], str]] = {
    "missing": (lambda out: (out / FIRST).unlink(), {}, f"/{FIRST}: no such file, 1 of 5 shards are missing; bring"),
    "cut": (lambda out: replace(out, lambda d: d[:-1], known=False), {}, rf"/{FIRST}: \d+ bytes, but the index says"),
    "flipped": (lambda out: replace(out, flipped, known=False), {}, f"/{FIRST}: its sha256 is not the index's; it was"),
    "no tar": (lambda out: replace(out, lambda d: b"x" * 999, known=True), {}, f"/{FIRST}: not a tar file .*; prepare"),
    "more": (lambda out: edit(out / INDEX, samples=5), {}, f"/{FIRST}: 4 samples, but the index says 5; prepare"),
    "fewer": (lambda out: edit(out / INDEX, samples=3), {}, f"/{FIRST}: 4 samples, but the index says 3; prepare"),
    "no index": (lambda out: (out / INDEX).unlink(), {}, f"/{INDEX}: no such file; prepare"),
    "no JSON": (lambda out: (out / INDEX).write_bytes(b"{"), {}, f"/{INDEX}: not JSON"),
    "empty": (lambda out: edit(out / INDEX, split="x", samples=0), {"split": "x"}, f'/{INDEX}: split "x" is empty'),
    "no split": (lambda out: None, {"split": "val"}, f"/{INDEX} has only test, train; choose one of these"),
    "size": (lambda out: None, {"size": 16}, f"/{INDEX} says 1 channels of 8 x 8 pixels; set both to what was"),
    "channels": (lambda out: None, {"channels": 3}, f"/{INDEX} says 1 channels of 8 x 8 pixels; set both to what was"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_one_line(small, damage, workers):
    harm, settings, words = DAMAGE[damage]
    harm(small)
    with refused(f"(data.*: )?{small}{words}"):
        read(reader(str(small), **settings), 10, **SMALL, workers=workers)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data set of 20 samples in 5 shards to train on, and 3 held out."""
    prepared(noise(23), tmp_path / "small", channels=1)
    return tmp_path / "small"


def test_fingerprint_is_of_the_split(small):
    one, other = reader(str(small)), reader(str(small), split="test")
    assert one.fingerprint == reader(f"{small}/").fingerprint != other.fingerprint
    edit(small / INDEX, sha256="0" * 64)
    assert reader(str(small)).fingerprint != one.fingerprint
    assert reader(str(small), split="test").fingerprint == other.fingerprint


# --- object stores and their cache


@pytest.fixture(params=["s3", "memory"])
def remote(request: pytest.FixtureRequest, small: Path) -> str:
    """The small data set in a store."""
    url = request.getfixturevalue("s3") + "/data" if request.param == "s3" else f"memory://{small}"
    for path in small.iterdir():
        storage.write(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.mark.parametrize("workers", [0, 3])
def test_a_store_gives_the_same_batches_and_fills_the_cache(small, remote, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    expected = read(reader(str(small)), 10, **SMALL)
    for cache in (str(tmp_path / "chosen"), ""):
        assert_same(read(reader(remote, cache=cache), 10, **SMALL, workers=workers), expected)
    shards = {f"{hashlib.sha256(p.read_bytes()).hexdigest()}.tar": p.read_bytes() for p in small.glob("train*")}
    for cache in ("chosen", "xdg"):
        assert {p.name: p.read_bytes() for p in (tmp_path / cache / "aaae_dist").iterdir()} == shards


def test_what_is_cached_is_not_fetched_again_unless_damaged(small, remote, tmp_path):
    expected = read(reader(str(small)), 10, **SMALL)
    cache = str(tmp_path / "cache")
    read(reader(remote, cache=cache), 5, **SMALL)
    cached = sorted((tmp_path / "cache" / "aaae_dist").iterdir())
    before = [path.read_bytes() for path in cached]
    for number, path in enumerate(cached):
        path.write_bytes([b"", before[number][:-1], before[number][:-1] + b"x"][number % 3])
    assert_same(read(reader(remote, cache=cache), 10, **SMALL), expected)
    assert [path.read_bytes() for path in cached] == before
    for path in small.glob("*.tar"):  # other bytes, as many
        storage.write(f"{remote}/{path.name}", bytes(path.stat().st_size))
    assert_same(read(reader(remote, cache=cache), 10, **SMALL), expected)
    with refused(rf"{remote}/train-.*\.tar: its sha256 is not the index's"):
        read(reader(remote, cache=str(tmp_path / "other")), 5, **SMALL)
    assert not (tmp_path / "other").exists()  # no damage gets into a cache


def test_a_full_cache_is_one_line(small, full_disk):
    for path in small.iterdir():
        storage.write(f"memory://{small}/{path.name}", path.read_bytes())
    (full_disk / "mine").write_bytes(bytes(50_000))
    with refused(rf"{full_disk}/aaae_dist/\w+\.tar: no space left; free some"):
        read(reader(f"memory://{small}", cache=str(full_disk)), 5, **SMALL)
    assert (full_disk / "mine").read_bytes() == bytes(50_000)


# --- pieces


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ahead_keeps_the_order_and_looks_few_calls_ahead(workers):
    taken = []

    def calls():
        for i in range(20):
            taken.append(i)
            yield lambda i=i: i * i if i < 15 else 1 // 0

    results = ahead(calls(), workers=workers)
    for i in range(15 - workers - 1):
        assert next(results) == i * i
        assert len(taken) <= i + workers + 2
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_bytes_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), pixels.double() / 127.5 - 1, rtol=0, atol=1.2e-7)
    assert torch.equal(to_uint8(images), pixels)
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.9999, 1.1, 0.0])).tolist() == [0, 0, 255, 255, 128]
    assert to_uint8(images.bfloat16()).dtype == torch.uint8
