"""One model under every engine: the same numbers, and one checkpoint.

Each trains once as its user starts it, and ranks that are forked with the variables that a launcher gives them (see
forks.py) come to the same bits; then they stand for it where trainings are only compared.
"""

import json
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import refused
from PIL import Image
from servers import free_port
from test_training import trainer_for
from training_runs import (
    CLOCKED,
    ENGINES,
    ROOT,
    assert_same_bits,
    command,
    ended,
    environment,
    final,
    networks,
    settings,
    train,
)

from aaae_dist import checkpoint, distributed
from aaae_dist.engine import Engine
from aaae_dist.fsdp import Fsdp
from aaae_dist.zero import Zero

pytestmark = pytest.mark.xdist_group("engines")  # which compare with the same runs

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
WITHOUT = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "deepspeed" else found(name, *more)
"""
# With matrices that ZeRO-3 divides between steps too: those of fewer than 100,000 values stay whole on every rank. Not
# where ranks sum in another order than one process does: so wide a critic makes more of the last bits in 20 steps.
WIDE = "model.latent_width=320"
HARD = (  # all that could tell engines apart: what is clipped, averaged, scheduled, penalised, judged, drawn
    "optimizer.encoder.lr=3e-3",
    "optimizer.clip=0.3",
    "training.warmup=300",
    "training.average_half_life=200",
    "evaluation.every=640",
    "logging.pictures_every=640",
    "logging.every=64",
    "data.workers=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def trained(folder, digits, forks) -> Callable[..., Path]:
    """A run of an engine, trained by the first who asks for it."""

    def trained(engine: str, *more: str, processes: int = 2) -> Path:
        run = folder / f"{engine}-{processes}-{len(more)}-{'-'.join(more)}".replace("/", "_")
        if not run.exists():
            done = forks.train(*settings(run, digits, *HARD, *more), processes=processes, engine=engine)
            assert "Error" not in done.stderr
            assert done.stdout == ""
        return run

    return trained


def assert_same_figures(ours: Path, theirs: Path) -> None:
    """Every number of every line but times and rates of work: losses to 1e-6, all to 1e-5."""
    found = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    assert len(found[0]) == len(found[1]) == 22
    for our, their in zip(*found, strict=True):
        for name, value in their.items():
            if not name.startswith(CLOCKED):
                limit = 1e-6 if name.endswith(("loss", "/mse", "held_out_mse")) else 1e-5
                assert our[name] == pytest.approx(value, rel=limit, abs=1e-6), (their["images"], name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("micro", ["0", "16"])
def test_every_engine_computes_the_same(trained, engine, micro):
    """As one process does on the same micro-batches, where all but the norms that are clipped by is the same sum."""
    parts, more = {"0": ("32", [WIDE]), "16": ("16", [])}[micro]
    one = trained("single", f"training.micro_batch_size={parts}", *more, processes=1)
    run = trained(engine, f"training.micro_batch_size={micro}", *more)
    assert_same_figures(run, one)
    ours, expected = final(run), final(one)
    assert ours.keys() == expected.keys()
    for key, value in networks(expected).items():
        assert (ours[key] - value).norm() <= 1e-5 * value.norm(), key
    manifest = checkpoint.read_manifest(str(run), checkpoint.complete(str(run))[-1])
    assert (manifest.engine, manifest.world) == (engine, 2)
    assert {path.name for path in (run / "samples").iterdir()} == {f"{images:012d}.png" for images in (640, 1280)}
    for path in (run / "samples").iterdir():
        shown, wanted = (np.asarray(Image.open(place / "samples" / path.name), np.int16) for place in (run, one))
        assert np.abs(shown - wanted).max() <= 1, "rounded to the next grey"


def test_no_variable_of_a_launcher_changes_the_micro_batches(folder, digits, trained):
    """Accelerate would take its word before ours, and train something else without one."""
    micro = "training.micro_batch_size=16"
    for name, value in (("four", "4"), ("one", "1")):
        run = folder / f"accumulation-of-{name}"
        train(*settings(run, digits, *HARD, micro), processes=2, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=value)
        assert_same_bits(final(run), final(trained("ddp", micro)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_without_clipping_every_engine_has_the_same_bits(trained, engine, precision):
    """Clipped by norms that are summed in other orders, the last bits are others, of which bfloat16 makes more."""
    options = (f"training.precision={precision}", "optimizer.clip=0.0", WIDE)
    one = trained("single", *options, "training.micro_batch_size=32", processes=1)
    run = trained(engine, *options)
    assert_same_figures(run, one)
    assert_same_bits(networks(final(run)), networks(final(one)))


def test_bfloat16_is_close_to_float32_and_its_weights_are_float32(trained):
    runs = [
        trained(
            "single",
            f"training.precision={precision}",
            "optimizer.clip=0.0",
            WIDE,
            "training.micro_batch_size=32",
            processes=1,
        )
        for precision in ("no", "bf16")
    ]
    assert {values.dtype for values in final(runs[1]).values()} == {torch.float32}
    mse = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["reconstruction/mse"] for run in runs]
    assert mse[1] == pytest.approx(mse[0], rel=0.02)
    assert mse[1] != mse[0]


MOVES = (  # engine, ranks, until so many images: each goes on from what the one before has saved
    ("zero3", 2, 192),
    ("single", 1, 320),
    ("zero1", 4, 448),
    ("fsdp2", 2, 576),
    ("zero2", 2, 704),
    ("ddp", 4, 832),
    ("zero3", 4, 960),
    ("fsdp2", 4, 1088),
    ("zero2", 1, 1216),
    ("ddp", 2, 1280),
)


def test_a_run_moves_from_engine_to_engine(folder, digits, trained, forks):
    """Any continues any other on any number of ranks, as if it had never moved, at the exact sample."""
    options = ("training.micro_batch_size=16", "training.final_rate=1.0", "evaluation.every=0", "checkpoint.every=0")
    still = trained("single", *options, processes=1)
    run = folder / "moving"
    for engine, processes, images in MOVES:
        arguments = settings(run, digits, *HARD, *options, f"training.images={images}", "logging.pictures_every=0")
        forks.train(*arguments, processes=processes, engine=engine)
        manifest = checkpoint.read_manifest(str(run), checkpoint.complete(str(run))[-1])
        assert (manifest.engine, manifest.world, manifest.progress["images"]) == (engine, processes, images)
    expected = networks(final(still))
    for key, value in networks(final(run)).items():
        assert (value - expected[key]).norm() <= 1e-5 * expected[key].norm(), key
    ours, theirs = (
        {line["images"]: line for line in map(json.loads, (place / "metrics.jsonl").read_text().splitlines())}
        for place in (run, still)
    )
    for images in range(64, 1281, 64):
        for name in ("reconstruction/mse", "latent_critic/loss", "image_critic/loss"):
            if name in ours[images]:
                assert ours[images][name] == pytest.approx(theirs[images][name], rel=1e-5), (images, name)


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_resumed_in_the_same_engine_it_ends_with_the_same_bits(folder, digits, forks, engine):
    """In parts, by ranks that are forked, as in one by those that a user's launcher starts."""
    whole, parts = folder / f"{engine}-whole", folder / f"{engine}-in-parts"
    how = {"engine": engine, "processes": 1 if engine == "single" else 2}
    options = (*HARD, "training.final_rate=1.0", WIDE)
    done = train(*settings(whole, digits, *options), **how)
    assert "Error" not in done.stderr
    said = [line for line in done.stdout.splitlines() if "Setting accelerator to CPU" not in line]  # the launcher
    assert said == []
    for images in (448, 1280):
        forks.train(*settings(parts, digits, *options, f"training.images={images}"), **how)
    assert_same_bits(final(parts), final(whole))


# --- what cannot be


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP_VERSION=1: only version 2 is ours; start with"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=None: only version 2 is ours; start with"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 0: must be 1, 2 or 3; start with `accelerate"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "ACCELERATE_DYNAMO_BACKEND=INDUCTOR, an option of accelerate's"),
        (ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "ACCELERATE_GRADIENT_CLIPPING=0.5, an option of accelerate's"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "FSDP_ACTIVATION_CHECKPOINTING=true, an option of accelerate's"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG=true, an option of"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true, an option of accelerate's launcher: nothing is"),
        (ZERO | {"PYTHONPATH": "without"}, "zero_stage 2: DeepSpeed is not installed; pip install 'aaae_dist"),
    ],
)
def test_an_engine_that_cannot_be_is_one_line(tmp_path, digits, variables, line):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(WITHOUT)
    more = {name: str(tmp_path / value) if name == "PYTHONPATH" else value for name, value in variables.items()}
    done = ended(*settings(tmp_path / "run", digits), **more)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"aaae: {line}")
    assert done.stderr.count("\n") == 1


def test_two_machines_are_one_world(tmp_path, digits):
    """The README's line on each; DeepSpeed's own launcher would let each train alone, in the same folder."""
    line = command(*settings(tmp_path / "run", digits, "data.workers=0"), engine="zero2", processes=2)
    meeting = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    launch, what = line[: line.index("--main_process_port")], line[line.index("-m", 3) :]
    with ExitStack() as stack:
        machines = []
        for rank in ("0", "1"):
            there = [*launch, *meeting, "--machine_rank", rank, *what]
            options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
            machines.append(stack.enter_context(subprocess.Popen(there, env=environment(), **options)))
            stack.callback(machines[-1].kill)
        said = [machine.communicate(timeout=200)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    manifest = checkpoint.read_manifest(str(tmp_path / "run"), checkpoint.complete(str(tmp_path / "run"))[-1])
    assert (manifest.engine, manifest.world) == ("zero2", 2)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_ranks_with_other_settings_are_refused(tmp_path, digits, engine):
    """As of a node with an older file: they would train something else without a word."""
    script = tmp_path / "older.py"
    script.write_text(
        "import os, sys\nfrom aaae_dist.cli import main\n"
        "sys.argv += ['optimizer.encoder.lr=3e-3'] if os.environ['RANK'] == '1' else ['data.cache=elsewhere']\nmain()"
    )
    done = ended(*settings(tmp_path / "run", digits), processes=2, engine=engine, script=script)
    assert done.returncode == 1  # the launcher's
    line = (
        f"aaae: optimizer.encoder.lr 0.003 on rank 1: rank 0 of {tmp_path / 'run'} has 0.001; give all nodes the same"
    )
    assert any(said.startswith(line) for said in done.stderr.splitlines()), done.stderr


NOWHERE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number; start with `accelerate launch"),
        ({"WORLD_SIZE": "2"}, "RANK: not set beside WORLD_SIZE=2, as a launcher sets both; start with `accelerate"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: not set beside WORLD_SIZE=2, as a launcher sets both"),
        (NOWHERE | {"RANK": "-1"}, "RANK=-1: must be a whole number"),
        (NOWHERE, "127.0.0.1:1: 2 ranks could not meet there (The client socket has "),
    ],
)
def test_ranks_that_no_launcher_brings_together_are_one_line(tmp_path, digits, variables, line):
    done = ended(*settings(tmp_path / "run", digits, "training.patience=2"), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    name = "aaae" if variables.get("RANK", "0") == "0" else f"aaae rank {variables['RANK']}"
    (said,) = [text for text in done.stderr.splitlines() if text.startswith(f"{name}: ")]
    assert said.startswith(f"{name}: {line}")
    assert "Traceback" not in done.stderr


def test_ranks_that_did_not_join_are_one_line(monkeypatch):
    """As where accelerate falls back to one process without a word."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(distributed, "launched_world", lambda: 2)
    with refused("WORLD_SIZE=2: the launcher announced as many ranks, but 1 joined; start with `accelerate launch"):
        Engine(precision="no", accumulation=1, micro=1, clip=0.0, patience=1.0)


def test_what_came_up_is_looked_at(digits, tmp_path, monkeypatch):
    """Where accelerate says that it did, and wrapped nothing."""
    trainer = trainer_for(*settings(tmp_path / "run", digits))
    for kind, world in ((Engine, 2), (Fsdp, 1), (Zero, 1)):
        engine = kind.__new__(kind)
        engine.game = engine.model = trainer.game
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        monkeypatch.setattr(distributed, "world", lambda world=world: world)
        assert not engine.came_up()


def test_what_no_checkpoint_would_hold_is_refused(digits, tmp_path):
    """A buffer, such as a batch norm's, and a parameter under two names."""
    trainer = trainer_for(*settings(tmp_path / "run", digits))
    encoder, decoder = trainer.game.encoder, trainer.game.decoder
    encoder.register_buffer("grid", torch.zeros(1))
    with pytest.raises(ValueError, match=r"^encoder\.grid: would be in no checkpoint; networks have parameters, each"):
        trainer.engine.take(trainer.game, trainer.optimizer)
    del encoder.grid
    decoder.tied = next(encoder.parameters())
    with pytest.raises(ValueError, match=r"^decoder\.tied: would be in no checkpoint"):
        trainer.engine.take(trainer.game, trainer.optimizer)


SLOW = """
import time
from aaae_dist import checkpoint
from aaae_dist.cli import main
publish = checkpoint.publish
checkpoint.publish = lambda *arguments: (time.sleep(9), publish(*arguments))
main()
"""


def test_a_store_that_takes_longer_than_ranks_wait_for_each_other_ends_no_run(tmp_path, digits):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    more = ("training.patience=6", "training.images=128", "checkpoint.every=0", "data.workers=0")
    train(*settings(tmp_path / "run", digits, *more), processes=2, script=script)
    assert [int(name) for name in checkpoint.complete(str(tmp_path / "run"))] == [128]
