"""The journal has everything and MLflow the same, whatever happens to either, with a real MLflow server."""

import collections
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from aaae_dist import storage, tracking
from aaae_dist.config import Config
from aaae_dist.errors import UserError
from aaae_dist.tracking import Delivery, Journal, NoTracker, Tracker, default_tracking_uri, sync

SECRET = "hunter2"

# MLflow 3.17's own database access, which SQLAlchemy 2.1 finds old-fashioned.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning")


def until(happened: Callable[[], object], *, seconds: float = 60) -> None:
    """Wait for something, and fail if it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


class Server:
    """An MLflow server on a port of its own, that can be killed and started again on what it has stored."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        places = [
            "--backend-store-uri",
            f"sqlite:///{folder}/server.db",
            "--artifacts-destination",
            str(folder / "files"),
        ]
        mlflow = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        self.command, self.log = [*mlflow, *places], folder / "log"
        self.start()

    def start(self) -> None:
        variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self.log.open("ab") as log:
            self.process = psutil.Popen(self.command, env=variables, stderr=log, stdout=log)
        until(self.answers, seconds=120)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        return False

    def kill(self) -> None:
        doomed = [self.process, *self.process.children(recursive=True)]
        for process in doomed:
            process.kill()
        psutil.wait_procs(doomed)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def server(mlflow_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, and the environment that says to use it, with credentials that it does not ask for."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url.replace("//", f"//me:{SECRET}@"))
    return mlflow_server


@pytest.fixture(scope="session")
def crooked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs whose name is hard on URLs; its database is made once."""
    folder = tmp_path_factory.mktemp("local") / "100% ü #1?a=b c"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody's own MLflow, short waits, and a working folder where nothing is lost."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in tracking.MLFLOW_SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.2)
    monkeypatch.chdir(tmp_path)


def configure(run: str, *, mlflow: bool = True, **data: str) -> Config:
    return Config.model_validate(
        {
            "data": {"url": "shards", "channels": 1, "size": 8} | data,
            "model": {"width": 8, "code_size": 4, "noise_size": 4},
            "training": {"run": run, "images": 1_000, "batch_size": 100},
            "tracking": {"mlflow": mlflow},
        }
    )


def begin(run: Path | str, *, images: int = 0) -> Tracker:
    return Tracker(str(run), configure(str(run)), images=images)


def picture(shade: int) -> Image.Image:
    return Image.fromarray(np.full((8, 16, 3), shade, np.uint8))


def client(run: Path | str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(str(run)))


def run_id(run: Path | str) -> str:
    return storage.read(f"{run}/mlflow_run_id").decode()


def journal(run: Path | str) -> list[dict]:
    return [json.loads(line) for line in storage.read(f"{run}/metrics.jsonl").splitlines()]


def points(run: Path | str) -> collections.Counter:
    """How often every (name, images, milliseconds, value) is in MLflow."""
    mlflow, found = client(run), collections.Counter()
    for name in mlflow.get_run(run_id(run)).data.metrics:
        found.update((name, p.step, p.timestamp, p.value) for p in mlflow.get_metric_history(run_id(run), name))
    return found


def expected(lines: list[dict]) -> collections.Counter:
    """Every point of the journal, once."""
    return collections.Counter(
        (name, line["images"], round(line["time"] * 1000), value)
        for line in lines
        for name, value in line.items()
        if name not in ("images", "time") and value is not None
    )


def samples(run: Path | str) -> list[str]:
    return [file.path for file in client(run).list_artifacts(run_id(run), "images") if file.path.endswith(".png")]


def everything(run: Path | str) -> str:
    """All that MLflow tells about a run, but its metrics."""
    known = client(run).get_run(run_id(run))
    config = Path(client(run).download_artifacts(run_id(run), "config.toml")).read_text()
    return f"{known.info} {known.data.params} {known.data.tags} {config}"


@pytest.mark.parametrize("place", ["local", "server"])
def test_mlflow_gets_all_of_a_run(place, request, crooked, tmp_path, capfd, caplog):
    run = (crooked if place == "local" else tmp_path) / "a run"
    if place == "server":
        request.getfixturevalue("server")
    config = configure(str(run), url=f"https://me:{SECRET}@store/shards", cache="x" * 7_000)
    tracker = Tracker(str(run), config, images=0)
    for images in (100, 200, 300):
        tracker.log(images, {"loss/mse": 1 / images, "loss/gan": float("nan"), "speed/images": float("inf")})
        tracker.log(images, {"evaluation/frechet distance": images / 7})  # a second line of the same images
    for images in (100, 300):
        tracker.picture(images, picture(images % 256))
    until(lambda: (run / "mlflow_run_id").exists() and client(run).get_run(run_id(run)).info.status == "RUNNING")
    tracker.close("FAILED")
    assert capfd.readouterr().out == ""
    assert caplog.records == []

    assert [list(line) for line in journal(run)][:2] == [
        ["images", "time", "loss/mse", "loss/gan", "speed/images"],
        ["images", "time", "evaluation/frechet distance"],
    ]
    assert [line.get("loss/gan", 0) for line in journal(run)] == [None, 0] * 3
    assert points(run) == expected(journal(run))
    assert len(points(run)) == 6

    known = client(run).get_run(run_id(run))
    assert known.info.status == "FAILED"
    assert known.info.end_time >= known.info.start_time
    assert known.info.run_name == "a run"
    assert client(run).get_experiment(known.info.experiment_id).name == "aaae"
    flat = config.flat() | {"data.url": "https://store/shards", "data.cache": "x" * 6_000}
    assert known.data.params == {key: str(value) for key, value in flat.items()}
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True).strip()
    assert known.data.tags["git.commit"] == known.data.tags["mlflow.source.git.commit"] == commit
    assert known.data.tags["version.mlflow"].startswith("3.")
    assert {"version.aaae_dist", "version.torch", "version.python", "host", "run"} <= known.data.tags.keys()
    assert SECRET not in everything(run)
    text = Path(client(run).download_artifacts(run_id(run), "config.toml")).read_text()
    assert text == config.toml().replace(f"me:{SECRET}@", "")

    shades = {}
    for path in samples(run):
        assert path.startswith("images/samples+step+")  # how MLflow's pages find pictures by step
        image = Image.open(client(run).download_artifacts(run_id(run), path))
        shades[int(path.split("+")[2])] = image.getpixel((0, 0))
    assert shades == {100: (100, 100, 100), 300: (44, 44, 44)}
    if place == "local":
        assert {file.name for file in crooked.iterdir()} == {"a run", "mlflow.db", "mlartifacts"}
    assert list(Path.cwd().glob("ml*")) == []  # where MLflow would put things by itself


def test_runs_that_start_together_share_one_new_database(tmp_path):
    """MLflow's own way of making it ends with two half migrations of one file, for ever."""
    runs = [f"{tmp_path}/run{number}" for number in range(2)]
    threads = [threading.Thread(target=tracking.make_database, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]
    assert client(runs[0]).search_experiments() != []


def test_a_resumed_run_goes_on_in_the_same_mlflow_run_without_duplicates(server, tmp_path):
    run = tmp_path / "run"
    killed = begin(run)
    for images in (100, 200, 300):
        killed.log(images, {"loss/mse": images / 7})
    killed.picture(200, picture(1))
    until(lambda: (run / "mlflow_run_id").exists() and len(points(run)) == 3 and len(samples(run)) == 1)
    first = journal(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"images": 400, "ti')  # as a kill leaves it

    resumed = begin(run, images=200)  # the last checkpoint
    assert journal(run) == first[:2]
    for images in (300, 400, 500):
        resumed.log(images, {"loss/mse": images / 7})
    resumed.picture(200, picture(1))
    resumed.picture(500, picture(2))
    resumed.close("FINISHED")
    assert [line["images"] for line in journal(run)] == [100, 200, 300, 400, 500]
    # Of the stretch that was trained twice MLflow keeps the first account, which differs in its time alone.
    assert points(run) == expected([*first, *journal(run)[3:]])
    assert sorted(path.split("+")[2] for path in samples(run)) == ["200", "500"]
    assert client(run).get_run(run_id(run)).info.status == "FINISHED"
    assert json.loads((run / "about.json").read_text())["training"] == killed.about["training"]

    again = begin(run, images=500)  # and a finished run that goes on, with another setting
    until(lambda: client(run).get_run(run_id(run)).info.status == "RUNNING")
    again.close("KILLED")
    assert client(run).get_run(run_id(run)).info.status == "KILLED"
    experiment = client(run).get_experiment_by_name("aaae").experiment_id
    tag = f"tags.training = '{again.about['training']}'"
    assert [found.info.run_id for found in client(run).search_runs([experiment], tag)] == [run_id(run)]


def test_a_server_that_is_down_from_the_start_gets_everything_by_sync(server, tmp_path, monkeypatch, caplog, capfd):
    run, up = tmp_path / "run", os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    tracker = begin(run)
    for images in (100, 200):
        tracker.log(images, {"loss/mse": images / 7})
    tracker.picture(200, picture(7))
    until(lambda: caplog.records)
    began = time.monotonic()
    tracker.close("KILLED")
    assert time.monotonic() - began < 5
    with pytest.raises(
        UserError, match="MLflow does not take .*Connection refused.*check MLFLOW_TRACKING_URI"
    ) as error:
        sync(str(run))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "Connection refused" in caplog.records[0].getMessage()
    assert f"`aaae track sync {run}`" in caplog.records[1].getMessage()
    assert SECRET not in caplog.text + str(error.value) + str(capfd.readouterr())
    assert error.value.__suppress_context__

    monkeypatch.setenv("MLFLOW_TRACKING_URI", up)
    for _ in range(2):  # the second finds nothing to do
        assert sync(str(run)) == 2
        assert points(run) == expected(journal(run))
        assert len(samples(run)) == 1
        assert client(run).get_run(run_id(run)).info.status == "KILLED"
    assert SECRET not in everything(run) + str(capfd.readouterr())


def test_a_server_killed_in_mid_run_gets_what_it_missed_when_it_is_back(server, tmp_path, caplog):
    run = tmp_path / "run"
    tracker = begin(run)
    tracker.log(100, {"loss/mse": 0.1})
    until(lambda: (run / "mlflow_run_id").exists() and len(points(run)) == 1)
    server.kill()
    began = time.monotonic()
    for images in range(200, 60_000, 100):
        tracker.log(images, {"loss/mse": images / 7, "loss/gan": images / 9})  # more than one request takes
    tracker.picture(300, picture(3))
    assert time.monotonic() - began < 5
    until(lambda: "MLflow gets nothing" in caplog.text)
    server.start()
    until(lambda: "MLflow is back" in caplog.text)
    assert points(run) == expected(journal(run))
    tracker.close("FINISHED")
    assert len(samples(run)) == 1
    assert [record.getMessage()[:12] for record in caplog.records] == ["MLflow gets ", "MLflow is ba"]  # once each


def test_a_server_that_never_answers_holds_nothing_up_and_the_process_ends(tmp_path):
    """The delivering thread hangs in a request while the interpreter goes down."""
    script = """
import sys, time
from aaae_dist import tracking
from aaae_dist.config import load_config
tracking.PARTING_SECONDS["FINISHED"] = 1.0
config = load_config([sys.argv[1]])
tracker = tracking.Tracker(sys.argv[2], config, images=0)
began = time.monotonic()
for images in range(100):
    tracker.log(images, {"loss/mse": 1.0})
logged = time.monotonic()
tracker.close("FINISHED")
assert logged - began < 2, logged - began
assert 1 <= time.monotonic() - logged < 3, time.monotonic() - logged
"""
    run = tmp_path / "run"
    (tmp_path / "config.toml").write_text(configure(str(run)).toml())
    with socket.create_server(("127.0.0.1", 0)) as hole:
        uri = f"http://me:{SECRET}@127.0.0.1:{hole.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "config.toml", run],
            env=os.environ | {"MLFLOW_TRACKING_URI": uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "300"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == f"MLflow has not got everything; `aaae track sync {run}` delivers the rest\n"
    assert len(journal(run)) == 100


@pytest.mark.parametrize("call", ["create_run", "log_batch"])
def test_what_arrived_without_a_reply_is_not_sent_twice(server, tmp_path, monkeypatch, caplog, call):
    from mlflow.store.tracking.rest_store import RestStore

    true, run, lost = getattr(RestStore, call), tmp_path / "run", []

    def silent(*arguments: object, **options: object) -> object:
        reply = true(*arguments, **options)
        if len(lost) < 2:
            lost.append(reply)
            raise TimeoutError("no reply")
        return reply

    monkeypatch.setattr(RestStore, call, silent)
    tracker = begin(run)
    for images in (100, 200):
        tracker.log(images, {"loss/mse": images / 7})
    until(lambda: "MLflow is back" in caplog.text)
    tracker.close("FINISHED")
    assert points(run) == expected(journal(run))
    tag = f"tags.training = '{tracker.about['training']}'"
    assert len(client(run).search_runs([client(run).get_experiment_by_name("aaae").experiment_id], tag)) == 1


def test_a_run_deleted_on_the_server_is_delivered_anew(server, tmp_path, caplog):
    run = tmp_path / "run"
    tracker = begin(run)
    tracker.log(100, {"loss/mse": 0.1})
    until(lambda: (run / "mlflow_run_id").exists() and len(points(run)) == 1)
    deleted = run_id(run)
    client(run).delete_run(deleted)
    tracker.log(200, {"loss/mse": 0.2})
    until(lambda: "MLflow is back" in caplog.text)
    tracker.close("FINISHED")
    assert run_id(run) != deleted
    assert points(run) == expected(journal(run))


def test_another_server_gets_a_run_of_its_own_and_the_first_is_found_again(server, crooked, monkeypatch):
    run, up = crooked / "moved", os.environ.pop("MLFLOW_TRACKING_URI")
    tracker = begin(run)
    tracker.log(100, {"loss/mse": 0.1})
    tracker.close("KILLED")
    here = run_id(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", up)
    assert sync(str(run)) == 1
    assert run_id(run) != here
    assert points(run) == expected(journal(run))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    resumed = begin(run, images=100)
    resumed.log(200, {"loss/mse": 0.2})
    resumed.close("FINISHED")
    assert run_id(run) == here
    assert points(run) == expected(journal(run))


def test_an_experiment_that_another_run_made_first_is_used(server, tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    client(tmp_path).create_experiment("raced")
    true, seen = MlflowClient.get_experiment_by_name, []
    monkeypatch.setattr(
        MlflowClient, "get_experiment_by_name", lambda *a: true(*a) if seen else seen.append("not there yet")
    )
    run = str(tmp_path / "run")
    config = configure(run)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"experiment": "raced"})})
    Delivery(run, config, {"training": "x", "status": "RUNNING"})
    assert client(run).get_run(run_id(run)).info.experiment_id == true(client(run), "raced").experiment_id


@pytest.mark.parametrize("uri", ["http://me:{}@127.0.0.1:9", "http://me:{}/#x@127.0.0.1:9", "postgresql://me:{}@h:9/x"])
def test_no_error_text_has_credentials(tmp_path, monkeypatch, uri, capfd):
    run = str(tmp_path / "run")
    Tracker(run, configure(run, mlflow=False), images=0).close("FINISHED")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(SECRET))
    with pytest.raises(UserError) as error:
        sync(run)
    assert SECRET not in str(error.value) + str(capfd.readouterr())
