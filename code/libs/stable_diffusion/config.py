"""Configuration of txt2img.py: the defaults below, then a YAML file with its differences, then flags."""

import os

from ..common.rules import device, integer, list_of, number, one_of, optional, text
from ..config import CODE, defaults_of, merge, read_yaml
from .model import DTYPES, SAMPLERS

# key -> (default, rule); the defaults are Stable Diffusion 1.x
SETTINGS = {
    "devices": (["cuda:0"], list_of(device())),  # the first is used; without a GPU the CPU
    "dtype": ("auto", one_of("auto", *DTYPES)),  # of UNet and text encoder; auto: fp16 on an NVIDIA GPU, else fp32
    "taesd_decoder": ("../pretrained/taesd_decoder.pth", text()),  # for --vae taesd

    "model.unet.dim": (320, integer(32, 8192)),
    "model.unet.context_dim": (768, integer(1, 8192)),
    "model.unet.dim_mults": ([1, 2, 4, 4], list_of(integer(1, 1000))),
    "model.unet.attn_levels": ([0, 1, 2], list_of(integer(0), empty=True)),
    "model.unet.num_res_blocks": (2, integer(1, 100)),
    "model.unet.num_heads": (8, integer(1, 8192)),
    "model.autoencoder.dim": (128, integer(32, 8192)),
    "model.autoencoder.dim_mults": ([1, 2, 4, 4], list_of(integer(1, 1000), 4)),
    "model.autoencoder.num_res_blocks": (2, integer(1, 100)),
    "model.text_encoder.width": (768, integer(1, 8192)),
    "model.text_encoder.layers": (12, integer(1, 100)),
    "model.text_encoder.heads": (12, integer(1, 8192)),

    "sample_cfg.sampler": ("dpmpp_2m", one_of(*SAMPLERS)),
    "sample_cfg.steps": (None, optional(integer(1, 1000))),  # null: the sampler's default
    "sample_cfg.guidance_scale": (7.5, number(0)),  # 1: none
    "sample_cfg.height": (512, integer(8, 2 ** 14)),  # multiples of 8
    "sample_cfg.width": (512, integer(8, 2 ** 14)),
}


def load_config(path, flags=None):
    """The defaults, then the file, then `flags`, a dict of sections like the file's.

    Raises UsageError naming the file or key, the value, and what would be right.
    """
    rules = {key: rule for key, (_, rule) in SETTINGS.items()}
    config = merge(defaults_of(SETTINGS), read_yaml(path), rules)
    config = merge(config, flags or {}, rules)
    config["taesd_decoder"] = os.path.normpath(os.path.join(CODE, os.path.expanduser(config["taesd_decoder"])))
    return config
