"""Against divergence: steps that would ruin the networks are left out, and after too many of them the run goes back.

A step is bad if its loss, or the norm of a network's gradient, is no finite number, or is far above those of the steps
before: by more than so many robust standard deviations of their logarithms, 1.4826 times the median absolute deviation
from the median (Rousseeuw and Croux 1993). All ranks see the same figures, so they judge alike.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aaae_dist import storage
from aaae_dist.config import Guard as Settings
from aaae_dist.errors import UserError

WINDOW = 128  # steps that are looked back at
FEWEST = 32  # good steps before which none is far above them
ROLLBACKS = "rollbacks.json"
LEAST = 0.1  # deviation of the logarithms that is taken for usual where they hardly spread
NOTHING = 1e-20  # a figure that was usually below this, such as a gradient that has yet to come alive, is not judged
NEAR = 16  # good steps after a bad one before a checkpoint is worth going back to


class Guard:
    """Judges the steps of a run, one by one."""

    def __init__(self, settings: Settings) -> None:
        """Nothing has been seen."""
        self.settings = settings
        self.usual = np.zeros((0, 0))  # logarithms of the figures of the last good steps, a row a step, oldest first
        self.bad: list[bool] = []  # of the last steps, good or not
        self.skipped, self.complaint = 0, ""  # on the way here; about the last bad one
        self.condemned = False

    def judge(self, figures: Mapping[str, float]) -> str:
        """What is wrong with a step by its figures; empty: nothing, it counts.

        Above figures that are usually zero or less, such as the losses of a Wasserstein critic, none is taken for far.
        """
        values = np.array(list(figures.values()))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.maximum(values, np.finfo(np.float32).tiny))
        finite = np.isfinite(values)
        far = self.far(logs) if finite.all() else ~finite
        found = next((name for name, odd in zip(figures, far, strict=True) if odd), "")
        self.bad = [*self.bad[1 - WINDOW :], bool(found)]
        if not found:
            self.usual = np.concatenate([self.usual.reshape(-1, len(logs))[1 - WINDOW :], logs[None]])
            return ""
        self.skipped += 1
        self.complaint = f"{found} is not finite"
        if math.isfinite(figures[found]):
            column = list(figures).index(found)
            usual = math.exp(np.median(self.usual[:, column]))
            self.complaint = f"{found} is {figures[found]:.3g}, {usual:.3g} is usual"
        return self.complaint

    def far(self, logs: np.ndarray) -> np.ndarray:
        """Which of a step's figures are far above the usual."""
        if len(self.usual) < FEWEST or not self.settings.deviations:
            return np.zeros(len(logs), bool)
        median = middle(self.usual)
        far = (logs > median + self.settings.deviations * LEAST) & (median > math.log(NOTHING))
        if far.any():
            deviation = 1.4826 * middle(np.abs(self.usual - median))
            far &= logs > median + self.settings.deviations * deviation
        return far

    def forgive(self) -> None:
        """Forget the bad steps."""
        self.bad = []

    def condemn(self, complaint: str) -> None:
        """What the last steps led to cannot be kept."""
        self.complaint, self.condemned = complaint, True

    @property
    def exhausted(self) -> bool:
        """Whether the run must go back: more of the last steps were bad than are forgiven, or it is condemned."""
        return self.condemned or sum(self.bad) > self.settings.skips

    @property
    def sound(self) -> bool:
        """Whether the last steps were good."""
        return not any(self.bad[-NEAR:])

    def state_dict(self) -> dict[str, Any]:
        return {"usual": self.usual.tolist(), "bad": self.bad, "skipped": self.skipped, "complaint": self.complaint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.usual, self.bad = np.array(state["usual"]), state["bad"]
        self.skipped, self.complaint, self.condemned = state["skipped"], state["complaint"], False


def middle(rows: np.ndarray) -> np.ndarray:
    """The median of every column: numpy's takes four times as long, and small networks' steps take 3 ms."""
    ordered, count = np.sort(rows, axis=0), len(rows)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


# --- going back


def diverged(run: str, what: str, *, images: int) -> UserError:
    """The end of a run that the guard could not keep."""
    return UserError(
        f"{run}: {what} after {images:,} images, so training stopped; older checkpoints are untouched: begin another "
        "training.run with lower learning rates or other penalties"
    )


def read_rollbacks(run: str) -> list[dict[str, Any]]:
    """How often a run went back: `after` and `to` so many images, `because` of what, and at what `time`, since 1970."""
    place = storage.join(run, ROLLBACKS)
    return storage.read_json(place) if storage.exists(place) else []


def write_rollbacks(run: str, rollbacks: Sequence[dict[str, Any]]) -> None:
    storage.write_json(storage.join(run, ROLLBACKS), list(rollbacks))
