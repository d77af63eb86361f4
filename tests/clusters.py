"""A real SLURM for the tests: a controller and nodes, all on 127.0.0.1, from Debian's packages."""

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from servers import PATIENCE, Daemon, free_port, tail

# Steps are seen to without cgroups, so that this runs in a container. Like these, and unlike linuxproc, pgid signals a
# step's first processes alone. A requeued job waits two minutes, unless told.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=20000,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=30
MessageTimeout=10
MinJobAge=600
SlurmdParameters=config_overrides
GresTypes=gpu
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2\n"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "munged")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class Slurm:
    """A running cluster. Its commands are given through `call`."""

    def __init__(self, folder: Path, nodes: dict[str, Daemon]) -> None:
        self.folder, self.nodes = folder, nodes
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str | Path, **variables: str) -> str:
        """What a command says; its failure is the test's."""
        there = os.environ | self.variables | variables
        done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job, by its words."""
        said = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\S+?)=(\S*)", said))

    def log(self) -> str:
        """What the controller and the nodes have said last."""
        return "\n".join(f"--- {log.name}\n{tail(log)}" for log in sorted(self.folder.glob("*.log")))

    def wait(self, number: str, *states: str, seconds: float = 150.0) -> dict[str, str]:
        """The job, when it is in one of these states; by default, when it has ended."""
        deadline = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in (states or ENDED):
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def start_again(self, number: str) -> None:
        """Start a job that was requeued, instead of in two minutes: not before its last start is over."""
        itself = self.wait(number, "PENDING")["JobId"]  # a task of an array has two
        deadline = time.monotonic() + PATIENCE
        while any(self.processes(SLURM_JOB_ID=itself)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # Nodes tell a job's starts apart by the second: one in the second in which the last was ended is refused.
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def kill_node(self, name: str) -> None:
        """As a power cut would: its daemon, and every process of every job on it."""
        self.nodes[name].kill()
        for process in self.processes(SLURMD_NODENAME=name):
            process.kill()
        for process in psutil.process_iter(["cmdline"]):  # what watches over a job on a node has that in its files
            with suppress(psutil.Error):
                if " ".join(process.info["cmdline"] or []).startswith("slurmstepd") and any(
                    opened.path == f"{self.folder}/slurmd-{name}.log" for opened in process.open_files()
                ):
                    process.kill()

    def processes(self, **variables: str) -> Iterator[psutil.Process]:
        """Those of jobs of this cluster with these variables."""
        wanted = self.variables | variables
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted.items() <= process.environ().items():
                    yield process


def slurm_is_installed() -> bool:
    return all(map(shutil.which, PROGRAMS))


@contextmanager
def slurm(nodes: int = 4) -> Iterator[Slurm]:
    """A SLURM of so many nodes, n1 and so on, each with two CPUs and two GPUs that are none."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="slurm-")))
        starter = stack.enter_context(ThreadPoolExecutor(1))
        host, names, port = os.uname().nodename, [f"n{i + 1}" for i in range(nodes)], free_port()
        conf = SLURM_CONF.format(host=host, port=port, folder=folder)
        ports = {name: free_port() for name in names}
        conf += "".join(NODE.format(name=name, host=host, port=ports[name]) for name in names)
        conf += f"PartitionName=all Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP\n"
        (folder / "slurm.conf").write_text(conf)
        for gpu in range(2):
            os.mknod(folder / f"gpu{gpu}", 0o20644, os.makedev(1, 3))  # /dev/null under another name
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1]\n")
        (folder / "state").mkdir()
        (folder / "munge.key").touch(0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        folder.chmod(0o755)  # munge wants to be reached through it

        daemon = partial(
            Daemon, variables={"SLURM_CONF": str(folder / "slurm.conf")}, log=folder / "daemons.log", starter=starter
        )
        files = [f"--{name}-file={folder}/munge.{kind}" for name, kind in (("key", "key"), ("pid", "pid"))]
        files += [f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
        munge = daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        controller = daemon("slurmctld", "-D", "-c", port=port)
        machines = {name: daemon("slurmd", "-D", "-N", name, port=ports[name]) for name in names}
        made = Slurm(folder, machines)
        for server in (munge, controller, *machines.values()):
            stack.callback(server.kill)
            server.start()
            if server is munge:
                deadline = time.monotonic() + PATIENCE
                while not (folder / "munge.socket").exists():
                    assert time.monotonic() < deadline, (folder / "daemons.log").read_text()
                    time.sleep(0.02)
        deadline = time.monotonic() + PATIENCE
        while made.call("sinfo", "--noheader", "--Node", "--format=%t").split() != ["idle"] * nodes:
            assert time.monotonic() < deadline, made.call("sinfo")
            time.sleep(0.05)
        try:
            yield made
        finally:
            for number in made.call("squeue", "--noheader", "--format=%A").split():
                made.call("scancel", "--signal=KILL", "--full", number)
            for name in names:
                made.kill_node(name)
