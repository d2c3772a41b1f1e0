"""Compare Stable Diffusion with diffusers and transformers, on random weights. As a script: at the true size.

python tests/sd_parity.py random.safetensors [--size 256]     random_sd_checkpoint.py makes the file

It needs requirements-extra.txt, and ends with status 1 if a number is outside its limits.

The other side is theirs from end to end: their classes, weights through diffusers' own conversion of the keys, their
schedulers; only the guidance between two network calls is written here."""

import importlib.util
import math
import os
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))

import random_sd_checkpoint  # noqa: E402
from libs.common.cli import Parser, positive, run  # noqa: E402
from libs.common.errors import RunError, UsageError  # noqa: E402
from libs.config import defaults_of  # noqa: E402
from libs.data.images import to_uint8  # noqa: E402
from libs.stable_diffusion import load_checkpoint, seeded  # noqa: E402
from libs.stable_diffusion.autoencoder import LATENT_SCALE  # noqa: E402
from libs.stable_diffusion.config import SETTINGS, load_config  # noqa: E402
from libs.stable_diffusion.files import read_tensors  # noqa: E402
from libs.stable_diffusion.model import check_settings  # noqa: E402

BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# what StableDiffusion's samplers are compared with
SCHEDULERS = {
    "ddim": ("DDIMScheduler", dict(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False,
                                   clip_sample=False)),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True, algorithm_type="dpmsolver++",
                                                     solver_order=2, final_sigmas_type="zero")),
    "heun": ("HeunDiscreteScheduler", dict(use_karras_sigmas=True)),
    "euler": ("EulerDiscreteScheduler", dict(use_karras_sigmas=True)),
}

TRUE_SIZE = defaults_of(SETTINGS)["model"]
# the true model with fewer channels and layers: all modules of the UNet and the autoencoder have the same names
SMALL = {"unet": TRUE_SIZE["unet"] | {"dim": 32, "context_dim": 32},
         "autoencoder": TRUE_SIZE["autoencoder"] | {"dim": 32},
         "text_encoder": {"width": 32, "layers": 2, "heads": 2}}


def small_checkpoint(folder, name="small.safetensors", **options):
    """Path of a random checkpoint of SMALL."""
    path = os.path.join(folder, name)
    random_sd_checkpoint.write(path, model=SMALL, **options)
    return path


def their_unet(tensors, cfg):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    levels = range(len(cfg["dim_mults"]))
    unet = UNet2DConditionModel(
        block_out_channels=[cfg["dim"] * m for m in cfg["dim_mults"]], layers_per_block=cfg["num_res_blocks"],
        down_block_types=["CrossAttnDownBlock2D" if i in cfg["attn_levels"] else "DownBlock2D" for i in levels],
        up_block_types=["CrossAttnUpBlock2D" if i in cfg["attn_levels"] else "UpBlock2D" for i in reversed(levels)],
        attention_head_dim=cfg["num_heads"], cross_attention_dim=cfg["context_dim"])  # diffusers' name for the number of heads
    return loaded(unet, convert_ldm_unet_checkpoint(dict(tensors), unet.config))


def their_vae(tensors, cfg):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    n = len(cfg["dim_mults"])
    vae = AutoencoderKL(block_out_channels=[cfg["dim"] * m for m in cfg["dim_mults"]],
                        layers_per_block=cfg["num_res_blocks"], latent_channels=4,
                        down_block_types=["DownEncoderBlock2D"] * n, up_block_types=["UpDecoderBlock2D"] * n)
    return loaded(vae, convert_ldm_vae_checkpoint(dict(tensors), vae.config))


def their_text_encoder(tensors, cfg):
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel
    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=cfg["width"], intermediate_size=4 * cfg["width"], num_hidden_layers=cfg["layers"],
        num_attention_heads=cfg["heads"], max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768,
        pad_token_id=1, bos_token_id=49406, eos_token_id=49407))
    state = convert_ldm_clip_checkpoint(dict(tensors))
    if not hasattr(model, "text_model"):  # transformers took this level out of its names
        state = {name.removeprefix("text_model."): t for name, t in state.items()}
    return loaded(model, {name: t for name, t in state.items() if not name.endswith("position_ids")})


def loaded(model, state):
    model.load_state_dict(state, assign=True)  # strict
    return model.float().eval().requires_grad_(False)


class Theirs:
    """The three models of one checkpoint. model: their sizes, as in the config."""

    def __init__(self, path, model=TRUE_SIZE):
        tensors = read_tensors(path)
        self.unet = their_unet(tensors, model["unet"])
        self.vae = their_vae(tensors, model["autoencoder"])
        self.text_encoder = their_text_encoder(tensors, model["text_encoder"])

    @torch.no_grad()
    def encode_text(self, ids):
        return self.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def encode(self, images):
        return self.vae.encode(images).latent_dist.mean * LATENT_SCALE

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents / LATENT_SCALE).sample

    @torch.no_grad()
    def sample(self, ids, negative_ids, noise, sampler, steps, guidance_scale, whole_timesteps=False):
        """Images in [0, 1]. whole_timesteps: round the scheduler's timesteps."""
        import diffusers
        kind, options = SCHEDULERS[sampler]
        scheduler = getattr(diffusers, kind)(**BETAS, **options)
        scheduler.set_timesteps(steps)
        if whole_timesteps:
            scheduler.timesteps = scheduler.timesteps.round()
            scheduler.set_begin_index(0)  # two may be equal now: count them
        context = torch.cat([self.encode_text(negative_ids), self.encode_text(ids)])
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x_in = scheduler.scale_model_input(torch.cat([x, x]), t)
            uncond, cond = self.unet(x_in, t, context).sample.chunk(2)
            x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
        return ((self.decode(x) + 1) / 2).clamp(0, 1)


def relative(ours, theirs):
    """Largest difference, in units of the largest value of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def levels(a, b):
    """(largest, mean) difference of two sets of images in [0, 1], in grey levels of 255."""
    difference = (to_uint8(a).int() - to_uint8(b).int()).abs().float()
    return difference.max().item(), difference.mean().item()


class Report:
    """Prints each number; `end` raises RunError if one was outside its limits."""

    def __init__(self):
        self.started, self.numbers, self.wrong = time.time(), 0, []

    def print(self, text):
        print(f"{time.time() - self.started:4.0f} s  {text}", flush=True)

    def __call__(self, name, value, at_least=0.0, at_most=math.inf):
        self.numbers += 1
        limit = f"at most {at_most:g}" if at_most < math.inf else f"at least {at_least:g}"
        right = at_least <= value <= at_most  # False for nan
        self.print(f"{name}: {value:.3g} ({limit}){'' if right else '  WRONG'}")
        if not right:
            self.wrong.append(f"{name} is {value:.3g}, not {limit}")

    def end(self):
        if self.wrong:
            raise RunError("; ".join(self.wrong))
        self.print(f"all {self.numbers} numbers are within their limits")


def compare(sd, theirs, size, steps, report):
    """The networks, then whole pictures of size x size pixels."""
    for name, part in (("UNet", sd.unet), ("autoencoder", sd.autoencoder), ("text encoder", sd.text_encoder)):
        report.print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
    prompts = ["a photograph of an astronaut riding a horse", "two cats on a red sofa, oil painting"]
    ids, noise = sd.tokenizer(prompts), seeded([0, 1])(0, (2, 4, size // 8, size // 8))
    with torch.no_grad():
        t, context = torch.tensor([981, 7]), sd.encode_text(prompts)
        images = seeded([2])(0, (1, 3, size, size)).tanh()
        for name, ours, other in (
                ("text encoder", lambda: context, lambda: theirs.encode_text(ids)),
                ("UNet", lambda: sd.unet(noise, t, context), lambda: theirs.unet(noise, t, context).sample),
                ("encoder", lambda: sd.autoencoder.encode(images), lambda: theirs.encode(images)),
                ("decoder", lambda: sd.autoencoder.decode(noise[:1]), lambda: theirs.decode(noise[:1]))):
            report(f"{name}, largest difference in units of the largest value", relative(ours(), other()), at_most=1e-4)

    options = dict(steps=steps, noise=noise[:1], height=size, width=size)
    for sampler in ("ddim", "dpmpp_2m"):
        def draw(prompt=prompts[0], guidance_scale=7.5):
            return sd.sample(prompt, "blurry", sampler=sampler, guidance_scale=guidance_scale, **options)

        ours = draw()
        other = theirs.sample(ids[:1], sd.tokenizer("blurry"), noise[:1], sampler, steps, 7.5)
        report(f"{sampler}, {steps} steps, guidance 7.5: largest difference in grey levels", levels(ours, other)[0],
               at_most=1)
        report(f"{sampler}: standard deviation of the picture", 255 * ours.std().item(), at_least=20)
        report(f"{sampler}: another prompt moves it, on average, by", levels(ours, draw(prompts[1]))[1], at_least=5)
        report(f"{sampler}: no guidance moves it by", levels(ours, draw(guidance_scale=1.0))[1], at_least=5)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="the file of random_sd_checkpoint.py")
    parser.add_argument("--size", type=positive, default=256, help="pixels of the pictures (default 256)")
    parser.add_argument("--steps", type=positive, default=20, help="of each sampler (default 20)")
    parser.add_argument("--config", default=None, help="a config of txt2img.py with other sizes")
    args = parser.parse_args(argv)
    check_settings("ddim", args.steps, args.size, args.size)
    for package in ("diffusers", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed; `pip install -r requirements-extra.txt` installs it")
    model = load_config(args.config)["model"] if args.config else TRUE_SIZE
    report, sd = Report(), load_checkpoint(args.checkpoint, model=model)
    compare(sd, Theirs(args.checkpoint, model), args.size, args.steps, report)
    report.end()


if __name__ == "__main__":
    run(main)
