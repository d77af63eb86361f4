"""Trainings whose ranks start in tenths of a second, forked from a process that has imported everything.

The variables that a launcher gives ranks are a real one's, asked for once for each engine and number of ranks. How it
starts them, and what it makes of their ends, is for tests that go through it.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import TCPStore
from training_runs import ROOT, environment, train

DUMP = """
import json, os, sys
from pathlib import Path
Path(sys.argv[-1], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(dict(os.environ)))
"""


class Hold(NamedTuple):
    """Stop for ever before a file operation, to be killed there."""

    kind: str  # "write" or "remove"
    after: int  # images trained; 0: from the start
    number: int  # of the operations of that kind from then on, counted from 1
    what: str = ""  # on files with this in their names


class Order(NamedTuple):
    """Start the ranks of a training."""

    arguments: list[str]  # of the command `aaae`
    script: str  # a program that runs instead of it; empty: none
    variables: list[dict[str, str]]  # the whole environment of each rank
    holds: list[Hold | None]  # of each rank, where ranks are watched because some are to be killed; empty: not here
    spoiled: list[int]  # images after which a step of ranks that are watched is bad, until the run has gone back
    told: str  # a named pipe, open until they end; lines "RANK step IMAGES" and "RANK hold OPERATION" if watched
    out: str  # a file that gets their stdout
    said: str  # another, for their stderr


class Forks:
    """The process that all ranks are forked from (see ranks.py), and what a launcher does for them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.launched: dict[tuple[str, int], list[dict[str, str]]] = {}
        variables = environment() | {"DS_ACCELERATOR": "cpu"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        line = [sys.executable, Path(__file__).with_name("ranks.py")]
        self.process = subprocess.Popen(line, env=variables, cwd=ROOT, **pipes)

    def ask(self, question: object) -> Any:
        self.process.stdin.write(json.dumps(question) + "\n")
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End it, and with it the ranks that a test has left."""
        self.process.communicate()

    def variables(self, engine: str, processes: int) -> list[dict[str, str]]:
        """The environment of each rank: ours, what a real launcher adds to it, and a new place to meet."""
        if (engine, processes) == ("", 1):
            return [environment()]
        key = engine or "ddp", processes
        if key not in self.launched:
            (script := self.folder / "dump.py").write_text(DUMP)
            (folder := self.folder / f"{key[0]}-{processes}").mkdir(exist_ok=True)
            ours = environment()
            train(str(folder), processes=processes, engine=engine, script=script)
            found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
            meets = [given.get("TORCHELASTIC_USE_AGENT_STORE") == "True" for given in found]
            assert meets == ["RANK" in given for given in found]
            self.launched[key] = [{k: v for k, v in given.items() if ours.get(k) != v} for given in found]
        self.meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_PORT": str(self.meeting.port)}
        return [environment() | added | (place if "RANK" in added else {}) for added in self.launched[key]]

    def train(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess:
        """As `train` of training_runs does: to the end; the output is part of the failure."""
        ranks = Ranks(self, *arguments, **how)
        codes = ranks.ended(seconds=300.0)
        assert not any(codes), f"{codes}\n{ranks.said.read_text()}"
        return subprocess.CompletedProcess(arguments, 0, stdout=ranks.out.read_text(), stderr=ranks.said.read_text())


class Ranks:
    """Ranks that train, and what they tell of it if they are watched."""

    def __init__(
        self,
        forks: Forks,
        *arguments: str,
        processes: int = 1,
        engine: str = "",
        script: Path | None = None,
        holds: Sequence[Hold | None] = (),
        spoiled: Sequence[int] = (),
    ) -> None:
        self.forks, self.gone, self.first_step = forks, False, 0.0
        self.told: list[tuple[str, str, str]] = []  # rank, "step" or "hold", images or operation
        forks.started += 1
        pipe, self.out, self.said = (forks.folder / f"{forks.started}.{what}" for what in ("told", "out", "said"))
        os.mkfifo(pipe)
        self.pipe = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        variables = forks.variables(engine, processes)
        files = str(pipe), str(self.out), str(self.said)
        order = Order(["train", *arguments], str(script or ""), variables, [*holds], [*spoiled], *files)
        self.pids = forks.ask(order._asdict())
        self.began = time.monotonic()

    def listen(self, until: str = "", *, images: int = 0, seconds: float) -> bool:
        """Whether a rank told of this within so many seconds; of a step, after as many images. Ends when all have."""
        deadline = time.monotonic() + seconds
        while not self.gone and select.select([self.pipe], [], [], max(deadline - time.monotonic(), 0.0))[0]:
            told = [tuple(line.split(" ", 2)) for line in os.read(self.pipe, 1 << 16).decode().splitlines()]
            self.gone = not told
            self.told += told
            self.first_step = self.first_step or (time.monotonic() if self.steps() else 0.0)
            if any(what == until and (what == "hold" or int(which) >= images) for _, what, which in told):
                return True
        return False

    def steps(self) -> list[int]:
        """Images trained before each step of rank 0."""
        return [int(images) for rank, what, images in self.told if (rank, what) == ("0", "step")]

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def ended(self, *, seconds: float) -> list[int]:
        """How each ended, by itself or not. A failure if that takes longer."""
        self.listen(seconds=seconds)
        if late := not self.gone:
            self.kill(*range(len(self.pids)))
            self.listen(seconds=30.0)
        os.close(self.pipe)
        codes = [self.forks.ask(pid) for pid in self.pids]
        assert not late, (codes, self.told, self.said.read_text())
        return codes
