"""Denoising diffusion implicit models: Song et al. 2020 (arXiv 2010.02502).

The network, its training and its checkpoints are DDPM's; only the way back is another: deterministic,
over a few of the timesteps. Equation numbers are Song et al.'s, whose alpha is our `alphas_cumprod`.
"""

import copy

import torch

from .ddpm import DDPM
from .errors import UsageError


class DDIM(DDPM):
    """A DDPM that samples by DDIM."""

    SAMPLERS = {"ddim": "ddim", "ddpm": "ancestral"}
    DEFAULT_STEPS = 50

    @classmethod
    def from_ddpm(cls, ddpm):
        """A DDIM that shares network and tables with `ddpm`; nothing is copied."""
        ddim = copy.copy(ddpm)
        ddim.__class__ = cls
        return ddim

    def ddim_timesteps(self, steps):
        """`steps` of the timesteps, evenly spaced, from T - 1 down to 0: a list of ints.

        Both ends are in it (one step: T - 1 alone), so that the first is pure noise as in training.
        """
        if not 1 <= steps <= self.timesteps:
            raise UsageError(f"steps: {steps} is not between 1 and the model's {self.timesteps} timesteps")
        if steps == 1:
            return [self.timesteps - 1]
        return [round(i * (self.timesteps - 1) / (steps - 1)) for i in reversed(range(steps))]

    @torch.no_grad()
    def p_sample(self, x, label, t, t_index, guidance_scale=1.0, generator=None, t_next=None):
        """One DDIM step, eq. 12 with sigma = 0: from timestep t to t_next, B x C x H x W.

        t_next: int, -1 means the image itself (abar = 1); None means t_index - 1.
        """
        t_next = t_index - 1 if t_next is None else t_next
        eps, x0 = self.predict(x, label, t, guidance_scale)
        abar = self.alphas_cumprod[t_next] if t_next >= 0 else self.alphas_cumprod.new_ones(())
        # "predicted x_0", then "direction pointing to x_t"
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def ddim(self, x, labels, steps=None, guidance_scale=1.0, generator=None, callback=None):
        """From x_T = x down to x_0 in `steps` network calls (default 50, or T if that is less)."""
        steps = min(self.DEFAULT_STEPS, self.timesteps) if steps is None else steps
        timesteps = self.ddim_timesteps(steps)
        for k, (i, i_next) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            x = self.p_sample(x, labels, t, i, guidance_scale, generator, t_next=i_next)
            if callback:
                callback(k + 1, steps, x)
        return x

    def ancestral(self, x, labels, *options, **more):
        """DDPM's Algorithm 2, with DDPM's steps in place of the ones above."""
        ddpm = copy.copy(self)
        ddpm.__class__ = DDPM
        return ddpm.ancestral(x, labels, *options, **more)

    def p_sample_loop(self, labels, **options):
        """Draw one image per label, B -> B x C x H x W in [0, 1]. Options: `steps` and those of `sample`."""
        return self.sample(labels, "ddim", **options)
