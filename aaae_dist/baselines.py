"""Other autoencoders behind the same interface as AAAE, so that the same loop trains them all."""

from torch import nn

from aaae_dist.aaae import AAAE, GenerativeAutoencoder, Turn
from aaae_dist.config import Config, Objective
from aaae_dist.losses import reconstruction_error
from aaae_dist.networks import ARCHITECTURES, Images
from aaae_dist.randomness import Keys


class Autoencoder(GenerativeAutoencoder):
    """A plain deterministic autoencoder: reconstruction alone (Hinton, Salakhutdinov 2006).

    It samples from a Gaussian with the codes' mean and variances: the weakest density that can be fitted to free codes.
    """

    objective: Objective

    @classmethod
    def build(cls, config: Config) -> "Autoencoder":
        """Encoder and decoder of the same size as AAAE's; noise is as wide as the codes."""
        shape, code_size = (config.data.channels, config.data.size, config.model.width), config.model.code_size
        architecture = ARCHITECTURES[config.model.architecture]
        parts = architecture.encoder(*shape, code_size), architecture.decoder(*shape, code_size), nn.Identity()
        game = cls(*parts, code_size=code_size, noise_size=code_size)
        game.objective = config.objective
        return game

    def forward(self, images: Images, keys: Keys) -> Turn:
        del keys  # nothing is drawn
        codes = self.encoder(images)
        reconstruction = reconstruction_error(self.decoder(codes), images)
        return Turn(
            self.objective.reconstruction_weight * reconstruction,
            {"reconstruction/mse": reconstruction.detach()},
            codes.detach(),
        )


METHODS = {"aaae": AAAE, "autoencoder": Autoencoder}
