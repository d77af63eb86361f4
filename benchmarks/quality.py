"""How good are samples after so much CPU time? One pass beside the textbook's alternating loop.

    python benchmarks/quality.py --out FOLDER [--mnist URL] [--quick]

The digits, and with --mnist (where the official files are, as for `aaae prepare mnist`; two of them will do) MNIST.
Both loops train the networks of configs/digits.toml or configs/mnist.toml on the same batches, with the same schedule,
averages and losses, at the penalties' shares of the configuration: one pass through `Trainer`, by differences; the
alternating loop (alternating.py), exactly. What a step of each costs is measured first, in turns, and says how many
steps a budget buys; every budget is a training of its own, whose learning rates end with it. Each loop has its own
learning rates, the best of GRID by the Frechet distance at the middle budget, with a seed that is not used again.

Judged are the averaged networks, as judge.py does it: the Frechet distance of 5,000 samples in the features of a
classifier, over the trace, and the mean squared error of held-out reconstructions. The CPU time is that of the steps
and their data alone, on one thread.

Every training is a process, and every result a file in FOLDER: the same command again goes on where it was stopped, and
draws curves.png there. About an hour of CPU time with MNIST, a quarter of one without.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from alternating import Alternating
from judge import STEPS, apply, fit_classifier, over_trace, read
from matplotlib.figure import Figure
from step import Turn, begun, go_on, in_turns, write
from torch.nn.functional import mse_loss

from aaae_dist import storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.config import Config, load_config
from aaae_dist.data import Stream, to_float
from aaae_dist.distributed import keep_freed_memory
from aaae_dist.errors import UserError
from aaae_dist.inference import sample
from aaae_dist.reader import Reader
from aaae_dist.sources import SOURCES

CONFIGS = Path(__file__).parent.parent / "configs"
SAMPLES, PART = 5000, 500  # drawn in all, and at once
COLOURS = {"one-pass": "#0072b2", "alternating": "#d55e00"}
FIGURES = {"frechet": "sample Frechet / trace", "held_out_mse": "held-out MSE"}


class Rates(NamedTuple):
    """Peak learning rates of the autoencoder and of the latent players; the image critic's is twice the former."""

    autoencoder: float
    latent: float

    def settings(self) -> list[str]:
        chosen = {"encoder": self.autoencoder, "decoder": self.autoencoder, "image_critic": 2 * self.autoencoder}
        chosen |= {"latent_generator": self.latent, "latent_critic": self.latent}
        return [f"optimizer.{network}.lr={rate}" for network, rate in chosen.items()]


GRID = [Rates(base, times * base) for base, times in product((1e-3, 2e-3), (2, 4, 8))]


class Plan(NamedTuple):
    """How much is tried."""

    seconds: dict[str, float]  # of CPU time, the largest budget, by data set
    shares: Sequence[float]  # the budgets, as shares of that; the middle one is the grid's
    grid: Sequence[Rates]
    grid_seed: int
    seeds: Sequence[int]
    classifier_steps: int
    turn: float  # seconds, to measure what steps cost


FULL = Plan({"digits": 72.0, "mnist": 144.0}, (0.25, 0.5, 1.0), GRID, 3, (0, 1, 2), STEPS, 2.0)
QUICK = Plan({"digits": 0.4}, (0.5, 1.0), GRID[:2], 3, (0,), 50, 0.02)


# --- the loops, each as what takes so many steps, and what lends the averaged networks


Training = tuple[Turn, Callable[[], AbstractContextManager[GenerativeAutoencoder]]]


def one_pass(config: Config) -> Training:
    trainer = begun(config)
    return lambda steps: go_on(trainer, steps, trainer.next_batch), trainer.engine.averaged


def alternating(config: Config) -> Training:
    """On the same batches as `Trainer` has."""
    keep_freed_memory()
    data, training, loop = config.data, config.training, Alternating(config, "cpu")
    order = {"seed": training.seed, "lanes": data.lanes, "window": data.window}
    stream = iter(Stream([Reader(data, split=data.split)], **order, batch_size=training.batch_size))
    return lambda steps: [loop.step(next(stream).images) for _ in range(steps)], lambda: nullcontext(loop.averages)


METHODS: dict[str, Callable[[Config], Training]] = {"one-pass": one_pass, "alternating": alternating}


# --- what is done in a process of its own


def costs(config: Config, turn: float) -> dict[str, float]:
    """What a step of each loop costs, in CPU seconds."""
    torch.set_num_threads(1)
    rounds = in_turns([begin(config)[0] for begin in METHODS.values()], rounds=7, seconds=turn)
    return {method: median(found) / 1000 for method, found in zip(METHODS, zip(*rounds, strict=True), strict=True)}


class Outcome(NamedTuple):
    """What a training leaves: its CPU time, samples, and the error of held-out reconstructions.

    The error is infinite, and there are no samples, if the numbers went bad.
    """

    seconds: float
    samples: np.ndarray
    held_out_mse: float


def train(method: str, config: Config) -> Outcome:
    """A training from its beginning to its end."""
    torch.set_num_threads(1)
    turn, averaged = METHODS[method](config)
    lost, before = Outcome(math.inf, np.empty(0), math.inf), time.process_time()
    try:
        turn(config.training.images // config.training.batch_size)
    except UserError:  # the trainer stops; the other loop goes on
        return lost
    seconds = time.process_time() - before
    images, _ = read(config.data, config.data.held_out)
    with averaged() as networks, torch.no_grad():
        error = mse_loss(networks.decode(networks.encode(images)).clamp(-1, 1), images).item()
        samples = [sample(networks, seed=1, first=first, count=PART) for first in range(0, SAMPLES, PART)]
    return Outcome(seconds, torch.cat(samples).numpy(), error) if math.isfinite(error) else lost


def answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, which ends with this one."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["aaae_dist.training", "matplotlib.figure"])  # imported once for all
    here, there = context.Pipe()
    process = context.Process(target=answer, args=(there, function, arguments), daemon=True)
    process.start()
    there.close()
    try:
        found = here.recv()
    except EOFError:
        sys.exit("a process ended without a result; what it said last is above")
    process.join()
    return found


# --- one data set


class Judge:
    """A classifier's view of a data set."""

    def __init__(self, config: Config, *, steps: int) -> None:
        images, labels = read(config.data, config.data.split)
        self.classifier = fit_classifier(images, labels, seed=0, steps=steps)
        self.real, _ = apply(self.classifier, images)
        self.floor = self.distance(read(config.data, config.data.held_out)[0])

    def distance(self, images: torch.Tensor) -> float:
        """Frechet distance of images in [-1, 1] from the training images, over the trace."""
        return over_trace(self.real, apply(self.classifier, images)[0])


class Bench:
    """Both loops on one data set; what is found is kept in a folder."""

    def __init__(self, data: str, *, out: str, plan: Plan) -> None:
        """Measure what steps cost and how far held-out images are from the others, if that is not known."""
        self.data, self.out, self.plan = data, storage.join(out, data), plan
        self.costs = self.kept("costs", lambda: apart(costs, self.config(1_000_000_000), plan.turn))
        self.floor = self.kept("floor", lambda: {"frechet": self.judge.floor})["frechet"]

    def config(self, images: int, *more: str) -> Config:
        """The data set's own configuration, for so many images; bad numbers are not skipped: the other loop cannot."""
        own = [f"data.url={storage.join(self.out, 'data')}", f"training.run={storage.join(self.out, 'none')}"]
        own += ["guard.skips=0", "guard.deviations=0"]
        return load_config([str(CONFIGS / f"{self.data}.toml"), *own, f"training.images={images}", *more])

    def kept(self, name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a file of this name says, or else what is found now, and kept there."""
        url = storage.join(self.out, f"{name}.json")
        if not storage.exists(url):
            found = find()
            print(f"{self.data} {name}: {found}", file=sys.stderr, flush=True)
            storage.write_json(url, found)
        return storage.read_json(url)

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.config(1), steps=self.plan.classifier_steps)

    def result(self, method: str, rates: Rates, *, seed: int, share: float) -> dict[str, float]:
        """The figures of one training."""
        steps = max(1, round(share * self.plan.seconds[self.data] / self.costs[method]))

        def find() -> dict[str, float]:
            size = self.config(1).training.batch_size
            config = self.config(steps * size, f"training.seed={seed}", *rates.settings())
            found: Outcome = apart(train, method, config)
            figures = {"steps": steps, "seconds": found.seconds, "held_out_mse": found.held_out_mse}
            whole = len(found.samples) > 0
            frechet = self.judge.distance(to_float(torch.from_numpy(found.samples))) if whole else math.inf
            return figures | {"frechet": frechet}

        return self.kept(f"{method}-{rates.autoencoder:g}-{rates.latent:g}-seed{seed}-{steps}", find)

    def middle(self, method: str, rates: Rates) -> float:
        """The Frechet distance that the grid is judged by."""
        share = self.plan.shares[len(self.plan.shares) // 2]
        return self.result(method, rates, seed=self.plan.grid_seed, share=share)["frechet"]

    def best(self, method: str) -> Rates:
        return min(self.plan.grid, key=lambda rates: self.middle(method, rates))

    def curve(self, method: str) -> list[list[dict[str, float]]]:
        """The figures at every budget, of every seed."""
        rates = self.best(method)
        return [
            [self.result(method, rates, seed=seed, share=share) for seed in self.plan.seeds]
            for share in self.plan.shares
        ]

    def find(self) -> None:
        """Do all that is not done; a benchmark that is stopped has both loops equally far."""
        for rates, method in product(self.plan.grid, METHODS):
            self.middle(method, rates)
        for seed, share, method in product(self.plan.seeds, self.plan.shares, METHODS):
            self.result(method, self.best(method), seed=seed, share=share)


# --- what is told


def tell(benches: Sequence[Bench]) -> None:
    """The tables of the curves and of the grid."""

    def cell(figures: Sequence[float]) -> str:
        return f"{mean(figures):.4f} ({min(figures):.4f} to {max(figures):.4f})"

    print(f"| data | loop | rates | steps | CPU s | {' | '.join(FIGURES.values())} |")
    print(f"|{' --- |' * (5 + len(FIGURES))}")
    for bench, method in product(benches, METHODS):
        rates = bench.best(method)
        for results in bench.curve(method):
            seconds = mean(result["seconds"] for result in results)
            cells = [cell([result[figure] for result in results]) for figure in FIGURES]
            told = [bench.data, method, f"{rates.autoencoder:g}, {rates.latent:g}", f"{results[0]['steps']}"]
            print(f"| {' | '.join([*told, f'{seconds:.1f}', *cells])} |")
    print(f"\n| rates | {' | '.join(f'{bench.data}, {method}' for bench, method in product(benches, METHODS))} |")
    print(f"|{' --- |' * (1 + len(benches) * len(METHODS))}")
    for rates in benches[0].plan.grid:
        cells = [f"{bench.middle(method, rates):.4f}" for bench, method in product(benches, METHODS)]
        print(f"| {rates.autoencoder:g}, {rates.latent:g} | {' | '.join(cells)} |")


def draw(benches: Sequence[Bench], file: Path) -> None:
    """The curves: a line through the seeds' means, a dot for each seed; dashed, the held-out images' own distance."""
    figure = Figure(figsize=(4.5 * len(benches), 6), layout="constrained")
    axes = figure.subplots(len(FIGURES), len(benches), squeeze=False)
    for column, bench in enumerate(benches):
        for place, (name, title) in zip(axes[:, column], FIGURES.items(), strict=True):
            for method, colour in COLOURS.items():
                curve = bench.curve(method)
                times, found = (np.array([[r[n] for r in results] for results in curve]) for n in ("seconds", name))
                place.plot(times.mean(1), found.mean(1), color=colour, label=method)
                place.plot(times.ravel(), found.ravel(), "o", color=colour, markersize=4)
            if name == "frechet":
                place.axhline(bench.floor, color="grey", linestyle="--", label="held-out images")
            place.set(xscale="log", yscale="log", xlabel="CPU s of training", ylabel=title, title=bench.data)
            place.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for results, kept")
    parser.add_argument("--mnist", default="", metavar="URL", help="where MNIST's official files are")
    parser.add_argument("--quick", action="store_true", help="the digits alone, in seconds; the figures mean nothing")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before a process asks: what is compared is CPU time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the process under way ends too
    torch.set_num_threads(1)
    plan, benches = QUICK if arguments.quick else FULL, []
    for data in plan.seconds:
        if data == "digits" or arguments.mnist:
            url = arguments.mnist if data == "mnist" else ""
            write(SOURCES[data](url, labels=""), str(arguments.out / data / "data"), name=data)
            benches.append(Bench(data, out=str(arguments.out), plan=plan))
            benches[-1].find()
    tell(benches)
    draw(benches, arguments.out / "curves.png")


if __name__ == "__main__":
    main()
