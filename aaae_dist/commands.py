"""The commands: one function for each verb, heavy imports inside. (Those about data sets: data_commands.)"""

import argparse
import io
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from aaae_dist import storage
from aaae_dist.config import load_config
from aaae_dist.data_commands import DATA_COMMANDS
from aaae_dist.errors import UserError
from aaae_dist.stopping import StopRequest, end_with_parent

log = logging.getLogger(__name__)

AT_ONCE = 250  # images of a forward pass


def train(arguments: argparse.Namespace) -> None:
    stop = listening()
    config = load_config(arguments.config)
    from aaae_dist.distributed import leave, lost_peer
    from aaae_dist.training import Trainer
    from aaae_dist.watch import Watch

    with Watch(config.training.run, stop=stop, patience=config.training.patience) as watch:
        try:
            trainer = Trainer(config, stop=stop)
            watch.at_work(config.training.silence)
            trainer.train()
            del trainer  # else the process group would end with it: that waits for threads which wait for this one
        except RuntimeError as error:
            if not lost_peer(error):
                raise
            raise watch.lost_peer() from error
    leave()
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt


def selftest(arguments: argparse.Namespace) -> None:
    stop, failed = listening(), []
    from aaae_dist.distributed import launched_rank
    from aaae_dist.selftest import selftest as test

    for finding in test(arguments.out, stop=stop):
        failed += [] if finding.well else [finding.part]
        if launched_rank() == 0:
            print(finding, flush=True)
    if failed:
        raise UserError(f"the selftest failed ({failed[0]}), see stdout; train nothing here before it is well")


def preflight(arguments: argparse.Namespace) -> None:
    from aaae_dist.distributed import launched_rank
    from aaae_dist.preflight import preflight as look

    if launched_rank() != 0:  # one looks for all
        return
    findings = []
    for finding in look(
        arguments.config,
        nodes=arguments.nodes,
        processes=arguments.processes_per_node,
        engine=arguments.engine,
        grace=arguments.grace,
    ):
        findings.append(finding)
        if not arguments.json:
            print(finding, flush=True)
    wrong = [finding.part for finding in findings if finding.verdict == "error"]
    if arguments.json:
        print(json.dumps({"errors": len(wrong), "findings": [finding._asdict() for finding in findings]}))
    if wrong:
        raise UserError(
            f"the preflight found {'1 error' if len(wrong) == 1 else f'{len(wrong)} errors'} "
            f"({', '.join(dict.fromkeys(wrong))}), see stdout; queue nothing before that is mended"
        )


def evaluate(arguments: argparse.Namespace) -> None:
    from aaae_dist.checkpoint import load_average, read_manifest
    from aaae_dist.evaluation import evaluate as judge
    from aaae_dist.reader import Reader

    model, config, name = load_average(arguments.run, name=arguments.checkpoint)
    data, chosen = config.data, config.evaluation
    train, held_out = (Reader(data, split=split) for split in (data.split, data.held_out))
    trained_on = read_manifest(arguments.run, name).progress["stream"]["sets"][0]["fingerprint"]
    if trained_on != train.fingerprint:
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


def export(arguments: argparse.Namespace) -> None:
    from aaae_dist.export import export as write

    if not arguments.out:
        raise UserError("--out: must not be empty; give a new folder or any fsspec URL")
    name = write(arguments.run, name=arguments.checkpoint, out=arguments.out)
    print(f"{arguments.out}: the averaged networks of {arguments.run} after {int(name):,} images")


def status(arguments: argparse.Namespace) -> None:
    from aaae_dist.status import news, text, views

    redraw, before = arguments.follow and sys.stdout.isatty() and not arguments.json, ""
    for found in views(arguments.run, follow=arguments.follow):
        if redraw or news(found) != before:
            said = json.dumps(found) if arguments.json else text(found, now=time.time())
            print("\x1b[H\x1b[J" * redraw + said, flush=True)  # from the corner of a terminal that is cleared
        before = news(found)


def track_sync(arguments: argparse.Namespace) -> None:
    from aaae_dist.tracking import sync

    print(f"{arguments.run}: MLflow has all {sync(arguments.run)} lines of metrics, and the pictures")


def checkpoint_list(arguments: argparse.Namespace) -> None:
    from aaae_dist import checkpoint

    checkpoint.read_run_config(arguments.run)
    for name in checkpoint.complete(arguments.run):
        try:
            about = checkpoint.read_manifest(arguments.run, name)
        except checkpoint.DamagedError as error:
            if name in checkpoint.complete(arguments.run):  # else a training removed it meanwhile
                log.warning("checkpoint %s: %s", name, error)
            continue
        images, size = about.progress["images"], sum(file.bytes for file in about.files.values())
        if arguments.json:
            row = {"checkpoint": name, "images": images, "engine": about.engine, "ranks": about.world, "bytes": size}
            print(json.dumps(row | {"figures": about.figures}))
        else:
            figures = "".join(f"  {figure} {value:.4g}" for figure, value in about.figures.items())
            print(f"{name}  {images:,} images  {about.engine} on {about.world}  {size / 1e6:,.1f} MB{figures}")


def checkpoint_verify(arguments: argparse.Namespace) -> None:
    from aaae_dist import checkpoint

    checkpoint.read_run_config(arguments.run)
    names, count = checkpoint.complete(arguments.run), 0
    for line in checkpoint.verify(arguments.run):
        print(line, flush=True)
        count += 1
    if count:
        raise UserError(
            f"{arguments.run}: damaged in {'1 file' if count == 1 else f'{count} files'}, see stdout; bring them back, "
            "or train on from the newest undamaged checkpoint"
        )
    print(f"{arguments.run}: {len(names)} checkpoints as they were saved")


def checkpoint_prune(arguments: argparse.Namespace) -> None:
    from aaae_dist import checkpoint

    checkpoint.read_run_config(arguments.run)
    lock = storage.Lock(arguments.run)
    try:
        if damage := next(checkpoint.verify(arguments.run), ""):
            raise UserError(f"{damage}; nothing was removed: bring that back, or remove its checkpoint's folder, first")
        options = {"keep": arguments.keep, "keep_every": arguments.keep_every, "best": arguments.best}
        gone = checkpoint.prune(arguments.run, **options)
    finally:
        lock.release()
    left = checkpoint.complete(arguments.run)
    print(f"{arguments.run}: removed {', '.join(gone) or 'nothing'}; left {', '.join(left) or 'nothing'}")


# --- pieces of the commands


def listening() -> StopRequest:
    """To signals, before the seconds that the imports take."""
    stop = StopRequest()
    stop.listen()
    if "LOCAL_RANK" in os.environ:  # a launcher that is killed leaves its ranks behind; restarted, there were two runs
        end_with_parent(signal.SIGTERM)
    return stop


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

    from aaae_dist.images import decode, fit

    try:
        pixels = decode(storage.read(path))
    except ValueError as error:
        raise UserError(f"{path}: not an image that can be read ({error}); give PNG, JPEG or WebP files") from None
    fitted = torch.from_numpy(fit(pixels, channels=channels, size=size).copy())
    return fitted.view(size, size, channels).permute(2, 0, 1)


COMMANDS = DATA_COMMANDS | {
    "train": train,
    "preflight": preflight,
    "selftest": selftest,
    "evaluate": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "export": export,
    "status": status,
    "track sync": track_sync,
    "checkpoint list": checkpoint_list,
    "checkpoint verify": checkpoint_verify,
    "checkpoint prune": checkpoint_prune,
}
