"""The solvers' order of convergence to an exact flow, and the distribution that stochastic ones draw; in float64."""

import math

import numpy as np
import pytest
import torch

from exact import ONE, TWO
from libs.ddim import ddim_step, ddim_timesteps
from libs.samplers import SOLVERS, dpmpp_2m, euler_ancestral, heun, karras_sigmas

LO, HI = 0.002, 80.0
U = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


# ---- order of convergence

def solve(name):
    def error(data, n):
        """From the exact marginal at HI in n steps to LO."""
        sigmas = karras_sigmas(n + 1, LO, HI)[:-1]
        return SOLVERS[name](data.denoise, data.quantile(U, HI), sigmas) - data.quantile(U, LO)
    return error


def solve_ddim(data, n):
    """The same for DDIM over evenly spaced ones of 1025 timesteps, the last and the first among them."""
    abar = (1 - torch.linspace(1e-4, 0.02, 1025, dtype=torch.float64)).cumprod(0)
    a, s = abar.sqrt(), (1 - abar).sqrt()
    timesteps = ddim_timesteps(1025, n + 1)
    x = a[-1] * data.quantile(U, (s / a)[-1])
    for i, i_next in zip(timesteps[:-1], timesteps[1:]):
        x0 = data.denoise(x / a[i], s[i] / a[i])
        x = ddim_step(x0, (x - a[i] * x0) / s[i], (a[i], s[i]), (a[i_next], s[i_next]))
    return x / a[0] - data.quantile(U, (s / a)[0])


@pytest.mark.parametrize("data", [ONE, TWO], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("error, order", [(solve("heun"), 2), (solve("dpmpp_2m"), 2), (solve("euler"), 1),
                                          (solve_ddim, 1)], ids=["heun", "dpmpp_2m", "euler", "ddim"])
def test_order_of_convergence(data, error, order):
    steps = np.array([64, 128, 256, 512])
    errors = np.array([error(data, int(n)).abs().max().item() for n in steps])
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    # off by what is left of the next order at these steps
    assert (abs(slopes - order) < 0.25).all() and abs(slopes[-1] - order) < 0.1, slopes
    assert errors[-1] < (2e-3 if order == 2 else 0.1)


# ---- stochastic samplers: the distribution is right, though no single path is

N = 10_000


def standard_errors(x, data):
    """How far mean, variance and five quantiles of N samples are from the data's, in standard errors."""
    off = [(x.mean() - data.mean) / math.sqrt(data.var / N)]
    fourth = (x - data.mean).pow(4).mean().item()
    off.append((x.var() - data.var) / math.sqrt((fourth - data.var ** 2) / N))
    for u in (0.1, 0.3, 0.5, 0.7, 0.9):
        q = data.quantile(torch.tensor(u, dtype=torch.float64))
        off.append(((x < q).double().mean() - u) / math.sqrt(u * (1 - u) / N))
    return torch.stack(off).abs()


@pytest.mark.parametrize("sampler, steps, options", [
    (euler_ancestral, 250, {}), (heun, 60, dict(S_churn=40, S_min=0.05, S_max=50.0)), (heun, 60, {"S_churn": 1000}),
    (dpmpp_2m, 100, {"eta": 0.5}), (dpmpp_2m, 100, {"eta": 1.0}),
])
def test_distribution(sampler, steps, options):
    x = sampler(TWO.denoise, HI * torch.randn(N, dtype=torch.float64), karras_sigmas(steps),
                generator=torch.Generator().manual_seed(1), **options)
    assert (standard_errors(x, TWO) < 5).all(), standard_errors(x, TWO)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_distribution_of_ddim(eta):
    # all timesteps: with fewer, beta-tilde is a little too small a variance
    abar = (1 - torch.linspace(4e-4, 0.08, 250, dtype=torch.float64)).cumprod(0)
    levels = [*zip(abar.sqrt().tolist(), (1 - abar).sqrt().tolist())][::-1]
    x = torch.randn(N, dtype=torch.float64)
    for (a, s), level_next in zip(levels, [*levels[1:], (1.0, 0.0)]):
        x0 = TWO.denoise(x / a, s / a)
        x = ddim_step(x0, (x - a * x0) / s, (a, s), level_next, eta, torch.randn_like(x))
    assert (standard_errors(x, TWO) < 5).all(), standard_errors(x, TWO)


# ---- the steps themselves

@pytest.mark.parametrize("S_churn", [4.0, 100.0])
def test_algorithm_2_line_by_line(S_churn):
    """Karras et al., Algorithm 2, written out once more in NumPy, with the same noise."""
    def D(x, t):
        return TWO.denoise(torch.as_tensor(x), float(t)).numpy()

    t, noise = karras_sigmas(20, 0.01, 30.0).numpy(), torch.randn(20, 7, dtype=torch.float64)
    S_tmin, S_tmax, S_noise = 0.1, 10.0, 1.02
    x = start = 30.0 * np.linspace(-2, 2, 7)
    for i in range(20):
        gamma = min(S_churn / 20, math.sqrt(2) - 1) if S_tmin <= t[i] <= S_tmax else 0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat ** 2 - t[i] ** 2) * S_noise * noise[i].numpy()
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_dash = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_dash) / 2
    got = heun(TWO.denoise, torch.as_tensor(start), t, generator=lambda step, shape: noise[step - 1], S_churn=S_churn,
               S_min=S_tmin, S_max=S_tmax, S_noise=S_noise)
    assert np.allclose(got, x, rtol=0, atol=1e-12)


def test_an_ancestral_step_is_the_posterior():
    # q(x' | x, x_0 = D) between any two levels: Ho et al. eq. 7 for alpha = 1
    x, sigma, sigma_next = torch.linspace(-9, 9, 7, dtype=torch.float64), 3.0, 1.2
    noise = torch.randn(7, dtype=torch.float64)
    got = euler_ancestral(TWO.denoise, x, [sigma, sigma_next], generator=lambda step, shape: noise)
    share = sigma_next ** 2 / sigma ** 2
    mean = share * x + (1 - share) * TWO.denoise(x, sigma)
    var = share * (sigma ** 2 - sigma_next ** 2)
    assert torch.allclose(got, mean + math.sqrt(var) * noise, rtol=0, atol=1e-12)
    # and with eta that share of its standard deviation, the rest of the way by Euler's method
    got = euler_ancestral(TWO.denoise, x, [sigma, sigma_next], generator=lambda step, shape: noise, eta=0.3)
    up = 0.3 * math.sqrt(var)
    mean = x + (math.sqrt(sigma_next ** 2 - up ** 2) - sigma) * (x - TWO.denoise(x, sigma)) / sigma
    assert torch.allclose(got, mean + up * noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_perfect_denoiser_of_one_image_gives_it_back(name):
    # with D constant the flow is a straight line, and every solver ends on it; one call a step, but for Heun
    for steps in (1, 2, 10):
        image, states, sigmas, called = torch.randn(3, 4, dtype=torch.float64), [], karras_sigmas(steps), []
        end = SOLVERS[name](lambda x, sigma: called.append(sigma) or image, HI * torch.randn_like(image), sigmas,
                            callback=lambda k, n, x: states.append((k, n)))
        assert torch.allclose(end, image, rtol=0, atol=1e-12)
        assert states == [(k, steps) for k in range(1, steps + 1)]
        assert len(called) == 2 * steps - 1 if name == "heun" else called == sigmas[:-1].tolist()
