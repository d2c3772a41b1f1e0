"""Draw pictures from a text with Stable Diffusion 1.x.

python ./txt2img.py ./configs/sd15.yaml --ckpt v1-5-pruned-emaonly.safetensors \\
    --prompt "a photograph of an astronaut riding a horse"                          one picture, txt2img.png
... --num 4 --seed 10                                  seeds 10 to 13: txt2img_000.png to txt2img_003.png
... --prompts FILE --negative-prompt "blurry"          every line of a file
... --sampler ddim --steps 50 --guidance-scale 5 --height 768"""

import os
import time

from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from libs.common.cli import Parser, check_output, positive, run
from libs.common.errors import UsageError, display_path
from libs.common.files import atomic_file
from libs.data.images import to_uint8
from libs.stable_diffusion import load_checkpoint, seeded
from libs.stable_diffusion.checkpoint import build_parts, weight_bytes
from libs.stable_diffusion.config import load_config
from libs.stable_diffusion.memory import PeakMemory, check_memory, drawing_bytes
from libs.stable_diffusion.model import DTYPES, check_size, load_taesd
from libs.training.update import peak_memory, pick_device

BAR = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("config", help="such as configs/sd15.yaml")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="the model, .safetensors or .ckpt")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="what to draw")
    what.add_argument("--prompts", metavar="FILE", help="what to draw, one prompt a line")
    parser.add_argument("--negative-prompt", default=None, help="what guidance leads away from (default: nothing)")
    parser.add_argument("--num", type=positive, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of a prompt's first picture; the next one has the next")
    parser.add_argument("--batch-size", type=positive, default=1, help="pictures at a time; changes none (default 1)")
    parser.add_argument("--output", default="txt2img.png", help="FILE.png; several pictures get a number each")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    way = parser.add_argument_group("what is not given is the config's")
    way.add_argument("--sampler", default=None)
    way.add_argument("--steps", type=positive, default=None)
    way.add_argument("--guidance-scale", type=float, default=None, help="1: none")
    way.add_argument("--height", type=int, default=None)
    way.add_argument("--width", type=int, default=None)
    way.add_argument("--device", default=None)
    way.add_argument("--dtype", default=None, help="auto, fp16, bf16 or fp32")
    parser.add_argument("--vae", choices=("kl", "taesd"), default="kl", help="what makes pictures of latents: the "
                        "checkpoint's autoencoder, or TAESD,\nquick and a little coarser")
    parser.add_argument("--weights", choices=("ema", "plain"), default=None, help="where the checkpoint has both")
    return parser.parse_args()


def settings(args):
    """The configuration with the flags on top."""
    sampling = {key: getattr(args, key) for key in ("sampler", "steps", "guidance_scale", "negative_prompt", "height",
                                                    "width") if getattr(args, key) is not None}
    if args.steps is None and args.sampler not in (None, load_config(args.config)["sample_cfg"]["sampler"]):
        sampling["steps"] = None  # the config's were meant for another sampler
    flags = {"sample_cfg": sampling}
    if args.device:
        flags["devices"] = [args.device]
    if args.dtype:
        flags["dtype"] = args.dtype
    if args.weights:
        flags["ema"] = args.weights == "ema"
    return load_config(args.config, flags)


def read_prompts(args):
    if args.prompts is None:
        return [args.prompt]
    try:
        with open(args.prompts, encoding="utf-8-sig") as f:
            prompts = [line.strip() for line in f if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--prompts: cannot read {args.prompts} ({e})") from None
    if not prompts:
        raise UsageError(f"--prompts: {args.prompts} has no line with text")
    return prompts


def file_names(output, n, overwrite):
    """out.png, or out_000.png, out_001.png, ..."""
    stem, ending = os.path.splitext(output)
    if ending.lower() != ".png":
        raise UsageError(f"--output: {output} must end in .png")
    names = [output] if n == 1 else [f"{stem}_{k:03d}{ending}" for k in range(n)]
    for name in names:
        check_output(name, overwrite)
    return names


def write_picture(path, image, about):
    """A PNG with the settings as its text chunks, whole or not at all. image: uint8, 3 x H x W."""
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, str(value).encode("utf-8", "replace").decode())  # a terminal may send what is no text
    with atomic_file(path) as f:
        to_pil_image(image).save(f, "PNG", pnginfo=info)


def gib(n):
    return f"{n / 2 ** 30:.2f} GiB" if n else "(not known here)"


def main():
    # 1. what is drawn, checked before the work
    args = parse_args()
    config = settings(args)
    way = dict(config["sample_cfg"])
    height, width = way["height"], way["width"]
    check_size(height, width)
    jobs = [(prompt, args.seed + k) for prompt in read_prompts(args) for k in range(args.num)]
    names = file_names(args.output, len(jobs), args.overwrite)
    if args.vae == "taesd":
        load_taesd(config["taesd_decoder"])  # 5 MB, of which mistakes are said before the model is loaded
    device = pick_device(config["devices"])
    auto = "fp16" if device.type == "cuda" else "fp32"
    dtype_name = auto if config["dtype"] == "auto" else config["dtype"]
    dtype, batch = DTYPES[dtype_name], min(args.batch_size, len(jobs))
    need = weight_bytes(build_parts(config["model"]), dtype) + drawing_bytes(dtype, height, width, batch)
    check_memory(device, need, f"drawing {batch} x {width} x {height} pixels in {dtype_name}",
                 "take a smaller --batch-size, --height, --width or --dtype, or close other programs")

    # 2. the model
    with PeakMemory() as memory:
        started = time.time()
        sd = load_checkpoint(args.ckpt, dtype, device, config["ema"], config["vocabulary"], config["model"])
        if args.vae == "taesd":
            sd.use_taesd(config["taesd_decoder"])
        plan = sd.plan(way["sampler"], way["steps"], way["guidance_scale"])
        weights = sum(p.numel() * p.element_size() for p in sd.parameters())
        print(f"{display_path(args.ckpt)}: {sd.summary}\nloaded in {time.time() - started:.1f} s; the weights have "
              f"{gib(weights)}; memory beside mapped files at most {gib(memory.peak)}")
    for prompt in dict.fromkeys([way["negative_prompt"], *(prompt for prompt, _ in jobs)]):
        if sd.tokenizer.surplus(prompt):
            print(f"prompt too long by {sd.tokenizer.surplus(prompt)} tokens, which are cut off: {prompt[:60]}...")
    print(f"drawing {len(jobs)} of {width} x {height} pixels on {device} in {dtype_name}: {plan.sampler}, {plan.steps} "
          f"steps, guidance scale {plan.guidance_scale:g}, seed {args.seed}", flush=True)

    # 3. draw, and write every batch when it is ready
    about = {"negative_prompt": way["negative_prompt"], "sampler": plan.sampler, "steps": plan.steps,
             "guidance_scale": plan.guidance_scale, "size": f"{width}x{height}",
             "checkpoint": os.path.basename(args.ckpt), "weights": sd.weights, "dtype": dtype_name, "vae": args.vae}
    started = time.time()
    with PeakMemory() as memory, tqdm(total=len(jobs) * plan.steps, bar_format=BAR, disable=None) as bar:
        for first in range(0, len(jobs), args.batch_size):
            prompts, seeds = zip(*jobs[first:first + args.batch_size])
            images = sd.sample(list(prompts), generator=seeded(seeds), callback=lambda *_: bar.update(len(prompts)),
                               **way)
            for image, name, prompt, seed in zip(to_uint8(images).cpu(), names[first:], prompts, seeds):
                write_picture(name, image, {"prompt": prompt, "seed": seed, **about})
    on_gpu = f", {gib(peak_memory(device))} on {device}" if device.type == "cuda" else ""
    print(f"{(time.time() - started) / len(jobs):.1f} s a picture, memory beside mapped files at most "
          f"{gib(memory.peak)}{on_gpu}; saved {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else ""))


if __name__ == "__main__":
    run(main)
