"""The benchmarks of speed and quality run; what they measure means nothing here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from judge import read
from PIL import Image
from quality import METHODS, QUICK, costs, train
from step import main as compare_steps
from training_runs import ROOT, environment, settings

from aaae_dist.config import load_config


@pytest.fixture(autouse=True)
def _one_training_a_process():
    AcceleratorState._reset_state(reset_partial_state=True)


def rows(table: str) -> list[list[str]]:
    """The cells of a markdown table, but its second line."""
    lines = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
    return [lines[0], *lines[2:]]


def test_steps_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick"])
    compare_steps()
    _, *found = rows(capsys.readouterr().out)
    assert [row[0].partition(",")[0] for row in found] == ["bare one-pass step", "ours", *["alternating"] * 3]
    assert all(float(row[1]) > 0 for row in found)
    assert found[0][2] == found[1][3] == "1.000 (1.000 to 1.000)"


@pytest.mark.parametrize("setting", ["objective.pairing=logistic", "objective.image_reaches_latent=false"])
def test_steps_that_compute_something_else_are_not_compared(monkeypatch, setting):
    """Of other games than the usual one the page of plain torch knows nothing."""
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick", str(ROOT / "configs" / "smoke.toml"), setting])
    with pytest.raises(AssertionError, match=r"step \d: a loss of|the averages of"):
        compare_steps()


def test_what_steps_cost_is_measured_of_both_loops(tmp_path, digits):
    config = load_config(settings(tmp_path / "run", digits))
    found = costs(config, 0.01)
    assert found.keys() == METHODS.keys()
    assert min(found.values()) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [1e-3, 1e6])
def test_rates_under_which_numbers_go_bad_lose(tmp_path, digits, method, rate):
    changes = "training.images=128", "guard.skips=0", f"optimizer.encoder.lr={rate}", f"optimizer.decoder.lr={rate}"
    found = train(method, load_config(settings(tmp_path / "run", digits, *changes)))
    assert (len(found.samples), found.held_out_mse < math.inf) == ((5000, True) if rate < 1 else (0, False))


def test_quality_goes_on_with_the_best_rates(tmp_path):
    """Of the quick plan the costs are known, and what came of the grid; the curves are found and drawn."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "costs.json").write_text(json.dumps({"one-pass": 0.1, "alternating": 0.2}))
    steps, best = {"one-pass": (2, 4), "alternating": (1, 2)}, {"one-pass": QUICK.grid[1], "alternating": QUICK.grid[0]}
    for method in METHODS:
        for rates in QUICK.grid:
            name = f"{method}-{rates.autoencoder:g}-{rates.latent:g}-seed3-{steps[method][1]}.json"
            figures = {"frechet": 0.25 if rates == best[method] else 0.75, "held_out_mse": 0.5, "seconds": 0.1}
            (folder / name).write_text(json.dumps(figures | {"steps": steps[method][1]}))
    known = {path.name for path in folder.iterdir()}

    line = [sys.executable, "-W", "error", str(ROOT / "benchmarks/quality.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {path.stem for path in folder.glob("*.json") if path.name not in known}
    assert found == {"floor"} | {
        f"{method}-{best[method].autoencoder:g}-{best[method].latent:g}-seed0-{count}"
        for method in METHODS
        for count in steps[method]
    }
    curves, grid = map(rows, done.stdout.split("\n\n"))
    assert [row[1::2] for row in grid[1:]] == [["0.7500"], ["0.2500"]]
    for method, rates, *told in (row[1:] for row in curves[1:]):
        assert rates == f"{best[method].autoencoder:g}, {best[method].latent:g}"
        chosen = folder / f"{method}-{best[method].autoencoder:g}-{best[method].latent:g}-seed0-{told[0]}.json"
        figures = json.loads(chosen.read_text())
        assert told[2].startswith(f"{figures['frechet']:.4f} ")
        assert told[3].startswith(f"{figures['held_out_mse']:.4f} ")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 400


def test_rows_that_only_fill_a_batch_up_are_not_judged(digits):
    """1,618 images, read in batches of 500."""
    images, labels = read(load_config(settings(Path("none"), digits)).data, "train")
    assert images.shape == (1618, 1, 8, 8)
    assert labels.bincount().sum() == 1618
    assert (images > -1).flatten(1).any(1).all()
