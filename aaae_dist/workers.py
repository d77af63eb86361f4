"""Processes that fetch and decode batches into slots of shared memory, ahead of their use.

A worker is this module, run by the Python at hand. It gets one JSON line a batch, which samples go to which slot, and
answers with one; pixels never pass through a pipe. It ends when its input does, so none outlives its trainer, and
leaves signals to that. (Threads need less code, but with images of 64 x 64 pixels two spend half their time waiting for
each other.)
"""

import errno
import json
import logging
import math
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import UInt8

from aaae_dist.config import Data
from aaae_dist.errors import UserError, one_line, speaker
from aaae_dist.failures import reason
from aaae_dist.fetching import Place
from aaae_dist.reader import Bad, Reader, Told
from aaae_dist.shards import Index
from aaae_dist.stopping import end_with_parent

TRAINERS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
UNANSWERED = 60.0  # seconds, on top of what a store may take, after which a worker that does not answer is given up
AHEAD = 2  # batches that a worker is asked for before the first is taken


class Request(NamedTuple):
    """Samples of one batch: of each of several readers, by its number, the (shard, number) of samples."""

    reads: list[tuple[int, np.ndarray]]
    plans: dict[int, list[int]]  # of readers whose plan is a new one


class Answer(NamedTuple):
    """The pixels of a batch, and what is told of its samples."""

    pixels: UInt8[np.ndarray, "n height width channels"]
    told: Told


def read(readers: Sequence[Reader], request: Request, pixels: np.ndarray) -> Told:
    """Do a request in this process."""
    told, first = [], 0
    for number, places in request.reads:
        told.append(readers[number].read(places, pixels[first : first + len(places)]))
        first += len(places)
    return Told(
        [key for part in told for key in part.keys],
        [label for part in told for label in part.labels],
        sum(part.fetching for part in told),
        sum(part.decoding for part in told),
        told[-1].finished,
    )


def answers(readers: Sequence[Reader], requests: Iterator[Request], *, rows: int, workers: int) -> Iterator[Answer]:
    """What the requests ask for, in their order, done ahead by so many processes; 0: here, when it is asked for.

    Raises:
        UserError: a reader failed, or a worker died.
    """
    shape = (rows, *readers[0].shape)
    for request in requests:
        pixels = np.empty(shape, np.uint8)
        answer = Answer(pixels, read(readers, request, pixels))
        if workers:  # these come to life while the first batch is used, not while it is waited for
            yield from Crew(readers, shape=shape, workers=workers).answers(answer, requests)
            return
        yield answer


class Worker:
    """A process that runs `work`, as its trainer sees it: lines of JSON to it and from it."""

    def __init__(self, memory: int) -> None:
        """Start it.

        Args:
            memory: descriptor that it inherits.

        Raises:
            OSError, RuntimeError: the process, or the thread that talks to it, cannot be started.
        """
        self.messages: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self.said = b""  # what was read and not yet taken
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aaae_dist.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a message is not to wait for the next
            pass_fds=[memory],
            start_new_session=True,
        )
        try:
            threading.Thread(target=self.pass_on, name="workers", daemon=True).start()
        except RuntimeError:
            self.kill()
            self.bury()
            raise

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message, without waiting for the process to listen."""
        self.messages.put(message)

    def pass_on(self) -> None:
        """Write the messages. The process may be long in listening, and a pipe holds little."""
        assert self.process.stdin
        with suppress(OSError), self.process.stdin:  # it may have died, which `line` tells
            while (message := self.messages.get()) is not None:
                line = memoryview(json.dumps(message).encode() + b"\n")
                while line:
                    line = line[self.process.stdin.write(line) :]

    def line(self, limit: float) -> bytes:
        """The next line that it says; empty: it ended.

        Raises:
            TimeoutError: it said nothing for `limit` seconds.
        """
        assert self.process.stdout
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.said:
            if not poll.poll(1000 * limit):
                raise TimeoutError
            if not (part := os.read(self.process.stdout.fileno(), 1 << 16)):
                return b""
            self.said += part
        line, _, self.said = self.said.partition(b"\n")
        return line

    def kill(self) -> None:
        self.process.kill()
        self.messages.put(None)

    def bury(self) -> None:
        """Take leave of it after `kill`."""
        assert self.process.stdout
        self.process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # a disk that hangs may hold it; it ends when that lets go
            self.process.wait(timeout=5)


class Crew:
    """Workers, and the slots of memory that they share with this process."""

    def __init__(self, readers: Sequence[Reader], *, shape: tuple[int, ...], workers: int) -> None:
        self.readers, self.shape = readers, shape
        self.slots = (AHEAD + 1) * workers + 1
        self.free = deque(range(self.slots))
        self.workers: list[Worker] = []
        sets = [
            {"data": r.data.model_dump(), "index": r.index.model_dump(), "split": r.split, "url": r.url}
            for r in readers
        ]
        descriptor = None
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)  # they inherit it
        try:
            descriptor = os.memfd_create("batches")
            os.ftruncate(descriptor, self.slots * math.prod(shape))
            self.memory = mmap.mmap(descriptor, 0)
            for _ in range(workers):
                self.workers.append(Worker(descriptor))
                self.workers[-1].tell({"memory": descriptor, "shape": shape, "sets": sets})
        except (OSError, RuntimeError) as error:  # the latter of threads
            self.dismiss()
            problem = reason(error) if getattr(error, "errno", 0) == errno.EMFILE else f"{one_line(error)}; lower it"
            raise UserError(f"data.workers {workers}: {problem}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
            if descriptor is not None:
                os.close(descriptor)

    def answers(self, first: Answer, requests: Iterator[Request]) -> Iterator[Answer]:
        """An answer that is there already, and after it those of the requests in their order."""
        waiting: deque[tuple[Worker, int]] = deque()
        turns = cycle(self.workers)

        def ask_ahead() -> None:
            while len(waiting) < AHEAD * len(self.workers) and self.free:
                worker, request, slot = next(turns), next(requests), self.free.popleft()
                for other in self.workers if request.plans else ():
                    other.tell({"plans": request.plans})
                worker.tell({"slot": slot, "reads": [(n, places.tobytes().hex()) for n, places in request.reads]})
                waiting.append((worker, slot))

        try:
            ask_ahead()
            yield first
            while True:
                ask_ahead()
                yield self.take(*waiting.popleft())
        finally:
            self.dismiss()

    def take(self, worker: Worker, slot: int) -> Answer:
        """A worker's next answer. Its slot is used again when nobody holds the pixels any more."""
        limit = max(reader.data.patience for reader in self.readers) + UNANSWERED
        try:
            line = worker.line(limit)
        except TimeoutError:
            raise UserError(
                f"data.workers {len(self.workers)}: process {worker.process.pid} has not answered for {limit:.0f} s; "
                "see what holds it, such as a disk that hangs, and give the same command again"
            ) from None
        if not line:
            code = worker.process.wait()
            remedy = "; lower it, or training.batch_size, if memory was short" if code < 0 else "; see what it said"
            raise UserError(f"data.workers {len(self.workers)}: a worker ended ({code}){remedy}")
        answer = json.loads(line)
        for number, shard, index, bad in answer["bad"]:
            self.readers[number].meet((shard, index), Bad(*bad))
        if answer["error"]:
            raise UserError(answer["error"])
        count, start = math.prod(self.shape), slot * math.prod(self.shape)
        pixels = np.frombuffer(self.memory, np.uint8, count, start).reshape(self.shape)
        if len(self.free) < len(self.workers):  # someone keeps many batches: let this one be a copy
            pixels = pixels.copy()
            self.free.append(slot)
        else:
            weakref.finalize(pixels, self.free.append, slot)
        return Answer(pixels, Told(*answer["told"]))

    def dismiss(self) -> None:
        """End all workers, all of them asked before the first is waited for."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.bury()


def listen(messages: SimpleQueue[str]) -> None:
    """Hand on what the trainer says. When it is gone, so is this process, even amid a fetch from a failing store."""
    for line in sys.stdin:
        messages.put(line)
    os._exit(0)


def work() -> NoReturn:
    """The life of a worker. It ends with the thread that started it, even if it is stopped."""
    end_with_parent(signal.SIGKILL)
    logging.basicConfig(stream=sys.stderr, format=f"{speaker()} data worker: %(message)s", level=logging.WARNING)
    logging.getLogger("aaae_dist.reader").setLevel(logging.ERROR)  # bad samples are told of in the answers
    setup = json.loads(sys.stdin.readline())
    slots = np.frombuffer(mmap.mmap(setup["memory"], 0), np.uint8).reshape(-1, *setup["shape"])
    readers = [
        Reader(Data(**each["data"]), split=each["split"], url=each["url"], index=Index(**each["index"]))
        for each in setup["sets"]
    ]
    met: list[set[Place]] = [set() for _ in readers]
    messages: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=listen, args=[messages], daemon=True).start()
    while True:
        message = json.loads(messages.get())
        if "plans" in message:
            for number, shards in message["plans"].items():
                readers[int(number)].fetcher.let_go(shards)
            continue
        reads = [(n, np.frombuffer(bytes.fromhex(places), np.int64).reshape(-1, 2)) for n, places in message["reads"]]
        request = Request(reads, {})
        told, error = None, ""
        try:
            told = read(readers, request, slots[message["slot"]])
        except UserError as problem:
            error = str(problem)
        bad = [
            (n, *place, reader.bad[place])
            for n, reader in enumerate(readers)
            for place in reader.bad
            if place not in met[n]
        ]
        for number, shard, index, _ in bad:
            met[number].add((shard, index))
        try:
            print(json.dumps({"told": told, "bad": bad, "error": error}), flush=True)
        except BrokenPipeError:  # the trainer is gone
            os._exit(0)


if __name__ == "__main__":
    work()
