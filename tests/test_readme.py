"""The README's commands, run as they stand but for shorter trainings, in a folder of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import write_mnist
from training_runs import ROOT, environment

import aaae_dist

BIN = Path(sys.executable).parent
SHORT = (
    "training.images=128 training.batch_size=32 training.precision=no model.width=4 model.latent_width=16 "
    "evaluation.samples=100 data.bad_share=0"
)
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with the project's configs and launch files, photos, and MNIST's files in small."""
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    draws = np.random.default_rng(0)
    for kind, names in {"cats": ["tom"], "dogs": ["rex"]}.items():
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for name in [*names, *(f"{i:02d}" for i in range(30))]:
            pixels = draws.integers(0, 256, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / kind / f"{name}.jpg")
    (tmp_path / "mnist").mkdir()
    write_mnist(tmp_path / "mnist", "t10k", count=60)
    return tmp_path


def block_with(text: str) -> str:
    (found,) = [block for block in BLOCKS if text in block]
    return found


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def run(script: str, folder: Path, **more: str) -> subprocess.CompletedProcess:
    """A block of the README in a shell that stops at the first failure; trainings are short."""
    script = re.sub(r"(train configs/\w+\.toml)", rf"\1 {SHORT}", script)
    variables = environment() | more | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    shell = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(shell, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_your_own_images(workplace):
    run(block_with("prepare folder"), workplace)
    assert size_of(workplace / "samples.png") == (10 * 68, 10 * 68)
    assert size_of(workplace / "pairs.png") == (2 * 68, 2 * 68)
    assert json.loads((workplace / "store/photos/index.json").read_text())["classes"] == ["cats", "dogs"]


def test_everything_in_an_object_store(workplace, s3):
    run(block_with("s3://bucket/runs").replace("s3://bucket", s3), workplace, XDG_CACHE_HOME=str(workplace / "cache"))
    done = run(f"aaae sample {s3}/runs/mnist --count 3 --out {s3}/three.npz", workplace)
    assert "three.npz: 3 images" in done.stdout
    assert list((workplace / "cache").rglob("*.tar"))
    assert not (workplace / "runs").exists()


def test_the_demo_and_what_follows(workplace):
    """`make demo` is this script once all is installed; the README's launch line and `track sync` follow it."""
    first = run(f"launch/demo.sh {BIN} {SHORT}", workplace)
    assert "latent/frechet_over_trace" in first.stdout
    picture = re.search(r"samples and reconstructions +(\S+)", first.stdout)[1]
    assert size_of(workplace / picture) == (2 * (10 * 36 + 16), 10 * 36)
    assert (workplace / "runs/digits/mlflow_run_id").read_text().strip() in first.stdout
    again = run(block_with("train configs/digits.toml"), workplace)
    assert "nothing is left to do" in again.stderr
    assert "MLflow has all" in run(block_with("track sync"), workplace).stdout
    stands = run(block_with("aaae status"), workplace).stdout
    assert stands.startswith("runs/digits: finished, 128 of 128 images (100 %), ")
    printed = re.search(r"```\n(runs/digits: .*?)```", (ROOT / "README.md").read_text(), flags=re.S)[1]
    rows = [[line.split()[0] for line in shown.splitlines() if "warning" not in line] for shown in (stands, printed)]
    assert rows[0] == rows[1]
    saved = run(block_with("checkpoint list"), workplace).stdout
    assert "images  ddp on 2  " in saved
    assert "as they were saved" in saved
    assert aaae_dist.load(str(workplace / "digits-model")).noise_size == 12
    looked = run(block_with("shards inspect"), workplace)
    assert looked.stdout.count('{"batch": ') == 3
    assert (workplace / "sheet.png").exists()


def test_the_preflight_finds_nothing(workplace):
    done = run(f"aaae prepare digits --out store/digits\n{block_with('preflight')}", workplace)
    lines = done.stdout.splitlines()[1:]
    assert {line.split()[0] for line in lines} == {"ok"}, done.stdout
    shown = re.search(r"```\n(ok .*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert shown
    parts = {line[9:19] for line in lines}
    assert {line[9:19] for line in shown[1].splitlines()} <= parts


def test_the_selftest_finds_nothing_and_leaves_nothing(workplace):
    done = run(block_with("selftest"), workplace)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 5, done.stdout
    assert "ddp, 2 ranks on 1 node, " in done.stdout
    assert list((workplace / "runs").iterdir()) == []


def test_every_block_is_accounted_for():
    """What is not run above is `make demo` and `make test`, which run this."""
    known = (
        "prepare folder",
        "s3://bucket/runs",
        "train configs/digits.toml",
        "preflight",
        "selftest",
        "track sync",
        "aaae status",
        "checkpoint list",
        "shards inspect",
    )
    known += ("make demo", "make test", "sbatch ")  # which test_slurm runs, and what stands beside it test_local
    assert [block for block in BLOCKS if not any(text in block for text in known)] == []
    makefile = (ROOT / "Makefile").read_text()
    assert "launch/demo.sh $(BIN)" in makefile
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_links_and_pictures_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []
