"""The selftest: it finds nothing where all is well, and what is wrong by its name where something is."""

import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import awaited, refused
from servers import free_port
from training_runs import ROOT, command, ended, environment

from aaae_dist import checkpoint, selftest, storage, supervision
from aaae_dist.errors import UserError
from aaae_dist.pieces import Piece
from aaae_dist.selftest import Selftest, difference
from aaae_dist.stopping import StopRequest
from aaae_dist.supervision import EndedError, Supervisor

# --- as its users start it


def lines(done: subprocess.CompletedProcess) -> list[tuple[str, str]]:
    """Part and outcome of each line on stdout."""
    said = [line for line in done.stdout.splitlines() if "Setting accelerator to CPU" not in line]  # the launcher
    return [(line[8:44].strip(), line[:8].strip()) for line in said]


def test_all_is_well_under_zero2(tmp_path):
    """(Under DDP: test_readme.py.)"""
    done = ended("--out", str(tmp_path / "out"), processes=2, engine="zero2", verb="selftest")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ["ranks are equal", "killed and resumed = never stopped", "1 = 2", "checkpoints are whole", "verdict"]
    assert lines(done) == [(part, "ok") for part in parts]
    assert "zero2, 2 ranks on 1 node, " in done.stdout
    assert f"deepspeed {importlib.metadata.version('deepspeed')}" in done.stdout
    end = checkpoint.name_of(20 * 64)
    for run, engine, world in (("run", "zero2", 2), ("killed", "zero2", 2), ("alone", "single", 1)):
        manifest = checkpoint.read_manifest(str(tmp_path / "out" / run), end)
        assert (manifest.engine, manifest.world) == (engine, world)


DEFECTS = {
    "drifts": """
def step(self, batch, step=Trainer.step):
    step(self, batch)
    if self.state.images == 320 and os.environ.get("RANK") == "1":
        self.game.decoder.get_parameter(sorted(dict(self.game.decoder.named_parameters()))[0]).data.mul_(1.001)
Trainer.step = step
""",
    "raises": """
def step(self, batch, step=Trainer.step):
    if self.state.images == 320 and os.environ.get("RANK") == "1":
        raise ValueError("a defect")
    step(self, batch)
Trainer.step = step
""",
    "forgets": "Adam.count = lambda self, steps: None",
}


def spoiled(folder: Path, defect: str) -> dict[str, str]:
    """Variables with which every training process, and no other, has a defect."""
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'train' in sys.orig_argv:\n"
        "    from aaae_dist.optimizer import Adam\n"
        "    from aaae_dist.training import Trainer\n"
        f"    exec({DEFECTS[defect]!r})\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def test_ranks_that_drift_apart_are_found(tmp_path):
    done = ended("--out", str(tmp_path / "out"), processes=2, verb="selftest", **spoiled(tmp_path, "drifts"))
    assert done.returncode != 0
    assert lines(done) == [("ranks are equal", "FAILED"), ("verdict", "FAILED")]
    assert "decoder is not the same on all ranks" in done.stdout
    assert "the selftest failed (ranks are equal), see stdout" in done.stderr


def test_a_rank_that_fails_ends_all_with_its_reason(tmp_path):
    """Here without a launcher that would end the others: the ranks are told by variables alone."""
    there = environment() | spoiled(tmp_path, "raises") | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    line = command("--out", str(tmp_path / "out"), verb="selftest")
    ranks = [
        subprocess.Popen(
            line,
            env=there | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert [line.split()[0] for line in said[0][0].splitlines()] == ["FAILED", "FAILED"]
    assert "rank 1 ended with exit code 1: ValueError: a defect" in said[0][0].splitlines()[0]
    assert said[1][0] == ""
    assert "in step" in said[1][1], "the traceback is shown"
    assert "another rank is gone" not in said[0][1], "what follows from it is not"


def test_a_resumed_run_that_differs_is_found(tmp_path):
    """As where Adam forgets its steps: nothing else would tell."""
    done = ended("--out", str(tmp_path / "out"), verb="selftest", **spoiled(tmp_path, "forgets"))
    assert done.returncode == 2
    assert [well for _, well in lines(done)] == ["ok", "FAILED", "ok", "ok", "FAILED"]
    assert "two runs that were never stopped have the same bits" in done.stdout
    assert f"what was trained stays in {tmp_path / 'out'}" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("aaae: the selftest failed (killed and resumed = never stopped), ")


def test_asked_to_stop_it_leaves_no_process(tmp_path):
    line = command("--out", str(tmp_path / "out"), verb="selftest")
    with subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            (child,) = awaited(psutil.Process(process.pid).children, of=process)
            process.terminate()
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 2
    assert said == "aaae: the selftest was ended by SIGTERM; begin it anew\n"
    assert not child.is_running()


# --- what is compared


VALUES = torch.tensor([1.0, 2.0, 2.0])


def save(run: str, steps: int, **off: float) -> None:
    """A checkpoint of one tensor; by state, the share of its norm by which it is off."""
    values = {state: VALUES.clone() for state in ("weight", "exp_avg", "exp_avg_sq", "average")}
    for state, share in off.items():
        values[state][0] += VALUES.norm() * share
    name = checkpoint.name_of(steps * 32)
    place = storage.join(checkpoint.folder(run), name)
    about = {"engine": "single", "world": 1, "config": "", "shapes": {"encoder.bias": [3]}, "files": {}}
    manifest = checkpoint.Manifest(**about, sound=True, fingerprints={}, figures={}, progress={"images": steps * 32})
    checkpoint.save_part(place, {"encoder.bias": Piece([3], 0, values)}, rank=0, attempt="a")
    part = checkpoint.saved_part(place, rank=0, attempt="a")
    assert part
    checkpoint.publish(place, manifest, [part])


class Pretended(Selftest):
    """With trainings that save at once what they are told to: by the name of a run, how far it is off at its end."""

    off: dict[str, dict[str, float]]

    def train(self, run: str, *_: str, **how: Any) -> None:
        name = run.rpartition("/")[2]
        if "until" in how:
            for steps in (5, 10, 20, 25):  # it was killed late
                save(run, steps)
            return
        assert name != "killed" or checkpoint.complete(run) == [checkpoint.name_of(steps * 32) for steps in (5, 10)]
        save(run, 20, **self.off.get(name, {}))


def pretended(out: Path, **off: dict[str, float]) -> Pretended:
    test = Pretended(str(out), Supervisor(StopRequest()))
    test.off = off
    return test


@pytest.mark.parametrize(
    ("off", "wrong", "what"),
    [
        ({}, "", "killed, taken up at step 10, at step 20 the same bits"),
        ({"killed": {"exp_avg": 1e-3}}, "killed", "at step 20 1.0e-03 of a tensor's norm (exp_avg/encoder.bias) off"),
        ({"killed": {"average": 5e-4}, "again": {"weight": 1e-4}}, "", "never stopped are 1.0e-04 of a tensor's norm"),
        ({"killed": {"average": 5e-3}, "again": {"weight": 1e-4}}, "killed", "do not repeat bits"),
        ({"alone": {"weight": 9e-6, "exp_avg": 0.1}}, "", "at most 9.0e-06 of a tensor's norm (weight/encoder.bias)"),
        ({"alone": {"average": 1.2e-5}}, "1 = 1", "at most 1.2e-05 of a tensor's norm (average/encoder.bias) off"),
        ({"alone": {"exp_avg_sq": 0.1}}, "", "at most 0.0e+00 of a tensor's norm off"),
    ],
)
def test_what_differs_is_told_with_its_figure(tmp_path, off, wrong, what):
    found = list(pretended(tmp_path / "out", **off).findings())
    assert [finding.part.split()[0] for finding in found if not finding.well] == wrong.split()[:1]
    assert what in " | ".join(finding.figure for finding in found)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("steps", "wrong"), [(10, "checkpoints are whole"), (20, "killed and resumed = never stopped")]
)
def test_a_damaged_checkpoint_is_found(tmp_path, steps, wrong):
    """Where it has to be read for a comparison, then."""
    test = pretended(tmp_path / "out", killed={"weight": 1e-3})
    found, wanted, train = test.findings(), None, test.train

    def damaging(run: str, *more: str, **how: Any) -> None:
        nonlocal wanted
        train(run, *more, **how)
        if run == test.killed and "until" not in how:
            wanted = Path(checkpoint.folder(run)) / checkpoint.name_of(steps * 32) / "00000-000.safetensors"
            data = bytearray(wanted.read_bytes())
            data[-1] ^= 1
            wanted.write_bytes(data)

    test.train = damaging
    bad = [finding for finding in found if not finding.well and "damaged" in finding.figure]
    assert [finding.part for finding in bad] == [wrong]
    assert str(wanted) in bad[0].figure


def test_the_worst_tensor_is_told(tmp_path):
    save(str(tmp_path / "a"), 20)
    save(str(tmp_path / "b"), 20, weight=1e-4, average=2e-4)
    found = difference(str(tmp_path / "a"), str(tmp_path / "b"), checkpoint.name_of(640))
    assert found == (pytest.approx(2e-4, rel=1e-3), "average/encoder.bias")


def test_what_is_there_stays(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with refused(f"--out {tmp_path}: there is something already; give a new folder, or remove it"):
        pretended(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_gpu_and_its_driver_are_named(monkeypatch):
    assert selftest.device() == "CPU" or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(storage, "exists", lambda place: place == "/proc/driver/nvidia/version")
    told = b"NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    monkeypatch.setattr(storage, "read", lambda place: told)
    assert selftest.device() == f"NVIDIA H100 80GB HBM3, driver 550.54.15, CUDA {torch.version.cuda}"


# --- supervisors


@pytest.fixture
def two(monkeypatch) -> Callable[..., list[Any]]:
    """Runs work on two supervisors, in two threads; what each returns, or raises."""
    store, supervisors = dist.HashStore(), []
    monkeypatch.setattr(dist, "rendezvous", lambda url, **options: iter([(store, 0, 2)]))
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        supervisors.append(Supervisor(StopRequest()))
    ends: list[Any] = [None, None]

    def on(rank: int, work: Callable[[Supervisor], Any]) -> None:
        try:
            with supervisors[rank].together():
                ends[rank] = work(supervisors[rank])
        except BaseException as error:
            ends[rank] = error

    def run(work: Callable[[Supervisor], Any]) -> list[Any]:
        threads = [threading.Thread(target=on, args=(rank, work), name=f"{rank}") for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends

    return run


def test_supervisors_tell_each_other(two):
    assert (
        two(lambda me: [me.gather([me.rank, "x"]), me.from_rank_0(lambda: {"rank": me.rank})])
        == [[[[0, "x"], [1, "x"]], {"rank": 0}]] * 2
    )


def test_one_that_fails_or_is_asked_to_stop_ends_all(two):
    def work(me: Supervisor) -> None:
        if me.rank == 1:
            me.stop.receive(signal.SIGTERM, None)
        me.gather("")
        me.gather("") if me.rank == 0 else me.look()

    first, second = two(work)
    assert str(second) == "the selftest was ended by SIGTERM; begin it anew"
    assert str(first) == f"the selftest ends with another rank: rank 1: {second}"


def test_ctrl_c_ends_all(two):
    def work(me: Supervisor) -> None:
        me.stop.signal = signal.SIGINT if me.rank == 1 else None
        me.gather("")
        me.gather("") if me.rank == 0 else me.look()

    first, second = two(work)
    assert isinstance(second, KeyboardInterrupt)
    assert str(first) == "the selftest ends with another rank: rank 1: KeyboardInterrupt"


def test_one_that_is_silent_is_named(two, monkeypatch):
    monkeypatch.setattr(supervision, "GRACE", 0.5)
    first, _ = two(lambda me: me.gather("", seconds=0.3) if me.rank == 0 else None)
    assert str(first) == "rank 1: not heard of for 0 s; look at its node"


def test_a_rank_that_sees_other_files_is_named(two, tmp_path, monkeypatch):
    exists = storage.exists
    monkeypatch.setattr(storage, "exists", lambda url: threading.current_thread().name == "0" and exists(url))
    out = str(tmp_path / "out")
    for error in two(lambda me: Selftest(out, me)):
        assert isinstance(error, UserError)
        assert str(error).startswith(f"--out {out}: rank 1 on ")
        assert str(error).endswith("does not see what rank 0 writes there; give a folder or URL that all nodes see")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("pass", ""),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 11)", "was ended by SIGSEGV"),
        ("import time; time.sleep(60)", "was not done after 1 s"),
    ],
)
def test_how_a_process_ended_is_told(monkeypatch, code, problem):
    monkeypatch.setattr(supervision, "LIMIT", 1.0)
    me = Supervisor(StopRequest())
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert me.see_to(process, until=None) == problem
        process.kill()


def test_one_that_ends_before_it_is_killed_is_told():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        assert Supervisor(StopRequest()).see_to(process, until=lambda: False) == "ended with exit code 0"


def test_the_others_are_not_blamed_when_one_has_failed(two, monkeypatch):
    def work(me: Supervisor) -> str:
        me.gather("")
        code = "raise SystemExit(1)" if me.rank else "input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
            try:
                return me.see_to(process, until=None)
            finally:
                process.kill()

    monkeypatch.setattr(supervision, "GRACE", 0.5)
    assert two(work) == ["", "ended with exit code 1"]


@pytest.mark.parametrize(
    ("said", "last", "shown"),
    [
        ("aaae: 64 of 128 images\naaae rank 1: x: must be y", "x: must be y", True),
        ("aaae: 64 of 128 images\n[rank1]:   File x\n[rank1]: ValueError: a\n[W1 x.cpp:1] left", "ValueError: a", True),
        (
            "aaae: 64 of 128 images\ntorch.OutOfMemoryError: CUDA out of memory",
            "torch.OutOfMemoryError: CUDA out",
            True,
        ),
        ("aaae rank 1: runs/x: another rank is gone, as its own message says", "runs/x: another rank is gone", False),
        ("Killed", "Killed", True),
        ("", "it said nothing", True),
    ],
)
def test_the_last_words_are_the_reason(capsys, said, last, shown):
    with tempfile.TemporaryFile() as file:
        file.write(said.encode())
        assert supervision.last_words(file).startswith(last)
    assert capsys.readouterr().err == (f"{said or 'it said nothing'}\n" if shown else "")


def test_the_cause_is_told_not_its_consequences(two, monkeypatch):
    """Whichever rank it is."""
    ends = ["another rank is gone, as its own message says", "ValueError: x"]
    monkeypatch.setattr(Supervisor, "see_to", lambda me, process, until: "ended with exit code 1")
    monkeypatch.setattr(supervision, "last_words", lambda said: ends[int(threading.current_thread().name)])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for error in two(lambda me: me.train("x=y")):
        assert isinstance(error, EndedError)
        assert str(error) == "rank 1 ended with exit code 1: ValueError: x"


OF_LAUNCHERS = (  # what accelerate sets, and what of it changes a training
    *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"),
    *("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"),
)


def test_one_process_alone_is_without_engine_and_ranks(monkeypatch):
    theirs = {*supervision.OF_RANKS, *OF_LAUNCHERS}
    for name in theirs:
        monkeypatch.setenv(name, "1")
    alone, many = (supervision.environment(1234, alone=alone) for alone in (True, False))
    assert many.keys() - alone.keys() == theirs | {"TORCHELASTIC_USE_AGENT_STORE"}
    assert (many["MASTER_PORT"], many["RANK"]) == ("1234", "1")
    assert alone["NVIDIA_TF32_OVERRIDE"] == many["NVIDIA_TF32_OVERRIDE"] == "0"
