"""Rectified flow against closed forms: the velocity, the loss and the flow of Gaussian data, and of a mixture."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from exact import TWO
from helpers import SMALL
from libs import EDM, Flow, UsageError

MU, S = 0.4, 0.3  # data N(MU, S^2) in every pixel


def small(network=None, **options):
    model = Flow(**{**SMALL, "timesteps": 100, **options}).eval()
    if network is not None:
        model.model = network
    return model


def gaussian_velocity(x_t, t):
    """E[noise - x_0 | x_t] for data N(MU, S^2): a regression of one Gaussian on another."""
    variance = (1 - t) ** 2 * S ** 2 + t ** 2
    return (t - (1 - t) * S ** 2) / variance * (x_t - (1 - t) * MU) - MU


class Exact(nn.Module):
    """A network that knows the velocity: function(x_t, t) -> dx/dt, t shaped to multiply x_t."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity
        self.register_buffer("like", torch.empty(0, dtype=torch.float64))  # the dtype that samples start in

    def forward(self, x, label, time):
        return self.velocity(x, (time / 1000)[:, None, None, None])


# ---- training

def test_loss_is_that_of_the_straight_line():
    x, noise, label = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4)
    t, model, seen = torch.tensor([0.0, 12.5, 50.0, 99.9]), small(), []
    network = model.model.forward
    model.model.forward = lambda *args: seen.append(args) or network(*args)
    loss, each = model.compute_loss(x, label, t, noise, return_each=True)
    for i, u in enumerate([0.0, 0.125, 0.5, 0.999]):
        assert torch.allclose(seen[0][0][i], (1 - u) * x[i] + u * noise[i], atol=1e-6)
        v = network(seen[0][0][i:i + 1], label[i:i + 1], torch.tensor([1000 * u]))[0]
        assert each[i].item() == pytest.approx((v - (noise[i] - x[i])).square().mean().item(), rel=1e-4)
    assert seen[0][2].tolist() == pytest.approx([0, 125, 500, 999]) and loss == each.mean()
    # long t stand for the middle between them and the next, as for the other models
    assert torch.equal(model.compute_loss(x, label, torch.tensor([0, 12, 50, 99]), noise),
                       model.compute_loss(x, label, torch.tensor([0.5, 12.5, 50.5, 99.5]), noise))


def test_loss_of_the_exact_velocity():
    """No predictor does better than the conditional variance of noise - x_0, which is S^2 / ((1 - t)^2 S^2 + t^2)."""
    model, generator = small(Exact(gaussian_velocity)), torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(4000, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for t in (0.02, 0.3, 0.5, 0.9):
        expected = S ** 2 / ((1 - t) ** 2 * S ** 2 + t ** 2)
        loss = model.compute_loss(MU + S * x_0, torch.zeros(4000, dtype=torch.long), torch.full((4000,), 100 * t), noise)
        assert loss.item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("P_mean, P_std", [(0.0, 1.0), (-0.4, 1.2)])
def test_times_are_logit_normal(P_mean, P_std):
    t = small(P_mean=P_mean, P_std=P_std).draw_times(20_000, torch.Generator().manual_seed(3)).double() / 100
    normal = ((t / (1 - t)).log().sort().values - P_mean) / P_std
    expected = torch.tensor([NormalDist().inv_cdf((k + 0.5) / 20_000) for k in range(20_000)])
    assert (normal - expected).abs()[100:-100].max() < 0.08
    far = small(P_mean=P_mean + 100, sigma_max=1e6, P_std=40).draw_times(1000)
    assert far.dtype == torch.float32 and far.max() < 100  # in float32 too; all arguments count to `timesteps` alone


# ---- the denoiser

def test_denoise_of_gaussian_data():
    """In EDM's variables the velocity of Gaussian data is the denoiser (S^2 x + sigma^2 MU) / (S^2 + sigma^2)."""
    model, x = small(Exact(gaussian_velocity)), torch.randn(5, 1, 8, 8, dtype=torch.float64)
    for sigma in (0.01, 0.3, 1.0, 20.0):
        D = model.denoise(sigma * x, sigma, torch.zeros(5, dtype=torch.long))
        assert torch.allclose(D, (S ** 2 * sigma * x + sigma ** 2 * MU) / (S ** 2 + sigma ** 2), atol=1e-9)


def test_denoise_is_edms():
    """The denoiser of an EDM, written as a velocity, is denoised alike by a Flow: v = (x_t - D) / t."""
    edm = EDM(**SMALL).eval()
    x, label, sigma = torch.randn(4, 1, 8, 8), torch.arange(4), torch.tensor([0.05, 0.5, 2.0, 30.0])
    flow = small(Exact(lambda x_t, t: (x_t - edm.denoise(x_t / (1 - t), (t / (1 - t)).flatten(), label)) / t))
    with torch.no_grad():
        assert torch.allclose(flow.denoise(x * sigma[:, None, None, None], sigma, label),
                              edm.denoise(x * sigma[:, None, None, None], sigma, label), atol=1e-4)


def test_guidance_is_of_the_velocity():
    model = small(label_dropout=0.1)
    x, label, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 3]), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        plain, null = (model.model(x, c, 1000 * t) for c in (label, torch.full((2,), 4)))
        assert torch.allclose(model.velocity(x, label, t, 2.5), null + 2.5 * (plain - null), atol=1e-5)


# ---- the flow

@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_is_exact_on_straight_paths(steps):
    """Where each noise is matched to one image, the path is a line, and Euler's method ends at the image."""
    x_0 = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    noise = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    model = small(Exact(lambda x_t, t: noise - x_0))
    start = x_0 / model.sigma_range[1] + noise  # where the pair's line is at the solver's first level
    x = model.solve(start, torch.zeros(4, dtype=torch.long), "euler", steps)
    assert torch.allclose(x, x_0, atol=1e-9)


def test_euler_in_sigma_is_euler_in_t():
    model, x = small(Exact(gaussian_velocity)), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    states = []
    model.solve(x, torch.zeros(3, dtype=torch.long), "euler", 12, callback=lambda k, n, x: states.append(x))
    low, high, rho = model.sigma_range
    sigmas = [(high ** (1 / rho) + i / 11 * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(12)] + [0.0]
    times = [sigma / (1 + sigma) for sigma in sigmas]
    x_t = times[0] * x
    for t, t_next, sigma, state in zip(times, times[1:], sigmas[1:], states):
        x_t = x_t + (t_next - t) * gaussian_velocity(x_t, t)
        assert torch.allclose(state * (1 + sigma ** 2) ** 0.5, x_t / (1 - t_next), atol=1e-9)


def test_the_flow_of_gaussian_data():
    """x_t = (1 - t) MU + sqrt((1 - t)^2 S^2 + t^2) z with the same z at all times."""
    model, noise = small(Exact(gaussian_velocity), P_std=3.0), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    high = model.sigma_range[1]
    z = (high * noise - MU) / math.sqrt(S ** 2 + high ** 2)
    errors = [(model.solve(noise, torch.zeros(4, dtype=torch.long), "heun", steps) - (MU + S * z)).abs().max().item()
              for steps in (40, 80, 160)]
    assert errors[2] < 1e-3 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3  # second order


def test_the_flow_of_a_mixture():
    """The flow of one dimension takes each quantile of the noisy data to that of the data."""
    model = small(Exact(lambda x_t, t: (x_t - TWO.denoise(x_t / (1 - t), t / (1 - t))) / t), P_std=3.0)
    high, noise = model.sigma_range[1], torch.randn(2, 1, 8, 8, dtype=torch.float64)
    exact = TWO.quantile(TWO.cdf(high * noise, high))
    x = model.solve(noise, torch.zeros(2, dtype=torch.long), "dpmpp_2m", 400)
    assert torch.allclose(x, exact, atol=2e-3)


# ---- as the other models

def test_sampling():
    model, labels = small(img_shape=(3, 8, 4), label_dropout=0.1), torch.tensor([0, 1, 3])
    images = model.sample(labels, "heun", 3, guidance_scale=2.0, clip=True)
    assert images.shape == (3, 3, 8, 4) and not images.requires_grad and images.min() >= 0 and images.max() <= 1
    with pytest.raises(UsageError, match="label 4"):
        model.sample(torch.tensor([4]))


def test_levels_that_training_never_draws_are_refused():
    assert small().sigma_range == (pytest.approx(math.exp(-3.5)), pytest.approx(math.exp(3.5)), 7.0)
    assert small(P_mean=1.0, sigma_max=8).sigma_range[:2] == (pytest.approx(math.exp(-2.5)), 8)
    with pytest.raises(UsageError, match="model.sigma_min is 40.0 .* around e"):
        small(sigma_min=40.0)
