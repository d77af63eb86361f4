"""The node's cache: bounded, shared, fetched once, gone on with after a kill; and readers that use it."""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import noise, prepared, refused
from fsspec.implementations.memory import MemoryFileSystem
from test_data import assert_same
from test_data import read as read_stream
from test_reader import read_all, reader

from aaae_dist import cache as module
from aaae_dist import storage
from aaae_dist.cache import Cache, pieces
from aaae_dist.shards import Shard

MB = 1_000_000
OFFSETS = b"some offsets"  # of one sample


def shard(number: int, size: int = MB) -> tuple[str, Shard, bytes]:
    """URL, record and content of a shard in a store."""
    data = np.random.default_rng(number).bytes(size)
    url = f"memory://shards/{number}.tar"
    storage.write(url, data)
    sha256 = hashlib.sha256(data).hexdigest()
    return url, Shard(url=url, split="train", samples=1, bytes=size, sha256=sha256, offsets=""), data


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every request to the store: path, first byte, byte after the last."""
    made, original = [], MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        made.append((path, start, end))
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def take(cache: Cache, number: int) -> bytes | None:
    """Fetch a shard and let go of it."""
    url, record, _ = shard(number)
    file = cache.fetch(url, record, lambda: OFFSETS, patience=1.0)
    if file is None:
        return None
    try:
        return os.pread(file, record.bytes, 0)
    finally:
        os.close(file)


def test_a_shard_is_fetched_once_and_whole(tmp_path, requests):
    cache = Cache(tmp_path / "cache", limit=10 * MB)
    assert cache.get(shard(0)[1]) is None
    for _ in range(3):
        assert take(cache, 0) == shard(0)[2]
    assert [(start, end) for _, start, end in requests] == [(0, MB)]
    assert names(cache.folder) == {f"{shard(0)[1].sha256}.tar"}


def test_the_least_recently_used_make_room_but_not_what_is_open(tmp_path, requests):
    cache = Cache(tmp_path, limit=3 * MB + MB // 2)
    for number in (0, 1, 2):
        take(cache, number)
    held = cache.get(shard(0)[1])  # used, and open
    assert held is not None
    os.utime(tmp_path / f"{shard(0)[1].sha256}.tar", ns=(0, 0))  # as if for the last time long ago
    for number, stay in ((3, {0, 2, 3}), (4, {0, 3, 4})):
        assert take(cache, number) == shard(number)[2]
        assert names(tmp_path) == {f"{shard(n)[1].sha256}.tar" for n in stay}
    os.close(held)
    take(cache, 5)
    assert names(tmp_path) == {f"{shard(n)[1].sha256}.tar" for n in (3, 4, 5)}


def test_what_does_not_fit_is_not_fetched(tmp_path, requests, caplog):
    cache = Cache(tmp_path, limit=MB + MB // 2)
    file = cache.fetch(*shard(0)[:2], lambda: OFFSETS, patience=1.0)
    assert file is not None
    for _ in range(3):
        assert take(cache, 1) is None  # number 0 is open
    os.close(file)
    assert take(cache, 1) == shard(1)[2]
    assert take(Cache(tmp_path / "tiny", limit=MB // 2), 0) is None
    assert len(requests) == 2
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "data.cache_gb 0.0015",
        "data.cache_gb 0.0005",
    ]


def test_a_full_disk_ends_no_run(full_disk, caplog):
    cache = Cache(full_disk / "cache", limit=10 * MB)
    assert take(cache, 0) is None
    assert names(cache.folder) == set()
    (message,) = caplog.messages
    assert message.startswith(f"{cache.folder}: no space left; the other shards' samples are fetched one by one")


def test_a_wrong_copy_is_thrown_away(tmp_path, requests):
    cache = Cache(tmp_path, limit=10 * MB)
    take(cache, 0)
    path = tmp_path / f"{shard(0)[1].sha256}.tar"
    os.truncate(path, 1000)
    assert take(cache, 0) == shard(0)[2]
    cache.drop(shard(0)[1])
    assert not path.exists()
    assert take(cache, 0) == shard(0)[2]
    assert len(requests) == 3


def test_other_bytes_than_the_index_says_are_one_line(tmp_path):
    url, record, data = shard(0)
    storage.write(url, data[:-1] + b"x")
    with refused(f"{url}: its sha256 is not the index's; it was damaged or replaced: prepare the data set anew"):
        Cache(tmp_path, limit=10 * MB).fetch(url, record, lambda: OFFSETS, patience=1.0)
    assert names(tmp_path) == set()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_download_that_was_killed_goes_on(tmp_path, requests, damaged):
    cache = Cache(tmp_path, limit=10 * MB)
    url, record, data = shard(0)
    part = cache.part(record)
    part.write_bytes(bytes(1000) if damaged else data[:1000])
    first = cache.fetch(url, record, lambda: OFFSETS, patience=1.0)
    assert requests == [("/shards/0.tar", 1000, MB)]
    assert (first is None) == damaged  # found out at the end: the next attempt begins anew
    if first is not None:
        os.close(first)
    assert take(cache, 0) == data
    assert requests[1:] == ([("/shards/0.tar", 0, MB)] if damaged else [])
    assert names(tmp_path) == {f"{record.sha256}.tar"}


def test_two_do_not_fetch_the_same(tmp_path, requests):
    cache = Cache(tmp_path, limit=10 * MB)
    url, record, data = shard(0)
    with cache.part(record).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cache.fetch(url, record, lambda: OFFSETS, patience=1.0) is None
        assert requests == []
    assert take(cache, 0) == data


FETCH = """
import os, sys
from aaae_dist.cache import Cache
from aaae_dist.shards import Shard
from pathlib import Path
url, folder, record = sys.argv[1:]
record = Shard.model_validate_json(record)
print("go", flush=True)
while (file := Cache(Path(folder), limit=10**9).fetch(url, record, lambda: b'some offsets', patience=60)) is None:
    pass
assert os.fstat(file).st_size == record.bytes + len(b'some offsets')
"""


def test_processes_share_a_download_and_survive_each_others_death(tmp_path, s3):
    """Three at one shard; the one that downloads is killed, again and again; what it fetched stays."""
    data = np.random.default_rng(0).bytes(60 * MB)
    url, sha256 = f"{s3}/big.tar", hashlib.sha256(data).hexdigest()
    storage.write(url, data)
    record = Shard(url=url, split="train", samples=1, bytes=len(data), sha256=sha256, offsets="")
    line = [sys.executable, "-c", FETCH, url, str(tmp_path), record.model_dump_json()]
    reached, deaths = 0, 0
    while not (tmp_path / f"{sha256}.tar").exists():
        some = [subprocess.Popen(line) for _ in range(3)]
        part = Cache(tmp_path, limit=10**9).part(record)
        while not (part.exists() and part.stat().st_size > reached) and any(p.poll() is None for p in some):
            pass
        if deaths < 3 and part.exists():
            reached, deaths = part.stat().st_size, deaths + 1
            for process in some:
                process.kill()
                process.wait()
            assert not part.exists() or part.stat().st_size >= reached
        assert all(process.wait(timeout=60) in (0, -9) for process in some)
    assert deaths >= 1
    assert (tmp_path / f"{sha256}.tar").read_bytes() == data + OFFSETS
    assert names(tmp_path) == {f"{sha256}.tar"}


def test_pieces_shrink_where_requests_fail_and_lose_nothing(monkeypatch):
    """A connection that is cut after 200 kB, whatever is asked for, ends no download."""
    url, _, data = shard(0, size=3 * MB)
    made, original = [], MemoryFileSystem.cat_file

    def cut(self, path, start=None, end=None, **options):
        made.append(end - start)
        if end - start > 200_000:
            raise ConnectionResetError("cut")
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cut)
    monkeypatch.setattr(module.storage.time, "sleep", lambda seconds: None)
    assert b"".join(pieces(url, 5, len(data), patience=60.0)) == data[5:]
    assert min(made) >= 65_536


# --- readers of a store


@pytest.fixture
def small(tmp_path: Path) -> str:
    """A data set of 200 samples in 10 shards, and 3 held out, on disk."""
    prepared(noise(203), out := tmp_path / "small", channels=1, samples_per_shard=20)
    return str(out)


def copied(small: str, url: str) -> str:
    for path in Path(small).iterdir():
        storage.write(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.fixture(params=["s3", "memory", "http"])
def remote(request: pytest.FixtureRequest, small: str) -> Iterator[str]:
    """The small data set in a store."""
    if request.param == "http":
        import servers

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
    fetched = len(requests)
    source.read(np.array([[1, 0], [5, 7]]), np.zeros((2, 8, 8, 1), np.uint8))
    assert requests[fetched:] == []


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
