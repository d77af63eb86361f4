"""The preflight: what would fail after the queue, found before it. Nothing is left behind by it.

Each check tells what it finds, with the remedy; one that fails ends no other. What cannot be known because an earlier
check failed is left out.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from aaae_dist import checkpoint, dry_step, storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.baselines import METHODS
from aaae_dist.compatibility import micro_batch_size, refuse_changes
from aaae_dist.config import Config, load_config
from aaae_dist.data import refuse_unlike, spread
from aaae_dist.errors import UserError, one_line
from aaae_dist.execution import arrange, refuse_compiling
from aaae_dist.failures import explained, short_of_memory
from aaae_dist.launched import ENGINES, launched_name
from aaae_dist.progress import counted
from aaae_dist.rates import read_rate, refuse_read_only, write_rate
from aaae_dist.reader import Reader
from aaae_dist.tracking import harmless, local_folder, settle_mlflow
from aaae_dist.versions import differences, installed, installed_on, nodes_at_hand
from aaae_dist.zero import refuse_missing_deepspeed

Verdict = Literal["ok", "warning", "error"]
Told = Iterator[tuple[Verdict, str]]

PATIENCE = 15.0  # seconds for which a store of data that fails is asked again, at most
NEARLY = 0.8  # of what there is: above, it is called tight
LOOKED_AT = 4  # images of each split that are decoded
CLONE = Path(__file__).parent.parent


class Finding(NamedTuple):
    """What a check tells: a sentence with its figures and, unless all is well, the remedy."""

    part: str
    verdict: Verdict
    sentence: str

    def __str__(self) -> str:
        return f"{self.verdict:<9}{self.part:<10}{self.sentence}"


def preflight(
    arguments: Sequence[str], *, nodes: int, processes: int, engine: str = "", grace: int = 0
) -> Iterator[Finding]:
    """Look at everything, check by check.

    Args:
        arguments: of `aaae train`.
        nodes, processes: nodes, and ranks on each of them.
        engine: "": what a launcher has asked for, else ddp for several ranks.
        grace: seconds between the signal to stop and the end; 0: not known.
    """
    try:
        config = load_config(arguments)
    except UserError as error:
        yield Finding("settings", "error", str(error))
    else:
        yield from Preflight(config, nodes=nodes, processes=processes, engine=engine, grace=grace).findings()
    yield from guarded("versions", check_versions)


def guarded(part: str, check: Callable[[], Told]) -> Iterator[Finding]:
    """What a check tells; where it meets a mistake or a lack of memory, that is its finding."""
    try:
        for verdict, sentence in check():
            yield Finding(part, verdict, sentence)
    except UserError as error:
        yield Finding(part, "error", one_line(error))
    except (MemoryError, RuntimeError) as error:
        if not (what := short_of_memory(error)):
            raise
        yield Finding(part, "error", f"out of memory ({what}); {LESS_MEMORY}")


LESS_MEMORY = "lower training.micro_batch_size or model.width, or set training.activation_checkpointing"


class Preflight:
    """The checks of one training, in the order in which they are made, and what they learn for each other."""

    def __init__(self, config: Config, *, nodes: int, processes: int, engine: str, grace: int) -> None:
        self.config, self.training, self.run = config, config.training, config.training.run
        self.data = config.data.model_copy(update={"patience": min(config.data.patience, PATIENCE)})
        self.nodes, self.processes, self.ranks = nodes, processes, nodes * processes
        self.engine, self.grace = engine, grace
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.micro = 0  # not known yet, as what follows
        self.readers: list[Reader] = []  # of what is trained on
        self.game: GenerativeAutoencoder | None = None
        self.seconds = 0.0  # of a dry step
        self.took = 0.0  # seconds, the newest checkpoint of this run, if there is one
        self.writable = False  # the run's folder

    def findings(self) -> Iterator[Finding]:
        yield from guarded("settings", self.check_batch)
        yield from guarded("run", self.check_run)
        for url in (self.data.url, *self.data.mix):
            yield from guarded("data", partial(self.check_data, url))
        yield from guarded("data", partial(self.check_data, self.data.url, held_out=True))
        yield from guarded("labels", self.check_labels)
        yield from guarded("engine", self.check_engine)
        yield from guarded("networks", self.check_networks)
        yield from guarded("memory", self.check_memory)
        for reader in self.readers:
            yield from guarded("store", partial(self.check_store, reader))
        yield from guarded("folder", self.check_folder)
        yield from guarded("space", self.check_space)
        yield from guarded("saving", self.check_saving)
        yield from guarded("mlflow", self.check_mlflow)

    # --- what is asked for

    def check_batch(self) -> Told:
        """Whether the batch can be divided among the ranks."""
        training = self.training
        self.micro = micro_batch_size(self.config, self.ranks)
        parts = training.batch_size // (self.ranks * self.micro)
        steps = -(-training.images // training.batch_size)
        told = (
            f"{steps:,} steps of {training.batch_size}: {counted(self.ranks, 'rank')} on {counted(self.nodes, 'node')}"
        )
        yield "ok", f"{told}, each {parts} x {counted(self.micro, 'image')}"

    def check_run(self) -> Told:
        """What the run goes on from."""
        refuse_changes(self.config, self.run)
        names = checkpoint.complete(self.run)
        while names:
            try:
                self.took = checkpoint.read_manifest(self.run, names[-1]).seconds
                break
            except checkpoint.DamagedError as error:
                yield "warning", f"{error}; training would pass it over"
                names.pop()
        if not names:
            yield "ok", f"{self.run}: a new run"
        elif int(names[-1]) < self.training.images:
            yield "ok", f"{self.run}: goes on from {int(names[-1]):,} images"
        else:
            told = f"{self.run}: {int(names[-1]):,} images are trained, nothing is left to do"
            yield "warning", f"{told}; raise training.images, or choose another training.run"

    # --- the data

    def check_data(self, url: str, *, held_out: bool = False) -> Told:
        """Whether a split of a data set is there, whole, of the right size, and can be read and decoded."""
        split = self.data.held_out if held_out else self.data.split
        reader = Reader(self.data, split=split, url=url)
        places = spread(reader.counts, limit=LOOKED_AT)
        reader.read(places, np.empty((len(places), *reader.shape), np.uint8))
        if not held_out:
            refuse_unlike([*self.readers, reader])
            self.readers.append(reader)
        height, width, channels = reader.shape
        told = f"{url}: {len(reader):,} {split} images of {channels} x {height} x {width} in "
        told += f"{counted(len(reader.shards), 'shard')}, {mb(sum(shard.bytes for shard in reader.shards))}"
        if bad := [f"{found.key} ({found.reason})" for found in reader.bad.values()]:
            yield "warning", f"{told}; cannot be used: {', '.join(bad)}; see all with `aaae shards verify {url}`"
        else:
            yield "ok", f"{told}; {len(places)} of them decoded"

    def check_labels(self) -> Told:
        """Whether there are any. (Those of the images that were decoded are valid.)"""
        for url, index in ((reader.url, reader.index) for reader in self.readers):
            if index.classes or index.attributes:
                yield "ok", f"{url}: {len(index.classes)} classes, {len(index.attributes)} attributes"
            else:
                yield "warning", f"{url}: none, and training needs none; where there are some, prepare it with them"

    def check_store(self, reader: Reader) -> Told:
        """Whether a data set is read here as fast as a node trains on it."""
        rate, weights = read_rate(reader), {self.data.url: 1.0} | self.data.mix
        told = f"{reader.url}: read at {mb(rate)}/s"
        if reader.keep:
            yield "ok", f"{told}; kept in memory once it is read"
            return
        if not self.seconds:
            yield "ok", f"{told}; what training needs is not known without a step"
            return
        images = self.processes * self.micro / self.seconds * weights[reader.url] / sum(weights.values())
        need = images * sum(shard.bytes for shard in reader.shards) / len(reader)
        told += f"; a node needs {mb(need)}/s ({images:,.0f} images) if a step takes there what it takes here"
        slow = "training waits for data until it is cached; bring the data nearer, or prepare it with --format jpg"
        yield ("ok", told) if need <= rate else ("warning", f"{told}; {slow}")

    # --- what it is computed with

    def check_engine(self) -> Told:
        """Whether the engine, the precision, a compiler and GPUs are there."""
        self.engine, problems = self.engine or launched_name(self.ranks), list[str]()
        for refuse in (self.refuse_ranks, self.refuse_library, self.refuse_compiler):
            try:
                refuse()
            except UserError as error:
                problems.append(one_line(error))
        yield from (("error", problem) for problem in problems)
        bf16, there = self.training.precision == "bf16", self.device == "cuda"
        if bf16 and there and not torch.cuda.is_bf16_supported(including_emulation=False):
            yield "warning", f'training.precision bf16: slow on {torch.cuda.get_device_name()}; set it to "no"'
        file = f"launch/{self.engine}.yaml"
        if self.ranks > 1 and not any((place / file).exists() for place in (Path(), CLONE)):
            yield "warning", f"{file}: no such file here; start where it is, or write --config_file otherwise"
        if not problems:
            where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if there else "no GPU here"
            yield "ok", f"{self.engine}, {'bf16' if bf16 else 'float32'}, {where}"

    def refuse_ranks(self) -> None:
        if self.engine == "single" and self.ranks > 1:
            raise UserError(
                f"--engine single: one process, but {self.nodes} x {self.processes} are asked for; choose another"
            )
        if self.device == "cuda" and self.processes > torch.cuda.device_count():
            raise UserError(
                f"--processes-per-node {self.processes}: more than the {torch.cuda.device_count()} GPUs here; lower it"
            )

    def refuse_library(self) -> None:
        if self.engine.startswith("zero"):
            refuse_missing_deepspeed(self.engine)

    def refuse_compiler(self) -> None:
        refuse_compiling(self.training, engine=self.engine, compiles=ENGINES[self.engine].compiles)

    def check_networks(self) -> Told:
        """Whether the networks can be built. What is far too large is not tried: it would take the machine down."""
        build = METHODS[self.config.model.method].build
        self.there = dry_step.available(processes=self.processes)
        with torch.device("meta"):  # only the shapes
            size = sum(weight.nbytes for weight in build(self.config).parameters())
        if 2 * size > self.there.free:
            told = f"weights and gradients take {mb(2 * size)}; {mb(self.there.free)} are free here"
            yield compared(2 * size, self.there.free, told, LESS_MEMORY)
            return
        game = build(self.config)
        arrange(game, self.training)
        self.game = game.to(self.device)
        values = sum(weight.numel() for weight in game.parameters())
        yield "ok", f"{values / 1e6:,.2f} million weights; a checkpoint takes {mb(dry_step.checkpoint_bytes(game))}"

    def check_memory(self) -> Told:
        """What each network takes on a rank, and whether all of it is there; if so, a step is made."""
        if not (self.game and self.micro and self.engine in ENGINES):
            return
        kept = dry_step.activations(self.game, self.config, images=self.micro)
        need = kept.pop("")
        for name, size in kept.items():
            network = getattr(self.game, name)
            memory = dry_step.state_of(network, engine=self.engine, ranks=self.ranks, activations=size)
            need += sum(memory)
            if any(memory):
                parts = ", ".join(f"{kind} {mb(size)}" for kind, size in memory._asdict().items())
                yield "ok", f"{name} {mb(sum(memory))}: {parts}"
        need += dry_step.overhead(self.game, self.there, engine=self.engine, ranks=self.ranks)
        if need <= self.there.free:
            self.seconds, peak = dry_step.step(self.game, self.config, images=self.micro)
            counted_before = 2 * sum(weight.nbytes for weight in self.game.parameters()) + sum(kept.values())
            need += max(0, peak - counted_before)  # what the GPU's libraries work in
        where = "on the GPU" if self.there.gpu else "for it"
        told = f"a rank takes {mb(need)} in all; {mb(self.there.free)} are free {where} here"
        yield compared(need, self.there.free, told, LESS_MEMORY)

    # --- where it is saved and reported

    def check_folder(self) -> Told:
        """Whether the run's folder can be written to."""
        refuse_read_only(self.run)
        self.writable = True
        yield "ok", f"{self.run}: written, read back, removed"

    def check_space(self) -> Told:
        """Whether there is room for the checkpoints that are kept at once, and the one that is being saved."""
        if self.game is None:
            return
        chosen, size = self.config.checkpoint, dry_step.checkpoint_bytes(self.game)
        images, number = self.training.images, chosen.keep + 1 + bool(chosen.best)
        number += images // chosen.keep_every if chosen.keep_every else 0
        if not chosen.minutes:  # as many as it saves, and one when it is stopped
            number = min(number, (-(-images // chosen.every) if chosen.every else 1) + 1)
        told = f"{counted(number, 'checkpoint')} of {mb(size)} take {mb(number * size)}"
        if not storage.is_local(self.run):
            yield "ok", f"{told}; how much is free, {self.run} does not tell"
            return
        with explained(self.run):
            _, there = storage.disk_bytes(self.run)
            saved = storage.local_path(self.run).glob("checkpoints/*/*")
            held = sum(file.stat().st_size for file in saved)  # they make room
        remedy = "free some, choose another training.run, or lower checkpoint.keep or raise checkpoint.keep_every"
        yield compared(number * size - held, there, f"{told}; {mb(there)} are free", remedy)

    def check_saving(self) -> Told:
        """How long a save takes, and whether the one under way, a step and the last save fit into the grace period."""
        if self.game is None or not self.writable:
            return
        size = dry_step.checkpoint_bytes(self.game)
        rate = write_rate(self.run, most=size)
        saving = self.took or size / rate
        step = self.seconds * self.training.batch_size / (self.ranks * self.micro) if self.micro else 0.0
        need = 2 * saving + step
        told = f"written at {mb(rate)}/s, a checkpoint takes {saving:.1f} s; from the signal to the end up to "
        told += f"{math.ceil(need)} s (the save under way, a step, the last save)"
        if not self.grace:
            yield "ok", f"{told}; see that the scheduler grants so much, as by --signal"
        elif need <= self.grace:
            yield "ok", f"{told}, of --grace {self.grace}"
        else:
            remedy = "have the signal sent earlier, or set checkpoint.minutes to what may be lost"
            yield "warning", f"{told}, more than --grace {self.grace}; {remedy}"

    def check_mlflow(self) -> Told:
        """Whether MLflow answers. Training goes on without it, and it is told later."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self.config.tracking.mlflow:
            yield "ok", "off, as tracking.mlflow says"
        elif not uri or uri.startswith("sqlite:///"):
            database = Path(uri[len("sqlite:///") :]) if uri else local_folder(self.run) / "mlflow.db"
            try:
                refuse_read_only(str(database.parent))
                yield "ok", f"{database}: the folder can be written to"
            except UserError as error:
                yield "warning", f"{database} cannot be made or written ({one_line(error)}); training goes on without"
        elif problem := ask_mlflow(uri):
            told = f"{harmless(uri)} does not answer ({problem})"
            yield "warning", f"{told}; training goes on without it; check MLFLOW_TRACKING_URI, the server, the password"
        else:
            yield "ok", f"{harmless(uri)} answers"


def ask_mlflow(uri: str) -> str:
    """What goes wrong when an MLflow is asked for its experiments; nothing if it answers."""
    settle_mlflow()
    try:
        from mlflow.tracking import MlflowClient

        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:  # whatever MLflow and its database raise; what it says could hold credentials
        return harmless(one_line(error))[:300]
    return ""


def check_versions() -> Told:
    """Whether all nodes of the allocation have the same installed."""
    nodes = nodes_at_hand()
    found = installed_on(nodes) if nodes > 1 else {}
    odd = differences(found) if found else []
    yield from (("error", f"{what}; install the same on all nodes") for what in odd)
    here = ", ".join(f"{name} {version[:12]}" for name, version in installed().items())
    if not odd:
        yield "ok", f"{here}; {f'the same on {nodes} nodes' if nodes > 1 else 'other nodes were not asked'}"


def mb(size: int | float) -> str:
    """Megabytes, or kilobytes where these are few."""
    return f"{size / 1e6:,.{1 if size < 1e8 else 0}f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def compared(need: int, there: int, told: str, remedy: str) -> tuple[Verdict, str]:
    """What is told of a need: an error if there is less, a warning if there is hardly more."""
    if need > there:
        return "error", f"{told}, which is too little; {remedy}"
    return ("warning", f"{told}, which is tight; {remedy}") if need > NEARLY * there else ("ok", told)
