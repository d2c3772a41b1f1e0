"""DDPM's tables, forward process and loss, against the papers' formulas and diffusers."""

import math

import numpy as np
import pytest
import torch

from helpers import SMALL, Recorder, reference
from libs import DDPM, UsageError
from libs.ddpm import SCHEDULES


def small(**options):
    return DDPM(**{**SMALL, **options}).eval()


# ---- schedules and tables

@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("quadratic", "scaled_linear"),
                                          ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_tables_agree_with_diffusers(diffusers, ours, theirs, timesteps):
    scheduler = reference(diffusers, theirs, timesteps)
    model = small(timesteps=timesteps, beta_schedule=ours)
    abar = scheduler.alphas_cumprod
    for table, expected in ((model.betas, scheduler.betas), (model.alphas_cumprod, abar),
                            (model.sqrt_alphas_cumprod, abar.sqrt()),
                            (model.sqrt_one_minus_alphas_cumprod, (1 - abar).sqrt())):
        assert table.dtype == torch.float32 and table.shape == (timesteps,)
        assert torch.allclose(table.double(), expected.double(), rtol=0, atol=1e-6)
    assert torch.allclose(model.sqrt_recip_alphas.double(), (1 - scheduler.betas.double()) ** -0.5, rtol=1e-4)
    variance = torch.stack([scheduler._get_variance(t) for t in range(timesteps)])
    assert torch.allclose(model.posterior_variance.double(), variance.double(), rtol=0, atol=1e-6)
    assert model.posterior_variance[0] == 0


def test_schedules_from_the_papers():
    T = 20
    linear = SCHEDULES["linear"](T).numpy()
    assert np.allclose(linear, [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)], rtol=1e-12)
    quadratic = SCHEDULES["quadratic"](T).numpy()
    low, high = 0.00085 ** 0.5, 0.012 ** 0.5
    assert np.allclose(quadratic, [(low + (high - low) * i / (T - 1)) ** 2 for i in range(T)], rtol=1e-12)
    # Nichol & Dhariwal: abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi / 2)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    cosine = SCHEDULES["cosine"](T).numpy()
    assert np.allclose((1 - cosine).cumprod()[:-1], np.array(f[1:-1]) / f[0], rtol=1e-9)
    assert cosine[-1] == 0.999  # f(T) = 0 would make it 1
    assert all(SCHEDULES[name](T).dtype == torch.float64 for name in SCHEDULES)


def test_default_schedule_depends_on_the_space():
    assert torch.allclose(small().betas, torch.linspace(1e-4, 0.02, 50))
    latent = small(img_shape=(3, 32, 32), use_vae=True)
    assert torch.allclose(latent.betas.sqrt(), torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 50))


def test_scaled_betas():
    # 20 times the betas in a 20th of the steps: nearly the same total noise
    model = small(scale_betas=True)
    assert torch.allclose(model.betas, 20 * torch.linspace(1e-4, 0.02, 50))
    full = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    assert 0.1 < model.alphas_cumprod[-1].item() / full < 1
    assert small().alphas_cumprod[-1] > 0.5
    same = small(timesteps=1000, scale_betas=True)
    assert torch.allclose(same.betas, torch.linspace(1e-4, 0.02, 1000))


def test_betas_stay_below_one():
    model = small(timesteps=10, scale_betas=True)
    expected = np.minimum(100 * np.linspace(1e-4, 0.02, 10), 0.999)
    assert np.allclose(model.betas, expected, atol=1e-7) and (expected == 0.999).sum() == 5
    for name, table in model.named_buffers():
        assert torch.isfinite(table).all(), name


# ---- forward process

@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("quadratic", "scaled_linear")])
def test_q_sample_agrees_with_diffusers(diffusers, ours, theirs):
    scheduler = reference(diffusers, theirs, 1000)
    model = small(timesteps=1000, beta_schedule=ours)
    t = torch.arange(1000)
    x, noise = torch.rand(1000, 1, 4, 4) * 2 - 1, torch.randn(1000, 1, 4, 4)
    assert torch.allclose(model.q_sample(x, t, noise), scheduler.add_noise(x, noise, t), rtol=0, atol=2e-6)


def test_q_sample_mean_and_variance_at_every_t():
    # one x_0 many times; the noise is the method's own
    model = small()
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 50))
    value, n = -0.7, 64 * 64
    x_t = model.q_sample(torch.full((50, 1, 64, 64), value), torch.arange(50)).double().flatten(1).numpy()
    mean, var = x_t.mean(1), x_t.var(1)
    assert (abs(mean - np.sqrt(abar) * value) < 4.5 * np.sqrt((1 - abar) / n)).all()
    assert (abs(var / (1 - abar) - 1) < 4.5 * np.sqrt(2 / n)).all()


def test_q_sample_t_zero_is_one_step():
    model = small()
    x, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    expected = math.sqrt(1 - 1e-4) * x + 0.01 * noise
    assert torch.allclose(model.q_sample(x, torch.zeros(3, dtype=torch.long), noise), expected, atol=1e-6)


def test_q_sample_takes_each_image_at_its_own_t():
    model = small()
    x, noise, t = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([49, 0, 7])
    together = model.q_sample(x, t, noise)
    for i in range(3):
        assert torch.equal(model.q_sample(x[i:i + 1], t[i:i + 1], noise[i:i + 1]), together[i:i + 1])


# ---- eps, v and x0

@pytest.fixture(params=["linear", "quadratic", "cosine"])
def at_every_t(request):
    """A model in float64 and x_0, eps, x_t, v at all t, with coefficients worked out here."""
    model = small(beta_schedule=request.param).double()
    abar = (1 - SCHEDULES[request.param](50)).cumprod(0)[:, None, None, None]
    x0, eps = torch.randn(2, 50, 1, 8, 8, dtype=torch.float64)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    return model, torch.arange(50), x0, eps, x_t, v, abar


def test_predictions_invert_each_other(at_every_t):
    model, t, x0, eps, x_t, v, abar = at_every_t
    # the tables are fp32: one part in 10^7, more where it is divided by a small factor
    near_x0 = 1e-6 / abar.sqrt().clamp(max=1)
    near_eps = 1e-6 / (1 - abar).sqrt()
    assert torch.allclose(model.q_sample(x0, t, eps), x_t, atol=1e-6)
    assert torch.allclose(model.predict_v(x0, t, eps), v, atol=1e-6)
    assert torch.allclose(model.predict_start_from_v(x_t, t, v), x0, atol=1e-6)
    assert torch.allclose(model.predict_noise_from_v(x_t, t, v), eps, atol=1e-6)
    assert ((model.predict_start_from_noise(x_t, t, eps) - x0).abs() < near_x0).all()
    assert ((model.predict_noise_from_start(x_t, t, x0) - eps).abs() < near_eps).all()
    # there and back through the model's own tables is exact
    x_t = model.q_sample(x0, t, eps)
    assert torch.allclose(model.predict_start_from_noise(x_t, t, eps), x0, atol=1e-10)
    assert torch.allclose(model.predict_noise_from_start(x_t, t, x0), eps, atol=1e-10)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_predict_returns_eps_and_x0(prediction):
    model = small(prediction=prediction)
    abar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 50)))[:, None, None, None]
    x0, eps = torch.randn(2, 50, 1, 8, 8, dtype=torch.float64)
    truth = {"eps": eps, "x0": x0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[prediction]
    model.model = Recorder(truth)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    got_eps, got_x0 = model.predict(x_t.float(), torch.zeros(50, dtype=torch.long), torch.arange(50))
    assert got_eps.dtype == got_x0.dtype == torch.float32
    assert torch.allclose(got_x0.double(), x0, atol=1e-5)
    # from x0 alone, fp32 knows eps at t = 0 to 1e-7 / 0.01
    assert torch.allclose(got_eps.double(), eps, atol=1e-4)


def test_unknown_prediction():
    with pytest.raises(UsageError, match="'score'.*eps, v, x0"):
        small(prediction="score")


# ---- training

@pytest.mark.parametrize("gamma", [None, 0.5, 5.0])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_loss_is_algorithm_1(prediction, gamma):
    model = small(prediction=prediction, min_snr_gamma=gamma)
    t = torch.tensor([0, 3, 20, 49, 49])
    label = torch.tensor([0, 1, 2, 3, 0])
    x0, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)

    abar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 50))[t.numpy()])
    a, s = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
    with torch.no_grad():
        out = model.model((a * x0 + s * noise).float(), label, t)
    target = {"eps": noise, "v": a * noise - s * x0, "x0": x0}[prediction]
    # Hang et al. 2023, Section 3.4
    snr = (abar / (1 - abar)).numpy()
    weight = 1.0
    if gamma is not None:
        weight = {"x0": np.minimum(snr, gamma), "eps": np.minimum(snr, gamma) / snr,
                  "v": np.minimum(snr, gamma) / (snr + 1)}[prediction]
    expected = np.mean(weight * ((out - target) ** 2).mean((1, 2, 3)).numpy())

    loss = model.compute_loss(x0, label, t, noise)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=2e-5)


def test_min_snr_weights_agree_between_predictions():
    # the same x0 error, said as eps, v or x0, must cost the same
    x0, noise, t = torch.randn(50, 1, 8, 8), torch.randn(50, 1, 8, 8), torch.arange(50)
    abar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 50)))[:, None, None, None]
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    wrong_x0 = x0 + torch.randn_like(x0)
    wrong_eps = (x_t - abar.sqrt() * wrong_x0) / (1 - abar).sqrt()
    said = {"x0": wrong_x0, "eps": wrong_eps, "v": abar.sqrt() * wrong_eps - (1 - abar).sqrt() * wrong_x0}
    losses = {}
    for prediction, value in said.items():
        model = small(prediction=prediction, min_snr_gamma=5.0)
        model.model = Recorder(value)
        losses[prediction] = model(x0, torch.zeros(50, dtype=torch.long), t, noise)
    assert torch.allclose(losses["eps"], losses["x0"], rtol=2e-3)
    assert torch.allclose(losses["v"], losses["x0"], rtol=2e-3)


def test_loss_reaches_the_weights_and_draws_its_own_noise():
    model = small().train()
    x, label, t = torch.randn(4, 1, 8, 8), torch.arange(4), torch.arange(4)
    first, second = model.compute_loss(x, label, t), model.compute_loss(x, label, t)
    assert first != second
    first.backward()
    # one context token needs no query: see TransformerBlock
    idle = ("norm2", "attn2.to_q", "attn2.to_k")
    assert all((p.grad is None) == any(word in name for word in idle) for name, p in model.model.named_parameters())


def test_label_dropout_mask():
    model = small(label_dropout=0.3)
    model.model = Recorder()
    label, drop = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    model.compute_loss(torch.zeros(4, 1, 8, 8), label, torch.zeros(4, dtype=torch.long), drop=drop)
    assert model.model.calls[0][1].tolist() == [4, 1, 4, 3]  # 4 is the null label
    assert label.tolist() == [0, 1, 2, 3]


def test_label_dropout_rate_and_only_in_training():
    model = small(label_dropout=0.3)
    model.model = Recorder()
    n = 20000
    args = torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    model.train().compute_loss(*args)
    model.eval().compute_loss(*args)
    training, evaluation = (call[1] for call in model.model.calls)
    assert abs((training == 4).double().mean() - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / n)
    assert (evaluation == 0).all()


def test_without_label_dropout_there_is_no_null_label():
    model = small()
    assert model.model.label_embd.embd.num_embeddings == 4
    assert small(label_dropout=0.1).model.label_embd.embd.num_embeddings == 5
    model.model = Recorder()
    model.train().compute_loss(torch.zeros(4, 1, 8, 8), torch.arange(4), torch.arange(4))
    assert model.model.calls[0][1].tolist() == [0, 1, 2, 3]
