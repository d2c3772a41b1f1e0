"""Denoising diffusion probabilistic models: Ho et al. 2020 (arXiv 2006.11239).

In pixels, or in an autoencoder's latents (Rombach et al. 2022). Equation numbers are Ho et al.'s;
abar is their alpha-bar, `alphas_cumprod` here. t = 0 is one step of noise (the paper counts from 1).
"""

import warnings

import torch

from .diffusion import Diffusion
from .common.errors import UsageError
from .samplers import draw_noise, guidance_at


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
PREDICTIONS = ("eps", "v", "x0")
SIGMA_MAX = 160.0  # where solvers start at most: Ho et al.'s schedule ends at 157, the cosine at 20,000


class DDPM(Diffusion):
    """DDPM, or latent diffusion with `use_vae`. See Diffusion for the arguments before these:

    Args:
        beta_schedule: "linear", "quadratic" or "cosine"; None takes the handout's, linear in pixels and
            quadratic in latents.
        prediction: what the network predicts: the noise "eps" (eq. 14), "x0", or "v" = sqrt(abar) eps -
            sqrt(1 - abar) x0 (Salimans & Ho 2022).
    """

    linear_beta_schedule = staticmethod(linear_beta_schedule)
    quadratic_beta_schedule = staticmethod(quadratic_beta_schedule)

    def __init__(self, img_shape=(3, 32, 32), timesteps=1000, dim=64, context_dim=64, num_classes=10,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), use_vae=False, vae_encoder_weights=None,
                 vae_decoder_weights=None, beta_schedule=None, prediction="eps", **options):
        super().__init__(img_shape, timesteps, dim, context_dim, num_classes, dim_mults, attn_levels,
                         use_vae, vae_encoder_weights, vae_decoder_weights, **options)
        if prediction not in PREDICTIONS:
            raise UsageError(f"model.prediction: {prediction!r} is none of {', '.join(PREDICTIONS)}")
        self.prediction = prediction

        # all tables in float64, stored in fp32
        betas = SCHEDULES[beta_schedule or ("quadratic" if use_vae else "linear")](timesteps)
        alphas = 1 - betas
        abar = alphas.cumprod(0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        tables = {
            "betas": betas,
            "alphas_cumprod": abar,
            # q(x_t | x_0), eq. 4
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
            # p(x_{t-1} | x_t), eq. 11 and 7
            "sqrt_recip_alphas": (1 / alphas).sqrt(),
            "posterior_variance": betas * (1 - abar_prev) / (1 - abar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float())
        self._check_end(float(self.sqrt_alphas_cumprod[-1]))

    def _check_end(self, signal):
        """Raise UsageError, or warn, unless the schedule ends at noise from which an image can be computed.

        signal: sqrt(abar) at the last timestep, the share of the image that is left.
        """
        ends = f"model.timesteps: with {self.timesteps}, the noise schedule ends at sqrt(abar) = {signal:.2g}"
        if signal < (1e-4 if self.prediction == "eps" else 1e-12):  # an image computed from eps has its error / signal
            raise UsageError(f"{ends}, from where no image can be computed; take fewer, or model.prediction v")
        if signal > 0.1:
            warnings.warn(f"{ends}, but sampling starts from pure noise, which training then never sees; take more",
                          stacklevel=3)

    @staticmethod
    def _extract(table, t, x_shape):
        """table[t], shaped to multiply a batch of shape x_shape: B -> B x 1 x 1 x 1. A gather on the device, no sync."""
        return table.gather(0, t).reshape(-1, *[1] * (len(x_shape) - 1))

    # ---- forward process and loss

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t given x_0, eq. 4: sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.

        x_start: B x C x H x W, t: B (long, 0 means one step of noise) -> B x C x H x W.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        return (self._extract(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
                + self._extract(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise)

    def compute_loss(self, x_start, label, t, noise=None, drop=None, encoded=False, return_each=False):
        """Algorithm 1, lines 2 to 5: the mean squared error of the predicted noise, eq. 14. A scalar.

        What train.py minimises; see Diffusion.compute_loss for the arguments.
        """
        if self.use_vae and not encoded:
            x_start = self.encode(x_start)  # latent diffusion: everything below happens in latents
        if self.label_dropout > 0:
            label = self.hide_labels(label, drop)
        if noise is None:
            noise = torch.randn_like(x_start)

        x_t = self.q_sample(x_start, t, noise)
        predicted = self.model(x_t, label, t).to(x_t.dtype)  # eps_theta(x_t, c, t)
        if self.prediction == "eps":
            target = noise
        elif self.prediction == "v":
            target = self.predict_v(x_start, t, noise)
        else:
            target = x_start
        each = (predicted - target).pow(2).flatten(1).mean(1)  # B
        return (each.mean(), each) if return_each else each.mean()

    # ---- eps, v and x0 are equivalent: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, v as above

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
        return (self._extract(self.sqrt_alphas_cumprod, t, x.shape),
                self._extract(self.sqrt_one_minus_alphas_cumprod, t, x.shape))

    # ---- reverse process

    def predict(self, x, label, t, guidance_scale=1.0, clip=False):
        """(eps, x0) that the network predicts from x_t; each B x C x H x W, in the precision of x.

        clip: keep x0 in [-1, 1], where pixels are, and return the eps that belongs to it.
        """
        out = self.guided(x, label, t, guidance_scale).to(x.dtype)
        if self.prediction == "eps":
            eps, x0 = out, self.predict_start_from_noise(x, t, out)
        elif self.prediction == "v":
            eps, x0 = self.predict_noise_from_v(x, t, out), self.predict_start_from_v(x, t, out)
        else:
            eps, x0 = self.predict_noise_from_start(x, t, out), out
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = self.predict_noise_from_start(x, t, x0)
        return eps, x0

    @torch.no_grad()
    def p_sample(self, x, label, t, t_index, guidance_scale=1.0, generator=None, clip=False):
        """One step of Algorithm 2: draw x_{t-1} given x_t.

        x: B x C x H x W, label: B, t: B (long, all equal to t_index), t_index: int.
        The mean is eq. 11, the variance beta-tilde of eq. 7; no noise at t_index 0.
        generator: see samplers.draw_noise; clip: see `predict`, not part of Algorithm 2.
        """
        eps, _ = self.predict(x, label, t, guidance_scale, clip)  # eps_theta(x_t, t)
        beta = self._extract(self.betas, t, x.shape)
        mean = self._extract(self.sqrt_recip_alphas, t, x.shape) * (
            x - beta / self._extract(self.sqrt_one_minus_alphas_cumprod, t, x.shape) * eps
        )
        if t_index == 0:
            return mean
        noise = draw_noise(generator, self.timesteps - t_index, x)  # draw number 1, 2, ...; number 0 was x_T
        return mean + self._extract(self.posterior_variance, t, x.shape).sqrt() * noise

    @torch.no_grad()
    def p_sample_loop(self, labels, noise=None, guidance_interval=None, callback=None, **given):
        """Algorithm 2: draw one image per label, B -> B x C x H x W in [0, 1], decoded when `use_vae`.

        noise, guidance_interval, callback: see Diffusion.sample. given: guidance_scale, generator and clip of
        `p_sample`, passed on only where they are given here: a subclass may override p_sample(x, label, t, t_index).
        """
        scale = given.get("guidance_scale", 1.0)
        self.check_guidance(scale)
        labels, x = self.start(labels, noise, given.get("generator"))
        for i in reversed(range(self.timesteps)):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            if guidance_interval:
                given["guidance_scale"] = guidance_at(float(self.sigmas[i]), scale, guidance_interval)
            x = self.p_sample(x, labels, t, i, **given)
            if callback:
                callback(self.timesteps - i, self.timesteps, x)
        return self.postprocess(x)

    # ---- the same model as a denoiser, for every solver of samplers.py

    @property
    def sigmas(self):
        """Noise level of each timestep, T, where the image has scale 1: x_t / sqrt(abar) = x_0 + sigma * noise."""
        return self.sqrt_one_minus_alphas_cumprod / self.sqrt_alphas_cumprod

    @property
    def sigma_range(self):
        sigmas = self.sigmas
        return float(sigmas[0]), min(float(sigmas[-1]), SIGMA_MAX), 7.0

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
