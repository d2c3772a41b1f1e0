"""What a configuration says of sampling: refused before training, or completed for `draw_images`."""

from pathlib import Path

import pytest

from libs import UsageError, build_model, load_config, sampling_settings
from libs.config import CODE
from libs.models import network_calls

MNIST = str(Path(CODE).parent / "configs" / "mnist.yaml")
SMALL = ["model.dim=8", "model.dim_mults=[1]", "model.attn_levels=[]", "model.timesteps=60"]


def settings_of(*overrides, **given):
    config = load_config(MNIST, [*SMALL, *overrides])
    return sampling_settings(build_model(config), config, **given)


@pytest.mark.parametrize("overrides, message", [
    (["sampler=ddim", "steps=61"], "steps.*at most model.timesteps, 60"),
    (["sampler=ddpm", "steps=5"], "steps.*always takes all 60"),
    (["sampler=heun", "eta=0.5"], "eta: the sampler heun does not take it; ddim, euler_ancestral, dpmpp_2m do"),
    (["S_churn=10"], "S_churn: the sampler ddim does not take it; heun does"),
    (["guidance_interval=[3, 2]"], r"guidance_interval: \[3.0, 2.0\]"),
])
def test_sampling_that_cannot_work_is_refused_before_training(overrides, message):
    with pytest.raises(UsageError, match=f"config: sample_cfg.{message}"):
        settings_of(*(f"sample_cfg.{x}" for x in overrides))


def test_samplers_and_options_that_a_model_does_not_have():
    with pytest.raises(UsageError, match="config: sample_cfg.sampler: ddim cannot draw from this EDM; it has heun, euler"):
        settings_of("model_name=EDM", "sample_cfg.sampler=ddim")
    config = load_config(MNIST, [*SMALL, "model.use_vae=true", "model.vae_encoder_weights=e", "model.vae_decoder_weights=d",
                                 "dataset.name=CIFAR10", "sample_cfg.clip=true"])
    config["model"] |= {"vae_encoder_weights": None, "vae_decoder_weights": None}
    with pytest.raises(UsageError, match="config: sample_cfg.clip: .*latents"):
        build_model(config)
    config["sample_cfg"]["clip"] = None
    assert "clip" not in sampling_settings(build_model(config), config)


def test_settings_are_completed():
    assert settings_of() == {"sampler": "ddim", "steps": 50, "guidance_scale": 1.0, "clip": True}
    assert settings_of("model.timesteps=20")["steps"] == 20
    assert settings_of("model_name=EDM") == {"sampler": "heun", "steps": 18, "guidance_scale": 1.0}
    assert settings_of("sample_cfg.steps=7")["steps"] == 7
    assert settings_of("sample_cfg.steps=7", steps=9, clip=False) == {"sampler": "ddim", "steps": 9, "guidance_scale": 1.0,
                                                                      "clip": False}


def test_options_of_another_sampler_do_not_stay():
    """Steps, eta and spacing were meant for the config's own sampler; guidance holds for all. Algorithm 2 has no clip."""
    config = ["sample_cfg={steps: 7, eta: 0.5, spacing: quadratic, guidance_interval: [0, 3]}"]
    assert settings_of(*config, sampler="ddpm") == {"sampler": "ddpm", "steps": 60, "guidance_scale": 1.0,
                                                    "guidance_interval": [0, 3]}
    assert settings_of(*config, sampler="dpmpp_2m") == {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 1.0,
                                                        "guidance_interval": [0, 3], "clip": True}


@pytest.mark.parametrize("given, calls", [
    ({"sampler": "ddpm"}, 60), ({"steps": 9}, 9), ({"sampler": "heun", "steps": 9}, 17),
    ({"sampler": "ddpm", "guidance_scale": 2}, 120), ({"sampler": "dpmpp_2m", "guidance_scale": 2}, 40)])
def test_network_calls(given, calls):
    config = load_config(MNIST, [*SMALL, "model.label_dropout=0.1"])
    model = build_model(config)
    settings = sampling_settings(model, config, **given)
    assert network_calls(model, settings) == calls
    low = model.sigmas[30].item()  # guided below the upper half of the timesteps alone
    if settings["guidance_scale"] == 2 and settings["sampler"] == "ddpm":
        assert network_calls(model, {**settings, "guidance_interval": [0, low]}) == 60 + 31
