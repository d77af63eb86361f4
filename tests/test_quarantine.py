"""The quarantine: whatever a sample is called, it is listed once, and survives a resume."""

import json

import pytest

from aaae_dist import distributed, storage
from aaae_dist.quarantine import QUARANTINE, Quarantine
from aaae_dist.reader import Bad

KEYS = ["a/000001", "", "two\nlines", "\r\n", "\u2028\u2029\x85\x1e", '"quoted", \\n', "ünï 🙂", "\udcff\udcfe", "\0"]
BAD = [Bad(f"s3://bucket/{key}.tar", key, f"why: {key}") for key in KEYS]


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"


def test_samples_of_any_name_are_listed_once_and_survive_a_resume(run):
    quarantine = Quarantine(run)
    assert list(quarantine.samples) == []
    quarantine.add(BAD[:5] + BAD[:5])
    resumed = Quarantine(run)
    assert list(resumed.samples) == BAD[:5]
    resumed.add(reversed(BAD))
    assert list(resumed.samples) == BAD[:5] + BAD[:4:-1]
    assert list(Quarantine(run).samples) == BAD[:5] + BAD[:4:-1]
    lines = storage.read(f"{run}/{QUARANTINE}").splitlines()  # of bytes
    assert [json.loads(line) for line in lines] == [bad._asdict() for bad in BAD[:5] + BAD[:4:-1]]


def test_a_sample_that_fails_in_another_way_or_shard_is_another(run):
    several = [Bad(shard, "key", why) for shard in "ab" for why in ("truncated", "no label")]
    Quarantine(run).add(several)
    assert list(Quarantine(run).samples) == several


def test_nothing_is_written_when_nothing_is_new(run):
    place = f"{run}/{QUARANTINE}"
    (quarantine := Quarantine(run)).add([])
    assert not storage.exists(place)
    quarantine.add(BAD)
    resumed = Quarantine(run)
    storage.remove(place)
    for each in (quarantine, resumed):
        each.add(BAD[::2])
        assert not storage.exists(place)
    resumed.add([Bad("a", "new", "")])
    assert len(Quarantine(run).samples) == len(BAD) + 1


def test_ranks_for_which_the_run_ends_write_what_each_met(run, monkeypatch):
    """All at once: none writes over another's, and whoever goes on knows all of them."""
    ranks = [Quarantine(run) for _ in range(3)]
    for rank in (1, 0, 2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        ranks[rank].add(BAD[3 * rank : 3 * rank + 3], alone=True)
    assert set(Quarantine(run).samples) == set(BAD)


def test_only_rank_0_writes(run, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    (quarantine := Quarantine(run)).add(BAD)
    assert list(quarantine.samples) == BAD
    assert not storage.exists(f"{run}/{QUARANTINE}")


def test_the_samples_of_one_data_set_are_told_from_another_s(run):
    ours, theirs = ([f"{url}/{i}.tar" for i in range(2)] for url in ("s3://a/digits", "s3://a/digits2"))
    bad = [Bad(shard, "key", "") for shard in [*ours, *theirs[:1]]]
    (quarantine := Quarantine(run)).add(bad)
    assert (quarantine.of(ours), quarantine.of(theirs), quarantine.of([])) == (bad[:2], bad[2:], [])
