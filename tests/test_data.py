"""Streams: the same batches for any ranks and workers, from any sample on; mixes; sweeps."""

import errno
import gc
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import awaited, noise, prepared, refused
from sklearn.datasets import load_digits

from aaae_dist.config import Data
from aaae_dist.data import Batch, Stream, ahead, middle, sweep, to_float, to_uint8
from aaae_dist.reader import Reader
from aaae_dist.sources import Source

USUAL = {"seed": 0, "lanes": 16, "window": 8, "batch_size": 24}


def reader(url: str, *, split: str = "train", keep: bool = True, **settings: Any) -> Reader:
    found = Reader(Data.model_validate({"url": url, "channels": 1, "size": 8} | settings), split=split)
    found.keep = keep  # what is small is decoded once, and by no workers
    return found


def read(
    sources: Reader | list[Reader], count: int, *, state: dict[str, Any] | None = None, world: int = 1, **settings: Any
) -> tuple[list[Batch], list[dict[str, Any]]]:
    """The first batches of a stream, gathered over all its ranks, and its state after each."""
    sources = sources if isinstance(sources, list) else [sources]
    streams = [Stream(sources, **USUAL | settings, world=world, rank=rank) for rank in range(world)]
    for stream in streams:
        stream.load_state_dict(state or stream.state_dict())
    gathered, states = [], []
    iterators = [iter(stream) for stream in streams]
    for parts in itertools.islice(zip(*iterators, strict=True), count):
        assert len({part.images.shape for part in parts}) == 1
        assert all(part.mask.all() for part in parts)
        (after,) = {json.dumps(stream.state_dict()) for stream in streams}  # it survives JSON, and ranks agree
        states.append(json.loads(after))
        keys, labels = ([value for part in parts for value in part[field]] for field in (1, 2))
        images = torch.cat([part.images for part in parts])
        gathered.append(parts[0]._replace(images=images, keys=keys, labels=labels))
    for iterator in iterators:
        iterator.close()
    return gathered, states


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch[1:3] for batch in found] == [batch[1:3] for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))


# --- the order


def test_batches_are_the_digits(digits):
    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    for batch in read(reader(digits), 3)[0]:
        numbers = [int(key) for key in batch.keys]
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (24, 1, 8, 8)
        assert np.array_equal(batch.images.flatten(1), np.rint(pixels[numbers] * (255 / 16)))
        assert batch.labels == labels[numbers].tolist()


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> str:
    """URL of a data set of 200 samples in 10 shards."""
    prepared(noise(203), out := tmp_path_factory.mktemp("many"), channels=1, samples_per_shard=20)
    return str(out)


@pytest.fixture(scope="module")
def twenty(many) -> tuple[list[Batch], list[dict[str, Any]]]:
    """What every stream of them begins with: 8 batches of each of two epochs, 4 of the next; and the states."""
    batches, states = read(reader(many), 20)
    places = [(state["sets"][0]["epoch"], state["sets"][0]["position"]) for state in states]
    assert places == [(i // 8, i % 8 * 24 + 24) for i in range(20)]
    return batches, states


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 12, 24])
def test_batches_are_the_same_for_any_ranks(many, twenty, world, keep):
    assert_same(read(reader(many, keep=keep), 20, world=world)[0], twenty[0])


@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 2), (5, 1)])
def test_batches_are_the_same_for_any_workers(many, twenty, workers, world):
    found, states = read(reader(many, keep=False), 20, world=world, workers=workers)
    assert_same(found, twenty[0])
    assert states == twenty[1]


@pytest.mark.parametrize("after", range(1, 20))
@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_stream_continues_at_the_exact_sample(many, twenty, after, world):
    batches, states = twenty
    found, later = read(reader(many), 20 - after, state=states[after - 1], world=world)
    assert_same(found, batches[after:])
    assert later == states[after:]


def test_skipping_is_reading(many, twenty):
    for batches in range(1, 20):
        stream = Stream([reader(many)], **USUAL)
        stream.skip(batches)
        assert stream.state_dict() == twenty[1][batches - 1] | {"samples": 24 * batches} or batches % 8 == 0
        assert next(iter(stream)).keys == twenty[0][batches].keys


def test_a_stream_of_another_batch_size_continues_too(many, twenty):
    keys = [key for batch in twenty[0][:3] for key in batch.keys]
    changed, states = read(reader(many), 20, batch_size=10, state=twenty[1][2])
    epochs = [state["sets"][0]["epoch"] for state in states]
    keys += [key for batch, epoch in zip(changed, epochs, strict=True) if epoch == 0 for key in batch.keys]
    assert len(set(keys)) == len(keys) == 192  # 3 batches of 24, 12 of 10


@pytest.mark.parametrize(("batch_size", "lanes"), [(1, 1), (24, 16), (30, 7), (192, 16), (200, 1)])
def test_an_epoch_has_no_sample_twice_and_leaves_out_few(many, batch_size, lanes):
    source, count = reader(many), 200 // lanes * lanes // batch_size
    batches, _ = read(source, 2 * count, batch_size=batch_size, lanes=lanes)
    for epoch in (batches[:count], batches[count:]):
        keys = [key for batch in epoch for key in batch.keys]
        assert len(set(keys)) == len(keys) == count * batch_size > 200 - batch_size - lanes
    assert len({tuple(batch.keys) for batch in (batches[0], batches[count], read(source, 1, seed=1)[0][0])}) == 3


@pytest.mark.parametrize("samples_per_shard", [9, 1000])  # 2 shards, 1 shard
def test_more_ranks_than_shards(tmp_path, samples_per_shard):
    prepared(noise(18), tmp_path, channels=1, held_out=1, samples_per_shard=samples_per_shard)
    one, eight = (read(reader(str(tmp_path)), 7, world=world, batch_size=8)[0] for world in (1, 8))
    assert_same(eight, one)


@pytest.mark.parametrize(
    ("batch_size", "world", "line"),
    [
        (50, 4, "training.batch_size 50: not a multiple of the 4 ranks; choose one that is"),
        (196, 4, "training.batch_size 196: larger than the 192 samples of an epoch; choose a smaller one"),
        (193, 1, "training.batch_size 193: larger than the 192 samples of an epoch; choose a smaller one"),
    ],
)
def test_impossible_batch_size_is_one_line(many, batch_size, world, line):
    with refused(line):
        read(reader(many), 1, batch_size=batch_size, world=world)


# --- the state


def test_a_state_of_something_else_is_refused(many, digits, twenty):
    state = twenty[1][3]
    for changes, line in (
        ({"seed": 1}, "data: the saved order is {.*'seed': 0.*}, not {.*'seed': 1.*}; set it back"),
        ({"lanes": 4}, "data: the saved order is .*; set it back"),
        ({"window": 9}, "data: the saved order is .*; set it back"),
    ):
        with refused(line):
            Stream([reader(many)], **USUAL | changes).load_state_dict(state)
    with refused(r"data: the saved order is of version 0, this program's is \d+; go on with the one"):
        Stream([reader(many)], **USUAL).load_state_dict(state | {"version": 0})
    with refused(
        rf"{digits}: not the data that the state was saved with, its shards differ \(fingerprint \w+ instead of"
    ):
        Stream([reader(digits)], **USUAL).load_state_dict(state)
    with refused(f"{many}, {digits}: not the data that the state was saved with"):
        Stream([reader(many), reader(digits)], weights=(1.0, 1.0), **USUAL).load_state_dict(state)


def test_a_state_after_the_first_batch_is_refused(many, twenty):
    stream = Stream([reader(many)], **USUAL)
    batches = iter(stream)
    next(batches)
    with refused("the stream has begun; load its state before the first batch"):
        stream.load_state_dict(twenty[1][3])


def test_the_state_is_of_what_was_handed_over_not_of_what_was_read_ahead(many, twenty):
    stream = Stream([reader(many, keep=False)], **USUAL, workers=2)
    batches = iter(stream)
    for expected in twenty[1][:3]:
        next(batches)
        assert stream.state_dict() == expected
    batches.close()


# --- workers


def test_batches_that_are_kept_are_not_written_over(many, twenty):
    """A batch lies in memory that workers fill again, but only when nobody has it any more."""
    stream = iter(Stream([reader(many, keep=False)], **USUAL, workers=1))
    held = [next(stream) for _ in range(20)]
    assert_same(held, twenty[0])
    stream.close()


def data_workers() -> list[psutil.Process]:
    """This process's. One that was started just now has no command line for a moment."""
    return [child for child in psutil.Process().children() if "aaae_dist.workers" in awaited(child.cmdline)]


def shared_memories() -> int:
    """Descriptors of memory shared with workers that this process holds."""
    return sum("/memfd:batches" in os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def test_workers_end_with_their_stream_and_leave_nothing(many):
    held, blocked = shared_memories(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stream = iter(Stream([reader(many, keep=False)], **USUAL, workers=2))
    next(stream)
    workers = data_workers()
    assert len(workers) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
    assert shared_memories() == held + 1
    stream.close()
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    del stream
    gc.collect()
    assert shared_memories() == held


def test_neither_workers_nor_whole_shards_delay_the_first_batch(many, monkeypatch):
    source, seen = reader(many, keep=False), []
    real = source.read

    def read(*arguments: Any) -> Any:
        seen.append((data_workers(), dict(source.fetcher.plans)))
        return real(*arguments)

    monkeypatch.setattr(source, "read", read)
    stream = iter(Stream([source], **USUAL, workers=1))
    next(stream)
    assert seen == [([], {})]
    assert len(data_workers()) == 1
    assert "stream" in source.fetcher.plans
    stream.close()


def test_a_worker_that_is_long_in_listening_holds_nobody_up(tmp_path, monkeypatch):
    """Its index and its requests are longer than what a pipe holds."""
    prepared(noise(503), out := tmp_path / "shards", channels=1, held_out=3, samples_per_shard=1)
    (tmp_path / "deaf").write_text("#!/bin/sh\nsleep 100\n")  # the pipe stays open when the shell is killed
    (tmp_path / "deaf").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "deaf"))

    def sleepers() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child.name() == "sleep"]

    stream = iter(Stream([reader(str(out), keep=False)], **USUAL, workers=2))
    next(stream)
    awaited(lambda: len(sleepers()) == 2)
    left, began = sleepers(), time.monotonic()
    try:
        stream.close()
        assert time.monotonic() - began < 20
    finally:
        for process in left:
            process.kill()


def test_a_dead_worker_is_one_line(many):
    stream = iter(Stream([reader(many, keep=False)], **USUAL, workers=2))
    next(stream)
    for worker in data_workers():
        os.kill(worker.pid, signal.SIGTERM)  # which is its trainer's affair
    next(stream)
    for worker in data_workers():
        worker.kill()
    with refused(r"data.workers 2: a worker ended \(-9\); lower it, or training.batch_size, if memory was short"):
        for _ in range(10):
            next(stream)


def test_a_worker_that_is_stopped_is_one_line(many, monkeypatch):
    monkeypatch.setattr("aaae_dist.workers.UNANSWERED", 0.5)
    stream = iter(Stream([reader(many, keep=False, patience=1.5)], **USUAL, workers=1))
    next(stream)
    (worker,) = data_workers()
    worker.suspend()
    with refused(rf"data\.workers 1: process {worker.pid} has not answered for 2 s; see what holds it"):
        for _ in range(10):
            next(stream)
    assert not worker.is_running()


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (errno.EAGAIN, r".*Resource temporarily unavailable; lower it"),
        (errno.EMFILE, "too many open files; raise the limit of this process, `ulimit -n`"),
    ],
)
def test_workers_that_cannot_be_started_are_one_line(many, monkeypatch, code, line):
    started, original = [], subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen:
        if started:
            raise OSError(code, os.strerror(code))  # as where `ulimit -u` or `ulimit -n` is reached
        started.append(original(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with refused(rf"data\.workers 2: {line}"):
        next(iter(Stream([reader(many, keep=False)], **USUAL, workers=2)))
    assert started[0].returncode is not None


def test_batches_larger_than_a_pipe(tmp_path):
    """Keys and places of 3,000 samples take more than the 64 KiB that a pipe holds while its reader does something."""
    pixels = np.zeros((8, 8), np.uint8)
    source = Source([f"{i:064d}" for i in range(3_030)], lambda _: pixels, size=8, channels=1)
    prepared(source, tmp_path, held_out=30, samples_per_shard=1_000)
    expected, _ = read(reader(str(tmp_path)), 6, batch_size=2_992)
    assert_same(read(reader(str(tmp_path), keep=False), 6, batch_size=2_992, workers=1)[0], expected)


def test_a_batch_that_lies_ready_says_since_when(many):
    stream = iter(Stream([reader(many, keep=False)], **USUAL, workers=1))
    for _ in range(100):
        began = time.perf_counter()
        if next(stream).finished < began:  # the time by which it then came late is none of the worker's
            break
        time.sleep(0.05)
    else:
        pytest.fail("no batch was ever finished before it was asked for")
    stream.close()


def test_memory_does_not_grow_over_epochs(tmp_path):
    """100 batches of 1.2 MB; what is held is a few of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    source = Source([f"{i:04d}" for i in range(2_200)], lambda i: pixels[i % 50], size=64, channels=3)
    prepared(source, tmp_path, format="jpg", held_out=200, samples_per_shard=250)
    source = Reader(Data(url=str(tmp_path), channels=3, size=64), split="train")
    source.keep = False
    batches = iter(Stream([source], seed=0, lanes=16, window=1000, batch_size=100, workers=1))

    def held() -> int:
        """Bytes; without mapped files, whose share depends on who else has them mapped."""
        stated = [Path(f"/proc/{process.pid}/status").read_text() for process in [psutil.Process(), *data_workers()]]
        return sum(1024 * int(kib) for text in stated for kib in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text))

    before = [next(batches) and held() for _ in range(25)][-1]
    after = [next(batches) and held() for _ in range(75)][-1]
    batches.close()
    assert after - before < 10_000_000


# --- mixes


@pytest.fixture(scope="module")
def mixed(many, digits) -> list[Reader]:
    """The noise, its keys of 3 digits, and the digits, theirs of 6."""
    return [reader(many), reader(digits)]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (1.0, 0.1), (0.3, 0.7)])
def test_a_mix_keeps_its_weights_exactly(mixed, weights):
    counts = np.zeros(2, int)
    batches, states = read(mixed, 60, weights=weights)
    for number, batch in enumerate(batches, start=1):
        counts += [sum(len(key) == length for key in batch.keys) for length in (3, 6)]
        share = np.array(weights) / sum(weights)
        assert abs(counts - share * 24 * number).max() <= 1
    for length, at, order in zip((3, 6), states[-1]["sets"], (192, 1616), strict=True):  # of its own epochs, none twice
        first = [key for batch in batches for key in batch.keys if len(key) == length][: order - 24]
        assert len(set(first)) == len(first)
        assert at["epoch"] == 0 or length == 3


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_mix_is_the_same_for_any_ranks_and_from_any_sample_on(mixed, world):
    batches, states = read(mixed, 30, weights=(1.0, 2.0))
    assert_same(read(mixed, 30, weights=(1.0, 2.0), world=world)[0], batches)
    for after in (1, 10, 23):
        found, later = read(mixed, 30 - after, weights=(1.0, 2.0), world=world, state=states[after - 1])
        assert_same(found, batches[after:])
        assert later == states[after:]


def test_data_sets_that_do_not_go_together_are_one_line(mixed, digits, tmp_path):
    larger = Source([f"{i}" for i in range(40)], lambda _: np.zeros((12, 12), np.uint8), size=12, channels=1)
    prepared(larger, tmp_path)
    sets = [mixed[1], reader(str(tmp_path), crop=True)]
    with refused(rf"data\.mix {tmp_path}: images of 12 x 12 pixels, but {digits} has 8 x 8; prepare both in one size"):
        Stream(sets, weights=(1.0, 1.0), **USUAL)
    with refused(rf"data\.mix {digits}/: the same shards as in {digits}; leave one of them out"):
        Stream([mixed[1], reader(f"{digits}/")], weights=(1.0, 1.0), **USUAL)


def test_a_weight_too_small_for_a_batch_is_one_line(mixed):
    with refused(r"data\.mix: the smallest weight gives 0\.24 of the 24 images of a batch; raise it, or"):
        Stream(mixed, weights=(99.0, 1.0), **USUAL)
    with refused(r"data\.mix: the smallest weight gives 0\.96 of the 24 images of a batch; raise it, or"):
        Stream(mixed, weights=(24.0, 1.0), **USUAL)
    Stream(mixed, weights=(23.0, 1.0), **USUAL)  # one


def test_a_batch_may_take_a_whole_data_set_but_of_a_mix_one_sample_less(tmp_path):
    """Its quota differs by one from batch to batch."""
    sets = []
    for size in (4, 5):
        prepared(noise(27), tmp_path / str(size), channels=1, samples_per_shard=size)
        sets.append(reader(str(tmp_path / str(size))))
    usual = USUAL | {"lanes": 4}
    Stream(sets[:1], **usual | {"batch_size": 24})
    with refused("training.batch_size 25: larger than the 24 samples of an epoch"):
        Stream(sets[:1], **usual | {"batch_size": 25})
    Stream(sets, weights=(1.0, 1.0), **usual | {"batch_size": 46})
    with refused("training.batch_size 48: larger than the 24 samples of an epoch"):
        Stream(sets, weights=(1.0, 1.0), **usual | {"batch_size": 48})


# --- sweeps


@pytest.mark.parametrize("limit", [1, 7, 50, 199, 200, 1000])
def test_a_sweep_is_spread_over_the_split(many, limit):
    """No shard gives two samples more than another; each comes once, in their order."""
    source = reader(many)
    keys = next(sweep(source, limit=limit, batch_size=200)).keys[:limit]
    every = next(sweep(source, limit=200, batch_size=200)).keys
    chosen = [every.index(key) for key in keys if key]
    assert len(chosen) == min(limit, 200)
    assert chosen == sorted(set(chosen))
    shares = np.bincount(np.array(chosen) // 20, minlength=10)
    assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("limit", [1, 100, 179, 1000])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sweep_sees_every_sample_once(digits, world, batch_size, limit, workers):
    source, found, lengths = reader(digits, split="test"), [], set()
    whole = next(sweep(source, limit=limit, batch_size=179))
    for rank in range(world):
        batches = list(sweep(source, limit=limit, batch_size=batch_size, world=world, rank=rank, workers=workers))
        lengths.add(len(batches))
        assert {len(batch.images) for batch in batches} == {len(batch.mask) for batch in batches} == {batch_size}
        for batch in batches:
            found += [
                (key, image) for key, image, real in zip(batch.keys, batch.images, batch.mask, strict=True) if real
            ]
            assert [key == "" for key in batch.keys] == (~batch.mask).tolist()
    assert len(lengths) == 1  # all ranks enter as many collectives
    assert sorted(key for key, _ in found) == sorted(key for key in whole.keys if key)
    images = dict(zip(whole.keys, whole.images, strict=True))
    assert all(torch.equal(image, images[key]) for key, image in found)


def test_a_sweep_shows_the_middle_of_larger_images(digits):
    whole = next(sweep(reader(digits, split="test"), limit=9, batch_size=9)).images
    cut = next(sweep(reader(digits, split="test", size=4, crop=True), limit=9, batch_size=9)).images
    assert torch.equal(cut, whole[:, :, 2:6, 2:6])
    assert torch.equal(middle(whole, 5), whole[:, :, 1:6, 1:6])


# --- pieces


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_ahead_keeps_the_order_and_looks_few_calls_ahead(workers):
    taken = []

    def calls():
        for i in range(20):
            taken.append(i)
            yield lambda i=i: i * i if i < 15 else 1 // 0

    results = ahead(calls(), workers=workers)
    for i in range(15 - workers - 1):
        assert next(results) == i * i
        assert len(taken) <= i + workers + 2
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_bytes_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), pixels.double() / 127.5 - 1, rtol=0, atol=1.2e-7)
    assert torch.equal(to_uint8(images), pixels)
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.9999, 1.1, 0.0])).tolist() == [0, 0, 255, 255, 128]
    assert to_uint8(images.bfloat16()).dtype == torch.uint8
