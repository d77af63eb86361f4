"""How long something takes on this rank's device, without a word to the device: it is asked when it is long past it."""

import time
from types import TracebackType
from typing import Any

import torch


class Stopwatch:
    """Sums the time that its `with` blocks take.

    Two readings of a clock for each; on a GPU two events in its stream, so the host does not wait and the GPU's own
    time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self.began = self.now()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.spans.append((self.began, self.now()))

    def take(self) -> float:
        """The seconds since it was asked before. Where the device is not past them it is waited for."""
        spans, self.spans = self.spans, []
        if self.device.type != "cuda":
            return sum((ended - began for began, ended in spans), 0.0)
        for _, ended in spans:
            ended.synchronize()
        return sum((began.elapsed_time(ended) for began, ended in spans), 0.0) / 1000
