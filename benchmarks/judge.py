"""Judge runs by a classifier of the labels: are the samples of all classes, in balance, and as varied as the images?

    python benchmarks/judge.py RUN [RUN ...] [--samples 5000] [--seed 0]

A small network is fitted to the labelled training images of the runs' data set (noise and shifts of a pixel against
overfitting). For every run it prints the classifier's accuracy on held-out images, the Kullback-Leibler divergence of
the samples' classes from uniform, the Frechet distance in the classifier's features between training images and
samples, over the trace of the former's covariance, and beside it the same for the held-out images: what a perfect model
would get, but for the bias of their smaller number.
"""

import argparse
import itertools
import json

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from aaae_dist.checkpoint import load_average
from aaae_dist.config import Data
from aaae_dist.data import Reader, sweep, to_float
from aaae_dist.inference import sample
from aaae_dist.metrics import Moments, RunningMoments, frechet_distance

FEATURES, STEPS, BATCH = 64, 1000, 64


def read(data: Data, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split in [-1, 1], and their labels."""
    reader = Reader(data, split=split)
    batches = list(sweep(reader, limit=len(reader), batch_size=500, world=1, rank=0, workers=2))
    labels = [label for batch in batches for label in itertools.compress(batch.labels, batch.mask)]
    if None in labels:
        raise SystemExit(f"{data.url}: the images have no labels, so no classifier can be fitted")
    return to_float(torch.cat([batch.images[batch.mask] for batch in batches])), torch.tensor(labels)


def fit_classifier(images: Tensor, labels: Tensor, *, seed: int, steps: int = STEPS) -> nn.Sequential:
    """Convolutions down to 4 x 4 pixels, FEATURES features, logits."""
    torch.manual_seed(seed)
    channels, size = images.shape[1:3]
    layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, 1, 1), nn.ReLU()]
    width = 32
    while size > 4:
        layers += [nn.Conv2d(width, min(2 * width, 128), 4, 2, 1), nn.ReLU()]
        width, size = min(2 * width, 128), size // 2
    layers += [nn.Flatten(), nn.Linear(width * size * size, FEATURES), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(FEATURES, int(labels.max()) + 1))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        top, left = torch.randint(3, (2,)).tolist()
        size = images.shape[2]
        shifted = pad(images[chosen], (1, 1, 1, 1), value=-1)[:, :, top : top + size, left : left + size]
        loss = cross_entropy(model(shifted + 0.15 * torch.randn_like(shifted)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def apply(classifier: nn.Sequential, images: Tensor) -> tuple[Moments, Tensor]:
    """Moments of the images' features, and their classes."""
    moments, classes = RunningMoments(FEATURES), []
    for part in images.split(500):
        features = classifier[:-1](part)
        moments.add(features)
        classes.append(classifier[-1](features).argmax(1))
    return moments.over_ranks(), torch.cat(classes)


def over_trace(real: Moments, other: Moments) -> float:
    """The Frechet distance in units of the real features' total variance."""
    return frechet_distance(real, other) / real.covariance.trace().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="of the classifier")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    loaded = [(run, *load_average(run)) for run in arguments.runs]
    for data, group in itertools.groupby(loaded, key=lambda found: found[2].data):
        images, labels = read(data, data.split)
        classifier = fit_classifier(images, labels, seed=arguments.seed)
        real, _ = apply(classifier, images)
        held_out, truth = read(data, data.held_out)
        floor, guessed = apply(classifier, held_out)
        for run, model, _, name in group:
            count = range(0, arguments.samples, 500)
            parts = [sample(model, seed=1, first=i, count=min(500, arguments.samples - i)) for i in count]
            fake, classes = apply(classifier, to_float(torch.cat(parts)))
            shares = torch.bincount(classes, minlength=int(labels.max()) + 1) / len(classes)
            figures = {
                "run": run,
                "images": int(name),
                "classifier_accuracy": (guessed == truth).double().mean().item(),
                "class_shares": [round(share, 4) for share in shares.tolist()],
                "class_kl": (shares.xlogy(shares * len(shares))).sum().item(),
                "frechet_over_trace": over_trace(real, fake),
                "held_out_frechet_over_trace": over_trace(real, floor),
            }
            print(json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in figures.items()}))


if __name__ == "__main__":
    main()
