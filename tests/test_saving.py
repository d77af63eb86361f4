"""Saving beside the training: what is saved is the moment it began, and what goes wrong is told."""

import threading
from types import SimpleNamespace

import pytest
from test_checkpoint import SHAPES, cut, newest

from aaae_dist import checkpoint, storage
from aaae_dist.checkpoint import Manifest
from aaae_dist.config import Checkpoint
from aaae_dist.errors import UserError
from aaae_dist.saving import Saver


def manifest(images: int, *, world: int) -> Manifest:
    about = {"engine": "ddp", "world": world, "config": "", "sound": True, "progress": {"images": images}}
    return Manifest(**about, shapes=SHAPES, fingerprints={}, figures={}, files={})


def savers(run: str, *, world: int) -> list[Saver]:
    return [Saver(run, Checkpoint(minutes=2.0), rank=rank, attempt="x") for rank in range(world)]


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Nothing is written before it is set."""
    opened, write = threading.Event(), storage.write

    def wait(url: str, data: bytes) -> None:
        assert opened.wait(20)
        write(url, data)

    monkeypatch.setattr(storage, "write", wait)
    return opened


def test_training_goes_on_while_the_moment_of_the_beginning_is_saved(tmp_path, gate):
    (saver,) = savers(str(tmp_path), world=1)
    pieces = cut(640, world=1, rank=0)
    saver.begin(checkpoint.name_of(640), pieces, manifest(640, world=1))
    for piece in pieces.values():
        for values in piece.values.values():
            values.add_(1)  # a step
    assert saver.problem() == ""
    assert checkpoint.complete(str(tmp_path)) == []
    gate.set()
    assert saver.wait(20.0)
    assert saver.problem() == ""
    assert newest(str(tmp_path)) == checkpoint.name_of(640)


def test_one_after_the_other_into_the_same_memory(tmp_path):
    (saver,) = savers(str(tmp_path), world=1)
    kept = []
    for images in (100, 200, 300):
        saver.begin(checkpoint.name_of(images), cut(images, world=1, rank=0), manifest(images, world=1))
        assert saver.wait(20.0)
        kept.append({name: values.data_ptr() for name, values in saver.copies.items()})
        assert newest(str(tmp_path)) == checkpoint.name_of(images)
    assert kept[0] == kept[1] == kept[2]
    assert checkpoint.complete(str(tmp_path)) == [checkpoint.name_of(200), checkpoint.name_of(300)]


def test_the_memory_of_copies_is_taken_before(tmp_path):
    (saver,) = savers(str(tmp_path), world=1)
    saver.reserve(cut(100, world=1, rank=0))
    taken = {name: values.data_ptr() for name, values in saver.copies.items()}
    saver.begin(checkpoint.name_of(200), cut(200, world=1, rank=0), manifest(200, world=1))
    assert {name: values.data_ptr() for name, values in saver.copies.items()} == taken != {}
    assert saver.wait(20.0)
    assert newest(str(tmp_path)) == checkpoint.name_of(200)


def test_who_leaves_waits_a_while_for_what_is_under_way(tmp_path, gate):
    (saver,) = savers(str(tmp_path), world=1)
    saver.begin(checkpoint.name_of(64), cut(64, world=1, rank=0), manifest(64, world=1))
    threading.Timer(0.3, gate.set).start()
    saver.close(seconds=20.0)
    assert newest(str(tmp_path)) == checkpoint.name_of(64)


def test_it_is_complete_when_the_last_rank_is_done(tmp_path):
    ranks = savers(str(tmp_path), world=3)
    for rank in (0, 2):
        ranks[rank].begin(checkpoint.name_of(64), cut(64, world=3, rank=rank), manifest(64, world=3))
    assert ranks[2].wait(20.0)
    assert not ranks[0].wait(0.5)
    assert checkpoint.complete(str(tmp_path)) == []
    ranks[1].begin(checkpoint.name_of(64), cut(64, world=3, rank=1), manifest(64, world=3))
    assert ranks[0].wait(20.0)
    assert newest(str(tmp_path)) == checkpoint.name_of(64)


def test_a_rank_that_fails_tells_why_and_the_one_that_waits_for_it_can_give_up(tmp_path, monkeypatch):
    ranks, write = savers(str(tmp_path), world=2), storage.write

    def fail(url: str, data: bytes) -> None:
        if url.endswith("00001-000.safetensors"):
            raise UserError(f"{url}: no space left")
        write(url, data)

    monkeypatch.setattr(storage, "write", fail)
    for rank in (0, 1):
        ranks[rank].begin(checkpoint.name_of(64), cut(64, world=2, rank=rank), manifest(64, world=2))
    place = f"{tmp_path}/checkpoints/{checkpoint.name_of(64)}"
    assert ranks[1].wait(20.0)
    assert ranks[1].problem() == (
        f"the checkpoint after 64 images could not be saved: {place}/00001-000.safetensors: no space left"
    )
    assert not ranks[0].wait(1.0)
    assert ranks[0].problem() == ""
    (publishing,) = ranks[0].threads
    ranks[0].close(seconds=0.1)
    publishing.join(20)
    assert not publishing.is_alive()
    assert checkpoint.complete(str(tmp_path)) == []


def test_what_could_not_be_removed_is_not_told_as_not_saved(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise UserError("checkpoints/x: access denied")

    (saver,) = savers(str(tmp_path), world=1)
    monkeypatch.setattr(checkpoint, "prune", fail)
    saver.begin(checkpoint.name_of(64), cut(64, world=1, rank=0), manifest(64, world=1))
    assert saver.wait(20.0)
    assert saver.problem() == (
        "the checkpoint after 64 images is there, but older ones could not be removed: checkpoints/x: access denied"
    )
    assert newest(str(tmp_path)) == checkpoint.name_of(64)


def test_a_defect_of_ours_is_no_one_liner(tmp_path, monkeypatch):
    (saver,) = savers(str(tmp_path), world=1)
    monkeypatch.setattr(checkpoint, "save_part", lambda *_, **__: 1 / 0)
    saver.begin(checkpoint.name_of(64), cut(64, world=1, rank=0), manifest(64, world=1))
    assert not saver.wait(0.2)  # for what will never be there
    with pytest.raises(ZeroDivisionError):
        saver.problem()
    saver.close(seconds=0.1)


def test_rank_0_says_by_its_clock_when_one_is_due(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("aaae_dist.saving.time", SimpleNamespace(monotonic=lambda: clock[0]))
    first, second = savers(str(tmp_path), world=2)
    never = Saver(str(tmp_path), Checkpoint(), rank=0, attempt="x")
    for clock[0], due in ((1000.0, False), (1119.0, False), (1121.0, True), (9999.0, True)):
        assert (first.is_due(), second.is_due(), never.is_due()) == (due, False, False)
    first.begin(checkpoint.name_of(64), cut(64, world=2, rank=0), manifest(64, world=2))
    assert not first.is_due()
    first.close(seconds=0.1)
