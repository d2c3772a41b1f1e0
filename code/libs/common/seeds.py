"""Random numbers that depend on what they are for, not on what was drawn before.

The order of the data, its augmentation, the noise and the noise levels of update n are each a function of
(seed, purpose, n). So a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib

import torch


def seeded_generator(*key, device="cpu"):
    """A torch.Generator whose stream is a function of `key` (numbers and strings) alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def image_noise(seed, numbers, shape):
    """Starting noise of the images with these numbers, N x *shape: image k has the same in any batch."""
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, "image", int(k))) for k in numbers])


def seed_everything(seed, *purpose):
    """Seed torch's global generators, on every device, from which initial weights and dropout come.

    With `purpose` (numbers and strings), the seed is a function of (seed, *purpose).
    """
    torch.manual_seed(seeded_generator(seed, *purpose).initial_seed() if purpose else seed % 2 ** 64)
