"""The servers of the tests are what they say, and faults happen as they are counted."""

import http.client
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import fsspec
import psutil
import pytest
import servers
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError
from conftest import forget_clients, unavailable
from faults import FaultProxy, Faults

from aaae_dist import storage

BODY = os.urandom(30_000)  # fits into what the system takes of a connection before anyone reads it
ONCE = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30)


def client(url: str, key: str, secret: str) -> Any:
    """One that tries everything once."""
    user = {"aws_access_key_id": key, "aws_secret_access_key": secret}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=ONCE, **user)


def user_of(variables: dict[str, str]) -> tuple[str, str]:
    return variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]


# --- Ceph


def need_ceph() -> None:
    if not servers.ceph_is_installed():
        unavailable("Ceph is not installed; .ci/run installs it")


@pytest.fixture(scope="module")
def lasting() -> Iterator[servers.Ceph]:
    """A Ceph that forgets nothing when it is killed."""
    need_ceph()
    with servers.ceph("bluestore") as store:
        yield store


def test_ceph_checks_signatures_and_answers_ranges(lasting):
    url, (key, secret) = lasting.variables["AWS_ENDPOINT_URL"], user_of(lasting.variables)
    s3 = client(url, key, secret)
    s3.create_bucket(Bucket="ranges")
    s3.put_object(Bucket="ranges", Key="file", Body=BODY)
    got = s3.get_object(Bucket="ranges", Key="file", Range="bytes=1000-1999")
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206
    assert got["ContentRange"] == f"bytes 1000-1999/{len(BODY)}"
    assert got["Body"].read() == BODY[1000:2000]
    for other, code in (
        (client(url, key, "wrong"), "SignatureDoesNotMatch"),
        (client(url, "a", "b"), "InvalidAccessKeyId"),
    ):
        with pytest.raises(ClientError) as refusal:
            other.get_object(Bucket="ranges", Key="file")
        assert refusal.value.response["Error"]["Code"] == code
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{url}/ranges/file")


def test_ceph_keeps_what_it_has_when_it_is_killed(lasting):
    s3 = client(lasting.variables["AWS_ENDPOINT_URL"], *user_of(lasting.variables))
    s3.create_bucket(Bucket="kept")
    s3.put_object(Bucket="kept", Key="file", Body=BODY)
    lasting.gateway.kill()
    lasting.disk.kill()
    with pytest.raises(EndpointConnectionError):
        s3.get_object(Bucket="kept", Key="file")
    lasting.disk.start()
    lasting.gateway.start()
    assert s3.get_object(Bucket="kept", Key="file")["Body"].read() == BODY


SLEEPER = """
import sys, servers
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sleeper = servers.Daemon("sleep", "1000", variables={}, log=Path(sys.argv[1]), starter=ThreadPoolExecutor(1))
sleeper.start()
print(sleeper.process.pid, flush=True)
input()
"""


@pytest.mark.parametrize("delay", [0, 1])
def test_a_server_dies_with_the_tests_that_started_it(tmp_path, delay):
    slow = tmp_path / "setpriv"  # a busy machine: the tests are gone before the system is asked to watch them
    slow.write_text(f'#!/bin/sh\nsleep {delay}\nexec {shutil.which("setpriv")} "$@"\n')
    slow.chmod(0o755)
    line = [sys.executable, "-c", SLEEPER, tmp_path / "log"]
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(line, cwd=Path(__file__).parent, env=variables, **pipes) as tests:
        assert tests.stdout
        server = psutil.Process(int(tests.stdout.readline()))
        assert server.is_running()
        tests.kill()
        server.wait(timeout=30)


def test_a_server_that_does_not_start_says_why(tmp_path):
    line = ("sh", "-c", "echo the disk is full; exit 1")
    with ThreadPoolExecutor(1) as starter, pytest.raises(RuntimeError, match=r"does not serve: .*the disk is full"):
        servers.Daemon(*line, variables={}, log=tmp_path / "log", starter=starter, port=servers.free_port()).start()


# --- files by HTTP


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a file of BODY."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "file").write_bytes(BODY)
    with servers.files(folder) as url:
        yield f"{url}/file"


def test_files_by_http(file):
    assert storage.read(file) == BODY
    store = fsspec.filesystem("http")
    assert store.cat_file(file, start=5, end=900) == BODY[5:900]
    with store.open(file, block_size=1000) as opened:
        opened.seek(len(BODY) - 10)
        assert opened.read() == BODY[-10:]
    for range_, code in (("bytes=9-8", 416), (f"bytes={len(BODY)}-", 416)):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            urllib.request.urlopen(urllib.request.Request(file, headers={"Range": range_}))
    storage.filesystem.cache_clear()


# --- faults


class Client:
    """Asks for a file on one connection as long as that lives, and keeps account."""

    def __init__(self, proxy: FaultProxy, timeout: float = 30) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=timeout)
        self.outcomes: list[tuple[int, int]] = []  # status, bytes of the body
        self.connections = 0

    def get(self) -> bytes:
        """The body as far as it came."""
        self.connections += self.connection.sock is None
        self.connection.request("GET", "/file")
        body = b""
        with self.connection.getresponse() as answer:
            try:
                while piece := answer.read1():
                    body += piece
            except ConnectionResetError:
                self.connection.close()
        self.outcomes.append((answer.status, len(body)))
        return body


@pytest.fixture
def proxy(file: str) -> Iterator[FaultProxy]:
    """One before the file server."""
    with FaultProxy(file) as proxy:
        yield proxy


def fates(file: str, seed: int, faults: Faults) -> tuple[Client, FaultProxy]:
    """What 300 requests met."""
    with FaultProxy(file, seed=seed) as proxy:
        proxy.faults, client = faults, Client(proxy)
        for _ in range(300):
            body = client.get()
            assert client.outcomes[-1][0] == 503 or BODY.startswith(body)
        client.connection.close()
    return client, proxy


def test_what_goes_wrong_is_counted_and_chosen_by_the_seed(file):
    client, proxy = fates(file, 1, Faults(errors=0.4, cuts=0.4))
    lengths = [length for status, length in client.outcomes if status == 200]
    cut = [length for length in lengths if length < len(BODY)]
    counts = proxy.counts
    assert counts.requests == {"GET": len(client.outcomes)}
    assert (counts.errors, counts.cuts, counts.sent) == (300 - len(lengths), len(cut), sum(lengths))
    assert abs(counts.errors - 300 * 0.4) < 4 * (300 * 0.4 * 0.6) ** 0.5
    assert abs(counts.cuts - 300 * 0.6 * 0.4) < 4 * (300 * 0.24 * 0.76) ** 0.5
    assert min(cut) < 0.1 * len(BODY)
    assert max(cut) > 0.9 * len(BODY)
    assert client.connections - 1 in (counts.cuts - 1, counts.cuts)  # nothing else ends a connection
    assert fates(file, 1, Faults(errors=0.4, cuts=0.4))[0].outcomes == client.outcomes
    assert fates(file, 2, Faults(errors=0.4, cuts=0.4))[0].outcomes != client.outcomes


@pytest.fixture(params=["ceph", "moto"])
def variables(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Those of each store."""
    if request.param == "ceph":
        need_ceph()
        yield request.getfixturevalue("s3_variables")
    else:
        with servers.moto() as variables:
            yield variables


def test_signatures_hold_through_the_proxy(variables, monkeypatch):
    parts = [os.urandom(5 << 20), b"end"]
    with FaultProxy(variables["AWS_ENDPOINT_URL"]) as proxy:
        s3 = client(proxy.url, *user_of(variables))
        s3.create_bucket(Bucket="proxied")
        s3.put_object(Bucket="proxied", Key="file", Body=BODY)
        upload = {"Bucket": "proxied", "Key": "large"}
        upload["UploadId"] = s3.create_multipart_upload(**upload)["UploadId"]
        sent = [s3.upload_part(**upload, PartNumber=i + 1, Body=part) for i, part in enumerate(parts)]
        done = {"Parts": [{"PartNumber": i + 1, "ETag": part["ETag"]} for i, part in enumerate(sent)]}
        s3.complete_multipart_upload(**upload, MultipartUpload=done)
        before = proxy.counts.sent
        assert s3.get_object(Bucket="proxied", Key="large")["Body"].read() == b"".join(parts)
        ranged = s3.get_object(Bucket="proxied", Key="file", Range="bytes=7-")
        assert (ranged["ResponseMetadata"]["HTTPStatusCode"], ranged["Body"].read()) == (206, BODY[7:])
        assert proxy.counts.sent - before == sum(map(len, parts)) + len(BODY) - 7
        assert s3.head_object(Bucket="proxied", Key="file")["ContentLength"] == len(BODY)
        assert [entry["Key"] for entry in s3.list_objects_v2(Bucket="proxied")["Contents"]] == ["file", "large"]
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            client(proxy.url, user_of(variables)[0], "wrong").list_objects_v2(Bucket="proxied")
        s3.delete_object(Bucket="proxied", Key="large")
        assert proxy.counts.requests == {"PUT": 4, "POST": 2, "GET": 4, "HEAD": 1, "DELETE": 1}
        for name, value in (variables | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        forget_clients()
        storage.write("s3://proxied/other", BODY)
        assert storage.read("s3://proxied/other") == BODY
        assert list(storage.listing("s3://proxied")) == ["file", "other"]
        forget_clients()
        proxy.faults = Faults(errors=1.0)
        with pytest.raises(ClientError, match="SlowDown"):
            s3.get_object(Bucket="proxied", Key="file")


@pytest.mark.parametrize("faults", [Faults(latency=0.3), Faults(rate=len(BODY) / 0.3)], ids=["latency", "rate"])
def test_slow_is_as_slow_as_it_should_be(proxy, faults):
    proxy.faults, client = faults, Client(proxy)
    began = time.monotonic()
    for _ in range(2):
        assert client.get() == BODY
    assert time.monotonic() - began >= 0.6
    client.connection.close()


def test_a_silent_server_answers_nobody(proxy):
    client = Client(proxy, timeout=0.2)
    assert client.get() == BODY
    proxy.faults = Faults(silent=True)
    with pytest.raises(TimeoutError):
        client.get()
    client.connection.close()
    proxy.faults = Faults()
    assert client.get() == BODY
    assert proxy.counts.requests == {"GET": 3}
    client.connection.close()


def test_a_server_that_is_down_refuses_and_comes_back(proxy):
    client = Client(proxy)
    assert client.get() == BODY
    began = time.monotonic()
    proxy.down(0.5)
    with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
        client.get()
    client.connection.close()
    refused = 0
    while True:
        try:
            assert client.get() == BODY
            break
        except ConnectionRefusedError:
            refused += 1
            client.connection.close()
            assert time.monotonic() - began < 30
    assert refused
    assert time.monotonic() - began >= 0.5
    proxy.down()
    client.connection.close()
    with pytest.raises(ConnectionRefusedError):
        client.get()
    client.connection.close()


def test_a_forked_process_keeps_no_connection_open(proxy):
    client = Client(proxy, timeout=5)
    assert client.get() == BODY
    context = multiprocessing.get_context("fork")
    end = context.Event()
    child = context.Process(target=end.wait)
    child.start()
    try:
        proxy.faults = Faults(cuts=1.0)
        assert len(client.get()) < len(BODY)
        proxy.down()
        with pytest.raises(ConnectionRefusedError):
            client.get()
    finally:
        end.set()
        child.join()
        client.connection.close()


def test_who_asks_before_sending_a_body_is_answered_at_once(proxy):
    at = urlsplit(proxy.url)
    with socket.create_connection((at.hostname, at.port), timeout=30) as connection, connection.makefile("rb") as said:
        connection.sendall(b"POST /file HTTP/1.1\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\n")
        assert said.readline() == b"HTTP/1.1 100 Continue\r\n"
        connection.sendall(b"x")
        assert said.readlines(2)[1].startswith(b"HTTP/1.1 501")  # the file server's own word
