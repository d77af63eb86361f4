"""The command `aaae` where every rank has a node to itself, n0, n1 and so on, and the forwards of rank 1 are slow."""

import os
import platform
import time

from aaae_dist.aaae import AAAE
from aaae_dist.cli import main

SECONDS = 0.2  # that they take longer

if __name__ == "__main__":
    number, forward = os.environ["RANK"], AAAE.forward
    os.environ["LOCAL_RANK"], platform.node = "0", lambda: f"n{number}"
    if number == "1":
        AAAE.forward = lambda *given: (time.sleep(SECONDS), forward(*given))[1]
    main()
