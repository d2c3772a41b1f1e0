"""The UNet: size, structure, impossible settings, and what reaches its output."""

import pytest
import torch
from torch import nn

from libs import UsageError
from libs.blocks import Downsample, LabelEmbedding, ResBlock, SpatialTransformer, Upsample
from libs.unet import UNet, default_groups, default_heads


def small(**options):
    return UNet(**{**dict(dim=16, context_dim=12, num_classes=5, in_channels=1, dim_mults=(1, 2), attn_levels=(0, 1),
                          num_heads=4), **options}).eval()


def batch(n=2, channels=1, size=8):
    return torch.randn(n, channels, size, size), torch.arange(n) % 5, torch.arange(n) * 37 + 3


# ---- structure

def test_parameter_count_of_the_default_network():
    assert sum(p.numel() for p in UNet(64, 64, 10, in_channels=1).parameters()) == 6_595_649  # the handout's 6.6 M


@pytest.mark.parametrize("attn_levels", [(), (2,), (0, 1)])
def test_levels(attn_levels):
    model = small(dim_mults=(1, 2, 4), attn_levels=attn_levels)
    assert len(model.encoder) == len(model.decoder) == 3
    levels = [*zip((0, 1, 2), model.encoder), *zip((2, 1, 0), model.decoder)]
    for k, (level, (block, attention, resize)) in enumerate(levels):
        assert isinstance(block, ResBlock)
        assert isinstance(attention, SpatialTransformer) == (level in attn_levels)
        assert isinstance(resize, Downsample if k < 3 else Upsample) == (level < 2 if k < 3 else level > 0)
    assert isinstance(model.mid_attn, SpatialTransformer) and isinstance(model.label_embd, LabelEmbedding)


@pytest.mark.parametrize("dim, groups, heads", [(8, 8, 4), (64, 8, 4), (192, 24, 4), (256, 32, 8), (512, 32, 8)])
def test_default_groups_and_heads(dim, groups, heads):
    # 8 groups per 64 channels, 8 to 32; 4 heads per 128, 4 to 8
    assert default_groups(dim) == groups and default_heads(dim) == heads


def test_groups_and_heads_reach_the_layers():
    for options, groups, heads in ({}, 16, 4), (dict(num_groups=4, num_heads=2), 4, 2):
        model = UNet(128, 16, 3, dim_mults=(1,), attn_levels=(0,), **options)
        for group_norm in (model.final_conv[0], model.mid_attn.norm, model.mid_res_block1.in_layers[0]):
            assert group_norm.num_groups == groups
        assert model.mid_attn.transformer_blocks[0].attn1.num_heads == heads


# ---- shapes

@pytest.mark.parametrize("options, shape", [
    (dict(in_channels=3), (3, 8, 16)),
    (dict(in_channels=4, attn_levels=()), (4, 2, 2)),
    (dict(dim_mults=(1, 2, 4), attn_levels=(0, 1)), (1, 28, 28)),
    (dict(dim_mults=(2,), attn_levels=(0,)), (1, 5, 7)),
    (dict(patch_size=4, dim_mults=(1, 1, 2), attn_levels=(2,)), (1, 32, 16)),
    (dict(init_dim=32), (1, 8, 8)),
])
def test_shape_in_is_shape_out(options, shape):
    x = torch.randn(3, *shape)
    assert small(**options)(x, torch.zeros(3, dtype=torch.long), torch.arange(3)).shape == x.shape


def test_patches_are_laid_into_channels():
    # with patches, the first layer sees every pixel of a patch and the size is divided
    model = small(in_channels=3, out_channels=6, patch_size=2)
    seen = []
    model.conv_in.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, label, time = batch(channels=3)
    assert model(x, label, time).shape == (2, 6, 8, 8)
    assert seen[0].shape == (2, 12, 4, 4)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert torch.equal(seen[0][:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])


# ---- impossible settings

@pytest.mark.parametrize("patch_size, size, nearest", [(1, (28, 30), "28 and 32"), (1, (2, 4), "4"),
                                                       (2, (8, 12), "8 and 16")])
def test_an_impossible_size_names_the_nearest(patch_size, size, nearest):
    model = small(dim_mults=(1, 2, 4), patch_size=patch_size)
    with pytest.raises(UsageError) as error:
        model(torch.zeros(1, 1, *size), torch.zeros(1, dtype=torch.long), torch.zeros(1))
    text = str(error.value)
    assert f"{size[0]} x {size[1]}" in text and text.endswith(nearest) and "\n" not in text
    for side in nearest.split(" and "):
        model.check_size(int(side), int(side))


@pytest.mark.parametrize("options, words", [
    (dict(dim=20), "model.dim.*8 groups"),
    (dict(dim=16, init_dim=12), "model.dim.*8 groups"),
    (dict(dim=24, num_heads=5), "model.dim.*5 heads"),
    (dict(attn_levels=(0, 5)), "model.attn_levels: level 5.*0 to 1"),
])
def test_impossible_settings(options, words):
    with pytest.raises(UsageError, match=words):
        small(**options)


# ---- what reaches the output

def test_skips_are_taken_before_the_downsample():
    model = small(dim_mults=(1, 2, 4), attn_levels=(0,))
    out, cat = {}, {}
    for level, (block, attention, _) in enumerate(model.encoder):
        (block if attention is None else attention).register_forward_hook(
            lambda module, args, y, level=level: out.update({level: y}))
    for level, (block, _, _) in zip((2, 1, 0), model.decoder):
        block.register_forward_hook(lambda module, args, y, level=level: cat.update({level: args[0]}))
    model(*batch(size=16))
    for level, (channels, size) in enumerate(((16, 16), (32, 8), (64, 4))):
        assert out[level].shape == (2, channels, size, size)
        assert cat[level].shape == (2, 2 * channels, size, size)
        assert torch.equal(cat[level][:, channels:], out[level])


def test_time_and_label_reach_the_output():
    model = small()
    x, label, time = batch()
    y = model(x, label, time)
    assert (model(x, label, time + 1) - y).abs().flatten(1).amax(1).min() > 1e-4
    assert (model(x, (label + 1) % 5, time) - y).abs().flatten(1).amax(1).min() > 1e-4
    # a time may be a fraction
    assert torch.equal(model(x, label, time.float()), y) and not torch.equal(model(x, label, time + 0.5), y)


def test_null_label_is_one_more_row():
    x, _, time = batch()
    model, null = small(null_label=True), torch.full((2,), 5)
    assert all(not torch.allclose(model(x, torch.full((2,), k), time), model(x, null, time)) for k in range(5))
    with pytest.raises(IndexError):
        small()(x, null, time)


@pytest.mark.parametrize("label_in_time", [False, True])
def test_label_in_time(label_in_time):
    # with the transformers' way for the label cut, only the time embedding can carry it
    model = small(label_in_time=label_in_time)
    for m in model.modules():
        if isinstance(m, SpatialTransformer):
            nn.init.zeros_(m.transformer_blocks[0].attn2.to_v.weight)
    x, label, time = batch()
    same = torch.allclose(model(x, label, time), model(x, (label + 1) % 5, time), atol=1e-6)
    assert same == (not label_in_time)


def test_every_weight_is_used():
    model = small(label_in_time=True, null_label=True).train()
    model(*batch()).square().sum().backward()
    for name, p in model.named_parameters():
        # one context token: softmax over it is 1 whatever query and key are
        if "attn2.to_q" in name or "attn2.to_k" in name or "norm2" in name:
            assert p.grad is None, name
        else:
            assert p.grad.abs().max() > 0, name


def test_zero_init_starts_at_zero():
    model = small(zero_init=True, dim_mults=(1, 2, 4))
    assert torch.count_nonzero(model(*batch())) == 0
    # and every residual branch starts as the identity
    x, t_emb, context = torch.randn(2, 64, 4, 4), torch.randn(2, 64), torch.randn(2, 1, 12)
    assert torch.equal(model.mid_res_block1(x, t_emb), x)
    assert torch.equal(model.mid_attn(x, context), x)
