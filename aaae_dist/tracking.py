"""Metrics: metrics.jsonl in the run's folder always has everything; MLflow is told in the background.

The folder is the queue: what MLflow has not got yet is read from the journal and the pictures there, and MLflow itself
says how far it got. So an outage costs nothing, a resumed run goes on in the same MLflow run, and `aaae track sync RUN`
is the same delivery, later.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from aaae_dist import storage
from aaae_dist.checkpoint import read_run_config
from aaae_dist.config import Config
from aaae_dist.errors import UserError, one_line
from aaae_dist.failures import explained
from aaae_dist.guard import read_rollbacks
from aaae_dist.versions import commit, git

log = logging.getLogger(__name__)

RETRY_SECONDS, UPLOAD_SECONDS = 15.0, 30.0
PARTING_SECONDS = {"FINISHED": 60.0, "KILLED": 10.0, "FAILED": 2.0}  # who was told to stop has no minute left
CHANGING = ("status", "starts", "began")  # of what about.json says: no tags in MLflow
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # we retry
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # we report, once and in one line
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The journal's whole lines; one cut short by a kill, or not ours, is dropped."""
    lines = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and {"images", "time"} <= found.keys():
                lines.append(found)
    return lines


class Journal:
    """metrics.jsonl: one JSON object a line, `images`, `time` (seconds since 1970), then `group/name: number`."""

    def __init__(self, run: str, *, images: int) -> None:
        """Open the journal of a run that goes on from `images`; lines beyond are dropped, to be written again."""
        self.url = storage.join(run, "metrics.jsonl")
        data = storage.read(self.url) if storage.exists(self.url) else b""
        self.lines = [line for line in parse_lines(data) if line["images"] <= images]
        self.upload()

    def write(self, images: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.lines.append({"images": images, "time": round(time.time(), 3)} | numbers)
        if storage.is_local(self.url):
            with explained(self.url), storage.local_path(self.url).open("ab") as file:
                file.write(json.dumps(self.lines[-1]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        elif time.monotonic() > self.uploaded + UPLOAD_SECONDS:
            try:
                self.upload()
            except UserError as error:
                log.warning("%s (nothing is lost yet: the journal is written again in a while)", error)

    def upload(self) -> None:
        """Write the whole journal anew: object stores cannot append."""
        self.uploaded = time.monotonic()
        storage.write(self.url, b"".join(json.dumps(line).encode() + b"\n" for line in self.lines))


def forget_pictures(run: str, *, images: int) -> None:
    """Remove the pictures that were drawn after more images: they will be drawn anew."""
    for name in storage.listing(samples := storage.join(run, "samples")):
        if re.fullmatch(r"\d+\.png", name) and int(name[:-4]) > images:
            storage.remove(storage.join(samples, name))


def local_folder(run: str) -> Path:
    """Where MLflow's local database and pictures are: beside the run, or here if the run is in an object store."""
    return storage.local_path(run).parent if storage.is_local(run) else Path.cwd()


def default_tracking_uri(run: str, *, database: str = "mlflow.db") -> str:
    """Which MLflow is told unless MLFLOW_TRACKING_URI says: a sqlite database beside the run."""
    return "sqlite:///" + str(local_folder(run) / database).replace("%", "%25").replace("?", "%3F")


def make_database(run: str) -> None:
    """Make mlflow.db aside: a kill, or a second run that starts at the same time, would ruin it for good."""
    database = local_folder(run) / "mlflow.db"
    aside = database.with_name(f".mlflow.db.{secrets.token_hex(4)}.partial")
    if database.exists():
        return
    command = ["-P", "-m", "mlflow", "db", "upgrade", default_tracking_uri(run, database=aside.name)]
    try:
        made = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if made.returncode:
            raise OSError(f"{database} cannot be made: {made.stderr.strip()[-300:]}")
        with contextlib.suppress(FileExistsError):  # another run was faster
            os.link(aside, database)
    finally:
        aside.unlink(missing_ok=True)


def harmless(text: str) -> str:
    """The text without what stands before the @ of MLFLOW_TRACKING_URI, however it is written, and of other URLs."""
    person = os.environ.get("MLFLOW_TRACKING_URI", "").rpartition("@")[0]
    return re.sub(r"//[^/\s]+@", "//", text.replace(f"{person}@", "") if person else text)


def describe_code() -> dict[str, str]:
    """What runs, where and for whom."""
    about = {"host": platform.node(), "version.python": platform.python_version(), "mlflow.source.name": "aaae train"}
    about["mlflow.user"] = os.environ.get("USER") or str(os.getuid())
    for name in ("aaae_dist", "torch", "accelerate", "webdataset", "mlflow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[f"version.{name}"] = importlib.metadata.version(name)
    if code := commit():
        about["git.commit"] = about["mlflow.source.git.commit"] = code
        about["git.changed"] = str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower()
    return about


def settle_mlflow() -> None:
    """Import MLflow, in the main thread: two that import at once can meet half a module."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # stdout is for results
    with contextlib.suppress(ImportError):  # the delivery will meet it again, and it is reported
        import mlflow.tracking  # noqa: F401
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # where it was imported before, as by DeepSpeed


class Delivery:
    """Brings MLflow up to date with a run's folder. Once a call has failed, begin another: MLflow knows what it got."""

    def __init__(self, run: str, config: Config, about: Mapping[str, Any]) -> None:
        """Find or make the MLflow run, and ask how far it got."""
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        self.run, self.config, self.training = run, config, about["training"]
        self.remote = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self.remote:
            make_database(run)
        self.client = MlflowClient(self.remote or default_tracking_uri(run))
        place = storage.join(run, "mlflow_run_id")
        written = storage.read(place).decode().strip() if storage.exists(place) else ""
        known = self.find(written)
        self.id, self.status = known.info.run_id, known.info.status
        if self.id != written:
            storage.write(place, self.id.encode())
        # MLflow takes no point back: what is trained a second time after a kill stays there as it was at first.
        # But what was trained again after going back is told again, as it went another way then.
        self.reached = {metric.key: (metric.step, metric.timestamp) for metric in known.data._metric_objs}
        self.rollbacks = read_rollbacks(run)
        self.lines = 0
        self.pictures: set[int] | None = None  # not asked yet: metrics must not wait for where pictures are stored
        # Nor does it let a parameter change: where a resumed run's do, config.toml says so.
        new = {key: str(value) for key, value in config.flat().items() if key not in known.data.params}
        params = [Param(key, harmless(value)[:6_000]) for key, value in new.items()]  # the longest that MLflow takes
        tags = [RunTag(key, value) for key, value in about.items() if key not in CHANGING]
        self.client.log_batch(self.id, params=params, tags=tags, synchronous=True)

    def find(self, run_id: str) -> Any:
        """The MLflow run of that id; else another of the same training, whose id got lost or was of another server."""
        try:
            if run_id and (known := self.client.get_run(run_id)).info.lifecycle_stage == "active":
                return known
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
        experiment = self.experiment()
        if found := self.client.search_runs([experiment], f"tags.training = '{self.training}'", max_results=1):
            return found[0]
        name = self.config.tracking.name or self.run.rstrip("/").rpartition("/")[2]
        return self.client.create_run(experiment, run_name=name, tags={"training": self.training})

    def experiment(self) -> str:
        name = self.config.tracking.experiment
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            place = None if self.remote else (local_folder(self.run) / "mlartifacts").as_uri()
            return self.client.create_experiment(name, artifact_location=place)
        except Exception:
            if found := self.client.get_experiment_by_name(name):  # another run was faster
                return found.experiment_id
            raise

    def is_news(self, name: str, line: Mapping[str, Any]) -> bool:
        """Whether MLflow has not got this figure of a line of the journal."""
        step, when = self.reached.get(name, (-1, 0))
        return line["images"] > step or any(when < back["time"] * 1000 < line["time"] * 1000 for back in self.rollbacks)

    def is_abandoned(self, step: int, when: int) -> bool:
        """Whether what was told of so many images, so many ms after 1970, is of a way that was gone back from."""
        return any(step > back["to"] and when < back["time"] * 1000 for back in self.rollbacks)

    def deliver(self, lines: Sequence[dict[str, Any]], status: str) -> None:
        """Send what MLflow has not got: lines of the journal, the status, config.toml, pictures."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(line["time"] * 1000), line["images"])
            for line in lines[self.lines :]
            for name, value in line.items()
            if name not in ("images", "time") and value is not None and self.is_news(name, line)
        ]
        self.client.log_batch(self.id, metrics=metrics, synchronous=True)
        self.lines = len(lines)
        if status != self.status:
            change = self.client.update_run if status == "RUNNING" else self.client.set_terminated
            change(self.id, status=status)
            self.status = status

        if self.pictures is None:
            self.client.log_text(self.id, harmless(self.config.toml()), "config.toml")
            files = " ".join(found.path for found in self.client.list_artifacts(self.id, "images"))
            found = re.findall(r"\+step\+(\d+)\+timestamp\+(\d+)\S+compressed", files)
            self.pictures = {int(step) for step, when in found if not self.is_abandoned(int(step), int(when))}
        for name in storage.listing(storage.join(self.run, "samples")):
            if re.fullmatch(r"\d+\.png", name) and int(name[:-4]) not in self.pictures:
                picture = Image.open(io.BytesIO(storage.read(storage.join(self.run, "samples", name))))
                self.client.log_image(self.id, picture, key="samples", step=int(name[:-4]), synchronous=True)
                self.pictures.add(int(name[:-4]))


class OvertakenError(UserError):
    """Another training has begun in the same place since."""


class Tracker:
    """What rank 0 reports with. Nothing here waits for MLflow but `close`, and that not for long.

    `restarts` is how often the run was begun before.
    """

    def __init__(self, run: str, config: Config, *, images: int) -> None:
        self.run, self.config = run, config
        for folder in (run, storage.join(run, "samples")):
            storage.sweep(folder)
        forget_pictures(run, images=images)
        storage.write(storage.join(run, "config.toml"), config.toml().encode())
        place = storage.join(run, "about.json")
        before = read_about(run) if storage.exists(place) else {"training": secrets.token_hex(8), "starts": 0}
        self.restarts = before.get("starts", 1)
        self.attempt = secrets.token_hex(8)  # tells it from a training that begins in the same folder at the same time
        self.about = {"training": before["training"], "attempt": self.attempt, "run": harmless(run)}
        self.about |= {"status": "RUNNING", "starts": self.restarts + 1, "began": round(time.time(), 3)}
        self.about |= describe_code()
        storage.write_json(place, self.about)
        self.journal = Journal(run, images=images)
        self.news, self.parting, self.delivered = threading.Event(), threading.Event(), not config.tracking.mlflow
        self.thread = threading.Thread(target=self.keep_delivering, name="mlflow", daemon=True)
        if config.tracking.mlflow:
            settle_mlflow()
            self.news.set()
            self.thread.start()

    def log(self, images: int, metrics: Mapping[str, float]) -> None:
        self.journal.write(images, metrics)
        self.news.set()

    def picture(self, images: int, image: Image.Image) -> None:
        file = io.BytesIO()
        image.save(file, "PNG")
        storage.write(storage.join(self.run, "samples", f"{images:012d}.png"), file.getvalue())
        self.news.set()

    def go_back(self, images: int) -> None:
        """Drop what was reported after so many images: it is to be reported anew."""
        self.journal = Journal(self.run, images=images)
        forget_pictures(self.run, images=images)
        self.news.set()

    def flush(self) -> None:
        """Have every line where no kill can reach it, before a checkpoint says that it was written.

        Raises:
            UserError: the store fails, or another training has begun there since, which only a disk's lock keeps away.
        """
        if not storage.is_local(self.run):  # there it is as soon as it is written
            self.refuse_another()
            self.journal.upload()

    def refuse_another(self) -> None:
        if read_about(self.run).get("attempt") != self.attempt:
            raise OvertakenError(
                f"{self.run}: another training has begun there since this one did; end one of the two, or give them "
                "different places in training.run"
            )

    def keep_delivering(self) -> None:
        """The background thread: deliver whenever there is news; when MLflow fails, say so once and try again later."""
        delivery, journal, down, parting = None, self.journal, False, False
        while not parting:
            self.news.wait()
            self.news.clear()
            parting = self.parting.is_set()  # looked at before delivering: what was logged until then is delivered
            if journal is not self.journal:  # the run went back
                delivery, journal = None, self.journal
            try:
                delivery = delivery or Delivery(self.run, self.config, self.about)
                delivery.deliver(list(journal.lines), self.about["status"])
                self.delivered = parting
                if down:
                    log.warning("MLflow is back, and has everything")
                down = False
            except Exception as error:  # whatever MLflow, its database and its store raise: none of training's trouble
                if not down:
                    what = harmless(one_line(error))[:500]
                    log.warning("MLflow does not take all (%s); training goes on, and it is tried again", what)
                delivery, down = None, True
                self.parting.wait(RETRY_SECONDS)
                self.news.set()

    def close(self, status: str) -> None:
        """End the report. `status`: FINISHED, KILLED (stopped by a signal) or FAILED."""
        try:
            self.flush()
            self.about["status"] = status
            storage.write_json(storage.join(self.run, "about.json"), self.about)
        except UserError as error:
            if not isinstance(error, OvertakenError):  # else MLflow is to hear of the other training alone
                self.about["status"] = status
            raise
        finally:
            self.parting.set()
            self.news.set()
            if self.thread.is_alive():
                self.thread.join(PARTING_SECONDS[status])
            if not self.delivered:
                log.warning("MLflow has not got everything; `aaae track sync %s` delivers the rest", self.run)


def read_about(run: str) -> dict[str, Any]:
    """What about.json says of a run, or a UserError if that is nothing of ours.

    Of what code trains it, and where; its `status`; how often a training of it was started, and when last.
    """
    place = storage.join(run, "about.json")
    about = storage.read_json(place)
    if not isinstance(about, dict) or not {"training", "status"} <= about.keys():
        raise UserError(f"{place}: damaged; remove it and train on: MLflow then gets a new run")
    return about


def training_of(run: str) -> str:
    """The word by which MLflow and the ranks know a training; empty: it has not begun."""
    return read_about(run)["training"] if storage.exists(storage.join(run, "about.json")) else ""


def is_unfinished(run: str) -> bool:
    """Whether a run's report was begun and not ended as it should be."""
    return storage.exists(storage.join(run, "about.json")) and read_about(run)["status"] != "FINISHED"


class NoTracker:
    """What the other ranks report with: nothing."""

    restarts = 0

    def ignore(self, *_: Any) -> None: ...

    log = picture = go_back = flush = close = ignore


def sync(run: str) -> int:
    """Deliver to MLflow what it missed of a run, or raise a UserError; returns the number of lines it now has."""
    config = read_run_config(run)
    lines = parse_lines(storage.read(storage.join(run, "metrics.jsonl")))
    about = read_about(run)
    settle_mlflow()
    try:
        Delivery(run, config, about).deliver(lines, about["status"])
    except Exception as error:  # whatever MLflow and its database raise; a traceback of it could hold credentials
        what = harmless(one_line(error))[:500]
        raise UserError(f"MLflow does not take {run} ({what}); check MLFLOW_TRACKING_URI, and try again") from None
    return len(lines)
