"""Files on any fsspec filesystem: local paths, s3://, memory:// and the rest alike.

A file appears whole or not at all, and whatever goes wrong is one line that names the URL. Credentials come from where
the client library usually finds them (for s3:// the AWS variables and files) and are never part of a message.
"""

import errno
import fcntl
import functools
import glob
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import split_protocol

from aaae_dist.errors import UserError

# A store that takes connections and never answers is given up after 3 x 2 x 20 seconds. s3fs tries again on top of
# what botocore does; their defaults together would wait 25 minutes.
S3_TRIES = 3
S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 1}},
}


@functools.lru_cache(maxsize=64)
def filesystem(protocol: str, pid: int) -> fsspec.AbstractFileSystem:
    """The filesystem of a protocol, one per process: clients do not survive a fork."""
    del pid
    try:
        found = fsspec.filesystem(protocol, **(S3_OPTIONS if protocol in ("s3", "s3a") else {}))
        if protocol in ("s3", "s3a"):
            found.retries = S3_TRIES
        return found
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{protocol}://: {one_line(error)}; install the package that provides it, or use another URL"
        ) from None


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path on it."""
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
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
    if isinstance(error, PermissionError) or "InvalidAccessKeyId" in text or "SignatureDoesNotMatch" in text:
        return "access denied; check the credentials and the permissions of this URL"
    if "NoSuchBucket" in text or "bucket does not exist" in text:
        return "the bucket does not exist; create it or correct the URL"
    if isinstance(error, FileNotFoundError):
        return "no such file; check the URL"
    if name in (
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ClientConnectorError",
    ) or isinstance(error, (ConnectionError, TimeoutError)):
        return "the store does not answer; check that it is up and that AWS_ENDPOINT_URL, if set, is right"
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


def exists(url: str) -> bool:
    with explained(url):
        store, path = locate(url)
        return store.exists(path)


def read(url: str) -> bytes:
    with explained(url):
        store, path = locate(url)
        data = store.cat_file(path)
        assert isinstance(data, bytes)
        return data


def read_json(url: str) -> Any:
    data = read(url)
    try:
        return json.loads(data)
    except ValueError:
        raise UserError(f"{url}: not JSON ({len(data)} bytes); it is damaged or not what it should be") from None


def listing(url: str) -> dict[str, int]:
    """Names of what is right below a URL with sizes in bytes, sorted; none if there is no such folder."""
    with explained(url):
        store, path = locate(url)
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


def write(url: str, data: bytes) -> None:
    """Write a file whole or not at all, durably; an older one of that name stays until the new one is complete."""
    with explained(url):
        store, path = locate(url)
        if not is_local(url):
            store.pipe_file(path, data)
            if (size := store.size(path)) != len(data):
                raise UserError(f"{url}: {size} bytes arrived of {len(data)}; the upload failed, try again")
            return
        target = Path(path)
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
    with explained(url):
        store, path = locate(url)
        if store.exists(path):
            # Remote filesystems take *, ? and [...] in a path as patterns, and would remove its neighbours too.
            store.rm(path if is_local(url) else glob.escape(path), recursive=True)
