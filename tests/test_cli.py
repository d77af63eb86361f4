"""The command line: results on stdout, and a user's mistake is one line on stderr, exit code 2, nothing lost."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import servers
from accelerate.state import AcceleratorState
from conftest import forget_clients, small_disk
from faults import FaultProxy, Faults
from PIL import Image

from aaae_dist import storage
from aaae_dist.cli import circumstance, main
from aaae_dist.commands import COMMANDS
from aaae_dist.config import settings
from aaae_dist.shards import INDEX
from aaae_dist.sources import SOURCES
from aaae_dist.verbs import parser

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # streams as users have them
AAAE = [sys.executable, "-m", "aaae_dist"]
Refuse = Callable[..., str]


def call(*arguments: object) -> int:
    """The exit code of `aaae ...`, run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`aaae ...` in a process of its own, where streams and imports are real."""
    line = [*AAAE, *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


def contents(*folders: Path) -> dict[str, str]:
    """What is in these folders, to see that nothing of it was touched."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def tiny(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains in half a second: 10 steps, a checkpoint at step 5."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.toml").write_text(f"""
        data = {{ url = "{digits}", channels = 1, size = 8, workers = 0 }}
        training = {{ run = "{folder / "run"}", images = 320, batch_size = 32 }}
        evaluation = {{ samples = 200 }}
        checkpoint = {{ every = 160 }}
        tracking = {{ mlflow = false }}
        [model]
        architecture = "mlp"
        width = 16
        code_size = 4
        noise_size = 4
        latent_width = 16
        latent_depth = 1
    """)
    return folder / "tiny.toml"


@pytest.fixture(scope="session")
def run(tiny: Path) -> Path:
    """A finished training with two checkpoints. Copy it before you change it."""
    assert call("train", tiny) == 0
    return tiny.parent / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the finished training, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, digits: str) -> Refuse:
    """Expect `aaae ...` to be refused as a user's mistake, with all files as they were; returns the line said."""

    def refuse(*arguments: object) -> str:
        capsys.readouterr()
        before = contents(tmp_path, tiny.parent, Path(digits))
        code, (out, said) = call(*arguments), capsys.readouterr()
        assert (code, out) == (2, "")
        assert said.startswith("aaae: ")
        assert said.count("\n") == 1
        assert said.endswith("\n")
        assert contents(tmp_path, tiny.parent, Path(digits)) == before
        return said.removeprefix("aaae: ").rstrip()

    return refuse


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*command.split(), "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: aaae {command} ")
    assert f"aaae {command} " in out.partition("example:\n")[2]
    assert not err
    for group in {command.split()[0]} - COMMANDS.keys():
        assert call(group, "--help") == 0
        assert f"aaae {command} " in capsys.readouterr().out.partition("example:\n")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_right(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    call(*command.split(), "--help")
    example = capsys.readouterr().out.partition("example:\n")[2].splitlines()[0]
    arguments = parser().parse_args(example.partition("aaae ")[2].split())
    assert arguments.command == command


def test_help_lists_commands_settings_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    out = capsys.readouterr().out
    assert all(f"    {command.split()[0]}" in out for command in COMMANDS)
    assert call("train", "--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {name} = " in out and setting.sentence in out for name, setting in settings().items())
    assert '  model.architecture = "dcgan"  ("dcgan" or "mlp")\n' in out
    assert call("prepare", "--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    for source in SOURCES:
        assert f"{source}: " in out
        assert parser().parse_args(["prepare", source, "--out", "x"]).source == source


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND; see `aaae --help`"),
        ("trian x", "argument COMMAND: invalid choice: 'trian' (choose from 'prepare', 'train', "),
        ("shards", "the following arguments are required: COMMAND; see `aaae shards --help`"),
        ("train", "the following arguments are required: CONFIG; see `aaae train --help`"),
        (
            "train x.toml --batch-size 32",
            "--batch-size: unknown option; settings are given as section.key=value, witho",
        ),
        ("sample x --out y.png --cuont 3", "--cuont: unknown option; did you mean --count?; see `aaae sample --help`"),
        ("sample x --out y.png --coun 3", "--coun: unknown option; did you mean --count?; see `aaae sample --help`"),
        ("sample x --out y.png --count 1e3", "argument --count: 1e3: must be a whole number from 1 to 1000000000000; "),
        ("sample x --out y.png --count 0", "argument --count: 0: must be a whole number from 1 to "),
        ("sample x --out y.png --seed -1", "argument --seed: -1: must be a whole number from 0 to "),
        ("sample x --out y.png --count 9" + "9" * 5000, "argument --count: 999"),
        ("sample x --out y.jpg", "--out y.jpg: must end in .png (a picture) or .npz (an array `images`, uint8, N x "),
        ("sample x", "the following arguments are required: --out; see `aaae sample --help`"),
        ("prepare digits x y --out z", "y: unknown argument; see `aaae prepare --help`"),
        ("prepare cats --out z", "argument SOURCE: invalid choice: 'cats' (choose from 'digits', 'mnist', 'cifar10', "),
        ("prepare digits --channels 2 --out z", "argument --channels: invalid choice: 2 (choose from 1, 3); see "),
        ("prepare digits --quality 101 --out z", "argument --quality: 101: must be a whole number from 1 to 100; see "),
        ("prepare digits --quality 90 --out z", "--quality 90: png is lossless; leave it out, or add --format jpg"),
        ("prepare digits --held-out 3 --out z", "argument --held-out: 3: must be a share, from 0 to below 1; see "),
        ("prepare digits --bad-share x --out z", "argument --bad-share: x: must be a share, from 0 to below 1; see "),
        ("prepare digits --out=", "--out: must not be empty; "),
        ("prepare tar x --crop 0 --out z", "--crop 0: without --size the tars stay as they are; leave it out, or add "),
        ("prepare tar x --labels y --out z", "--labels y: without --size the tars stay as they are; "),
        ("shards inspect x --picture y.jpg", "--picture y.jpg: must end in .png"),
        (
            "shards read x --batch-size 4 --rank 2 --world 2",
            "--rank 2: must be less than --world 2; ranks are counted ",
        ),
        ("shards read x --batch-size 5 --world 2", "--batch-size 5: must be a multiple of --world 2, "),
    ],
    ids=lambda text: text[:40],
)
def test_wrong_arguments(line: str, message: str, refuse: Refuse) -> None:
    assert refuse(*line.split()).startswith(message)


# --- mistakes


def test_mistakes_in_a_process_of_their_own(tmp_path: Path, tiny: Path) -> None:
    for arguments, message in (
        (
            ["train", tiny, "training.batchsize=3"],
            "training.batchsize: unknown setting; did you mean training.batch_size?",
        ),
        (["train", tiny, "training.batch_size=3.0"], "training.batch_size 3.0: must be a whole number without a point"),
        (["train", tmp_path / "no.toml"], f"{tmp_path / 'no.toml'}: no such file; configurations are TOML files such "),
        (
            ["train", tiny, f"data.url={tmp_path}/no", f"training.run={tmp_path}"],
            f"{tmp_path}/no/index.json: no such f",
        ),
    ):
        done = process(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"aaae: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_end_without_taking_the_interpreter_down(world: int) -> None:
    """What gloo's threads still hold would bring such a process to SIGABRT, now and then."""
    script = (
        "import atexit; atexit.register(print, 'taken down'); from aaae_dist.cli import main; main(['evaluate', ''])"
    )
    variables = os.environ | {"WORLD_SIZE": str(world)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("aaae: ")
    assert ("taken down" in done.stdout) == (world == 1)


def test_a_file_that_may_not_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, where others than the owner see nothing
        Path(folder).chmod(0o755)
        path = Path(folder) / "secret.toml"
        path.touch(0o000)
        os.seteuid(user or 65534)  # root may read everything
        try:
            code = call("train", path)
        finally:
            os.seteuid(user)
        assert (code, capsys.readouterr()) == (
            2,
            ("", f"aaae: {path}: access denied; check the credentials and the permissions of this URL\n"),
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=17", "model.width 17: the run in "),
        ("optimizer.encoder.lr=0.5", "optimizer.encoder.lr 0.5: the run in "),
        ("training.seed=1", "training.seed 1: the run in "),
        ("training.micro_batch_size=5", "training.micro_batch_size 5: does not divide the 32 images of a rank"),
    ],
)
def test_other_settings_in_the_same_run(override: str, message: str, tiny: Path, run: Path, refuse: Refuse) -> None:
    said = refuse("train", tiny, override)
    assert said.startswith(message)
    assert "; " in said


def test_a_finished_training_has_nothing_left_to_do(tiny: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    assert call("train", tiny) == 0
    assert capsys.readouterr().out == ""
    assert contents(run) == before


def test_runs_that_are_none(run: Path, copy: Path, tmp_path: Path, refuse: Refuse) -> None:
    out = tmp_path / "out.png"
    for verb, *more in (
        ["evaluate"],
        ["status"],
        ["status", "--json", "--follow"],
        ["sample", "--out", out],
        ["reconstruct", "x.png", "--out", out],
    ):
        assert refuse(verb, tmp_path, *more) == (
            f"{tmp_path}/config.toml: no such file; RUN is the folder of a training (its training.run)"
        )
    assert refuse("track", "sync", tmp_path).startswith(f"{tmp_path}/config.toml: no such file; ")
    names = "000000000160, 000000000320"
    said = refuse("sample", run, "--checkpoint", "5", "--out", out)
    assert said == f"--checkpoint 5: {run} has {names}; choose one of these"
    for marker in copy.glob("checkpoints/*/COMPLETE"):
        marker.unlink()
    assert refuse("evaluate", copy).startswith(f"{copy}: no complete checkpoint yet; train it first, or wait for ")
    assert not out.exists()


def test_checkpoints_are_listed_verified_and_pruned(
    copy: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = sorted((copy / "checkpoints").iterdir())
    sizes = [sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (older, newer)]
    assert call("checkpoint", "list", copy) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[:3] for row in rows] == [
        [place.name, f"{int(place.name):,} images", "single on 1"] for place in (older, newer)
    ]
    assert call("checkpoint", "list", copy, "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["checkpoint"], row["bytes"], row["engine"], row["ranks"]) for row in told] == [
        (place.name, size, "single", 1) for place, size in zip((older, newer), sizes, strict=True)
    ]
    assert told[1]["figures"]["reconstruction/held_out_mse"] > 0
    assert call("checkpoint", "verify", copy) == 0
    assert capsys.readouterr().out == f"{copy}: 2 checkpoints as they were saved\n"
    assert call("checkpoint", "prune", copy, "--keep", 1) == 0
    assert capsys.readouterr().out == f"{copy}: removed {older.name}; left {newer.name}\n"
    assert not older.exists()
    damage(newer / "00000-000.safetensors")
    assert call("checkpoint", "verify", copy) == 2
    told = capsys.readouterr()
    assert told.out == f"{newer}/00000-000.safetensors: damaged, its bytes are not those that were saved\n"
    assert told.err.startswith(f"aaae: {copy}: damaged in 1 file, see stdout; bring them back, or train on from")
    assert refuse("checkpoint", "prune", copy, "--keep", 1) == (
        f"{newer}/00000-000.safetensors: damaged, its bytes are not those that were saved; nothing was removed: bring "
        "that back, or remove its checkpoint's folder, first"
    )
    damage(newer / "manifest.json")
    assert call("checkpoint", "list", copy) == 0
    assert capsys.readouterr().out == ""
    assert f"checkpoint {newer.name}: {newer}/manifest.json: damaged" in caplog.text
    none = copy / "nothing"
    assert refuse("checkpoint", "prune", none, "--keep", 1).startswith(f"{none}/config.toml: no such file; RUN is")
    lock = storage.Lock(str(copy))
    assert refuse("checkpoint", "prune", copy, "--keep", 1).startswith(f"{copy}: another training is at work there")
    lock.release()


def test_damaged_checkpoints(copy: Path, tmp_path: Path, refuse: Refuse, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = sorted((copy / "checkpoints").iterdir())
    damage(newer / "00000-000.safetensors")
    assert call("sample", copy, "--out", tmp_path / "out.npz") == 0  # the older one is whole
    assert f"checkpoint {newer.name} is passed over: {newer}/00000-000.safetensors: damaged" in caplog.text
    assert refuse("sample", copy, "--checkpoint", newer.name, "--out", tmp_path / "out.npz") == (
        f"{newer}/00000-000.safetensors: damaged, its bytes are not those that were saved"
    )
    (older / "00000-000.safetensors").write_bytes(b"")
    for arguments in (["evaluate", copy], ["sample", copy, "--out", tmp_path / "out.npz"]):
        assert refuse(*arguments) == (
            f"{copy}/checkpoints: all 2 checkpoints are damaged; restore one, or remove the folder to start anew "
            f"(the newest: {newer}/00000-000.safetensors: damaged, its bytes are not those that were saved)"
        )


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_out_that_cannot_be_written(run: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "file").touch()
    assert refuse("sample", run, "--out", tmp_path / "file" / "out.png").startswith(f"{tmp_path}/file/out.png: ")
    (tmp_path / "folder.npz").mkdir()
    assert refuse("sample", run, "--out", tmp_path / "folder.npz").startswith(f"{tmp_path}/folder.npz: ")
    assert refuse("sample", run, "--count", 10**12, "--out", tmp_path / "huge.npz").startswith("out of memory (")
    for words in ("can't start new thread", "could not create a primitive"):  # as where `ulimit -v` is low
        assert circumstance(RuntimeError(words)).startswith(f"out of memory ({words}); lower")


def test_images_that_are_none(run: Path, tiny: Path, tmp_path: Path, refuse: Refuse) -> None:
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    assert refuse("reconstruct", run, tiny, "--out", out).startswith(f"{tiny}: not an image that can be read (")
    assert refuse("reconstruct", run, tmp_path / "no.png", "--out", out) == (
        f"{tmp_path}/no.png: no such file; check the URL"
    )
    assert refuse("reconstruct", run, tmp_path, "--out", out).startswith(f"{tmp_path}: ")
    whole = picture_file(tmp_path / "whole.png", size=64).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert refuse("reconstruct", run, tmp_path / "cut.png", "--out", out).startswith(f"{tmp_path}/cut.png: not an ima")


# --- data sets that are none


@pytest.fixture
def shards(digits: str, tmp_path: Path) -> Path:
    """A copy of the prepared digits, to be damaged."""
    return Path(shutil.copytree(digits, tmp_path / "shards"))


def test_damaged_data_sets(shards: Path, tiny: Path, tmp_path: Path, refuse: Refuse) -> None:
    train = ["train", tiny, f"data.url={shards}", f"training.run={tmp_path}/new"]
    read = ["shards", "read", shards, "--batch-size", 1600]
    tar, index = shards / "train-000003.tar", (shards / "index.json").read_text()
    data = tar.read_bytes()

    tar.write_bytes(data[:-512])
    for arguments in (train, read):
        assert refuse(*arguments).startswith(f"{tar}: {len(data) - 512} bytes, but the index says {len(data)}; it was ")
    damage(tar)
    tar.write_bytes(tar.read_bytes() + bytes(512))
    assert re.match(rf"{tar}: sample \d+ .* is not what was indexed; it was damaged or replaced", refuse(*read))
    tar.unlink()
    for arguments in (train, read):
        assert refuse(*arguments) == (
            f"{tar}: no such file, 1 of 9 shards are missing; bring them back or prepare the data set anew"
        )

    for text, message in (
        (json.dumps(json.loads(index) | {"shards": []}), "it lists no shards; prepare the data set anew"),
        ("", "not JSON (0 bytes); it is damaged or not what it should be"),
        ("[]", ""),
    ):
        (shards / "index.json").write_text(text)
        for arguments in (train, read):
            assert refuse(*arguments).startswith(f"{shards}/index.json: {message}")
    assert not (tmp_path / "new").exists()


def test_data_sets_of_another_kind(digits: str, tiny: Path, tmp_path: Path, refuse: Refuse) -> None:
    train = ["train", tiny, f"training.run={tmp_path}/new"]
    for override, message in (
        ("data.size=16", f"data.channels 1, data.size 16: {digits}/index.json says 1 channels of 8 x 8 pixels; set "),
        ("data.channels=3", "data.channels 3, data.size 8: "),
        ("data.split=dev", f'data.split or data.held_out "dev": {digits}/index.json has only test, train; choose one'),
        (f"data.url={tmp_path}", f"{tmp_path}/index.json: no such file; prepare a data set with `aaae prepare SOURCE "),
    ):
        assert refuse(*train, override).startswith(message)
    assert not (tmp_path / "new").exists()
    assert refuse("shards", "read", digits, "--batch-size", 1800).startswith("training.batch_size 1800: larger than ")
    assert refuse("shards", "read", digits, "--batch-size", 4, "--split", "dev").count('"dev"') == 1
    assert refuse("prepare", "digits", "--out", digits).startswith(
        f"{digits}: it already holds a data set, of other images"
    )
    assert refuse("prepare", "digits", "--held-out", 0, "--labels", "x", "--out", tmp_path / "new").startswith("--lab")
    assert refuse("prepare", "folder", "--out", tmp_path / "new").endswith("holds the images")
    assert refuse("prepare", "folder", tmp_path, "--out", tmp_path / "new").startswith(f"{tmp_path}: no images here; ")


def test_a_batch_larger_than_the_data(tiny: Path, tmp_path: Path, refuse: Refuse) -> None:
    train = ["train", tiny, f"training.run={tmp_path}/new"]
    assert refuse(*train, "training.batch_size=1800").startswith("training.batch_size 1800: larger than the ")
    assert call(*train) == 0  # nothing keeps the corrected one from it


def test_one_unreadable_image_is_skipped_and_counted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hand = hand_made(tmp_path / "hand", bad=7)
    assert capsys.readouterr().out == f"{hand}: 16 train, 16 test images of 1 x 8 x 8 in 2 shards\n"
    assert call("shards", "read", hand, "--batch-size", 16) == 0
    keys = json.loads(capsys.readouterr().out.splitlines()[0])["keys"]
    assert len(keys) == 16
    assert "image7" not in keys
    assert f"{hand}/train-000000.tar: sample image7 cannot be read (" in caplog.text

    new = tmp_path / "new"
    settings = ["training.images=64", "training.batch_size=16", "logging.every=16", "evaluation.samples=100"]
    assert call("train", tiny, f"data.url={hand}", f"training.run={new}", *settings) == 0
    lines = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    assert [line["data/bad_samples"] for line in lines if "data/bad_samples" in line] == [1, 1, 1, 1]


def hand_made(folder: Path, *, bad: int) -> Path:
    """Tars as anybody may write them, one image of which is none, and an index of them."""
    folder.mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for number in range(16):
                image = picture_file(folder / "image.png", size=8, seed=number)
                if (split, number) == ("train", bad):
                    image.write_bytes(b"no image")
                tar.add(image, f"image{number}.png")
                image.unlink()
    assert call("shards", "index", folder) == 0
    return folder


def picture_file(path: Path, *, size: int, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)).save(path)
    return path


def test_object_stores_that_do_not_answer_as_hoped(
    s3: str, tiny: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = f"training.run={tmp_path}/new"
    assert refuse("prepare", "digits", "--out", f"{s3}-not/digits") == (
        f"{s3}-not/digits/train-000000.tar: the bucket does not exist; create it or correct the URL"
    )
    assert refuse("train", tiny, new, f"data.url={s3}-not").startswith(f"{s3}-not/index.json: ")
    assert refuse("train", tiny, f"training.run={s3}-not/run").startswith(f"{s3}-not/run/")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    for arguments, place in (
        (["prepare", "digits", "--out", f"{s3}/digits"], "digits"),
        (["train", tiny, new, f"data.url={s3}/digits"], "digits/index.json"),
        (["train", tiny, f"training.run={s3}/run"], "run/checkpoints"),
        (["evaluate", f"{s3}/run"], "run/config.toml"),
        (["train", f"{s3}/config.toml"], "config.toml"),
    ):
        assert refuse(*arguments) == (
            f"{s3}/{place}: access denied; check the credentials and the permissions of this URL"
        )


# --- disks, pipes and signals


def test_a_full_disk_leaves_the_older_checkpoint(tiny: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        run, images = disk / "run", "training.images=640"
        assert call("train", tiny, f"training.run={run}", "training.images=160") == 0
        before = contents(run / "checkpoints")
        (disk / "others").write_bytes(bytes(shutil.disk_usage(disk).free - 2**16))

        done = process("train", tiny, f"training.run={run}", images)
        assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (2, "", False)
        assert done.stderr.splitlines()[-1].startswith("aaae: the checkpoint after 320 images could not be saved: ")
        assert done.stderr.rstrip().endswith(": no space left; free some, or choose another place")
        assert contents(run / "checkpoints").items() >= before.items()
        assert call("sample", run, "--checkpoint", "000000000160", "--out", tmp_path / "out.npz") == 0

        (disk / "others").unlink()
        assert call("train", tiny, f"training.run={run}", images) == 0
        assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["000000000480", "000000000640"]


def test_results_that_nobody_takes(digits: str) -> None:
    line = [*AAAE, "shards", "read", digits, "--batch-size", "64", "--count", "1000000"]
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout
        assert reader.stderr
        assert json.loads(reader.stdout.readline())["batch"] == 0
        reader.stdout.close()  # as `| head -1` does
        assert reader.stderr.read() == b""
        assert reader.wait(60) == 128 + signal.SIGPIPE
    line = [*AAAE, "shards", "read", digits, "--batch-size", "64", "--count", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr == b"aaae: stdout: no space left; free some, or choose another place\n"


def test_an_interrupted_training_saves_and_ends_quietly(tiny: Path, tmp_path: Path) -> None:
    settings = [
        f"training.run={tmp_path}/new",
        "training.images=100_000_000",
        "logging.every=160",
        "checkpoint.every=0",
    ]
    line = [*AAAE, "train", str(tiny), *settings]
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        assert training.stdout
        assert training.stderr
        assert "of 100,000,000 images" in training.stderr.readline()
        training.send_signal(signal.SIGINT)
        said = training.stderr.read()
        assert (training.wait(60), training.stdout.read()) == (130, "")
        assert "Traceback" not in said
        assert re.search(r"/new: stopped as asked, after [\d,]+ of 100,000,000 images; the same command again", said)
    assert len(list((tmp_path / "new" / "checkpoints").glob("*/COMPLETE"))) == 1


def test_ctrl_c_twice_leaves_at_once_even_while_a_store_is_waited_for(digits: str, tiny: Path, tmp_path: Path) -> None:
    with servers.files(Path(digits)) as url, FaultProxy(url) as proxy:
        proxy.faults = Faults(silent=True)
        index = storage.read_json(f"{digits}/{INDEX}")
        for shard in index["shards"]:
            shard |= {name: f"{proxy.url}/{shard[name]}" for name in ("url", "offsets")}
        storage.write_json(f"{tmp_path}/{INDEX}", index)
        settings = [
            f"training.run={tmp_path}/new",
            f"data.url={tmp_path}",
            f"data.cache={tmp_path}",
            "data.patience=60",
        ]
        line = [*AAAE, "train", str(tiny), *settings]
        with subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as training:
            assert training.stderr
            assert "trying again for up to 60 s" in training.stderr.readline()
            training.send_signal(signal.SIGINT)
            time.sleep(0.5)  # two that come together are one
            training.send_signal(signal.SIGINT)
            began = time.monotonic()
            assert training.wait(60) == 130
            assert time.monotonic() - began < 10
            assert "Traceback" not in training.stderr.read()


# --- results


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("evaluate", run, "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not err
    assert (found.pop("run"), found.pop("checkpoint"), found.pop("images")) == (str(run), "000000000320", 320)
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert found == pytest.approx({name: last[name] for name in found})  # what the training said at its end
    assert call("evaluate", run, "--checkpoint", "000000000160") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{run}, averaged networks after 160 images"
    assert [line.split()[0] for line in lines] == list(found)
    monkeypatch.setattr("aaae_dist.evaluation.evaluate", lambda model, **_: [("psnr", math.inf)])
    assert call("evaluate", run, "--json") == 0
    assert capsys.readouterr().out.endswith('"psnr": null}\n')  # JSON knows no infinity


def images_of(path: Path) -> np.ndarray:
    with np.load(path) as archive:
        assert archive.files == ["images"]
        images = archive["images"]
    assert images.dtype == np.uint8
    return images


def test_sample(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sample(name: str, count: int, *arguments: object) -> Path:
        path = tmp_path / name
        assert call("sample", run, "--out", path, "--count", count, *arguments) == 0
        assert capsys.readouterr() == (f"{path}: {count} images\n", "")
        return path

    capsys.readouterr()

    many = images_of(sample("many.npz", 260))
    assert many.shape == (260, 8, 8, 1)
    assert len(np.unique(many, axis=0)) > 200
    few = images_of(sample("few.npz", 3))
    assert (np.abs(few.astype(int) - many[:3]) <= 1).all()  # but for rounding: other sizes of batch, other kernels
    assert sample("again.npz", 3).read_bytes() == (tmp_path / "few.npz").read_bytes()
    assert (images_of(sample("other.npz", 3, "--seed", 1)) != few).any()
    older = images_of(sample("older.npz", 3, "--checkpoint", "000000000160"))
    assert (older != few).any()
    with Image.open(sample("grid.png", 5)) as grid:
        assert (grid.mode, grid.size) == ("L", (3 * 36, 2 * 36))


def test_reconstruct(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = (picture_file(tmp_path / f"{size}.png", size=size) for size in (8, 40))
    Image.open(large).convert("RGB").save(tmp_path / "large.jpg")
    files = [small, large, tmp_path / "large.jpg"]
    assert call("reconstruct", run, *files, "--out", tmp_path / "out.npz") == 0
    assert capsys.readouterr() == (f"{tmp_path}/out.npz: 3 images\n", "")
    images = images_of(tmp_path / "out.npz")
    assert images.shape == (3, 8, 8, 1)
    assert call("reconstruct", run, *files, "--out", tmp_path / "out.png") == 0
    with Image.open(tmp_path / "out.png") as pairs:
        assert pairs.size == (3 * 36, 2 * 36)
        above = np.asarray(pairs)[:32:4, :32:4]
        below = np.asarray(pairs)[36:68:4, :32:4]
    with Image.open(small) as original:
        assert (above == np.asarray(original)).all()
    assert (below == images[0, :, :, 0]).all()


def test_shards_read(digits: str, capsys: pytest.CaptureFixture[str]) -> None:
    def read(*arguments: object) -> list[dict]:
        assert call("shards", "read", digits, "--batch-size", 24, *arguments) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    whole = read("--count", 70)  # more than one epoch
    assert [list(line) for line in whole] == [["batch", "keys"]] * 70
    assert [line["batch"] for line in whole] == list(range(70))
    for world in (2, 12):  # 12 ranks, and 9 shards
        ranks = [read("--count", 70, "--world", world, "--rank", rank) for rank in range(world)]
        for line, *parts in zip(whole, *ranks, strict=True):
            assert [key for part in parts for key in part["keys"]] == line["keys"]
    assert read("--start", 66, "--count", 4, "--workers", 2) == whole[66:]
    assert read("--count", 2, "--seed", 1) != whole[:2]


def test_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    for number in range(12):
        (photos / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture_file(photos / "ab"[number % 2] / f"{number}.png", size=20, seed=number)
    (photos / "a" / "broken.jpg").write_bytes(b"no image")
    options = ["--size", 16, "--crop", 18, "--channels", 1, "--format", "webp", "--held-out", 0.4]
    assert call("prepare", "folder", photos, *options, "--samples-per-shard", 3, "--out", out) == 0
    said, err = capsys.readouterr()
    assert not err
    assert re.fullmatch(rf"{out}: \d train, \d test images of 1 x 16 x 16 in [56] shards\n", said)
    assert caplog.messages == [f"1 images could not be read and are left out: {out}/rejects.csv"]
    assert "a/broken_jpg," in (out / "rejects.csv").read_text()
    index = json.loads((out / "index.json").read_text())
    assert (index["source"], index["classes"], index["attributes"]) == ("folder", ["a", "b"], [])
    with tarfile.open(out / "train-000000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".cls", ".webp"}


def test_tars_are_indexed_or_written_anew(digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars, size = tmp_path / "tars", ["--size", 4, "--format", "jpg"]
    shutil.copytree(digits, tars, ignore=shutil.ignore_patterns("index.json", "*.offsets"))
    before = contents(tars)
    lines = []
    for command in (
        ["prepare", "tar", tars, "--out", tmp_path / "a"],
        ["shards", "index", tars, "--out", tmp_path / "b"],
    ):
        assert call(*command) == 0
        lines.append(capsys.readouterr().out.partition(": ")[2])
    assert set(lines) == {"1,618 train, 179 test images of 1 x 8 x 8 in 10 shards\n"}
    assert contents(tars) == before
    assert [*contents(tmp_path / "a").values()] == [*contents(tmp_path / "b").values()]
    there, here = (json.loads((folder / "index.json").read_text()) for folder in (tmp_path / "a", Path(digits)))
    for one, other in zip(there["shards"], here["shards"], strict=True):
        assert one == other | {"url": f"{tars}/{other['url']}"}
    assert there == here | {"source": "tar", "made": "", "shards": there["shards"]}
    assert call("prepare", "tar", tars, *size, "--out", tmp_path / "c") == 0
    said = "1,618 train, 179 test images of 3 x 4 x 4 in 3 shards\n"
    assert capsys.readouterr().out.partition(": ")[2] == said
    assert call("shards", "verify", tmp_path / "c") == 0
    assert capsys.readouterr() == (f"{tmp_path}/c: {said}", "")


def test_shards_inspect(digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("shards", "inspect", digits, "--json", "--picture", tmp_path / "x.png") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not err
    assert (found["url"], found["splits"]["train"]["images"]) == (digits, 1618)
    with Image.open(tmp_path / "x.png") as picture:
        assert (picture.mode, picture.size) == ("L", (8 * 36, 8 * 36))
    assert call("shards", "inspect", digits) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{digits}: digits, images of 1 x 8 x 8"
    table = [line.split() for line in lines if line]
    assert table[:2] == [
        ["split", "images", "shards", "bytes", "bytes_per_image"],
        ["train", *(f"{number:,}" for number in found["splits"]["train"].values())],
    ]
    assert table[3:] == [
        ["class", "train", "test"],
        *([name, str(row["train"]), str(row["test"])] for name, row in found["classes"].items()),
    ]


def test_shards_verify(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for quick in ([], ["--quick"]):
        assert call("shards", "verify", shards, *quick) == 0
        assert capsys.readouterr() == (f"{shards}: 1,618 train, 179 test images of 1 x 8 x 8 in 10 shards\n", "")
    tar = shards / "train-000003.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    assert call("shards", "verify", shards) == 2
    assert capsys.readouterr() == (
        f"{tar}: its sha256 is not the index's\n",
        f"aaae: {shards}: damaged in 1 place, see stdout; bring it anew, or prepare it anew\n",
    )


def test_another_data_set_is_not_judged_by(copy: Path, tiny: Path, tmp_path: Path, refuse: Refuse) -> None:
    """Divided anew, images that were trained on would count as held out."""
    other = tmp_path / "other"
    assert call("prepare", "digits", "--out", other, "--seed", "7") == 0
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(re.sub(r'^url = ".*"', f'url = "{other}"', config, flags=re.M))
    assert refuse("evaluate", copy).startswith(f"{other}: not the data set that {copy} was trained on")
