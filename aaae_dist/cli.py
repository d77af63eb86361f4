"""The command `aaae`: what is asked for, how it ends, and what the user is told if it fails.

stdout carries results, stderr everything else.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from aaae_dist.commands import COMMANDS
from aaae_dist.errors import UserError, speaker, tell
from aaae_dist.failures import reason, short_of_memory
from aaae_dist.verbs import parser

log = logging.getLogger("aaae_dist")

CANCELLED = 128 + signal.SIGINT  # exit code


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    name = speaker()
    logging.basicConfig(stream=sys.stderr, format=f"{name}: %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO if name == "aaae" else logging.WARNING)  # of one rank only
    try:
        try:
            arguments = parser().parse_args(argv)
            COMMANDS[arguments.command](arguments)
        finally:
            if sys.stdout:  # None where the caller closed it
                sys.stdout.flush()  # so that a failure to deliver the results is met here
    except KeyboardInterrupt:
        end(CANCELLED)
    except UserError as error:
        mistake = str(error)
    except (OSError, MemoryError, RuntimeError) as error:
        mistake = circumstance(error)
        if not mistake:
            raise
    else:
        end(0)
    tell(f"{name}: {' '.join(mistake.splitlines())}")
    end(2)


def end(code: int) -> NoReturn:
    """Exit; at once after Ctrl-C, though threads may wait for a store, and as one of several ranks.

    Gloo's threads let go of Python objects when they come to it. One that comes to it while the interpreter takes
    itself down is killed inside C++, and the whole process with it (SIGABRT, "terminate called without an active
    exception"): one in three of the runs that had nothing left to do ended so.
    """
    if code == CANCELLED or os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def circumstance(error: Exception) -> str:
    """What went wrong around this program and not in it, in one line; empty: nothing."""
    if isinstance(error, OSError):  # of stdout, as a rule: storage explains its files itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # whoever read the results, such as `head`, has seen enough
        return f"{error.filename or 'stdout'}: {reason(error)}"
    if what := short_of_memory(error):
        return (
            f"out of memory ({what}); lower --count or --size here, or training.micro_batch_size, "
            "evaluation.batch_size or model.width in the configuration"
        )
    return ""
