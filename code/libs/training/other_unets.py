"""Other libraries' UNets with our levels and about as many parameters, for benchmark.py --compare."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class OtherUNet(nn.Module):
    """A network that is called as libs.unet.UNet is: x, label, time (B x C x H x W, B, B) -> B x C x H x W.

    model: the `model` section of a config; channels: C. It works on the same patches, so levels have the same sizes.
    """

    package = None  # pip's name for it

    def __init__(self, model, channels):
        super().__init__()
        self.patch_size = model["patch_size"]
        self.channels = channels * self.patch_size ** 2
        self.attention = [level in model["attn_levels"] for level in range(len(model["dim_mults"]))]

    def forward(self, x, label, time):
        return F.pixel_shuffle(self.predict(F.pixel_unshuffle(x, self.patch_size), label, time), self.patch_size)


class Diffusers(OtherUNet):
    """UNet2DConditionModel with its usual two blocks a level; the label is its one context token."""

    package = "diffusers"
    blocks = 2

    def __init__(self, model, channels, width):
        super().__init__(model, channels)
        from diffusers import UNet2DConditionModel
        self.label = nn.Embedding(model["num_classes"] + 1, model["context_dim"])
        self.net = UNet2DConditionModel(
            in_channels=self.channels, out_channels=self.channels, layers_per_block=self.blocks,
            block_out_channels=[width * m for m in model["dim_mults"]], time_embedding_dim=width,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in self.attention],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(self.attention)],
            norm_num_groups=math.gcd(width, 8), cross_attention_dim=model["context_dim"],
            attention_head_dim=math.gcd(width, 4))  # its name for the number of heads

    def predict(self, x, label, time):
        return self.net(x, time, self.label(label)[:, None]).sample


class DiffusersOneBlock(Diffusers):
    """With one block a level as ours, and so wider; its decoder still has one more than its encoder."""

    blocks = 1


class Lucidrains(OtherUNet):
    """denoising-diffusion-pytorch's Unet: no labels; fused attention on our levels, on the others its linear one."""

    package = "denoising-diffusion-pytorch"
    our_levels = True

    def __init__(self, model, channels, width):
        super().__init__(model, channels)
        from denoising_diffusion_pytorch import Unet
        self.net = Unet(width, dim_mults=tuple(model["dim_mults"]), channels=self.channels,
                        full_attn=tuple(self.attention) if self.our_levels else None, flash_attn=True)

    def predict(self, x, label, time):
        return self.net(x, time)


class LucidrainsAsItComes(Lucidrains):
    """As its README builds it: fused attention on the innermost level alone, wherever ours is."""

    our_levels = False


OTHERS = {"lucidrains": Lucidrains, "lucidrains, as it comes": LucidrainsAsItComes,
          "diffusers": Diffusers, "diffusers, one block a level": DiffusersOneBlock}


def parameters(network):
    """Number of weights."""
    return sum(p.numel() for p in network.parameters())


def build_other(name, unet, model, width):
    """One of OTHERS for the images of our `unet`."""
    return OTHERS[name](model, unet.conv_in.in_channels // unet.patch_size ** 2, width)


def nearest_width(name, unet, model):
    """The multiple of 4 at which one of OTHERS is nearest to our `unet`'s number of parameters.

    Raises ImportError without its package.
    """
    def error(width):
        with torch.device("meta"):  # shapes without numbers
            return abs(parameters(build_other(name, unet, model, width)) - parameters(unet))

    return min(range(model["dim"] // 8 * 4, model["dim"] * 3 // 2 + 1, 4), key=error)
