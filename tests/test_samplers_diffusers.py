"""The solvers step by step against diffusers' schedulers, on random networks."""

import numpy as np
import pytest
import torch

from helpers import SMALL
from libs import DDPM, EDM
from libs.samplers import dpmpp_2m, euler_ancestral

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs
PREDICTIONS = pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
LABELS = torch.tensor([0, 3])


def ddpm(prediction):
    return DDPM(**{**SMALL, "timesteps": 1000, "prediction": prediction}).eval()


def scheduler_of(kind, prediction, **options):
    """One of diffusers', with DDPM's linear schedule in float64: fp32 products lose four digits of 1 - abar."""
    scheduler = kind(1000, 1e-4, 0.02, "linear", prediction_type=prediction, timestep_spacing="linspace", **options)
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return scheduler


def their_states(scheduler, network, x, **options):
    """The state after each step and its noise level."""
    states = []
    for k, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            out = network(scheduler.scale_model_input(x, t), LABELS, t.repeat(len(LABELS)))
        x = scheduler.step(out, t, x, **options).prev_sample.to(x.dtype)
        states.append((x, scheduler.sigmas[k + 1].item()))
    return states


def assert_agree(ours, theirs):
    """To 1e-5 of the largest value in each state."""
    assert len(ours) == len(theirs) > 0
    for k, (a, b) in enumerate(zip(ours, theirs)):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max()), k


# ---- at the noise levels of Diffusion.sample: Karras et al.'s between DDPM's first and last, rho 7, then 0

@PREDICTIONS
def test_euler_of_a_ddpm(diffusers, prediction, theirs, steps=7):
    model, noise, ours = ddpm(prediction), torch.randn(2, 1, 8, 8), []
    scheduler = scheduler_of(diffusers.EulerDiscreteScheduler, theirs, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    expected = their_states(scheduler, model.model, noise * (1 + scheduler.sigmas[0].item() ** 2) ** 0.5)
    model.sample(LABELS, "euler", steps, noise=noise, callback=lambda k, n, x: ours.append(x))
    assert_agree(ours, [x / (1 + sigma ** 2) ** 0.5 for x, sigma in expected])


@PREDICTIONS
def test_heun_of_a_ddpm(diffusers, prediction, theirs, steps=7):
    # fp32 rounds too coarsely for large steps down from sigma = 157
    model, noise, ours = ddpm(prediction).double(), torch.randn(2, 1, 8, 8).double(), []
    scheduler = scheduler_of(diffusers.HeunDiscreteScheduler, theirs, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    expected = their_states(scheduler, model.model, noise * (1 + scheduler.sigmas[0].item() ** 2) ** 0.5)
    assert len(expected) == 2 * steps - 1
    model.sample(LABELS, "heun", steps, noise=noise, callback=lambda k, n, x: ours.append(x))
    # theirs goes to the next level and back; every second state is the end of a step, as is the very last
    assert_agree(ours, [x / (1 + sigma ** 2) ** 0.5 for x, sigma in expected[1::2] + expected[-1:]])


# ---- on the grid of evenly spaced timesteps ("linspace", no offset), then 0

@PREDICTIONS
@pytest.mark.parametrize("kind, eta", [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
@pytest.mark.parametrize("steps", [1, 10])
def test_dpmpp_2m_of_a_ddpm(diffusers, prediction, theirs, kind, eta, steps):
    # midpoint, second order, the last step to sigma 0 of first order ("zero"); its state is scaled as DDPM's
    model, noise, ours = ddpm(prediction), torch.randn(2, 1, 8, 8), []
    scheduler = scheduler_of(diffusers.DPMSolverMultistepScheduler, theirs, algorithm_type=kind,
                             solver_order=2, solver_type="midpoint", final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == np.linspace(0, 999, steps + 1).round()[:0:-1].tolist()
    expected = their_states(scheduler, model.model, noise, generator=torch.Generator().manual_seed(3))
    levels = [*model.sigmas[scheduler.timesteps].tolist(), 0.0]
    with torch.no_grad():
        dpmpp_2m(lambda x, sigma: model.denoise(x, sigma, LABELS), noise * (1 + levels[0] ** 2) ** 0.5, levels,
                 callback=lambda k, n, x: ours.append(x / (1 + levels[k] ** 2) ** 0.5), eta=eta,
                 generator=torch.Generator().manual_seed(3))
    assert_agree(ours, [x for x, _ in expected])


@PREDICTIONS
def test_euler_ancestral_of_a_ddpm(diffusers, prediction, theirs, steps=10):
    model, noise, ours = ddpm(prediction), torch.randn(2, 1, 8, 8), []
    scheduler = scheduler_of(diffusers.EulerAncestralDiscreteScheduler, theirs)
    scheduler.set_timesteps(steps)  # steps - 1 divides 999: each is a timestep
    levels = scheduler.sigmas.tolist()
    x = noise * (1 + levels[0] ** 2) ** 0.5
    expected = their_states(scheduler, model.model, x, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        euler_ancestral(lambda x, sigma: model.denoise(x, sigma, LABELS), x, levels,
                        callback=lambda k, n, x: ours.append(x / (1 + levels[k] ** 2) ** 0.5),
                        generator=torch.Generator().manual_seed(3))
    assert_agree(ours, [x / (1 + sigma ** 2) ** 0.5 for x, sigma in expected])


# ---- EDM with its own noise levels, then 0

@pytest.mark.parametrize("sampler, kind", [("euler", "EDMEulerScheduler"),
                                           ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")])
@pytest.mark.parametrize("steps", [1, 7])
def test_solvers_of_edm(diffusers, sampler, kind, steps):
    model = EDM(**SMALL, sigma_data=0.4, P_mean=0, sigma_min=0.02, sigma_max=50.0, rho=5.0).eval()
    noise, ours = torch.randn(2, 1, 8, 8), []
    scheduler = getattr(diffusers, kind)(0.02, 50.0, sigma_data=0.4, rho=5.0, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    # their time is c_noise of Table 1; our embedding wants it 1000 times as large
    expected = their_states(scheduler, lambda x, label, time: model.model(x, label, 1000 * time), 50.0 * noise)
    model.sample(LABELS, sampler, steps, noise=noise, callback=lambda k, n, x: ours.append(x))
    assert_agree(ours, [x / (1 + sigma ** 2) ** 0.5 for x, sigma in expected])
