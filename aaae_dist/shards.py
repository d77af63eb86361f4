"""The format: what lies where in a prepared data set.

A prepared data set is a folder (any fsspec URL) with an `index.json` that names plain webdataset tars, the *shards*,
and of each a file of *offsets* (see `tars.py`). A sample holds one image; `cls`, the number of its class as text, if it
is labelled; and `attributes.json`, a list of 0 and 1, if the index names attributes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.images import EXTENSIONS

INDEX = "index.json"
SPLITS = ("train", "val", "test")
LABEL, ATTRIBUTES = "cls", "attributes.json"  # members of a sample


class Shard(BaseModel):
    """One tar: where it and its offsets are, absolute or relative to the index, and what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    url: str
    split: str
    samples: NonNegativeInt
    bytes: PositiveInt
    sha256: str
    offsets: str


class Index(BaseModel):
    """What a prepared data set holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Literal[2] = 2
    source: str
    channels: Literal[1, 3]
    height: PositiveInt
    width: PositiveInt
    classes: list[str]
    attributes: list[str]
    shards: list[Shard]
    made: str = ""  # fingerprint of what `aaae prepare` made it of; empty: other tars were indexed


def url_of(url: str, name: str) -> str:
    """The URL of a file that the index at `url` names: `name` itself if it is absolute, else below `url`."""
    return name if re.match(r"/|[\w+.-]+://", name) else storage.join(url, name)


def read_index(url: str, *, patience: float | None = None) -> Index:
    """The index of a prepared data set.

    Args:
        patience: seconds within which a store that fails must recover.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = storage.join(url, INDEX)
    try:
        index = Index.model_validate(storage.read_json(file, patience=patience))
    except UserError as problem:
        if not isinstance(problem.__cause__, FileNotFoundError):
            raise
        raise UserError(
            f"{file}: no such file; prepare a data set with `aaae prepare SOURCE --out {url}`, or correct the URL"
        ) from None
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "the whole"
        raise UserError(
            f"{file}: {field}: {problem['msg'].lower()}; it is damaged or not an index: prepare the data set anew"
        ) from None
    if not index.shards:
        raise UserError(f"{file}: it lists no shards; prepare the data set anew")
    return index


# --- what a sample holds, by extension


def image_of(members: Mapping[str, bytes]) -> bytes:
    """The image file of a sample.

    Raises:
        ValueError: it has none.
    """
    for extension in EXTENSIONS:
        if extension in members:
            return members[extension]
    raise ValueError(f"no image, only {', '.join(members)}")


def label_of(members: Mapping[str, bytes], classes: Sequence[str]) -> int | None:
    """The class of a sample; None in a data set without.

    Raises:
        ValueError: it is missing, or none of them.
    """
    if not classes:
        return None
    if LABEL not in members:
        raise ValueError("no label")
    label = int(members[LABEL])
    if not 0 <= label < len(classes):
        raise ValueError(f"label {label} of {len(classes)} classes")
    return label


def marks_of(members: Mapping[str, bytes], attributes: Sequence[str]) -> list[int]:
    """0 or 1 for each attribute of the data set.

    Raises:
        ValueError: they are missing, or not such a list.
    """
    if not attributes:
        return []
    if ATTRIBUTES not in members:
        raise ValueError("no attributes")
    try:
        marks = json.loads(members[ATTRIBUTES])
    except (ValueError, RecursionError):
        marks = None
    if not isinstance(marks, list) or len(marks) != len(attributes) or any(mark not in (0, 1) for mark in marks):
        raise ValueError(f"its attributes are not {len(attributes)} of 0 and 1")
    return marks


def named_split(name: str) -> str:
    """The split that a tar's name begins with, or that of a folder it is in; nothing if none does."""
    found = (re.match("train|val|test", part) for part in reversed(PurePosixPath(name).parts))
    return next((match[0] for match in found if match), "")
