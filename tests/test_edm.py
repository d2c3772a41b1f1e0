"""EDM against Table 1 and Algorithm 1 of Karras et al. 2022, and against the exact flow of Gaussian data."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import nn

from libs import EDM, UsageError
from libs.samplers import heun, karras_sigmas

SMALL = dict(img_shape=(1, 8, 8), timesteps=100, dim=8, context_dim=8, num_classes=4, dim_mults=(1, 2),
             attn_levels=(0,))
LEVELS = (0.002, 0.05, 0.5, 1.0, 7.0, 80.0)


def small(**options):
    return EDM(**{**SMALL, **options}).eval()


# ---- preconditioning

@pytest.mark.parametrize("sigma_data", [0.3, 0.5, 1.7])
def test_preconditioning_is_table_1(sigma_data):
    sigma = np.array(LEVELS)
    c_skip, c_out, c_in, c_noise = (c.numpy() for c in small(sigma_data=sigma_data).preconditioning(
        torch.tensor(LEVELS)))
    assert np.allclose(c_skip, sigma_data ** 2 / (sigma ** 2 + sigma_data ** 2), rtol=1e-5)
    assert np.allclose(c_out, sigma * sigma_data / np.sqrt(sigma_data ** 2 + sigma ** 2), rtol=1e-5)
    assert np.allclose(c_in, 1 / np.sqrt(sigma ** 2 + sigma_data ** 2), rtol=1e-5)
    assert np.allclose(c_noise, np.log(sigma) / 4, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sigma", LEVELS)
def test_input_and_target_have_unit_variance(sigma):
    # App. B.6: what the coefficients were made for, on data that has this standard deviation
    s, n = 0.7, 200_000
    c_skip, c_out, c_in, _ = (c.item() for c in small(sigma_data=s).preconditioning(torch.tensor(sigma)))
    data = torch.randn(n, dtype=torch.float64) * s
    x = data + torch.randn(n, dtype=torch.float64) * sigma
    tolerance = 4 * math.sqrt(2 / n)
    assert abs((c_in * x).var() - 1) < tolerance
    assert abs(((data - c_skip * x) / c_out).var() - 1) < tolerance
    # App. B.6: of all c_skip it is the one that asks the least of the network
    for other in (0.9 * c_skip, 1.1 * c_skip):
        assert (1 - other) ** 2 * s ** 2 + other ** 2 * sigma ** 2 > c_out ** 2


def test_denoise_is_eq_7():
    model = small(sigma_data=0.4)
    x, label, sigma = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]), np.array(LEVELS)
    var = sigma ** 2 + 0.4 ** 2
    columns = [torch.tensor(c, dtype=torch.float32)[:, None, None, None]
               for c in (0.4 ** 2 / var, sigma * 0.4 / var ** 0.5, var ** -0.5)]
    with torch.no_grad():
        F = model.model(columns[2] * x, label, torch.tensor(250 * np.log(sigma), dtype=torch.float32))
        D = model.denoise(x, torch.tensor(LEVELS), label)
    assert torch.allclose(D, columns[0] * x + columns[1] * F, atol=1e-4)


def test_denoise_takes_one_sigma_for_all():
    model, x, label = small(), torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert torch.equal(model.denoise(x, 0.7, label), model.denoise(x, torch.full((3,), 0.7), label))


def test_without_noise_the_image_stays():
    model, x, label = small(), torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.allclose(model.denoise(x, 1e-6, label), x, atol=1e-5)
        assert not torch.allclose(model.denoise(x, 1.0, label), x, atol=1e-2)


def test_sigma_data():
    model = small()
    assert model.sigma_data == 0.5
    model.set_sigma_data(0.8)
    assert model.sigma_data == pytest.approx(0.8) and "sigma_data" in model.state_dict()
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
    normal = NormalDist(-1.2, 1.2)
    expected = [math.exp(normal.inv_cdf((i + 0.5) / timesteps)) for i in range(timesteps)]
    assert sigmas.dtype == torch.float32
    assert np.allclose(sigmas, expected, rtol=1e-5)


def test_training_levels_have_the_papers_moments():
    log = small(timesteps=1000).sigmas.double().log()
    assert log.mean().item() == pytest.approx(-1.2, abs=1e-4)
    assert log.std().item() == pytest.approx(1.2, rel=0.005)  # slices cut the tails a little
    log = small(timesteps=1000, P_mean=-0.5, P_std=0.8).sigmas.double().log()
    assert log.mean().item() == pytest.approx(-0.5, abs=1e-4) and log.std().item() == pytest.approx(0.8, rel=0.005)
    assert (log.diff() > 0).all()  # t = 0 is the least noise


def test_loss_is_eq_2():
    model = small(sigma_data=0.6)
    x, noise = torch.randn(5, 1, 8, 8) * 0.6, torch.randn(5, 1, 8, 8)
    t, label = torch.tensor([0, 10, 50, 99, 99]), torch.tensor([0, 1, 2, 3, 0])
    normal, total = NormalDist(-1.2, 1.2), 0
    for i in range(5):
        sigma = math.exp(normal.inv_cdf((t[i].item() + 0.5) / 100))
        var = sigma ** 2 + 0.36
        y = x[i:i + 1] + sigma * noise[i:i + 1]
        with torch.no_grad():
            F = model.model(y / math.sqrt(var), label[i:i + 1], torch.tensor([250 * math.log(sigma)]))
        # the second form of eq. 8: lambda c_out^2 (F - target)^2 with lambda c_out^2 = 1
        target = (x[i:i + 1] - 0.36 / var * y) / (sigma * 0.6 / math.sqrt(var))
        total += (F - target).square().mean().item() / 5
    loss = model.compute_loss(x, label, t, noise)
    assert loss.shape == () and loss.item() == pytest.approx(total, rel=1e-4)


def test_loss_starts_at_one_at_every_level():
    # the target has unit variance and a zero network says nothing of it
    s = 0.6
    model = small(sigma_data=s, zero_init=True, img_shape=(1, 64, 64), dim_mults=(1,), attn_levels=())
    t = torch.arange(0, 100, 20)
    losses = model(torch.randn(len(t), 1, 64, 64) * s, torch.zeros_like(t), t)
    assert ((losses - 1).abs() < 4.5 * math.sqrt(2 / 64 ** 2)).all()


class GaussianOracle(nn.Module):
    """The network whose D is exact for data N(mu[label], s^2): it undoes the preconditioning."""

    def __init__(self, mu, s, sigma_data):
        super().__init__()
        self.mu, self.s, self.sigma_data, self.calls = torch.as_tensor(mu, dtype=torch.float64), s, sigma_data, []

    def forward(self, x, label, time):
        self.calls.append(time[0].item())
        sigma = (time.double() / 250).exp()[:, None, None, None]
        mu, var = self.mu[label][:, None, None, None], sigma ** 2 + self.sigma_data ** 2
        y = x.double() * var.sqrt()
        D = (self.s ** 2 * y + sigma ** 2 * mu) / (self.s ** 2 + sigma ** 2)
        return ((D - self.sigma_data ** 2 / var * y) / (sigma * self.sigma_data / var.sqrt())).float()


def test_loss_at_the_optimum():
    # no denoiser does better than E (D - x0)^2 = s^2 sigma^2 / (s^2 + sigma^2)
    s, sigma_data = 0.3, 0.5
    model = small(sigma_data=sigma_data, img_shape=(1, 64, 64))
    model.model = GaussianOracle([0.4], s, sigma_data)
    t = torch.arange(0, 100, 9)
    sigma = np.exp([NormalDist(-1.2, 1.2).inv_cdf((i + 0.5) / 100) for i in t.tolist()])
    weight = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2
    expected = weight * s ** 2 * sigma ** 2 / (s ** 2 + sigma ** 2)
    losses = model(0.4 + s * torch.randn(len(t), 1, 64, 64), torch.zeros_like(t), t).numpy()
    assert (abs(losses / expected - 1) < 4.5 * math.sqrt(2 / 64 ** 2)).all()


# ---- the solver

def test_karras_sigmas():
    sigmas = karras_sigmas(18)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (19,)
    assert sigmas[0].item() == pytest.approx(80.0, rel=1e-12) and sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(0.002, rel=1e-9)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert np.allclose(sigmas[:-1], expected, rtol=1e-12)
    assert (sigmas.diff() < 0).all()
    assert karras_sigmas(1).tolist() == pytest.approx([80.0, 0.0])
    assert karras_sigmas(3, 1.0, 9.0, rho=1).tolist() == pytest.approx([9.0, 5.0, 1.0, 0.0])


MU, S = 0.4, 0.5


def exact_denoiser(x, sigma):
    """For data N(MU, S^2)."""
    return (S ** 2 * x + sigma ** 2 * MU) / (S ** 2 + sigma ** 2)


def test_heun_is_of_second_order():
    lo, hi = 0.002, 80.0
    x = MU + math.sqrt(S ** 2 + hi ** 2) * torch.randn(50, dtype=torch.float64)
    exact = MU + (x - MU) * math.sqrt((S ** 2 + lo ** 2) / (S ** 2 + hi ** 2))
    steps, errors = (64, 128, 256, 512), []
    for n in steps:
        end = heun(exact_denoiser, x, karras_sigmas(n + 1, lo, hi)[:-1])  # stop at sigma_min
        assert end.dtype == torch.float64
        errors.append((end - exact).abs().max().item())
    slopes = -np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert (1.8 < slopes).all() and (slopes < 2.2).all(), slopes
    assert errors[-1] < 1e-4


def test_order_test_notices_euler():
    # with the corrector fed the slope it had, Heun is Euler and of first order
    x = MU + math.sqrt(S ** 2 + 6400) * torch.randn(50, dtype=torch.float64)
    exact = MU + (x - MU) * math.sqrt((S ** 2 + 4e-6) / (S ** 2 + 6400))
    errors = []
    for n in (256, 512):
        sigmas, y = karras_sigmas(n + 1)[:-1].tolist(), x
        for now, then in zip(sigmas[:-1], sigmas[1:]):
            y = y + (then - now) * (y - exact_denoiser(y, now)) / now
        errors.append((y - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) < 1.3


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
def test_heun_calls_and_its_end(steps):
    sigmas, said, seen = karras_sigmas(steps), [], []

    def denoise(x, sigma):
        assert type(sigma) is float
        said.append((sigma, exact_denoiser(x, sigma)))
        return said[-1][1]

    x = 80 * torch.randn(10, dtype=torch.float64)
    end = heun(denoise, x, sigmas, callback=lambda k, n, x: seen.append((k, n)))
    assert len(said) == 2 * steps - 1
    assert seen == [(k, steps) for k in range(1, steps + 1)]
    # the last step is Euler's down to 0: it lands on what the denoiser said
    assert said[-1][0] == pytest.approx(sigmas[-2].item())
    assert torch.allclose(end, said[-1][1], atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4, 18, 100])
def test_sampling_gaussian_data(steps):
    # labels, times, scales and solver together, against Algorithm 1 in float64
    mu, s, sigma_data = (0.4, -0.2), 0.3, 0.5
    model = small(sigma_data=sigma_data)
    model.model = GaussianOracle(mu, s, sigma_data)
    model.postprocess = lambda x: x
    noise, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    got = model.p_sample_loop(labels, steps=steps, noise=noise)
    assert len(model.model.calls) == 2 * steps - 1

    sigmas = [(80 ** (1 / 7) + i / max(steps - 1, 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
              for i in range(steps)] + [0.0]
    m = np.array(mu)[labels.numpy()][:, None, None, None]
    x = noise.double().numpy() * sigmas[0]
    for now, then in zip(sigmas[:-1], sigmas[1:]):
        def slope(y, sigma):
            return (y - (s ** 2 * y + sigma ** 2 * m) / (s ** 2 + sigma ** 2)) / sigma
        d = slope(x, now)
        y = x + (then - now) * d
        x = x + (then - now) * (d + slope(y, then)) / 2 if then else y
    assert np.allclose(got, x, atol=1e-3)
    if steps == 100:  # and that is close to the data
        assert np.allclose(got, m + s * noise.numpy(), atol=0.01)


# ---- the face it shares with DDPM

def test_images_have_their_shape_and_range():
    model, labels = small(img_shape=(3, 8, 4)), torch.tensor([0, 1, 3])
    images = model.p_sample_loop(labels, steps=3)
    assert images.shape == (3, 3, 8, 4) and not images.requires_grad
    assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    noise = torch.randn(3, 3, 8, 4)
    assert torch.equal(model.p_sample_loop(labels, steps=3, noise=noise),
                       model.p_sample_loop(labels, steps=3, noise=noise))


def test_default_is_18_steps():
    count = []
    small().p_sample_loop(torch.tensor([0]), callback=lambda k, n, x: count.append(n))
    assert count == [18] * 18


def test_guidance_is_linear_in_the_denoised_image():
    model = small(label_dropout=0.1)
    x, label, null = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.tensor([4, 4, 4])
    with torch.no_grad():
        cond, uncond = model.denoise(x, 0.7, label), model.denoise(x, 0.7, null)
        assert torch.allclose(model.denoise(x, 0.7, label, 3.0), uncond + 3 * (cond - uncond), atol=1e-5)


def test_refusals():
    model, labels = small(), torch.tensor([0])
    for steps in (0, -1):
        with pytest.raises(UsageError, match=f"steps: {steps}"):
            model.p_sample_loop(labels, steps=steps)
    with pytest.raises(UsageError, match="'ddim'.*heun"):
        model.sample(labels, "ddim")
    with pytest.raises(UsageError, match="guidance_scale"):
        model.p_sample_loop(labels, guidance_scale=2.0)
    with pytest.raises(UsageError, match="label 4"):
        model.p_sample_loop(torch.tensor([4]))
