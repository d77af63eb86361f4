"""Draws are a pure function of (seed, sample): the same however a batch is cut, and as random as they should be."""

import pytest
import torch

from aaae_dist.randomness import GOLDEN, gaussian, mix, sample_keys, signed


def test_mix_is_splitmix64():
    """The first outputs for seed 1234567, from the reference implementation (Vigna's splitmix64.c)."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    state = torch.tensor([signed(1234567 + (i + 1) * GOLDEN) for i in range(5)])
    assert [value % 2**64 for value in mix(state).tolist()] == expected


@pytest.mark.parametrize("parts", [[64], [32, 32], [16] * 4, [1] * 64, [5, 59]])
def test_draws_do_not_depend_on_how_the_batch_is_cut(parts):
    whole = gaussian(sample_keys(3, 1000, 64), (3, 5), stream=2, dtype=torch.float32)
    starts = [sum(parts[:i]) for i in range(len(parts))]
    keys = [sample_keys(3, 1000 + start, count) for start, count in zip(starts, parts, strict=True)]
    assert torch.equal(torch.cat([gaussian(key, (3, 5), stream=2, dtype=torch.float32) for key in keys]), whole)


def test_draws_are_standard_normal_and_independent():
    draws = gaussian(sample_keys(0, 0, 4000), (50,), stream=0, dtype=torch.float64)
    count = draws.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert draws.pow(power).mean().item() == pytest.approx(moment, abs=4 * (variance / count) ** 0.5), power
    between = torch.corrcoef(draws.T) - torch.eye(50)  # of the numbers of one sample
    across = torch.corrcoef(draws[:50]) - torch.eye(50)  # of neighbouring samples
    assert between.abs().max() < 5 / 4000**0.5
    assert across.abs().max() < 5 / 50**0.5
    assert draws.abs().max() > 4


def test_seeds_samples_and_streams_differ():
    keys = {(seed, stream): sample_keys(seed, 0, 100) for seed in (0, 1, 2**62) for stream in (0, 1, 2)}
    draws = torch.stack([gaussian(key, (1,), stream=stream, dtype=torch.float64) for (_, stream), key in keys.items()])
    assert draws.unique().numel() == draws.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(dtype):
    assert gaussian(sample_keys(0, 0, 2), (3, 2, 2), stream=0, dtype=dtype).shape == (2, 3, 2, 2)
    assert gaussian(sample_keys(0, 0, 2), (3,), stream=0, dtype=dtype).dtype == dtype
