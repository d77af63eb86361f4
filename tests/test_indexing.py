"""Indexing tars of others: found wherever they lie, untouched, and read as stock webdataset reads them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import contents, picture, refused, stock_samples
from PIL import Image
from test_reader import read_all, reader

from aaae_dist import storage
from aaae_dist.images import decode_into
from aaae_dist.indexing import index
from aaae_dist.shards import INDEX, Index, image_of, url_of
from aaae_dist.tars import load_offsets, read_sample

RNG = np.random.default_rng(0)
Sample = dict[str, bytes]


def sample(*, size: tuple[int, int] = (16, 16), mode: str = "RGB", kind: str = "JPEG", **members: bytes) -> Sample:
    """Members by extension; names with a dot in them are written with __."""
    pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = picture(Image.fromarray(pixels), kind, mode=mode)
    return {{"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]: image} | {
        name.replace("__", "."): data for name, data in members.items()
    }


def tar(samples: dict[str, Sample], form: int = tarfile.PAX_FORMAT, *, folders: bool = False) -> bytes:
    """A tar as tarfile writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        for key, members in samples.items():
            if folders and "/" in key:
                folder = tarfile.TarInfo(key.rpartition("/")[0])
                folder.type = tarfile.DIRTYPE
                made.addfile(folder)
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
    return file.getvalue()


def indexed(url: str | Path, out: str | Path = "", *, held_out: float | None = None) -> Index:
    return index(str(url), out=str(out or url), held_out=held_out, workers=2)


def write(url: str | Path, tars: dict[str, bytes]) -> None:
    for name, data in tars.items():
        storage.write(f"{url}/{name}", data)


def read_by_offsets(out: str, made: Index) -> dict[str, np.ndarray]:
    """Pixels of all samples by key, as the reader gets them."""
    found = {}
    for shard in made.shards:
        data = storage.read(url_of(out, shard.url))
        offsets = load_offsets(storage.read(url_of(out, shard.offsets)), samples=shard.samples)
        for number in range(shard.samples):
            key, members = read_sample(data[slice(*offsets.span(number))])
            found[key] = np.empty((made.height, made.width, made.channels), np.uint8)
            decode_into(found[key], image_of(members))
    return found


MASK = picture(np.zeros((4, 4), np.uint8))
FORMS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_tars_of_every_kind_are_read_as_webdataset_reads_them(tmp_path, form, kind):
    keys = ["a", "b/c d", f"{'e' * 90}/{'f' * 80}"] + ["ü/🙂", "g" * 180] * (form != "ustar")
    tars = {
        f"{split}/{number}/000.tar": tar(
            {
                f"{key}-{split}{number}": sample(kind=kind, cls=b"3", json=b"{}", seg__png=MASK, txt=b"x")
                for key in keys
            },
            FORMS[form],
            folders=True,
        )
        for split in ("train", "validation")
        for number in range(2)
    }
    write(tmp_path, tars)
    made = indexed(tmp_path)
    assert [shard.url for shard in made.shards] == sorted(tars)
    assert [shard.split for shard in made.shards] == ["train", "train", "val", "val"]
    assert len({shard.offsets for shard in made.shards}) == 4
    assert {name: (tmp_path / name).read_bytes() for name in tars} == tars
    assert (made.channels, made.height, made.width, made.classes) == (3, 16, 16, ["0", "1", "2", "3"])
    found = read_by_offsets(str(tmp_path), made)
    stock = stock_samples(str(tmp_path), "train") | stock_samples(str(tmp_path), "val")
    assert found.keys() == stock.keys()
    read = reader(str(tmp_path), split="val", channels=3, size=16)
    assert set(read_all(read)[0]) == stock_samples(str(tmp_path), "val").keys()
    for key, pixels in found.items():
        assert np.array_equal(pixels, stock[key][{"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]])


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_store_is_indexed_in_place_or_from_elsewhere(tmp_path, request, kind):
    url = f"memory://{tmp_path}/in" if kind == "memory" else f"{request.getfixturevalue('s3')}/in"
    write(url, {f"{split}-{i}.tar": tar({f"{split}{i}": sample()}) for split in ("train", "test") for i in range(2)})
    before = storage.listing(url)
    there = indexed(url, tmp_path / "out")
    assert storage.listing(url) == before
    assert [shard.url for shard in there.shards] == [f"{url}/{name}" for name in [*list(before)[2:], *list(before)[:2]]]
    assert all(not shard.offsets.startswith("/") for shard in there.shards)
    here = indexed(url)
    assert [shard.url for shard in here.shards] == ["train-0.tar", "train-1.tar", "test-0.tar", "test-1.tar"]
    assert read_by_offsets(url, here).keys() == read_by_offsets(str(tmp_path / "out"), there).keys()


def test_a_folder_that_may_not_be_written_to_stays_as_it_is(tmp_path, monkeypatch):
    write(tmp_path / "in", {f"{i}/train.tar": tar({f"{i}": sample(mode="L")}) for i in range(3)})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "in").rglob("*")}
    monkeypatch.chdir(tmp_path)
    made = indexed("in", "out")  # relative ones
    assert [shard.url for shard in made.shards] == [f"{tmp_path}/in/{i}/train.tar" for i in range(3)]
    assert made.channels == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "in").rglob("*")} == before
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")) == [
        *(f"{i}/train.offsets" for i in range(3)),
        INDEX,
    ]
    assert read_by_offsets(str(tmp_path / "out"), made).keys() == {"0", "1", "2"}


def test_whole_tars_are_held_out_by_their_names(tmp_path):
    write(tmp_path, {f"{i:03d}.tar": tar({f"{i}": sample(size=(1, 1))}) for i in range(60)})
    made = indexed(tmp_path)
    held_out = {shard.url for shard in made.shards if shard.split == "test"}
    assert 1 <= len(held_out) <= 14  # of 6, on average
    write(tmp_path, {f"new/{i:03d}.tar": tar({f"new{i}": sample(size=(1, 1))}) for i in range(20)})
    (tmp_path / INDEX).unlink()
    more = indexed(tmp_path)
    assert {shard.url for shard in more.shards if shard.split == "test" and "new" not in shard.url} == held_out
    (tmp_path / INDEX).unlink()
    assert {shard.split for shard in indexed(tmp_path, held_out=0.0).shards} == {"train"}
    with refused("--held-out 0.0001: it holds out none of the 80 tars, which their names decide; the least that does"):
        indexed(tmp_path, tmp_path / "new", held_out=0.0001)


def test_samples_that_cannot_be_used_are_told_and_kept(tmp_path, caplog):
    samples = {"a": sample(), "b": {"jpg": b"no image"}, "c": {"txt": b"x"}, "d": sample()}
    write(tmp_path, {"train-0.tar": tar(samples)})
    (shard,) = indexed(tmp_path).shards
    assert shard.samples == 4
    assert caplog.messages[0].startswith(
        f"{tmp_path}: 2 samples without an image that can be opened, first {tmp_path}/"
    )
    assert "train-0.tar b: " in caplog.messages[0]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([b"0", b"1", b"1"], ["0", "1"]),
        ([b"3\n", b" 1", b"3"], ["0", "1", "2", "3"]),
        ([b"3", None, b"1"], []),
        ([b"cat", None, b"1"], []),
        ([None, None, None], []),
    ],
)
def test_classes_are_the_labels_if_all_samples_have_one(tmp_path, labels, classes):
    for i, label in enumerate(labels):
        write(tmp_path, {f"train-{i}.tar": tar({f"{i}": sample() | ({"cls": label} if label else {})})})
    assert indexed(tmp_path).classes == classes


def test_a_tar_that_was_cut_anywhere_is_refused(tmp_path):
    """At a member's end it is a whole tar, but for the empty blocks that every writer puts behind the last."""
    whole = tar({f"{i}": sample(cls=b"1") for i in range(4)}, folders=True)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in [*range(512, end + 1, 512), end - 100, end + 100]:
        write(tmp_path, {"train.tar": whole[:cut]})
        with refused(f"{tmp_path}/train.tar: .*; bring it anew, or remove it$"):
            indexed(tmp_path, tmp_path / "out")
    write(tmp_path, {"train.tar": whole[: end + 512]})
    assert indexed(tmp_path, tmp_path / "out").shards[0].samples == 4


@pytest.mark.parametrize(("unlabelled", "kept"), [(0, True), (1, True), (2, False), (100, True), (99, False)])
def test_samples_without_a_label_are_told_of(tmp_path, caplog, unlabelled, kept):
    """One in a hundred is a fault, which reading will find; more are a choice."""
    image = sample(size=(8, 8))
    write(
        tmp_path, {"train.tar": tar({f"{i}": image | ({"cls": b"1"} if i >= unlabelled else {}) for i in range(100)})}
    )
    made = indexed(tmp_path)
    assert made.classes == (["0", "1"] if kept and unlabelled < 100 else [])
    told = [message for message in caplog.messages if "samples have no member `cls`" in message]
    assert len(told) == (0 < unlabelled < 100)
    assert all(f"{unlabelled} of 100" in message for message in told)


def test_keys_that_are_not_unique_are_told_of(tmp_path, caplog):
    both = tar({"a": sample(), "b": sample()})
    write(tmp_path, {"train-0.tar": both, "train-1.tar": both, "train-2.tar": tar({"c": sample()})})
    indexed(tmp_path)
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "2 of 5 samples have the key of another one; nothing will tell them apart"
    ]


GOOD = tar({"good": sample()})
REMEDY = r"`aaae prepare tar {url} --size N --out OUT`$"


@pytest.mark.parametrize(
    ("tars", "line"),
    [
        ({}, "{url}: no tars here; it must hold webdataset shards, uncompressed files named "),
        ({"x.tar.gz": GOOD}, "{url}: no tars here; "),
        ({"train.tar": tar({})}, r"{url}: no image in its 1 tars \(they are empty\)"),
        (
            {"train.tar": tar({"a": {"txt": b"x"}})},
            r"{url}: no image in its 1 tars \({url}/train.tar a: no image, only t",
        ),
        ({"train.tar": b"x" * 999}, "{url}/train.tar: not a tar file: .*; bring it anew, or remove it$"),
        ({"train.tar": GOOD[:1024]}, "{url}/train.tar: .*; bring it anew, or remove it$"),
        (
            {
                "train-0.tar": GOOD,
                "train-1.tar": tar({"b": sample(), "c": sample(size=(8, 8)), "d": sample(size=(4, 4))}),
            },
            "{url}: train-0.tar good is 16 x 16 pixels, train-1.tar c is 8 x 8; make them squares of one size with "
            + REMEDY,
        ),
        (
            {"train.tar": tar({"b": sample(size=(8, 16))})},
            "{url}: train.tar b is 8 x 16 pixels, not square; make them squares of one size with " + REMEDY,
        ),
        (
            {"train-0.tar": GOOD, "0.tar": GOOD},
            "{url}/0.tar: its split is unknown, while train-0.tar names one; let all",
        ),
        (
            {"train.tar": tar({"b": sample(cls=b"cat")})},
            "{url}: a member `cls` says 'cat', not a class from 0 to 65535; number them with " + REMEDY,
        ),
        ({"train.tar": tar({"b": sample(cls=b"-1")})}, "{url}: a member `cls` says '-1', not a class"),
        ({"train.tar": tar({"b": sample(cls=b"65536")})}, "{url}: a member `cls` says '65536', not a class"),
        ({"0.tar": GOOD}, "--held-out 0.1: it holds out none of the 1 tars, "),
    ],
)
def test_what_cannot_be_indexed_is_one_line(tmp_path, tars, line):
    write(tmp_path, tars)
    (tmp_path / "other").write_bytes(b"")
    with refused(line.replace("{url}", str(tmp_path))):
        indexed(tmp_path)
    assert not (tmp_path / INDEX).exists()
    assert {name: (tmp_path / name).read_bytes() for name in tars} == tars


def test_what_is_there_is_refused_and_untouched(tmp_path):
    write(tmp_path, {"train.tar": GOOD, "train.offsets": b"mine"})
    with refused(f"{tmp_path}/train.offsets: another file is there already; remove it, or choose another --out$"):
        indexed(tmp_path)
    with refused("--held-out 0.5: the names of the tars say their splits; leave it out$"):
        indexed(tmp_path, tmp_path / "out", held_out=0.5)
    indexed(tmp_path, tmp_path / "out")
    before = contents(tmp_path / "out")
    with refused(f"{tmp_path}/out: it already holds a data set; remove its {INDEX} first, or choose another --out$"):
        indexed(tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert (tmp_path / "train.offsets").read_bytes() == b"mine"
