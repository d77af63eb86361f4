"""pythae's `AdversarialTrainer` around our networks, for step.py."""

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from aaae_dist.aaae import AAAE
from aaae_dist.config import Config
from aaae_dist.networks import Images

PACKAGE = "pythae==0.1.2"


def install(folder: Path) -> None:
    """Put pythae into a folder of its own, if it is not there, and on the path.

    Without its dependencies: those that training needs are MLflow's, or ours.
    """
    if not (folder / "pythae").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, PACKAGE], check=True)
    sys.path.append(str(folder))


def silence() -> redirect_stderr:
    """It speaks of all that it does."""
    return redirect_stderr(io.StringIO())


def training(game: AAAE, config: Config, images: Images, *, folder: str) -> Callable[[int], None]:
    """What takes so many steps, as an epoch of pythae's own loop over as many batches of these images.

    Args:
        game: whose encoder, decoder and latent critic are trained, as an adversarial autoencoder.
        folder: for what the trainer writes.
    """
    with silence():
        models, nets = import_module("pythae.models"), import_module("pythae.models.nn")
        trainers, datasets = import_module("pythae.trainers"), import_module("pythae.data.datasets")
        output = import_module("pythae.models.base.base_utils").ModelOutput

    class Encoder(nets.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = game.encoder

        def forward(self, images: Images) -> object:
            codes = self.network(images)
            return output(embedding=codes, log_covariance=torch.zeros_like(codes))

    class Decoder(nets.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = game.decoder

        def forward(self, codes: Tensor) -> object:
            return output(reconstruction=self.network(codes))

    class Discriminator(nets.BaseDiscriminator):
        def __init__(self) -> None:
            super().__init__()
            self.network: nn.Module = game.latent_critic

        def forward(self, codes: Tensor) -> object:
            return output(embedding=self.network(codes).sigmoid())

    about = models.Adversarial_AE_Config(
        input_dim=tuple(images.shape[1:]), latent_dim=config.model.code_size, deterministic_posterior=True
    )
    model = models.Adversarial_AE(about, encoder=Encoder(), decoder=Decoder(), discriminator=Discriminator())
    chosen = trainers.AdversarialTrainerConfig(
        output_dir=folder, per_device_train_batch_size=config.training.batch_size
    )
    with silence():
        data = datasets.BaseDataset(images, torch.zeros(len(images)))
        trainer = trainers.AdversarialTrainer(model, data, training_config=chosen)
        trainer.prepare_training()

    def turn(steps: int) -> None:
        chosen = torch.arange(steps * config.training.batch_size) % len(images)
        with silence():
            trainer.train_loader = trainer.get_train_dataloader(datasets.BaseDataset(images[chosen], chosen))
            trainer.train_step(1)

    return turn
