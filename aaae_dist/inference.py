"""What a trained autoencoder does: (networks, tensors) -> tensors, and pictures of them."""

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from aaae_dist.aaae import NOISE, GenerativeAutoencoder
from aaae_dist.data import Pixels, to_float, to_uint8
from aaae_dist.networks import Codes, Images
from aaae_dist.randomness import gaussian, sample_keys


def device_of(model: GenerativeAutoencoder) -> torch.device:
    return model.moments.device


@torch.no_grad()
def sample_codes(model: GenerativeAutoencoder, *, seed: int, first: int, count: int) -> Codes:
    """Generated codes of samples `first`, `first + 1`, ...: sample i depends on (seed, i) alone, not on the batch."""
    keys = sample_keys(seed, first, count, device_of(model))
    return model.generate(gaussian(keys, (model.noise_size,), stream=NOISE, dtype=torch.float32))


@torch.no_grad()
def sample(model: GenerativeAutoencoder, *, seed: int, first: int, count: int) -> Pixels:
    """Generated images of samples `first`, `first + 1`, ... of this seed."""
    return to_uint8(model.decode(sample_codes(model, seed=seed, first=first, count=count)))


@torch.no_grad()
def reconstruct(model: GenerativeAutoencoder, pixels: Pixels) -> Pixels:
    """Images encoded and decoded again."""
    images: Images = to_float(pixels.to(device_of(model)))
    return to_uint8(model.decode(model.encode(images)))


def grid(pixels: Pixels, *, columns: int, scale: int = 0) -> UInt8[Tensor, "channels height width"]:
    """Images side by side, `columns` in a row, enlarged `scale` times without smoothing (0: to some 32 pixels each)."""
    count, channels, height, width = pixels.shape
    scale = scale or max(1, 32 // height)
    rows = -(-count // columns)
    cells = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    cells[:count] = pixels.cpu()
    tiled = cells.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return tiled.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def pairs(originals: Pixels, reconstructions: Pixels, *, columns: int, scale: int = 0) -> UInt8[Tensor, "channels height width"]:
    """A grid whose rows alternate: originals, and below them their reconstructions."""
    rows = [torch.cat([originals[k : k + columns].cpu(), reconstructions[k : k + columns].cpu()]) for k in range(0, len(originals) // columns * columns, columns)]
    return grid(torch.cat(rows or [originals.cpu(), reconstructions.cpu()]), columns=columns, scale=scale)


def picture(pixels: UInt8[Tensor, "channels height width"]) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def overview(model: GenerativeAutoencoder, held_out: Pixels, *, seed: int) -> Image.Image:
    """What a run shows as it goes: 100 samples of fixed noise, and held-out images above their reconstructions."""
    left = grid(sample(model, seed=seed, first=0, count=100), columns=10)
    right = pairs(held_out[:50], reconstruct(model, held_out[:50]), columns=10) if len(held_out) >= 50 else pairs(held_out, reconstruct(model, held_out), columns=len(held_out))
    height = max(left.shape[1], right.shape[1])
    sides = [torch.nn.functional.pad(side, (0, 0, 0, height - side.shape[1]), value=255) for side in (left, right)]
    gap = torch.full((left.shape[0], height, 16), 255, dtype=torch.uint8)
    return picture(torch.cat([sides[0], gap, sides[1]], dim=2))
