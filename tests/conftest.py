"""What several rooms share: data sets, a real S3 store, a full disk."""

import io
import os
import secrets
import subprocess
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
import servers
from PIL import Image

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.shards import Index, prepare
from aaae_dist.sources import Example, Source
from aaae_dist.sources import digits as handwritten


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the 1,797 digits, prepared: 9 train shards and 1 test shard. Copy it before you change it."""
    out = str(tmp_path_factory.mktemp("digits") / "shards")
    prepared(handwritten(""), out, name="digits", held_out=179, samples_per_shard=180)
    return out


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    """The AWS variables of an S3 store that checks signatures, up for the whole session."""
    with servers.s3_server() as variables:
        yield variables


@pytest.fixture
def s3(s3_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """URL of a fresh bucket, with the environment set so that we, and processes we start, reach it."""
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):  # nobody's own settings
        monkeypatch.setenv(name, str(tmp_path / "none"))
    forget_clients()
    url = f"s3://test-{secrets.token_hex(4)}"
    storage.locate(url)[0].mkdir(url)
    yield url
    forget_clients()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of this size, mounted on a new folder. Without root that cannot be: in CI a failure, elsewhere a skip."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mounting a small disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        yield disk


def forget_clients() -> None:
    """Clients keep the credentials and the address they were made with."""
    storage.filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def noise(count: int, *, unreadable: Collection[int] = (), labels: bool = True) -> Source:
    """Images of random bytes, grey and RGB by turns."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)

    def example(i: int) -> Example | None:
        if i in unreadable:
            return None
        return Example(f"{i:03d}", pixels[i] if i % 2 else pixels[i, :, :, 0], i % 5 if labels else None)

    return Source(count, example, [str(i) for i in range(5)] if labels else [], size=8, channels=3)


def prepared(source: Source, out: str | Path, **changes: Any) -> tuple[Index, list[int]]:
    """`prepare` with small numbers."""
    usual: dict[str, Any] = {"name": "test", "size": 0, "channels": 0, "seed": 0, "quality": 0}
    usual |= {"held_out": 3, "samples_per_shard": 4}
    return prepare(source, out=str(out), **usual | changes)


def examples(source: Source) -> list[Example]:
    """All that can be read."""
    return [found for i in range(source.count) if (found := source.example(i))]


def picture(pixels: np.ndarray | Image.Image, kind: str = "PNG", *, mode: str = "", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


@contextmanager
def refused(line: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """The block ends with one line for the user that begins so (a regular expression)."""
    with pytest.raises(UserError, match=f"^{line}") as caught:
        yield caught
    assert "\n" not in str(caught.value)
