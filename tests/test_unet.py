"""The UNet: size, structure, refusals, and what reaches its output."""


import pytest
import torch
from torch import nn

from libs import UsageError
from libs.blocks import (Downsample, LabelEmbedding, ResBlock, SpatialTransformer, Upsample)
from libs.unet import UNet, default_groups, default_heads


def small(**options):
    settings = dict(dim=16, context_dim=12, num_classes=5, in_channels=1, dim_mults=(1, 2), attn_levels=(0, 1),
                    num_heads=4)
    settings.update(options)
    return UNet(**settings).eval()


def batch(n=2, channels=1, size=8):
    return torch.randn(n, channels, size, size), torch.arange(n) % 5, torch.arange(n) * 37 + 3


# ---- size of the network

def conv(c_in, c_out, k):
    return c_in * c_out * k * k + c_out


def linear(c_in, c_out):
    return c_in * c_out + c_out


def norm(c):
    return 2 * c


def res_block(c_in, c_out, time_dim):
    shortcut = conv(c_in, c_out, 1) if c_in != c_out else 0
    return norm(c_in) + conv(c_in, c_out, 3) + linear(time_dim, c_out) + norm(c_out) + conv(c_out, c_out, 3) + shortcut


def transformer(c, context):
    self_attention = 3 * c * c + linear(c, c)
    cross_attention = c * c + 2 * context * c + linear(c, c)
    mlp = linear(c, 2 * c) + linear(c, c)
    return norm(c) + conv(c, c, 1) + 3 * norm(c) + self_attention + cross_attention + mlp + conv(c, c, 1)


def test_parameter_count_of_the_default_network():
    # counted from the design, layer by layer
    dim, context, time = 64, 64, 256
    a, b, c = 64, 128, 256
    expected = linear(dim, time) + linear(time, time) + 10 * context + conv(1, dim, 3)
    expected += res_block(dim, a, time) + transformer(a, context) + conv(a, a, 3)
    expected += res_block(a, b, time) + transformer(b, context) + conv(b, b, 3)
    expected += res_block(b, c, time)
    expected += 2 * res_block(c, c, time) + transformer(c, context)
    expected += res_block(2 * c, b, time) + conv(b, b, 3)
    expected += res_block(2 * b, a, time) + transformer(a, context) + conv(a, a, 3)
    expected += res_block(2 * a, dim, time) + transformer(dim, context)
    expected += norm(dim) + conv(dim, 1, 3)

    model = UNet(64, 64, 10, in_channels=1)
    count = sum(p.numel() for p in model.parameters())
    assert count == expected == 6_595_649
    assert round(count / 1e6, 1) == 6.6


def test_attributes_of_the_design():
    model = UNet(64, 64, 10)
    for name in ("time_embd", "label_embd", "conv_in", "encoder", "mid_res_block1", "mid_attn", "mid_res_block2",
                 "decoder", "final_conv"):
        assert isinstance(getattr(model, name), nn.Module), name
    assert isinstance(model.label_embd, LabelEmbedding)
    assert isinstance(model.mid_res_block1, ResBlock) and isinstance(model.mid_res_block2, ResBlock)
    assert isinstance(model.mid_attn, SpatialTransformer)


@pytest.mark.parametrize("attn_levels", [(), (0,), (2,), (0, 1), (0, 1, 2)])
def test_levels(attn_levels):
    model = small(dim_mults=(1, 2, 4), attn_levels=attn_levels)
    assert len(model.encoder) == len(model.decoder) == 3
    for level, (block, attention, down) in enumerate(model.encoder):
        assert isinstance(block, ResBlock)
        assert isinstance(attention, SpatialTransformer) == (level in attn_levels)
        assert isinstance(down, Downsample) == (level < 2)
    for level, (block, attention, up) in zip((2, 1, 0), model.decoder):
        assert isinstance(block, ResBlock)
        assert isinstance(attention, SpatialTransformer) == (level in attn_levels)
        assert isinstance(up, Upsample) == (level > 0)
    assert isinstance(model.mid_attn, SpatialTransformer)


@pytest.mark.parametrize("dim, groups, heads", [
    (8, 8, 4), (32, 8, 4), (64, 8, 4), (128, 16, 4), (192, 24, 4), (256, 32, 8), (320, 32, 8), (512, 32, 8),
])
def test_default_groups_and_heads(dim, groups, heads):
    # 8 groups per 64 channels, 8 to 32; 4 heads per 128, 4 to 8
    assert default_groups(dim) == groups and default_heads(dim) == heads


def test_defaults_reach_the_layers():
    model = UNet(128, 16, 3, dim_mults=(1,), attn_levels=(0,))
    assert model.final_conv[0].num_groups == model.mid_attn.norm.num_groups == 16
    assert model.mid_attn.transformer_blocks[0].attn1.num_heads == 4
    model = UNet(128, 16, 3, dim_mults=(1,), attn_levels=(0,), num_groups=4, num_heads=2)
    assert model.final_conv[0].num_groups == model.mid_res_block1.in_layers[0].num_groups == 4
    assert model.mid_attn.transformer_blocks[0].attn2.num_heads == 2


# ---- shapes

@pytest.mark.parametrize("options, shape", [
    (dict(), (1, 8, 8)),
    (dict(in_channels=3), (3, 8, 16)),
    (dict(in_channels=4, attn_levels=()), (4, 2, 2)),
    (dict(dim_mults=(1, 2, 4), attn_levels=(0, 1)), (1, 28, 28)),
    (dict(dim_mults=(1, 2, 2, 4), attn_levels=(3,)), (1, 16, 24)),
    (dict(dim_mults=(2,), attn_levels=(0,)), (1, 5, 7)),
    (dict(in_channels=3, patch_size=2), (3, 12, 8)),
    (dict(patch_size=4, dim_mults=(1, 1, 2), attn_levels=(2,)), (1, 32, 16)),
    (dict(init_dim=32), (1, 8, 8)),
    (dict(null_label=True, label_in_time=True, zero_init=True, dropout=0.1), (1, 8, 8)),
])
def test_shape_in_is_shape_out(options, shape):
    model = small(**options)
    for n in (1, 3):
        x = torch.randn(n, *shape)
        assert model(x, torch.zeros(n, dtype=torch.long), torch.arange(n)).shape == x.shape


@pytest.mark.parametrize("patch_size", [1, 2])
def test_out_channels(patch_size):
    model = small(in_channels=3, out_channels=6, patch_size=patch_size)
    x, label, time = batch(channels=3)
    assert model(x, label, time).shape == (2, 6, 8, 8)


def test_block_shapes():
    x, t_emb, context = torch.randn(2, 16, 8, 6), torch.randn(2, 32), torch.randn(2, 3, 12)
    assert ResBlock(16, 24, 32)(x, t_emb).shape == (2, 24, 8, 6)
    assert SpatialTransformer(16, 12)(x, context).shape == x.shape
    assert Downsample(16)(x).shape == (2, 16, 4, 3)
    assert Upsample(16)(x).shape == (2, 16, 16, 12)
    assert LabelEmbedding(10, 12)(torch.tensor([0, 9])).shape == (2, 1, 12)
    assert LabelEmbedding(10, 12, null_label=True)(torch.tensor([10])).shape == (1, 1, 12)


def test_patches_are_laid_into_channels():
    # with patches, the first layer sees every pixel of a patch and the size is divided
    model = small(in_channels=3, patch_size=2)
    seen = []
    model.conv_in.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x, label, time = batch(channels=3)
    model(x, label, time)
    assert seen[0].shape == (2, 12, 4, 4)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert torch.equal(seen[0][:, 4 * c + 2 * i + j], x[:, c, i::2, j::2])


# ---- refusals

@pytest.mark.parametrize("size, nearest", [((28, 30), "28 and 32"), ((14, 28), "12 and 16"), ((2, 4), "4")])
def test_refused_sizes_name_sizes_that_work(size, nearest):
    model = small(dim_mults=(1, 2, 4))
    with pytest.raises(UsageError) as error:
        model(torch.zeros(1, 1, *size), torch.zeros(1, dtype=torch.long), torch.zeros(1))
    text = str(error.value)
    assert f"{size[0]} x {size[1]}" in text and text.endswith(nearest) and "\n" not in text
    for side in nearest.split(" and "):
        model.check_size(int(side), int(side))
        model(torch.zeros(1, 1, int(side), int(side)), torch.zeros(1, dtype=torch.long), torch.zeros(1))


def test_patches_count_in_the_size():
    model = small(dim_mults=(1, 2, 4), patch_size=2)
    model.check_size(8, 16)
    with pytest.raises(UsageError, match="multiple of 8.* 8 and 16"):
        model.check_size(12, 16)


@pytest.mark.parametrize("options, word", [
    (dict(dim=20), "8 groups"),  # 20 / 8
    (dict(dim=16, num_groups=3), "3 groups"),
    (dict(dim=16, init_dim=12), "8 groups"),
    (dict(dim=24, num_heads=5), "5 heads"),
])
def test_dim_that_does_not_divide(options, word):
    with pytest.raises(UsageError, match=word) as error:
        small(**options)
    assert "model.dim" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("levels", [(2,), (-1,), (0, 5)])
def test_attention_level_that_does_not_exist(levels):
    with pytest.raises(UsageError, match="model.attn_levels.*0 to 1"):
        small(attn_levels=levels)


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
    assert torch.equal(model(x, label, time), y)


def test_time_may_be_a_fraction():
    model = small()
    x, label, time = batch()
    assert torch.equal(model(x, label, time.float()), model(x, label, time))
    assert not torch.equal(model(x, label, time + 0.5), model(x, label, time))


def test_null_label_is_one_more_row():
    model = small(null_label=True)
    x, _, time = batch()
    null = model(x, torch.full((2,), 5), time)
    assert all(not torch.allclose(model(x, torch.full((2,), k), time), null) for k in range(5))
    with pytest.raises(IndexError):
        small()(x, torch.full((2,), 5), time)


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


def test_images_of_a_batch_do_not_mix():
    model = small(dim_mults=(1, 2), label_in_time=True)
    x, label, time = batch(4)
    together = model(x, label, time)
    for i in range(4):
        alone = model(x[i:i + 1], label[i:i + 1], time[i:i + 1])
        assert torch.allclose(alone, together[i:i + 1], atol=1e-5)


def test_every_weight_is_used():
    model = small(label_in_time=True, null_label=True).train()
    x, label, time = batch()
    model(x, label, time).square().sum().backward()
    for name, p in model.named_parameters():
        # one context token: softmax over it is 1 whatever query and key say
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
    assert torch.count_nonzero(small()(*batch())) > 0


def test_float64():
    model = small().double()
    x, label, time = batch()
    y = model(x.double(), label, time)
    assert y.dtype == torch.float64
    assert torch.allclose(model.float()(x, label, time).double(), y, atol=1e-4)
