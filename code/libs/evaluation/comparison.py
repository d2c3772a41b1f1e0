"""Timed drawing of samples, a file of results that grows, and tables of means: mostly for compare.py."""

import json
import os
import statistics
import time

import torch

from ..common.cli import check_output
from ..common.errors import UsageError, shown
from ..common.files import atomic_file
from ..data.images import ImageSet, to_uint8
from ..models import draw_images


def draw_samples(model, settings, labels, seed, batch_size, device, progress):
    """Draw one image per label: (ImageSet, seconds per 1,000 images). progress(n) is called after each n images."""
    pixels, started = [], time.time()
    for batch in draw_images(model, labels, settings, seed, batch_size, device):
        pixels.append(to_uint8(batch))
        progress(len(batch))
    return ImageSet(torch.cat(pixels), labels), 1000 * (time.time() - started) / len(labels)


class Results:
    """Rows of measurements in a JSON file, to which every call adds, and tables of them in a Markdown file beside it.

    Args:
        path: FILE.json; the tables go into FILE.md.
        lists: names of the lists of rows in the file.
        tables: function of the file's content, a dict, that gives the Markdown's lines.

    Raises UsageError for a file of something else, or one that cannot be written.
    """

    def __init__(self, path, lists, tables):
        if not path.endswith(".json"):
            raise UsageError(f"--output: {path} must end in .json")
        self.path, self.markdown, self.tables = path, path.removesuffix("json") + "md", tables
        self.content = {name: [] for name in lists}
        goes_on = os.path.exists(path)
        for name in (path, self.markdown):
            check_output(name, overwrite=goes_on)
        if goes_on:
            try:
                with open(path, encoding="utf-8") as f:
                    self.content = json.load(f)
                foreign = [key for key in ("errors", "rows") if key in self.content] != lists or not self.text()
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                foreign = True
            if foreign:
                raise UsageError(f"--output: {path} is not a file of this command of compare.py")

    def require(self, **conditions):
        """Record what all rows have in common. Raises UsageError where earlier rows were measured otherwise."""
        for key, value in conditions.items():
            if self.content.get(key, value) != value:
                raise UsageError(f"--output: {self.path} has {key} {shown(self.content[key])}, not {shown(value)}; "
                                 "give another name")
        self.content |= conditions

    def has(self, name, **values):
        """Whether the list `name` has a row with these values."""
        return any(all(row.get(key) == value for key, value in values.items()) for row in self.content[name])

    def add(self, name, row, **facts):
        """Append a row to the list `name`, record facts that hold for all rows, and write both files."""
        self.content |= facts
        self.content[name].append(row)
        for path, text in ((self.path, json.dumps(self.content, indent=1)), (self.markdown, self.text() + "\n")):
            with atomic_file(path) as f:
                f.write(text.encode())

    def text(self):
        return "\n".join(self.tables(self.content))


# ---- tables

def grouped(rows, *keys):
    """Lists of the rows that agree in all `keys`, in the order in which each list's first row appears."""
    groups = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in keys], sort_keys=True), []).append(row)
    return list(groups.values())


def kind_name(row, content):
    """A row's kind, with the hash of its settings where runs of other settings have the same kind."""
    hashes = {other["settings"] for other in content["errors"] if other["kind"] == row["kind"]}
    return row["kind"] + (f" ({row['settings']})" if len(hashes) > 1 else "")


def mean(values, form):
    """ "mean (± standard deviation)" of numbers, each printed by the function `form`; "-" for none."""
    if not values:
        return "-"
    return form(statistics.mean(values)) + (f" (± {form(statistics.stdev(values))})" if len(values) > 1 else "")


def means(rows, columns):
    """A cell for each column; columns: title -> (key of the rows, function that prints a number)."""
    return [mean([row[key] for row in rows if key in row], form) for key, form in columns.values()]


def markdown_table(titles, lines):
    """Lines of Markdown; lines: an iterable of lists of cells."""
    yield "| " + " | ".join(titles) + " |"
    yield "|" + "---|" * len(titles)
    for cells in lines:
        yield "| " + " | ".join(map(str, cells)) + " |"
