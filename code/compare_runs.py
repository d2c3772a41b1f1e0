"""Training runs of several kinds beside each other, the mean and spread over the runs of each kind.

python ./compare_runs.py ../logs/ddpm_0 ../logs/ddpm_1 ../logs/edm_0 ../logs/edm_1 \\
    --way DDPM=ddim:20 --way "EDM=heun:10 S_churn=5" --num 2000

A run's kind is its model_name. Of its averaged weights: the error of denoising held-out and training images, by noise
level, and for each --way of its kind the distance of its samples to the held-out images. What the --output holds
already is not measured again."""

import json
import os
import statistics
import time
from hashlib import sha256

import torch
from tqdm import tqdm

import libs
from libs.common.cli import Parser, positive, run
from compare_samplers import markdown, parse_table_args, parse_way
from libs.common.checkpoint import load_checkpoint, model_file
from libs.evaluation.classifier import file_hash
from libs.datasets import build_dataset
from libs.drawing import draw_images
from libs.common.errors import UsageError, display_path
from libs.evaluation.report import RealImages, against, denoising_error, labels_like
from libs.evaluation.features import EXTRACTORS
from libs.common.files import atomic_file
from libs.data.images import ImageSet, to_uint8
from libs.models import MODELS, model_from
from libs.training.update import memory_format, pick_device

SIGMAS = [0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0]  # where latents have a deviation of about 1
LEAST = 10  # samples
# settings in which runs of a kind may differ and still be repetitions of each other, maybe on another machine
FREE = ("seed", "devices", "dtype", "output_folder", "sample_cfg", "eval")
FREE_INSIDE = {"dataset": ("data_folder",), "loader": ("num_workers",),
               "train_cfg": ("compile", "cuda_graphs", "keep_last", "num_eval_samples"),
               "model": ("vae_encoder_weights", "vae_decoder_weights")}
# column -> (key of a row's numbers, how it is printed)
COLUMNS = {"FD to held-out images": ("fd_test", "{:.4g}"), "FD to training images": ("fd_train", "{:.4g}"),
           "precision": ("precision", "{:.3f}"), "recall": ("recall", "{:.3f}"),
           "seconds for 1,000 images": ("seconds_per_1000", "{:.1f}")}


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders, or checkpoints of train.py")
    parser.add_argument("--way", action="append", default=[], metavar="KIND=WAY",
                        help="a way to draw from the runs of this kind, as in compare_samplers.py")
    parser.add_argument("--num", type=positive, default=2000, help="images of each run and way (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--features", choices=list(EXTRACTORS), default=None,
                        help="whose features are compared (default: the config's eval.features)")
    args = parse_table_args(parser, "runs.json")
    if args.num < LEAST:
        raise UsageError(f"--num: {args.num} is too few; {LEAST} is the least")
    return args


def parse_ways(texts):
    """["EDM=heun:10 S_churn=5", ...] -> {"EDM": [{"sampler": "heun", ...}, ...], ...}"""
    ways = {}
    for text in texts:
        kind, _, way = text.partition("=")
        if kind not in MODELS:
            raise UsageError(f"--way: {text!r} must begin with one of {', '.join(MODELS)} and =, as in EDM=heun:10")
        ways.setdefault(kind, []).append(parse_way(way))
    return ways


def load_output(path):
    """What an earlier call wrote, or nothing. Raises UsageError for another file."""
    if not os.path.exists(path):
        return {"errors": [], "rows": []}
    try:
        with open(path) as f:
            saved = json.load(f)
        saved["errors"], saved["rows"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--output: {path} is no file of compare_runs.py") from None
    return saved


def save(path, saved):
    with atomic_file(path) as f:
        f.write(json.dumps(saved, indent=1).encode())
    with atomic_file(markdown(path)) as f:
        f.write(("\n".join(tables(saved)) + "\n").encode())


def spread(values, form):
    """ "mean (± standard deviation)" of the runs of a kind"""
    text = form.format(statistics.mean(values))
    return text + (f" (± {form.format(statistics.stdev(values))})" if len(values) > 1 else "")


def by(rows, *keys):
    """Rows in groups, in the order in which each first appears."""
    groups = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in keys]), []).append(row)
    return groups.values()


def kind_of(row, saved):
    """The name of a row's kind, with a mark where runs of other settings have the same."""
    others = {other["settings"] for other in saved["errors"] if other["kind"] == row["kind"]}
    return row["kind"] + (f" ({row['settings']})" if len(others) > 1 else "")


def tables(saved):
    """Lines of Markdown: how good samples are, then the error of denoising at each noise level."""
    kind = ("kind", "settings", "parameters", "images_seen")
    if saved["rows"]:
        yield from samples_table(saved, kind)
        yield ""
    yield "Mean squared error of denoised latents (or pixels), by noise level sigma, mean (± deviation) over the runs:"
    yield ""
    groups = list(by(saved["errors"], *kind))
    names = [f"{kind_of(same[0], saved)}, {same[0]['images_seen']:,} images seen, {split}" for same in groups
             for split in ("held out", "training")]
    yield "| sigma | " + " | ".join(names) + " |"
    yield "|" + "---|" * (1 + len(names))
    for k, sigma in enumerate(saved["sigmas"]):
        cells = [spread([row[split][k] for row in same], "{:.4f}") for same in groups for split in ("test", "train")]
        yield f"| {sigma:g} | " + " | ".join(cells) + " |"


def samples_table(saved, kind):
    yield (f"{saved['metric']} of {saved['num']:,} samples to all held-out and all training images; {saved['num']:,} "
           f"training images to the held-out ones: {saved['floor']:.4g}. Mean (± standard deviation) over the runs of "
           f"a kind; {saved['device']}, PyTorch {saved['torch']}")
    yield ""
    yield "| kind | parameters | images seen | runs | sampler | network calls | " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * (6 + len(COLUMNS))
    for same in by(saved["rows"], *kind, "way"):
        first = same[0]
        way = ", ".join(str(v) if k in ("sampler", "steps") else f"{k} {v}" for k, v in first["way"].items())
        cells = [kind_of(first, saved), f"{first['parameters']:,}", f"{first['images_seen']:,}", str(len(same)), way,
                 str(first["network_calls"])]
        cells += [spread([row[key] for row in same], form) for key, form in COLUMNS.values()]
        yield "| " + " | ".join(cells) + " |"


def real_latents(model, config, device):
    """split -> (images in the model's space, labels): the test images, and as many of the training images."""
    data, found, count = config["dataset"], {}, None
    for split in ("test", "train"):
        dataset, _, _ = build_dataset(data["name"], split, data["data_folder"], data["img_size"],
                                      (0, 1) if config["model"]["use_vae"] else (-1, 1),
                                      data["limit"] if split == "train" else None)
        dataset.augment, count = False, min(count or len(dataset), len(dataset))
        parts = [dataset.batch(part) for part in torch.linspace(0, len(dataset) - 1, count).long().split(50)]
        found[split] = (torch.cat([model.encode(images.to(device)) for images, _ in parts]),
                        torch.cat([labels for _, labels in parts]).to(device))
    return found


def load_run(path, data_folder):
    """(model, config, its classes or None, what a row says of the run)"""
    path = model_file(path)
    state = load_checkpoint(path)
    model, config = model_from(state, path)
    fixed = {key: {k: v for k, v in section.items() if k not in FREE_INSIDE.get(key, ())} if isinstance(section, dict)
             else section for key, section in config.items() if key not in FREE}
    if data_folder:
        config["dataset"]["data_folder"] = data_folder
    about = {"run": display_path(path), "hash": file_hash(path), "kind": config["model_name"], "seed": config["seed"],
             "settings": sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:6], "updates": state["step"],
             "parameters": sum(p.numel() for p in model.model.parameters())}
    return model, config, state.get("classes"), about


def check_runs(runs, ways):
    """Raise UsageError unless these runs can stand in one table. runs: path -> what `load_run` returned."""
    first = next(iter(runs))
    _, config, classes, _ = runs[first]
    latents, seen = _autoencoder(runs[first][0]), {}
    for path, (model, other, names, about) in runs.items():
        for way in ways.get(about["kind"], []):
            model.plan(**libs.sampling_options(other, **way))
        for key, value in config["dataset"].items():
            if other["dataset"][key] != value:
                raise UsageError(f"{path}: its dataset.{key} is {other['dataset'][key]}, that of {first} {value}")
        if _autoencoder(model) != latents:
            raise UsageError(f"{path}: what it diffuses is not what {first} does: other latents, or pixels")
        if names != classes:
            raise UsageError(f"{path}: its classes are not those of {first}")
        twin = seen.setdefault((about["settings"], about["seed"], about["updates"]), path)
        if twin != path:
            raise UsageError(f"{path}: is the same run as {twin}: the same settings and seed")
    unused = set(ways) - {about["kind"] for *_, about in runs.values()}
    if unused:
        raise UsageError(f"--way: none of the runs is of the kind {sorted(unused)[0]}")


def _autoencoder(model):
    return model.vae.hashes() if model.use_vae else None


def main():
    args = parse_args()
    ways, saved = parse_ways(args.way), load_output(args.output)
    device = pick_device([args.device])
    runs = {path: load_run(path, args.data_folder) for path in args.runs}
    check_runs(runs, ways)
    _, config, classes, _ = runs[args.runs[0]]
    config["eval"]["features"] = args.features or config["eval"]["features"]
    print("features of the real images, where no cache has them", flush=True)
    real = RealImages(config, device)
    if list(classes or real.train.classes) != list(real.train.classes):
        raise UsageError(f"{args.runs[0]}: its classes are not those of the data set")
    head = {"num": args.num, "seed": args.seed, "data": real.train.digest()[:12],
            "extractor_hash": real.extractor.hash, "sigmas": SIGMAS, "device": str(device)}
    for key, value in head.items():
        if saved.get(key, value) != value:
            raise UsageError(f"--output: {args.output} has {key} {saved[key]}, not {value}; give another name")
    saved |= {**head, "metric": real.extractor.metric, "floor": real.floor(args.num), "torch": torch.__version__}
    labels, latents = labels_like(real.test.labels, len(real.train.classes), args.num), None
    for model, config, _, about in runs.values():
        about["images_seen"] = about.pop("updates") * min(config["loader"]["batch_size"], len(real.train))
        model.to(device, memory_format=memory_format(device))
        if about["hash"] not in [row["hash"] for row in saved["errors"]]:
            latents = latents or real_latents(model, config, device)
            saved["errors"].append({**about, **{split: denoising_error(model, *latents[split], SIGMAS)
                                                for split in latents}})
            save(args.output, saved)
        for way in ways.get(about["kind"], []):
            options = libs.sampling_options(config, **way)
            options["steps"] = model.plan(**options).steps
            if (about["hash"], options) not in [(row["hash"], row["way"]) for row in saved["rows"]]:
                saved["rows"].append({**about, "way": options, **measure(model, options, labels, real, args, device)})
                save(args.output, saved)
        model.to("cpu")
    print("\n".join(tables(saved)))


def measure(model, options, labels, real, args, device):
    """Draw, and compare with the real images: name -> number."""
    calls, pixels, started = model.network_calls(**options), [], time.time()
    with tqdm(total=len(labels), desc=f"{options['sampler']}, {calls} calls", unit="image", disable=None) as bar:
        for batch in draw_images(model, labels, options, args.seed, args.batch_size, device):
            pixels.append(to_uint8(batch))
            bar.update(len(batch))
    seconds = time.time() - started
    return {"network_calls": calls, **against(ImageSet(torch.cat(pixels), labels, real.train.classes), real),
            "seconds_per_1000": 1000 * seconds / len(labels)}


if __name__ == "__main__":
    run(main)
