"""One process, or DDP: every rank has all. What the other engines change of it is in rooms of their own."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from aaae_dist import distributed
from aaae_dist.aaae import GenerativeAutoencoder, Turn
from aaae_dist.errors import UserError
from aaae_dist.networks import Images
from aaae_dist.optimizer import STATES, Adam, local
from aaae_dist.pieces import Piece, share
from aaae_dist.randomness import Keys
from aaae_dist.stopwatch import Stopwatch


class Engine:
    """One process, or DDP: every rank has all."""

    kinds: tuple[DistributedType, ...] = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    divided = False  # whether every rank keeps another part of the optimizer's state
    compiles = True  # whether it works with networks that are compiled

    def __init__(self, *, precision: str, accumulation: int, micro: int, clip: float, patience: float) -> None:
        """Join the process group that the launcher prepared, if any.

        Args:
            precision: "no" or "bf16".
            accumulation, micro: the micro-batches of a step on one rank, and the images in one.
            clip: largest norm of the gradient of a network; 0: any.
            patience: seconds that a rank waits for the others in a collective.

        Raises:
            UserError: not that engine came up, or fewer ranks than were launched.
        """
        self.precision, self.accumulation, self.micro, self.clip = precision, accumulation, micro, clip
        self.on_cpu, self.timeout = not torch.cuda.is_available(), timedelta(seconds=patience)
        if self.on_cpu:
            distributed.keep_freed_memory()
            os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed, where accelerate imports it, guesses aloud on stdout
        try:
            self.accelerator = self.accelerate()
        except RuntimeError as error:
            if not distributed.lost_peer(error):
                raise
            place, what = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
            raise UserError(
                f"{place}: {distributed.launched_world()} ranks could not meet there ({what[:200]}); look at the "
                f"others' messages, the address and the network; training.patience is {patience:g} s"
            ) from None
        self.device = self.accelerator.device
        self.forwards = Stopwatch(self.device)
        if self.accelerator.distributed_type not in self.kinds:
            raise UserError(
                f"distributed_type {self.accelerator.distributed_type.value}: no engine of ours; {distributed.LAUNCH}"
            )
        if distributed.world() != distributed.launched_world():
            raise UserError(
                f"WORLD_SIZE={distributed.launched_world()}: the launcher announced as many ranks, but "
                f"{distributed.world()} joined; {distributed.LAUNCH}"
            )

    @property
    def name(self) -> str:
        return "ddp" if distributed.world() > 1 else "single"

    # --- what accelerate makes of it

    def accelerate(self, **more: Any) -> Accelerator:
        return Accelerator(
            cpu=self.on_cpu,
            mixed_precision=self.precision,
            gradient_accumulation_plugin=self.accumulated(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=self.timeout)],
            **more,
        )

    def accumulated(self) -> GradientAccumulationPlugin:
        """The micro-batches of a step; told as a number, they would give way to a variable of the launcher's."""
        return GradientAccumulationPlugin(num_steps=self.accumulation, sync_with_dataloader=False)

    def take(self, game: GenerativeAutoencoder, optimizer: Adam) -> None:
        """Prepare a game and its optimizer, which begins anew.

        Raises:
            UserError: accelerate made something else of them.
            ValueError: the game has a state that is neither a parameter nor the codes' moments, or parameters under
                two names, and so more than a checkpoint would hold.
        """
        self.shapes = {name: list(weight.shape) for name, weight in game.named_parameters()}
        self.shapes["moments"] = list(game.moments.shape)
        if others := game.state_dict().keys() ^ self.shapes.keys():
            raise ValueError(
                f"{min(others)}: would be in no checkpoint; networks have parameters, each under one name, no buffers"
            )
        self.adam = optimizer
        self.model, self.stepper = self.wrap(game.to(self.device))
        self.game: GenerativeAutoencoder = getattr(self.model, "module", self.model)
        if not self.came_up():
            raise UserError(
                f"{type(self.model).__name__}: {self.name} was asked for and did not come up; {distributed.LAUNCH}"
            )
        self.averaged_moments = self.game.moments.clone()
        self.adam.begin(self.kept())

    def wrap(self, game: GenerativeAutoencoder) -> tuple[Any, Any]:
        model, stepper = self.accelerator.prepare(game, self.adam)
        if isinstance(model, DistributedDataParallel):
            model.forward_sync_buffers = False  # spares a broadcast: the moments are equal on all ranks anyway
        return model, stepper

    def came_up(self) -> bool:
        return distributed.world() == 1 or isinstance(self.model, DistributedDataParallel)

    # --- a step

    def turn(self, images: Images, keys: Keys) -> Turn:
        """Forward and backward of one micro-batch; its loss counts as a part of the step's.

        The forward's time is taken: until the backward no rank waits for another, unless weights are divided.
        """
        with self.accelerator.accumulate(self.model):
            with self.accelerator.autocast(), self.forwards:
                turn: Turn = self.model(images, keys)
            self.backward(turn.loss)
        return turn

    def backward(self, loss: Float[Tensor, ""]) -> None:
        self.accelerator.backward(loss)

    def gradients(self) -> list[list[Tensor]]:
        """What this rank has of the gradient of every network, after the last micro-batch; changes there count."""
        groups = [[weight.grad for weight in group["params"]] for group in self.adam.param_groups]
        return [[local(gradient) for gradient in group if gradient is not None] for group in groups]

    def squared_norms(self) -> Float64[Tensor, " network"]:
        """What this rank adds to the squared norm of the gradient of every network; what all have, rank 0 adds.

        So all clip and judge by the same numbers, whatever their devices make of the last bits. In float64, so that
        engines do too, however they cut the gradients that are summed; but what is beyond float32, in which Adam
        squares gradients, is infinite.
        """
        norms = (torch._foreach_norm(gradient, 2.0, dtype=torch.float64) for gradient in self.gradients())
        squares = torch.stack([torch.stack(norm).square().sum() for norm in norms])
        squares = torch.where(squares > torch.finfo(torch.float32).max, math.inf, squares)
        return squares if self.divided or distributed.rank() == 0 else torch.zeros_like(squares)

    def step(self, norms: Sequence[float]) -> None:
        """Step all networks.

        Args:
            norms: of their gradients; what is longer than `clip` is cut to that.
        """
        for gradient, norm in zip(self.gradients(), norms, strict=True):
            if norm > self.clip > 0:
                torch._foreach_mul_(gradient, self.clip / norm)
        self.move()

    def skip(self) -> None:
        """Drop the gradients: nothing moves in this step."""
        self.adam.idle = True
        self.move()
        self.adam.idle = False

    def move(self) -> None:
        self.stepper.step()
        self.stepper.zero_grad()

    def settle(self, images: Images, keys: Keys) -> None:
        """One backward for nothing.

        After its first, DDP puts gradients into other buckets for good. More than two ranks sum in an order that
        depends on the bucket, so without this a run that was resumed would differ, in the last bits, from one that was
        not. And FSDP's first forward must be the whole game's, not that of one network.
        """
        self.accelerator.backward(self.model(images, keys).loss)
        self.stepper.zero_grad()

    # --- the state, wherever it lies

    def kept(self) -> Sequence[Tensor]:
        """What the optimizer steps."""
        return list(self.game.parameters())

    def pieces(self) -> dict[str, Piece]:
        """What this rank keeps, by the names of parameters; it changes with them, and they with it (see `refresh`)."""
        found = {}
        for name, weight in self.game.named_parameters():
            start, values = self.span(weight)
            if len(values["weight"]):
                found[name] = Piece(self.shapes[name], start, values)
        moments = {"weight": self.game.moments.view(-1), "average": self.averaged_moments.view(-1)}
        return found | {"moments": Piece(self.shapes["moments"], 0, moments)}

    def span(self, weight: Any) -> tuple[int, dict[str, Tensor]]:
        """What this rank keeps of a parameter: from which value on, and the values by state."""
        tensors = {"weight": weight, **{state: self.adam.state[weight][state] for state in STATES}}
        return 0, {state: local(tensor).view(-1) for state, tensor in tensors.items()}

    def alike(self) -> dict[str, Piece]:
        """What all ranks must have alike, bit by bit: of what is divided, the codes' moments."""
        pieces = self.pieces()
        return {"moments": pieces["moments"]} if self.divided else pieces

    def to_save(self) -> dict[str, Piece]:
        """The pieces that this rank is to save, so that together the ranks save everything once."""
        if not self.divided:
            return share(self.pieces(), rank=distributed.rank(), world=distributed.world())
        return {name: piece for name, piece in self.pieces().items() if name != "moments" or distributed.rank() == 0}

    def refresh(self) -> None:
        """Let the networks follow what was written to the pieces. All ranks must call it."""

    @contextmanager
    def averaged(self) -> Iterator[GenerativeAutoencoder]:
        """The networks, with the averages in the place of the weights. All ranks must enter, run and leave it alike."""
        self.swap()
        yield self.game
        self.swap()  # not after an exception: it ends the run, and the other ranks would have to take part

    def swap(self) -> None:
        for piece in self.pieces().values():
            weight, average = piece.values["weight"], piece.values["average"]
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self.refresh()
