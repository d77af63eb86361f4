"""How a process comes to its end: a polite request, which the loop looks at between steps, or its parent's death.

No heavy imports here, so that the handler is in place before they take their seconds.
"""

import ctypes
import signal
from types import FrameType

from aaae_dist.errors import UserError, one_line

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl


class StopRequest:
    """Whether this process was asked to stop, and by which signal, or must end, and why."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.failure = ""

    def listen(self) -> None:
        """Install the handlers, in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # Ctrl-C twice leaves at once

    def fail(self, error: BaseException) -> None:
        """End because of this. The first reason is kept."""
        kind, text = type(error).__name__, one_line(error)
        told = text if isinstance(error, UserError) or text == kind else f"{kind}: {text}"
        self.failure = self.failure or told


def end_with_parent(number: signal.Signals) -> None:
    """Get this signal when the thread that started this process ends, however it ends (Linux only)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(SET_PARENT_DEATH_SIGNAL, number)
