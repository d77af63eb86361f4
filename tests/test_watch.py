"""A rank that fails or is killed brings the others down within seconds, with its reason, whatever they are doing."""

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace

import psutil
import pytest
import torch.distributed as dist
from conftest import awaited
from training_runs import command, environment, settings

from aaae_dist import checkpoint
from aaae_dist.errors import UserError
from aaae_dist.stopping import StopRequest
from aaae_dist.watch import FAILED, Watch

# Rank 0 reads, saves or sleeps for an hour and is in no collective. No launcher is there that would end it.
BUSY = """
import time
from aaae_dist import distributed
from aaae_dist.cli import main
from aaae_dist.training import Trainer
step = Trainer.step

def busy(self, batch):
    if self.state.images == 128:
        if distributed.rank() == 0:
            print("busy", flush=True)
            time.sleep(3600)
        {fate}
    step(self, batch)

Trainer.step = busy
main()
"""


@pytest.mark.parametrize(
    ("fate", "within", "reason"),
    [
        ("raise ValueError('a defect')", 15, "(rank 1: ValueError: a defect)"),
        ("os.kill(os.getpid(), 9)", 30, "(rank 1: no sign of life for 15 s, see training.silence)"),
    ],
)
def test_a_rank_that_is_gone_brings_the_others_down(tmp_path, digits, fate, within, reason):
    (tmp_path / "busy.py").write_text("import os\n" + BUSY.format(fate=fate))
    line = command(
        *settings(tmp_path / "run", digits, "data.workers=0", "checkpoint.every=64"), script=tmp_path / "busy.py"
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # as a launcher's
    there = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}", "WORLD_SIZE": "2"}
    there["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with ExitStack() as stack:
        ranks = [
            subprocess.Popen(
                line,
                env=there | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        for rank in ranks:
            stack.enter_context(rank)
            stack.callback(rank.kill)
        assert ranks[1].wait(120) in (1, -9)
        began = time.monotonic()
        out, said = ranks[0].communicate(timeout=60)
        assert time.monotonic() - began < within
        assert (ranks[0].returncode, out) == (2, "busy\n")
    last = said.splitlines()[-1]
    assert last == (
        f"aaae: {tmp_path / 'run'}: another rank is gone {reason}; the same command again goes on from the last "
        "checkpoint"
    )
    assert int(checkpoint.complete(str(tmp_path / "run"))[0]) == 64


# --- two watches of this process


@pytest.fixture
def ended(monkeypatch) -> list[int]:
    """How this process would have been ended."""
    codes = list[int]()
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.fixture
def server(monkeypatch, ended) -> dist.TCPStore:
    """A launcher's store."""
    del ended
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("aaae_dist.watch.SIGN", 0.01)
    monkeypatch.setattr("aaae_dist.watch.GRACE", 2.0)
    return server


@pytest.fixture
def store(server) -> dist.Store:
    """What the ranks see of it in their first attempt."""
    return dist.PrefixStore("watch/0", server)


def watch_of(rank: int, monkeypatch) -> Watch:
    monkeypatch.setenv("RANK", str(rank))
    return Watch("runs/x", stop=StopRequest(), patience=30.0)


def test_one_that_has_left_is_not_missed_and_one_that_is_silent_is(store, monkeypatch, ended):
    """Each says for how long it may be."""
    with watch_of(1, monkeypatch) as watch:
        monkeypatch.setattr("aaae_dist.watch.SIGN", 60.0)
        awaited(lambda: store.check(["1"]))
        watch.at_work(7.5)
        awaited(lambda: store.check(["1"]) and store.get("1").endswith(b" 7.5"))
    assert store.get("1") == b"left"
    monkeypatch.setattr("aaae_dist.watch.SIGN", 0.01)
    watch = watch_of(0, monkeypatch)
    watch.patience = 0.5
    with watch:
        assert not watch.told.wait(1.0)
        store.set("1", "1.0 0.7")
        assert watch.told.wait(20)
        assert store.get(FAILED) == b"rank 1: no sign of life for 1 s, see training.silence"
    assert not ended


class Talk(dist.Store):
    """What ranks say to each other, as a store has it."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[str, str] = {}

    def check(self, keys: list[str]) -> bool:
        return all(key in self.words for key in keys)

    def get(self, key: str) -> bytes:
        return self.words[key].encode()

    def set(self, key: str, value: str) -> None:
        self.words[key] = value

    def compare_set(self, key: str, expected: str, value: str) -> None:
        del expected
        self.words.setdefault(key, value)


@pytest.mark.parametrize(
    ("signs", "naps", "reason"),
    [
        ({0: "0 15"}, {}, "rank 1: no sign of life for 15 s, see training.silence"),
        ({}, {}, "rank 1: no sign of life for 30 s, see training.patience"),
        ({0: "0 15", 25: "25 15", 38: "38 15"}, {10: 13}, ""),  # all were away, and the other came back a bit later
        ({0: "0 15"}, {10: 13}, "rank 1: no sign of life for 15 s, see training.silence"),  # and it did not
    ],
)
def test_who_was_away_does_not_blame_the_other(monkeypatch, ended, signs, naps, reason):
    """A job that is suspended and goes on, rank by rank. By the second, on a clock of the test's own."""
    watch, store, clock = watch_of(0, monkeypatch), Talk(), [0.0]
    monkeypatch.setattr("aaae_dist.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def wait(seconds: float) -> None:
        clock[0] += seconds + naps.get(clock[0], 0)
        if (sign := signs.get(int(clock[0]))) is not None:
            store.set("1", sign)
        if clock[0] > 50:
            watch.ended.set()

    monkeypatch.setattr("aaae_dist.watch.SIGN", 1.0)
    monkeypatch.setattr(watch.news, "wait", wait)
    monkeypatch.setattr(watch, "bring_down", lambda: None)
    if 0 in signs:
        store.set("1", signs[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    watch.next = "1"
    watch.give_and_take(store)
    assert store.words.get(FAILED, "") == reason
    assert not ended


def test_one_that_fails_while_its_connection_is_broken_tells_of_it_later(monkeypatch):
    watch = watch_of(0, monkeypatch)
    monkeypatch.setattr(watch, "give_and_take", lambda store: (_ for _ in ()).throw(dist.DistNetworkError("broken")))
    watch.ended.set()
    assert watch.look(Talk())
    watch.stop.fail(UserError("the disk is full"))
    assert not watch.look(Talk())


def test_the_first_reason_is_told_to_all(store, monkeypatch, ended):
    def fail(error: Exception) -> None:
        awaited(lambda: store.check(["0"]))
        raise error

    watch, other = watch_of(0, monkeypatch), watch_of(1, monkeypatch)
    with watch:
        with pytest.raises(KeyError), other:
            fail(KeyError("x"))
        assert store.get(FAILED) == b"rank 1: KeyError: 'x'"
        assert str(watch.lost_peer()).startswith("runs/x: another rank is gone (rank 1: KeyError: 'x'); the same")
    with pytest.raises(UserError), watch_of(1, monkeypatch):
        fail(UserError("the disk is full"))
    assert store.get(FAILED) == b"rank 1: KeyError: 'x'"
    with watch_of(1, monkeypatch) as late:
        late.thread.join(20)  # and does not end by itself
        assert ended == [2]


def test_ranks_that_are_started_again_hear_nothing_of_the_failure_before(server, store, monkeypatch):
    store.set(FAILED, "rank 1: a passing fault")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with watch_of(0, monkeypatch) as watch:
        awaited(lambda: dist.PrefixStore("watch/1", server).check(["0"]))
        assert not watch.told.wait(0.2)


def test_a_connection_that_breaks_is_made_anew_as_often_as_it_does(server, monkeypatch, ended):
    watch, others = watch_of(0, monkeypatch), connections_to(server.port)
    with watch:
        for _ in range(3):
            awaited(lambda: dist.PrefixStore("watch/0", server).check(["0"]))
            with socket.socket(
                fileno=os.dup(awaited(lambda: connections_to(server.port) - others).pop())
            ) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            server.delete_key("watch/0/0")
        awaited(lambda: server.check(["watch/0/0"]))
        assert not watch.told.is_set()
    assert not ended


def connections_to(port: int) -> set[int]:
    """The file descriptors of this process that are connected to a port."""
    return {one.fd for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr.port == port}


def test_the_others_hear_of_a_failure_while_this_one_puts_its_affairs_in_order(store, monkeypatch, ended):
    watch = watch_of(1, monkeypatch)
    with watch:
        watch.stop.fail(UserError("the store is down"))
        watch.stop.fail(KeyError("and more"))
        awaited(lambda: store.check([FAILED]))
        assert store.get(FAILED) == b"rank 1: the store is down"
        assert not watch.told.wait(2.5)  # longer than it would get to end
    assert not ended


def test_one_that_was_asked_to_stop_goes_on_without_the_store(server, monkeypatch, ended):
    del server
    for asked in (True, False):
        launcher = dist.TCPStore("127.0.0.1", 0, is_master=True)
        monkeypatch.setenv("MASTER_PORT", str(launcher.port))
        watch = watch_of(0, monkeypatch)
        watch.most = 0.1
        with watch:
            awaited(lambda launcher=launcher: launcher.check(["watch/0/0"]))
            watch.stop.signal = signal.SIGTERM if asked else None
            del launcher
            watch.thread.join(20)
            watch.overseer.join(20)
        assert ended == ([] if asked else [2])
        assert watch.reason.startswith("" if asked else "the launcher's store at 127.0.0.1 does not answer")
        assert bool(watch.reason) != asked
        assert watch.told.is_set() != asked


def test_a_store_that_never_answers_is_given_up(monkeypatch, ended):
    """As where the network loses packets without a word: its client waits for an answer, and nothing breaks."""
    silent, watch = threading.Event(), watch_of(0, monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "far")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("aaae_dist.watch.SIGN", 0.01)
    monkeypatch.setattr("aaae_dist.watch.GRACE", 0.1)
    watch.thread = threading.Thread(target=silent.wait)
    with watch:
        assert not watch.told.wait(0.5)
        watch.at_work(0.2)
        watch.overseer.join(20)
        assert watch.reason.startswith("the launcher's store at far does not answer")
        assert ended == [2]
        silent.set()


@pytest.mark.parametrize(
    ("until", "nap", "signaled", "given_up"),
    [
        (5, 0, None, 21),
        (60, 13, None, None),  # all were away, as those of a job that is suspended, and the store too
        (60, 14.5, None, None),
        (5, 0, signal.SIGTERM, 36),  # the others may have ended by now, and their launcher with its store: no hurry
    ],
)
def test_a_store_is_given_time(monkeypatch, until, nap, signaled, given_up):
    """By the second, on a clock of the test's own; after a nap in its 10th second."""
    watch, clock, lost = watch_of(0, monkeypatch), [0.0], []

    def wait(seconds: float) -> bool:
        if clock[0] <= until:
            watch.answered = clock[0]
        clock[0] += seconds + (nap if clock[0] == 10 else 0)
        return clock[0] > 60

    monkeypatch.setattr("aaae_dist.watch.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(watch, "ended", SimpleNamespace(wait=wait))
    monkeypatch.setattr(watch, "thread", SimpleNamespace(is_alive=lambda: True))
    monkeypatch.setattr(watch, "lose_store", lambda: lost.append(clock[0]))
    watch.most, watch.answered, watch.stop.signal = 15.0, 0.0, signaled
    watch.oversee()
    assert lost == ([] if given_up is None else [given_up])


def test_who_is_silent_is_named_soon_where_a_collective_has_failed(store, monkeypatch, ended):
    monkeypatch.setattr("aaae_dist.watch.BROKEN", 0.5)
    store.set("1", "1.0 15")
    with watch_of(0, monkeypatch) as watch:
        assert not watch.told.wait(1.0)
        assert "(rank 1: no sign of life for 0 s, and a connection is broken)" in str(watch.lost_peer())
    assert not ended


def test_alone_there_is_nothing_to_watch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watch_of(0, monkeypatch) as watch:
        assert not watch.thread.is_alive()
