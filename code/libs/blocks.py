"""What a UNet is made of: embeddings, residual blocks and transformer blocks.

Sub-modules carry the names of Stable Diffusion's own code (`in_layers`, `to_q`,
`ff.net`, ...), so that the weights of an SD 1.x checkpoint fit them as they are.
Shapes: B images, C channels, H x W pixels, L = H * W tokens, M context tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SinusoidalPE(nn.Module):
    """Embed B noise levels as B x dim: cosines, then sines, of geometric frequencies.

    Vaswani et al. 2017, Section 3.5, in Stable Diffusion's order (cosine first).
    Times of the order of 1 to 1000 are told apart best.
    """

    def __init__(self, dim, max_period=10000):
        super().__init__()
        if dim % 2:
            raise ValueError(f"SinusoidalPE: dim is {dim}; it must be even")
        self.dim, self.max_period = dim, max_period
        # empty: it only carries the model's dtype, for the output; frequencies kept in that dtype would be rounded
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, time):
        # phases of 1000 radians need more than half precision: always fp32
        half = self.dim // 2
        i = torch.arange(half, dtype=torch.float32, device=time.device)
        args = time.float()[:, None] * torch.exp(-math.log(self.max_period) / half * i)
        return torch.cat([args.cos(), args.sin()], dim=-1).to(self.like.dtype)


class LabelEmbedding(nn.Module):
    """Embed B labels as one context token each: B x 1 x dim.

    With `null_label` there is one row more, index `num_classes`: "no label", the
    unconditional branch of classifier-free guidance (Ho & Salimans 2022).
    """

    def __init__(self, num_classes, dim, null_label=False):
        super().__init__()
        self.embd = nn.Embedding(num_classes + int(null_label), dim)

    def forward(self, label):
        return self.embd(label)[:, None]


class ResBlock(nn.Module):
    """Residual block; the time enters as one added value per channel.

    x: B x C_in x H x W, t_emb: B x time_dim -> B x C_out x H x W.
    """

    def __init__(self, in_channels, out_channels, time_dim, num_groups=8, dropout=0.0):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(num_groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(num_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x, t_emb):
        h = self.in_layers(x)
        h = h + self.emb_layers(t_emb)[:, :, None, None]
        h = self.out_layers(h)
        return self.skip_connection(x) + h


class CrossAttention(nn.Module):
    """Multi-head attention from B x L x dim queries to B x M x context_dim keys and values.

    Without a context it is self-attention. Vaswani et al. 2017, eq. 1.
    """

    def __init__(self, dim, context_dim=None, num_heads=4):
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"attention: {dim} channels cannot be divided among {num_heads} heads; "
                f"give num_heads a divisor of {dim}"
            )
        context_dim = dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def _heads(self, x):
        # B x L x dim -> B x heads x L x dim/heads
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self._heads(self.to_q(x)), self._heads(self.to_k(context)), self._heads(self.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Attention(CrossAttention):
    """Self-attention: every pixel looks at every other. B x L x dim -> B x L x dim."""

    def __init__(self, dim, num_heads=4):
        super().__init__(dim, None, num_heads)

    def forward(self, x):
        return super().forward(x)


class GEGLU(nn.Module):
    """Linear layer with a GELU gate (Shazeer 2020). ... x dim_in -> ... x dim_out."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """The transformer's MLP, with the gate that Stable Diffusion has in it.

    The hidden width is `mult * dim`: 1 in our UNet, 4 in Stable Diffusion's.
    """

    def __init__(self, dim, mult=1):
        super().__init__()
        # index 1 is SD's dropout; it keeps the last layer's name `net.2`
        self.net = nn.Sequential(GEGLU(dim, dim * mult), nn.Identity(), nn.Linear(dim * mult, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, MLP; each after a LayerNorm, each residual."""

    def __init__(self, dim, context_dim, num_heads=4, ff_mult=1):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, ff_mult)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        if context.shape[1] == 1:
            # softmax over one token is 1: every pixel gets that token's value, whatever its query. Exactly the same
            # output; norm2, to_q and to_k would have a gradient of zero and have none.
            x = x + self.attn2.to_out(self.attn2.to_v(context))
        else:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map.

    x: B x C x H x W, context: B x M x context_dim -> B x C x H x W. Rombach et al. 2022, App. E.2.1.
    """

    def __init__(self, channels, context_dim, num_heads=4, num_groups=8, ff_mult=1):
        super().__init__()
        # eps is Stable Diffusion's; its ResBlocks use the default 1e-5
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, context_dim, num_heads, ff_mult)]
        )
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, context):
        h = self.proj_in(self.norm(x))
        size = h.shape[-2:]
        h = h.flatten(2).transpose(1, 2)  # B x L x C
        for block in self.transformer_blocks:
            h = block(h, context)
        h = h.transpose(1, 2).unflatten(2, size)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels, out_channels=None):
        super().__init__()
        self.op = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution against the blockiness."""

    def __init__(self, channels, out_channels=None):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
