"""Schedules: pure functions of the images seen, so that there is nothing to save and nothing to step."""

import math

from aaae_dist.config import Training


def learning_rate(training: Training, images: int) -> float:
    """The share of the peak rates at this point: a linear warm-up, then half a cosine down to `final_rate`."""
    if images < training.warmup:
        return (images + training.batch_size) / (training.warmup + training.batch_size)
    way = min((images - training.warmup) / max(training.images - training.warmup, 1), 1.0)
    return training.final_rate + (1 - training.final_rate) * 0.5 * (1 + math.cos(math.pi * way))


def averaging_rate(training: Training, images: int) -> float:
    """How far the averages move to the weights after this step; their half-life grows with the run until it is full."""
    half_life = min(training.average_half_life, images / 12)
    return 1 - 0.5 ** (training.batch_size / half_life) if half_life > 0 else 1.0
