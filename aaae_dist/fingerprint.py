"""Fingerprints of tensors: 64 bits that any changed bit changes, and that runs of values add up to.

For values with the bits b_i, read as whole numbers, it is the sum of b_i (2 i + 1) modulo 2^64, i the number of the
value in the whole tensor. Odd factors have an inverse, so no change of a single value goes unseen; and the sum does not
depend on how a tensor is cut, so ranks, engines and files can be compared.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from aaae_dist.pieces import Pieces

SLICE = 1 << 22  # values at a time: their factors take 8 bytes each
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value


def fingerprint(values: Float[Tensor, " run"], *, start: int = 0) -> Int64[Tensor, ""]:
    """Of a run of values, the first of which has number `start` in its tensor; on their device."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for first in range(0, len(values), SLICE):
        part = values[first : first + SLICE].view(BITS[values.element_size()]).long()
        number = start + first
        total += (part * torch.arange(2 * number + 1, 2 * (number + len(part)) + 1, 2, device=values.device)).sum()
    return total


def fingerprints(pieces: Pieces) -> dict[str, Int64[Tensor, ""]]:
    """Of pieces, by "state/tensor"."""
    return {
        f"{state}/{name}": fingerprint(values, start=piece.start)
        for name, piece in pieces.items()
        for state, values in piece.values.items()
    }
