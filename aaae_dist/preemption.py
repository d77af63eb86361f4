"""Preemption: the end that a scheduler sets a job, the time that it leaves for saving, and its word to start it again.

A scheduler tells by the environment:

    SLURM_JOB_END_TIME               when the job will be ended, in seconds since 1970
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds that the launcher leaves its ranks after SIGTERM; 30 where it is not set
    AAAE_STOPPED                     file in which rank 0 leaves word that the run was stopped, or is done

slurm.sbatch and kubernetes/pod.sh of launch/ read that word: a launcher that is asked to stop ends as if it had failed.
"""

import os
import time
from pathlib import Path

from aaae_dist.failures import explained

LAUNCHERS_PATIENCE = 30.0  # seconds, where nothing is set
MARGIN = 20.0  # seconds for what comes after the save, and for clocks that are not the controller's
AGAIN, DONE = "again", "done"
BEGAN = time.time()  # an end before that is another job's


def job_is_ending(saving: float, *, judging: float = 0.0) -> bool:
    """Whether the job's end leaves no more time than stopping takes: a save may be under way, and another follows.

    Args:
        saving: seconds that a save takes.
        judging: seconds that an evaluation takes, which may come before.
    """
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return end.isdigit() and int(end) > BEGAN and time.time() > int(end) - 2 * saving - judging - MARGIN


def complain_of_grace(saving: float) -> str:
    """What is wrong with the time that the launcher leaves after SIGTERM, with the remedy; empty: nothing.

    Args:
        saving: seconds that a save takes; 0: not known yet.
    """
    if "LOCAL_RANK" not in os.environ or not saving:
        return ""
    grace, needed = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LAUNCHERS_PATIENCE)), 2 * saving
    if grace >= needed:
        return ""
    return (
        f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT {grace:g}: the launcher kills so many seconds after SIGTERM, but saving takes "
        f"{saving:.0f}, and one may be under way; set it to {needed:.0f} or more, or GRACE for launch/slurm.sbatch"
    )


def leave_word(*, done: bool, gained: bool) -> None:
    """Leave word that the run is saved.

    Args:
        done: whether that is its end, and not only where it was stopped.
        gained: whether it came further than it was when it began; only then it is worth another start.

    Raises:
        UserError: the file cannot be written.
    """
    if place := os.environ.get("AAAE_STOPPED"):
        with explained(place):
            again = AGAIN if gained else "it came no further than it was when it began"
            Path(place).write_text(DONE if done else again)
