"""Bytes of samples: whatever the cache holds, whatever was damaged, whoever may look."""

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import psutil
import pytest
import servers
from conftest import copied, forget_clients, noise, prepared, refused
from test_data import assert_same
from test_data import read as read_stream
from test_reader import read_all, reader

from aaae_dist import storage


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


def test_a_store_that_may_be_read_but_not_listed(small, s3, monkeypatch):
    if not servers.ceph_is_installed():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Ceph is not installed, and moto has no public files")
    remote, client = copied(small, f"{s3}/data"), boto3.client("s3")
    for path in Path(small).iterdir():
        client.put_object_acl(Bucket=s3.removeprefix("s3://"), Key=f"data/{path.name}", ACL="public-read")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    forget_clients()
    with refused(f"{remote}: access denied"):
        storage.listing(remote)
    assert read_all(reader(remote)) == read_all(reader(small))
