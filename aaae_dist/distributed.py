"""Ranks: what the launcher started, and what they say to each other."""

import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from aaae_dist.errors import UserError


def start(*, precision: str, accumulation: int, patience: float) -> Accelerator:
    """Join the process group that the launcher prepared, if any.

    Accelerate falls back to one process in silence, for example on a machine without a GPU; this does not.

    Raises:
        UserError: the group has not as many ranks as the launcher started.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=patience))],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UserError(
            f"distributed_type {accelerator.distributed_type.value}: one process or DDP only, so far; start with "
            "`accelerate launch --config_file launch/ddp.yaml`"
        )
    if world() != launched_world():
        raise UserError(
            f"WORLD_SIZE={launched_world()}: the launcher announced as many ranks, but {world()} joined; start with "
            "`accelerate launch --config_file launch/ddp.yaml`"
        )
    return accelerator


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: given back, large tensors cost a page fault per 4 kB, a fifth of a CPU step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: allocations below 32 MB, its upper limit, come from the heap
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: the heap shrinks only when 1 GB of it is free


def launched_world() -> int:
    """Ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. All ranks must call it."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


class HostCopy:
    """A small tensor on its way to the host: reading it waits for the work before it on its device, not after it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def tolist(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor.tolist()


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or silent. (Gloo raises no class of its own.)"""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


def keep_buffers_local(model: torch.nn.Module) -> None:
    """Spare DDP's broadcast of buffers before every forward: the moments are equal on all ranks by construction."""
    if isinstance(model, DistributedDataParallel):
        model.forward_sync_buffers = False


def leave() -> None:
    """Leave the process group, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
