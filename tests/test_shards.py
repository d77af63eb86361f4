"""The format: what the index says of real shards, what is damaged, and what a sample must hold."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import contents, refused

from aaae_dist import shards
from aaae_dist.shards import ATTRIBUTES, INDEX, LABEL, image_of, label_of, marks_of, named_split, read_index


def test_index_says_what_the_shards_hold(digits):
    index, files = read_index(digits), contents(digits)
    assert {name for shard in index.shards for name in (shard.url, shard.offsets)} | {INDEX} == set(files)
    for shard in index.shards:
        assert shard.bytes == len(files[shard.url])
        assert shard.sha256 == hashlib.sha256(files[shard.url]).hexdigest()
        with tarfile.open(Path(digits) / shard.url) as tar:
            first = [member for member in tar if member.name.endswith(".cls")]  # webdataset sorts the members
        starts = np.frombuffer(files[shard.offsets], "<u4")[: shard.samples + 1] * 512
        assert starts.tolist()[:-1] == [member.offset for member in first]
    assert [shard.samples for shard in index.shards] == [180] * 8 + [178, 179]
    assert [shard.split for shard in index.shards] == ["train"] * 9 + ["test"]
    assert (index.source, index.channels, index.height, index.width) == ("digits", 1, 8, 8)
    assert (index.classes, index.attributes) == (list("0123456789"), [])
    assert json.loads(files[INDEX]) == index.model_dump()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: text[:-10], r"not JSON \(\d+ bytes\); it is damaged"),
        (lambda text: b"", r"not JSON \(0 bytes\); it is damaged"),
        (lambda text: b"[]", "the whole: input should be a valid dictionary.*; it is damaged or not an index"),
        (lambda text: b"{}", "source: field required; it is damaged or not an index"),
        (lambda text: text.replace(b'"sha256"', b'"sha1"', 1), r"shards\.0\.sha256: field required; it is damaged"),
        (lambda text: b"[" * 100_000, "not JSON"),
        (lambda text: text.replace(b'"version": 2', b'"version": 1'), "version: input should be 2"),
        (
            lambda text: text.replace(b'"samples": ', b'"samples": "many", "n": ', 1),
            r"shards\.0\.samples: input should",
        ),
        (lambda text: json.dumps({**json.loads(text), "shards": []}).encode(), "it lists no shards; prepare"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}).encode(), "extra: extra inputs are not permitted"),
    ],
)
def test_damaged_index_is_one_line(tmp_path, digits, damage, line):
    (tmp_path / INDEX).write_bytes(damage((Path(digits) / INDEX).read_bytes()))
    with refused(rf"{tmp_path}/index\.json: {line}"):
        read_index(str(tmp_path))


def test_no_index_is_one_line(tmp_path):
    with refused(f"{tmp_path}/{INDEX}: no such file; prepare a data set with `aaae prepare SOURCE --out {tmp_path}`, "):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "name", "there"),
    [
        ("store/x", "train-000000.tar", "store/x/train-000000.tar"),
        ("s3://bucket/x/", "a/0.tar", "s3://bucket/x/a/0.tar"),
        ("s3://bucket/x", "/data/0.tar", "/data/0.tar"),
        ("store/x", "s3://other/0.tar", "s3://other/0.tar"),
        ("store/x", "gs+v1.0://other/0.tar", "gs+v1.0://other/0.tar"),
        ("store/x", "a:b//c.tar", "store/x/a:b//c.tar"),
    ],
)
def test_where_shards_are(url, name, there):
    assert shards.url_of(url, name) == there


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000.tar", "train"),
        ("training_0.tar", "train"),
        ("validation/0.tar", "val"),
        ("a/test/b/0.tar", "test"),
        ("train/test-0.tar", "test"),
        ("contest/0.tar", ""),
        ("000.tar", ""),
    ],
)
def test_splits_by_name(name, split):
    assert named_split(name) == split


def test_what_samples_hold():
    assert image_of({"cls": b"1", "png": b"p", "jpg": b"j", "seg.png": b"s"}) == b"j"
    assert label_of({LABEL: b" 2\n"}, ["a", "b", "c"]) == 2
    assert label_of({LABEL: b"cat"}, []) is None
    assert marks_of({ATTRIBUTES: b"[0, 1]"}, ["a", "b"]) == [0, 1]
    assert marks_of({ATTRIBUTES: b"?"}, []) == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: image_of({"cls": b"1", "seg.png": b""}), "no image, only cls, seg.png"),
        (lambda: label_of({}, ["a"]), "no label"),
        (lambda: label_of({LABEL: b"1"}, ["a"]), "label 1 of 1 classes"),
        (lambda: label_of({LABEL: b"-1"}, ["a"]), "label -1 of 1 classes"),
        (lambda: label_of({LABEL: b"a"}, ["a"]), "invalid literal"),
        (lambda: marks_of({}, ["a"]), "no attributes"),
        (lambda: marks_of({ATTRIBUTES: b"[0, 1]"}, ["a"]), "its attributes are not 1 of 0 and 1"),
        (lambda: marks_of({ATTRIBUTES: b"[2]"}, ["a"]), "its attributes are not 1 of 0 and 1"),
        (lambda: marks_of({ATTRIBUTES: b"{}"}, ["a"]), "its attributes are not 1 of 0 and 1"),
        (lambda: marks_of({ATTRIBUTES: b"[0"}, ["a"]), "its attributes are not 1 of 0 and 1"),
        (lambda: marks_of({ATTRIBUTES: b"[" * 100_000}, ["a"]), "its attributes are not 1 of 0 and 1"),
    ],
)
def test_what_samples_lack(call, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        call()
