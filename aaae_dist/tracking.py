"""Metrics: metrics.jsonl in the run's folder always has everything; MLflow is told in the background.

The journal is the queue: whatever MLflow has not got yet is read from the journal and the pictures of the run, and
MLflow itself says how far it got. So an outage costs nothing, a resumed run goes on in the same MLflow run, and `aaae
track sync RUN` is the same delivery, later.
"""

import contextlib
import getpass
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from aaae_dist import storage
from aaae_dist.checkpoint import read_run_config
from aaae_dist.config import Config
from aaae_dist.errors import UserError

log = logging.getLogger(__name__)

LINE = "progress/line"  # the number of the journal's line, sent with it: how far MLflow got
RETRY_SECONDS, UPLOAD_SECONDS, PARTING_SECONDS = 15.0, 30.0, 60.0


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The journal's whole lines; a last one cut short by a kill is dropped."""
    lines = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


class Journal:
    """metrics.jsonl: one JSON object a line, `images`, `time` (seconds since 1970), then `group/name: number`."""

    def __init__(self, run: str, *, images: int) -> None:
        """Open the journal of a run that goes on from `images`; lines beyond are dropped, to be written again."""
        self.url = storage.join(run, "metrics.jsonl")
        data = storage.read(self.url) if storage.exists(self.url) else b""
        self.lines = [line for line in parse_lines(data) if line["images"] <= images]
        self.uploaded = 0.0
        self.upload()
        self.file = storage.local_path(self.url).open("ab") if storage.is_local(run) else None

    def write(self, images: int, metrics: Mapping[str, float]) -> None:
        line = {"images": images, "time": round(time.time(), 3)} | {
            name: value if math.isfinite(value) else None for name, value in metrics.items()
        }
        self.lines.append(line)
        if self.file is None:
            if time.monotonic() - self.uploaded > UPLOAD_SECONDS:
                self.upload()
            return
        with storage.explained(self.url):
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()

    def upload(self) -> None:
        """Write the whole journal anew: object stores cannot append."""
        storage.write(self.url, b"".join(json.dumps(line).encode() + b"\n" for line in self.lines))
        self.uploaded = time.monotonic()

    def close(self) -> None:
        if self.file is None:
            self.upload()
        else:
            self.file.close()


def default_tracking_uri(run: str) -> str:
    """The sqlite database beside the run; in the working folder where the run is in an object store."""
    folder = storage.local_path(run).parent if storage.is_local(run) else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


def describe_code() -> dict[str, str]:
    """Tags that say what ran: git commit, versions, machine."""
    here = Path(__file__).resolve().parent
    versions = {
        f"version.{name}": importlib.metadata.version(name)
        for name in ("aaae_dist", "torch", "accelerate", "webdataset", "mlflow", "numpy")
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
        versions |= {
            "git.commit": commit,
            "mlflow.source.git.commit": commit,
            "git.changed": str(bool(changed)).lower(),
        }
    return versions | {"version.python": platform.python_version(), "host": platform.node()}


class Delivery:
    """Brings MLflow up to date with a run's folder. Every call of `deliver` sends what is missing, and only that."""

    def __init__(self, run: str, config: Config) -> None:
        for name, value in {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        }.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        logging.getLogger("alembic").setLevel(logging.WARNING)
        self.run, self.config = run, config
        self.local = "MLFLOW_TRACKING_URI" not in os.environ
        self.client = MlflowClient(default_tracking_uri(run) if self.local else os.environ["MLFLOW_TRACKING_URI"])
        self.run_id, self.line, self.pictures = "", 0, set[str]()

    def connect(self) -> None:
        """Find or make the MLflow run, and ask how far it got."""
        place = storage.join(self.run, "mlflow_run_id")
        if not storage.exists(place):
            name = self.config.tracking.name or self.run.rstrip("/").rpartition("/")[2]
            tags = describe_code() | {
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "aaae train",
                "run": self.run,
            }
            created = self.client.create_run(self.experiment(), run_name=name, tags=tags)
            storage.write(place, created.info.run_id.encode())
        self.run_id = storage.read(place).decode().strip()
        known = self.client.get_run(self.run_id)
        self.line = int(known.data.metrics.get(LINE, 0))
        self.pictures = {Path(found.path).name for found in self.client.list_artifacts(self.run_id, "samples")}
        self.client.update_run(self.run_id, status="RUNNING")
        for key, value in self.config.flat().items():
            if (
                key not in known.data.params
            ):  # MLflow lets no parameter change: a resumed run's new config.toml says what did
                self.client.log_param(self.run_id, key, value)
        self.client.log_text(self.run_id, self.config.toml(), "config.toml")

    def experiment(self) -> str:
        name = self.config.tracking.experiment
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        place = (
            storage.local_path(self.run).parent.joinpath("mlartifacts", name).as_uri()
            if self.local and storage.is_local(self.run)
            else None
        )
        try:
            return self.client.create_experiment(name, artifact_location=place)
        except Exception:
            if found := self.client.get_experiment_by_name(name):  # another run of a job array was faster
                return found.experiment_id
            raise

    def deliver(self, lines: list[dict[str, Any]]) -> None:
        """Send the journal's lines and the pictures that MLflow has not got."""
        from mlflow.entities import Metric

        if not self.run_id:
            self.connect()
        for number in range(self.line + 1, len(lines) + 1):
            line = lines[number - 1]
            values = {
                name: value for name, value in line.items() if name not in ("images", "time") and value is not None
            }
            moment = int(line["time"] * 1000)
            self.client.log_batch(
                self.run_id,
                [Metric(name, value, moment, line["images"]) for name, value in (values | {LINE: number}).items()],
            )
            self.line = number
        for name in storage.listing(storage.join(self.run, "samples")):
            if name.endswith(".png") and name not in self.pictures:
                image = Image.open(io.BytesIO(storage.read(storage.join(self.run, "samples", name))))
                self.client.log_image(self.run_id, image, artifact_file=f"samples/{name}")
                self.pictures.add(name)

    def finish(self, status: str) -> None:
        self.client.set_terminated(self.run_id, status)


class Tracker:
    """What rank 0 reports with. Nothing here waits for MLflow but `close`, and that not for long."""

    def __init__(self, run: str, config: Config, *, images: int) -> None:
        self.run = run
        storage.write(storage.join(run, "config.toml"), config.toml().encode())
        self.journal = Journal(run, images=images)
        self.config, self.status = config, ""
        self.news, self.parting = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.keep_delivering, name="mlflow", daemon=True)
        self.delivered = not config.tracking.mlflow
        if config.tracking.mlflow:
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

    def keep_delivering(self) -> None:
        """The background thread: deliver whenever there is news; when MLflow fails, say so once and try again later."""
        delivery, down = None, False
        while True:
            self.news.wait(RETRY_SECONDS)
            self.news.clear()
            parting = self.parting.is_set()  # looked at before delivering: what was logged until then is delivered
            try:
                delivery = delivery or Delivery(self.run, self.config)
                delivery.deliver(list(self.journal.lines))
                if parting:
                    delivery.finish(self.status)
                    self.delivered = True
                    return
                if down:
                    log.warning("MLflow is back, and has everything")
                down = False
            except (
                Exception
            ) as error:  # whatever MLflow and its database raise must not touch the training; it is reported
                if not down:
                    log.warning(
                        "MLflow is not reachable (%s); training goes on, metrics.jsonl has everything, and it is "
                        "tried again every %.0f s",
                        type(error).__name__,
                        RETRY_SECONDS,
                    )
                down = True
                if parting:
                    return
                self.parting.wait(RETRY_SECONDS)

    def close(self, status: str) -> None:
        """End the report. `status`: FINISHED, KILLED (stopped by a signal) or FAILED."""
        self.journal.close()
        self.status = status
        self.parting.set()
        self.news.set()
        if self.thread.is_alive():
            self.thread.join(PARTING_SECONDS)
        if not self.delivered:
            log.warning("MLflow has not got everything; `aaae track sync %s` delivers the rest", self.run)


class NoTracker:
    """What the other ranks report with: nothing."""

    def log(self, images: int, metrics: Mapping[str, float]) -> None: ...

    def picture(self, images: int, image: Image.Image) -> None: ...

    def close(self, status: str) -> None: ...


def sync(run: str) -> int:
    """Deliver to MLflow what it missed of a run; returns the number of lines it now has.

    Raises:
        UserError: there is no such run, or MLflow does not answer.
    """
    config = read_run_config(run)
    journal = storage.join(run, "metrics.jsonl")
    lines = parse_lines(storage.read(journal))
    try:
        delivery = Delivery(run, config)
        delivery.deliver(lines)
        if lines and lines[-1]["images"] >= config.training.images:
            delivery.finish("FINISHED")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow ({type(error).__name__}): it does not take the run's metrics; check that the server of "
            "MLFLOW_TRACKING_URI is up, and try again"
        ) from error
    return delivery.line
