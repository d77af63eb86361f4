"""Compiled, in channels-last, with activations made again: the same losses in every engine."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import refused
from test_training import configured, lines
from torch import nn
from training_runs import ENGINES, ended, settings

from aaae_dist import checkpoint, networks
from aaae_dist.aaae import AAAE
from aaae_dist.config import Config
from aaae_dist.engine import Engine
from aaae_dist.execution import settle_execution
from aaae_dist.randomness import sample_keys

STEPS = (
    12  # in later ones the last bits that a compiler changes put units of the critics on the other side of their kink
)
SHORT = (f"training.images={64 * STEPS}", "logging.every=64", "checkpoint.every=0", "evaluation.every=0")


def game_of(**training: bool) -> AAAE:
    torch.manual_seed(0)
    sections = configured(**training).model_dump() | {
        "data": {"url": "x", "channels": 3, "size": 16},
        "model": {"width": 8, "code_size": 4, "noise_size": 4},
    }
    config = Config.model_validate(sections)
    game = AAAE.build(config)
    settle_execution(game, config.training, engine=Engine.__new__(Engine))
    return game


def gradients(game: AAAE) -> dict[str, torch.Tensor]:
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    game(images, sample_keys(0, 0, 8)).loss.backward()
    return {name: weight.grad for name, weight in game.named_parameters() if weight.grad is not None}


def test_convolutions_see_channels_last_and_weights_stay_as_they_are():
    game, seen = game_of(channels_last=True), []
    for module in game.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda layer, given, made: seen.extend([*given, made]))
    found = gradients(game)
    assert len(seen) == 2 * 6
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen)
    assert all(weight.is_contiguous() for weight in game.parameters())
    for name, expected in gradients(game_of()).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_activations_made_again_are_not_kept():
    kept = {}
    for again in (False, True):
        game, bytes_of = game_of(activation_checkpointing=again), {}

        def keep(tensor: torch.Tensor, bytes_of: dict = bytes_of) -> torch.Tensor:
            bytes_of[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        for weight in game.parameters():
            bytes_of[weight.untyped_storage().data_ptr()] = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            turn = game(torch.zeros(64, 3, 16, 16), sample_keys(0, 0, 64))
        turn.loss.backward()
        kept[again] = sum(bytes_of.values()), {name: weight.grad for name, weight in game.named_parameters()}
    assert kept[True][0] < 0.4 * kept[False][0]
    for name, gradient in kept[False][1].items():
        assert torch.equal(kept[True][1][name], gradient), name


# --- in every engine

COUNTED = """
import json
from pathlib import Path
from torch._dynamo.utils import counters
from aaae_dist import distributed
from aaae_dist.cli import main
from aaae_dist.training import Trainer
train = Trainer.train

def counted(self):
    train(self)
    Path(self.run, f"graphs-{distributed.rank()}.json").write_text(json.dumps(counters["stats"]))

Trainer.train = counted
main()
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory, digits, forks) -> list[dict]:
    """What one process logs that uses none of it."""
    run = tmp_path_factory.mktemp("plain") / "run"
    forks.train(*settings(run, digits, *SHORT, "training.micro_batch_size=32", "data.workers=0"))
    return lines(run)


def assert_same_losses(run: Path, plain: list[dict]) -> None:
    found = lines(run)
    assert [line["images"] for line in found] == [line["images"] for line in plain] == [*range(64, 769, 64), 768]
    for ours, theirs in zip(found, plain, strict=True):
        for name, value in theirs.items():
            if name.endswith(("/mse", "/loss", "_loss", "held_out_mse")):
                assert math.isclose(ours[name], value, rel_tol=2e-6), (ours["images"], name)


@pytest.mark.parametrize("engine", ENGINES)
def test_settings_of_memory_change_no_loss_in_any_engine(tmp_path, digits, forks, plain, engine):
    """Also with a layer large enough for ZeRO-3 to take it away after every use, where there is one."""
    options = ("training.channels_last=true", "training.activation_checkpointing=true", "data.workers=0")
    forks.train(*settings(tmp_path / "run", digits, *SHORT, *options), processes=2, engine=engine)
    assert_same_losses(tmp_path / "run", plain)


@pytest.mark.parametrize("engine", ["single", "ddp", "zero1", "zero2", "fsdp2"])
def test_compiled_networks_have_the_same_losses(tmp_path, digits, forks, plain, engine):
    (tmp_path / "counted.py").write_text(COUNTED)
    processes, more = 1 if engine == "single" else 2, ("training.compile=true", "training.micro_batch_size=32")
    options = settings(tmp_path / "run", digits, *SHORT, *more, "data.workers=0")
    forks.train(*options, processes=processes, engine=engine, script=tmp_path / "counted.py")
    assert_same_losses(tmp_path / "run", plain)
    for rank in range(processes):
        graphs = json.loads((tmp_path / "run" / f"graphs-{rank}.json").read_text())["unique_graphs"]
        assert graphs >= len(list(game_of().children()))


def test_what_zero3_cannot_do_is_one_line(tmp_path, digits):
    done = ended(*settings(tmp_path, digits, "training.compile=true"), processes=2, engine="zero3")
    assert done.returncode != 0
    assert "training.compile true: zero3 lends a network's weights out layer by layer" in done.stderr
    assert not checkpoint.complete(str(tmp_path))


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with refused(r"training.compile true: there is no C\+\+ compiler on the PATH; install g\+\+, or set it to false"):
        game_of(compile=True)
    assert networks.Layers.recomputed is False
