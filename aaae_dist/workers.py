"""Processes that fetch and decode batches into slots of shared memory, ahead of their use.

A worker is this module, run by the Python at hand. It gets one JSON line a batch, which samples go to which slot, and
answers with one; pixels never pass through a pipe. It ends when its input does, so none outlives its trainer, and
leaves signals to that. (Threads need less code, but with images of 64 x 64 pixels two spend half their time waiting for
each other.)
"""

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
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import cycle
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import UInt8

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.errors import UserError
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


class Crew:
    """Worker processes and the slots of memory that they share with this one."""

    def __init__(self, readers: Sequence[Reader], *, shape: tuple[int, ...], workers: int) -> None:
        self.readers, self.shape = readers, shape
        self.slots = (AHEAD + 1) * workers + 1
        self.free = deque(range(self.slots))
        descriptor = os.memfd_create("batches")
        os.ftruncate(descriptor, self.slots * math.prod(shape))
        self.memory = mmap.mmap(descriptor, 0)
        setup = {
            "memory": descriptor,
            "shape": shape,
            "sets": [
                {"data": r.data.model_dump(), "index": r.index.model_dump(), "split": r.split, "url": r.url}
                for r in readers
            ],
        }
        line = [sys.executable, "-m", "aaae_dist.workers"]
        self.workers: list[subprocess.Popen[bytes]] = []
        self.told: defaultdict[int, SimpleQueue[dict[str, Any] | None]] = defaultdict(SimpleQueue)  # by process
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)  # they inherit it
        try:
            for _ in range(workers):
                self.workers.append(
                    subprocess.Popen(
                        line,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        bufsize=0,  # no buffer, no lock: `dismiss` must not wait for a thread that is amid a message
                        pass_fds=[descriptor],
                        start_new_session=True,
                    )
                )
        except OSError as error:
            self.dismiss()
            raise UserError(f"data.workers {workers}: {storage.one_line(error)}; lower it") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
            os.close(descriptor)
        self.said = {worker.pid: b"" for worker in self.workers}  # what was read and not yet taken
        for worker in self.workers:
            self.told[worker.pid].put(setup)
            threading.Thread(target=self.tell, args=[worker], name="workers", daemon=True).start()

    def answers(self, first: Answer, requests: Iterator[Request]) -> Iterator[Answer]:
        """An answer that is there already, and after it those of the requests in their order."""
        waiting: deque[tuple[subprocess.Popen[bytes], int]] = deque()
        turns = cycle(self.workers)
        try:
            following: Answer | None = first
            while True:
                while len(waiting) < AHEAD * len(self.workers) and self.free:
                    worker, request, slot = next(turns), next(requests), self.free.popleft()
                    for other in self.workers if request.plans else ():
                        self.told[other.pid].put({"plans": request.plans})
                    reads = [(n, places.tobytes().hex()) for n, places in request.reads]
                    self.told[worker.pid].put({"slot": slot, "reads": reads})
                    waiting.append((worker, slot))
                yield following or self.take(*waiting.popleft())
                following = None
        finally:
            self.dismiss()

    def take(self, worker: subprocess.Popen[bytes], slot: int) -> Answer:
        """A worker's next answer. Its slot is used again when nobody holds the pixels any more."""
        line = self.line(worker)
        if not line:
            code = worker.wait()
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

    def line(self, worker: subprocess.Popen[bytes]) -> bytes:
        """The next line of a worker; empty: it ended."""
        assert worker.stdout
        said, limit = self.said[worker.pid], max(reader.data.patience for reader in self.readers) + UNANSWERED
        poll = select.poll()
        poll.register(worker.stdout, select.POLLIN)
        while b"\n" not in said:
            if not poll.poll(1000 * limit):
                raise UserError(
                    f"data.workers {len(self.workers)}: process {worker.pid} has not answered for {limit:.0f} s; see "
                    "what holds it, such as a disk that hangs, and give the same command again"
                )
            if not (part := os.read(worker.stdout.fileno(), 1 << 16)):
                return b""
            said += part
        line, _, self.said[worker.pid] = said.partition(b"\n")
        return bytes(line)

    def tell(self, worker: subprocess.Popen[bytes]) -> None:
        """Pass on what a worker is to be told. It may be long in listening, and a pipe holds little."""
        assert worker.stdin
        with suppress(OSError, ValueError):  # it died, which `take` tells, or was dismissed
            while (message := self.told[worker.pid].get()) is not None:
                line = memoryview(json.dumps(message).encode() + b"\n")
                while line:
                    line = line[worker.stdin.write(line) :]

    def dismiss(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.kill()
            self.told[worker.pid].put(None)
        for worker in self.workers:
            assert worker.stdin
            assert worker.stdout
            worker.stdin.close()
            worker.stdout.close()
            with suppress(subprocess.TimeoutExpired):  # a disk that hangs may hold it; it ends when that lets go
                worker.wait(timeout=5)


def listen(messages: SimpleQueue[str]) -> None:
    """Hand on what the trainer says. When it is gone, so is this process, even amid a fetch from a failing store."""
    for line in sys.stdin:
        messages.put(line)
    os._exit(0)


def work() -> NoReturn:
    """The life of a worker. It ends with the thread that started it, even if it is stopped."""
    end_with_parent(signal.SIGKILL)
    rank = f" rank {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""  # as `cli.main` names it
    logging.basicConfig(stream=sys.stderr, format=f"aaae{rank} data worker: %(message)s", level=logging.WARNING)
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
