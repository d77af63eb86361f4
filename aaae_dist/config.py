"""Settings: frozen sections with a sentence for every key, read from TOML files merged left to right plus overrides."""

import contextlib
import difflib
import functools
import json
import tomllib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from aaae_dist import storage
from aaae_dist.errors import UserError, one_line


def whole_stride(share: float) -> float:
    if abs(1 / share - round(1 / share)) > 0.02:
        raise ValueError("must be 1 over a whole number, such as 1.0, 0.5, 0.25")
    return share


def safe_precision(precision: str) -> str:
    if precision not in ("no", "bf16"):
        raise ValueError(
            'must be "no" or "bf16"; in float16 exp(margin), the ratio between the gradients of an opponent and its '
            "critic, overflows"
        )
    return precision


# The upper limits are far beyond use: they turn a slip of the hand into one line instead of an overflow deep below.
Count = Annotated[int, Field(ge=1, lt=10**12)]  # twelve digits: checkpoints are named and sorted so
Whole = Annotated[int, Field(ge=0, lt=10**12)]
Size = Annotated[int, Field(ge=1, le=65_536)]
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(ge=1e-6, le=1), AfterValidator(whole_stride)]
Beta = Annotated[float, Field(ge=0, lt=1)]


Figure = Literal["", "reconstruction/held_out_mse", "latent/frechet_over_trace", "samples/thumbnail_frechet_over_trace"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Data(Section):
    url: Text
    """Where the shards and their index.json are: a folder or any fsspec URL, as given to `aaae prepare --out`."""
    split: Text = "train"
    """The split that is trained on."""
    held_out: Text = "test"
    """The split that evaluation reconstructs."""
    channels: Literal[1, 3]
    """Channels of the images: 1 (grey) or 3 (RGB). Must be what the index says."""
    size: Annotated[int, Field(ge=1, le=4_096)]
    """Height and width of the images in pixels. Must be what the index says, or less with `crop`."""
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Processes of each rank that fetch and decode ahead; 0: in the step, as for what takes up to 64 MB decoded."""
    lanes: Size = 16
    """Places of the data set that every batch is gathered from. A part of the order: keep it to continue a run."""
    window: Count = 65_536
    """Samples that are shuffled among each other within a lane. A part of the order: keep it to continue a run."""
    mix: dict[Text, Positive] = {}
    """Other data sets mixed in, and their weights against the 1 of `url`: mix = {"s3://bucket/other" = 0.5}."""
    flip: bool = False
    """Whether training images are mirrored left to right at random."""
    crop: bool = False
    """Whether squares of `size` are cut out of larger images: at random places to train, in the middle to judge."""
    bad_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of unreadable samples (replaced by their neighbours) above which a run stops; ten are always forgiven."""
    cache: str = ""
    """Folder of this node for shards fetched from an object store; empty: the user's cache folder."""
    cache_gb: Positive = 20.0
    """Gigabytes (10^9 bytes) that the cache may hold, over all runs; the least recently used shards make room."""
    patience: Positive = 120.0
    """Seconds within which a store that fails must recover, or the run ends. An unanswered request takes ten."""


class Model(Section):
    method: Literal["aaae", "autoencoder"] = "aaae"
    """What is trained: the AAAE, or a plain autoencoder to compare with."""
    architecture: Literal["dcgan", "mlp"] = "dcgan"
    """Family of the encoder, decoder and image critic."""
    width: Size
    """Channels after the first halving (dcgan), or units of a hidden layer (mlp)."""
    code_size: Size
    """Numbers in a code."""
    noise_size: Size
    """Numbers in the latent generator's noise; at least the codes' intrinsic dimension."""
    latent_width: Size = 256
    """Units of a hidden layer of the latent generator and the latent critic."""
    latent_depth: Annotated[int, Field(ge=1, le=1_000)] = 3
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
    run: Text
    """Folder (or fsspec URL) of metrics, checkpoints and pictures; the same command again continues the run."""
    images: Count
    """Images to train on, over all ranks: the only clock. Rounded up to whole batches."""
    batch_size: Count
    """Images per optimizer step, over all ranks."""
    micro_batch_size: Whole = 0
    """Images per forward pass on one rank; 0: the rank's whole share of the batch. Smaller ones are accumulated."""
    precision: Annotated[str, AfterValidator(safe_precision)] = "no"
    """Mixed precision: "no" (float32) or "bf16"."""
    compile: bool = False
    """Whether every network is compiled (torch.compile), which takes a minute at the start and a C++ compiler."""
    channels_last: bool = False
    """Whether convolutions run with channels last in memory, which GPUs are faster at."""
    activation_checkpointing: bool = False
    """Whether networks make activations again in the backward pass instead of keeping them: less memory, more time."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the weights, the order of the data and every draw."""
    warmup: Whole = 0
    """Images over which the learning rates rise from 0."""
    final_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the peak learning rates that the cosine ends at."""
    average_half_life: NotNegative = 9_000.0
    """Half-life, in images, of the averaged weights that are judged; at most a twelfth of the images seen; 0: off."""
    compare_every: Whole = 100_000
    """Images between two comparisons of what all ranks must have alike, bit by bit; 0: only before it is saved."""
    patience: Positive = 180.0
    """Seconds that a rank waits for the others before it gives up."""
    silence: Annotated[float, Field(ge=5, le=1e6)] = 15.0
    """Seconds without a sign of life after which a rank that trains is taken for gone, and all are brought down."""


class Logging(Section):
    every: Count = 5_000
    """Images between two lines of metrics."""
    pictures_every: Whole = 50_000
    """Images between two pictures of samples and reconstructions; 0: only at the end."""


class Evaluation(Section):
    every: Whole = 0
    """Images between two evaluations; 0: only at the end."""
    samples: Annotated[int, Field(ge=100)] = 5_000
    """Samples drawn, and at most as many training images encoded, for the distances."""
    batch_size: Count = 250
    """Images per forward pass on one rank."""


class Checkpoint(Section):
    every: Whole = 50_000
    """Images between two checkpoints; 0: only at the end and when stopped."""
    minutes: NotNegative = 0.0
    """Minutes between two checkpoints, where `every` takes longer; 0: however long it takes."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Whole = 0
    """Images between two checkpoints that are kept besides, for good; 0: none."""
    best: Figure = ""
    """Figure by whose lowest value one is kept besides, of those saved when it was evaluated; empty: none."""


class Guard(Section):
    deviations: NotNegative = 12.0
    """Robust standard deviations, of its logarithm, above the usual, at which a loss or gradient explodes; 0: off."""
    skips: Whole = 5
    """Steps of the last 128 that are skipped, for what exploded or was not finite, before the run goes back."""
    rollbacks: Whole = 3
    """Times that a run goes back to a good checkpoint, and on in another order of the data, before it ends."""


class Tracking(Section):
    mlflow: bool = True
    """Whether MLflow is told; where it is, MLFLOW_TRACKING_URI says (default: mlflow.db beside the run)."""
    experiment: Text = "aaae"
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
    guard: Guard = Guard()
    """What is done about divergence."""
    tracking: Tracking = Tracking()
    """MLflow."""

    def toml(self) -> str:
        """The whole configuration, defaults included."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def flat(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        tree = self.model_dump(mode="json")
        return {name: functools.reduce(lambda part, key: part[key], name.split("."), tree) for name in settings()}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Setting(NamedTuple):
    """What is known of a setting: its sentence, its type, and its default (None: it must be set)."""

    sentence: str
    kind: Any
    default: Any


@functools.cache
def settings() -> dict[str, Setting]:
    """Every setting by its dotted name."""

    def walk(section: type[Section], prefix: str, default: Section | None) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        for name, field in section.model_fields.items():
            value = getattr(default, name) if default else None if field.is_required() else field.default
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                found |= walk(field.annotation, f"{prefix}{name}.", value)
            else:
                found[prefix + name] = Setting(field.description or "", field.annotation, value)
        return found

    return walk(Config, "", None)


def load_config(arguments: Sequence[str]) -> Config:
    """Read TOML files (any fsspec URL) and `section.key=value` overrides, merged left to right.

    Raises:
        UserError: a file that is missing or no TOML, an unknown key (the nearest valid one is named), or a wrong value.
    """
    # A network's rates have defaults of their own: seen here, so that one of them can be set alone.
    tree: dict[str, Any] = {"optimizer": Optimizer().model_dump(mode="json")}
    origin: dict[str, str] = {}  # of every key: the file that set it
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        override = equals and (not argument.endswith(".toml") or key.partition(".")[0] in Config.model_fields)
        read = parse_override(argument) if override else read_toml(argument)
        merge(tree, read)
        origin |= dict.fromkeys(flatten(read), "" if override else f"{argument}: ")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        unknown = [p for p in problems if p["type"] == "extra_forbidden"]  # told first: what is misspelt is missing too
        raise UserError("; also ".join(describe(problem, origin) for problem in unknown or problems)) from None


def read_toml(url: str) -> dict[str, Any]:
    if not storage.exists(url):
        raise UserError(
            f"{url}: no such file; configurations are TOML files such as configs/digits.toml, overrides look like "
            "training.batch_size=128"
        )
    try:
        return tomllib.loads(storage.read(url).decode())
    except ValueError as error:
        raise UserError(f"{url}: not TOML: {one_line(error)}; mend that line, or give another file") from None


def parse_override(argument: str) -> dict[str, Any]:
    key, _, value = argument.partition("=")
    setting, word = settings().get(key.strip()), json.dumps(value, ensure_ascii=False)
    if setting and setting.kind is str and value.strip()[:1] not in ('"', "'"):
        value = word  # what is to be text needs no quotes: `tracking.name=7`
    for line in (f"{key} = {value}", f"{key} = {word}"):  # nor does what is no TOML value
        with contextlib.suppress(ValueError):
            return tomllib.loads(line)
    raise UserError(f"{argument}: an override looks like section.key=value, such as training.batch_size=128")


def merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Take `other` into `tree`, key by key."""
    for name, value in other.items():
        if isinstance(old := tree.get(name), dict) and isinstance(value, dict):
            merge(old, value)
        else:
            tree[name] = value


RULES = {  # pydantic's kinds of complaint, in our words
    "int_type": "must be a whole number without a point or an exponent, such as 100_000",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": 'must be text in quotes, such as "train"',
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "value_error": "{error}",
    "model_type": "is a section, not a value; set its keys, such as {below[0]}",
    **dict.fromkeys(("missing", "too_long", "tuple_type"), "must be two numbers, such as [0.5, 0.99]"),  # of betas
}


def describe(problem: Any, origin: dict[str, str]) -> str:
    """One of pydantic's complaints in one clause: the file, the setting, its value, the rule, the remedy."""
    kind, path = problem["type"], problem["loc"]
    key = ".".join(part for part in path if isinstance(part, str))
    below = [name for name in settings() if name.startswith(f"{key}.")]
    places = [place for name, place in origin.items() if name.startswith(f"{key}.")]
    where = origin.get(key, places[0] if places else "")
    if kind == "extra_forbidden":
        return f"{where}{key}: unknown setting; {suggest(key)}"
    if kind == "missing" and below:
        wanted = ", ".join(name for name in below if settings()[name].default is None)
        return f"section [{key}] is missing; write it in a TOML file with at least {wanted}"
    if kind == "missing" and isinstance(path[-1], str):
        return f"{key}: missing; set it in a TOML file or as {key}=... ({settings()[key].sentence.rstrip('.')})"
    rule = RULES.get(kind, problem["msg"]).format(**problem.get("ctx", {}), below=below)
    return f"{where}{key} {json.dumps(problem['input'], default=str)}: {rule}"


def suggest(key: str) -> str:
    """What an unknown key may have been meant to be: that name in another section, or one like it in this."""
    parent, dot, name = key.rpartition(".")
    elsewhere = [s for s in settings() if s.rpartition(".")[2] == name]
    here = dict.fromkeys(s[len(parent + dot) :].partition(".")[0] for s in settings() if s.startswith(parent + dot))
    if near := elsewhere or [parent + dot + other for other in difflib.get_close_matches(name, here, n=1, cutoff=0.7)]:
        return f"did you mean {' or '.join(near)}?"
    return f"{f'[{parent}] has' if parent else 'the sections are'} {', '.join(here)}; see `aaae train --help`"
