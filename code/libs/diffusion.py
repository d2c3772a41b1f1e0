"""What all models share: the UNet, the optional autoencoder, guidance, and sampling by the solvers of samplers.py."""

import torch
from torch import nn

from .common.errors import UsageError
from .samplers import SOLVERS, draw_noise, guidance_at, karras_sigmas
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

    A subclass defines the training loss (`compute_loss`), the denoiser (`denoise`) and the range of noise levels
    (`sigma_range`).
    """

    def __init__(self, img_shape=(3, 32, 32), timesteps=1000, dim=64, context_dim=64, num_classes=10,
                 dim_mults=(1, 2, 4), attn_levels=(0, 1), use_vae=False, vae_encoder_weights=None,
                 vae_decoder_weights=None, label_dropout=0.0, **unet_options):
        super().__init__()
        self.timesteps = timesteps
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.dropout = unet_options.get("dropout", 0.0)
        self.use_vae = use_vae
        self.vae = TAESD(vae_encoder_weights, vae_decoder_weights) if use_vae else None
        self.guide = None  # a weaker model that `solve` leads away from
        self.img_shape = TAESD.latent_shape(img_shape) if use_vae else tuple(img_shape)
        self.model = UNet(
            dim, context_dim, num_classes, in_channels=self.img_shape[0], dim_mults=dim_mults,
            attn_levels=attn_levels, null_label=label_dropout > 0, **unet_options,
        )
        self.model.check_size(*self.img_shape[1:], scale=DOWNSCALE if use_vae else 1)

    # ---- autoencoder and guide are tools, not parts: never trained, never saved

    def train(self, mode=True):
        super().train(mode)
        for tool in filter(None, (self.vae, self.guide)):
            tool.eval()
        return self

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for key in [k for k in state if k.startswith(("vae.", "guide."))]:
            del state[key]
        return state

    def load_state_dict(self, state_dict, strict=True, assign=False):
        tools, self.vae, self.guide = (self.vae, self.guide), None, None
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self.vae, self.guide = tools

    @torch.no_grad()
    def encode(self, images):
        """B x 3 x H x W in [0, 1] -> latents B x 4 x H/8 x W/8; pixels pass as they are."""
        if not self.use_vae:
            return images
        with torch.autocast(images.device.type, enabled=False):  # the training targets are not rounded
            return in_parts(self.vae.encoder, images.to(next(self.vae.parameters()).dtype))

    @torch.no_grad()
    def postprocess(self, x):
        """The result of the reverse process -> images in [0, 1], decoded when `use_vae`."""
        if self.use_vae:
            return in_parts(self.vae.decoder, x).clamp(0, 1)
        return ((x + 1) / 2).clamp(0, 1)

    # ---- training

    def draw_times(self, n, generator=None, device=None):
        """The random times t of n images: n, long."""
        return torch.randint(self.timesteps, (n,), generator=generator, device=device)

    def compute_loss(self, x_start, label, t, noise=None, drop=None, encoded=False, return_each=False):
        """The training loss, a scalar.

        Args:
            x_start: B x C x H x W images: in [-1, 1], or in [0, 1] with `use_vae`.
            label: B, long.
            t: B, long, 0 to timesteps - 1: the noise level.
            noise: like x_start (with `use_vae` like its latents), standard normal; None draws it.
            drop: B, bool: whose label is hidden; None draws it with chance `label_dropout` in training mode.
            encoded: x_start holds latents already.
            return_each: return (loss, loss of each image, B).
        """
        raise NotImplementedError

    def forward(self, *args, **options):
        """`compute_loss`: DistributedDataParallel averages gradients of what is called as a module."""
        return self.compute_loss(*args, **options)

    def hide_labels(self, label, drop=None):
        """Labels with those in `drop` replaced by "no label", for classifier-free guidance (Ho & Salimans 2022)."""
        if drop is None:
            drop = torch.rand(label.shape, device=label.device) < self.label_dropout * self.training
        return torch.where(drop, self.num_classes, label)

    # ---- the denoiser

    sigma_range = None  # (sigma_min, sigma_max, rho) of karras_sigmas

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        """D(x; sigma), B x C x H x W: the image under noise of standard deviation sigma (B, or a number)."""
        raise NotImplementedError

    def guided(self, x, label, time, guidance_scale=1.0):
        """The network's output, pushed away from its output without a label.

        Classifier-free guidance, Ho & Salimans 2022 eq. 6 with guidance_scale = 1 + w:
        1 is the plain conditional model, 0 the unconditional one. Both branches go in one call.
        """
        if guidance_scale == 1.0:
            return self.model(x, label, time)
        null = torch.full_like(label, self.num_classes)
        both = self.model(x.repeat(2, 1, 1, 1), torch.cat([label, null]), time.repeat(2))
        cond, uncond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    # ---- sampling

    def check_guidance(self, guidance_scale):
        """Raise UsageError unless this scale works by the label alone: the loops of DDPM and DDIM use no `guide`."""
        if guidance_scale == 1.0:
            return
        if self.guide is not None:
            raise UsageError(f"guide: only {', '.join(SOLVERS)} take it, not ddpm and ddim")
        if self.label_dropout == 0:
            raise UsageError(
                f"guidance_scale: {guidance_scale} needs a model that was trained with model.label_dropout > 0; "
                "for this one only 1.0 works"
            )

    def check_labels(self, labels):
        """Raise UsageError unless all labels are classes that the model knows."""
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < self.num_classes):
            wrong = next(int(k) for k in labels if not 0 <= int(k) < self.num_classes)
            raise UsageError(f"label {wrong} is outside the model's classes 0 to {self.num_classes - 1}")

    def start(self, labels, noise=None, generator=None):
        """Where the reverse process begins: (labels on the model's device, standard normal noise B x *img_shape).

        noise: the same, if it is given; else `generator` draws it, see samplers.draw_noise.
        Raises UsageError for a label that is no class of the model.
        """
        self.check_labels(labels)
        like = next(self.buffers())
        if noise is None:
            noise = draw_noise(generator, 0, like.new_empty(len(labels), *self.img_shape))
        return labels.to(like.device), noise.to(like)

    def scale_noise(self, x, sigma_max):
        """Standard normal x -> where a solver starts."""
        return sigma_max * x

    def solve(self, x, label, solver, steps, guidance_scale=1.0, guidance_interval=None, clip=False, generator=None,
              callback=None, **options):
        """From standard normal x to x_0, in the model's space, by one of SOLVERS. See `sample` for the arguments."""
        sigmas = karras_sigmas(steps, *self.sigma_range)

        def denoise(x, sigma):
            scale = guidance_at(sigma, guidance_scale, guidance_interval)
            if self.guide is None or scale == 1:
                D = self.denoise(x, sigma, label, scale)
            else:  # autoguidance, Karras et al. 2024 (arXiv 2406.02507): on from where a weaker model would go
                D_guide = self.guide.denoise(x, sigma, label)
                D = D_guide + scale * (self.denoise(x, sigma, label) - D_guide)
            return D.clamp(-1, 1) if clip else D

        def report(step, steps, x):
            callback(step, steps, x / (1 + float(sigmas[step]) ** 2) ** 0.5)

        return SOLVERS[solver](denoise, self.scale_noise(x, float(sigmas[0])), sigmas, callback and report, generator,
                               **options)

    @torch.no_grad()
    def sample(self, labels, solver="heun", steps=18, noise=None, generator=None, **options):
        """Draw one image per label with a solver: B -> B x C x H x W in [0, 1].

        Args:
            labels: B, long.
            solver: a key of samplers.SOLVERS.
            steps: number of solver steps.
            noise: B x *img_shape, standard normal: where the reverse process starts; None draws it.
            generator: source of all randomness; None is torch's global one. A function (step, shape) -> noise
                such as samplers.image_generator lets each image have its own.
            guidance_scale: see `guided`; with a `guide`, away from what that one would draw.
            guidance_interval: (sigma_lo, sigma_hi): guide only where sigma_lo < sigma <= sigma_hi; None: always.
            clip: keep the predicted image in [-1, 1] in every step; not for latents.
            callback: called as callback(step, steps, x) after every step. Its x is the state in DDPM's scaling,
                sqrt(abar) x_0 + sqrt(1 - abar) noise, whatever the solver's.
            options: the solver's own.

        Raises UsageError for a label outside the classes, or guidance of a model that has no guide and was trained
        without label dropout.
        """
        if self.guide is None:
            self.check_guidance(options.get("guidance_scale", 1.0))
        labels, x = self.start(labels, noise, generator)
        return self.postprocess(self.solve(x, labels, solver, steps, generator=generator, **options))
