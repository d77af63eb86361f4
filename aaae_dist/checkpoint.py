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
from torch import Tensor

from aaae_dist import storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.baselines import METHODS
from aaae_dist.config import Config, load_config
from aaae_dist.errors import UserError

log = logging.getLogger(__name__)

COMPLETE, MANIFEST, PROGRESS = "COMPLETE", "manifest.json", "progress.json"


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
        UserError: a file is missing, has another size or another sha256 than the manifest says.
    """
    place = storage.join(folder(run), name)
    manifest = storage.read_json(storage.join(place, MANIFEST))
    tensors, progress = {}, {}
    for file in (*(f"{part}.safetensors" for part in parts), PROGRESS):
        data = storage.read(storage.join(place, file))
        try:
            expected = manifest["files"][file]
            if len(data) != expected["bytes"] or hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise UserError(f"{storage.join(place, file)}: damaged, its bytes are not those that were saved")
            if file == PROGRESS:
                progress = json.loads(data)
            else:
                tensors[file.removesuffix(".safetensors")] = safetensors.torch.load(data)
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"{storage.join(place, file)}: not of this format ({storage.one_line(error)})") from None
    return Saved(name, tensors, progress)


def newest(run: str, *, parts: tuple[str, ...] = ("game", "average", "optimizer")) -> Saved | None:
    """The newest complete checkpoint that is undamaged; a damaged one is named in the log and passed over.

    Raises:
        UserError: there are checkpoints, but all are damaged: training on from nothing would bury that.
    """
    names = complete(run)
    for name in reversed(names):
        try:
            return read(run, name, parts=parts)
        except UserError as error:
            log.warning("checkpoint %s is passed over: %s", name, error)
    if names:
        raise UserError(
            f"{folder(run)}: all {len(names)} checkpoints are damaged; restore one, or remove the folder to start anew"
        )
    return None


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
    """The averaged networks of a checkpoint (default: the newest undamaged), the run's configuration, the checkpoint's
    name.

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
    model.load_state_dict(saved.tensors["average"])
    return model, config, saved.name
