"""Making a data set of webdataset tars that exist already, where they are: they are neither touched nor copied."""

import hashlib
import io
import logging
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from aaae_dist import storage
from aaae_dist.errors import UserError, one_line
from aaae_dist.images import is_grey, why
from aaae_dist.names import files_below
from aaae_dist.passes import Pass
from aaae_dist.preparation import HELD_OUT, hold_out, put
from aaae_dist.shards import INDEX, LABEL, SPLITS, Index, Shard, image_of, named_split
from aaae_dist.tars import Offsets, members_of, scan

log = logging.getLogger(__name__)

UNLABELLED = 0.01  # share of the samples up to which a missing label is a fault; above, a choice

MOST_CLASSES = 1 << 16


class Survey(NamedTuple):
    """What one tar holds."""

    offsets: Offsets
    sizes: dict[tuple[int, int], str]  # (width, height) -> key of the first image that has it
    grey: bool  # every image
    labels: set[bytes]
    unlabelled: int  # samples
    keys: Int64[np.ndarray, " samples"]  # hashes of them
    bad: list[str]  # keys of samples without an image that can be opened, and why


def index(url: str, *, out: str, held_out: float | None, workers: int) -> Index:
    """Write an index of the webdataset tars below `url`, and their offsets, to `out`.

    A tar belongs to the split that its name, or a folder's, begins with (train, val, test). If none does, whole tars
    are held out, chosen by a hash of their names. The classes are the whole numbers of the members `cls`, if all
    samples have one.

    Args:
        held_out: share of the tars for the split `test`; None: a tenth; 0: none.
        workers: threads, each of which holds one tar in memory.

    Raises:
        UserError: there are no tars, `out` already holds a data set, the images are not all squares of one size, the
            labels are no classes, or the store fails. No index is written then.
    """
    storage.refuse_web(out)
    if INDEX in storage.listing(out):
        raise UserError(f"{out}: it already holds a data set; remove its {INDEX} first, or choose another --out")
    tars = [name for name in files_below(url) if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{url}: no tars here; it must hold webdataset shards, uncompressed files named *.tar")
    splits = dict(zip(tars, divide(tars, url=url, held_out=held_out), strict=True))
    here = absolute(url) == absolute(out)
    work = Pass(len(tars), unit="tars", workers=workers)

    def take_up(name: str) -> tuple[Shard, Survey]:
        place, offsets = storage.join(url, name), f"{name.removesuffix('.tar')}.offsets"
        data = storage.read(place)
        found = survey(data, place=place)
        put(storage.join(out, offsets), found.offsets.dump())
        work.advance(len(data))
        return Shard(
            url=name if here else absolute(place),
            offsets=offsets,
            split=splits[name],
            samples=len(found.offsets.checksums),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        ), found

    shards, surveys, sizes = [], [], {}
    with closing(work.over(tars, take_up)) as results:
        for shard, found in results:
            shards.append(shard)
            surveys.append(found)
            sizes = {size: f"{shard.url} {key}" for size, key in found.sizes.items()} | sizes
            refuse_other_sizes(sizes, url=url)
    bad = [reason for found in surveys for reason in found.bad]
    if not sizes:
        raise UserError(f"{url}: no image in its {len(tars)} tars ({', '.join(bad[:1]) or 'they are empty'})")
    keys = np.concatenate([found.keys for found in surveys])
    if alike := len(keys) - len(np.unique(keys)):
        log.warning(
            "%s: %d of %d samples have the key of another one; nothing will tell them apart", url, alike, len(keys)
        )
    if bad:
        log.warning("%s: %d samples without an image that can be opened, first %s", url, len(bad), bad[0])
    made = Index(
        source="tar",
        channels=1 if all(found.grey for found in surveys) else 3,
        height=next(iter(sizes))[1],
        width=next(iter(sizes))[0],
        classes=classes(surveys, url=url),
        attributes=[],
        shards=sorted((shard for shard in shards if shard.samples), key=lambda shard: SPLITS.index(shard.split)),
    )
    storage.write_json(storage.join(out, INDEX), made.model_dump())
    return made


def absolute(url: str) -> str:
    return str(storage.local_path(url)) if storage.is_local(url) else url.rstrip("/")


def divide(tars: Sequence[str], *, url: str, held_out: float | None) -> list[str]:
    """The split of every tar.

    Raises:
        UserError: some names say it and others do not, or `held_out` is given though they do, or leaves a split empty.
    """
    named = {name: named_split(name) for name in tars}
    if not any(named.values()):
        return hold_out(tars, share=HELD_OUT if held_out is None else held_out, seed=0, what="tars")
    if nameless := next((name for name, split in named.items() if not split), None):
        other = next(name for name, split in named.items() if split)
        raise UserError(
            f"{storage.join(url, nameless)}: its split is unknown, while {other} names one; let all names begin with "
            "train, val or test, or none"
        )
    if held_out is not None:
        raise UserError(f"--held-out {held_out:g}: the names of the tars say their splits; leave it out")
    return list(named.values())


def survey(data: bytes, *, place: str) -> Survey:
    """Look at every sample of a tar, at images no further than their headers.

    Raises:
        UserError: it is not a tar, or damaged.
    """
    try:
        offsets, keys = scan(data)
        samples = list(members_of(data, offsets))
    except ValueError as error:
        raise UserError(f"{place}: {one_line(error)}; bring it anew, or remove it") from None
    sizes: dict[tuple[int, int], str] = {}
    grey, bad = True, []
    for key, members in zip(keys, samples, strict=True):
        try:
            with Image.open(io.BytesIO(image_of(members))) as image:
                sizes.setdefault(image.size, key)
                grey = grey and is_grey(image)
        except Exception as error:  # at damaged files PIL lets struct.error, TypeError and more through
            bad.append(f"{place} {key}: {why(error)}")
    labels = [members[LABEL].strip() for members in samples if LABEL in members]
    hashes = np.array([hash(key) for key in keys], np.int64)
    return Survey(offsets, sizes, grey, set(labels), len(samples) - len(labels), hashes, bad)


def refuse_other_sizes(sizes: dict[tuple[int, int], str], *, url: str) -> None:
    """Raise a UserError if there are images of several sizes, or they are not square."""
    remedy = f"make them squares of one size with `aaae prepare tar {url} --size N --out OUT`"
    found = [f"{where} is {width} x {height}" for (width, height), where in sizes.items()]
    if len(found) > 1:
        raise UserError(f"{url}: {found[0]} pixels, {found[1]}; {remedy}")
    if any(width != height for width, height in sizes):
        raise UserError(f"{url}: {found[0]} pixels, not square; {remedy}")


def classes(surveys: Sequence[Survey], *, url: str) -> list[str]:
    """Names of the classes, which are numbers from 0; none if more than a few samples have no label.

    Raises:
        UserError: a label is no such number.
    """
    labels = set().union(*(found.labels for found in surveys))
    samples, unlabelled = (sum(len(found.keys) for found in surveys), sum(found.unlabelled for found in surveys))
    if not labels:
        return []
    few = unlabelled <= UNLABELLED * samples
    if unlabelled:
        done = "they will be passed over as unreadable" if few else "indexed as without classes"
        log.warning("%s: %d of %d samples have no member `%s`: %s", url, unlabelled, samples, LABEL, done)
    if not few:
        return []
    for text in sorted(labels):
        if not text.isdigit() or len(text) > 5 or int(text) >= MOST_CLASSES:
            raise UserError(
                f"{url}: a member `{LABEL}` says {text.decode(errors='replace')!r}, not a class from 0 to "
                f"{MOST_CLASSES - 1}; number them with `aaae prepare tar {url} --size N --out OUT`"
            )
    return [str(number) for number in range(1 + max(map(int, labels)))]
