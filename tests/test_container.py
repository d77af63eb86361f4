"""The image, built and run by podman: what docs/container.md says, and what an image must not have."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import servers
from conftest import awaited, small_disk, unavailable
from pages import block
from training_runs import ROOT

from aaae_dist import checkpoint, versions

pytestmark = [pytest.mark.xdist_group("container"), pytest.mark.timeout(1200)]  # one image for all

BASE = "docker.io/library/python:3.11-slim-bookworm"
NEEDED = ("podman", "runc", "mmdebstrap")
USER = 12345  # has no name in the image
CONF = """\
[containers]
netns = "host"  # else it wants to make a network
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]  # else it wants higher ones than it may give everywhere
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
tmp_dir = "{folder}/state"
"""
STORAGE = """\
[storage]
driver = "{driver}"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
# Under the name of docker, as the page has it. A Docker engine has no other tmpfs than those it is told of.
DOCKER = """\
#!/usr/bin/env bash
case $1 in
  build) exec podman build {options} "${{@:2}}" ;;
  run) exec podman run --read-only-tmpfs=false "${{@:2}}" ;;
  *) exec podman "$@" ;;
esac
"""
WHO = f"#!/bin/sh\necho {USER}\n"  # in place of `id`


def of_pip(folder: Path) -> list[str]:
    """Options of a build in which pip finds packages where it finds them here."""
    line = [sys.executable, "-m", "pip", "config", "list"]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    found = {}
    for kind in ("global", "install", ":env:"):  # the last one wins
        for name, value in re.findall(rf"^{kind}\.(\S+)=(.*)$", said, flags=re.M):
            found[name] = " ".join(ast.literal_eval(value).split())
    places = {name: found[name] for name in ("index-url", "extra-index-url", "find-links") if name in found}
    others = {name: found[name] for name in ("cert", "proxy", "trusted-host", "default-timeout") if name in found}
    conf = folder / "pip.conf"
    conf.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in (places | others).items())]))
    mounted = {conf: "/etc/pip.conf"}
    for word in " ".join((places | others).values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            path = path.parent if word.startswith("file://") else path  # an index's files may lie beside it
            mounted[path] = str(path)
    options = [f"--volume {path}:{there}:ro" for path, there in mounted.items()]
    return [*options, "--build-arg TORCH_INDEX="] if places else options


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that call podman, or docker, with images of their own; the base is there."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [f"{name} is not installed; .ci/run installs it" for name in NEEDED if not shutil.which(name, path=path)]
    if missing or os.geteuid():
        unavailable((missing or ["making a base needs root"])[0])
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("container")
        # In memory if there is room (6 GB, and 2 once the image is made): where the disk is busy, in half the time.
        if psutil.virtual_memory().available > 12e9:
            folder = stack.enter_context(small_disk(folder / "memory", "8g"))
        options = ["--isolation chroot", "--layers=false", *of_pip(folder)]
        (folder / "bin").mkdir()
        for name, script in (("docker", DOCKER.format(options=" ".join(options))), ("id", WHO)):
            (folder / "bin" / name).write_text(script)
            (folder / "bin" / name).chmod(0o755)
        native = "overlay" in Path("/proc/filesystems").read_text()
        (folder / "containers.conf").write_text(CONF.format(folder=folder))
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder, driver="overlay" if native else "vfs"))
        (folder / "tmp").mkdir()
        environment = os.environ | {
            "PATH": f"{folder}/bin:{path}",
            "TMPDIR": f"{folder}/tmp",
            "CONTAINERS_CONF": f"{folder}/containers.conf",
            "CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf",
        }
        packages = "--include=python3,python3-pip,ca-certificates"
        base = f"mmdebstrap --quiet --variant=apt {packages} bookworm - | podman import --quiet - {BASE}"
        run(base, folder, environment)
        yield environment
        run("podman rm --all --force --time 0; podman volume rm --all; podman rmi --all --force", folder, environment)


@pytest.fixture(scope="module")
def image(shell: dict[str, str]) -> dict[str, str]:
    """The environment in which there is the image `aaae`, made as the page says."""
    run(block("docs/container.md", "--tag aaae --build-arg"), ROOT, shell)
    return shell


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the user who calls."""
    os.chown(tmp_path, USER, USER)
    for name in ("store", "runs"):
        (tmp_path / name).mkdir()
        os.chown(tmp_path / name, USER, USER)
    return tmp_path


def run(script: str, folder: Path, environment: dict[str, str], *, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A script that ends with this code, at its first failure."""
    line = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=1000)
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def inside(program: str, environment: dict[str, str], *options: str) -> str:
    """What a program for Python prints in the image."""
    line = ["podman", "run", "--rm", "--interactive", "--read-only", *options, "--entrypoint", "python3", "aaae", "-"]
    done = subprocess.run(line, env=environment, input=program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page(image, folder):
    """Prepared, trained by one process and by two, and recorded, by a user who has no name, under a read-only root."""
    done = run(block("docs/container.md", "aaae --help"), folder, image)
    assert done.stdout.startswith("usage: aaae [-h] COMMAND")
    assert "runs/two: finished, 1,280 of 1,280 images (100 %)" in done.stdout
    for name, engine in (("smoke", "single"), ("two", "ddp")):
        made = str(folder / "runs" / name)
        assert checkpoint.read_manifest(made, checkpoint.complete(made)[-1]).engine == engine
    about = json.loads((folder / "runs" / "smoke" / "about.json").read_text())
    assert about["version.torch"] == pins()["torch"] + "+cpu"
    assert about.get("mlflow.source.git.commit", "") == versions.commit()
    assert (folder / "runs" / "mlflow.db").stat().st_uid == USER
    assert "Warning" not in done.stderr


def test_a_job_in_its_folder(image, folder, digits):
    """As slurm.sbatch starts it on a node: ZeRO-2, no compiler, the folder's scripts, the image's code."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copytree(digits, folder / "store" / "digits")
    (folder / "aaae_dist").mkdir()
    (folder / "aaae_dist" / "__init__.py").write_text("raise SystemExit('this is not the code of the image')")
    job = "--env NODES=1 --env HEAD=127.0.0.1 --env PROCESSES=2 --env ENGINE=zero2"
    place = f"--volume {folder}:{folder} --workdir {folder} --user {USER} --tmpfs /tmp --entrypoint bash"
    step = """-c 'trap "" USR1; NODE=0 exec launch/node.sh "$@"' node configs/smoke.toml tracking.mlflow=false"""
    run(f"podman run --rm --read-only {job} {place} aaae {step}", folder, image)
    made = str(folder / "runs" / "smoke")
    assert checkpoint.read_manifest(made, checkpoint.complete(made)[-1]).engine == "zero2"


def test_it_saves_when_it_is_stopped_and_keeps_shards(image, folder, digits):
    """On a folder for the cache; where that is read-only, one line says what to do."""
    with servers.files(Path(digits)) as url:
        settings = f"configs/smoke.toml training.run=/runs/stopped data.url={url} tracking.mlflow=false"
        long = "training.images=1_280_000 checkpoint.every=640 evaluation.every=1_280_000"
        place = f"--rm --read-only --tmpfs /tmp --user {USER} --volume {folder}/runs:/runs"
        refused = run(f"podman run {place} aaae train {settings}", folder, image, code=2)
        assert refused.stderr == "aaae: data.cache /cache: the file system is read-only; choose another place\n"
        line = f"exec podman run --name stopped {place} --volume shards:/cache aaae train {settings} {long}"
        with subprocess.Popen(["bash", "-c", line], env=image, stderr=subprocess.PIPE, text=True) as process:
            awaited(lambda: bool(checkpoint.complete(str(folder / "runs" / "stopped"))), of=process, seconds=120)
            run("podman stop --time 120 stopped", folder, image)
            _, said = process.communicate(timeout=60)
    saved = int(checkpoint.complete(str(folder / "runs" / "stopped"))[-1])
    assert f"stopped as asked, after {saved:,} of 1,280,000 images" in said
    assert process.returncode == 0, said
    kept = run("podman volume inspect --format '{{.Mountpoint}}' shards", folder, image).stdout.strip()
    assert len(list(Path(kept).glob("aaae_dist/*.tar"))) == 9


def pins() -> dict[str, str]:
    """Versions in constraints.txt, by name."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {plain(name): version for name, version in (line.split("==") for line in lines)}


def plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_every_package_has_the_version_that_is_tested(image):
    listed = """
import json, sys
from importlib.metadata import distributions
print(json.dumps([(found.name, found.version) for found in distributions(path=sys.path[-1:])]))
"""
    found = {plain(name): version for name, version in json.loads(inside(listed, image))}
    assert found.pop("aaae-dist") == versions.installed()["aaae_dist"]
    expected = pins()
    assert found.pop("torch") == expected["torch"] + "+cpu"
    assert {name: version for name, version in found.items() if version != expected.get(name)} == {}
    assert {"accelerate", "deepspeed", "mlflow", "s3fs"} <= found.keys()
    assert not {"pytest", "moto", "ruff", "pip"} & found.keys()


def test_nobody_can_change_the_code_and_nothing_is_there_that_is_not_used(image, folder):
    config = json.loads(run("podman image inspect --format json aaae", folder, image).stdout)[0]
    assert config["Config"]["User"] == "10001:10001"
    assert config["Config"]["Entrypoint"] == ["aaae"]
    names = {line.partition("=")[0] for line in config["Config"]["Env"]}
    assert names == {
        *("PATH", "VENV", "HOME", "XDG_CACHE_HOME", "AAAE_COMMIT"),
        *("PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH", "PYTHONPATH"),
    }
    assert 1e9 < config["Size"] < 2e9
    find = "find / -xdev -writable ! -type l 2> /dev/null || true"
    script = f"id -u; ({find}) | tr '\\n' ' '; echo; type -p git gcc cc c++ make ssh || true"
    said = run(f'podman run --rm --entrypoint bash aaae -c "{script}"', folder, image).stdout.splitlines()
    user, writable, *programs = said
    assert (user, programs) == ("10001", [])
    assert set(writable.split()) == {"/cache", "/tmp", "/var/tmp", "/run/lock"}
    root = Path(run("podman image mount aaae", folder, image).stdout.strip())
    app = {str(path.relative_to(root / "aaae")) for path in (root / "aaae").rglob("*") if path.is_file()}
    ours = {str(path.relative_to(ROOT)) for name in ("configs", "launch") for path in (ROOT / name).rglob("*.*")}
    assert app == ours | {"pyproject.toml", "constraints.txt"}
    assert not list((root / "venv").glob("lib/*/site-packages/**/tests"))
    for left in (
        "root/.cache",
        "source",
        "tmp/*",
        "var/lib/apt/lists/*",
        "venv/bin/pip",
        "var/cache/apt/archives/*.deb",
    ):
        assert not list(root.glob(left)), left
    run("podman image unmount aaae", folder, image)


def test_bytecode_is_there(image):
    """Nobody can write it later, and each start would take three times as long."""
    program = """
import accelerate, deepspeed, mlflow, sys, torch, aaae_dist.training
from pathlib import Path
places = [(name, vars(module).get("__cached__")) for name, module in sys.modules.items()]
print(*[name for name, place in places if place and place.startswith("/venv") and not Path(place).exists()])
print(len(places))
"""
    missing, count = inside(program, image, "--tmpfs", "/tmp").splitlines()[-2:]
    assert int(count) > 3000
    assert missing.split() == []
