"""From names of files to the keys, classes and labels of images."""

import csv
import hashlib
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aaae_dist import storage, web
from aaae_dist.errors import UserError, one_line
from aaae_dist.failures import explained


def files_below(url: str) -> list[str]:
    """Names of all files below a folder, from there on, sorted."""
    if storage.is_local(url):
        with explained(url):
            root = str(storage.local_path(url))
            if not os.path.isdir(root):
                raise UserError(f"{url}: no such folder; correct the URL")
            paths = list(walk(root))
    elif storage.is_web(url):
        return sorted(web.files_below(url))
    else:
        root = storage.locate(url)[1]
        paths = storage.persistently(url, lambda store, path: list(map(str, store.find(path))))
    return sorted(path[len(root) :].lstrip("/") for path in paths)


def walk(root: str) -> Iterator[str]:
    """Paths of all files below a local folder; links to folders are followed, but not back into one they lie in."""
    waiting: list[tuple[str, tuple]] = [(root, ())]
    while waiting:
        folder, above = waiting.pop()
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                    waiting.append((entry.path, (*above, here)))
                elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
                    yield entry.path


def classify(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different names, sorted (by value if all are whole numbers), and the place of every name among them."""
    classes = sorted(set(names))
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in classes):
        classes.sort(key=int)
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[name] for name in names]


def distinct(names: Sequence[str], identities: Sequence[str]) -> list[str]:
    """Keys from names: without dots, and by a hash of their identities where they would be equal."""
    keys = [name.encode("utf-8", "backslashreplace").decode().replace(".", "_") for name in names]
    counts = Counter(keys)
    hashes = (hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest() for identity in identities)
    return [key if counts[key] == 1 else f"{key}-{digest[:16]}" for key, digest in zip(keys, hashes, strict=True)]


def read_labels(url: str) -> dict[str, str]:
    """Label by file from a CSV file with columns `file` and `label`, or from JSON lines with keys of these names.

    Labels are text or whole numbers; files are paths below the folder of images.

    Raises:
        UserError: it is neither, a line lacks one of the two, or a file is named twice.
    """
    labels: dict[str, str] = {}
    try:
        text = storage.read(url).decode("utf-8-sig")
        for line, row in json_lines(text) if url.lower().endswith(".jsonl") else csv_lines(text):
            file, label = (row.get(name) for name in ("file", "label"))
            if not isinstance(file, str) or isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                raise ValueError(f"line {line} has no file with a label that is text or a whole number")
            file = posixpath.normpath(file)
            if file in labels:
                raise ValueError(f"line {line} names {file!r} again")
            labels[file] = str(label)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{url}: {one_line(error)}; give a CSV file (.csv) with the columns file and label, or JSON lines "
            '(.jsonl) such as {"file": "cats/tom.jpg", "label": "cat"}'
        ) from None
    return labels


def csv_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    if not {"file", "label"} <= set(rows.fieldnames or ()):
        raise ValueError("its first line does not name the columns file and label")
    for row in rows:
        yield rows.line_num, row


def json_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"line {number} is no JSON") from None
            yield number, row if isinstance(row, dict) else {}


def check_labels(place: str, labels: Mapping[str, str], url: str, names: Sequence[str]) -> None:
    """Raise a UserError unless a file of labels names the images, each and no other."""
    known = set(names)
    without = [name for name in names if name not in labels]
    absent = [name for name in labels if name not in known]
    for found, what in ((absent, "of its files are no images"), (without, "images have no label in it")):
        if found:
            raise UserError(
                f"--labels {place}: {len(found)} {what}, first {found[0]!r}; it must name every image below {url}, by "
                f"its path from there such as {names[0]!r}, and no other"
            )
