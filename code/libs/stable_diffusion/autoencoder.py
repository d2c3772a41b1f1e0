"""Stable Diffusion 1.x's autoencoder: Rombach et al. 2022 (arXiv 2112.10752), App. G; names are the official code's."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from ..blocks import Upsample
from ..tiny_autoencoder import LATENT_CHANNELS

LATENT_SCALE = 0.18215  # 1 / standard deviation of the training images' latents, so that the UNet sees about 1


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)  # the UNet's ResBlocks have 1e-5


class ResBlock(nn.Module):
    """Residual block without time. B x C_in x H x W -> B x C_out x H x W."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with one head, residual. B x C x H x W -> the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # B x 1 x HW x C
        return x + self.proj_out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))


class Downsample(nn.Module):
    """Halve height and width; padded at the right and at the bottom alone."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def level(c_in, c_out, num_blocks):
    """The ResBlocks of one resolution; what changes the size is added behind them, under the official code's name."""
    blocks = [ResBlock(c_in if i == 0 else c_out, c_out) for i in range(num_blocks)]
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks)))


def middle(channels):
    return nn.Sequential(OrderedDict(block_1=ResBlock(channels, channels),
                                     attn_1=AttentionBlock(channels),
                                     block_2=ResBlock(channels, channels)))


class Encoder(nn.Module):
    """Images B x 3 x H x W -> mean and log-variance of the latents, B x 8 x H/8 x W/8."""

    def __init__(self, dim, dim_mults, num_res_blocks):
        super().__init__()
        dims = [dim] + [dim * m for m in dim_mults]
        self.conv_in = nn.Conv2d(3, dim, 3, padding=1)
        self.down = nn.Sequential()
        for i in range(len(dim_mults)):
            self.down.append(level(dims[i], dims[i + 1], num_res_blocks))
            if i < len(dim_mults) - 1:
                self.down[i].add_module("downsample", Downsample(dims[i + 1]))
        self.mid = middle(dims[-1])
        self.norm_out = norm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 2 * LATENT_CHANNELS, 3, padding=1)

    def forward(self, x):
        h = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents B x 4 x H/8 x W/8 -> images B x 3 x H x W. `up[0]` is the finest level, as `down[0]` is."""

    def __init__(self, dim, dim_mults, num_res_blocks):
        super().__init__()
        dims = [dim * m for m in (*dim_mults, dim_mults[-1])]
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, dims[-1], 3, padding=1)
        self.mid = middle(dims[-1])
        self.up = nn.ModuleList()
        for i in range(len(dim_mults)):
            self.up.append(level(dims[i + 1], dims[i], num_res_blocks + 1))
            if i > 0:
                self.up[i].add_module("upsample", Upsample(dims[i]))
        self.norm_out = norm(dims[0])
        self.conv_out = nn.Conv2d(dims[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for up in reversed(self.up):
            h = up(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """`.encode(images)` and `.decode(latents)`; the defaults are Stable Diffusion 1.x's, 83,653,863 parameters.

    Images are B x 3 x H x W in [-1, 1], H and W multiples of 8 (of 2^(levels - 1)); latents B x 4 x H/8 x W/8 in the
    scale of the UNet, about standard normal.
    """

    def __init__(self, dim=128, dim_mults=(1, 2, 4, 4), num_res_blocks=2):
        super().__init__()
        self.encoder = Encoder(dim, dim_mults, num_res_blocks)
        self.decoder = Decoder(dim, dim_mults, num_res_blocks)
        self.quant_conv = nn.Conv2d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1)

    def encode(self, images):
        """The mean of the latents' distribution, without sampling."""
        mean, _ = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return LATENT_SCALE * mean

    def decode(self, latents):
        """Images about in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / LATENT_SCALE))
