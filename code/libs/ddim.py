"""Denoising diffusion implicit models: Song et al. 2020 (arXiv 2010.02502). Equation numbers are theirs; their alpha_t is
alpha-bar of Ho et al., abar here.

The network, its training and its checkpoints are DDPM's; only the reverse process differs: it visits a few of the
timesteps, and adds no noise unless `eta` asks for it.
"""

import torch

from .common.errors import UsageError
from .ddpm import DDPM
from .samplers import draw_noise, guidance_at


def ddim_timesteps(timesteps, steps, spacing="uniform"):
    """`steps` of the timesteps T - 1, ..., 0, the noisiest first: a list of ints, no two the same.

    spacing: "uniform", or "quadratic", which is denser near 0 (Section 4.4 and Appendix D.2). Both ends are included;
    one step is T - 1 alone. Raises UsageError unless 1 <= steps <= timesteps.
    """
    if not 1 <= steps <= timesteps:
        raise UsageError(f"steps: {steps} is not possible; ddim takes 1 and more, at most model.timesteps, {timesteps}")
    if steps == 1:
        return [timesteps - 1]
    power = {"uniform": 1, "quadratic": 2}[spacing]
    # max: where squares lie less than 1 apart, every timestep is taken
    return [max(i, round((timesteps - 1) * i ** power / (steps - 1) ** power)) for i in reversed(range(steps))]


def ddim_step(x0, eps, level, level_next, eta=0.0, noise=None):
    """Eq. 12: from the network's prediction in x_t to x at the next noise level.

    level, level_next: (sqrt(abar), sqrt(1 - abar)) now and next; the image itself has (1, 0).
    eta: share of eq. 16's noise, 0 to 1; at 1 between neighbours its variance is beta-tilde (Ho et al. eq. 7).
    """
    (a, s), (a_next, s_next) = level, level_next
    # eq. 16's sigma^2 is s_next^2 times this; written without a difference of two nearly equal numbers
    fresh = eta ** 2 * (1 - (s_next / a_next * a / s) ** 2)
    x = a_next * x0 + s_next * (1 - fresh) ** 0.5 * eps  # "predicted x_0", "direction pointing to x_t"
    return x if noise is None else x + s_next * fresh ** 0.5 * noise  # "random noise"


class DDIM(DDPM):
    """A DDPM that samples by DDIM."""

    @classmethod
    def from_ddpm(cls, ddpm):
        """A DDIM that shares network and tables with `ddpm`; nothing is copied."""
        ddim = cls.__new__(cls)
        vars(ddim).update(vars(ddpm))
        return ddim

    @torch.no_grad()
    def p_sample(self, x, label, t, t_index, guidance_scale=1.0, generator=None, clip=False, t_next=None, eta=0.0):
        """One DDIM step, eq. 12: from timestep t (B, all equal to t_index) to t_next, B x C x H x W.

        t_next: int, -1 means the image itself (abar = 1); None means t_index - 1.
        eta, generator: noise, see ddim_step and samplers.draw_noise; clip: see DDPM.predict.
        """
        t_next = t_index - 1 if t_next is None else t_next
        eps, x0 = self.predict(x, label, t, guidance_scale, clip)
        level, level_next = ((self.sqrt_alphas_cumprod[i], self.sqrt_one_minus_alphas_cumprod[i]) if i >= 0
                             else (1.0, 0.0) for i in (t_index, t_next))
        noise = draw_noise(generator, self.timesteps - t_index, x) if eta > 0 and t_next >= 0 else None
        return ddim_step(x0, eps, level, level_next, eta, noise)

    @torch.no_grad()
    def p_sample_loop(self, labels, steps=50, spacing="uniform", noise=None, guidance_interval=None, callback=None,
                      **given):
        """Draw one image per label in `steps` network calls: B -> B x C x H x W in [0, 1].

        steps, spacing: see `ddim_timesteps`. given: guidance_scale, generator, clip and eta of `p_sample`.
        noise, guidance_interval, callback: see Diffusion.sample.
        """
        scale = given.get("guidance_scale", 1.0)
        self.check_guidance(scale)
        labels, x = self.start(labels, noise, given.get("generator"))
        timesteps = ddim_timesteps(self.timesteps, steps, spacing)
        for k, (i, i_next) in enumerate(zip(timesteps, timesteps[1:] + [-1])):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            if guidance_interval:
                given["guidance_scale"] = guidance_at(float(self.sigmas[i]), scale, guidance_interval)
            x = self.p_sample(x, labels, t, i, t_next=i_next, **given)
            if callback:
                callback(k + 1, steps, x)
        return self.postprocess(x)
