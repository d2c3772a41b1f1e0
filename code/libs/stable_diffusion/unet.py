"""Stable Diffusion 1.x's UNet: Rombach et al. 2022 (arXiv 2112.10752). Its layers are those of blocks.py.

Modules have the names of the official code, so that a checkpoint's tensors fit as they are. What differs from our own
UNet: two ResBlocks a level on the way down and three on the way up, a skip after every one of them and after every
Downsample, four times wider MLPs, and a context of many tokens in place of one label.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..blocks import Downsample, ResBlock, SinusoidalPE, SpatialTransformer, Upsample
from ..tiny_autoencoder import LATENT_CHANNELS

GROUPS = 32  # of every GroupNorm


class Block(nn.Sequential):
    """A sequence of layers. Each gets the arguments that it takes: the time, the context, or the size to return to."""

    def forward(self, x, t_emb, context, size=None):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, t_emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                # twice the size, or one pixel less if the size was odd before the Downsample
                x = layer.conv(F.interpolate(x, size=size, mode="nearest"))
            else:
                x = layer(x)
        return x


class SDUNet(nn.Module):
    """eps_theta(x, t, context); the defaults are Stable Diffusion 1.x's, 859,520,964 parameters.

    Args:
        dim: channels at the finest level; level i has `dim * dim_mults[i]`.
        context_dim: width of the text's tokens.
        dim_mults: one factor per level; each level after the first halves the latents.
        attn_levels: levels with a SpatialTransformer (0 is the finest). The middle always has one.
        num_res_blocks: per level of the encoder; the decoder has one more.
        num_heads: of every attention.

    forward(x, t, context): latents B x 4 x H x W of any size, timesteps B from 0 to 999, text B x M x context_dim
    -> the noise in x, B x 4 x H x W.
    """

    def __init__(self, dim=320, context_dim=768, dim_mults=(1, 2, 4, 4), attn_levels=(0, 1, 2), num_res_blocks=2,
                 num_heads=8):
        super().__init__()
        time_dim = 4 * dim
        self.time_pe = SinusoidalPE(dim)
        self.time_embed = nn.Sequential(nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))

        def res_block(c_in, c_out):
            return ResBlock(c_in, c_out, time_dim, GROUPS)

        def transformer(c):
            return SpatialTransformer(c, context_dim, num_heads, GROUPS, ff_mult=4)

        c, last, skips = dim, len(dim_mults) - 1, [dim]
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(LATENT_CHANNELS, dim, 3, padding=1))])
        for level, mult in enumerate(dim_mults):
            for _ in range(num_res_blocks):
                layers = [res_block(c, dim * mult)]
                c = dim * mult
                if level in attn_levels:
                    layers.append(transformer(c))
                self.input_blocks.append(Block(*layers))
                skips.append(c)
            if level < last:
                self.input_blocks.append(Block(Downsample(c)))
                skips.append(c)

        self.middle_block = Block(res_block(c, c), transformer(c), res_block(c, c))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(dim_mults))):
            for i in range(num_res_blocks + 1):
                layers = [res_block(c + skips.pop(), dim * mult)]
                c = dim * mult
                if level in attn_levels:
                    layers.append(transformer(c))
                if level > 0 and i == num_res_blocks:
                    layers.append(Upsample(c))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(nn.GroupNorm(GROUPS, c), nn.SiLU(), nn.Conv2d(c, LATENT_CHANNELS, 3, padding=1))

    def forward(self, x, t, context):
        t_emb = self.time_embed(self.time_pe(t).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, t_emb, context)
            skips.append(x)
        x = self.middle_block(x, t_emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, t_emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(x)
