"""Steps that would ruin the networks are skipped, too many of them send the run back, and too many of those end it."""

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_training import lines, train_here, trainer_for
from training_runs import ENGINES, assert_same_bits, ended, final, networks, settings

from aaae_dist import checkpoint
from aaae_dist.config import Guard as Settings
from aaae_dist.errors import UserError
from aaae_dist.guard import FEWEST, NEAR, WINDOW, Guard, read_rollbacks, write_rollbacks
from aaae_dist.state import State


def warm(settings: Settings, *, spread: float = 0.5) -> Guard:
    """A guard that has seen figures whose logarithms have this standard deviation."""
    guard, generator = Guard(settings), torch.Generator().manual_seed(0)
    for loss, norm in torch.randn(WINDOW, 2, generator=generator).mul(spread).exp().tolist():
        assert guard.judge({"the loss": loss, "the gradient of encoder": norm}) == ""
    return guard


@pytest.mark.parametrize(("deviations", "spread"), [(6.0, 0.5), (12.0, 0.3), (6.0, 1e-3)])
def test_what_is_far_is_told_by_the_median_absolute_deviation(deviations, spread):
    """1.4826 of which is the standard deviation of a normal distribution; hardly any spread counts as 0.1."""
    guard = warm(Settings(deviations=deviations), spread=spread)
    limit = math.exp(deviations * max(spread, 0.1))
    assert guard.judge({"the loss": 1.0, "the gradient of encoder": limit * 0.5}) == ""
    for value in (limit * 2, math.inf, math.nan):
        complaint = guard.judge({"the loss": 1.0, "the gradient of encoder": value})
        assert complaint.startswith("the gradient of encoder is ")
        assert ("not finite" in complaint) == (not math.isfinite(value))
    assert guard.skipped == 3
    assert not guard.exhausted


def test_what_was_high_before_anything_was_judged_is_no_measure():
    guard = Guard(Settings())
    for step in range(WINDOW // 2):
        assert guard.judge({"the loss": 1e9 if step == 5 else 1.0}) == ""
    assert guard.judge({"the loss": 1e8}) == "the loss is 1e+08, 1 is usual"


def test_a_run_that_settles_is_not_disturbed_and_a_start_is_not_judged():
    guard = Guard(Settings())
    for step in range(FEWEST):
        assert guard.judge({"the loss": 1e6 if step % 2 else 1e-6}) == ""
    guard = Guard(Settings())
    for step in range(1_000):  # losses that grow by 1 % a step, or are negative, and a gradient that comes alive
        alive = 0.0 if step < 900 else 3.0
        assert guard.judge({"the loss": 1.01**step, "another": -step, "the gradient of critic": alive}) == ""


def test_the_budget_is_one_of_the_last_steps_and_survives_a_restart():
    guard = Guard(Settings(skips=2))
    for _ in range(2):
        assert guard.judge({"the loss": math.inf})
    for _ in range(WINDOW):
        assert not guard.exhausted
        guard.judge({"the loss": 1.0})
    guard.judge({"the loss": math.nan})
    guard.judge({"the loss": math.nan})
    again = Guard(Settings(skips=2))
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for each in (guard, again):
        assert not each.exhausted
        each.judge({"the loss": math.nan})
        assert each.exhausted
    assert guard.state_dict() == again.state_dict()
    assert again.skipped == 5
    assert len(again.bad) == WINDOW
    assert "is not finite" in again.complaint


def test_bad_steps_now_and_then_leave_moments_to_go_back_to():
    guard, sound = Guard(Settings()), []
    for step in range(400):
        guard.judge({"the loss": math.inf if step % 30 == 0 else 1.0})
        sound.append(guard.sound)
    assert not guard.exhausted
    assert [step for step in range(60, 90) if sound[step]] == list(range(60 + NEAR, 90))


# --- in training

SPOILED = """
from aaae_dist import distributed
from aaae_dist.cli import main
from aaae_dist.training import Trainer
step, factors = Trainer.step, {factors}

def spoiled(self, batch):
    factor, hooks = factors.get((self.state.images, len(self.state.rollbacks))), []
    if factor and distributed.rank() == distributed.world() - 1:  # the loss stays as it is
        spoil = lambda network, given, codes: hooks.append(codes.register_hook(lambda gradient: gradient * factor))
        hooks.append(self.game.encoder.register_forward_hook(spoil))
    step(self, batch)
    for hook in hooks:
        hook.remove()

Trainer.step = spoiled
main()
"""


def spoiled(folder: Path, factors: dict[tuple[int, int], float]) -> Path:
    """Trains with gradients of the encoder times a factor, in steps after so many images and rollbacks."""
    path = folder / "spoiled.py"
    path.write_text(SPOILED.format(factors=str(factors).replace("inf", "float('inf')")))
    return path


def counts(run: Path) -> tuple[int, int]:
    """Steps skipped and rollbacks, as logged last."""
    found = [line for line in lines(run) if "guard/rollbacks" in line][-1]
    return found["guard/skipped_steps"], found["guard/rollbacks"]


TWO_BAD = {(128, 0): math.inf, (2304, 0): 1e9}
LONG = ("training.images=2560", "training.micro_batch_size=32", "checkpoint.every=0", "data.workers=0")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, digits, forks) -> Path:
    """A run of one process with two bad steps."""
    folder = tmp_path_factory.mktemp("one")
    forks.train(*settings(folder / "run", digits, *LONG), script=spoiled(folder, TWO_BAD))
    assert counts(folder / "run") == (2, 0)
    return folder / "run"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_step_of_one_rank_is_skipped_by_all_in_every_engine(tmp_path, digits, forks, one_process, engine):
    """One that is not finite, which DeepSpeed passes over in its own way, and one that explodes."""
    script = spoiled(tmp_path, TWO_BAD)
    said = forks.train(*settings(tmp_path / "run", digits, *LONG), processes=2, engine=engine, script=script).stderr
    assert "aaae: the step to 192 images is skipped: the gradient of encoder is not finite" in said
    assert "aaae: the step to 2,368 images is skipped: the gradient of encoder is " in said
    assert counts(tmp_path / "run") == (2, 0)
    expected = networks(final(one_process))
    for key, value in networks(final(tmp_path / "run")).items():
        assert (value - expected[key]).norm() <= 1e-5 * expected[key].norm(), key


def test_a_skipped_step_moves_nothing_but_the_data(tmp_path, digits):
    trainer = trainer_for(*settings(tmp_path, digits, "training.images=640", "checkpoint.every=0"))
    step, state = trainer.step, trainer.state

    def watched(batch):
        before = {name: value.clone() for name, value in values().items()}
        spoil = state.images in (128, 256)
        hook = trainer.game.decoder.register_forward_hook(lambda *given: given[-1] * math.nan) if spoil else None
        step(batch)
        same = [name for name, value in values().items() if torch.equal(value, before[name])]
        assert len(same) == len(before) if spoil else not {"weight/decoder.layers.0.weight"} & set(same)
        if hook:
            hook.remove()

    def values():
        pieces = trainer.engine.pieces()
        return {f"{state}/{name}": v for name, piece in pieces.items() for state, v in piece.values.items()}

    trainer.step = watched
    trainer.train()
    assert (state.images, state.steps) == (640, 8)
    assert {s["step"].item() for s in trainer.optimizer.state.values()} == {8}


ALWAYS = {(images, 0): math.inf for images in range(640, 1280, 64)}
BACK = ("guard.skips=1", "checkpoint.every=320", "training.final_rate=1.0", "logging.every=64", "data.workers=0")


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_too_many_bad_steps_send_the_run_back_and_on_in_another_order(tmp_path, digits, forks, engine):
    """And what then comes is as exact as ever: stopped and continued it ends with the same bits."""
    whole, parts, how = tmp_path / "whole", tmp_path / "parts", {"processes": 2, "engine": engine}
    said = forks.train(*settings(whole, digits, *BACK), script=spoiled(tmp_path, ALWAYS), **how).stderr
    assert f"aaae: {whole} goes back from 768 to 640 images: the gradient of encoder is not finite" in said
    (event,) = read_rollbacks(str(whole))
    assert (event["after"], event["to"], event["because"]) == (768, 640, "the gradient of encoder is not finite")
    assert counts(whole) == (0, 1)
    assert [line["images"] for line in lines(whole)][:-1] == list(range(64, 1281, 64))
    for images in (960, 1280):
        options = settings(parts, digits, *BACK, f"training.images={images}")
        forks.train(*options, script=spoiled(tmp_path, ALWAYS), **how)
    assert_same_bits(final(parts), final(whole))
    calm = tmp_path / "calm"
    forks.train(*settings(calm, digits, *BACK), **how)
    name = "weight/encoder.layers.0.weight"
    assert not torch.equal(final(calm)[name], final(whole)[name])
    assert checkpoint.read_manifest(str(whole), f"{1280:012d}").progress["stream"]["order"]["seed"] != 0


def test_checkpoints_are_saved_anew_where_the_run_went_back_past_them(tmp_path, digits, monkeypatch):
    """Not made of the parts that lie there, and one that is under way when it goes back is past."""
    run, gate, publish = tmp_path / "run", threading.Event(), checkpoint.publish
    options = ("guard.skips=2", "checkpoint.every=64", "checkpoint.keep=99", "data.workers=0")
    trainer, gone = trainer_for(*settings(run, digits, *options)), []
    step, go_back = trainer.step, trainer.go_back

    def spoil(batch):
        bad = trainer.state.images in (640, 704, 832) and not trainer.state.rollbacks
        hook = trainer.game.decoder.register_forward_hook(lambda *given: given[-1] * math.nan) if bad else None
        step(batch)
        if hook:
            hook.remove()

    def slow(place, manifest, parts):
        assert not place.endswith("832") or gate.wait(20)
        publish(place, manifest, parts)
        gone.extend(name for name in checkpoint.complete(str(run)) if int(name) > 640 and not trainer.state.rollbacks)

    def finish_saving():
        if trainer.guard.exhausted:
            gate.set()
        finish()

    def watched():
        assert trainer.interval.steps == 1
        go_back()
        assert trainer.interval.steps == 0
        assert trainer.progress.first == 640

    finish, trainer.state.finish_saving = trainer.state.finish_saving, finish_saving
    monkeypatch.setattr(checkpoint, "publish", slow)
    trainer.step, trainer.go_back = spoil, watched
    trainer.train()
    assert {int(name) for name in gone} == {704, 768, 832}
    names = checkpoint.complete(str(run))
    assert [int(name) for name in names] == list(range(64, 1281, 64))
    assert list(checkpoint.verify(str(run))) == []
    seeds = [checkpoint.read_manifest(str(run), name).progress["stream"]["order"]["seed"] for name in names]
    assert (len({*seeds[:10]}), len({*seeds[10:]}), len({*seeds})) == (1, 1, 2)


def test_a_run_whose_checkpoints_were_removed_begins_anew(tmp_path, digits):
    write_rollbacks(str(tmp_path), [{"after": 64, "to": 0, "because": "of old", "time": 0.0}])
    for images in (64, 128):
        trainer = trainer_for(*settings(tmp_path, digits, f"training.images={images}"))
        assert trainer.state.rollbacks == []
        assert trainer.state.seed == 0
        trainer.train()
    assert read_rollbacks(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("tos", "best_last"),
    [
        ([], [100, 1900, 2000]),
        ([2000], [100, 2000, 1900]),
        ([2000, 1900], [100, 1900, 2000]),  # another 2000, saved on the way from 1900
        ([1900, 2000], [100, 1900, 2000]),
        ([100], [100, 1900, 2000]),
    ],
)
def test_it_goes_back_to_one_that_has_not_led_to_the_same_before_if_that_is_recent(
    tmp_path, monkeypatch, tos, best_last
):
    names = [checkpoint.name_of(images) for images in (100, 1900, 2000, 2100)]
    monkeypatch.setattr(checkpoint, "complete", lambda run: names)
    monkeypatch.setattr(checkpoint, "sound", lambda run, names: reversed(names[:-1]))
    config = SimpleNamespace(checkpoint=SimpleNamespace(keep=3))
    state = SimpleNamespace(run=str(tmp_path), config=config, rollbacks=[{"to": to} for to in tos])
    assert [int(name) for name in State.good(state)] == best_last


def test_a_run_that_keeps_diverging_ends_and_keeps_its_last_good_checkpoint(tmp_path, digits):
    run = tmp_path / "run"
    always = {(images, n): math.inf for images in range(384, 1280, 64) for n in range(9)}
    options = settings(run, digits, "guard.skips=3", "guard.rollbacks=2", "checkpoint.every=64", "checkpoint.keep=5")
    done = ended(*options, script=spoiled(tmp_path, always))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"aaae: {run}: the gradient of encoder is not finite, and it went back guard.rollbacks = 2 times, after 640 "
        "images, so training stopped; older checkpoints are untouched: begin another training.run with lower learning "
        "rates or other penalties"
    )
    assert [event["to"] for event in read_rollbacks(str(run))] == [384, 320]
    sound = list(checkpoint.sound(str(run), checkpoint.complete(str(run))))
    assert [int(name) for name in sound] == [384, 320]
    assert all(value.isfinite().all() for value in final(run, sound[0]).values())


@pytest.mark.parametrize("network", ["encoder", "image_critic"])
def test_weights_that_are_lost_send_the_run_back_or_end_it(tmp_path, digits, network):
    whole, run = tmp_path / "whole", tmp_path / "run"
    for place in (whole, run):
        train_here(*settings(place, digits, "training.images=640", "training.final_rate=1.0"))
    kept = final(run)
    more = ("checkpoint.every=64", "training.final_rate=1.0")
    trainer = trainer_for(*settings(run, digits, *more, "guard.rollbacks=0"))
    with torch.no_grad():
        next(getattr(trainer.game, network).parameters()).fill_(math.inf)
    with pytest.raises(UserError, match=r"is not finite.* after 704 images.*older checkpoints are untouched"):
        trainer.train()
    assert checkpoint.complete(str(run))[-1] == f"{640:012d}"
    assert_same_bits(final(run), kept)

    trainer = trainer_for(*settings(whole, digits, *more))
    with torch.no_grad():
        next(getattr(trainer.game, network).parameters()).fill_(math.inf)
    trainer.train()
    assert counts(whole)[1] == 1
    assert all(value.isfinite().all() for value in final(whole).values())


LOST = """
import math, torch
from aaae_dist import distributed
from aaae_dist.cli import main
from aaae_dist.training import Trainer
step = Trainer.step

def lost(self, batch):
    step(self, batch)
    if self.state.images == 256 and not self.state.rollbacks:
        with torch.no_grad():
            next(self.game.{network}.parameters()).fill_(math.inf)

Trainer.step = lost
main()
"""


@pytest.mark.parametrize("network", ["encoder", "image_critic"])
def test_weights_that_one_rank_saves_send_all_back_if_they_are_lost(tmp_path, digits, forks, network):
    """Ranks that have all alike share the tensors out among them, when they save."""
    (tmp_path / "lost.py").write_text(LOST.format(network=network))
    more = ("training.images=640", "checkpoint.every=64", "data.workers=0", "evaluation.every=0")
    done = forks.train(*settings(tmp_path / "run", digits, *more), processes=2, script=tmp_path / "lost.py")
    assert f"goes back from 256 to 192 images: {network}." in done.stderr
    assert all(value.isfinite().all() for value in final(tmp_path / "run").values())
