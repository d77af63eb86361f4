"""What is installed, here and on the nodes of an allocation. (Its nodes are processes that a script starts.)"""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import refused

from aaae_dist import versions
from aaae_dist.versions import differences, installed, installed_on, nodes_at_hand

SRUN = """#!/bin/sh
for argument; do case $argument in --nodes=*) nodes=${argument#--nodes=};; esac; done
while [ "${1#--}" != "$1" ]; do shift; done
"""


def allocate(folder: Path, monkeypatch: pytest.MonkeyPatch, *, nodes: int, script: str) -> None:
    """An allocation of so many nodes, with an srun that does this with its command, $@."""
    (folder / "bin").mkdir()
    srun = folder / "bin" / "srun"
    srun.write_text(SRUN + script)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", str(nodes))


# As every node would answer, but under names of their own, and the last one with what is inserted for it.
ANSWER = """answer=$("$@") || exit
for node in $(seq $nodes); do echo "$answer" | sed "s/\\"node\\": \\"[^\\"]*\\"/\\"node\\": \\"n$node\\"/; s/x^//"; done
"""


def test_what_is_installed_here():
    found = installed()
    assert found["python"] == platform.python_version()
    assert found["torch"] == version("torch")


def test_an_image_tells_the_commit_that_it_was_built_from(monkeypatch):
    monkeypatch.setenv("AAAE_COMMIT", "abc")
    assert versions.commit() != "abc", "a repository knows better"
    monkeypatch.setattr(versions, "git", lambda *_: "")
    assert (versions.commit(), installed()["commit"]) == ("abc", "abc")


def test_outside_an_allocation_no_node_is_asked(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    assert nodes_at_hand() == 1


def test_nodes_are_asked_through_srun(tmp_path, monkeypatch):
    allocate(tmp_path, monkeypatch, nodes=3, script=ANSWER)
    assert nodes_at_hand() == 3
    found = installed_on(3)
    assert found == dict.fromkeys(("n1", "n2", "n3"), installed())
    assert differences(found) == []


def test_one_that_differs_is_named(tmp_path, monkeypatch):
    other = ANSWER.replace("s/x^//", 's/\\"torch\\": \\"[^\\"]*\\"/\\"torch\\": \\"2.$node\\"/')
    allocate(tmp_path, monkeypatch, nodes=2, script=other)
    assert differences(installed_on(2)) == ["torch 2.2 on n2, 2.1 on n1"]
    assert differences({"a": {"torch": "1"}, "b": {"torch": "1", "deepspeed": "2"}}) == [
        "deepspeed 2 on b, none on a",
    ]


def test_nodes_that_do_not_answer(tmp_path, monkeypatch):
    allocate(tmp_path, monkeypatch, nodes=2, script=ANSWER.replace("seq $nodes", "seq 1"))
    with refused("srun: 1 of 2 nodes have .*python.* and aaae_dist; install both where all nodes see them$"):
        installed_on(2)
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\necho 'error: n2: no such program' >&2; exit 2\n")
    with refused(r"srun: 0 of 2 nodes .* \(error: n2: no such program\); install"):
        installed_on(2)
    monkeypatch.setattr(versions, "LIMIT", 0.3)
    (tmp_path / "bin" / "srun").write_text("#!/bin/sh\nexec sleep 60\n")
    with refused("srun: the 2 nodes have not all answered within 0 s; see which is down"):
        installed_on(2)
