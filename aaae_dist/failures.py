"""What the failures of stores and disks mean: one line with the remedy to a user, and whether to ask again."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

from aaae_dist.errors import UserError, one_line

WRONG_CLOCK = 290.0  # seconds: S3 allows 900, other stores 300


class IncompleteError(ConnectionError):
    """Less arrived at a store than was sent."""


def reason(error: BaseException) -> str:
    """What a storage error means to a user, with the remedy."""
    name, text, code = type(error).__name__, one_line(error), getattr(error, "errno", None)
    if name == "NoCredentialsError":
        return (
            "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role; for a public "
            "bucket, AWS_NO_SIGN_REQUEST=true"
        )
    refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)  # the latter aiohttp's
    response = getattr(error.__cause__, "response", {})  # of botocore; some stores send a code and no message
    response = response if isinstance(response, dict) else {}
    if refused or "InvalidAccessKeyId" in text or "SignatureDoesNotMatch" in text:
        if abs(ahead := clock_ahead(response)) > WRONG_CLOCK:
            apart = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
            return f"access denied; this machine's clock is {apart}: set it, or check the credentials"
        return "access denied; check the credentials and the permissions of this URL"
    stated = response.get("Error", {}).get("Code", "")
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


def clock_ahead(response: dict[str, Any]) -> float:
    """Seconds by which this machine's clock is ahead of that of the store that answered so; 0 if that tells no time.

    Signatures hold for some minutes, so a store refuses who has another time.
    """
    told = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    with suppress(ValueError):
        return time.time() - parsedate_to_datetime(told).timestamp()
    return 0.0


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a filesystem raises into one line about `url`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # client libraries raise classes of their own; all end here, and the cause is named
        raise UserError(f"{url}: {reason(error)}") from error


def short_of_memory(error: BaseException) -> str:
    """What could not be had, if that is memory or a thread; nothing if something else went wrong."""
    # Where memory is short, Python and torch raise a RuntimeError too.
    words = ("allocate", "can't start new thread", "could not create a primitive")
    short = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))
    return one_line(error).rpartition("Allocator: ")[2] if short else ""


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
