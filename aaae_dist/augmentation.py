"""Training images varied at random: a pure function of the images and their keys, on the device."""

import torch
from jaxtyping import UInt8
from torch import Tensor

from aaae_dist.randomness import Keys, integers

FLIP, TOP, LEFT = range(16, 19)  # streams of randomness


def augment(
    pixels: UInt8[Tensor, "batch channels height width"], keys: Keys, *, size: int, flip: bool
) -> UInt8[Tensor, "batch channels size size"]:
    """Squares of `size` cut out at random places, each as likely; with `flip`, half of them mirrored left to right.

    Args:
        keys: of the samples (see `randomness.py`), so that image i of a run is varied in the same way on any ranks.
    """
    top, left = (
        integers(keys, side - size + 1, stream=stream)[:, None] + torch.arange(size, device=keys.device)
        for side, stream in zip(pixels.shape[2:], (TOP, LEFT), strict=True)
    )
    if flip:
        mirrored = integers(keys, 2, stream=FLIP).bool()
        left = torch.where(mirrored[:, None], left.flip(1), left)
    sample = torch.arange(len(pixels), device=keys.device)[:, None, None, None]
    channel = torch.arange(pixels.shape[1], device=keys.device)[:, None, None]
    return pixels[sample, channel, top[:, None, :, None], left[:, None, None, :]]
