"""How networks are run, which changes their speed and memory and, but for rounding, none of their values."""

import os
import shutil

import torch
from torch import Tensor, nn

from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.config import Training
from aaae_dist.engine import Engine
from aaae_dist.errors import UserError
from aaae_dist.networks import Layers


def settle_execution(game: GenerativeAutoencoder, training: Training, *, engine: Engine) -> None:
    """Have each network compiled, its convolutions in channels-last, its activations made again, as the settings say.

    Each by itself: compiled as a whole, the game has silently wrong losses under FSDP2 and ZeRO-3, which put a
    network's weights in place in hooks around it.

    Raises:
        UserError: there is no compiler, or the engine cannot do with it.
    """
    refuse_compiling(training, engine=engine.name, compiles=engine.compiles)
    arrange(game, training)
    if training.compile:
        for network in game.children():
            network.compile()


def refuse_compiling(training: Training, *, engine: str, compiles: bool) -> None:
    """Raise a UserError if networks are to be compiled, and there is no compiler or the engine cannot do with it."""
    if training.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("training.compile true: there is no C++ compiler on the PATH; install g++, or set it to false")
    if training.compile and not compiles:
        raise UserError(
            f"training.compile true: {engine} lends a network's weights out layer by layer, which cannot be "
            "compiled; set it to false, or start with launch/zero2.yaml or launch/fsdp2.yaml"
        )


def arrange(game: GenerativeAutoencoder, training: Training) -> None:
    """Have convolutions in channels-last and activations made again, as the settings say."""
    for module in game.modules():
        if isinstance(module, Layers):
            module.recomputed = training.activation_checkpointing
        if training.channels_last and isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_pre_hook(channels_last)


def channels_last(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The images or features before a convolution, in that order; what follows keeps it.

    Weights stay as they are, so that they can be cut into the pieces of any engine.
    """
    del layer
    return (inputs[0].contiguous(memory_format=torch.channels_last),)
