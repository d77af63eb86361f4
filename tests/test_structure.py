"""The shape of the package: imports point one way, rooms stay small, nothing is unpickled, help comes fast."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from aaae_dist.baselines import METHODS
from aaae_dist.commands import COMMANDS
from aaae_dist.config import settings
from aaae_dist.losses import PAIRINGS
from aaae_dist.networks import ARCHITECTURES

PACKAGE = Path(__file__).parent.parent / "aaae_dist"
ORDER = (  # a module imports only from those before it
    *("errors", "failures", "versions", "storage", "web", "config", "arguments", "data_verbs", "verbs", "stopping"),
    *("preemption", "distributed", "randomness", "schedule", "losses", "networks", "aaae", "baselines", "progress"),
    *("passes", "images", "tars", "shards", "archives", "formats", "names", "sources", "preparation", "indexing"),
    *("inspection", "order", "cache", "fetching", "reader", "workers", "data", "quarantine", "augmentation", "metrics"),
    *("inference", "evaluation", "pieces", "fingerprint", "optimizer", "stopwatch", "engine", "fsdp", "zero"),
    *("launched", "execution", "checkpoint", "export", "agreement", "saving", "guard", "compatibility", "tracking"),
    *("system", "interval", "state", "training", "watch", "supervision", "selftest", "status"),
    *("rates", "dry_step", "preflight"),
    *("data_commands", "commands", "cli"),
)
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}
LONG = 12  # lines: a shorter function may speak for itself


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The module and the name of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((str(node.module), name.name) for name in node.names)


def test_imports_point_one_way() -> None:
    assert set(TREES) == {*ORDER, "__init__", "__main__"}
    for name in ORDER:
        for module, what in imported(TREES[name]):
            package, _, inside = module.partition(".")
            if package == "aaae_dist":
                assert ORDER.index(inside or what) < ORDER.index(name), f"{name} imports {inside or what}"


def test_only_commands_import_late() -> None:
    for name, tree in TREES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                late = [module for module, _ in imported(function) if module.partition(".")[0] == "aaae_dist"]
                assert not late or name in ("commands", "data_commands", "__init__"), (
                    f"{name}.{function.name} imports {late}"
                )


def test_rooms_are_small_and_named_for_what_is_in_them() -> None:
    for name in TREES:
        assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 400, name
        assert not {"utils", "util", "common", "helpers", "misc", "manager"} & set(name.split("_")), name


@pytest.mark.parametrize("name", ORDER)
def test_what_does_not_speak_for_itself_has_a_docstring(name: str) -> None:
    """Modules, classes, and functions of a dozen lines.

    Sections of the configuration and commands have their sentences elsewhere: in Config, and in their help.
    """
    assert ast.get_docstring(TREES[name])
    for node in TREES[name].body:
        if isinstance(node, ast.ClassDef):
            told = "Section" in [getattr(base, "id", "") for base in node.bases] or node.name == "Section"
        elif isinstance(node, ast.FunctionDef):
            told = node.name.replace("_", " ") in COMMANDS or (node.end_lineno or 0) - node.lineno + 1 < LONG
        else:
            continue
        assert told or ast.get_docstring(node), f"{name}.{node.name}"


def test_what_can_be_chosen_is_there() -> None:
    for setting, found in (
        ("model.method", METHODS),
        ("model.architecture", ARCHITECTURES),
        ("objective.pairing", PAIRINGS),
    ):
        assert set(get_args(settings()[setting].kind)) == found.keys(), setting


def test_nothing_is_unpickled() -> None:
    for name, tree in TREES.items():
        found = {module.partition(".")[0] for module, _ in imported(tree)}
        assert not found & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert ast.unparse(node) == "safetensors.torch.load", f"{name}: {ast.unparse(node)}"


def test_help_does_not_wait_for_heavy_imports() -> None:
    heavy = "{'torch', 'numpy', 'PIL', 'accelerate', 'mlflow', 'sklearn', 'webdataset', 's3fs'}"
    code = f"import sys, aaae_dist.cli; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
