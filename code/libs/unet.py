"""The conditional UNet: eps_theta(x, c, t) of the handout, Section 4.1."""

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Downsample, LabelEmbedding, ResBlock, SinusoidalPE, SpatialTransformer, Upsample
from .common.errors import UsageError


def default_groups(dim):
    """8 groups per 64 channels, at least 8 and at most 32 (as many as Stable Diffusion has)."""
    return min(max(8 * (dim // 64), 8), 32)


def default_heads(dim):
    """4 heads per 128 channels, at least 4 and at most 8."""
    return min(max(4 * (dim // 128), 4), 8)


class UNet(nn.Module):
    """UNet after Stable Diffusion's, one ResBlock a level.

    Args:
        dim: channels at the finest level; level i has `dim * dim_mults[i]`.
        context_dim: width of the label's context token.
        num_classes: labels are 0 ... num_classes - 1.
        in_channels, out_channels: of the image; `out_channels` None means the same.
        dim_mults: one factor per level; each level after the first halves the image.
        attn_levels: levels that have a SpatialTransformer (0 is the finest). The middle always has one.
        init_dim: channels after `conv_in`, None means `dim`.
        num_groups, num_heads: None means `default_groups(dim)` and `default_heads(dim)`.
        dropout: inside the ResBlocks.
        null_label: one more label, `num_classes`, that means "no label" (for guidance).
        label_in_time: also add the label to the time embedding, so that it reaches every ResBlock
            (as in Dhariwal & Nichol 2021, Section 2), not the transformers alone.
        zero_init: start the last layer of every residual branch at zero, so that the network starts
            as the identity (Dhariwal & Nichol 2021; Karras et al. 2022, App. F).
        patch_size: work on patches of p x p pixels laid into channels (Luhman & Luhman 2022):
            the finest level is p times coarser, so wide layers cost p * p times less.

    forward(x, label, time): B x C x H x W, B (long), B (long or float) -> B x C x H x W.

    Raises:
        UsageError: channels that the groups or heads do not divide; an image size that
            `size_multiple` does not divide.
    """

    def __init__(self, dim, context_dim, num_classes, in_channels=3, out_channels=None,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), init_dim=None, num_groups=None,
                 num_heads=None, dropout=0.0, null_label=False, label_in_time=False,
                 zero_init=False, patch_size=1):
        super().__init__()
        init_dim = init_dim or dim
        num_groups = num_groups or default_groups(dim)
        num_heads = num_heads or default_heads(dim)
        out_channels = out_channels or in_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        dims = [init_dim] + [dim * m for m in dim_mults]
        self._check(dims, dim_mults, attn_levels, num_groups, num_heads)
        self.patch_size = patch_size
        # a size that this divides survives every Downsample and Upsample
        self.size_multiple = patch_size * 2 ** (len(dim_mults) - 1)

        # time: sinusoid, then a small MLP; label: one context token
        time_dim = dim * 4
        self.time_embd = nn.Sequential(
            SinusoidalPE(dim), nn.Linear(dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        self.label_embd = LabelEmbedding(num_classes, context_dim, null_label)
        self.label_to_time = nn.Linear(context_dim, time_dim) if label_in_time else None

        def res_block(c_in, c_out):
            return ResBlock(c_in, c_out, time_dim, num_groups, dropout)

        def attention(channels, level):
            if level not in attn_levels:
                return None
            return SpatialTransformer(channels, context_dim, num_heads, num_groups)

        self.conv_in = nn.Conv2d(in_channels * patch_size ** 2, init_dim, 3, padding=1)

        last = len(dim_mults) - 1
        self.encoder = nn.ModuleList()
        for level, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:])):
            self.encoder.append(nn.ModuleList([
                res_block(c_in, c_out),
                attention(c_out, level),
                Downsample(c_out) if level < last else None,
            ]))

        self.mid_res_block1 = res_block(dims[-1], dims[-1])
        self.mid_attn = SpatialTransformer(dims[-1], context_dim, num_heads, num_groups)
        self.mid_res_block2 = res_block(dims[-1], dims[-1])

        # the encoder in reverse; each level ends with the channels that the next finer one has
        self.decoder = nn.ModuleList()
        for level, (c_out, c_in) in reversed(list(enumerate(zip(dims[:-1], dims[1:])))):
            self.decoder.append(nn.ModuleList([
                res_block(2 * c_in, c_out),
                attention(c_out, level),
                Upsample(c_out) if level > 0 else None,
            ]))

        self.final_conv = nn.Sequential(
            nn.GroupNorm(num_groups, init_dim),
            nn.SiLU(),
            nn.Conv2d(init_dim, out_channels * patch_size ** 2, 3, padding=1),
        )
        if zero_init:
            self._zero_init()

    @staticmethod
    def _check(dims, dim_mults, attn_levels, num_groups, num_heads):
        for channels in dims:
            if channels % num_groups:
                raise UsageError(
                    f"model.dim: {channels} channels cannot be divided into {num_groups} groups; "
                    f"use a multiple of {num_groups}"
                )
            if channels % num_heads:
                raise UsageError(
                    f"model.dim: {channels} channels cannot be divided among {num_heads} heads; "
                    f"use a multiple of {num_heads}"
                )
        wrong = [level for level in attn_levels if not 0 <= level < len(dim_mults)]
        if wrong:
            raise UsageError(
                f"model.attn_levels: level {wrong[0]} does not exist; "
                f"model.dim_mults has levels 0 to {len(dim_mults) - 1}"
            )

    def _zero_init(self):
        last = [m.out_layers[-1] for m in self.modules() if isinstance(m, ResBlock)]
        last += [m.proj_out for m in self.modules() if isinstance(m, SpatialTransformer)]
        for conv in (*last, self.final_conv[-1]):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def check_size(self, height, width, scale=1):
        """Raise UsageError unless H x W images can pass; names the nearest sizes that can.

        scale: pixels of the image per pixel here, where an autoencoder comes first; the message is in the image's.
        """
        height, width, m = height * scale, width * scale, self.size_multiple * scale
        for size in (height, width):
            if size % m or size < m:
                near = [s for s in (size // m * m, (size // m + 1) * m) if s > 0]
                raise UsageError(
                    f"dataset.img_size: image size {height} x {width}: {size} is not a multiple of {m}, which a UNet "
                    f"of this depth needs; the nearest sizes are {' and '.join(map(str, near))}"
                )

    def forward(self, x, label, time):
        self.check_size(*x.shape[-2:])
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)

        context = self.label_embd(label)  # B x 1 x context_dim
        t_emb = self.time_embd(time)  # B x time_dim
        if self.label_to_time is not None:
            t_emb = t_emb + self.label_to_time(context[:, 0])

        x = self.conv_in(x)

        skips = []
        for block, attn, downsample in self.encoder:
            x = block(x, t_emb)
            if attn is not None:
                x = attn(x, context)
            skips.append(x)  # before the Downsample: same size as the decoder's level
            if downsample is not None:
                x = downsample(x)

        x = self.mid_res_block1(x, t_emb)
        x = self.mid_attn(x, context)
        x = self.mid_res_block2(x, t_emb)

        for block, attn, upsample in self.decoder:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, t_emb)
            if attn is not None:
                x = attn(x, context)
            if upsample is not None:
                x = upsample(x)

        x = self.final_conv(x)
        return F.pixel_shuffle(x, self.patch_size) if self.patch_size > 1 else x
