"""Losses against closed forms and automatic differentiation."""

import math

import pytest
import torch

from aaae_dist.losses import PAIRINGS, gradient_penalty, reconstruction_error


@pytest.mark.parametrize("name", PAIRINGS)
def test_the_ratio_is_that_of_the_two_sides_gradients(name):
    pairing = PAIRINGS[name]
    real = torch.linspace(-30, 30, 13, dtype=torch.float64)
    fake = torch.linspace(25, -35, 13, dtype=torch.float64).requires_grad_()
    (own,) = torch.autograd.grad(pairing.critic(real, fake).sum(), fake)
    (other,) = torch.autograd.grad(pairing.opponent(real, fake).sum(), fake)
    torch.testing.assert_close(
        own * pairing.ratio(real, fake.detach()), other, rtol=1e-8, atol=0
    )  # beyond 20, torch's softplus(x) is x


def test_values_at_known_points():
    zero, three = torch.zeros(1), torch.full((1,), math.log(3.0))
    assert PAIRINGS["relativistic"].critic(zero, zero).item() == pytest.approx(math.log(2))
    assert PAIRINGS["relativistic"].critic(zero, three).item() == pytest.approx(math.log(4))
    assert PAIRINGS["relativistic"].opponent(zero, three).item() == pytest.approx(math.log(4 / 3))
    assert PAIRINGS["logistic"].critic(three, three).item() == pytest.approx(math.log(4) + math.log(4 / 3))


def test_penalty_of_a_linear_critic_is_exact():
    slope, directions = torch.tensor([3.0, -4.0]), torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    plus, minus = 0.5 * directions @ slope, -0.5 * directions @ slope
    torch.testing.assert_close(gradient_penalty(plus, minus, step=0.5), (directions @ slope).square().mean())


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_reconstruction_error_is_a_mean_in_float32_or_wider(dtype, expected):
    error = reconstruction_error(torch.full((2, 3), 0.5, dtype=dtype), torch.zeros(2, 3, dtype=dtype))
    assert error.dtype == expected
    assert error.item() == 0.25
