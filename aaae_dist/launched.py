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

from aaae_dist.engine import Engine
from aaae_dist.fsdp import Fsdp
from aaae_dist.zero import Zero, ZeroThree


def launched_engine() -> type[Engine]:
    """The engine that the launcher asked for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return ZeroThree if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else Zero
    return Fsdp if os.environ.get("ACCELERATE_USE_FSDP") == "true" else Engine
