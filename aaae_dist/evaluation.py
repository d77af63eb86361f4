"""How good a model is: figures that do not depend on the number of ranks. All ranks must take part."""

from collections.abc import Iterator

import torch
from torch.nn.functional import adaptive_avg_pool2d

from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.data import sweep
from aaae_dist.distributed import rank, sum_over_ranks, world
from aaae_dist.inference import images_for, sample_codes
from aaae_dist.metrics import Features, RunningMoments, effective_rank, frechet_distance, psnr
from aaae_dist.networks import Images
from aaae_dist.reader import Reader

EVALUATION_SEED = 0x5EED  # the same samples for every run, so that runs compare
THUMBNAIL = 16  # pixels: small enough for a covariance, and no extractor is needed


@torch.no_grad()
def evaluate(
    model: GenerativeAutoencoder, *, train: Reader, held_out: Reader, samples: int, batch_size: int, workers: int
) -> Iterator[tuple[str, float]]:
    """Names and values, the same on every rank. (config.Figure lists those that `checkpoint.best` may choose by.)

    Args:
        train: the generated codes and images are held against these.
        held_out: the images that are reconstructed.
        samples: drawn, and at most as many images of `train` encoded.
    """
    device, code_size, thumbnail = model.moments.device, model.moments.shape[1], min(train.data.size, THUMBNAIL)
    part = {"batch_size": batch_size, "world": world(), "rank": rank(), "workers": workers}

    error = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in sweep(held_out, limit=len(held_out), **part):
        images = images_for(model, batch.images)
        squares = (model.decode(model.encode(images)).clamp(-1, 1) - images)[batch.mask].double().square()
        error += torch.stack([squares.sum(), squares.new_tensor(squares.numel())])
    total, count = sum_over_ranks(error).tolist()
    yield "reconstruction/held_out_mse", total / count
    yield "reconstruction/held_out_psnr", psnr(total / count, span=2.0)

    def thumbnails(images: Images) -> Features:
        return adaptive_avg_pool2d(images, thumbnail).flatten(1)

    codes, reals = RunningMoments(code_size, device), RunningMoments(train.data.channels * thumbnail**2, device)
    for batch in sweep(train, limit=samples, **part):
        images = images_for(model, batch.images)
        codes.add(model.encode(images)[batch.mask])
        reals.add(thumbnails(images[batch.mask]))
    generated, fakes = RunningMoments(code_size, device), RunningMoments(train.data.channels * thumbnail**2, device)
    for start in range(0, samples, world() * batch_size):  # as many forwards on every rank: weights may be divided
        first = start + rank() * batch_size
        count = min(max(samples - first, 0), batch_size)
        drawn = sample_codes(model, seed=EVALUATION_SEED, first=first, count=max(count, 1))
        images = model.decode(drawn).clamp(-1, 1)
        generated.add(drawn[:count])
        fakes.add(thumbnails(images[:count]))
    true, made = codes.over_ranks(), generated.over_ranks()
    yield "latent/frechet_over_trace", frechet_distance(true, made) / max(true.covariance.trace().item(), 1e-12)
    yield "latent/effective_rank", effective_rank(true.covariance)
    yield "latent/generated_effective_rank", effective_rank(made.covariance)
    real, fake = reals.over_ranks(), fakes.over_ranks()
    yield (
        "samples/thumbnail_frechet_over_trace",
        frechet_distance(real, fake) / max(real.covariance.trace().item(), 1e-12),
    )
