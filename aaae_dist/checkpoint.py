"""Checkpoints: saved whole or not at all.

    checkpoints/000000102400/        named by the images seen
        game.safetensors  average.safetensors  optimizer.safetensors  progress.json
        manifest.json                size and sha256 of each of them
        COMPLETE                     written last; a folder without it is no checkpoint

Older ones go only after a new one is complete. Tensors are plain safetensors by parameter name: nothing is unpickled.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from aaae_dist import storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.baselines import METHODS
from aaae_dist.config import Config, load_config
from aaae_dist.errors import UserError

log = logging.getLogger(__name__)

COMPLETE, MANIFEST, PROGRESS = "COMPLETE", "manifest.json", "progress.json"


class DamagedError(UserError):
    """A checkpoint is not what was saved. Not raised when it merely cannot be read at the moment."""


class Saved(NamedTuple):
    """A checkpoint's parts (such as "game") as tensors by name, on the CPU, and the progress saved with them."""

    name: str
    tensors: dict[str, dict[str, Tensor]]
    progress: dict[str, Any]


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


def save(
    run: str, images: int, *, tensors: Mapping[str, Mapping[str, Tensor]], progress: Mapping[str, Any], keep: int
) -> None:
    """Save, then remove all but the newest `keep` and whatever earlier attempts left behind.

    A checkpoint of the same images that is already complete stays as it is: training is deterministic.

    Raises:
        UserError: the store fails or is full; the checkpoints before this one are untouched.
    """
    name = name_of(images)
    if name not in complete(run):
        place = storage.join(folder(run), name)
        storage.remove(place)
        manifest = {}
        files = {
            f"{part}.safetensors": safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in values.items()})
            for part, values in tensors.items()
        }
        files[PROGRESS] = json.dumps(dict(progress), indent=1).encode()
        for file, data in files.items():
            storage.write(storage.join(place, file), data)
            manifest[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        storage.write_json(storage.join(place, MANIFEST), {"version": 1, "images": images, "files": manifest})
        storage.write(storage.join(place, COMPLETE), b"")
    prune(run, keep=keep)


def prune(run: str, *, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and incomplete ones older than the newest."""
    names = complete(run)
    kept = names[-keep:]
    for name in storage.listing(folder(run)):
        if name.isdigit() and name not in kept and kept and name < kept[-1]:
            storage.remove(storage.join(folder(run), name, COMPLETE))  # first: a half-removed one is no checkpoint
            storage.remove(storage.join(folder(run), name))


def read(run: str, name: str, *, parts: tuple[str, ...] = ("game", "average", "optimizer")) -> Saved:
    """Read and verify a complete checkpoint.

    Raises:
        DamagedError: a file is missing, has another size or another sha256 than the manifest says.
        UserError: the store cannot be read.
    """
    place = storage.join(folder(run), name)
    try:
        manifest = json.loads(read_file(storage.join(place, MANIFEST)))
    except ValueError:
        raise DamagedError(f"{storage.join(place, MANIFEST)}: damaged, not JSON") from None
    tensors, progress = {}, {}
    for file in (*(f"{part}.safetensors" for part in parts), PROGRESS):
        data = read_file(storage.join(place, file))
        try:
            listed = manifest["files"][file]
            if (listed["bytes"], listed["sha256"]) != (len(data), hashlib.sha256(data).hexdigest()):
                raise DamagedError(f"{storage.join(place, file)}: damaged, its bytes are not those that were saved")
        except (KeyError, TypeError):
            raise DamagedError(
                f"{storage.join(place, MANIFEST)}: damaged, it does not say what {file} must be"
            ) from None
        try:
            if file == PROGRESS:
                progress = json.loads(data)
            else:
                tensors[file.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except (ValueError, SafetensorError) as error:
            raise DamagedError(f"{storage.join(place, file)}: not of this format ({storage.one_line(error)})") from None
    return Saved(name, tensors, progress)


def read_file(place: str) -> bytes:
    try:
        return storage.read(place)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedError(f"{place}: missing") from None
        raise


def newest(run: str, *, parts: tuple[str, ...] = ("game", "average", "optimizer")) -> Saved | None:
    """The newest complete checkpoint that is undamaged; a damaged one is named in the log and passed over.

    Raises:
        UserError: there are checkpoints, but all are damaged: training on from nothing would bury that.
    """
    problems: dict[str, DamagedError] = {}
    for name in reversed(complete(run)):
        try:
            saved = read(run, name, parts=parts)
        except DamagedError as error:
            problems[name] = error
            continue
        for damaged, problem in problems.items():
            log.warning("checkpoint %s is passed over: %s", damaged, problem)
        return saved
    if problems:
        raise UserError(
            f"{folder(run)}: all {len(problems)} checkpoints are damaged; restore one, or remove the folder to start "
            f"anew (the newest: {next(iter(problems.values()))})"
        )
    return None


def discard_after(run: str, name: str) -> None:
    """Take the marker from the checkpoints after this one, which training goes on from: they will be saved anew."""
    for later in complete(run):
        if later > name:
            storage.remove(storage.join(folder(run), later, COMPLETE))


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, run: str) -> None:
    """Load tensors by name.

    Raises:
        UserError: they are those of other networks.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{run}: its checkpoint is one of other networks than its config.toml says "
            f"({storage.one_line(error)[:200]}); was that edited? set it back"
        ) from None


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
    saved = read(run, name, parts=("average",)) if name else newest(run, parts=("average",))
    if saved is None:
        raise UserError(
            f"{run}: no complete checkpoint yet; train it first, or wait for checkpoint.every = "
            f"{config.checkpoint.every} images"
        )
    model = METHODS[config.model.method].build(config).average()
    fill(model, saved.tensors["average"], run=run)
    return model, config, saved.name
