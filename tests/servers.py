"""Real servers for the tests: processes of their own on free ports of 127.0.0.1, ended with their `with` block."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import boto3
import psutil

ANYTHING = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}
PATIENCE = 60.0  # seconds until a server that does not start is given up


def free_port() -> int:
    """A port below those that the system gives to clients: no connection takes it while its server is down."""
    while True:
        port = secrets.choice(range(10_000, 30_000))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# --- moto: a store in Python, here wherever the tests are


@contextmanager
def serving(command: Sequence[str], **variables: str) -> Iterator[str]:
    """Run a server until the block ends; its URL, taken from what it says on stderr once it listens."""
    with subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr
        assert said
        try:
            url = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", line) for line in said)), None)
            assert url, f"{command} ended with {process.wait()}"
            threading.Thread(target=said.read, daemon=True).start()  # a full pipe would stop it
            yield url[0]
        finally:
            process.terminate()
            process.wait()


@contextmanager
def moto() -> Iterator[dict[str, str]]:
    """An S3 store that checks every signature and knows one user; the variables with which a client reaches it."""
    command = [sys.executable, "-u", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with serving(command, INITIAL_NO_AUTH_ACTION_COUNT="3") as url:  # the three that make the user
        iam = boto3.client(
            "iam", endpoint_url=url, region_name="us-east-1", aws_access_key_id="-", aws_secret_access_key="-"
        )
        iam.create_user(UserName="tester")
        iam.put_user_policy(UserName="tester", PolicyName="anything", PolicyDocument=json.dumps(ANYTHING))
        key = iam.create_access_key(UserName="tester")["AccessKey"]
        yield s3_variables(url, key["AccessKeyId"], key["SecretAccessKey"])


def s3_variables(url: str, key: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
    }


# --- Ceph: what a cluster has

# One monitor, one disk, one gateway. Without tcp_nodelay a small read waits 40 ms for its acknowledgement; with the
# usual paxos intervals the start takes seconds. With authentication off, radosgw hangs.
CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = {monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
ms initial backoff = 0.05
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
log file = {folder}/$name.log
run dir = {folder}
pid file =
admin socket =
paxos propose interval = 0.02
paxos min wait = 0.01
osd pool default size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush initial weight = 1
mon allow pool size one = true
mon max pg per osd = 1000
[mon]
mon data = {folder}/mon
mon cluster log file = {folder}/cluster.log
mon data avail crit = 2
[osd]
osd data = {folder}/osd
osd objectstore = {objects}
osd class update on start = false
memstore device bytes = 4294967296
bluestore block size = 10737418240
bluestore cache autotune = false
bluestore fsck on mkfs = false
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw dynamic resharding = false
"""
KEYRING = """\
[mon.]
key = {key}
caps mon = allow *
[client.admin]
key = {key}
caps mon = allow *
caps osd = allow *
[client.rgw]
key = {key}
caps mon = allow rwx
caps osd = allow rwx
[osd.0]
key = {key}
caps mon = allow profile osd
caps osd = allow *
"""


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


class Daemon:
    """A process of a server, which can be killed and started again on what it has stored."""

    def __init__(
        self, *command: str, variables: Mapping[str, str], log: Path, starter: Executor, port: int = 0
    ) -> None:
        # The system kills the process when the thread that started it ends, so it survives no test run, however that
        # ends; a run that ended before the system was asked shows in the parent. In a session of its own the process
        # hears no Ctrl-C: it is ended in order.
        unless_orphan = 'test $PPID = "$0" && exec "$@"'
        self.command = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", unless_orphan, str(os.getpid()), *command]
        self.variables, self.log, self.starter, self.port = variables, log, starter, port
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and wait until its port, if it has one, takes connections."""
        with self.log.open("ab") as log:
            options = {"env": os.environ | self.variables, "stdout": log, "stderr": log, "start_new_session": True}
            self.process = self.starter.submit(subprocess.Popen, self.command, **options).result()
        deadline = time.monotonic() + PATIENCE
        while self.port:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(self.command)} does not serve: {tail(self.log)}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as a power cut would; it has gone when this returns."""
        if self.process:
            self.process.kill()
            self.process.wait()


class Ceph(NamedTuple):
    """A running Ceph and the variables with which an S3 client reaches it."""

    variables: dict[str, str]
    monitor: Daemon
    disk: Daemon
    gateway: Daemon


def ceph_is_installed() -> bool:
    return all(map(shutil.which, ("ceph", "ceph-mon", "ceph-osd", "radosgw")))


@contextmanager
def ceph(objects: Literal["memstore", "bluestore"] = "memstore") -> Iterator[Ceph]:
    """A Ceph of this machine with an S3 gateway and one user, from Debian's packages.

    `memstore` is up in a second and forgets everything when its disk is killed; `bluestore` takes eight and forgets
    nothing.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="ceph-")))
        starter = stack.enter_context(ThreadPoolExecutor(1))
        fsid, port, monitor_at = str(uuid.uuid4()), free_port(), f"[v2:127.0.0.1:{free_port()}]"
        conf, keyring, monmap = (str(folder / name) for name in ("ceph.conf", "keyring", "monmap"))
        variables, log = {"CEPH_CONF": conf}, folder / "daemons.log"

        def call(*command: str) -> str:
            environment = os.environ | variables
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}{tail(log)}"
            return done.stdout

        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        settings = {"folder": folder, "fsid": fsid, "monitor": monitor_at, "port": port, "objects": objects}
        Path(conf).write_text(CEPH_CONF.format(**settings))
        Path(keyring).write_text(KEYRING.format(key=call("ceph-authtool", "--gen-print-key").strip()))

        daemon = partial(Daemon, variables=variables, log=log, starter=starter)
        monitor = daemon("ceph-mon", "-i", "a", "-f")
        disk = daemon("ceph-osd", "-i", "0", "-f")
        gateway = daemon("radosgw", "-n", "client.rgw", "-f", port=port)
        for server in (monitor, disk, gateway):
            stack.callback(server.kill)  # the gateway first: it hangs without the others

        call("monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor_at, monmap)
        call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        monitor.start()
        call("ceph", "--connect-timeout", "30", "osd", "new", fsid)  # waits for the monitor
        call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", fsid)
        disk.start()
        gateway.start()  # waits for the disk
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
        user = ["--uid=tester", "--display-name=tester", f"--access-key={key}", f"--secret-key={secret}"]
        call("radosgw-admin", "-n", "client.rgw", "user", "create", *user)
        yield Ceph(s3_variables(f"http://127.0.0.1:{port}", key, secret), monitor, disk, gateway)


# --- MLflow


class MlflowServer:
    """An MLflow server on a port of its own, that can be killed and started again on what it has stored."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        self.command += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", f"{folder}/files"]
        self.start()

    def start(self) -> None:
        variables = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
        self.process = psutil.Popen(self.command, env=variables, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{' '.join(self.command)} does not serve")
            time.sleep(0.05)

    def kill(self) -> None:
        children = self.process.children(recursive=True) if self.process.is_running() else []
        for process in (processes := [self.process, *children]):
            process.kill()
        psutil.wait_procs(processes)


# --- files by HTTP


class RangeHandler(SimpleHTTPRequestHandler):
    """Python's own file server, with one range per request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and path.is_file():
            self.send_range(path, int(asked[1]), int(asked[2] or path.stat().st_size))
        else:
            super().do_GET()

    def send_range(self, path: Path, first: int, last: int) -> None:
        size = path.stat().st_size
        if not first <= last or first >= size:
            self.send_error(416)
            return
        with path.open("rb") as file:
            file.seek(first)
            part = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def files(folder: Path, handler: type[SimpleHTTPRequestHandler] = RangeHandler) -> Iterator[str]:
    """The URL of an HTTP server of this folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
