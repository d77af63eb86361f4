"""aaae_dist: distributed training of the Adversarially Approximated Autoencoder."""
