"""The README's commands, run as they stand but for shorter trainings, in a folder of their own."""

import json
import re
from pathlib import Path

import pages
import pytest
from pages import BIN, SHORT, block, run
from PIL import Image

import aaae_dist


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    return pages.workplace(tmp_path)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_your_own_images(workplace):
    run(block("README.md", "prepare folder"), workplace)
    assert size_of(workplace / "samples.png") == (10 * 68, 10 * 68)
    assert size_of(workplace / "pairs.png") == (2 * 68, 2 * 68)
    assert json.loads((workplace / "store/photos/index.json").read_text())["classes"] == ["cats", "dogs"]


def test_everything_in_an_object_store(workplace, s3):
    script = block("README.md", "s3://bucket/runs").replace("s3://bucket", s3)
    run(script, workplace, XDG_CACHE_HOME=str(workplace / "cache"))
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
    again = run(block("README.md", "train configs/digits.toml"), workplace)
    assert "nothing is left to do" in again.stderr
    assert "MLflow has all" in run(block("README.md", "track sync"), workplace).stdout
    stands = run(block("README.md", "aaae status"), workplace).stdout
    assert stands.startswith("runs/digits: finished, 128 of 128 images (100 %), ")
    printed = re.search(r"```\n(runs/digits: .*?)```", pages.read("README.md"), flags=re.S)[1]
    rows = [[line.split()[0] for line in shown.splitlines() if "warning" not in line] for shown in (stands, printed)]
    assert rows[0] == rows[1]
    saved = run(block("README.md", "checkpoint list"), workplace).stdout
    assert "images  ddp on 2  " in saved
    assert "as they were saved" in saved
    assert aaae_dist.load(str(workplace / "digits-model")).noise_size == 12
    looked = run(block("README.md", "shards inspect"), workplace)
    assert looked.stdout.count('{"batch": ') == 3
    assert (workplace / "sheet.png").exists()


def test_the_preflight_finds_nothing(workplace):
    done = run("aaae prepare digits --out store/digits\n" + block("README.md", "preflight"), workplace)
    lines = done.stdout.splitlines()[1:]
    assert {line.split()[0] for line in lines} == {"ok"}, done.stdout
    shown = re.search(r"```\n(ok .*?)```", pages.read("README.md"), flags=re.S)
    assert shown
    parts = {line[9:19] for line in lines}
    assert {line[9:19] for line in shown[1].splitlines()} <= parts


def test_the_selftest_finds_nothing_and_leaves_nothing(workplace):
    done = run(block("README.md", "selftest"), workplace)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 5, done.stdout
    assert "ddp, 2 ranks on 1 node, " in done.stdout
    assert list((workplace / "runs").iterdir()) == []
