"""Long passes: few items at a time, results in order, an end to all at the first failure, and the time left."""

import logging
import os
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator

import pytest

from aaae_dist import passes
from aaae_dist.passes import Pass


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_are_in_order_and_few_items_are_taken_up(workers):
    taken, later = [], threading.Event()

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    def call(item: int) -> int:
        if workers > 1 and item == 0:  # the first is the last of those taken up to be done
            assert later.wait(60)
        if item == workers:
            later.set()
        return item**2

    for number, result in enumerate(Pass(100, workers=workers).over(items(), call)):
        assert result == number**2
        assert len(taken) == min(100, number + 2 * workers)


def test_the_first_failure_ends_what_was_taken_up():
    work, begun, steps = Pass(100, workers=2), threading.Event(), []

    def call(item: int) -> None:
        if item == 0:
            assert begun.wait(60)
            raise ValueError("no")
        for _ in range(10**9):  # would take an hour
            work.advance(1)
            steps.append(item)
            begun.set()

    with pytest.raises(ValueError, match=r"^no$"):
        list(work.over(range(100), call))
    assert 1 in set(steps) <= {1, 2, 3}  # of the four taken up


def test_lines_say_the_speed_and_the_time_left(monkeypatch, caplog):
    now = iter([0.0, 10.0, 30.0, 40.0, 60.0])
    monkeypatch.setattr(passes.time, "monotonic", lambda: next(now))
    caplog.set_level(logging.INFO, "aaae_dist")
    work = Pass(2000, workers=1)
    work.skip(1000)
    for _ in range(4):
        work.advance(3_000_000)
    assert caplog.messages == [
        "1,002 of 2,000 images (50 %), 0.06667 images/s, 0.2 MB/s, 4:09:30 left",  # 998 more, 15 s each
        "1,004 of 2,000 images (50 %), 0.06667 images/s, 0.2 MB/s, 4:09:00 left",
    ]


def test_a_terminal_has_a_bar():
    code = "from aaae_dist.passes import Pass\nwork = Pass(3, workers=1)\n"
    code += "print(list(work.over('abc', lambda item: work.advance(1))))"
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave, check=True)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert done.stdout == b"[None, None, None]\n"
    assert "3.00/3.00" in shown
    assert "images/s" in shown
