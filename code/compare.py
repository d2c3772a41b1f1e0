"""Compare samplers of one model, or training runs of several kinds, in tables that grow.

python code/compare.py samplers pretrained/mnist_cpu.pth.tar heun:9 "dpmpp_2m:14 guidance_scale=2" --seeds 3
python code/compare.py runs ddpm_0 ddpm_1 edm_0 edm_1 --sampler DDPM=ddim:20 --sampler "EDM=heun:10 S_churn=5"

samplers: network calls, seconds and image quality of each SETTING; mean and standard deviation over the seeds.
runs: mean and standard deviation over the runs of each kind, which is their model_name, of the error of denoising
held-out and training images, by noise level, and for each --sampler of the distance of samples to held-out images.

A SETTING is SAMPLER[:STEPS], then KEY=VALUE of sample_cfg. The rest is the config's, which `config` alone takes as it is.
What --output holds already is not measured again: an interrupted comparison goes on, another call adds its rows."""

import json
from functools import cached_property
from hashlib import sha256

import torch

from libs.common.checkpoint import load_checkpoint, model_file
from libs.common.cli import Parser, positive, progress_bar, run
from libs.common.errors import UsageError, display_path, shown
from libs.config import parse_setting
from libs.evaluation import RealImages, denoising_error, distances_to_all, evaluate, file_hash, labels_like, scalars
from libs.evaluation.comparison import Results, draw_samples, grouped, kind_name, markdown_table, mean, means
from libs.evaluation.report import FLOORS
from libs.models import check_images, model_from, network_calls, sampling_settings
from libs.training.device import fast_sampling, memory_format, pick_device, pick_precision
from libs.training.speed import operations

SIGMAS = [0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0]  # where latents have a deviation of about 1
# title -> (key of a row, function that prints its numbers)
ACCURACY = {"label accuracy": ("label_accuracy", lambda x: f"{100 * x:.2f} %"),
            "recognised": ("recognised", lambda x: f"{100 * x:.2f} %")}
RATIO_TO_FLOOR = {"floors": ("floors", "{:.1f}".format)}
QUALITY_AND_TIME = {"precision": ("precision", "{:.3f}".format), "recall": ("recall", "{:.3f}".format),
                    "seconds for 1,000 images": ("seconds_per_1000", "{:.1f}".format)}
SAMPLER_COLUMNS = ACCURACY | {"FD": ("fd_train", "{:.3f}".format)} | RATIO_TO_FLOOR | QUALITY_AND_TIME
FACTS = {"parameters": ("parameters", "{:,}".format), "images seen": ("images_seen", "{:,}".format),
         "training, TFLOP": ("training_operations", lambda x: f"{x / 1e12:.1f}")}
RUN_COLUMNS = ACCURACY | {"FD to held-out images": ("fd_test", "{:.4g}".format)} | RATIO_TO_FLOOR | {
    "FD to training images": ("fd_train", "{:.4g}".format)} | QUALITY_AND_TIME
# settings in which runs of one kind may differ and still be repetitions of each other, maybe on other machines
FREE = {"seed", "devices", "dtype", "output_folder", "sample_cfg", "eval", "dataset.data_folder", "loader.num_workers",
        "train_cfg.compile", "train_cfg.keep_last", "train_cfg.num_eval_samples",
        "model.vae_encoder_weights", "model.vae_decoder_weights"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=lambda prog, **_: Parser(__doc__, prog))

    samplers = commands.add_parser("samplers")
    samplers.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of train.py, or a run folder")
    samplers.add_argument("settings", nargs="+", metavar="SETTING", help="of a sampler, see above")
    samplers.add_argument("--seeds", type=positive, default=1, metavar="N", help="draw with the seeds 0 to N - 1")

    runs = commands.add_parser("runs")
    runs.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or checkpoints of train.py")
    runs.add_argument("--sampler", action="append", default=[], metavar="KIND=SETTING",
                      help="draw from the runs of this kind with this setting")
    runs.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")

    for name, command in commands.choices.items():
        command.add_argument("--num", type=positive, default=2000, help="images of each row (default 2000)")
        command.add_argument("--output", default=f"{name}.json", metavar="FILE.json",
                             help=f"results; the tables go into FILE.md (default {name}.json)")
        command.add_argument("--batch-size", type=positive, default=200, help="images drawn at once (default 200)")
        command.add_argument("--device", default=None, help="cuda:0, mps or cpu (default: the best there is)")
    return parser.parse_args(argv)


class TrainedRun:
    """A run's averaged model, its config and classes (None: not known)."""

    def __init__(self, path):
        self.path = model_file(path)
        state = load_checkpoint(self.path)
        self.model, self.config = model_from(state, self.path)
        self.hash, self.classes, self.updates = file_hash(self.path), state.get("classes"), state.get("step", 0)

    @cached_property
    def operations(self):
        """Floating-point operations of training, for one image."""
        return operations(self.model)[1]

    def settings(self, texts):
        """The complete settings of a sampler that each text means for this model, without repetitions."""
        complete = [sampling_settings(self.model, self.config, **parse_setting(text)) for text in texts]
        return [setting for k, setting in enumerate(complete) if setting not in complete[:k]]

    def real_images(self, device):
        """The images of its data set. Raises UsageError where their classes are not the run's."""
        print("features of the real images, where no cache has them", flush=True)
        real = RealImages(self.config, device)
        if list(self.classes or real.train.classes) != list(real.train.classes):
            raise UsageError(f"{display_path(self.path)}: its classes are not those of the data set")
        return real


# ---- samplers

def compare_samplers(args):
    # 1. the model, its settings, the real images
    trained = TrainedRun(args.checkpoint)
    model, settings = trained.model, trained.settings(args.settings)
    results = Results(args.output, ["rows"], sampler_tables)
    device = pick_device(args.device)
    results.require(num=args.num, device=str(device))  # before the slow work
    check_images(args.num, trained.config, "--num")
    real = trained.real_images(device)
    results.require(data=real.train.digest()[:12], extractor_hash=real.extractor.hash)

    # 2. what is left to draw
    todo = [(seed, setting) for seed in range(args.seeds) for setting in settings
            if not results.has("rows", hash=trained.hash, way=setting, seed=seed)]
    calls = sum(network_calls(model, setting) for _, setting in todo) * args.num
    print(f"{len(todo)} sets of {args.num:,} images, {calls:,} network calls in all, on {device}, into {args.output}",
          flush=True)
    model.to(device, memory_format=memory_format(device))
    if model.use_vae and todo:
        real.reconstruct(model, device)
    labels = labels_like(real.test.labels, model.num_classes, args.num)

    # 3. a row for each
    with (fast_sampling(model, device, pick_precision(trained.config["dtype"], device)),
          progress_bar(calls, "call", unit_scale=True, smoothing=0) as bar):
        for seed, setting in todo:
            cost = network_calls(model, setting)
            samples, seconds = draw_samples(model, setting, labels, seed, args.batch_size, device,
                                            lambda n: bar.update(n * cost))
            report = evaluate(samples, real, memorization=False)
            numbers, floors = scalars(report), {key: report[key]["fd_train"] for key in FLOORS if key in report}
            row = {"model": display_path(args.checkpoint), "hash": trained.hash, "way": setting, "seed": seed,
                   "network_calls": cost, "floors": numbers["fd_train"] / floors["floor"], **numbers,
                   "seconds_per_1000": seconds}
            results.add("rows", row, metric=report["metric"], n=report["n"], **floors, torch=torch.__version__,
                        recognised={key: report[key]["recognised"] for key in floors if "recognised" in report[key]})
    print(results.text())


def floor_text(content, form):
    """The floors in a file: of real images, and of the same ones in other views."""
    views = dict(zip(FLOORS, ("", ", cropped and mirrored as in training ", ", reconstructed by the autoencoder ")))
    return "".join(text + format(content[key], form) for key, text in views.items() if key in content)


def recognised_text(content):
    """The floors of `recognised`, where they were measured."""
    floors = content.get("recognised")
    return f"recognised of the test images {floor_text(floors, '.2%')}; " if floors else ""


def measured(columns, rows):
    """The columns that any of the rows has a number for."""
    keys = {key for row in rows for key in row}
    return {title: column for title, column in columns.items() if column[0] in keys}


def sampler_tables(content):
    """Lines of Markdown: a row for each model and setting."""
    yield (f"{content['num']:,} images of each way and seed; {content['metric']} to {content['n']:,} training images, "
           f"floor (test images) {floor_text(content, '.3f')}; {recognised_text(content)}{content['device']}, "
           f"PyTorch {content['torch']}")
    yield ""
    names = {row["hash"]: row["model"] for row in reversed(content["rows"])}  # a file's first name
    lines, columns = [], measured(SAMPLER_COLUMNS, content["rows"])
    for group in grouped(content["rows"], "hash", "way"):
        digest, way = group[0]["hash"], dict(group[0]["way"])
        name = names[digest]
        if list(names.values()).count(name) > 1:  # trained further, or another file of the same name
            name += f" ({digest})"
        sampler, steps = way.pop("sampler"), way.pop("steps")
        others = ", ".join(f"{key} {value}" for key, value in way.items()) or "-"
        lines.append([name, sampler, steps, others, group[0]["network_calls"], len(group),
                      *means(group, columns)])
    yield from markdown_table(["model", "sampler", "steps", "other settings", "network calls", "seeds", *columns],
                              lines)


# ---- runs

def compare_runs(args):
    # 1. the runs, the settings of their samplers, the real images
    results = Results(args.output, ["errors", "rows"], run_tables)
    runs = [TrainedRun(path) for path in args.runs]
    check_comparable(runs)
    texts = settings_by_kind(args.sampler, {trained.config["model_name"] for trained in runs})
    jobs = [(trained, trained.settings(texts[trained.config["model_name"]])) for trained in runs]
    device = pick_device(args.device)
    results.require(num=args.num, seed=args.seed, sigmas=SIGMAS, device=str(device))
    check_images(args.num, runs[0].config, "--num")
    real = runs[0].real_images(device)
    results.require(data=real.train.digest()[:12], extractor_hash=real.extractor.hash)
    model = runs[0].model.to(device, memory_format=memory_format(device))
    if model.use_vae:
        real.reconstruct(model, device)
    facts = {"metric": real.extractor.metric, **real.floors_to_all(args.num), "torch": torch.__version__,
             "recognised": real.recognised_floors()}
    latents = real_latents(model, real, device)
    labels = labels_like(real.test.labels, len(real.train.classes), args.num)

    # 2. errors and samples of each run, those that the file does not have
    for trained, settings in jobs:
        model = trained.model.to(device, memory_format=memory_format(device))
        precision = pick_precision(trained.config["dtype"], device)
        row = description(trained, len(real.train))
        for known in results.content["errors"]:
            if known["hash"] == trained.hash:  # as it was described then, so that its rows stay together
                row = {key: known.get(key, value) for key, value in row.items()}
        if not results.has("errors", hash=trained.hash):
            errors = {split: denoising_error(model, *latents[split], SIGMAS) for split in latents}
            results.add("errors", {**row, **errors}, **facts)
        for setting in settings:
            if not results.has("rows", hash=trained.hash, way=setting):
                calls = network_calls(model, setting)
                with (fast_sampling(model, device, precision),
                      progress_bar(args.num, "image", f"{setting['sampler']}, {calls} calls") as bar):
                    samples, seconds = draw_samples(model, setting, labels, args.seed, args.batch_size, device,
                                                    bar.update)
                numbers = distances_to_all(samples, real)
                numbers["floors"] = numbers["fd_test"] / facts["floor"]
                results.add("rows", {**row, "way": setting, "network_calls": calls, **numbers,
                                     "seconds_per_1000": seconds}, **facts)
        model.to("cpu")
    print(results.text())


def check_comparable(runs):
    """Raise UsageError unless the runs can stand in one table."""
    def common(trained):
        yield from ((f"dataset.{key}", value) for key, value in trained.config["dataset"].items()
                   if f"dataset.{key}" not in FREE)
        yield "classes", trained.classes
        yield "autoencoder", trained.model.vae.hashes() if trained.model.use_vae else None

    for trained in runs[1:]:
        for (key, value), (_, first) in zip(common(trained), common(runs[0])):
            if value != first:
                raise UsageError(f"{trained.path}: its {key} is {value}, that of {runs[0].path} {first}")


def settings_by_kind(texts, kinds):
    """["EDM=heun:10 S_churn=5", ...] -> {"EDM": ["heun:10 S_churn=5", ...], ...}, a list for each of the kinds."""
    settings = {kind: [] for kind in kinds}
    for text in texts:
        kind, _, setting = text.partition("=")
        if kind not in kinds:
            raise UsageError(f"--sampler: {shown(text)} must begin with the kind of one of the runs, "
                             f"{' or '.join(sorted(kinds))}, as in EDM=heun:10")
        settings[kind].append(setting)
    return settings


def description(trained, images):
    """What a row says of its run. images: how many the training set has."""
    config, fixed, seen = trained.config, {}, trained.updates * min(trained.config["loader"]["batch_size"], images)
    for key, value in config.items():
        if isinstance(value, dict):
            value = {sub: x for sub, x in value.items() if f"{key}.{sub}" not in FREE}
        if key not in FREE:
            fixed[key] = value
    return {"run": display_path(trained.path), "hash": trained.hash, "kind": config["model_name"],
            "seed": config["seed"], "settings": sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:6],
            "parameters": sum(p.numel() for p in trained.model.model.parameters()), "images_seen": seen,
            "training_operations": seen * trained.operations}


def real_latents(model, real, device):
    """split -> (images in the model's space, labels): the test images, and at most as many of the training images."""
    low, high, latents = 0 if model.use_vae else -1, 1, {}
    for split, images in (("test", real.test), ("train", real.train)):
        chosen = images.take(torch.linspace(0, len(images) - 1, min(len(images), len(real.test))).long())
        encoded = [model.encode(x.to(device).float() * ((high - low) / 255) + low) for x in chosen.batches(50)]
        latents[split] = torch.cat(encoded), chosen.labels.to(device)
    return latents


def run_tables(content):
    """Lines of Markdown: how good samples are, then the error of denoising at each noise level."""
    kind = ("kind", "settings", "parameters", "images_seen")
    if content["rows"]:
        yield (f"{content['metric']} of {content['num']:,} samples to all held-out and all training images; "
               f"{content['num']:,} training images to the held-out ones: {floor_text(content, '.4g')}. "
               f"Mean (± standard deviation) over the runs of a kind; {recognised_text(content)}{content['device']}, "
               f"PyTorch {content['torch']}")
        yield ""
        lines, (facts, columns) = [], (measured(table, content["rows"]) for table in (FACTS, RUN_COLUMNS))
        for group in grouped(content["rows"], *kind, "way"):
            first = group[0]
            way = ", ".join(str(v) if k in ("sampler", "steps") else f"{k} {v}" for k, v in first["way"].items())
            lines.append([kind_name(first, content), *means([first], facts), len(group), way, first["network_calls"],
                          *means(group, columns)])
        yield from markdown_table(["kind", *facts, "runs", "sampler", "network calls", *columns], lines)
        yield ""
    yield "Mean squared error of denoised latents (or pixels), by noise level sigma, mean (± deviation) over the runs:"
    yield ""
    columns = {f"{kind_name(group[0], content)}, {group[0]['images_seen']:,} images seen, {title}": (group, split)
               for group in grouped(content["errors"], *kind)
               for split, title in (("test", "held out"), ("train", "training"))}
    yield from markdown_table(["sigma", *columns], (
        [f"{sigma:g}", *(mean([row[split][k] for row in group], "{:.4f}".format) for group, split in columns.values())]
        for k, sigma in enumerate(content["sigmas"])))


def main(argv=None):
    args = parse_args(argv)
    (compare_samplers if args.command == "samplers" else compare_runs)(args)


if __name__ == "__main__":
    run(main)
