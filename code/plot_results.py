"""Figures of a training run, or of a comparison of samplers: PDFs that can be read in grey, and their numbers as CSV.

python ./plot_results.py ../logs/RUN                            into ../logs/RUN/figures
python ./plot_results.py ../logs/RUN --output ../results/mine
python ./plot_results.py ../results/mnist_cpu/samplers.json     samplers.pdf beside it

Of a run: its losses (curves.csv, loss.pdf), its loss per noise level (loss_by_time.pdf), its evaluations where it has
some (eval.pdf), and the same labels and noises after more and more epochs (samples_by_epoch.png)."""

import csv
import io
import json
import math
import os
import re
import statistics

import yaml
from PIL import Image, ImageDraw, ImageFont

from libs.common.cli import Parser, check_output, positive, run
from libs.training.autoencoder import GRID_ROW
from libs.training.autoencoder import NAME as AUTOENCODER
from libs.common.errors import UsageError, first_line, display_path
from libs.common.files import atomic_file
from libs.common.pictures import CAPTION, write_png

WIDTH = 6.3  # inches: the text of an A4 page
TENTHS = "loss_by_time/"  # and the tenth's beginning: train.py's tags
STYLES = [("black", "o", "-"), ("0.45", "s", "--"), ("black", "^", ":"), ("0.45", "D", "-."), ("black", "v", "--")]


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("source", help="a run folder, or a JSON file of compare_samplers.py")
    parser.add_argument("--output", default=None, metavar="FOLDER", help="where the figures go (default: see above)")
    parser.add_argument("--epochs", type=positive, default=6, metavar="N", help="grids side by side (default 6)")
    parser.add_argument("--columns", type=positive, default=3, metavar="N", help="columns of each of them (default 3)")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that exist")
    return parser.parse_args()


def new_figure(rows=1, height=2.4):
    """A Matplotlib figure of the width of a page, and its axes, one below the other."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("figures need matplotlib: pip install -r requirements-extra.txt") from None
    rcParams.update({"font.size": 9, "pdf.fonttype": 42, "axes.grid": True, "grid.color": "0.9",
                     "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def log_scale(axis):
    """Make an axis (`.xaxis` or `.yaxis`) logarithmic, with 0.1, 0.2, 0.5, 1, ... beside it."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def write_figure(path, figure):
    data = io.BytesIO()
    figure.savefig(data, format="pdf", metadata={"CreationDate": None})  # the same numbers give the same file
    with atomic_file(path) as f:
        f.write(data.getvalue())


# ---- a run folder

def read_curves(folder):
    """tag -> [(step, value)], of all scalars on a run's TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = os.path.join(folder, "logs")
    if not os.path.isdir(logs):
        return {}
    events = EventAccumulator(logs, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def read_config(folder):
    """(images in a batch, images in each row of a grid)"""
    try:
        with open(os.path.join(folder, "config.txt"), encoding="utf-8") as f:
            config = yaml.safe_load(f)
        per_row = GRID_ROW if config["model_name"] == AUTOENCODER else config["train_cfg"]["num_eval_samples"]
        return config["loader"]["batch_size"], per_row
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as e:
        raise UsageError(f"{folder} is no run folder: its config.txt cannot be read ({first_line(e)})") from None


def write_curves(path, curves):
    """All scalars, one row a step, one column a tag."""
    table = {}
    for tag, points in curves.items():
        for step, value in points:
            table.setdefault(step, {})[tag] = f"{value:.6g}"
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *curves], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **values} for step, values in sorted(table.items()))
    with atomic_file(path) as f:
        f.write(text.getvalue().encode())


def draw_curve(axis, points, **style):
    """A line through (step, value) pairs; a value that is not finite leaves a gap."""
    axis.plot([step for step, _ in points], [y if math.isfinite(y) else math.nan for _, y in points], **style)


def plot_loss(curves, batch_size):
    """The loss above, what governs it below."""
    panels = [(tag, label) for tag, label in (("train/loss", "training loss"), ("train/lr", "learning rate"),
                                              ("train/grad_norm", "gradient norm")) if tag in curves]
    figure, axes = new_figure(len(panels), 1.7)
    for axis, (tag, label) in zip(axes, panels):
        draw_curve(axis, curves[tag], color="black", linewidth=1)
        axis.set_ylabel(label)
        values = sorted(value for _, value in curves[tag] if math.isfinite(value))
        if values and values[0] > 0 and values[-1] > 4 * values[len(values) // 2]:  # else the start hides the rest
            log_scale(axis.yaxis)
    axes[-1].set_xlabel(f"updates of {batch_size} images")
    return figure


def spread(values, least):
    """`values`, moved apart as little as it takes for neighbours to be `least` apart, in the same order."""
    order = sorted(range(len(values)), key=lambda k: values[k])
    places = [values[k] - least * rank for rank, k in enumerate(order)]
    blocks = []  # isotonic regression: what falls back joins what is before it, at their mean
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and statistics.mean(blocks[-2]) > statistics.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [mean for block in blocks for mean in [statistics.mean(block)] * len(block)]
    return [level[rank] + least * rank for rank in sorted(range(len(order)), key=lambda rank: order[rank])]


def plot_tenths(curves, batch_size):
    """The loss in each tenth of the diffusion time, each curve named at its end."""
    from matplotlib import colormaps

    figure, (axis,) = new_figure(1, 3)
    tenths = {tag.split("/")[1]: [(step, value) for step, value in curves[tag] if 0 < value < math.inf]
              for tag in sorted(curves) if tag.startswith(TENTHS)}
    tenths = {start: points for start, points in tenths.items() if points}
    logs = [math.log(value) for points in tenths.values() for _, value in points]
    low, high = min(logs), max(logs)
    margin = 0.03 * (high - low) or 0.1
    low, high = low - margin, high + margin
    places = spread([math.log(points[-1][1]) for points in tenths.values()], 0.055 * (high - low))
    for k, ((start, points), place) in enumerate(zip(tenths.items(), places)):
        color = colormaps["viridis"](0.9 * k / max(len(tenths) - 1, 1))
        axis.plot(*zip(*points), color=color, linewidth=1)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        axis.annotate(f"{start} to {float(start) + 0.1:.1f}", points[-1], (1.03, (place - low) / (high - low)),
                      textcoords="axes fraction", va="center", fontsize=7, arrowprops=line, annotation_clip=False)
    log_scale(axis.yaxis)
    axis.set_ylim(math.exp(low), math.exp(high))
    axis.margins(x=0)
    axis.set_xlabel(f"updates of {batch_size} images")
    axis.set_ylabel("loss, by t / T (0: least noise)")
    return figure


# the axes of eval.pdf: label -> tags
EVALUATIONS = {"Frechet distance": ("fd_train", "fd_test", "fd_floor"),
               "share": ("precision", "recall", "label_accuracy"), "PSNR (dB)": ("psnr",), "SSIM": ("ssim",)}


def plot_evaluations(curves, batch_size):
    panels = {label: [tag for tag in tags if f"eval/{tag}" in curves] for label, tags in EVALUATIONS.items()}
    panels = {label: tags for label, tags in panels.items() if tags}
    figure, axes = new_figure(len(panels), 1.8)
    for axis, (label, tags) in zip(axes, panels.items()):
        for tag, (color, marker, line) in zip(tags, STYLES):
            draw_curve(axis, curves[f"eval/{tag}"], color=color, marker=marker, linestyle=line, markersize=3,
                       linewidth=1, label=tag.replace("_", " "))
        axis.set_ylabel(label)
        if label == "Frechet distance":
            log_scale(axis.yaxis)
        if len(tags) > 1:
            axis.legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel(f"updates of {batch_size} images")
    return figure


def sample_grids(folder):
    """[(epoch, path)] of a run's grids, by epoch."""
    found = (re.fullmatch(r"sample-(\d+)\.png", name) for name in os.listdir(folder))
    return sorted((int(match[1]) + 1, os.path.join(folder, match[0])) for match in found if match)


def samples_by_epoch(grids, per_row, n, columns):
    """The left `columns` of `n` of the grids, side by side, each under its epoch: a Pillow image.

    per_row: images in each row of a grid, which has one pixel between them and around (torchvision's make_grid).
    """
    chosen = sorted({round(k * (len(grids) - 1) / max(n - 1, 1)) for k in range(n)})
    parts = []
    for epoch, path in (grids[k] for k in chosen):
        with Image.open(path) as picture:
            step = (picture.width - 1) // per_row
            parts.append((epoch, picture.convert("RGB").crop((0, 0, step * min(columns, per_row) + 1, picture.height))))
    font, width = ImageFont.load_default(), max(parts[0][1].width, 48) + 8
    sheet = Image.new("RGB", (width * len(parts) - 8, CAPTION + parts[0][1].height), "white")
    for k, (epoch, part) in enumerate(parts):
        ImageDraw.Draw(sheet).text((k * width, 4), f"epoch {epoch}", "black", font)
        sheet.paste(part, (k * width, CAPTION))
    return sheet


def plot_run(folder, args):
    batch_size, per_row = read_config(folder)
    curves = read_curves(folder)
    if "train/loss" not in curves:
        raise UsageError(f"{folder}: no train/loss on its TensorBoard; it has not come to its first line of the log")
    grids = sample_grids(folder)
    makers = {"curves.csv": lambda path: write_curves(path, curves),
              "loss.pdf": lambda path: write_figure(path, plot_loss(curves, batch_size))}
    if any(0 < value < math.inf for tag in curves if tag.startswith(TENTHS) for _, value in curves[tag]):
        makers["loss_by_time.pdf"] = lambda path: write_figure(path, plot_tenths(curves, batch_size))
    if any(f"eval/{tag}" in curves for tags in EVALUATIONS.values() for tag in tags):
        makers["eval.pdf"] = lambda path: write_figure(path, plot_evaluations(curves, batch_size))
    if grids:
        sheet = samples_by_epoch(grids, per_row, args.epochs, args.columns)
        makers["samples_by_epoch.png"] = lambda path: write_png(path, sheet)
    return args.output or os.path.join(folder, "figures"), makers


# ---- a comparison of samplers

def read_comparison(path):
    """(what the file says of all rows, [(series, network calls, Frechet distance)]).

    A series is one model drawn in one way, with any number of steps. It is named by what sets it apart from the others.
    """
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
        rows = [({"model": os.path.basename(row["model"]).split(".")[0], "hash": row["hash"],
                  **{key: str(value) for key, value in row["way"].items() if key != "steps"}},
                 row["network_calls"], row["fd_train"]) for row in saved["rows"]]
        saved["metric"], saved["n"], saved["floor"], rows[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise UsageError(f"{path} is no file of compare_samplers.py with rows in it ({first_line(e)})") from None
    keys = list(dict.fromkeys(key for series, _, _ in rows for key in series))
    apart = [key for key in keys if len({series.get(key) for series, _, _ in rows}) > 1]
    return saved, [(", ".join(series[key] if key in ("model", "hash", "sampler") else f"{key} {series[key]}"
                              for key in apart if key in series) or series["sampler"], calls, fd)
                   for series, calls, fd in rows]


def plot_samplers(saved, rows):
    """Frechet distance over network calls: a line for each series, mean and standard deviation over the seeds."""
    figure, (axis,) = new_figure(1, 3)
    for k, name in enumerate(dict.fromkeys(series for series, _, _ in rows)):
        points = {}
        for series, calls, fd in rows:
            if series == name:
                points.setdefault(calls, []).append(fd)
        calls = sorted(points)
        means = [statistics.mean(points[c]) for c in calls]
        deviations = [statistics.stdev(points[c]) if len(points[c]) > 1 else 0 for c in calls]
        color, marker, line = STYLES[k % len(STYLES)]
        axis.errorbar(calls, means, deviations, color=color, marker=marker, linestyle=line, markersize=4, linewidth=1,
                      capsize=2, label=name)
    axis.axhline(saved["floor"], color="0.7", linewidth=0.8, label="real test images")
    log_scale(axis.xaxis)
    axis.set_xlabel("network calls an image")
    axis.set_ylabel(f"{saved['metric']}, n = {saved['n']:,}")
    axis.legend(fontsize=7, frameon=False)
    return figure


def plot_comparison(path, args):
    saved, rows = read_comparison(path)
    name = os.path.splitext(os.path.basename(path))[0] + ".pdf"
    figure = plot_samplers(saved, rows)
    return args.output or os.path.dirname(path) or ".", {name: lambda path: write_figure(path, figure)}


def main():
    args = parse_args()
    if not os.path.exists(args.source):
        raise UsageError(f"{args.source}: no such run folder or file")
    folder, makers = (plot_run if os.path.isdir(args.source) else plot_comparison)(args.source, args)
    os.makedirs(folder, exist_ok=True)
    for name in makers:
        check_output(os.path.join(folder, name), args.overwrite)
    for name, make in makers.items():
        make(os.path.join(folder, name))
    print(f"{', '.join(makers)} in {display_path(folder)}")


if __name__ == "__main__":
    run(main)
