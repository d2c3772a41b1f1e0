"""DDPM's tables, forward process and loss, against the papers' formulas and diffusers."""

import math

import numpy as np
import pytest
import torch

from helpers import SMALL, Recorder, one_line, reference
from libs import DDPM, UsageError
from libs.ddpm import SCHEDULES


def small(**options):
    return DDPM(**{**SMALL, **options}).eval()


# ---- schedules and tables

@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("quadratic", "scaled_linear"),
                                          ("cosine", "squaredcos_cap_v2")])
def test_tables_agree_with_diffusers(diffusers, ours, theirs):
    scheduler = reference(diffusers, theirs, 1000)
    model = small(timesteps=1000, beta_schedule=ours, prediction="v")
    abar = scheduler.alphas_cumprod
    for table, expected in ((model.betas, scheduler.betas), (model.alphas_cumprod, abar),
                            (model.sqrt_alphas_cumprod, abar.sqrt()),
                            (model.sqrt_one_minus_alphas_cumprod, (1 - abar).sqrt())):
        assert table.dtype == torch.float32 and table.shape == (1000,)
        assert torch.allclose(table.double(), expected.double(), rtol=0, atol=1e-6)
    assert torch.allclose(model.sqrt_recip_alphas.double(), (1 - scheduler.betas.double()) ** -0.5, rtol=1e-4)
    variance = torch.stack([scheduler._get_variance(t) for t in range(1000)])
    assert torch.allclose(model.posterior_variance.double(), variance.double(), rtol=0, atol=1e-6)
    assert model.posterior_variance[0] == 0


def test_schedules_of_the_papers():
    T = 20
    assert np.allclose(SCHEDULES["linear"](T), [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)], rtol=1e-12)
    low, high = 0.00085 ** 0.5, 0.012 ** 0.5
    assert np.allclose(SCHEDULES["quadratic"](T), [(low + (high - low) * i / (T - 1)) ** 2 for i in range(T)],
                       rtol=1e-12)
    # Nichol & Dhariwal: abar_t = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) * pi / 2)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    cosine = SCHEDULES["cosine"](T).numpy()
    assert np.allclose((1 - cosine).cumprod()[:-1], np.array(f[1:-1]) / f[0], rtol=1e-9)
    assert cosine[-1] == 0.999  # f(T) = 0 would make it 1


def test_default_schedule_depends_on_the_space():
    assert torch.allclose(small().betas, torch.linspace(1e-4, 0.02, 50))
    latent = small(img_shape=(3, 32, 32), use_vae=True)
    assert torch.allclose(latent.betas.sqrt(), torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 50))


# ---- forward process

def test_q_sample_agrees_with_diffusers(diffusers):
    model, t = small(timesteps=1000), torch.arange(1000)
    x, noise = torch.rand(1000, 1, 4, 4) * 2 - 1, torch.randn(1000, 1, 4, 4)
    expected = reference(diffusers, "linear", 1000).add_noise(x, noise, t)
    assert torch.allclose(model.q_sample(x, t, noise), expected, rtol=0, atol=2e-6)


def test_q_sample_mean_and_variance_at_every_t():
    # one x_0 many times; the noise is the method's own
    model = small()
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 50))
    value, n = -0.7, 64 * 64
    x_t = model.q_sample(torch.full((50, 1, 64, 64), value), torch.arange(50)).double().flatten(1).numpy()
    mean, var = x_t.mean(1), x_t.var(1)
    assert (abs(mean - np.sqrt(abar) * value) < 4.5 * np.sqrt((1 - abar) / n)).all()
    assert (abs(var / (1 - abar) - 1) < 4.5 * np.sqrt(2 / n)).all()


# ---- the end of the schedule, from both sides

@pytest.mark.parametrize("options, words", [
    ({"timesteps": 100}, ("with 100", "sqrt(abar) = 0.6", "take more")),
    ({"timesteps": 300, "beta_schedule": "quadratic"}, ("with 300", "take more"))])
def test_a_schedule_that_ends_too_early_warns(options, words):
    with pytest.warns(UserWarning, match="model.timesteps") as caught:
        DDPM(**SMALL | options)
    message = str(caught[0].message)
    assert len(caught) == 1 and all(word in message for word in words) and "\n" not in message


@pytest.mark.parametrize("options, words", [
    ({"timesteps": 2000}, ("with 2000", "= 4e-05", "take fewer, or model.prediction v")),
    ({"timesteps": 1000, "beta_schedule": "cosine"}, ("= 4.9e-05", "model.prediction v")),
    ({"timesteps": 20_000, "prediction": "v"}, ("with 20000", "take fewer"))])
def test_a_schedule_that_never_comes_back_is_refused(options, words):
    with pytest.raises(UsageError) as error:
        DDPM(**SMALL | options)
    assert "model.timesteps: " in one_line(error) and all(word in one_line(error) for word in words)


@pytest.mark.parametrize("options", [{}, {"use_vae": True, "img_shape": (3, 64, 64)},
                                     {"beta_schedule": "cosine", "prediction": "v"}])
def test_the_defaults_end_where_sampling_starts(options, recwarn):
    small = {key: value for key, value in SMALL.items() if key not in ("timesteps", "img_shape")}
    model = DDPM(**small | options)
    assert model.timesteps == 1000 and model.sqrt_alphas_cumprod[-1] < 0.1
    assert not [w for w in recwarn if "timesteps" in str(w.message)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_predictions_invert_each_other(schedule):
    model, t = small(beta_schedule=schedule).double(), torch.arange(50)
    abar = (1 - SCHEDULES[schedule](50)).cumprod(0)[:, None, None, None]
    x0, eps = torch.randn(2, 50, 1, 8, 8, dtype=torch.float64)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
    # the tables are fp32: one part in 10^7, more where it is divided by a small factor
    assert torch.allclose(model.q_sample(x0, t, eps), x_t, atol=1e-6)
    assert torch.allclose(model.predict_v(x0, t, eps), v, atol=1e-6)
    assert torch.allclose(model.predict_start_from_v(x_t, t, v), x0, atol=1e-6)
    assert torch.allclose(model.predict_noise_from_v(x_t, t, v), eps, atol=1e-6)
    assert ((model.predict_start_from_noise(x_t, t, eps) - x0).abs() < 1e-6 / abar.sqrt()).all()
    assert ((model.predict_noise_from_start(x_t, t, x0) - eps).abs() < 1e-6 / (1 - abar).sqrt()).all()


def test_unknown_prediction():
    with pytest.raises(UsageError, match="'score'.*eps, v, x0"):
        small(prediction="score")


# ---- training

@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_loss_is_algorithm_1(prediction):
    model = small(prediction=prediction)
    t, label = torch.tensor([0, 3, 20, 49, 49]), torch.tensor([0, 1, 2, 3, 0])
    x0, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)

    abar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 50))[t.numpy()])
    a, s = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
    with torch.no_grad():
        out = model.model((a * x0 + s * noise).float(), label, t)
    target = {"eps": noise, "v": a * noise - s * x0, "x0": x0}[prediction]
    expected = ((out - target).double() ** 2).mean((1, 2, 3))

    loss, each = model.compute_loss(x0, label, t, noise, return_each=True)
    assert torch.allclose(each.double(), expected, rtol=2e-5)
    assert loss.shape == () and loss.item() == pytest.approx(expected.mean().item(), rel=2e-5)
    assert torch.equal(model.compute_loss(x0, label, t, noise), loss) and torch.equal(model(x0, label, t, noise), loss)


def test_loss_reaches_the_weights_and_draws_its_own_noise():
    model = small().train()
    x, label, t = torch.randn(4, 1, 8, 8), torch.arange(4), torch.arange(4)
    first, second = model.compute_loss(x, label, t), model.compute_loss(x, label, t)
    assert first != second
    first.backward()
    # one context token needs no query: see TransformerBlock
    idle = ("norm2", "attn2.to_q", "attn2.to_k")
    assert all((p.grad is None) == any(word in name for word in idle) for name, p in model.model.named_parameters())


def test_label_dropout():
    model, n = small(label_dropout=0.3), 20000
    model.model = Recorder()
    label, drop = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    model.compute_loss(torch.zeros(4, 1, 8, 8), label, torch.zeros(4, dtype=torch.long), drop=drop)
    assert model.model.calls[0][1].tolist() == [4, 1, 4, 3]  # 4 is the null label
    assert label.tolist() == [0, 1, 2, 3]
    # its rate, and only in training
    zeros = torch.zeros(n, dtype=torch.long)
    model.train().compute_loss(torch.zeros(n, 1, 1, 1), zeros, zeros)
    model.eval().compute_loss(torch.zeros(n, 1, 1, 1), zeros, zeros)
    training, evaluation = (call[1] for call in model.model.calls[1:])
    assert abs((training == 4).double().mean() - 0.3) < 4.5 * math.sqrt(0.3 * 0.7 / n)
    assert (evaluation == 0).all()
    # without it the network has no such label
    assert small(label_dropout=0.1).model.label_embd.embd.num_embeddings == 5
    assert small().model.label_embd.embd.num_embeddings == 4
