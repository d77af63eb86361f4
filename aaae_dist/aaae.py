"""AAAE as one game in one pass: five networks, one forward, one backward.

Each network runs once per step, and stop-gradients and hooks see to it that each receives exactly the gradient of its
own loss. The mathematics is in `play`; who plays whom is in `AAAE.forward`.
"""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aaae_dist import networks
from aaae_dist.config import Config, Objective
from aaae_dist.losses import PAIRINGS, gradient_penalty, reconstruction_error
from aaae_dist.networks import Codes, Images, Noise
from aaae_dist.randomness import Keys, gaussian

MOMENTS_HALF_LIFE = 2_200  # images; the codes drift slowly, and a batch of 64 then weighs 2 %
NOISE, CODE_DIRECTIONS, IMAGE_DIRECTIONS = range(3)  # streams of randomness


class Turn(NamedTuple):
    """What one forward says: the loss to go backward from, scalars for the log, and the codes for their statistics."""

    loss: Float[Tensor, ""]
    report: dict[str, Float[Tensor, ""]]
    codes: Codes


class GenerativeAutoencoder(nn.Module):
    """What remains when the game is over: it encodes, decodes and samples.

    The encoder's codes are free: nothing bounds or normalises them. The latent generator speaks in standardised units,
    and the running moments of the codes turn these into codes.
    """

    OPPONENTS: tuple[str, ...] = ()  # networks that only the game needs

    moments: Float[Tensor, "3 code"]  # of the codes, decayed: total weight, sum, sum of squares

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, generator: nn.Module, *, code_size: int, noise_size: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_generator = generator
        self.noise_size = noise_size
        self.register_buffer("moments", torch.zeros(3, code_size))

    def standard(self) -> tuple[Float[Tensor, " code"], Float[Tensor, " code"]]:
        """Mean and standard deviation of the codes so far (0 and 1 before the first)."""
        weight, total, squares = self.moments
        known = weight > 0
        weight = weight.clamp_min(torch.finfo(weight.dtype).tiny)
        mean = total / weight
        deviation = (squares / weight - mean.square()).clamp_min(1e-4).sqrt()
        return torch.where(known, mean, 0.0), torch.where(known, deviation, 1.0)

    @torch.no_grad()
    def observe(self, mean: Float[Tensor, " code"], mean_square: Float[Tensor, " code"], *, images: int) -> None:
        """Take the first two moments of the last `images` images' codes, over all ranks, into the running ones."""
        rate = 1 - 0.5 ** (images / MOMENTS_HALF_LIFE)
        self.moments.lerp_(torch.stack([torch.ones_like(mean), mean, mean_square]).to(self.moments), rate)

    def encode(self, images: Images) -> Codes:
        return self.encoder(images)

    def decode(self, codes: Codes) -> Images:
        """Images, not clamped: values may leave [-1, 1] a little."""
        return self.decoder(codes)

    def generate(self, noise: Noise) -> Codes:
        """Codes m + s g(n), distributed as the encoder's own if the game went well."""
        mean, deviation = self.standard()
        return mean + deviation * self.latent_generator(noise)

    def average(self) -> "GenerativeAutoencoder":
        """A frozen copy without opponents: it samples and reconstructs."""
        twin = copy.deepcopy(self)
        for name in self.OPPONENTS:
            delattr(twin, name)
        return twin.requires_grad_(False).eval()


def play(
    critic: nn.Module,
    real: Float[Tensor, "batch *shape"],
    fake: Float[Tensor, "batch *shape"],
    keys: Keys,
    *,
    stream: int,
    pairing: str,
    weight: float,
    penalty: float,
    penalised: float,
    step: float,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """One adversarial pairing: the critic's loss, whose backward also serves its opponent, the maker of `fake`.

    The critic minimises pairing.critic + penalty / 2 (R1 + R2); the opponent minimises weight * pairing.opponent. A
    critic judges each sample by itself, so what backward brings to a fake sample is the critic's logit's gradient times
    the derivative of the critic's loss. Multiplied by the ratio of the two derivatives it is the opponent's gradient;
    the critic's parameters, behind the hook, never see the ratio.

    Args:
        real: must carry no gradient.
        keys, stream: of the samples and of the draws, for the penalties' directions.
        penalised: the share of the pairs that the penalties look at, every (1 / penalised)-th. They work on detached
            copies and reach only the critic.
        step: of the finite differences.

    Returns:
        The loss to go backward from, and detached scalars for the log.
    """
    count, every = len(real), round(1 / penalised)
    fake = fake.view_as(fake)  # an alias, so that only this critic's gradient passes the hook
    both = torch.cat([real[::every], fake[::every]]).detach()
    jumps = step * gaussian(keys[::every], (2, *real.shape[1:]), stream=stream, dtype=both.dtype).transpose(
        0, 1
    ).flatten(0, 1)
    logits = critic(torch.cat([real, fake, both + jumps, both - jumps]))
    real_logits, fake_logits, plus, minus = logits.split([count, count, len(both), len(both)])

    sides = PAIRINGS[pairing]
    ratio = weight * sides.ratio(real_logits.detach(), fake_logits.detach()).view(-1, *[1] * (fake.dim() - 1))
    if fake.requires_grad:
        fake.register_hook(lambda gradient: (gradient * ratio).to(gradient.dtype))
    critic_loss = sides.critic(real_logits, fake_logits).mean()
    slope = gradient_penalty(plus, minus, step=step)

    margin = (real_logits - fake_logits).detach()
    report = {
        "loss": critic_loss.detach(),
        "opponent_loss": sides.opponent(real_logits, fake_logits).mean().detach(),
        "squared_slope": slope.detach(),
        "margin": margin.mean(),
        "accuracy": (margin > 0).to(margin.dtype).mean(),
    }
    return critic_loss + penalty * slope, report


@torch.no_grad()
def refuse_coupled(name: str, critic: nn.Module, example: Float[Tensor, "4 ..."]) -> None:
    """Refuse a critic whose verdict on a sample depends on the others: its opponent's gradient would be silently wrong.

    Raises:
        ValueError: the critic uses batch statistics, such as BatchNorm's or a minibatch standard deviation.
    """
    if example.is_meta:  # networks that are only to be measured have no verdicts
        return
    state = copy.deepcopy(critic.state_dict())
    together, apart = critic(example), torch.cat([critic(example[:2]), critic(example[2:])])
    critic.load_state_dict(state)
    if not torch.allclose(together, apart, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"{name} judges a sample differently in another batch: the one-pass game needs critics without batch "
            "statistics (no BatchNorm, no minibatch deviation); use no norm or one per sample"
        )


class AAAE(GenerativeAutoencoder):
    """The game of five networks (Xu, Keshmiri, Wang 2019, as its abstract states it).

    | network          | learns from |
    |------------------|-------------|
    | encoder          | reconstruction only |
    | decoder          | reconstruction + image_weight * image adversary |
    | latent_generator | latent adversary (+ image_weight * image adversary, through the decoder) |
    | latent_critic    | standardised codes against g(noise) |
    | image_critic     | images against decoded g(noise) |
    """

    OPPONENTS = ("latent_critic", "image_critic")

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        generator: nn.Module,
        latent_critic: nn.Module,
        image_critic: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        code_size: int,
        noise_size: int,
        objective: Objective,
    ) -> None:
        super().__init__(encoder, decoder, generator, code_size=code_size, noise_size=noise_size)
        self.latent_critic = latent_critic
        self.image_critic = image_critic
        self.objective = objective
        keys = torch.arange(4)
        dtype = next(latent_critic.parameters()).dtype
        refuse_coupled(
            "latent_critic", latent_critic, gaussian(keys, (code_size,), stream=CODE_DIRECTIONS, dtype=dtype)
        )
        refuse_coupled("image_critic", image_critic, gaussian(keys, image_shape, stream=IMAGE_DIRECTIONS, dtype=dtype))

    @classmethod
    def build(cls, config: Config) -> "AAAE":
        """Fresh networks; their weights come from torch's global generator."""
        model, shape = config.model, (config.data.channels, config.data.size, config.model.width)
        architecture, latent = (
            networks.ARCHITECTURES[model.architecture],
            {"width": model.latent_width, "depth": model.latent_depth},
        )
        return cls(
            architecture.encoder(*shape, model.code_size),
            architecture.decoder(*shape, model.code_size),
            networks.latent_generator(model.noise_size, model.code_size, **latent),
            networks.latent_critic(model.code_size, **latent),
            architecture.critic(*shape),
            image_shape=(config.data.channels, config.data.size, config.data.size),
            code_size=model.code_size,
            noise_size=model.noise_size,
            objective=config.objective,
        )

    def forward(self, images: Images, keys: Keys) -> Turn:
        """Every loss of one (micro-)batch.

        Args:
            images: values in [-1, 1].
            keys: of the samples, from which their noise and the penalties' directions are drawn.
        """
        objective = self.objective
        noise = gaussian(keys, (self.noise_size,), stream=NOISE, dtype=images.dtype)
        mean, deviation = self.standard()  # of the steps before this one

        # Encoder and decoder learn to reconstruct; the decoder runs once, on codes and generated codes together.
        codes, fake = self.encoder(images), self.latent_generator(noise)
        fake_codes = mean + deviation * (fake if objective.image_reaches_latent else fake.detach())
        reconstructions, samples = self.decoder(torch.cat([codes, fake_codes])).chunk(2)
        reconstruction = reconstruction_error(reconstructions, images)

        # The latent game, in standardised units: the generator comes to the codes, the codes do not move.
        latent_game, latent_report = play(
            self.latent_critic,
            (codes.detach() - mean) / deviation,
            fake,
            keys,
            stream=CODE_DIRECTIONS,
            pairing=objective.pairing,
            weight=1.0,
            penalty=objective.latent_penalty,
            penalised=objective.latent_penalised,
            step=objective.latent_step,
        )

        # The image game closes the gap that a pixel loss leaves.
        image_game, image_report = play(
            self.image_critic,
            images,
            samples,
            keys,
            stream=IMAGE_DIRECTIONS,
            pairing=objective.pairing,
            weight=objective.image_weight,
            penalty=objective.image_penalty,
            penalised=objective.image_penalised,
            step=objective.image_step,
        )

        report = {"reconstruction/mse": reconstruction.detach()}
        report |= {f"latent_critic/{name}": value for name, value in latent_report.items()}
        report |= {f"image_critic/{name}": value for name, value in image_report.items()}
        return Turn(objective.reconstruction_weight * reconstruction + latent_game + image_game, report, codes.detach())
