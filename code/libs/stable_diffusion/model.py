"""Stable Diffusion 1.x: prompt in, picture out, with the samplers of all models here."""

import torch
from torch import nn

from ..common.errors import RunError, UsageError
from ..ddpm import DDPM, quadratic_beta_schedule
from ..samplers import draw_noise, image_generator
from ..tiny_autoencoder import DOWNSCALE, LATENT_CHANNELS, TAESD, load_weight_file

TIMESTEPS = 1000
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLERS = {"dpmpp_2m": 20, "ddim": 50, "heun": 18, "euler": 50, "euler_ancestral": 50}  # name -> default steps

# memory beside the weights, in bytes per pixel of the image: of a step (for each image and branch of guidance) and of
# decoding one image, measured on a CPU in fp32 at 512 x 512; and what PyTorch takes for itself
UNET_BYTES, DECODER_BYTES, OTHER_BYTES = 700, 4000, 200 * 2 ** 20


def seeded(seeds):
    """A `generator` for `StableDiffusion.sample`: an image with this seed is the same in any batch."""
    def generator(step, shape):
        return torch.cat([image_generator(seed, [0])(step, (1, *shape[1:])) for seed in seeds])
    return generator


def check_settings(sampler, steps, height, width):
    """The number of steps, the sampler's default for None. Raises UsageError for what cannot be drawn."""
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler: unknown {sampler!r}; there are {', '.join(SAMPLERS)}")
    for name, size in (("height", height), ("width", width)):
        if size % DOWNSCALE or size < DOWNSCALE:
            raise UsageError(f"{name}: {size} is not a multiple of {DOWNSCALE}; multiples of 64 near 512 suit the "
                             "model best")
    steps = SAMPLERS[sampler] if steps is None else steps
    if steps < 1:
        raise UsageError(f"steps: {steps} is too few; 1 is the least")
    first = 1 + (steps - 1) * (TIMESTEPS // steps)  # of leading_timesteps
    if sampler == "ddim" and not 800 <= first < TIMESTEPS:
        raise UsageError(f"steps: {steps} would start ddim at timestep {first}, but pure noise is at 800 to 999; right "
                         "are 5 to 250, 268 to 333, 401 to 500 and 800 to 999 steps")
    return steps


def leading_timesteps(steps):
    """1 + k * (1000 // steps), the noisiest first: diffusers' spacing "leading" with offset 1."""
    return [1 + k * (TIMESTEPS // steps) for k in reversed(range(steps))]


def drawing_bytes(dtype, height, width, batch_size=1):
    """Memory for drawing a batch of images, guided, beside the weights. dtype: of the UNet."""
    step = UNET_BYTES * dtype.itemsize / 4 * 2 * batch_size
    return int(height * width * max(step, DECODER_BYTES)) + OTHER_BYTES


def load_taesd(decoder_path):
    """A TAESD with the decoder of this file. Raises UsageError: no such file, or another network's."""
    taesd = TAESD()
    load_weight_file(taesd.decoder, decoder_path, "taesd_decoder")
    return taesd


class StableDiffusion(DDPM):
    """`.unet(x, t, context)`, `.autoencoder.encode(images in [-1, 1])` and `.decode(latents)`, `.encode_text(prompts)`.

    A DDPM of latents whose network reads a text: it inherits the reverse process, not the training. README.md, beside
    this file, names the schedulers of diffusers that draw the same pictures.

    Set `.vae` to a TAESD (`load_taesd`) to decode with it: a hundredth of the work, a little less detail.
    """

    def __init__(self, unet, autoencoder, text_encoder, tokenizer):
        nn.Module.__init__(self)  # DDPM's would build a network for labels
        self.unet, self.autoencoder, self.text_encoder, self.tokenizer = unet, autoencoder, text_encoder, tokenizer
        self.vae = self.guide = None
        self.weights = "plain"  # or "ema": which of a checkpoint's weights these are
        self.timesteps, self.prediction = TIMESTEPS, "eps"
        abar = (1 - quadratic_beta_schedule(TIMESTEPS)).cumprod(0)
        self.register_buffer("sqrt_alphas_cumprod", abar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - abar).sqrt().float(), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def dtype(self):
        """Of the UNet's weights. The sampler's state and the autoencoder are in fp32."""
        return self.unet.time_embed[0].weight.dtype

    @torch.no_grad()
    def encode_text(self, prompts):
        """List of B texts -> B x 77 x 768. Tokens beyond 75 are cut off; `tokenizer.surplus` counts them."""
        return self.text_encoder(self.tokenizer(prompts).to(self.sqrt_alphas_cumprod.device))

    # ---- what the samplers call; their `label` is (tokens of the prompts, tokens of the negative prompts)

    def guided(self, x, label, time, guidance_scale=1.0):
        """DDPM's, with the negative prompt in place of no label. Computed in the UNet's precision, mixed in x's."""
        cond, uncond = label
        x_in = x.to(self.dtype)
        if guidance_scale == 1.0:
            return self.unet(x_in, time, cond).to(x.dtype)
        both = self.unet(x_in.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([cond, uncond]))
        cond, uncond = both.to(x.dtype).chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def sigma_to_time(self, sigma):
        """DDPM's, rounded to a timestep: the network was trained on no others."""
        return super().sigma_to_time(sigma).round()

    def ddim(self, x, label, steps, guidance_scale, callback=None):
        """DDIM (Song et al. 2020, eq. 12 without noise) from x_T = x down to timestep 0 instead of the image."""
        a, s = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        timesteps = leading_timesteps(steps)
        for k, (i, i_next) in enumerate(zip(timesteps, timesteps[1:] + [0])):
            t = torch.full((len(x),), i, device=x.device)
            eps = self.guided(x, label, t, guidance_scale)
            x0 = (x - s[i] * eps) / a[i]  # "predicted x_0"
            x = a[i_next] * x0 + s[i_next] * eps
            if callback:
                callback(k + 1, steps, x)
        return x

    # ---- from a prompt to a picture

    @torch.no_grad()
    def sample(self, prompts, negative_prompt="", height=512, width=512, sampler="dpmpp_2m", steps=None,
               guidance_scale=7.5, noise=None, generator=None, callback=None):
        """Draw one image per prompt: list of B texts, or one text -> B x 3 x height x width in [0, 1].

        Args:
            negative_prompt: what guidance leads away from, a text.
            height, width: pixels, multiples of 8.
            sampler, steps: a key of SAMPLERS; None takes its default number of steps.
            guidance_scale: 1 is the plain model, which does not see the negative prompt.
            noise: B x 4 x height/8 x width/8, standard normal: where the reverse process starts; None draws it.
            generator: see samplers.draw_noise; `seeded([...])` gives each image its own seed.
            callback: called as callback(step, steps, x) after every step.

        Raises:
            UsageError: see `check_settings`; not as many seeds or noises as prompts.
            RunError: values that are not finite, as half precision may give.
        """
        steps = check_settings(sampler, steps, height, width)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        like = self.sqrt_alphas_cumprod
        shape = len(prompts), LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE
        noise = draw_noise(generator, 0, like.new_empty(shape)) if noise is None else noise.to(like)
        if noise.shape != shape:
            raise UsageError(f"noise: its shape is {list(noise.shape)}; prompts and size need {list(shape)}")
        label = self.encode_text(prompts), self.encode_text([negative_prompt] * len(prompts))
        if sampler == "ddim":
            x = self.ddim(noise, label, steps, guidance_scale, callback)
        else:
            x = self.solve(noise, label, sampler, steps, guidance_scale, generator=generator, callback=callback)
        if not x.isfinite().all():
            name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
            raise RunError(f"drawing in {name} gave values that are not finite, and so no picture; "
                           + ("--dtype bf16 or fp32 has room for larger ones" if name == "fp16" else
                              "a smaller guidance scale may help, or the checkpoint's weights are damaged"))
        return self.decode(x)

    @torch.no_grad()
    def decode(self, latents):
        """B x 4 x H/8 x W/8 -> images B x 3 x H x W in [0, 1]; one by one, since this takes the most memory."""
        if self.vae is not None:
            return torch.cat([self.vae.decoder(z).clamp(0, 1) for z in latents.split(1)])
        return torch.cat([((self.autoencoder.decode(z) + 1) / 2).clamp(0, 1) for z in latents.split(1)])
