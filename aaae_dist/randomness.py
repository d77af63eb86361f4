"""Random numbers as a pure function of (seed, sample): no generator, no state, nothing to save.

Every sample of a run carries a *key*, a 64-bit integer made of the seed and the number of images seen before it.
Whatever is drawn for that sample (its noise, the directions of its penalties) is a hash of its key. So the draws are
the same on one rank or many, in one batch or in micro-batches, on a CPU or a GPU, and after a resume.
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Keys = Int64[Tensor, " batch"]

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64 (Steele, Lea, Flood 2014)


def signed(value: int) -> int:
    """The int64 with the same 64 bits as `value` modulo 2^64 (torch has no uint64 arithmetic)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def another(seed: int, number: int) -> int:
    """A seed, 0 <= seed < 2^63, for every whole number; number 0 is the seed itself."""
    return (seed + number * GOLDEN) % (1 << 63)


def mix(x: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """The finalizer of SplitMix64, a bijection of 64-bit integers whose output bits all depend on all input bits."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def sample_keys(seed: int, first: int, count: int, device: torch.device | str = "cpu") -> Keys:
    """Keys of samples `first`, `first + 1`, ..., `first + count - 1` of the run with this seed."""
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return mix(mix(index + signed(seed * GOLDEN)) + signed(GOLDEN))


def gaussian(keys: Keys, shape: tuple[int, ...], *, stream: int, dtype: torch.dtype) -> Float[Tensor, "batch ..."]:
    """Standard normal numbers of `shape` for every key, by Box and Muller (1958) on 24-bit uniforms.

    Draws of the same keys under different `stream` numbers are independent.
    """
    count = math.prod(shape)
    pairs = torch.arange((count + 1) // 2, dtype=torch.int64, device=keys.device)
    bits = mix(mix(keys + signed(stream * 0xD1B54A32D192ED03))[:, None] + pairs * signed(GOLDEN))
    radius = ((bits >> 40 & 0xFFFFFF).float() + 0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    normal = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :count]
    return normal.reshape(len(keys), *shape).to(dtype)


def integers(keys: Keys, below: int, *, stream: int) -> Int64[Tensor, " batch"]:
    """A number 0, ..., below - 1 for every key, all as likely to 2^-24; `below` is at most 2^24."""
    return (mix(keys + signed(stream * 0xD1B54A32D192ED03)) >> 40 & 0xFFFFFF) * below >> 24
