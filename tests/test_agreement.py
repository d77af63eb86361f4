"""Ranks that drift apart are stopped before they save, with the name of the tensor and the rank."""

from pathlib import Path

import pytest
from test_training import trainer_for
from training_runs import ended, settings

from aaae_dist import checkpoint, distributed
from aaae_dist.agreement import differing, refuse_other_state, seen_by_all

CORRUPTED = """
import torch
from aaae_dist import distributed
from aaae_dist.cli import main
from aaae_dist.training import Trainer
step = Trainer.step

def corrupted(self, batch):
    step(self, batch)
    if self.state.images == 192 and distributed.rank() == 1:
        with torch.no_grad():
            values = self.engine.alike()["{tensor}"].values["{state}"]
            values.view(torch.int32)[-1] ^= 1 << 20  # (what lower bits do may be rounded away in a step)

Trainer.step = corrupted
main()
"""


@pytest.mark.parametrize(
    ("engine", "where", "every"),
    [
        ("ddp", "weight/decoder.layers.0.weight", 256),
        ("ddp", "exp_avg_sq/image_critic.head.weight", 192),
        ("ddp", "average/encoder.layers.0.bias", 0),  # at the next checkpoint
        ("zero1", "weight/latent_generator.layers.0.weight", 192),
        ("fsdp2", "weight/moments", 192),
    ],
)
def test_a_single_bit_of_one_rank_stops_the_run(tmp_path, digits, engine, where, every):
    state, tensor = where.split("/")
    script = tmp_path / "corrupted.py"
    script.write_text(CORRUPTED.format(state=state, tensor=tensor))
    more = (f"training.compare_every={every}", f"checkpoint.every={0 if every else 64}")
    done = ended(*settings(tmp_path / "run", digits, *more), processes=2, engine=engine, script=script)
    assert done.returncode != 0
    found = [text for text in done.stderr.splitlines() if "is not the same on all ranks" in text]
    network = tensor.partition(".")[0]
    assert found[0].startswith(("aaae: ", "aaae rank 1: "))
    assert (
        f"{network} is not the same on all ranks: {tensor} ({state}) differs between ranks 0 and 1; look at" in found[0]
    )
    told = int(found[0].split(" after ")[1].split(" images")[0])
    assert told in {every, 192}
    saved = [int(name) for name in checkpoint.complete(str(tmp_path / "run"))]
    assert saved == ([] if every else [64, 128])


def test_who_differs_is_in_the_minority():
    same = {"weight/a": 1, "weight/b": 2}
    assert differing([same, same, same]) is None
    assert differing([same, same | {"weight/b": 3}, same]) == ("weight/b", [1])
    assert differing([same | {"weight/a": 9, "weight/b": 3}, same, same]) == ("weight/a", [0])
    assert differing([same, same | {"weight/a": 3}]) == ("weight/a", [0, 1])


def test_a_rank_that_sees_late_is_waited_for(monkeypatch):
    """As NFS hides new files for a while."""
    looks = iter([[], [], ["000000000064"]])
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "from_rank_0", lambda look: ["000000000064"])
    monkeypatch.setattr(distributed, "gather", lambda value: [(True, False), value])
    monkeypatch.setattr("aaae_dist.agreement.time.sleep", lambda seconds: None)
    assert seen_by_all("runs/x", lambda: next(looks)) == ["000000000064"]
    assert next(looks, "no more") == "no more"


def test_another_state_than_was_saved_is_a_defect(tmp_path: Path, digits: str):
    trainer_for(*settings(tmp_path, digits, "training.images=64")).train()
    trainer = trainer_for(*settings(tmp_path, digits, "training.images=128"))
    manifest = checkpoint.read_manifest(str(tmp_path), f"{64:012d}")
    refuse_other_state(trainer.engine, manifest)
    for piece in trainer.engine.pieces().values():
        for values in piece.values.values():
            values[0] = -values[0] if values[0] else 1.0
            with pytest.raises(RuntimeError, match="is not what was saved: fingerprint"):
                refuse_other_state(trainer.engine, manifest)
            values[0] = -values[0] if values[0] != 1.0 else 0.0
    assert distributed.world() == 1
