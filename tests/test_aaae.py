"""The game against its textbook: every network's gradient, written out by hand with everything else frozen."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss, softplus

from aaae_dist.aaae import AAAE, CODE_DIRECTIONS, IMAGE_DIRECTIONS, NOISE, play
from aaae_dist.config import Config
from aaae_dist.losses import PAIRINGS
from aaae_dist.networks import Critic
from aaae_dist.randomness import gaussian, sample_keys

BATCH, CODE = 8, 5


def config(*, architecture="dcgan", **objective) -> Config:
    return Config.model_validate(
        {
            "data": {"url": "x", "channels": 1, "size": 8},
            "model": {
                "architecture": architecture,
                "width": 6,
                "code_size": CODE,
                "noise_size": CODE,
                "latent_width": 12,
                "latent_depth": 2,
            },
            "objective": {"image_weight": 0.7, **objective},
            "training": {"run": "x", "images": 1, "batch_size": 1},
        }
    )


@pytest.fixture
def doubles():
    """float64 as torch's default, within a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fresh(settings: Config) -> tuple[AAAE, torch.Tensor, torch.Tensor]:
    """A game with moments of some earlier codes, images, keys."""
    torch.manual_seed(0)
    game, images, keys = AAAE.build(settings), torch.rand(BATCH, 1, 8, 8) * 2 - 1, sample_keys(1, 0, BATCH)
    mean = torch.randn(CODE)
    game.observe(mean, mean.square() + 1 + torch.rand(CODE) * 9, images=500)
    return game, images, keys


def textbook(game: AAAE, images, keys) -> dict[str, torch.Tensor]:
    """The loss of each network by itself, from the formulas of the paper's plot; penalties by differences."""
    o, mean = game.objective, game.moments[1] / game.moments[0]
    deviation = (game.moments[2] / game.moments[0] - mean**2).sqrt()
    noise = gaussian(keys, (CODE,), stream=NOISE, dtype=images.dtype)
    opponent = {
        "relativistic": lambda real, fake: softplus(-(fake - real)),
        "logistic": lambda real, fake: softplus(-fake),
    }[o.pairing]
    own = {
        "relativistic": lambda real, fake: softplus(fake - real),
        "logistic": lambda real, fake: softplus(fake) + softplus(-real),
    }[o.pairing]

    codes, fake = game.encoder(images), game.latent_generator(noise)
    standard = ((codes - mean) / deviation).detach()
    rec = o.reconstruction_weight * mse_loss(game.decoder(codes), images)
    samples = game.decoder(mean + deviation * fake)
    image_opponent = o.image_weight * opponent(game.image_critic(images), game.image_critic(samples)).mean()
    latent_opponent = opponent(game.latent_critic(standard), game.latent_critic(fake)).mean()

    def critic_loss(critic, real, made, *, stream, gamma, share, step):
        every = round(1 / share)
        directions = gaussian(keys[::every], (2, *real.shape[1:]), stream=stream, dtype=real.dtype)
        slopes = [
            (critic(x[::every] + step * e) - critic(x[::every] - step * e)) / (2 * step)
            for x, e in ((real, directions[:, 0]), (made.detach(), directions[:, 1]))
        ]
        r1, r2 = (slope.square().mean() for slope in slopes)
        return own(critic(real), critic(made.detach())).mean() + gamma / 2 * (r1 + r2)

    return {
        "encoder": rec,
        "decoder": rec + image_opponent,
        "latent_generator": latent_opponent + (image_opponent if o.image_reaches_latent else 0),
        "latent_critic": critic_loss(
            game.latent_critic,
            standard,
            fake,
            stream=CODE_DIRECTIONS,
            gamma=o.latent_penalty,
            share=o.latent_penalised,
            step=o.latent_step,
        ),
        "image_critic": critic_loss(
            game.image_critic,
            images,
            samples,
            stream=IMAGE_DIRECTIONS,
            gamma=o.image_penalty,
            share=o.image_penalised,
            step=o.image_step,
        ),
    }


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("architecture", ["dcgan", "mlp"])
@pytest.mark.parametrize("reaches", [True, False])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_one_backward_gives_every_network_its_own_gradient(pairing, reaches, architecture):
    settings = config(pairing=pairing, image_reaches_latent=reaches, architecture=architecture, latent_penalised=0.5)
    game, images, keys = fresh(settings)
    game(images, keys).loss.backward()
    for name, loss in textbook(game, images, keys).items():
        weights = list(getattr(game, name).parameters())
        for weight, expected in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True), strict=True):
            assert (weight.grad - expected).norm() <= 1e-9 * expected.norm(), name


@pytest.mark.usefixtures("doubles")
def test_the_report_says_the_losses_of_the_textbook():
    game, images, keys = fresh(config(latent_penalty=0.0, image_penalty=0.0))
    turn, losses = game(images, keys), textbook(game, images, keys)
    report = turn.report
    assert report["reconstruction/mse"] * 16 == pytest.approx(losses["encoder"].item())
    assert report["latent_critic/loss"] == pytest.approx(losses["latent_critic"].item())
    assert report["image_critic/loss"] == pytest.approx(losses["image_critic"].item())
    assert report["image_critic/opponent_loss"] * 0.7 == pytest.approx((losses["decoder"] - losses["encoder"]).item())
    assert report["latent_critic/accuracy"] in [k / BATCH for k in range(BATCH + 1)]
    torch.testing.assert_close(turn.codes, game.encoder(images).detach())


class Quartic(nn.Module):
    """A critic with a gradient that is known: D(x) = a . x + sum x^4 / 4, so grad D = a + x^3."""

    def __init__(self, size):
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, x):
        return x @ self.a + (x**4).sum(1) / 4


@pytest.mark.usefixtures("doubles")
def test_differences_converge_to_the_exact_penalty_as_their_step_shrinks():
    """Their mean over directions is R1 + R2, and for each direction the error falls with the square of the step."""
    count = 100_000
    critic, keys = Quartic(3), sample_keys(0, 0, count)
    real, fake = torch.tensor([[0.5, -1.0, 2.0]]).expand(count, 3), torch.tensor([[1.0, 0.3, -0.7]]).expand(count, 3)
    settings = {"stream": 0, "pairing": "relativistic", "weight": 1.0, "penalty": 1.0, "penalised": 1.0}

    def penalty(step):
        loss, report = play(critic, real, fake.clone().requires_grad_(), keys, **settings, step=step)
        (gradient,) = torch.autograd.grad(loss, critic.a)
        return report["squared_slope"], gradient

    directions = gaussian(keys, (2, 3), stream=0, dtype=torch.float64)
    slopes = [(e * (critic.a + x**3)).sum(1) for x, e in ((real, directions[:, 0]), (fake, directions[:, 1]))]
    exact = torch.cat(slopes).square().mean()
    errors = [abs(penalty(step)[0] - exact).item() for step in (0.2, 0.1, 0.05)]
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([4, 4], rel=0.2)
    assert penalty(1e-4)[0] == pytest.approx(exact.item(), rel=1e-6)

    # Over directions: the exact (R1 + R2) / 2 by double backward.
    both = torch.cat([real[:1], fake[:1]]).requires_grad_()
    (slope,) = torch.autograd.grad(critic(both).sum(), both, create_graph=True)
    half = slope.square().sum(1).mean()
    assert exact.item() == pytest.approx(half.item(), rel=0.02)
    margin = critic(fake) - critic(real)
    (expected,) = torch.autograd.grad(softplus(margin).mean() + half, critic.a)
    torch.testing.assert_close(penalty(1e-4)[1], expected, rtol=0.03, atol=0.02)


class Sure(nn.Module):
    """A critic whose logits are what the first number of a sample says, and whose gradient is all ones."""

    def forward(self, x):
        return x.float().sum(1)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_critic_that_is_sure_of_itself_still_teaches_its_opponent(pairing, dtype, tolerance):
    margins = torch.tensor([-60.0, -30.0, -5.0, 0.0, 5.0, 30.0, 60.0]).to(dtype)
    fake = torch.stack([margins, torch.zeros_like(margins)], 1).requires_grad_()
    real, keys = torch.zeros_like(fake), sample_keys(0, 0, len(fake))
    options = {"stream": 0, "pairing": pairing, "weight": 0.5, "penalty": 0.3, "penalised": 1.0, "step": 0.1}
    loss, _ = play(Sure(), real.detach(), fake, keys, **options)
    loss.backward()
    expected = -0.5 * torch.sigmoid(-margins.double()) / len(margins)
    torch.testing.assert_close(fake.grad[:, 0].double(), expected, rtol=tolerance, atol=0)


def test_under_bf16_every_network_still_gets_its_own_gradient():
    """Real networks under autocast, critics that are sure of themselves: within the precision of bfloat16."""
    game, images, keys = fresh(config(latent_penalty=0.0, image_penalty=0.0))
    with torch.no_grad():
        game.latent_critic.head.weight.mul_(200)
        game.image_critic.head.weight.mul_(200)
    with torch.autocast("cpu", torch.bfloat16):
        turn = game(images, keys)
    turn.loss.backward()
    assert turn.report["latent_critic/loss"].dtype == torch.float32
    for name, loss in textbook(game, images, keys).items():
        weights = list(getattr(game, name).parameters())
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        ours = torch.cat([weight.grad.flatten() for weight in weights])
        assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 0.98, name
        assert ours.norm() == pytest.approx(expected.norm().item(), rel=0.1), name


class WithBatchNorm(Critic):
    def __init__(self):
        super().__init__(nn.Linear(CODE, 8), nn.BatchNorm1d(8), features=8)


class WithMinibatchDeviation(Critic):
    def __init__(self):
        super().__init__(nn.Identity(), features=CODE)

    def forward(self, x):
        return super().forward(x) + x.std(0).mean()


@pytest.mark.parametrize("critic", [WithBatchNorm, WithMinibatchDeviation])
def test_a_critic_with_batch_statistics_is_refused(critic):
    game, _, _ = fresh(config())
    shape = {"image_shape": (1, 8, 8), "code_size": CODE, "noise_size": CODE, "objective": game.objective}
    parts = game.encoder, game.decoder, game.latent_generator
    with pytest.raises(ValueError, match="latent_critic judges a sample differently in another batch"):
        AAAE(*parts, critic(), game.image_critic, **shape)


@pytest.mark.parametrize("architecture", ["dcgan", "mlp"])
def test_no_network_looks_at_more_than_one_sample(architecture):
    game, images, keys = fresh(config(architecture=architecture))
    codes = gaussian(keys, (CODE,), stream=0, dtype=torch.float32)
    inputs = {"encoder": images, "decoder": codes, "latent_generator": codes, "latent_critic": codes}
    for name, network in game.named_children():
        x = inputs.get(name, images)
        alone = torch.cat([network(one) for one in x.split(1)])
        torch.testing.assert_close(network(x), alone, rtol=1e-4, atol=1e-5)


def test_the_game_is_standardised_by_the_moments_of_earlier_steps():
    game, images, keys = fresh(config())
    torch.nn.init.zeros_(game.moments)
    mean, deviation = game.standard()
    assert mean.tolist() == [0] * CODE
    assert deviation.tolist() == [1] * CODE
    codes = torch.randn(1000, CODE) * torch.arange(1, CODE + 1) + 3
    before = game(images, keys).report["latent_critic/margin"]
    game.observe(codes.mean(0), codes.square().mean(0), images=64)
    mean, deviation = game.standard()  # the first step's moments, unbiased by the zeros before them
    torch.testing.assert_close(mean, codes.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(deviation, codes.std(0, correction=0), rtol=1e-3, atol=1e-3)
    assert game(images, keys).report["latent_critic/margin"] != before
    game.observe(torch.zeros(CODE), torch.ones(CODE), images=2200)  # one half-life later
    weight = game.moments[0, 0]
    torch.testing.assert_close(game.standard()[0], codes.mean(0) * (weight - 0.5) / weight, rtol=1e-4, atol=1e-4)


def test_what_is_averaged_has_no_opponents():
    game, _, _ = fresh(config())
    average = game.average()
    assert {name.split(".")[0] for name in average.state_dict()} == {
        "encoder",
        "decoder",
        "latent_generator",
        "moments",
    }
    assert not any(weight.requires_grad for weight in average.parameters())
