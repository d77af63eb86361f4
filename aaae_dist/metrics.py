"""Statistics of features and codes, mergeable over ranks, and the figures made of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from aaae_dist.distributed import sum_over_ranks

Features = Float[Tensor, "batch feature"]


class Moments(NamedTuple):
    """Count, mean and covariance (of N - 1) in float64."""

    count: float
    mean: Float[Tensor, " feature"]
    covariance: Float[Tensor, "feature feature"]


class RunningMoments:
    """Sums of features and of their products in float64: exact enough to subtract, and a plain sum over ranks."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(1 + size + size * size, dtype=torch.float64, device=device)
        self.size = size

    def add(self, features: Features) -> None:
        wide = features.detach().double()
        self.sums += torch.cat([wide.new_tensor([len(wide)]), wide.sum(0), (wide.T @ wide).flatten()])

    def over_ranks(self) -> Moments:
        """Of all ranks' features together. All ranks must call it."""
        return moments_of(sum_over_ranks(self.sums.clone()), self.size)


def moments_of(sums: Float[Tensor, " sums"], size: int) -> Moments:
    """Moments from the sums that `RunningMoments` keeps: count, sum of features, sum of products."""
    count, total, products = sums[0], sums[1 : 1 + size], sums[1 + size :].view(size, size)
    mean = total / count
    return Moments(count.item(), mean, (products - count * mean.outer(mean)) / (count - 1).clamp_min(1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson, Landau 1982; Heusel et al. 2017), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of L^T C_b L, C_a = L L^T.
    """
    if not (a.covariance.isfinite().all() and b.covariance.isfinite().all()):
        return float("nan")
    factor, failed = torch.linalg.cholesky_ex(a.covariance)
    if failed:  # fewer samples than features
        values, vectors = torch.linalg.eigh(a.covariance)
        factor = vectors * values.clamp_min(0).sqrt()
    product = factor.T @ b.covariance @ factor
    root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    return max(distance.item(), 0.0)


def effective_rank(covariance: Float[Tensor, "feature feature"]) -> float:
    """exp of the entropy of the normalised eigenvalues (Roy, Vetterli 2007): how many dimensions are really used."""
    if not covariance.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(covariance.double()).clamp_min(0)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum().exp().item()


def psnr(mean_squared_error: float, *, span: float) -> float:
    """Peak signal-to-noise ratio in dB of values that span `span` (2 for [-1, 1])."""
    return (
        float("inf")
        if mean_squared_error <= 0
        else (10 * torch.log10(torch.tensor(span * span / mean_squared_error, dtype=torch.float64))).item()
    )
