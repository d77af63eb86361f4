"""Ranks watch each other: one that is gone brings all down, with its reason, whatever these are waiting for.

Collectives tell late or never: NCCL's wait for `training.patience`, and a rank that reads or saves is in none. So a
thread of each rank gives a sign of life every second at the launcher's store, and looks there for the next rank's and
for word of a failure: a few small requests, however many ranks there are.
"""

import math
import os
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from aaae_dist.distributed import LOST_PEER, launched_rank, launched_world
from aaae_dist.errors import UserError, speaker, tell
from aaae_dist.stopping import StopRequest

SIGN = 1.0  # seconds between two signs of life
AWAY = 3 * SIGN  # seconds after which this rank, not the next, was not there: stopped, as all are by a suspended job
BROKEN = 3 * SIGN  # seconds without one that are enough where a collective has failed
GRACE = 6.0  # seconds that a rank gets to end in order when another has failed
FAILED, LEFT = "failed", b"left"


class Watch:
    """While its `with` block lasts, this rank watches and is watched; alone it does nothing."""

    def __init__(self, run: str, *, stop: StopRequest, patience: float) -> None:
        """Nothing is watched yet.

        Args:
            stop: a rank that was asked to stop does so without the launcher's store, which may end before it. One
                that fails has told the others by the time that it has ended its own affairs.
            patience: seconds within which that store must be found, and all ranks be at work.
        """
        self.run, self.stop, self.patience = run, stop, patience
        self.most = patience  # seconds for which this rank may give no sign of life, and the store no answer
        self.broken = False  # whether a collective has failed here
        self.rank, self.next = str(launched_rank()), str((launched_rank() + 1) % launched_world())
        self.ended, self.told, self.news = threading.Event(), threading.Event(), threading.Event()
        self.reason = ""  # why another rank failed, or seems to be gone
        self.losing = threading.Lock()
        self.answered = 0.0  # when the store did so last
        self.thread = threading.Thread(target=self.watch, name="watch", daemon=True)
        self.overseer = threading.Thread(target=self.oversee, name="overseer", daemon=True)

    def __enter__(self) -> "Watch":
        if launched_world() > 1:
            self.answered = time.monotonic()
            self.thread.start()
            self.overseer.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.stop.fail(error)
        self.ended.set()
        self.news.set()
        if self.thread.is_alive():
            self.thread.join(GRACE)  # in which it tells the others

    def at_work(self, silence: float) -> None:
        """From now on no more than so many seconds are to pass without a sign of life from this rank."""
        self.most = silence
        self.news.set()

    def lost_peer(self) -> UserError:
        """What this rank ends with when a collective has failed, with the reason if it comes soon."""
        self.broken = True
        known = self.told.wait(BROKEN + 2 * SIGN)
        because = f" ({self.reason})" if known else ", as its own message says; if it has none, look at the network"
        return UserError(f"{self.run}: {LOST_PEER}{because}; the same command again goes on from the last checkpoint")

    def watch(self) -> None:
        """The thread: until the block ends, or another rank has."""
        try:
            store = launchers_store(self.patience)
        except dist.DistError:
            return  # the engine needs it too, and tells
        try:
            while not self.look(store) and self.stop.signal is None:
                store = launchers_store(self.most)  # a connection may break, and be made anew
        except dist.DistError:
            if self.stop.signal is None:
                self.lose_store()

    def oversee(self) -> None:
        """Another thread: give the launcher's store up when it has not answered for too long.

        Where packets are lost without a word, a request to it returns after a quarter of an hour.
        """
        looked = time.monotonic()
        while not (self.ended.wait(SIGN) or self.told.is_set()) and self.thread.is_alive():
            now = time.monotonic()
            if now - looked > AWAY:
                self.answered = now
            if now - self.answered > (self.most if self.stop.signal is None else self.patience):
                self.lose_store()
                return
            looked = now

    def lose_store(self) -> None:
        self.lose(f"the launcher's store at {os.environ['MASTER_ADDR']} does not answer; is the network up?")

    def lose(self, reason: str) -> None:
        """Bring this process down for a reason, unless that is under way for another."""
        with self.losing:
            if self.told.is_set():
                return
            self.reason = reason
            self.told.set()
        self.bring_down()

    def look(self, store: dist.Store) -> bool:
        """Give signs of life, and look for those of the next rank, until the block ends, or another rank has.

        Returns:
            False: the connection broke before.
        """
        try:
            self.give_and_take(store)
        except dist.DistError:
            return self.ended.wait(SIGN) and not self.stop.failure  # which the others have not been told yet
        return True

    def give_and_take(self, store: dist.Store) -> None:
        seen, since, most = b"", time.monotonic(), self.patience
        looked = since
        while not (self.ended.is_set() or self.stop.failure):
            if time.monotonic() - looked > AWAY:
                since = time.monotonic()
            looked = time.monotonic()
            store.set(self.rank, f"{time.monotonic()} {self.most}")
            sign = store.get(self.next) if store.check([self.next]) else b""
            if sign != seen:
                seen, since = sign, time.monotonic()
                most = math.inf if sign == LEFT else float(sign.split()[1])
            elif time.monotonic() - since > (allowed := BROKEN if self.broken and sign != LEFT else most):
                setting = "patience" if most == self.patience else "silence"
                because = f"see training.{setting}" if allowed == most else "and a connection is broken"
                store.compare_set(FAILED, "", f"rank {self.next}: no sign of life for {allowed:.0f} s, {because}")
            if store.check([FAILED]):
                self.lose(store.get(FAILED).decode())
                return
            self.answered = time.monotonic()
            self.news.wait(SIGN)
            self.news.clear()
        if self.stop.failure:
            store.compare_set(FAILED, "", f"rank {self.rank}: {self.stop.failure}")  # the first reason is kept
        else:
            store.set(self.rank, LEFT.decode())

    def bring_down(self) -> None:
        """End this process, if it does not end by itself."""
        if not self.ended.wait(GRACE):
            tell(f"{speaker()}: {self.lost_peer()}")
            os._exit(2)


def launchers_store(patience: float) -> dist.Store:
    """Where the ranks of this attempt meet, found within so many seconds."""
    place, limit = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timedelta(seconds=patience)
    store = dist.TCPStore(*place, is_master=False, timeout=limit)
    # A launcher that starts failed ranks again (--max_restarts) keeps its store, and the word of the failure in it.
    return dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
