"""DeepSpeed's ZeRO: each rank steps a flat part of each network's weights; in stage 3 it keeps no more than that."""

import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from jaxtyping import Float
from torch import Tensor

from aaae_dist import distributed
from aaae_dist.engine import Engine
from aaae_dist.errors import UserError
from aaae_dist.networks import Images
from aaae_dist.optimizer import STATES
from aaae_dist.pieces import Piece
from aaae_dist.randomness import Keys


def refuse_missing_deepspeed(setting: str) -> None:
    """Raise a UserError about the setting that asks for it if DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{setting}: DeepSpeed is not installed; pip install 'aaae_dist[deepspeed]'")


class Zero(Engine):
    """DeepSpeed's ZeRO, stages 1 and 2: each rank steps a flat part of each network, and all get the weights."""

    kinds = (DistributedType.DEEPSPEED,)
    divided = True

    @property
    def stage(self) -> str:
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")

    @property
    def name(self) -> str:
        return f"zero{self.stage}"

    def accelerate(self, **more: Any) -> Accelerator:
        if self.stage not in ("1", "2", "3"):
            raise UserError(f"zero_stage {self.stage}: must be 1, 2 or 3; {distributed.LAUNCH}")
        refuse_missing_deepspeed(f"zero_stage {self.stage}")
        import deepspeed.ops

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it speaks on stdout, and of nothing that matters here
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of what it calls
        group = InitProcessGroupKwargs(timeout=self.timeout)
        if self.on_cpu:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
            group = InitProcessGroupKwargs(timeout=self.timeout, backend="gloo")
        settings = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0,  # the engine clips, network by network; DeepSpeed's default is 1
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(self.stage), "sub_group_size": 10**12},  # a network is one group
            # Weights stay float32, also on their way between ranks, as in the other engines.
            "torch_autocast": {
                "enabled": self.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        return Accelerator(
            gradient_accumulation_plugin=self.accumulated(),
            mixed_precision="no",  # the settings above see to it, whatever the launcher says
            deepspeed_plugin=Plugin(hf_ds_config=settings),
            kwargs_handlers=[group],
            **more,
        )

    def came_up(self) -> bool:
        return str(getattr(self.model, "zero_optimization_stage", int)()) == self.stage

    def settle(self, images: Images, keys: Keys) -> None:
        """DeepSpeed's buckets stay as they are."""

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """As accelerate does it, which would also step at once after the last micro-batch."""
        self.model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.model.backward(loss)

    def gradients(self) -> list[list[Tensor]]:
        found = self.zero.averaged_gradients
        return [found[number] for number in range(len(found))]

    def move(self) -> None:
        self.model.step()

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer around ours."""
        return self.model.optimizer

    def alike(self) -> dict[str, Piece]:
        weights = self.game.named_parameters()
        alike = {name: Piece(self.shapes[name], 0, {"weight": weight.detach().view(-1)}) for name, weight in weights}
        return alike | {"moments": self.pieces()["moments"]}

    def kept(self) -> Sequence[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def span(self, weight: Any) -> tuple[int, dict[str, Tensor]]:
        if (place := weight._hp_mapping) is None:
            return 0, self.lying(0, 0, 0)
        there = place.hp_fragment_address
        return place.lp_fragment_address.start, self.lying(place.param_group_index, there.start, there.numel)

    def lying(self, group: int, offset: int, count: int) -> dict[str, Tensor]:
        """Values of a network's flat partition, by state."""
        flat = self.kept()[group]
        tensors = {"weight": flat.data, **{state: self.adam.state[flat][state] for state in STATES}}
        return {state: tensor.narrow(0, offset, count) for state, tensor in tensors.items()}

    def refresh(self) -> None:
        self.zero.update_lp_params()


class ZeroThree(Zero):
    """DeepSpeed's ZeRO, stage 3: weights too are divided, and lent to a layer while it runs."""

    compiles = False

    def alike(self) -> dict[str, Piece]:
        return {"moments": self.pieces()["moments"]}

    def kept(self) -> Sequence[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def span(self, weight: Any) -> tuple[int, dict[str, Tensor]]:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(weight)]
        size = weight.ds_tensor.numel()
        start = distributed.rank() * size
        count = max(0, min(size, weight.ds_numel - start))  # the last ranks' parts are padded
        return start, self.lying(group, offset, count)

    def refresh(self) -> None:
        """Write to the copies that DeepSpeed trains with, which its own setters leave stale, and lend out anew."""
        if lent := self.zero.persistent_parameters:  # small ones, which stay with every rank between two steps
            lent[0].partition(lent)
        for weight in self.game.parameters():
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(weight)]
            part = weight.ds_tensor  # type: ignore[attr-defined]
            part.data.copy_(self.kept()[group].data.narrow(0, offset, part.numel()))
        if lent:
            lent[0].all_gather(lent)


class Plugin(DeepSpeedPlugin):
    """Accelerate's, which is not to ask for `transformers`, and to take from the launcher nothing but the stage."""

    def set_deepspeed_weakref(self) -> None:
        """It would need `transformers`."""

    def _deepspeed_config_checks(self) -> None:
        """It would refuse a stage from the launcher beside settings from here."""
