"""TAESD against diffusers' copy of it, its weight files, and its place in a latent diffusion model."""

import pickle

import pytest
import torch

from helpers import Evil, as_diffusers, one_line
from libs import DDPM, EDM, Flow, ModelEMA, UsageError
from libs.tiny_autoencoder import TAESD, build_decoder, build_encoder

SMALL = dict(img_shape=(3, 32, 48), timesteps=5, dim=8, context_dim=8, num_classes=4, dim_mults=(1, 2),
             attn_levels=(0,), use_vae=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files of an encoder and a decoder with random weights."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("taesd")
    paths = {}
    for name, module in (("encoder", build_encoder()), ("decoder", build_decoder())):
        paths[name] = str(folder / f"taesd_{name}.pth")
        torch.save(module.state_dict(), paths[name])
    return paths


def latent_model(kind, files, **options):
    return kind(**{**SMALL, **options}, vae_encoder_weights=files["encoder"], vae_decoder_weights=files["decoder"])


# ---- the networks

def test_agrees_with_diffusers(diffusers):
    ours = TAESD()
    theirs = as_diffusers(diffusers, ours)
    images = torch.rand(2, 3, 32, 48)
    latents = 4 * torch.randn(2, 4, 4, 6)  # far into the clamp
    with torch.no_grad():
        assert torch.allclose(ours.encoder(images), theirs.encode(2 * images - 1).latents, rtol=1e-5, atol=1e-5)
        assert torch.allclose(ours.decoder(latents), (theirs.decode(latents).sample + 1) / 2, rtol=1e-5, atol=1e-5)
    assert ours.decoder[0](torch.tensor([0.0, 3.0, -30.0])).tolist() == pytest.approx([0, 3 * 0.761594156, -3])


def test_keys_and_sizes_of_the_official_files():
    sizes = {"conv": ("weight", "bias"), "stride": ("weight",),
             "block": [f"conv.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]}

    def keys(*layout):
        return [f"{number}.{part}" for number, kind in layout for part in sizes[kind]]

    encoder, number = [(0, "conv"), (1, "block")], 2
    for _ in range(3):
        encoder += [(number, "stride"), *((number + k, "block") for k in (1, 2, 3))]
        number += 4
    encoder.append((number, "conv"))
    # 0 is the clamp, 2 a ReLU; after three blocks comes an upsampling without weights
    decoder, number = [(1, "conv")], 3
    for _ in range(3):
        decoder += [*((number + k, "block") for k in (0, 1, 2)), (number + 4, "stride")]
        number += 5
    decoder += [(number, "block"), (number + 1, "conv")]
    for network, layout, last, count in ((build_encoder(), encoder, "14.bias", 1_222_532),
                                         (build_decoder(), decoder, "19.bias", 1_222_531)):
        assert list(network.state_dict()) == keys(*layout) and keys(*layout)[-1] == last
        assert sum(p.numel() for p in network.parameters()) == count


# ---- weight files

def test_files_are_loaded(files, tmp_path):
    vae = TAESD(files["encoder"], files["decoder"])
    state = torch.load(files["encoder"], weights_only=True)
    assert all(torch.equal(vae.encoder.state_dict()[key], w) for key, w in state.items())
    torch.save({key: w.half() for key, w in state.items()}, tmp_path / "half.pth")
    vae, other = TAESD(str(tmp_path / "half.pth")), TAESD(str(tmp_path / "half.pth"))
    assert all(w.dtype == torch.float32 for w in vae.parameters())
    assert torch.allclose(vae.encoder[0].weight, state["0.weight"], atol=1e-3)
    assert not torch.equal(vae.decoder[1].weight, other.decoder[1].weight)  # one file leaves the other half random


@pytest.mark.parametrize("kind", [
    "missing", "empty", "text", "half", "last byte", "number", "code", "old code", "a tensor", "decoder", "a key less",
    "a key more", "a wrong shape", "a number"])
def test_bad_weight_files(kind, files, tmp_path):
    path, state = tmp_path / "file.pth", torch.load(files["encoder"], weights_only=True)
    with open(files["encoder"], "rb") as f:
        good = f.read()
    content = {"empty": b"", "text": b"<!DOCTYPE html>\n<html>404</html>\n", "half": good[:len(good) // 2],
               "last byte": good[:-1], "number": pickle.dumps(3, 2),
               "old code": pickle.dumps(Evil(tmp_path / "ran"), 2)}
    objects = {"code": Evil(tmp_path / "ran"), "a tensor": torch.zeros(3), "decoder": build_decoder().state_dict(),
               "a key less": dict(list(state.items())[1:]), "a key more": {**state, "15.weight": torch.zeros(1)},
               "a wrong shape": {**state, "0.weight": torch.zeros(64, 4, 3, 3)}, "a number": {**state, "0.bias": 3.0}}
    if kind in content:
        path.write_bytes(content[kind])
    elif kind in objects:
        torch.save(objects[kind], path)
    with pytest.raises(UsageError) as error:
        TAESD(encoder_path=str(path))
    assert one_line(error).startswith("model.vae_encoder_weights: ") and str(path) in one_line(error)
    assert not (tmp_path / "ran").exists()


def test_what_makes_a_missing_file(files, tmp_path):
    for name, command in (("taesd_encoder.pth", "sh download_dataset.sh taesd"),
                          ("afhq_encoder.pth", "train_autoencoder.py configs/afhq_")):
        with pytest.raises(UsageError, match=command):
            TAESD(str(tmp_path / name))
    with pytest.raises(UsageError, match="^model.vae_decoder_weights: "):
        TAESD(files["encoder"], files["encoder"])


def test_hashes_are_of_the_weights_alone(files):
    vae = TAESD(files["encoder"], files["decoder"])
    hashes = vae.hashes()
    assert hashes["encoder"] != hashes["decoder"] and TAESD(files["encoder"], files["decoder"]).hashes() == hashes
    assert vae.double().to(memory_format=torch.channels_last).hashes() == hashes
    with torch.no_grad():
        vae.decoder[1].bias[0] += 1e-3
    assert vae.hashes()["encoder"] == hashes["encoder"] and vae.hashes()["decoder"] != hashes["decoder"]


# ---- a tool of the diffusion model, not a part

def test_training_leaves_it_alone():
    model = DDPM(**SMALL).train()
    assert not any(m.training for m in model.vae.modules()) and model.model.training
    assert not any(p.requires_grad for p in model.vae.parameters())
    before, network = [p.clone() for p in model.vae.parameters()], {id(p) for p in model.model.parameters()}
    assert not any(id(p) in network for p in model.vae.parameters())
    loss = model.compute_loss(torch.rand(2, 3, 32, 48), torch.tensor([0, 1]), torch.tensor([0, 4]))
    loss.backward()
    assert all(p.grad is None for p in model.vae.parameters())
    without = [name for name, p in model.model.named_parameters() if p.grad is None]  # see TransformerBlock
    assert all(any(part in name for part in (".norm2.", ".attn2.to_q.", ".attn2.to_k.")) for name in without)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.vae.parameters()))


@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_not_in_the_checkpoint(kind, files):
    model = kind(**SMALL)
    state = model.state_dict()
    assert not any("vae" in key for key in state)
    assert {key.removeprefix("model.") for key in state if key.startswith("model.")} == set(model.model.state_dict())
    # a checkpoint that is loaded leaves the autoencoder as it is
    other = latent_model(kind, files)
    vae, weight = other.vae, other.vae.encoder[0].weight.clone()
    done = other.load_state_dict(state)
    assert not done.missing_keys and not done.unexpected_keys and torch.equal(other.vae.encoder[0].weight, weight)
    assert torch.equal(other.model.conv_in.weight, model.model.conv_in.weight)
    with pytest.raises(RuntimeError):
        other.load_state_dict({})
    assert other.vae is vae
    pixels = kind(**{**SMALL, "use_vae": False})
    assert pixels.vae is None and set(pixels.state_dict()) == set(state)


def test_average_shares_it():
    model = DDPM(**SMALL)
    ema = ModelEMA(model)
    assert ema.module.vae is model.vae and ema.module.model is not model.model
    before = model.vae.encoder[0].weight.clone()
    with torch.no_grad():
        for p in model.model.parameters():
            p += 1
    ema.update(model)
    assert torch.equal(model.vae.encoder[0].weight, before)
    assert not torch.equal(ema.module.model.conv_in.weight, model.model.conv_in.weight)
    assert all(p.requires_grad for p in model.model.parameters())


# ---- diffusion of latents

@pytest.mark.parametrize("kind", [DDPM, EDM, Flow])
def test_latent_diffusion(kind, files):
    model = latent_model(kind, files).eval()
    assert model.img_shape == (4, 4, 6) and model.model.conv_in.in_channels == 4
    images, label, t = torch.rand(3, 3, 32, 48), torch.tensor([0, 1, 3]), torch.tensor([0, 2, 4])
    latents, noise = model.encode(images), torch.randn(3, 4, 4, 6)
    assert torch.equal(latents, model.vae.encoder(images)) and not latents.requires_grad
    from_images = model.compute_loss(images, label, t, noise)
    assert torch.equal(from_images, model.compute_loss(latents, label, t, noise, encoded=True))
    assert not torch.equal(from_images, model.compute_loss(latents + 0.1, label, t, noise, encoded=True))


@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_samples_are_decoded(kind, files):
    model, last = latent_model(kind, files).eval(), []
    images = model.p_sample_loop(torch.tensor([0, 3]), callback=lambda step, steps, x: last.append(x))
    assert last[-1].shape == (2, 4, 4, 6)
    assert images.shape == (2, 3, 32, 48) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, model.vae.decoder(last[-1]).clamp(0, 1))


@pytest.mark.parametrize("shape, says", [
    ((3, 60, 64), "multiples of 8.*3 x 60 x 64"), ((1, 64, 64), "multiples of 8.*1 x 64 x 64"),
    # 24 pixels are 3 latents, which two levels cannot halve; the message counts in the image's pixels
    ((3, 24, 32), "24 is not a multiple of 16.* 16 and 32")])
def test_refused_shapes(shape, says):
    with pytest.raises(UsageError, match=says):
        DDPM(**{**SMALL, "img_shape": shape})
