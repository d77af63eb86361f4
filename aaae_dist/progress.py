"""How far a long piece of work is: a bar on a terminal, plain lines with the time left elsewhere. Always on stderr."""

import logging
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

log = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def counted(number: int, what: str) -> str:
    """So many of something."""
    return f"{number:,} {what}" + "s" * (number != 1)


class Progress:
    """Of a training, counted in images."""

    def __init__(self, total: int, done: int, *, visible: bool) -> None:
        self.total, self.first, self.began, self.visible = total, done, time.monotonic(), visible
        self.bar = (
            tqdm(total=total, initial=done, unit=" images", unit_scale=True, dynamic_ncols=True)
            if visible and sys.stderr.isatty()
            else None
        )

    def advance(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images - self.bar.n)

    def go_back(self, images: int) -> None:
        """Go on from so many images, fewer than before."""
        self.first, self.began = images, time.monotonic()
        self.advance(images)

    def say(self, images: int, metrics: Mapping[str, float]) -> None:
        """Some figures of the last interval: behind the bar, or as a line."""
        figures = {
            name.replace("reconstruction/", "").replace("speed/", ""): f"{value:.4g}" for name, value in metrics.items()
        }
        if self.bar is not None:
            self.bar.set_postfix(figures)
        elif self.visible:
            left = (self.total - images) * (time.monotonic() - self.began) / max(images - self.first, 1)
            log.info(
                "%s of %s images (%.0f %%), %s left, %s",
                f"{images:,}",
                f"{self.total:,}",
                100 * images / self.total,
                duration(left),
                ", ".join(f"{k} {v}" for k, v in figures.items()),
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
