"""launch/local.sh: this machine alone, and several by a real ssh."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import hosts
import psutil
import pytest
from conftest import awaited, unavailable
from operations import ROWS
from servers import Daemon, free_port
from training_runs import ROOT, assert_same_bits, environment, final, settings, train

from aaae_dist import checkpoint

LOCAL = ROOT / "launch" / "local.sh"
SSHD_CONF = """\
ListenAddress {address}:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
"""


def here(*line: str | Path) -> list[str | Path]:
    return [*line]


@contextmanager
def sshd(folder: Path, address: str, *, port: int, line: Callable[..., list[str | Path]] = here) -> Iterator[str]:
    """How to reach an ssh server on this address, which lets in whoever has a key made for this.

    Args:
        line: what a command becomes that is run where that address is.
    """
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None:
        unavailable("sshd is not installed; .ci/run installs it")
    for key in ("host", "user"):
        if not (folder / key).exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    conf = folder / f"conf-{address}"
    conf.write_text(SSHD_CONF.format(address=address, port=port, folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)  # where it goes before it knows who comes
    with ThreadPoolExecutor(1) as starter:
        command = map(str, line(server, "-D", "-e", "-f", conf))
        reachable = port if address == "127.0.0.1" else 0
        daemon = Daemon(*command, variables={}, log=folder / "log", starter=starter, port=reachable)
        daemon.start()
        options = "-o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        yield f"ssh -F none -p {port} -i {folder}/user {options}"
        daemon.kill()


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with sshd(tmp_path_factory.mktemp("ssh"), "127.0.0.1", port=free_port()) as command:
        yield command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the project, in which logs may be left. Its path is hard on shells."""
    made = tmp_path / "a project's folder"
    made.mkdir()
    for name in ("aaae_dist", "launch", "configs"):
        (made / name).symlink_to(ROOT / name)
    return made


def started(folder: Path, *arguments: str, under: Sequence[str | Path] = (), **variables: str) -> subprocess.Popen[str]:
    there = environment() | {"VENV": sys.prefix} | variables
    line = ["bash", "launch/local.sh", *arguments]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*under, *line], cwd=folder, env=there, start_new_session=True, **options)


def test_this_machine_alone(folder, tmp_path, digits):
    """What accelerate launch does, under one name."""
    run, other = tmp_path / "run", tmp_path / "other"
    with started(folder, *settings(run, digits), PROCESSES="2") as process:
        out, said = process.communicate(timeout=200)
        assert (process.returncode, out) == (0, ""), said
    train(*settings(other, digits), processes=2)
    assert_same_bits(final(run), final(other))
    assert checkpoint.read_manifest(str(run), checkpoint.complete(str(run))[-1]).engine == "ddp"
    with started(folder, "configs/none.toml") as process:
        _, said = process.communicate(timeout=100)
        assert process.returncode != 0
        assert "aaae: configs/none.toml: no such file" in said


def test_several_hosts_by_ssh(folder, tmp_path, digits, ssh):
    """Two names of this machine; the same bits as two processes that it starts itself."""
    run, other, both = tmp_path / "run", tmp_path / "other", {"HOSTS": "127.0.0.1 localhost", "SSH": ssh}
    with started(folder, *settings(run, digits), **both, PORT=str(free_port())) as process:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert "1,280 of 1,280 images" in said
    train(*settings(other, digits), processes=2)
    assert_same_bits(final(run), final(other))
    logs = sorted(path.name for path in (folder / "logs").glob("*/*.log"))
    assert logs == ["0-127.0.0.1.log", "1-localhost.log"]


def test_hosts_are_stopped_together_and_go_on(folder, tmp_path, digits, ssh):
    """By Ctrl-C: a terminal's signal comes to every process of the script, ssh included."""
    run, both = str(tmp_path / "run"), {"HOSTS": "127.0.0.1 localhost", "SSH": ssh}
    long = ("training.images=12_800", "checkpoint.every=640", "logging.every=320")
    with started(folder, *settings(run, digits, *long), **both, PORT=str(free_port())) as process:
        awaited(lambda: bool(checkpoint.complete(run)), of=process, seconds=120)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=100)
        assert process.returncode not in (0, -signal.SIGINT), said
        assert not ranks_of(run, rank="0") + ranks_of(run, rank="1")
    stopped = int(checkpoint.complete(run)[-1])
    assert f"stopped as asked, after {stopped:,} of 12,800 images" in said
    with started(folder, *settings(run, digits, *long), **both, PORT=str(free_port())) as process:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    assert f"goes on from {stopped:,} images" in said


def test_a_rank_that_hangs_is_ended_with_the_others(folder, tmp_path, digits, ssh):
    """Its launcher does not see it. The script sees that the other host has ended, and ends this one."""
    run, both = str(tmp_path / "run"), {"HOSTS": "127.0.0.1 localhost", "SSH": ssh, "GRACE": "5"}
    more = ("training.images=1_000_000", "checkpoint.every=640", "training.silence=5", "data.workers=0")
    with started(folder, *settings(run, digits, *more), **both, PORT=str(free_port())) as process:
        awaited(lambda: bool(checkpoint.complete(run)), of=process, seconds=120)
        (hanging,) = ranks_of(run, rank="1")
        hanging.suspend()
        row = ROWS["its rank hangs"]
        _, said = process.communicate(timeout=row.seconds())
        assert process.returncode not in (0, -signal.SIGHUP), said
    assert row.says(0, said)
    assert not ranks_of(run, rank="0") + ranks_of(run, rank="1")


def test_a_host_that_is_cut_off_is_given_up(folder, tmp_path, digits):
    """Its ssh would wait for it for a quarter of an hour. The script is on a third host."""
    if not hosts.can_be_made():
        unavailable("hosts need root, iproute2, iptables; .ci/run has them")
    run, more = str(tmp_path / "run"), ("training.images=1_000_000", "checkpoint.every=640", "training.silence=5")
    (keys := tmp_path / "keys").mkdir()
    with hosts.network(3) as network, ExitStack() as stack:
        for host in range(2):
            line = partial(network.line, host)
            command = stack.enter_context(sshd(keys, network.address(host), line=line, port=2222))
        there = {"HOSTS": f"{network.address(0)} {network.address(1)}", "SSH": command, "GRACE": "5"}
        with started(folder, *settings(run, digits, *more), under=network.line(2), **there) as process:
            awaited(lambda: bool(checkpoint.complete(run)), of=process, seconds=120)
            network.cut(1)
            _, said = process.communicate(timeout=60)
    assert process.returncode not in (0, None), said
    assert "no sign of life for 5 s, see training.silence" in said
    assert f"{network.address(1)}: ended with exit code 255" in said


def ranks_of(run: str, *, rank: str) -> list[psutil.Process]:
    """The trainers of a run that are alive and have this number."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if f"training.run={run}" in line and "launch" not in line and process.environ().get("RANK") == rank:
                found.append(process)
    return found
