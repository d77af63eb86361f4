"""The order against a slow one that follows its definition word by word, and values that must never change."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from aaae_dist.order import Order

SPLITS = [[3, 4, 2], [1] * 5, [23], [7, 1, 30, 2, 12]]


def by_definition(counts, *, seed, lanes, window, epoch):
    """All samples of an epoch by position."""

    def shuffled(values, *key):
        draws = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(len(values))
        return [value for _, value in sorted(zip(draws, values, strict=True))]

    line = [(shard, i) for shard in shuffled(range(len(counts)), epoch) for i in range(counts[shard])]
    lanes = min(lanes, len(line))
    length = len(line) // lanes
    paths = []
    for lane in range(lanes):
        own = line[lane * length : (lane + 1) * length]
        blocks = [own[start : start + window] for start in range(0, length, window)]
        order = (shuffled(range(len(block)), epoch, lane, b) for b, block in enumerate(blocks))
        paths.append([block[i] for block, chosen in zip(blocks, order, strict=True) for i in chosen])
    return [paths[p % lanes][p // lanes] for p in range(lanes * length)]


@pytest.mark.parametrize("counts", SPLITS)
@pytest.mark.parametrize("lanes", [1, 2, 5, 16])
@pytest.mark.parametrize("window", [1, 3, 4096])
def test_order_is_what_its_definition_says(counts, lanes, window):
    for seed, epoch in [(0, 0), (0, 1), (5, 0), (2**40, 10**6)]:
        order = Order(counts, seed=seed, lanes=lanes, window=window)
        expected = by_definition(counts, seed=seed, lanes=lanes, window=window, epoch=epoch)
        assert [order.samples(epoch, p, p + 1) for p in range(order.length)] == [[sample] for sample in expected]
        assert len(set(expected)) == order.length > sum(counts) - lanes  # none twice, fewer than `lanes` left out


@pytest.mark.parametrize("counts", SPLITS)
def test_a_slice_holds_its_positions_whatever_was_asked_before(counts):
    order = Order(counts, seed=1, lanes=4, window=3)
    for start, stop in [(0, order.length), (1, 4), (order.length - 2, order.length), (0, 1)]:
        fresh = Order(counts, seed=1, lanes=4, window=3).samples(2, start, stop)
        assert order.samples(2, start, stop) == fresh
        assert sorted(fresh) == sorted(s for p in range(start, stop) for s in order.samples(2, p, p + 1))


def test_values_never_change():
    assert Order([3, 4, 2], seed=7, lanes=2, window=3).samples(1, 0, 8) == [
        (2, 0),
        (0, 0),
        (2, 1),
        (0, 1),
        (1, 1),
        (1, 0),
        (0, 2),
        (1, 2),
    ]
    assert Order([1000] * 6, seed=2**33, lanes=16, window=64).samples(10**5, 1700, 1706) == [
        (0, 567),
        (0, 959),
        (4, 353),
        (4, 740),
        (2, 113),
        (2, 453),
    ]


def test_every_permutation_is_as_likely():
    found = Counter(tuple(Order([4], seed=seed, lanes=1, window=9).samples(0, 0, 4)) for seed in range(2400))
    assert found.keys() == set(permutations((0, i) for i in range(4)))
    assert sum((n - 100) ** 2 / 100 for n in found.values()) < 49.7  # chi squared of 23 degrees, 0.999


def test_epochs_and_seeds_differ_and_leave_out_different_samples():
    orders = {seed: Order([7, 30, 12], seed=seed, lanes=16, window=64) for seed in range(5)}
    epochs = {(seed, epoch): order.samples(epoch, 0, 48) for seed, order in orders.items() for epoch in range(5)}
    assert len({tuple(samples) for samples in epochs.values()}) == 25
    everything = {(shard, i) for shard, count in enumerate([7, 30, 12]) for i in range(count)}
    assert len({missing for samples in epochs.values() for missing in everything.difference(samples)}) > 1


def test_a_batch_needs_few_shards():
    order = Order([10] * 1000, seed=0, lanes=8, window=20)
    for start in range(0, order.length, 500):
        shards = {shard for shard, _ in order.samples(0, start, start + 80)}
        assert 8 <= len(shards) <= 8 * 5  # 10 offsets of a lane meet at most 2 windows, those at most 5 shards


@pytest.mark.parametrize("batch_size", [1, 4, 7, 8])
def test_after_is_where_a_stream_of_whole_batches_stands(batch_size):
    order = Order([3, 4, 2], seed=0, lanes=2, window=3)  # 8 samples in an epoch
    epoch = position = 0
    for batches in range(20):
        assert order.after(batches, batch_size=batch_size) == (epoch, position)
        position += batch_size
        if position + batch_size > order.length:
            epoch, position = epoch + 1, 0
