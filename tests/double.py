"""The command `aaae` in float64: networks are made in torch's default precision."""

import torch

from aaae_dist.cli import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    main()
