"""Saving beside the training: the steps are held for a copy of this rank's state, and a thread does the rest."""

import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from aaae_dist import checkpoint, storage
from aaae_dist.checkpoint import Manifest, Part
from aaae_dist.config import Checkpoint
from aaae_dist.errors import UserError
from aaae_dist.pieces import Piece, Pieces

LOOK = 0.1  # seconds between two looks whether another rank is done
SLOW = 50e6  # bytes per second that a store takes, where nothing was saved yet


class Saver:
    """Saves checkpoints of a run, one at a time, from one rank. No collectives: ranks leave word in the store."""

    def __init__(self, run: str, settings: Checkpoint, *, rank: int, attempt: str) -> None:
        """Nothing is under way.

        Args:
            settings: say which checkpoints stay.
            attempt: a word that all ranks of this training share, and no other training of the run.
        """
        self.run, self.settings, self.rank, self.attempt = run, settings, rank, attempt
        self.began = time.monotonic()  # the one under way, or the last one
        self.guess = 0.0  # seconds that one takes, before any was saved
        self.took = 0.0  # seconds, the last one, or the one that the run goes on from; 0: not known yet
        self.copies: dict[str, Tensor] = {}  # on the host; used again, as fresh memory costs more than copying to it
        self.name, self.published = "", False
        self.threads: list[threading.Thread] = []  # one that saves this rank's part; on rank 0 another that publishes
        self.failure: BaseException | None = None
        self.given_up = threading.Event()

    def begin(self, name: str, pieces: Pieces, manifest: Manifest) -> None:
        """Copy these pieces, and save them from now on. The one before must have been waited for.

        Args:
            manifest: of rank 0, without what the parts will tell.
        """
        self.name, self.began, self.published = name, time.monotonic(), False
        held = {tensor: self.copy(tensor, piece) for tensor, piece in pieces.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.start(lambda: checkpoint.save_part(self.place, held, rank=self.rank, attempt=self.attempt))
        if self.rank == 0:
            self.start(lambda: self.publish(manifest))

    def reserve(self, pieces: Pieces) -> None:
        """Take the memory for copies of these pieces now: taken at the first save, it would hold that."""
        for tensor, piece in pieces.items():
            self.copy(tensor, piece)
        self.guess = sum(copy.nbytes for copy in self.copies.values()) / SLOW

    @property
    def place(self) -> str:
        return storage.join(checkpoint.folder(self.run), self.name)

    def copy(self, tensor: str, piece: Piece) -> Piece:
        """A piece on the host."""
        copied = {}
        for state, values in piece.values.items():
            key = f"{state}/{tensor}"
            if key not in self.copies:
                self.copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            copied[state] = self.copies[key].copy_(values, non_blocking=True)
        return piece._replace(values=copied)

    def expected(self) -> float:
        """Seconds that a save takes: as the last one, or a guess."""
        return self.took or self.guess

    def start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self.failure = error

        self.threads.append(threading.Thread(target=guarded, name="checkpoint", daemon=True))
        self.threads[-1].start()

    def publish(self, manifest: Manifest) -> None:
        """Wait for the parts of all ranks, and make a checkpoint of them."""
        parts: list[Part] = []
        while len(parts) < manifest.world:
            if part := checkpoint.saved_part(self.place, rank=len(parts), attempt=self.attempt):
                parts.append(part)
            elif self.given_up.wait(LOOK):
                return
        checkpoint.publish(self.place, manifest, parts)
        self.published, self.took = True, time.monotonic() - self.began
        chosen = self.settings
        checkpoint.prune(self.run, keep=chosen.keep, keep_every=chosen.keep_every, best=chosen.best)

    def is_due(self) -> bool:
        """Whether the last one was begun longer ago than it may be. (One rank decides: clocks differ.)"""
        minutes = self.settings.minutes
        return self.rank == 0 and 0 < minutes < (time.monotonic() - self.began) / 60

    def problem(self) -> str:
        """What went wrong with the checkpoint under way, so far."""
        if self.failure is not None and not isinstance(self.failure, UserError):
            raise self.failure
        if self.failure is None:
            return ""
        what = "is there, but older ones could not be removed" if self.published else "could not be saved"
        return f"the checkpoint after {int(self.name):,} images {what}: {self.failure}"

    def wait(self, seconds: float) -> bool:
        """Whether the checkpoint is there, as far as this rank sees to it; waits for so long at most."""
        until = time.monotonic() + seconds
        for thread in self.threads:
            thread.join(max(until - time.monotonic(), 0.0))
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        return not self.threads

    def close(self, *, seconds: float = 3.0) -> None:
        """Leave; what is under way, as it is only where training failed, gets so long to end."""
        self.wait(seconds)
        self.given_up.set()
