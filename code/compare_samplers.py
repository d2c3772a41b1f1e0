"""One table of several ways to draw from a model: network calls, seconds, and how good the images are.

python ./compare_samplers.py ../pretrained/mnist_cpu.pth.tar --num 2000 --seeds 3 \\
    heun:9 heun:18 "dpmpp_2m:14 guidance_scale=2 guidance_interval=0.3,4"

A way is SAMPLER[:STEPS], then settings of sample_cfg; what it leaves out is the config's, and `config` is all of them.
What the --output holds already is not drawn again, so that an interrupted comparison goes on, and a further way or
checkpoint only adds its rows."""

import argparse
import json
import os
import statistics
import time

import torch
import yaml
from tqdm import tqdm

import libs
from libs.common.cli import SETTINGS, Parser, check_output, interval, positive, run
from libs.common.checkpoint import load_checkpoint, model_file
from libs.evaluation.classifier import file_hash
from libs.config import check_value
from libs.drawing import draw_images
from libs.common.errors import UsageError, display_path
from libs.evaluation.report import RealImages, evaluate, labels_like, scalars
from libs.common.files import atomic_file
from libs.data.images import ImageSet, to_uint8
from libs.models import model_from
from libs.training.update import memory_format, pick_device

# column -> (key of a row's numbers, how it is printed, factor)
COLUMNS = {"label accuracy": ("label_accuracy", "{:.2f} %", 100), "FD": ("fd_train", "{:.3f}", 1),
           "floors": ("floors", "{:.1f}", 1), "precision": ("precision", "{:.3f}", 1), "recall": ("recall", "{:.3f}", 1),
           "seconds for 1,000 images": ("seconds_per_1000", "{:.1f}", 1)}


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of train.py, or a run folder")
    parser.add_argument("ways", nargs="+", metavar="WAY", help="ways to draw, see above")
    parser.add_argument("--num", type=positive, default=2000, help="images of each way and seed (default 2000)")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="draw with the seeds 0 to N - 1")
    return parse_table_args(parser, "samplers.json")


def parse_table_args(parser, output):
    """`parser.parse_args` with the flags of a script whose --output is a table that a further call adds to."""
    parser.add_argument("--output", default=output, metavar="FILE.json",
                        help=f"the figures, and beside them the table as FILE.md (default {output})")
    parser.add_argument("--batch-size", type=positive, default=200)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--data-folder", default=None, help="the real images, if they are not where the config says")
    args = parser.parse_args()
    if not args.output.endswith(".json"):
        raise UsageError(f"--output: {args.output} must end in .json")
    if not os.path.exists(args.output):  # one of ours is added to
        check_output(args.output)
        check_output(markdown(args.output))
    return args


def markdown(path):
    return path[:-len("json")] + "md"


def parse_way(text):
    """ "heun:9 guidance_scale=2" -> {"sampler": "heun", "steps": 9, "guidance_scale": 2}, settings of sample_cfg"""
    name, *settings = text.split() or [""]
    sampler, colon, steps = name.partition(":")
    unknown = [x for x in settings if x.partition("=")[0] not in SETTINGS[2:] or "=" not in x]
    if unknown:
        raise UsageError(f"{text!r}: {unknown[0]!r} is no setting; {', '.join(SETTINGS[2:])} are, as in guidance_scale=2")
    try:
        way = {} if name == "config" else {"sampler": sampler, "steps": int(steps) if colon else None}
        for key, _, value in (setting.partition("=") for setting in settings):
            value = interval(value) if key == "guidance_interval" else yaml.safe_load(value)
            way[key] = check_value(f"sample_cfg.{key}", value)
    except (ValueError, argparse.ArgumentTypeError, yaml.YAMLError) as e:
        why = f": {e}" if isinstance(e, UsageError) else ""
        raise UsageError(f"{text!r} is no way to draw such as 'heun:9 guidance_scale=2'{why}") from None
    return way


def load_rows(path, key):
    """The rows of an earlier call, of whatever checkpoint. Raises UsageError where they cannot be compared."""
    if not os.path.exists(path):
        return []
    try:
        with open(path) as f:
            saved = json.load(f)
        rows = saved["rows"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--output: {path} is no file of compare_samplers.py") from None
    other = [k for k in key if saved.get(k) != key[k]]
    if other:
        raise UsageError(f"--output: {path} has {other[0]} {saved.get(other[0])}, not {key[other[0]]}; give another name")
    return rows


def save(path, head, rows):
    with atomic_file(path) as f:
        f.write(json.dumps({**head, "rows": rows}, indent=1).encode())
    with atomic_file(markdown(path)) as f:
        f.write(("\n".join(table(head, rows)) + "\n").encode())


def table(head, rows):
    """Lines of Markdown: a row for each model and way, mean and standard deviation over its seeds."""
    yield (f"{head['num']:,} images of each way and seed; {head['metric']} to {head['n']:,} training images, floor (test "
           f"images) {head['floor']:.3f}; {head['device']}, PyTorch {head['torch']}")
    yield ""
    yield "| model | sampler | steps | other settings | network calls | seeds | " + " | ".join(COLUMNS) + " |"
    yield "|" + "---|" * (6 + len(COLUMNS))
    groups = {}
    for row in rows:
        groups.setdefault((row["model"], row["hash"], json.dumps(row["way"])), []).append(row)
    for (model, digest, _), same in groups.items():
        if any(row["model"] == model and row["hash"] != digest for row in rows):
            model += f" ({digest})"  # trained further, or another file of the same name
        way = dict(same[0]["way"])
        cells = [model, way.pop("sampler"), str(way.pop("steps")),
                 ", ".join(f"{k} {v}" for k, v in way.items()) or "-", str(same[0]["network_calls"]), str(len(same))]
        for key, form, factor in COLUMNS.values():
            values = [factor * row[key] for row in same if key in row]
            text = form.format(statistics.mean(values)) if values else "-"
            cells.append(text + (f" (± {form.format(statistics.stdev(values))})" if len(values) > 1 else ""))
        yield "| " + " | ".join(cells) + " |"


def main():
    args = parse_args()
    path = model_file(args.checkpoint)
    state = load_checkpoint(path)
    model, config = model_from(state, path)
    ways = []
    for text in args.ways:
        options = libs.sampling_options(config, **parse_way(text))
        plan = model.plan(**options)
        way = {**options, "sampler": plan.sampler, "steps": plan.steps}
        if way not in ways:
            ways.append(way)
    if args.data_folder:
        config["dataset"]["data_folder"] = args.data_folder
    device = pick_device([args.device])
    real = RealImages(config, device)
    if list(state.get("classes", real.train.classes)) != list(real.train.classes):
        raise UsageError(f"{display_path(path)}: its classes are not those of the data set; evaluate.py matches them by name")
    # what rows must have in common to stand in one table
    head = {"num": args.num, "data": real.train.digest()[:12], "extractor_hash": real.extractor.hash,
            "device": str(device)}
    rows = load_rows(args.output, head)
    done = {(row["hash"], json.dumps(row["way"]), row["seed"]) for row in rows}
    name, digest = display_path(args.checkpoint), file_hash(path)
    todo = [(way, seed) for seed in range(args.seeds) for way in ways
            if (digest, json.dumps(way), seed) not in done]

    calls = sum(model.network_calls(**way) for way, _ in todo) * args.num
    print(f"{len(todo)} sets of {args.num:,} images, {calls:,} network calls in all, on {device}, into {args.output}",
          flush=True)
    model.to(device, memory_format=memory_format(device))
    labels = labels_like(real.test.labels, model.num_classes, args.num)
    with tqdm(total=calls, unit="call", unit_scale=True, smoothing=0, disable=None) as bar:
        for way, seed in todo:
            cost, pixels, started = model.network_calls(**way), [], time.time()
            for batch in draw_images(model, labels, way, seed, args.batch_size, device):
                pixels.append(to_uint8(batch))
                bar.update(cost * len(batch))
            seconds = time.time() - started
            report = evaluate(ImageSet(torch.cat(pixels), labels, real.train.classes), real, memorization=False)
            numbers = scalars(report)
            head |= {"metric": report["metric"], "n": report["n"], "floor": report["floor"]["fd_train"],
                     "torch": torch.__version__}
            rows.append({"model": name, "hash": digest, "way": way, "seed": seed, "network_calls": cost,
                         "floors": numbers["fd_train"] / head["floor"], **numbers,
                         "seconds_per_1000": 1000 * seconds / args.num})
            save(args.output, head, rows)
    print("\n".join(table(head, rows)) if todo else "nothing is left to draw")


if __name__ == "__main__":
    run(main)
