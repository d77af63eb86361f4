"""What is installed: on this machine, and on all nodes of a SLURM allocation. As a module it prints that as JSON."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from aaae_dist.errors import UserError

PACKAGES = ("aaae_dist", "torch", "accelerate", "deepspeed")  # that ranks must have alike
LIMIT = 120.0  # seconds until all nodes have answered: a shared disk may be slow to start Python from


def git(*words: str) -> str:
    """What git says in the package's folder; nothing if there is no git or no repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=5).strip()
    return ""


def commit() -> str:
    """The commit that runs, in an image as it was built in; nothing where the package is merely installed somewhere."""
    return git("rev-parse", "HEAD") if git("ls-files", Path(__file__).name) else os.environ.get("AAAE_COMMIT", "")


def installed() -> dict[str, str]:
    """Versions here, by package."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | ({"commit": code} if (code := commit()) else {})


def nodes_at_hand() -> int:
    """Nodes of the allocation that this process is in; 1 where there is none, or no srun to reach them with."""
    number = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    known = "SLURM_JOB_ID" in os.environ and number.isdigit() and shutil.which("srun")
    return int(number) if known else 1


def installed_on(nodes: int) -> dict[str, dict[str, str]]:
    """Versions on all nodes of the allocation, by node and package.

    Raises:
        UserError: a node does not start this Python, or not all answer.
    """
    line = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    try:
        done = subprocess.run(
            [*line, sys.executable, "-m", "aaae_dist.versions"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"srun: the {nodes} nodes have not all answered within {LIMIT:.0f} s; see which is down, `sinfo -N`"
        ) from None
    answers = [json.loads(text) for text in done.stdout.splitlines() if text.startswith('{"node": ')]
    found = {answer["node"]: answer["versions"] for answer in answers}
    if done.returncode or len(answers) != nodes:
        said = done.stderr.strip().splitlines()
        raise UserError(
            f"srun: {len(answers)} of {nodes} nodes have {sys.executable} and aaae_dist"
            + (f" ({said[-1][:200]})" if said else "")
            + "; install both where all nodes see them"
        )
    return found


def differences(found: dict[str, dict[str, str]]) -> list[str]:
    """What a node has otherwise than the first one, in words."""
    first, *others = sorted(found)
    return [
        f"{name} {found[node].get(name, 'none')} on {node}, {found[first].get(name, 'none')} on {first}"
        for node in others
        for name in sorted({*found[node], *found[first]})
        if found[node].get(name) != found[first].get(name)
    ]


if __name__ == "__main__":
    print(json.dumps({"node": platform.node(), "versions": installed()}))
