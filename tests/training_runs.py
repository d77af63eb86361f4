"""Trainings for the tests: tiny, through the real commands."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from aaae_dist import checkpoint

ROOT = Path(__file__).resolve().parents[1]
DOUBLE = Path(__file__).with_name("double.py")


def environment() -> dict[str, str]:
    """Of a training: one thread per process, ranks that meet on the loopback interface."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def settings(run: Path, data: str, *more: str) -> list[str]:
    """20 steps of the smoke configuration, without MLflow; a full penalty share so that every pair counts."""
    return [
        str(ROOT / "configs" / "smoke.toml"),
        f"training.run={run}",
        f"data.url={data}",
        "tracking.mlflow=false",
        "evaluation.samples=100",
        *more,
    ]


def command(*arguments: str, processes: int = 1, double: bool = False) -> list[str]:
    """The command line of a training, in one process or under accelerate launch as the README says it."""
    what = [str(DOUBLE)] if double else ["-m", "aaae_dist"]
    if processes == 1:
        return [sys.executable, *what, "train", *arguments]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "ddp.yaml")]
    return [*launch, "--num_processes", str(processes), "--main_process_port", "0", *what, "train", *arguments]


def train(*arguments: str, processes: int = 1, double: bool = False) -> subprocess.CompletedProcess:
    """Train to the end; the output is part of the failure."""
    line = command(*arguments, processes=processes, double=double)
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done


def final(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds, by name."""
    saved = checkpoint.newest(str(run))
    assert saved is not None
    return {f"{part}/{name}": value for part, values in saved.tensors.items() for name, value in values.items()}
