"""The networks. None looks at more than one sample at a time, so ranks and micro-batches do not matter.

Encoders and decoders are normalised by the root mean square over channels, pixel by pixel; critics by nothing. A
critic's last layer has no bias: a relativistic pairing compares logits, so the bias has no gradient but rounding noise,
which Adam would turn into steps of full size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from aaae_dist.errors import UserError

Images = Float[Tensor, "batch channels height width"]  # in [-1, 1]
Codes = Float[Tensor, "batch code"]
Noise = Float[Tensor, "batch noise"]
Logits = Float[Tensor, " batch"]


class RMSNorm(nn.Module):
    """Each sample's features divided by their root mean square over channels (Zhang, Sennrich 2019), pixel by pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        gain = self.gain.view(-1, *[1] * (x.dim() - 2))
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * gain


class Layers(nn.Sequential):
    """Layers in sequence; `recomputed`, they keep no activations for the backward pass, but make them there again."""

    recomputed = False

    def forward(self, input: Tensor) -> Tensor:
        if not self.recomputed:
            return super().forward(input)
        return checkpoint(super().forward, input, use_reentrant=False)


class Stack(nn.Module):
    """Layers in sequence.

    A class with a forward of its own, because a bare nn.Sequential cannot be compiled in place.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = Layers(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Critic(nn.Module):
    """Layers that end in features, and a last layer of one logit per sample, always in float32 or wider.

    In bfloat16 the logits' rounding would drown the finite differences of the penalties.
    """

    def __init__(self, *layers: nn.Module, features: int) -> None:
        super().__init__()
        self.layers = Layers(*layers)
        self.head = nn.Linear(features, 1, bias=False)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Logits:
        features = self.layers(x)
        with torch.autocast(features.device.type, enabled=False):
            precision = torch.promote_types(features.dtype, torch.float32)
            return linear(features.to(precision), self.head.weight.to(precision)).squeeze(1)


def activation() -> nn.Module:
    return nn.LeakyReLU(0.2)


def hidden(inputs: int, *, width: int, depth: int, norm: bool = False) -> list[nn.Module]:
    """`depth` fully connected hidden layers."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += (
            [nn.Linear(inputs, width), RMSNorm(width), activation()]
            if norm
            else [nn.Linear(inputs, width), activation()]
        )
        inputs = width
    return layers


class Architecture(NamedTuple):
    """How to make the three image networks, each from (channels, size, width, code size)."""

    encoder: Callable[[int, int, int, int], nn.Module]
    decoder: Callable[[int, int, int, int], nn.Module]
    critic: Callable[[int, int, int], nn.Module]


def dcgan_widths(size: int, width: int) -> list[int]:
    """Channels after each halving from `size` pixels down to 4."""
    halvings = (size // 4).bit_length() - 1
    if size < 8 or size != 4 << halvings:
        raise UserError(
            f"data.size {size}: the dcgan architecture needs 4 times a power of two (8, 16, 32, ...); prepare the "
            "images at such a size"
        )
    return [width << i for i in range(halvings)]


def dcgan_trunk(channels: int, size: int, width: int, *, norm: bool) -> list[nn.Module]:
    """Halvings down to 4 x 4 pixels, then flat features (Radford, Metz, Chintala 2016).

    The first is never normalised.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in dcgan_widths(size, width):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1)]
        layers += [RMSNorm(outputs), activation()] if norm and inputs != channels else [activation()]
        inputs = outputs
    return [*layers, nn.Flatten()]


def dcgan_encoder(channels: int, size: int, width: int, code_size: int) -> nn.Module:
    features = 16 * dcgan_widths(size, width)[-1]
    return Stack(*dcgan_trunk(channels, size, width, norm=True), nn.Linear(features, code_size))


def dcgan_decoder(channels: int, size: int, width: int, code_size: int) -> nn.Module:
    inputs, *widths = reversed(dcgan_widths(size, width))
    layers: list[nn.Module] = [nn.Linear(code_size, 16 * inputs), nn.Unflatten(1, (inputs, 4, 4))]
    for outputs in widths:
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), RMSNorm(outputs), activation()]
        inputs = outputs
    return Stack(*layers, nn.ConvTranspose2d(inputs, channels, 4, 2, 1))


def dcgan_critic(channels: int, size: int, width: int) -> nn.Module:
    features = 16 * dcgan_widths(size, width)[-1]
    return Critic(*dcgan_trunk(channels, size, width, norm=False), features=features)


def mlp_encoder(channels: int, size: int, width: int, code_size: int) -> nn.Module:
    layers = hidden(channels * size * size, width=width, depth=2, norm=True)
    return Stack(nn.Flatten(), *layers, nn.Linear(width, code_size))


def mlp_decoder(channels: int, size: int, width: int, code_size: int) -> nn.Module:
    layers = hidden(code_size, width=width, depth=2, norm=True)
    return Stack(*layers, nn.Linear(width, channels * size * size), nn.Unflatten(1, (channels, size, size)))


def mlp_critic(channels: int, size: int, width: int) -> nn.Module:
    return Critic(nn.Flatten(), *hidden(channels * size * size, width=width, depth=2), features=width)


ARCHITECTURES = {
    "dcgan": Architecture(dcgan_encoder, dcgan_decoder, dcgan_critic),
    "mlp": Architecture(mlp_encoder, mlp_decoder, mlp_critic),
}


def latent_generator(noise_size: int, code_size: int, *, width: int, depth: int) -> nn.Module:
    return Stack(*hidden(noise_size, width=width, depth=depth), nn.Linear(width, code_size))


def latent_critic(code_size: int, *, width: int, depth: int) -> nn.Module:
    return Critic(*hidden(code_size, width=width, depth=depth), features=width)
