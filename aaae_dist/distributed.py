"""Ranks: what the launcher started, and what they say to each other."""

import ctypes
import os
import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from aaae_dist.errors import UserError

LOST_PEER = "another rank is gone"  # what the ranks that are left say
LAUNCH = "start with `accelerate launch --config_file launch/NAME.yaml`: single, ddp, zero1, zero2, zero3 or fsdp2"


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: given back, large tensors cost a page fault per 4 kB, a fifth of a CPU step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: allocations below 32 MB, its upper limit, come from the heap
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: the heap shrinks only when 1 GB of it is free


def launched_world() -> int:
    """Ranks that the launcher announced; 1 without a launcher.

    Raises:
        UserError: it announced no number, or not where they meet.
    """
    world = of_launcher("WORLD_SIZE", "1")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and name not in os.environ:
            raise UserError(f"{name}: not set beside WORLD_SIZE={world}, as a launcher sets both; {LAUNCH}")
    return world


def launched_rank() -> int:
    """This one of them, counted from 0."""
    return of_launcher("RANK", "0")


def of_launcher(name: str, alone: str) -> int:
    """A number that the launcher left in the environment; without a launcher another."""
    text = os.environ.get(name, alone)
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"{name}={text}: must be a whole number; {LAUNCH}")
    return int(text)


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place. All ranks must call it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(ask: Callable[[], Any]) -> Any:
    """What rank 0 gets when it asks, on every rank. All ranks must call it."""
    box = [ask() if rank() == 0 else None]
    if world() == 1:
        return box[0]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. All ranks must call it."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def first(problem: str) -> str:
    """What is wrong on the first rank on which anything is. All ranks must call it."""
    return next(filter(None, gather(problem)), "")


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or silent. (Gloo raises no class of its own.)"""
    raised = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())
    return raised and launched_world() > 1


def leave() -> None:
    """Leave the process group, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()
