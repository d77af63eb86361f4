"""Twenty SIGKILLs at random moments, of one process and of the ranks of engines, with the run on disk and in S3."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from forks import Forks, Hold, Ranks
from training_runs import CLOCKED, assert_same_bits, final, settings

from aaae_dist import checkpoint, storage
from aaae_dist.guard import read_rollbacks
from aaae_dist.tracking import parse_lines

BATCH, STEPS, EVERY = 64, 32, 128  # images of a step; steps; images between two checkpoints
SURVIVAL = 30.0  # seconds within which the death of a rank has ended the others


# --- moments


class Kill(NamedTuple):
    """A moment of a run, and who dies then."""

    amid: str  # the "start" of an attempt, its "opening" of the run, a "step", the "write" or "remove" of a file
    after: int  # images
    ranks: list[int]
    holds: list[Hold | None]  # of each rank, at an operation on a file
    share: float  # of the seconds of a start or a step


MOMENTS = {  # what dying is amid, how many of two ranks die, and how often
    ("start", 2): 3,
    ("opening", 2): 1,
    ("opening", 1): 1,
    ("step", 2): 3,
    ("step", 1): 3,
    ("write", 2): 3,
    ("write", 1): 3,
    ("remove", 2): 1,
    ("remove", 1): 2,
}
OPERATIONS = {  # of an opening and of a save, by each rank
    "disk": {"opening": (10, 0), "write": (14, 6), "remove": (8, 0)},
    "s3": {"opening": (3, 0), "write": (5, 2), "remove": (2, 0)},
}


def moments(rng: random.Random, store: str, world: int) -> list[Kill]:
    """Twenty, spread over a run."""
    last = STEPS - 5 * EVERY // BATCH  # from then on, the saves that are left may be too few to be held at
    afters = [BATCH * step for step in sorted(rng.choices(range(1, last), k=20))]
    kinds = rng.sample(list(MOMENTS), 20, counts=MOMENTS.values())
    return [moment(rng, store, world, *kind, after=after) for kind, after in zip(kinds, afters, strict=True)]


def moment(rng: random.Random, store: str, world: int, amid: str, dying: int, *, after: int) -> Kill:
    rank, holds = rng.randrange(world), [None] * world
    if counts := OPERATIONS[store].get(amid):
        rank = rank if counts[1] else 0
        kind, since = ("write", 0) if amid == "opening" else (amid, after)
        holds[rank] = Hold(kind, since, rng.randint(1, counts[rank]))
    return Kill(amid, after, [*range(world)] if dying == 2 else [rank], holds, rng.random())


# --- runs


def started(forks: Forks, engine: str, arguments: list[str], holds: Sequence[Hold | None] = (), **more: Any) -> Ranks:
    """The ranks of an engine, watched."""
    world = 1 if engine == "single" else 2
    return Ranks(forks, *arguments, engine=engine, processes=world, holds=holds or [None] * world, **more)


def options(run: str, data: str) -> list[str]:
    """Every step is reported: a figure of several would be of fewer after a kill."""
    more = (f"training.images={STEPS * BATCH}", f"checkpoint.every={EVERY}", f"logging.every={BATCH}", "data.workers=0")
    return settings(run, data, *more)


def metrics(run: str) -> list[dict[str, Any]]:
    """Every line, without what depends on the clock."""
    lines = parse_lines(storage.read(storage.join(run, "metrics.jsonl")))
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKED)} for line in lines]


def files(run: str) -> set[str]:
    """All in the folder of a run, but for the lock that only a disk has."""
    store, path = storage.locate(run)
    return {found.removeprefix(path) for found in store.find(path)} - {"/.lock"}


class Whole(NamedTuple):
    """A run that was never stopped."""

    run: str
    start: float  # seconds
    step: float


@pytest.fixture(scope="module")
def whole(forks, digits, tmp_path_factory) -> Callable[[str], Whole]:
    """Of an engine."""
    made: dict[str, Whole] = {}

    def trained(engine: str) -> Whole:
        if engine not in made:
            run = str(tmp_path_factory.mktemp("whole") / engine)
            ranks = started(forks, engine, options(run, digits))
            assert not any(ranks.ended(seconds=200.0)), ranks.said.read_text()
            took = time.monotonic() - ranks.first_step
            made[engine] = Whole(run, ranks.first_step - ranks.began, took / STEPS)
        return made[engine]

    return trained


@pytest.mark.parametrize(("engine", "world"), [("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)])
@pytest.mark.parametrize("store", ["disk", "s3"])
def test_killed_at_twenty_random_moments_a_run_ends_with_the_same_bits(
    tmp_path, request, digits, forks, whole, store, engine, world
):
    """SIGKILL of all ranks, or of one of two, which ends the other, loses at most the work since the last save."""
    run = f"{request.getfixturevalue('s3')}/run" if store == "s3" else str(tmp_path / "run")
    expected, start, step = whole(engine)
    saved, early = 0, 0
    for kill in moments(random.Random(f"{engine} {store}"), store, world):
        print(kill)
        ranks = started(forks, engine, options(run, digits), kill.holds)
        if kill.amid == "start":
            ranks.listen("step", seconds=kill.share * start)
        elif kill.amid == "step":
            assert ranks.listen("step", images=kill.after, seconds=120.0), ranks.said.read_text()
            time.sleep(kill.share * step)
        else:
            assert ranks.listen("hold", seconds=120.0), ranks.said.read_text()
        ranks.kill(*kill.ranks)
        codes = ranks.ended(seconds=SURVIVAL)
        assert codes == [-signal.SIGKILL if rank in kill.ranks else 2 for rank in range(world)], ranks.said.read_text()
        assert ranks.said.read_text().count("another rank is gone") == world - len(kill.ranks)

        steps, before, names = ranks.steps(), saved, checkpoint.complete(run)
        saved = int(names[-1]) if names else 0
        assert steps[:1] in ([], [before]), "it goes on from the newest"
        assert saved >= max([before, *(images - 2 * EVERY for images in steps)]), "what was saved stays"
        assert list(checkpoint.verify(run)) == []
        early += kill.amid == "start" and not ranks.first_step
        start = ranks.first_step - ranks.began if ranks.first_step else start
    assert early, "some must die before they train"

    ranks = started(forks, engine, options(run, digits))
    assert not any(ranks.ended(seconds=200.0)), ranks.said.read_text()
    assert ranks.steps()[0] == saved
    assert metrics(run) == metrics(expected), "every line once, in order"
    assert files(run) == files(expected)
    for name in checkpoint.complete(expected):
        assert_same_bits(final(run, name), final(expected, name))


def test_killed_while_it_goes_back_a_run_goes_back_again(tmp_path, digits, forks):
    """At any of the operations on files, past two checkpoints that are unmade, and on as if nobody had killed it."""
    whole, run, bad = tmp_path / "whole", tmp_path / "run", range(960, 1216, 64)
    more = ("guard.skips=3", "checkpoint.every=64", "checkpoint.keep=99")
    ranks = started(forks, "ddp", [*options(str(whole), digits), *more], spoiled=bad)
    assert ranks.ended(seconds=200.0) == [0, 0], ranks.said.read_text()
    removals = [Hold("remove", bad[-1], number, "COMPLETE") for number in (1, 2, 3)]
    for hold in [*removals, *(Hold("write", bad[-1], number, "rollbacks.json") for number in (1, 2))]:
        ranks = started(forks, "ddp", [*options(str(run), digits), *more], [hold, None], spoiled=bad)
        assert ranks.listen("hold", seconds=120.0), ranks.said.read_text()
        ranks.kill(0, 1)
        ranks.ended(seconds=SURVIVAL)
        assert list(checkpoint.verify(str(run))) == []
    ranks = started(forks, "ddp", [*options(str(run), digits), *more], spoiled=bad)
    assert ranks.ended(seconds=200.0) == [0, 0], ranks.said.read_text()
    assert metrics(str(run)) == metrics(str(whole))
    assert files(str(run)) == files(str(whole))
    assert_same_bits(final(run), final(whole))
    (event,), (expected,) = read_rollbacks(str(run)), read_rollbacks(str(whole))
    assert event | {"time": 0} == expected | {"time": 0}
