"""How good generated images are: Frechet distance, precision, recall, label accuracy, copies of training images.

python code/evaluate.py pretrained/mnist_cpu.pth.tar --num 10000
python code/evaluate.py logs/RUN --features inception
python code/evaluate.py FOLDER_OR_NPZ --config configs/mnist.yaml"""

import json
import os
import time

import torch
from torch.utils.tensorboard import SummaryWriter

import libs
from libs.common.checkpoint import find_run, load_checkpoint, model_file
from libs.common.cli import Parser, check_output, positive, progress_bar, run
from libs.common.errors import UsageError, display_path
from libs.config import add_sampler_flags, sampler_flags
from libs.common.files import atomic_file
from libs.common.pictures import sheet, write_png
from libs.common.seeds import seeded_generator
from libs.data.images import ImageSet, read_images
from libs.evaluation import EXTRACTORS, RealImages, evaluate, labels_like, scalars
from libs.evaluation.comparison import draw_samples
from libs.evaluation.memorization import LEAST
from libs.models import check_images, model_from, network_calls, sampling_settings
from libs.training.device import fast_sampling, memory_format, pick_device, pick_precision


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", help="a checkpoint of train.py or a run folder; or images: a folder or an .npz file")
    parser.add_argument("--config", default=None, help="YAML file, for a source without one: images, or a checkpoint that holds no "
                        "configuration")
    parser.add_argument("--num", type=positive, default=10000,
                        help="images to draw, or at most to read (default 10000)")
    parser.add_argument("--features", choices=list(EXTRACTORS), default=None,
                        help="the network whose features are compared (default: classifier for MNIST, else mobilenet)")
    add_sampler_flags(parser)
    parser.add_argument("--seed", type=int, default=0,
                        help="of the noise that images are drawn from, or of the choice among those read (default 0)")
    parser.add_argument("--batch-size", type=positive, default=200, help="images drawn at a time (default 200)")
    parser.add_argument("--device", default=None, help="cuda:0, mps or cpu (default: the best there is)")
    parser.add_argument("--data-folder", default=None, help="the real images, if they are not where the config says")
    parser.add_argument("--no-memorization", action="store_true", help="do not look for copies of training images")
    parser.add_argument("--output", default=None, metavar="FILE.json", help="the figures; a picture goes beside them "
                        "(default: evaluation_<source>.json in the run folder, or here)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    started, device = time.time(), pick_device(args.device)

    # 1. Images to read, or a model to draw them with
    source = find_run(args.source)
    run_folder = model = None
    if source.endswith(".npz") or (os.path.isdir(source) and not is_run(source)):
        config = config_of_images(args)
        name = os.path.splitext(os.path.basename(os.path.abspath(source)))[0]
    else:
        checkpoint = model_file(source)
        state = load_checkpoint(checkpoint, libs.load_config(args.config) if args.config else None)
        model, config = model_from(state, checkpoint, ema="state_dict_ema" in state, guide=args.guide)
        settings = sampling_settings(model, config, **sampler_flags(args))
        name, folder = os.path.basename(checkpoint).split(".")[0], os.path.dirname(os.path.abspath(checkpoint))
        run_folder = folder if is_run(folder) else None

    # 2. Fail before the work starts
    json_path = args.output or os.path.join(run_folder or ".", f"evaluation_{name}.json")
    if not json_path.endswith(".json"):
        raise UsageError(f"--output: {json_path} must end in .json")
    png_path = json_path[:-len("json")] + "png"
    for path in (json_path, png_path):
        check_output(path, args.overwrite)
    check_count(args, args.num, "--num")
    if model:
        check_images(args.num, config, "--num")
    if config["dataset"]["split"] != "train" and not args.no_memorization:
        raise UsageError(f"dataset.split: {args.source} was trained on the {config['dataset']['split']} images, which "
                         "the search for copies takes for unseen ones; give --no-memorization")
    config["dataset"]["data_folder"] = args.data_folder or config["dataset"]["data_folder"]
    config["eval"]["features"] = args.features or config["eval"]["features"]
    if not model:
        data = config["dataset"]
        one, _, shape = libs.build_dataset(data["name"], "train", data["data_folder"], data["img_size"], limit=1)
        images = read_images(source, shape[0], one.classes, shape[1:])
        order = torch.randperm(len(images), generator=seeded_generator(args.seed, "subset"))
        images = images.take(order[:args.num])
        check_count(args, len(images), f"images in {args.source}")

    # 3. Real and generated images
    real = RealImages(config, device)
    check_count(args, len(real.test), "test images")
    figures = {"source": display_path(args.source), "data": config["dataset"]["name"]}
    if model:
        labels = labels_like(real.test.labels, len(real.train.classes), args.num)
        model_labels = match_classes(labels, real, state.get("classes", real.train.classes))
        model.to(device, memory_format=memory_format(device))
        if model.use_vae:
            real.reconstruct(model, device)
        print(f"drawing {len(labels):,} images: " + ", ".join(f"{k} {v}" for k, v in settings.items())
              + f", seed {args.seed}: {network_calls(model, settings)} network calls an image", flush=True)
        with (fast_sampling(model, device, pick_precision(config["dtype"], device)),
              progress_bar(len(labels), "image") as bar):
            images, _ = draw_samples(model, settings, model_labels, args.seed, args.batch_size, device, bar.update)
        images = ImageSet(images.images, labels, real.train.classes)
        figures |= {"step": state.get("step", 0), **settings, "network_calls": network_calls(model, settings),
                    "seed": args.seed}

    # 4. Compare them
    print("comparing" + ("" if args.no_memorization else ", then looking for copies of training images"), flush=True)
    report = evaluate(images, real, not args.no_memorization)
    figures |= {**report, "seconds": round(time.time() - started, 1)}
    print("\n".join(table(report)))
    with atomic_file(json_path) as f:
        f.write(json.dumps(figures, indent=1).encode())
    write_png(png_path, picture(images, real, report))
    print(f"{figures['seconds']:.0f} s; figures in {display_path(json_path)}, picture in {display_path(png_path)}")
    if run_folder:
        with SummaryWriter(os.path.join(run_folder, "logs")) as board:
            for tag, value in scalars(report).items():
                board.add_scalar(f"evaluation/{tag}", value, state.get("step", 0))


def is_run(folder):
    return os.path.isfile(os.path.join(folder, "config.txt"))


def config_of_images(args):
    """The configuration for a source that holds images."""
    if not args.config:
        raise UsageError(f"--config: {args.source} holds images; name the YAML file of the data set to compare with")
    given = [f"--{key.replace('_', '-')}" for key, value in sampler_flags(args).items() if value is not None]
    if given:
        raise UsageError(f"{given[0]}: {args.source} holds images; nothing is drawn")
    return libs.load_config(args.config)


def check_count(args, count, what):
    if count < LEAST and not args.no_memorization:
        raise UsageError(f"{what}: {count} is too few to look for copies; at least {LEAST}, or --no-memorization")


def match_classes(labels, real, classes):
    """Labels of the real images -> those of the model, by the classes' names."""
    unknown = [name for k, name in enumerate(real.train.classes) if name not in classes and (labels == k).any()]
    if unknown:
        raise UsageError(f"class {unknown[0]} of the data set is none of the model's ({', '.join(classes)})")
    return torch.tensor([classes.index(c) if c in classes else -1 for c in real.train.classes])[labels]


def table(report):
    """The figures as lines of text: generated images between their floor, real images, and their ceiling, noise."""
    titles = {"generated": "   generated", "floor": "   test images", "floor_augmented": "   augmented",
              "reconstructions": "   reconstructed",
              "ceiling": "       noise"}
    n, columns = report["n"], [key for key in titles if key in report]
    yield f"noise: {report['ceiling_n']:,} images; label accuracy, recognised: of all images" + (
        "; augmented: test images, cropped and mirrored as in training" if "floor_augmented" in report else "") + (
        "; reconstructed: test images, by the model's autoencoder" if "reconstructions" in report else "")
    rows = [(f"{report['metric']} to {n:,} training images", "fd_train", "{:.3f}"),
            (f"{report['metric']} to {n:,} test images", "fd_test", "{:.3f}"),
            ("kernel distance x 1000", "kd", "{:.3f}"),
            ("precision", "precision", "{:.3f}"), ("recall", "recall", "{:.3f}"),
            ("label accuracy", "label_accuracy", "{:.2%}"),
            ("recognised (ImageNet class of the label)", "recognised", "{:.2%}")]
    yield " " * 46 + "".join(titles[c] for c in columns)
    for text, key, form in rows:
        values = [form.format(report[c][key] * (1000 if key == "kd" else 1)) if key in report[c] else "-"
                  for c in columns]
        if any(v != "-" for v in values):
            yield f"{text:<46}" + "".join(f"{value:>{len(titles[c])}}" for c, value in zip(columns, values))
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
    order = torch.arange(min(100, len(images)))
    if images.labels is not None:  # the classes side by side
        order = images.labels[:len(order)].argsort(stable=True)
    panels = [(f"{len(order)} of {len(images):,} images", images.take(order).images)]
    for name, source in (("generated", images), ("held_out", real.test)) if "memorization" in report else ():
        pairs = report["memorization"]["closest"][name]
        closest, sources = (torch.tensor([pair[key] for pair in pairs]) for key in ("image", "train"))
        panels.append((f"the {name.replace('_', '-')} images most like a copy, above their nearest training images",
                       torch.cat([source.take(closest).images, real.train.take(sources).images])))
    return sheet(panels, 10)


if __name__ == "__main__":
    run(main)
