"""Checkpoints are whole or they are not: damaged, half-written and pruned ones; and any cut fits any other."""

import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from aaae_dist import checkpoint, storage
from aaae_dist.checkpoint import Manifest
from aaae_dist.errors import UserError
from aaae_dist.fingerprint import fingerprints
from aaae_dist.pieces import Piece

SHAPES = {"encoder.weight": [5, 4], "encoder.bias": [5], "critic.weight": [1, 3], "moments": [3, 2]}
STATES = ("weight", "exp_avg", "exp_avg_sq", "average")
FIRST = "00000-000.safetensors"


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """By tensor and state, flat: no value twice."""
    found = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        states = STATES if name != "moments" else ("weight", "average")
        flat = torch.arange(math.prod(shape)) / 100 + number + value
        found[name] = {state: flat + 10 * STATES.index(state) for state in states}
    return found


def piece(name: str, values: dict[str, torch.Tensor], start: int, stop: int) -> Piece:
    return Piece(SHAPES[name], start, {state: run[start:stop].clone() for state, run in values.items()})


def cut(value: float, *, world: int, rank: int) -> dict[str, Piece]:
    """A rank's pieces: every tensor cut into as many runs as there are ranks, some of them empty and left out."""
    found = {}
    for name, values in tensors(value).items():
        size = math.prod(SHAPES[name])
        most = -(-size // world)
        start, stop = min(most * rank, size), min(most * (rank + 1), size)
        if stop > start:
            found[name] = piece(name, values, start, stop)
    return found


def save(
    run: str, images: int, *, world: int = 1, attempt: str = "x", figures: dict[str, float] | None = None, **kept: Any
) -> None:
    place = storage.join(checkpoint.folder(run), checkpoint.name_of(images))
    for rank in range(world):
        checkpoint.save_part(place, cut(images, world=world, rank=rank), rank=rank, attempt=attempt)
    parts = [checkpoint.saved_part(place, rank=rank, attempt=attempt) for rank in range(world)]
    manifest = Manifest(
        engine="ddp",
        world=world,
        config="",
        sound=True,
        shapes=SHAPES,
        figures=figures or {},
        progress={"images": images, "epoch": 1},
        fingerprints={},
        files={},
    )
    checkpoint.publish(place, manifest, [part for part in parts if part])
    checkpoint.prune(run, **{"keep": 2} | kept)


def restored(run: str, *, world: int = 1, rank: int = 0) -> tuple[str, Manifest, dict[str, Piece]] | None:
    """The newest undamaged checkpoint, as a rank of so many takes it up."""
    pieces = cut(math.nan, world=world, rank=rank)
    found = checkpoint.restore(run, checkpoint.complete(run), pieces)
    return (*found, pieces) if found else None


def newest(run: str) -> str:
    found = restored(run)
    assert found
    name, _, pieces = found
    for tensor, expected in tensors(float(int(name))).items():
        for state, values in expected.items():
            assert torch.equal(pieces[tensor].values[state], values)
    return name


@pytest.fixture(params=["folder", "memory"])
def run(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path}/run"


@pytest.mark.parametrize("most", [1 << 26, 7])
@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_what_is_saved_by_some_ranks_is_read_by_any(run, monkeypatch, most, saved_by, world):
    monkeypatch.setattr(checkpoint, "FILE_VALUES", most)
    save(run, 640, world=saved_by)
    for rank in range(world):
        name, manifest, pieces = restored(run, world=world, rank=rank)
        assert name == "000000000640"
        assert manifest.progress == {"images": 640, "epoch": 1}
        assert manifest.fingerprints == {k: int(v) for k, v in fingerprints(cut(640, world=1, rank=0)).items()}
        for tensor, expected in cut(640, world=world, rank=rank).items():
            for state, values in expected.values.items():
                assert torch.equal(pieces[tensor].values[state], values)
    place = storage.join(checkpoint.folder(run), name)
    sizes = storage.listing(place)
    assert {name: sizes[name] for name in manifest.files} == {n: f.bytes for n, f in manifest.files.items()}
    assert set(sizes) == {*manifest.files, *(f"{r:05d}.json" for r in range(saved_by)), "manifest.json", "COMPLETE"}


def test_only_files_that_hold_a_part_are_read(run, monkeypatch):
    save(run, 640, world=4)
    read, seen = storage.read, []
    monkeypatch.setattr(storage, "read", lambda url, **more: seen.append(url.rpartition("/")[2]) or read(url, **more))
    assert restored(run, world=4, rank=2)
    assert seen == ["manifest.json", "COMPLETE", "00002-000.safetensors"]


def test_what_an_earlier_attempt_left_is_no_part_and_goes(run):
    place = storage.join(checkpoint.folder(run), checkpoint.name_of(64))
    for rank in range(3):
        checkpoint.save_part(place, cut(7, world=3, rank=rank), rank=rank, attempt="earlier")
    assert checkpoint.saved_part(place, rank=1, attempt="x") is None
    save(run, 64, world=2)
    assert newest(run) == f"{64:012d}"
    assert not any(name.startswith("00002") for name in storage.listing(place))


@pytest.mark.parametrize("left", [b"", b"{}", b'{"attemqt": "x"}', bytes(40)])
def test_what_a_power_cut_left_of_a_part_is_none(run, left):
    """It lies where a checkpoint is saved anew, until that part is there."""
    place = storage.join(checkpoint.folder(run), checkpoint.name_of(64))
    storage.write(storage.join(place, "00000.json"), left)
    assert checkpoint.saved_part(place, rank=0, attempt="x") is None
    save(run, 64)
    assert newest(run) == f"{64:012d}"


def test_what_is_there_twice_or_not_at_all_is_no_checkpoint(run):
    """As where ranks divide the tensors otherwise than they say."""
    save(run, 128, world=2)
    manifest = checkpoint.read_manifest(run, checkpoint.name_of(128))
    place, parts = storage.join(checkpoint.folder(run), checkpoint.name_of(192)), []
    for rank in range(2):
        checkpoint.save_part(place, cut(7, world=2, rank=rank), rank=rank, attempt="x")
        parts.append(checkpoint.saved_part(place, rank=rank, attempt="x"))
    for wrong in (parts[:1], [*parts, parts[0]]):
        with pytest.raises(RuntimeError, match=r"values of .*, which has"):
            checkpoint.publish(place, manifest, wrong)
    assert checkpoint.complete(run) == [checkpoint.name_of(128)]


def test_a_run_without_checkpoints_begins_anew(run):
    assert restored(run) is None


def test_the_newest_are_kept(run):
    for images in (100, 200, 300, 400):
        save(run, images)
    assert checkpoint.complete(run) == ["000000000300", "000000000400"]
    assert list(storage.listing(checkpoint.folder(run))) == ["000000000300", "000000000400"]


def test_one_that_is_half_removed_is_no_checkpoint(run, monkeypatch):
    for images in (100, 200, 300):
        save(run, images, keep=9)
    gone, remove = [], storage.remove

    def note(url: str) -> None:
        gone.append(url.removeprefix(checkpoint.folder(run)))
        remove(url)

    monkeypatch.setattr(storage, "remove", note)
    checkpoint.prune(run, keep=2)
    assert gone == [f"/{100:012d}/COMPLETE", f"/{100:012d}"]


def test_one_that_was_set_aside_can_be_brought_back_until_it_is_saved_anew(run):
    for images in (100, 200, 300):
        save(run, images, keep=9)
    place = storage.join(checkpoint.folder(run), f"{300:012d}")
    lost = storage.read(storage.join(place, FIRST))
    storage.remove(storage.join(place, FIRST))
    assert newest(run) == f"{200:012d}"
    checkpoint.set_aside_after(run, f"{200:012d}")
    assert checkpoint.complete(run) == [f"{100:012d}", f"{200:012d}"]
    storage.write(storage.join(place, FIRST), lost)
    storage.write(storage.join(place, "COMPLETE"), storage.read(storage.join(place, "ASIDE")))
    assert list(checkpoint.verify(run)) == []
    assert newest(run) == f"{300:012d}"
    save(run, 300, keep=9)
    assert "ASIDE" not in storage.listing(place)


def test_milestones_and_the_best_are_kept_besides(run):
    mse = dict(zip(range(100, 1300, 100), (9, 8, 3, 7, 6, 3, 5, 4, 9, 9, 8, 7), strict=True))
    for images, value in mse.items():
        figures = {"mse": float(value)} if images != 500 else {}
        save(run, images, keep=1, keep_every=450, best="mse", figures=figures)
    kept = [500, 600, 900, 1200]  # the first after 450 and after 900, the newest of the lowest, the newest
    assert [int(name) for name in checkpoint.complete(run)] == kept
    assert checkpoint.prune(run, keep=2) == [f"{images:012d}" for images in (500, 600)]
    assert checkpoint.prune(run, keep=1, best="no such figure") == [f"{900:012d}"]
    assert checkpoint.prune(run, keep=1) == []


def test_a_damaged_one_is_not_the_best(run):
    for images, value in ((100, 1.0), (200, 2.0), (300, 3.0)):
        save(run, images, keep=9, figures={"mse": value})
    flip(storage.join(checkpoint.folder(run), f"{100:012d}", "manifest.json"))
    assert checkpoint.prune(run, keep=1, best="mse") == [f"{100:012d}"]


def test_all_damage_is_found(run):
    for images in (100, 200, 300):
        save(run, images, world=2, keep=9)
    assert list(checkpoint.verify(run)) == []
    places = [storage.join(checkpoint.folder(run), f"{images:012d}") for images in (100, 200, 300)]
    flip(storage.join(places[0], "manifest.json"))
    flip(storage.join(places[2], FIRST))
    storage.remove(storage.join(places[2], "00001-000.safetensors"))
    assert [line.split(": ")[0] for line in checkpoint.verify(run)] == [
        storage.join(places[0], "manifest.json"),
        storage.join(places[2], FIRST),
        storage.join(places[2], "00001-000.safetensors"),
    ]


def test_an_incomplete_one_is_no_checkpoint_and_goes_with_the_next(run):
    save(run, 100)
    half = storage.join(checkpoint.folder(run), "000000000200")
    storage.write(storage.join(half, FIRST), b"half of it")
    assert newest(run) == "000000000100"
    save(run, 200)
    assert newest(run) == "000000000200"
    storage.write(storage.join(checkpoint.folder(run), "000000000250", FIRST), b"half")
    save(run, 300)
    assert list(storage.listing(checkpoint.folder(run))) == ["000000000200", "000000000300"]


def flip(place: str) -> None:
    data = bytearray(storage.read(place))
    data[-1] ^= 1
    storage.write(place, bytes(data))


DAMAGE = {
    "a flipped byte": flip,
    "a missing file": storage.remove,
    "a file cut short": lambda place: storage.write(place, storage.read(place)[:-5]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", [FIRST, "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(run, file, damage, caplog):
    save(run, 100)
    save(run, 200)
    DAMAGE[damage](storage.join(checkpoint.folder(run), "000000000200", file))
    with caplog.at_level(logging.WARNING):
        assert newest(run) == "000000000100"
    assert f"checkpoint 000000000200 is passed over: {checkpoint.folder(run)}/000000000200/{file}: " in caplog.text


def test_a_marker_that_is_damaged_is_told_as_its_manifest(run):
    save(run, 100)
    flip(storage.join(checkpoint.folder(run), "000000000100", "COMPLETE"))
    with pytest.raises(UserError, match=r"all 1 checkpoints are damaged.*manifest.json: damaged, its bytes are not"):
        restored(run)


def test_what_another_rank_finds_damaged_is_passed_over_here_too(run):
    save(run, 100)
    save(run, 200)
    answers = iter(["checkpoints/000000000200/00001-000.safetensors: missing", ""])
    pieces = cut(math.nan, world=1, rank=0)
    found = checkpoint.restore(run, checkpoint.complete(run), pieces, agree=lambda problem: problem or next(answers))
    assert found
    assert found[0] == "000000000100"
    assert torch.equal(pieces["moments"].values["average"], tensors(100)["moments"]["average"])


def test_if_all_are_damaged_nothing_is_begun_anew(run):
    save(run, 100)
    flip(storage.join(checkpoint.folder(run), "000000000100", FIRST))
    with pytest.raises(UserError, match=r"all 1 checkpoints are damaged; restore one, or remove the folder"):
        restored(run)


def test_a_checkpoint_of_other_networks_is_refused(run):
    save(run, 100)
    pieces = {"encoder.bias": Piece([6], 0, {"weight": torch.zeros(6)})}
    with pytest.raises(UserError, match=r"one of other networks .*\(encoder.bias is \[6\] there, \[5\] here\)"):
        checkpoint.restore(run, checkpoint.complete(run), pieces)


def test_one_that_another_version_wrote_is_refused_and_not_taken_for_damage(run):
    save(run, 100)
    place = storage.join(checkpoint.folder(run), "000000000100")
    data = storage.read(storage.join(place, "manifest.json")).replace(b'"version": 3', b'"version": 2')
    storage.write(storage.join(place, "manifest.json"), data)
    storage.write(storage.join(place, "COMPLETE"), hashlib.sha256(data).hexdigest().encode())
    with pytest.raises(UserError, match=r"manifest.json: written by another version of aaae_dist; go on with that"):
        restored(run)


def test_what_a_training_removes_meanwhile_is_no_damage(run, monkeypatch):
    for images in (100, 200):
        save(run, images)
    flip(storage.join(checkpoint.folder(run), "000000000200", FIRST))
    damage = checkpoint.damage

    def removed(run: str, name: str):
        if name == "000000000100":
            storage.remove(storage.join(checkpoint.folder(run), name))
        return damage(run, name)

    monkeypatch.setattr(checkpoint, "damage", removed)
    (found,) = checkpoint.verify(run)
    assert "000000000200" in found


def test_files_that_do_not_hold_all_are_damage(run):
    save(run, 100, world=2)
    place, manifest = storage.join(checkpoint.folder(run), f"{100:012d}"), checkpoint.read_manifest(run, f"{100:012d}")
    half = {file: about for file, about in manifest.files.items() if file.startswith("00000")}
    data = manifest.model_copy(update={"files": half}).model_dump_json().encode()
    storage.write(storage.join(place, "manifest.json"), data)
    storage.write(storage.join(place, "COMPLETE"), hashlib.sha256(data).hexdigest().encode())
    with pytest.raises(UserError, match=r"manifest.json: no file holds all of encoder.weight"):
        restored(run)


def test_a_failing_store_leaves_the_older_ones(tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    save(run, 100)
    write = storage.write

    def fail(url: str, data: bytes) -> None:
        if url.endswith(FIRST):
            raise UserError(f"{url}: no space left")
        write(url, data)

    monkeypatch.setattr(storage, "write", fail)
    with pytest.raises(UserError, match="no space left"):
        save(run, 200, keep=1)
    assert checkpoint.complete(run) == ["000000000100"]
    assert newest(run) == "000000000100"
    assert not list(Path(run).rglob("*.partial"))
