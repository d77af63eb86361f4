"""What the machine of this rank does: processors, memory, disks, network, and this rank's GPU.

It is looked at when a line is logged, and differences are taken to the look before: no thread, nothing between two.
"""

import logging
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence

import psutil
import torch

from aaae_dist import storage
from aaae_dist.distributed import of_launcher
from aaae_dist.errors import one_line

log = logging.getLogger(__name__)

LONGEST = 100  # characters of a node's name; MLflow takes 250 for that of a metric


def safe_name(name: str) -> str:
    """A machine's name as a part of a metric's: MLflow takes letters, digits, `_`, `-` and `.`, and no folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:LONGEST].strip(".") or "node"


class Node:
    """The machine of this rank, between two looks at it."""

    def __init__(self, folders: Sequence[str], *, device: torch.device) -> None:
        """Begin to count.

        Args:
            folders: whose disks matter; those that are not on this machine are left out.
        """
        self.name = safe_name(platform.node())
        self.folders = [folder for folder in folders if storage.is_local(folder)]
        self.device = device
        self.speaks = of_launcher("LOCAL_RANK", "0") == 0  # one rank of a node is enough
        self.has_utilisation = device.type == "cuda" and answers(device)
        self.told = False  # that there are no figures
        psutil.cpu_percent()  # which tells of the time since it was asked before
        self.looked, self.traffic = time.perf_counter(), traffic()

    def figures(self) -> dict[str, float]:
        """Of the time since the last look: what the first rank of a node tells of it, and every rank of its GPU."""
        try:
            return (self.of_machine() if self.speaks else {}) | self.of_gpu()
        except Exception as error:  # of psutil, NVML or a disk that is gone: training does not end for want of a figure
            if not self.told:
                log.warning("%s tells nothing of itself (%s); training goes on", self.name, one_line(error))
            self.told = True
            return {}

    def of_machine(self) -> dict[str, float]:
        """Processors, memory, disks, network."""
        now, moved = time.perf_counter(), traffic()
        incoming, outgoing = (
            max(after - before, 0) / 1e6 / max(now - self.looked, 1e-9)  # a counter may begin anew
            for before, after in zip(self.traffic, moved, strict=True)
        )
        self.looked, self.traffic = now, moved
        memory = psutil.virtual_memory()
        figures = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_gb": memory.used / 1e9,
            "network_in_mb_per_second": incoming,
            "network_out_mb_per_second": outgoing,
        }
        return figures | ({"disk_percent": max(map(disk_percent, self.folders))} if self.folders else {})

    def of_gpu(self) -> dict[str, float]:
        """This rank's GPU: all memory that is taken there, by whomever, and how busy it is, if its driver says so."""
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        figures = {"gpu_memory_percent": 100 * (1 - free / total), "gpu_memory_gb": (total - free) / 1e9}
        return figures | ({"gpu_percent": float(torch.cuda.utilization(self.device))} if self.has_utilisation else {})


def traffic() -> tuple[int, int]:
    """Bytes that came in and went out by all interfaces but the loopback's. (InfiniBand's own verbs pass them by.)"""
    found = [counts for name, counts in psutil.net_io_counters(pernic=True).items() if not re.match(r"lo\d*$", name)]
    return sum(counts.bytes_recv for counts in found), sum(counts.bytes_sent for counts in found)


def disk_percent(folder: str) -> float:
    """How full the disk of a local folder is."""
    used, free = storage.disk_bytes(folder)
    return 100 * used / (used + free)  # what is kept for root is not to be had


def answers(device: torch.device) -> bool:
    """Whether the driver says how busy a GPU is, which takes `nvidia-ml-py`, and not a part of a GPU."""
    try:
        torch.cuda.utilization(device)
    except Exception as error:  # NVML's own classes are there only where NVML is
        log.info("how busy the GPUs are is not logged: %s", one_line(error))
        return False
    return True


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this rank has held since it began: its tensors' on a GPU, else all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def by_node(told: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """What is logged of nodes: every figure under the node's name, the mean of those of its ranks that tell it.

    Args:
        told: the node's name and the figures of every rank. Several launched on one machine are one node.
    """
    found: dict[str, list[float]] = {}
    for node, figures in told:
        for name, value in figures.items():
            found.setdefault(f"system/{node}/{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
