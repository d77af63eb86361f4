"""A stopwatch on the host, and on a GPU that is made up."""

from types import SimpleNamespace

import pytest
import torch

from aaae_dist import stopwatch as module
from aaae_dist.stopwatch import Stopwatch


def test_it_sums_what_its_blocks_take_and_begins_anew(monkeypatch):
    clock = iter([10.0, 10.25, 20.0, 20.5, 30.0, 31.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = Stopwatch(torch.device("cpu"))
    for expected, blocks in ((0.75, 2), (1.0, 1), (0.0, 0)):
        for _ in range(blocks):
            with watch:
                pass
        assert watch.take() == expected


def test_on_a_gpu_events_tell_and_nothing_is_waited_for_until_it_is_asked(monkeypatch):
    events = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.recorded = self.waited = 0
            events.append(self)

        def record(self) -> None:
            self.recorded += 1

        def synchronize(self) -> None:
            self.waited += 1

        def elapsed_time(self, other: "Event") -> float:
            return 1000.0 * (events.index(other) - events.index(self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda", 0))
    for _ in range(3):
        with watch:
            pass
    assert [(event.recorded, event.waited) for event in events] == [(1, 0)] * 6
    assert watch.take() == pytest.approx(3.0)
    assert [event.waited for event in events] == [0, 1] * 3
    assert watch.take() == 0.0
