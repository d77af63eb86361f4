"""The journal has everything and MLflow the same, whatever happens to either; with a real MLflow server."""

import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from servers import MlflowServer
from training_runs import SLOW, settings

from aaae_dist import storage, tracking
from aaae_dist.config import Config
from aaae_dist.errors import UserError
from aaae_dist.guard import write_rollbacks
from aaae_dist.system import safe_name
from aaae_dist.tracking import Tracker, default_tracking_uri, sync

SECRET, PICTURE = "hunter2", Image.new("RGB", (16, 8))
THEIRS = {"MLFLOW_ENABLE_ASYNC_LOGGING": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "false"}
THEIRS |= {"MLFLOW_TRUNCATE_LONG_VALUES": "false"}
UNANSWERED = """
import os, time
from aaae_dist import config, tracking
tracking.PARTING_SECONDS["FINISHED"] = 1.0
tracker = tracking.Tracker("run", config.load_config(["config.toml"]), images=0)
began = time.monotonic()
for images in range(100):
    tracker.log(images, {"loss/mse": 1.0})
logged = time.monotonic()
tracker.close("FINISHED")
assert logged - began < 2 and 1 <= time.monotonic() - logged < 3
assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "300"
"""

# MLflow 3.17's own database access, which SQLAlchemy 2.1 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


def until(happened: Callable[[], object]) -> None:
    """Wait for something, and fail if it does not happen in time."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError, UserError):
            if happened():
                return
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.05)


@pytest.fixture
def server(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowServer:
    """The server, and an environment that says to use it, with credentials that it does not ask for."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url.replace("//", f"//me:{SECRET}@"))
    return mlflow_server


@pytest.fixture(scope="session")
def crooked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with MLflow's local database, and a name that is hard on URLs."""
    return tmp_path_factory.mktemp("local") / "a%20b ü #1?c=d e"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No server, what users may have set, short waits, and a working folder of its own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in THEIRS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)


def configure(run: Path | str, *, data: dict[str, str] | None = None, **chosen: Any) -> Config:
    sections = {
        "data": {"url": "shards", "channels": 1, "size": 8} | (data or {}),
        "model": {"width": 8, "code_size": 4, "noise_size": 4},
        "training": {"run": str(run), "images": 1_000, "batch_size": 100},
    }
    return Config.model_validate(sections | {"tracking": chosen})


def begin(run: Path | str, *, images: int = 0, **chosen: Any) -> Tracker:
    return Tracker(str(run), configure(run, **chosen), images=images)


def journal(run: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in storage.read(f"{run}/metrics.jsonl").splitlines()]


def client(run: Path | str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(str(run)))


def known(run: Path | str) -> Any:
    return client(run).get_run(storage.read(f"{run}/mlflow_run_id").decode())


def artifact(run: Path | str, path: str) -> str:
    return client(run).download_artifacts(known(run).info.run_id, path)


def samples(run: Path | str) -> list[str]:
    """The pictures of a run in MLflow, named as its pages look for them by step."""
    files = client(run).list_artifacts(known(run).info.run_id, "images")
    return [file.path for file in files if file.path.endswith(".png")]


def agree(run: Path | str, lines: list[dict[str, Any]] | None = None) -> bool:
    """Whether MLflow has every number of the journal (or of these lines) once, and nothing else."""
    told = Counter(
        (name, line["images"], round(line["time"] * 1000), value)
        for line in lines or journal(run)
        for name, value in line.items()
        if name not in ("images", "time") and value is not None
    )
    assert told
    seen, history = known(run), client(run).get_metric_history
    points = [point for name in seen.data.metrics for point in history(seen.info.run_id, name)]
    return told == Counter((point.key, point.step, point.timestamp, point.value) for point in points)


def alone(run: Path | str) -> bool:
    """Whether MLflow has only this one run of that training."""
    tag = f"tags.training = '{json.loads(Path(run, 'about.json').read_text())['training']}'"
    found = client(run).search_runs([known(run).info.experiment_id], tag)
    return [one.info.run_id for one in found] == [known(run).info.run_id]


@pytest.mark.parametrize("place", ["local", "server"])
def test_mlflow_gets_all_of_a_run(place, request, crooked, tmp_path, capfd, caplog):
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True).strip()
    folder = crooked if place == "local" else tmp_path / "runs"
    if place == "server":
        request.getfixturevalue("server")
    run, beside = folder / "a run", begin(folder / "another run")  # on a new database they start together
    config = configure(run, data={"url": f"https://me:{SECRET}@store/shards", "cache": "x" * 7_000})
    tracker = Tracker(str(run), config, images=0)
    for images in (100, 200, 300):
        tracker.log(images, {"loss/mse": 1 / images, "loss/gan": float("nan"), "speed/images": float("inf")})
        tracker.log(images, {"evaluation/frechet distance": images / 7})  # a second line of the same images
    for images in (100, 300):
        tracker.picture(images, Image.new("RGB", (16, 8), (images % 256,) * 3))
    until(lambda: known(run).info.status == "RUNNING")
    tracker.close("FAILED")
    beside.close("FINISHED")
    assert (*capfd.readouterr(), caplog.records) == ("", "", [])
    if place == "local":
        assert {file.name for file in folder.iterdir()} == {"a run", "another run", "mlflow.db", "mlartifacts"}
    assert list(Path.cwd().glob("ml*")) == []  # where MLflow would put things by itself
    assert list(journal(run)[0]) == ["images", "time", "loss/mse", "loss/gan", "speed/images"]
    assert [line.get("loss/gan", 0) for line in journal(run)] == [None, 0] * 3
    assert agree(run)
    info, data = known(run).info, known(run).data
    assert (info.status, info.run_name, info.end_time >= info.start_time) == ("FAILED", "a run", True)
    assert client(run).get_experiment(info.experiment_id).name == "aaae"
    flat = config.flat() | {"data.url": "https://store/shards", "data.cache": "x" * 6_000}
    assert data.params == {key: str(value) for key, value in flat.items()}
    assert Path(artifact(run, "config.toml")).read_text() == config.toml().replace(f"me:{SECRET}@", "")
    assert data.tags["git.commit"] == data.tags["mlflow.source.git.commit"] == commit
    assert {"version.aaae_dist", "version.torch", "version.python", "host", "run"} <= data.tags.keys()
    assert SECRET not in f"{info} {data}"
    shades = {path.split("+timestamp")[0]: Image.open(artifact(run, path)).getpixel((0, 0)) for path in samples(run)}
    assert shades == {"images/samples+step+100": (100,) * 3, "images/samples+step+300": (44,) * 3}


def test_nodes_and_a_slow_rank_are_told_under_their_names_in_the_one_run(digits, forks):
    """Of two ranks, each on a node of its own as it believes, the second sleeps in every forward."""
    run = Path("run").absolute()
    options = settings(run, digits, "tracking.mlflow=true", "checkpoint.every=320")
    said = forks.train(*options, "training.images=640", processes=2, script=SLOW).stderr
    assert (
        len(re.findall(r"aaae: rank 1 on node n1 is slow: its forward takes [2-9]\d\d ms, \S+ ms is usual", said)) == 2
    )
    assert "rank 0 on node" not in said
    assert "aaae" not in re.sub("aaae: .*", "", said)
    forks.train(*options, processes=2)  # on this machine's one node
    assert (agree(run), alone(run)) == (True, True)
    figures, here = known(run).data.metrics, safe_name(platform.node())
    of_nodes = {name.rpartition("/")[0] for name in figures if name.startswith("system/")}
    assert of_nodes == {"system/n0", "system/n1", f"system/{here}"}
    for node in of_nodes:
        assert 0 <= figures[f"{node}/cpu_percent"] <= 100
        assert 0 < figures[f"{node}/memory_percent"] <= 100
        assert 0 < figures[f"{node}/disk_percent"] <= 100
        assert figures[f"{node}/network_in_mb_per_second"] >= 0
    assert figures["system/n1/slow_rank"] == 1
    assert 0 < figures["ranks/forward_seconds/min"] <= figures["ranks/forward_seconds/max"]
    restarts = client(run).get_metric_history(known(run).info.run_id, "run/restarts")
    assert [(point.step, point.value) for point in restarts] == [(320, 0), (640, 0), (960, 1), (1280, 1)]
    assert not {"status", "starts", "began"} & known(run).data.tags.keys()
    about = json.loads(Path(run, "about.json").read_text())
    assert (about["starts"], about["status"]) == (2, "FINISHED")
    assert Path(run, "config.toml").stat().st_mtime - 60 < about["began"] < time.time()


def test_starts_of_a_run_whose_about_json_does_not_count_them_are_counted_on(tmp_path):
    begin("run", mlflow=False).close("KILLED")
    about = json.loads(Path("run/about.json").read_text())
    assert about.pop("starts") == 1
    Path("run/about.json").write_text(json.dumps(about))
    tracker = begin("run", mlflow=False)
    tracker.close("KILLED")
    assert (tracker.restarts, json.loads(Path("run/about.json").read_text())["starts"]) == (1, 2)


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_duplicates(server, tmp_path):
    run = tmp_path / "run"
    killed = begin(run)
    for images in (100, 200, 300):
        killed.log(images, {"loss/mse": images / 7})
    killed.picture(200, PICTURE)
    until(lambda: agree(run) and samples(run))
    first = journal(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"images": 400, "ti')  # as a kill leaves it
    resumed = begin(run, images=200, name="another name")  # of the last checkpoint; no parameter can be changed
    assert journal(run) == first[:2]
    for images in (300, 400, 500):
        resumed.log(images, {"loss/mse": images / 7})
    for images in (200, 500):
        resumed.picture(images, PICTURE)
    resumed.close("FINISHED")
    assert [line["images"] for line in journal(run)] == [100, 200, 300, 400, 500]
    # Of the stretch that was trained twice MLflow keeps the first account, which differs in its time alone.
    assert agree(run, [*first, *journal(run)[3:]])
    assert [path.split("+")[2] for path in samples(run)] == ["200", "500"]
    assert 'name = "another name"' in Path(artifact(run, "config.toml")).read_text()
    assert (known(run).info.status, alone(run)) == ("FINISHED", True)
    again = begin(run, images=500)
    until(lambda: known(run).info.status == "RUNNING")
    again.close("KILLED")
    assert known(run).info.status == "KILLED"


def test_what_a_run_trains_again_after_going_back_is_told_again(server, tmp_path):
    run = tmp_path / "run"
    tracker = begin(run)
    for images in (100, 200, 300):
        tracker.log(images, {"loss/mse": images / 7})
        tracker.picture(images, PICTURE)
    until(lambda: agree(run) and len(samples(run)) == 3)
    abandoned, first = journal(run)[1:], samples(run)
    event = {"after": 300, "to": 100, "because": "a test", "time": round(time.time(), 3)}
    write_rollbacks(str(run), [event])
    tracker.go_back(100)
    for images in (200, 300):
        tracker.log(images, {"loss/mse": images / 9})
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["000000000100.png"]
    tracker.picture(200, PICTURE)
    until(lambda: agree(run, [*abandoned, *journal(run)]) and len(samples(run)) == 4)
    (again,) = {*samples(run)} - {*first}
    assert "+step+200+" in again
    tracker.close("KILLED")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    now = {"time": round(time.time(), 3)}
    write_rollbacks(str(run), [event, {"after": 450, "to": 400, "because": "another", "time": now["time"] + 1}])
    with (run / "metrics.jsonl").open("a") as file:  # MLflow missed a line between two such moments
        file.write(json.dumps({"images": 300, "more/mse": 0.1} | now) + "\n")
        file.write(json.dumps({"images": 400, "loss/mse": 400 / 9} | now) + "\n")
    assert len(lines) == 3
    (run / "samples" / "000000000500.png").write_bytes(b"of an abandoned way")
    resumed = begin(run, images=400)
    resumed.log(500, {"loss/mse": 0.5})
    resumed.close("FINISHED")
    told = [(line["images"], line["loss/mse"]) for line in journal(run) if "loss/mse" in line]
    assert told == [(100, 100 / 7), *((images, images / 9) for images in (200, 300, 400)), (500, 0.5)]
    assert len(samples(run)) == 4
    assert agree(run, [*abandoned, *journal(run)])


def test_a_server_that_is_down_from_the_start_gets_everything_by_sync(server, crooked, monkeypatch, caplog, capfd):
    run, up = crooked / "run", os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    tracker = begin(run)
    tracker.log(200, {"loss/mse": 0.1})
    tracker.picture(200, PICTURE)
    until(lambda: caplog.records)
    tracker.close("KILLED")
    assert ("refused" in caplog.messages[0], len(caplog.messages)) == (True, 2)
    assert f"`aaae track sync {run}`" in caplog.messages[1]
    for uri in (up, up, "", up):  # twice in a row, and a local database in between, which gets a run of its own
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert sync(str(run)) == 1
        assert agree(run)
        assert (known(run).info.status, len(samples(run)), alone(run)) == ("KILLED", 1, True)
    assert (said := capfd.readouterr()).out == ""
    assert SECRET not in f"{caplog.messages} {said.err} {known(run).info} {known(run).data}"


def test_a_server_killed_in_mid_run_gets_what_it_missed_when_it_is_back(server, tmp_path, caplog):
    run = tmp_path / "run"
    tracker = begin(run)
    tracker.log(100, {"loss/mse": 0.1})
    until(lambda: agree(run))
    server.kill()
    for images in range(200, 80_000, 100):  # more than one request takes
        tracker.log(images, {"loss/mse": images / 7, "loss/gan": images / 9})
    tracker.picture(300, PICTURE)
    until(lambda: caplog.records)
    server.start()
    until(lambda: len(caplog.records) == 2)
    assert agree(run)
    deleted = known(run).info.run_id
    client(run).delete_run(deleted)
    tracker.log(80_000, {"loss/mse": 0.2})
    until(lambda: len(caplog.records) == 4)
    tracker.close("FINISHED")
    assert (agree(run), alone(run), len(samples(run))) == (True, True, 1)
    assert (known(run).info.status, known(run).info.run_id != deleted) == ("FINISHED", True)
    assert [message[:20] for message in caplog.messages] == ["MLflow does not take", "MLflow is back, and "] * 2


def test_a_server_that_never_answers_holds_nothing_up_and_the_process_ends():
    Path("config.toml").write_text(configure("run").toml())
    with socket.create_server(("127.0.0.1", 0)) as hole:
        uri = f"http://me:{SECRET}@127.0.0.1:{hole.getsockname()[1]}"
        variables = os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "300"}
        script = [sys.executable, "-c", UNANSWERED]
        done = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=120, check=False)
    said = "MLflow has not got everything; `aaae track sync run` delivers the rest\n"
    assert (done.returncode, done.stdout, done.stderr, len(journal("run"))) == (0, "", said, 100)


def test_what_arrived_without_a_reply_is_not_sent_twice(server, monkeypatch, caplog):
    from mlflow.store.tracking.rest_store import RestStore

    def lose(call: str, *, times: int) -> None:
        true, replies = getattr(RestStore, call), []

        def silent(*arguments: Any, **options: Any) -> Any:
            replies.append(true(*arguments, **options))
            if len(replies) <= times:
                raise TimeoutError("no reply")
            return replies[-1]

        monkeypatch.setattr(RestStore, call, silent)

    lose("create_experiment", times=1)  # as if another run were faster
    begin("early", experiment="new", mlflow=False).close("FINISHED")
    assert sync("early") == 0
    lose("create_run", times=1)
    lose("log_batch", times=2)  # the parameters, then the metrics
    tracker = begin("run")
    tracker.log(100, {"loss/mse": 0.1})
    until(lambda: "MLflow is back" in caplog.text)
    tracker.close("FINISHED")
    assert (agree("run"), alone("run")) == (True, True)


def test_metrics_do_not_wait_for_a_place_of_pictures_that_is_out_of_order(server, tmp_path):
    (tmp_path / "file").touch()
    client("run").create_experiment("broken", artifact_location=(tmp_path / "file" / "below").as_uri())
    tracker = begin("run", experiment="broken")
    tracker.log(100, {"loss/mse": 0.1})
    tracker.close("FINISHED")
    assert (agree("run"), known("run").info.status, tracker.delivered) == (True, "FINISHED", False)


@pytest.mark.parametrize("uri", ["http://me:{}@127.0.0.1:9", "http://me:{}/#?x@127.0.0.1:9", "me:{}@127.0.0.1:9"])
def test_no_error_text_has_credentials(monkeypatch, uri, capfd):
    begin("run", mlflow=False).close("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(SECRET))
    with pytest.raises(UserError, match="MLflow does not take run") as error:
        sync("run")
    assert SECRET not in f"{error.value} {capfd.readouterr()}"
    assert (error.value.__cause__, error.value.__suppress_context__) == (None, True)


def test_a_remote_journal_is_whole_at_checkpoints_and_at_the_end(tmp_path, monkeypatch, caplog):
    run = f"memory://{tmp_path}/run"
    assert default_tracking_uri(run) == f"sqlite:///{tmp_path}/mlflow.db"
    tracker = begin(run, mlflow=False)
    tracker.log(100, {"loss/mse": 0.1})
    assert journal(run) == []  # an upload for every line would be too many
    tracker.flush()
    assert len(journal(run)) == 1
    monkeypatch.setattr(tracking, "UPLOAD_SECONDS", 0.0)
    with monkeypatch.context() as broken:
        broken.setattr(storage.locate(run)[0], "pipe_file", None)
        tracker.log(200, {"loss/mse": 0.2})
        with pytest.raises(UserError):
            tracker.flush()  # no checkpoint before it
    assert "nothing is lost yet" in caplog.text
    tracker.log(300, {"loss/mse": 0.3})
    assert len(journal(run)) == 3
    begin(run, images=100, mlflow=False).close("KILLED")
    assert [line["images"] for line in journal(run)] == [100]


def test_the_training_that_began_first_gives_way_to_another_in_the_same_folder(s3):
    """Where no lock holds, as in an object store: they would save into each other's checkpoints."""
    first = begin(f"{s3}/run", mlflow=False)
    first.flush()
    second = begin(f"{s3}/run", mlflow=False)
    with pytest.raises(UserError, match=f"^{s3}/run: another training has begun there since this one did; end one"):
        first.flush()
    with pytest.raises(UserError):
        first.close("FAILED")
    assert first.about["status"] == "RUNNING", "MLflow hears of the other training, which is the same run there"
    second.flush()
    second.close("FINISHED")
    assert json.loads(storage.read(f"{s3}/run/about.json"))["status"] == "FINISHED"
