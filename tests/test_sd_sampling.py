"""From noise to a picture by Stable Diffusion: a small one beside diffusers' schedulers, guidance, seeds, sizes."""

import pytest
import torch

from helpers import one_line
from libs.errors import UsageError
from libs.samplers import image_generator
from libs.stable_diffusion import load_checkpoint, seeded
from libs.tiny_autoencoder import TAESD
from sd_parity import SMALL, Theirs, levels, small_checkpoint

SIZE = dict(height=128, width=128)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers'


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("open_clip")
    return small_checkpoint(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def model(path):
    return load_checkpoint(path, model=SMALL)


@pytest.fixture
def sd(model):
    yield model
    model.unet.__dict__.pop("forward", None)  # what tests put in its place
    model.vae = None


@pytest.fixture(scope="module")
def theirs(path):
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    return Theirs(path, SMALL)


# ---- the whole way beside diffusers: text, guidance with a negative prompt, sampler, decoder

@pytest.mark.parametrize("sampler, steps", [("ddim", 20), ("ddim", 7), ("dpmpp_2m", 20), ("dpmpp_2m", 9), ("heun", 6),
                                            ("euler", 12)])
def test_pictures_agree_with_diffusers(sd, theirs, sampler, steps):
    noise, prompts = torch.randn(2, 4, 16, 16), ["a cat", "two dogs in the snow"]
    ours = sd.sample(prompts, "blurry", sampler=sampler, steps=steps, guidance_scale=7.5, noise=noise, **SIZE)
    ids, negative = sd.tokenizer(prompts), sd.tokenizer(["blurry"] * 2)
    other = theirs.sample(ids, negative, noise, sampler, steps, 7.5, whole_timesteps=sampler in ("heun", "euler"))
    assert levels(ours, other)[0] <= 1
    assert 255 * ours.std() > 20  # a picture, no flat grey


# ---- guidance

def record(sd):
    """Remember what the UNet is called with."""
    calls, forward = [], sd.unet.forward
    sd.unet.forward = lambda x, t, context: calls.append((x, t, context)) or forward(x, t, context)
    return calls


def test_both_branches_go_in_one_call(sd):
    calls = record(sd)
    sd.sample(["a cat", "a dog"], "blurry", steps=3, **SIZE)
    assert len(calls) == 3 and all(len(x) == len(t) == len(context) == 4 for x, t, context in calls)
    for _, t, context in calls:
        assert torch.equal(context, sd.encode_text(["a cat", "a dog", "blurry", "blurry"]))
        assert (t == t[0]).all() and t[0] == t[0].round()
    del calls[:]
    sd.sample(["a cat", "a dog"], "blurry", steps=3, guidance_scale=1, **SIZE)
    assert [len(x) for x, _, _ in calls] == [2, 2, 2]


def test_guidance_is_linear_between_its_branches(sd):
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    label = sd.encode_text(["a cat"]), sd.encode_text([""])
    with torch.no_grad():
        cond, uncond, guided = (sd.guided(x, label, t, scale) for scale in (1.0, 0.0, 7.5))
    assert torch.allclose(guided, uncond + 7.5 * (cond - uncond), atol=1e-4) and not torch.allclose(cond, uncond)
    with torch.no_grad():
        assert torch.allclose(uncond, sd.unet(x, t, label[1]), atol=1e-5)


def test_prompt_negative_prompt_and_scale_matter(sd):
    noise = torch.randn(1, 4, 16, 16)

    def draw(prompt="a cat", negative="", scale=7.5):
        return sd.sample([prompt], negative, steps=5, noise=noise, guidance_scale=scale, **SIZE)

    for other in (draw("a dog"), draw(negative="blurry"), draw(scale=2)):
        assert levels(draw(), other)[1] > 5
    assert torch.equal(draw(scale=1), draw(scale=1, negative="blurry"))


# ---- seeds, sizes, precision, decoders

@pytest.mark.parametrize("options", [dict(sampler="dpmpp_2m"), dict(sampler="euler_ancestral"),
                                     dict(sampler="ddim", eta=1.0)])
def test_a_picture_depends_on_its_seed_not_on_its_batch(sd, options):
    options = dict(steps=4, **SIZE, **options)
    batch = sd.sample(["a cat", "a dog", "a cat"], generator=seeded([3, 4, 5]), **options)
    alone = sd.sample(["a dog"], generator=seeded([4]), **options)
    assert levels(batch[1:2], alone)[0] <= 1 and levels(batch[:1], batch[2:])[1] > 5
    assert torch.equal(seeded([9, 4])(0, (2, 4, 2, 2))[1:], image_generator(4, [0])(0, (1, 4, 2, 2)))


@pytest.mark.parametrize("height, width", [(64, 192), (136, 152)])
def test_sizes(sd, height, width):
    assert sd.sample(["a cat"], height=height, width=width, steps=2).shape == (1, 3, height, width)


def test_half_precision_draws_nearly_the_same(path, sd):
    half = load_checkpoint(path, torch.bfloat16, model=SMALL)
    assert half.dtype == torch.bfloat16 and half.autoencoder.dtype == torch.float32
    noise, options = torch.randn(1, 4, 16, 16), dict(steps=4, guidance_scale=2.0, **SIZE)
    a, b = (model.sample(["a cat"], noise=noise, **options) for model in (sd, half))
    assert a.dtype == b.dtype == torch.float32 and levels(a, b)[1] < 10


def test_decoding_by_taesd(sd, tmp_path):
    taesd = TAESD()
    torch.save(taesd.decoder.state_dict(), tmp_path / "decoder.pth")
    noise, states = torch.randn(1, 4, 16, 16), []
    options = dict(steps=2, noise=noise, callback=lambda step, steps, x: states.append(x), **SIZE)
    plain = sd.sample(["a cat"], **options)
    sd.use_taesd(str(tmp_path / "decoder.pth"))
    tiny = sd.sample(["a cat"], **options)
    assert torch.equal(tiny, taesd.decoder(states[-1]).clamp(0, 1)) and not torch.allclose(tiny, plain)


@pytest.mark.parametrize("options, says", [
    (dict(sampler="ddmi"), "did you mean ddim?"), (dict(sampler="ddpm"), "unknown 'ddpm'"),
    (dict(sampler="ddim", steps=1000), "steps: 1000 is too many"), (dict(sampler="ddim", steps=1001), "steps: 1001"),
    (dict(steps=0), "steps: 0"), (dict(guidance_scale=-1), "guidance_scale: -1"), (dict(eta=0.5), "eta"),
    (dict(clip=True), "clip"), (dict(height=100), "height: 100")])
def test_settings_that_cannot_work(sd, options, says):
    calls = record(sd)
    with pytest.raises(UsageError) as error:
        sd.sample(["a cat"], **options)
    assert says in one_line(error) and not calls


@pytest.mark.parametrize("steps, expected", [(20, range(951, 0, -50)), (3, [667, 334, 1]), (1, [1]),
                                             (500, range(999, 0, -2)), (999, range(999, 0, -1))])
def test_timesteps_of_ddim(sd, steps, expected):
    called = []
    sd.unet.forward = lambda x, t, context: called.append(int(t[0])) or torch.zeros_like(x)
    sd.sample(["a cat"], sampler="ddim", steps=steps, guidance_scale=1, height=64, width=64)
    assert called == list(expected)
