"""Supervision: each rank that a launcher starts sees to one process at a time, a training on that rank.

Supervisors train nothing themselves. They talk through the launcher's store, for a process group would not outlive the
deaths of processes that they are there for; the processes meet at a store that rank 0's supervisor opens for each
training, on a port that is free.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import IO, Any

import torch.distributed as dist

from aaae_dist import distributed
from aaae_dist.errors import UserError, one_line, tell
from aaae_dist.stopping import StopRequest

LOOK = 0.1  # seconds between two looks at a process, or for the others' words
GRACE = 5.0  # seconds that the other ranks get to end by themselves when one has failed
LIMIT = 600.0  # seconds that a training may take, its start included
NEAR = 60.0  # seconds that ranks wait for one that has nothing to do but to come

OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_")  # how variables begin that tell of engines


class EndedError(Exception):
    """A training did not end as it should; the text says how it did."""


class Supervisor:
    """One rank's: what it says to the others, and the process that it starts."""

    def __init__(self, stop: StopRequest) -> None:
        """Meet at the launcher's store, if there is a launcher.

        Args:
            stop: whether this rank is asked to end; all ranks do then.
        """
        self.stop, self.world, self.rank = stop, distributed.launched_world(), distributed.launched_rank()
        self.launched = "RANK" in os.environ
        store = next(dist.rendezvous("env://", timeout=timedelta(seconds=LIMIT)))[0] if self.launched else None
        self.store = dist.PrefixStore("selftest", store or dist.HashStore())
        self.talks = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done by all ranks, or ended on all of them: one that fails, or is asked to stop, tells the others."""
        try:
            yield
        except BaseException as error:
            with suppress(dist.DistError):
                self.store.set("failed", f"rank {self.rank}: {one_line(error)}")
            if isinstance(error, dist.DistError):
                raise UserError(
                    f"{distributed.LOST_PEER}, and the ranks' store with it; see what it said last"
                ) from error
            raise
        finally:
            self.leave()

    def leave(self) -> None:
        """Go; rank 0, which may be the host of the store, goes last."""
        with suppress(dist.DistError):
            self.store.set(f"left/{self.rank}", "")
            until, all_left = time.monotonic() + GRACE, [f"left/{rank}" for rank in range(self.world)]
            while self.rank == 0 and not self.store.check(all_left) and time.monotonic() < until:
                time.sleep(LOOK)

    def gather(self, value: Any, *, seconds: float = NEAR) -> list[Any]:
        """Every rank's value (of JSON), by rank, on every rank. All ranks must call it.

        Raises:
            UserError: a rank failed, was asked to stop, or did not come within so many seconds.
        """
        self.talks += 1
        words = [f"{self.talks}/{rank}" for rank in range(self.world)]
        self.store.set(words[self.rank], json.dumps(value))
        until = time.monotonic() + seconds
        while not self.store.check(words):
            self.look()
            if time.monotonic() > until:
                silent = [str(rank) for rank, word in enumerate(words) if not self.store.check([word])]
                raise UserError(f"rank {', '.join(silent)}: not heard of for {seconds:.0f} s; look at its node")
            time.sleep(LOOK)
        return [json.loads(self.store.get(word)) for word in words]

    def from_rank_0(self, work: Callable[[], Any]) -> Any:
        """What rank 0 makes of it (JSON), on every rank. All ranks must call it."""
        return self.gather(work() if self.rank == 0 else None, seconds=LIMIT)[0]

    def look(self) -> None:
        """Raise what ends the test on all ranks, if anything does."""
        if self.stop.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop.signal:
            raise UserError(f"the selftest was ended by {self.stop.signal.name}; begin it anew")
        if self.store.check(["failed"]):
            raise UserError(f"the selftest ends with another rank: {self.store.get('failed').decode()}")

    def train(self, *settings: str, alone: bool = False, until: Callable[[], bool] | None = None) -> None:
        """Train on all ranks, and see to it that no process is left. All ranks must call it.

        Args:
            alone: on rank 0 only, as one process without an engine.
            until: looked at on rank 0: when it says so, the processes of all ranks are killed.

        Raises:
            EndedError: a process failed, or took longer than it may.
        """
        server = None
        if self.launched and self.rank == 0 and not alone:
            server = dist.TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True)
        port, problem = self.gather(server.port if server else 0)[0], ""
        if not alone or self.rank == 0:
            with tempfile.TemporaryFile() as said:
                line, there = [sys.executable, "-m", "aaae_dist", "train", *settings], environment(port, alone=alone)
                process = subprocess.Popen(line, env=there, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
                try:
                    problem = self.see_to(process, until=until)
                finally:
                    process.kill()
                    process.wait()
                problem = problem and f"{problem}: {last_words(said)}"
        found = self.gather(problem, seconds=LIMIT + NEAR)  # rank 0 may be at work alone
        problems = [f"rank {rank} {what}" for rank, what in enumerate(found) if what]
        if problems:  # the cause, not its consequences
            raise EndedError(min(problems, key=lambda problem: distributed.LOST_PEER in problem))

    def see_to(self, process: subprocess.Popen, *, until: Callable[[], bool] | None) -> str:
        """Wait for a process to end, or until it is to be killed; what was wrong with that, if anything."""
        began, failed, kill = time.monotonic(), f"failed/{self.talks}", f"kill/{self.talks}"
        while process.poll() is None and not self.store.check([failed]):
            self.look()
            if until and self.rank == 0 and until():
                self.store.set(kill, "")  # and only then is one killed, so that all know what the others die of
            if until and self.store.check([kill]):
                return ""
            if time.monotonic() - began > LIMIT:
                self.store.set(failed, "")
                return f"was not done after {LIMIT:.0f} s"
            time.sleep(LOOK)
        if until and self.store.check([kill]):
            return ""
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        code = process.returncode
        if code is None or (code == 0 and not until):
            return ""
        self.store.set(failed, "")
        return f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def environment(port: int, *, alone: bool) -> dict[str, str]:
    """Of a training process: the rank's own but for the store's port, or that of one process without an engine.

    NVIDIA's libraries are kept from TF32, so that float32 is what is compared.
    """
    there = os.environ | {"NVIDIA_TF32_OVERRIDE": "0"}
    if alone:
        kept = there.keys() - OF_RANKS
        return {name: there[name] for name in kept if not name.startswith(OF_LAUNCHERS)}
    return there | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"} if port else there


def last_words(said: IO[bytes]) -> str:
    """Why a process ended, of all that it said; the end of that is passed on to stderr, unless it tells of others."""
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines() or ["it said nothing"]
    speakers = r"\[rank\d+\]: |aaae( rank \d+)?: "  # in torch's tracebacks, and ours
    telling = [line for line in lines if re.match(rf"aaae|({speakers})?[\w.]+(Error|Exception|Exit)\b", line)]
    last = (telling or lines)[-1]
    if distributed.LOST_PEER not in last:
        tell("\n".join(lines[-40:]))
    return re.sub(f"^({speakers})", "", last)
