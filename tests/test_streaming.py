"""Streams from a real store on a bad day: nothing is lost, nothing comes twice, and nothing hangs."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import psutil
import pytest
import servers
from conftest import awaited, copied, forget_clients, noise, prepared, unavailable
from faults import FaultProxy, Faults
from test_data import assert_same, reader
from test_training import launched

from aaae_dist import storage
from aaae_dist.data import Batch, Stream
from aaae_dist.reader import Reader

ORDER = {"seed": 0, "lanes": 4, "window": 100, "batch_size": 50}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of 2,000 samples in 20 shards, on disk."""
    prepared(noise(2010), out := tmp_path_factory.mktemp("local"), channels=1, held_out=10, samples_per_shard=100)
    return str(out)


@contextmanager
def through(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """S3 clients, here and in processes to come, meet the proxy instead of the store."""
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL", proxy.url)
        forget_clients()
        yield
    forget_clients()


def stream(source: Reader, count: int, **settings: int) -> list[Batch]:
    source.keep = False
    return list(islice(Stream([source], **ORDER | settings), count))


@pytest.mark.parametrize(("cache_gb", "count", "workers"), [(1.0, 9, 0), (1.0, 9, 2), (1e-9, 1, 0)])
def test_errors_and_cuts_lose_no_sample(local, s3, tmp_path, monkeypatch, cache_gb, count, workers):
    url, expected = copied(local, f"{s3}/data"), stream(reader(local), count)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, through(proxy, monkeypatch):
        proxy.faults = Faults(errors=0.4, cuts=0.4)
        source = reader(url, cache=str(tmp_path), cache_gb=cache_gb)
        assert_same(stream(source, count, workers=workers), expected)
        assert proxy.counts.errors > 10
        assert proxy.counts.cuts > 3


def test_a_store_that_is_killed_and_comes_back_loses_no_sample(local, tmp_path, monkeypatch):
    if not servers.ceph_is_installed():
        unavailable("Ceph is not installed; .ci/run installs it")
    expected = stream(reader(local), 40)
    with servers.ceph() as store, monkeypatch.context() as changed:
        for name, value in store.variables.items():
            changed.setenv(name, value)
        forget_clients()
        storage.locate("s3://bucket")[0].mkdir("s3://bucket")
        source = reader(copied(local, "s3://bucket/data"), cache=str(tmp_path), cache_gb=1e-9)
        source.keep = False
        batches = iter(Stream([source], **ORDER, workers=1))
        found = list(islice(batches, 10))
        store.gateway.kill()
        began = time.monotonic()
        back = threading.Timer(10, store.gateway.start)
        back.start()
        found += islice(batches, 30)
        assert time.monotonic() - began > 10
        back.join()
        batches.close()
    forget_clients()
    assert_same(found, expected)


def test_a_download_goes_on_at_the_byte_reached(s3, tmp_path, monkeypatch):
    """Where nine in ten connections are cut, a shard takes hardly more traffic than its size."""
    prepared(noise(3000), out := tmp_path / "local", channels=1, samples_per_shard=3000)
    url = copied(str(out), f"{s3}/data")
    (record, *_) = reader(url).shards
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], seed=1) as proxy, through(proxy, monkeypatch):
        source = reader(url, cache=str(tmp_path / "cache"))
        proxy.faults, before = Faults(cuts=0.9), proxy.counts.sent
        file = source.fetcher.cache.fetch(source.fetcher.urls[0], record, bytes, patience=60.0)
        assert file is not None
        os.close(file)
        assert proxy.counts.cuts > 0
        assert proxy.counts.sent - before < 1.5 * record.bytes


TRAINER = """
import sys
from aaae_dist.config import Data
from aaae_dist.data import Stream
from aaae_dist.reader import Reader
url, cache = sys.argv[1:]
reader = Reader(Data(url=url, channels=1, size=8, cache=cache, cache_gb=1e-9), split="train")
reader.keep = False
for _ in Stream([reader], seed=0, lanes=4, window=100, batch_size=50, workers=1):
    print("a batch", flush=True)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_waits_for_a_store_ends_with_its_trainer(local, tmp_path, stopped):
    with servers.files(Path(local)) as url, FaultProxy(url) as proxy:
        line = [sys.executable, "-c", TRAINER, proxy.url, str(tmp_path)]
        with subprocess.Popen(line, stdout=subprocess.PIPE) as trainer:
            assert trainer.stdout
            try:
                assert trainer.stdout.readline()
                proxy.faults = Faults(silent=True)
                (worker,) = awaited(lambda: [p for p in psutil.Process(trainer.pid).children() if p.net_connections()])
                if stopped:
                    worker.suspend()
            finally:
                trainer.kill()
        assert psutil.wait_procs([worker], timeout=5)[1] == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fault", ["down", "silent"])
def test_a_store_that_stays_away_ends_a_training_with_a_line_of_every_rank(local, s3, tmp_path, monkeypatch, fault):
    url = copied(local, f"{s3}/data")
    more = [
        "data.patience=15",
        "data.cache_gb=1e-9",
        f"data.cache={tmp_path}",
        "data.workers=1",
        "training.patience=60",
    ]
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, through(proxy, monkeypatch), ExitStack() as stack:
        launcher = stack.enter_context(launched(tmp_path / "run", url, *more, "logging.every=64"))
        began = time.monotonic()
        if fault == "down":
            proxy.down()
        else:
            proxy.faults = Faults(silent=True)
        _, said = launcher.communicate(timeout=120)
        assert time.monotonic() - began < 15 + 20
    lines = [line for line in said.splitlines() if line.startswith("aaae")]
    away = f"{url}/train-"
    told = [line for line in lines if away in line and "the store does not answer; check that it is up" in line]
    assert told, said
    for rank in ("aaae: ", "aaae rank 1: "):
        assert any(line.startswith(rank) and (line in told or "another rank is gone" in line) for line in lines), said
    assert launcher.returncode != 0
