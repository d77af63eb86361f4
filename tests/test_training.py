"""Properties of whole trainings: as many ranks as you like, killed and resumed, asked to stop, numbers gone bad."""

import itertools
import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import awaited, prepared
from test_data import data_workers
from training_runs import DOUBLE, ROOT, assert_same_bits, command, ended, environment, final, networks, settings

from aaae_dist import checkpoint, distributed, storage
from aaae_dist import interval as module
from aaae_dist.config import Config, load_config
from aaae_dist.data import Batch, to_uint8
from aaae_dist.errors import UserError
from aaae_dist.interval import Interval, describe_waits, slow_data
from aaae_dist.preparation import Recipe
from aaae_dist.progress import Progress
from aaae_dist.schedule import averaging_rate, learning_rate
from aaae_dist.sources import Source
from aaae_dist.sources import digits as handwritten
from aaae_dist.stopping import StopRequest
from aaae_dist.system import Node
from aaae_dist.tracking import Tracker
from aaae_dist.training import Trainer


def trainer_for(*arguments: str) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
    return Trainer(load_config(arguments), stop=StopRequest())


def train_here(*arguments: str) -> None:
    trainer_for(*arguments).train()


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- schedules


def configured(**training) -> Config:
    data, model = {"url": "x", "channels": 1, "size": 8}, {"width": 1, "code_size": 1, "noise_size": 1}
    defaults = {"run": "x", "images": 1000, "batch_size": 10}
    return Config.model_validate({"data": data, "model": model, "training": defaults | training})


def test_learning_rate_rises_and_falls_with_the_images():
    training = configured(warmup=100, final_rate=0.1).training
    assert learning_rate(training, 0) == pytest.approx(10 / 110)
    assert learning_rate(training, 100) == 1.0
    assert learning_rate(training, 550) == pytest.approx(0.55)
    assert learning_rate(training, 1000) == pytest.approx(0.1)
    rates = [learning_rate(training, images) for images in range(0, 1000, 10)]
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)


def test_averages_halve_what_was_before_in_a_half_life():
    training = configured(average_half_life=100.0).training
    kept = 1.0
    for images in range(5000, 5100, 10):
        kept *= 1 - averaging_rate(training, images)
    assert kept == pytest.approx(0.5)
    assert averaging_rate(training, 10) == pytest.approx(1 - 0.5**12)  # the first average is nearly the weights
    assert averaging_rate(configured(average_half_life=0.0).training, 500) == 1.0


# --- the same training however it is cut


@pytest.mark.parametrize(("double", "tolerance"), [(False, 1e-5), (True, 1e-10)], ids=["float32", "float64"])
def test_one_process_equals_two_and_micro_batches(tmp_path, digits, forks, double, tolerance):
    """Every tensor of the networks and their averages, to a share of its norm, after 20 steps."""
    ways = {"one": (1, "0"), "two": (2, "0"), "four_parts": (1, "16"), "two_by_two": (2, "16")}
    found = {}
    for name, (processes, micro) in ways.items():
        run = tmp_path / name
        options = settings(run, digits, f"training.micro_batch_size={micro}", "checkpoint.every=0")
        forks.train(*options, processes=processes, script=DOUBLE if double else None)
        found[name] = networks(final(run))
        evaluated = next(line for line in reversed(lines(run)) if "latent/frechet_over_trace" in line)
        found[name]["evaluation"] = torch.tensor([v for k, v in evaluated.items() if "/" in k])
    for name, tensors in found.items():
        for key, value in found["one"].items():
            limit = 1e-4 if key == "evaluation" else tolerance
            assert (tensors[key] - value).norm() <= limit * value.norm(), (name, key)


def mixed(folder: Path, *, side: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Settings of five steps on two data sets of such images, with those of `b` at half the weight; and the images."""
    found = {}
    for name, count in {"a": 70, "b": 50}.items():
        found[name] = pixels = np.random.default_rng(count).integers(0, 256, (count, side, side), dtype=np.uint8)
        source = Source([f"{i:03d}" for i in range(count)], pixels.__getitem__, size=side, channels=1)
        prepared(source, folder / name)
    return [f"data.url={folder}/a", f'data.mix={{"{folder}/b" = 0.5}}', "training.images=320"], found


@pytest.mark.parametrize(("crop", "flip", "critical"), [(1, 1, 24.3), (1, 0, 16.3), (0, 1, 10.8), (0, 0, np.inf)])
def test_the_game_sees_crops_and_mirror_images_of_all_data_sets(tmp_path, crop, flip, critical):
    options, images = mixed(tmp_path, side=8 + crop)
    kinds = {}  # data set, place and whether mirrored, of all squares that there are
    for name, top, left in itertools.product(images, range(1 + crop), range(1 + crop)):
        for square in images[name][:, top : top + 8, left : left + 8]:
            kinds[square.tobytes()] = name, top, left, False
            kinds[np.fliplr(square).tobytes()] = name, top, left, True
    choice = (f"data.crop={crop > 0}".lower(), f"data.flip={flip > 0}".lower())
    trainer, seen = trainer_for(*settings(tmp_path / "run", "", *options, *choice)), []
    trainer.engine.model.register_forward_pre_hook(
        lambda model, inputs: seen.append([kinds[to_uint8(image).numpy().tobytes()] for image in inputs[0]])
    )
    trainer.train()
    assert [len(batch) for batch in seen] == [64] * 5
    for step in range(1, 6):
        of_b = sum(name == "b" for batch in seen[:step] for name, *_ in batch)
        assert abs(of_b - 64 * step / 3) < 1
    tally = Counter(kind[1:] for batch in seen for kind in batch)
    places = 4**crop * 2**flip
    assert len(tally) == places
    assert sum((count - 320 / places) ** 2 * places / 320 for count in tally.values()) < critical  # chi squared, 0.999


@pytest.mark.parametrize("number", [0, signal.SIGTERM, signal.SIGINT])
def test_worker_processes_change_no_bit_and_end_with_the_training(tmp_path, number):
    """What takes more than 64 MB decoded is not kept, so workers are at work; stopped and continued they are, too."""
    ramp = np.add.outer(np.arange(192), np.arange(192))
    source = Source([f"{i}" for i in range(1_900)], lambda i: ((ramp + i) % 256).astype(np.uint8), size=192, channels=1)
    prepared(source, data := tmp_path / "data", held_out=20, samples_per_shard=500, format="jpg")
    options = ("data.crop=true", "checkpoint.every=0", "evaluation.every=0")
    train_here(*settings(tmp_path / "none", str(data), *options, "data.workers=0"))
    some = settings(tmp_path / "some", str(data), *options, "data.workers=2")
    trainer, met = trainer_for(*some), []
    step = trainer.step

    def watched(batch: Batch) -> None:
        met.append(len(data_workers()))
        if number and len(met) == 7:
            trainer.stop.receive(number, None)
        step(batch)

    trainer.step = watched
    trainer.train()
    assert set(met) == {2}
    assert trainer.state.images == (7 * 64 if number else 20 * 64)  # the step of the wish
    if number:
        train_here(*some)
    assert_same_bits(final(tmp_path / "some"), final(tmp_path / "none"))


def test_variation_and_mixes_are_the_same_on_two_ranks(tmp_path, forks):
    options, _ = mixed(tmp_path, side=9)
    for processes in (1, 2):
        more = ("data.crop=true", "data.flip=true", "checkpoint.every=0")
        forks.train(*settings(tmp_path / str(processes), "", *options, *more), processes=processes)
    one, two = (networks(final(tmp_path / name)) for name in "12")
    for key, value in one.items():
        assert (two[key] - value).norm() <= 1e-5 * value.norm(), key


def test_ranks_see_the_same_statistics_and_one_line_of_metrics(tmp_path, digits, forks):
    forks.train(*settings(tmp_path / "run", digits), processes=2)
    found = lines(tmp_path / "run")
    assert [line["images"] for line in found] == [320, 640, 960, 1280, 1280]
    first = found[0]
    networks = {"encoder", "decoder", "latent_generator", "latent_critic", "image_critic"}
    assert {name.split("/")[1] for name in first if name.startswith("gradient_norm/")} == networks
    assert {name.split("/")[1] for name in first if name.startswith("learning_rate/")} == networks
    for name in ("latent_critic/margin", "image_critic/accuracy", "codes/rms", "codes/effective_rank"):
        assert isinstance(first[name], float)
    assert first["speed/images_per_second"] > 0
    assert 0 <= sum(first[f"data/wait/{name}"] for name in ("fetching", "decoding", "hand_over")) < 1
    assert first["data/slowest_rank"] in range(2)
    for name in ("step_seconds", "forward_seconds", "data_wait", "memory_gb"):
        assert 0 <= first[f"ranks/{name}/min"] <= first[f"ranks/{name}/mean"] <= first[f"ranks/{name}/max"]
    assert 0 < first["ranks/forward_seconds/max"] < first["ranks/step_seconds/max"]
    assert first["ranks/slowest"] in range(2)
    assert len([name for name in first if name.startswith("system/") and name.endswith("/cpu_percent")]) == 1
    assert 1 <= first["codes/effective_rank"] <= 8


@pytest.mark.parametrize(
    ("waits", "line"),
    [
        (
            (0.3, 0.05, 0.006),
            "rank 3 waits longest for data, 36% of its time (fetching 30%, decoding 5%, hand-over 1%)",
        ),
        ((0.0, 0.0, 0.125), "rank 3 waits longest for data, 12% of its time (fetching 0%, decoding 0%, hand-over 12%)"),
        ((0.03, 0.03, 0.03), ""),
    ],
)
def test_the_log_says_who_waits_for_data_and_for_what(waits, line):
    shares = torch.zeros(5, 3)
    shares[3], shares[1, 1] = torch.tensor(waits), 0.02
    assert slow_data(describe_waits(shares)) == line


def test_a_training_that_waits_for_data_says_so(tmp_path, digits, caplog):
    caplog.set_level("INFO", logger="aaae_dist.training")
    trainer = trainer_for(*settings(tmp_path / "run", digits))
    trainer.interval.waits[1] = 1e6
    trainer.train()
    said = [message for message in caplog.messages if "waits longest" in message]
    assert re.match(
        r"rank 0 waits longest for data, \d+% of its time \(fetching \d+%, decoding \d+%, hand-over", said[0]
    )
    assert lines(tmp_path / "run")[0]["data/wait/decoding"] > 1 > lines(tmp_path / "run")[1]["data/wait/decoding"]


def made(*, fetching: float, decoding: float, finished: float) -> Batch:
    nothing = torch.zeros(0, 1, 1, 1, dtype=torch.uint8)
    return Batch(nothing, [], [], torch.zeros(0, dtype=torch.bool), fetching, decoding, finished)


def test_waiting_is_told_by_what_the_batch_waited_for(monkeypatch):
    """What is left of fetching and decoding when the step comes, in their proportion; the rest is hand-over."""
    device = torch.device("cpu")
    interval = Interval(["encoder"], code_size=1, device=device, node=Node([], device=device))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 10.0))
    for began, batch, waits in (
        (4.0, made(fetching=3.75, decoding=1.25, finished=9.0), (3.75, 1.25, 1.0)),  # made when asked for
        (8.0, made(fetching=30.0, decoding=10.0, finished=9.0), (0.75, 0.25, 1.0)),  # begun before
        (8.0, made(fetching=3.0, decoding=1.0, finished=5.0), (0.0, 0.0, 2.0)),  # ready before
        (7.0, made(fetching=0.0, decoding=0.0, finished=7.0), (0.0, 0.0, 3.0)),  # all of it kept
    ):
        before = list(interval.waits)
        interval.add_wait(batch, began=began)
        assert [b - a for a, b in zip(before, interval.waits, strict=True)] == pytest.approx(waits)


# --- killed, stopped, resumed


def newest(run: Path) -> int:
    """Images of the newest complete checkpoint."""
    return max((int(found.parent.name) for found in run.glob("checkpoints/*/COMPLETE")), default=0)


def workers_of(launcher: int) -> list[int]:
    """The training processes below a launcher, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # a process may end while it is looked at
            if f"PPid:\t{launcher}\n" in (entry / "status").read_text():
                variables = (entry / "environ").read_bytes().split(b"\0")
                found |= {int(value[5:]): int(entry.name) for value in variables if value.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@contextmanager
def launched(run: Path, digits: str, *more: str) -> Iterator[subprocess.Popen]:
    """A training on two processes that would go on for ever, and has begun."""
    arguments = settings(run, digits, "training.images=10_000_000", "logging.every=640", *more)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command(*arguments, processes=2), env=environment(), cwd=ROOT, **pipes)
    try:
        awaited(lambda: (run / "metrics.jsonl").exists() and lines(run), of=launcher, seconds=120.0)
        yield launcher
    finally:
        if launcher.poll() is None:
            for pid in [*workers_of(launcher.pid), launcher.pid]:
                os.kill(pid, signal.SIGKILL)
        launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_rank_asked_to_stop_all_save_at_the_same_step_and_leave(tmp_path, digits, forks, number):
    run = tmp_path / "run"
    with launched(run, digits, "checkpoint.every=0") as launcher:
        os.kill(workers_of(launcher.pid)[1], number)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, said
    (name,) = checkpoint.complete(str(run))
    saved = checkpoint.read_manifest(str(run), name)
    assert saved.progress["images"] == int(name) < 10_000_000
    assert int(name) % 64 == 0
    forks.train(*settings(run, digits, f"training.images={int(name) + 64}", "checkpoint.every=0"), processes=2)
    assert checkpoint.complete(str(run))[-1] == f"{int(name) + 64:012d}"


def test_a_rank_that_dies_brings_the_others_down_with_one_line(tmp_path, digits):
    with launched(tmp_path / "run", digits) as launcher:
        os.kill(workers_of(launcher.pid)[1], signal.SIGKILL)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    ours = [line for line in said.splitlines() if line.startswith("aaae: ") and "another rank is gone" in line]
    assert len(ours) == 1
    assert "goes on from the last checkpoint" in ours[0]


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path, digits):
    with launched(tmp_path / "run", digits) as launcher:
        ranks = [psutil.Process(pid) for pid in workers_of(launcher.pid)]
        assert len(ranks) == 2
        launcher.kill()
        _, left = psutil.wait_procs(ranks, timeout=10)
        for rank in left:
            rank.kill()
        assert left == []


def test_a_finished_run_has_nothing_left_to_do(tmp_path, digits, forks):
    arguments = settings(tmp_path / "run", digits, "training.images=128")
    forks.train(*arguments)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = forks.train(*arguments)
    assert "nothing is left to do" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_stop_of_one_is_known_to_all(tmp_path, digits, monkeypatch):
    """They may have to do without the launcher's store from then on."""
    trainer = trainer_for(*settings(tmp_path / "run", digits))
    trainer.progress = Progress(1_280, 0, visible=False)
    for stop in (0.0, 1.0):
        wishes = [0.0, stop, 0.0, 0.0, *[0.0] * 5]  # the loss, stop, save, failed, norms
        monkeypatch.setattr(
            distributed,
            "sum_over_ranks",
            lambda told, wishes=wishes: told + told.new_tensor([*[0.0] * (len(told) - len(wishes)), *wishes]),
        )
        trainer.step(trainer.next_batch())
        assert (trainer.stopping, trainer.stop.signal) == ((True, signal.SIGTERM) if stop else (False, None))


def test_what_ended_a_run_is_told_and_not_what_fails_while_it_closes(tmp_path, digits, monkeypatch):
    def fail(tracker: Tracker, status: str) -> None:
        raise UserError(f"the store is down at {status}")

    monkeypatch.setattr(Tracker, "close", fail)
    with pytest.raises(UserError, match="the store is down at FINISHED"):
        train_here(*settings(tmp_path / "well", digits, "training.images=64"))
    trainer = trainer_for(*settings(tmp_path / "ill", digits))
    monkeypatch.setattr(trainer, "step", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.stop.failure == "ZeroDivisionError: division by zero"


def test_a_checkpoint_that_a_training_removes_meanwhile_is_not_damaged(tmp_path, digits, monkeypatch):
    run, complete = str(tmp_path / "run"), checkpoint.complete
    train_here(*settings(run, digits, "training.images=192", "checkpoint.every=64", "checkpoint.keep=1"))
    assert complete(run) == [f"{192:012d}"]
    seen = [[f"{64:012d}"], [f"{128:012d}"]]  # each gone when it was to be read
    monkeypatch.setattr(checkpoint, "complete", lambda run: seen.pop(0) if seen else complete(run))
    assert checkpoint.load_average(run)[2] == f"{192:012d}"
    assert not seen
    storage.remove(f"{run}/checkpoints/{192:012d}/manifest.json")
    with pytest.raises(UserError, match=r"all 1 checkpoints are damaged"):
        checkpoint.load_average(run)


APART = """
import os
from aaae_dist import agreement
from aaae_dist.cli import main
agreement.LATE = 2.0
os.makedirs(os.environ["RANK"], exist_ok=True)
os.chdir(os.environ["RANK"])
main()
"""


def test_a_run_that_not_all_ranks_see_is_refused(tmp_path, digits, monkeypatch):
    """In a folder of each node, whether it is new or not."""
    (tmp_path / "apart.py").write_text(APART.replace('os.environ["RANK"]', f'"{tmp_path}/" + os.environ["RANK"]'))
    options = settings("run", digits, "training.images=128", "data.workers=0")
    line = "aaae: run: rank 1 sees other files there than rank 0; put training.run where all nodes see it"
    for found in ([], ["000000000128"]):
        assert checkpoint.complete(f"{tmp_path}/0/run") == found
        done = ended(*options, processes=2, script=tmp_path / "apart.py")
        assert done.returncode == 1  # the launcher's
        assert line in done.stderr.splitlines()
        (tmp_path / "0").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "0")
        train_here(*options)


def test_four_ranks_killed_and_resumed_end_with_the_same_bits(tmp_path, digits, forks):
    """More than two, which test_kills has, sum in an order that depends on how DDP lays out its buckets."""
    whole, parts, length = tmp_path / "whole", tmp_path / "parts", "training.images=6_400"
    forks.train(*settings(whole, digits, length, "checkpoint.every=0"), processes=4)
    arguments = settings(parts, digits, length)
    line = command(*arguments, processes=4)
    launcher = subprocess.Popen(line, env=environment(), stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        awaited(lambda: newest(parts), of=launcher, seconds=120.0)
    finally:
        for pid in [*workers_of(launcher.pid), launcher.pid]:
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
    assert 0 < newest(parts) < 6_400, "it must be killed while it trains"
    forks.train(*arguments, processes=4)
    assert_same_bits(final(parts), final(whole))


# --- what is configured is what happens


def test_rates_betas_and_averages_are_those_configured(tmp_path, digits):
    rates = ("optimizer.encoder.lr=2e-3", "optimizer.latent_critic.betas=[0.3, 0.9]", "training.average_half_life=200")
    trainer = trainer_for(*settings(tmp_path / "run", digits, *rates, "training.warmup=200"))
    training, expected = trainer.config.training, {k: v.clone() for k, v in trainer.game.state_dict().items()}
    step, seen = trainer.step, []

    def record(batch: Batch) -> None:
        step(batch)
        seen.append({group["name"]: (group["lr"], group["betas"]) for group in trainer.optimizer.param_groups})
        for name, value in expected.items():
            share = averaging_rate(training, 64 * len(seen))
            value.copy_(value + share * (trainer.game.state_dict()[name] - value))

    trainer.step = record
    trainer.train()
    for step, groups in enumerate(seen):
        share = learning_rate(training, 64 * step)
        for name, (rate, betas) in groups.items():
            configured = getattr(trainer.config.optimizer, name)
            assert rate == pytest.approx(share * configured.lr)
            assert betas == configured.betas
    assert seen[3]["encoder"][0] == pytest.approx(2 * seen[3]["decoder"][0])
    with trainer.engine.averaged() as game:
        for name, value in game.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_parts_that_would_compute_something_else_are_refused(tmp_path, digits):
    parts = settings(tmp_path / "run", digits, "training.micro_batch_size=2")
    with pytest.raises(UserError, match=r"batch_size 64, of which a part of 2 .* must be a multiple of 4, because obj"):
        trainer_for(*parts)
    trainer_for(*parts, "model.method=autoencoder")  # has no pairs


def test_a_run_that_saved_nothing_can_be_corrected(tmp_path, digits):
    run = tmp_path / "run"
    trainer_for(*settings(run, digits))
    (run).mkdir(exist_ok=True)
    (run / "config.toml").write_text(load_config(settings(run, digits, "model.width=9")).toml())
    train_here(*settings(run, digits, "training.images=64"))


def test_a_checkpoint_in_a_store_has_its_metrics_with_it(tmp_path, digits, monkeypatch):
    """The store's journal is whole when a checkpoint says what was done: a kill at that moment loses no line."""
    run, found = f"memory://{tmp_path}/run", {}
    publish = checkpoint.publish

    def look(place: str, manifest: checkpoint.Manifest, parts: list[checkpoint.Part]) -> None:
        found[manifest.progress["images"]] = storage.read(storage.join(run, "metrics.jsonl")).count(b"\n")
        publish(place, manifest, parts)

    monkeypatch.setattr(checkpoint, "publish", look)
    train_here(*settings(run, digits))
    assert found == {640: 2, 1280: 5}


def test_checkpoints_by_the_clock_and_those_that_stay(tmp_path, digits, monkeypatch):
    """A step lasts a minute here; one that began two minutes after the last checkpoint is followed by another."""
    trainer = trainer_for(
        *settings(tmp_path, digits, "training.images=640", "checkpoint.every=0", "checkpoint.minutes=1.9"),
        *("checkpoint.keep=99", "evaluation.every=320"),
    )
    monkeypatch.setattr(
        "aaae_dist.saving.time", SimpleNamespace(monotonic=lambda: 60.0 * trainer.state.images / 64 + 1)
    )
    trainer.state.saver.began = 0.0
    trainer.train()
    names = checkpoint.complete(str(tmp_path))
    assert [int(name) // 64 for name in names] == [3, 6, 9, 10]
    figures = [checkpoint.read_manifest(str(tmp_path), name).figures for name in names]
    assert figures[:3] == [{}, {}, {}]
    assert figures[3].items() <= lines(tmp_path)[-1].items()
    assert "reconstruction/held_out_mse" in figures[3]


# --- precision, bad numbers, changed settings


def test_bf16_trains_close_to_float32(tmp_path, digits):
    losses = {}
    for precision in ("no", "bf16"):
        train_here(*settings(tmp_path / precision, digits, f"training.precision={precision}"))
        losses[precision] = lines(tmp_path / precision)[-2]
    assert losses["bf16"]["reconstruction/mse"] == pytest.approx(losses["no"]["reconstruction/mse"], rel=0.02)
    assert losses["bf16"]["reconstruction/mse"] != losses["no"]["reconstruction/mse"]


@pytest.mark.parametrize("change", ["model.width=8", "optimizer.encoder.lr=0.1", "training.seed=3", "data.lanes=4"])
def test_another_configuration_in_the_same_run_is_refused(tmp_path, digits, change):
    run = tmp_path / "run"
    train_here(*settings(run, digits, "training.images=128"))
    kept = final(run)
    with pytest.raises(UserError, match=rf"{change.split('=')[0]} .*the run in .* was begun with"):
        train_here(*settings(run, digits, "training.images=256", change))
    assert_same_bits(final(run), kept)


def test_gradients_are_clipped_network_by_network(tmp_path, digits, monkeypatch):
    norms, step = {}, torch.optim.Adam.step
    for clip in (0.0, 0.05):
        trainer, seen = trainer_for(*settings(tmp_path / str(clip), digits, f"optimizer.clip={clip}")), []

        def record(optimizer, seen=seen):
            gradients = [[weight.grad for weight in group["params"]] for group in optimizer.param_groups]
            seen.append([torch.nn.utils.get_total_norm(part).item() for part in gradients])
            step(optimizer)

        monkeypatch.setattr(torch.optim.Adam, "step", record)
        trainer.train()
        norms[clip] = torch.tensor(seen)
    assert norms[0.0].max() > 0.05
    assert norms[0.05].max() <= 0.05 * (1 + 1e-4)
    free = norms[0.0][0] > 0.05
    torch.testing.assert_close(norms[0.05][0][free], torch.full((int(free.sum()),), 0.05), rtol=1e-3, atol=0)
    torch.testing.assert_close(norms[0.05][0][~free], norms[0.0][0][~free])


def test_a_plain_autoencoder_goes_through_the_same_loop(tmp_path, digits):
    run = tmp_path / "run"
    train_here(*settings(run, digits, "model.method=autoencoder"))
    first, last = lines(run)[0], lines(run)[-2]
    assert last["reconstruction/mse"] < first["reconstruction/mse"]
    assert not any(name.startswith(("latent_critic", "image_critic")) for name in last)


# --- on a bad day


def test_two_trainings_do_not_share_a_run(tmp_path, digits):
    first = trainer_for(*settings(tmp_path / "run", digits))
    lock = storage.Lock(first.run)
    with pytest.raises(UserError, match=r"run: another training is at work there; choose another training.run"):
        first.train()
    lock.release()
    first.train()


def test_a_training_that_another_has_overtaken_touches_nothing(tmp_path, digits):
    run = tmp_path / "run"
    train_here(*settings(run, digits, "training.images=640"))
    slow = trainer_for(*settings(run, digits))
    train_here(*settings(run, digits))
    with pytest.raises(UserError, match="another training saved there in the meantime"):
        slow.train()
    assert checkpoint.complete(str(run)) == [f"{640:012d}", f"{1280:012d}"]
    assert len(lines(run)) == 6


def test_a_run_that_went_further_is_not_rewritten_by_a_shorter_command(tmp_path, digits):
    run = tmp_path / "run"
    train_here(*settings(run, digits))
    about = json.loads((run / "about.json").read_text()) | {"status": "RUNNING"}
    (run / "about.json").write_text(json.dumps(about))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train_here(*settings(run, digits, "training.images=640"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_store_that_does_not_answer_is_not_taken_for_damage(tmp_path, digits, monkeypatch):
    run = tmp_path / "run"
    train_here(*settings(run, digits, "training.images=256", "checkpoint.every=64"))
    read = storage.read

    def stall(url, **options):
        if url.endswith("000000000256/00000-000.safetensors"):
            raise UserError(f"{url}: the store does not answer")
        return read(url, **options)

    monkeypatch.setattr(storage, "read", stall)
    with pytest.raises(UserError, match="the store does not answer"):
        trainer_for(*settings(run, digits, "training.images=320"))
    assert checkpoint.complete(str(run))[-1] == f"{256:012d}"


def test_a_damaged_checkpoint_is_saved_anew_when_training_comes_by(tmp_path, digits):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_here(*settings(whole, digits))
    train_here(*settings(run, digits))
    (run / "checkpoints" / f"{1280:012d}" / "00000-000.safetensors").write_bytes(b"damage")
    train_here(*settings(run, digits))
    assert_same_bits(final(run), final(whole))


@pytest.mark.parametrize("rate", ["1e5", "1e3"])
def test_wild_rates_never_end_in_a_finished_run(tmp_path, digits, rate):
    """Also when the numbers go bad after the last step: evaluation and weights are looked at before they are saved."""
    wild = (f"optimizer.encoder.lr={rate}", f"optimizer.decoder.lr={rate}")
    with pytest.raises(UserError, match=r"is not finite after .* begin another training.run with lower learning rates"):
        train_here(*settings(tmp_path / "run", digits, "training.images=640", "checkpoint.every=0", *wild))
    assert checkpoint.complete(str(tmp_path / "run")) == []


def test_bad_samples_are_counted_over_all_ranks(tmp_path, digits, forks, monkeypatch):
    """Neither of two ranks meets too many, the two together do. Where more are allowed, they are listed, each once."""
    run, out = tmp_path / "run", tmp_path / "bad"
    batch = next(trainer_for(*settings(run, digits)).batches).keys
    bad, source, apply = {*batch[:6], *batch[32:38]}, handwritten("", labels=""), Recipe.apply
    blank = lambda i: np.zeros((8, 8), np.uint8) if source.keys[i] in bad else source.read(i)  # noqa: E731
    resized = lambda self, pixels: apply(self if pixels.any() else self._replace(size=4), pixels)  # noqa: E731
    monkeypatch.setattr(Recipe, "apply", resized)
    prepared(source._replace(read=blank), out, held_out=179, samples_per_shard=180)

    arguments = settings(run, str(out), "training.images=64", "data.bad_share=0.001")
    with pytest.raises(AssertionError, match=f"aaae: {out}: 12 unreadable samples, more than data.bad_share = 0.001"):
        forks.train(*arguments, processes=2)
    assert checkpoint.complete(str(run)) == []
    train_here(*arguments, "data.bad_share=0.1")
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(sample["key"] for sample in listed) == sorted(bad)
    assert lines(run)[0]["data/bad_samples"] == 12


def test_a_run_killed_at_its_very_end_is_finished_by_the_same_command(tmp_path, digits):
    run = tmp_path / "run"
    train_here(*settings(run, digits, "training.images=64"))
    about = json.loads((run / "about.json").read_text())
    (run / "about.json").write_text(json.dumps(about | {"status": "RUNNING"}))
    train_here(*settings(run, digits, "training.images=64"))
    assert json.loads((run / "about.json").read_text())["status"] == "FINISHED"
