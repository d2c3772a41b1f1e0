"""Stable Diffusion 1.x in our own code: `load_checkpoint(path)` gives a `StableDiffusion` to draw with."""

from .checkpoint import load_checkpoint
from .model import StableDiffusion, seeded
