"""No changed bit goes unseen, however a tensor is cut."""

import itertools

import numpy as np
import pytest
import torch

from aaae_dist import fingerprint as module
from aaae_dist.fingerprint import fingerprint, fingerprints
from aaae_dist.pieces import Piece


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, np.int32), (torch.float64, np.int64)])
def test_against_the_formula(dtype, bits):
    values = torch.randn(1000, dtype=dtype)
    expected = sum(int(b) * (2 * (7 + i) + 1) for i, b in enumerate(values.numpy().view(bits))) % 2**64
    assert int(fingerprint(values, start=7)) % 2**64 == expected


def test_it_does_not_depend_on_how_a_tensor_is_cut(monkeypatch):
    values = torch.randn(1001)
    whole = int(fingerprint(values))
    for cuts in ([0, 1001], [0, 1, 500, 1001], [0, 333, 334, 1000, 1001]):
        parts = [int(fingerprint(values[a:b], start=a)) for a, b in itertools.pairwise(cuts)]
        assert sum(parts) % 2**64 == whole % 2**64
    monkeypatch.setattr(module, "SLICE", 13)
    assert int(fingerprint(values)) == whole


def test_every_bit_counts_and_so_does_the_order():
    values = torch.randn(64)
    whole = int(fingerprint(values))
    for number in range(64):
        for bit in range(32):
            changed = values.clone()
            changed.view(torch.int32)[number] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            assert int(fingerprint(changed)) != whole
    swapped = values[torch.tensor([1, 0, *range(2, 64)])]
    assert int(fingerprint(swapped)) != whole
    assert int(fingerprint(values.new_tensor([-0.0]))) != int(fingerprint(values.new_tensor([0.0])))


def test_pieces_are_told_by_state_and_tensor():
    piece = Piece([4], 1, {"weight": torch.ones(2), "average": torch.zeros(2)})
    found = fingerprints({"a.b": piece})
    assert set(found) == {"weight/a.b", "average/a.b"}
    assert int(found["weight/a.b"]) == 0x3F800000 * (3 + 5)
    assert int(found["average/a.b"]) == 0
