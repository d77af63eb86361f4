"""What a trained autoencoder does: (networks, tensors) -> tensors, and pictures of them."""

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from aaae_dist.aaae import NOISE, GenerativeAutoencoder
from aaae_dist.data import Pixels, to_float, to_uint8
from aaae_dist.networks import Codes, Images
from aaae_dist.randomness import gaussian, sample_keys

Tiling = UInt8[Tensor, "channels picture_height picture_width"]


def images_for(model: GenerativeAutoencoder, pixels: Pixels) -> Images:
    """Bytes as the model takes them: in [-1, 1], on its device, of its precision."""
    return to_float(pixels.to(model.moments.device)).to(model.moments.dtype)


@torch.no_grad()
def sample_codes(model: GenerativeAutoencoder, *, seed: int, first: int, count: int) -> Codes:
    """Generated codes of samples `first`, `first + 1`, ...: sample i depends on (seed, i) alone, not on the batch."""
    keys = sample_keys(seed, first, count, model.moments.device)
    return model.generate(gaussian(keys, (model.noise_size,), stream=NOISE, dtype=model.moments.dtype))


@torch.no_grad()
def sample(model: GenerativeAutoencoder, *, seed: int, first: int, count: int) -> Pixels:
    """Generated images of samples `first`, `first + 1`, ... of this seed."""
    return to_uint8(model.decode(sample_codes(model, seed=seed, first=first, count=count)))


@torch.no_grad()
def reconstruct(model: GenerativeAutoencoder, pixels: Pixels) -> Pixels:
    """Images encoded and decoded again."""
    return to_uint8(model.decode(model.encode(images_for(model, pixels))))


def grid(pixels: Pixels, *, columns: int, gap: int = 4) -> Tiling:
    """Images side by side on white, `columns` in a row; small ones enlarged to some 32 pixels, without smoothing."""
    scale = max(1, 32 // pixels.shape[2])
    enlarged = pad(pixels.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3), (0, gap, 0, gap), value=255)
    count, channels, height, width = enlarged.shape
    rows = -(-count // columns)
    cells = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    cells[:count] = enlarged
    return (
        cells.view(rows, columns, channels, height, width)
        .permute(2, 0, 3, 1, 4)
        .reshape(channels, rows * height, columns * width)
    )


def pairs(originals: Pixels, reconstructions: Pixels, *, columns: int) -> Tiling:
    """A grid whose rows alternate: originals, and below them their reconstructions."""
    rows = [
        grid(images[start : start + columns], columns=columns)
        for start in range(0, len(originals), columns)
        for images in (originals, reconstructions)
    ]
    return torch.cat(rows, dim=1)


def picture(pixels: Tiling) -> Image.Image:
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def overview(model: GenerativeAutoencoder, held_out: Pixels, *, seed: int) -> Image.Image:
    """What a run shows: left, 100 samples of fixed noise; right, held-out images above their reconstructions."""
    sides = (
        grid(sample(model, seed=seed, first=0, count=100), columns=10),
        pairs(held_out, reconstruct(model, held_out), columns=10),
    )
    height = max(side.shape[1] for side in sides)
    return picture(torch.cat([pad(side, (0, 16, 0, height - side.shape[1]), value=255) for side in sides], dim=2))
