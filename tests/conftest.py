"""What several rooms share: data sets, ranks that start at once, a real S3 store, a full disk."""

import gc
import io
import os
import secrets
import subprocess
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import pytest
import s3fs
import servers
import webdataset
from forks import Forks
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from aaae_dist import storage
from aaae_dist.errors import UserError
from aaae_dist.preparation import Recipe, prepare
from aaae_dist.shards import Index, read_index, url_of
from aaae_dist.sources import Source
from aaae_dist.sources import digits as handwritten

Result = TypeVar("Result")


def pytest_report_header() -> str:
    return f"S3 store: {'Ceph' if servers.ceph_is_installed() else 'moto, for Ceph is not installed'}"


def awaited(call: Callable[[], Result], *, of: subprocess.Popen | None = None, seconds: float = 30.0) -> Result:
    """What a call returns when that is something; it is asked again and again, as long as a process `of` it lives."""
    deadline = time.monotonic() + seconds
    while not (found := call()):
        assert of is None or of.poll() is None, of.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def unavailable(reason: str) -> NoReturn:
    """End a test that cannot be made here: in CI it must be, and fails; elsewhere it is skipped."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the 1,797 digits, prepared: 9 train shards and 1 test shard. Copy it before you change it."""
    out = str(tmp_path_factory.mktemp("digits") / "shards")
    prepared(handwritten("", labels=""), out, name="digits", held_out=179, samples_per_shard=180)
    return out


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Where trainings start in tenths of a second: for tests of what they come to, not of how they are started."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    """The AWS variables of an S3 store that checks signatures, up for the whole session."""
    if servers.ceph_is_installed():
        with servers.ceph() as store:
            yield store.variables
    elif os.environ.get("CI"):
        pytest.fail("no S3 store: Ceph is not installed; .ci/run installs it")
    else:
        with servers.moto() as variables:
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


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.MlflowServer]:
    server = servers.MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of this size, mounted on a new folder. Without root that cannot be: in CI a failure, elsewhere a skip."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        unavailable("mounting a small disk needs root")
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


class Example(NamedTuple):
    """One image of a source."""

    key: str
    pixels: np.ndarray
    label: int | None
    split: str


def noise(count: int, *, unreadable: Collection[int] = (), labels: bool = True) -> Source:
    """Images of random bytes, grey and RGB by turns."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)

    def read(i: int) -> np.ndarray:
        if i in unreadable:
            raise ValueError(f"number {i} is broken")
        return pixels[i] if i % 2 else pixels[i, :, :, 0]

    keys, classes = [f"{i:03d}" for i in range(count)], [str(i) for i in range(5)]
    source = Source(keys, read, size=8, channels=3)
    return source._replace(classes=classes, labels=[i % 5 for i in range(count)]) if labels else source


def prepared(source: Source, out: str | Path, **changes: Any) -> Index:
    """`prepare` with small numbers, and by default 3 images held out."""
    recipe = {field: changes.pop(field) for field in Recipe._fields if field in changes}
    usual = Recipe(source.channels, source.crop, source.size, format="png", quality=95)
    others: dict[str, Any] = {"name": "test", "origin": "test", "held_out": 3, "samples_per_shard": 4, "seed": 0}
    others |= {"bad_share": 0.01, "workers": 2} | changes
    if isinstance(count := others["held_out"], int):  # so many and no other, as an official split has them
        held_out = set(np.random.default_rng(0).permutation(len(source.keys))[:count].tolist())
        splits = ["test" if i in held_out else "train" for i in range(len(source.keys))]
        source, others["held_out"] = source._replace(splits=source.splits or splits), None
    return prepare(source, usual._replace(**recipe), out=str(out), **others)


def examples(source: Source) -> list[Example]:
    """All that can be read."""
    found = []
    for i, key in enumerate(source.keys):
        with suppress(ValueError):
            label, split = (values[i] if values is not None else None for values in (source.labels, source.splits))
            found.append(Example(key, source.read(i), label, split or ""))
    return found


def stock_samples(out: str, split: str) -> dict[str, dict[str, Any]]:
    """What stock webdataset makes of a split of a data set, by key."""
    urls = [url_of(out, shard.url) for shard in read_index(out).shards if shard.split == split]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        stock: Any = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
        found = list(stock)
        gc.collect()
    assert len({sample["__key__"] for sample in found}) == len(found)
    return {sample["__key__"]: sample for sample in found}


def contents(out: str | Path) -> dict[str, bytes]:
    """All files right below a folder; folders are an error."""
    return {name: storage.read(storage.join(str(out), name)) for name in storage.listing(str(out))}


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


def copied(folder: str, url: str) -> str:
    """A folder's files below another URL; that URL."""
    for path in Path(folder).iterdir():
        storage.write(f"{url}/{path.name}", path.read_bytes())
    return url


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every request to the store: path, first byte, byte after the last."""
    made, original = [], MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        made.append((path, start, end))
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return made
