"""Stable Diffusion's networks: the names, shapes and sizes of the real ones; small ones against diffusers and
transformers."""

import os
import re
import sys
from hashlib import sha256

import pytest
import torch
import yaml

import sd_parity
from libs.common.cli import run
from helpers import one_line
from libs.common.errors import UsageError
from libs.stable_diffusion import StableDiffusion, load_checkpoint
from libs.stable_diffusion.autoencoder import AutoencoderKL
from libs.stable_diffusion.checkpoint import IGNORED, UNET, build_parts, expected_shapes
from libs.stable_diffusion.model import check_size
from sd_parity import SMALL, Theirs, relative, small_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers'

# of the sorted lines "name [n,n,...]" of all weights in a file like v1-5-pruned-emaonly
DIGEST = "8635a19d3b3c944617b26104c47833e0fe2ff2e72ccc4887d6ac9922bea4bff1"


def digest(shapes):
    lines = sorted(f"{name} [{','.join(map(str, shape))}]" for name, shape in shapes.items())
    return sha256("\n".join(lines).encode()).hexdigest()


# ---- the true size

def test_parameters_of_the_true_size():
    sizes = {prefix: sum(p.numel() for p in part.parameters()) for prefix, part in build_parts().items()}
    assert list(sizes.values()) == [859_520_964, 83_653_863, 123_060_480]


def test_names_and_shapes_of_the_true_size():
    shapes = expected_shapes(build_parts())
    assert len(shapes) == 1130 and digest(shapes) == DIGEST


def test_the_digest_is_that_of_the_official_list(real_data):
    path = os.path.join(real_data, "sd", "sd1_emaonly_state_dict_keys.txt")
    if not os.path.isfile(path):
        pytest.skip(f"no {path}")
    names = [line.rstrip("\n").rsplit(" ", 1) for line in open(path)]
    assert len(names) == 1145
    used = {name: shape[1:-1].split(",") for name, shape in names
            if not any(re.fullmatch(pattern, name) for pattern, _ in IGNORED)}
    assert digest(used) == DIGEST


def test_names_of_the_averaged_weights_are_unique():
    # the official code takes the dots out of them
    names = [name for name in expected_shapes(build_parts()) if name.startswith(UNET)]
    assert len({name.replace(".", "") for name in names}) == len(names) == 686


# ---- small ones against independent ones

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pytest.importorskip("diffusers"), pytest.importorskip("transformers"), pytest.importorskip("open_clip")
    path = small_checkpoint(tmp_path_factory.mktemp("sd"))
    return load_checkpoint(path, model=SMALL), Theirs(path, SMALL)


@pytest.mark.parametrize("height, width", [(16, 16), (24, 16), (17, 23), (9, 30)])
def test_unet(pair, height, width):
    ours, theirs = pair
    x, context, t = torch.randn(3, 4, height, width), torch.randn(3, 77, 32), torch.tensor([0, 500, 999])
    with torch.no_grad():
        out = ours.unet(x, t, context)
        assert relative(out, theirs.unet(x, t, context).sample) < 1e-5
    # each of the three inputs matters
    with torch.no_grad():
        for other in ((x.flip(0), t, context), (x, t.flip(0), context), (x, t, context.flip(0))):
            assert relative(ours.unet(*other), out) > 0.01


@pytest.mark.parametrize("height, width", [(64, 64), (72, 40)])
def test_autoencoder(pair, height, width):
    ours, theirs = pair
    images, latents = torch.rand(2, 3, height, width) * 2 - 1, torch.randn(2, 4, height // 8, width // 8)
    with torch.no_grad():
        encoded, decoded = ours.autoencoder.encode(images), ours.autoencoder.decode(latents)
    assert encoded.shape == latents.shape and decoded.shape == images.shape
    assert relative(encoded, theirs.encode(images)) < 1e-5
    assert relative(decoded, theirs.decode(latents)) < 1e-5


def test_latents_are_scaled_on_both_sides():
    class Same(torch.nn.Module):
        def forward(self, x):
            return x
    vae = AutoencoderKL(32, (1,), 1)
    vae.encoder, vae.decoder = Same(), Same()
    for conv in (vae.quant_conv, vae.post_quant_conv):
        with torch.no_grad():
            conv.weight.copy_(torch.eye(len(conv.weight))[..., None, None]), conv.bias.zero_()
    moments = torch.randn(1, 8, 2, 2)
    assert torch.allclose(vae.encode(moments), 0.18215 * moments[:, :4])  # the mean; the rest is the log-variance
    assert torch.allclose(vae.decode(moments[:, :4]), moments[:, :4] / 0.18215)


def test_text_encoder(pair):
    ours, theirs = pair
    prompts = ["", "a cat", "a cat on a mat", "word " * 100]
    out = ours.encode_text(prompts)
    assert out.shape == (4, 77, 32)
    assert relative(out, theirs.encode_text(ours.tokenizer(prompts))) < 1e-5
    # a token sees what comes before it alone
    assert torch.equal(out[1, :3], out[2, :3]) and not torch.allclose(out[1, 3], out[2, 3])


# ---- the script that does all of it at the true size

@pytest.fixture
def parity(tmp_path, monkeypatch, capsys):
    """parity(flags): run it on a small model; returns (status, what it printed, its error)."""
    for package in ("diffusers", "transformers", "open_clip"):
        pytest.importorskip(package)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"model": SMALL}))
    path = small_checkpoint(tmp_path)

    def parity(*flags):
        small = ["--config", str(tmp_path / "small.yaml"), "--size", "64", "--steps", "5"]
        monkeypatch.setattr(sys, "argv", ["sd_parity.py", path, *small, *flags])
        with pytest.raises(SystemExit) as end:
            run(sd_parity.main)
        return end.value.code, *capsys.readouterr()
    return parity


def test_parity_script(parity):
    status, said, error = parity()
    assert not status and not error and "all 12 numbers are within their limits" in said


def scaled(name, factor):
    """In place of a function of Theirs: its result times a factor."""
    plain = getattr(Theirs, name)
    return lambda *args, **options: factor * plain(*args, **options)


@pytest.mark.parametrize("name, factor, says", [
    ("encode_text", 1.001, "text encoder, largest"), ("encode", float("nan"), "encoder, largest"),
    ("decode", 1.001, "decoder, largest"), ("sample", 0.98, "ddim, 5 steps, guidance 7.5: largest"),
    ("sample", 0.98, "dpmpp_2m, 5 steps, guidance 7.5: largest")])
def test_parity_script_fails_where_a_number_is_wrong(parity, monkeypatch, name, factor, says):
    monkeypatch.setattr(Theirs, name, scaled(name, factor))
    status, said, error = parity()
    assert status == 1 and says in error and error.count("\n") == 1 and "WRONG" in said and "all 12" not in said


def test_parity_script_fails_on_flat_pictures(parity, monkeypatch):
    for kind in (StableDiffusion, Theirs):
        monkeypatch.setattr(kind, "sample", lambda *args, **options: torch.full((1, 3, 64, 64), 0.5))
    status, _, error = parity()
    assert status == 1
    for sampler in ("ddim", "dpmpp_2m"):
        for says in ("standard deviation of the picture is 0, not", "another prompt moves it", "no guidance moves it"):
            assert f"{sampler}: {says}" in error


def test_parity_script_mistakes(parity, monkeypatch):
    assert parity("--size", "100")[0] == 2
    monkeypatch.setattr(sd_parity.importlib.util, "find_spec", lambda name: None)
    status, _, error = parity()
    assert status == 2 and "diffusers is not here; `pip install -r requirements-extra.txt`" in error


@pytest.mark.parametrize("height, width, says", [
    (500, 512, "height: 500 is not a multiple of 8; the nearest sizes are 496 and 504"),
    (512, 4, "width: 4 is not a multiple of 8; the nearest sizes are 8 "), (0, 512, "height: 0 is not")])
def test_sizes_that_cannot_be_drawn(height, width, says):
    with pytest.raises(UsageError) as error:
        check_size(height, width)
    assert says in one_line(error)
    check_size(8, 520)
