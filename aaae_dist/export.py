"""Handing a model on: averaged networks in files that need no engine and, as programs, nothing of this package.

config.toml             how the networks are built
networks.safetensors    their weights and the moments of the codes: what `aaae_dist.load` reads
encoder.pt2             images -> codes             programs for `torch.export.load`, float32, for any number of
decoder.pt2             codes -> images             samples; images in [-1, 1], (batch, channels, height, width)
sampler.pt2             standard normal noise -> images
about.json              where they come from, and the sha256 of networks.safetensors
"""

import hashlib
import io

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from aaae_dist import storage
from aaae_dist.aaae import GenerativeAutoencoder
from aaae_dist.baselines import METHODS
from aaae_dist.checkpoint import load_average
from aaae_dist.config import load_config
from aaae_dist.errors import UserError, one_line
from aaae_dist.networks import Codes, Images, Noise

NETWORKS, CONFIG, ABOUT = "networks.safetensors", "config.toml", "about.json"


class Decoder(nn.Module):
    """Codes to images in [-1, 1]."""

    def __init__(self, model: GenerativeAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Codes) -> Images:
        return self.model.decode(codes).clamp(-1, 1)


class Sampler(nn.Module):
    """Noise to images in [-1, 1]."""

    def __init__(self, model: GenerativeAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Noise) -> Images:
        return self.model.decode(self.model.generate(noise)).clamp(-1, 1)


def export(run: str, *, name: str, out: str) -> str:
    """Write the averaged networks of a checkpoint (default: the newest undamaged).

    Returns:
        The name of the checkpoint.

    Raises:
        UserError: there is none, or `out` holds other files.
    """
    if strays := storage.listing(out).keys() - {NETWORKS, CONFIG, ABOUT, "encoder.pt2", "decoder.pt2", "sampler.pt2"}:
        raise UserError(f"--out {out}: it holds {min(strays)}; choose a new folder")
    model, config, name = load_average(run, name=name)
    data = config.data
    storage.remove(storage.join(out, NETWORKS))  # which comes last, for what it is read with is there then
    for program, (network, example) in {
        "encoder": (model.encoder, torch.zeros(2, data.channels, data.size, data.size)),
        "decoder": (Decoder(model), torch.zeros(2, config.model.code_size)),
        "sampler": (Sampler(model), torch.zeros(2, model.noise_size)),
    }.items():
        file = io.BytesIO()
        made = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(made, file)
        storage.write(storage.join(out, f"{program}.pt2"), file.getvalue())
    storage.write(storage.join(out, CONFIG), config.toml().encode())
    weights = safetensors.torch.save(model.state_dict())
    about = {"run": run, "checkpoint": name, "images": int(name), "sha256": hashlib.sha256(weights).hexdigest()}
    storage.write_json(storage.join(out, ABOUT), about)
    storage.write(storage.join(out, NETWORKS), weights)
    return name


def load(url: str) -> GenerativeAutoencoder:
    """An exported model, on the CPU, in evaluation mode: it encodes, decodes, generates.

    Args:
        url: what was given to `aaae export --out`: a folder or any fsspec URL.

    Raises:
        UserError: there is none, or it is damaged.
    """
    place = storage.join(url, NETWORKS)
    config = load_config([storage.join(url, CONFIG)])
    model = METHODS[config.model.method].build(config).average()
    weights, about = storage.read(place), storage.read_json(storage.join(url, ABOUT))
    if not isinstance(about, dict) or about.get("sha256") != hashlib.sha256(weights).hexdigest():
        raise UserError(f"{place}: damaged, its bytes are not those that {ABOUT} speaks of; export anew")
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (SafetensorError, RuntimeError) as error:
        problem = one_line(error)[:200]
        raise UserError(f"{place}: of other networks than its config.toml says ({problem}); export anew") from None
    return model
