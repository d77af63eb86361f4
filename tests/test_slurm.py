"""launch/slurm.sbatch under a real SLURM of four nodes: jobs end well, are preempted, cancelled, and lose nodes."""

import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from clusters import Slurm, slurm, slurm_is_installed
from conftest import awaited, copied, unavailable
from training_runs import ROOT, assert_same_bits, final, settings, train

from aaae_dist import checkpoint, storage
from aaae_dist.tracking import parse_lines

pytestmark = pytest.mark.xdist_group("slurm")  # one cluster for all

EVERY = 640  # images between two checkpoints
LONG = ("training.images=12_800", f"checkpoint.every={EVERY}", "logging.every=320")  # 200 steps
Submit = Callable[..., str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    if not slurm_is_installed():
        unavailable("SLURM is not installed; .ci/run installs it")
    with slurm() as made:
        yield made


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to submit in."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("aaae_dist", "launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def submit(cluster: Slurm, project: Path) -> Iterator[Submit]:
    """Submit a job of launch/slurm.sbatch; its number."""
    jobs = []

    def call(*arguments: str, options: tuple[str, ...] = (), **variables: str) -> str:
        there = {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", **variables}
        line = ["sbatch", "--parsable", f"--chdir={project}", *options, "launch/slurm.sbatch", *arguments]
        jobs.append(cluster.call("env", "-C", str(project), *line, **there).strip())
        return jobs[-1]

    yield call
    for number in jobs:
        if cluster.job(number)["JobState"] in ("RUNNING", "PENDING"):
            cluster.call("scancel", number)


def said(project: Path, number: str) -> str:
    """All that a job has said."""
    logs = [project / f"aaae-{number}.out", *sorted((project / "logs" / number).glob("*.log"))]
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs if log.exists())


@pytest.fixture(scope="module")
def whole(digits: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What four ranks come to without SLURM, and without a stop."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(*settings(run, digits, *LONG), processes=4)
    return final(run)


def under_way(run: str) -> bool:
    """Whether a run has saved something."""
    return bool(checkpoint.complete(run))


def gone_on_from(project: Path, number: str) -> list[int]:
    """After how many images each start of a job but the first went on."""
    return [
        int(images.replace(",", "")) for images in re.findall(r"goes on from ([\d,]+) images", said(project, number))
    ]


def stopped_after(project: Path, number: str) -> int:
    """After how many images a job was stopped."""
    found = re.findall(r"stopped as asked, after ([\d,]+) of", said(project, number))
    assert len(found) == 1, said(project, number)
    return int(found[0].replace(",", ""))


def ended_well(cluster: Slurm, project: Path, number: str, *, restarts: int) -> None:
    job = cluster.wait(number)
    found = (job["JobState"], job["ExitCode"], job["Restarts"])
    assert found == ("COMPLETED", "0:0", str(restarts)), said(project, number) + cluster.log()


def test_sbatch_takes_the_commands_that_the_pages_say(cluster, project):
    pages = [ROOT / "README.md", ROOT / "docs" / "slurm.md"]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)]
    lines = [line for block in blocks for line in block.splitlines() if "sbatch " in line]
    assert len(lines) == 3
    for line in lines:
        cluster.call("bash", "-c", f"cd {project}; {line.replace('sbatch ', 'sbatch --test-only ')}")


def test_two_nodes_train_from_s3_to_the_end(cluster, project, submit, s3, digits, whole):
    """A process for each GPU, as SLURM counts them; the same bits as without it."""
    url, run = copied(digits, f"{s3}/digits"), f"{s3}/run"
    number = submit(*settings(run, url, *LONG), options=("--nodes=2", "--gpus-per-node=2"))
    ended_well(cluster, project, number, restarts=0)
    assert_same_bits(final(run), whole)
    assert "2 nodes (n1 n2), 2 processes on each, ddp, start 1" in (project / f"aaae-{number}.out").read_text()
    assert {log.name[:2] for log in (project / "logs" / number).glob("*.log")} == {"0-", "1-"}


@pytest.mark.parametrize(
    "command",
    [
        ("scancel", "--batch", "--signal=USR1"),  # what --signal=B:USR1@... sends the batch shell alone
        ("scontrol", "requeue"),  # SIGTERM to every process
    ],
)
def test_a_job_that_starts_again_has_lost_no_image(cluster, project, submit, tmp_path, digits, whole, command):
    run = str(tmp_path / "run")
    number = submit(*settings(run, digits, *LONG), options=("--nodes=2",), PROCESSES="2")
    awaited(lambda: under_way(run), seconds=120)
    cluster.call(*command, number)
    cluster.start_again(number)
    ended_well(cluster, project, number, restarts=1)
    assert gone_on_from(project, number) == [stopped_after(project, number)]
    assert_same_bits(final(run), whole)


def test_a_run_stops_by_itself_before_the_time_is_over(cluster, project, submit, tmp_path, digits):
    """As where the signal is lost, because it comes while the ranks start."""
    run = str(tmp_path / "run")
    endless = ("training.images=100_000_000", "checkpoint.every=0")
    number = submit(*settings(run, digits, *endless), options=("--time=1", "--signal=B:CONT@10"))
    # SLURM would have let it run, and killed it, half a minute longer.
    awaited(lambda: cluster.job(number)["Restarts"] == "1", seconds=80)
    assert "the job ends soon" in said(project, number)
    assert checkpoint.complete(run) == [checkpoint.name_of(stopped_after(project, number))]


def test_an_array_of_three_configurations_is_one_experiment(cluster, project, submit, tmp_path, digits):
    """One of its tasks starts again, and is the same run there."""
    variants = [tmp_path / f"{name}.toml" for name in ("one", "two", "three")]
    for number, file in enumerate(variants):
        lines = ["[training]", f'run = "{tmp_path}/{file.stem}"', f"seed = {number}", "[tracking]", "mlflow = true"]
        file.write_text("\n".join(lines))
    with variants[1].open("a") as file:
        file.write(f"\n[checkpoint]\nevery = {EVERY}\n[logging]\nevery = 320\n")
    arguments = [word for word in settings("none", digits) if not word.startswith(("training.run", "tracking"))]
    arguments.append("training.images=6_400")  # 100 steps
    number = submit(*arguments, options=("--array=0-2",), VARIANTS=" ".join(map(str, variants)))
    awaited(lambda: under_way(f"{tmp_path}/two"), seconds=120)
    tasks = [f"{number}_{task}" for task in range(3)]
    cluster.call("scontrol", "requeue", tasks[1])
    cluster.start_again(tasks[1])
    jobs = [cluster.wait(task)["JobId"] for task in tasks]
    assert len(set(jobs)) == 3
    for restarts, job in zip((0, 1, 0), jobs, strict=True):
        ended_well(cluster, project, job, restarts=restarts)
    assert gone_on_from(project, jobs[1]) == [stopped_after(project, jobs[1])]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:  # beside the runs
        found = database.execute(
            "select runs.name, runs.status, experiments.name, params.value from runs join experiments using"
            " (experiment_id) join params using (run_uuid) where params.key = 'training.seed'"
        ).fetchall()
    assert sorted(found) == [
        (name, "FINISHED", "aaae", seed) for name, seed in zip(("one", "three", "two"), "021", strict=True)
    ]


def test_a_job_that_is_cancelled_saves_and_stays_so(cluster, project, submit, tmp_path, digits):
    run = str(tmp_path / "run")
    number = submit(*settings(run, digits, *LONG), options=("--nodes=2",), PROCESSES="1", ENGINE="zero2")
    awaited(lambda: under_way(run), seconds=120)
    cluster.call("scancel", number)
    awaited(lambda: not cluster.call("squeue", "--noheader", "--job", number), seconds=60)
    assert cluster.job(number)["JobState"] == "CANCELLED"
    newest = checkpoint.complete(run)[-1]
    assert newest == checkpoint.name_of(stopped_after(project, number))
    assert checkpoint.read_manifest(run, newest).engine == "zero2"
    assert "SLURM decides whether it starts again" in said(project, number)


def test_a_node_that_dies_costs_at_most_an_interval(cluster, project, submit, tmp_path, digits, whole):
    run = str(tmp_path / "run")
    number = submit(*settings(run, digits, *LONG), options=("--nodes=2",), PROCESSES="2")
    awaited(lambda: under_way(run), seconds=120)
    cluster.kill_node("n2")
    awaited(lambda: cluster.job(number)["JobState"] == "PENDING", seconds=150)
    reached = parse_lines(storage.read(f"{run}/metrics.jsonl"))[-1]["images"]
    cluster.start_again(number)
    ended_well(cluster, project, number, restarts=1)
    (went_on,) = gone_on_from(project, number)
    assert reached - went_on <= 2 * EVERY  # one that was being saved is lost too
    assert_same_bits(final(run), whole)
    cluster.nodes["n2"].start()
