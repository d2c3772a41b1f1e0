"""Rectified flow, or flow matching: Liu et al. 2022 (arXiv 2209.03003), Lipman et al. 2022 (arXiv 2210.02747).

A straight line joins image and noise, x_t = (1 - t) x_0 + t noise, and the network predicts the velocity along it,
dx_t/dt = noise - x_0. Training draws t as Esser et al. 2024 do (arXiv 2403.03206, Section 3.1).
"""

import torch

from .diffusion import Diffusion
from .samplers import trained_range


class Flow(Diffusion):
    """Rectified flow in pixels, or in latents with `use_vae`. See Diffusion for the arguments before these:

    Args:
        P_mean, P_std: the logit of t, ln(t / (1 - t)), is drawn from N(P_mean, P_std^2).
        sigma_min, sigma_max, rho: the sampler's noise levels, as EDM's.

    Divided by 1 - t, x_t is the image plus noise of standard deviation sigma = t / (1 - t), which is how the solvers see
    it. So the logit of t is ln(sigma), P_mean and P_std mean what they mean for EDM, and Euler's method takes the same
    steps in sigma as in t. In the arguments of `compute_loss`, t counts from 0 to `timesteps`, as for the other models.
    """

    def __init__(self, img_shape=(3, 32, 32), timesteps=1000, dim=64, context_dim=64, num_classes=10,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), use_vae=False, vae_encoder_weights=None,
                 vae_decoder_weights=None, P_mean=0.0, P_std=1.0, sigma_min=0.002, sigma_max=80.0, rho=7.0, **options):
        super().__init__(img_shape, timesteps, dim, context_dim, num_classes, dim_mults, attn_levels,
                         use_vae, vae_encoder_weights, vae_decoder_weights, **options)
        self.P_mean, self.P_std = P_mean, P_std
        self.sigma_range = *trained_range(P_mean, P_std, sigma_min, sigma_max), rho

    def velocity(self, x_t, label, t, guidance_scale=1.0):
        """The predicted dx/dt where x is x_t at time t: B x C x H x W, B, B from 0 to 1 -> B x C x H x W."""
        return self.guided(x_t, label, 1000 * t, guidance_scale).to(x_t.dtype)

    def draw_times(self, n, generator=None, device=None):
        """n times, float, from 0 to `timesteps`: logit-normal."""
        logit = self.P_mean + self.P_std * torch.randn(n, generator=generator, device=device)
        return self.timesteps * torch.sigmoid(logit).clamp(max=1 - 2 ** -23)

    def compute_loss(self, x_start, label, t, noise=None, drop=None, encoded=False, return_each=False):
        """The mean squared error of the velocity. A scalar; see Diffusion.compute_loss for the arguments.

        t: B, floats as `draw_times` gives, or long, 0 to timesteps - 1, where k means k + 1/2.
        """
        if self.use_vae and not encoded:
            x_start = self.encode(x_start)
        if self.label_dropout > 0:
            label = self.hide_labels(label, drop)
        if noise is None:
            noise = torch.randn_like(x_start)

        t = (t if t.is_floating_point() else t + 0.5) / self.timesteps
        share = t[:, None, None, None]
        v = self.velocity((1 - share) * x_start + share * noise, label, t)
        each = (v - (noise - x_start)).pow(2).flatten(1).mean(1)  # B
        return (each.mean(), each) if return_each else each.mean()

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        """D(x; sigma), the estimate of the noiseless image: where the line through x_t with this velocity is at t = 0.

        x: B x C x H x W, image plus noise of standard deviation sigma; sigma: B or a number; label: B.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        t = sigma / (1 + sigma)
        share = t[:, None, None, None]
        x_t = (1 - share) * x
        return x_t - share * self.velocity(x_t, label, t, guidance_scale)
