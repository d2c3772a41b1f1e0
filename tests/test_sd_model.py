"""Stable Diffusion's networks and sampling: names, shapes and sizes of the real ones; small ones beside diffusers and
transformers."""

import os
import re
from hashlib import sha256

import pytest
import torch

import sd_parity
from helpers import one_line
from libs.common.errors import RunError, UsageError
from libs.models import SAMPLERS as ALL_SAMPLERS
from libs.samplers import image_generator
from libs.stable_diffusion import StableDiffusion, load_checkpoint, seeded
from libs.stable_diffusion.checkpoint import IGNORED, UNET, build_parts, expected_shapes
from libs.stable_diffusion.model import SAMPLERS, check_settings, load_taesd
from libs.tiny_autoencoder import TAESD
from sd_parity import SMALL, Theirs, levels, relative, small_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers'
SIZE = dict(height=64, width=64)

# of the sorted lines "name [n,n,...]" of all weights in a file like v1-5-pruned-emaonly
DIGEST = "8635a19d3b3c944617b26104c47833e0fe2ff2e72ccc4887d6ac9922bea4bff1"


def digest(shapes):
    lines = sorted(f"{name} [{','.join(map(str, shape))}]" for name, shape in shapes.items())
    return sha256("\n".join(lines).encode()).hexdigest()


@pytest.fixture(scope="module")
def path(open_clip, tmp_path_factory):
    return small_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def model(path):
    return load_checkpoint(path, model=SMALL)


@pytest.fixture
def sd(model):
    yield model
    model.unet.__dict__.pop("forward", None)  # what tests replaced it by
    model.vae = None


@pytest.fixture(scope="module")
def theirs(path):
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    return Theirs(path, SMALL)


def record(sd):
    """A list that receives the UNet's arguments."""
    calls, forward = [], sd.unet.forward
    sd.unet.forward = lambda x, t, context: calls.append((x, t, context)) or forward(x, t, context)
    return calls


# ---- the true size

def test_names_shapes_and_sizes():
    parts = build_parts()
    sizes = [sum(p.numel() for p in part.parameters()) for part in parts.values()]
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
    shapes = expected_shapes(parts)
    assert len(shapes) == 1130 and digest(shapes) == DIGEST
    # the official code takes the dots out of the averaged weights' names: they stay different
    names = [name for name in shapes if name.startswith(UNET)]
    assert len({name.replace(".", "") for name in names}) == len(names) == 686


def test_the_digest_is_that_of_the_official_list(real_data):
    path = os.path.join(real_data, "sd", "sd1_emaonly_state_dict_keys.txt")
    if not os.path.isfile(path):
        pytest.skip(f"no {path}")
    names = [line.rstrip("\n").rsplit(" ", 1) for line in open(path)]
    assert len(names) == 1145
    used = {name: shape[1:-1].split(",") for name, shape in names
            if not any(re.fullmatch(pattern, name) for pattern in IGNORED)}
    assert digest(used) == DIGEST


# ---- small networks beside independent ones

@pytest.mark.parametrize("height, width", [(16, 16), (9, 30)])
def test_unet(sd, theirs, height, width):
    x, context, t = torch.randn(3, 4, height, width), torch.randn(3, 77, 32), torch.tensor([0, 500, 999])
    with torch.no_grad():
        out = sd.unet(x, t, context)
        assert relative(out, theirs.unet(x, t, context).sample) < 1e-5
        # each of the three inputs matters
        for other in ((x.flip(0), t, context), (x, t.flip(0), context), (x, t, context.flip(0))):
            assert relative(sd.unet(*other), out) > 0.01


def test_autoencoder(sd, theirs):
    images, latents = torch.rand(2, 3, 72, 40) * 2 - 1, torch.randn(2, 4, 9, 5)
    with torch.no_grad():
        encoded, decoded = sd.autoencoder.encode(images), sd.autoencoder.decode(latents)
        # the scale is in ours and not in theirs
        assert relative(encoded, 0.18215 * theirs.vae.encode(images).latent_dist.mean) < 1e-5
        assert relative(decoded, theirs.vae.decode(latents / 0.18215).sample) < 1e-5
    assert encoded.shape == latents.shape and decoded.shape == images.shape


def test_text_encoder(sd, theirs):
    prompts = ["", "a cat", "a cat on a mat", "word " * 100]
    out = sd.encode_text(prompts)
    assert out.shape == (4, 77, 32) and relative(out, theirs.encode_text(sd.tokenizer(prompts))) < 1e-5


# ---- whole pictures beside diffusers: text, guidance with a negative prompt, sampler, decoder

@pytest.mark.parametrize("sampler, steps", [("ddim", 7), ("dpmpp_2m", 9), ("heun", 5), ("euler", 8)])
def test_pictures_agree_with_diffusers(sd, theirs, sampler, steps):
    noise, prompts = torch.randn(2, 4, 8, 8), ["a cat", "two dogs in the snow"]
    ours = sd.sample(prompts, "blurry", sampler=sampler, steps=steps, guidance_scale=7.5, noise=noise, **SIZE)
    ids, negative = sd.tokenizer(prompts), sd.tokenizer(["blurry"] * 2)
    other = theirs.sample(ids, negative, noise, sampler, steps, 7.5, whole_timesteps=sampler in ("heun", "euler"))
    assert levels(ours, other)[0] <= 1
    assert 255 * ours.std() > 20  # a picture, not flat grey


def test_timesteps_of_ddim(sd):
    """Down to timestep 0; a network that predicts no noise only rescales the image."""
    called, states, noise = [], [], torch.randn(1, 4, 8, 8)
    sd.unet.forward = lambda x, t, context: called.append(int(t[0])) or torch.zeros_like(x)
    sd.sample("a cat", sampler="ddim", steps=7, guidance_scale=1, noise=noise,
              callback=lambda step, steps, x: states.append(x), **SIZE)
    assert called == list(range(853, 0, -142))
    a = sd.sqrt_alphas_cumprod
    assert torch.allclose(states[-1], noise * a[0] / a[853], rtol=1e-5)


def test_both_branches_go_in_one_call(sd):
    calls = record(sd)
    sd.sample(["a cat", "a dog"], "blurry", steps=3, **SIZE)
    assert len(calls) == 3
    for x, t, context in calls:
        assert torch.equal(context, sd.encode_text(["a cat", "a dog", "blurry", "blurry"]))
        assert len(x) == len(t) == 4 and (t == t[0]).all() and t[0] == t[0].round()
    del calls[:]
    sd.sample("a cat", "blurry", steps=3, guidance_scale=1, **SIZE)
    assert [len(x) for x, _, _ in calls] == [1, 1, 1]
    assert torch.equal(calls[0][2], sd.encode_text(["a cat"]))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_a_picture_depends_on_its_seed_not_on_its_batch(sd, sampler):
    options = dict(steps=3, sampler=sampler, **SIZE)
    batch = sd.sample(["a cat", "a dog", "a cat"], generator=seeded([3, 4, 5]), **options)
    alone = sd.sample(["a dog"], generator=seeded([4]), **options)
    assert levels(batch[1:2], alone)[0] <= 1 and levels(batch[:1], batch[2:])[1] > 5
    assert torch.equal(seeded([9, 4])(0, (2, 4, 2, 2))[1:], image_generator(4, [0])(0, (1, 4, 2, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(path, sd, dtype):
    half = load_checkpoint(path, dtype, model=SMALL)
    options = dict(noise=torch.randn(1, 4, 8, 8), steps=4, guidance_scale=2.0, **SIZE)
    a, b = (model.sample("a cat", **options) for model in (sd, half))
    assert half.dtype == dtype and b.dtype == torch.float32
    assert 0 < levels(a, b)[1] < {torch.float16: 1, torch.bfloat16: 10}[dtype]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddim"])
def test_pictures_that_are_not_finite(sd, sampler):
    sd.unet.forward = lambda x, t, context: torch.full_like(x, float("inf"))
    with pytest.raises(RunError) as error:
        sd.sample("a cat", sampler=sampler, steps=5, **SIZE)
    assert "drawing in fp32 gave values that are not finite" in one_line(error)


def test_decoding_by_taesd(sd, tmp_path):
    taesd, states = TAESD(), []
    torch.save(taesd.decoder.state_dict(), tmp_path / "decoder.pth")
    sd.vae = load_taesd(str(tmp_path / "decoder.pth"))
    picture = sd.sample("a cat", steps=2, callback=lambda step, steps, x: states.append(x), **SIZE)
    assert torch.equal(picture, taesd.decoder(states[-1]).clamp(0, 1))


# ---- settings

@pytest.mark.parametrize("options, says", [
    (dict(sampler="ddpm"), "sampler: unknown 'ddpm'"), (dict(steps=0), "steps: 0"), (dict(height=100), "height: 100"),
    (dict(generator=seeded([1])), "noise: its shape is [1, 4, 8, 8]; prompts and size need [2, 4, 8, 8]")])
def test_settings_that_cannot_work(sd, options, says):
    calls = record(sd)
    with pytest.raises(UsageError) as error:
        sd.sample(["a cat", "a dog"], **SIZE | options)
    assert says in one_line(error) and not calls


def test_default_steps_are_those_of_all_models():
    assert SAMPLERS == {name: ALL_SAMPLERS[name].steps for name in SAMPLERS}


def test_numbers_of_ddim_steps():
    right = [n for n in range(1, 1001) if 800 <= 1 + (n - 1) * (1000 // n) < 1000]
    for steps in set(range(1, 1001)) - set(right):
        with pytest.raises(UsageError) as error:
            check_settings("ddim", steps, 512, 512)
    assert [check_settings("ddim", steps, 512, 512) for steps in right] == right
    ranges = re.findall(r"(\d+) to (\d+)", str(error.value).split("right are")[1])
    assert [n for a, b in ranges for n in range(int(a), int(b) + 1)] == right


# ---- the script that compares at the true size

@pytest.fixture(scope="module")
def parity(path, theirs, tmp_path_factory):
    """parity(): run it on the small model."""
    config = tmp_path_factory.mktemp("parity") / "small.yaml"
    config.write_text(f"model: {SMALL}")
    return lambda: sd_parity.main([path, "--config", str(config), "--size", "64", "--steps", "5"])


def test_parity_script(parity, capsys):
    parity()
    assert "all 12 numbers are within their limits" in capsys.readouterr().out


def test_parity_script_fails_where_numbers_are_wrong(parity, monkeypatch, capsys):
    encode, decode = Theirs.encode, Theirs.decode
    monkeypatch.setattr(Theirs, "encode", lambda *args: float("nan") * encode(*args))
    monkeypatch.setattr(Theirs, "decode", lambda *args: 1.001 * decode(*args))
    for kind in (StableDiffusion, Theirs):  # flat pictures
        monkeypatch.setattr(kind, "sample", lambda *args, **options: torch.full((1, 3, 64, 64), 0.5))
    with pytest.raises(RunError) as error:
        parity()
    for says in ("encoder, largest", "decoder, largest", *(f"{sampler}: {text}" for sampler in ("ddim", "dpmpp_2m")
                 for text in ("standard deviation of the picture is 0, not", "another prompt", "no guidance"))):
        assert says in one_line(error)
