"""Denoising diffusion implicit models: Song et al. 2020 (arXiv 2010.02502).

The network, its training and its checkpoints are DDPM's; only the way back is another: over a few of the timesteps,
and without noise unless `eta` asks for it. The formulas are in samplers.py, `ddim_timesteps` and `ddim_step`.
"""

import torch

from .ddpm import DDPM
from .samplers import ddim_timesteps


class DDIM(DDPM):
    """A DDPM that samples by DDIM."""

    SAMPLERS = {"ddim": "ddim", **DDPM.SAMPLERS}

    @classmethod
    def from_ddpm(cls, ddpm):
        """A DDIM that shares network and tables with `ddpm`; nothing is copied."""
        ddim = cls.__new__(cls)
        vars(ddim).update(vars(ddpm))
        return ddim

    def ddim_timesteps(self, steps, spacing="uniform"):
        """The timesteps that `steps` steps visit, see samplers.ddim_timesteps."""
        return ddim_timesteps(self.timesteps, steps, spacing)

    @torch.no_grad()
    def p_sample(self, x, label, t, t_index, guidance_scale=1.0, generator=None, t_next=None, eta=0.0, clip=False):
        """One DDIM step, eq. 12: from timestep t (B, all equal to t_index) to t_next, B x C x H x W.

        t_next: int, -1 means the image itself (abar = 1); None means t_index - 1.
        eta, generator: noise, see samplers.ddim_step and draw_noise; clip: see DDPM.predict_clipped.
        """
        t_next = t_index - 1 if t_next is None else t_next
        return self.ddim_step(x, label, t, t_index, t_next, guidance_scale, generator, eta, clip)

    def ancestral(self, *args, **options):
        """DDPM's Algorithm 2, with DDPM's step in place of the one above."""
        return super().ancestral(*args, step=super().p_sample, **options)

    def p_sample_loop(self, labels, **options):
        """Draw one image per label, B -> B x C x H x W in [0, 1].

        Options: `steps`, `eta`, `spacing` ("uniform" or "quadratic") and those of `sample`.
        """
        return self.sample(labels, "ddim", **options)
