"""The order against a slow one that follows its definition word by word, and values that must never change."""

import tracemalloc
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from aaae_dist.order import Order

SPLITS = [[3, 4, 2], [1] * 5, [23], [7, 1, 30, 2, 12]]


def listed(order, *of):
    return [tuple(sample) for sample in order.samples(*of).tolist()]


def by_definition(counts, *, seed, lanes, window, epoch):
    """All samples of an epoch by position."""

    def shuffled(values, *key):
        draws = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(len(values))
        return [value for _, value in sorted(zip(draws, values, strict=True))]

    line = [(shard, i) for shard in shuffled(range(len(counts)), epoch) for i in range(counts[shard])]
    (drawn,) = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch, 0))).random_raw(1).tolist()
    line = line[drawn % len(line) :] + line[: drawn % len(line)]
    lanes = min(lanes, len(line))
    length = len(line) // lanes
    paths = []
    for lane in range(lanes):
        own = line[lane * length : (lane + 1) * length]
        blocks = [own[start : start + window] for start in range(0, length, window)]
        order = (shuffled(range(len(block)), epoch, lane, b) for b, block in enumerate(blocks))
        paths.append([block[i] for block, chosen in zip(blocks, order, strict=True) for i in chosen])
    return [paths[lane][r] for r in range(length) for lane in shuffled(range(lanes), epoch, 1 + r)]


@pytest.mark.parametrize("counts", SPLITS)
@pytest.mark.parametrize("lanes", [1, 2, 5, 16])
@pytest.mark.parametrize("window", [1, 3, 4096])
def test_order_is_what_its_definition_says(counts, lanes, window):
    for seed, epoch in [(0, 0), (0, 1), (5, 0), (2**40, 10**6)]:
        order = Order(counts, seed=seed, lanes=lanes, window=window)
        expected = by_definition(counts, seed=seed, lanes=lanes, window=window, epoch=epoch)
        assert [listed(order, epoch, p, p + 1) for p in range(order.length)] == [[sample] for sample in expected]
        assert len(set(expected)) == order.length > sum(counts) - lanes  # none twice, fewer than `lanes` left out


@pytest.mark.parametrize("counts", SPLITS)
def test_a_slice_holds_its_positions_whatever_was_asked_before(counts):
    order = Order(counts, seed=1, lanes=4, window=3)
    for start, stop in [(0, order.length), (1, 4), (order.length - 2, order.length), (0, 1)]:
        fresh = listed(Order(counts, seed=1, lanes=4, window=3), 2, start, stop)
        assert listed(order, 2, start, stop) == fresh
        assert sorted(fresh) == sorted(s for p in range(start, stop) for s in listed(order, 2, p, p + 1))
        for cut in range(len(fresh)):
            shares = [listed(order, 2, start, stop, share) for share in (slice(0, cut), slice(cut, stop))]
            assert shares[0] + shares[1] == fresh


def test_values_never_change():
    assert listed(Order([3, 4, 2], seed=7, lanes=2, window=3), 1, 0, 8) == [
        (0, 2),
        (1, 1),
        (1, 0),
        (1, 2),
        (2, 1),
        (2, 0),
        (1, 3),
        (0, 0),
    ]
    assert listed(Order([1000] * 6, seed=2**33, lanes=16, window=64), 10**5, 1700, 1706) == [
        (3, 972),
        (2, 602),
        (2, 975),
        (5, 105),
        (5, 455),
        (5, 846),
    ]


def test_every_permutation_is_as_likely():
    found = Counter(tuple(listed(Order([4], seed=seed, lanes=1, window=9), 0, 0, 4)) for seed in range(2400))
    assert found.keys() == set(permutations((0, i) for i in range(4)))
    assert sum((n - 100) ** 2 / 100 for n in found.values()) < 49.7  # chi squared of 23 degrees, 0.999


def test_epochs_and_seeds_differ_and_leave_out_different_samples():
    orders = {seed: Order([7, 30, 12], seed=seed, lanes=16, window=64) for seed in range(5)}
    epochs = {(seed, epoch): listed(order, epoch, 0, 48) for seed, order in orders.items() for epoch in range(5)}
    assert len({tuple(samples) for samples in epochs.values()}) == 25
    everything = {(shard, i) for shard, count in enumerate([7, 30, 12]) for i in range(count)}
    assert len({missing for samples in epochs.values() for missing in everything.difference(samples)}) > 1


def test_a_batch_needs_few_shards():
    order = Order([10] * 1000, seed=0, lanes=8, window=20)
    for start in range(0, order.length, 500):
        shards = {shard for shard, _ in listed(order, 0, start, start + 80)}
        assert 8 <= len(shards) <= 8 * 5  # 10 offsets of a lane meet at most 2 windows, those at most 5 shards


@pytest.mark.parametrize("counts", SPLITS)
@pytest.mark.parametrize(("lanes", "window"), [(1, 4), (4, 3), (4, 100), (16, 1)])
def test_in_play_are_the_shards_of_a_block(counts, lanes, window):
    order = Order(counts, seed=3, lanes=lanes, window=window)
    lanes = order.lanes
    for block in range(order.block(order.length - 1) + 1):
        start, stop = block * window * lanes, min((block + 1) * window * lanes, order.length)
        assert order.block(start) == order.block(stop - 1) == block
        assert set(order.in_play(1, block)) == {shard for shard, _ in listed(order, 1, start, stop)}
        for first, last in [(0, 1), (0, lanes), (lanes - 1, lanes)]:  # of ranks that have whole lanes
            lanes_of = slice((stop - start) * first // lanes, (stop - start) * last // lanes)
            found = order.in_play(1, block, (first / lanes, last / lanes))
            assert set(found) == {shard for shard, _ in listed(order, 1, start, stop, lanes_of)}
    assert order.in_play(1, block + 1) == []


@pytest.mark.parametrize(("lanes", "window", "good"), [(16, 65_536, True), (48, 65_536, True), (16, 500, False)])
def test_batches_of_class_sorted_shards_are_as_mixed_as_by_a_full_permutation(lanes, window, good):
    """The spread of a class's share over batches, against sampling without replacement (hypergeometric)."""
    classes, size = 10, 256
    order = Order([1000] * 60, seed=0, lanes=lanes, window=window)  # shard s holds class s // 6 alone
    shares = []
    for epoch in range(2):
        for start in range(0, order.length - size + 1, size):
            found = order.samples(epoch, start, start + size)[:, 0] // 6
            shares.append(np.bincount(found, minlength=classes) / size)
    ideal = (0.1 * 0.9 / size * (60_000 - size) / (60_000 - 1)) ** 0.5
    assert (np.std(shares, axis=0).mean() / ideal < 1.1) == good  # less: a lane is a stratum


@pytest.mark.parametrize("size", [4, 8, 24])
def test_batches_that_are_no_multiple_of_the_lanes_are_as_mixed_too(size):
    """Two shards of one class each: the lanes' own order would give one class a batch."""
    order = Order([800, 800], seed=0, lanes=16, window=65_536)
    starts = [(epoch, start) for epoch in range(20) for start in range(0, order.length - size + 1, size)]
    shares = [(order.samples(epoch, start, start + size)[:, 0] == 0).mean() for epoch, start in starts]
    ideal = (0.25 / size * (1600 - size) / (1600 - 1)) ** 0.5
    assert np.std(shares) / ideal < 1.1


@pytest.mark.parametrize("counts", [[24], [7, 10], [1] * 17])
def test_every_sample_comes_in_some_epoch(counts):
    order = Order(counts, seed=0, lanes=16, window=65_536)
    seen = {sample for epoch in range(40) for sample in listed(order, epoch, 0, order.length)}
    assert len(seen) == sum(counts)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 8])
def test_after_is_where_a_stream_of_whole_batches_stands(batch_size):
    order = Order([3, 4, 2], seed=0, lanes=2, window=3)  # 8 samples in an epoch
    epoch = position = 0
    for batches in range(20):
        assert order.after(batches, batch_size=batch_size) == (epoch, position)
        position += batch_size
        if position + batch_size > order.length:
            epoch, position = epoch + 1, 0


@pytest.mark.parametrize(("counts", "lanes", "window"), [([1] * 20_000, 1, 1), ([20_000], 4, 1000)])
def test_memory_does_not_grow_with_the_epochs(counts, lanes, window):
    order = Order(counts, seed=0, lanes=lanes, window=window)
    blocks = range(0, order.length, lanes * window)[:5]
    tracemalloc.start()
    try:
        for epoch in range(20):
            for start in blocks:
                order.samples(epoch, start, start + 1)
            if epoch == 9:
                before = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] - before < 20_000  # of what an epoch takes, four bytes a sample
    finally:
        tracemalloc.stop()
