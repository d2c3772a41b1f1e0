"""DDIM against diffusers, and against the affine map that Gaussian data makes of it."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers import SMALL
from libs import DDIM, DDPM, UsageError
from libs.samplers import image_generator


def small(kind=DDIM, **options):
    return kind(**{**SMALL, **options}).eval()


# ---- one step after the other against diffusers

@pytest.mark.parametrize("eta, clip", [(0.0, False), (0.0, True), (0.4, False), (1.0, True)])
@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_steps_agree_with_diffusers(diffusers, prediction, theirs, eta, clip):
    # 41 timesteps, every 5th: the only spacing both can have, 40, 35, ..., 0 and then the image
    model = small(timesteps=41, prediction=prediction)
    scheduler = diffusers.DDIMScheduler(41, 1e-4, 0.02, "linear", clip_sample=clip, set_alpha_to_one=True,
                                        prediction_type=theirs)
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.num_inference_steps = 41 // 5  # step() goes back 41 // this = 5
    timesteps = model.ddim_timesteps(9)
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


@pytest.mark.parametrize("schedule", ["linear", "quadratic", "cosine"])
@pytest.mark.parametrize("steps, spacing, eta", [(1, "uniform", 0.0), (2, "uniform", 0.5), (7, "quadratic", 0.0),
                                                 (50, "uniform", 0.0), (50, "quadratic", 1.0), (333, "uniform", 0.0)])
def test_any_spacing_agrees_with_diffusers(diffusers, schedule, steps, spacing, eta):
    # a choice of timesteps is a schedule of its own: give that to diffusers, to be walked one by one
    model = small(timesteps=1000, beta_schedule=schedule, prediction="v", img_shape=(1, 4, 4), attn_levels=())
    beta = {"linear": np.linspace(1e-4, 0.02, 1000),
            "quadratic": np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2}.get(schedule)
    if schedule == "cosine":
        f = np.cos((np.linspace(0, 1, 1001) + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    timesteps = model.ddim_timesteps(steps, spacing)
    scheduler = diffusers.DDIMScheduler(steps, clip_sample=False, set_alpha_to_one=True,
                                        prediction_type="v_prediction", beta_schedule="linear")
    scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - beta)[timesteps[::-1]])
    scheduler.num_inference_steps = steps

    label, noise = torch.tensor([1]), torch.randn(1, 1, 4, 4)
    x, seen = noise, []
    for k, i in enumerate(timesteps):
        with torch.no_grad():
            out = model.model(x, label, torch.tensor([i]))
        fresh = torch.randn(noise.shape, generator=torch.Generator().manual_seed(i))
        x = scheduler.step(out, steps - 1 - k, x, eta=eta, variance_noise=fresh).prev_sample.float()
        seen.append(x)
    ours = []
    model.sample(label, steps=steps, spacing=spacing, eta=eta, noise=noise,
                 callback=lambda step, total, x: ours.append(x),
                 # `step` is the number of the timestep, from the noisiest on
                 generator=lambda step, shape: torch.randn(shape, generator=torch.Generator().manual_seed(1000 - step)))
    assert len(ours) == len(seen) == steps
    # v keeps errors small: nothing is divided by sqrt(abar)
    for a, b in zip(ours, seen):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# ---- Gaussian data: every step is affine

class GaussianOracle(nn.Module):
    """The exact network for data N(mu, s^2) per pixel: E[eps | x_t] = slope x_t + const."""

    def __init__(self, abar, mu, s):
        super().__init__()
        self.slope = (1 - abar).sqrt() / (abar * s ** 2 + 1 - abar)
        self.const = -self.slope * abar.sqrt() * mu

    def forward(self, x, label, time):
        return (self.slope[time][:, None, None, None] * x + self.const[time][:, None, None, None]).float()


@pytest.mark.parametrize("steps", [1, 2, 5, 17, 50])
def test_sampling_gaussian_data_in_closed_form(steps):
    mu, s = 0.4, 0.3
    beta = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64) * 20
    abar = (1 - beta).cumprod(0)
    model = small(scale_betas=True)
    model.model = GaussianOracle(abar, mu, s)
    model.postprocess = lambda x: x

    chosen = sorted({round(i * 49 / max(steps - 1, 1)) for i in range(steps)} if steps > 1 else {49})
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
    got = model.p_sample_loop(torch.tensor([0, 1]), steps=steps, noise=noise)
    assert torch.allclose(got.double(), factor * noise.double() + shift, atol=2e-4)


def test_many_steps_meet_the_exact_flow():
    # the probability flow maps the quantiles of N(0, 1) to those of the data
    mu, s = 0.4, 0.3
    model = small(timesteps=1000)
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    model.model = GaussianOracle(abar, mu, s)
    model.postprocess = lambda x: x
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    # the start is q(x_T)'s own quantile
    last = abar[-1].item()
    start = np.sqrt(last) * mu + np.sqrt(last * s ** 2 + 1 - last) * noise
    error = [(model.p_sample_loop(labels, steps=n, noise=start.float()) - (mu + s * noise)).abs().max().item()
             for n in (50, 200, 1000)]
    assert error[0] > 2 * error[1] > 4 * error[2] and error[2] < 0.01


# ---- number of steps

@pytest.mark.parametrize("options", [{}, {"spacing": "quadratic"}, {"eta": 1.0}, {"eta": 0.3, "spacing": "quadratic"}])
def test_every_number_of_steps_runs(options):
    model = small(timesteps=12)
    labels = torch.tensor([0, 3])
    for steps in range(1, 13):
        count = []
        images = model.p_sample_loop(labels, steps=steps, callback=lambda k, n, x: count.append((k, n)), **options)
        assert count == [(k, steps) for k in range(1, steps + 1)]
        assert images.shape == (2, 1, 8, 8) and torch.isfinite(images).all()
        assert images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("T", [1, 2, 13, 50, 100, 1000])
def test_timesteps_are_distinct_and_even(T):
    model = small(timesteps=T)
    for steps in range(1, T + 1) if T <= 100 else (1, 2, 3, 50, 333, 999, 1000):
        timesteps = model.ddim_timesteps(steps)
        gaps = -np.diff(timesteps)
        assert len(timesteps) == steps and timesteps[0] == T - 1
        assert steps == 1 or timesteps[-1] == 0
        assert all(type(t) is int for t in timesteps)
        assert steps == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("T", [1, 2, 13, 50, 100, 1000])
def test_quadratic_timesteps(T):
    model = small(timesteps=T)
    for steps in range(1, T + 1) if T <= 100 else (1, 2, 3, 50, 333, 999, 1000):
        timesteps = model.ddim_timesteps(steps, "quadratic")
        assert len(set(timesteps)) == len(timesteps) == steps and timesteps == sorted(timesteps, reverse=True)
        assert timesteps[0] == T - 1 and (steps == 1 or timesteps[-1] == 0)
        exact = [(T - 1) * (i / max(steps - 1, 1)) ** 2 for i in reversed(range(steps))]
        # off only where squares are nearer than two timesteps can be
        assert all(abs(t - e) <= 0.5 or t == steps - 1 - k > e for k, (t, e) in enumerate(zip(timesteps, exact))
                   if steps > 1)
    if T == 1000:
        assert model.ddim_timesteps(11, "quadratic") == [999, 809, 639, 490, 360, 250, 160, 90, 40, 10, 0]


@pytest.mark.parametrize("steps", [0, -3, 51, 1000])
def test_refused_steps(steps):
    with pytest.raises(UsageError, match=f"steps: {steps} .* 1 and .* 50"):
        small().p_sample_loop(torch.tensor([0]), steps=steps)


@pytest.mark.parametrize("T, default", [(200, 50), (20, 20)])
def test_default_steps(T, default):
    count = []
    small(timesteps=T).p_sample_loop(torch.tensor([0]), callback=lambda k, n, x: count.append(n))
    assert count == [default] * default


def test_step_down_to_the_next_timestep_by_default():
    model = small()
    x, label = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    for i in (0, 1, 49):
        t = torch.full((2,), i)
        assert torch.equal(model.p_sample(x, label, t, i), model.p_sample(x, label, t, i, t_next=i - 1))


# ---- the relation to DDPM

@pytest.mark.parametrize("schedule, prediction, T", [("linear", "eps", 50), ("linear", "v", 1000),
                                                     ("quadratic", "x0", 1000), ("cosine", "v", 1000)])
def test_eta_1_over_all_timesteps_is_algorithm_2(schedule, prediction, T):
    """With the same noise, and the smaller of DDPM's two variances: beta-tilde of eq. 7, not beta."""
    ddpm = small(DDPM, timesteps=T, beta_schedule=schedule, prediction=prediction, img_shape=(1, 4, 4), attn_levels=())
    ddim, label = DDIM.from_ddpm(ddpm), torch.tensor([0, 3])
    for i in {0, 1, 2, 5, T // 4, T // 2, T - 2, T - 1}:
        x, t = torch.randn(2, 1, 4, 4), torch.full((2,), i)

        def step(model, value=None, **options):
            noise = (lambda step, shape: torch.full(shape, value)) if value is not None else \
                torch.Generator().manual_seed(i)
            return model.p_sample(x, label, t, i, generator=noise, **options)

        expected = step(ddpm)
        assert torch.allclose(step(ddim, eta=1.0), expected, rtol=0, atol=1e-5 * max(1, expected.abs().max())), i
        std = (step(ddim, 1e3, eta=1.0) - step(ddim, 0.0, eta=1.0)) / 1e3
        assert torch.allclose(std ** 2, ddpm.posterior_variance[i], rtol=1e-3, atol=1e-9)
        if i in (1, 2, 5):  # where the two differ most
            assert ((std ** 2 / ddpm.betas[i] - 1).abs() > 0.1).all()

    # and so the whole way, up to rounding that a network of random weights carries on
    ddpm.postprocess = ddim.postprocess = lambda x: x
    a, b = (model.sample(label, sampler, T, generator=image_generator(0, range(2)), **options)
            for model, sampler, options in ((ddpm, "ddpm", {}), (ddim, "ddim", {"eta": 1.0})))
    assert torch.allclose(a, b, rtol=0, atol=1e-3 * a.abs().max())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_state_keeps_its_variance(eta):
    # data N(0, 1): the exact x0 is sqrt(abar) x, and eq. 12 keeps the variance of x_t at 1 whatever eta is
    model = small(img_shape=(1, 32, 32))
    model.predict = lambda x, label, t, scale: (model._signal_noise(x, t)[1] * x, model._signal_noise(x, t)[0] * x)
    x, stds = torch.randn(16, 1, 32, 32), []
    for i in reversed(range(1, 50)):
        x = model.p_sample(x, torch.zeros(16, dtype=torch.long), torch.full((16,), i), i, eta=eta)
        stds.append(x.std().item())
    assert all(abs(s - 1) < 0.05 for s in stds), stds
    assert eta > 0 or np.allclose(stds, stds[0], rtol=0.01)


def test_eta_1_forgets_and_eta_0_does_not():
    model, labels = small(timesteps=200, scale_betas=True), torch.tensor([0, 1])
    noise = torch.randn(2, 1, 8, 8)

    def draw(seed, eta):
        return model.p_sample_loop(labels, steps=20, noise=noise, eta=eta,
                                   generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1, 0.0), draw(2, 0.0)) and torch.equal(draw(1, 1.0), draw(1, 1.0))
    assert not torch.equal(draw(1, 1.0), draw(2, 1.0)) and not torch.equal(draw(1, 0.2), draw(1, 1.0))

def test_deterministic_given_the_noise():
    model, labels, noise = small(), torch.tensor([0, 1]), torch.randn(2, 1, 8, 8)
    first, second = (model.p_sample_loop(labels, steps=5, noise=noise) for _ in range(2))
    assert torch.equal(first, second)


def test_labels_and_guidance():
    model, noise = small(label_dropout=0.1), torch.randn(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    images = {(k, w): model.p_sample_loop(labels + k, steps=4, noise=noise, guidance_scale=w)
              for k in (0, 2) for w in (0.0, 1.0, 4.0)}
    assert not torch.equal(images[0, 1.0], images[2, 1.0]) and not torch.equal(images[0, 1.0], images[0, 4.0])
    assert torch.allclose(images[0, 0.0], images[2, 0.0], atol=1e-5)
    with pytest.raises(UsageError, match="guidance_scale"):
        small().p_sample_loop(labels, guidance_scale=2.0)
    with pytest.raises(UsageError, match="label 4"):
        model.p_sample_loop(torch.tensor([4]))


def test_from_ddpm_shares_the_weights():
    ddpm = small(DDPM)
    ddim = DDIM.from_ddpm(ddpm)
    assert type(ddim) is DDIM and type(ddpm) is DDPM and ddim.model is ddpm.model
    for mine, theirs in zip((*ddim.parameters(), *ddim.buffers()), (*ddpm.parameters(), *ddpm.buffers())):
        assert mine.data_ptr() == theirs.data_ptr()
    labels, noise = torch.tensor([0, 1]), torch.randn(2, 1, 8, 8)
    before = ddim.p_sample_loop(labels, steps=3, noise=noise)
    with torch.no_grad():
        ddpm.model.final_conv[-1].bias += 0.5
    assert not torch.equal(ddim.p_sample_loop(labels, steps=3, noise=noise), before)


def test_loads_what_ddpm_saved(tmp_path):
    ddpm = small(DDPM)
    torch.save(ddpm.state_dict(), tmp_path / "ddpm.pth")
    torch.manual_seed(1)
    ddim = small()
    labels, noise = torch.tensor([0, 1]), torch.randn(2, 1, 8, 8)
    expected = ddpm.sample(labels, "ddim", steps=5, noise=noise)
    assert not torch.equal(ddim.p_sample_loop(labels, steps=5, noise=noise), expected)
    done = ddim.load_state_dict(torch.load(tmp_path / "ddpm.pth", weights_only=True))
    assert not done.missing_keys and not done.unexpected_keys
    assert torch.equal(ddim.p_sample_loop(labels, steps=5, noise=noise), expected)


def test_same_loss_as_ddpm():
    ddpm = small(DDPM)
    ddim = DDIM.from_ddpm(ddpm)
    x, noise, t, label = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4), torch.arange(4)
    assert torch.equal(ddim.compute_loss(x, label, t, noise), ddpm.compute_loss(x, label, t, noise))


def test_both_samplers_mean_the_same_in_both_classes():
    # "ddpm" is Algorithm 2 with its noise, whichever class holds the weights
    ddpm = small(DDPM)
    ddim = DDIM.from_ddpm(ddpm)
    labels, noise = torch.tensor([0, 1]), torch.randn(2, 1, 8, 8)
    for sampler in ("ddim", "ddpm"):
        a, b = (m.sample(labels, sampler, noise=noise, generator=torch.Generator().manual_seed(1))
                for m in (ddpm, ddim))
        assert torch.equal(a, b), sampler
