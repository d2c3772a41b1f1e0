"""The UNet's blocks, against formulas written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from libs.blocks import (Attention, CrossAttention, Downsample, LabelEmbedding, ResBlock, SinusoidalPE,
                         SpatialTransformer, TransformerBlock, Upsample)


def written_out_attention(module, x, context):
    """softmax(Q K^T / sqrt(d)) V, head by head."""
    q, k, v = (x @ module.to_q.weight.T, context @ module.to_k.weight.T, context @ module.to_v.weight.T)
    d = q.shape[-1] // module.num_heads
    heads = []
    for h in range(module.num_heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(weights @ v[..., part])
    return torch.cat(heads, -1) @ module.to_out[0].weight.T + module.to_out[0].bias


@pytest.mark.parametrize("heads", [1, 4])
def test_self_attention(heads):
    module = Attention(16, heads)
    x = 3 * torch.randn(2, 10, 16)
    assert torch.allclose(module(x), written_out_attention(module, x, x), atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7])
def test_cross_attention(tokens):
    module = CrossAttention(16, 12, 4)
    x, context = 3 * torch.randn(2, 10, 16), 3 * torch.randn(2, tokens, 12)
    assert torch.allclose(module(x, context), written_out_attention(module, x, context), atol=1e-5)


def test_sinusoidal_embedding():
    dim = 32
    for time in (0, 1, 7, 99, 500, 999, 0.25):
        phases = [time * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
        expected = torch.tensor([math.cos(p) for p in phases] + [math.sin(p) for p in phases])
        # fp32 phases near 1000 are known to 6e-5
        assert torch.allclose(SinusoidalPE(dim)(torch.tensor([time]))[0], expected, atol=1e-4)


def test_sinusoidal_embedding_keeps_its_precision_in_half():
    # rounded to half, a frequency near 0.5 would be off by 0.1 radians at time 999
    time = torch.tensor([999])
    assert torch.allclose(SinusoidalPE(32).half()(time).float(), SinusoidalPE(32)(time), atol=2e-3)


def test_res_block_formula():
    block = ResBlock(16, 24, 32, num_groups=4)
    x, t_emb = torch.randn(2, 16, 6, 6), torch.randn(2, 32)

    def group_norm(h, layer):
        g = h.reshape(len(h), 4, -1)
        g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return g.reshape(h.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(h):
        return h / (1 + (-h).exp())

    for layer in (block.in_layers[0], block.out_layers[0]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    h = block.in_layers[2](silu(group_norm(x, block.in_layers[0])))
    h = h + (silu(t_emb) @ block.emb_layers[1].weight.T + block.emb_layers[1].bias)[:, :, None, None]
    h = block.out_layers[3](silu(group_norm(h, block.out_layers[0])))
    assert torch.allclose(block(x, t_emb), block.skip_connection(x) + h, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3])  # one: the label's, where no query is needed
def test_transformer_block_formula(tokens):
    block = TransformerBlock(16, 12, num_heads=4)
    x, context = torch.randn(2, 10, 16), torch.randn(2, tokens, 12)

    def layer_norm(h, layer):
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h * layer.weight + layer.bias

    h = layer_norm(x, block.norm1)
    expected = x + written_out_attention(block.attn1, h, h)
    expected = expected + written_out_attention(block.attn2, layer_norm(expected, block.norm2), context)
    proj, out = block.ff.net[0].proj, block.ff.net[2]
    h = layer_norm(expected, block.norm3) @ proj.weight.T + proj.bias
    value, gate = h[..., :16], h[..., 16:]  # as in Stable Diffusion: the gate is the second half
    gate = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    expected = expected + (value * gate) @ out.weight.T + out.bias
    assert torch.allclose(block(x, context), expected, atol=1e-5)


def test_upsample_and_downsample():
    up, down, x = Upsample(2), Downsample(2), torch.randn(1, 2, 4, 6)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(up(x), up.conv(doubled), atol=1e-6)
    # every second pixel of the convolution at full size
    full = F.conv2d(x, down.op.weight, down.op.bias, padding=1)
    assert torch.allclose(down(x), full[..., ::2, ::2], atol=1e-6)


def test_spatial_transformer_is_a_residual_over_pixels():
    module, x, context = SpatialTransformer(16, 12), torch.randn(2, 16, 3, 5), torch.randn(2, 4, 12)
    h = module.proj_in(module.norm(x)).permute(0, 2, 3, 1).reshape(2, 15, 16)
    h = module.transformer_blocks[0](h, context).reshape(2, 3, 5, 16).permute(0, 3, 1, 2)
    assert torch.allclose(module(x, context), x + module.proj_out(h), atol=1e-5)


def test_label_embedding():
    module = LabelEmbedding(10, 12, null_label=True)
    assert torch.equal(module(torch.tensor([0, 10])), module.embd.weight[[0, 10]][:, None])
    assert LabelEmbedding(10, 12).embd.num_embeddings == 10
