"""The command line of `aaae`: its verbs, their arguments, and help that teaches."""

import argparse
import json
from typing import Any, Literal, get_args, get_origin

from aaae_dist.arguments import SEED, Parser, argument, as_setting, group, verb, whole
from aaae_dist.config import settings
from aaae_dist.data_verbs import add_preparing, add_shards

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
CONFIG = argument(
    "config",
    nargs="+",
    metavar="CONFIG",
    help="TOML files (any fsspec URL) and section.key=value overrides, merged left to right",
)
RUN = argument("run", metavar="RUN", help="folder of a training (its training.run), or any fsspec URL")
CHECKPOINT = argument(
    "--checkpoint",
    default="",
    metavar="NAME",
    help="a folder below RUN/checkpoints; default: the newest undamaged",
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
    add_preflight(verbs)
    add_status(verbs)
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


def add_training(verbs: Any) -> None:
    """Configuration to run."""
    made = verb(
        verbs,
        "train",
        "Train, or continue: the same command again goes on from the newest checkpoint.",
        CONFIG,
        example="aaae train configs/digits.toml training.run=runs/second training.seed=1",
    )
    made.epilog = f"{made.epilog}\n\n{settings_help()}"
    made.hint = "; settings are given as section.key=value, without dashes"


def add_status(verbs: Any) -> None:
    """How a run stands."""
    verb(
        verbs,
        "status",
        "Say how a run stands, from any machine that reads its folder: how far it is, what is left, its losses, last "
        "checkpoint and restarts, and what to look at. Nothing is written there.",
        RUN,
        argument("--json", action="store_true", help="one JSON object on stdout"),
        argument(
            "--follow",
            action="store_true",
            help="until the run ends: every 5 seconds on a terminal, elsewhere when something has changed",
        ),
        example="aaae status s3://bucket/runs/photos --follow",
    )


def add_preflight(verbs: Any) -> None:
    """Configuration to what would fail."""
    made = verb(
        verbs,
        "preflight",
        "Say before the queue what would fail after it: settings, data, the store's speed, the engine, memory of each "
        "network, the run's folder and its space, the time a save takes, MLflow, versions on all nodes of a SLURM "
        "allocation. A line each on stdout, ok, warning or error with the remedy; exit code 2 if there is an error. "
        "Run it where training will run: what is measured is this machine's.",
        CONFIG,
        argument("--nodes", type=whole(1, 100_000), default=1, metavar="N", help="nodes; default: 1"),
        argument("--processes-per-node", type=whole(1, 1_000), default=1, metavar="P", help="on each; default: 1"),
        argument(
            "--engine",
            default="",
            choices=("", *ENGINES),
            metavar="NAME",
            help=f"{', '.join(ENGINES)}; default: what a launcher has asked for, else ddp for several processes",
        ),
        argument(
            "--grace",
            type=whole(1),
            default=0,
            metavar="SECONDS",
            help="between the scheduler's signal and the end; default: only say how long a save takes",
        ),
        argument("--json", action="store_true", help="one JSON object on stdout, at the end"),
        example="aaae preflight configs/digits.toml --nodes 2 --processes-per-node 4 --engine zero2 --grace 120",
    )
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
