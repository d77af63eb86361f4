"""A polite request to stop: SIGTERM, SIGUSR1 and Ctrl-C raise a flag, and the loop looks at it between steps.

No heavy imports here, so that the handler is in place before they take their seconds.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        """Install the handlers, in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)  # Ctrl-C twice leaves at once
