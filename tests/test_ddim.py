"""DDIM against diffusers, against DDPM, and against the affine map that it is for Gaussian data."""

import numpy as np
import pytest
import torch

from helpers import SMALL, GaussianOracle
from libs import DDIM, DDPM, UsageError
from libs.ddim import ddim_step, ddim_timesteps
from libs.ddpm import SCHEDULES
from libs.samplers import image_generator


def small(kind=DDIM, **options):
    return kind(**{**SMALL, **options}).eval()


# ---- against diffusers

@pytest.mark.parametrize("eta, clip", [(0.0, False), (0.4, False), (1.0, True)])
@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_steps_agree_with_diffusers(diffusers, prediction, theirs, eta, clip):
    # 41 timesteps, every 5th: the only spacing both can have, 40, 35, ..., 0 and then the image
    model = small(timesteps=41, prediction=prediction)
    scheduler = diffusers.DDIMScheduler(41, 1e-4, 0.02, "linear", clip_sample=clip, set_alpha_to_one=True,
                                        prediction_type=theirs)
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.num_inference_steps = 41 // 5  # step() goes back 41 // this = 5
    timesteps = ddim_timesteps(41, 9)
    assert timesteps == [40, 35, 30, 25, 20, 15, 10, 5, 0]
    label, x = torch.tensor([0, 3]), torch.randn(2, 1, 8, 8)
    for i, i_next in zip(timesteps, timesteps[1:] + [-1]):
        t = torch.full((2,), i)
        with torch.no_grad():
            out = model.model(x, label, t)
        noise = torch.randn_like(x)
        expected = scheduler.step(out, i, x, eta=eta, use_clipped_model_output=clip,
                                  variance_noise=noise).prev_sample.float()
        x = model.p_sample(x, label, t, i, t_next=i_next, eta=eta, clip=clip, generator=lambda step, shape: noise)
        assert torch.allclose(x, expected, rtol=1e-5, atol=1e-5), i


@pytest.mark.parametrize("schedule, steps, spacing, eta", [
    ("linear", 1, "uniform", 0.0), ("linear", 7, "quadratic", 0.5), ("quadratic", 20, "uniform", 0.0),
    ("cosine", 20, "quadratic", 1.0)])
def test_the_loop_agrees_with_diffusers_for_any_spacing(diffusers, schedule, steps, spacing, eta):
    # a choice of timesteps is a schedule of its own: give that to diffusers, one timestep after the other
    model = small(timesteps=1000, beta_schedule=schedule, prediction="v", img_shape=(1, 4, 4), attn_levels=())
    timesteps = ddim_timesteps(1000, steps, spacing)
    scheduler = diffusers.DDIMScheduler(steps, clip_sample=False, set_alpha_to_one=True,
                                        prediction_type="v_prediction", beta_schedule="linear")
    scheduler.alphas_cumprod = (1 - SCHEDULES[schedule](1000)).cumprod(0)[timesteps[::-1]]
    scheduler.num_inference_steps = steps

    label, noise = torch.tensor([1]), torch.randn(1, 1, 4, 4)
    x, expected, states = noise, [], []
    for k, i in enumerate(timesteps):
        with torch.no_grad():
            out = model.model(x, label, torch.tensor([i]))
        fresh = torch.randn(noise.shape, generator=torch.Generator().manual_seed(i))
        x = scheduler.step(out, steps - 1 - k, x, eta=eta, variance_noise=fresh).prev_sample.float()
        expected.append(x)
    model.p_sample_loop(label, steps, spacing, eta=eta, noise=noise,
                        callback=lambda step, total, x: states.append(x),
                        # `step` counts timesteps, from the noisiest on
                        generator=lambda step, shape: torch.randn(
                            shape, generator=torch.Generator().manual_seed(1000 - step)))
    assert len(states) == len(expected) == steps
    for a, b in zip(states, expected):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_step_is_eq_12_with_the_noise_of_eq_16():
    abar, abar_next, eta = 0.3, 0.8, 0.4
    x0, eps, noise = torch.randn(3, 5, dtype=torch.float64)
    sigma = eta * ((1 - abar_next) / (1 - abar)) ** 0.5 * (1 - abar / abar_next) ** 0.5
    expected = abar_next ** 0.5 * x0 + (1 - abar_next - sigma ** 2) ** 0.5 * eps + sigma * noise
    levels = [(a ** 0.5, (1 - a) ** 0.5) for a in (abar, abar_next)]
    assert torch.allclose(ddim_step(x0, eps, *levels, eta, noise), expected, rtol=0, atol=1e-12)


# ---- Gaussian data: every step is affine

@pytest.mark.parametrize("steps", [1, 2, 17, 50])
def test_sampling_gaussian_data_in_closed_form(steps):
    mu, s = 0.4, 0.3
    abar = (1 - SCHEDULES["linear"](50)).cumprod(0)
    model = small()
    model.model = GaussianOracle(abar, [mu, mu], s)
    model.postprocess = lambda x: x

    chosen = [round(i * 49 / (steps - 1)) for i in range(steps)] if steps > 1 else [49]
    factor, shift = 1.0, 0.0
    for k in reversed(range(steps)):
        now, then = abar[chosen[k]].item(), abar[chosen[k - 1]].item() if k else 1.0
        slope = np.sqrt(1 - now) / (now * s ** 2 + 1 - now)
        const = -slope * np.sqrt(now) * mu
        # x0 = (x - sqrt(1 - now) eps) / sqrt(now); next = sqrt(then) x0 + sqrt(1 - then) eps
        direction = np.sqrt(1 - then) - np.sqrt(then) * np.sqrt(1 - now) / np.sqrt(now)
        a, b = np.sqrt(then / now) + direction * slope, direction * const
        factor, shift = a * factor, a * shift + b

    noise = torch.randn(2, 1, 8, 8)
    got = model.p_sample_loop(torch.tensor([0, 1]), steps, noise=noise)
    assert torch.allclose(got.double(), factor * noise.double() + shift, atol=2e-4)


# ---- number of steps

@pytest.mark.parametrize("T", [1, 2, 13, 50, 1000])
def test_timesteps_of_every_number_of_steps(T):
    for steps in range(1, T + 1) if T < 1000 else (1, 2, 3, 50, 333, 999, 1000):
        uniform, quadratic = ddim_timesteps(T, steps), ddim_timesteps(T, steps, "quadratic")
        for timesteps in (uniform, quadratic):
            assert len(timesteps) == steps and all(type(t) is int for t in timesteps)
            assert timesteps[0] == T - 1 and (steps == 1 or timesteps[-1] == 0)
            assert (np.diff(timesteps) < 0).all()
        gaps = -np.diff(uniform)
        assert steps == 1 or gaps.max() - gaps.min() <= 1
        for k, t in enumerate(quadratic if steps > 1 else ()):
            exact, least = (T - 1) * ((steps - 1 - k) / (steps - 1)) ** 2, steps - 1 - k
            # off only where squares are nearer than two timesteps can be
            assert abs(t - exact) <= 0.5 or t == least > exact
    if T == 1000:
        assert ddim_timesteps(T, 11, "quadratic") == [999, 809, 639, 490, 360, 250, 160, 90, 40, 10, 0]


@pytest.mark.parametrize("steps", [0, 51])
def test_impossible_numbers_of_steps(steps):
    with pytest.raises(UsageError, match=f"steps: {steps} .* 1 and .* 50"):
        small().p_sample_loop(torch.tensor([0]), steps)


# ---- the relation to DDPM

@pytest.mark.parametrize("schedule, prediction, T", [("linear", "eps", 50), ("quadratic", "x0", 1000),
                                                     ("cosine", "v", 1000)])
def test_eta_1_over_all_timesteps_is_algorithm_2(schedule, prediction, T):
    """With the same noise, and the smaller of DDPM's two variances: beta-tilde of eq. 7, not beta."""
    ddpm = small(DDPM, timesteps=T, beta_schedule=schedule, prediction=prediction, img_shape=(1, 4, 4), attn_levels=())
    ddim, label = DDIM.from_ddpm(ddpm), torch.tensor([0, 3])
    for i in {0, 1, 2, T // 2, T - 1}:
        x, t = torch.randn(2, 1, 4, 4), torch.full((2,), i)  # the next timestep is i - 1 where none is given
        expected, got = (model.p_sample(x, label, t, i, generator=torch.Generator().manual_seed(i), **options)
                         for model, options in ((ddpm, {}), (ddim, {"eta": 1.0})))
        assert torch.allclose(got, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max())), i

    # and so the whole way, up to rounding that a network of random weights carries on
    if T == 50:
        ddpm.postprocess = ddim.postprocess = lambda x: x
        a = ddpm.p_sample_loop(label, generator=image_generator(0, range(2)))
        b = ddim.p_sample_loop(label, T, generator=image_generator(0, range(2)), eta=1.0)
        assert torch.allclose(a, b, rtol=0, atol=1e-3 * a.abs().max())


def test_from_ddpm_shares_the_weights():
    ddpm = small(DDPM)
    ddim = DDIM.from_ddpm(ddpm)
    assert type(ddim) is DDIM and type(ddpm) is DDPM and ddim.model is ddpm.model
    labels, noise = torch.tensor([0, 1]), torch.randn(2, 1, 8, 8)
    before = ddim.p_sample_loop(labels, 3, noise=noise)
    with torch.no_grad():
        ddpm.model.final_conv[-1].bias += 0.5
    assert not torch.equal(ddim.p_sample_loop(labels, 3, noise=noise), before)
    # and what a DDPM saved loads into a DDIM
    other = small()
    other.load_state_dict(ddpm.state_dict())
    assert torch.equal(other.p_sample_loop(labels, 3, noise=noise), ddim.p_sample_loop(labels, 3, noise=noise))
