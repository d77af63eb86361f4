"""launch/kubernetes: the manifest, by the models of JobSet and Kubernetes, and its pods, as processes of this host."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pages
import psutil
import pytest
import yaml
from conftest import awaited, copied, unavailable
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pages import block
from servers import free_port
from test_launch import program
from training_runs import ROOT, assert_same_bits, environment, final, settings, train

from aaae_dist import checkpoint
from aaae_dist.config import Data, load_config

MANIFEST = ROOT / "launch" / "kubernetes" / "jobset.yaml"
QUANTITY = r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?"
LONG = ("training.images=6_400", "checkpoint.every=640", "logging.every=320")  # 100 steps
ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
BARE = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec setpriv --no-new-privs --bounding-set=-all "$@"'
Manifest = dict[str, Any]


@pytest.fixture
def manifest() -> Manifest:
    return yaml.safe_load(MANIFEST.read_text())


def job_of(manifest: Manifest) -> Manifest:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job


def pod_of(manifest: Manifest) -> Manifest:
    return job_of(manifest)["template"]["spec"]["template"]["spec"]


def container_of(manifest: Manifest) -> Manifest:
    (container,) = pod_of(manifest)["containers"]
    return container


# --- the manifest


def is_valid(manifest: Manifest) -> bool:
    """Whether JobSet's models, and with them those of Kubernetes, take it whole.

    They raise where a type or one of several words is wrong. A key that they do not know they leave out, and one that
    is missing they make up.
    """
    try:
        found = JobsetV1alpha2JobSet.from_dict(manifest)
    except ValueError:
        return False
    assert found
    return found.to_dict() == manifest


def test_the_manifest_is_valid(manifest, tmp_path):
    """With GPUs, and as the page makes it without."""
    assert is_valid(manifest)
    pages.workplace(tmp_path)
    pages.run(block("docs/kubernetes.md", "sed "), tmp_path)
    other = yaml.safe_load((tmp_path / "cpu.yaml").read_text())
    assert is_valid(other)
    del container_of(manifest)["resources"]["limits"]["nvidia.com/gpu"]
    assert other == manifest


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest["spec"].update(failurepolicy={}),
        lambda manifest: manifest["spec"]["failurePolicy"].update(maxRestarts="100"),
        lambda manifest: manifest["spec"]["failurePolicy"]["rules"][0].update(onJobFailureReason=["PodFailurePolicy"]),
        lambda manifest: job_of(manifest).pop("name"),
        lambda manifest: job_of(manifest)["template"]["spec"].update(backofflimit=0),
        lambda manifest: job_of(manifest)["template"]["spec"]["podFailurePolicy"]["rules"][0].update(action="Fail"),
        lambda manifest: pod_of(manifest).update(restartPolicy="never"),
        lambda manifest: pod_of(manifest)["volumes"][0]["emptyDir"].update(size="2Gi"),
        lambda manifest: pod_of(manifest)["securityContext"].update(runAsNonRoot="true"),
        lambda manifest: container_of(manifest)["env"][0].update(value=1),
        lambda manifest: container_of(manifest)["securityContext"].update(readOnlyRootFileSystem=True),
    ],
)
def test_a_slip_of_the_hand_is_not(manifest, spoil: Callable[[Manifest], object]):
    spoil(manifest)
    assert not is_valid(manifest)


def test_what_no_model_knows_of_the_manifest(manifest):
    """Words and numbers that must fit each other, or the cluster."""
    job, pod, container = (of(manifest) for of in (job_of, pod_of, container_of))
    policy, rules = manifest["spec"]["failurePolicy"], job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # Only the preflight's word ends all for good, and it is not among the exit codes that the training could have.
    assert policy["rules"] == [
        {"name": "preflight", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    code = {"containerName": container["name"], "operator": "In", "values": [78]}
    assert rules == [{"action": "FailJob", "onExitCodes": code}]
    assert (job["template"]["spec"]["backoffLimit"], policy["restartStrategy"]) == (0, "BlockingRecreate")
    assert 0 < policy["maxRestarts"] < 2**31

    # A pod can do nothing but train: it has no rights, writes to its own volumes alone, and asks the cluster nothing.
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (pod["automountServiceAccountToken"], pod["restartPolicy"]) == (False, "Never")
    # Ranks find each other by name before they are ready; nothing has names of our variables; a lost node is left soon.
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert pod["enableServiceLinks"] is False
    assert {rule["tolerationSeconds"] for rule in pod["tolerations"]} == {30}
    asked, most = (container["resources"][kind] for kind in ("requests", "limits"))
    assert asked["memory"] == most["memory"], "more would be refused, less could be taken away"
    assert not re.search("(?i)secret_access_key: |password: ", MANIFEST.read_text())

    sizes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    places = {mount["mountPath"]: sizes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(places) == len(sizes) == len(pod["volumes"])
    assert places["/dev/shm"]["medium"] == "Memory"
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    gibibytes = int(places[variables["XDG_CACHE_HOME"]]["sizeLimit"].removesuffix("Gi"))
    assert gibibytes * 2**30 > 1.2 * Data.model_fields["cache_gb"].default * 1e9
    assert variables["HOME"] in places
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    quantities = [*requests.values(), *limits.values(), *(size["sizeLimit"] for size in sizes.values())]
    assert all(re.fullmatch(QUANTITY, str(quantity)) for quantity in quantities)
    assert limits["nvidia.com/gpu"] == int(variables["PROCESSES"])
    assert pod["terminationGracePeriodSeconds"] >= int(variables["GRACE"]) + 30

    longest = f"{manifest['metadata']['name']}-{job['name']}-99999-0-abcde"  # of a pod
    assert len(longest) < 64
    config = load_config([str(ROOT / word) if word.endswith(".toml") else word for word in container["args"]])
    assert config.data.url.startswith("s3://")
    assert config.training.run.startswith("s3://")


# --- its pods


def given(manifest: Manifest, *, node: int, attempt: int, secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """The variables that Kubernetes gives the container of a pod: `$(NAME)` stands for one that was given before."""
    container, name, job = container_of(manifest), manifest["metadata"]["name"], job_of(manifest)
    annotations = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/replicatedjob-replicas": str(job["replicas"]),
        "jobset.sigs.k8s.io/job-index": str(node),
        "jobset.sigs.k8s.io/restart-attempt": str(attempt),
    }
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        found |= secrets[source["secretRef"]["name"]]
    for entry in container["env"]:
        source = entry.get("valueFrom", {})
        if "fieldRef" in source:
            field = re.fullmatch(r"metadata\.annotations\['(.+)'\]", source["fieldRef"]["fieldPath"])
            assert field
            value = annotations[field[1]]
        elif source:
            assert source["resourceFieldRef"]["resource"] == "requests.cpu"
            value = container["resources"]["requests"]["cpu"]
        else:
            value = re.sub(r"\$\((\w+)\)", lambda name: found.get(name[1], name[0]), entry["value"])
        found[entry["name"]] = value
    return found


class Pod:
    """The first process of a pod: number 1 of a namespace of its own, as in a container, with all that follows of that.

    It can write nowhere but below a folder, and has no capabilities. Only HEAD, NEXT and PORT, and the folders of its
    volumes, are this machine's.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        node: int = 0,
        attempt: int = 0,
        port: int = 0,
        threads: str = "1",
        **secret: str,
    ) -> None:
        container, here = container_of(manifest), folder / f"{node}-{attempt}"
        places = {mount["mountPath"]: str(here / mount["name"]) for mount in container["volumeMounts"]}
        for place in places.values():
            Path(place).mkdir(parents=True)
        variables = given(manifest, node=node, attempt=attempt, secrets={"aaae": secret})
        variables = {name: places.get(value, value) for name, value in variables.items()}
        variables |= {"TMPDIR": places["/tmp"], "HEAD": "127.0.0.1", "NEXT": "127.0.0.1", "PORT": str(port)}
        (command,) = container["command"]
        line = [*ALONE, "sh", "-c", BARE, str(folder), command.replace("/aaae/", f"{ROOT}/"), *container["args"]]
        path = f"{os.environ['PATH']}:{Path(sys.executable).parent}"  # the image's has these programs too
        variables = environment() | {"OMP_NUM_THREADS": threads, "PATH": path} | variables
        self.log = here / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                line, env=variables, cwd="/", stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def terminate(self) -> None:
        """As the kubelet does it."""
        (first,) = psutil.Process(self.process.pid).children()
        first.send_signal(signal.SIGTERM)

    def ended(self) -> tuple[int, str]:
        """Its exit code, and all that it said."""
        return self.process.wait(timeout=200), self.log.read_text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    """Start a pod, which ends with the test."""
    line, made = [*ALONE, "sh", "-c", BARE, str(tmp_path), "true"], list[Pod]()
    if subprocess.run(line, capture_output=True, check=False).returncode:
        unavailable("making a process the first of a namespace needs root")

    def call(*arguments: Any, **options: Any) -> Pod:
        made.append(Pod(*arguments, **options))
        return made[-1]

    yield call
    for pod in made:
        pod.process.kill()
        pod.process.wait()


def test_a_pod_is_told_who_it_is(manifest):
    """In the order in which variables stand there, for one may only name those before it."""
    told = given(manifest, node=1, attempt=3, secrets={"aaae": {"AWS_ACCESS_KEY_ID": "key"}})
    name, job = manifest["metadata"]["name"], job_of(manifest)["name"]
    expected = {"NODES": "2", "NODE": "1", "ATTEMPT": "3", "CPUS": "8", "AWS_ACCESS_KEY_ID": "key"}
    expected |= {"HEAD": f"{name}-{job}-0-0.{name}", "NEXT": f"{name}-{job}-1-0.{name}"}  # as JobSet names its pods
    assert expected.items() <= told.items()


def test_two_pods_lose_nothing_when_one_is_evicted(manifest, start, tmp_path, s3, s3_variables, digits):
    """The same bits as two processes that were never stopped."""
    run, other, url = f"{s3}/run", tmp_path / "other", copied(digits, f"{s3}/digits")
    container_of(manifest)["args"] = settings(run, url, *LONG)

    def pair(attempt: int) -> list[Pod]:
        options = {"attempt": attempt, "port": free_port()} | s3_variables
        return [start(manifest, tmp_path, node=node, **options) for node in range(2)]

    head, evicted = pair(0)
    awaited(lambda: bool(checkpoint.complete(run)), of=head.process, seconds=120)
    evicted.terminate()
    its, its_words = evicted.ended()
    assert its not in (0, 78), its_words
    assert "SIGTERM: asking the ranks to save" in its_words
    head.terminate()  # as JobSet does when a pod has failed; the launcher waits for the other one's, which is gone
    code, said = head.ended()
    assert code == 75, said
    assert f"ok       folder    {run}: written" in said  # of the preflight, which only one pod makes
    assert "ok       " not in its_words
    stopped = int(checkpoint.complete(run)[-1])
    assert f"stopped as asked, after {stopped:,} of 6,400 images" in said
    again = pair(1)
    for pod in again:
        code, said = pod.ended()
        assert code == 0, said
    assert f"goes on from {stopped:,} images" in again[0].log.read_text()
    assert "ok       " not in again[0].log.read_text()
    assert list((tmp_path / "0-1" / "cache").rglob("*.tar"))
    stands = pages.run(
        block("docs/kubernetes.md", "aaae status").replace("s3://bucket/runs/digits", run), tmp_path
    ).stdout
    assert f"{run}: finished, 6,400 of 6,400 images" in stands
    assert "restarts    1, " in stands
    train(*settings(other, digits, *LONG), processes=2)
    assert_same_bits(final(run), final(other))


def test_one_pod_of_one_process_is_not_done_when_it_was_stopped(manifest, start, tmp_path, digits):
    run = str(tmp_path / "run")
    job_of(manifest)["replicas"] = 1
    container_of(manifest)["args"] = settings(run, digits, *LONG, "training.images=64_000")
    pod = start(manifest, tmp_path, attempt=1)
    awaited(lambda: bool(checkpoint.complete(run)), of=pod.process, seconds=120)
    pod.terminate()
    code, said = pod.ended()
    assert code == 75, said
    assert "stopped and saved before its end: again" in said
    stopped = int(checkpoint.complete(run)[-1])
    container_of(manifest)["args"].append(f"training.images={stopped + 64}")
    code, said = start(manifest, tmp_path, attempt=2).ended()
    assert code == 0, said
    assert f"goes on from {stopped:,} images" in said
    assert int(checkpoint.complete(run)[-1]) == stopped + 64


STOPPED = 'printf again > "$AAAE_STOPPED"'
DONE = STOPPED.replace("again", "done")


@pytest.mark.parametrize(
    ("aaae", "code"),
    [
        ("exit 0", 0),
        ("[ $1 = train ] || exit 2", 78),
        ("[ $1 = train ] || exit 1", 1),
        ("[ $1 = preflight ] || exit 2", 2),
        ("[ $1 = preflight ] || exit 78", 1),  # the preflight's word, from anybody else
        (f"[ $1 = preflight ] || {STOPPED}", 75),
        (f"[ $1 = preflight ] || {{ {STOPPED}; exit 1; }}", 75),
        ("[ $1 = preflight ] || kill -KILL $$", 137),
        (f"[ $1 = preflight ] || {{ {DONE}; kill -TERM $PPID; exit 1; }}", 0),  # asked at the very end
        (f"[ $1 = preflight ] || {{ {DONE}; exit 1; }}", 1),
        ("touch here; exec sleep 60", 143),  # SIGTERM while the preflight is at it
        ("[ $1 = preflight ] || { touch here; exec sleep 60; }", 143),  # and before the training listens
    ],
)
def test_a_pod_ends_as_its_training_did(manifest, start, tmp_path, monkeypatch, aaae, code):
    program(tmp_path, "aaae", f'echo "$*, on $OMP_NUM_THREADS" >> {tmp_path}/told; cd {tmp_path}; {aaae}')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    job_of(manifest)["replicas"] = 1
    pod = start(manifest, tmp_path, threads="")  # so many as there are cores for each process
    if "sleep" in aaae:
        awaited((tmp_path / "here").exists, of=pod.process)
        pod.terminate()
    found, said = pod.ended()
    assert found == code, said
    first, *rest = (tmp_path / "told").read_text().splitlines()
    words = " ".join(container_of(manifest)["args"])
    assert first == f"preflight {words} --nodes 1 --processes-per-node 1 --engine single --grace 120, on 8"
    assert rest == ([] if aaae.startswith(("[ $1 = train", "touch")) else [f"train {words}, on 8"])


def test_a_pod_that_is_stopped_before_it_starts_anything_starts_nothing(manifest, start, tmp_path, monkeypatch):
    """The first process of a container is deaf to SIGTERM but for what it says itself."""
    program(tmp_path, "mktemp", "kill -TERM $PPID")
    program(tmp_path, "aaae", f"touch {tmp_path}/started")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    job_of(manifest)["replicas"] = 1
    for attempt in range(2):
        code, said = start(manifest, tmp_path, attempt=attempt).ended()
        assert code == 143, said
    assert not (tmp_path / "started").exists()
