"""Random numbers that depend on what they are for, not on what was drawn before.

The order of the data, its augmentation, the noise and the noise levels of update n are each a function of
(seed, purpose, n). So a resumed run draws what the uninterrupted one would have drawn.
"""

import hashlib
import random

import numpy as np
import torch


def seeded_generator(*key, device="cpu"):
    """A torch.Generator whose stream is a function of `key` (numbers and strings) alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def image_noise(seed, numbers, shape):
    """Starting noise of the images with these numbers, N x *shape: image k has the same in any batch."""
    return torch.stack([torch.randn(shape, generator=seeded_generator(seed, "image", int(k))) for k in numbers])


def seed_everything(seed):
    """Seed the global generators: Python's, NumPy's, torch's on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def rng_state():
    """States of all global generators, as tensors and plain values (so that a checkpoint can hold them)."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state):
    """Put back what `rng_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
