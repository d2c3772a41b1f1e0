"""Denoising diffusion probabilistic models: Ho et al. 2020 (arXiv 2006.11239).

In pixels, or in an autoencoder's latents (Rombach et al. 2022). Equation numbers are Ho et al.'s;
abar is their alpha-bar, `alphas_cumprod` here. t = 0 is one step of noise (the paper counts from 1).
"""

import torch

from .diffusion import Diffusion
from .common.errors import UsageError
from .samplers import ddim_step, ddim_timesteps, draw_noise

PREDICTIONS = ("eps", "v", "x0")


# ---- noise schedules: T betas, float64

def linear_beta_schedule(timesteps):
    """Ho et al., Section 4: beta from 1e-4 to 0.02, evenly spaced."""
    return torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)


def quadratic_beta_schedule(timesteps):
    """Stable Diffusion's: sqrt(beta) evenly spaced, beta from 0.00085 to 0.012."""
    return torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, timesteps, dtype=torch.float64) ** 2


def cosine_beta_schedule(timesteps, s=0.008):
    """Nichol & Dhariwal 2021, eq. 17: abar follows a squared cosine; beta at most 0.999."""
    x = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    abar = torch.cos((x + s) / (1 + s) * torch.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_beta_schedule, "quadratic": quadratic_beta_schedule, "cosine": cosine_beta_schedule}


class DDPM(Diffusion):
    """DDPM, or latent diffusion with `use_vae`. See Diffusion for the arguments before these:

    Args:
        beta_schedule: "linear", "quadratic" or "cosine"; None takes the handout's, linear in pixels and
            quadratic in latents.
        scale_betas: multiply the betas by 1000 / timesteps, so that fewer steps still end in noise.
        prediction: what the network says: the noise "eps" (eq. 14), "x0", or "v" = sqrt(abar) eps -
            sqrt(1 - abar) x0 (Salimans & Ho 2022).
        min_snr_gamma: cap the loss's weight in x0 at this signal-to-noise ratio (Hang et al. 2023); None
            is the plain squared error of `prediction`.
    """

    SAMPLERS = {"ddpm": "ancestral", "ddim": "ddim", **Diffusion.SAMPLERS}

    def __init__(self, img_shape=(3, 32, 32), timesteps=100, dim=64, context_dim=64, num_classes=10,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), use_vae=False, vae_encoder_weights=None,
                 vae_decoder_weights=None, beta_schedule=None, scale_betas=False, prediction="eps",
                 min_snr_gamma=None, **options):
        super().__init__(img_shape, timesteps, dim, context_dim, num_classes, dim_mults, attn_levels,
                         use_vae, vae_encoder_weights, vae_decoder_weights, **options)
        if prediction not in PREDICTIONS:
            raise UsageError(f"model.prediction: {prediction!r} is none of {', '.join(PREDICTIONS)}")
        self.prediction = prediction

        # all tables in float64, stored in fp32
        beta_schedule = beta_schedule or ("quadratic" if use_vae else "linear")
        betas = SCHEDULES[beta_schedule](timesteps)
        if scale_betas:
            betas = (betas * 1000 / timesteps).clamp(max=0.999)
        alphas = 1 - betas
        abar = alphas.cumprod(0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        snr = abar / (1 - abar)
        tables = {
            "betas": betas,
            "alphas_cumprod": abar,
            # q(x_t | x_0), eq. 4
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            # p(x_{t-1} | x_t), eq. 11 and 7
            "sqrt_recip_alphas": (1 / alphas).sqrt(),
            "posterior_variance": betas * (1 - abar_prev) / (1 - abar),
            "loss_weight": self._loss_weight(snr, min_snr_gamma),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())

    def _loss_weight(self, snr, gamma):
        if gamma is None:
            return torch.ones_like(snr)
        # an error in eps or v, times this, is the same error in x0
        in_x0 = {"x0": torch.ones_like(snr), "eps": 1 / snr, "v": 1 / (snr + 1)}[self.prediction]
        return snr.clamp(max=gamma) * in_x0

    @staticmethod
    def _extract(table, t, x):
        """table[t], shaped to multiply x: B -> B x 1 x 1 x 1. A gather on the device, no sync."""
        return table.gather(0, t).reshape(-1, *[1] * (x.dim() - 1))

    # ---- forward process

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t given x_0, eq. 4: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

        x_start: B x C x H x W, t: B (long, 0 means one step of noise) -> B x C x H x W.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        return (self._extract(self.sqrt_alphas_cumprod, t, x_start) * x_start
                + self._extract(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise)

    # ---- eps, v and x0 tell the same: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, v as above

    def predict_start_from_noise(self, x_t, t, eps):
        """x0 from x_t and eps."""
        a, s = self._signal_noise(x_t, t)
        return (x_t - s * eps) / a

    def predict_noise_from_start(self, x_t, t, x0):
        """eps from x_t and x0."""
        a, s = self._signal_noise(x_t, t)
        return (x_t - a * x0) / s

    def predict_v(self, x0, t, eps):
        """v from x0 and eps."""
        a, s = self._signal_noise(x0, t)
        return a * eps - s * x0

    def predict_start_from_v(self, x_t, t, v):
        """x0 from x_t and v."""
        a, s = self._signal_noise(x_t, t)
        return a * x_t - s * v

    def predict_noise_from_v(self, x_t, t, v):
        """eps from x_t and v."""
        a, s = self._signal_noise(x_t, t)
        return s * x_t + a * v

    def _signal_noise(self, x, t):
        return (self._extract(self.sqrt_alphas_cumprod, t, x),
                self._extract(self.sqrt_one_minus_alphas_cumprod, t, x))

    # ---- training: `compute_loss` (in diffusion.py) draws what is not given and averages these

    def losses(self, x_start, label, t, noise):
        """Algorithm 1, lines 2 to 5, for each image: B."""
        x_t = self.q_sample(x_start, t, noise)
        out = self.model(x_t, label, t).to(x_t.dtype)
        if self.prediction == "eps":
            target = noise
        elif self.prediction == "v":
            target = self.predict_v(x_start, t, noise)
        else:
            target = x_start
        return self.loss_weight.gather(0, t) * (out - target).pow(2).flatten(1).mean(1)

    # ---- reverse process

    def predict(self, x, label, t, guidance_scale=1.0):
        """(eps, x0) as the network sees them in x_t; each B x C x H x W, in the precision of x."""
        out = self.guided(x, label, t, guidance_scale).to(x.dtype)
        if self.prediction == "eps":
            return out, self.predict_start_from_noise(x, t, out)
        if self.prediction == "v":
            return self.predict_noise_from_v(x, t, out), self.predict_start_from_v(x, t, out)
        return self.predict_noise_from_start(x, t, out), out

    def predict_clipped(self, x, label, t, guidance_scale=1.0):
        """The same, x0 kept in [-1, 1], where pixels are, and the eps that belongs to it."""
        x0 = self.predict(x, label, t, guidance_scale)[1].clamp(-1, 1)
        return self.predict_noise_from_start(x, t, x0), x0

    @torch.no_grad()
    def p_sample(self, x, label, t, t_index, guidance_scale=1.0, generator=None, clip=False):
        """One step of Algorithm 2: draw x_{t-1} given x_t.

        x: B x C x H x W, label: B, t: B (long, all equal to t_index), t_index: int.
        The mean is eq. 11, the variance beta-tilde of eq. 7; no noise at t_index 0.
        generator: see samplers.draw_noise; clip: use `predict_clipped`, which is not in Algorithm 2.
        """
        eps, _ = (self.predict_clipped if clip else self.predict)(x, label, t, guidance_scale)
        beta = self._extract(self.betas, t, x)
        mean = self._extract(self.sqrt_recip_alphas, t, x) * (
            x - beta / self._extract(self.sqrt_one_minus_alphas_cumprod, t, x) * eps
        )
        if t_index == 0:
            return mean
        noise = draw_noise(generator, self.timesteps - t_index, x)
        return mean + self._extract(self.posterior_variance, t, x).sqrt() * noise

    def ancestral(self, x, labels, plan, generator=None, callback=None, step=None):
        """Algorithm 2 from x_T = x down to x_0, in the model's space. step: in place of `p_sample`."""
        step = step or self.p_sample
        options = {"clip": True} if plan.clip else {}
        sigmas = self.sigmas.tolist()
        for i in reversed(range(self.timesteps)):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            x = step(x, labels, t, i, plan.scale(sigmas[i]), generator, **options)
            if callback:
                callback(self.timesteps - i, self.timesteps, x)
        return x

    def ddim_step(self, x, label, t, t_index, t_next, guidance_scale=1.0, generator=None, eta=0.0, clip=False):
        """One DDIM step (Song et al. 2020, see samplers.ddim_step) from t_index to t_next, -1 being the image."""
        eps, x0 = (self.predict_clipped if clip else self.predict)(x, label, t, guidance_scale)
        level, level_next = ((self.sqrt_alphas_cumprod[i], self.sqrt_one_minus_alphas_cumprod[i]) if i >= 0
                             else (1.0, 0.0) for i in (t_index, t_next))
        noise = draw_noise(generator, self.timesteps - t_index, x) if eta > 0 and t_next >= 0 else None
        return ddim_step(x0, eps, level, level_next, eta, noise)

    def ddim(self, x, labels, plan, generator=None, callback=None):
        """DDIM from x_T = x down to x_0: the same network, tens of calls instead of `timesteps`."""
        timesteps = ddim_timesteps(self.timesteps, plan.steps, plan.options.get("spacing", "uniform"))
        sigmas = self.sigmas.tolist()
        for k, (i, i_next) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            x = self.ddim_step(x, labels, t, i, i_next, plan.scale(sigmas[i]), generator,
                               plan.options.get("eta", 0.0), plan.clip)
            if callback:
                callback(k + 1, plan.steps, x)
        return x

    # ---- the same model as a denoiser, for every solver of samplers.py

    @property
    def sigmas(self):
        """Noise level of each timestep, T, where the image has scale 1: x_t / sqrt(abar) = x_0 + sigma * noise."""
        return self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod

    @property
    def sigma_range(self):
        sigmas = self.sigmas
        return float(sigmas[0]), float(sigmas[-1]), 7.0

    def scale_noise(self, x, sigma_max):
        """x_T = x, scaled as the solvers have it: by 1 / sqrt(abar)."""
        return (1 + sigma_max ** 2) ** 0.5 * x

    def sigma_to_time(self, sigma):
        """The timestep with this noise level, B -> B: fractional, by interpolation in log sigma; at most T - 1."""
        if self.timesteps == 1:
            return torch.zeros_like(sigma)
        table = self.sigmas.log().to(sigma.dtype)
        log_sigma = sigma.log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, log_sigma).clamp(1, self.timesteps - 1)
        lo, hi = table[above - 1], table[above]
        return above - 1 + (log_sigma - lo) / (hi - lo)

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        """D(x; sigma) as in EDM: the estimate of the noiseless image.

        x: B x C x H x W, image plus noise of standard deviation sigma; sigma: B or a number; label: B.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        time = self.sigma_to_time(sigma)
        sigma = sigma[:, None, None, None]
        scale = (1 + sigma ** 2).sqrt()  # 1 / sqrt(abar)
        out = self.guided(x / scale, label, time, guidance_scale).to(x.dtype)
        if self.prediction == "eps":
            return x - sigma * out
        if self.prediction == "v":
            return x / scale ** 2 - sigma / scale * out
        return out

    def p_sample_loop(self, labels, **options):
        """Algorithm 2: draw one image per label, B -> B x C x H x W in [0, 1].

        Options: `guidance_scale`, `noise`, `generator`, `callback`, see `sample`.
        """
        return self.sample(labels, "ddpm", **options)
