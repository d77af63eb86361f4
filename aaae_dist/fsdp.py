"""PyTorch's fully sharded data parallel, version 2: each rank keeps some rows of every tensor, as a DTensor."""

import os
import warnings
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from aaae_dist import distributed
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.engine import Engine
from aaae_dist.errors import UserError


class Fsdp(Engine):
    """PyTorch's fully sharded data parallel, version 2: each rank keeps some rows of every tensor, as a DTensor."""

    kinds = (DistributedType.FSDP,)
    divided = True
    name = "fsdp2"  # type: ignore[assignment]

    def accelerate(self, **more: Any) -> Accelerator:
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError(
                f"FSDP_VERSION={os.environ.get('FSDP_VERSION')}: only version 2 is ours; {distributed.LAUNCH}"
            )
        # It warns of a critic's logits, a view of what its last layer returns. None of ours changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
        if self.on_cpu:  # else accelerate takes MULTI_CPU for an answer, and forgets FSDP
            PartialState(cpu=True, timeout=self.timeout).distributed_type = DistributedType.MULTI_GPU
        self.plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",  # "by class": by size, it would tear the critics' heads off
            cpu_ram_efficient_loading=False,
            mixed_precision_policy=MixedPrecisionPolicy(),  # autocast sees to it, as in the other engines
        )
        return super().accelerate(fsdp_plugin=self.plugin, **more)

    def wrap(self, game: GenerativeAutoencoder) -> tuple[Any, Any]:
        networks = (getattr(game, group["name"]) for group in self.adam.param_groups)
        self.plugin.transformer_cls_names_to_wrap = sorted({type(network).__name__ for network in networks})
        return super().wrap(game)

    def came_up(self) -> bool:
        return all(isinstance(weight, DTensor) for weight in self.game.parameters())

    def span(self, weight: Any) -> tuple[int, dict[str, Tensor]]:
        """Rows, dealt out as torch.chunk does it."""
        most = -(-len(weight) // distributed.world())
        return most * distributed.rank() * weight.shape[1:].numel(), super().span(weight)[1]
