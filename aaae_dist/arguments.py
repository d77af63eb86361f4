"""The command line of `aaae`: its verbs, their arguments, and help that teaches."""

import argparse
from typing import Any

from aaae_dist.config import documentation


def settings_help() -> str:
    """Every setting with its sentence, for `aaae train --help`."""
    lines, section = (
        ["settings (in TOML files as [section] key = value, on the command line as section.key=value):"],
        "",
    )
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
  aaae train configs/digits.toml                on one process, or on several:
  accelerate launch --config_file launch/ddp.yaml -m aaae_dist train configs/digits.toml
  aaae evaluate runs/digits
  aaae sample runs/digits --count 100 --out samples.png""",
    )
    verbs = top.add_subparsers(required=True, metavar="COMMAND")

    def verb(command: str, summary: str, *, example: str, among: Any = verbs) -> argparse.ArgumentParser:
        made = among.add_parser(
            command.split()[-1],
            help=summary,
            description=summary,
            formatter_class=raw,
            epilog=f"example:\n  {example}",
        )
        made.set_defaults(command=command)
        return made

    def of_run(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument("run", metavar="RUN", help="folder of a training (its training.run), or any fsspec URL")
        return made

    def of_checkpoint(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument(
            "--checkpoint",
            default="",
            metavar="NAME",
            help="a folder below RUN/checkpoints; default: the newest undamaged",
        )
        return made

    made = verb(
        "prepare",
        "Write images as webdataset shards with an index.",
        example="aaae prepare folder photos/ --size 64 --quality 95 --out s3://bucket/photos",
    )
    made.add_argument(
        "source",
        choices=("digits", "mnist", "folder"),
        help="digits: scikit-learn's 1,797 digits; mnist: the official idx files in FOLDER; folder: "
        "image files below FOLDER, sub-folders are classes",
    )
    made.add_argument(
        "folder",
        nargs="?",
        default="",
        metavar="FOLDER",
        help="where the source's files are: a folder or any fsspec URL",
    )
    made.add_argument(
        "--out",
        required=True,
        metavar="URL",
        help="where to write: a new folder or any fsspec URL; index.json comes last",
    )
    made.add_argument(
        "--size",
        type=positive,
        default=0,
        help="pixels of a side; default: 8 for digits, 32 for mnist (bordered), 64 for a folder "
        "(short side resized, middle cut out)",
    )
    made.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        default=0,
        help="1 (grey) or 3 (RGB); default: 1 for digits and mnist, 3 for a folder",
    )
    made.add_argument(
        "--held-out",
        type=not_negative,
        metavar="N",
        help="images held out as split `test` where the source has no official one; default: a tenth",
    )
    made.add_argument(
        "--samples-per-shard",
        type=positive,
        default=1000,
        metavar="N",
        help="default: 1000; aim at shards of 50 to 250 MB for an object store",
    )
    made.add_argument("--seed", type=not_negative, default=0, help="of the shuffle before sharding; default: 0")
    made.add_argument(
        "--quality",
        type=int,
        default=0,
        choices=range(101),
        metavar="0..100",
        help="of JPEG; 0: PNG, lossless; default: 0 (95 suits photographs)",
    )

    made = verb(
        "train",
        "Train, or continue: the same command again goes on from the newest checkpoint.",
        example="aaae train configs/digits.toml training.run=runs/second training.seed=1",
    )
    made.epilog = f"{made.epilog}\n\n{settings_help()}"
    made.add_argument(
        "config", nargs="+", metavar="CONFIG", help="TOML files and section.key=value overrides, merged left to right"
    )

    made = of_checkpoint(
        of_run(
            verb(
                "evaluate",
                "Judge the averaged networks of a checkpoint.",
                example="aaae evaluate runs/digits --json",
            )
        )
    )
    made.add_argument("--json", action="store_true", help="one JSON object on stdout")

    made = of_checkpoint(
        of_run(verb("sample", "Draw images.", example="aaae sample runs/digits --count 5000 --out samples.npz"))
    )
    made.add_argument("--count", type=positive, default=100, metavar="N", help="default: 100")
    made.add_argument(
        "--seed", type=not_negative, default=0, help="sample i depends on the seed and i alone; default: 0"
    )
    made.add_argument(
        "--out", required=True, metavar="FILE", help=".png: a grid; .npz: array `images`, uint8, N x H x W x C"
    )

    made = of_checkpoint(
        of_run(
            verb(
                "reconstruct",
                "Encode images and decode them again.",
                example="aaae reconstruct runs/digits a.png b.png --out pairs.png",
            )
        )
    )
    made.add_argument("images", nargs="+", metavar="IMAGE", help="image files, resized to the networks' size")
    made.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=".png: originals above reconstructions; .npz: array `images`, uint8, N x H x W x C",
    )

    below = verbs.add_parser("track", help="Metrics and MLflow.").add_subparsers(required=True, metavar="COMMAND")
    of_run(
        verb(
            "track sync",
            "Deliver to MLflow what it missed of a run.",
            among=below,
            example="MLFLOW_TRACKING_URI=http://mlflow:5000 aaae track sync runs/digits",
        )
    )

    below = verbs.add_parser("shards", help="Prepared data sets.").add_subparsers(required=True, metavar="COMMAND")
    made = verb(
        "shards read",
        "Print the keys that a rank reads, one JSON object a batch.",
        among=below,
        example="aaae shards read store/digits --world 2 --rank 1 --workers 0 --batch-size 64 --count 3",
    )
    made.add_argument("url", metavar="URL", help="a prepared data set")
    made.add_argument("--split", default="train", help="default: train")
    made.add_argument("--world", type=positive, default=1, help="ranks; default: 1")
    made.add_argument("--rank", type=not_negative, default=0, help="default: 0")
    made.add_argument(
        "--workers",
        type=not_negative,
        default=0,
        help="threads that read ahead; the order does not depend on it; default: 0",
    )
    made.add_argument("--batch-size", type=positive, required=True, help="of the global batch, over all ranks")
    made.add_argument(
        "--start", type=not_negative, default=0, metavar="P", help="first batch, counted over all epochs; default: 0"
    )
    made.add_argument("--count", type=positive, default=10, metavar="C", help="batches; default: 10")
    made.add_argument("--seed", type=not_negative, default=0, help="default: 0")
    made.add_argument("--lanes", type=positive, default=16, help="as data.lanes; default: 16")
    made.add_argument("--window", type=positive, default=4096, help="as data.window; default: 4096")
    return top
