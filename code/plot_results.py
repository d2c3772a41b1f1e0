"""Figures of a training run, or of a table of compare.py: PDFs that can be read in grey, and their numbers as CSV.

python code/plot_results.py RUN                                 into the run's folder, figures/
python code/plot_results.py RUN --output results/mine
python code/plot_results.py results/mnist_cpu/samplers.json     samplers.pdf beside it

Of a run: its losses (curves.csv, loss.pdf), its loss by noise level (loss_by_time.pdf), and the same labels and noise
after more and more epochs (samples_by_epoch.png)."""

import csv
import io
import json
import math
import os
import re
import statistics

from PIL import Image, ImageDraw, ImageFont

from libs.common.checkpoint import find_run
from libs.common.cli import Parser, check_output, positive, run
from libs.common.errors import UsageError, display_path, first_line
from libs.common.files import atomic_file
from libs.common.pictures import CAPTION
from libs.config import check_value, read_yaml
from libs.data.folders import open_image
from libs.evaluation.comparison import kind_name
from libs.training.autoencoder import GRID_ROW
from libs.training.autoencoder import NAME as AUTOENCODER

STYLES = [("black", "o", "-"), ("0.45", "s", "--"), ("black", "^", ":"), ("0.45", "D", "-."), ("black", "v", "--")]
TENTHS = "train_loss_by_time/"  # and the beginning of the tenth: train.py's tags
# the panels of loss.pdf, from top to bottom: label -> tag
LOSS = {"training loss": "train/loss", "learning rate": "train/lr", "gradient norm": "train/grad_norm"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", help="a run folder, or a JSON file of compare.py")
    parser.add_argument("--output", default=None, metavar="FOLDER", help="where the figures go (default: see above)")
    parser.add_argument("--epochs", type=positive, default=6, metavar="N", help="grids side by side (default 6)")
    parser.add_argument("--columns", type=positive, default=3, metavar="N", help="columns of each of them (default 3)")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that exist")
    return parser.parse_args(argv)


# ---- a run folder

def read_config(folder):
    """(images in a batch, images in each row of a grid)"""
    try:
        config = read_yaml(os.path.join(folder, "config.txt"))
        per_row = check_value("train_cfg.num_eval_samples", config["train_cfg"]["num_eval_samples"])
        return (check_value("loader.batch_size", config["loader"]["batch_size"]),
                GRID_ROW if config["model_name"] == AUTOENCODER else per_row)
    except (ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{folder} is no run folder: its config.txt cannot be read ({first_line(e)})") from None


def read_curves(folder):
    """tag -> [(step, value)], of all scalars on a run's TensorBoard. Raises UsageError where there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs, curves = os.path.join(folder, "logs"), {}
    if os.path.isdir(logs):
        events = EventAccumulator(logs, size_guidance={"scalars": 0}).Reload()
        curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    if "train/loss" not in curves:
        raise UsageError(f"{folder}: no train/loss on its TensorBoard; it has not come to its first line of the log")
    return curves


def curves_csv(curves):
    """All scalars as CSV: one row a step, one column a tag."""
    table = {}
    for tag, points in curves.items():
        for step, value in points:
            table.setdefault(step, {})[tag] = f"{value:.6g}"
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *curves], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": step, **values} for step, values in sorted(table.items()))
    return text.getvalue()


def samples_by_epoch(folder, per_row, n, columns):
    """The left `columns` of `n` of a run's grids, side by side, each under its epoch: a Pillow image, or None.

    per_row: images in each row of a grid, which has one pixel between them and around (torchvision's make_grid).
    """
    found = (re.fullmatch(r"sample-(\d+)\.png", name) for name in os.listdir(folder))
    grids = sorted((int(match[1]) + 1, os.path.join(folder, match[0])) for match in found if match)
    if not grids:
        return None
    parts, n = [], min(n, len(grids))
    for k in range(n):
        epoch, path = grids[round(k * (len(grids) - 1) / max(n - 1, 1))]
        with open_image(path, "samples") as picture:
            step = (picture.width - 1) // per_row
            parts.append((epoch, picture.convert("RGB").crop((0, 0, step * min(columns, per_row) + 1, picture.height))))
    font, width = ImageFont.load_default(), max(parts[0][1].width, 48) + 8
    sheet = Image.new("RGB", (width * len(parts) - 8, CAPTION + parts[0][1].height), "white")
    for k, (epoch, part) in enumerate(parts):
        ImageDraw.Draw(sheet).text((k * width, 4), f"epoch {epoch}", "black", font)
        sheet.paste(part, (k * width, CAPTION))
    return sheet


# ---- figures

def new_figure(rows, height):
    """A figure of the width of an A4 page's text, and its axes, one below the other, each `height` inches high."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("figures need matplotlib: pip install matplotlib") from None
    rcParams.update({"font.size": 9, "pdf.fonttype": 42, "axes.grid": True, "grid.color": "0.9",
                     "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 7,
                     "legend.frameon": False})
    figure = Figure(figsize=(6.3, height * rows), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def log_scale(axis, ticks=(1, 2, 5)):
    """Make an axis (`.xaxis` or `.yaxis`) logarithmic, with the multiples of 0.1, 1, 10, ... in `ticks` beside it."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def plot_losses(curves, batch_size):
    """The curves of LOSS that there are. curves: tag -> [(step, value)]."""
    panels = {label: curves[tag] for label, tag in LOSS.items() if tag in curves}
    figure, axes = new_figure(len(panels), 1.7)
    for axis, (label, points) in zip(axes, panels.items()):
        finite = [y for _, y in points if math.isfinite(y)]
        axis.plot([step for step, _ in points], [y if math.isfinite(y) else math.nan for _, y in points],  # NaN: a gap
                  color="black", linewidth=1, markersize=3, marker="o" if len(points) <= 40 else None)
        if finite and min(finite) > 0 and max(finite) > 4 * statistics.median(finite):  # else the start hides the rest
            log_scale(axis.yaxis)
        axis.set_ylabel(label)
    axes[-1].set_xlabel(f"updates of {batch_size} images")
    return figure


def plot_loss_by_time(curves, batch_size):
    """The loss in each tenth of the diffusion time; None where no loss is positive and finite."""
    tenths = {tag.removeprefix(TENTHS): [(step, value) for step, value in curves[tag] if 0 < value < math.inf]
              for tag in sorted(curves) if tag.startswith(TENTHS)}
    tenths = {start: points for start, points in tenths.items() if points}
    if not tenths:
        return None
    figure, (axis,) = new_figure(1, 3)
    from matplotlib import colormaps

    colors = {start: colormaps["viridis"](0.9 * k / max(len(tenths) - 1, 1)) for k, start in enumerate(tenths)}
    # the legend names the curves in the order of their ends, from top to bottom
    for start in sorted(tenths, key=lambda start: -tenths[start][-1][1]):
        axis.plot(*zip(*tenths[start]), color=colors[start], linewidth=1, label=f"{start} to {float(start) + 0.1:.1f}")
    axis.legend(title="t / T", loc="center left", bbox_to_anchor=(1, 0.5))
    log_scale(axis.yaxis)
    axis.margins(x=0)
    axis.set_xlabel(f"updates of {batch_size} images")
    axis.set_ylabel("loss, by t / T (0: least noise)")
    return figure


def plot_samplers(results):
    """Frechet distance over network calls: a line for each model, or kind of runs, and sampler, mean and deviation over
    the seeds.

    results: the content of a JSON file of compare.py.
    """
    runs = "errors" in results
    rows = [({"kind": kind_name(row, results), **row["way"]} if runs else
             {"model": os.path.basename(row["model"]).split(".")[0], "hash": row["hash"], **row["way"]},
             row["network_calls"], row["fd_test" if runs else "fd_train"]) for row in results["rows"]]
    # a line is named by those of its settings that are not the same in all rows
    keys = [key for key in dict.fromkeys(key for settings, _, _ in rows for key in settings)
            if key != "steps" and len({str(settings.get(key)) for settings, _, _ in rows}) > 1]
    lines = {}  # name -> network calls -> distances
    for settings, calls, distance in rows:
        name = ", ".join(str(settings[key]) if key in ("model", "hash", "kind", "sampler") else f"{key} {settings[key]}"
                         for key in keys if key in settings) or settings["sampler"]
        lines.setdefault(name, {}).setdefault(calls, []).append(distance)

    figure, (axis,) = new_figure(1, 3)
    for k, (name, points) in enumerate(lines.items()):
        points = sorted(points.items())
        color, marker, line = STYLES[k % len(STYLES)]
        axis.errorbar([calls for calls, _ in points], [statistics.mean(values) for _, values in points],
                      [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points], color=color,
                      marker=marker, linestyle=line, markersize=4, linewidth=1, capsize=2, label=name)
    axis.axhline(results["floor"], color="0.7", linewidth=0.8, label="real test images")
    log_scale(axis.xaxis, ticks=(1, 2, 4))
    axis.set_xlabel("network calls an image")
    axis.set_ylabel(f"{results['metric']}, n = {results['num' if runs else 'n']:,}")
    axis.legend()
    return figure


# ---- the command

def run_figures(folder, epochs, columns):
    """file name -> its content: text, a Pillow image, a Matplotlib figure, or None where there is nothing to show"""
    batch_size, per_row = read_config(folder)
    curves = read_curves(folder)
    return {"curves.csv": curves_csv(curves), "loss.pdf": plot_losses(curves, batch_size),
            "loss_by_time.pdf": plot_loss_by_time(curves, batch_size),
            "samples_by_epoch.png": samples_by_epoch(folder, per_row, epochs, columns)}


def comparison_figures(path):
    """The same for a JSON file of compare.py."""
    name = os.path.splitext(os.path.basename(path))[0] + ".pdf"
    try:
        with open(path, encoding="utf-8") as f:
            return {name: plot_samplers(json.load(f))}
    except UsageError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UsageError(f"{path} is no file of compare.py") from None


def write(path, content):
    data = io.BytesIO()
    if isinstance(content, str):
        data.write(content.encode())
    elif isinstance(content, Image.Image):
        content.save(data, "PNG")
    else:
        content.savefig(data, format="pdf", metadata={"CreationDate": None})  # the same numbers give the same file
    with atomic_file(path) as f:
        f.write(data.getvalue())


def main(argv=None):
    args = parse_args(argv)
    source = find_run(args.source)
    if not os.path.isfile(source) and not os.path.isdir(source):
        raise UsageError(f"{args.source}: no such run folder or file")
    if os.path.isdir(source):
        folder, figures = os.path.join(source, "figures"), run_figures(source, args.epochs, args.columns)
    else:
        folder, figures = os.path.dirname(source) or ".", comparison_figures(source)
    folder = args.output or folder
    figures = {name: content for name, content in figures.items() if content is not None}

    os.makedirs(folder, exist_ok=True)
    for name in figures:
        check_output(os.path.join(folder, name), args.overwrite)
    for name, content in figures.items():
        write(os.path.join(folder, name), content)
    print(f"{', '.join(figures)} in {display_path(folder)}")


if __name__ == "__main__":
    run(main)
