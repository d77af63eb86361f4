"""Runs of values: cut, shared out and put together again, every value is there once."""

import pytest
import torch
from torch import nn

from aaae_dist.pieces import Piece, cut, share, whole

SIZES = {"a": 7, "b": 1, "c": 40, "d": 12, "moments": 6}


def everything() -> dict[str, Piece]:
    """Tensors of these sizes, each value its own number and, in the other state, that and a half."""
    found = {}
    for name, size in SIZES.items():
        values = torch.arange(100 * len(found), 100 * len(found) + size).float()
        found[name] = Piece([size], 0, {"weight": values, "average": values + 0.5})
    return found


def count(portions: list[dict[str, Piece]]) -> dict[str, list[int]]:
    """How often each value of each tensor is there."""
    tally = {name: [0] * size for name, size in SIZES.items()}
    for portion in portions:
        for name, piece in portion.items():
            expected = everything()[name].part(piece.start, piece.stop)
            for state, values in piece.values.items():
                assert torch.equal(values, expected.values[state])
            for number in range(piece.start, piece.stop):
                tally[name][number] += 1
    return tally


@pytest.mark.parametrize("most", [2, 3, 5, 14, 16, 80, 132, 1000])
def test_portions_hold_every_value_once_and_no_more_than_they_may(most):
    portions = list(cut(everything(), most=most))
    sizes = [sum(2 * (piece.stop - piece.start) for piece in portion.values()) for portion in portions]
    assert max(sizes) <= most
    assert count(portions) == {name: [1] * size for name, size in SIZES.items()}
    assert len(portions) <= 1 + sum(2 * size for size in SIZES.values()) / max(most - 2, 1)


def test_portions_begin_amid_a_tensor_that_does():
    piece = everything()["c"].part(10, 30)
    (portion,) = cut({"c": piece}, most=1000)
    assert (portion["c"].start, portion["c"].stop, portion["c"].shape) == (10, 30, [40])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_share_every_tensor_once(world):
    shares = [share(everything(), rank=rank, world=world) for rank in range(world)]
    assert count(shares) == {name: [1] * size for name, size in SIZES.items()}
    if world == 2:
        assert [sorted(part) for part in shares] == [["a", "b", "c"], ["d", "moments"]]


def test_overlaps():
    piece = everything()["c"].part(10, 30)
    for start, stop, found in ((0, 40, (10, 30)), (15, 20, (15, 20)), (0, 11, (10, 11)), (29, 50, (29, 30))):
        overlap = piece.overlap(start, stop)
        assert overlap is not None
        assert (overlap.start, overlap.stop) == found
        assert torch.equal(overlap.values["weight"], everything()["c"].values["weight"][slice(*found)])
    assert piece.overlap(0, 10) is None
    assert piece.overlap(30, 40) is None


def test_a_modules_tensors_are_filled_in_place():
    module = nn.Linear(3, 2)
    for piece in whole(module, "average").values():
        piece.values["average"].fill_(7)
    assert all((value == 7).all() for value in module.state_dict().values())
    assert {name: piece.shape for name, piece in whole(module, "x").items()} == {"weight": [2, 3], "bias": [2]}
