"""What a rank keeps of a model's state, whatever the engine: runs of values of tensors, by the tensors' names."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class Piece(NamedTuple):
    """A run of a tensor's values, in row-major order, in each of its states.

    The states of a parameter are `weight`, `exp_avg`, `exp_avg_sq` (Adam's moments) and `average`; of the codes'
    moments `weight` and `average`.
    """

    shape: list[int]  # of the whole tensor
    start: int  # number of the first value in the whole tensor
    values: dict[str, Float[Tensor, " run"]]

    @property
    def stop(self) -> int:
        """Number of the value after the last."""
        return self.start + len(next(iter(self.values.values())))

    def part(self, start: int, stop: int) -> "Piece":
        """From value number `start` to before number `stop`, both within it."""
        values = {state: run[start - self.start : stop - self.start] for state, run in self.values.items()}
        return Piece(self.shape, start, values)

    def overlap(self, start: int, stop: int) -> "Piece | None":
        """What it has of the values from number `start` to before number `stop`, if any."""
        start, stop = max(start, self.start), min(stop, self.stop)
        return self.part(start, stop) if start < stop else None


Pieces = Mapping[str, Piece]  # by the name of the tensor


def whole(module: nn.Module, state: str) -> dict[str, Piece]:
    """A module's tensors, as one of their states."""
    return {name: Piece(list(value.shape), 0, {state: value.view(-1)}) for name, value in module.state_dict().items()}


def cut(pieces: Pieces, *, most: int) -> Iterator[dict[str, Piece]]:
    """The same in portions of at most so many values, states counted apart; a piece that is longer is divided."""
    portion: dict[str, Piece] = {}
    room = most
    for name, piece in pieces.items():
        start, states = piece.start, len(piece.values)
        while start < piece.stop:
            if room < states:
                yield portion
                portion, room = {}, most
            stop = min(piece.stop, start + room // states)
            portion[name] = piece.part(start, stop)
            room -= states * (stop - start)
            start = stop
    if portion:
        yield portion


def share(pieces: Pieces, *, rank: int, world: int) -> dict[str, Piece]:
    """The share of a rank in what all ranks have: with all values in a row, the tensors that begin in its part."""
    total, before, chosen = sum(piece.stop - piece.start for piece in pieces.values()), 0, {}
    for name, piece in pieces.items():
        if before * world // total == rank:
            chosen[name] = piece
        before += piece.stop - piece.start
    return chosen
