"""The one-pass step in plain torch: the least that computes what a step of the trainer computes.

The game's forward, backward and Adam; the codes' moments and the averages that are judged. No accelerate, no norms, no
figures for the log, no averages of critics, and noise from torch's own generator. For the usual game alone:
relativistic pairing, no clipping, no micro-batches, no augmentation.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from aaae_dist.aaae import AAAE, CODE_DIRECTIONS, IMAGE_DIRECTIONS, NOISE
from aaae_dist.config import Config
from aaae_dist.data import Pixels, to_float
from aaae_dist.networks import Codes, Noise
from aaae_dist.optimizer import EPSILON
from aaae_dist.randomness import Keys, gaussian
from aaae_dist.schedule import averaging_rate, learning_rate


class Loop:
    """What any training loop of the game has: networks, an Adam for each, rates, the codes' moments and averages."""

    def __init__(self, config: Config, device: torch.device | str) -> None:
        """The same weights as `Trainer` begins with."""
        torch.manual_seed(config.training.seed)
        self.config, self.images = config, 0
        self.game = AAAE.build(config).to(device)
        self.averages = self.game.average()
        weights = dict(self.game.named_parameters())
        self.behind: list[Tensor] = list(self.averages.parameters())
        self.ahead: list[Tensor] = [weights[name] for name, _ in self.averages.named_parameters()]
        self.optimizers = {
            name: torch.optim.Adam(
                network.parameters(), betas=getattr(config.optimizer, name).betas, eps=EPSILON, fused=True
            )
            for name, network in self.game.named_children()
        }

    def noise(self) -> Noise:
        return torch.randn(self.config.training.batch_size, self.game.noise_size, device=self.game.moments.device)

    def move(self, *names: str) -> None:
        """Step some networks by their gradients, at the rates of this moment, and forget these."""
        share = learning_rate(self.config.training, self.images)
        for name in names:
            self.optimizers[name].param_groups[0]["lr"] = share * getattr(self.config.optimizer, name).lr
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    @torch.no_grad()
    def finish(self, codes: Codes) -> None:
        """End a step: take the codes into their moments, and let the averages follow."""
        self.game.observe(codes.mean(0), codes.square().mean(0), images=len(codes))
        self.images += len(codes)
        rate = averaging_rate(self.config.training, self.images)
        torch._foreach_lerp_(self.behind, self.ahead, rate)
        self.averages.moments.lerp_(self.game.moments, rate)


class Draws(NamedTuple):
    """The random numbers of a step: noise, and the penalties' directions for the codes and images they look at."""

    noise: Noise
    codes: Float[Tensor, "penalised code"]
    images: Float[Tensor, "penalised channels height width"]


def hashed(config: Config, keys: Keys) -> Draws:
    """The same numbers as `AAAE.forward` draws for these samples."""

    def directions(shape: tuple[int, ...], share: float, stream: int) -> Tensor:
        drawn = gaussian(keys[:: round(1 / share)], (2, *shape), stream=stream, dtype=torch.float32)
        return drawn.transpose(0, 1).flatten(0, 1)

    data, model, objective = config.data, config.model, config.objective
    return Draws(
        gaussian(keys, (model.noise_size,), stream=NOISE, dtype=torch.float32),
        directions((model.code_size,), objective.latent_penalised, CODE_DIRECTIONS),
        directions((data.channels, data.size, data.size), objective.image_penalised, IMAGE_DIRECTIONS),
    )


def play(
    critic: nn.Module,
    real: Tensor,
    fake: Tensor,
    directions: Tensor,
    *,
    weight: float,
    penalty: float,
    penalised: float,
    step: float,
) -> Float[Tensor, ""]:
    """The critic's loss, whose backward brings `fake` the gradient of its opponent's loss, times `weight`."""
    count, every, fake = len(real), round(1 / penalised), fake.view_as(fake)
    both, jumps = torch.cat([real[::every], fake[::every]]).detach(), step * directions
    logits = critic(torch.cat([real, fake, both + jumps, both - jumps]))
    real_logits, fake_logits, plus, minus = logits.split([count, count, len(both), len(both)])
    margin = fake_logits - real_logits
    ratio = -weight * torch.exp(-margin.detach().clamp(-80, 80)).view(-1, *[1] * (fake.dim() - 1))
    fake.register_hook(lambda gradient: gradient * ratio)
    return softplus(margin).mean() + penalty * ((plus - minus) / (2 * step)).square().mean()


class Bare(Loop):
    """One forward and one backward for all five networks."""

    def drawn(self) -> Draws:
        """Fresh numbers of torch's generator."""
        data, objective, device = self.config.data, self.config.objective, self.game.moments.device

        def directions(shape: tuple[int, ...], share: float) -> Tensor:
            looked_at = len(range(0, self.config.training.batch_size, round(1 / share)))
            return torch.randn(2 * looked_at, *shape, device=device)

        return Draws(
            self.noise(),
            directions((self.config.model.code_size,), objective.latent_penalised),
            directions((data.channels, data.size, data.size), objective.image_penalised),
        )

    def step(self, pixels: Pixels, draws: Draws) -> Float[Tensor, ""]:
        """One step on a batch; the loss before it."""
        game, objective = self.game, self.config.objective
        images = to_float(pixels.to(game.moments.device))
        mean, deviation = game.standard()
        codes, fake = game.encoder(images), game.latent_generator(draws.noise)
        reconstructions, samples = game.decoder(torch.cat([codes, mean + deviation * fake])).chunk(2)
        loss = objective.reconstruction_weight * mse_loss(reconstructions, images)
        loss = loss + play(
            game.latent_critic,
            (codes.detach() - mean) / deviation,
            fake,
            draws.codes,
            weight=1.0,
            penalty=objective.latent_penalty,
            penalised=objective.latent_penalised,
            step=objective.latent_step,
        )
        loss = loss + play(
            game.image_critic,
            images,
            samples,
            draws.images,
            weight=objective.image_weight,
            penalty=objective.image_penalty,
            penalised=objective.image_penalised,
            step=objective.image_step,
        )
        loss.backward()
        self.move(*self.optimizers)
        self.finish(codes.detach())
        return loss.detach()
