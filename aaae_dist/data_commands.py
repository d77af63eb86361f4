"""The commands about data sets, `prepare` and `shards ...`: one function for each verb, heavy imports inside."""

import argparse
import io
import json
from typing import Any

from aaae_dist import storage
from aaae_dist.config import Data
from aaae_dist.errors import UserError


def prepare(arguments: argparse.Namespace) -> None:
    from aaae_dist.preparation import Recipe
    from aaae_dist.preparation import prepare as write
    from aaae_dist.sources import SOURCES

    if not arguments.out:
        raise UserError("--out: must not be empty; give a new folder or any fsspec URL")
    if arguments.source == "tar" and arguments.size is None:
        for option in ("labels", "crop", "channels", "format", "quality", "samples_per_shard", "seed", "bad_share"):
            if getattr(arguments, option) not in (None, ""):
                raise UserError(
                    f"--{option.replace('_', '-')} {getattr(arguments, option)}: without --size the tars stay as they "
                    "are; leave it out, or add --size N to write them anew"
                )
        shards_index(arguments)
        return
    kind = arguments.format or "png"
    if kind == "png" and arguments.quality:
        raise UserError(f"--quality {arguments.quality}: png is lossless; leave it out, or add --format jpg")
    source = SOURCES[arguments.source](arguments.url, labels=arguments.labels)
    index = write(
        source,
        Recipe(
            channels=arguments.channels or source.channels,
            crop=source.crop if arguments.crop is None else arguments.crop,
            size=arguments.size or source.size,
            format=kind,
            quality=arguments.quality or 95,
        ),
        name=arguments.source,
        origin=f"{arguments.source} {arguments.url}",
        out=arguments.out,
        held_out=arguments.held_out,
        samples_per_shard=arguments.samples_per_shard or 1000,
        seed=arguments.seed or 0,
        bad_share=0.01 if arguments.bad_share is None else arguments.bad_share,
        workers=arguments.workers,
    )
    say_what_is_there(arguments.out, index)


def shards_inspect(arguments: argparse.Namespace) -> None:
    from aaae_dist.inspection import inspect, some_images

    if arguments.picture is not None and not arguments.picture.endswith(".png"):
        raise UserError(f"--picture {arguments.picture}: must end in .png")
    found = inspect(arguments.url, workers=arguments.workers)
    if arguments.picture:
        import torch

        from aaae_dist.inference import grid, picture

        images = some_images(arguments.url, most=64, seed=arguments.seed, workers=arguments.workers)
        file = io.BytesIO()
        picture(grid(torch.from_numpy(images).permute(0, 3, 1, 2), columns=8)).save(file, "PNG")
        storage.write(arguments.picture, file.getvalue())
    if arguments.json:
        print(json.dumps(found))
        return
    shape = f"{found['channels']} x {found['height']} x {found['width']}"
    print(f"{arguments.url}: {found['source']}, images of {shape}")
    print_table("split", found["splits"])
    for name, kind in (("class", "classes"), ("attribute", "attributes")):
        if found[kind]:
            print_table(name, found[kind])


def shards_verify(arguments: argparse.Namespace) -> None:
    from aaae_dist.inspection import verify
    from aaae_dist.shards import read_index

    count = 0
    for line in verify(arguments.url, decode=not arguments.quick, workers=arguments.workers):
        print(line, flush=True)
        count += 1
    if count:
        places = "1 place" if count == 1 else f"{count:,} places"
        raise UserError(f"{arguments.url}: damaged in {places}, see stdout; bring it anew, or prepare it anew")
    say_what_is_there(arguments.url, read_index(arguments.url))


def shards_index(arguments: argparse.Namespace) -> None:
    from aaae_dist.indexing import index

    out = arguments.out or arguments.url
    say_what_is_there(out, index(arguments.url, out=out, held_out=arguments.held_out, workers=arguments.workers))


def shards_read(arguments: argparse.Namespace) -> None:
    from itertools import islice

    from aaae_dist.data import Stream
    from aaae_dist.reader import Reader
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
    stream = Stream(
        [reader],
        seed=arguments.seed,
        lanes=arguments.lanes,
        window=arguments.window,
        batch_size=size,
        world=world,
        rank=arguments.rank,
        workers=arguments.workers,
    )
    stream.skip(arguments.start)
    for number, batch in enumerate(islice(stream, arguments.count), start=arguments.start):
        print(json.dumps({"batch": number, "keys": batch.keys}), flush=True)


# --- pieces of the commands


def say_what_is_there(url: str, index: Any) -> None:
    counts: dict[str, int] = {}
    for shard in index.shards:
        counts[shard.split] = counts.get(shard.split, 0) + shard.samples
    images = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    shape = f"{index.channels} x {index.height} x {index.width}"
    print(f"{url}: {images} images of {shape} in {len(index.shards)} shards")


def print_table(title: str, rows: dict[str, dict[str, int | float]]) -> None:
    """Rows of numbers by the names of their columns."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in (title, *rows))
    print("\n" + "  ".join([f"{title:{width}}", *(f"{column:>15}" for column in columns)]))
    for name, row in rows.items():
        print("  ".join([f"{name:{width}}", *(f"{row[column]:>15,}" for column in columns)]))


DATA_COMMANDS = {
    "prepare": prepare,
    "shards inspect": shards_inspect,
    "shards verify": shards_verify,
    "shards index": shards_index,
    "shards read": shards_read,
}
