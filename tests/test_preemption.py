"""The end of a job: how a training knows of it, and what it leaves word of."""

import json
import signal
import time
from pathlib import Path

import pytest
from conftest import refused
from test_training import train_here, trainer_for
from training_runs import settings

from aaae_dist import checkpoint
from aaae_dist.preemption import MARGIN, complain_of_grace, job_is_ending, leave_word


def test_a_job_is_ending_when_what_is_left_is_not_more_than_stopping_takes(monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    monkeypatch.setattr("aaae_dist.preemption.BEGAN", 900.0)
    for end, saving, ending in (("1141", 60.0, False), ("1139", 60.0, True), (f"{1001 + MARGIN:.0f}", 0.0, False)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", end)
        assert job_is_ending(saving) == ending
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1141")
    assert job_is_ending(60.0, judging=2.0)
    for unknown in ("", "Unknown", "899"):
        monkeypatch.setenv("SLURM_JOB_END_TIME", unknown)
        assert not job_is_ending(1e9)


def test_a_launcher_that_leaves_less_time_than_a_save_takes_is_complained_of(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert complain_of_grace(15.0) == complain_of_grace(0.0) == ""
    assert complain_of_grace(16.0) == (
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT 30: the launcher kills so many seconds after SIGTERM, but saving takes 16, and "
        "one may be under way; set it to 32 or more, or GRACE for launch/slurm.sbatch"
    )
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "40")
    assert complain_of_grace(16.0) == ""
    monkeypatch.delenv("LOCAL_RANK")
    assert complain_of_grace(1e9) == ""


def test_a_resumed_run_knows_how_long_its_last_save_took(tmp_path, digits, monkeypatch, caplog):
    run = str(tmp_path / "run")
    train_here(*settings(run, digits, "training.images=128"))
    place = Path(checkpoint.folder(run)) / checkpoint.name_of(128)
    manifest = checkpoint.read_manifest(run, place.name)
    assert 0 < manifest.seconds < 60
    checkpoint.publish(
        str(place),
        manifest,
        [slower(checkpoint.Part.model_validate_json(found.read_text())) for found in place.glob("0*.json")],
    )
    trainer = trainer_for(*settings(run, digits, "training.images=192"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert trainer.state.saver.expected() == 99.0
    trainer.train()
    assert "saving takes 99" in caplog.text


def slower(part: checkpoint.Part) -> checkpoint.Part:
    return part.model_copy(update={"seconds": 99.0})


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_leaves_word_of_its_end_or_that_it_was_stopped_before(tmp_path, digits, monkeypatch, asked):
    word, run = tmp_path / "word", str(tmp_path / "run")
    monkeypatch.setenv("AAAE_STOPPED", str(word))
    trainer = trainer_for(*settings(run, digits, "training.images=128"))
    trainer.stop.signal = signal.SIGTERM if asked else None
    trainer.train()
    assert word.read_text() == ("again" if asked else "done")
    last = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])["images"] if not asked else 64
    assert checkpoint.complete(run)[-1] == checkpoint.name_of(last)


def test_a_run_that_came_no_further_is_not_worth_another_start(tmp_path, monkeypatch):
    monkeypatch.setenv("AAAE_STOPPED", str(tmp_path / "word"))
    leave_word(done=False, gained=False)
    assert (tmp_path / "word").read_text() == "it came no further than it was when it began"
    monkeypatch.setenv("AAAE_STOPPED", str(tmp_path / "nowhere" / "word"))
    with refused(f"{tmp_path}/nowhere/word: no such file"):
        leave_word(done=False, gained=True)
