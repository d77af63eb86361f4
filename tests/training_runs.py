"""Trainings for the tests: tiny, through the real commands."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from aaae_dist import checkpoint, storage

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")  # of several ranks
DOUBLE, SLOW = (Path(__file__).with_name(name) for name in ("double.py", "slow.py"))
CLOCKED = ("time", "speed/", "data/", "ranks/", "system/", "run/")  # figures of one run alone begin so


def environment() -> dict[str, str]:
    """Of a training: one thread per process, ranks that meet on the loopback interface."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def settings(run: Path | str, data: str, *more: str) -> list[str]:
    """20 steps of the smoke configuration, without MLflow; a full penalty share so that every pair counts."""
    return [
        str(ROOT / "configs" / "smoke.toml"),
        f"training.run={run}",
        f"data.url={data}",
        "tracking.mlflow=false",
        "evaluation.samples=100",
        *more,
    ]


def command(
    *arguments: str, processes: int = 1, engine: str = "", script: Path | None = None, verb: str = "train"
) -> list[str]:
    """The command line of a training, in one process or under accelerate launch as the README says it.

    Args:
        script: what runs instead of `aaae`: a program that changes something and then calls its `main`.
    """
    what = [str(script)] if script else ["-m", "aaae_dist"]
    if processes == 1 and not engine:
        return [sys.executable, *what, verb, *arguments]
    config = ROOT / "launch" / f"{engine or 'ddp'}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", str(processes), "--main_process_port", "0", *what, verb, *arguments]


def ended(
    *arguments: str,
    processes: int = 1,
    engine: str = "",
    script: Path | None = None,
    verb: str = "train",
    **variables: str,
) -> subprocess.CompletedProcess:
    """Train, however that ends, with these variables in the environment."""
    line = command(*arguments, processes=processes, engine=engine, script=script, verb=verb)
    there = environment() | variables
    return subprocess.run(line, env=there, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)


def train(*arguments: str, **how: Any) -> subprocess.CompletedProcess:
    """Train to the end; the output is part of the failure."""
    done = ended(*arguments, **how)
    assert done.returncode == 0, done.stderr
    return done


def final(run: Path | str, name: str = "") -> dict[str, torch.Tensor]:
    """All that a checkpoint holds (default: the newest), flat, by "state/tensor": each value once."""
    name = name or checkpoint.complete(str(run))[-1]
    manifest, found = checkpoint.read_manifest(str(run), name), {}
    for file, about in manifest.files.items():
        place = storage.join(checkpoint.folder(str(run)), name, file)
        for key, values in checkpoint.read_tensors(place, about).items():
            tensor = key.partition("/")[2]
            start, stop = about.holds[tensor]
            whole = found.setdefault(key, values.new_full([math.prod(manifest.shapes[tensor])], math.nan))
            assert whole[start:stop].isnan().all(), f"{key} is there twice"
            whole[start:stop] = values
    assert found
    assert not any(values.isnan().any() for values in found.values())
    return found


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def networks(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of what a checkpoint holds, all but the optimizer's moments."""
    return {key: value for key, value in found.items() if key.startswith(("weight/", "average/"))}
