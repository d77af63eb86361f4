"""What failures mean, to a user and to whoever might ask again. (Those of real stores: test_storage.)"""

import errno
import time
from email.utils import formatdate
from typing import Any

import pytest
from conftest import refused

from aaae_dist.errors import UserError
from aaae_dist.failures import explained, may_pass


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.EMFILE, "Too many open files"),
            "too many open files; raise the limit of this process, `ulimit -n`",
        ),
        (OSError(errno.ENOTEMPTY, "Directory not empty"), "another process is at work there; wait for it, or choose"),
    ],
)
def test_what_a_machine_refuses_is_one_line_with_its_remedy(error, words):
    with refused(f"/some/place: {words}"), explained("/some/place"):
        raise error


def test_what_nobody_knows_is_told_on_one_line():
    with refused("s3://b/x: two lines; check the URL and the store$"), explained("s3://b/x"):
        raise RuntimeError("two\n  lines\n")


def test_what_is_explained_already_stays_as_it_is():
    with refused("^data.url: mend it$"), explained("s3://b/x"):
        raise UserError("data.url: mend it")


@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (200, "access denied; check the credentials and the permissions of this URL"),
        (300, r"access denied; this machine's clock is 3\d\d s ahead of"),
        (0, "access denied; check the credentials and the permissions of this URL"),
        (
            3600,
            r"access denied; this machine's clock is 3\d\d\d s ahead of the store's: set it, or check the credentials",
        ),
        (
            -3600,
            r"access denied; this machine's clock is 3\d\d\d s behind the store's: set it, or check the credentials",
        ),
    ],
)
def test_a_store_that_refuses_says_what_time_it_is(ahead, words):
    """For signatures hold for some minutes. (A real one: test_faults.)"""
    error, cause = PermissionError("Forbidden"), OfBotocoreError(403)
    cause.response["ResponseMetadata"]["HTTPHeaders"] = {"date": formatdate(time.time() - ahead, usegmt=True)}
    error.__cause__ = cause
    with refused(f"s3://b/x: {words}"), explained("s3://b/x"):
        raise error


class OfBotocoreError(Exception):
    """As botocore's ClientError tells of a status."""

    def __init__(self, status: int) -> None:
        self.response: dict[str, Any] = {"ResponseMetadata": {"HTTPStatusCode": status}}


class OfAiohttpError(Exception):
    """As aiohttp's ClientResponseError tells of a status."""

    def __init__(self, status: int) -> None:
        self.status = status


class OfGcsfsError(Exception):
    """As gcsfs's HttpError tells of a status."""

    def __init__(self, status: int) -> None:
        self.code = status


@pytest.mark.parametrize("kind", [OfBotocoreError, OfAiohttpError, OfGcsfsError])
def test_a_stores_own_faults_may_pass_and_its_refusals_do_not(kind):
    passing = {status for status in (400, 403, 404, 408, 416, 429, 500, 502, 503, 599) if may_pass(kind(status))}
    assert passing == {408, 429, 500, 502, 503, 599}
    wrapped = OSError("of s3fs")
    wrapped.__cause__ = kind(503)
    assert may_pass(wrapped)


def test_lost_connections_may_pass_and_what_a_disk_refuses_does_not():
    assert all(may_pass(error) for error in (ConnectionResetError(), TimeoutError(), BrokenPipeError()))
    assert not any(may_pass(error) for error in (FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "")))
