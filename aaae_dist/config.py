"""Settings: frozen sections with a sentence for every key, read from TOML files merged left to right plus overrides."""

import difflib
import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aaae_dist.errors import UserError

Count = Annotated[int, Field(ge=1)]
Interval = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    url: str
    """Where the shards and their index.json are: a folder or any fsspec URL, as given to `aaae prepare --out`."""
    split: str = "train"
    """The split that is trained on."""
    held_out: str = "test"
    """The split that evaluation reconstructs."""
    channels: Literal[1, 3]
    """Channels of the images: 1 (grey) or 3 (RGB). Must be what the index says."""
    size: Count
    """Height and width of the images in pixels. Must be what the index says."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Threads per process that fetch and decode ahead; 0 does it in the step. The order does not depend on it."""
    lanes: Count = 16
    """Places of the data set that every batch is gathered from. A part of the order: keep it to continue a run."""
    window: Count = 4096
    """Samples that are shuffled among each other within a lane. A part of the order: keep it to continue a run."""
    bad_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of unreadable samples (replaced by their neighbours) above which a run stops; ten are always forgiven."""
    cache: str = ""
    """Folder for shards fetched from an object store; empty: `aaae_dist` in the user's cache folder."""


class Model(Section):
    method: Literal["aaae", "autoencoder"] = "aaae"
    """What is trained: the AAAE, or a plain autoencoder to compare with."""
    architecture: Literal["dcgan", "mlp"] = "dcgan"
    """Family of the encoder, decoder and image critic."""
    width: Count
    """Channels after the first halving (dcgan), or units of a hidden layer (mlp)."""
    code_size: Count
    """Numbers in a code."""
    noise_size: Count
    """Numbers in the latent generator's noise; at least the codes' intrinsic dimension."""
    latent_width: Count = 256
    """Units of a hidden layer of the latent generator and the latent critic."""
    latent_depth: Count = 3
    """Hidden layers of the latent generator and the latent critic."""


class Objective(Section):
    pairing: Literal["relativistic", "logistic"] = "relativistic"
    """How critic and opponent are paired: logits compared in pairs (RpGAN), or each by itself (non-saturating)."""
    reconstruction_weight: Positive = 16.0
    """Weight of the mean squared error, on values in [-1, 1]."""
    image_weight: NotNegative = 0.1
    """Weight of the image adversary in the decoder's loss (lambda_x); the image critic learns even at 0."""
    image_reaches_latent: bool = True
    """Whether the image adversary's gradient goes on through the decoder to the latent generator."""
    latent_penalty: NotNegative = 0.3
    """Weight gamma of the latent critic's penalty, gamma / 2 (R1 + R2), on standardised codes."""
    latent_penalised: Share = 1.0
    """Share of the pairs that the latent critic's penalty looks at: 1, 1/2, 1/3, ..."""
    latent_step: Positive = 0.1
    """Step of the finite differences in the latent critic's penalty."""
    image_penalty: NotNegative = 0.3
    """Weight gamma of the image critic's penalty; it grows with the number of pixels."""
    image_penalised: Share = 0.25
    """Share of the pairs that the image critic's penalty looks at: 1, 1/2, 1/3, ..."""
    image_step: Positive = 0.1
    """Step of the finite differences in the image critic's penalty."""

    @model_validator(mode="after")
    def whole_strides(self) -> Self:
        for name in ("latent_penalised", "image_penalised"):
            value = getattr(self, name)
            if abs(1 / value - round(1 / value)) > 0.02:
                raise ValueError(f"{name} {value}: must be 1 over a whole number, such as 1.0, 0.5, 0.25")
        return self


class Rates(Section):
    lr: NotNegative
    """Peak learning rate of Adam."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.0, 0.99)
    """Adam's decay of the first and second moments."""


class Optimizer(Section):
    encoder: Rates = Rates(lr=1e-3, betas=(0.5, 0.99))
    """Rates of the encoder."""
    decoder: Rates = Rates(lr=1e-3, betas=(0.5, 0.99))
    """Rates of the decoder."""
    latent_generator: Rates = Rates(lr=4e-3)
    """Rates of the latent generator."""
    latent_critic: Rates = Rates(lr=4e-3)
    """Rates of the latent critic."""
    image_critic: Rates = Rates(lr=2e-3)
    """Rates of the image critic."""
    clip: NotNegative = 0.0
    """Largest gradient norm, of each network by itself; 0 is off."""


class Training(Section):
    run: str
    """Folder (or fsspec URL) of metrics, checkpoints and pictures; the same command again continues the run."""
    images: Count
    """Images to train on, over all ranks: the only clock. Rounded up to whole batches."""
    batch_size: Count
    """Images per optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    """Images per forward pass on one rank; 0: the rank's whole share of the batch. Smaller ones are accumulated."""
    precision: str = "no"
    """Mixed precision: "no" (float32) or "bf16"."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the weights, the order of the data and every draw."""
    warmup: Interval = 0
    """Images over which the learning rates rise from 0."""
    final_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the peak learning rates that the cosine ends at."""
    average_half_life: NotNegative = 9_000.0
    """Half-life, in images, of the averaged weights that are judged; at most a twelfth of the images seen; 0: off."""
    patience: Positive = 180.0
    """Seconds that a rank waits for the others before it gives up."""

    @model_validator(mode="after")
    def precision_is_safe(self) -> Self:
        if self.precision == "fp16":
            raise ValueError(
                "precision \"fp16\": refused, because the ratio between an opponent's gradient and its critic's, "
                'exp(margin), overflows in float16; use "bf16" or "no"'
            )
        if self.precision not in ("no", "bf16"):
            raise ValueError(f'precision "{self.precision}": must be "no" or "bf16"')
        return self


class Logging(Section):
    every: Count = 5_000
    """Images between two lines of metrics."""
    pictures_every: Interval = 50_000
    """Images between two pictures of samples and reconstructions; 0: only at the end."""


class Evaluation(Section):
    every: Interval = 0
    """Images between two evaluations; 0: only at the end."""
    samples: Annotated[int, Field(ge=100)] = 5_000
    """Samples drawn, and at most as many training images encoded, for the distances."""
    batch_size: Count = 250
    """Images per forward pass on one rank."""


class Checkpoint(Section):
    every: Interval = 50_000
    """Images between two checkpoints; 0: only at the end and when stopped."""
    keep: Count = 2
    """Newest checkpoints that are kept."""


class Tracking(Section):
    mlflow: bool = True
    """Whether MLflow is told; where it is, MLFLOW_TRACKING_URI says (default: mlflow.db beside the run)."""
    experiment: str = "aaae"
    """MLflow experiment."""
    name: str = ""
    """MLflow run name; empty: the last part of training.run."""


class Config(Section):
    data: Data
    """What is trained on."""
    model: Model
    """The networks."""
    objective: Objective = Objective()
    """The losses."""
    optimizer: Optimizer = Optimizer()
    """The learning rates, network by network."""
    training: Training
    """The run."""
    logging: Logging = Logging()
    """How often what is reported."""
    evaluation: Evaluation = Evaluation()
    """How often and how thoroughly it is judged."""
    checkpoint: Checkpoint = Checkpoint()
    """How often it is saved."""
    tracking: Tracking = Tracking()
    """MLflow."""

    def toml(self) -> str:
        """The whole configuration, defaults included."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return flatten(self.model_dump(mode="json"))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@functools.cache
def documentation() -> dict[str, str]:
    """The sentence of every setting, by its dotted name."""

    def walk(section: type[Section], prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= walk(field.annotation, f"{prefix}{name}.")
            else:
                found[prefix + name] = field.description or ""
        return found

    return walk(Config, "")


def load_config(arguments: Sequence[str]) -> Config:
    """Read TOML files and `section.key=value` overrides, merged left to right.

    Raises:
        UserError: a file that is missing or no TOML, an unknown key (the nearest valid one is named), or a wrong value.
    """
    tree: dict[str, Any] = {
        "optimizer": Optimizer().model_dump(mode="json")
    }  # so that one of a network's rates can be set alone
    origin: dict[str, str] = {}  # of every key: the file or argument that set it
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and not argument.endswith(".toml"):
            read = parse_override(argument, key, value)
        else:
            read = read_toml(argument)
        merge(tree, read, where=argument)
        origin |= dict.fromkeys(flatten(read), argument)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(describe(problem, origin) for problem in error.errors())) from None


def read_toml(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; configurations are TOML files such as configs/digits.toml, overrides look like "
            "training.batch_size=128"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML: {error}") from None


def parse_override(argument: str, key: str, value: str) -> dict[str, Any]:
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a plain word is text: `training.run=runs/second`
    *sections, name = key.strip().split(".")
    if not all([*sections, name]):
        raise UserError(f"{argument}: an override looks like section.key=value, such as training.batch_size=128")
    tree: dict[str, Any] = {name: parsed}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def merge(tree: dict[str, Any], other: dict[str, Any], *, where: str) -> None:
    """Take `other` into `tree`, key by key."""
    for name, value in other.items():
        old = tree.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            merge(old, value, where=where)
        elif isinstance(old, dict):
            raise UserError(
                f"{where}: {name} is a section, not a value; set its keys, such as {name}.{next(iter(old), 'key')}"
            )
        else:
            tree[name] = value


def describe(problem: Any, origin: dict[str, str]) -> str:
    """One of pydantic's complaints in one clause: where it was set, the setting, its value, the rule."""
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    key = ".".join(parts)
    where = origin.get(key) or next(
        (source for name, source in origin.items() if name.startswith(f"{key}.") or key.startswith(f"{name}.")), ""
    )
    where = f"{where}: " if where and "=" not in where else ""
    if problem["type"] == "extra_forbidden":
        known = list(documentation())
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
            name for name in known if name.rpartition(".")[2] == parts[-1]
        ]
        sections = ", ".join(Config.model_fields)
        return f"{where}{key}: unknown setting; " + (
            f"did you mean {near[0]}?"
            if near
            else f"the sections are {sections}; `aaae train --help` lists every setting"
        )
    if problem["type"] == "missing":
        sentence = documentation().get(key, "")
        return f"{key}: missing; set it in the TOML file or as {key}=..." + (
            f" ({sentence.rstrip('.')})" if sentence else ""
        )
    if problem["type"] == "value_error":
        return f"{where}{key}.{problem['ctx']['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}{key} {problem['input']!r}: {message}"
