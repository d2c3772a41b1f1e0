"""Draw images from a trained model.

python code/sample.py pretrained/mnist_cpu.pth.tar                  a grid, samples.png
python code/sample.py RUN --num 1000 --output digits.npz            1,000 images of each class, for evaluate.py
python code/sample.py RUN --output digits/                          single PNG files"""

import os
import time

import torch
from tqdm import tqdm

from libs.common.checkpoint import load_checkpoint, model_file
from libs.common.cli import Parser, check_output, positive, run
from libs.common.errors import UsageError, display_path, shown
from libs.config import add_sampler_flags, load_config, sampler_flags
from libs.common.pictures import folder_names, grid, write_folder, write_png
from libs.data.images import to_uint8, write_npz
from libs.models import check_images, draw_images, model_from, network_calls, sampling_settings
from libs.training.device import fast_sampling, memory_format, pick_device, pick_precision

BAR = "{percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or a run folder")
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML file, for a checkpoint that holds no "
                        "configuration")
    parser.add_argument("--labels", default="", metavar="L,L,...", help="classes to draw (default: all)")
    parser.add_argument("--num", type=positive, default=10, help="images per class (default 10)")
    add_sampler_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--batch-size", type=positive, default=100, help="changes no image (default 100)")
    parser.add_argument("--device", default=None, help="cuda:0, mps or cpu (default: the best there is)")
    parser.add_argument("--output", default="samples.png", help="FILE.png: a grid; FILE.npz: images and labels for "
                        "evaluate.py;\nFOLDER/: single PNG files (default samples.png)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    return parser.parse_args(argv)


def kind_of_output(path, overwrite):
    """ "png", "npz" or "folder", from the name. Refuses a name that cannot be written."""
    if path.endswith(("/", os.sep)) or os.path.isdir(path):
        path = os.path.realpath(path)
        if os.path.isfile(path) or os.path.isdir(path) and os.listdir(path):
            raise UsageError(f"--output: {display_path(path)} exists; a folder for images must be new or empty")
        check_output(f"{path}.partial", overwrite=True)  # which pictures.write_folder makes beside it
        return "folder"
    kind = os.path.splitext(path)[1][1:]
    if kind not in ("png", "npz"):
        raise UsageError(f"--output: {path} must end in .png or .npz, or in / for a folder of images")
    check_output(path, overwrite)
    return kind


def parse_labels(text, num_classes):
    try:
        return torch.tensor([int(x) for x in text.split(",")]) if text else torch.arange(num_classes)
    except (ValueError, RuntimeError):  # RuntimeError: does not fit in 64 bits
        raise UsageError(f"--labels: {shown(text)} is no list of integers such as 3,1,4") from None


def main(argv=None):
    # ---- 1. What is drawn, checked before the work
    args = parse_args(argv)
    path = model_file(args.checkpoint)
    state = load_checkpoint(path, load_config(args.config) if args.config else None)
    model, config = model_from(state, path, ema="state_dict_ema" in state, guide=args.guide)
    kind = kind_of_output(args.output, args.overwrite)
    settings = sampling_settings(model, config, **sampler_flags(args))
    classes = parse_labels(args.labels, model.num_classes)
    model.check_labels(classes)
    zoom = max(1, 64 // config["model"]["img_shape"][-1]) if kind == "png" else 1  # of image_grid
    check_images(args.num * len(classes), config, "--num", 6 * zoom ** 2)
    # image k has class k modulo their number: a larger --num only adds images, and the first n of a file have all classes
    labels, folders = classes.repeat(args.num), folder_names(state.get("classes"), model.num_classes)

    # ---- 2. What is going to happen
    device, calls = pick_device(args.device), network_calls(model, settings)
    print(f"drawing {len(labels):,} images into {args.output}, seed {args.seed}, on {device}")
    print("; ".join([f"{settings['sampler']}, {settings['steps']} steps, {calls} network calls an image",
                     *(f"{k} {v}" for k, v in settings.items() if k not in ("sampler", "steps"))]), flush=True)

    # ---- 3. Draw
    started = time.time()
    model.to(device, memory_format=memory_format(device))
    with (fast_sampling(model, device, pick_precision(config["dtype"], device)),
          tqdm(total=calls * len(labels), bar_format=BAR, disable=None) as bar):
        batches = draw_images(model, labels, settings, args.seed, args.batch_size, device,
                              lambda step, steps, x: bar.update(calls / steps * len(x)))
        images = torch.cat([to_uint8(batch) for batch in batches])

    # ---- 4. Write; in a grid each class has a row
    if kind == "png":
        write_png(args.output, grid(images.unflatten(0, (args.num, -1)).transpose(0, 1).flatten(0, 1), args.num))
    elif kind == "npz":
        write_npz(args.output, images, labels)
    else:
        write_folder(args.output, images, [folders[k] for k in labels.tolist()] if folders else None)
    print(f"{time.time() - started:.0f} s; saved {args.output}")


if __name__ == "__main__":
    run(main)
