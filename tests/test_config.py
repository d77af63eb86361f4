"""Settings: what is read, how it is merged, and that every mistake is one line that says what to do."""

from pathlib import Path

import pytest

from aaae_dist.config import Config, Optimizer, load_config, settings
from aaae_dist.errors import UserError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))
SMALLEST = """
[data]
url = "store/digits"
channels = 1
size = 8
[model]
width = 16
code_size = 4
noise_size = 4
[training]
run = "runs/test"
images = 320
batch_size = 32
"""


@pytest.fixture
def smallest(tmp_path: Path) -> str:
    """A file with all settings that must be set, and no other."""
    return written(tmp_path / "smallest.toml", SMALLEST)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refusal(*arguments: str) -> str:
    """The one line with which these are refused."""
    with pytest.raises(UserError) as caught:
        load_config(arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def test_every_setting_is_documented() -> None:
    for name, setting in settings().items():
        assert setting.sentence.endswith("."), name
        assert setting.sentence[0].isupper(), name
        assert "\n" not in setting.sentence, name


def test_defaults_are_those_of_the_help(smallest: str) -> None:
    config = load_config([smallest]).model_dump()
    required = []
    for name, setting in settings().items():
        section, _, key = name.rpartition(".")
        value = config
        for part in section.split("."):
            value = value[part]
        if setting.default is None:
            required.append(name)
        else:
            assert value[key] == setting.default, name
    assert required == [
        *("data.url", "data.channels", "data.size", "model.width", "model.code_size", "model.noise_size"),
        *("training.run", "training.images", "training.batch_size"),
    ]


def test_toml_round_trip(smallest: str, tmp_path: Path) -> None:
    config = load_config([smallest, "optimizer.encoder.betas=[0.25, 0.75]", 'tracking.name="a \\"b\\" \\\\ ü"'])
    again = load_config([written(tmp_path / "again.toml", config.toml())])
    assert again == config
    assert config.tracking.name == 'a "b" \\ ü'
    assert list(config.flat()) == list(settings())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configurations(path: Path, tmp_path: Path) -> None:
    under = [str(ROOT / "configs" / "digits.toml")] if path.parent.name == "baselines" else []  # they say what differs
    config = load_config([*under, str(path)])
    assert load_config([written(tmp_path / "again.toml", config.toml())]) == config
    assert path.read_text().startswith("# "), "say what it is, and the command"


def test_merged_left_to_right(smallest: str, tmp_path: Path) -> None:
    second = written(tmp_path / "second.toml", "[training]\nbatch_size = 64\nseed = 1\n[optimizer.decoder]\nlr = 0.5\n")
    config = load_config([smallest, "training.seed=3", "model.width=8", second, "model.width=4"])
    assert (config.training.batch_size, config.training.seed, config.model.width) == (64, 1, 4)
    assert config.training.images == 320
    assert config.optimizer.decoder.lr == 0.5
    assert config.optimizer.decoder.betas == Optimizer().decoder.betas  # set one rate, keep the other
    assert config.optimizer.encoder == Optimizer().encoder


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.images=1_000", 1000),
        ("training.warmup = 7", 7),
        ("training.average_half_life=1e3", 1000.0),
        ("training.run=runs/second", "runs/second"),
        ('training.run="runs/third"', "runs/third"),
        ("training.run='runs/third'", "runs/third"),
        ("training.run=runs/lr=0.1", "runs/lr=0.1"),
        ("training.run=old.toml", "old.toml"),
        ("training.run=7", "7"),
        ("tracking.name=2026-01-02", "2026-01-02"),
        ("tracking.name=", ""),
        ("tracking.mlflow=false", False),
        ("optimizer.encoder.betas=[0.5, 0.9]", (0.5, 0.9)),
    ],
)
def test_overrides(smallest: str, override: str, value: object) -> None:
    config: object = load_config([smallest, override])
    for part in override.partition("=")[0].strip().split("."):
        config = getattr(config, part)
    assert config == value


def test_an_override_may_set_a_table(smallest: str) -> None:
    config = load_config([smallest, "optimizer.encoder={lr = 0.25}", "training={seed = 5, warmup = 9}"])
    assert (config.optimizer.encoder.lr, config.training.seed, config.training.warmup) == (0.25, 5, 9)
    assert config.training.images == 320


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert load_config([written(folder / "config.toml", SMALLEST)]).model.width == 16


def test_a_file_may_lie_in_an_object_store(s3: str) -> None:
    from aaae_dist import storage

    storage.write(f"{s3}/config.toml", SMALLEST.encode())
    assert load_config([f"{s3}/config.toml"]).model.width == 16
    assert refusal(f"{s3}/other.toml").startswith(f"{s3}/other.toml: no such file")


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.batchsize=32", "did you mean training.batch_size?"),
        ("model.widht=32", "did you mean model.width?"),
        ("optimizer.encoder.beta=[0.5, 0.9]", "did you mean optimizer.encoder.betas?"),
        ("optimizer.encodr.lr=0.1", "did you mean optimizer.encoder?"),
        ("trainng.batch_size=32", "did you mean training?"),
        ("model.batch_size=32", "did you mean training.batch_size or evaluation.batch_size?"),
        ("seed=1", "did you mean training.seed?"),
        (
            "optimizer.lr=1",
            "did you mean optimizer.encoder.lr or optimizer.decoder.lr or optimizer.latent_generator.lr ",
        ),
        ("model.depth=2", "[model] has method, architecture, width, code_size, noise_size, latent_width, latent_depth"),
        ("scheduler.kind=cosine", "the sections are data, model, objective, optimizer, training, logging, "),
    ],
)
def test_unknown_settings_name_the_nearest(smallest: str, override: str, meant: str) -> None:
    message = refusal(smallest, override)
    assert ": unknown setting; " in message
    assert meant in message


def test_unknown_settings_of_a_file_name_it(smallest: str, tmp_path: Path) -> None:
    path = written(tmp_path / "typo.toml", "[training]\nsede = 1\n[sheduler]\nkind = 'cosine'\n")
    message = refusal(smallest, path)
    assert f"{path}: training.sede: unknown setting; did you mean training.seed?; also {path}: sheduler: " in message


def test_a_misspelt_key_is_not_also_called_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "typo.toml", SMALLEST.replace("batch_size", "batchsize"))
    assert refusal(path) == f"{path}: training.batchsize: unknown setting; did you mean training.batch_size?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.images=1e6", "training.images 1000000.0: must be a whole number without a point or an exponent"),
        ("training.images=many", 'training.images "many": must be a whole number'),
        ("training.images=" + "9" * 5000, 'training.images "999'),
        ("training.images=1_000_000_000_000", "training.images 1000000000000: must be less than 1000000000000"),
        ("training.images=0", "training.images 0: must be at least 1"),
        ("training.batch_size=-32", "training.batch_size -32: must be at least 1"),
        ("training.batch_size=true", "training.batch_size true: must be a whole number"),
        ("training.seed=-1", "training.seed -1: must be at least 0"),
        ("training.run=", 'training.run "": must not be empty'),
        (
            "training.precision=fp16",
            'training.precision "fp16": must be "no" or "bf16"; in float16 exp(margin), the ra',
        ),
        ("training.final_rate=1.5", "training.final_rate 1.5: must be at most 1"),
        ("data.url=", 'data.url "": must not be empty'),
        ("data.channels=2", "data.channels 2: must be 1 or 3"),
        ("data.workers=1000", "data.workers 1000: must be at most 256"),
        ("model.method=gan", "model.method \"gan\": must be 'aaae' or 'autoencoder'"),
        ("model.width=1_000_000", "model.width 1000000: must be at most 65536"),
        ("objective.reconstruction_weight=0", "objective.reconstruction_weight 0: must be more than 0"),
        (
            "objective.latent_penalised=0.4",
            "objective.latent_penalised 0.4: must be 1 over a whole number, such as 1.0",
        ),
        ("objective.image_penalised=0", "objective.image_penalised 0: must be at least 1e-06"),
        ("objective.image_weight=much", 'objective.image_weight "much": must be a number'),
        ("optimizer.encoder.lr=nan", "optimizer.encoder.lr NaN: must be a finite number"),
        ("optimizer.encoder.betas=[0.5]", "optimizer.encoder.betas [0.5]: must be two numbers, such as [0.5, 0.99]"),
        ("optimizer.encoder.betas=[0.5, 0.9, 1]", "optimizer.encoder.betas [0.5, 0.9, 1]: must be two numbers"),
        ("optimizer.encoder.betas=0.5", "optimizer.encoder.betas 0.5: must be two numbers"),
        ("optimizer.encoder.betas=[0.5, 1]", "optimizer.encoder.betas 1: must be less than 1"),
        ("tracking.mlflow=no", 'tracking.mlflow "no": must be true or false'),
        ("tracking.mlflow=1", "tracking.mlflow 1: must be true or false"),
        ("data=store/digits", 'data "store/digits": is a section, not a value; set its keys, such as data.url'),
        (
            "optimizer.encoder=0.1",
            "optimizer.encoder 0.1: is a section, not a value; set its keys, such as optimizer.enc",
        ),
        ("=3", "=3: an override looks like section.key=value, such as training.batch_size=128"),
        ("training.=3", "training.=3: an override looks like section.key=value"),
        ("training..seed=3", "training..seed=3: an override looks like section.key=value"),
    ],
    ids=lambda text: text[:40],
)
def test_wrong_values(smallest: str, override: str, message: str) -> None:
    assert refusal(smallest, override).startswith(message)


def test_wrong_values_of_a_file_name_it(smallest: str, tmp_path: Path) -> None:
    path = written(tmp_path / "wrong.toml", "[tracking]\nname = 7\n[training]\nseed = '1'\n")
    message = refusal(smallest, path, "model.width=0")
    assert message == (
        "model.width 0: must be at least 1; also "
        f'{path}: training.seed "1": must be a whole number without a point or an exponent, such as 100_000; also '
        f'{path}: tracking.name 7: must be text in quotes, such as "train"'
    )
    table = written(tmp_path / "table.toml", "model = 3\n")
    assert (
        refusal(smallest, table) == f"{table}: model 3: is a section, not a value; set its keys, such as model.method"
    )


def test_missing_settings(tmp_path: Path) -> None:
    path = written(
        tmp_path / "short.toml", SMALLEST.replace("images = 320\n", "").replace("[data]", "[data]\ncache=''")
    )
    assert refusal(path) == (
        "training.images: missing; set it in a TOML file or as training.images=... (Images to train on, over all "
        "ranks: the only clock. Rounded up to whole batches)"
    )
    assert "section [data] is missing; write it in a TOML file with at least data.url, data.channels, data.size; " in (
        refusal(written(tmp_path / "empty.toml", ""))
    )


def test_files_that_are_none(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.toml")
    assert refusal(nowhere).startswith(f"{nowhere}: no such file; configurations are TOML files such as configs/digi")
    assert refusal("training.batch_size", nowhere).startswith("training.batch_size: no such file; ")
    assert refusal(str(tmp_path)).startswith(f"{tmp_path}: ")
    broken = written(tmp_path / "broken.toml", "[data]\nurl = \n")
    assert refusal(broken).startswith(f"{broken}: not TOML: Invalid value (at line 2, column 7); ")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.toml: not TOML: " in refusal(str(tmp_path / "bytes.toml"))
    assert "nothing://" in refusal("nothing://here.toml")


def test_settings_are_frozen(smallest: str) -> None:
    config = load_config([smallest])
    with pytest.raises(ValueError, match="frozen"):
        config.training.__setattr__("seed", 1)
    assert isinstance(config, Config)
