"""What DDPM and EDM share: the UNet, the optional autoencoder, the loss's and the samplers' frame."""

import torch
from torch import nn

from .common.errors import UsageError
from .samplers import SOLVERS, Plan, ddim_timesteps, default_steps, draw_noise, karras_sigmas, nearest
from .tiny_autoencoder import DOWNSCALE, TAESD, in_parts
from .unet import UNet


class Diffusion(nn.Module):
    """A conditional diffusion model of images, or with `use_vae` of an autoencoder's latents.

    Args:
        img_shape: (C, H, W) of the image. With `use_vae` the attribute `.img_shape` becomes the latent's.
        timesteps: number of noise levels that training draws from; t = 0 is the least noise.
        dim, context_dim, num_classes, dim_mults, attn_levels: see UNet.
        use_vae: images in [0, 1] go through TAESD; without it images are in [-1, 1].
        vae_encoder_weights, vae_decoder_weights: files of TAESD's weights; None keeps random ones.
        label_dropout: chance that training hides an image's label, so that sampling can be guided.
        unet_options: further keyword arguments of UNet.

    A subclass says how a noise level disturbs an image (`losses`), what the image under it is (`denoise`) and which
    noise levels there are (`sigma_range`).
    """

    # name -> method(x, labels, plan, generator, callback) that takes standard normal x to x_0, in the model's space
    SAMPLERS = dict.fromkeys(SOLVERS, "solve")

    def __init__(self, img_shape=(3, 32, 32), timesteps=100, dim=64, context_dim=64, num_classes=10,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), use_vae=False, vae_encoder_weights=None,
                 vae_decoder_weights=None, label_dropout=0.0, **unet_options):
        super().__init__()
        self.timesteps = timesteps
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.use_vae = use_vae
        self.vae = TAESD(vae_encoder_weights, vae_decoder_weights) if use_vae else None
        self.img_shape = TAESD.latent_shape(img_shape) if use_vae else tuple(img_shape)
        self.model = UNet(
            dim, context_dim, num_classes, in_channels=self.img_shape[0], dim_mults=dim_mults,
            attn_levels=attn_levels, null_label=label_dropout > 0, **unet_options,
        )
        self.model.check_size(*self.img_shape[1:], scale=DOWNSCALE if use_vae else 1)

    # ---- the autoencoder is a tool, not a part: never trained, never saved

    def train(self, mode=True):
        super().train(mode)
        if self.vae is not None:
            self.vae.eval()
        return self

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for key in [k for k in state if k.startswith("vae.")]:
            del state[key]
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        vae, self.vae = self.vae, None
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self.vae = vae

    @torch.no_grad()
    def encode(self, images):
        """B x 3 x H x W in [0, 1] -> latents B x 4 x H/8 x W/8; pixels pass as they are."""
        if not self.use_vae:
            return images
        with torch.autocast(images.device.type, enabled=False):  # what is learnt from is not rounded
            return in_parts(self.vae.encoder, images.to(next(self.vae.parameters()).dtype))

    @torch.no_grad()
    def postprocess(self, x):
        """What the reverse process ends with -> images in [0, 1], decoded when `use_vae`."""
        if self.use_vae:
            return in_parts(self.vae.decoder, x).clamp(0, 1)
        return ((x + 1) / 2).clamp(0, 1)

    # ---- training

    def losses(self, x_start, label, t, noise):
        """B x ..., B, B, B x ... -> B weighted squared errors, each the mean over one image's values."""
        raise NotImplementedError

    def forward(self, x_start, label, t, noise=None, drop=None, encoded=False):
        """Loss of each image, B; `compute_loss` is its mean and explains the arguments."""
        if not encoded:
            x_start = self.encode(x_start)
        if noise is None:
            noise = torch.randn_like(x_start)
        if self.label_dropout > 0:
            if drop is None:
                drop = torch.rand(label.shape, device=label.device) < self.label_dropout * self.training
            label = torch.where(drop, self.num_classes, label)
        return self.losses(x_start, label, t, noise)

    def compute_loss(self, x_start, label, t, noise=None, drop=None, encoded=False):
        """The training loss, a scalar.

        Args:
            x_start: B x C x H x W images: in [-1, 1], or in [0, 1] with `use_vae`.
            label: B, long.
            t: B, long, 0 to timesteps - 1: the noise level.
            noise: like x_start (with `use_vae` like its latents), standard normal; None draws it.
            drop: B, bool: whose label is hidden; None draws it with chance `label_dropout` in training mode.
            encoded: x_start holds latents already.
        """
        return self(x_start, label, t, noise, drop, encoded).mean()

    # ---- sampling

    @property
    def sigma_range(self):
        """(sigma_min, sigma_max, rho) of karras_sigmas."""
        raise NotImplementedError

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        """D(x; sigma), B x C x H x W: the image under noise of standard deviation sigma (B, or a number)."""
        raise NotImplementedError

    def guided(self, x, label, time, guidance_scale=1.0):
        """The network's output, pushed away from what it says without a label.

        Classifier-free guidance, Ho & Salimans 2022 eq. 6 with guidance_scale = 1 + w:
        1 is the plain conditional model, 0 the unconditional one. Both branches go in one call.
        """
        if guidance_scale == 1.0:
            return self.model(x, label, time)
        self.check_guidance(guidance_scale)
        null = torch.full_like(label, self.num_classes)
        both = self.model(x.repeat(2, 1, 1, 1), torch.cat([label, null]), time.repeat(2))
        cond, uncond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def check_guidance(self, guidance_scale):
        """Raise UsageError unless the model can be guided by this."""
        if guidance_scale != 1.0 and self.label_dropout == 0:
            raise UsageError(
                f"guidance_scale: {guidance_scale} needs a model that was trained with model.label_dropout > 0; "
                "for this one only 1.0 works"
            )

    def check_labels(self, labels):
        """Raise UsageError unless all labels are classes that the model knows."""
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < self.num_classes):
            wrong = next(int(k) for k in labels if not 0 <= int(k) < self.num_classes)
            raise UsageError(f"label {wrong} is outside the model's classes 0 to {self.num_classes - 1}")

    def plan(self, sampler=None, steps=None, guidance_scale=1.0, clip=False, guidance_interval=None, **options):
        """What `sample` takes, checked before anything is drawn: a samplers.Plan. Raises `sample`'s UsageErrors."""
        sampler = sampler or next(iter(self.SAMPLERS))
        if sampler not in self.SAMPLERS:
            raise UsageError(f"sampler: unknown {sampler!r}; {type(self).__name__} has {', '.join(self.SAMPLERS)}"
                             + nearest(sampler, self.SAMPLERS))
        if steps is None:
            steps = default_steps(sampler, self.timesteps) or self.timesteps
        if sampler == "ddpm" and steps != self.timesteps:
            raise UsageError(f"steps: ddpm always takes all {self.timesteps}, not {steps}; ddim takes fewer")
        if sampler == "ddim":
            ddim_timesteps(self.timesteps, steps)
        if steps < 1:
            raise UsageError(f"steps: {steps} is too few; 1 is the least")
        if sampler in SOLVERS and self.sigma_range[0] >= self.sigma_range[1]:
            raise UsageError(f"sampler: {sampler} needs more than the one noise level that this model has")
        if clip and self.use_vae:
            raise UsageError("clip: only pixels lie in [-1, 1]; this is a model of latents")
        self.check_guidance(guidance_scale)
        return Plan(sampler, steps, guidance_scale, guidance_interval, clip, options)

    def network_calls(self, *args, **options):
        """How often the network sees one image while `sample` draws it with this `plan`; twice in a guided step."""
        plan, levels = self.plan(*args, **options), []
        if plan.sampler in SOLVERS:
            # the solver itself counts, on a number
            SOLVERS[plan.sampler](lambda x, sigma: levels.append(sigma) or x, torch.zeros(1), self._sigmas(plan),
                                  generator=lambda step, shape: torch.zeros(shape), **plan.options)
        else:
            timesteps = ddim_timesteps(self.timesteps, plan.steps, plan.options.get("spacing", "uniform"))
            levels = self.sigmas[timesteps].tolist()
        return sum(1 if plan.scale(sigma) == 1 else 2 for sigma in levels)

    def _sigmas(self, plan):
        return karras_sigmas(plan.steps, *self.sigma_range)

    def scale_noise(self, x, sigma_max):
        """Where a solver starts, from standard normal x."""
        return sigma_max * x

    def solve(self, x, labels, plan, generator=None, callback=None):
        """One of SOLVERS from standard normal x to x_0."""
        sigmas = self._sigmas(plan)

        def denoise(x, sigma):
            D = self.denoise(x, sigma, labels, plan.scale(sigma))
            return D.clamp(-1, 1) if plan.clip else D

        def say(step, steps, x):
            if callback:
                callback(step, steps, x / (1 + float(sigmas[step]) ** 2) ** 0.5)

        return SOLVERS[plan.sampler](denoise, self.scale_noise(x, float(sigmas[0])), sigmas, say, generator,
                                     **plan.options)

    @torch.no_grad()
    def sample(self, labels, sampler=None, steps=None, guidance_scale=1.0, noise=None, generator=None,
               callback=None, **options):
        """Draw one image per label: B -> B x C x H x W in [0, 1].

        Args:
            labels: B, long.
            sampler: a key of `SAMPLERS`; None takes the class's first.
            steps: number of sampler steps; None takes the sampler's default (samplers.DEFAULT_STEPS).
            guidance_scale: see `guided`.
            noise: B x *img_shape, standard normal: where the reverse process starts; None draws it.
            generator: source of all randomness; None is torch's global one. A function (step, shape) -> noise
                such as samplers.image_generator lets each image have its own.
            callback: called as callback(step, steps, x) after every step. Its x is the state in DDPM's scaling,
                sqrt(abar) x_0 + sqrt(1 - abar) noise, whatever the sampler's.
            guidance_interval: (sigma_lo, sigma_hi): guide only at noise levels sigma_lo < sigma <= sigma_hi, elsewhere
                the network is called without the second branch; None guides everywhere.
            clip: keep the predicted image in [-1, 1] in every step; not for latents.
            options: the sampler's own, see samplers.OPTIONS.

        Raises:
            UsageError: unknown sampler or option, a value out of range, label outside the classes, guidance of a
                model trained without label dropout.
        """
        plan = self.plan(sampler, steps, guidance_scale, **options)
        self.check_labels(labels)
        like = next(self.buffers())
        labels = labels.to(like.device)
        if noise is None:
            noise = draw_noise(generator, 0, like.new_empty(len(labels), *self.img_shape))
        x = getattr(self, self.SAMPLERS[plan.sampler])(noise.to(like), labels, plan, generator, callback)
        return self.postprocess(x)
