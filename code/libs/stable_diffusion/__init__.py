"""Stable Diffusion 1.x in our own code: `load_checkpoint(path)` gives a `StableDiffusion` to draw with."""

from .autoencoder import AutoencoderKL
from .checkpoint import load_checkpoint
from .model import StableDiffusion, seeded
from .text import TextEncoder, Tokenizer
from .unet import SDUNet
