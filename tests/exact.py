"""Mixtures of Gaussians in one dimension, in float64: their denoiser and their exact flow are known."""

import torch
from torch import nn
from torch.special import ndtr


class Mixture:
    """sum_k weights[k] N(means[k], stds[k]^2), and the same under noise of standard deviation sigma."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.mean = (self.weights * self.means).sum().item()
        self.var = (self.weights * (self.stds ** 2 + self.means ** 2)).sum().item() - self.mean ** 2

    def denoise(self, x, sigma):
        """E[x_0 | x_0 + sigma * noise = x]; sigma a number, or shaped to multiply x."""
        x = x[..., None]
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        sigma = sigma[..., None] if sigma.dim() else sigma
        var = self.stds ** 2 + sigma ** 2
        share = (self.weights.log() - var.log() / 2 - (x - self.means) ** 2 / (2 * var)).softmax(-1)
        return (share * (self.stds ** 2 * x + sigma ** 2 * self.means) / var).sum(-1)

    def cdf(self, x, sigma=0.0):
        return (self.weights * ndtr((x[..., None] - self.means) / (self.stds ** 2 + sigma ** 2).sqrt())).sum(-1)

    def quantile(self, u, sigma=0.0):
        """By bisection, to the last digit. The probability flow takes each quantile to that at another sigma."""
        bound = 10 * (1 + sigma) + self.means.abs().max()
        lo, hi = -bound * torch.ones_like(u), bound * torch.ones_like(u)
        for _ in range(80):
            mid = (lo + hi) / 2
            below = self.cdf(mid, sigma) < u
            lo, hi = torch.where(below, mid, lo), torch.where(below, hi, mid)
        return (lo + hi) / 2


ONE = Mixture([1.0], [0.4], [0.5])
TWO = Mixture([0.35, 0.65], [-0.6, 0.5], [0.2, 0.3])


class ExactNetwork(nn.Module):
    """The exact network of a DDPM for such pixels; also between timesteps, where log sigma is linear."""

    def __init__(self, data, sigmas, prediction="eps"):
        super().__init__()
        self.data, self.log_sigmas, self.prediction = data, sigmas.double().log(), prediction

    def forward(self, x, label, time):
        x, time = x.double(), time.double()
        lo = time.floor().long().clamp(max=max(len(self.log_sigmas) - 2, 0))
        hi = (lo + 1).clamp(max=len(self.log_sigmas) - 1)
        log_sigma = self.log_sigmas[lo] + (time - lo) * (self.log_sigmas[hi] - self.log_sigmas[lo])
        sigma = log_sigma.exp()[:, None, None, None]
        abar = 1 / (1 + sigma ** 2)
        x0 = self.data.denoise(x / abar.sqrt(), sigma)
        eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        return {"x0": x0, "eps": eps, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[self.prediction]
