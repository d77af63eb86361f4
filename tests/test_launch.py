"""The scripts of launch/, where no cluster is needed: what they refuse, start, and make of how a training ended."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from training_runs import ROOT

NODE = ROOT / "launch" / "node.sh"
SBATCH = "launch/slurm.sbatch"
IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"}


def program(folder: Path, name: str, script: str) -> None:
    """A program of this name, to be found before the real one."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / "bin" / name).chmod(0o755)


def run(folder: Path, *line: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GLOO_", "NCCL_"))}
    there = kept | {"PATH": f"{folder}/bin:{os.environ['PATH']}"} | variables
    return subprocess.run(line, env=there, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


# --- a node


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"NODE": "0", "HEAD": "x"}, "NODES: how many nodes there are"),
        ({"NODES": "2", "NODE": "0", "HEAD": "x", "ENGINE": "zero9"}, "ENGINE zero9: there is no launch/zero9.yaml"),
        (
            {"NODES": "2", "NODE": "0", "HEAD": "x", "ENGINE": "single"},
            "ENGINE single: has one process, not 2 nodes of",
        ),
    ],
)
def test_what_a_node_cannot_start_is_one_line(tmp_path, variables, line):
    done = run(tmp_path, NODE, "configs/smoke.toml", **variables)
    assert done.returncode != 0
    (said,) = done.stderr.splitlines()
    assert line in said


def test_a_node_starts_its_ranks(tmp_path):
    """One of several: over the interface that leads to another, with the time to save, and deaf to SIGUSR1."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SIGNALS_TO_HANDLE")
    shown = f"printf '%s\\n' \"$@\"; printenv {' '.join(names)}; "
    program(tmp_path, "accelerate", shown + 'grep -i sigign "/proc/$$/status"')
    job = {"NODES": "2", "NODE": "1", "HEAD": "127.0.0.1", "PORT": "1234", "PROCESSES": "4", "ENGINE": "zero2"}
    done = run(tmp_path, NODE, "configs/smoke.toml", "training.seed=1", GRACE="77", **job)
    assert done.returncode == 0, done.stderr
    *said, ignored = done.stdout.splitlines()
    assert said == [
        *("launch", "--config_file", "launch/zero2.yaml", "--num_processes", "8", "--num_machines", "2"),
        *("--machine_rank", "1", "--main_process_ip", "127.0.0.1", "--main_process_port", "1234"),
        *(
            "--rdzv_backend",
            "static",
            "--rdzv_conf",
            "timeout=900",
            "--same_network",
            "-m",
            "aaae_dist",
            "train",
            "configs/smoke.toml",
        ),
        *("training.seed=1", "lo", "lo", "77", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
    ]
    assert int(ignored.split()[1], 16) >> (10 - 1) & 1, "SIGUSR1 has number 10"


def test_one_process_needs_no_launcher(tmp_path):
    """Which would die of SIGTERM before it has saved."""
    program(tmp_path, "aaae", 'echo "$*"')
    done = run(tmp_path, NODE, "configs/smoke.toml", NODES="1", NODE="0", HEAD="x", ENGINE="single")
    assert (done.returncode, done.stdout) == (0, "train configs/smoke.toml\n")


# --- hosts


@pytest.mark.parametrize("hosts", ["near far", "far near"])
@pytest.mark.parametrize("after", ["0", "1.5"])  # seconds
@pytest.mark.parametrize("under", [[], ["nohup"]])
def test_a_host_that_fails_ends_the_others(tmp_path, hosts, after, under):
    """What each reads is held open until then."""
    far = f'sleep {after}; echo "no route to far" >&2; exit 255'
    program(tmp_path, "ssh", f'case "$*" in *" near bash -c "*) cat > /dev/null;; *) {far};; esac')
    shutil.copytree(ROOT / "launch", tmp_path / "project" / "launch")
    (tmp_path / "project" / ".venv").mkdir()
    done = run(tmp_path, *under, "project/launch/local.sh", "configs/smoke.toml", HOSTS=hosts)
    assert done.returncode == 255, done.stderr
    assert "far: ended with exit code 255; its log is logs/" in done.stderr
    (log,) = (tmp_path / "project" / "logs").glob("*/*-far.log")
    assert log.read_text() == "no route to far\n"
    assert len(list(log.parent.iterdir())) == 2


# --- a job


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder to submit in, and a SLURM that notes what it is told."""
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    answers = (
        '"show node"*) echo NodeAddr=10.0.0.1;;',
        '"show hostnames"*) printf "n1\\nn2\\n";;',
        "requeue*) exit ${REFUSED:-0};;",
    )
    program(tmp_path, "scontrol", f'echo "scontrol $*" >> told; case $* in {" ".join(answers)} esac')
    program(tmp_path, "squeue", "echo 2026-11-28T12:00:00")
    program(tmp_path, "sleep", "exit 0")
    (tmp_path / "logs" / "7").mkdir(parents=True)
    (tmp_path / "logs" / "7" / "preflight").touch()  # which found nothing
    return tmp_path


def ended(folder: Path, **variables: str) -> tuple[int, str]:
    """The exit code of a job, and the last that it said."""
    there = IN_A_JOB | {"SLURM_SUBMIT_DIR": str(folder)} | variables
    done = run(folder, "bash", SBATCH, "configs/smoke.toml", **there)
    said = (done.stdout + done.stderr).splitlines()
    return done.returncode, re.sub(r"^\S+ job 7: ", "", said[-1])


STOPPED = 'echo -n again > "$AAAE_STOPPED"'
DONE = STOPPED.replace("again", "done")
NOT_AGAIN = "stopped and saved, and not started again: "


@pytest.mark.parametrize(
    ("srun", "variables", "code", "word", "again"),
    [
        ("exit 0", {}, 0, "the training ended with exit code 0", False),
        ("exit 2", {}, 2, "the training ended with exit code 2", False),
        (STOPPED, {}, 75, "stopped and saved; it is queued again", True),
        (f"{STOPPED}; exit 1", {}, 75, "stopped and saved; it is queued again", True),
        (STOPPED, {"REFUSED": "1"}, 75, f"{NOT_AGAIN}SLURM does not queue it", True),
        (STOPPED, {"REQUEUES": "1"}, 75, f"{NOT_AGAIN}it was, 1 times; REQUEUES is the limit", False),
        (STOPPED.replace("again", "'no further'"), {}, 75, f"{NOT_AGAIN}no further", False),
        (f"{STOPPED}; kill -TERM $PPID", {}, 75, "stopped and saved; SLURM decides", False),
        (f"{DONE}; kill -USR1 $PPID; exit 143", {}, 0, "the training ended with exit code 0", False),
        (f"{DONE}; exit 2", {}, 2, "the training ended with exit code 2", False),
    ],
)
def test_a_job_ends_as_its_training_did(job, srun, variables, code, word, again):
    """And is queued again if that was stopped, may be started again, and is worth it."""
    program(job, "srun", f'case "$*" in *--overlap*) exit 0;; esac; {srun}')
    found, said = ended(job, **variables)
    assert (found, said.startswith(word)) == (code, True), said
    assert ("scontrol requeue 7" in (job / "told").read_text().splitlines()) == again


def test_a_job_whose_node_does_not_answer_waits_for_slurm(job):
    program(job, "srun", "exit 1")
    assert ended(job, SLURM_JOB_NUM_NODES="2") == (
        1,
        "a node does not answer: waiting until SLURM finds it lost, and queues the job again",
    )


def test_nothing_starts_before_the_preflight_has_found_nothing(job):
    """Which is asked no more then: what is under way is to go on, come what may."""
    (job / "logs" / "7" / "preflight").unlink()
    program(job, "srun", "touch trained")
    program(job, "aaae", 'echo "$*" >> looked; exit $FOUND')
    word = "nothing was started: the preflight ended with exit code "
    for code in ("2", "143"):  # the latter as of one that is requeued meanwhile
        assert ended(job, FOUND=code, SLURM_GPUS_ON_NODE="4") == (int(code), word + code)
        assert not (job / "trained").exists()
    for code in ("0", "2"):
        assert ended(job, FOUND=code, SLURM_GPUS_ON_NODE="4")[0] == 0
        assert (job / "trained").exists()
    line = "preflight configs/smoke.toml --nodes 1 --processes-per-node 4 --engine ddp --grace 120"
    assert (job / "looked").read_text().splitlines() == [line] * 3


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("model.sif", ["apptainer", "exec", "--nv", "model.sif", "launch/node.sh"]),
        ("ghcr.io/me/aaae:1", ["--container-image=ghcr.io/me/aaae:1", "--container-workdir", "launch/node.sh"]),
    ],
)
def test_a_job_runs_in_a_container(job, image, words):
    program(job, "srun", 'printf "%s " "$@" > line')
    assert ended(job, CONTAINER=image)[0] == 0
    line = (job / "line").read_text()
    places = [line.index(word) for word in words]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"SLURM_SUBMIT_DIR": "/"}, "/: no launch/node.sh here; submit in the project's folder"),
        ({"SLURM_ARRAY_TASK_ID": "2", "VARIANTS": "a b"}, "VARIANTS 'a b': has no word number 2, counted from 0"),
    ],
)
def test_what_a_job_cannot_start_is_one_line(job, variables, line):
    code, said = ended(job, **variables)
    assert (code, said.startswith(line)) == (2, True), said


def test_every_task_of_an_array_has_a_word_of_its_own(job):
    program(job, "srun", 'printf "%s\\n" "${@: -2}" > line')
    assert ended(job, SLURM_ARRAY_TASK_ID="1", VARIANTS="one.toml two.toml")[0] == 0
    assert (job / "line").read_text().split() == ["configs/smoke.toml", "two.toml"]


def test_a_task_of_an_array_queues_itself_again_and_no_other(job):
    """Its number may be that of the whole array."""
    program(job, "srun", STOPPED)
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "VARIANTS": "one.toml\ntwo.toml"}
    assert ended(job, **task) == (75, "stopped and saved; it is queued again")
    assert "scontrol requeue 7_1" in (job / "told").read_text().splitlines()


@pytest.mark.parametrize(
    ("said", "end"),
    [
        ("echo 2026-11-28T12:00:00", True),
        ("echo N/A", False),
        ("exit 1", False),
        ("printf '2026-11-28T12:00:00\\n2026-11-28T12:00:00\\n'", False),
    ],
)
def test_the_end_of_a_job_is_told_where_it_is_known(job, said, end):
    program(job, "squeue", said)
    program(job, "srun", 'echo "${SLURM_JOB_END_TIME:-none} $SLURM_EXPORT_ENV" > end')
    assert ended(job)[0] == 0
    found, exported = (job / "end").read_text().split()
    assert found.isdigit() == end
    assert exported == "ALL"
