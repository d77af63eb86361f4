"""The textbook's loop for the same game: the critics first, then autoencoder and generator, each with its own forwards.

Of what makes such a loop quick it has what costs no line: nothing is recorded that no gradient needs, the decoder runs
on codes and generated codes together, and critics pass gradients on without gathering their own.
"""

import torch
from bare import Loop
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from aaae_dist.config import Config
from aaae_dist.data import Pixels, to_float
from aaae_dist.networks import Images

CRITICS = ("latent_critic", "image_critic")
OPPONENTS = ("encoder", "decoder", "latent_generator")


def critic_loss(
    critic: nn.Module, real: Tensor, fake: Tensor, *, penalty: float, penalised: float, shared: bool
) -> Float[Tensor, ""]:
    """softplus(D(fake) - D(real)) + penalty / 2 (R1 + R2), by double backward (Mescheder et al. 2018).

    Args:
        penalised: the share of the pairs that the penalty looks at.
        shared: whether a penalty on all pairs uses the critic's forward for the loss, and has none of its own.
    """
    every = round(1 / penalised)
    shared = shared and every == 1
    both = torch.cat([real, fake]).requires_grad_(shared)
    logits = critic(both)
    seen = both if shared else torch.cat([real[::every], fake[::every]]).requires_grad_()
    (slopes,) = torch.autograd.grad((logits if shared else critic(seen)).sum(), seen, create_graph=True)
    real_logits, fake_logits = logits.chunk(2)
    return softplus(fake_logits - real_logits).mean() + penalty * slopes.square().flatten(1).sum(1).mean()


def opponent_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Float[Tensor, ""]:
    with torch.no_grad():
        real_logits = critic(real)
    return softplus(real_logits - critic(fake)).mean()


class Alternating(Loop):
    """Two phases a step, on one batch and with fresh noise in each."""

    def __init__(self, config: Config, device: torch.device | str, *, shared: bool = True) -> None:
        """The same weights as `Trainer` begins with; `shared` is for `critic_loss`."""
        super().__init__(config, device)
        self.shared = shared

    def step(self, pixels: Pixels) -> Float[Tensor, ""]:
        """One step on a batch; the mean squared error before it."""
        images = to_float(pixels.to(self.game.moments.device))
        self.move_critics(images)
        return self.move_opponents(images)

    def move_critics(self, images: Images) -> None:
        game, objective = self.game, self.config.objective
        mean, deviation = game.standard()
        with torch.no_grad():
            codes, fake = game.encoder(images), game.latent_generator(self.noise())
            samples = game.decoder(mean + deviation * fake)
        loss = critic_loss(
            game.latent_critic,
            (codes - mean) / deviation,
            fake,
            penalty=objective.latent_penalty,
            penalised=objective.latent_penalised,
            shared=self.shared,
        ) + critic_loss(
            game.image_critic,
            images,
            samples,
            penalty=objective.image_penalty,
            penalised=objective.image_penalised,
            shared=self.shared,
        )
        loss.backward(inputs=[weight for name in CRITICS for weight in getattr(game, name).parameters()])
        self.move(*CRITICS)

    def move_opponents(self, images: Images) -> Float[Tensor, ""]:
        game, objective = self.game, self.config.objective
        mean, deviation = game.standard()
        codes, fake = game.encoder(images), game.latent_generator(self.noise())
        reconstructions, samples = game.decoder(torch.cat([codes, mean + deviation * fake])).chunk(2)
        error = mse_loss(reconstructions, images)
        loss = (
            objective.reconstruction_weight * error
            + opponent_loss(game.latent_critic, (codes.detach() - mean) / deviation, fake)
            + objective.image_weight * opponent_loss(game.image_critic, images, samples)
        )
        loss.backward(inputs=[weight for name in OPPONENTS for weight in getattr(game, name).parameters()])
        self.move(*OPPONENTS)
        self.finish(codes.detach())
        return error.detach()
