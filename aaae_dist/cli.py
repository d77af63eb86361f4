"""The command `aaae`: one function for each verb, heavy imports inside.

stdout carries results, stderr everything else.
"""

import argparse
import io
import json
import logging
import os
import sys
from typing import Any, NoReturn

from aaae_dist.arguments import parser
from aaae_dist.config import Data, load_config
from aaae_dist.errors import UserError
from aaae_dist.stopping import StopRequest

log = logging.getLogger("aaae_dist")


def prepare(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from aaae_dist.shards import prepare as write
    from aaae_dist.sources import SOURCES

    source = SOURCES[arguments.source](arguments.folder)
    index, bad = write(
        source,
        name=arguments.source,
        out=arguments.out,
        size=arguments.size,
        channels=arguments.channels,
        held_out=source.count // 10 if arguments.held_out is None else arguments.held_out,
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
    from aaae_dist.training import Trainer

    Trainer(config, stop=stop).train()


def evaluate(arguments: argparse.Namespace) -> None:
    from aaae_dist.checkpoint import load_average
    from aaae_dist.data import Reader
    from aaae_dist.evaluation import evaluate as judge

    model, config, name = load_average(arguments.run, name=arguments.checkpoint)
    data, chosen = config.data, config.evaluation
    train, held_out = (Reader(data, split=split) for split in (data.split, data.held_out))
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
        print(json.dumps({"run": arguments.run, "checkpoint": name, "images": int(name), **metrics}))
        return
    print(f"{arguments.run}, averaged networks after {int(name):,} images")
    for metric, value in metrics.items():
        print(f"  {metric:<40} {value:.5g}")


def sample(arguments: argparse.Namespace) -> None:
    import torch

    from aaae_dist import inference
    from aaae_dist.checkpoint import load_average

    check_out(arguments.out)
    model = on_device(load_average(arguments.run, name=arguments.checkpoint)[0])
    parts = (
        inference.sample(model, seed=arguments.seed, first=first, count=min(250, arguments.count - first))
        for first in range(0, arguments.count, 250)
    )
    images = torch.cat([part.cpu() for part in parts])
    write_images(arguments.out, images, inference.grid(images, columns=min(10, len(images))))


def reconstruct(arguments: argparse.Namespace) -> None:
    import torch

    from aaae_dist import inference
    from aaae_dist.checkpoint import load_average

    check_out(arguments.out)
    model, config, _ = load_average(arguments.run, name=arguments.checkpoint)
    originals = torch.stack(
        [read_image(path, channels=config.data.channels, size=config.data.size) for path in arguments.images]
    )
    images = inference.reconstruct(on_device(model), originals).cpu()
    write_images(arguments.out, images, inference.pairs(originals, images, columns=min(10, len(images))))


def track_sync(arguments: argparse.Namespace) -> None:
    from aaae_dist.tracking import sync

    print(f"{arguments.run}: MLflow has all {sync(arguments.run)} lines of metrics, and the pictures")


def shards_read(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from aaae_dist.data import Order, Reader, stream
    from aaae_dist.shards import read_index

    index = read_index(arguments.url)
    data = Data.model_validate({"url": arguments.url, "channels": index.channels, "size": index.height})
    reader = Reader(data, split=arguments.split)
    if arguments.rank >= arguments.world:
        raise UserError(
            f"--rank {arguments.rank}: ranks of --world {arguments.world} go from 0 to {arguments.world - 1}"
        )
    order = {"seed": arguments.seed, "lanes": arguments.lanes, "window": arguments.window}
    epoch, position = Order(reader.counts, **order).after(arguments.start, batch_size=arguments.batch_size)
    batches = stream(
        reader,
        **order,
        batch_size=arguments.batch_size,
        world=arguments.world,
        rank=arguments.rank,
        workers=arguments.workers,
        epoch=epoch,
        position=position,
    )
    for number, batch in enumerate(islice(batches, arguments.count), start=arguments.start):
        print(json.dumps({"batch": number, "keys": batch.keys}))


# --- pieces of the commands


def on_device(model: Any) -> Any:
    import torch

    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_out(out: str) -> None:
    if not out.endswith((".png", ".npz")):
        raise UserError(f"--out {out}: must end in .png (a picture) or .npz (an array `images`, uint8, N x H x W x C)")


def write_images(out: str, images: Any, overview: Any) -> None:
    import numpy as np

    from aaae_dist import storage
    from aaae_dist.inference import picture

    file = io.BytesIO()
    if out.endswith(".npz"):
        np.savez_compressed(file, images=images.permute(0, 2, 3, 1).numpy())
    else:
        picture(overview).save(file, "PNG")
    storage.write(out, file.getvalue())
    print(f"{out}: {len(images)} images")


def read_image(path: str, *, channels: int, size: int) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    from aaae_dist import storage
    from aaae_dist.shards import fit
    from aaae_dist.sources import UNREADABLE

    try:
        pixels = np.asarray(Image.open(io.BytesIO(storage.read(path))).convert("L" if channels == 1 else "RGB"))
    except UNREADABLE as error:
        raise UserError(
            f"{path}: not an image that can be read ({type(error).__name__}); give PNG, JPEG or WebP files"
        ) from None
    return (
        torch.from_numpy(fit(pixels, channels=channels, size=size).copy()).view(size, size, channels).permute(2, 0, 1)
    )


COMMANDS = {
    "prepare": prepare,
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "track sync": track_sync,
    "shards read": shards_read,
}


def main() -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    rank = os.environ.get("RANK", "0")
    name = "aaae" if rank == "0" else f"aaae rank {rank}"
    logging.basicConfig(stream=sys.stderr, format=f"{name}: %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    try:
        arguments = parser().parse_args()
        COMMANDS[arguments.command](arguments)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
