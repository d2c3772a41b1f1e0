"""DDPM's reverse process: guidance, diffusers' steps, and the closed form for Gaussian data."""

import numpy as np
import pytest
import torch

from helpers import SMALL, GaussianOracle, Recorder, reference
from libs import DDPM, UsageError
from libs.ddpm import SCHEDULES


def small(**options):
    return DDPM(**{**SMALL, **options}).eval()


# ---- guidance

@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_formula(scale):
    model = small(label_dropout=0.1)
    x, label, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3]), torch.tensor([0, 20, 49])
    with torch.no_grad():
        cond = model.model(x, label, t)
        uncond = model.model(x, torch.full((3,), 4), t)
        guided = model.guided(x, label, t, scale)
    assert torch.allclose(guided, uncond + scale * (cond - uncond), atol=1e-5)
    assert torch.equal(guided, cond) if scale == 1 else not torch.allclose(guided, cond, atol=1e-5)


def test_guidance_needs_label_dropout():
    with pytest.raises(UsageError, match="guidance_scale: 3.0.*label_dropout"):
        small(timesteps=3).p_sample_loop(torch.tensor([0]), guidance_scale=3.0)


# ---- one step

@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("clip", [False, True])
def test_p_sample_agrees_with_diffusers(diffusers, prediction, theirs, clip):
    scheduler = reference(diffusers, "linear", 1000, theirs)
    scheduler.register_to_config(clip_sample=clip, clip_sample_range=1.0)
    model, label, clipped = small(timesteps=1000, prediction=prediction), torch.tensor([0, 1]), 0
    with torch.no_grad():
        model.model.final_conv[-1].weight *= 4  # so that x0 leaves [-1, 1] whatever is predicted
    for t_index in (0, 1, 2, 10, 100, 500, 999):
        x, t = torch.randn(2, 1, 8, 8), torch.full((2,), t_index)
        with torch.no_grad():
            out = model.model(x, label, t)
            clipped += (model.predict(x, label, t)[1].abs() > 1).sum()
        expected = scheduler.step(out, t_index, x, generator=torch.Generator().manual_seed(t_index)).prev_sample
        got = model.p_sample(x, label, t, t_index, generator=torch.Generator().manual_seed(t_index), clip=clip)
        assert torch.allclose(got, expected.float(), rtol=1e-5, atol=1e-5), t_index
    assert clipped > 50


def test_no_noise_in_the_last_step():
    model = small()
    x, label, t = torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long)
    assert torch.equal(model.p_sample(x, label, t, 0), model.p_sample(x, label, t, 0))
    assert not torch.equal(model.p_sample(x, label, t + 1, 1), model.p_sample(x, label, t + 1, 1))


# ---- the loop

def test_loop_visits_all_timesteps_with_the_labels():
    model = small(timesteps=7)
    model.model = Recorder()
    labels, seen = torch.tensor([3, 0]), []
    model.p_sample_loop(labels, callback=lambda step, steps, x: seen.append((step, steps, x.shape)))
    assert [call[2].tolist() for call in model.model.calls] == [[t, t] for t in reversed(range(7))]
    assert all(call[1].tolist() == [3, 0] for call in model.model.calls)
    assert seen == [(k, 7, (2, 1, 8, 8)) for k in range(1, 8)]


MU, S, N, T = (0.5, -0.3), 0.3, 64, 50
BETA = SCHEDULES["cosine"](T)  # nearly all noise at the end, so that every step matters


def draw_gaussian():
    """Pixels that Algorithm 2 draws with the exact network for Gaussian data, for two labels: 2 x pixels."""
    model = DDPM(img_shape=(1, 32, 32), timesteps=T, dim=8, context_dim=8, num_classes=2, dim_mults=(1,),
                 attn_levels=(), beta_schedule="cosine").eval()
    model.model = GaussianOracle((1 - BETA).cumprod(0), MU, S)
    model.postprocess = lambda x: x
    return model.p_sample_loop(torch.arange(2).repeat_interleave(N // 2)).double().reshape(2, -1).numpy()


def standard_errors_from_truth(x):
    """How far mean and variance per label are from eq. 11 with the exact eps, in standard errors: 4 values."""
    beta = BETA.numpy()
    abar = np.cumprod(1 - beta)
    off = []
    for values, mu in zip(x, MU):
        mean, var = 0.0, 1.0  # x_T
        for t in reversed(range(T)):
            # eps = slope * x + const, so x_{t-1} = a x + b + noise
            slope = np.sqrt(1 - abar[t]) / (abar[t] * S ** 2 + 1 - abar[t])
            const = -slope * np.sqrt(abar[t]) * mu
            factor = beta[t] / np.sqrt(1 - abar[t])
            a, b = (1 - factor * slope) / np.sqrt(1 - beta[t]), -factor * const / np.sqrt(1 - beta[t])
            noise = beta[t] * (1 - abar[t - 1]) / (1 - abar[t]) if t else 0.0
            mean, var = a * mean + b, a ** 2 * var + noise
        n = len(values)
        off += [abs(values.mean() - mean) / np.sqrt(var / n), abs(values.var() - var) / (var * np.sqrt(2 / n))]
    return np.array(off)


def test_sampling_gaussian_data_in_closed_form():
    x = draw_gaussian()
    assert (standard_errors_from_truth(x) < 4).all()
    # and the data's own mean and spread come out, nearly: eq. 7's variance is the lower bound
    for values, mu in zip(x, MU):
        assert abs(values.mean() - mu) < 0.02 and 0.8 * S < values.std() < 1.02 * S


# ---- images out

def test_postprocess_maps_to_the_unit_interval():
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 3)
    assert small().postprocess(x).flatten().tolist() == [0, 0, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize("label", [4, -1])
def test_label_outside_the_classes(label):
    with pytest.raises(UsageError, match=f"label {label} .* 0 to 3"):
        small(timesteps=3).p_sample_loop(torch.tensor([0, label]))
