"""Distributed training of the Adversarially Approximated Autoencoder (Xu, Keshmiri, Wang, arXiv 1902.05581)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aaae_dist.aaae import GenerativeAutoencoder


def load(url: str) -> "GenerativeAutoencoder":
    """An exported model (see `export.load`); torch is imported when it is called."""
    from aaae_dist.export import load as read

    return read(url)
