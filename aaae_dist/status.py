"""How a run stands, from its folder alone: from any machine that reads it, and nothing is written there."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from aaae_dist import checkpoint, storage
from aaae_dist.errors import UserError
from aaae_dist.guard import ROLLBACKS, read_rollbacks
from aaae_dist.interval import slow_data, straggler
from aaae_dist.progress import counted, duration
from aaae_dist.quarantine import QUARANTINE, Quarantine
from aaae_dist.tracking import UPLOAD_SECONDS, parse_lines, read_about

EVERY = 5.0  # seconds between two looks at a run that is followed
TAIL = 1 << 20  # bytes at the end of metrics.jsonl that are read: the lines of hours as a rule
RECENT = 10  # lines that the time left is reckoned from
# A run is silent when its newest line is older than so many usual times between two, and than so many seconds.
INTERVALS, LEAST, START = 5, 60.0, 600.0
STATES = {"RUNNING": "running", "KILLED": "stopped", "FAILED": "failed", "FINISHED": "finished"}
ENDED = ("stopped", "failed", "finished")
DAY = 86_400.0


class Saved(NamedTuple):
    """A checkpoint: the images seen, when it was complete, and its size."""

    images: int
    time: float
    bytes: int


class Seen(NamedTuple):
    """What a run's folder holds."""

    total: int  # images to train on
    remote: bool  # whether its lines come late, many at once
    about: dict[str, Any]  # empty: it has not begun
    lines: list[dict[str, Any]]  # the newest of metrics.jsonl
    saved: Saved | None  # the newest undamaged checkpoint
    damage: list[str]  # about newer ones
    incomplete: list[str]  # names of checkpoints
    rollbacks: list[dict[str, Any]]
    bad: int  # samples that could not be used


def look(run: str) -> Seen:
    """Read what a run's folder holds.

    Raises:
        UserError: there is no run, or the store cannot be read.
    """
    config, sizes = checkpoint.read_run_config(run), storage.listing(run)
    names, complete, damage = storage.listing(checkpoint.folder(run)), checkpoint.complete(run), list[str]()
    return Seen(
        total=config.training.images,
        remote=not storage.is_local(run),
        about=read_about(run) if "about.json" in sizes else {},
        lines=newest_lines(run, size=sizes.get("metrics.jsonl", 0)),
        saved=newest_checkpoint(run, complete, damage),
        damage=damage,
        incomplete=[name for name in names if name.isdigit() and name not in complete],
        rollbacks=read_rollbacks(run) if ROLLBACKS in sizes else [],
        bad=len(Quarantine(run).samples) if any(name.startswith(QUARANTINE[:10]) for name in sizes) else 0,
    )


def newest_lines(run: str, *, size: int) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl, of which so many bytes are there. One that is cut is dropped."""
    place = storage.join(run, "metrics.jsonl")
    return parse_lines(storage.read(place, max(size - TAIL, 0), size)) if size else []


def newest_checkpoint(run: str, names: Sequence[str], damage: list[str]) -> Saved | None:
    """The newest of these with a manifest that is as it was saved. (Its tensors are not read.)

    Args:
        damage: takes a line about each that is passed over.
    """
    for name in reversed(names):
        try:
            files = checkpoint.read_manifest(run, name).files
            when = storage.modified(storage.join(checkpoint.folder(run), name, checkpoint.COMPLETE))
        except UserError as error:
            if name in checkpoint.complete(run):  # else a training removed it meanwhile
                if not isinstance(error, checkpoint.DamagedError):
                    raise
                damage.append(str(error))
            continue
        return Saved(int(name), when, sum(file.bytes for file in files.values()))
    return None


def describe(run: str, seen: Seen, *, now: float) -> dict[str, Any]:
    """How a run stands, in numbers, when it is `now`, in seconds since 1970."""
    images = max(seen.lines[-1]["images"] if seen.lines else 0, seen.saved.images if seen.saved else 0)
    state = STATES[seen.about["status"]] if seen.about else "not begun"
    quiet = silence(seen, now=now) if state == "running" else 0.0
    state = "silent" if quiet else state
    _, figures = newest(seen.lines, "guard/skipped_steps")
    judged, held_out = newest(seen.lines, "reconstruction/held_out_mse")
    _, losses = newest(seen.lines, "reconstruction/mse")
    _, speed = newest(seen.lines, "speed/images_per_second")
    skipped = int(figures.get("guard/skipped_steps", 0))
    return {
        "run": run,
        "state": state,
        "silent_seconds": round(quiet, 1) if quiet else None,
        "images": images,
        "of_images": seen.total,
        "share": min(images / seen.total, 1.0),
        "seconds_left": seconds_left(seen, images=images) if state == "running" else None,
        "images_per_second": speed.get("speed/images_per_second"),
        "losses": {name: value for name, value in losses.items() if name.endswith(("/mse", "/loss", "/opponent_loss"))},
        "held_out": held_out,
        "held_out_images": judged,
        "checkpoint": seen.saved._asdict() if seen.saved else None,
        "restarts": seen.about.get("starts", 1) - 1 if seen.about else 0,
        "rollbacks": len(seen.rollbacks),
        "newest_rollback": seen.rollbacks[-1] if seen.rollbacks else None,
        "skipped_steps": skipped,
        "bad_samples": seen.bad,
        "warnings": list(warnings(seen, figures, skipped=skipped, under_way=state == "running")),
    }


def newest(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[int | None, dict[str, float]]:
    """Of the newest line that has a figure, the images and all figures that are numbers; None: none has it."""
    found = next((line for line in reversed(lines) if name in line), {})
    numbers = {name: float(value) for name, value in found.items() if "/" in name and value is not None}
    return found.get("images"), numbers


def since_start(seen: Seen) -> list[dict[str, Any]]:
    """The lines of the training that was started last: between it and the one before it lie hours, perhaps."""
    return [line for line in seen.lines if line["time"] >= seen.about.get("began", 0)]


def silence(seen: Seen, *, now: float) -> float:
    """For how many seconds a run that is said to train has written nothing, if that is too long; else 0.

    Twice as long as it was silent before, as while it was evaluated, is not too long.
    """
    lines = since_start(seen)
    quiet = now - max([seen.about.get("began", 0.0), *(line["time"] for line in lines)])
    gaps = [later["time"] - sooner["time"] for sooner, later in pairwise(lines)]
    most = max(LEAST, INTERVALS * median(gaps), 2 * max(gaps)) if gaps else START
    return quiet if quiet > most + (UPLOAD_SECONDS if seen.remote else 0.0) else 0.0


def seconds_left(seen: Seen, *, images: int) -> float | None:
    """By the pace of the last lines, with what evaluations and checkpoints took; None: not known yet."""
    lines = since_start(seen)[-RECENT:]
    if len(lines) > 1 and lines[-1]["images"] > lines[0]["images"]:
        pace = (lines[-1]["images"] - lines[0]["images"]) / max(lines[-1]["time"] - lines[0]["time"], 1e-3)
    else:
        pace = newest(lines, "speed/images_per_second")[1].get("speed/images_per_second", 0.0)
    return round(max(seen.total - images, 0) / pace, 1) if pace else None


def warnings(seen: Seen, figures: Mapping[str, float], *, skipped: int, under_way: bool) -> Iterator[str]:
    """What somebody should look at.

    Args:
        figures: of the newest line about an interval of training.
        under_way: whether a checkpoint may be incomplete because it is being saved.
    """
    if skipped:
        yield f"{counted(skipped, 'step')} skipped: a loss or gradient was not finite, or far above the usual"
    if seen.bad:
        yield f"{counted(seen.bad, 'sample')} could not be used, see quarantine.jsonl"
    yield from filter(None, (straggler(figures), slow_data(figures)))
    yield from seen.damage
    for name in () if under_way else seen.incomplete:
        yield f"checkpoint {name} is incomplete: it was being saved when training ended, or was gone back from"


def text(found: Mapping[str, Any], *, now: float) -> str:
    """The same for people; the first line says the most."""
    first = f"{found['run']}: {found['state']}"
    if found["state"] == "silent":
        first += f" for {duration(found['silent_seconds'])}: it waits, or was killed"
    first += f", {found['images']:,} of {found['of_images']:,} images ({100 * found['share']:.0f} %)"
    if found["seconds_left"] is not None:
        first += f", {duration(found['seconds_left'])} left"
    if found["images_per_second"]:
        first += f", {found['images_per_second']:,.0f} images/s"
    rows = [("losses", shown(found["losses"])), ("held out", shown(found["held_out"]))]
    if found["held_out"]:
        rows[1] = ("held out", f"after {found['held_out_images']:,} images: {shown(found['held_out'])}")
    if saved := found["checkpoint"]:
        when = max(now - saved["time"], 0.0)
        past = duration(when) if when < 2 * DAY else f"{when / DAY:.0f} days"
        rows.append(("checkpoint", f"after {saved['images']:,} images, {past} ago, {saved['bytes'] / 1e6:,.1f} MB"))
    else:
        rows.append(("checkpoint", "none yet"))
    again = f"{found['restarts']}, rollbacks: {found['rollbacks']}"
    if back := found["newest_rollback"]:
        again += f", the last from {back['after']:,} to {back['to']:,} images: {back['because']}"
    rows += [("restarts", again), *(("warning", warning) for warning in found["warnings"])]
    return "\n".join([first, *(f"  {name:<11} {row}" for name, row in rows if row)])


def shown(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('reconstruction/')} {value:.4g}" for name, value in figures.items())


def views(run: str, *, follow: bool) -> Iterator[dict[str, Any]]:
    """How a run stands now; and if it is followed, again every few seconds until it has ended."""
    while True:
        yield (found := describe(run, look(run), now=time.time()))
        if not follow or found["state"] in ENDED:
            return
        time.sleep(EVERY)


def news(found: Mapping[str, Any]) -> str:
    """All that changes only when something happens: not the seconds of a silence."""
    return json.dumps({name: value for name, value in found.items() if name != "silent_seconds"})
