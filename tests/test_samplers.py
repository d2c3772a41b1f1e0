"""What the samplers have in common on every model: noise by image, guidance, calls, states, clipping."""

import pytest
import torch
from torch import nn

from exact import ONE, TWO, ExactNetwork
from helpers import SMALL
from libs import UsageError, network_calls, sampling_settings
from libs.common.seeds import image_noise
from libs.config import complete_config
from libs.models import MODELS, SAMPLERS, sample_images, samplers_of
from libs.samplers import SOLVERS, guidance_at, image_generator, karras_sigmas

EACH = pytest.mark.parametrize("kind, sampler", [("DDPM", name) for name in SAMPLERS]
                               + [(kind, name) for kind in ("EDM", "Flow") for name in SOLVERS])
# with these, every sampler but Euler's adds noise on the way
OPTIONS = {"ddim": {"eta": 0.7}, "heun": {"S_churn": 5.0}, "dpmpp_2m": {"eta": 0.7}}
CONFIG = {kind: complete_config({"model_name": kind}) for kind in MODELS}


def small(kind, **options):
    model = MODELS[kind](**{**SMALL, "timesteps": 12, "label_dropout": 0.1, **options}).eval()
    model.postprocess = lambda x: x  # what the sampler ended with
    return model


def draw(model, labels, sampler, steps=None, noise=None, generator=None, callback=None, **options):
    """Images, as every script draws them; without clipping where it is not asked for."""
    kind = next(name for name, kind in MODELS.items() if isinstance(model, kind))
    settings = sampling_settings(model, CONFIG[kind], **{"clip": False, "sampler": sampler, "steps": steps, **options})
    return sample_images(model, labels, settings, noise, generator, callback)


def steps_of(sampler):
    return 12 if sampler == "ddpm" else 4


def test_samplers_of_each_model():
    assert set(SOLVERS) == {"heun", "euler", "euler_ancestral", "dpmpp_2m"} == set(samplers_of(small("EDM")))
    assert samplers_of(small("Flow")) == samplers_of(small("EDM"))
    assert set(samplers_of(small("DDPM"))) == {"ddpm", "ddim", *SOLVERS}
    assert samplers_of(small("DDPM", timesteps=1)) == ["ddpm", "ddim"]  # a solver needs more than one noise level
    with pytest.raises(UsageError, match="sampler: ddim cannot draw from this EDM; it has heun, euler"):
        draw(small("EDM"), torch.tensor([0]), "ddim")


# ---- an image is the same in any batch

@EACH
def test_an_image_does_not_depend_on_its_batch(kind, sampler):
    """In double precision: the batch size decides the order of sums, and a random network amplifies the rounding."""
    model, labels = small(kind).double(), torch.tensor([3, 0, 2, 2])
    options = dict(sampler=sampler, steps=steps_of(sampler), guidance_scale=2.0, **OPTIONS.get(sampler, {}))
    whole = draw(model, labels, generator=image_generator(5, range(4)), **options)
    parts = [draw(model, labels[k], generator=image_generator(5, k), **options)
             for k in (torch.tensor([0]), torch.tensor([3, 1]))]
    assert whole.dtype == torch.float64 and torch.allclose(whole[[0, 3, 1]], torch.cat(parts), atol=1e-9)
    assert not torch.allclose(whole[2], whole[3], atol=1e-2)  # the same label, another number
    # with one start, other noise on the way
    again, other = (draw(model, labels, noise=torch.ones(4, 1, 8, 8), generator=torch.Generator().manual_seed(seed),
                         **options) for seed in (1, 2))
    assert torch.equal(again, other) == (sampler == "euler")  # the only one that has no noise to add


def test_noise_by_image():
    generator = image_generator(5, [7, 9])
    assert torch.equal(generator(0, (2, 1, 8, 8)), image_noise(5, [7, 9], (1, 8, 8)))
    values = torch.stack([generator(step, (2, 1, 64, 64)) for step in range(4)]).flatten(2)
    alone = torch.stack([image_generator(5, [9])(step, (1, 1, 64, 64)) for step in range(4)]).flatten(1)
    assert torch.equal(values[:, 1], alone)
    correlation = torch.corrcoef(values.flatten(0, 1))
    assert (correlation - torch.eye(8)).abs().max() < 5 / 64  # each image and each step its own
    assert (values.mean(2).abs() < 5 / 64).all() and ((values.var(2) - 1).abs() < 5 * 2 ** 0.5 / 64).all()


# ---- guidance and network calls

class Counter(nn.Module):
    """The network; remembers the labels of each call."""

    def __init__(self, network):
        super().__init__()
        self.network, self.labels = network, []

    def forward(self, x, label, time):
        self.labels.append(label.tolist())
        return self.network(x, label, time)


@EACH
def test_guidance_inside_the_interval_only(kind, sampler):
    model, labels, noise = small(kind), torch.tensor([3, 0]), torch.randn(2, 1, 8, 8)
    network, options = model.model, dict(sampler=sampler, steps=steps_of(sampler), **OPTIONS.get(sampler, {}))
    levels = (karras_sigmas(4, *model.sigma_range)[:-1] if sampler in SOLVERS else model.sigmas.flip(0)).tolist()
    interval = [(levels[-1] * levels[-2]) ** 0.5, (levels[0] * levels[1]) ** 0.5]

    def images(**guidance):
        model.model = Counter(network)
        x = draw(model, labels, noise=noise, generator=image_generator(0, range(2)), **options, **guidance)
        settings = sampling_settings(model, CONFIG[kind], **options, **guidance)
        assert sum(map(len, model.model.labels)) == 2 * network_calls(model, settings)
        return x, model.model.labels

    plain, seen = images()
    assert all(labels == [3, 0] for labels in seen)
    guided, seen = images(guidance_scale=3.0)
    assert all(labels == [3, 0, 4, 4] for labels in seen)  # both branches in one call
    limited, seen = images(guidance_scale=3.0, guidance_interval=interval)
    # both branches between the bounds, one outside them, in the order of falling noise
    assert len(seen[0]) == len(seen[-1]) == 2 and {len(labels) for labels in seen} == {2, 4}
    assert not torch.equal(limited, plain) and not torch.equal(limited, guided)
    assert torch.equal(images(guidance_scale=3.0, guidance_interval=[0, 1e6])[0], guided)
    assert torch.equal(images(guidance_scale=3.0, guidance_interval=[1e5, 1e6])[0], plain)


def test_the_interval_is_open_below_and_closed_above():
    assert [guidance_at(s, 3.0, (0.3, 5.0)) for s in (0.2, 0.3, 0.3001, 5.0, 5.001)] == [1, 1, 3, 3, 1]
    assert guidance_at(1e-9, 3.0) == guidance_at(1e9, 3.0) == 3


# ---- states

@pytest.mark.parametrize("kind, sampler", [("DDPM", name) for name in SAMPLERS if name != "ddpm"] + [("EDM", "heun")])
def test_states_are_in_the_scaling_of_ddpm(kind, sampler):
    # data of standard deviation 1 keep it under DDPM's noise, so every state has it
    model, states = small(kind, timesteps=1000, img_shape=(1, 16, 16)), []
    if kind == "EDM":
        model.denoise = lambda x, sigma, label, scale: x / (1 + sigma ** 2)
    else:
        model.model = ExactNetwork(type(ONE)([1.0], [0.0], [1.0]), model.sigmas)
    x = draw(model, torch.zeros(8, dtype=torch.long), sampler, 100, callback=lambda *state: states.append(state))
    assert [state[:2] for state in states] == [(k, 100) for k in range(1, 101)]
    stds = torch.stack([state[2].std() for state in states])
    assert ((stds - 1).abs() < 0.1).all(), stds
    assert torch.allclose(states[-1][2], x)


# ---- DDPM as a denoiser

@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_denoise_of_a_ddpm(prediction):
    model = small("DDPM", timesteps=1000, prediction=prediction)
    model.model = ExactNetwork(TWO, model.sigmas, prediction)
    assert model.sigma_range == pytest.approx((0.01, 157.4, 7), rel=1e-3)
    sigma = torch.cat([model.sigmas[[0, 10, 500, 999]], torch.tensor([0.02, 0.7, 3.3, 90.0])])
    x = 0.3 + (0.3 + sigma)[:, None, None, None] * torch.randn(8, 1, 8, 8)
    got = model.denoise(x, sigma, torch.zeros(8, dtype=torch.long))
    expected = TWO.denoise(x.double(), sigma.double()[:, None, None, None])
    # an eps in fp32 is off by 1e-7, and sigma times that is the image's error
    assert ((got - expected).abs().flatten(1).amax(1) < 1e-5 + 2e-6 * sigma).all()
    alone = model.denoise(x[5:6], 0.7, torch.zeros(1, dtype=torch.long))
    assert torch.allclose(alone, got[5:6], atol=1e-6)


def test_solvers_start_where_an_image_is_lost_and_not_far_beyond():
    model = small("DDPM", timesteps=1000, beta_schedule="cosine", prediction="v")
    assert model.sigmas[-1] > 20_000 and model.sigma_range[1] == 160
    sigmas = karras_sigmas(20, *model.sigma_range)
    assert (sigmas > 80).sum() <= 3


@pytest.mark.parametrize("T, schedule", [(1000, "linear"), (50, "cosine"), (2, "linear")])
def test_time_of_a_noise_level(T, schedule):
    model = small("DDPM", timesteps=T, beta_schedule=schedule, prediction="v")
    sigmas = model.sigmas
    assert torch.allclose(model.sigma_to_time(sigmas), torch.arange(T).float(), atol=2e-3)
    between = (sigmas[1:] * sigmas[:-1]).sqrt()  # half way in log sigma
    assert torch.allclose(model.sigma_to_time(between), torch.arange(T - 1) + 0.5, atol=2e-3)
    assert model.sigma_to_time(torch.stack([sigmas[0] / 3, sigmas[-1] * 3])).tolist() == [0, T - 1]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler, steps, tolerance", [("ddim", 500, 0.01), ("heun", 60, 0.005),
                                                       ("dpmpp_2m", 60, 0.005)])
def test_a_ddpm_takes_quantiles_to_quantiles(prediction, sampler, steps, tolerance):
    """The exact flow, from x_T to the image: noise levels, times, scales and solver together."""
    model = small("DDPM", timesteps=1000, prediction=prediction).double()
    model.model = ExactNetwork(TWO, model.sigmas, prediction)
    u, sigma = torch.linspace(0.02, 0.98, 64, dtype=torch.float64), model.sigmas[-1].item()
    noise = TWO.quantile(u, sigma) / (1 + sigma ** 2) ** 0.5
    x = draw(model, torch.tensor([0]), sampler, steps, noise=noise.reshape(1, 1, 8, 8)).flatten()
    assert (x - TWO.quantile(u)).abs().max() < tolerance


# ---- clipping

@EACH
def test_clip_keeps_predictions_among_the_pixels(kind, sampler):
    model, labels, noise = small(kind), torch.tensor([3, 0]), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        model.model.final_conv[-1].weight *= 5
        model.model.final_conv[-1].bias += 5
    free, kept = (draw(model, labels, sampler, steps_of(sampler), noise=noise, clip=clip,
                       generator=image_generator(0, range(2))) for clip in (False, True))
    assert free.abs().max() > 1.5  # the last step ends on the prediction
    assert kept.abs().max() <= 1 + 1e-5
