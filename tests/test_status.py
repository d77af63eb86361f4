"""How a run stands by its folder: of runs that are made up, at a time that is given, and of real ones."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import refused
from test_cli import AAAE, ENVIRONMENT, call
from training_runs import settings

from aaae_dist import checkpoint, status, storage
from aaae_dist.reader import Bad
from aaae_dist.status import Saved, Seen, describe, look, news, silence, text, warnings

NOW = 10_000.0
LOSSES = {"reconstruction/mse": 0.0312, "latent_critic/loss": 0.674, "codes/rms": 1.0}


def line(images: int, when: float, **more: Any) -> dict[str, Any]:
    figures = LOSSES | {"speed/images_per_second": 123.4, "guard/skipped_steps": 0} | more
    return {"images": images, "time": when} | figures


def seen(*lines: dict[str, Any], **changes: Any) -> Seen:
    """A run of 10,000 images that is at work, with these lines."""
    about = {"training": "x", "status": "RUNNING", "starts": 1, "began": 0.0}
    usual = Seen(
        10_000, remote=False, about=about, lines=list(lines), saved=None, damage=[], incomplete=[], rollbacks=[], bad=0
    )
    return usual._replace(**changes)


def paced(count: int, *, every: float = 10.0, end: float = NOW) -> list[dict[str, Any]]:
    """So many lines, each of 100 images more, the last one at `end`."""
    return [line(100 * (number + 1), end - every * (count - 1 - number)) for number in range(count)]


def state(view: Seen, *, now: float = NOW) -> str:
    return describe("run", view, now=now)["state"]


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, "not begun"),
        ({"status": "RUNNING"}, "running"),
        ({"status": "KILLED"}, "stopped"),
        ({"status": "FAILED"}, "failed"),
        ({"status": "FINISHED"}, "finished"),
    ],
)
def test_the_state_is_what_the_run_says(about, expected):
    found = describe("run", seen(*paced(3), about=about), now=NOW)
    assert (found["state"], found["silent_seconds"]) == (expected, None)
    assert (found["seconds_left"] is None) == (expected != "running")


def test_a_run_is_silent_after_several_usual_times_between_two_lines():
    lines = paced(8, every=60.0)
    assert state(seen(*lines), now=NOW + 5 * 60.0) == "running"
    found = describe("run", seen(*lines), now=NOW + 12 * 60.0)
    assert (found["state"], found["silent_seconds"], found["seconds_left"]) == ("silent", 720.0, None)
    assert text(found, now=NOW).startswith(
        "run: silent for 0:12:00: it waits, or was killed, 800 of 10,000 images (8 %)"
    )
    assert state(seen(*lines, about={"status": "FINISHED"}), now=NOW + 12 * 60.0) == "finished"
    assert state(seen(*paced(8, every=0.1)), now=NOW + 50.0) == "running"  # a minute is always allowed
    assert state(seen(*paced(8, every=0.1)), now=NOW + 70.0) == "silent"
    assert state(seen(*paced(8, every=0.1), remote=True), now=NOW + 70.0) == "running"  # lines come every 30 s there
    assert state(seen(*lines), now=NOW - 50.0) == "running"  # another machine's clock


def test_an_evaluation_as_long_as_the_one_before_is_no_silence():
    lines = [*paced(4, every=60.0, end=NOW - 1_500.0), *paced(4, every=60.0)]
    gap = 1_500.0 - 180.0
    assert state(seen(*lines), now=NOW + 1.9 * gap) == "running"
    assert state(seen(*lines), now=NOW + 2.1 * gap) == "silent"


def test_what_was_before_the_last_start_is_no_measure_and_no_silence():
    before = paced(8, every=1.0, end=NOW - 9_000.0)
    restarted = {"status": "RUNNING", "starts": 2, "began": NOW}
    view = seen(*before, about=restarted)
    assert silence(view, now=NOW + 500.0) == 0.0
    assert silence(view, now=NOW + 700.0) == 700.0
    found = describe("run", view, now=NOW)
    assert (found["seconds_left"], found["restarts"]) == (None, 1)
    view = view._replace(lines=[*before, line(900, NOW + 50.0), line(1_000, NOW + 60.0)])
    assert describe("run", view, now=NOW)["seconds_left"] == 900.0  # 100 images in 10 s


def test_the_time_left_is_by_the_pace_of_the_last_lines_with_all_that_took_time():
    slow, fast = paced(5, every=1_000.0, end=NOW - 100.0), paced(10, every=10.0)
    lines = [*slow, *({**found, "images": found["images"] + 500} for found in fast)]
    assert describe("run", seen(*lines), now=NOW)["seconds_left"] == 850.0  # 8,500 images at 10 a second
    one = describe("run", seen(line(1_234, NOW)), now=NOW)
    assert one["seconds_left"] == pytest.approx((10_000 - 1_234) / 123.4, abs=0.1)
    assert describe("run", seen(line(10_000, NOW)), now=NOW)["seconds_left"] == 0.0
    assert describe("run", seen(), now=NOW)["seconds_left"] is None


def test_all_of_a_run_in_some_lines():
    evaluated = {"images": 900, "time": NOW - 5, "reconstruction/held_out_mse": 0.0345, "latent/effective_rank": None}
    back = {"after": 700, "to": 300, "because": "the loss is not finite", "time": NOW - 80}
    view = seen(
        *paced(8, end=NOW - 20),
        evaluated,
        line(1_000, NOW, **{"guard/skipped_steps": 2, "reconstruction/mse": 0.03}),
        saved=Saved(900, NOW - 75.0, 8_500_000),
        rollbacks=[back],
        about={"status": "RUNNING", "starts": 3, "began": 1.0},
        bad=12,
    )
    found = describe("s3://bucket/run", view, now=NOW)
    assert text(found, now=NOW).split("\n") == [
        "s3://bucket/run: running, 1,000 of 10,000 images (10 %), 0:15:00 left, 123 images/s",
        "  losses      mse 0.03, latent_critic/loss 0.674",
        "  held out    after 900 images: held_out_mse 0.0345",
        "  checkpoint  after 900 images, 0:01:15 ago, 8.5 MB",
        "  restarts    2, rollbacks: 1, the last from 700 to 300 images: the loss is not finite",
        "  warning     2 steps skipped: a loss or gradient was not finite, or far above the usual",
        "  warning     12 samples could not be used, see quarantine.jsonl",
    ]
    assert found == json.loads(json.dumps(found))
    assert found["losses"] == {"reconstruction/mse": 0.03, "latent_critic/loss": 0.674}
    assert found["checkpoint"] == {"images": 900, "time": NOW - 75, "bytes": 8_500_000}
    assert (found["share"], found["newest_rollback"], found["held_out_images"]) == (0.1, back, 900)
    assert (found["restarts"], found["rollbacks"], found["skipped_steps"], found["bad_samples"]) == (2, 1, 2, 12)
    assert "3 days ago" in text(found, now=NOW + 3 * 86_400)


def test_a_run_that_has_hardly_begun():
    found = describe("run", seen(about={}), now=NOW)
    assert text(found, now=NOW).split("\n") == [
        "run: not begun, 0 of 10,000 images (0 %)",
        "  checkpoint  none yet",
        "  restarts    0, rollbacks: 0",
    ]
    found = describe("run", seen(line(100, NOW), saved=Saved(500, NOW, 1)), now=NOW)
    assert found["images"] == 500  # saved when it was told to stop, between two lines


def test_warnings():
    slow = {"ranks/slowest": 1, "ranks/forward_seconds/max": 0.084, "ranks/forward_seconds/usual": 0.031}
    waits = {"data/slowest_rank": 3, "data/wait/fetching": 0.3, "data/wait/decoding": 0.05, "data/wait/hand_over": 0.0}
    figures = line(100, NOW) | slow | waits | {"system/n2/slow_rank": 1}
    view = seen(figures, damage=["manifest.json: missing"], incomplete=["000000000200"])
    found = [
        "rank 1 on node n2 is slow: its forward takes 84 ms, 31 ms is usual; look at that node",
        "rank 3 waits longest for data, 35% of its time (fetching 30%, decoding 5%, hand-over 0%)",
        "manifest.json: missing",
    ]
    assert describe("run", view, now=NOW)["warnings"] == found  # the incomplete one is being saved
    unfinished = "checkpoint 000000000200 is incomplete: it was being saved when training ended, or was gone back from"
    ended = view._replace(about={"status": "KILLED"})
    assert describe("run", ended, now=NOW)["warnings"] == [*found, unfinished]
    assert list(warnings(seen(), LOSSES, skipped=0, under_way=True)) == []
    # Numbers that were none are null in metrics.jsonl.
    broken = view._replace(lines=[dict.fromkeys(figures) | {"images": 100, "time": NOW}])
    assert describe("run", broken, now=NOW)["warnings"] == ["manifest.json: missing"]


# --- real runs


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_real_run_is_read_and_not_touched(place, request, tmp_path, digits, forks, capsys):
    run = f"{request.getfixturevalue('s3')}/runs/one" if place == "s3" else str(tmp_path / "one")
    options = settings(run, digits, "evaluation.every=640")
    forks.train(*options, "training.images=640", processes=2)

    def held() -> dict[str, Any]:
        store, path = storage.locate(run)
        files = store.find(path)
        return {file: (store.cat_file(file), store.modified(file)) for file in files}

    before = held()
    assert call("status", run) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{run}: finished, 640 of 640 images (100 %), ")
    assert out[0].endswith(" images/s")
    assert [row.split()[0] for row in out[1:5]] == ["losses", "held", "checkpoint", "restarts"]
    assert out[4].split(maxsplit=1)[1] == "0, rollbacks: 0"
    forks.train(*options)
    assert held().keys() > before.keys()
    before = held()
    assert call("status", run, "--json", "--follow") == 0
    (said,) = capsys.readouterr().out.splitlines()
    found = json.loads(said)
    assert (found["run"], found["state"], found["images"], found["restarts"]) == (run, "finished", 1_280, 1)
    assert set(found["losses"]) > {"reconstruction/mse", "latent_critic/loss", "image_critic/loss"}
    assert found["held_out"]["reconstruction/held_out_mse"] > 0
    assert found["held_out_images"] == found["checkpoint"]["images"] == 1_280
    manifest = checkpoint.read_manifest(run, f"{1280:012d}")
    assert found["checkpoint"]["bytes"] == sum(file.bytes for file in manifest.files.values())
    about = json.loads(storage.read(f"{run}/about.json"))
    assert about["began"] - 60 < found["checkpoint"]["time"] < about["began"] + 120
    assert found["images_per_second"] > 0
    assert held() == before


@pytest.fixture(scope="module")
def trained(digits, forks, tmp_path_factory) -> str:
    run = str(tmp_path_factory.mktemp("status") / "run")
    forks.train(*settings(run, digits, "training.images=640", "checkpoint.every=320"))
    return run


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def test_what_is_wrong_in_a_folder_is_said_and_the_checkpoint_before_counts(copy):
    (copy / "checkpoints" / f"{640:012d}" / "manifest.json").write_bytes(b"{}")
    (copy / "checkpoints" / f"{960:012d}").mkdir()
    (copy / "quarantine.jsonl").write_text(json.dumps(Bad("0.tar", "7", "why")._asdict()) + "\n")
    (copy / "rollbacks.json").write_text(json.dumps([{"after": 640, "to": 320, "because": "why", "time": 1.0}]))
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b'{"images": 700, "ti')  # as a kill leaves it, or as it is being written
    found = describe(str(copy), look(str(copy)), now=NOW)
    assert (found["checkpoint"]["images"], found["images"]) == (320, 640)
    assert (found["rollbacks"], found["bad_samples"]) == (1, 1)
    sample, damaged, incomplete = (said for said in found["warnings"] if "waits longest for data" not in said)
    assert sample == "1 sample could not be used, see quarantine.jsonl"
    assert damaged.endswith("manifest.json: damaged, its bytes are not those that were saved")
    assert incomplete.startswith(f"checkpoint {960:012d} is incomplete")


def test_of_a_long_journal_the_end_is_read(copy, monkeypatch):
    read, ranges = storage.read, []
    monkeypatch.setattr(
        storage, "read", lambda url, *span, **more: ranges.append((url, *span)) or read(url, *span, **more)
    )
    whole = look(str(copy)).lines
    size = (copy / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(status, "TAIL", size // 2)
    part = look(str(copy)).lines
    assert 0 < len(part) < len(whole)
    assert part == whole[-len(part) :]
    assert [span for url, *span in ranges if url.endswith("metrics.jsonl")] == [[0, size], [size - size // 2, size]]


def test_a_folder_without_a_run(tmp_path):
    with refused(f"{tmp_path}/config.toml: no such file; RUN is the folder of a training"):
        look(str(tmp_path))


# --- followed


@pytest.fixture
def looks(monkeypatch) -> list[Seen]:
    """A run that was looked at four times: nothing new the second time, the end the last."""
    first, later = seen(*paced(3)), seen(*paced(4))
    ended = later._replace(about={"status": "FINISHED"})
    found = [first, first, later, ended]
    left = iter(found)
    monkeypatch.setattr(status, "look", lambda run: next(left))
    monkeypatch.setattr(status, "EVERY", 0.0)
    monkeypatch.setattr(status, "time", SimpleNamespace(time=lambda: NOW, sleep=time.sleep))
    return found


def test_followed_elsewhere_it_is_said_when_something_has_changed(looks, capsys):
    assert call("status", "run", "--follow") == 0
    said = [found for found in capsys.readouterr().out.splitlines() if found.startswith("run: ")]
    assert [found.split(",")[0:2] for found in said] == [
        ["run: running", " 300 of 10"],
        ["run: running", " 400 of 10"],
        ["run: finished", " 400 of 10"],
    ]


def test_followed_as_json_every_change_is_a_line(looks, capsys):
    assert call("status", "run", "--follow", "--json") == 0
    assert [json.loads(found)["images"] for found in capsys.readouterr().out.splitlines()] == [300, 400, 400]


def test_followed_on_a_terminal_it_is_drawn_anew_each_time(looks, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call("status", "run", "--follow") == 0
    assert capsys.readouterr().out.count("\x1b[H\x1b[Jrun: ") == 4


def test_a_growing_silence_is_no_news():
    view = seen(*paced(3))
    first, later = (describe("run", view, now=NOW + seconds) for seconds in (1_000.0, 2_000.0))
    assert first["state"] == later["state"] == "silent"
    assert first != later
    assert news(first) == news(later) != news(describe("run", view, now=NOW))


def test_it_is_followed_until_ctrl_c(copy):
    about = json.loads((copy / "about.json").read_text())
    (copy / "about.json").write_text(json.dumps(about | {"status": "RUNNING", "began": time.time()}))
    line = [*AAAE, "status", str(copy), "--follow"]
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{copy}: running, 640 of 640 images (100 %), ")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
