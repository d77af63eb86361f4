"""Ranks: what the launcher started, and what they say to each other."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from aaae_dist.errors import UserError


def start(*, precision: str, accumulation: int, patience: float) -> Accelerator:
    """Join the process group that the launcher prepared, if any.

    Accelerate falls back to one process in silence, for example on a machine without a GPU; this does not.

    Raises:
        UserError: the group has not as many ranks as the launcher started.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=patience))],
    )
    if world() != launched_world():
        raise UserError(
            f"WORLD_SIZE={launched_world()}: the launcher announced as many ranks, but {world()} joined; start with "
            "`accelerate launch --config_file launch/ddp.yaml`"
        )
    return accelerator


def launched_world() -> int:
    """Ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place. All ranks must call it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank. All ranks must call it."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def keep_buffers_local(model: torch.nn.Module) -> None:
    """Spare DDP's broadcast of buffers before every forward: the moments are equal on all ranks by construction."""
    if isinstance(model, DistributedDataParallel):
        model.forward_sync_buffers = False


def leave() -> None:
    """Leave the process group, without waiting for anybody."""
    if dist.is_initialized():
        dist.destroy_process_group()
