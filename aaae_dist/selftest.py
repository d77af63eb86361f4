"""The selftest: do the machines, the engine and the libraries at hand keep what this project promises?

Trainings of a small model are started on all ranks, killed and resumed, and done on one rank alone; what they have
saved is compared. They are ordinary ones, `aaae train` in processes of their own (see supervision.py).
"""

import importlib.metadata
import platform
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aaae_dist import checkpoint, storage
from aaae_dist.checkpoint import DamagedError, Manifest, load
from aaae_dist.errors import UserError
from aaae_dist.pieces import Piece
from aaae_dist.preparation import Recipe, prepare
from aaae_dist.progress import counted
from aaae_dist.sources import digits
from aaae_dist.stopping import StopRequest
from aaae_dist.supervision import EndedError, Supervisor

STEPS = 20
SAVE_STEPS = 5  # between two checkpoints
MICRO = 16  # images in a micro-batch; fewer make more of the last bits
PARTS = 2  # micro-batches of a rank in a step
ENDLESS = 10**11  # images
TOLERANCE = 1e-5  # of a tensor's norm, between one process and many, in float32
NOISE = 10  # times the difference of two runs that were never stopped, where a machine does not repeat its own bits

# All that could tell ranks, engines and a resumed run apart. The rates do not fall: the run to be killed has no end.
SETTINGS = (
    *("data.channels=1", "data.size=8", "data.workers=0"),
    *("model.width=16", "model.code_size=8", "model.noise_size=8", "model.latent_width=64", "model.latent_depth=2"),
    *("optimizer.encoder.lr=3e-3", "optimizer.clip=0.3"),
    *("training.final_rate=1.0", f"training.micro_batch_size={MICRO}"),
    *("evaluation.samples=100", "checkpoint.keep=1_000_000", "tracking.mlflow=false"),
)


class Finding(NamedTuple):
    """What a part of the test has found, with its figure or, where it failed, what to look at."""

    part: str
    well: bool
    figure: str

    def __str__(self) -> str:
        return f"{'ok' if self.well else 'FAILED':<8}{self.part:<36}{self.figure}"


class Difference(NamedTuple):
    """Between two checkpoints: the largest of a tensor, as a share of that tensor's norm, and which tensor it is."""

    share: float
    tensor: str

    def __str__(self) -> str:
        return f"{self.share:.1e} of a tensor's norm" + f" ({self.tensor})" * bool(self.tensor)


def selftest(out: str, *, stop: StopRequest) -> Iterator[Finding]:
    """Test, part by part; the last finding is the verdict. All ranks find the same.

    Args:
        out: a folder or any fsspec URL that all ranks see, where nothing is yet, and what was trained stays; "": a
            fresh one below runs/, which stays only if a part failed.
        stop: whether this rank is asked to end; all ranks do then.

    Raises:
        UserError: the ranks do not see the same files, lost each other or were asked to stop, or the store fails.
    """
    ranks = Supervisor(stop)
    with ranks.together():
        test, well = Selftest(out, ranks), True
        for finding in test.findings():
            well = well and finding.well
            yield finding
        figure = test.setting()
        if not well:
            figure = f"{figure}; what was trained stays in {test.out}"
        elif not out and ranks.rank == 0:
            storage.remove(test.out)
        yield Finding("verdict", well, figure)


class Selftest:
    """The whole test, on this rank."""

    def __init__(self, out: str, ranks: Supervisor) -> None:
        """Write the images.

        Args:
            out: a folder or any fsspec URL that all ranks see, where nothing is yet; "": a fresh one below runs/.

        Raises:
            UserError: there is something, or not all ranks see what is written there.
        """
        self.ranks = ranks
        self.out = ranks.from_rank_0(lambda: out or f"runs/selftest-{secrets.token_hex(4)}")
        self.batch = MICRO * PARTS * ranks.world
        self.run, self.killed, self.alone = (storage.join(self.out, name) for name in ("run", "killed", "alone"))
        ranks.from_rank_0(self.write_images)
        index = storage.join(self.out, "images", "index.json")
        for rank, (seen, node) in enumerate(ranks.gather([storage.exists(index), platform.node()])):
            if not seen:
                raise UserError(
                    f"--out {self.out}: rank {rank} on {node} does not see what rank 0 writes there; give a folder or "
                    "URL that all nodes see"
                )

    def write_images(self) -> None:
        if storage.listing(self.out):
            raise UserError(f"--out {self.out}: there is something already; give a new folder, or remove it")
        source = digits("")
        there = len(source.keys)
        keys = [f"{i:06d}" for i in range(max(there, 2 * self.batch))]  # many ranks take more in a step than there are
        prepare(
            source._replace(keys=keys, read=lambda i: source.read(i % there), classes=(), labels=None),
            Recipe(channels=1, crop=0, size=8, format="png", quality=95),
            name="digits",
            origin="digits",
            out=storage.join(self.out, "images"),
            held_out=0.1,
            samples_per_shard=400,
            seed=0,
            bad_share=0.0,
            workers=1,
        )

    @property
    def end(self) -> str:
        """The checkpoint that runs are compared by."""
        return checkpoint.name_of(STEPS * self.batch)

    def train(self, run: str, *more: str, **how: Any) -> None:
        """Train to the end, or as said otherwise.

        Raises:
            EndedError: it did not come to its end.
        """
        half = f"{self.batch * STEPS // 2}"
        self.ranks.train(
            *SETTINGS,
            f"data.url={storage.join(self.out, 'images')}",
            f"training.run={run}",
            f"training.batch_size={self.batch}",
            f"training.images={STEPS * self.batch}",
            f"training.warmup={SAVE_STEPS * self.batch}",
            f"training.average_half_life={3 * self.batch}",
            f"training.compare_every={self.batch}",
            f"checkpoint.every={SAVE_STEPS * self.batch}",
            f"logging.every={self.batch}",
            f"logging.pictures_every={half}",
            f"evaluation.every={half}",
            *more,
            **how,
        )
        if not self.ranks.from_rank_0(lambda: "until" in how or self.end in checkpoint.complete(run)):
            raise EndedError(f"{run} has no checkpoint at its end: was one of its processes told to stop?")

    def judge(self, work: Callable[[], Any]) -> Any:
        """What rank 0 makes of checkpoints (JSON), on every rank. All ranks must call it.

        Raises:
            EndedError: one of them is damaged.
        """

        def guarded() -> tuple[Any, str]:
            try:
                return work(), ""
            except DamagedError as error:
                return None, str(error)

        found, problem = self.ranks.from_rank_0(guarded)
        if problem:
            raise EndedError(problem)
        return found

    def findings(self) -> Iterator[Finding]:
        """The parts, one after the other; a training that cannot be ended ends the test. All ranks find the same."""
        for part, work in (
            ("ranks are equal", self.are_ranks_equal),
            ("killed and resumed = never stopped", self.does_a_kill_change_nothing),
            (f"1 = {self.ranks.world}", self.is_one_rank_as_many),
            ("checkpoints are whole", self.are_checkpoints_whole),
        ):
            try:
                yield Finding(part, *work())
            except EndedError as error:
                yield Finding(part, False, str(error))
                return

    def are_ranks_equal(self) -> tuple[bool, str]:
        self.train(self.run)
        return (
            True,
            f"{counted(self.ranks.world, 'rank')}, what all have is compared bit by bit after each of {STEPS} steps",
        )

    def does_a_kill_change_nothing(self) -> tuple[bool, str]:
        """The moment of the kill is the machines': the run has no end, and is killed when anything is saved."""
        self.train(self.killed, f"training.images={ENDLESS}", until=lambda: bool(checkpoint.complete(self.killed)))
        since = self.ranks.from_rank_0(self.forget_the_end)
        self.train(self.killed)
        found = self.judge(lambda: difference(self.run, self.killed, self.end))
        told = f"killed, taken up at step {since // self.batch}, at step {STEPS}"
        if not found:
            return True, f"{told} the same bits: weights, averages, Adam's moments"
        again = storage.join(self.out, "again")
        self.train(again)
        noise = self.judge(lambda: difference(self.run, again, self.end))
        told = f"{told} {Difference(*found)} off"
        if not noise:
            return False, f"{told}; two runs that were never stopped have the same bits: look at what is taken up"
        told = (
            f"{told}; these machines do not repeat bits: two runs that were never stopped are {Difference(*noise)} off"
        )
        return found[0] <= NOISE * noise[0], told

    def forget_the_end(self) -> int:
        """Where a machine was quick, checkpoints at the end and after it are none; images of the newest before that."""
        newest = max(name for name in checkpoint.complete(self.killed) if name < self.end)
        checkpoint.set_aside_after(self.killed, newest)
        return int(newest)

    def is_one_rank_as_many(self) -> tuple[bool, str]:
        self.train(self.alone, alone=True)
        states = ("weight", "average")  # Adam's moments of gradients that are zero but for rounding are no measure
        found = self.judge(lambda: difference(self.run, self.alone, self.end, states))
        share, tensor = found or (0.0, "")
        told = f"weights and averages at step {STEPS} at most {Difference(share, tensor)} off"
        return share <= TOLERANCE, f"{told}; allowed: {TOLERANCE:.0e}, in float32"

    def are_checkpoints_whole(self) -> tuple[bool, str]:
        runs = (self.run, self.killed, self.alone)
        damaged = self.ranks.from_rank_0(lambda: [line for run in runs for line in checkpoint.verify(run)])
        count = self.ranks.from_rank_0(lambda: sum(len(checkpoint.complete(run)) for run in runs))
        if damaged:
            return False, f"{damaged[0]}; {len(damaged)} damaged in all: look at the store and its network"
        return True, f"{count}, read again"

    def setting(self) -> str:
        """What was tested: the engine and its ranks, machines and versions. All ranks must call it."""
        found = self.ranks.gather([platform.node(), device()])
        nodes, devices = ({each[i] for each in found} for i in range(2))
        engine = self.ranks.from_rank_0(self.engine)
        packages = ("torch", "accelerate", *(["deepspeed"] if engine.startswith("zero") else []))
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        ranks, where = counted(len(found), "rank"), counted(len(nodes), "node")
        return f"{engine}, {ranks} on {where}, {' and '.join(sorted(devices))}; {versions}"

    def engine(self) -> str:
        """The engine that saved something, if anything was."""
        names = checkpoint.complete(self.run)
        return checkpoint.read_manifest(self.run, names[-1]).engine if names else "no engine"


def device() -> str:
    """What this rank computes on."""
    if not torch.cuda.is_available():
        return "CPU"
    place = "/proc/driver/nvidia/version"
    driver = re.search(r"\d+\.\d+[.\d]*", storage.read(place).decode()) if storage.exists(place) else None
    return f"{torch.cuda.get_device_name()}, driver {driver[0] if driver else 'unknown'}, CUDA {torch.version.cuda}"


def difference(run: str, other: str, name: str, states: Sequence[str] = ()) -> Difference | None:
    """Between the checkpoints of that name of two runs; None: the same bits.

    Args:
        states: those that are compared; default: all.

    Raises:
        UserError: one of them is damaged, or the store fails.
    """
    ours, theirs = (checkpoint.read_manifest(place, name) for place in (run, other))
    odd = [
        key
        for key, number in ours.fingerprints.items()
        if theirs.fingerprints.get(key) != number and (not states or key.partition("/")[0] in states)
    ]
    if not odd:
        return None
    one, two = tensors(run, name, ours), tensors(other, name, theirs)
    shares = {key: float((two[key] - one[key]).norm() / one[key].norm().clamp(min=1e-30)) for key in odd}
    worst = max(shares, key=lambda key: shares[key])
    return Difference(shares[worst], worst)


def tensors(run: str, name: str, manifest: Manifest) -> dict[str, Tensor]:
    """All that a checkpoint holds, by "state/tensor", flat, as float64."""
    values: dict[str, dict[str, Tensor]] = {}
    for key in manifest.fingerprints:
        state, _, tensor = key.partition("/")
        values.setdefault(tensor, {})[state] = torch.empty(prod(manifest.shapes[tensor]))
    pieces = {tensor: Piece(manifest.shapes[tensor], 0, found) for tensor, found in values.items()}
    load(run, name, manifest, pieces)
    return {f"{state}/{tensor}": value.double() for tensor, found in values.items() for state, value in found.items()}
