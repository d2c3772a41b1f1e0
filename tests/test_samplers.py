"""What holds for every sampler of every model: guidance, noise by image, clipping, calls, callback, errors."""

import pytest
import torch
from torch import nn

from exact import ONE, TWO, ExactNetwork
from helpers import SMALL, one_line
from libs import DDIM, DDPM, EDM, UsageError
from libs.samplers import DEFAULT_STEPS, SOLVERS, Plan, image_generator, karras_sigmas
from libs.common.seeds import image_noise

KINDS = {"DDPM": DDPM, "DDIM": DDIM, "EDM": EDM}
ALL = [(kind, sampler) for kind in KINDS for sampler in KINDS[kind].SAMPLERS]
# so that every sampler that can draws noise
OPTIONS = {"ddim": {"eta": 0.7}, "heun": {"S_churn": 5.0}, "dpmpp_2m": {"eta": 0.7}}
each = pytest.mark.parametrize("kind, sampler", ALL)


def small(kind, **options):
    model = KINDS[kind](**{**SMALL, "timesteps": 12, "label_dropout": 0.1, **options}).eval()
    model.postprocess = lambda x: x  # what the solver ended with
    return model


def steps_of(sampler):
    return None if sampler == "ddpm" else 4


class Counter(nn.Module):
    """The network, and how many images it saw in each call, and at which time."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x, label, time):
        self.seen.append((len(x), label.tolist(), time[0].item()))
        return self.network(x, label, time)


# ---- which samplers there are

def test_samplers_of_each_model():
    assert set(SOLVERS) == {"heun", "euler", "euler_ancestral", "dpmpp_2m"} == set(EDM.SAMPLERS)
    assert set(DDPM.SAMPLERS) == set(DDIM.SAMPLERS) == {"ddpm", "ddim", *SOLVERS} == set(DEFAULT_STEPS)
    assert [next(iter(k.SAMPLERS)) for k in KINDS.values()] == ["ddpm", "ddim", "heun"]  # the default


# ---- an image is the same in any batch

@each
def test_an_image_does_not_depend_on_its_batch(kind, sampler):
    """In double precision: a batch's size decides the order of sums, and a random network makes much of the rounding."""
    model, labels = small(kind).double(), torch.tensor([3, 0, 1, 2, 2])
    options = dict(sampler=sampler, steps=steps_of(sampler), guidance_scale=2.0, **OPTIONS.get(sampler, {}))
    whole = model.sample(labels, generator=image_generator(5, range(5)), **options)
    parts = [model.sample(labels[k], generator=image_generator(5, k), **options)
             for k in (torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([4, 3]))]
    assert torch.allclose(whole[[0, 1, 2, 4, 3]], torch.cat(parts), atol=1e-9)
    assert not torch.allclose(whole[3], whole[4], atol=1e-2)  # the same label, another number
    other = model.sample(labels, generator=image_generator(6, range(5)), **options)
    assert not torch.allclose(whole, other, atol=1e-2)


@each
def test_a_torch_generator_repeats_too(kind, sampler):
    model, labels, noise = small(kind), torch.tensor([3, 0]), torch.randn(2, 1, 8, 8)

    def draw(seed):
        return model.sample(labels, sampler, steps_of(sampler), noise=noise, **OPTIONS.get(sampler, {}),
                            generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(2)) == (sampler == "euler")  # the only one that has no noise to add


def test_noise_by_image():
    draw = image_generator(5, [7, 9])
    assert torch.equal(draw(0, (2, 1, 8, 8)), image_noise(5, [7, 9], (1, 8, 8)))
    values = torch.stack([draw(step, (2, 1, 64, 64)) for step in range(4)]).flatten(2)
    alone = torch.stack([image_generator(5, [9])(step, (1, 1, 64, 64)) for step in range(4)]).flatten(1)
    assert torch.equal(values[:, 1], alone)
    correlation = torch.corrcoef(values.flatten(0, 1))
    assert (correlation - torch.eye(8)).abs().max() < 5 / 64  # each image and each step its own
    assert (values.mean(2).abs() < 5 / 64).all() and ((values.var(2) - 1).abs() < 5 * 2 ** 0.5 / 64).all()


@each
def test_in_double_precision(kind, sampler):
    model, labels = small(kind), torch.tensor([3, 0])
    options = dict(sampler=sampler, steps=steps_of(sampler), guidance_scale=2.0, **OPTIONS.get(sampler, {}))
    single = model.sample(labels, **options, generator=torch.Generator().manual_seed(1))
    double = model.double().sample(labels, **options, generator=torch.Generator().manual_seed(1))
    assert double.dtype == torch.float64 and torch.allclose(single.double(), double, atol=1e-4)


# ---- guidance

@each
def test_guidance_inside_the_interval_only(kind, sampler):
    model, labels, noise = small(kind), torch.tensor([3, 0]), torch.randn(2, 1, 8, 8)
    options = dict(sampler=sampler, steps=steps_of(sampler), noise=noise, **OPTIONS.get(sampler, {}))
    network = model.model
    levels = (karras_sigmas(4, *model.sigma_range)[:-1] if sampler in SOLVERS else model.sigmas.flip(0)).tolist()
    interval = ((levels[-1] * levels[-2]) ** 0.5, (levels[0] * levels[1]) ** 0.5)

    def draw(**more):
        model.model = Counter(network)
        x = model.sample(labels, generator=image_generator(0, range(2)), **options, **more)
        assert sum(n for n, _, _ in model.model.seen) == 2 * model.network_calls(
            sampler, options["steps"], **OPTIONS.get(sampler, {}), **more)
        return x, model.model.seen

    plain, seen = draw()
    assert {n for n, _, _ in seen} == {2}
    guided, seen = draw(guidance_scale=3.0)
    assert all((n, label) == (4, [3, 0, 4, 4]) for n, label, _ in seen)  # both branches in one call
    limited, seen = draw(guidance_scale=3.0, guidance_interval=interval)
    # both branches between the bounds, one outside them, in the order of falling noise
    assert seen[0][0] == seen[-1][0] == 2 and {n for n, _, _ in seen} == {2, 4}
    assert not torch.equal(limited, plain) and not torch.equal(limited, guided)
    # an interval that holds all levels, and one that holds none
    assert torch.equal(draw(guidance_scale=3.0, guidance_interval=(0, 1e6))[0], guided)
    assert torch.equal(draw(guidance_scale=3.0, guidance_interval=(1e5, 1e6))[0], plain)


def test_the_interval_is_open_below_and_closed_above():
    plan = Plan("heun", 5, guidance_scale=3.0, guidance_interval=(0.3, 5.0))
    assert [plan.scale(s) for s in (0.2, 0.3, 0.3001, 5.0, 5.001)] == [1, 1, 3, 3, 1]
    assert Plan("heun", 5, guidance_scale=3.0).scale(1e-9) == Plan("heun", 5, guidance_scale=3.0).scale(1e9) == 3


# ---- network calls

@pytest.mark.parametrize("sampler, steps, calls", [("ddpm", None, 12), ("ddim", 5, 5), ("heun", 5, 9), ("euler", 5, 5),
                                                   ("euler_ancestral", 5, 5), ("dpmpp_2m", 5, 5), ("ddim", None, 12)])
def test_network_calls(sampler, steps, calls):
    model = small("DDPM")
    assert model.network_calls(sampler, steps) == calls
    assert model.network_calls(sampler, steps, guidance_scale=2.0) == 2 * calls
    assert small("EDM").network_calls() == 35  # the paper's figure for 18 steps of Heun


# ---- one callback for all

@each
def test_callback_sees_every_state(kind, sampler):
    model, states = small(kind), []
    noise = torch.randn(2, 1, 8, 8)
    x = model.sample(torch.tensor([1, 2]), sampler, steps_of(sampler), noise=noise,
                     callback=lambda step, steps, x: states.append((step, steps, x)))
    n = steps_of(sampler) or 12
    assert [s[:2] for s in states] == [(k, n) for k in range(1, n + 1)]
    assert torch.allclose(states[-1][2], x)


@pytest.mark.parametrize("kind, sampler", [(k, s) for k, s in ALL if s != "ddpm"])
def test_states_have_one_scaling(kind, sampler):
    # data of standard deviation 1 keep it under DDPM's noise, so every state has it
    model, stds = small(kind, timesteps=1000, img_shape=(1, 16, 16)), []
    if kind == "EDM":
        model.denoise = lambda x, sigma, label, scale: x / (1 + sigma ** 2)
    else:
        model.predict = lambda x, label, t, scale: (model._signal_noise(x, t)[1] * x, model._signal_noise(x, t)[0] * x)
        model.denoise = lambda x, sigma, label, scale: x / (1 + sigma ** 2)
    model.sample(torch.zeros(8, dtype=torch.long), sampler, 100, callback=lambda k, n, x: stds.append(x.std().item()))
    assert len(stds) == 100 and all(abs(s - 1) < 0.1 for s in stds), stds


# ---- DDPM as a denoiser

@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("data", [ONE, TWO], ids=["Gaussian", "mixture"])
def test_denoise_of_a_ddpm(prediction, data):
    model = small("DDPM", timesteps=1000, prediction=prediction)
    model.model = ExactNetwork(data, model.sigmas, prediction)
    lo, hi, rho = model.sigma_range
    assert (lo, hi, rho) == pytest.approx((0.01, 157.4, 7), rel=1e-3)
    sigma = torch.cat([model.sigmas[[0, 10, 500, 999]], torch.tensor([0.02, 0.7, 3.3, 90.0])])
    x = 0.3 + (0.3 + sigma)[:, None, None, None] * torch.randn(8, 1, 8, 8)
    got = model.denoise(x, sigma, torch.zeros(8, dtype=torch.long))
    expected = data.denoise(x.double(), sigma.double()[:, None, None, None])
    # an eps in fp32 is off by 1e-7, and sigma times that is the image's error
    assert ((got - expected).abs().flatten(1).amax(1) < 1e-5 + 2e-6 * sigma).all()
    alone = model.denoise(x[5:6], 0.7, torch.zeros(1, dtype=torch.long))
    assert torch.allclose(alone, got[5:6], atol=1e-6)


@pytest.mark.parametrize("T, schedule", [(1000, "linear"), (1000, "cosine"), (50, "quadratic"), (2, "linear")])
def test_time_of_a_noise_level(T, schedule):
    model = small("DDPM", timesteps=T, beta_schedule=schedule, prediction="v")
    sigmas = model.sigmas
    assert torch.allclose(model.sigma_to_time(sigmas), torch.arange(T).float(), atol=2e-3)
    between = (sigmas[1:] * sigmas[:-1]).sqrt()  # half way in log sigma
    assert torch.allclose(model.sigma_to_time(between), torch.arange(T - 1) + 0.5, atol=2e-3)
    outside = model.sigma_to_time(torch.stack([sigmas[0] / 3, sigmas[-1] * 3]))
    assert outside.tolist() == [0, T - 1]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler, steps, tolerance", [("ddim", 1000, 0.01), ("euler", 500, 0.01), ("heun", 60, 0.005),
                                                       ("dpmpp_2m", 60, 0.005)])
def test_a_ddpm_takes_quantiles_to_quantiles(prediction, sampler, steps, tolerance):
    """The exact flow, from x_T to the image, through `sample`: noise levels, times, scales and solver together."""
    model = small("DDPM", timesteps=1000, prediction=prediction).double()
    model.model = ExactNetwork(TWO, model.sigmas, prediction)
    u, sigma = torch.linspace(0.02, 0.98, 64, dtype=torch.float64), model.sigmas[-1].item()
    noise = TWO.quantile(u, sigma) / (1 + sigma ** 2) ** 0.5
    x = model.sample(torch.tensor([0]), sampler, steps, noise=noise.reshape(1, 1, 8, 8)).flatten()
    assert (x - TWO.quantile(u)).abs().max() < tolerance


def test_dpmpp_and_ddim_meet():
    """Both solve the same equation, from the same noise, with a network that was never told of it."""
    model, labels, noise = small("DDPM", timesteps=1000), torch.tensor([0, 3]), torch.randn(2, 1, 8, 8)
    fine = model.sample(labels, "ddim", 1000, noise=noise)
    off = {(name, n): (model.sample(labels, name, n, noise=noise) - fine).abs().max().item()
           for name, n in (("dpmpp_2m", 20), ("dpmpp_2m", 200), ("heun", 100))}
    print(f"range {fine.min():.2f} to {fine.max():.2f}, off {off}")
    assert off["dpmpp_2m", 200] < 0.02 * fine.std() and off["heun", 100] < 0.02 * fine.std()
    assert off["dpmpp_2m", 200] < off["dpmpp_2m", 20]


# ---- clipping

@pytest.mark.parametrize("kind, sampler", [(k, s) for k, s in ALL if k != "DDIM"])
def test_clip_keeps_what_is_predicted_among_the_pixels(kind, sampler):
    model, labels, noise = small(kind), torch.tensor([3, 0]), torch.randn(2, 1, 8, 8)
    network = model.model

    class Loud(nn.Module):
        def forward(self, *args):
            return 5 * network(*args) + 5

    model.model = Loud()
    options = dict(sampler=sampler, steps=steps_of(sampler), noise=noise)
    free, kept = (model.sample(labels, **options, clip=clip, generator=image_generator(0, range(2)))
                  for clip in (False, True))
    assert free.abs().max() > 1.5  # the last step ends on the prediction
    assert kept.abs().max() <= 1 + 1e-5
    assert torch.equal(free, model.sample(labels, **options, generator=image_generator(0, range(2))))  # off by default


# ---- what is refused

@pytest.mark.parametrize("kind, options, words", [
    ("DDPM", dict(sampler="dpmp_2m"), ["sampler", "'dpmp_2m'", "did you mean dpmpp_2m?"]),
    ("DDPM", dict(sampler="plms"), ["'plms'", "DDPM has ddpm, ddim, heun, euler, euler_ancestral, dpmpp_2m"]),
    ("EDM", dict(sampler="ddim"), ["sampler", "'ddim'", "EDM has heun, euler, euler_ancestral, dpmpp_2m"]),
    ("EDM", dict(steps=0), ["steps: 0", "1"]),
    ("DDPM", dict(sampler="dpmpp_2m", steps=-1), ["steps: -1", "1"]),
    ("DDIM", dict(steps=13), ["steps: 13", "12"]),
    ("DDPM", dict(sampler="ddpm", steps=5), ["steps", "all 12, not 5"]),
    ("DDIM", dict(eta=1.01), ["eta: 1.01", "between 0 and 1"]),
    ("DDIM", dict(eta=-0.1), ["eta: -0.1", "between 0 and 1"]),
    ("DDIM", dict(eta=float("nan")), ["eta: nan", "between 0 and 1"]),
    ("DDIM", dict(spacing="quadratc"), ["spacing: 'quadratc'", "uniform, quadratic", "did you mean quadratic?"]),
    ("EDM", dict(eta=0.5), ["eta: the sampler heun does not", "ddim, euler_ancestral, dpmpp_2m do"]),
    ("EDM", dict(sampler="dpmpp_2m", S_churn=3), ["S_churn: the sampler dpmpp_2m", "heun does"]),
    ("DDPM", dict(sampler="ddpm", spacing="uniform"), ["spacing: the sampler ddpm", "ddim does"]),
    ("EDM", dict(S_chrun=3), ["S_chrun: no sampler", "did you mean S_churn?"]),
    ("EDM", dict(S_noise=-1), ["S_noise: -1"]),
    ("EDM", dict(guidance_scale=2, guidance_interval=(2, 1)), ["guidance_interval: [2, 1]", "sigma_lo < sigma_hi"]),
    ("EDM", dict(guidance_scale=float("nan")), ["guidance_scale: nan"]),
    ("EDM", dict(guidance_scale=-1), ["guidance_scale: -1"]),
])
def test_refused(kind, options, words):
    model, noise = small(kind), torch.zeros(0)
    for call in (lambda: model.sample(torch.tensor([0]), noise=noise, **options),
                 lambda: model.network_calls(**options)):
        with pytest.raises(UsageError) as error:
            call()
        message = one_line(error)
        assert all(word in message for word in words), message


def test_refused_for_what_the_model_is():
    plain = EDM(**SMALL).eval()
    with pytest.raises(UsageError, match="guidance_scale: 2.0.*label_dropout"):
        # though the interval holds no noise level at all
        plain.sample(torch.tensor([0]), guidance_scale=2.0, guidance_interval=(1e5, 1e6))
    with pytest.raises(UsageError, match="clip: .*latents"):
        EDM(**{**SMALL, "img_shape": (3, 64, 64)}, use_vae=True).sample(torch.tensor([0]), clip=True)
    with pytest.raises(UsageError, match="sampler: heun needs more than the one noise level"):
        small("DDPM", timesteps=1).sample(torch.tensor([0]), "heun")
    small("DDPM", timesteps=1).sample(torch.tensor([0]), "ddpm")
