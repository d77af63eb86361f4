"""Writing: image sources -> webdataset tar shards and their index.

The same source, options and seed give the same bytes, for any number of threads, and however often the work was cut
short. Until the index is there, which comes last, a folder `unfinished-...` beside the shards holds a record of each
that is done; the same command again goes on from them.
"""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Literal, NamedTuple

import numpy as np
import PIL
import webdataset
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from aaae_dist import storage
from aaae_dist.errors import UserError, one_line
from aaae_dist.images import fit
from aaae_dist.passes import Pass
from aaae_dist.shards import ATTRIBUTES, INDEX, LABEL, SPLITS, Index, Shard, read_index
from aaae_dist.sources import Source
from aaae_dist.tars import scan, size_of_offsets

log = logging.getLogger(__name__)

REJECTS = "rejects.csv"
UNFINISHED = "unfinished-"
HELD_OUT = 0.1  # share of the images, where the source has no official split
FORGIVEN = 10  # unreadable images that are never too many


class Recipe(NamedTuple):
    """What becomes of every image, in this order.

    The middle square of `crop` pixels is cut out (0, or an image smaller than that: of its short side) and resized to
    `size` pixels (antialiased bicubic; small grey images are bordered, see `images.fit`), with 1 or 3 channels, and
    stored as `format`, lossy ones with `quality` (1 to 100).
    """

    channels: Literal[1, 3]
    crop: int
    size: int
    format: Literal["png", "jpg", "webp"]
    quality: int

    def apply(self, pixels: np.ndarray) -> bytes:
        """The file of an image: uint8 (height, width) or (height, width, 3)."""
        fitted = Image.fromarray(fit(middle(pixels, self.crop), channels=self.channels, size=self.size))
        file = io.BytesIO()
        if self.format == "jpg":
            fitted.save(file, "JPEG", quality=self.quality, subsampling=0)
        elif self.format == "webp":
            fitted.save(file, "WEBP", quality=self.quality)
        else:
            fitted.save(file, "PNG")
        return file.getvalue()


class Portion(NamedTuple):
    """What goes into one shard: its name without extension, and the numbers of its images in the source."""

    name: str
    split: str
    images: Sequence[int]


class Record(BaseModel):
    """Of a shard that is done: what the index will say of it (None: no image could be read), and (key, reason)s."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shard: Shard | None
    rejects: list[tuple[str, str]]


def prepare(
    source: Source,
    recipe: Recipe,
    *,
    name: str,
    origin: str,
    out: str,
    held_out: float | None,
    samples_per_shard: int,
    seed: int,
    bad_share: float,
    workers: int,
) -> Index:
    """Shuffle a source, cut it into shards, write them, the list of what could not be read and, last, the index.

    Args:
        origin: where the source's files are: work that was cut short is gone on with only if they are the same.
        held_out: share of the images for the split `test`, chosen by a hash of seed and key, so that images that are
            added later move none; None: the official split, or a tenth.
        bad_share: of the images may be unreadable, and ten always.
        workers: threads, each of which holds one shard in memory.

    Raises:
        UserError: `out` already holds a data set or other files, too many images cannot be read, or the store fails.
            No index is written then, and nothing of others is touched.
    """
    if not source.keys:
        raise UserError(f"{name}: no images; check the files")
    storage.refuse_web(out)
    portions = divide(source, name=name, held_out=held_out, samples_per_shard=samples_per_shard, seed=seed)
    there = storage.listing(out)
    made = fingerprint(source, recipe, portions, origin=origin)
    unfinished = UNFINISHED + made
    if INDEX in there and (index := read_index(out)).made == made:
        harmed = [shard for shard in index.shards if not is_whole(shard, out=out, there=there)]
        if not harmed:  # done before, but perhaps for the last of it
            storage.remove(storage.join(out, unfinished))
            log.info("%s: prepared already, of the same images with the same options", out)
            return index
        log.warning("%s: %d of %d shards are missing or damaged; made anew", out, len(harmed), len(index.shards))
        for file in (INDEX, *(file for shard in harmed for file in (shard.url, shard.offsets))):
            storage.remove(storage.join(out, file))
        there = storage.listing(out)
    refuse_others(out, there, unfinished)
    names = {f"{portion.name}.{kind}" for portion in portions for kind in ("tar", "offsets")}
    storage.sweep(out, names | {REJECTS, INDEX})

    work = Pass(len(source.keys), workers=workers)
    done = storage.listing(storage.join(out, unfinished))

    def finish(portion: Portion) -> Record:
        place = storage.join(out, unfinished, f"{portion.name}.json")
        record = read_record(place) if f"{portion.name}.json" in done else None
        if record and is_whole(record.shard, out=out, there=there):
            work.skip(len(portion.images))
            return record
        data, rejects = pack(source, portion, recipe, work=work)
        shard = publish(data, portion, out=out) if len(rejects) < len(portion.images) else None
        storage.write_json(place, Record(shard=shard, rejects=rejects).model_dump())
        return Record(shard=shard, rejects=rejects)

    records: list[Record] = []
    rejects: list[tuple[str, str]] = []
    with closing(work.over(portions, finish)) as results:
        for record in results:
            records.append(record)
            rejects += record.rejects
            refuse_too_many(rejects, count=len(source.keys), bad_share=bad_share)
    shards = [record.shard for record in records if record.shard]
    there_are = {shard.split for shard in shards}
    for portion, record in zip(portions, records, strict=True):
        if portion.split not in there_are:
            why = ": ".join(record.rejects[0])
            raise UserError(f"{origin}: no image of split {portion.split} can be read ({why}); check the files")
    if rejects:
        put(storage.join(out, REJECTS), table(rejects))
        log.warning("%d images could not be read and are left out: %s", len(rejects), storage.join(out, REJECTS))
    index = Index(
        source=name,
        channels=recipe.channels,
        height=recipe.size,
        width=recipe.size,
        classes=list(source.classes),
        attributes=list(source.attributes),
        shards=shards,
        made=made,
    )
    storage.write_json(storage.join(out, INDEX), index.model_dump())
    storage.remove(storage.join(out, unfinished))
    return index


# --- the plan


def divide(source: Source, *, name: str, held_out: float | None, samples_per_shard: int, seed: int) -> list[Portion]:
    """All images, shuffled, by split and shard.

    Raises:
        UserError: `held_out` is given, but the source has an official split; or it leaves a split empty.
    """
    if source.splits is None:
        splits = hold_out(source.keys, share=HELD_OUT if held_out is None else held_out, seed=seed, what="images")
    elif held_out is None:
        splits = source.splits
    else:
        raise UserError(f"--held-out {held_out:g}: {name} has an official split; leave it out")
    order = np.random.Philox(np.random.SeedSequence(seed)).random_raw(len(source.keys)).argsort(kind="stable")
    chosen = {split: [i for i in order.tolist() if splits[i] == split] for split in SPLITS}
    return [
        Portion(f"{split}-{number:06d}", split, images[start : start + samples_per_shard])
        for split, images in chosen.items()
        for number, start in enumerate(range(0, len(images), samples_per_shard))
    ]


def hold_out(keys: Sequence[str], *, share: float, seed: int, what: str) -> list[str]:
    """The split of every key, "test" for about this share of them, the others "train"; by its hash alone.

    Raises:
        UserError: one of them would be empty, though the share is not 0.
    """
    places = [int.from_bytes(hashlib.sha256(text(f"{seed} {key}")).digest()[:8]) / 2**64 for key in keys]
    splits = ["test" if place < share else "train" for place in places]
    if "train" not in splits:
        raise UserError(f"--held-out {share:g}: it leaves none of the {len(keys)} {what} to train on; lower it")
    if share and "test" not in splits:
        least = np.ceil(min(places) * 1000 + 1e-9) / 1000
        raise UserError(
            f"--held-out {share:g}: it holds out none of the {len(keys)} {what}, which their names decide; the least "
            f"that does is {least:g}, and 0 holds out none"
        )
    return splits


def fingerprint(source: Source, recipe: Recipe, portions: Sequence[Portion], *, origin: str) -> str:
    """Of all that decides about the bytes, as far as it is known without reading the images."""
    kind = [origin, PIL.__version__, *recipe, *source.classes, *source.attributes]
    digest = hashlib.sha256(json.dumps(kind).encode())
    for portion in portions:
        labels = [source.labels[i] for i in portion.images] if source.labels is not None else []
        keys = [source.keys[i] for i in portion.images]
        digest.update(json.dumps([portion.name, keys, [int(label) for label in labels]]).encode())
        if source.marks is not None:
            digest.update(source.marks[list(portion.images)].tobytes())
    return digest.hexdigest()[:12]


# --- shards


def middle(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle square of so many pixels, or of the short side if that is less; 0: all, as it is."""
    height, width = pixels.shape[:2]
    side = min(side, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side] if side else pixels


def pack(source: Source, portion: Portion, recipe: Recipe, *, work: Pass) -> tuple[bytes, list[tuple[str, str]]]:
    """A shard of these images as a webdataset tar, and (key, reason) of those that cannot be read."""
    file, rejects = io.BytesIO(), []
    with webdataset.TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for i in portion.images:
            try:
                pixels = source.read(i)
            except ValueError as error:
                rejects.append((source.keys[i], one_line(error)))
                work.advance(0)
                continue
            sample: dict[str, str | bytes] = {"__key__": source.keys[i], recipe.format: recipe.apply(pixels)}
            if source.labels is not None:
                sample[LABEL] = str(int(source.labels[i])).encode()
            if source.marks is not None:
                sample[ATTRIBUTES] = json.dumps(source.marks[i].tolist()).encode()
            tar.write(sample)
            work.advance(len(sample[recipe.format]))
    return file.getvalue(), rejects


def publish(data: bytes, portion: Portion, *, out: str) -> Shard:
    """Write a tar and its offsets; returns what the index says of them."""
    found, keys = scan(data)
    shard = Shard(
        url=f"{portion.name}.tar",
        offsets=f"{portion.name}.offsets",
        split=portion.split,
        samples=len(keys),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    put(storage.join(out, shard.url), data)
    put(storage.join(out, shard.offsets), found.dump())
    return shard


def put(url: str, data: bytes) -> None:
    """Write a file, unless an earlier attempt did.

    Raises:
        UserError: another file is there.
    """
    if not storage.exists(url):
        storage.write(url, data)
    elif storage.read(url) != data:
        raise UserError(f"{url}: another file is there already; remove it, or choose another --out")


def read_record(url: str) -> Record | None:
    """The record of a shard, None if it is damaged."""
    try:
        return Record.model_validate_json(storage.read(url))
    except ValidationError:
        return None


def is_whole(shard: Shard | None, *, out: str, there: dict[str, int]) -> bool:
    """Whether a shard lies where its record says: by sizes, on a local disk by its bytes too."""
    if shard is None:
        return True
    if there.get(shard.url) != shard.bytes or there.get(shard.offsets) != size_of_offsets(shard.samples):
        return False
    place = storage.join(out, shard.url)
    return not storage.is_local(place) or hashlib.sha256(storage.read(place)).hexdigest() == shard.sha256


# --- what does not belong


def refuse_others(out: str, there: dict[str, int], unfinished: str) -> None:
    """Raise a UserError if `out` holds a data set, or an unfinished one that is not this one."""
    if INDEX in there:
        raise UserError(
            f"{out}: it already holds a data set, of other images or made with other options; choose another --out, or "
            "remove that one if nobody needs it"
        )
    if other := next((name for name in there if name.startswith(UNFINISHED) and name != unfinished), None):
        raise UserError(
            f"{storage.join(out, other)}: left by an unfinished preparation of other images or with other options; "
            "finish that one with its command, remove it, or choose another --out"
        )


def refuse_too_many(rejects: Sequence[tuple[str, str]], *, count: int, bad_share: float) -> None:
    """Raise a UserError if more images could not be read than may be."""
    if len(rejects) > max(FORGIVEN, bad_share * count):
        raise UserError(
            f"{len(rejects)} of {count} images cannot be read, more than --bad-share {bad_share:g} allows; the first "
            f"is {': '.join(rejects[0])}; mend the files, or raise it"
        )


def table(rejects: Sequence[tuple[str, str]]) -> bytes:
    """Rejected images as CSV, sorted by key."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([("key", "reason"), *sorted(rejects)])
    return text(file.getvalue())


def text(value: str) -> bytes:
    """As UTF-8; file names of other encodings as the bytes they are."""
    return value.encode(errors="surrogateescape")
