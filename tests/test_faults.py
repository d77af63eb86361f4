"""docs/operations.md: what a training on two hosts does when something between, beside or on them fails. Row by row."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hosts
import psutil
import pytest
import torch
from conftest import awaited, copied, small_disk, unavailable
from faults import FaultProxy
from hosts import Hosts
from operations import ROWS, Row
from training_runs import ROOT, assert_same_bits, environment, final, settings, train

from aaae_dist import checkpoint, storage
from aaae_dist.tracking import parse_lines

EVERY = 640  # images between two checkpoints
LONG = ("training.images=12_800", f"checkpoint.every={EVERY}", "logging.every=320", "training.silence=5")


class Training:
    """One rank on each of two hosts, started by launch/node.sh."""

    def __init__(
        self,
        network: Hosts,
        logs: Path,
        *arguments: str,
        of_host_1: dict[str, str] | None = None,
        **variables: str,
    ) -> None:
        """Start it.

        Args:
            of_host_1: what is different there of the variables.
        """
        head = {"NODES": "2", "HEAD": network.address(0), "NEXT": network.address(1)}
        self.logs, self.processes = [logs / f"{os.urandom(4).hex()}-{host}" for host in range(2)], []
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        for host, log in enumerate(self.logs):
            there = environment() | variables | head | {"NODE": str(host), "PATH": path}
            there |= (of_host_1 or {}) if host else {}
            del there["GLOO_SOCKET_IFNAME"]  # which node.sh finds
            with log.open("wb") as said:
                line = network.line(host, ROOT / "launch" / "node.sh", *arguments)
                self.processes.append(subprocess.Popen(line, env=there, stdout=said, stderr=said))

    def said(self, host: int) -> str:
        """What the rank on a host has said."""
        lines = self.logs[host].read_text().splitlines()
        return "\n".join(line for line in lines if line.startswith("aaae"))

    def wait(self, seconds: float) -> list[int]:
        """How it ended on each host, within so many seconds."""
        until = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(until - time.monotonic())
            except subprocess.TimeoutExpired:
                pytest.fail("\n---\n".join(log.read_text() for log in self.logs))
        return [process.returncode for process in self.processes]

    def rank(self, host: int) -> psutil.Process:
        """The trainer on a host, below its launcher."""
        (found,) = [one for one in psutil.Process(self.processes[host].pid).children() if "train" in one.cmdline()]
        return found

    def kill(self) -> None:
        for process in self.processes:
            for one in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                one.kill()
            process.kill()
            process.wait()


@pytest.fixture
def network() -> Iterator[Hosts]:
    """Two hosts to train on, and a third for servers."""
    if not hosts.can_be_made():
        unavailable("hosts need root, iproute2 and iptables; .ci/run has them")
    with hosts.network(3) as made:
        yield made


Start = Callable[..., Training]


@pytest.fixture
def start(network: Hosts, tmp_path: Path) -> Iterator[Start]:
    """Start a training on the two hosts."""
    started: list[Training] = []

    def call(*arguments: str, **how: Any) -> Training:
        started.append(Training(network, tmp_path, *arguments, **how))
        return started[-1]

    yield call
    for training in started:
        training.kill()


@pytest.fixture(scope="module")
def whole(digits: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two ranks come to where nothing fails."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(*settings(run, digits, *LONG), processes=2)
    return final(run)


def under_way(training: Training, run: str) -> None:
    """Wait until a training has saved something."""
    awaited(lambda: bool(checkpoint.complete(run)), of=training.processes[0], seconds=120)


def as_the_page_says(row: Row, training: Training) -> None:
    """Wait for the end, and compare it, its time and its words with the row's."""
    ends = row.does == "ends"
    codes = training.wait(row.seconds() if ends else 120)
    assert all(codes) == any(codes) == ends, codes
    for rank in range(2):
        assert row.says(rank, training.said(rank)), training.said(rank)


def images_logged(run: str) -> int:
    """After how many images a run has told its figures last."""
    return parse_lines(storage.read(f"{run}/metrics.jsonl"))[-1]["images"]


def goes_on(start: Start, run: str, *arguments: str, whole: dict[str, torch.Tensor], **how: Any) -> None:
    """Start a training again that was ended: it loses at most an interval, and ends as if nothing had failed."""
    reached = images_logged(run)
    again = start(*arguments, **how)
    assert again.wait(120) == [0, 0], again.said(0)
    from_images = re.search(r"goes on from ([\d,]+) images", again.said(0))
    assert from_images
    assert reached - int(from_images[1].replace(",", "")) <= 2 * EVERY  # one that was being saved is lost too
    assert_same_bits(final(run), whole)


FOR_GOOD: dict[str, Callable[[Hosts, Training], None]] = {
    "host 1's link is cut": lambda network, training: network.cut(1),
    "its packets are lost": lambda network, training: network.drop(1),
    "its connections are reset": lambda network, training: network.reset(1),
    "rank 0 is killed": lambda network, training: training.rank(0).kill(),
    "its rank is killed": lambda network, training: training.rank(1).kill(),
}


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_what_lasts_ends_the_run_and_the_next_start_goes_on(network, start, tmp_path, digits, whole, fault):
    run = str(tmp_path / "run")
    training = start(*settings(run, digits, *LONG))
    under_way(training, run)
    FOR_GOOD[fault](network, training)
    as_the_page_says(ROWS[fault], training)
    network.join(1)
    network.pass_again(1)
    goes_on(start, run, *settings(run, digits, *LONG), whole=whole)


def test_what_passes_costs_time_alone(network, start, tmp_path, digits, whole):
    """One fault after another. A link may be gone for less than training.silence."""
    run = str(tmp_path / "run")
    training = start(*settings(run, digits, *LONG, "training.silence=15"))
    under_way(training, run)

    def pace(images: int) -> float:
        """Steps' images per second, over so many from now."""
        began, first = time.monotonic(), awaited(lambda: images_logged(run))
        awaited(lambda: images_logged(run) >= first + images, of=training.processes[0])
        return images / (time.monotonic() - began)

    usual = pace(640)
    for begin, end in ((network.cut, network.join), (network.drop, network.pass_again)):
        begin(1)
        reached = images_logged(run)
        time.sleep(2.0)  # the fault itself
        assert images_logged(run) <= reached + 320
        end(1)
        pace(320)
    network.slow(1, "1mbit")
    assert pace(320) < usual / 2
    network.slow(1, "10gbit")
    rank = training.rank(1)
    while "rank 1 on node n1 is slow" not in training.said(0) and images_logged(run) < 12_800:
        rank.suspend()
        time.sleep(0.1)
        rank.resume()
        time.sleep(0.02)
    passed = ("host 1's link is cut for a moment", "its packets are lost for a moment", "its link is slow")
    for fault in (*passed, "its processor is slow"):
        as_the_page_says(ROWS[fault], training)
    assert_same_bits(final(run), whole)


# --- servers


@pytest.fixture
def store(network: Hosts, s3: str) -> Iterator[FaultProxy]:
    """Where the hosts find the S3 store, on the third of them."""
    del s3
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], listener=network.listener(2, 8000)) as proxy:
        yield proxy


def test_a_store_that_is_gone_for_a_moment_and_a_cache_that_is_full(start, store, tmp_path, s3, digits, whole):
    run, url = f"{s3}/run", copied(digits, f"{s3}/digits")
    with small_disk(tmp_path / "disk", "64k") as disk:
        there = {"AWS_ENDPOINT_URL": store.url, "XDG_CACHE_HOME": str(tmp_path)}
        training = start(*settings(run, url, *LONG), of_host_1={"XDG_CACHE_HOME": str(disk)}, **there)
        under_way(training, run)
        store.down(seconds=5.0)
        for fault in ("its disk for shards is full", "the store is gone for a moment"):
            as_the_page_says(ROWS[fault], training)
    assert_same_bits(final(run), whole)


def test_a_store_that_is_gone(network, start, store, tmp_path, s3, digits, whole):
    """For a rank that has no copies of its shards: it needs the store all the time."""
    run, url = f"{s3}/run", copied(digits, f"{s3}/digits")
    with small_disk(tmp_path / "disk", "64k") as disk:
        there = {"AWS_ENDPOINT_URL": store.url, "XDG_CACHE_HOME": str(tmp_path)}
        chosen, of_host_1 = settings(run, url, *LONG, "data.patience=5"), {"XDG_CACHE_HOME": str(disk)}
        training = start(*chosen, of_host_1=of_host_1, **there)
        under_way(training, run)
        network.cut(2)
        as_the_page_says(ROWS["the store is gone"], training)
        network.join(2)
        goes_on(start, run, *chosen, whole=whole, of_host_1=of_host_1, **there)


def test_a_clock_that_is_wrong(start, store, tmp_path, s3, digits, whole):
    """The store refuses it; what is on disks does not mind."""
    chosen = settings(str(tmp_path / "run"), digits, *LONG)
    skewed = {"of_host_1": hosts.clock_ahead(3600, tmp_path)}
    training = start(*chosen, **skewed)
    as_the_page_says(ROWS["its clock is wrong"], training)
    assert_same_bits(final(tmp_path / "run"), whole)
    url = copied(digits, f"{s3}/digits")
    training = start(*settings(f"{s3}/run", url), **skewed, AWS_ENDPOINT_URL=store.url, XDG_CACHE_HOME=str(tmp_path))
    as_the_page_says(ROWS["its clock is wrong, and the data are in S3"], training)


def test_a_disk_that_is_full(start, tmp_path, digits, whole):
    with small_disk(tmp_path / "disk", "32m") as disk:
        run = str(disk / "run")
        training = start(*settings(run, digits, *LONG))
        under_way(training, run)
        with suppress(OSError), (disk / "full").open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
        as_the_page_says(ROWS["the run's disk is full"], training)
        (disk / "full").unlink()
        goes_on(start, run, *settings(run, digits, *LONG), whole=whole)


def test_an_mlflow_that_is_gone(network, start, mlflow_server, tmp_path, digits, whole):
    run = str(tmp_path / "run")
    with FaultProxy(mlflow_server.url, listener=network.listener(2, 5000)) as proxy:
        training = start(*settings(run, digits, *LONG, "tracking.mlflow=true"), MLFLOW_TRACKING_URI=proxy.url)
        under_way(training, run)
        network.drop(2)
        as_the_page_says(ROWS["MLflow is gone"], training)
    assert_same_bits(final(run), whole)
    line = [sys.executable, "-m", "aaae_dist", "track", "sync", run]
    there = environment() | {"MLFLOW_TRACKING_URI": mlflow_server.url}
    assert "MLflow has all" in subprocess.run(line, env=there, capture_output=True, text=True, check=True).stdout


def test_every_row_is_tested():
    written = "".join((ROOT / "tests" / name).read_text() for name in ("test_faults.py", "test_local.py"))
    assert len(ROWS) > 10
    assert [fault for fault in ROWS if f'"{fault}"' not in written] == []
