"""The command `aaae`: one function for each verb, heavy imports inside.

stdout carries results, stderr everything else.
"""

import argparse
import io
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from aaae_dist import storage
from aaae_dist.arguments import parser
from aaae_dist.config import Data, load_config
from aaae_dist.errors import UserError
from aaae_dist.stopping import StopRequest

log = logging.getLogger("aaae_dist")

AT_ONCE = 250  # images of a forward pass


def prepare(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from aaae_dist.shards import prepare as write
    from aaae_dist.sources import SOURCES

    if not arguments.out:
        raise UserError("--out: must not be empty; give a new folder or any fsspec URL")
    source = SOURCES[arguments.source](arguments.folder)
    index, bad = write(
        source,
        name=arguments.source,
        out=arguments.out,
        size=arguments.size,
        channels=arguments.channels,
        held_out=arguments.held_out or max(source.count // 10, 1),
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        quality=arguments.quality,
        progress=lambda shards: tqdm(shards, unit=" shards", disable=not sys.stderr.isatty()),
    )
    for number in bad:
        log.warning("image %d of %s cannot be read and is left out", number, arguments.source)
    counts = {
        split: sum(shard.samples for shard in index.shards if shard.split == split) for split in ("train", "test")
    }
    print(
        f"{arguments.out}: {counts['train']:,} images to train on, {counts['test']:,} held out, {index.channels} x "
        f"{index.height} x {index.width}, in {len(index.shards)} shards; {len(bad)} unreadable"
    )


def train(arguments: argparse.Namespace) -> None:
    stop = StopRequest()
    stop.listen()  # before the seconds that the imports take
    config = load_config(arguments.config)
    from aaae_dist.distributed import leave, lost_peer
    from aaae_dist.training import Trainer

    try:
        Trainer(config, stop=stop).train()
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        raise UserError(
            f"{config.training.run}: another rank is gone, as its own message says, or was silent for longer than "
            "training.patience; the same command again goes on from the last checkpoint"
        ) from error
    leave()


def evaluate(arguments: argparse.Namespace) -> None:
    from aaae_dist.checkpoint import load_average, read
    from aaae_dist.data import Reader
    from aaae_dist.evaluation import evaluate as judge

    model, config, name = load_average(arguments.run, name=arguments.checkpoint)
    data, chosen = config.data, config.evaluation
    train, held_out = (Reader(data, split=split) for split in (data.split, data.held_out))
    if read(arguments.run, name, parts=()).progress["data"] != train.fingerprint:
        raise UserError(
            f"{data.url}: not the data set that {arguments.run} was trained on, its shards differ; bring it back"
        )
    metrics = dict(
        judge(
            on_device(model),
            train=train,
            held_out=held_out,
            samples=chosen.samples,
            batch_size=chosen.batch_size,
            workers=data.workers,
        )
    )
    if arguments.json:
        numbers = {metric: value if math.isfinite(value) else None for metric, value in metrics.items()}
        print(json.dumps({"run": arguments.run, "checkpoint": name, "images": int(name), **numbers}))
        return
    print(f"{arguments.run}, averaged networks after {int(name):,} images")
    for metric, value in metrics.items():
        print(f"  {metric:<40} {value:.5g}")


def sample(arguments: argparse.Namespace) -> None:
    import torch

    from aaae_dist import inference
    from aaae_dist.checkpoint import load_average

    check_out(arguments.out)
    model, config, _ = load_average(arguments.run, name=arguments.checkpoint)
    model, count, data = on_device(model), arguments.count, config.data
    images = torch.empty(count, data.channels, data.size, data.size, dtype=torch.uint8)
    for first in range(0, count, AT_ONCE):
        part = images[first : first + AT_ONCE]
        part.copy_(inference.sample(model, seed=arguments.seed, first=first, count=len(part)))
    write_images(arguments.out, images, lambda: inference.grid(images, columns=math.isqrt(count - 1) + 1))


def reconstruct(arguments: argparse.Namespace) -> None:
    import torch

    from aaae_dist import inference
    from aaae_dist.checkpoint import load_average

    check_out(arguments.out)
    if arguments.out in arguments.images:
        raise UserError(f"--out {arguments.out}: it is one of the images; choose another file")
    model, config, _ = load_average(arguments.run, name=arguments.checkpoint)
    shape = {"channels": config.data.channels, "size": config.data.size}
    originals = torch.stack([read_image(path, **shape) for path in arguments.images])
    model = on_device(model)
    images = torch.cat([inference.reconstruct(model, part).cpu() for part in originals.split(AT_ONCE)])
    write_images(arguments.out, images, lambda: inference.pairs(originals, images, columns=min(10, len(images))))


def track_sync(arguments: argparse.Namespace) -> None:
    from aaae_dist.tracking import sync

    print(f"{arguments.run}: MLflow has all {sync(arguments.run)} lines of metrics, and the pictures")


def shards_read(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from aaae_dist.data import Order, Reader, stream
    from aaae_dist.shards import read_index

    world, size = arguments.world, arguments.batch_size
    if arguments.rank >= world:
        raise UserError(f"--rank {arguments.rank}: must be less than --world {world}; ranks are counted from 0")
    if size % world:
        raise UserError(f"--batch-size {size}: must be a multiple of --world {world}, as every rank gets its share")
    index = read_index(arguments.url)
    # Not validated: what the data set says of itself holds here.
    data = Data.model_construct(url=arguments.url, channels=index.channels, size=index.height)
    reader = Reader(data, split=arguments.split)
    order = {"seed": arguments.seed, "lanes": arguments.lanes, "window": arguments.window}
    epoch, position = Order(reader.counts, **order).after(arguments.start, batch_size=size)
    batches = stream(
        reader,
        **order,
        batch_size=size,
        world=world,
        rank=arguments.rank,
        workers=arguments.workers,
        epoch=epoch,
        position=position,
    )
    for number, batch in enumerate(islice(batches, arguments.count), start=arguments.start):
        print(json.dumps({"batch": number, "keys": batch.keys}), flush=True)


# --- pieces of the commands


def on_device(model: Any) -> Any:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_out(out: str) -> None:
    if not out.endswith((".png", ".npz")):
        raise UserError(f"--out {out}: must end in .png (a picture) or .npz (an array `images`, uint8, N x H x W x C)")


def write_images(out: str, images: Any, overview: Callable[[], Any]) -> None:
    """Write uint8 images (N, C, H, W) as an array, or a picture of them."""
    import numpy as np

    from aaae_dist.inference import picture

    file = io.BytesIO()
    if out.endswith(".npz"):
        np.savez_compressed(file, images=images.permute(0, 2, 3, 1).numpy())
    else:
        picture(overview()).save(file, "PNG")
    storage.write(out, file.getvalue())
    print(f"{out}: {len(images)} images")


def read_image(path: str, *, channels: int, size: int) -> Any:
    """An image file as the networks take it: uint8 (C, H, W)."""
    import torch

    from aaae_dist.shards import fit
    from aaae_dist.sources import decode

    try:
        pixels = decode(storage.read(path))
    except ValueError as error:
        raise UserError(f"{path}: not an image that can be read ({error}); give PNG, JPEG or WebP files") from None
    fitted = torch.from_numpy(fit(pixels, channels=channels, size=size).copy())
    return fitted.view(size, size, channels).permute(2, 0, 1)


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "track sync": track_sync,
    "shards read": shards_read,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    rank = os.environ.get("RANK", "0")
    name = "aaae" if rank == "0" else f"aaae rank {rank}"
    logging.basicConfig(stream=sys.stderr, format=f"{name}: %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    try:
        try:
            arguments = parser().parse_args(argv)
            COMMANDS[arguments.command](arguments)
        finally:
            if sys.stdout:  # None where the caller closed it
                sys.stdout.flush()  # so that a failure to deliver the results is met here
    except KeyboardInterrupt:
        end(128 + signal.SIGINT)
    except UserError as error:
        mistake = str(error)
    except (OSError, MemoryError, RuntimeError) as error:
        mistake = circumstance(error)
        if not mistake:
            raise
    else:
        end(0)
    print(f"{name}: {' '.join(mistake.splitlines())}", file=sys.stderr, flush=True)
    end(2)


def end(code: int) -> NoReturn:
    """Exit; as one rank of several, at once.

    Gloo's threads let go of Python objects when they come to it. One that comes to it while the interpreter takes
    itself down is killed inside C++, and the whole process with it (SIGABRT, "terminate called without an active
    exception"): one in three of the runs that had nothing left to do ended so.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def circumstance(error: Exception) -> str:
    """What went wrong around this program and not in it, in one line; empty: nothing."""
    if isinstance(error, OSError):  # of stdout, as a rule: storage explains its files itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)  # whoever read the results, such as `head`, has seen enough
        return f"{error.filename or 'stdout'}: {storage.reason(error)}"
    if isinstance(error, MemoryError) or "allocate" in str(error):  # torch raises a RuntimeError
        what = storage.one_line(error).rpartition("Allocator: ")[2]
        return (
            f"out of memory ({what}); lower --count or --size here, or training.micro_batch_size, "
            "evaluation.batch_size or model.width in the configuration"
        )
    return ""
