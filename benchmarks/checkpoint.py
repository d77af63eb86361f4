"""How long a checkpoint holds the training, against a save that is waited for.

    python benchmarks/checkpoint.py --out FOLDER_OR_URL [--parameters 100_000_000] [--rounds 3]

The state of so many parameters, Adam's two moments and the averages, float32, is saved by one rank through the
trainer's own `Saver`: the step loop goes on after `begin`, the rest is a thread's work. The memory for the copies is
taken before, as the trainer does it at its start.
"""

import argparse
import secrets
import time

import torch

from aaae_dist import storage
from aaae_dist.checkpoint import Manifest, name_of
from aaae_dist.config import Checkpoint
from aaae_dist.pieces import Piece
from aaae_dist.saving import Saver

LAYERS = 20


def state(parameters: int) -> dict[str, Piece]:
    size = parameters // LAYERS
    states = ("weight", "exp_avg", "exp_avg_sq", "average")
    return {
        f"decoder.layers.{i}.weight": Piece([size], 0, {s: torch.randn(size) for s in states}) for i in range(LAYERS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pieces = state(arguments.parameters)
    run = storage.join(arguments.out, f"benchmark-{secrets.token_hex(4)}")
    saver = Saver(run, Checkpoint(keep=1), rank=0, attempt="benchmark")
    saver.reserve(pieces)
    shapes = {name: piece.shape for name, piece in pieces.items()}
    about = {"engine": "single", "world": 1, "config": "", "sound": True, "progress": {}, "figures": {}}
    print(
        f"{sum(map(len, (v for p in pieces.values() for v in p.values.values()))) * 4 / 1e9:.2f} GB to {arguments.out}"
    )
    for number in range(1, arguments.rounds + 1):
        began = time.perf_counter()
        saver.begin(name_of(number), pieces, Manifest(**about, shapes=shapes, fingerprints={}, files={}))
        held = time.perf_counter() - began
        assert saver.wait(3600.0)
        whole = time.perf_counter() - began
        assert not saver.problem(), saver.problem()
        print(f"round {number}: held for {held:.3f} s of {whole:.2f} s, {held / whole:.1%}")
    storage.remove(run)


if __name__ == "__main__":
    main()
