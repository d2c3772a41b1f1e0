"""EDM: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".

The same UNet as DDPM's, preconditioned so that its input and its target have unit variance at every noise
level, and weighted so that each counts alike. Equation and table numbers are of arXiv 2206.00364.
"""

import torch

from .diffusion import Diffusion
from .samplers import trained_range


class EDM(Diffusion):
    """EDM in pixels, or in latents with `use_vae`. See Diffusion for the arguments before these:

    Args:
        sigma_data: standard deviation of the data; None starts at the paper's 0.5, and `train.py`
            measures it (`set_sigma_data`). A buffer, kept with the weights.
        P_mean, P_std: training draws ln(sigma) from N(P_mean, P_std^2); Table 1.
        sigma_min, sigma_max, rho: the sampler's noise levels, eq. 5, cut to those that training draws (`trained_range`).

    The log-normal is divided into `timesteps` equally likely strata: t = 0 is the lowest, as in DDPM, so that both take
    the same arguments and can be plotted alike. Training draws the place inside a stratum too, so every level occurs.
    """

    def __init__(self, img_shape=(3, 32, 32), timesteps=1000, dim=64, context_dim=64, num_classes=10,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), use_vae=False, vae_encoder_weights=None,
                 vae_decoder_weights=None, sigma_data=None, P_mean=-1.2, P_std=1.2, sigma_min=0.002,
                 sigma_max=80.0, rho=7.0, **options):
        super().__init__(img_shape, timesteps, dim, context_dim, num_classes, dim_mults, attn_levels,
                         use_vae, vae_encoder_weights, vae_decoder_weights, **options)
        self.measures_sigma_data = sigma_data is None
        self.register_buffer("sigma_data", torch.tensor(0.5 if sigma_data is None else float(sigma_data)))
        # the middle of each stratum
        u = (torch.arange(timesteps, dtype=torch.float64) + 0.5) / timesteps
        self.register_buffer("sigmas", torch.exp(P_mean + P_std * torch.special.ndtri(u)).float())
        self.P_mean, self.P_std = P_mean, P_std
        self.sigma_range = *trained_range(P_mean, P_std, sigma_min, sigma_max), rho

    def set_sigma_data(self, std):
        """Set sigma_data to the data's measured standard deviation, unless the config gave one."""
        if self.measures_sigma_data:
            self.sigma_data.fill_(std)

    # ---- preconditioning

    def preconditioning(self, sigma):
        """(c_skip, c_out, c_in, c_noise) of Table 1, each the shape of sigma."""
        var = sigma ** 2 + self.sigma_data ** 2
        return (self.sigma_data ** 2 / var, sigma * self.sigma_data / var.sqrt(), 1 / var.sqrt(), sigma.log() / 4)

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        """D(x; sigma), eq. 7: the estimate of the noiseless image.

        x: B x C x H x W, image plus noise of standard deviation sigma; sigma: B or a number; label: B.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in self.preconditioning(sigma))
        # the sinusoidal embedding distinguishes times of the order of 1000; c_noise is of the order of 1
        F_x = self.guided(c_in * x, label, 1000 * c_noise.flatten(), guidance_scale).to(x.dtype)
        return c_skip * x + c_out * F_x

    # ---- training

    def draw_times(self, n, generator=None, device=None):
        """n times, float: the number of a stratum plus a place inside it, from 0 to 1."""
        return self._inside(super().draw_times(n, generator, device), generator)

    def _inside(self, t, generator=None):
        t = t + torch.rand(t.shape, generator=generator, device=t.device)
        return t.clamp(self.timesteps * 2 ** -23, self.timesteps * (1 - 2 ** -23))  # 0 and T are infinitely far out

    def noise_level(self, t):
        """sigma, B, at the times t: floats as `draw_times` gives, or a stratum's number (long), which means its middle."""
        if not t.is_floating_point():
            return self.sigmas.gather(0, t)
        normal = 2 ** 0.5 * torch.erfinv(2 * t / self.timesteps - 1)  # the normal distribution's quantile
        return torch.exp(self.P_mean + self.P_std * normal)

    def compute_loss(self, x_start, label, t, noise=None, drop=None, encoded=False, return_each=False):
        """Eq. 2 weighted by lambda(sigma) = 1 / c_out^2. A scalar; see Diffusion.compute_loss for the arguments.

        Without `noise`, the place inside the strata t is drawn too.
        """
        if self.use_vae and not encoded:
            x_start = self.encode(x_start)
        if self.label_dropout > 0:
            label = self.hide_labels(label, drop)
        if noise is None:
            noise = torch.randn_like(x_start)
            t = t if t.is_floating_point() else self._inside(t)

        sigma = self.noise_level(t)
        D_x = self.denoise(x_start + sigma[:, None, None, None] * noise, sigma, label)
        weight = (sigma ** 2 + self.sigma_data ** 2) / (sigma * self.sigma_data) ** 2
        each = weight * (D_x - x_start).pow(2).flatten(1).mean(1)  # B
        return (each.mean(), each) if return_each else each.mean()

    # ---- sampling: `sample` (in diffusion.py) goes from sigma_max down to 0

    def p_sample_loop(self, labels, **options):
        """Draw one image per label by Heun's method, Algorithm 1: B -> B x C x H x W in [0, 1]. Options: of `sample`."""
        return self.sample(labels, **options)
