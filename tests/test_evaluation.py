"""Figures and samples that depend on neither batch nor rank."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import environment, settings

from aaae_dist import inference
from aaae_dist.checkpoint import load_average
from aaae_dist.data import sweep
from aaae_dist.evaluation import evaluate
from aaae_dist.reader import Reader

WORKER = """
import json, sys
import torch.distributed as dist
from aaae_dist.checkpoint import load_average
from aaae_dist.reader import Reader
from aaae_dist.evaluation import evaluate
dist.init_process_group("gloo")
model, config, _ = load_average(sys.argv[1])
readers = {"train": Reader(config.data, split="train"), "held_out": Reader(config.data, split="test")}
figures = dict(evaluate(model, **readers, samples=501, batch_size=int(sys.argv[2]), workers=0))
open(f"{sys.argv[3]}/{dist.get_rank()}.json", "w").write(json.dumps(figures))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits, forks) -> Path:
    made = tmp_path_factory.mktemp("evaluated") / "run"
    forks.train(*settings(made, digits))
    return made


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 64), (3, 50)])
def test_evaluation_does_not_depend_on_ranks_or_batch(run, tmp_path, ranks, batch_size):
    model, config, _ = load_average(str(run))
    readers = {"train": Reader(config.data, split="train"), "held_out": Reader(config.data, split="test")}
    alone = dict(evaluate(model, **readers, samples=501, batch_size=501, workers=0))
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    line = [*launch, str(tmp_path / "worker.py"), str(run), str(batch_size), str(tmp_path)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(alone, rel=1e-6)


def test_figures_against_a_plain_computation(run):
    model, config, _ = load_average(str(run))
    readers = {"train": Reader(config.data, split="train"), "held_out": Reader(config.data, split="test")}
    figures = dict(evaluate(model, **readers, samples=300, batch_size=100, workers=0))
    held_out = next(sweep(readers["held_out"], limit=1000, batch_size=1000, world=1, rank=0, workers=0))
    images = held_out.images[held_out.mask].double() / 127.5 - 1
    with torch.no_grad():
        reconstructions = model.decode(model.encode(images.float())).clamp(-1, 1).double()
        codes = model.encode(images.float())
    mse = (reconstructions - images).square().mean().item()
    assert figures["reconstruction/held_out_mse"] == pytest.approx(mse, rel=1e-5)
    assert figures["reconstruction/held_out_psnr"] == pytest.approx(10 * math.log10(4 / mse), rel=1e-5)
    assert 1 <= figures["latent/effective_rank"] <= codes.shape[1]
    assert set(figures) >= {"latent/frechet_over_trace", "samples/thumbnail_frechet_over_trace"}


def test_a_sample_depends_on_its_seed_and_number_alone(run):
    model, _, _ = load_average(str(run))
    whole = inference.sample(model, seed=3, first=0, count=20)
    assert whole.shape == (20, 1, 8, 8)
    assert whole.dtype == torch.uint8
    assert torch.equal(torch.cat([inference.sample(model, seed=3, first=i, count=4) for i in range(0, 20, 4)]), whole)
    assert not torch.equal(inference.sample(model, seed=4, first=0, count=20), whole)
    assert whole.unique(dim=0).shape == whole.shape


def test_grids_place_every_image():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 32, 32)
    tiled = inference.grid(images, columns=4, gap=2)
    assert tiled.shape == (1, 2 * 34, 4 * 34)
    for number in range(6):
        row, column = divmod(number, 4)
        assert (tiled[0, row * 34 : row * 34 + 32, column * 34 : column * 34 + 32] == number).all()
    assert (tiled[0, 34:, 68:] == 255).all()
    rows = inference.pairs(images, images + 100, columns=4)[0, ::36, ::36]
    assert rows.tolist() == [[0, 1, 2, 3], [100, 101, 102, 103], [4, 5, 255, 255], [104, 105, 255, 255]]
