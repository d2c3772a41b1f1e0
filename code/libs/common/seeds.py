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


def seed_everything(seed):
    """Seed torch's global generators, on every device: initial weights and dropout come from them."""
    torch.manual_seed(seed)


def rng_state():
    """States of torch's global generators, as tensors."""
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    """Put back what `rng_state` returned; on another number of GPUs, only the CPU's."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
