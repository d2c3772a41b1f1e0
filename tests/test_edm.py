"""EDM against Table 1 and Algorithm 1 of Karras et al. 2022, and against the exact flow of Gaussian data."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from helpers import SMALL
from libs import EDM, UsageError
from libs.samplers import karras_sigmas

LEVELS = (0.002, 0.05, 0.5, 1.0, 7.0, 80.0)


def small(**options):
    return EDM(**{**SMALL, "timesteps": 100, **options}).eval()


def level(t, timesteps=100):
    """Noise level of timestep t: a quantile of the log-normal of Table 1."""
    return math.exp(NormalDist(-1.2, 1.2).inv_cdf((t + 0.5) / timesteps))


# ---- preconditioning

@pytest.mark.parametrize("sigma_data", [0.3, 1.7])
def test_preconditioning_is_table_1(sigma_data):
    sigma = np.array(LEVELS)
    c_skip, c_out, c_in, c_noise = small(sigma_data=sigma_data).preconditioning(torch.tensor(LEVELS))
    assert np.allclose(c_skip, sigma_data ** 2 / (sigma ** 2 + sigma_data ** 2), rtol=1e-5)
    assert np.allclose(c_out, sigma * sigma_data / np.sqrt(sigma_data ** 2 + sigma ** 2), rtol=1e-5)
    assert np.allclose(c_in, 1 / np.sqrt(sigma ** 2 + sigma_data ** 2), rtol=1e-5)
    assert np.allclose(c_noise, np.log(sigma) / 4, rtol=1e-5, atol=1e-7)


def test_denoise_is_eq_7():
    model = small(sigma_data=0.4)
    x, label, sigma = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]), np.array(LEVELS)
    var = sigma ** 2 + 0.4 ** 2
    columns = [torch.tensor(c, dtype=torch.float32)[:, None, None, None]
               for c in (0.4 ** 2 / var, sigma * 0.4 / var ** 0.5, var ** -0.5)]
    with torch.no_grad():
        F = model.model(columns[2] * x, label, torch.tensor(250 * np.log(sigma), dtype=torch.float32))
        D = model.denoise(x, torch.tensor(LEVELS), label)
        assert torch.allclose(model.denoise(x[2:4], 0.7, label[2:4]),
                              model.denoise(x[2:4], torch.tensor([0.7, 0.7]), label[2:4]))
    assert torch.allclose(D, columns[0] * x + columns[1] * F, atol=1e-4)


def test_sigma_data():
    model = small()
    assert model.sigma_data == 0.5
    model.set_sigma_data(0.8)
    other = small()
    other.load_state_dict(model.state_dict())
    assert other.sigma_data == pytest.approx(0.8)
    given = small(sigma_data=0.25)
    given.set_sigma_data(0.8)
    assert given.sigma_data == 0.25


# ---- training

@pytest.mark.parametrize("timesteps", [1, 10, 1000])
def test_training_levels_are_quantiles(timesteps):
    sigmas = small(timesteps=timesteps).sigmas
    assert sigmas.dtype == torch.float32
    assert np.allclose(sigmas, [level(i, timesteps) for i in range(timesteps)], rtol=1e-5)
    other = small(timesteps=timesteps, P_mean=-0.5, P_std=0.8).sigmas
    assert torch.allclose((other.log() + 0.5) / 0.8, (sigmas.log() + 1.2) / 1.2, atol=1e-5)


def test_loss_is_eq_2():
    model = small(sigma_data=0.6)
    x, noise = torch.randn(5, 1, 8, 8) * 0.6, torch.randn(5, 1, 8, 8)
    t, label, expected = torch.tensor([0, 10, 50, 99, 99]), torch.tensor([0, 1, 2, 3, 0]), []
    for i in range(5):
        sigma = level(t[i].item())
        var = sigma ** 2 + 0.36
        y = x[i:i + 1] + sigma * noise[i:i + 1]
        with torch.no_grad():
            F = model.model(y / math.sqrt(var), label[i:i + 1], torch.tensor([250 * math.log(sigma)]))
        # the second form of eq. 8: lambda c_out^2 (F - target)^2 with lambda c_out^2 = 1
        target = (x[i:i + 1] - 0.36 / var * y) / (sigma * 0.6 / math.sqrt(var))
        expected.append((F - target).square().mean().item())
    loss, each = model.compute_loss(x, label, t, noise, return_each=True)
    assert each.tolist() == pytest.approx(expected, rel=1e-4)
    assert loss.shape == () and loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_times_are_a_stratum_and_a_place_in_it():
    model, plain = small(), small().noise_level(torch.arange(100))
    t = model.draw_times(20_000, torch.Generator().manual_seed(3))
    strata = torch.randint(100, (20_000,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(t.long(), strata) and 0.49 < (t - strata).mean() < 0.51
    assert torch.equal(plain, model.sigmas) and torch.allclose(model.noise_level(torch.arange(100) + 0.5), plain, rtol=1e-4)
    # the levels are of the log-normal itself, tails included
    normal = (model.noise_level(t).log() + 1.2) / 1.2
    expected = torch.tensor([NormalDist().inv_cdf((k + 0.5) / 20_000) for k in range(20_000)])
    assert (normal.sort().values - expected).abs()[100:-100].max() < 0.08 and normal.max() > 3.3 and normal.min() < -3.3


def test_no_time_is_infinitely_far_out(monkeypatch):
    model = small(timesteps=1000)
    for place, stratum in ((0.0, 0), (1 - 2 ** -24, 999)):
        monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, place))
        monkeypatch.setattr(torch, "randint", lambda high, shape, **_: torch.full(shape, stratum))
        t = model.draw_times(4)
        assert torch.isfinite(model.noise_level(t).log()).all() and t.long().tolist() == [stratum] * 4


def test_the_place_is_drawn_with_the_noise():
    model, x = small(), torch.zeros(64, 1, 8, 8)
    t, label, seen = torch.full((64,), 70), torch.zeros(64, dtype=torch.long), []
    model.denoise = lambda x, sigma, label: seen.append(sigma) or x
    model.compute_loss(x, label, t, torch.randn_like(x))
    model.compute_loss(x, label, t)
    assert torch.equal(seen[0], torch.full((64,), level(70)))
    assert level(69.5) < seen[1].min() < level(69.6) < level(70.4) < seen[1].max() < level(70.5)


@pytest.mark.parametrize("options", [{}, {"P_mean": -0.4, "sigma_min": 0.02, "sigma_max": 40, "rho": 5},
                                     {"P_mean": 3.0, "sigma_max": 80}])
def test_sampling_stays_where_training_was(options):
    model = small(**options)
    low, high, rho = model.sigma_range
    levels = model.noise_level(model.draw_times(100_000))
    assert low >= options.get("sigma_min", 0.002) and high <= options.get("sigma_max", 80) and rho == options.get("rho", 7)
    assert (levels > high).sum() >= 10 and (levels < low).sum() >= 10  # it has seen more and less than that


@pytest.mark.parametrize("options", [{"sigma_min": 80.0}, {"sigma_min": 30.0}, {"sigma_max": 0.001}, {"P_mean": 9.0}])
def test_levels_that_training_never_draws_are_refused(options):
    with pytest.raises(UsageError, match="model.sigma_min is .* and model.sigma_max .* around e"):
        small(**options)


# ---- sampling

def test_karras_sigmas():
    sigmas = karras_sigmas(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert sigmas.dtype == torch.float64 and np.allclose(sigmas, [*expected, 0], rtol=1e-12)
    assert karras_sigmas(1).tolist() == pytest.approx([80.0, 0.0])
    assert karras_sigmas(3, 1.0, 9.0, rho=1).tolist() == pytest.approx([9.0, 5.0, 1.0, 0.0])


def test_sampling_gaussian_data():
    # the flow scales about the mean as the standard deviation shrinks
    model, mu, s = small(), torch.tensor([0.4, -0.2]), 0.3
    labels, noise = torch.tensor([0, 1, 1, 0]), torch.randn(4, 1, 8, 8)
    m = mu[labels][:, None, None, None]
    model.denoise = lambda x, sigma, label, scale: (
        (s ** 2 * x + sigma ** 2 * mu[label][:, None, None, None]) / (s ** 2 + sigma ** 2))
    model.postprocess = lambda x: x
    got, start = model.p_sample_loop(labels, steps=100, noise=noise), model.sigma_range[1]
    assert torch.allclose(got, m + (start * noise - m) * s / math.sqrt(s ** 2 + start ** 2), atol=4e-3)


def test_p_sample_loop():
    model, labels, count = small(img_shape=(3, 8, 4)), torch.tensor([0, 1, 3]), []
    images = model.p_sample_loop(labels, callback=lambda k, n, x: count.append(n))
    assert count == [18] * 18  # the paper's number for CIFAR-10
    assert images.shape == (3, 3, 8, 4) and not images.requires_grad
    assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    with pytest.raises(UsageError, match="guidance_scale"):
        model.p_sample_loop(labels, guidance_scale=2.0)
    with pytest.raises(UsageError, match="label 4"):
        model.p_sample_loop(torch.tensor([4]))
