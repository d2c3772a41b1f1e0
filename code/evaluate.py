"""How good generated images are: Frechet distance, precision, recall, label accuracy, copies of training images.

python ./evaluate.py ../pretrained/mnist_cpu.pth.tar --num 10000
python ./evaluate.py ../logs/mnist_demo
python ./evaluate.py FOLDER_OR_NPZ --config ./configs/mnist.yaml"""

import json
import os
import time

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import libs
from libs.common.cli import Parser, add_sampler_flags, check_output, positive, run, sampler_settings
from libs.common.checkpoint import load_checkpoint, model_file
from libs.drawing import draw_images
from libs.common.errors import UsageError, display_path
from libs.evaluation.report import RealImages, evaluate, labels_like, scalars
from libs.evaluation.features import EXTRACTORS
from libs.common.files import atomic_file
from libs.data.images import ImageSet, read_images, to_uint8
from libs.evaluation.memorization import LEAST
from libs.models import model_from
from libs.common.pictures import sheet, write_png
from libs.common.seeds import seeded_generator
from libs.training.update import memory_format, pick_device


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("source", help="a checkpoint of train.py or a run folder; or images: a folder or an .npz file")
    parser.add_argument("--config", default=None, help="for images: the YAML file of the data set to compare with")
    parser.add_argument("--num", type=positive, default=10000,
                        help="images to draw, or at most to read (default 10000)")
    parser.add_argument("--features", choices=list(EXTRACTORS), default=None,
                        help="whose features are compared (default: classifier for MNIST, else inception)")
    parser.add_argument("--feature-weights", default=None, metavar="FILE", help="the extractor's weights, if its own "
                        "are not meant; for autoencoder the config's encoder is the default")
    add_sampler_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=200)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--data-folder", default=None, help="the real images, if they are not where the config says")
    parser.add_argument("--no-memorization", action="store_true", help="do not look for copies of training images")
    parser.add_argument("--output", default=None, metavar="FILE.json", help="the figures; a picture goes beside them "
                        "(default: evaluation_<what>.json in the run folder, or here)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args()


def outputs(args, folder, what):
    """(JSON file, PNG file); refused now rather than after the work."""
    path = args.output or os.path.join(folder, f"evaluation_{what}.json")
    if not path.endswith(".json"):
        raise UsageError(f"--output: {path} must end in .json")
    paths = path, path[:-len("json")] + "png"
    for p in paths:
        check_output(p, args.overwrite)
    return paths


def is_run(folder):
    return os.path.isfile(os.path.join(folder, "config.txt"))


def draw(model, options, args, labels, device):
    """uint8 N x C x H x W, and how they were drawn."""
    calls = model.network_calls(**options)
    minutes = calls * len(labels) * seconds_per_call(model, args.batch_size, device) / 60
    print(f"drawing {len(labels):,} images: " + ", ".join(f"{k} {v}" for k, v in options.items()) + f", seed {args.seed}: "
          f"{calls} network calls an image, about {minutes:.1f} minutes", flush=True)
    images = []
    with tqdm(total=len(labels), unit="image", disable=None) as bar:
        for batch in draw_images(model, labels, options, args.seed, args.batch_size, device):
            images.append(to_uint8(batch))
            bar.update(len(batch))
    return torch.cat(images), {**options, "network_calls": calls, "seed": args.seed}


@torch.no_grad()
def seconds_per_call(model, batch_size, device):
    """Seconds that one network call takes, for one image, measured after a call to warm up."""
    x = torch.zeros(batch_size, *model.img_shape, device=device)
    label = torch.zeros(batch_size, dtype=torch.long, device=device)
    for _ in range(2):
        started = time.time()
        float(model.model(x, label, label).sum())  # waits for the GPU
    return (time.time() - started) / batch_size


def table(report):
    """The figures as lines of text: generated images between what real and what senseless ones get."""
    n, columns = report["n"], ("generated", "floor", "ceiling")
    yield f"noise: {report['ceiling_n']:,} images; label accuracy: of all images"
    rows = [(f"{report['metric']} to {n:,} training images", "fd_train", "{:.3f}"),
            (f"{report['metric']} to {n:,} test images", "fd_test", "{:.3f}"),
            ("kernel distance x 1000", "kd", "{:.3f}"),
            ("precision", "precision", "{:.3f}"), ("recall", "recall", "{:.3f}"),
            ("label accuracy", "label_accuracy", "{:.2%}")]
    yield " " * 46 + f"{'generated':>12}{'test images':>14}{'noise':>12}"
    for text, key, form in rows:
        values = [form.format(report[c][key] * (1000 if key == "kd" else 1)) if key in report[c] else "-"
                  for c in columns]
        if any(v != "-" for v in values):
            yield f"{text:<46}{values[0]:>12}{values[1]:>14}{values[2]:>12}"
    if "n_all" in report:
        drawn, *real = report["n_all"]
        for (split, what), count in zip((("train", "training"), ("test", "test")), real):
            yield f"{report['metric']} of all {drawn:,} to all {count:,} {what} images: {report[f'fd_{split}_all']:.3f}"
    if "memorization" in report:
        for space in ("pixels", "features"):
            yield f"nearest training image, {space}: " + ", ".join(
                f"{key.replace('_', ' ')} {value:.3g}" for key, value in report["memorization"][space].items()
                if isinstance(value, float))
        yield report["memorization"]["copies"]["verdict"]


def picture(images, real, report):
    """Some of the images; below, the ones most like a copy, above their nearest training images."""
    order = range(min(100, len(images)))
    if images.labels is not None:  # the classes side by side
        order = images.labels[:len(order)].argsort(stable=True)
    panels = [(f"{len(order)} of {len(images):,} images", images.take(torch.as_tensor(order)).images)]
    for which, source in (("generated", images), ("held_out", real.test)) if "memorization" in report else ():
        pairs = report["memorization"]["closest"][which]
        mine, theirs = (torch.tensor([pair[key] for pair in pairs]) for key in ("image", "train"))
        panels.append((f"the {which.replace('_', '-')} images most like a copy, above their nearest training images",
                       torch.cat([source.take(mine).images, real.train.take(theirs).images])))
    return sheet(panels, 10)


def matched(labels, real, classes):
    """Labels of the real images -> those of the model, by the classes' names."""
    unknown = [name for k, name in enumerate(real.train.classes) if name not in classes and (labels == k).any()]
    if unknown:
        raise UsageError(f"class {unknown[0]} of the data set is none of the model's ({', '.join(classes)})")
    return torch.tensor([classes.index(c) if c in classes else -1 for c in real.train.classes])[labels]


def main():
    args = parse_args()
    started, device = time.time(), pick_device([args.device])
    state = None
    if args.source.endswith(".npz") or (os.path.isdir(args.source) and not is_run(args.source)):
        if not args.config:
            raise UsageError(f"--config: {args.source} holds images; name the YAML file of the data set to compare with")
        given = [f"--{key.replace('_', '-')}" for key, value in sampler_settings(args).items() if value is not None]
        if given:
            raise UsageError(f"{given[0]}: {args.source} holds images; nothing is drawn")
        config = libs.load_config(args.config)
        what, folder = os.path.splitext(os.path.basename(os.path.abspath(args.source)))[0], "."
    else:
        checkpoint = model_file(args.source)
        state = load_checkpoint(checkpoint)
        model, config = model_from(state, checkpoint)
        if args.config:
            raise UsageError(f"--config: {args.config} is for images; the checkpoint {display_path(checkpoint)} has its own")
        what, folder = os.path.basename(checkpoint).split(".")[0], os.path.dirname(os.path.abspath(checkpoint))
        options = libs.sampling_options(config, **sampler_settings(args))
        model.plan(**options)  # so that what cannot be is said now
    run_folder = folder if is_run(folder) else None
    json_path, png_path = outputs(args, run_folder or ".", what)
    if args.num < LEAST and not args.no_memorization:
        raise UsageError(f"--num: {args.num} is too few to look for copies; at least {LEAST}, or --no-memorization")
    if config["dataset"]["split"] != "train" and not args.no_memorization:
        raise UsageError(f"dataset.split: {args.source} was trained on the {config['dataset']['split']} images, which the "
                         "search for copies takes for unseen ones; give --no-memorization")
    if args.data_folder:
        config["dataset"]["data_folder"] = args.data_folder
    config["eval"]["features"] = args.features or config["eval"]["features"]

    print("features of the real images, where no cache has them", flush=True)
    with tqdm(unit="image", disable=None) as bar:
        real = RealImages(config, device, args.feature_weights, bar.update, bar.write)
    if len(real.test) < LEAST and not args.no_memorization:
        raise UsageError(f"the data set has {len(real.test)} test images, too few to look for copies (at least {LEAST}); "
                         "give --no-memorization")
    figures = {"source": display_path(args.source), "data": config["dataset"]["name"]}
    if state is None:
        images = read_images(args.source, channels=real.train.shape[1], classes=real.train.classes)
        order = torch.randperm(len(images), generator=seeded_generator(args.seed, "subset"))
        images = images.take(order[:args.num])
        if len(images) < LEAST and not args.no_memorization:
            raise UsageError(f"{args.source} has {len(images)} images, too few to look for copies (at least {LEAST}); give "
                             "--no-memorization")
    else:
        labels = labels_like(real.test.labels, len(real.train.classes), args.num)
        wanted = matched(labels, real, state.get("classes", real.train.classes))
        pixels, drawn = draw(model.to(device, memory_format=memory_format(device)), options, args, wanted, device)
        images = ImageSet(pixels, labels, real.train.classes)
        figures |= {"step": state["step"], **drawn}
    print("comparing" + ("" if args.no_memorization else ", then looking for copies of training images"), flush=True)
    report = evaluate(images, real, not args.no_memorization)
    figures |= {**report, "seconds": round(time.time() - started, 1)}
    print("\n".join(table(report)))
    with atomic_file(json_path) as f:
        f.write(json.dumps(figures, indent=1).encode())
    write_png(png_path, picture(images, real, report))
    print(f"{figures['seconds']:.0f} s; figures in {display_path(json_path)}, picture in {display_path(png_path)}")
    if run_folder and state is not None:
        with SummaryWriter(os.path.join(run_folder, "logs")) as board:
            for tag, value in scalars(report).items():
                board.add_scalar(f"evaluation/{tag}", value, state["step"])


if __name__ == "__main__":
    run(main)
