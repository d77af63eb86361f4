"""Files on any fsspec filesystem: local paths, s3://, memory:// and the rest alike.

A file appears whole or not at all. What a store may recover from, such as a lost connection or "slow down", is tried
again for a while; whatever remains wrong is one line that names the URL. Credentials come from where the client library
usually finds them (for s3:// the AWS variables and files; none if AWS_NO_SIGN_REQUEST is true) and are never part of a
message.
"""

import errno
import fcntl
import functools
import glob
import json
import logging
import os
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import split_protocol

from aaae_dist.errors import UserError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PATIENCE = 60.0  # seconds for which a failing store is asked again, where a setting does not say otherwise
WORTH_TELLING = 3.0  # seconds of failing after which a user should know
SILENCE = 10.0  # seconds without a byte after which an attempt has failed

# Attempts are counted in one place, `persistently`. By default s3fs tries again on top of what botocore does, and the
# two together would wait 25 minutes for a store that takes connections and never answers.
S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": SILENCE,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 64,  # more than are ever at work
    },
}


class IncompleteError(ConnectionError):
    """Less arrived at a store than was sent."""


@functools.lru_cache(maxsize=64)
def filesystem(protocol: str, pid: int) -> fsspec.AbstractFileSystem:
    """The filesystem of a protocol, one per process: clients do not survive a fork."""
    del pid
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        options = S3_OPTIONS | {"anon": os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true", "yes")}
    elif protocol in ("http", "https"):
        import aiohttp  # a fifth of a second, which no other command should wait

        timeout = aiohttp.ClientTimeout(sock_connect=5, sock_read=SILENCE)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies, and passwords of ~/.netrc
    try:
        found = fsspec.filesystem(protocol, **options)
        if protocol in ("s3", "s3a"):
            found.retries = 1
        return found
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{protocol}://: {one_line(error)}; install the package that provides it, or use another URL"
        ) from None


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path on it.

    Raises:
        UserError: the URL holds a password, or nothing here knows its protocol.
    """
    if secret := re.match(r"([\w+.-]+://)[^/@:]*:(?!\d+/)[^@]*@", url):
        raise UserError(
            f"{secret[1]}***@{url[secret.end() :]}: a password in a URL ends up in logs and files; take it out and "
            "put it where the store's client looks: the AWS variables for s3://, ~/.netrc for http://"
        )
    protocol = split_protocol(url)[0] or "file"
    found = filesystem(protocol, os.getpid())
    return found, str(found._strip_protocol(url))


def is_local(url: str) -> bool:
    return split_protocol(url)[0] in (None, "file", "local")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(locate(url)[1])


def join(url: str, *names: str) -> str:
    """A URL below another.

    Raises:
        UserError: there is nothing behind `://`.
    """
    if re.fullmatch(r"[\w+.-]+:/*", url):
        raise UserError(f"{url}: it names no bucket or folder; complete it, as in s3://bucket/folder")
    return "/".join([url.rstrip("/"), *names])


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """What a storage error means to a user, with the remedy."""
    name, text, code = type(error).__name__, one_line(error), getattr(error, "errno", None)
    if name == "NoCredentialsError":
        return (
            "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role; for a public "
            "bucket, AWS_NO_SIGN_REQUEST=true"
        )
    refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)  # the latter aiohttp's
    if refused or "InvalidAccessKeyId" in text or "SignatureDoesNotMatch" in text:
        return "access denied; check the credentials and the permissions of this URL"
    response = getattr(error.__cause__, "response", {})  # of botocore; some stores send a code and no message
    stated = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    text = one_line(error.__cause__) if stated and error.__cause__ else text
    if stated == "NoSuchBucket" or "bucket does not exist" in text:
        return "the bucket does not exist; create it or correct the URL"
    if isinstance(error, FileNotFoundError):
        return "no such file; check the URL"
    if isinstance(error, IncompleteError):
        return f"{text}; check the network and the store"
    if name in (
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ClientConnectorError",
    ) or isinstance(error, (ConnectionError, TimeoutError)):
        return "the store does not answer; check that it is up and that AWS_ENDPOINT_URL, if set, is right"
    if code == errno.EMFILE:
        return "too many open files; raise the limit of this process, `ulimit -n`"
    if code == errno.ENOTDIR:
        return "a file is where a folder should be; choose another place"
    if code == errno.ENOTEMPTY:
        return "another process is at work there; wait for it, or choose another place"
    if "Invalid bucket name" in text:
        return "no name that a bucket may have; correct the URL"
    if code == errno.EBUSY or getattr(error, "status", None) in (429, 503):
        return "the store is overloaded; try again later, or with fewer processes"
    if name in ("ClientPayloadError", "IncompleteReadError", "ResponseStreamingError", "ConnectionClosedError"):
        return "the connection was cut amid an answer; check the network and the store"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "no space left; free some, or choose another place"
    if code == errno.EROFS:
        return "the file system is read-only; choose another place"
    return f"{text}; check the URL and the store"


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a filesystem raises into one line about `url`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # client libraries raise classes of their own; all end here, and the cause is named
        raise UserError(f"{url}: {reason(error)}") from error


# Of fsspec's clients (botocore, aiohttp, gcsfs, ...): each has classes of its own, and none is to be imported for this.
PASSING = {"ConnectionError", "TimeoutError", "HTTPClientError", "IncompleteReadError"} | {
    "ClientConnectionError",
    "ClientPayloadError",
}


def may_pass(error: BaseException | None) -> bool:
    """Whether a store may recover from this by itself: a lost connection, a silence, "slow down", its own fault."""
    while error is not None:
        response = getattr(error, "response", None)  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        status = status or getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
        if isinstance(status, int) and (status in (408, 429) or status >= 500):
            return True
        if PASSING & {kind.__name__ for kind in type(error).__mro__}:
            return True
        error = error.__cause__
    return False


def persistently(
    url: str, call: Callable[[fsspec.AbstractFileSystem, str], Result], *, patience: float | None = None
) -> Result:
    """What `call(filesystem, path)` returns, tried again with growing, jittered pauses while the store may recover.

    Args:
        patience: seconds within which the last attempt ends.

    Raises:
        UserError: the store refuses, or has failed for so long; one line about `url`.
    """
    began, attempts, limit = time.monotonic(), 0, PATIENCE if patience is None else patience
    with explained(url):
        while True:
            store, path = locate(url)
            started = time.monotonic()
            try:
                return call(store, path)
            except Exception as error:
                attempts += 1
                pause = min(0.05 * 2 ** min(attempts, 10), 2.0) * random.uniform(0.5, 1.0)  # noqa: S311  no secret
                spent, took = time.monotonic() - began, min(time.monotonic() - started, SILENCE)
                if is_local(url) or not may_pass(error):
                    raise
                if spent + pause + took > limit:  # what fails as it did before would fail too late
                    tried = f" ({attempts} attempts in {spent:.0f} s)" if attempts > 1 else ""
                    raise UserError(f"{url}: {reason(error)}{tried}") from error
                if spent > WORTH_TELLING:
                    tell(url, reason(error).partition(";")[0], limit)
                time.sleep(pause)


def tell(url: str, problem: str, limit: float) -> None:
    """Warn of a store that is asked again: once a minute, however many of its files are waited for."""
    folder = url if re.fullmatch(r"\w+://[^/]*", url) else url.rpartition("/")[0]
    minute = int(time.monotonic() // 60)
    with TELLING:
        told, TOLD[folder] = TOLD.get(folder), minute
    if told != minute:
        log.warning("%s: %s; trying again for up to %.0f s", folder, problem, limit)


TELLING, TOLD = threading.Lock(), dict[str, int]()  # the minute in which this process warned of a folder


def exists(url: str) -> bool:
    """Whether there is such a file or folder."""

    def attempt(store: fsspec.AbstractFileSystem, path: str) -> bool:
        if not path.startswith(("http://", "https://")):
            return store.exists(path)
        try:  # `exists` takes a server that does not answer for a file that is not there
            store.info(path)
        except FileNotFoundError as error:
            if may_pass(error) and error.__cause__:
                raise error.__cause__ from None
            return False
        return True

    return persistently(url, attempt)


def part(store: fsspec.AbstractFileSystem, path: str, start: int | None, stop: int | None) -> bytes:
    """Bytes of a file from one request; also of a web server that knows no ranges, and sends all."""
    data = store.cat_file(path, start=start, end=stop)
    assert isinstance(data, bytes)
    return data[start:stop] if start is not None and stop is not None and len(data) > stop - start else data


def read(url: str, start: int | None = None, stop: int | None = None, *, patience: float | None = None) -> bytes:
    """A file's bytes, or those from `start` to before `stop`; fewer if it ends before."""

    def attempt(store: fsspec.AbstractFileSystem, path: str) -> bytes:
        return part(store, path, start, stop)

    return persistently(url, attempt, patience=patience)


def read_json(url: str, *, patience: float | None = None) -> Any:
    data = read(url, patience=patience)
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{url}: not JSON ({len(data)} bytes); it is damaged or not what it should be") from None


def listing(url: str, *, patience: float | None = None) -> dict[str, int]:
    """Names of what is right below a URL with sizes in bytes, sorted; none if there is no such folder."""

    def attempt(store: fsspec.AbstractFileSystem, path: str) -> dict[str, int]:
        try:
            found = store.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        sizes = {
            Path(entry["name"]).name: int(entry["size"] or 0)
            for entry in found
            if entry["name"].rstrip("/") != path.rstrip("/")
        }
        return dict(sorted(sizes.items()))

    return persistently(url, attempt, patience=patience)


def below(store: fsspec.AbstractFileSystem, path: str) -> list[str]:
    """Paths of all files below a folder."""
    if not path.startswith(("http://", "https://")):
        return list(map(str, store.find(path)))
    # `find` and `walk` take a folder of a web server that does not answer for an empty one.
    found, folders = [], [path]
    for folder in folders:  # it grows
        for entry in store.ls(folder, detail=True):
            if entry["type"] != "directory":
                found.append(entry["name"])
            elif entry["name"] not in folders:
                folders.append(entry["name"])
    return found


def refuse_web(url: str) -> None:
    """Raise a UserError if nothing can be written there."""
    if url.startswith(("http://", "https://")):
        raise UserError(f"{url}: a web server is read, not written; choose a folder or an object store")


def write(url: str, data: bytes) -> None:
    """Write a file whole or not at all, durably; an older one of that name stays until the new one is complete."""
    refuse_web(url)

    def upload(store: fsspec.AbstractFileSystem, path: str) -> None:
        store.pipe_file(path, data)
        if (size := store.size(path)) != len(data):
            raise IncompleteError(f"{size} bytes arrived of {len(data)}")

    if not is_local(url):
        persistently(url, upload)
        return
    with explained(url):
        target = local_path(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Lock:
    """Holds a local folder for this process alone; it ends with the process, however that ends.

    An object store has no such thing: there, nothing is held.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, url: str) -> None:
        self.file = None
        if is_local(url):
            with explained(url):
                local_path(url).mkdir(parents=True, exist_ok=True)
                self.file = local_path(join(url, ".lock")).open("ab")
                try:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.release()
                    raise UserError(f"{url}: another training is at work there; choose another training.run") from None

    def release(self) -> None:
        if self.file is not None:
            self.file.close()


def write_json(url: str, value: Any) -> None:
    write(url, json.dumps(value, indent=1).encode() + b"\n")


def remove(url: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens if there is none."""

    def attempt(store: fsspec.AbstractFileSystem, path: str) -> None:
        if store.exists(path):
            # Remote filesystems take *, ? and [...] in a path as patterns, and would remove its neighbours too.
            store.rm(path if is_local(url) else glob.escape(path), recursive=True)

    persistently(url, attempt)
