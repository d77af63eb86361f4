"""The node's cache: bounded, shared, fetched once, gone on with after a kill."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import refused
from fsspec.implementations.memory import MemoryFileSystem

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


@pytest.fixture
def before_lock(monkeypatch) -> list[Callable[[], None]]:
    """What is done, once, before the next lock is taken."""
    actions, lock = [], module.lock

    def late(file: int, kind: int) -> bool:
        while actions:
            actions.pop(0)()
        return lock(file, kind)

    monkeypatch.setattr(module, "lock", late)
    return actions


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


def test_what_is_used_stays_longer_than_what_was_only_fetched(tmp_path, requests):
    cache = Cache(tmp_path, limit=3 * MB + MB // 2)
    for number in (0, 1, 2):
        take(cache, number)
        os.utime(tmp_path / f"{shard(number)[1].sha256}.tar", ns=(0, number))  # long ago, one after the other
    for number in (0, 3):  # the first is here
        take(cache, number)
    assert names(tmp_path) == {f"{shard(n)[1].sha256}.tar" for n in (0, 2, 3)}


@pytest.mark.parametrize("growing", [True, False])
def test_a_shard_takes_all_its_room_from_its_first_byte_on(tmp_path, requests, growing):
    cache = Cache(tmp_path, limit=MB + MB // 2)
    part = cache.part(shard(0)[1])
    with part.open("wb") as other:
        if growing:
            fcntl.flock(other, fcntl.LOCK_EX)
        assert take(cache, 1) == (None if growing else shard(1)[2])  # what nobody goes on with makes room
    assert names(tmp_path) == {part.name if growing else f"{shard(1)[1].sha256}.tar"}


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


def test_what_the_disk_cannot_hold_is_not_fetched_and_the_unused_makes_room(tmp_path, requests, monkeypatch, caplog):
    cache, disk = Cache(tmp_path, limit=10 * MB), 2 * MB

    def left(path: Path) -> os.statvfs_result:
        return os.statvfs_result([1, 1, 0, 0, disk - sum(file.stat().st_size for file in tmp_path.iterdir()), *[0] * 5])

    monkeypatch.setattr(os, "statvfs", left)
    take(cache, 0)
    assert take(cache, 1) == shard(1)[2]
    assert names(tmp_path) == {f"{shard(1)[1].sha256}.tar"}
    disk, before = MB // 2, len(requests)
    assert take(cache, 2) is None
    assert requests[before:] == []
    disk = 2 * MB + MB // 2
    part = cache.part(shard(3)[1])
    with part.open("wb") as other:  # which another process begins: what it will write counts too, and once
        fcntl.flock(other, fcntl.LOCK_EX)
        assert take(cache, 2) == shard(2)[2]
        assert names(tmp_path) == {f"{shard(2)[1].sha256}.tar", part.name}
        other.truncate(MB - 1000)
        disk = 3 * MB + 2000
        assert take(cache, 4) == shard(4)[2]
        assert names(tmp_path) == {f"{shard(2)[1].sha256}.tar", f"{shard(4)[1].sha256}.tar", part.name}
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: no space left; ")
    assert message.endswith(": free some, or set data.cache to a larger disk")


def test_what_can_never_fit_empties_no_cache(tmp_path):
    cache = Cache(tmp_path, limit=3 * MB)
    assert take(cache, 0) == shard(0)[2]
    assert take(cache, 1) == shard(1)[2]
    held = cache.get(shard(0)[1])  # and so stays
    assert held is not None
    for wanted in (4 * MB, 2 * MB + MB // 2):
        assert cache.make_room(wanted).startswith("data.cache_gb 0.003: it does not hold all shards in play; ")
        assert names(tmp_path) == {f"{shard(n)[1].sha256}.tar" for n in (0, 1)}
    os.close(held)
    assert cache.make_room(2 * MB + MB // 2) == ""


def test_a_download_that_ends_meanwhile_is_counted(tmp_path, monkeypatch):
    cache = Cache(tmp_path, limit=2 * MB)
    _, record, data = shard(0)
    part, real = cache.part(record), Path.stat
    part.write_bytes(data)

    def late(path: Path, **more: bool) -> os.stat_result:
        if path == part and os.path.exists(path):
            path.rename(tmp_path / f"{record.sha256}.tar")
        return real(path, **more)

    monkeypatch.setattr(Path, "stat", late)
    assert cache.make_room(MB + MB // 2)


def test_a_folder_that_is_removed_amid_a_download_is_made_anew(tmp_path, monkeypatch):
    cache, whole = Cache(tmp_path / "cache", limit=10 * MB), module.pieces

    def removed(*arguments: Any, **more: Any) -> Iterator[bytes]:
        yield from whole(*arguments, **more)
        monkeypatch.setattr(module, "pieces", whole)
        shutil.rmtree(cache.folder)

    monkeypatch.setattr(module, "pieces", removed)
    assert take(cache, 0) is None
    assert take(cache, 0) == shard(0)[2]


def test_several_processes_hold_one_shard(tmp_path):
    url, record, data = shard(0)
    first = Cache(tmp_path, limit=10 * MB).fetch(url, record, lambda: OFFSETS, patience=1.0)
    second = Cache(tmp_path, limit=10 * MB).get(record)
    assert first is not None
    assert second is not None
    assert os.pread(second, MB, 0) == data
    os.close(first)
    os.close(second)


def test_strangers_in_the_folder_are_let_alone(tmp_path):
    (tmp_path / "x.tar.part").write_bytes(bytes(MB))
    assert take(Cache(tmp_path, limit=MB + 100), 0) == shard(0)[2]
    assert "x.tar.part" in names(tmp_path)


def test_a_wrong_copy_is_thrown_away(tmp_path, requests):
    cache = Cache(tmp_path, limit=10 * MB)
    take(cache, 0)
    path = tmp_path / f"{shard(0)[1].sha256}.tar"
    os.truncate(path, 1000)
    assert take(cache, 0) == shard(0)[2]
    damaged = cache.get(shard(0)[1])
    assert damaged is not None
    cache.drop(shard(0)[1], damaged)
    assert not path.exists()
    assert take(cache, 0) == shard(0)[2]
    assert len(requests) == 3
    cache.drop(shard(0)[1], damaged)  # said again, by another thread: a right one has its name now
    assert path.exists()
    os.close(damaged)


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


def test_room_is_given_to_one_process_at_a_time(tmp_path, requests):
    cache = Cache(tmp_path, limit=MB + MB // 2)
    with (tmp_path / ".lock").open("ab") as door, ThreadPoolExecutor(1) as pool:
        fcntl.flock(door, fcntl.LOCK_EX)
        answer = pool.submit(take, cache, 1)
        waits = re.compile(rf"-> FLOCK .*:{os.fstat(door.fileno()).st_ino} ")
        while not waits.search(Path("/proc/locks").read_text()):
            assert not answer.done()
        with cache.part(shard(0)[1]).open("wb") as other:  # the room is taken meanwhile
            fcntl.flock(other, fcntl.LOCK_EX)
            fcntl.flock(door, fcntl.LOCK_UN)
            assert answer.result() is None
    assert requests == []


def complete(cache: Cache) -> None:
    _, record, data = shard(0)
    (cache.folder / f"{record.sha256}.tar").write_bytes(data + OFFSETS)


def begin(cache: Cache) -> None:
    cache.part(shard(0)[1]).touch()


def give_up(cache: Cache) -> None:
    cache.part(shard(0)[1]).unlink()


MEANWHILE = {  # what other processes do with a shard that this one has just opened, and the file that they leave
    "completed": ([give_up, complete], "tar"),  # as by a new name
    "completed and begun": ([complete], "tar"),
    "given up": ([give_up], ""),
    "given up and begun": ([give_up, begin], "part"),
}


@pytest.mark.parametrize("kind", MEANWHILE)
def test_a_shard_that_others_complete_or_give_up_is_not_fetched_into_a_lost_file(tmp_path, requests, before_lock, kind):
    """Between the opening of a file and its lock anything may happen to it."""
    (actions, left), cache = MEANWHILE[kind], Cache(tmp_path, limit=10 * MB)
    before_lock += [partial(action, cache) for action in actions]
    assert take(cache, 0) is None
    assert requests == []
    assert {name.rpartition(".")[2] for name in names(tmp_path)} == {left} - {""}
    assert take(cache, 0) == shard(0)[2]
    assert names(tmp_path) == {f"{shard(0)[1].sha256}.tar"}


def test_a_shard_that_another_removes_is_fetched_again(tmp_path, requests, before_lock):
    cache = Cache(tmp_path, limit=10 * MB)
    take(cache, 0)
    before_lock.append((tmp_path / f"{shard(0)[1].sha256}.tar").unlink)
    assert take(cache, 0) == shard(0)[2]
    assert len(requests) == 2
    assert names(tmp_path) == {f"{shard(0)[1].sha256}.tar"}


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


def test_pieces_grow_again_where_requests_succeed(monkeypatch):
    shrinking, growing = ([1 << power for power in powers] for powers in ([20, 19, 18, 17, 16, 16], range(16, 21)))
    url, _, data = shard(0, size=sum(growing))
    made, failures, original = [], iter(shrinking), MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        made.append(end - start)
        if next(failures, None) is not None:
            raise ConnectionResetError("cut")
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr(module, "PIECE", 1 << 20)
    monkeypatch.setattr(module.storage.time, "sleep", lambda seconds: None)
    assert b"".join(pieces(url, 0, len(data), patience=60.0)) == data
    assert made == shrinking + growing
