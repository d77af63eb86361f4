"""Files of the official data sets: read as other readers read them; a pickle that would do something does nothing."""

import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from conftest import refused
from official import (
    CIFAR_CLASSES,
    cifar_batches,
    cifar_binary,
    cifar_python,
    python2_pickle,
    tgz,
    write_celeba,
)

from aaae_dist.errors import UserError
from aaae_dist.formats import plain_values, read_attributes, read_cifar10, read_mat, read_partition

# --- pickles


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


BY_HAND = {  # pickles that call, each in its own way; {} is a command that makes a file
    "global": "cos\nsystem\n(S'{}'\ntR.",
    "short": "cposix\nsystem\nU\x01{}\x85R.",
    "instance": "(S'{}'\nios\nsystem\n.",
    "object": "(cos\nsystem\nS'{}'\no.",
    "new object": "\x80\x02cos\nsystem\nS'{}'\n\x85\x81.",
    "eval": 'c__builtin__\neval\n(S\'__import__("os").system("{}")\'\ntR.',
    "from numpy": "cnumpy.testing._private.utils\nrunstring\n(S'{}'\n}}tR.",
    "build": "cnumpy\nndarray\n(dS'__class__'\ncos\nsystem\nsb.",
    "extension": "\x80\x02\x82\x01.",
    "persistent": "P{}\n.",
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: {"data": it, "labels": [1]}, lambda it: [1, (it,)]])
def test_a_hostile_pickle_does_nothing(tmp_path, protocol, wrap):
    data = pickle.dumps(wrap(Hostile(tmp_path / "made")), protocol)
    with pytest.raises(ValueError, match=r"a pickle of other than plain values: it (would run posix system|uses )"):
        plain_values(data)
    assert not (tmp_path / "made").exists()
    pickle.loads(data)  # as it would have gone otherwise
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", BY_HAND)
def test_pickles_that_call_by_hand_do_nothing(tmp_path, kind):
    data = BY_HAND[kind].format(f"touch {tmp_path}/made").encode("latin-1")
    with pytest.raises(ValueError, match="a pickle of other than plain values: ") as caught:
        plain_values(data)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_plain_values_are_those_of_pickle():
    values = {"a": [1, 255, 256, 65_536, -5, None, True, False], "b": ((), (1,), ("x", 2), (1, 2, 3), (1, 2, 3, 4))}
    values |= {"long": "ä" * 300, "many": list(range(2500)), "deep": {"c": [{}, []]}}
    data = python2_pickle(values)
    assert plain_values(data) == pickle.loads(data, encoding="latin-1") == values


def test_laughing_pickles_end_soon(tmp_path):
    """Each list holds the one before twice: 2**60 items, if anything walked through them or wrote them down."""
    lists = b"]q\0" + b"".join(b"]q" + bytes([i]) + b"(h" + bytes([i - 1, 104, i - 1]) + b"e" for i in range(1, 60))
    for name, field in (("batches.meta", "label_names"), ("data_batch_1", "labels"), ("data_batch_1", "data")):
        data = b"\x80\x02}(" + b"U" + bytes([len(field)]) + field.encode() + b"(" + lists + b"tu."
        assert field in plain_values(data)
        members = cifar_python(cifar_batches(2)) | {f"cifar-10-batches-py/{name}": data}
        (tmp_path / "x.tgz").write_bytes(tgz(members))
        with refused(f"{tmp_path}/x.tgz: not CIFAR-10, or cut short"):
            read_cifar10(f"{tmp_path}/x.tgz")


@pytest.mark.filterwarnings("ignore")
def test_no_damaged_pickle_raises_anything_but_value_error():
    data, chance, refusals = cifar_python(cifar_batches(2))["cifar-10-batches-py/data_batch_1"], random.Random(0), 0
    for _ in range(1500):
        damaged = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])])
        for _ in range(3):
            damaged[chance.choice([chance.randrange(len(damaged)), chance.randrange(min(250, len(damaged)))])] = (
                chance.choice(b"K(}]U\x85\x86\x87Rbtueh0.c\xff\x00")
            )
        try:
            plain_values(bytes(damaged))
        except ValueError:
            refusals += 1
    assert refusals > 500


# --- CIFAR-10


def unpickled(data: bytes) -> Any:
    """By pickle and numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of the old name of a module
        return pickle.loads(data, encoding="bytes")


def test_both_archives_of_cifar10_hold_the_same(tmp_path):
    batches = cifar_batches()
    (tmp_path / "binary.tgz").write_bytes(tgz(cifar_binary(batches)))
    (tmp_path / "python.tgz").write_bytes(tgz(members := cifar_python(batches)))
    loaded = [unpickled(members[f"cifar-10-batches-py/{name}"]) for name in batches]
    assert set(loaded[0]) == {b"batch_label", b"labels", b"data", b"filenames"}
    images = np.concatenate([batch[b"data"].reshape(-1, 3, 32, 32) for batch in loaded]).transpose(0, 2, 3, 1)
    assert np.array_equal(images, np.concatenate([batch[0] for batch in batches.values()]))
    for name in ("binary", "python"):
        found = read_cifar10(f"{tmp_path}/{name}.tgz")
        assert np.array_equal(found.images, images)
        assert found.labels.tolist() == [label for batch in loaded for label in batch[b"labels"]]
        assert (found.classes, found.train, found.images.dtype) == (CIFAR_CLASSES, 35, np.uint8)


BIN, PY = "cifar-10-batches-bin", "cifar-10-batches-py"
ODD = cifar_batches(3)
IMAGES, LABELS = ODD["data_batch_1"]
WRONG = {  # what is instead of one member, and the line
    "a batch is missing": (f"{BIN}/data_batch_3.bin", None, "it holds no cifar-10-batches-bin/data_batch_3.bin; down"),
    "a batch is cut short": (f"{BIN}/data_batch_3.bin", bytes(3072), "not CIFAR-10, or cut short .*; download it"),
    "label 10": (f"{BIN}/test_batch.bin", b"\x0a" + bytes(3072), "not CIFAR-10, .*label 10, but 10 names"),
    "no names": (f"{BIN}/batches.meta.txt", b"", r"not CIFAR-10, .*label \d, but 0 names"),
    "names are no text": (f"{BIN}/batches.meta.txt", b"\xff", r"not CIFAR-10, .*decode"),
    "nothing": (f"{BIN}/batches.meta.txt", None, "it holds no cifar-10-batches-bin/batches.meta.txt; download"),
    "no array": (f"{PY}/data_batch_2", python2_pickle({"data": [1], "labels": [1]}), "not CIFAR-10, .*without an arr"),
    "no dict": (f"{PY}/data_batch_2", python2_pickle([1]), "not CIFAR-10, .*without an array"),
    "no labels": (
        f"{PY}/test_batch",
        python2_pickle({"data": np.zeros((1, 3072), np.uint8)}),
        "not CIFAR-10, .*labels",
    ),
    "other shape": (
        f"{PY}/test_batch",
        python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        "not CIFAR-10, .*2 images, but 1 labels",
    ),
    "other type": (
        f"{PY}/test_batch",
        python2_pickle({"data": np.zeros((1, 3072), np.int16), "labels": [1]}),
        "not CIFAR-10, .*without an array of bytes",
    ),
    "label 256": (
        f"{PY}/test_batch",
        python2_pickle({"data": np.zeros((1, 3072), np.uint8), "labels": [256]}),
        "not CIFAR-10, .*range",
    ),
    "names are numbers": (f"{PY}/batches.meta", python2_pickle({"label_names": list(range(10))}), "not CIFAR-10, "),
    "no names at all": (f"{PY}/batches.meta", python2_pickle({}), "not CIFAR-10, .*label_names"),
    "a pickle that calls": (
        f"{PY}/data_batch_5",
        b"cos\nsystem\n(S'touch made'\ntR.",
        r"not CIFAR-10, or cut short \(a pickle of other than plain values: it would run os system\); download",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_cifar10_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name, data, line = WRONG[kind]
    members = cifar_python(ODD) if name.startswith(PY) else cifar_binary(ODD)
    members.pop(name)
    (tmp_path / "x.tgz").write_bytes(tgz(members | ({} if data is None else {name: data})))
    with refused(f"{tmp_path}/x.tgz: {line}"):
        read_cifar10(f"{tmp_path}/x.tgz")
    assert os.listdir() == ["x.tgz"]


# --- CelebA and MATLAB


def test_lists_of_celeba(tmp_path):
    _, marks, parts = write_celeba(tmp_path)
    files, attributes, found = read_attributes(f"{tmp_path}/list_attr_celeba.txt")
    assert files == [f"{i:06d}.jpg" for i in range(1, 10)]
    assert (len(attributes), attributes[20], attributes[39]) == (40, "Male", "Young")
    assert found.dtype == np.uint8
    assert np.array_equal(found, marks > 0)
    partition = read_partition(f"{tmp_path}/list_eval_partition.txt")
    assert partition == {file: ["train", "val", "test"][part] for file, part in zip(files, parts, strict=True)}


ATTRIBUTES = "2\nBald Male\n000001.jpg -1  1\n000002.jpg  1  1\n"
DAMAGED_LISTS = {  # of attributes
    "cut short": (ATTRIBUTES[:-5], r"\(line 4 has other than 2 values"),
    "a line short": (ATTRIBUTES.rpartition("000002")[0], r"\(1 images instead of 2\)"),
    "a value": (ATTRIBUTES.replace("-1", "0"), r"\(line 3 has other than 2 values -1 or 1\)"),
    "an extra value": (ATTRIBUTES + "000003.jpg 1 1 1\n", r"\(line 5 has other than 2"),
    "no count": (ATTRIBUTES[2:], r"\(line 3 has other"),
    "nobody": ("0\nBald Male\n", r"\(0 images instead of 0\)"),
    "no attributes": ("1\n\n000001.jpg\n", r"\(1 images instead of 1\)"),
    "empty": ("", r"\(not enough values"),
    "a web page": ("<html>\n<body>404</body>\n</html>", r"\(invalid literal|\(line 3 has"),
}


@pytest.mark.parametrize("kind", DAMAGED_LISTS)
def test_a_damaged_list_of_attributes_is_one_line(tmp_path, kind):
    text, words = DAMAGED_LISTS[kind]
    (tmp_path / "x").write_text(text)
    with refused(f"{tmp_path}/x: not CelebA's list of attributes, or cut short ({words}).*; download it again"):
        read_attributes(f"{tmp_path}/x")


@pytest.mark.parametrize("text", ["000001.jpg", "000001.jpg 3", "000001.jpg 0 0", "<html>404</html>"])
def test_a_damaged_partition_is_one_line(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with refused(f"{tmp_path}/x: not CelebA's partition, or cut short .*; download it again"):
        read_partition(f"{tmp_path}/x")


@pytest.mark.parametrize("compressed", [True, False])
def test_matlab_files(tmp_path, compressed):
    values = {"a": np.arange(300, dtype=np.uint16), "b": np.array([[7]], np.uint8), "other": "text", "none": []}
    scipy.io.savemat(tmp_path / "x.mat", values, do_compression=compressed)
    found = read_mat(f"{tmp_path}/x.mat", "a", "b")
    assert [(array.tolist(), array.dtype) for array in found] == [(list(range(300)), np.int64), ([7], np.int64)]
    for names in (("missing",), ("a", "other"), ("none",)):
        with refused(f"{tmp_path}/x.mat: not a MATLAB file of {' and '.join(names)}, or cut short .*; download it"):
            read_mat(f"{tmp_path}/x.mat", *names)


def test_no_damaged_matlab_file_raises_anything_else(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"labels": np.arange(300, dtype=np.uint16)}, do_compression=True)
    data, chance, refusals = (tmp_path / "x.mat").read_bytes(), random.Random(0), []
    for _ in range(200):
        damaged = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])])
        for _ in range(min(3, len(damaged))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "x.mat").write_bytes(damaged)
        try:
            read_mat(f"{tmp_path}/x.mat", "labels")
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in line for line in refusals)
