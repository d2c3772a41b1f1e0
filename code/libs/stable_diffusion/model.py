"""Stable Diffusion 1.x: prompt in, picture out, through the same samplers as every model here."""

import torch
from torch import nn

from ..ddpm import DDPM, quadratic_beta_schedule
from ..common.errors import RunError, UsageError
from ..samplers import draw_noise, image_generator
from ..tiny_autoencoder import DOWNSCALE, LATENT_CHANNELS, TAESD, load_weights

TIMESTEPS = 1000
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def seeded(seeds):
    """A `generator` for `StableDiffusion.sample`: an image with this seed is the same in any batch."""
    seeds = list(seeds)

    def generator(step, shape):
        if len(seeds) != shape[0]:
            raise UsageError(f"seeds: {len(seeds)} for a batch of {shape[0]}; it takes one for each prompt")
        return torch.cat([image_generator(seed, [0])(step, (1, *shape[1:])) for seed in seeds])
    return generator


def check_size(height, width):
    """Raise UsageError unless the autoencoder can make an image of this size."""
    for name, size in (("height", height), ("width", width)):
        if size % DOWNSCALE or size < DOWNSCALE:
            near = [s for s in (size // DOWNSCALE * DOWNSCALE, (size // DOWNSCALE + 1) * DOWNSCALE) if s > 0]
            raise UsageError(f"{name}: {size} is not a multiple of {DOWNSCALE}; the nearest sizes are "
                             f"{' and '.join(map(str, near))} (512 suits the model, multiples of 64 suit it best)")


def leading_timesteps(steps):
    """Those of diffusers' spacing "leading" with offset 1, from the noisiest: 1 + k * (1000 // steps)."""
    return [1 + k * (TIMESTEPS // steps) for k in reversed(range(steps))]


def load_taesd(decoder_path):
    """The tiny autoencoder's decoder. Raises UsageError: no such file, or another's."""
    taesd = TAESD()
    load_weights(taesd.decoder, decoder_path, "taesd_decoder")
    return taesd


class StableDiffusion(DDPM):
    """`.unet(x, t, context)`, `.autoencoder.encode(images in [-1, 1])` and `.decode(latents)`, `.encode_text(prompts)`.

    A DDPM in latents whose network reads a text: of DDPM it has the way back, DDIM and the solvers, not the training.

    Samplers and the schedulers of diffusers that draw the same, all with beta_schedule="scaled_linear",
    beta_start=0.00085, beta_end=0.012:

    - "dpmpp_2m": DPMSolverMultistepScheduler(use_karras_sigmas=True, final_sigmas_type="zero");
    - "heun", "euler": Heun- and EulerDiscreteScheduler(use_karras_sigmas=True), but for the timesteps, which are whole
      numbers here (as with DPM++, there, too), and for the start: the noise times sqrt(1 + sigma_max^2), which is x_T,
      here; times sigma_max, 0.2 % less, there;
    - "ddim": DDIMScheduler(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, clip_sample=False).
      The official code does the same where `steps` divides 1000; elsewhere it takes more steps than asked for. With
      `spacing` the timesteps are those of our DDIM.
    """

    SAMPLERS = {"dpmpp_2m": "solve", "ddim": "ddim", "heun": "solve", "euler": "solve", "euler_ancestral": "solve"}

    def __init__(self, unet, autoencoder, text_encoder, tokenizer):
        nn.Module.__init__(self)  # DDPM's would build a network for labels
        self.unet, self.autoencoder, self.text_encoder, self.tokenizer = unet, autoencoder, text_encoder, tokenizer
        self.vae = None  # a TAESD to decode with in place of the autoencoder
        self.weights = "plain"  # or "ema": which of a checkpoint's these are
        self.timesteps, self.prediction, self.use_vae = TIMESTEPS, "eps", True
        abar = (1 - quadratic_beta_schedule(TIMESTEPS)).cumprod(0)
        self.register_buffer("sqrt_alphas_cumprod", abar.sqrt().float(), persistent=False)
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - abar).sqrt().float(), persistent=False)
        self.requires_grad_(False).eval()

    @property
    def dtype(self):
        """Of the UNet's weights. The sampler's state and the autoencoder are in fp32."""
        return self.unet.time_embed[0].weight.dtype

    def use_taesd(self, decoder_path):
        """Decode with the tiny autoencoder: a hundredth of the work, a little less detail."""
        self.vae = load_taesd(decoder_path).to(self.sqrt_alphas_cumprod.device)

    # ---- what the samplers call; their `label` is (tokens of the prompts, tokens of the negative prompts)

    @torch.no_grad()
    def encode_text(self, prompts):
        """List of B texts -> B x 77 x 768. Tokens beyond 75 are cut off; `tokenizer.surplus` counts them."""
        return self.text_encoder(self.tokenizer(prompts).to(self.sqrt_alphas_cumprod.device))

    def check_guidance(self, guidance_scale):
        """Every scale works: the text encoder knows the empty prompt."""

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
        """DDPM's, to the nearest whole timestep: the network has seen no others."""
        return super().sigma_to_time(sigma).round()

    def ddim(self, x, labels, plan, generator=None, callback=None):
        """DDIM over the timesteps 1 + k * (T // steps), down to timestep 0 instead of the image."""
        if "spacing" in plan.options:
            return super().ddim(x, labels, plan, generator, callback)
        timesteps = leading_timesteps(plan.steps)
        sigmas = self.sigmas.tolist()
        for k, (i, i_next) in enumerate(zip(timesteps, timesteps[1:] + [0])):
            t = torch.full((len(x),), i, device=x.device, dtype=torch.long)
            x = self.ddim_step(x, labels, t, i, i_next, plan.scale(sigmas[i]), generator, plan.options.get("eta", 0.0))
            if callback:
                callback(k + 1, plan.steps, x)
        return x

    def plan(self, sampler=None, steps=None, guidance_scale=7.5, **options):
        """Settings of `sample`, checked: see Diffusion.plan."""
        plan = super().plan(sampler, steps, guidance_scale, **options)
        if plan.sampler == "ddim" and "spacing" not in plan.options:
            first = leading_timesteps(plan.steps)[0]
            if not 800 <= first < TIMESTEPS:
                raise UsageError(f"steps: {plan.steps} would start ddim at timestep {first}, but pure noise is at 800 "
                                 "to 999; right are 5 to 250, 268 to 333, 401 to 500 and 800 to 999 steps")
        return plan

    def check_finite(self, x):
        """Raise RunError if there are values that make no picture."""
        if not x.isfinite().all():
            name = next((name for name, dtype in DTYPES.items() if dtype == self.dtype), self.dtype)
            remedy = {"fp16": "--dtype bf16 or fp32 has room for larger ones", "bf16": "try --dtype fp32"}.get(
                name, "a smaller guidance scale may help, or the checkpoint's weights are damaged")
            raise RunError(f"drawing in {name} gave values that are not finite, and so no picture; {remedy}")
        return x

    @torch.no_grad()
    def postprocess(self, x):
        """Latents B x 4 x H/8 x W/8 -> images B x 3 x H x W in [0, 1]; one by one, since this takes the most memory."""
        if self.vae is not None:
            return super().postprocess(x)
        return torch.cat([((self.autoencoder.decode(z) + 1) / 2).clamp(0, 1) for z in x.split(1)])

    # ---- from a prompt to a picture

    @torch.no_grad()
    def sample(self, prompts, negative_prompt="", height=512, width=512, sampler=None, steps=None, guidance_scale=7.5,
               noise=None, generator=None, callback=None, **options):
        """Draw one image per prompt: list of B texts, or one text -> B x 3 x height x width in [0, 1].

        Args:
            negative_prompt: what guidance leads away from: a text for all images, or B texts.
            height, width: pixels, multiples of 8.
            sampler, steps: a key of `SAMPLERS`; None takes the first, and its default number of steps.
            guidance_scale: 1 is the plain model, which does not look at the negative prompt.
            noise: B x 4 x height/8 x width/8, standard normal: where the reverse process starts; None draws it.
            generator: see samplers.draw_noise; `seeded([...])` gives each image its own seed.
            callback, options: see Diffusion.sample.

        Raises:
            UsageError: a size that 8 does not divide, an unknown sampler or option, a value out of range, not as many
                negative prompts, seeds or noises as prompts.
            RunError: values that are not finite, as half precision may give.
        """
        check_size(height, width)
        plan = self.plan(sampler, steps, guidance_scale, **options)
        prompts = [prompts] if isinstance(prompts, str) else prompts
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if len(negative) != len(prompts):
            raise UsageError(f"negative_prompt: {len(negative)} texts for {len(prompts)} prompts; it takes one text "
                             "for all, or one for each")
        like = self.sqrt_alphas_cumprod
        shape = len(prompts), LATENT_CHANNELS, height // DOWNSCALE, width // DOWNSCALE
        if noise is None:
            noise = draw_noise(generator, 0, like.new_empty(shape))
        elif noise.shape != shape:
            raise UsageError(f"noise: its shape is {list(noise.shape)}; prompts and size take {list(shape)}")
        label = self.encode_text(prompts), self.encode_text(negative)
        x = getattr(self, self.SAMPLERS[plan.sampler])(noise.to(like), label, plan, generator, callback)
        return self.check_finite(self.postprocess(self.check_finite(x)))
