"""Figures against closed forms and independent implementations."""

import math

import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.functional.image import peak_signal_noise_ratio

from aaae_dist.metrics import Moments, RunningMoments, effective_rank, frechet_distance, psnr


def normal(mean, covariance) -> Moments:
    return Moments(1.0, torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (normal([0.0], [[1.0]]), normal([3.0], [[4.0]]), 10),
        (
            normal([0.0] * 3, [[1, 0, 0], [0, 4, 0], [0, 0, 9]]),
            normal([0.0] * 3, [[4, 0, 0], [0, 1, 0], [0, 0, 16]]),
            3,
        ),
        (normal([0.0] * 2, [[2, 1], [1, 2]]), normal([0.0] * 2, [[3, 0], [0, 1]]), 8 - 2 * math.sqrt(14)),
        (normal([1.0] * 2, [[2, 1], [1, 2]]), normal([1.0] * 2, [[2, 1], [1, 2]]), 0),
        (normal([0.0] * 2, [[1, 0], [0, 0]]), normal([0.0] * 2, [[0, 0], [0, 1]]), 2),
    ],
)
def test_frechet_distance_of_known_gaussians(a, b, distance):
    assert frechet_distance(a, b) == pytest.approx(distance, abs=1e-7)
    assert frechet_distance(b, a) == pytest.approx(distance, abs=1e-7)


@pytest.mark.parametrize("count", [500, 20])  # more, and fewer, than the 30 features
def test_frechet_distance_against_scipy(count):
    torch.manual_seed(0)
    x, y = torch.randn(count, 30).double() @ torch.randn(30, 30).double(), torch.rand(count, 30).double() + 0.3
    a, b = RunningMoments(30), RunningMoments(30)
    for part in x.split(7):
        a.add(part)
    b.add(y)
    first, second = torch.cov(x.T), torch.cov(y.T)
    root = sqrtm((first @ second).numpy()).real.trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root
    assert frechet_distance(a.over_ranks(), b.over_ranks()) == pytest.approx(expected.item(), rel=1e-5)


def test_moments_far_from_zero_lose_nothing():
    torch.manual_seed(0)
    x = torch.randn(1000, 4) * 1e-2 + 1000
    running = RunningMoments(4)
    for part in x.split(33):
        running.add(part)
    torch.testing.assert_close(running.over_ranks().covariance, torch.cov(x.double().T), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("values", "rank"), [([1, 1, 1, 1], 4), ([1, 0, 0], 1), ([0, 0], 1), ([2, 2, 0], 2)])
def test_effective_rank_of_known_spectra(values, rank):
    assert effective_rank(torch.diag(torch.tensor(values, dtype=torch.float64))) == pytest.approx(rank)


def test_psnr_against_torchmetrics():
    torch.manual_seed(0)
    a, b = torch.rand(4, 1, 8, 8) * 2 - 1, torch.rand(4, 1, 8, 8) * 2 - 1
    expected = peak_signal_noise_ratio(a, b, data_range=2.0).item()
    assert psnr((a - b).square().mean().item(), span=2.0) == pytest.approx(expected, rel=1e-5)
    assert psnr(0.0, span=2.0) == float("inf")
