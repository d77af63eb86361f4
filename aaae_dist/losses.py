"""Losses as pure functions of tensors, each beside its formula."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

Logits = Float[Tensor, " batch"]


class Pairing(NamedTuple):
    """Both sides of one adversarial pairing, written down once.

    `ratio` is d(opponent's loss) / d(critic's loss) with respect to each fake sample: the critic's own gradient at its
    fake input, times this number, is the gradient that the opponent needs. All are functions of (real logits, fake
    logits).
    """

    critic: Callable[[Logits, Logits], Logits]
    opponent: Callable[[Logits, Logits], Logits]
    ratio: Callable[[Logits, Logits], Logits]


def minus_exp_of_minus(x: Logits) -> Logits:
    """-exp(-x). Clamped where float32 ends: a tighter clamp leaves a confident critic's opponent without gradient."""
    return -torch.exp(-x.clamp(-80, 80))


# Relativistic (RpGAN; Jolicoeur-Martineau 2018; Huang et al. 2025), d = D(fake) - D(real) of a pair:
#   critic softplus(d), opponent softplus(-d); their derivatives by d are s(d) and -s(-d) = -exp(-d) s(d).
# Logistic, non-saturating (Goodfellow et al. 2014), f = D(fake):
#   critic softplus(f) + softplus(-D(real)), opponent softplus(-f); derivatives by f: s(f) and -s(-f) = -exp(-f) s(f).
# A hinge is not here: its critic has no gradient where its opponent's is not zero.
PAIRINGS = {
    "relativistic": Pairing(
        critic=lambda real, fake: softplus(fake - real),
        opponent=lambda real, fake: softplus(real - fake),
        ratio=lambda real, fake: minus_exp_of_minus(fake - real),
    ),
    "logistic": Pairing(
        critic=lambda real, fake: softplus(fake) + softplus(-real),
        opponent=lambda real, fake: softplus(-fake),
        ratio=lambda real, fake: minus_exp_of_minus(fake),
    ),
}


def gradient_penalty(plus: Logits, minus: Logits, *, step: float) -> Float[Tensor, ""]:
    """(R1 + R2) / 2 by central differences: the mean over samples of |grad D|^2, half of them real and half fake.

    `plus` and `minus` are D(x + step e) and D(x - step e), e ~ N(0, I). For every direction the squared slope
    ((plus - minus) / (2 step))^2 tends to (e . grad D)^2, whose mean over e is |grad D|^2 (Mescheder et al. 2018).
    """
    return ((plus - minus) / (2 * step)).square().mean()


def reconstruction_error(
    reconstructions: Float[Tensor, "*shape"], images: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Mean squared error per value, in float32 or wider."""
    precision = torch.promote_types(images.dtype, torch.float32)
    return mse_loss(reconstructions.to(precision), images.to(precision))
