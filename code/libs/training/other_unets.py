"""Other people's UNets in the place of ours, with its levels and as many parameters: for benchmark.py --compare."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..common.errors import UsageError

TOLERANCE = 0.05  # of the number of parameters


class Other(nn.Module):
    """A network that is called as libs.unet.UNet is: x, label, time (B x C x H x W, B, B) -> B x C x H x W.

    model: the `model` section of a config; channels: C. It works on the same patches, so levels have the same sizes.
    """

    package = None  # as pip knows it
    variants = ({},)  # further arguments that `fit` may choose from

    def __init__(self, model, channels):
        super().__init__()
        self.patch_size = model["patch_size"]
        self.channels = channels * self.patch_size ** 2
        self.attention = [level in model["attn_levels"] for level in range(len(model["dim_mults"]))]

    def forward(self, x, label, time):
        return F.pixel_shuffle(self.predict(F.pixel_unshuffle(x, self.patch_size), label, time), self.patch_size)


class Diffusers(Other):
    """UNet2DConditionModel with its usual two blocks a level; the label is its one context token.

    time_mult: width of the time embedding in units of `width`; left alone it would be 4.
    """

    package = "diffusers"
    variants = tuple({"time_mult": k} for k in (4, 2, 1))
    blocks = 2

    def __init__(self, model, channels, width, time_mult):
        super().__init__(model, channels)
        from diffusers import UNet2DConditionModel
        self.label = nn.Embedding(model["num_classes"] + 1, model["context_dim"])
        self.net = UNet2DConditionModel(
            in_channels=self.channels, out_channels=self.channels, layers_per_block=self.blocks,
            block_out_channels=[width * m for m in model["dim_mults"]], time_embedding_dim=time_mult * width,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in self.attention],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention)],
            norm_num_groups=math.gcd(width, 8), cross_attention_dim=model["context_dim"],
            attention_head_dim=math.gcd(width, 4))  # its name for the number of heads

    def predict(self, x, label, time):
        return self.net(x, time, self.label(label)[:, None]).sample


class DiffusersLikeOurs(Diffusers):
    """With one block a level, as we have, and so wider; its decoder still has one more than its encoder."""

    blocks = 1


class Lucidrains(Other):
    """denoising-diffusion-pytorch's Unet: no labels; fused attention on our levels, on the others its linear one."""

    package = "denoising-diffusion-pytorch"

    def __init__(self, model, channels, width):
        super().__init__(model, channels)
        from denoising_diffusion_pytorch import Unet
        self.net = Unet(width, dim_mults=tuple(model["dim_mults"]), channels=self.channels,
                        full_attn=tuple(self.attention), flash_attn=True)

    def predict(self, x, label, time):
        return self.net(x, time)


OTHERS = {"lucidrains": Lucidrains, "diffusers": Diffusers, "diffusers, one block a level": DiffusersLikeOurs}


def parameters(network):
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())


def build_other(name, unet, model, how):
    """One of OTHERS for the images of our `unet`; how: what `fit` found."""
    return OTHERS[name](model, unet.conv_in.in_channels // unet.patch_size ** 2, **how)


def fit(name, unet, model):
    """Arguments that give one of OTHERS as many parameters as our `unet` has, and how many they are.

    Of the widths within TOLERANCE it takes the one that 16, or 8, or 4 divides, where convolutions are fast, then the
    nearest. Raises ImportError without its package, UsageError where no width comes near enough.
    """
    wanted, variants = parameters(unet), OTHERS[name].variants

    def count(how):
        with torch.device("meta"):  # shapes without numbers
            return parameters(build_other(name, unet, model, how))

    # the number grows about as the width's square
    near = model["dim"] * math.sqrt(wanted / count({"width": model["dim"], **variants[0]}))
    widths = range(max(int(near * 0.8) // 2 * 2, 4), int(near * 1.2) + 3, 2)
    counts = [(count(how), how) for how in ({"width": width, **more} for width in widths for more in variants)]
    found = [(n, how) for n, how in counts if abs(n / wanted - 1) <= TOLERANCE]
    if not found:
        raise UsageError(f"--compare: no width brings the UNet of {name} within {TOLERANCE:.0%} of our {wanted:,} "
                         "parameters")
    n, how = max(found, key=lambda pair: (math.gcd(pair[1]["width"], 16), -abs(pair[0] - wanted)))
    return how, n
