"""What a configuration says of sampling: refused before training, or filled in for `Diffusion.sample`."""

from pathlib import Path

import pytest

from helpers import one_line
from libs import UsageError, build_model, load_config, sampling_options
from libs.config import CODE

MNIST = str(Path(CODE).parent / "configs" / "mnist.yaml")
LATENTS = ["model.use_vae=true", "model.vae_encoder_weights=e.pth", "model.vae_decoder_weights=d.pth"]


@pytest.mark.parametrize("settings, said", [
    (("sampler=ddim", "steps=21"), "steps.*at most model.timesteps, 20"),
    (("sampler=ddpm", "steps=5"), "steps.*always takes all 20"),
    (("sampler=heun", "eta=0.5"), "eta: the sampler heun does not take it; ddim, euler_ancestral, dpmpp_2m do"),
    (("S_churn=10",), "S_churn: the sampler ddim does not take it; heun does"),
    (("guidance_interval=[3, 2]",), r"guidance_interval: \[3.0, 2.0\]"),
])
def test_sampling_that_cannot_work_is_refused_before_training(settings, said):
    config = load_config(MNIST, ["model.timesteps=20", "model.dim=8", *(f"sample_cfg.{s}" for s in settings)])
    with pytest.raises(UsageError, match=f"config: sample_cfg.{said}"):
        build_model(config)


def test_sampler_of_another_model_is_refused_before_training():
    config = load_config(MNIST, ["model_name=EDM", "model.dim=8", "sample_cfg.sampler=ddim"])
    with pytest.raises(UsageError, match="config: sample_cfg.sampler: .*'ddim'; EDM has heun, euler"):
        build_model(config)


def test_clipping_is_refused_for_latents():
    config = load_config(MNIST, [*LATENTS, "model.dim=8", "dataset.name=CIFAR10", "sample_cfg.clip=true"])
    config["model"] |= {"vae_encoder_weights": None, "vae_decoder_weights": None}
    with pytest.raises(UsageError, match="config: sample_cfg.clip: .*latents"):
        build_model(config)


def test_sampling_options_fill_in_what_is_not_said():
    assert sampling_options(load_config(MNIST)) == {"sampler": "ddim", "steps": 50, "guidance_scale": 1.0, "clip": True}
    assert sampling_options(load_config(MNIST, ["model.timesteps=20"]))["steps"] == 20
    given = load_config(MNIST, ["sample_cfg.steps=7"])
    assert sampling_options(given)["steps"] == 7
    assert sampling_options(given, sampler="ddpm")["steps"] is None  # 7 was meant for another sampler
    assert sampling_options(given, steps=9, guidance_scale=2.0) == {
        "sampler": "ddim", "steps": 9, "guidance_scale": 2.0, "clip": True}


def test_pixels_of_a_ddpm_are_clipped_unless_said_otherwise():
    assert "clip" not in sampling_options(load_config(MNIST, LATENTS))
    assert "clip" not in sampling_options(load_config(MNIST, ["model_name=EDM"]))
    ddpm = load_config(MNIST, ["sample_cfg={steps: 7, eta: 0.5, spacing: quadratic, guidance_interval: [0, 3]}"])
    assert sampling_options(ddpm)["clip"] and sampling_options(ddpm, sampler="dpmpp_2m")["clip"]
    assert not sampling_options(ddpm, clip=False)["clip"]
    # Algorithm 2 has no clipping; what was meant for ddim alone is dropped, the interval stays
    assert sampling_options(ddpm, sampler="ddpm") == {"sampler": "ddpm", "steps": None, "guidance_scale": 1.0,
                                                      "guidance_interval": [0, 3]}


@pytest.mark.parametrize("key, value", [
    ("sampler", "huen"), ("guidance_interval", "[1]"), ("guidance_interval", "[-1, 2]"), ("guidance_interval", "3"),
    ("clip", "1"), ("eta", "1.5"), ("eta", "-0.1"), ("spacing", "quadratc"), ("S_churn", "-1"), ("S_noise", ".nan"),
])
def test_impossible_sampling(key, value):
    with pytest.raises(UsageError) as error:
        load_config(MNIST, [f"sample_cfg.{key}={value}"])
    message = one_line(error)
    assert f"sample_cfg.{key} is " in message
    near = {"huen": "heun", "quadratc": "quadratic"}.get(value)
    assert near is None or f"did you mean {near}?" in message
