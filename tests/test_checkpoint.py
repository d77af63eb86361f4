"""Checkpoints are whole or they are not: damaged, half-written and pruned ones."""

import logging
from pathlib import Path

import pytest
import torch

from aaae_dist import checkpoint, storage
from aaae_dist.errors import UserError

PARTS = ("game", "average", "optimizer")


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {"weight": torch.full((3, 2), value), "step": torch.tensor(value)} for part in PARTS}


def save(run: str, images: int, *, keep: int = 2) -> None:
    checkpoint.save(run, images, tensors=parts(float(images)), progress={"images": images, "epoch": 1}, keep=keep)


@pytest.fixture(params=["folder", "memory"])
def run(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "folder" else f"memory://{tmp_path}/run"


def test_what_is_saved_is_read(run):
    save(run, 640)
    saved = checkpoint.newest(run)
    assert saved.name == "000000000640"
    assert saved.progress == {"images": 640, "epoch": 1}
    for part, values in parts(640.0).items():
        for name, value in values.items():
            assert torch.equal(saved.tensors[part][name], value)
    place = storage.join(run, "checkpoints", saved.name)
    manifest = storage.read_json(storage.join(place, "manifest.json"))
    sizes = storage.listing(place)
    assert {name: sizes[name] for name in manifest["files"]} == {n: f["bytes"] for n, f in manifest["files"].items()}
    assert set(sizes) == {*manifest["files"], "manifest.json", "COMPLETE"}


def test_a_run_without_checkpoints_begins_anew(run):
    assert checkpoint.newest(run) is None


def test_the_newest_are_kept(run):
    for images in (100, 200, 300, 400):
        save(run, images)
    assert checkpoint.complete(run) == ["000000000300", "000000000400"]
    assert list(storage.listing(checkpoint.folder(run))) == ["000000000300", "000000000400"]


def test_an_incomplete_one_is_no_checkpoint_and_goes_with_the_next(run):
    save(run, 100)
    half = storage.join(checkpoint.folder(run), "000000000200")
    storage.write(storage.join(half, "game.safetensors"), b"half of it")
    assert checkpoint.newest(run).name == "000000000100"
    save(run, 200)
    assert checkpoint.newest(run).tensors["game"]["step"] == 200
    storage.write(storage.join(checkpoint.folder(run), "000000000250", "game.safetensors"), b"half")
    save(run, 300)
    assert list(storage.listing(checkpoint.folder(run))) == ["000000000200", "000000000300"]


def test_a_complete_one_is_not_written_again(run):
    save(run, 100)
    checkpoint.save(run, 100, tensors=parts(7.0), progress={"images": 100}, keep=1)
    assert checkpoint.newest(run).tensors["game"]["step"] == 100


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
@pytest.mark.parametrize("file", ["game.safetensors", "progress.json", "manifest.json"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(run, file, damage, caplog):
    save(run, 100)
    save(run, 200)
    if file == "manifest.json" and damage == "a flipped byte":
        storage.write(storage.join(checkpoint.folder(run), "000000000200", file), b'{"files": {}}')
    else:
        DAMAGE[damage](storage.join(checkpoint.folder(run), "000000000200", file))
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(run).name == "000000000100"
    assert "checkpoint 000000000200 is passed over" in caplog.text
    assert file in caplog.text


def test_if_all_are_damaged_nothing_is_begun_anew(run):
    save(run, 100)
    flip(storage.join(checkpoint.folder(run), "000000000100", "game.safetensors"))
    with pytest.raises(UserError, match=r"all 1 checkpoints are damaged; restore one, or remove the folder"):
        checkpoint.newest(run)


def test_a_failing_store_leaves_the_older_ones(tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    save(run, 100)
    write = storage.write

    def fail_at_the_optimizer(url: str, data: bytes) -> None:
        if url.endswith("optimizer.safetensors"):
            raise UserError(f"{url}: no space left")
        write(url, data)

    monkeypatch.setattr(storage, "write", fail_at_the_optimizer)
    with pytest.raises(UserError, match="no space left"):
        save(run, 200, keep=1)
    assert checkpoint.complete(run) == ["000000000100"]
    assert checkpoint.newest(run).tensors["game"]["step"] == 100
    assert not list(Path(run).rglob("*.partial"))
