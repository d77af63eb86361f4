"""The preflight: it finds nothing where all is well, and every bad circumstance by its name."""

import importlib.util
import json
import os
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import copied, forget_clients, noise, prepared, small_disk
from servers import free_port
from test_cli import call
from test_versions import ANSWER, allocate
from training_runs import ROOT, settings

from aaae_dist import checkpoint, dry_step, launched, storage, verbs
from aaae_dist.baselines import METHODS
from aaae_dist.config import Config, load_config
from aaae_dist.dry_step import Available, activations, checkpoint_bytes, state_of
from aaae_dist.preflight import Finding, preflight
from aaae_dist.randomness import sample_keys

OF_LAUNCHERS = ("SLURM_JOB_ID", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "MLFLOW_TRACKING_URI")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher, no allocation, no MLflow server."""
    for name in OF_LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)


def look(*arguments: str, **how: Any) -> list[Finding]:
    return list(preflight(arguments, **{"nodes": 1, "processes": 1} | how))


def wrong(findings: list[Finding], verdict: str = "error") -> dict[str, str]:
    """What is found to be wrong, by part."""
    return {finding.part: finding.sentence for finding in findings if finding.verdict == verdict}


def game_of(*more: str) -> tuple[Any, Config]:
    config = load_config(settings("x", "y", *more))
    return METHODS[config.model.method].build(config), config


# --- all is well


def test_nothing_is_wrong_and_nothing_is_left(digits, tmp_path):
    run, before = tmp_path / "runs" / "run", sorted(Path(digits).iterdir())
    found = look(*settings(run, digits, "tracking.mlflow=true"), grace=60)
    assert {finding.verdict for finding in found} == {"ok"}, found
    parts = ["settings", "run", *["data"] * 2, "labels", "engine", "networks", *["memory"] * 6]
    assert [finding.part for finding in found] == [*parts, "store", "folder", "space", "saving", "mlflow", "versions"]
    told = {finding.part: finding.sentence for finding in found}
    assert told["settings"] == "20 steps of 64: 1 rank on 1 node, each 1 x 64 images"
    assert told["run"] == f"{run}: a new run"
    assert told["labels"] == f"{digits}: 10 classes, 0 attributes"
    assert told["data"].startswith(f"{digits}: 179 test images of 1 x 8 x 8 in 1 shard, ")
    assert "other nodes were not asked" in told["versions"]
    assert not run.parent.exists()
    assert sorted(Path(digits).iterdir()) == before


def test_the_command(digits, tmp_path, capsys):
    arguments = settings(tmp_path / "run", digits)
    assert call("preflight", *arguments) == 0
    out, err = capsys.readouterr()
    assert {line.split()[0] for line in out.splitlines()} == {"ok"}
    assert err == ""
    assert call("preflight", *arguments, "data.size=16", "--json") == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["errors"] == 2
    assert {"part": "run", "verdict": "ok", "sentence": f"{tmp_path}/run: a new run"} in told["findings"]
    assert err == "aaae: the preflight found 2 errors (data), see stdout; queue nothing before that is mended\n"


def test_only_one_of_many_ranks_looks(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert call("preflight", *settings(tmp_path, digits)) == 0
    assert capsys.readouterr().out == ""


def test_engines_are_those_of_the_launcher(monkeypatch):
    assert tuple(launched.ENGINES) == verbs.ENGINES
    assert [launched.launched_name(ranks) for ranks in (1, 2)] == ["single", "ddp"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launched.launched_name(1) == "fsdp2"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert launched.launched_name(2) == "zero3"


# --- settings, run


def test_settings_that_are_none(digits, tmp_path):
    found = look(*settings(tmp_path, digits, "training.batchsize=3"))
    assert [(finding.part, finding.verdict) for finding in found] == [("settings", "error"), ("versions", "ok")]
    assert found[0].sentence.startswith("training.batchsize: unknown setting; did you mean training.batch_size?")


def test_a_batch_that_cannot_be_divided(digits, tmp_path):
    found = look(*settings(tmp_path, digits), nodes=3)
    assert wrong(found) == {
        "settings": "training.batch_size 64: not a multiple of the 3 ranks; choose one that is",
    }
    assert {"networks", "space"} <= {finding.part for finding in found}
    assert "memory" not in {finding.part for finding in found}


def test_a_run_that_is_there(digits, tmp_path):
    arguments = settings(tmp_path / "run", digits, "logging.every=1280", "evaluation.samples=100")
    assert call("train", *arguments) == 0
    files = sorted(tmp_path.rglob("*"))
    told = {finding.part: finding for finding in look(*arguments)}
    assert told["run"].verdict == "warning"
    assert "1,280 images are trained, nothing is left to do; " in told["run"].sentence
    more = {finding.part: finding for finding in look(*arguments, "training.images=6400")}
    assert more["run"] == ("run", "ok", f"{tmp_path}/run: goes on from 1,280 images")
    assert wrong(look(*arguments, "model.width=8"))["run"].startswith("model.width 8: the run in ")
    assert sorted(tmp_path.rglob("*")) == files
    newest = tmp_path / "run" / "checkpoints" / "000000001280" / "manifest.json"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    found = [finding for finding in look(*arguments, "training.images=6400") if finding.part == "run"]
    assert [finding.verdict for finding in found] == ["warning", "ok"]
    assert found[0].sentence.endswith("training would pass it over")
    assert found[1].sentence.endswith("goes on from 640 images")
    newest.write_bytes(whole)

    # What is predicted of a checkpoint is what was saved.
    game, _ = game_of()
    manifest = checkpoint.read_manifest(str(tmp_path / "run"), "000000001280")
    saved = sum(4 * prod(manifest.shapes[key.partition("/")[2]]) for key in manifest.fingerprints)
    assert checkpoint_bytes(game) == saved


# --- data, store


def test_data_that_is_not_there_or_otherwise(digits, tmp_path):
    data = copied(digits, str(tmp_path / "data"))
    for more, message in (
        ("data.url=/no/where", "/no/where/index.json: no such file; prepare a data set with "),
        ("data.size=16", "data.channels 1, data.size 16: "),
        ("data.split=val", 'data.split or data.held_out "val": '),
    ):
        assert wrong(look(*settings(tmp_path / "run", data, more)))["data"].startswith(message)
    (tmp_path / "data" / "test-000000.tar").unlink()
    found = look(*settings(tmp_path / "run", data))
    assert list(wrong(found)) == ["data"]
    assert "test-000000.tar: no such file, 1 of 1 shards are missing; " in wrong(found)["data"]
    assert "store" in {finding.part for finding in found}  # of the split that is there


def test_shards_of_other_bytes(digits, tmp_path):
    data = copied(digits, str(tmp_path / "data"))
    tar = tmp_path / "data" / "train-000000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    assert "is not what was indexed" in wrong(look(*settings(tmp_path / "run", data)))["data"]


def test_a_mix_that_does_not_fit(digits, tmp_path):
    mix = f'data.mix={{"{tmp_path / "other"}" = 0.5}}'
    prepared(noise(40, labels=False), tmp_path / "other", channels=1)
    found = look(*settings(tmp_path / "run", digits, mix))
    assert wrong(found) == {}
    assert wrong(found, "warning") == {
        "labels": f"{tmp_path}/other: none, and training needs none; where there are some, prepare it with them"
    }
    assert [finding.part for finding in found].count("store") == 2
    copied(digits, str(tmp_path / "twin"))
    found = look(*settings(tmp_path / "run", digits, f'data.mix={{"{tmp_path / "twin"}" = 0.5}}'))
    assert wrong(found)["data"].startswith(f"data.mix {tmp_path}/twin: the same shards as in {digits}; ")


def test_a_store_that_is_too_slow(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("aaae_dist.reader.KEPT_BYTES", 0)
    monkeypatch.setattr("aaae_dist.preflight.read_rate", lambda reader: 10.0)
    told = wrong(look(*settings(tmp_path / "run", digits)), "warning")["store"]
    assert told.startswith(f"{digits}: read at 0 kB/s; a node needs ")
    assert "bring the data nearer" in told


def test_an_object_store(digits, tmp_path, s3, monkeypatch):
    arguments = settings(f"{s3}/run", copied(digits, f"{s3}/data"))
    found = look(*arguments)
    assert {finding.verdict for finding in found} == {"ok"}, found
    assert storage.listing(s3).keys() == {"data"}
    assert not list((tmp_path / "cache").rglob("*.tar"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    told = wrong(look(*arguments))
    assert told.keys() == {"run", "data", "folder"}
    assert all("access denied; check the credentials" in sentence for sentence in told.values())
    assert "wrong" not in str(told)


# --- engine, networks, memory


def test_an_engine_that_cannot_be(digits, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "deepspeed" else found(name, *more)
    )
    arguments = settings(tmp_path / "run", digits)
    assert wrong(look(*arguments, engine="zero2", processes=2)) == {
        "engine": "zero2: DeepSpeed is not installed; pip install 'aaae_dist[deepspeed]'"
    }
    told = look(*arguments, "training.compile=true", engine="zero3", processes=2)
    assert [finding.part for finding in told if finding.verdict == "error"] == ["engine", "engine"]
    assert wrong(told)["engine"].startswith("training.compile true: zero3 lends a network's weights out layer by layer")
    assert wrong(look(*arguments, engine="single", processes=2))["engine"].startswith("--engine single: one process, ")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert wrong(look(*arguments))["engine"].startswith("zero: no engine of ours; ")


def test_a_launch_file_that_is_not_here(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aaae_dist.preflight.CLONE", tmp_path)
    assert wrong(look(*settings("run", digits), processes=2), "warning") == {
        "engine": "launch/ddp.yaml: no such file here; start where it is, or write --config_file otherwise"
    }


def test_networks_that_cannot_be_built(digits, tmp_path):
    told = look(*settings(tmp_path / "run", digits, "data.size=6", "data.crop=true"))
    assert wrong(told).keys() == {"networks"}
    assert wrong(told)["networks"].startswith("data.size 6: the dcgan architecture needs ")
    assert "space" not in {finding.part for finding in told}


def test_too_little_memory(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("aaae_dist.reader.KEPT_BYTES", 0)
    monkeypatch.setattr("aaae_dist.preflight.read_rate", lambda reader: 1e12)
    arguments = settings(tmp_path / "run", digits, "training.batch_size=640")
    for free, verdict in ((6_000_000, "error"), (14_000_000, "warning"), (100_000_000, "ok")):  # of 12.6 MB
        monkeypatch.setattr(dry_step, "available", lambda processes, free=free: Available(free, True, 0))
        told = look(*arguments)
        memory = [finding for finding in told if finding.part == "memory"][-1]
        assert memory.verdict == verdict, memory
        assert ("lower training.micro_batch_size" in memory.sentence) == (verdict != "ok")
        assert any("not known without a step" in finding.sentence for finding in told) == (verdict == "error")


def test_networks_that_are_far_too_large_are_not_built(digits, tmp_path):
    told = look(*settings(tmp_path / "run", digits, "model.latent_width=65536", "model.latent_depth=100"))
    assert wrong(told)["networks"].startswith("weights and gradients take 6,803,")
    assert "memory" not in {finding.part for finding in told}


def test_memory_that_runs_out(digits, tmp_path, monkeypatch):
    def step(*arguments: Any, **more: Any) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(dry_step, "step", step)
    told = wrong(look(*settings(tmp_path / "run", digits)))
    assert told.keys() == {"memory"}
    assert told["memory"].startswith("out of memory (")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_grow_as_is_said(precision):
    """What is told of many images from a few is what is counted of as many."""
    game, config = game_of(f"training.precision={precision}")
    for images in (3, 100):
        assert activations(game, config, images=images) == dry_step.kept(game, config, images=images)


def test_activations_are_those_of_the_game():
    """All of it, by whoever keeps it, is what autograd keeps in all."""
    game, config = game_of()
    kept: dict[int, torch.UntypedStorage] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*game.parameters(), *game.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        turn = game(torch.rand(16, 1, 8, 8), sample_keys(0, 0, 16))
    found = activations(game, config, images=16)
    assert sum(found.values()) == sum(place.nbytes() for address, place in kept.items() if address not in own)
    assert min(found[name] for name, _ in game.named_children()) > 0
    turn.loss.backward()


def test_what_engines_divide():
    game, _ = game_of()
    size = sum(weight.nbytes for weight in game.encoder.parameters())
    found = {
        engine: tuple(state_of(game.encoder, engine=engine, ranks=4, activations=7)) for engine in launched.ENGINES
    }
    assert found == {
        "single": (size, size, 3 * size, 7),
        "ddp": (size, 2 * size, 3 * size, 7),
        "zero1": (size, size, size, 7),
        "zero2": (size, size / 4, size, 7),
        "zero3": (size / 4, size / 4, size, 7),
        "fsdp2": (size / 4, size / 4, 3 * size / 4, 7),
    }


def test_memory_that_a_scheduler_leaves(tmp_path, monkeypatch):
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    for folder, limit, used in ((job, "max", "5"), (job.parent, "3000000", "1500000")):
        for name, text in (("max", limit), ("current", used), ("stat", "anon 5\ninactive_file 500000\n")):
            (folder / f"memory.{name}").write_text(f"{text}\n")
    (tmp_path / "mine").write_text("1:cpu:/\n0::/slurm/job\n")
    monkeypatch.setattr(dry_step, "GROUPS", tmp_path)
    monkeypatch.setattr(dry_step, "MINE", tmp_path / "mine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dry_step.available(processes=2).free == 1_000_000


# --- where it is saved and reported


def test_a_folder_that_cannot_be_written(digits, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        told = look(*settings(disk / "run", digits))
        assert wrong(told).keys() == {"folder"}
        assert "the file system is read-only; choose another place" in wrong(told)["folder"]
        assert "saving" not in {finding.part for finding in told}
    (tmp_path / "file").touch()
    told = wrong(look(*settings(tmp_path / "file" / "run", digits)))
    assert "a file is where a folder should be" in told["folder"]


def test_a_disk_that_is_too_small(digits, tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        arguments = settings(disk / "run", digits)
        assert wrong(look(*arguments, "checkpoint.keep=1_000_000")) == {}  # it saves no more than two
        arguments += ["checkpoint.every=64", "checkpoint.best=reconstruction/held_out_mse"]
        told = wrong(look(*arguments, "checkpoint.keep_every=128"))
        assert told.keys() == {"space"}
        assert told["space"].startswith("14 checkpoints of 248 kB take 3.5 MB; 2.1 MB are free, which is too little; ")


def test_a_grace_that_is_too_short(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("aaae_dist.preflight.write_rate", lambda folder, most: most / 10.0)
    arguments = settings(tmp_path / "run", digits)
    assert wrong(look(*arguments, grace=60), "warning") == {}
    told = wrong(look(*arguments, grace=20), "warning")["saving"]
    assert "a checkpoint takes 10.0 s; from the signal to the end up to 21 s (the save under way, " in told
    assert told.endswith(
        "more than --grace 20; have the signal sent earlier, or set checkpoint.minutes to what may be lost"
    )


def test_mlflow_away(digits, tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{port}")
    told = wrong(look(*settings(tmp_path / "run", digits, "tracking.mlflow=true")), "warning")
    assert told["mlflow"].startswith(f"127.0.0.1:{port} does not answer (")
    assert "training goes on without it" in told["mlflow"]
    assert "secret" not in told["mlflow"]
    assert "someone" not in told["mlflow"]


def test_an_mlflow_that_answers(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow.tracking.MlflowClient.search_experiments", lambda self, max_results: [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@mlflow:5000")
    found = look(*settings(tmp_path / "run", digits, "tracking.mlflow=true"))
    assert ("mlflow", "ok", "mlflow:5000 answers") in found


def test_nodes_that_differ(digits, tmp_path, monkeypatch):
    other = ANSWER.replace("s/x^//", 's/\\"torch\\": \\"[^\\"]*\\"/\\"torch\\": \\"2.$node\\"/')
    allocate(tmp_path, monkeypatch, nodes=2, script=other)
    told = look(*settings(tmp_path / "run", digits), nodes=2)
    assert wrong(told) == {"versions": "torch 2.2 on n2, 2.1 on n1; install the same on all nodes"}
    assert os.environ["SLURM_JOB_ID"] == "7"
