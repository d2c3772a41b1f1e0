"""Solvers of the probability-flow ODE over one narrow call: denoise(x, sigma) -> D.

x = x_0 + sigma * noise, and D is the estimate of x_0 that minimises the squared error. Karras et al. 2022
(arXiv 2206.00364), whose symbols these are. Any model with such a `denoise` can be sampled by any of them.
"""

import torch


def karras_sigmas(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Eq. 5: `steps` noise levels from sigma_max down to sigma_min, then 0. float64, steps + 1 values."""
    i = torch.arange(steps, dtype=torch.float64)
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (hi + i / max(steps - 1, 1) * (lo - hi)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def heun(denoise, x, sigmas, callback=None):
    """Algorithm 1: Heun's second-order method. 2 * steps - 1 calls when sigmas ends in 0.

    Args:
        denoise: (x, sigma as a float) -> D, the shape of x.
        x: B x ..., noise of standard deviation sigmas[0].
        sigmas: decreasing noise levels, as many as steps + 1.
        callback: called as callback(step, steps, x) after every step.
    """
    sigmas = [float(s) for s in sigmas]
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        d = (x - denoise(x, sigma)) / sigma  # dx/dsigma here
        x_next = x + (sigma_next - sigma) * d
        if sigma_next > 0:
            d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next  # and at the end of the step
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
        if callback:
            callback(i + 1, len(sigmas) - 1, x)
    return x
