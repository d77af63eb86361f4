"""What is logged of machines: this one, and some that are made up."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from mlflow.utils.validation import _validate_metric_name

from aaae_dist import system as module
from aaae_dist.system import Node, by_node, peak_memory_gb, safe_name

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("node-17.cluster_a", "node-17.cluster_a"),
        ("rack/7 (blau)", "rack_7__blau_"),
        ("größe", "gr__e"),
        ("..", "node"),
        ("", "node"),
        ("n" * 300, "n" * 100),
    ],
)
def test_names_of_nodes_are_made_for_mlflow(name, safe):
    assert safe_name(name) == safe
    _validate_metric_name(f"system/{safe}/network_out_mb_per_second")


def test_this_machine(tmp_path):
    figures = Node([str(tmp_path / "not" / "there"), "s3://bucket/run"], device=CPU).figures()
    assert set(figures) == {
        *("cpu_percent", "memory_percent", "memory_gb", "disk_percent"),
        *("network_in_mb_per_second", "network_out_mb_per_second"),
    }
    for name, value in figures.items():
        assert 0 <= value <= (100 if name.endswith("percent") else 1e6), name
    assert figures["memory_gb"] > 0.1
    assert 0.01 < peak_memory_gb(CPU) < 100


def test_a_figure_that_cannot_be_had_ends_no_training(monkeypatch, caplog):
    """As of a disk that is away, or where a container has lost its driver's library."""
    node = Node(["/"], device=CPU)
    monkeypatch.setattr(module, "disk_percent", lambda folder: 1 / 0)
    assert node.figures() == node.figures() == {}
    assert caplog.text.count("tells nothing of itself (division by zero); training goes on") == 1


def test_a_disk_that_is_half_full_is_the_fullest(full_disk, tmp_path):
    (full_disk / "file").write_bytes(bytes(32 * 1024))
    figures = Node([str(full_disk / "run"), "/dev/shm"], device=CPU).figures()
    assert figures["disk_percent"] == pytest.approx(50, abs=10)
    assert "disk_percent" not in Node(["s3://bucket/run"], device=CPU).figures()


def test_traffic_is_of_the_time_since_the_last_look_and_not_of_the_loopback(monkeypatch):
    counts: dict[str, Any] = {}

    def count(**interfaces: tuple[int, int]) -> None:
        counts.update({name: SimpleNamespace(bytes_recv=i, bytes_sent=o) for name, (i, o) in interfaces.items()})

    clock = iter([100.0, 102.0, 106.0, 107.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: counts)
    count(eth0=(1_000_000, 0), ib0=(0, 0), lo=(0, 0))
    node = Node([], device=CPU)
    for step, expected in (
        ({"eth0": (5_000_000, 2_000_000), "ib0": (0, 4_000_000), "lo": (9_000_000, 9_000_000)}, (2.0, 3.0)),
        ({"eth0": (9_000_000, 2_000_000)}, (1.0, 0.0)),
        ({"eth0": (0, 0), "ib0": (0, 0)}, (0.0, 0.0)),  # the counters began anew
    ):
        count(**step)
        figures = node.figures()
        assert (figures["network_in_mb_per_second"], figures["network_out_mb_per_second"]) == expected


def test_one_rank_of_a_node_tells_of_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Node(["/"], device=CPU).figures() == {}


def test_every_rank_tells_of_its_gpu(monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20e9, 80e9))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5e9)
    memory = {"gpu_memory_percent": 75.0, "gpu_memory_gb": 60.0}
    assert Node([], device=GPU).figures() == memory | {"gpu_percent": 97.0}
    assert peak_memory_gb(GPU) == 5.0
    caplog.set_level("INFO", logger="aaae_dist.system")

    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert Node([], device=GPU).figures() == memory
    assert caplog.messages == ["how busy the GPUs are is not logged: nvidia-ml-py does not seem to be installed"]


def test_figures_stand_under_the_names_of_nodes_and_ranks_of_one_node_are_averaged():
    told = [
        ("a", {"cpu_percent": 50.0, "gpu_percent": 90.0}),
        ("a", {"gpu_percent": 70.0}),
        ("b", {"cpu_percent": 10.0}),
        ("b", {"cpu_percent": 20.0}),  # launched as two nodes on one machine
    ]
    assert by_node(told) == {"system/a/cpu_percent": 50.0, "system/a/gpu_percent": 80.0, "system/b/cpu_percent": 15.0}
