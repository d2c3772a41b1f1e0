"""Configuration of txt2img.py: DEFAULTS below, a YAML file with its differences on top, then flags."""

import copy
import os

from ..config import (CODE, check_value, _nearest, _read, boolean, device, integer, list_of, number, one_of, optional,
                      text)
from ..common.errors import UsageError
from .model import DTYPES, StableDiffusion

DEFAULTS = {
    "devices": ["cuda:0"],  # the first is used; without a GPU the CPU
    "dtype": "auto",  # of UNet and text encoder: fp16 on a GPU of NVIDIA's, else fp32; or "fp16", "bf16", "fp32"
    "ema": True,  # take the averaged weights, where the file has both
    "vocabulary": None,  # CLIP's bpe_simple_vocab_16e6.txt.gz; None: that of the package open_clip_torch
    "taesd_decoder": "../pretrained/taesd_decoder.pth",  # for --vae taesd
    "model": {  # arguments of SDUNet, AutoencoderKL and TextEncoder; these are Stable Diffusion 1.x
        "unet": {"dim": 320, "context_dim": 768, "dim_mults": [1, 2, 4, 4], "attn_levels": [0, 1, 2],
                 "num_res_blocks": 2, "num_heads": 8},
        "autoencoder": {"dim": 128, "dim_mults": [1, 2, 4, 4], "num_res_blocks": 2},
        "text_encoder": {"width": 768, "layers": 12, "heads": 12},
    },
    "sample_cfg": {
        "sampler": "dpmpp_2m",
        "steps": None,  # None: the sampler's default
        "guidance_scale": 7.5,  # 1: none
        "negative_prompt": "",  # what guidance leads away from
        "height": 512, "width": 512,  # multiples of 8
    },
}


def words():
    """Text that may be empty."""
    def check(v):
        if not isinstance(v, str):
            raise ValueError
        return v
    return "a piece of text", check


RULES = {
    "devices": list_of(device()), "dtype": one_of("auto", *DTYPES), "ema": boolean(),
    "vocabulary": optional(text()), "taesd_decoder": text(),
    "model.unet.dim": integer(32), "model.unet.context_dim": integer(1), "model.unet.dim_mults": list_of(integer(1)),
    "model.unet.attn_levels": list_of(integer(0), empty=True), "model.unet.num_res_blocks": integer(1),
    "model.unet.num_heads": integer(1),
    "model.autoencoder.dim": integer(32), "model.autoencoder.dim_mults": list_of(integer(1)),
    "model.autoencoder.num_res_blocks": integer(1),
    "model.text_encoder.width": integer(1), "model.text_encoder.layers": integer(1),
    "model.text_encoder.heads": integer(1),
    "sample_cfg.sampler": one_of(*StableDiffusion.SAMPLERS), "sample_cfg.steps": optional(integer(1)),
    "sample_cfg.guidance_scale": number(0), "sample_cfg.negative_prompt": words(),
    "sample_cfg.height": integer(8), "sample_cfg.width": integer(8),
}


def load_config(path, flags=None):
    """DEFAULTS, then the file, then `flags`, a dict like it; checked, paths absolute.

    Raises UsageError naming the file or key, the value, and what would be right.
    """
    config = _merge(copy.deepcopy(DEFAULTS), _read(path))
    config = _merge(config, flags or {})
    for key in ("vocabulary", "taesd_decoder"):
        if config[key]:
            config[key] = os.path.normpath(os.path.join(CODE, os.path.expanduser(config[key])))
    _check_sizes(config["model"])
    return config


def _check_sizes(model):
    unet, autoencoder, words = model["unet"], model["autoencoder"], model["text_encoder"]
    attention = {*unet["attn_levels"], len(unet["dim_mults"]) - 1}  # the last level's channels are the middle's
    channels = [unet["dim"] * mult for level, mult in enumerate(unet["dim_mults"]) if level in attention]
    for key, value, fits, right in (
            ("unet.dim", unet["dim"], unet["dim"] % 32 == 0, "a multiple of 32, the groups of its norms"),
            ("unet.num_heads", unet["num_heads"], not any(c % unet["num_heads"] for c in channels),
             f"a divisor of the channels of each level with attention, {channels}"),
            ("unet.context_dim", unet["context_dim"], unet["context_dim"] == words["width"],
             f"model.text_encoder.width, {words['width']}"),
            ("autoencoder.dim", autoencoder["dim"], autoencoder["dim"] % 32 == 0,
             "a multiple of 32, the groups of its norms"),
            ("autoencoder.dim_mults", autoencoder["dim_mults"], len(autoencoder["dim_mults"]) == 4,
             "a list of 4, for latents of an eighth of the picture's size"),
            ("text_encoder.heads", words["heads"], words["width"] % words["heads"] == 0,
             f"a divisor of model.text_encoder.width, {words['width']}")):
        if not fits:
            raise UsageError(f"config: model.{key} is {value}; it must be {right}")


def _merge(defaults, given, prefix=""):
    for key, value in given.items():
        full = f"{prefix}{key}"
        if key not in defaults:
            near = _nearest(key, defaults)
            raise UsageError(f"config: unknown key {full}; " + (f"did you mean {prefix}{near}?" if near else
                             f"there are {', '.join(map(str, defaults))}"))
        if not isinstance(defaults[key], dict):
            defaults[key] = check_value(full, value, RULES)
        elif isinstance(value, dict):
            _merge(defaults[key], value, f"{full}.")
        else:
            raise UsageError(f"config: {full} is a section of `key: value` lines, not {value!r}")
    return defaults
