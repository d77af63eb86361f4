"""The one exception that a user is meant to see, and how it is told."""

import os
import sys


class UserError(Exception):
    """A mistake that the user can mend.

    The text is one line: the setting or file, its value, the rule, the remedy. The command line prints it without a
    traceback and ends with exit code 2.
    """


def one_line(error: BaseException) -> str:
    """Its text on one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def speaker() -> str:
    """Who tells it: every line on stderr begins with this."""
    rank = os.environ.get("RANK", "0")
    return "aaae" if rank == "0" else f"aaae rank {rank}"


def tell(text: str) -> None:
    """Say something on stderr, in one write: ranks share it, and would begin amid each other's lines."""
    print(f"{text}\n", end="", file=sys.stderr, flush=True)
