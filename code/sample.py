"""Draw images from a trained model.

python code/sample.py pretrained/mnist_cpu.pth.tar                  a grid, samples.png
python code/sample.py RUN --num 1000 --output digits.npz            1,000 images of each class, for evaluate.py
python code/sample.py RUN --output digits/                          single PNG files
python code/sample.py RUN --output digits.gif                       the denoising
python code/sample.py RUN --interpolate 10                          rows from one noise to another
python code/sample.py RUN --compare ddim:10,ddim:50,heun:9          samplers side by side"""

import math
import os
import time

import torch
from tqdm import tqdm

from libs.common.checkpoint import load_checkpoint, model_file
from libs.common.cli import Parser, check_output, positive, run
from libs.common.errors import UsageError, display_path, shown
from libs.config import add_sampler_flags, load_config, parse_setting, sampler_flags
from libs.common.pictures import folder_names, grid, sheet, write_folder, write_gif, write_png
from libs.common.seeds import image_noise
from libs.data.images import to_uint8, write_npz
from libs.models import check_images, draw_images, model_from, network_calls, sampling_settings
from libs.training.device import memory_format, pick_device

FRAMES = 40  # of an animation, at most
BAR = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or a run folder")
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file, for a checkpoint that holds no "
                        "configuration")
    parser.add_argument("--labels", default="", metavar="L,L,...", help="classes to draw (default: all)")
    parser.add_argument("--num", type=positive, default=None, help="images per class (default 10; with --compare 1)")
    add_sampler_flags(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interpolate", type=positive, default=None, metavar="N",
                      help="one row of N images per class, from the first image of --num 2 to the second; without fresh noise")
    what.add_argument("--compare", default=None, metavar="SAMPLER[:STEPS],...",
                      help="a sheet: the same noise drawn by each of these samplers")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--batch-size", type=positive, default=100, help="changes no image (default 100)")
    parser.add_argument("--device", default=None, help="cuda:0, mps or cpu (default: the best there is)")
    parser.add_argument("--output", default="samples.png", help="FILE.png: a grid; FILE.npz: images and labels for "
                        "evaluate.py; FILE.gif: the denoising;\nFOLDER/: single PNG files (default samples.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(argv)
    if args.compare is not None and (args.sampler or args.steps):
        raise UsageError("--compare: it names samplers and steps itself, so leave out --sampler and --steps")
    if args.interpolate and args.num:
        raise UsageError("--interpolate: it draws one row per class, so leave out --num")
    if args.interpolate == 1:
        raise UsageError("--interpolate: 1 is too few; 2 is the least, the two ends")
    return args


def kind_of_output(path, overwrite):
    """ "png", "npz", "gif" or "folder", from the name. Refuses a name that cannot be written."""
    if path.endswith(("/", os.sep)) or os.path.isdir(path):
        path = os.path.realpath(path)
        if os.path.isfile(path) or os.path.isdir(path) and os.listdir(path):
            raise UsageError(f"--output: {display_path(path)} exists; a folder for images must be new or empty")
        check_output(f"{path}.partial", overwrite=True)  # which pictures.write_folder makes beside it
        return "folder"
    kind = os.path.splitext(path)[1][1:]
    if kind not in ("png", "npz", "gif"):
        raise UsageError(f"--output: {path} must end in .png, .npz or .gif, or in / for a folder of images")
    check_output(path, overwrite)
    return kind


def parse_labels(text, num_classes):
    try:
        return torch.tensor([int(x) for x in text.split(",")]) if text else torch.arange(num_classes)
    except (ValueError, RuntimeError):  # RuntimeError: more than 64 bits
        raise UsageError(f"--labels: {shown(text)} is no list of integers such as 3,1,4") from None


def without_fresh_noise(model, config, given):
    """Settings like those given, of a sampler that adds no noise on the way: neighbours in a row stay similar."""
    settings = sampling_settings(model, config, **given)
    if settings["sampler"] in ("ddpm", "euler_ancestral"):
        raise UsageError(f"--interpolate: {settings['sampler']} adds noise on the way, so that neighbours would differ; "
                         "take another sampler, such as heun")
    return {**settings, **{key: 0.0 for key in ("eta", "S_churn") if key in settings}}


def interpolated_noise(start, end, n):
    """Standard normal noise along a quarter of a circle: n x *start.shape, from `start` to `end`.

    cos^2 + sin^2 = 1, so that between two independent standard normals the variance is 1 all the way; on a straight
    line it would fall to 1/2, which no model has seen.
    """
    angle = torch.linspace(0, math.pi / 2, n, dtype=torch.float64).reshape(-1, *[1] * start.dim())
    return (angle.cos() * start + angle.sin() * end).to(start.dtype)


def draw(model, labels, choices, args, device, noise=None, keep=()):
    """Draw the labels by each of several settings, with one progress bar.

    Returns uint8 N x C x H x W for each, and of the last one as much after each of the steps in `keep`.
    """
    drawn, costs = [], [network_calls(model, settings) for settings in choices]
    with tqdm(total=sum(costs) * len(labels), bar_format=BAR, disable=None) as bar:
        for settings, cost in zip(choices, costs):
            frames = {step: [] for step in keep}

            def watch(step, steps, x):
                bar.update(cost / steps * len(x))
                if step in frames:
                    frames[step].append(to_uint8(model.postprocess(x)).cpu())

            batches = draw_images(model, labels, settings, args.seed, args.batch_size, device, noise, watch)
            drawn.append(torch.cat([to_uint8(images) for images in batches]))
    return drawn, [torch.cat(frames[step]) for step in keep]


def main(argv=None):
    # ---- 1. What is drawn, checked before the work
    args = parse_args(argv)
    path = model_file(args.checkpoint)
    state = load_checkpoint(path, load_config(args.config) if args.config else None)
    model, config = model_from(state, path, ema="state_dict_ema" in state)
    kind = kind_of_output(args.output, args.overwrite)
    if args.compare and kind != "png":
        raise UsageError(f"--output: {args.output} must end in .png for --compare")
    # image k has class k modulo their number: a larger --num only adds images, and the first n of a file have all classes
    classes = parse_labels(args.labels, model.num_classes)
    model.check_labels(classes)
    columns = args.interpolate or args.num or (1 if args.compare else 10)
    given = sampler_flags(args)
    if args.interpolate:
        choices = [without_fresh_noise(model, config, given)]
    else:
        chosen = [{}] if args.compare is None else map(parse_setting, args.compare.split(","))
        choices = [sampling_settings(model, config, **given | settings) for settings in chosen]
    folders = folder_names(state.get("classes"), model.num_classes)
    keep, steps = [], choices[0]["steps"]
    if kind == "gif":
        keep = torch.linspace(1, steps, min(steps, FRAMES)).round().long().tolist()

    zoom = max(1, 64 // config["model"]["img_shape"][-1]) if kind in ("png", "gif") else 1  # of image_grid
    check_images(columns * len(classes), config, "--interpolate" if args.interpolate else "--num",
                 zoom ** 2 * (2 * (len(choices) + len(keep)) + 4) + (20 if args.interpolate or keep else 0))  # 20: noise
    labels = classes.repeat(columns)

    # ---- 2. What is going to happen
    device = pick_device([args.device])
    where = {"png": "a grid", "npz": "images and labels", "gif": f"{1 + len(keep)} frames",
             "folder": "PNG files" + (", a folder for each class" if folders else "")}[kind]
    print(f"drawing {len(labels):,} images into {args.output} ({where}), seed {args.seed}, on {device}")
    captions = []
    for settings in choices:
        captions.append(f"{settings['sampler']}, {settings['steps']} steps, {network_calls(model, settings)} network "
                        "calls an image")
        print("; ".join([captions[-1], *(f"{k} {v}" for k, v in settings.items() if k not in ("sampler", "steps"))]),
              flush=True)

    # ---- 3. Draw
    started, noise = time.time(), None
    model.to(device, memory_format=memory_format(device))
    if args.interpolate:
        start, end = image_noise(args.seed, range(2 * len(classes)), model.img_shape).chunk(2)
        noise = interpolated_noise(start, end, columns).flatten(0, 1)
    elif kind == "gif":
        noise = image_noise(args.seed, range(len(labels)), model.img_shape)
    drawn, frames = draw(model, labels, choices, args, device, noise, keep)

    # ---- 4. Write; in grids each class has a row
    by_class = torch.arange(len(labels)).reshape(columns, -1).T.flatten()
    if args.compare:
        write_png(args.output, sheet(list(zip(captions, drawn)), len(classes)))
    elif kind == "png":
        write_png(args.output, grid(drawn[0][by_class], columns))
    elif kind == "gif":
        first = torch.cat([to_uint8(model.postprocess(z.to(device))).cpu() for z in noise.split(args.batch_size)])
        write_gif(args.output, [grid(images[by_class], columns) for images in (first, *frames)])
    elif kind == "npz":
        write_npz(args.output, drawn[0], labels)
    else:
        write_folder(args.output, drawn[0], [folders[k] for k in labels.tolist()] if folders else None)
    print(f"{time.time() - started:.0f} s; saved {args.output}")


if __name__ == "__main__":
    run(main)
