"""The optimizer: Adam that keeps an average behind every weight.

Only the optimizer has, in every engine, the float32 weights as they are kept, be these whole tensors, this rank's rows
of them, or a flat partition of a network.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# Some gradients of a paired critic are zero but for rounding, such as that of a bias behind which all samples are on
# the same side. With the usual 1e-8 Adam would make full steps of that noise, and two ranks would drift from one
# process by 2 % in 20 steps; with this they agree to 3e-6, and digits come out no worse.
EPSILON = 1e-5

STATES = ("exp_avg", "exp_avg_sq", "average")


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, without history."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Adam(torch.optim.Adam):
    """Adam (Kingma, Ba 2015) with a group of weights for each network.

    A group holds, beside what Adam's do, the network's `name`, and the `rate` at which averages follow the weights: 0
    not at all, 1 at once.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        """No rate is set yet."""
        super().__init__([{"lr": 0.0, "rate": 1.0} | group for group in groups], foreach=True, eps=EPSILON)
        self.idle = False  # whether a step moves nothing

    def begin(self, weights: Iterable[Tensor]) -> None:
        """Make the state of these weights, as it is before the first step."""
        for weight in weights:
            self.state[weight] = {
                "step": torch.tensor(0.0),  # on the host, where reading it costs nothing
                "exp_avg": torch.zeros_like(weight, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(weight, memory_format=torch.preserve_format),
                "average": weight.detach().clone(memory_format=torch.preserve_format),
            }

    def count(self, steps: int) -> None:
        """Go on after so many steps."""
        for state in self.state.values():
            state["step"].fill_(steps)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every network that has gradients: DeepSpeed gives them to one after the other."""
        del closure
        if self.idle:
            return
        active = [group for group in self.param_groups if any(weight.grad is not None for weight in group["params"])]
        super().step()
        for group in active:
            averages = [local(self.state[weight]["average"]) for weight in group["params"]]
            torch._foreach_lerp_(averages, [local(weight) for weight in group["params"]], group["rate"])
