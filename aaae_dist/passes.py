"""A long pass over many things: by threads, results in order, and how far it is."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

from aaae_dist.progress import duration

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

INTERVAL = 30.0  # seconds between two lines


class Pass:
    """Over so many images, with so many threads: a bar on a terminal, elsewhere a line now and then, on stderr.

    Safe to use from several threads.
    """

    def __init__(self, total: int, *, workers: int, unit: str = "images") -> None:
        self.total, self.unit, self.workers = total, unit, workers
        self.skipped = self.done = self.bytes = 0
        self.began = self.told = time.monotonic()
        self.lock, self.ended = threading.Lock(), False
        self.bar = tqdm(total=total, unit=f" {unit}", unit_scale=True, dynamic_ncols=True, disable=None)

    def over(self, items: Iterable[Item], call: Callable[[Item], Result]) -> Generator[Result]:
        """Results of `call` in the order of the items; few items at a time are taken up, whatever their number.

        The first exception ends it: what had been taken up by then is given up at its next `advance`.
        """
        left = iter(items)
        pool = ThreadPoolExecutor(self.workers)
        try:
            waiting = deque(pool.submit(call, item) for item in islice(left, 2 * self.workers))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(call, item) for item in islice(left, 1))
        finally:
            self.ended = True
            pool.shutdown(cancel_futures=True)
            self.bar.close()

    def skip(self, count: int) -> None:
        """So many need nothing more: an earlier attempt did them."""
        with self.lock:
            self.skipped += count
            self.bar.update(count)

    def advance(self, size: int) -> None:
        """One more is done, of so many bytes."""
        if self.ended:
            raise InterruptedError("the pass has ended")
        with self.lock:
            self.done, self.bytes = self.done + 1, self.bytes + size
            self.bar.update(1)
            now = time.monotonic()
            if now - self.told < (INTERVAL if self.bar.disable else 1):
                return
            self.told, spent = now, now - self.began
            speed = f"{self.bytes / spent / 1e6:.1f} MB/s"
            if not self.bar.disable:
                self.bar.set_postfix_str(speed, refresh=False)
                return
            finished = self.skipped + self.done
            log.info(
                "%s of %s %s (%.0f %%), %.4g %s/s, %s, %s left",
                f"{finished:,}",
                f"{self.total:,}",
                self.unit,
                100 * finished / self.total,
                self.done / spent,
                self.unit,
                speed,
                duration((self.total - finished) * spent / self.done),
            )
