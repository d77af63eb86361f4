"""`python -m aaae_dist` and `accelerate launch -m aaae_dist`: the command `aaae`."""

from aaae_dist.cli import main

main()
