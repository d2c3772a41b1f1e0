"""Solvers: from noise to an image, for every model here.

A solver knows a model by one narrow call: denoise(x, sigma) -> D. There x = x_0 + sigma * noise, and D is the estimate
of x_0 that minimises the squared error. Symbols are those of Karras et al. 2022 (arXiv 2206.00364).
"""

import math

import torch

from .common.errors import UsageError
from .common.seeds import image_noise


# ---- noise that samplers add on the way

def image_generator(seed, numbers):
    """A `generator` that gives image number k the same noise in any batch.

    numbers: the number of each image of the batch. At step 0 it is seeds.image_noise, where the image starts.
    """
    return lambda step, shape: image_noise((seed, "step", step) if step else seed, numbers, shape[1:])


def draw_noise(generator, step, like):
    """Standard normal noise, shaped like `like`, the same in any precision.

    generator: a torch.Generator, None for torch's global one, or a function (step, shape) -> noise;
    step: 0 for the start of an image, then another number for each draw.
    """
    if callable(generator):
        return generator(step, tuple(like.shape)).to(like)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)


# ---- solvers: (denoise, x, sigmas, callback, generator, options) -> x

def guidance_at(sigma, guidance_scale, interval=None):
    """The guidance scale at noise level sigma: 1, none, outside (sigma_lo, sigma_hi]; arXiv 2404.07724."""
    lo, hi = interval or (0.0, math.inf)
    return guidance_scale if lo < sigma <= hi else 1.0


def karras_sigmas(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Eq. 5: `steps` noise levels from sigma_max down to sigma_min, then 0. float64, steps + 1 values."""
    i = torch.arange(steps, dtype=torch.float64)
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (hi + i / max(steps - 1, 1) * (lo - hi)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def trained_range(P_mean, P_std, sigma_min, sigma_max, tail=3.5):
    """(sigma_min, sigma_max), cut to the levels that training draws where ln(sigma) is from N(P_mean, P_std^2).

    tail: in units of P_std; one of two thousand levels lies beyond 3.5, above or below. Raises UsageError where nothing
    is left.
    """
    low, high = max(sigma_min, math.exp(P_mean - tail * P_std)), min(sigma_max, math.exp(P_mean + tail * P_std))
    if low >= high:
        raise UsageError(f"model.sigma_min is {sigma_min} and model.sigma_max {sigma_max}; between them must be "
                         f"levels that training draws, around e^{P_mean}")
    return low, high


def _steps(sigmas):
    """Each step's number from 1, its noise level and the next."""
    sigmas = [float(s) for s in sigmas]
    return zip(range(1, len(sigmas)), sigmas[:-1], sigmas[1:])


def heun(denoise, x, sigmas, callback=None, generator=None, S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0):
    """Heun's second-order method: Algorithm 1, and with S_churn Algorithm 2. 2 * steps - 1 calls when sigmas ends in 0.

    Args (those of all solvers, then its own):
        denoise: (x, sigma as a float) -> D, the shape of x.
        x: B x ..., noise of standard deviation sigmas[0].
        sigmas: decreasing noise levels, as many as steps + 1.
        callback: called as callback(step, steps, x) after every step, x scaled as here.
        generator: see `draw_noise`.
        S_churn: noise added anew on the whole way, at most by a factor of sqrt(2) in a step; S_min, S_max: only
            between these noise levels; S_noise: its standard deviation.
    """
    N = len(sigmas) - 1
    for i, sigma, sigma_next in _steps(sigmas):
        gamma = min(S_churn / N, 2 ** 0.5 - 1) if S_min <= sigma <= S_max else 0.0
        if gamma > 0:
            sigma_hat = sigma + gamma * sigma
            x = x + (sigma_hat ** 2 - sigma ** 2) ** 0.5 * S_noise * draw_noise(generator, i, x)
            sigma = sigma_hat
        d = (x - denoise(x, sigma)) / sigma  # dx/dsigma here
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next  # and at the end of the step
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
        if callback:
            callback(i, N, x)
    return x


def euler(denoise, x, sigmas, callback=None, generator=None):
    """Euler's first-order method; DDIM is the same in another scaling. One call a step."""
    return euler_ancestral(denoise, x, sigmas, callback, generator, eta=0.0)


def euler_ancestral(denoise, x, sigmas, callback=None, generator=None, eta=1.0):
    """Euler's method to a lower noise level than the next one, then noise up to it. One call a step.

    eta: 1 adds as much noise as DDPM's posterior has between these levels, 0 none.
    """
    for i, sigma, sigma_next in _steps(sigmas):
        fresh = eta ** 2 * (1 - (sigma_next / sigma) ** 2)  # share of the next level's variance
        sigma_up, sigma_down = sigma_next * fresh ** 0.5, sigma_next * (1 - fresh) ** 0.5
        x = x + (sigma_down - sigma) * (x - denoise(x, sigma)) / sigma
        if sigma_up > 0:
            x = x + sigma_up * draw_noise(generator, i, x)
        if callback:
            callback(i, len(sigmas) - 1, x)
    return x


def dpmpp_2m(denoise, x, sigmas, callback=None, generator=None, eta=0.0):
    """DPM-Solver++(2M): Lu et al. 2022 (arXiv 2211.01095), Algorithm 2, of second order. One call a step.

    In the scaling used here their alpha is 1 and their sigma is ours; lambda = -ln(sigma).

    eta: fresh noise on the way: 0 none, 1 as their SDE-DPM-Solver++(2M) (Section 6). Each step solves the SDE that
        removes (1 + eta) times as much noise as the ODE and puts the excess back as fresh noise.
    """
    D_last = h_last = None
    for i, sigma, sigma_next in _steps(sigmas):
        D = denoise(x, sigma)
        if sigma_next == 0:
            x = D  # h is infinite: only the first-order step has a limit
        else:
            h = math.log(sigma / sigma_next)
            # extrapolated to the middle of the step from this call and the one before
            D_mid = D if D_last is None else D + h / (2 * h_last) * (D - D_last)
            x = sigma_next / sigma * math.exp(-eta * h) * x - math.expm1(-(1 + eta) * h) * D_mid
            if eta > 0:
                x = x + sigma_next * (-math.expm1(-2 * eta * h)) ** 0.5 * draw_noise(generator, i, x)
            D_last, h_last = D, h
        if callback:
            callback(i, len(sigmas) - 1, x)
    return x


SOLVERS = {"heun": heun, "euler": euler, "euler_ancestral": euler_ancestral, "dpmpp_2m": dpmpp_2m}
