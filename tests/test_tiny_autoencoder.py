"""TAESD against diffusers' copy of it, its weight files, and its place in a latent diffusion model."""

import os
import pickle

import pytest
import torch

from helpers import as_diffusers
from libs import DDPM, EDM, UsageError
from libs.tiny_autoencoder import TAESD, build_decoder, build_encoder
from libs.training.update import ModelEMA

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


# ---- the networks

def test_agrees_with_diffusers(diffusers):
    ours = TAESD()
    theirs = as_diffusers(diffusers, ours)
    images = torch.rand(2, 3, 32, 48)
    latents = 4 * torch.randn(2, 4, 4, 6)  # far into the clamp
    with torch.no_grad():
        assert torch.allclose(ours.encoder(images), theirs.encode(2 * images - 1).latents, rtol=1e-5, atol=1e-5)
        assert torch.allclose(ours.decoder(latents), (theirs.decode(latents).sample + 1) / 2, rtol=1e-5, atol=1e-5)


def test_parameter_counts():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    def conv(c_in, c_out, bias=True):
        return 9 * c_in * c_out + bias * c_out

    # 10 blocks of three convolutions, three convolutions without bias that change the size
    body = 30 * conv(64, 64) + 3 * conv(64, 64, bias=False)
    assert count(build_encoder()) == conv(3, 64) + body + conv(64, 4) == 1_222_532
    assert count(build_decoder()) == conv(4, 64) + body + conv(64, 3) == 1_222_531


def test_keys_of_the_official_files():
    blocks = [f"conv.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]

    def keys(*layout):
        found = []
        for number, kind in layout:
            found += [f"{number}.{part}" for part in {"conv": ("weight", "bias"), "stride": ("weight",),
                                                      "block": blocks}[kind]]
        return found

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

    assert list(build_encoder().state_dict()) == keys(*encoder)
    assert list(build_decoder().state_dict()) == keys(*decoder)
    encoder, decoder = list(build_encoder().state_dict()), list(build_decoder().state_dict())
    assert encoder[0] == "0.weight" and encoder[2] == "1.conv.0.weight" and encoder[-1] == "14.bias"
    assert decoder[0] == "1.weight" and decoder[2] == "3.conv.0.weight" and decoder[-1] == "19.bias"


def test_shapes():
    vae = TAESD()
    for height, width in ((8, 8), (128, 128), (40, 24)):
        latents = vae.encoder(torch.rand(1, 3, height, width))
        assert latents.shape == (1, 4, height // 8, width // 8) == (1, *TAESD.latent_shape((3, height, width)))
        assert vae.decoder(latents).shape == (1, 3, height, width)


def test_latents_are_clamped_softly():
    decoder = build_decoder()
    assert decoder[0](torch.tensor([0.0, 3.0, -30.0])).tolist() == pytest.approx([0, 3 * 0.761594156, -3])


# ---- weight files

def test_files_are_loaded(files):
    vae = TAESD(files["encoder"], files["decoder"])
    for name in ("encoder", "decoder"):
        for key, w in torch.load(files[name], weights_only=True).items():
            assert torch.equal(getattr(vae, name).state_dict()[key], w)


def test_one_file_leaves_the_other_half_random(files):
    first, second = TAESD(encoder_path=files["encoder"]), TAESD(encoder_path=files["encoder"])
    assert torch.equal(first.encoder[0].weight, second.encoder[0].weight)
    assert not torch.equal(first.decoder[1].weight, second.decoder[1].weight)


class Code:
    """Its pickle runs a command when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def broken(kind, files, folder):
    """A path that does not hold an encoder's weights."""
    path = str(folder / "file.pth")
    if kind == "missing" or kind == "missing folder":
        return path if kind == "missing" else str(folder / "no" / "file.pth")
    if kind == "folder":
        return str(folder)
    with open(files["encoder"], "rb") as f:
        good = f.read()
    state = torch.load(files["encoder"], weights_only=True)
    data = {"empty": b"", "text": b"<!DOCTYPE html>\n<html>404</html>\n", "half": good[:len(good) // 2],
            "last byte": good[:-1], "first bytes": good[:100], "zeros": bytes(1000),
            "noise": bytes(i * i * 31 % 251 for i in range(1000)),
            "pickle of a number": pickle.dumps(3, 2)}
    if kind in data:
        with open(path, "wb") as f:
            f.write(data[kind])
    elif kind == "code":
        torch.save(Code(str(folder / "ran")), path)
    elif kind == "old code":
        with open(path, "wb") as f:
            pickle.dump(Code(str(folder / "ran")), f, 2)
    elif kind == "half of an old file":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        with open(path, "rb+") as f:
            f.truncate(os.path.getsize(path) // 2)
    else:
        torch.save({"decoder": build_decoder().state_dict(), "a tensor": torch.zeros(3), "a list": [1, 2],
                    "a key less": dict(list(state.items())[1:]),
                    "a key more": {**state, "15.weight": torch.zeros(1)},
                    "a wrong shape": {**state, "0.weight": torch.zeros(64, 4, 3, 3)},
                    "a number": {**state, "0.bias": 3.0}}[kind], path)
    return path


@pytest.mark.parametrize("kind", [
    "missing", "missing folder", "folder", "empty", "text", "half", "last byte", "first bytes", "zeros", "noise",
    "pickle of a number", "code", "old code", "half of an old file", "decoder", "a tensor", "a list", "a key less",
    "a key more", "a wrong shape", "a number",
])
def test_bad_weight_files(kind, files, tmp_path):
    path = broken(kind, files, tmp_path)
    with pytest.raises(UsageError) as error:
        TAESD(encoder_path=path)
    text = str(error.value)
    assert "\n" not in text and text.startswith("model.vae_encoder_weights: ") and path in text
    assert ("train_autoencoder.py" in text) == (kind in ("missing", "missing folder", "folder"))
    assert not (tmp_path / "ran").exists()


def test_what_makes_a_missing_file(tmp_path):
    for name, maker in (("taesd_encoder.pth", "sh download_dataset.sh taesd"), ("afhq_encoder.pth",
                                                                               "train_autoencoder.py ./configs/afhq_")):
        with pytest.raises(UsageError, match=maker):
            TAESD(str(tmp_path / "taesd_x" / name))


def test_hashes_are_of_the_weights_alone(files, tmp_path):
    vae = TAESD(files["encoder"], files["decoder"])
    hashes = vae.hashes()
    assert hashes["encoder"] != hashes["decoder"] and TAESD(files["encoder"], files["decoder"]).hashes() == hashes
    assert vae.double().to(memory_format=torch.channels_last).hashes() == hashes
    with torch.no_grad():
        vae.decoder[1].bias[0] += 1e-3
    assert vae.hashes()["encoder"] == hashes["encoder"] and vae.hashes()["decoder"] != hashes["decoder"]


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_anywhere(zipped, files, tmp_path):
    path = str(tmp_path / "file.pth")
    torch.save(torch.load(files["encoder"], weights_only=True), path, _use_new_zipfile_serialization=zipped)
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        good = f.read()
    for length in [*range(1, 60), *range(60, 4000, 97), *range(4000, size, size // 10), size - 22, size - 1]:
        with open(path, "wb") as f:
            f.write(good[:length])
        with pytest.raises(UsageError) as error:
            TAESD(encoder_path=path)
        assert "\n" not in str(error.value), length


def test_wrong_decoder_is_named(files):
    with pytest.raises(UsageError, match="^model.vae_decoder_weights: "):
        TAESD(files["encoder"], files["encoder"])


def test_half_precision_files(files, tmp_path):
    state = torch.load(files["encoder"], weights_only=True)
    torch.save({k: w.half() for k, w in state.items()}, tmp_path / "half.pth")
    vae = TAESD(encoder_path=str(tmp_path / "half.pth"))
    assert all(w.dtype == torch.float32 for w in vae.parameters())
    assert torch.allclose(vae.encoder[0].weight, state["0.weight"], atol=1e-3)


# ---- a tool of the diffusion model, not a part

@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_frozen(kind):
    model = kind(**SMALL)
    assert not any(p.requires_grad for p in model.vae.parameters())
    assert all(p.requires_grad for p in model.model.parameters())
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == model.model.training == mode
        assert not any(m.training for m in model.vae.modules())
    model.eval()
    assert not model.training


def test_training_leaves_it_alone():
    model = DDPM(**SMALL).train()
    before = [p.clone() for p in model.vae.parameters()]
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
    # what is loaded leaves the autoencoder as it is
    other = kind(**SMALL, vae_encoder_weights=files["encoder"], vae_decoder_weights=files["decoder"])
    weight = other.vae.encoder[0].weight.clone()
    done = other.load_state_dict(state)
    assert not done.missing_keys and not done.unexpected_keys
    assert torch.equal(other.vae.encoder[0].weight, weight)
    assert torch.equal(other.model.conv_in.weight, model.model.conv_in.weight)
    pixels = kind(**{**SMALL, "use_vae": False})
    assert pixels.vae is None and set(pixels.state_dict()) == set(state)


def test_a_wrong_checkpoint_leaves_it_in_place():
    model = DDPM(**SMALL)
    vae = model.vae
    with pytest.raises(RuntimeError):
        model.load_state_dict({})
    assert model.vae is vae


def test_not_among_the_networks_parameters():
    model = DDPM(**SMALL)
    theirs = {id(p) for p in model.vae.parameters()}
    assert theirs and not any(id(p) in theirs for p in model.model.parameters())


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

@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_latent_diffusion(kind, files):
    model = kind(**SMALL, vae_encoder_weights=files["encoder"], vae_decoder_weights=files["decoder"]).eval()
    assert model.img_shape == (4, 4, 6) and model.model.conv_in.in_channels == 4
    images, label, t = torch.rand(3, 3, 32, 48), torch.tensor([0, 1, 3]), torch.tensor([0, 2, 4])
    latents, noise = model.encode(images), torch.randn(3, 4, 4, 6)
    assert torch.equal(latents, model.vae.encoder(images)) and not latents.requires_grad
    from_images = model.compute_loss(images, label, t, noise)
    assert torch.equal(from_images, model.compute_loss(latents, label, t, noise, encoded=True))
    assert not torch.equal(from_images, model.compute_loss(latents + 0.1, label, t, noise, encoded=True))


@pytest.mark.parametrize("kind", [DDPM, EDM])
def test_samples_are_decoded(kind, files):
    model = kind(**SMALL, vae_encoder_weights=files["encoder"], vae_decoder_weights=files["decoder"]).eval()
    last = []
    images = model.p_sample_loop(torch.tensor([0, 3]), callback=lambda step, steps, x: last.append(x))
    assert last[-1].shape == (2, 4, 4, 6)
    assert images.shape == (2, 3, 32, 48) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, model.vae.decoder(last[-1]).clamp(0, 1))


@pytest.mark.parametrize("shape", [(3, 60, 64), (3, 64, 4), (1, 64, 64), (4, 64, 64)])
def test_refused_shapes(shape):
    with pytest.raises(UsageError, match="multiples of 8.*" + " x ".join(map(str, shape))):
        DDPM(**{**SMALL, "img_shape": shape})


def test_latents_must_fit_the_network():
    # 24 pixels are 3 latents, which two levels cannot halve; the message counts in the image's pixels
    with pytest.raises(UsageError, match="24 is not a multiple of 16.* 16 and 32"):
        DDPM(**{**SMALL, "img_shape": (3, 24, 32)})
    assert DDPM(**{**SMALL, "img_shape": (3, 16, 32)}).img_shape == (4, 2, 4)
