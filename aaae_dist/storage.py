"""Files on any fsspec filesystem: local paths, s3://, memory:// and the rest alike.

A file appears whole or not at all. What a store may recover from, such as a lost connection or "slow down", is tried
again for a while; whatever remains wrong is one line that names the URL. Credentials come from where the client library
usually finds them (for s3:// the AWS variables and files; none if AWS_NO_SIGN_REQUEST is true) and are never part of a
message.
"""

import fcntl
import functools
import glob
import json
import logging
import os
import random
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import fsspec
from fsspec.core import split_protocol

from aaae_dist.errors import UserError, one_line
from aaae_dist.failures import IncompleteError, explained, may_pass, reason

log = logging.getLogger(__name__)

Result = TypeVar("Result")

PATIENCE = 60.0  # seconds for which a failing store is asked again, where a setting does not say otherwise
WORTH_TELLING = 3.0  # seconds of failing after which a user should know
SILENCE = 10.0  # seconds without a byte after which an attempt has failed

TELLING, TOLD = threading.Lock(), dict[str, int]()  # the minute in which this process warned of a folder

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


def is_web(url: str) -> bool:
    """Whether a web server has it: its pages are no listings, and nothing is written there."""
    return split_protocol(url)[0] in ("http", "https")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    return Path(locate(url)[1])


def disk_bytes(url: str) -> tuple[int, int]:
    """Bytes in use and free on the disk of a local folder, be the folder there yet or not."""
    path = local_path(url)
    found = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists()))
    return found.used, found.free


def quoted(name: str) -> str:
    """A name as a part of a web address."""
    return quote(name, errors="surrogateescape")


def unquoted(path: str) -> str:
    """The path of a web address as on a disk, whatever the encoding of its names is."""
    return unquote(path, errors="surrogateescape")


def join(url: str, *names: str) -> str:
    """A URL below another; names are as on a disk, whatever is in them.

    Raises:
        UserError: there is nothing behind `://`.
    """
    if re.fullmatch(r"[\w+.-]+:/*", url):
        raise UserError(f"{url}: it names no bucket or folder; complete it, as in s3://bucket/folder")
    return "/".join([url.rstrip("/"), *(map(quoted, names) if is_web(url) else names)])


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


def exists(url: str) -> bool:
    """Whether there is such a file or folder."""

    def attempt(store: fsspec.AbstractFileSystem, path: str) -> bool:
        if not is_web(path):
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


def modified(url: str) -> float:
    """When a file was written by the clock of its store, in seconds since 1970."""
    return persistently(url, lambda store, path: store.modified(path).timestamp())


def refuse_web(url: str) -> None:
    """Raise a UserError if nothing can be written there."""
    if is_web(url):
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


def sweep(url: str, names: Collection[str] | None = None) -> None:
    """Remove what is left, right below a URL, of files that a process was killed at writing. Only disks keep such.

    Args:
        names: of the files; None: of all. Nobody may be writing them.
    """
    for name in listing(url) if is_local(url) else ():
        if (left := re.fullmatch(r"\.(.+)\.[0-9a-f]{8}\.partial", name)) and (names is None or left[1] in names):
            remove(join(url, name))


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
