"""From noise to a picture by Stable Diffusion: a small one beside diffusers' schedulers, guidance, seeds, sizes."""

import re

import pytest
import torch

from helpers import one_line
from libs.common.errors import RunError, UsageError
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
    options = dict(steps=5, **SIZE, **options)
    batch = sd.sample(["a cat", "a dog", "a cat"], generator=seeded([3, 4, 5]), **options)
    alone = sd.sample(["a dog"], generator=seeded([4]), **options)
    assert levels(batch[1:2], alone)[0] <= 1 and levels(batch[:1], batch[2:])[1] > 5
    assert torch.equal(seeded([9, 4])(0, (2, 4, 2, 2))[1:], image_generator(4, [0])(0, (1, 4, 2, 2)))


@pytest.mark.parametrize("height, width", [(64, 192), (136, 152)])
def test_sizes(sd, height, width):
    assert sd.sample(["a cat"], height=height, width=width, steps=2).shape == (1, 3, height, width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_draws_nearly_the_same(path, sd, dtype):
    half = load_checkpoint(path, dtype, model=SMALL)
    assert half.dtype == dtype and half.autoencoder.dtype == torch.float32
    noise, options = torch.randn(1, 4, 16, 16), dict(steps=4, guidance_scale=2.0, **SIZE)
    a, b = (model.sample(["a cat"], noise=noise, **options) for model in (sd, half))
    assert a.dtype == b.dtype == torch.float32 and 0 < levels(a, b)[1] < {torch.float16: 1, torch.bfloat16: 10}[dtype]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype, says", [(torch.float16, "in fp16 gave values that are not finite"),
                                         (torch.bfloat16, "try --dtype fp32"), (torch.float32, "guidance scale")])
def test_pictures_that_are_not_finite(path, dtype, says, bad):
    sd = load_checkpoint(path, dtype, model=SMALL)
    sd.unet.forward = lambda x, t, context: torch.full_like(x, bad)
    for sampler in ("dpmpp_2m", "ddim"):
        with pytest.raises(RunError) as error:
            sd.sample("a cat", sampler=sampler, steps=5, **SIZE)
        assert says in one_line(error)
    del sd.unet.forward
    sd.autoencoder.decode = lambda z: torch.full((1, 3, 128, 128), float("nan"))
    with pytest.raises(RunError):
        sd.sample("a cat", steps=1, **SIZE)


def test_decoding_by_taesd(sd, tmp_path):
    taesd = TAESD()
    torch.save(taesd.decoder.state_dict(), tmp_path / "decoder.pth")
    noise, states = torch.randn(1, 4, 16, 16), []
    options = dict(steps=2, noise=noise, callback=lambda step, steps, x: states.append(x), **SIZE)
    plain = sd.sample(["a cat"], **options)
    sd.use_taesd(str(tmp_path / "decoder.pth"))
    tiny = sd.sample(["a cat"], **options)
    assert torch.equal(tiny, taesd.decoder(states[-1]).clamp(0, 1)) and not torch.allclose(tiny, plain)


# ---- how many of each

def test_one_prompt_as_a_text(sd):
    noise = torch.randn(1, 4, 16, 16)
    a, b = (sd.sample(prompts, steps=2, noise=noise, **SIZE) for prompts in ("a cat", ["a cat"]))
    assert a.shape == (1, 3, 128, 128) and torch.equal(a, b)
    assert torch.equal(sd.encode_text("a cat"), sd.encode_text(["a cat"]))


def test_a_negative_prompt_for_each(sd):
    noise, negative = torch.randn(2, 4, 16, 16), ["blurry", "a dog"]
    options = dict(steps=2, **SIZE)
    both = sd.sample(["a cat"] * 2, negative, noise=noise, **options)
    for k in range(2):
        assert levels(both[k:k + 1], sd.sample("a cat", negative[k], noise=noise[k:k + 1], **options))[0] <= 1


@pytest.mark.parametrize("options, says", [
    (dict(negative_prompt=["a", "b", "c"]), "negative_prompt: 3 texts for 2 prompts; it takes one text for all, or"),
    (dict(generator=seeded([1])), "seeds: 1 for a batch of 2"),
    (dict(noise=torch.zeros(1, 4, 16, 16)), "noise: its shape is [1, 4, 16, 16]; prompts and size take [2, 4, 16, 16]"),
    (dict(noise=torch.zeros(2, 4, 16, 8)), "noise: its shape is [2, 4, 16, 8]")])
def test_numbers_that_do_not_fit(sd, options, says):
    calls = record(sd)
    with pytest.raises(UsageError) as error:
        sd.sample(["a cat", "a dog"], **options, **SIZE)
    assert says in one_line(error) and not calls


# ---- settings

@pytest.mark.parametrize("options, says", [
    (dict(sampler="ddmi"), "did you mean ddim?"), (dict(sampler="ddpm"), "unknown 'ddpm'"),
    (dict(sampler="ddim", steps=1001), "steps: 1001"),
    (dict(steps=0), "steps: 0"), (dict(guidance_scale=-1), "guidance_scale: -1"), (dict(S_churn=1.0), "S_churn"),
    (dict(clip=True), "clip"), (dict(height=100), "height: 100")])
def test_settings_that_cannot_work(sd, options, says):
    calls = record(sd)
    with pytest.raises(UsageError) as error:
        sd.sample(["a cat"], **options)
    assert says in one_line(error) and not calls


def test_steps_of_ddim_that_start_far_from_noise(sd):
    right = [n for n in range(1, 1001) if 800 <= 1 + (n - 1) * (1000 // n) < 1000]
    for steps in range(1, 1001):
        sd.plan("ddim", steps, spacing="uniform")
        if steps in right:
            sd.plan("ddim", steps)
            continue
        with pytest.raises(UsageError) as error:
            sd.plan("ddim", steps)
        assert f"steps: {steps} would start ddim at timestep {1 + (steps - 1) * (1000 // steps)}," in one_line(error)
    said = re.findall(r"(\d+) to (\d+)", str(error.value).split("right are")[1])
    assert [n for a, b in said for n in range(int(a), int(b) + 1)] == right


@pytest.mark.parametrize("steps, expected", [(20, range(951, 0, -50)), (7, range(853, 0, -142)),
                                             (500, range(999, 0, -2)), (999, range(999, 0, -1))])
def test_timesteps_of_ddim(sd, steps, expected):
    called = []
    sd.unet.forward = lambda x, t, context: called.append(int(t[0])) or torch.zeros_like(x)
    sd.sample(["a cat"], sampler="ddim", steps=steps, guidance_scale=1, height=64, width=64)
    assert called == list(expected)
