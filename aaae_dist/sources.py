"""Sources of images: what `aaae prepare` reads. A new data set is a function here and a line in SOURCES."""

import errno
import json
import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

import numpy as np

from aaae_dist import storage
from aaae_dist.archives import Tgz, Zip, require
from aaae_dist.errors import UserError, one_line
from aaae_dist.formats import read_attributes, read_cifar10, read_idx, read_mat, read_partition
from aaae_dist.images import EXTENSIONS, decode
from aaae_dist.names import check_labels, classify, distinct, files_below, read_labels
from aaae_dist.shards import ATTRIBUTES, INDEX, LABEL, image_of, named_split
from aaae_dist.tars import Offsets, members_of, read_sample, scan

log = logging.getLogger(__name__)


class Source(NamedTuple):
    """Images to prepare: their names, and how to read one. A new data set is a function that returns this."""

    keys: Sequence[str]  # unique, no dots (webdataset ends a key at its first dot); may contain "/"
    read: Callable[[int], np.ndarray]  # i -> uint8 (height, width) or (height, width, 3), upright; thread-safe;
    # ValueError(reason) if this image cannot be read; UserError if the store fails
    size: int  # usual side of the prepared images in pixels
    channels: Literal[1, 3]  # usual
    classes: Sequence[str] = ()  # names
    labels: Sequence[int] | None = None  # class of every image
    splits: Sequence[str] | None = None  # official split of every image: "train", "val", "test"
    attributes: Sequence[str] = ()  # names of yes/no attributes
    marks: np.ndarray | None = None  # uint8 (images, attributes) of 0 and 1
    crop: int = 0  # usual side of the middle square cut out before resizing; 0: the short side


# --- data sets with a name


def digits(url: str, *, labels: str = "") -> Source:
    """scikit-learn's copy of the UCI test set of handwritten digits: 1,797 real grey images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    if url:
        raise UserError(f"aaae prepare digits {url}: scikit-learn brings these images; give no folder")
    refuse_labels("digits", labels)
    values, numbers = (np.asarray(part) for part in load_digits(return_X_y=True))
    pixels = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Source(
        [f"{i:06d}" for i in range(len(pixels))],
        lambda i: pixels[i],
        size=8,
        channels=1,
        classes=[str(i) for i in range(10)],
        labels=numbers.tolist(),
    )


def mnist(url: str, *, labels: str = "") -> Source:
    """The official idx files, gzipped or not: train- and t10k-images-idx3-ubyte with labels, or one of the two."""
    check_place("mnist", url, "the folder (or fsspec URL) that holds the official files")
    refuse_labels("mnist", labels)
    parts = []
    for name, split in (("train", "train"), ("t10k", "test")):
        images, numbers = (find_idx(url, f"{name}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        if bool(images) != bool(numbers):
            missing = "labels" if images else "images"
            raise UserError(f"{images or numbers}: its {missing} are missing; download them too")
        if images and numbers:
            parts.append((split, read_idx(images, dimensions=3), read_idx(numbers, dimensions=1)))
            if len(parts[-1][1]) != len(parts[-1][2]):
                counts = f"{len(parts[-1][1])} images but {len(parts[-1][2])} labels"
                raise UserError(f"{images}: {counts}; download both files again")
            if (most := parts[-1][2].max(initial=0)) > 9:
                raise UserError(f"{numbers}: a label is {most}, not 0 to 9; download it again")
    if not parts:
        raise UserError(
            f"{url}: no MNIST here; it must hold train-images-idx3-ubyte and train-labels-idx1-ubyte, or the t10k- "
            "ones, gzipped or not"
        )
    pixels, numbers = (np.concatenate([part[k] for part in parts]) for k in (1, 2))
    return Source(
        [f"{i:06d}" for i in range(len(pixels))],
        lambda i: pixels[i],
        size=32,
        channels=1,
        classes=[str(i) for i in range(10)],
        labels=numbers.tolist(),
        # One file alone has no official partition: its images are divided like any other source's.
        splits=[split for split, images, _ in parts for _ in images] if len(parts) > 1 else None,
    )


def find_idx(url: str, name: str) -> str | None:
    places = (storage.join(url, name + suffix) for suffix in ("", ".gz"))
    return next((place for place in places if storage.exists(place)), None)


def cifar10(url: str, *, labels: str = "") -> Source:
    """CIFAR-10 from the official binary or Python archive, in a folder or by its own URL: the same images either way.

    60,000 RGB images of 32 x 32 pixels in 10 classes, 10,000 of them to test.
    """
    names = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
    check_place("cifar10", url, f"the folder (or fsspec URL) that holds {' or '.join(names)}")
    refuse_labels("cifar10", labels)
    if not url.endswith((".tar.gz", ".tgz")):
        found = [place for name in names if storage.exists(place := storage.join(url, name))]
        if not found:
            raise UserError(f"{url}: no CIFAR-10 here; it must hold {' or '.join(names)}, as downloaded")
        url = found[0]
    data = read_cifar10(url)
    return Source(
        [f"{i:06d}" for i in range(len(data.images))],
        lambda i: data.images[i],
        size=32,
        channels=3,
        classes=data.classes,
        labels=data.labels.tolist(),
        splits=["train" if i < data.train else "test" for i in range(len(data.images))],
    )


def celeba(url: str, *, labels: str = "") -> Source:
    """CelebA, aligned and cropped: 202,599 faces of 178 x 218 pixels with 40 yes/no attributes; the usual crop is 148.

    Source: https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (Liu, Luo, Wang, Tang, Deep Learning Face Attributes in
    the Wild, ICCV 2015).
    """
    check_place("celeba", url, "the folder (or fsspec URL) that holds the official files")
    refuse_labels("celeba", labels)
    images, attributes, partition = official(
        url, "CelebA", "img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt"
    )
    files, names, marks = read_attributes(attributes)
    splits = read_partition(partition)
    if splits.keys() != set(files):
        raise UserError(f"{partition}: it names other images than list_attr_celeba.txt; download both again")
    archive = Zip(images)
    members = [f"img_align_celeba/{file}" for file in files]
    require(archive, members)
    return Source(
        [PurePosixPath(file).stem for file in files],
        lambda i: decode(archive.read(members[i])),
        size=64,
        channels=3,
        splits=[splits[file] for file in files],
        attributes=names,
        marks=marks,
        crop=148,
    )


def flowers102(url: str, *, labels: str = "") -> Source:
    """Oxford's 102 flowers: 8,189 photographs, 1,020 each to train and to validate; classes have numbers only.

    Source: https://www.robots.ox.ac.uk/~vgg/data/flowers/102 (Nilsback, Zisserman, Automated Flower Classification
    over a Large Number of Classes, ICVGIP 2008).
    """
    check_place("flowers102", url, "the folder (or fsspec URL) that holds the official files")
    refuse_labels("flowers102", labels)
    images, numbers, sets = official(url, "Oxford's 102 flowers", "102flowers.tgz", "imagelabels.mat", "setid.mat")
    (classes,) = read_mat(numbers, "labels")
    parts = dict(zip(("train", "val", "test"), read_mat(sets, "trnid", "valid", "tstid"), strict=True))
    if sorted(np.concatenate(list(parts.values()))) != list(range(1, len(classes) + 1)):
        raise UserError(f"{sets}: it does not divide the {len(classes)} images of imagelabels.mat; download both again")
    if classes.min() < 1:
        raise UserError(f"{numbers}: class {classes.min()}, but they begin at 1; download it again")
    splits = {int(number): split for split, chosen in parts.items() for number in chosen}
    archive = Tgz(images)
    members = [f"jpg/image_{i:05d}.jpg" for i in range(1, len(classes) + 1)]
    require(archive, members)
    return Source(
        [PurePosixPath(member).stem for member in members],
        lambda i: decode(archive.read(members[i])),
        size=64,
        channels=3,
        classes=[str(i) for i in range(1, classes.max() + 1)],
        labels=(classes - 1).tolist(),
        splits=[splits[i] for i in range(1, len(classes) + 1)],
    )


# --- images of one's own


def folder(url: str, *, labels: str = "") -> Source:
    """Image files below a folder, recursively. Classes are the first sub-folders, or what a file of labels says.

    On local disks links to folders are followed. See `names.read_labels` for that file.
    """
    check_place("folder", url, "the folder (or fsspec URL) that holds the images")
    names = [name for name in files_below(url) if PurePosixPath(name).suffix.lower()[1:] in EXTENSIONS]
    if not names:
        raise UserError(
            f"{url}: no images here; it must hold {', '.join(EXTENSIONS)} files, in sub-folders by class if "
            "they have classes"
        )
    if labels:
        given = read_labels(labels)
        check_labels(labels, given, url, names)
        classes, numbers = classify([given[name] for name in names])
    elif any("/" in name for name in names):
        if loose := [name for name in names if "/" not in name]:
            raise UserError(
                f"{url}: {len(loose)} of its {len(names)} images lie in no sub-folder, first {loose[0]!r}, and would "
                "have no class; move them into one, or give --labels FILE"
            )
        classes, numbers = classify([name.split("/")[0] for name in names])
    else:
        classes, numbers = [], None

    def read(i: int) -> np.ndarray:
        try:
            data = storage.read(storage.join(url, names[i]))
        except UserError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError) or getattr(cause, "errno", None) == errno.ELOOP:
                raise ValueError("a link that leads nowhere") from None
            raise
        return decode(data)

    return Source(distinct(names, names), read, size=64, channels=3, classes=classes, labels=numbers)


def tar(url: str, *, labels: str = "") -> Source:
    """Samples of the webdataset tars below a folder, to be written anew in another size.

    Classes are the `cls` members if all samples have one. Splits are told by how the tars' names begin, if it is with
    train, val or test and not the same for all. Names of classes and attributes are those of an index, if there is one.
    """
    check_place("tar", url, "the folder (or fsspec URL) that holds webdataset tars")
    refuse_labels("tar", labels)
    tars = [name for name in files_below(url) if name.lower().endswith(".tar")]
    if not tars:
        raise UserError(f"{url}: no tars here; it must hold webdataset shards, files named *.tar")
    offsets, keys, identities, texts, rows = [], [], [], [], []
    for name in tars:
        part, found, members = scan_tar(storage.join(url, name))
        offsets.append(part)
        keys += found
        identities += [f"{name}/{number}" for number in range(len(found))]
        texts += [cls for cls, _ in members]
        rows += [row for _, row in members]
    if not keys:
        raise UserError(f"{url}: its {len(tars)} tars hold no samples; check the URL")
    known = known_names(url)
    starts = [0, *accumulate(len(part.checksums) for part in offsets)]

    def read(i: int) -> np.ndarray:
        number = bisect_right(starts, i) - 1
        begin, end = offsets[number].span(i - starts[number])
        return decode(image_of(read_sample(storage.read(storage.join(url, tars[number]), begin, end))[1]))

    classes, numbers = ([], None) if None in texts else classify(texts)
    if 0 < (unlabelled := texts.count(None)) < len(texts):
        log.warning("%s: %d of %d samples have no `%s`: taken as without classes", url, unlabelled, len(texts), LABEL)
    if set(classes) <= {str(i) for i in range(len(known["classes"]))} and numbers:
        classes, numbers = known["classes"], [int(text) for text in texts]
    attributes = known["attributes"] if None not in rows else []
    splits = [named_split(name) for name, part in zip(tars, offsets, strict=True) for _ in part.checksums]
    return Source(
        distinct(keys, identities),
        read,
        size=64,
        channels=3,
        classes=classes,
        labels=numbers,
        splits=splits if all(splits) and len(set(splits)) > 1 else None,
        attributes=attributes,
        marks=read_marks(url, rows, attributes) if attributes else None,
    )


def scan_tar(url: str) -> tuple[Offsets, list[str], list[tuple[str | None, bytes | None]]]:
    """Offsets and keys of a tar's samples, and of each its members `cls` and `attributes.json`."""
    data = storage.read(url)
    try:
        offsets, keys = scan(data)
        told = [
            (members[LABEL].decode().strip() if LABEL in members else None, members.get(ATTRIBUTES))
            for members in members_of(data, offsets)
        ]
    except ValueError as error:
        raise UserError(f"{url}: {one_line(error)}; bring it anew, or remove it") from None
    return offsets, keys, told


def known_names(url: str) -> dict[str, list[str]]:
    """Names of classes and attributes in the index of a prepared data set; none if there is no index."""
    place = storage.join(url, INDEX)
    index = storage.read_json(place) if storage.exists(place) else {}
    found = {field: index.get(field, []) if isinstance(index, dict) else [] for field in ("classes", "attributes")}
    return {field: [str(name) for name in names] if isinstance(names, list) else [] for field, names in found.items()}


def read_marks(url: str, rows: Sequence[bytes], attributes: Sequence[str]) -> np.ndarray:
    """Marks, uint8 (rows, attributes) of 0 and 1, from lists in JSON."""
    try:
        marks = np.array([json.loads(row) for row in rows], np.uint8)
        if marks.shape != (len(rows), len(attributes)) or marks.max() > 1:
            raise ValueError(f"{marks.shape[1:]} values, {marks.max()} the largest")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{url}: an attributes.json is no list of 0 and 1 for each of the index's {len(attributes)} attributes "
            f"({one_line(error)}); remove the index, or bring the tars anew"
        ) from None
    return marks


# --- what they share


def check_place(name: str, url: str, what: str) -> None:
    if not url:
        raise UserError(f"aaae prepare {name}: give {what}")


def refuse_labels(name: str, labels: str) -> None:
    if labels:
        raise UserError(f"--labels {labels}: {name} brings its own; leave it out, it is for folder")


def official(url: str, title: str, *names: str) -> list[str]:
    """URLs of these files of a data set, which must all be there."""
    places = [storage.join(url, name) for name in names]
    if missing := [name for name, place in zip(names, places, strict=True) if not storage.exists(place)]:
        raise UserError(
            f"{url}: {title} is not here, or not whole: {', '.join(missing)} missing; it must hold {', '.join(names)}, "
            "as downloaded"
        )
    return places


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "celeba": celeba,
    "flowers102": flowers102,
    "folder": folder,
    "tar": tar,
}
