"""What does a training step cost? Ours beside the least that PyTorch can do, a textbook's loop, and pythae's trainer.

    python benchmarks/step.py [CONFIG ...] [--pythae FOLDER] [--quick]

CONFIG is as for `aaae train`: TOML files and section.key=value overrides; configs/celeba64.toml if there is none, on a
CPU with batches of 32. Networks, batch and losses are the same for all, in float32, without augmentation; the batches
are in memory before. Compared are

1. the one-pass step in plain torch (bare.py): the limit;
2. ours: the whole of a step of `Trainer`, the log's share of it included;
3. the textbook's loop (alternating.py) with exact penalties on as many pairs as the configuration says, a quarter in
   the image critic's; on all of them, as is usual, with a forward for the penalties; and sharing that of the loss;
4. with --pythae, where pythae is installed if it is not there: its `AdversarialTrainer` with our encoder, decoder and
   latent critic. It plays a smaller game, an adversarial autoencoder's: no generator, no image critic, no penalties.

All take turns, of two seconds or more, in one process; ratios are taken within a round, and of rounds the median.
Measured is the process's CPU time, on one thread; on a GPU, the time between two events. That 1 and 2 compute the same
losses and averages, and 3 the same mean squared error to begin with, is verified first.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from alternating import Alternating
from bare import Bare, hashed
from pythae_trainer import install
from pythae_trainer import training as pythae

from aaae_dist.aaae import AAAE
from aaae_dist.config import Config, load_config
from aaae_dist.data import Batch, to_float
from aaae_dist.errors import UserError
from aaae_dist.preparation import Recipe, prepare
from aaae_dist.progress import Progress
from aaae_dist.randomness import sample_keys
from aaae_dist.sources import Source
from aaae_dist.stopping import StopRequest
from aaae_dist.tracking import NoTracker
from aaae_dist.training import Trainer

CELEBA = Path(__file__).parent.parent / "configs" / "celeba64.toml"
QUICK = ["model.width=4", "model.latent_width=16", "training.batch_size=8"]
COMPARABLE = ["training.precision=no", "data.flip=false", "data.crop=false"]
COMPARABLE += ["training.images=1_000_000_000", "training.warmup=10_000"]  # at full rates the first steps are chaotic
BATCHES = 8
CHECKED = 3  # steps; rounding grows from step to step
ALL_PAIRS = ["objective.latent_penalised=1.0", "objective.image_penalised=1.0"]

Turn = Callable[[int], object]  # takes so many steps


def write(source: Source, out: str, *, name: str) -> None:
    """Prepare images as `aaae prepare` does if it is told no more."""
    prepare(
        source,
        Recipe(source.channels, crop=source.crop, size=source.size, format="png", quality=95),
        name=name,
        origin=name,
        out=out,
        held_out=None,
        samples_per_shard=1000,
        seed=0,
        bad_share=0.01,
        workers=1,
    )


def noise(config: Config) -> Source:
    """Images of random bytes, as many as some batches need."""
    data, count = config.data, 2 * BATCHES * config.training.batch_size
    shape = (data.size, data.size, 3)[: 2 + (data.channels == 3)]
    return Source(
        [f"{number:06d}" for number in range(count)],
        lambda number: np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8),
        size=data.size,
        channels=data.channels,
    )


def begun(config: Config) -> Trainer:
    """A training before its first step, as `Trainer.train` begins it, that writes and reports nothing."""
    trainer = Trainer(config, stop=StopRequest())
    trainer.tracker, trainer.progress = NoTracker(), Progress(config.training.images, 0, visible=False)
    return trainer


def go_on(trainer: Trainer, steps: int, batch: Callable[[], Batch]) -> None:
    """The trainer's own loop, but for pictures, evaluation and checkpoints; where that goes back, this ends."""
    for _ in range(steps):
        trainer.step(batch())
        if trainer.guard.exhausted:
            raise UserError(trainer.guard.complaint)
        if trainer.due(trainer.config.logging.every):
            trainer.log()


def verify(trainer: Trainer, bare: Bare, alternating: Alternating) -> None:
    """Let all take some steps on the same batches, and compare. (Exact penalties lead another way from there.)"""
    config = trainer.config
    objective, size = config.objective, config.training.batch_size
    begin = copy.deepcopy(bare.averages.state_dict())
    for number in range(CHECKED):
        batch = trainer.next_batch()
        trainer.interval = trainer.begin_interval()
        trainer.step(batch)
        told = {name: value.item() for name, value in trainer.interval.reports.items()}
        ours = objective.reconstruction_weight * told["reconstruction/mse"]
        for name, penalty in (("latent", objective.latent_penalty), ("image", objective.image_penalty)):
            ours += told[f"{name}_critic/loss"] + penalty * told[f"{name}_critic/squared_slope"]
        keys = sample_keys(config.training.seed, number * size, size, trainer.device)
        theirs = bare.step(batch.images, hashed(config, keys)).item()
        assert abs(ours - theirs) <= 1e-5 * abs(ours), f"step {number}: a loss of {ours} and one of {theirs}"
        error = alternating.step(batch.images).item()
        if number == 0:
            assert abs(error - told["reconstruction/mse"]) <= 1e-5 * error, f"{error}, {told['reconstruction/mse']}"
    with trainer.engine.averaged() as networks:
        ours = networks.state_dict()
        for name, theirs in bare.averages.state_dict().items():
            way, apart = (torch.linalg.vector_norm(theirs - other) for other in (begin[name], ours[name]))
            assert apart <= 1e-2 * way, f"the averages of {name} are {apart:.1e} apart, after a way of {way:.1e}"


def milliseconds(turn: Turn, steps: int) -> float:
    """What a step costs on average: CPU time of this process, or time on the GPU."""
    if not torch.cuda.is_available():
        before = time.process_time()
        turn(steps)
        return (time.process_time() - before) / steps * 1000
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    turn(steps)
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / steps


def in_turns(turns: Sequence[Turn], *, rounds: int, seconds: float) -> list[list[float]]:
    """For every round, what a step of each costs in ms; every other round goes backward.

    Args:
        seconds: of the first one's turn.
    """
    steps = max(1, round(1000 * seconds / min(milliseconds(turns[0], 1) for _ in range(3))))
    found = []
    for number in range(rounds):
        order = range(len(turns))[:: (-1) ** number]
        costs = {place: milliseconds(turns[place], steps) for place in order}
        found.append([costs[place] for place in range(len(turns))])
    return found


def report(names: Sequence[str], rounds: Sequence[Sequence[float]]) -> None:
    """A table: medians, and between which values the middle half of the rounds' ratios lies."""

    def over(place: int, other: int) -> str:
        low, middle, high = np.quantile([costs[place] / costs[other] for costs in rounds], [0.25, 0.5, 0.75])
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    print("| ms a step | median | over the bare step's | over ours |\n| --- | --- | --- | --- |")
    for place, name in enumerate(names):
        print(f"| {name} | {median(costs[place] for costs in rounds):.4g} | {over(place, 0)} | {over(place, 1)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", metavar="CONFIG", help="as for `aaae train`")
    parser.add_argument("--pythae", type=Path, metavar="FOLDER", help="for pythae, kept")
    parser.add_argument("--quick", action="store_true", help="narrow networks, few steps: seconds, rough figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.config or [str(CELEBA), *([] if torch.cuda.is_available() else ["training.batch_size=32"])]
    chosen += QUICK if arguments.quick else []
    with TemporaryDirectory() as home:
        chosen += [f"data.url={home}/noise", f"training.run={home}/run", *COMPARABLE]
        config, full = load_config(chosen), load_config([*chosen, *ALL_PAIRS])
        write(noise(config), config.data.url, name="noise")
        trainer = begun(config)
        bare, part = Bare(config, trainer.device), Alternating(config, trainer.device)
        whole, usual = (Alternating(full, trainer.device, shared=shared) for shared in (True, False))
        verify(trainer, bare, part)
        held = cycle([trainer.next_batch() for _ in range(BATCHES)])

        def repeated(loop: Alternating) -> Turn:
            return lambda steps: [loop.step(next(held).images) for _ in range(steps)]

        turns: dict[str, Turn] = {
            "bare one-pass step": lambda steps: [bare.step(next(held).images, bare.drawn()) for _ in range(steps)],
            "ours, the whole trainer": lambda steps: go_on(trainer, steps, held.__next__),
            "alternating, exact penalties on a part": repeated(part),
            "alternating, exact penalties on all": repeated(usual),
            "alternating, exact penalties on all, forward shared": repeated(whole),
        }
        if arguments.pythae:
            install(arguments.pythae)
            images = to_float(torch.cat([next(held).images for _ in range(BATCHES)]))
            turns["pythae's, a smaller game"] = pythae(AAAE.build(config), config, images, folder=home)
        rounds, seconds = (3, 0.02) if arguments.quick else (11, 2.0)
        report(list(turns), in_turns(list(turns.values()), rounds=rounds, seconds=seconds))


if __name__ == "__main__":
    main()
