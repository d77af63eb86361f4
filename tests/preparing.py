"""Preparations in a process of their own, to be killed. Only what they need is imported, for many are started."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from aaae_dist import storage
from aaae_dist.preparation import Recipe, prepare
from aaae_dist.sources import Source


def noted(count: int, log: Path | None, hold: int) -> Source:
    """Images of random bytes, the reading of which is noted in a file; two cannot be read, one of them takes for ever.

    Args:
        hold: which one, by the order in which they are read; negative: none.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    reads = iter(range(10**6))

    def read(i: int) -> np.ndarray:
        if log:
            with log.open("a") as file:
                file.write(f"{i}\n")
        if next(reads) == hold:
            time.sleep(600)
        if i in (3, 5):
            raise ValueError("broken")
        return pixels[i]

    return Source([f"{i:03d}" for i in range(count)], read, size=8, channels=3)


def work(out: str, count: int, log: Path | None = None, hold: int = -1) -> None:
    recipe = Recipe(3, crop=0, size=8, format="png", quality=0)
    numbers = {"held_out": 0.2, "samples_per_shard": 5, "seed": 0, "bad_share": 0.1, "workers": 2}
    prepare(noted(count, log, hold), recipe, name="noted", origin="test", out=out, **numbers)


def be_killed(out: str, count: int, log: Path, write: int, hold: int) -> None:
    """Prepare; die before write 0 of a file, after it (1), before the next (2) and so on; negative: at none."""
    writes, store, remove = iter(range(10**6)), storage.write, storage.remove

    def die(at: int) -> None:
        if at == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(action):
        def act(*arguments) -> None:
            number = next(writes)
            die(2 * number)
            action(*arguments)
            die(2 * number + 1)

        return act

    storage.write, storage.remove = counted(store), counted(remove)
    work(out, count, log, hold)
