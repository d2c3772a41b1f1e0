"""Draw images from a trained model.

python ./sample.py ../pretrained/mnist_cpu.pth.tar                                  a grid, samples.png
python ./sample.py RUN --num 1000 --output digits.npz                               1,000 images of each class
python ./sample.py RUN --output digits/                                             single PNG files
python ./sample.py RUN --gif                                                        the denoising, samples.gif
python ./sample.py RUN --interpolate 10                                             rows from one noise to another
python ./sample.py RUN --compare ddim:10,ddim:50,heun:9                             samplers side by side"""

import os
import time

import torch
from tqdm import tqdm

import libs
from libs.common.cli import Parser, add_sampler_flags, check_output, positive, run, sampler_settings
from libs.common.checkpoint import load_checkpoint, model_file
from libs.drawing import draw_images, interpolated_noise
from libs.common.errors import UsageError, display_path
from libs.data.images import to_uint8, write_npz
from libs.models import model_from
from libs.common.pictures import folder_names, grid, sheet, write_folder, write_gif, write_png
from libs.common.seeds import image_noise
from libs.training.update import memory_format, pick_device

FRAMES = 40  # of an animation, at most
BAR = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or a run folder")
    parser.add_argument("--labels", default="", metavar="L,L,...", help="classes to draw (default: all)")
    parser.add_argument("--num", type=positive, default=None, help="images per class (default 10; for --compare 1)")
    add_sampler_flags(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--gif", action="store_true", help="the denoising, as with an --output that ends in .gif")
    what.add_argument("--interpolate", type=positive, default=None, metavar="N",
                      help="one row of N images per class, from the first image of --num 2 to the second")
    what.add_argument("--compare", default=None, metavar="SAMPLER[:STEPS],...",
                      help="a sheet: the same noise drawn in each of these ways")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=100, help="changes no image (default 100)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--output", default=None, help="FILE.png: a grid; FILE.npz: images and labels for evaluate.py; "
                        "FILE.gif: the denoising;\nFOLDER/: single PNG files (default samples.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args()
    args.output = args.output or ("samples.gif" if args.gif else "samples.png")
    args.kind = kind_of_output(args.output, args.overwrite)
    if args.gif and args.kind != "gif" or args.compare and args.kind != "png":
        raise UsageError(f"--output: {args.output} must end in .{'gif for --gif' if args.gif else 'png for --compare'}")
    if args.compare and (args.sampler or args.steps):
        raise UsageError("--compare: it names samplers and steps itself, so leave out --sampler and --steps")
    if args.interpolate and args.num:
        raise UsageError("--interpolate: it draws one row per class, so leave out --num")
    if args.interpolate == 1:
        raise UsageError("--interpolate: 1 is too few; 2 is the least, the two ends")
    return args


def kind_of_output(path, overwrite):
    """ "png", "npz", "gif" or "folder", from the name. Refuses what cannot be written there."""
    if path.endswith(("/", os.sep)) or os.path.isdir(path):
        path = os.path.realpath(path)
        if os.path.isfile(path) or os.path.isdir(path) and os.listdir(path):
            raise UsageError(f"--output: {display_path(path)} exists; a folder for images must be new or empty")
        check_output(path, overwrite=True)
        return "folder"
    kind = os.path.splitext(path)[1][1:]
    if kind not in ("png", "npz", "gif"):
        raise UsageError(f"--output: {path} must end in .png, .npz or .gif, or in / for a folder of images")
    check_output(path, overwrite)
    return kind


def parse_labels(text, num_classes):
    try:
        return torch.tensor([int(x) for x in text.split(",")]) if text else torch.arange(num_classes)
    except ValueError:
        raise UsageError(f"--labels: {text!r} is no list of integers such as 3,1,4") from None


def parse_ways(text):
    """ "ddim:10,heun" -> [("ddim", 10), ("heun", None)] """
    ways = [way.partition(":") for way in text.split(",")]
    try:
        return [(sampler, int(steps) if colon else None) for sampler, colon, steps in ways]
    except ValueError:
        raise UsageError(f"--compare: {text!r} is no list such as ddim:10,ddim:50,heun:9") from None


def is_random(plan):
    """Whether noise is added on the way."""
    return (plan.sampler == "ddpm" or plan.options.get("eta", plan.sampler == "euler_ancestral") > 0
            or plan.options.get("S_churn", 0) > 0)


def draw(model, labels, ways, args, device, noise=None, keep=()):
    """Draw the labels in each of several ways, with one progress bar.

    Returns uint8 N x C x H x W for each way, and of the last one as much after each of the steps in `keep`.
    """
    drawn, costs = [], [model.network_calls(**options) for options in ways]
    with tqdm(total=sum(costs) * len(labels), bar_format=BAR, disable=None) as bar:
        for options, cost in zip(ways, costs):
            frames = {step: [] for step in keep}

            def look(step, steps, x):
                bar.update(cost / steps * len(x))
                if step in frames:
                    frames[step].append(to_uint8(model.postprocess(x)).cpu())

            batches = draw_images(model, labels, options, args.seed, args.batch_size, device, noise, look)
            drawn.append(torch.cat([to_uint8(images) for images in batches]))
    return drawn, [torch.cat(frames[step]) for step in keep]


def main():
    args = parse_args()
    path = model_file(args.checkpoint)
    state = load_checkpoint(path)
    model, config = model_from(state, path)

    # 1. what is drawn, checked before the work. Image k has class k modulo their number: a larger --num only adds
    # images, and the first n of a file have all classes
    classes = parse_labels(args.labels, model.num_classes)
    model.check_labels(classes)
    columns = args.interpolate or args.num or (1 if args.compare else 10)
    labels = classes.repeat(columns)
    given = sampler_settings(args)
    ways = parse_ways(args.compare) if args.compare else [(args.sampler, args.steps)]
    ways = [libs.sampling_options(config, **given | {"sampler": sampler, "steps": steps}) for sampler, steps in ways]
    plans = [model.plan(**options) for options in ways]
    if args.interpolate and is_random(plans[0]):
        raise UsageError(f"--interpolate: {plans[0].sampler} adds noise on the way, so that neighbours would differ; "
                         "take one that does not, such as heun, or --eta 0")
    folders = folder_names(state.get("classes"), model.num_classes)
    keep = []
    if args.kind == "gif":
        keep = torch.linspace(1, plans[0].steps, min(plans[0].steps, FRAMES)).round().long().tolist()

    # 2. what is going to happen
    device = pick_device([args.device])
    where = {"png": "a grid", "npz": "images and labels", "gif": f"{1 + len(keep)} frames",
             "folder": "PNG files" + (", a folder for each class" if folders else "")}[args.kind]
    print(f"drawing {len(labels):,} images into {args.output} ({where}), seed {args.seed}, on {device}")
    captions = []
    for plan, options in zip(plans, ways):
        captions.append(f"{plan.sampler}, {plan.steps} steps, {model.network_calls(**options)} network calls an image")
        print("; ".join([captions[-1], *(f"{k} {v}" for k, v in options.items() if k not in ("sampler", "steps"))]),
              flush=True)

    # 3. draw
    started, noise = time.time(), None
    model.to(device, memory_format=memory_format(device))
    if args.interpolate:
        start, end = image_noise(args.seed, range(2 * len(classes)), model.img_shape).chunk(2)
        noise = interpolated_noise(start, end, columns).flatten(0, 1)
    elif args.kind == "gif":
        noise = image_noise(args.seed, range(len(labels)), model.img_shape)
    drawn, frames = draw(model, labels, ways, args, device, noise, keep)

    # 4. write; in grids each class has a row
    by_class = torch.arange(len(labels)).reshape(columns, -1).T.flatten()
    if args.compare:
        write_png(args.output, sheet(list(zip(captions, drawn)), len(classes)))
    elif args.kind == "png":
        write_png(args.output, grid(drawn[0][by_class], columns))
    elif args.kind == "gif":
        first = torch.cat([to_uint8(model.postprocess(z.to(device))).cpu() for z in noise.split(args.batch_size)])
        write_gif(args.output, [grid(images[by_class], columns) for images in (first, *frames)])
    elif args.kind == "npz":
        write_npz(args.output, drawn[0], labels)
    else:
        write_folder(args.output, drawn[0], [folders[k] for k in labels.tolist()] if folders else None)
    print(f"{time.time() - started:.0f} s; saved {args.output}")


if __name__ == "__main__":
    run(main)
