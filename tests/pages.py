"""The pages for users: their blocks of commands, and a folder and a shell to run them in, with short trainings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from test_sources import write_mnist
from training_runs import ROOT, environment

BIN = Path(sys.executable).parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
SHORT = (
    "training.images=128 training.batch_size=32 training.precision=no model.width=4 model.latent_width=16 "
    "evaluation.samples=100 data.bad_share=0"
)


class Block(NamedTuple):
    """Commands of a page; `marked`: the line before says that they are not run."""

    text: str
    marked: bool


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    found = re.findall(r"([^\n]*)\n*```bash\n(.*?)```", read(page), flags=re.S)
    return [Block(text, marked="**not run" in before.lower()) for before, text in found]


def block(page: str, text: str) -> str:
    """The one block of a page with this text in it. Whoever asks for it runs it: test_pages looks who asks."""
    (found,) = [block.text for block in blocks(page) if text in block.text]
    return found


def workplace(folder: Path) -> Path:
    """The folder, with the project's configs and launch files, photos, and MNIST's files in small."""
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, folder / name)
    draws = np.random.default_rng(0)
    for kind, names in {"cats": ["tom"], "dogs": ["rex"]}.items():
        (folder / "photos" / kind).mkdir(parents=True)
        for name in [*names, *(f"{i:02d}" for i in range(30))]:
            pixels = draws.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / kind / f"{name}.jpg")
    (folder / "mnist").mkdir()
    write_mnist(folder / "mnist", "t10k", count=60)
    return folder


def started(script: str, folder: Path, *, settings: str = SHORT, **more: str) -> subprocess.Popen[str]:
    """A block in a shell that stops at the first failure, with these settings for its trainings."""
    script = re.sub(r"((?:train|local\.sh) configs/\w+\.toml)", rf"\1 {settings}", script)
    there = environment()
    there |= {"PATH": f"{BIN}:{there['PATH']}", "VENV": sys.prefix} | more
    line, pipe = ["bash", "-euo", "pipefail", "-c", script], subprocess.PIPE
    return subprocess.Popen(line, cwd=folder, env=there, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def run(script: str, folder: Path, *, settings: str = SHORT, **more: str) -> subprocess.CompletedProcess[str]:
    """Such a block to its end."""
    with started(script, folder, settings=settings, **more) as process:
        out, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return subprocess.CompletedProcess(process.args, 0, out, said)
