"""Which engine steps the networks: where weights, gradients and the optimizer's state lie. The loop need not know.

| engine | weights      | gradients    | optimizer state and averages |
|--------|--------------|--------------|------------------------------|
| single | here         | here         | here                         |
| ddp    | on each rank | on each rank | on each rank                 |
| zero1  | on each rank | on each rank | divided                      |
| zero2  | on each rank | divided      | divided                      |
| zero3  | divided      | divided      | divided                      |
| fsdp2  | divided      | divided      | divided                      |

The launcher chooses, `accelerate launch --config_file launch/zero2.yaml ...`, and accelerate tells by the environment.
Where it cannot do what was asked it does something else in silence (on a CPU, FSDP becomes DDP), so what came up is
checked.
"""

import os

from aaae_dist.distributed import LAUNCH
from aaae_dist.engine import Engine
from aaae_dist.errors import UserError
from aaae_dist.fsdp import Fsdp
from aaae_dist.zero import Zero, ZeroThree

OFFLOADED = "nothing is moved to the host here; leave it out, or take an engine that divides more among the ranks"
DEEPSPEEDS = "the engine chooses DeepSpeed's settings; leave it out"
# What accelerate's launcher can ask for beside the engine, and we would not do: the variable, and what to do instead.
NOT_OURS = {
    "ACCELERATE_DYNAMO_BACKEND": "compiled as a whole, the game has wrong losses; set training.compile instead",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "all ranks are of one group here; leave it out",
    "ACCELERATE_GRADIENT_CLIPPING": "set optimizer.clip instead, which holds for each network",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": DEEPSPEEDS,
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": OFFLOADED,
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": OFFLOADED,
    "FSDP_ACTIVATION_CHECKPOINTING": "set training.activation_checkpointing instead",
    "FSDP_OFFLOAD_PARAMS": OFFLOADED,
}
NOTHING = ("", "no", "none", "false")  # what they say where they ask for nothing

ENGINES: dict[str, type[Engine]] = {"single": Engine, "ddp": Engine}
ENGINES |= {"zero1": Zero, "zero2": Zero, "zero3": ZeroThree, "fsdp2": Fsdp}


def launched_name(ranks: int) -> str:
    """The name of that engine; where no launcher asked for one, of what is usual for so many ranks.

    Raises:
        UserError: it is none of ours.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        name = f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
        if name not in ENGINES:
            raise UserError(f"{name}: no engine of ours; {LAUNCH}")
        return name
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp" if ranks > 1 else "single"


def launched_engine() -> type[Engine]:
    """The engine that the launcher asked for.

    Raises:
        UserError: it asked for what no engine of ours does.
    """
    for name, remedy in NOT_OURS.items():
        if (value := os.environ.get(name, "")).lower() not in NOTHING:
            raise UserError(f"{name}={value}, an option of accelerate's launcher: {remedy}")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return ZeroThree if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else Zero
    return Fsdp if os.environ.get("ACCELERATE_USE_FSDP") == "true" else Engine
