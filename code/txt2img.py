"""Draw pictures from a text with Stable Diffusion 1.x.

python code/txt2img.py configs/sd15.yaml --ckpt v1-5-pruned-emaonly.safetensors \\
    --prompt "a photograph of an astronaut riding a horse"                          one picture, txt2img.png
... --num 4 --seed 10                                  seeds 10 to 13: txt2img_000.png to txt2img_003.png
... --prompts FILE --negative-prompt "blurry"          every line of a file
... --sampler ddim --steps 50 --guidance-scale 5 --height 768"""

import os
import time

from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.functional import to_pil_image

from libs.common.cli import Parser, check_output, positive, progress_bar, run
from libs.common.errors import UsageError, display_path
from libs.common.files import atomic_file
from libs.common.memory import check_memory
from libs.data.images import to_uint8
from libs.stable_diffusion import load_checkpoint, seeded
from libs.stable_diffusion.checkpoint import build_parts, weight_bytes
from libs.stable_diffusion.config import load_config
from libs.stable_diffusion.files import check_exists
from libs.stable_diffusion.model import DTYPES, SAMPLERS, check_settings, drawing_bytes, load_taesd
from libs.training.device import peak_memory, pick_device


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("config", help="YAML file, such as configs/sd15.yaml")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="the model, .safetensors or .ckpt")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="what to draw")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from (default: nothing)")
    parser.add_argument("--num", type=positive, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of a prompt's first picture, then count up (default 0)")
    parser.add_argument("--batch-size", type=positive, default=1, help="pictures drawn at a time (default 1)")
    parser.add_argument("--output", default="txt2img.png", help="FILE.png; several pictures are numbered "
                        "(default txt2img.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--vae", choices=("kl", "taesd"), default="kl", help="decode with the checkpoint's "
                        "autoencoder, or with TAESD, faster and coarser (default kl)")
    parser.add_argument("--weights", choices=("ema", "plain"), default="ema", help="averaged or plain weights, if the "
                        "checkpoint has both (default ema)")
    settings = parser.add_argument_group("settings of the config; the defaults are those of sd15.yaml")
    settings.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default dpmpp_2m)")
    settings.add_argument("--steps", type=positive, help="number of steps (default dpmpp_2m 20, heun 18, others 50)")
    settings.add_argument("--guidance-scale", type=float, help="1 is no guidance (default 7.5)")
    settings.add_argument("--height", type=int, help="pixels, a multiple of 8 (default 512)")
    settings.add_argument("--width", type=int, help="pixels, a multiple of 8 (default 512)")
    settings.add_argument("--device", help="cuda:0, mps, cpu, ... (default cuda:0, without a GPU cpu)")
    settings.add_argument("--dtype", metavar="NAME", help="auto, fp16, bf16 or fp32 (default auto: fp16 on an NVIDIA "
                          "GPU, else fp32)")
    return parser.parse_args(argv)


def read_config(args):
    """The configuration with the flags on top."""
    config = load_config(args.config)
    sampling = {key: getattr(args, key) for key in config["sample_cfg"] if getattr(args, key) is not None}
    if sampling.get("sampler") not in (None, config["sample_cfg"]["sampler"]):
        sampling = {"steps": None} | sampling  # the config's number is for its own sampler
    flags = {"sample_cfg": sampling}
    if args.device:
        flags["devices"] = [args.device]
    if args.dtype:
        flags["dtype"] = args.dtype
    return load_config(args.config, flags)


def read_prompts(args):
    if args.prompts is None:
        return [args.prompt]
    try:
        if os.path.exists(args.prompts) and not os.path.isfile(args.prompts):
            raise OSError("it is no regular file")  # a pipe or a device may never end
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


def write_picture(path, image, settings):
    """Write a PNG with the settings as its text chunks. image: uint8, 3 x H x W."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_text(key, str(value).encode("utf-8", "replace").decode())  # a terminal may send invalid characters
    with atomic_file(path) as f:
        to_pil_image(image).save(f, "PNG", pnginfo=info)


def main(argv=None):
    # 1. settings, checked before the work starts
    args = parse_args(argv)
    config = read_config(args)
    check_exists(args.ckpt)
    sampling = config["sample_cfg"]
    height, width, scale = sampling["height"], sampling["width"], sampling["guidance_scale"]
    steps = sampling["steps"] = check_settings(sampling["sampler"], sampling["steps"], height, width)
    prompts = read_prompts(args)
    if len(prompts) * args.num > 10 ** 5:
        raise UsageError(f"--num: {args.num:,} of {len(prompts):,} prompts are more than 100,000 pictures")
    jobs = [(prompt, args.seed + k) for prompt in prompts for k in range(args.num)]
    names = file_names(args.output, len(jobs), args.overwrite)
    taesd = load_taesd(config["taesd_decoder"]) if args.vae == "taesd" else None
    device = pick_device(config["devices"][0])
    auto = "fp16" if device.type == "cuda" else "fp32"
    dtype_name = auto if config["dtype"] == "auto" else config["dtype"]
    dtype, batch = DTYPES[dtype_name], min(args.batch_size, len(jobs))
    weights = weight_bytes(build_parts(config["model"]), dtype)
    check_memory(weights + drawing_bytes(dtype, height, width, batch),
                 f"drawing {batch} x {width} x {height} pixels in {dtype_name}",
                 "take a smaller --batch-size, --height, --width or --dtype, or close other programs", device)

    # 2. the model
    started = time.time()
    sd = load_checkpoint(args.ckpt, dtype, device, args.weights == "ema", config["model"])
    sd.vae = taesd and taesd.to(device)
    print(f"{display_path(args.ckpt)}: {'averaged' if sd.weights == 'ema' else 'plain'} weights, "
          f"{weights / 2 ** 30:.2f} GiB, loaded in {time.time() - started:.1f} s")
    for prompt in dict.fromkeys([args.negative_prompt, *(prompt for prompt, _ in jobs)]):
        if sd.tokenizer.surplus(prompt):
            print(f"prompt too long by {sd.tokenizer.surplus(prompt)} tokens, which are cut off: {prompt[:60]}...")
    print(f"drawing {len(jobs)} pictures of {width} x {height} pixels on {device} in {dtype_name}: {sampling['sampler']}, "
          f"{steps} steps, guidance scale {scale:g}, seed {args.seed}", flush=True)

    # 3. draw, and write each batch when it is finished
    settings = {"negative_prompt": args.negative_prompt, "sampler": sampling["sampler"], "steps": steps,
                "guidance_scale": scale, "size": f"{width}x{height}", "checkpoint": os.path.basename(args.ckpt),
                "weights": sd.weights, "dtype": dtype_name, "vae": args.vae}
    started = time.time()
    with progress_bar(len(jobs) * steps, "step") as bar:
        for first in range(0, len(jobs), args.batch_size):
            prompts, seeds = zip(*jobs[first:first + args.batch_size])
            images = sd.sample(list(prompts), args.negative_prompt, generator=seeded(seeds),
                               callback=lambda *_: bar.update(len(prompts)), **sampling)
            for image, name, prompt, seed in zip(to_uint8(images).cpu(), names[first:], prompts, seeds):
                write_picture(name, image, {"prompt": prompt, "seed": seed, **settings})
    print(f"{(time.time() - started) / len(jobs):.1f} s a picture, memory at most "
          f"{peak_memory(device) / 2 ** 30:.2f} GiB; saved {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else ""))


if __name__ == "__main__":
    run(main)
