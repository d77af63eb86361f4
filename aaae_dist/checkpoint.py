"""Checkpoints: saved whole or not at all, by all ranks, in one format for every engine and any number of ranks.

    checkpoints/000000102400/        named by the images seen
        00000-000.safetensors ...    rank and number: pieces of the state, flat, named "state/parameter"
        00000.json ...               what a rank has saved, for rank 0
        manifest.json                what is in which file, sizes and sha256, shapes, and the progress of the run
        COMPLETE                     written last, the manifest's sha256; a folder without it is no checkpoint
        ASIDE                        what COMPLETE held, where training went on from an older one

Whoever loads takes what overlaps with its own pieces, however these are cut. Older checkpoints go only after a new one
is complete. Tensors are safetensors: nothing is unpickled.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import prod
from typing import Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from aaae_dist import storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.baselines import METHODS
from aaae_dist.config import Config, load_config
from aaae_dist.errors import UserError
from aaae_dist.fingerprint import fingerprints
from aaae_dist.pieces import Pieces, cut, whole
from aaae_dist.randomness import signed

log = logging.getLogger(__name__)

COMPLETE, ASIDE, MANIFEST = "COMPLETE", "ASIDE", "manifest.json"
FILE_VALUES = 1 << 26  # of a file, 256 MB as float32: as much as whoever saves or loads holds beside its state


class DamagedError(UserError):
    """A checkpoint is not what was saved. Not raised when it merely cannot be read at the moment."""


class File(BaseModel):
    """What is known of a file: its size, its sha256, and of each tensor in it the first number and the one after the
    last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    sha256: str
    holds: dict[str, tuple[int, int]]


class Part(BaseModel):
    """What one rank has saved; `attempt` tells it from what an earlier attempt left there."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    attempt: str
    files: dict[str, File]
    fingerprints: dict[str, int]  # of its pieces, by "state/tensor"
    seconds: float  # that it took


class Manifest(BaseModel):
    """What a checkpoint holds: tensors by shape, files, and the progress to go on from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[3] = 3
    engine: str
    world: int
    config: str  # sha256 of the run's config.toml
    sound: bool  # whether the steps shortly before were good
    seconds: float = 0.0  # that saving took; 0: older than this field
    shapes: dict[str, list[int]]
    fingerprints: dict[str, int]  # of whole tensors, by "state/tensor"
    figures: dict[str, float]  # of the evaluation at that moment, if there was one
    progress: dict[str, Any]
    files: dict[str, File]


def folder(run: str) -> str:
    return storage.join(run, "checkpoints")


def name_of(images: int) -> str:
    return f"{images:012d}"


def complete(run: str) -> list[str]:
    """Names of the complete checkpoints of a run, oldest first."""
    return [
        name
        for name in storage.listing(folder(run))
        if name.isdigit() and storage.exists(storage.join(folder(run), name, COMPLETE))
    ]


def sound(run: str, names: Sequence[str]) -> Iterator[str]:
    """Those of these checkpoints that no bad step came shortly before, newest first."""
    for name in reversed(names):
        with suppress(DamagedError):
            if read_manifest(run, name).sound:
                yield name


# --- saving


def save_part(place: str, pieces: Pieces, *, rank: int, attempt: str) -> None:
    """Write a rank's pieces.

    Raises:
        UserError: the store fails or is full.
    """
    files, began = {}, time.monotonic()
    for number, portion in enumerate(cut(pieces, most=FILE_VALUES)):
        tensors = {
            f"{state}/{name}": values for name, piece in portion.items() for state, values in piece.values.items()
        }
        data, file = safetensors.torch.save(tensors), f"{rank:05d}-{number:03d}.safetensors"
        storage.write(storage.join(place, file), data)
        holds = {name: (piece.start, piece.stop) for name, piece in portion.items()}
        files[file] = File(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), holds=holds)
    numbers = {name: int(number) for name, number in fingerprints(pieces).items()}
    part = Part(attempt=attempt, files=files, fingerprints=numbers, seconds=time.monotonic() - began)
    storage.write_json(storage.join(place, f"{rank:05d}.json"), part.model_dump())


def saved_part(place: str, *, rank: int, attempt: str) -> Part | None:
    """What a rank has saved, when it is done; what an earlier attempt or a power cut left there is none of it."""
    url = storage.join(place, f"{rank:05d}.json")
    if not storage.exists(url):
        return None
    try:
        part = Part.model_validate_json(storage.read(url))
    except ValidationError:
        return None
    return part if part.attempt == attempt else None


def publish(place: str, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Make a checkpoint of what all ranks have saved, and of nothing else that lies there.

    Args:
        manifest: as it is without the parts.
    """
    held = Counter[str]()
    for file in (file for part in parts for file in part.files.values()):
        held.update({tensor: stop - start for tensor, (start, stop) in file.holds.items()})
    if odd := next((name for name, shape in manifest.shapes.items() if held[name] != prod(shape)), ""):
        raise RuntimeError(f"{place}: {held[odd]} values of {odd}, which has {prod(manifest.shapes[odd])}")
    numbers = Counter[str]()
    for part in parts:
        numbers.update(part.fingerprints)
    files = {file: about for part in parts for file, about in part.files.items()}
    sums = {name: signed(number) for name, number in numbers.items()}
    seconds = max(part.seconds for part in parts)
    manifest = manifest.model_copy(update={"files": files, "fingerprints": sums, "seconds": seconds})
    kept = {*manifest.files, *(f"{rank:05d}.json" for rank in range(manifest.world))}
    for stray in storage.listing(place).keys() - kept:
        storage.remove(storage.join(place, stray))
    data = manifest.model_dump_json(indent=1).encode()
    storage.write(storage.join(place, MANIFEST), data)
    storage.write(storage.join(place, COMPLETE), hashlib.sha256(data).hexdigest().encode())


def prune(run: str, *, keep: int, keep_every: int = 0, best: str = "") -> list[str]:
    """Remove all complete checkpoints but some, and incomplete ones older than the newest. The newest sound one stays.

    Args:
        keep: the newest that stay.
        keep_every: images after which the next stays; 0: none.
        best: figure of which the one with the lowest value stays; "": none.

    Returns:
        The names of the complete ones that were removed.
    """
    names = complete(run)
    kept = {*names[-keep:], *milestones(names, every=keep_every), lowest(run, names, best)}
    kept.add(next(sound(run, names), ""))
    for name in storage.listing(folder(run)):
        if name.isdigit() and name not in kept and names and name < names[-1]:
            storage.remove(storage.join(folder(run), name, COMPLETE))  # first: a half-removed one is no checkpoint
            storage.remove(storage.join(folder(run), name))
    return [name for name in names if name not in kept]


def milestones(names: Sequence[str], *, every: int) -> list[str]:
    """The first checkpoint in each interval of so many images but the first interval; 0: none."""
    first = {int(name) // every: name for name in reversed(names)} if every else {}
    return [name for number, name in first.items() if number]


def lowest(run: str, names: Sequence[str], figure: str) -> str:
    """The checkpoint with the lowest value of a figure, the newest of equals; empty: none has one."""
    found: list[tuple[float, str]] = []
    for name in reversed(names) if figure else ():
        with suppress(DamagedError):
            figures = read_manifest(run, name).figures
            found += [(figures[figure], name)] if figure in figures else []
    return min(found, key=lambda pair: pair[0])[1] if found else ""


# --- loading


def read_manifest(run: str, name: str) -> Manifest:
    """What a complete checkpoint holds.

    Raises:
        DamagedError: its manifest is not the one that was saved.
        UserError: the store cannot be read, or another version wrote it.
    """
    place = storage.join(folder(run), name)
    data, expected = (read_file(storage.join(place, file)) for file in (MANIFEST, COMPLETE))
    if hashlib.sha256(data).hexdigest().encode() != expected:
        raise DamagedError(f"{storage.join(place, MANIFEST)}: damaged, its bytes are not those that were saved")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError:
        raise UserError(
            f"{storage.join(place, MANIFEST)}: written by another version of aaae_dist; go on with that one, or begin "
            "another training.run"
        ) from None


def restore(
    run: str, names: Sequence[str], pieces: Pieces, *, agree: Callable[[str], str] = str
) -> tuple[str, Manifest] | None:
    """Fill pieces from the newest undamaged one of these checkpoints; damaged ones are named in the log.

    Args:
        agree: makes of what is wrong on this rank (nothing: "") what is wrong on any.

    Raises:
        UserError: all are damaged (training on from nothing would bury that), the store cannot be read, or the
            networks are others.
    """
    problems = []
    for name in reversed(names):
        manifest, problem = None, ""
        try:
            manifest = read_manifest(run, name)
            load(run, name, manifest, pieces)
        except DamagedError as error:
            problem = str(error)
        if problem := agree(problem):
            problems.append(problem)
            continue
        for passed, problem in zip(reversed(names), problems, strict=False):
            log.warning("checkpoint %s is passed over: %s", passed, problem)
        assert manifest
        return name, manifest
    if problems:
        raise UserError(
            f"{folder(run)}: all {len(problems)} checkpoints are damaged; restore one, or remove the folder to start "
            f"anew (the newest: {problems[0]})"
        )
    return None


def load(run: str, name: str, manifest: Manifest, pieces: Pieces) -> None:
    """Fill pieces with what a checkpoint holds, file by file. Every file that has a part of them is verified.

    Raises:
        DamagedError: a file is missing or not what was saved. The pieces hold some of it then.
        UserError: the store cannot be read, or the checkpoint is one of other networks.
    """
    place = storage.join(folder(run), name)
    if others := [tensor for tensor, piece in pieces.items() if manifest.shapes.get(tensor) != piece.shape]:
        raise UserError(
            f"{run}: its checkpoint is one of other networks than its config.toml says ({others[0]} is "
            f"{pieces[others[0]].shape} there, {manifest.shapes.get(others[0])} here); was that edited? set it back"
        )
    missing = {tensor: piece.stop - piece.start for tensor, piece in pieces.items()}
    for file, about in manifest.files.items():
        wanted = {tensor: pieces[tensor].overlap(*held) for tensor, held in about.holds.items() if tensor in pieces}
        if not any(wanted.values()):
            continue
        saved = read_tensors(storage.join(place, file), about)
        for tensor, part in wanted.items():
            if part:
                first = about.holds[tensor][0]
                for state, values in part.values.items():
                    values.copy_(saved[f"{state}/{tensor}"][part.start - first : part.stop - first])
                missing[tensor] -= part.stop - part.start
    if lacking := [tensor for tensor, values in missing.items() if values]:
        raise DamagedError(f"{storage.join(place, MANIFEST)}: no file holds all of {lacking[0]}")


def read_tensors(place: str, about: File) -> dict[str, Tensor]:
    """A file's tensors, by "state/parameter"."""
    data = read_file(place)
    if (about.bytes, about.sha256) != (len(data), hashlib.sha256(data).hexdigest()):
        raise DamagedError(f"{place}: damaged, its bytes are not those that were saved")
    return safetensors.torch.load(data)


def read_file(place: str) -> bytes:
    try:
        return storage.read(place)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedError(f"{place}: missing") from None
        raise


def verify(run: str) -> Iterator[str]:
    """Read every file of every complete checkpoint again; a line for each that is not what was saved."""
    for name in complete(run):
        found = list(damage(run, name))
        if storage.exists(storage.join(folder(run), name, COMPLETE)):  # else a training removed it meanwhile
            yield from found


def damage(run: str, name: str) -> Iterator[str]:
    """A line for each file of a checkpoint that is not what was saved."""
    try:
        files = read_manifest(run, name).files
    except DamagedError as error:
        yield str(error)
        return
    for file, about in files.items():
        try:
            read_tensors(storage.join(folder(run), name, file), about)
        except DamagedError as error:
            yield str(error)


def set_aside_after(run: str, name: str) -> None:
    """Set aside the checkpoints after this one, which training goes on from: they will be saved anew.

    Until then, whoever has mended one can make its ASIDE a COMPLETE again.
    """
    for later in reversed(complete(run)):  # newest first: killed amid this, it goes on from the last that is left
        if later > name:
            place = storage.join(folder(run), later)
            storage.write(storage.join(place, ASIDE), storage.read(storage.join(place, COMPLETE)))
            storage.remove(storage.join(place, COMPLETE))


def read_run_config(run: str) -> Config:
    """The resolved configuration of a run.

    Raises:
        UserError: there is no run here.
    """
    place = storage.join(run, "config.toml")
    if not storage.exists(place):
        raise UserError(f"{place}: no such file; RUN is the folder of a training (its training.run)")
    return load_config([place])


def load_average(run: str, *, name: str = "") -> tuple[GenerativeAutoencoder, Config, str]:
    """The averaged networks of a checkpoint (default: the newest undamaged), the run's settings, the checkpoint's name.

    Raises:
        UserError: there is no run or no such checkpoint, or it is damaged.
    """
    config, names = read_run_config(run), complete(run)
    if name and name not in names:
        raise UserError(f"--checkpoint {name}: {run} has {', '.join(names) or 'none'}; choose one of these")
    model = METHODS[config.model.method].build(config).average()
    pieces = whole(model, "average")
    if name:
        load(run, name, read_manifest(run, name), pieces)
        return model, config, name
    while names:
        try:
            found = restore(run, names, pieces)
            assert found
            return model, config, found[0]
        except UserError:
            there = complete(run)
            if there[-1:] == names[-1:]:
                raise
            names = there  # a training removed them meanwhile, and saved others
    raise UserError(
        f"{run}: no complete checkpoint yet; train it first, or wait for checkpoint.every = "
        f"{config.checkpoint.every} images"
    )
