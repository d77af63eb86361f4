"""Looking at a prepared data set: what it holds, and whether all of it is as it was written."""

import hashlib
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import accumulate
from typing import Any

import numpy as np

from aaae_dist import storage
from aaae_dist.errors import UserError, one_line
from aaae_dist.images import decode_into
from aaae_dist.passes import Pass
from aaae_dist.shards import Index, Shard, image_of, label_of, marks_of, read_index, url_of
from aaae_dist.tars import load_offsets, members_of, read_sample, scan

# --- is it whole?


def verify(url: str, *, decode: bool, workers: int) -> Iterator[str]:
    """Read every shard again and yield a line for each that is damaged, and for each damaged sample.

    Compared are length and sha256 with the index, the places and checksums of the samples with the file of offsets, and
    every sample with what the index says of all.

    Args:
        decode: decode every image too, and see that it has the promised size.
        workers: threads, each of which holds one shard in memory.

    Raises:
        UserError: there is no index, or the store fails.
    """
    index = read_index(url)
    work = Pass(sum(shard.samples for shard in index.shards), workers=workers)

    def check(shard: Shard) -> list[str]:
        where = url_of(url, shard.url)
        try:
            data, table = storage.read(where), storage.read(url_of(url, shard.offsets))
        except UserError as error:
            # A file that is gone, or a local disk that fails in one place, is damage; a store that fails would go on.
            if not storage.is_local(where) and not isinstance(error.__cause__, FileNotFoundError):
                raise
            work.skip(shard.samples)
            return [str(error).partition(";")[0]]
        return [f"{where}: {what}" for what in damage(data, table, shard, index, decode=decode, work=work)]

    with closing(work.over(index.shards, check)) as results:
        for lines in results:
            yield from lines


def damage(data: bytes, table: bytes, shard: Shard, index: Index, *, decode: bool, work: Pass) -> Iterator[str]:
    """What is wrong with a tar, its file of offsets, and its samples."""
    as_written = hashlib.sha256(data).hexdigest() == shard.sha256
    if len(data) != shard.bytes:
        yield f"{len(data)} bytes, but the index says {shard.bytes}"
    elif not as_written:
        yield "its sha256 is not the index's"
    try:
        offsets = scan(data)[0] if as_written else load_offsets(table, samples=shard.samples)
    except ValueError as error:
        yield one_line(error)
        work.skip(shard.samples)
        return
    if (count := len(offsets.checksums)) != shard.samples:
        yield f"{count} samples, but the index says {shard.samples}"
    elif as_written and offsets.dump() != table:
        yield f"its offsets, {shard.offsets}, are not those of its {count} samples"
    pixels = np.empty((index.height, index.width, index.channels), np.uint8)
    for number, checksum in enumerate(offsets.checksums):
        start, stop = offsets.span(number)
        chunk = data[start:stop]
        work.advance(len(chunk))
        if len(chunk) < stop - start:
            continue  # behind the end of what was cut short
        key = ""
        try:
            if zlib.crc32(chunk) != checksum:
                raise ValueError("its bytes are not those that were written")
            key, members = read_sample(chunk)
            image = image_of(members)
            if decode:
                decode_into(pixels, image)
            label_of(members, index.classes)
            marks_of(members, index.attributes)
        except ValueError as error:
            yield f"sample {key or number}: {one_line(error)}"


# --- what is in it?


def inspect(url: str, *, workers: int) -> dict[str, Any]:
    """What a data set holds: as JSON, sizes in bytes, and by split the images of each class and with each attribute.

    Raises:
        UserError: there is no index, the store fails, or a sample lacks its label.
    """
    index = read_index(url)
    by_split: dict[str, list[Shard]] = {}
    for shard in index.shards:
        by_split.setdefault(shard.split, []).append(shard)
    classes, attributes = tally(index, url=url, workers=workers)
    return {
        "url": url,
        "source": index.source,
        "channels": index.channels,
        "height": index.height,
        "width": index.width,
        "splits": {split: total(shards) for split, shards in by_split.items()},
        "classes": {
            name: {split: classes[split, number] for split in by_split} for number, name in enumerate(index.classes)
        },
        "attributes": {
            name: {split: attributes[split, number] for split in by_split}
            for number, name in enumerate(index.attributes)
        },
    }


def total(shards: list[Shard]) -> dict[str, int | float]:
    images, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    return {"images": images, "shards": len(shards), "bytes": size, "bytes_per_image": round(size / max(images, 1), 1)}


def tally(index: Index, *, url: str, workers: int) -> tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]:
    """Images by (split, class) and by (split, attribute). Nothing is read where there are neither."""
    classes: Counter[tuple[str, int]] = Counter()
    attributes: Counter[tuple[str, int]] = Counter()
    shards = index.shards if index.classes or index.attributes else []
    work = Pass(sum(shard.samples for shard in shards), workers=workers)

    def tell(shard: Shard) -> tuple[str, list[int | None], list[list[int]]]:
        where = url_of(url, shard.url)
        data, table = storage.read(where), storage.read(url_of(url, shard.offsets))
        labels, marks = [], []
        try:
            offsets = load_offsets(table, samples=shard.samples)
            for members in members_of(data, offsets):
                labels.append(label_of(members, index.classes))
                marks.append(marks_of(members, index.attributes))
                work.advance(sum(map(len, members.values())))
        except ValueError as error:
            raise UserError(f"{where}: {one_line(error)}; see all damage with `aaae shards verify {url}`") from None
        return shard.split, labels, marks

    with closing(work.over(shards, tell)) as results:
        for split, labels, marks in results:
            classes.update((split, label) for label in labels if label is not None)
            attributes.update((split, number) for row in marks for number, mark in enumerate(row) if mark)
    return classes, attributes


def some_images(url: str, *, most: int, seed: int, workers: int) -> np.ndarray:
    """Samples of all splits, drawn without replacement, in their order: uint8 (n, height, width, channels).

    Raises:
        UserError: there is no index, the store fails, or one of them is damaged.
    """
    index = read_index(url)
    ends = list(accumulate(shard.samples for shard in index.shards))
    draws = np.random.default_rng(seed).choice(ends[-1], min(most, ends[-1]), replace=False, shuffle=False)
    images = np.empty((len(draws), index.height, index.width, index.channels), np.uint8)
    work = Pass(len(draws), workers=workers)

    def draw(row: int, sample: int) -> None:
        number = bisect_right(ends, sample)
        shard = index.shards[number]
        where = url_of(url, shard.url)
        try:
            offsets = load_offsets(storage.read(url_of(url, shard.offsets)), samples=shard.samples)
            chunk = storage.read(where, *offsets.span(sample - ends[number] + shard.samples))
            decode_into(images[row], image_of(read_sample(chunk)[1]))
        except ValueError as error:
            raise UserError(f"{where}: {one_line(error)}; see all damage with `aaae shards verify {url}`") from None
        work.advance(len(chunk))

    with closing(work.over(enumerate(sorted(draws.tolist())), lambda item: draw(*item))) as results:
        for _ in results:
            pass
    return images
