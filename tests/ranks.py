"""Ranks that start in tenths of a second, forked from a process that has imported everything, and that can be killed at
any file operation.

Run as a program, this is that process. A line of its input is an Order or the id of a rank that has ended; it answers
with a line, the ids of the ranks it started, or how that one ended. At the end of its input it ends the ranks that are
left, and itself.
"""

import gc
import json
import math
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import s3fs
from forks import Hold, Order

from aaae_dist import watch
from aaae_dist.cli import main
from aaae_dist.saving import Saver
from aaae_dist.training import Trainer


class Witness:
    """Tells what a rank does, as it does it, and holds it where that is wanted."""

    def __init__(self, rank: int, order: Order, *, run: str, pipe: int) -> None:
        self.rank, self.hold, self.spoiled, self.run, self.pipe = rank, order.holds[rank], order.spoiled, run, pipe
        self.begun, self.met = self.hold is not None and self.hold.after == 0, 0

    def tell(self, what: str) -> None:
        os.write(self.pipe, f"{self.rank} {what}\n".encode())

    def operation(self, kind: str, what: str) -> None:
        """About to write or remove something."""
        if self.begun and kind == self.hold.kind and self.hold.what in what:
            self.met += 1
            if self.met == self.hold.number:
                self.tell(f"hold {what}")
                threading.Event().wait()

    def watch_steps(self) -> None:
        step = Trainer.step

        def watched(trainer: Trainer, batch: object) -> None:
            self.begun = self.begun or (self.hold is not None and trainer.state.images >= self.hold.after)
            self.tell(f"step {trainer.state.images}")
            bad = trainer.state.images in self.spoiled and not trainer.state.rollbacks
            hook = trainer.game.decoder.register_forward_hook(lambda *given: given[-1] * math.nan) if bad else None
            step(trainer, batch)
            if hook:
                hook.remove()

        Trainer.step = watched

    def watch_disk(self) -> None:
        """See what Python asks of the operating system, before it does: a file is written aside, and then renamed."""

        def audit(event: str, arguments: tuple) -> None:
            if event not in ("open", "os.rename", "os.remove", "os.rmdir") or not isinstance(arguments[0], str | Path):
                return
            path = Path(arguments[0])
            if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:
                path = Path(f"/proc/self/fd/{arguments[1]}").readlink() / path
            if not path.is_relative_to(self.run) or (event == "open" and not arguments[2] & os.O_ACCMODE):
                return
            writes = event in ("open", "os.rename") or path.suffix == ".partial"
            self.operation("write" if writes else "remove", f"{event} {path}")

        sys.addaudithook(audit)

    def watch_s3(self) -> None:
        """See every request, before it is made."""
        call = s3fs.S3FileSystem._call_s3

        async def watched(store: s3fs.S3FileSystem, method: str, *arguments: dict, **more: object) -> object:
            for word, kind in (("put", "write"), ("delete", "remove")):
                if word in method:
                    self.operation(kind, f"{method} {more.get('Key', more.get('Delete'))}")
            return await call(store, method, *arguments, **more)

        s3fs.S3FileSystem._call_s3 = watched


def watch_and_hurry(rank: int, order: Order, pipe: int) -> None:
    """Tell of a training, for the ranks that are killed, and for those that then wait for them in vain."""
    (run,) = (argument.removeprefix("training.run=") for argument in order.arguments if "training.run=" in argument)
    witness = Witness(rank, order, run=run, pipe=pipe)
    witness.watch_steps()
    witness.watch_s3() if run.startswith("s3://") else witness.watch_disk()
    Saver.close.__kwdefaults__["seconds"] = 1.0  # not three, for what a rank that was killed will never save
    watch.SIGN = 0.1  # nor two seconds for the word of such a rank


def be_rank(rank: int, order: Order, pipe: int) -> NoReturn:
    """Run the command in this process, as a launcher would have it run."""
    os.environ.clear()
    os.environ.update(order.variables[rank])
    out, said = (os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for file in (order.out, order.said))
    for stream, to in enumerate((os.open(os.devnull, os.O_RDONLY), out, said)):
        os.dup2(to, stream)
    if order.holds:
        watch_and_hurry(rank, order, pipe)
    code = 1
    try:
        if order.script:
            sys.argv = [order.script, *order.arguments]
            runpy.run_path(order.script, run_name="__main__")
        else:
            main(order.arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:  # never back to where it was forked
        os._exit(code)


def start(order: Order) -> list[int]:
    pipe, ranks = os.open(order.told, os.O_WRONLY), []
    for rank in range(len(order.variables)):
        if (pid := os.fork()) == 0:
            be_rank(rank, order, pipe)
        ranks.append(pid)
    os.close(pipe)
    return ranks


def serve() -> None:
    living: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            answer: object = os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
            living.remove(asked)
        else:
            order = Order(**asked)
            answer = start(order._replace(holds=[hold and Hold(*hold) for hold in order.holds]))
            living.update(answer)
        print(json.dumps(answer), flush=True)
    for pid in living:  # after a failure, or when the tests were killed
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    import deepspeed.runtime.zero.muon.muon_optimizer  # with it comes all that trainings import late

    assert deepspeed.ops.__compatible_ops__  # looked for here, once
    assert threading.active_count() == 1, "a fork takes one thread along"
    gc.freeze()  # what is collected no more stays shared with the forks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, at whose end the input ends
    serve()
