"""What is exported runs elsewhere: without the trainer's engines, and as programs without its code."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from training_runs import environment, settings

import aaae_dist
from aaae_dist import inference, storage
from aaae_dist.checkpoint import load_average
from aaae_dist.cli import main

WITHOUT_ENGINES = """
import sys
for name in ("accelerate", "deepspeed", "mlflow"):
    sys.modules[name] = None  # importing it fails
import numpy, torch, aaae_dist
model = aaae_dist.load(sys.argv[1])
images = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)
with torch.no_grad():
    numpy.savez(sys.argv[2], codes=model.encode(images), images=model.decode(model.encode(images)).clamp(-1, 1))
"""
WITHOUT_US = """
import sys
sys.modules["aaae_dist"] = None
import numpy, torch
encoder, decoder, sampler = (
    torch.export.load(f"{sys.argv[1]}/{name}.pt2").module() for name in ("encoder", "decoder", "sampler")
)
images = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)
with torch.no_grad():
    codes, noise = encoder(images), torch.linspace(-2, 2, 5 * 8).view(5, 8)
    numpy.savez(sys.argv[2], codes=codes, images=decoder(codes), samples=sampler(noise))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits, forks) -> str:
    made = tmp_path_factory.mktemp("exported") / "run"
    forks.train(*settings(made, digits))
    return str(made)


def called(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "aaae_dist", *arguments]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def out(run, tmp_path_factory) -> str:
    place = str(tmp_path_factory.mktemp("export") / "model")
    done = called("export", run, "--out", place)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{place}: the averaged networks of {run} after 1,280 images\n"
    return place


def expected(run: str) -> dict[str, np.ndarray]:
    model, _, _ = load_average(run)
    images = torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)
    with torch.no_grad():
        codes = model.encode(images)
        samples = model.decode(model.generate(torch.linspace(-2, 2, 5 * 8).view(5, 8))).clamp(-1, 1)
        return {"codes": codes.numpy(), "images": model.decode(codes).clamp(-1, 1).numpy(), "samples": samples.numpy()}


@pytest.mark.parametrize("script", [WITHOUT_ENGINES, WITHOUT_US])
def test_it_runs_elsewhere(run, out, tmp_path, script):
    line = [sys.executable, "-W", "error::UserWarning", "-c", script, out, str(tmp_path / "found.npz")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    found, wanted = np.load(tmp_path / "found.npz"), expected(run)
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_it_is_the_model_that_the_commands_use(run, out):
    model, _, name = load_average(run)
    loaded = aaae_dist.load(out)
    ours, theirs = (inference.sample(each, seed=1, first=0, count=5) for each in (loaded, model))
    assert torch.equal(ours, theirs)
    about = json.loads((Path(out) / "about.json").read_text())
    weights = hashlib.sha256((Path(out) / "networks.safetensors").read_bytes()).hexdigest()
    assert about == {"run": run, "checkpoint": name, "images": 1280, "sha256": weights}


def test_what_is_in_the_way_and_what_is_damaged_is_one_line(run, out, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["export", run, "--out", f"{tmp_path}/taken"])
    assert capsys.readouterr().err == f"aaae: --out {tmp_path}/taken: it holds thesis.tex; choose a new folder\n"
    with pytest.raises(SystemExit, match="2"):
        main(["export", run, "--out", ""])
    assert capsys.readouterr().err == "aaae: --out: must not be empty; give a new folder or any fsspec URL\n"
    for name in ("about.json", "config.toml", "networks.safetensors"):
        storage.write(f"{tmp_path}/bad/{name}", storage.read(f"{out}/{name}"))
    aaae_dist.load(f"{tmp_path}/bad")
    config = storage.read(f"{out}/config.toml").replace(b"latent_width = ", b"latent_width = 1")
    storage.write(f"{tmp_path}/bad/config.toml", config)
    with refused(f"{tmp_path}/bad/networks.safetensors: of other networks than its config.toml says"):
        aaae_dist.load(f"{tmp_path}/bad")
    weights = bytearray(storage.read(f"{out}/networks.safetensors"))
    weights[-100] ^= 1
    storage.write(f"{tmp_path}/bad/networks.safetensors", bytes(weights))
    with refused(f"{tmp_path}/bad/networks.safetensors: damaged, its bytes are not those that about.json speaks of"):
        aaae_dist.load(f"{tmp_path}/bad")
    with refused(f"{tmp_path}/none/config.toml: no such file"):
        aaae_dist.load(f"{tmp_path}/none")
