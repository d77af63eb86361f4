"""What the log makes of what ranks have told: spread, and which rank is slow."""

import pytest

from aaae_dist.interval import Told, describe_ranks, straggler


def ranks(*forwards: float) -> list[Told]:
    """Ranks with forwards of so many ms, two to a node."""
    return [
        Told(f"n{rank // 2}", [0.01 * rank, 0.0, 0.0], 0.2 + rank / 100, milliseconds / 1000, 1.0 + rank, {})
        for rank, milliseconds in enumerate(forwards)
    ]


def test_the_spread_over_ranks():
    found = describe_ranks(ranks(10, 40, 10, 12))
    assert found == pytest.approx(
        {
            **{"ranks/step_seconds/min": 0.2, "ranks/step_seconds/mean": 0.215, "ranks/step_seconds/max": 0.23},
            **{"ranks/forward_seconds/min": 0.01, "ranks/forward_seconds/mean": 0.018},
            **{"ranks/forward_seconds/max": 0.04, "ranks/forward_seconds/usual": 0.01},
            **{"ranks/data_wait/min": 0.0, "ranks/data_wait/mean": 0.015, "ranks/data_wait/max": 0.03},
            **{"ranks/memory_gb/min": 1.0, "ranks/memory_gb/mean": 2.5, "ranks/memory_gb/max": 4.0},
            **{"ranks/slowest": 1, "system/n0/slow_rank": 1},
        }
    )


@pytest.mark.parametrize(
    ("forwards", "line"),
    [
        ((31, 31, 31, 84), "rank 3 on node n1 is slow: its forward takes 84 ms, 31 ms is usual; look at that node"),
        ((31.04, 46.56), "rank 1 on node n0 is slow: its forward takes 46.6 ms, 31 ms is usual; look at that node"),
        ((1500, 900, 910, 20, 900), "rank 0 on node n0 is slow: its forward takes 1.5e+03 ms, "),
        ((31, 31), ""),
        ((31, 46), ""),
        ((31, 31, 46, 30), ""),
        ((0.5, 1.4), ""),  # a millisecond is nothing
        ((84, 84, 84, 31), ""),  # one that is faster is no complaint about the others
        ((84,), ""),
    ],
)
def test_a_rank_that_is_slower_than_the_others_is_named(forwards, line):
    told = ranks(*forwards)
    found = describe_ranks(told)
    assert straggler(found).startswith(line)
    assert bool(line) == bool(straggler(found)) == any(name.endswith("/slow_rank") for name in found)
    assert straggler({}) == ""
