"""One step that changes nothing: what memory each network takes on a rank, and how long a step takes.

Activations are counted from what autograd keeps, of a few images: they grow with the images and are the same on every
device. So a step that would not fit need not be tried, and a login node is not brought down by it.
"""

import math
import re
import time
from collections.abc import Iterator
from math import lcm
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.config import Config
from aaae_dist.optimizer import STATES
from aaae_dist.randomness import Keys, sample_keys

DIVIDED = {  # among the ranks, by engine
    **dict.fromkeys(("single", "ddp"), ()),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    **dict.fromkeys(("zero3", "fsdp2"), ("weights", "gradients", "optimizer")),
}
DEEPSPEED_BUFFER = 5 * 10**8 * 4  # bytes on a GPU, whatever the networks are: its default bucket, in float32
GROUPS, MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # control groups, and which this process is in
FEW = 4  # images, times what the penalties need


# --- what there is


class Available(NamedTuple):
    """Bytes that are free for one rank: of its GPU, or else of this machine."""

    free: int
    gpu: bool
    program: int  # what the program itself has taken of the machine's


def available(*, processes: int) -> Available:
    """What there is for each of so many ranks, as the scheduler or container leaves it."""
    program = kilobytes("/proc/self/status", "RssAnon")
    if torch.cuda.is_available():
        return Available(torch.cuda.mem_get_info()[0], gpu=True, program=program)
    free = min([kilobytes("/proc/meminfo", "MemAvailable"), *left_by_groups()])
    return Available(free // processes, gpu=False, program=program)


def left_by_groups() -> Iterator[int]:
    """What the control groups (version 2) that this process is in have left; the page cache gives way."""
    found = re.search(r"^0::/(.*)", MINE.read_text(), flags=re.M)
    here = GROUPS / (found[1] if found else "")
    for folder in (here, *here.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.exists() and (most := limit.read_text().strip()).isdigit():
            cache = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), flags=re.M)
            yield int(most) - int(used.read_text()) + (int(cache[1]) if cache else 0)


def kilobytes(path: str, name: str) -> int:
    """A figure of the kernel's, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), flags=re.M)
    assert found, f"{path} says nothing of {name}"
    return int(found[1]) * 1024


# --- what is taken


class Memory(NamedTuple):
    """Bytes that a network takes on a rank."""

    weights: int
    gradients: int
    optimizer: int  # Adam's moments, and averages
    activations: int


def state_of(network: nn.Module, *, engine: str, ranks: int, activations: int) -> Memory:
    """What a network takes on a rank, by what the engine divides. DDP and ZeRO keep a copy more than they need."""
    size = sum(weight.nbytes for weight in network.parameters())
    copies = {
        "weights": 1,
        "gradients": 2 if engine == "ddp" else 1,  # and its buckets
        "optimizer": len(STATES) + engine.startswith("zero"),  # and the weights that are stepped
    }
    share = {kind: math.ceil(size * n / (ranks if kind in DIVIDED[engine] else 1)) for kind, n in copies.items()}
    return Memory(**share, activations=activations)


def overhead(game: GenerativeAutoencoder, there: Available, *, engine: str, ranks: int) -> int:
    """What a rank takes besides: on a CPU the program itself, and the copies that are saved from."""
    if not there.gpu:
        return there.program + checkpoint_bytes(game) // ranks
    return DEEPSPEED_BUFFER if engine.startswith("zero") else 0


def checkpoint_bytes(game: GenerativeAutoencoder) -> int:
    """Of a checkpoint's tensors: weights, Adam's moments and averages; of the codes' moments, these and their average.

    All are float32, in every engine.
    """
    values = sum(weight.numel() for weight in game.parameters())
    return 4 * ((1 + len(STATES)) * values + 2 * game.moments.numel())


# --- activations


def activations(game: GenerativeAutoencoder, config: Config, *, images: int) -> dict[str, int]:
    """Bytes that each network keeps for the backward pass of so many images; under "": the losses."""
    few = FEW * lcm(*strides(config))
    if images <= 2 * few:
        return kept(game, config, images=images)
    one, two = (kept(game, config, images=n * few) for n in (1, 2))  # some, such as weights in bf16, are kept once
    return {name: two[name] + round((two[name] - one[name]) * (images - 2 * few) / few) for name in two}


def strides(config: Config) -> list[int]:
    """The penalties look at every so many-th image."""
    objective = config.objective
    return [round(1 / share) for share in (objective.latent_penalised, objective.image_penalised)]


def kept(game: GenerativeAutoencoder, config: Config, *, images: int) -> dict[str, int]:
    """`activations`, counted in a forward pass; what several keep counts for the first."""
    running, found = [""], dict.fromkeys(["", *dict(game.named_children())], 0)
    # By their addresses; what has one is held on to, lest another get the same.
    seen = {place.data_ptr(): place for place in map(Tensor.untyped_storage, (*game.parameters(), *game.buffers()))}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in seen:
            seen[place.data_ptr()] = place
            found[running[0]] += place.nbytes()
        return tensor

    def enter(name: str) -> None:
        running[0] = name

    hooks = []
    for name, network in game.named_children():
        hooks.append(network.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(network.register_forward_hook(lambda *_: enter("")))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(game, config, *drawn(game, config, images=images))
    for hook in hooks:
        hook.remove()
    return found


# --- a step


def drawn(game: GenerativeAutoencoder, config: Config, *, images: int) -> tuple[Tensor, Keys]:
    """Images of noise, and the keys of their draws."""
    data, device = config.data, game.moments.device
    shape = (images, data.channels, data.size, data.size)
    return torch.rand(shape, device=device) * 2 - 1, sample_keys(0, 0, images, device)


def forward(game: GenerativeAutoencoder, config: Config, images: Tensor, keys: Keys) -> Tensor:
    """The loss that a step goes backward from."""
    enabled = config.training.precision == "bf16"
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=enabled):
        return game(images, keys).loss


class Step(NamedTuple):
    """What a forward and backward pass took."""

    seconds: float
    peak: int  # bytes on the GPU, weights and gradients among them; 0 on a CPU, which does not tell


def step(game: GenerativeAutoencoder, config: Config, *, images: int) -> Step:
    """A forward and backward pass of so many images, the second one: the first prepares much."""
    seconds = 0.0
    for _ in range(2):
        batch = drawn(game, config, images=images)
        synchronize()
        began = time.perf_counter()
        forward(game, config, *batch).backward()
        synchronize()
        seconds = time.perf_counter() - began
        game.zero_grad()
    return Step(seconds, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
