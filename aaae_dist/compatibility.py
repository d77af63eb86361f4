"""Whether settings fit the ranks, and the run that is there already."""

from aaae_dist import checkpoint, distributed
from aaae_dist.checkpoint import read_run_config
from aaae_dist.config import Config
from aaae_dist.errors import UserError

# Settings and sections that may differ when a run goes on: they say how much and how often, not what is trained.
MAY_CHANGE = (
    "logging.",
    "evaluation.",
    "checkpoint.",
    "guard.",
    "tracking.",
    "data.url",  # a data set may move; its fingerprint is compared
    "data.workers",
    "data.cache",
    "data.cache_gb",
    "data.patience",
    "data.bad_share",
    "training.images",
    "training.compile",
    "training.silence",
    "training.channels_last",
    "training.activation_checkpointing",
    "training.run",
    "training.micro_batch_size",
    "training.compare_every",
    "training.patience",
)


def micro_batch_size(config: Config, world: int) -> int:
    """Images per forward on one rank.

    Raises:
        UserError: the batch cannot be divided so, or not so that its parts compute what it would as a whole.
    """
    training, objective = config.training, config.objective
    share = training.batch_size // world
    micro = training.micro_batch_size or share
    if training.batch_size % world:
        raise UserError(
            f"training.batch_size {training.batch_size}: not a multiple of the {world} ranks; choose one that is"
        )
    if share % micro:
        raise UserError(
            f"training.micro_batch_size {micro}: does not divide the {share} images of a rank (training.batch_size "
            f"{training.batch_size} over {world} ranks); choose a divisor"
        )
    for name in ("latent_penalised", "image_penalised") if config.model.method == "aaae" else ():
        every = round(1 / getattr(objective, name))
        if micro < training.batch_size and micro % every:
            raise UserError(
                f"training.batch_size {training.batch_size}, of which a part of {micro} is looked at at a time: that "
                f"must be a multiple of {every}, because objective.{name} looks at every {every}th pair; choose "
                "another batch_size or micro_batch_size"
            )
    return micro


def refuse_other_ranks(config: Config, run: str) -> None:
    """Compare the settings of all ranks, which may come from files of their nodes. All ranks must call it.

    Raises:
        UserError: they differ; the setting is named. Only what is of a node by itself may: its cache and workers.
    """
    ranks = distributed.gather(config.flat())
    for rank, settings in enumerate(ranks):
        for key, value in ranks[0].items():
            if settings.get(key) != value and key not in ("data.cache", "data.cache_gb", "data.workers"):
                raise UserError(
                    f"{key} {settings.get(key)!r} on rank {rank}: rank 0 of {run} has {value!r}; give all nodes the "
                    "same configuration"
                )


def refuse_changes(config: Config, run: str) -> None:
    """Raise a UserError if the run's folder holds checkpoints of other settings."""
    if not checkpoint.complete(run):
        return
    old, new = read_run_config(run).flat(), config.flat()
    for key, value in new.items():
        if old.get(key) != value and not {key, f"{key.partition('.')[0]}."} & set(MAY_CHANGE):
            raise UserError(
                f"{key} {value!r}: the run in {run} was begun with {old.get(key)!r}; set it back, or choose another "
                "training.run"
            )
