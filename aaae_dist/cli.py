"""The command `aaae`: one function for each verb, heavy imports inside. stdout carries results, stderr everything else."""

import argparse
import io
import json
import logging
import os
import sys
from typing import Any, NoReturn

from aaae_dist.config import documentation, load_config
from aaae_dist.errors import UserError
from aaae_dist.stopping import StopRequest

log = logging.getLogger("aaae_dist")


def prepare(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from aaae_dist import shards

    make, takes_folder = shards.SOURCES[arguments.source], arguments.source != "digits"
    if takes_folder != bool(arguments.folder):
        raise UserError(f"aaae prepare {arguments.source}: " + ("give the folder (or fsspec URL) that holds the images" if takes_folder else "scikit-learn brings the images, so give no folder"))
    source = make(arguments.folder) if takes_folder else make()
    index, bad = shards.prepare(
        source,
        name=arguments.source,
        out=arguments.out,
        size=arguments.size,
        channels=arguments.channels,
        held_out=source.count // 10 if arguments.held_out is None else arguments.held_out,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        quality=arguments.quality,
        progress=lambda parts: tqdm(parts, unit=" shards", disable=not sys.stderr.isatty()),
    )
    for number in bad:
        log.warning("image %d of %s cannot be read and is left out", number, arguments.source)
    counts = {split: sum(shard.samples for shard in index.shards if shard.split == split) for split in ("train", "test")}
    print(f"{arguments.out}: {counts['train']:,} images to train on, {counts['test']:,} held out, {index.channels} x {index.height} x {index.width}, in {len(index.shards)} shards; {len(bad)} unreadable")


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
    train, held_out = (Reader(data.url, split=split, channels=data.channels, size=data.size, bad_share=data.bad_share, cache=data.cache) for split in (data.split, data.held_out))
    metrics = dict(judge(on_device(model), train=train, held_out=held_out, samples=chosen.samples, batch_size=chosen.batch_size, workers=data.workers))
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
    parts = (inference.sample(model, seed=arguments.seed, first=first, count=min(250, arguments.count - first)) for first in range(0, arguments.count, 250))
    images = torch.cat([part.cpu() for part in parts])
    write_images(arguments.out, images, inference.grid(images, columns=min(10, len(images))))


def reconstruct(arguments: argparse.Namespace) -> None:
    import torch

    from aaae_dist import inference
    from aaae_dist.checkpoint import load_average

    check_out(arguments.out)
    model, config, _ = load_average(arguments.run, name=arguments.checkpoint)
    originals = torch.stack([read_image(path, channels=config.data.channels, size=config.data.size) for path in arguments.images])
    images = inference.reconstruct(on_device(model), originals).cpu()
    write_images(arguments.out, images, inference.pairs(originals, images, columns=min(10, len(images))))


def track_sync(arguments: argparse.Namespace) -> None:
    from aaae_dist.tracking import sync

    print(f"{arguments.run}: MLflow has all {sync(arguments.run)} lines of metrics, and the pictures")


def shards_read(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from aaae_dist.data import Reader, stream
    from aaae_dist.shards import read_index

    index = read_index(arguments.url)
    reader = Reader(arguments.url, split=arguments.split, channels=index.channels, size=index.height)
    if arguments.rank >= arguments.world:
        raise UserError(f"--rank {arguments.rank}: ranks of --world {arguments.world} go from 0 to {arguments.world - 1}")
    batches = stream(
        reader,
        seed=arguments.seed,
        lanes=arguments.lanes,
        window=arguments.window,
        batch_size=arguments.batch_size,
        world=arguments.world,
        rank=arguments.rank,
        workers=arguments.workers,
        start=arguments.start,
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

    try:
        pixels = np.asarray(Image.open(io.BytesIO(storage.read(path))).convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not an image that can be read ({type(error).__name__}); give PNG, JPEG or WebP files") from None
    return torch.from_numpy(fit(pixels, channels=channels, size=size).copy()).view(size, size, channels).permute(2, 0, 1)


# --- the command line


def settings_help() -> str:
    """Every setting with its sentence, for `aaae train --help`."""
    lines, section = ["settings (in TOML files as [section] key = value, on the command line as section.key=value):"], ""
    for name, sentence in documentation().items():
        if name.partition(".")[0] != section:
            section = name.partition(".")[0]
            lines.append("")
        lines.append(f"  {name:<38} {sentence}")
    return "\n".join(lines)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return value


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="aaae",
        formatter_class=raw,
        description="Train the Adversarially Approximated Autoencoder, and use it.",
        epilog="""a first session:
  aaae prepare digits --out store/digits        real handwritten digits as webdataset shards
  aaae train configs/digits.toml                one process; several: accelerate launch --config_file launch/ddp.yaml -m aaae_dist train ...
  aaae evaluate runs/digits
  aaae sample runs/digits --count 100 --out samples.png""",
    )
    verbs = top.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, function: Any, summary: str, *, among: Any = verbs, example: str = "", **more: Any) -> argparse.ArgumentParser:
        made = among.add_parser(name, help=summary, description=summary, formatter_class=raw, epilog=f"example:\n  {example}" if example else None, **more)
        made.set_defaults(function=function)
        return made

    def of_run(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("run", metavar="RUN", help="folder of a training (its training.run), or any fsspec URL")
        return made

    def of_checkpoint(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("--checkpoint", default="", metavar="NAME", help="a folder below RUN/checkpoints; default: the newest undamaged")
        return made

    made = verb("prepare", prepare, "Write images as webdataset shards with an index.", example="aaae prepare folder photos/ --size 64 --quality 95 --out s3://bucket/photos")
    made.add_argument("source", choices=("digits", "mnist", "folder"), help="digits: scikit-learn's 1,797 digits; mnist: the official idx files in FOLDER; folder: image files below FOLDER, sub-folders are classes")
    made.add_argument("folder", nargs="?", default="", metavar="FOLDER", help="where the source's files are: a folder or any fsspec URL")
    made.add_argument("--out", required=True, metavar="URL", help="where to write: a new folder or any fsspec URL; index.json comes last")
    made.add_argument("--size", type=positive, default=0, help="pixels of a side; default: 8 for digits, 32 for mnist (bordered), 64 for a folder (short side resized, middle cut out)")
    made.add_argument("--channels", type=int, choices=(1, 3), default=0, help="1 (grey) or 3 (RGB); default: 1 for digits and mnist, 3 for a folder")
    made.add_argument("--held-out", type=not_negative, metavar="N", help="images held out as split `test` where the source has no official one; default: a tenth")
    made.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="default: 1000; aim at shards of 50 to 250 MB for an object store")
    made.add_argument("--seed", type=not_negative, default=0, help="of the shuffle before sharding; default: 0")
    made.add_argument("--quality", type=int, default=0, choices=range(101), metavar="0..100", help="of JPEG; 0: PNG, lossless; default: 0 (95 suits photographs)")

    made = verb("train", train, "Train, or continue: the same command again goes on from the newest checkpoint.", example="aaae train configs/digits.toml training.run=runs/second training.seed=1")
    made.epilog = f"{made.epilog}\n\n{settings_help()}"
    made.add_argument("config", nargs="+", metavar="CONFIG", help="TOML files and section.key=value overrides, merged left to right")

    made = of_checkpoint(of_run(verb("evaluate", evaluate, "Judge the averaged networks of a checkpoint.", example="aaae evaluate runs/digits --json")))
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")

    made = of_checkpoint(of_run(verb("sample", sample, "Draw images.", example="aaae sample runs/digits --count 5000 --out samples.npz")))
    made.add_argument("--count", type=positive, default=100, metavar="N", help="default: 100")
    made.add_argument("--seed", type=not_negative, default=0, help="sample i depends on the seed and i alone; default: 0")
    made.add_argument("--out", required=True, metavar="FILE", help=".png: a grid; .npz: array `images`, uint8, N x H x W x C")

    made = of_checkpoint(of_run(verb("reconstruct", reconstruct, "Encode images and decode them again.", example="aaae reconstruct runs/digits a.png b.png --out pairs.png")))
    made.add_argument("images", nargs="+", metavar="IMAGE", help="image files, resized to the networks' size")
    made.add_argument("--out", required=True, metavar="FILE", help=".png: originals above reconstructions; .npz: array `images`, uint8, N x H x W x C")

    below = verbs.add_parser("track", help="Metrics and MLflow.").add_subparsers(required=True, metavar="COMMAND")
    of_run(verb("sync", track_sync, "Deliver to MLflow what it missed of a run.", among=below, example="MLFLOW_TRACKING_URI=http://mlflow:5000 aaae track sync runs/digits"))

    below = verbs.add_parser("shards", help="Prepared data sets.").add_subparsers(required=True, metavar="COMMAND")
    made = verb("read", shards_read, "Print the keys that a rank reads, one JSON object a batch.", among=below, example="aaae shards read store/digits --world 2 --rank 1 --workers 0 --batch-size 64 --count 3")
    made.add_argument("url", metavar="URL", help="a prepared data set")
    made.add_argument("--split", default="train", help="default: train")
    made.add_argument("--world", type=positive, default=1, help="ranks; default: 1")
    made.add_argument("--rank", type=not_negative, default=0, help="default: 0")
    made.add_argument("--workers", type=not_negative, default=0, help="threads that read ahead; the order does not depend on it; default: 0")
    made.add_argument("--batch-size", type=positive, required=True, help="of the global batch, over all ranks")
    made.add_argument("--start", type=not_negative, default=0, metavar="P", help="first batch, counted over all epochs; default: 0")
    made.add_argument("--count", type=positive, default=10, metavar="C", help="batches; default: 10")
    made.add_argument("--seed", type=not_negative, default=0, help="default: 0")
    made.add_argument("--lanes", type=positive, default=16, help="as data.lanes; default: 16")
    made.add_argument("--window", type=positive, default=4096, help="as data.window; default: 4096")
    return top


def main() -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    rank = os.environ.get("RANK", "0")
    name = "aaae" if rank == "0" else f"aaae rank {rank}"
    logging.basicConfig(stream=sys.stderr, format=f"{name}: %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    try:
        arguments = parser().parse_args()
        arguments.function(arguments)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
