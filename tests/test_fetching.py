"""Bytes of samples: whatever the cache holds, whatever was damaged, whoever may look."""

import errno
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pytest
import servers
from conftest import awaited, copied, forget_clients, noise, prepared, refused, unavailable
from test_data import assert_same, data_workers
from test_data import read as read_stream
from test_reader import read_all, reader

from aaae_dist import storage
from aaae_dist.data import Stream, sweep
from aaae_dist.fetching import DOWNLOADS
from aaae_dist.order import Order
from aaae_dist.shards import INDEX


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A data set of 200 samples in 10 shards, and 3 held out, on disk."""
    prepared(noise(203), out := tmp_path / "small", channels=1, samples_per_shard=20)
    return str(out)


@pytest.fixture(params=["s3", "memory", "http"])
def remote(request: pytest.FixtureRequest, small: str) -> Iterator[str]:
    """The small data set in a store."""
    if request.param == "http":
        with servers.files(Path(small)) as url:
            yield url
    else:
        base = request.getfixturevalue("s3") if request.param == "s3" else f"memory://{Path(small).name}"
        yield copied(small, f"{base}/data")


@pytest.mark.parametrize("cache_gb", [1.0, 0.00002, 1e-9])  # room for all, for two shards, for none
def test_a_store_gives_the_same_batches_whatever_the_cache_holds(small, remote, tmp_path, cache_gb):
    expected, _ = read_stream(reader(small), 12)
    source = reader(remote, cache=str(tmp_path / "cache"), cache_gb=cache_gb)
    assert_same(read_stream(source, 12)[0], expected)
    assert read_all(reader(remote, split="test", cache=str(tmp_path / "cache"))) == read_all(
        reader(small, split="test")
    )
    held = sum(path.stat().st_size for path in (tmp_path / "cache" / "aaae_dist").glob("*.tar"))
    assert held <= cache_gb * 1e9 + 20_000  # the held-out shard was read with room for all


def test_workers_read_from_a_store(small, s3, tmp_path):
    remote = copied(small, f"{s3}/data")
    source = reader(remote, cache=str(tmp_path / "cache"))
    source.keep = False
    expected, _ = read_stream(reader(small), 12)
    assert_same(read_stream(source, 12, workers=2)[0], expected)
    assert source.fetcher.failure is None


def test_workers_let_go_of_shards_with_the_plan(small, s3, tmp_path):
    source = reader(copied(small, f"{s3}/data"), cache=str(tmp_path))
    source.keep = False
    source.fetcher.plan("test", list(range(10)))
    awaited(lambda: len(source.fetcher.files) == 10)
    stream = iter(Stream([source], seed=0, lanes=2, window=5, batch_size=10, workers=2))
    held: list[set[int]] = []
    for _ in range(20):
        next(stream)
        time.sleep(0.01)
    numbers = {shard.sha256: number for number, shard in enumerate(source.shards)}
    for worker in data_workers():
        files = {Path(file.path).stem for file in worker.open_files()}
        held.append({numbers[name] for name in files if name in numbers})
    stream.close()
    assert len(held) == 2
    assert all(0 < len(each) <= 8 for each in held), held


@pytest.mark.parametrize("finder", ["this process", "another"])
def test_a_damaged_copy_that_is_planned_comes_again(small, tmp_path, finder):
    source = reader(copied(small, "memory://again"), cache=str(tmp_path))
    source.fetcher.plan("test", [3])
    awaited(lambda: 3 in source.fetcher.files)
    path = tmp_path / "aaae_dist" / f"{source.shards[3].sha256}.tar"
    content = path.read_bytes()
    if finder == "another":
        path.unlink()
        source.fetcher.plan("test", [3])
    else:
        with path.open("r+b") as file:
            file.write(bytes(2000))
        source.read(np.array([[3, 0]]), np.zeros((1, 8, 8, 1), np.uint8))
    awaited(lambda: path.exists() and path.read_bytes() == content and 3 in source.fetcher.files)


def name_other_shards(url: str) -> None:
    """Let the index of a data set expect other shards than are there, of the same names and sizes."""
    index = storage.read_json(f"{url}/{INDEX}")
    for shard in index["shards"]:
        shard["sha256"] = shard["sha256"][::-1]
    storage.write_json(f"{url}/{INDEX}", index)


def test_a_sweep_ends_at_a_shard_that_is_not_the_index_s(small, tmp_path):
    remote = copied(small, "memory://swept")
    name_other_shards(remote)
    source = reader(remote, cache=str(tmp_path))
    with refused(rf"{remote}/train-\d+\.tar: its sha256 is not the index's"):
        for _ in range(1000):
            list(sweep(source, limit=200, batch_size=20))


def test_who_saw_a_damaged_copy_drops_no_other(small, tmp_path):
    source = reader(copied(small, "memory://late"), cache=str(tmp_path)).fetcher
    source.plan("test", [3])
    awaited(lambda: 3 in source.files)
    damaged = source.files[3]
    (tmp_path / "aaae_dist" / f"{source.shards[3].sha256}.tar").unlink()
    source.plan("test", [3])
    awaited(lambda: source.files.get(3, damaged) is not damaged)
    right, offsets = source.files[3], source.load_offsets(3)
    source.drop_copy(3, damaged)
    assert source.files[3] is right
    assert source.offsets[3] is offsets


def test_offsets_are_let_go_with_the_plan(small, tmp_path):
    source = reader(copied(small, "memory://offsets"), cache=str(tmp_path), cache_gb=1e-9)
    source.read(np.array([[1, 0], [5, 7]]), np.zeros((2, 8, 8, 1), np.uint8))
    assert set(source.fetcher.offsets) == {1, 5}
    source.fetcher.plan("test", [5])
    assert set(source.fetcher.offsets) == {5}


def test_planned_shards_come_and_those_no_longer_planned_are_let_go(small, tmp_path, requests):
    source = reader(copied(small, "memory://planned"), cache=str(tmp_path))
    source.fetcher.plan("stream", [3, 1, 4])
    source.fetcher.plan("sweep", [1, 5])
    with source.fetcher.changed:
        assert source.fetcher.changed.wait_for(lambda: set(source.fetcher.files) == {1, 3, 4, 5}, timeout=20)
    assert {Path(file.path).stem for file in psutil.Process().open_files()} >= {source.shards[3].sha256}
    source.fetcher.plan("stream", [])
    assert set(source.fetcher.files) == {1, 5}
    opened = {Path(file.path).stem for file in psutil.Process().open_files()}
    assert opened & {shard.sha256 for shard in source.shards} == {source.shards[number].sha256 for number in (1, 5)}
    assert source.fetcher.asking == 0
    fetched = len(requests)
    source.read(np.array([[1, 0], [5, 7]]), np.zeros((2, 8, 8, 1), np.uint8))
    assert requests[fetched:] == []


def test_few_shards_are_fetched_at_a_time_and_none_is_kept_that_nobody_plans_any_more(small, tmp_path, monkeypatch):
    source, underway, most, go = reader(copied(small, "memory://few"), cache=str(tmp_path)), 0, 0, threading.Event()
    fetch, lock, done = source.fetcher.cache.fetch, threading.Lock(), threading.Semaphore(0)

    def slow(*arguments: Any, **more: Any) -> int | None:
        nonlocal underway, most
        with lock:
            underway += 1
            most = max(most, underway)
        assert go.wait(20)
        file = fetch(*arguments, **more)
        with lock:
            underway -= 1
        done.release()
        return file

    monkeypatch.setattr(source.fetcher.cache, "fetch", slow)
    source.fetcher.plan("stream", list(range(10)))
    awaited(lambda: underway == DOWNLOADS)
    source.fetcher.plan("stream", [9])
    go.set()
    for _ in range(DOWNLOADS + 1):
        assert done.acquire(timeout=20)
    awaited(lambda: set(source.fetcher.files) == {9} and not source.fetcher.downloads)
    assert most == DOWNLOADS
    opened = {Path(file.path).stem for file in psutil.Process().open_files()}
    assert opened & {shard.sha256 for shard in source.shards} == {source.shards[9].sha256}


@pytest.mark.parametrize("part", ["the first sample", "where the second begins", "a checksum"])
def test_a_damaged_copy_is_fetched_again_and_a_damaged_store_refused(small, tmp_path, caplog, part):
    remote = copied(small, "memory://damaged")
    cached, expected = tmp_path / "cache" / "aaae_dist", read_all(reader(small))
    settings = {"cache": str(tmp_path / "cache")}
    source = reader(remote, **settings)
    source.fetcher.plan("test", list(range(10)))
    with source.fetcher.changed:
        assert source.fetcher.changed.wait_for(lambda: len(source.fetcher.files) == 10, timeout=20)
    for shard in source.shards:
        path = cached / f"{shard.sha256}.tar"
        content = bytearray(path.read_bytes())
        content[{"the first sample": 600, "where the second begins": shard.bytes + 7, "a checksum": -4}[part]] ^= 0x81
        path.write_bytes(content)
    assert read_all(reader(remote, **settings)) == expected
    assert len({message for message in caplog.messages if "is damaged; fetched again" in message}) == 10
    for number in range(10):
        storage.write(f"{remote}/train-{number:06d}.tar", bytes(storage.listing(small)[f"train-{number:06d}.tar"]))
    with refused(rf"{remote}/train-\d+\.tar: (sample 0 .* is not what was indexed|its sha256 is not the index's)"):
        read_all(reader(remote, cache=str(tmp_path / "other")))
    assert not list((tmp_path / "other").rglob("*.tar"))


@pytest.mark.parametrize("cache_gb", [1.0, 1e-9])
def test_a_web_server_that_knows_no_ranges(small, tmp_path, cache_gb):
    with servers.files(Path(small), SimpleHTTPRequestHandler) as url:
        source = reader(url, cache=str(tmp_path / "cache"), cache_gb=cache_gb)
        assert read_all(source) == read_all(reader(small))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_not_the_index_s_ends_the_stream(small, tmp_path, workers):
    """Its samples are what their checksums say; the shard is not."""
    with servers.files(Path(small)) as url:
        name_other_shards(small)
        source = reader(url, cache=str(tmp_path / "cache"))
        source.keep = False
        with refused(rf"{url}/train-\d+\.tar: its sha256 is not the index's"):
            for _ in Stream([source], seed=0, lanes=4, window=8, batch_size=4, workers=workers):
                pass


def test_a_disk_that_fails(small, tmp_path, monkeypatch):
    """A local data set ends the run; a cached copy is as good as a damaged one."""
    expected, remote = read_all(reader(small)), copied(small, "memory://disk")
    source = reader(remote, cache=str(tmp_path / "cache"))
    source.fetcher.plan("test", list(range(10)))
    with source.fetcher.changed:
        assert source.fetcher.changed.wait_for(lambda: len(source.fetcher.files) == 10, timeout=20)

    def broken(*_: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    assert read_all(source) == expected
    with refused(rf"{small}/train-\d+\.tar: .*Input/output error; check"):
        read_all(reader(small))


def test_more_shards_may_be_open_than_files_of_a_process_usually(small):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (270, hard))
        reader(small)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(hard, 1 << 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("cache", "line"), [("s3://bucket/cache", "not a folder of this machine"), ("file/x", ".*; ")])
def test_a_cache_that_cannot_be_is_one_line(small, tmp_path, cache, line):
    (tmp_path / "file").write_bytes(b"")
    cache = cache if "://" in cache else f"{tmp_path}/{cache}"
    with refused(f"data.cache {cache}: {line}"):
        reader(copied(small, "memory://cache"), cache=cache)
    reader(small, cache=cache)  # needs none


def test_an_index_that_does_not_come_is_waited_for_as_long_as_the_settings_say(small):
    class Busy(SimpleHTTPRequestHandler):
        def parse_request(self) -> bool:
            if super().parse_request():
                self.send_error(503)
            return False

    with servers.files(Path(small), Busy) as url:
        began = time.monotonic()
        with refused(rf"{url}/index.json: the store is overloaded; .* \(\d attempts in \d s\)"):
            reader(url, patience=1.5)
        assert 0.5 < time.monotonic() - began < 20


# --- plans


@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (16, 4), (8, 4), (24, 2), (24, 4), (100, 4), (48, 3)])
def test_what_a_rank_reads_is_planned(small, batch_size, world):
    for rank in range(world):
        order = {"seed": 0, "lanes": 16, "window": 3, "batch_size": batch_size}
        requests, planned = Stream([reader(small)], **order, world=world, rank=rank).requests(deque()), set()
        for request in islice(requests, 40):
            planned = set(request.plans.get(0, planned))
            assert {shard for _, places in request.reads for shard in places[:, 0].tolist()} <= planned


def test_a_stream_plans_this_block_and_the_next_and_nothing_when_it_ends(small, tmp_path):
    source = reader(copied(small, "memory://plans"), cache=str(tmp_path))
    source.keep = False
    order = {"seed": 0, "lanes": 4, "window": 10}
    stream, ideal = iter(Stream([source], **order, batch_size=8)), Order(source.counts, **order)
    for position in range(0, 200, 8):
        next(stream)
        block = position // 4 // 10
        following = ideal.in_play(0, block + 1) if block < 4 else ideal.in_play(1, 0)
        assert set(source.fetcher.plans["stream"]) == {*ideal.in_play(0, block), *following}
    stream.close()
    assert source.fetcher.plans["stream"] == []


def test_a_sweep_plans_a_few_shards_ahead_and_none_where_it_takes_few_samples(small, tmp_path):
    source = reader(copied(small, "memory://sweeps"), cache=str(tmp_path))
    batches = sweep(source, limit=200, batch_size=20)
    for first in range(10):
        next(batches)
        assert source.fetcher.plans["sweep"] == list(range(first, min(first + 6, 10)))
    assert list(batches) == []
    assert source.fetcher.plans["sweep"] == []
    batches = sweep(source, limit=200, batch_size=20)
    next(batches)
    batches.close()  # before its end
    assert source.fetcher.plans["sweep"] == []
    next(sweep(source, limit=20, batch_size=20))
    assert source.fetcher.plans["sweep"] == []


def test_single_samples_that_someone_waits_for_go_first(small, tmp_path, requests):
    source = reader(copied(small, "memory://first"), cache=str(tmp_path))
    source.fetcher.asking = 1
    source.fetcher.plan("test", [3])
    before = len(requests)
    source.read(np.array([[5, 0]]), np.zeros((1, 8, 8, 1), np.uint8))
    assert {path for path, _, _ in requests[before:] if "000003" in path} == set()
    with source.fetcher.changed:
        assert source.fetcher.changed.wait_for(lambda: 3 in source.fetcher.files, timeout=20)  # but not for ever


def test_a_store_that_may_be_read_but_not_listed(small, s3, monkeypatch):
    if not servers.ceph_is_installed():
        unavailable("Ceph is not installed, and moto has no public files")
    remote, client = copied(small, f"{s3}/data"), boto3.client("s3")
    for path in Path(small).iterdir():
        client.put_object_acl(Bucket=s3.removeprefix("s3://"), Key=f"data/{path.name}", ACL="public-read")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    forget_clients()
    with refused(f"{remote}: access denied"):
        storage.listing(remote)
    assert read_all(reader(remote)) == read_all(reader(small))
