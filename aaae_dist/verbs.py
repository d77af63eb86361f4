"""The command line of `aaae`: its verbs, their arguments, and help that teaches."""

import argparse
import json
import os
from typing import Any, Literal, get_args, get_origin

from aaae_dist.arguments import Parser, argument, as_setting, group, share, verb, whole
from aaae_dist.config import settings

RUN = argument("run", metavar="RUN", help="folder of a training (its training.run), or any fsspec URL")
CHECKPOINT = argument(
    "--checkpoint",
    default="",
    metavar="NAME",
    help="a folder below RUN/checkpoints; default: the newest undamaged",
)
SEED = whole(0, 2**63 - 1)
DATA = argument("url", metavar="URL", help="a prepared data set: a folder or any fsspec URL")
THREADS = argument(
    "--workers",
    type=whole(1, 1024),
    default=os.cpu_count() or 1,
    metavar="N",
    help="threads; the result does not depend on it, and each holds one shard in memory; default: one per CPU",
)


def parser() -> Parser:
    """All verbs; what was chosen is `command`, such as "shards read"."""
    top = Parser(
        prog="aaae",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Train the Adversarially Approximated Autoencoder, and use it.",
        epilog="""a first session:
  aaae prepare digits --out store/digits        real handwritten digits as webdataset shards
  aaae train configs/digits.toml                on one process, or on several:
  accelerate launch --config_file launch/ddp.yaml -m aaae_dist train configs/digits.toml
  aaae evaluate runs/digits
  aaae sample runs/digits --count 100 --out samples.png""",
    )
    verbs = top.add_subparsers(required=True, metavar="COMMAND")
    add_preparing(verbs)
    add_training(verbs)
    add_selftest(verbs)
    add_using(verbs)
    add_export(verbs)
    add_tracking(verbs)
    add_checkpoints(verbs)
    add_shards(verbs)
    return top


def settings_help() -> str:
    """Every setting with its default and its sentence, for `aaae train --help`."""
    lines = [
        "settings, in TOML files as [section] key = value, on the command line as section.key=value",
        "(those with ... must be set, the others have these defaults):",
    ]
    section = ""
    for name, (sentence, kind, default) in settings().items():
        if name.partition(".")[0] != section:
            section = name.partition(".")[0]
            lines.append("")
        choices = " or ".join(map(json.dumps, get_args(kind))) if get_origin(kind) is Literal else ""
        lines.append(
            f"  {name} = {'...' if default is None else json.dumps(default)}" + f"  ({choices})" * bool(choices)
        )
        lines.append(f"      {sentence}")
    return "\n".join(lines)


def add_preparing(verbs: Any) -> None:
    """Images to shards."""
    verb(
        verbs,
        "prepare",
        "Write images as webdataset shards with an index. The same command again goes on where it was cut short.",
        argument(
            "source",
            metavar="SOURCE",
            choices=("digits", "mnist", "cifar10", "celeba", "flowers102", "folder", "tar"),
            help="digits: scikit-learn's 1,797 digits, without URL; mnist: the official idx files; cifar10: "
            "cifar-10-binary.tar.gz or cifar-10-python.tar.gz; celeba: img_align_celeba.zip, list_attr_celeba.txt and "
            "list_eval_partition.txt; flowers102: 102flowers.tgz, imagelabels.mat and setid.mat; folder: image files "
            "below URL, sub-folders are classes unless --labels is given; tar: webdataset tars below URL, without "
            "--size left where they are and indexed as by `aaae shards index`, with --size written anew",
        ),
        argument(
            "url",
            nargs="?",
            default="",
            metavar="URL",
            help="where the source's files are, official ones as downloaded: a folder or any fsspec URL",
        ),
        argument(
            "--out",
            required=True,
            metavar="OUT",
            help="where to write: a new folder or any fsspec URL; index.json comes last, and before it rejects.csv if "
            "images could not be read",
        ),
        argument(
            "--labels",
            default="",
            metavar="FILE",
            help="for folder: a CSV file with columns file and label, or JSON lines with these keys, that names every "
            "image by its path below URL",
        ),
        argument(
            "--crop",
            type=whole(0, 100_000),
            metavar="N",
            help="cut out the middle square of N pixels before resizing; 0: that of the short side; default: 148 for "
            "celeba (178 is usual too), 0 for the others",
        ),
        argument(
            "--size",
            type=whole(1, 4_096),
            metavar="N",
            help="resize to N x N pixels (antialiased bicubic; smaller grey images are bordered with black instead, up "
            "to twice their size); default: what is usual for the source, 64 for a folder",
        ),
        argument(
            "--channels",
            type=int,
            choices=(1, 3),
            help="1 (grey) or 3 (RGB); default: 1 for digits and mnist, 3 for the others",
        ),
        argument(
            "--format",
            choices=("png", "jpg", "webp"),
            help="of the images stored: png is lossless, jpg the quickest to read; default: png",
        ),
        argument(
            "--quality",
            type=whole(1, 100),
            metavar="N",
            help="of jpg (without chroma subsampling) and webp; default: 95",
        ),
        argument(
            "--held-out",
            type=share,
            metavar="SHARE",
            help="share of the images for the split `test`, where the source has no official one; a hash of seed and "
            "name decides about each, so images that are added later move none; default: 0.1",
        ),
        argument(
            "--samples-per-shard",
            type=whole(1),
            metavar="N",
            help="default: 1000; aim at shards of 50 to 250 MB for an object store",
        ),
        argument("--seed", type=SEED, metavar="N", help="of the shuffle before sharding; default: 0"),
        argument(
            "--bad-share",
            type=share,
            metavar="SHARE",
            help="of the images may be unreadable, and ten always; default: 0.01",
        ),
        THREADS,
        example="aaae prepare folder photos/ --size 64 --format jpg --out s3://bucket/photos",
    )


def add_training(verbs: Any) -> None:
    """Configuration to run."""
    made = verb(
        verbs,
        "train",
        "Train, or continue: the same command again goes on from the newest checkpoint.",
        argument(
            "config",
            nargs="+",
            metavar="CONFIG",
            help="TOML files (any fsspec URL) and section.key=value overrides, merged left to right",
        ),
        example="aaae train configs/digits.toml training.run=runs/second training.seed=1",
    )
    made.epilog = f"{made.epilog}\n\n{settings_help()}"
    made.hint = "; settings are given as section.key=value, without dashes"


def add_selftest(verbs: Any) -> None:
    """Whether trainings can be trusted here."""
    verb(
        verbs,
        "selftest",
        "Train a small model where this is started, and see whether all ranks are equal, whether a run that is killed "
        "and resumed ends with the same bits, whether one rank computes the same as all, and whether what is saved is "
        "whole. A line for each and a verdict on stdout; exit code 2 if anything failed. In float32, without TF32.",
        argument(
            "--out",
            default="",
            metavar="URL",
            help="a new folder or any fsspec URL that all nodes see, which stays; default: a new folder below runs/, "
            "which is removed if all is well",
        ),
        example="aaae selftest --out s3://bucket/selftest\n"
        "  accelerate launch --config_file launch/zero2.yaml -m aaae_dist selftest --out s3://bucket/selftest",
    )


def add_using(verbs: Any) -> None:
    """Run to figures and pictures."""
    verb(
        verbs,
        "evaluate",
        "Judge the averaged networks of a checkpoint.",
        RUN,
        CHECKPOINT,
        argument("--json", action="store_true", help="one JSON object on stdout"),
        example="aaae evaluate runs/digits --json",
    )
    verb(
        verbs,
        "sample",
        "Draw images from the averaged networks of a checkpoint.",
        RUN,
        CHECKPOINT,
        argument("--count", type=whole(1), default=100, metavar="N", help="default: 100"),
        argument(
            "--seed",
            type=SEED,
            default=0,
            metavar="N",
            help="sample i depends on the seed and i alone; default: 0",
        ),
        argument(
            "--out", required=True, metavar="FILE", help=".png: a grid; .npz: array `images`, uint8, N x H x W x C"
        ),
        example="aaae sample runs/digits --count 5000 --out samples.npz",
    )
    verb(
        verbs,
        "reconstruct",
        "Encode images and decode them again.",
        RUN,
        CHECKPOINT,
        argument(
            "images", nargs="+", metavar="IMAGE", help="image files or URLs of them, resized to the networks' size"
        ),
        argument(
            "--out",
            required=True,
            metavar="FILE",
            help=".png: originals above reconstructions; .npz: array `images`, uint8, N x H x W x C",
        ),
        example="aaae reconstruct runs/digits a.png b.png --out pairs.png",
    )


def add_export(verbs: Any) -> None:
    """Run to files for others."""
    verb(
        verbs,
        "export",
        "Write the averaged networks for use elsewhere: weights that aaae_dist.load reads without accelerate or "
        "DeepSpeed, and programs of encoder, decoder and sampler that torch.export.load reads without aaae_dist.",
        RUN,
        CHECKPOINT,
        argument("--out", required=True, metavar="DIR", help="where to write: a new folder or any fsspec URL"),
        example="aaae export runs/digits --out digits-model",
    )


def add_tracking(verbs: Any) -> None:
    """Run to MLflow."""
    sync = "MLFLOW_TRACKING_URI=http://mlflow:5000 aaae track sync runs/digits"
    verb(
        group(verbs, "track", "Metrics and MLflow.", example=sync),
        "track sync",
        "Deliver to MLflow what it missed of a run.",
        RUN,
        example=sync,
    )


def add_checkpoints(verbs: Any) -> None:
    """What a run has saved."""
    listed = "aaae checkpoint list runs/digits"
    verify = "aaae checkpoint verify s3://bucket/runs/photos"
    prune = "aaae checkpoint prune runs/digits --keep 1"
    checkpoints = group(verbs, "checkpoint", "What a run has saved.", example="\n  ".join([listed, verify, prune]))
    verb(
        checkpoints,
        "checkpoint list",
        "Say what checkpoints a run has: the images seen, the engine and ranks that saved it, its size and figures.",
        RUN,
        argument("--json", action="store_true", help="one JSON object a checkpoint on stdout"),
        example=listed,
    )
    verb(
        checkpoints,
        "checkpoint verify",
        "Read all checkpoints of a run again; what is damaged is a line on stdout, and exit code 2.",
        RUN,
        example=verify,
    )
    verb(
        checkpoints,
        "checkpoint prune",
        "Remove all checkpoints of a run but some, and what unfinished ones have left.",
        RUN,
        argument("--keep", type=whole(1), required=True, metavar="N", help="the newest that stay, as checkpoint.keep"),
        as_setting("--keep-every", "checkpoint.keep_every", whole(0)),
        argument(
            "--best",
            default="",
            choices=("", *get_args(settings()["checkpoint.best"].kind)),
            metavar="FIGURE",
            help="keep the best by this figure of the evaluation, as checkpoint.best; default: none",
        ),
        example=prune,
    )


def add_shards(verbs: Any) -> None:
    """What a data set holds, and what a rank reads of it."""
    read = "aaae shards read store/digits --world 2 --rank 1 --batch-size 64 --count 3"
    inspect = "aaae shards inspect store/digits --picture digits.png"
    verify = "aaae shards verify s3://bucket/photos"
    index = "aaae shards index s3://bucket/tars --out s3://bucket/tars-index"
    shards = group(verbs, "shards", "Prepared data sets.", example="\n  ".join([inspect, verify, index, read]))
    verb(
        shards,
        "shards inspect",
        "Say what a data set holds: images, bytes and sizes by split, images of every class and with every attribute.",
        DATA,
        argument("--json", action="store_true", help="one JSON object on stdout"),
        argument("--picture", metavar="FILE", help="write a picture of 64 random images there, a .png"),
        argument("--seed", type=SEED, default=0, metavar="N", help="of the choice of these images; default: 0"),
        THREADS,
        example=inspect,
    )
    verb(
        shards,
        "shards verify",
        "Read a data set again and say what is damaged, a line each on stdout; exit code 2 if anything is.",
        DATA,
        argument(
            "--quick",
            action="store_true",
            help="compare lengths and checksums alone; without it, every image is decoded too",
        ),
        THREADS,
        example=verify,
    )
    verb(
        shards,
        "shards index",
        "Make a data set of webdataset tars that exist already. They stay where and as they are; all their images must "
        "be squares of one size. Tars whose names, or folders, begin with train, val or test belong to that split.",
        argument("url", metavar="URL", help="the folder, or any fsspec URL, below which the .tar files are"),
        argument(
            "--out", default="", metavar="OUT", help="where to write index.json and the files of offsets; default: URL"
        ),
        argument(
            "--held-out",
            type=share,
            metavar="SHARE",
            help="share of the tars, whole ones, for the split `test`, where no name says it; a hash of its name "
            "decides about each; 0: none; default: 0.1",
        ),
        THREADS,
        example=index,
    )
    verb(
        shards,
        "shards read",
        "Print the keys that a rank reads, one JSON object a batch.",
        DATA,
        argument("--split", default="train", help="default: train"),
        argument("--world", type=whole(1), default=1, metavar="N", help="ranks; default: 1"),
        argument("--rank", type=whole(0), default=0, metavar="N", help="counted from 0; default: 0"),
        argument(
            "--workers",
            type=whole(0, 256),
            default=0,
            metavar="N",
            help="processes that read ahead; the order does not depend on it; default: 0",
        ),
        argument("--batch-size", type=whole(1), required=True, metavar="N", help="of the global batch, over all ranks"),
        argument(
            "--start", type=whole(0), default=0, metavar="P", help="first batch, counted over all epochs; default: 0"
        ),
        argument("--count", type=whole(1), default=10, metavar="C", help="batches; default: 10"),
        argument("--seed", type=SEED, default=0, metavar="N", help="as training.seed; default: 0"),
        as_setting("--lanes", "data.lanes", whole(1, 65_536)),
        as_setting("--window", "data.window", whole(1)),
        example=read,
    )
