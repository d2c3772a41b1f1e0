"""TAESD, the tiny autoencoder for Stable Diffusion's latents (github.com/madebyollin/taesd, MIT).

The modules' names are those of the official weight files. Images in [0, 1], latents about in [-3, 3].
"""

import os
from hashlib import sha256

import torch
from torch import nn

from .common.errors import UsageError, first_line
from .common.files import load_tensors, read_tensors

LATENT_CHANNELS = 4
DOWNSCALE = 8
CPU_BATCH = 4  # so that the activations of images of 128 pixels stay in the cache: 1.4 times as fast as 50 at once


def conv(c_in, c_out, **options):
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


class Clamp(nn.Module):
    """Squash latents softly into (-3, 3)."""

    def forward(self, x):
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions and a skip. B x C x H x W -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(conv(channels, channels), nn.ReLU(), conv(channels, channels), nn.ReLU(),
                                  conv(channels, channels))
        self.fuse = nn.ReLU()

    def forward(self, x):
        return self.fuse(self.conv(x) + x)


def build_encoder(channels=64):
    """Images B x 3 x H x W in [0, 1] -> latents B x 4 x H/8 x W/8."""
    layers = [conv(3, channels), Block(channels)]
    for _ in range(3):
        layers += [conv(channels, channels, stride=2, bias=False), *(Block(channels) for _ in range(3))]
    return nn.Sequential(*layers, conv(channels, LATENT_CHANNELS))


def build_decoder(channels=64):
    """Latents B x 4 x H/8 x W/8 -> images B x 3 x H x W, about in [0, 1]."""
    layers = [Clamp(), conv(LATENT_CHANNELS, channels), nn.ReLU()]
    for _ in range(3):
        layers += [*(Block(channels) for _ in range(3)), nn.Upsample(scale_factor=2),
                   conv(channels, channels, bias=False)]
    return nn.Sequential(*layers, Block(channels), conv(channels, 3))


def in_parts(network, x):
    """network(x) for x of B x C x H x W: on a CPU a few images at a time, which is faster."""
    return torch.cat([network(part) for part in (x.split(CPU_BATCH) if x.device.type == "cpu" else [x])])


def load_weight_file(module, path, key):
    """Load a weight file into `module`, strictly. `key` is the config's name for it.

    Raises UsageError when the file is missing, is no plain state dict, is another network's, or is not finite.
    """
    if not os.path.isfile(path):
        official = os.path.basename(path).startswith("taesd_")
        command = "sh download_dataset.sh taesd" if official else (
            "python code/train_autoencoder.py configs/afhq_autoencoder.yaml")
        raise UsageError(f"{key}: no file {path}; `{command}` makes one")
    try:
        state = read_tensors(path)
    except Exception as e:  # torch raises almost anything on a file of another kind
        raise UsageError(f"{key}: {path} is no file of plain weights ({first_line(e)})") from None
    load_tensors(module.state_dict(), state, f"{key}: {path}")


def weights_hash(module):
    """SHA-256, in hex, of a network's weights in fp32: independent of file, memory format and device."""
    digest = sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()


class TAESD(nn.Module):
    """The frozen autoencoder: `.encoder(images)` and `.decoder(latents)`.

    A path of None leaves that half's weights random. The module is in eval mode and takes no gradient.
    """

    def __init__(self, encoder_path=None, decoder_path=None):
        super().__init__()
        self.encoder, self.decoder = build_encoder(), build_decoder()
        if encoder_path is not None:
            load_weight_file(self.encoder, encoder_path, "model.vae_encoder_weights")
        if decoder_path is not None:
            load_weight_file(self.decoder, decoder_path, "model.vae_decoder_weights")
        self.requires_grad_(False).eval()

    def hashes(self):
        """The weights_hash of each half: they identify the latents that a diffusion model has learned."""
        return {"encoder": weights_hash(self.encoder), "decoder": weights_hash(self.decoder)}

    @staticmethod
    def latent_shape(img_shape):
        """(3, H, W) -> (4, H/8, W/8). Raises UsageError when 8 does not divide H and W."""
        channels, height, width = img_shape
        if channels != 3 or height % DOWNSCALE or width % DOWNSCALE:
            raise UsageError(f"model.img_shape: the autoencoder takes 3 x H x W with H and W multiples of {DOWNSCALE}, "
                             f"not {channels} x {height} x {width}")
        return LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE
