"""Build report.pdf: fill the numbers and tables of report.tex in from ../results, then run LaTeX.

python writeup/build.py            (needs TeX Live with latexmk, TikZ and booktabs)

In report.tex, \\val{FILE}{PATH}{FORMAT} is one number of one results file. PATH is the keys and list positions in a JSON
file, or the words that a line of a text file begins with, up to the number; it may end in *FACTOR or /DIVISOR. FORMAT is
Python's. \\rows{NAME} is the body of a table, made below. Measured values stand in report.tex in no other way; the time
that a command took is in results/README.md."""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
BUILD = HERE / ".build"


@cache
def read(name):
    text = (RESULTS / name).read_text()
    if not name.endswith(".json"):
        return text
    found = json.loads(text)
    if name == "benchmark.json":  # by.CONFIG.ROW, whatever the order of the rows
        found["by"] = {}
        for row in found["rows"]:
            found["by"].setdefault(Path(row["config"]).stem, {})[row["row"]] = row
    return found


def value(name, path):
    """The number (or text) that `path` names in a results file."""
    path, factor = re.fullmatch(r"(.*?)([*/][\d.e-]+)?", path, re.S).groups()
    found = read(name)
    if isinstance(found, str):
        match = re.search("^" + re.escape(path) + r"[^\d\n-]*(-?[\d.,]*\d(?:e-?\d+)?)", found, re.M)
        if not match:
            sys.exit(f"build.py: {name} has no line that begins with {path!r} and a number")
        found = float(match[1].replace(",", ""))
    else:
        for key in path.split("."):
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, ValueError, TypeError):
                sys.exit(f"build.py: {name} has no {path}")
    if factor:
        number = float(factor[1:])
        found = found * number if factor[0] == "*" else found / number
    return found


def val(name, path, form=""):
    found = value(name, path)
    if form.endswith(("d", ",")) and isinstance(found, float):
        found = round(found)
    return format(found, form).replace("%", r"\%").replace("e-0", "e-")


# ---- tables: each yields rows of cells

def mean(values, form):
    text = format(statistics.mean(values), form)
    return text + (rf" $\pm$ {format(statistics.stdev(values), form)}" if len(values) > 1 else "")


def samplers():
    """Rows of `compare.py samplers`: two DDPMs and the quick start's flow, each with the fewest network calls first."""
    for name, file, model in (("handout's DDPM", "mnist/samplers.json", ""),
                              ("small DDPM", "mnist_cpu/samplers.json", "mnist_ddpm_cpu"),
                              ("flow", "mnist_cpu/samplers.json", "mnist_cpu")):
        groups = {}
        for row in read(file)["rows"]:
            if not model or Path(row["model"]).name == f"{model}.pth.tar":
                groups.setdefault(json.dumps(row["way"]), []).append(row)
        for same in sorted(groups.values(), key=lambda rows: rows[0]["network_calls"]):
            way = same[0]["way"]
            yield [name, sampler_name(way), way["steps"], f"{way['guidance_scale']:g}",
                   same[0]["network_calls"], mean([100 * row["label_accuracy"] for row in same], ".2f"),
                   *(mean([row[key] for row in same], ".3f") for key in ("fd_train", "precision", "recall"))]
            name = ""


def sampler_name(way):
    return NAMES[way["sampler"]] + (rf", $\eta = {way['eta']:g}$" if way.get("eta") else "")


NAMES = {"dpmpp_2m": "DPM++(2M)", "heun": "Heun", "euler": "Euler", "ddim": "DDIM", "ddpm": "Algorithm 2"}
# folders of the runs in ablations.json, less the seed -> what differs from the quick start
CHANGES = {"mnist_cpu_short": "none", "mnist_cpu_edm": "an EDM", "mnist_cpu_wide": r"\code{dim} 40, twice the channels at $7\times7$",
           "mnist_cpu_levels": r"noise levels of before ($P_{\mathrm{mean}}=-0.4$, $P_{\mathrm{std}}=1.2$)",
           "mnist_cpu_cosine": "the learning rate falls by a cosine", "mnist_cpu_batch32": "batches of 32, learning rate 0.003",
           "mnist_cpu_adamw": "AdamW", "mnist_cpu_adamw2": "AdamW, learning rate 0.002"}
# the same of afhq_models/runs.json -> which model
CATS = {"afhq_cpu_edm_flow": "flow", "afhq_cpu_edm_small": "EDM", "afhq_cpu_ddpm_v": "DDPM, $v$",
        "afhq_cpu_ddpm_small": "DDPM, noise"}


def trainings(rows, names):
    """A name, and the rows of the runs that differ in their seed alone, for each of the folders in `names`."""
    for folder, name in names.items():
        yield name, [row for row in rows if re.sub(r"_\d$", "", Path(row["run"]).parent.name) == folder]


def cats():
    """Rows of `compare.py runs`, fewest network calls first."""
    for name, found in trainings(read("afhq_models/runs.json")["rows"], CATS):
        for calls in sorted({row["network_calls"] for row in found}):
            same = [row for row in found if row["network_calls"] == calls]
            yield [name, sampler_name(same[0]["way"]), calls, mean([100 * row["recognised"] for row in same], ".1f"),
                   *(mean([row[key] for row in same], ".0f") for key in ("fd_test", "fd_train"))]
            name = ""


def denoising():
    """Each model's mean error of denoising the held-out cats, by noise level."""
    found = read("afhq_models/runs.json")
    for sigma in (0.1, 0.4, 1.0, 2.0, 5.0, 12.0):
        k = found["sigmas"].index(sigma)
        yield [f"{sigma:g}", *(mean([row["test"][k] for row in same], ".4f") for _, same in trainings(found["errors"], CATS))]


def recipes():
    """Rows of both recipes of the quick start, each trained with several seeds."""
    for name, files in (("the quick start", ("evaluation", "seed_1", "seed_2")),
                        ("the recipe before", ("earlier_0", "earlier_1", "earlier_2"))):
        found = [read(f"mnist_cpu/{file}.json")["generated"] for file in files]
        yield [name, len(found), *(mean([factor * row[key] for row in found], form) for key, factor, form in (
            ("label_accuracy", 100, ".2f"), ("fd_train", 1, ".3f"), ("fd_test", 1, ".3f"), ("precision", 1, ".3f"),
            ("recall", 1, ".3f")))]


def ablations():
    """Rows of the short trainings, those that differ in their seed alone together."""
    found = read("mnist_cpu/ablations.json")
    levels = [found["sigmas"].index(sigma) for sigma in (0.4, 1.0, 2.0)]
    errors = {row["run"]: [row["test"][k] for k in levels] for row in found["errors"]}
    for name, same in trainings(found["rows"], CHANGES):
        yield [name, len(same),
               *(format(statistics.mean(level), ".4f") for level in zip(*(errors[row["run"]] for row in same))),
               mean([row["fd_test"] for row in same], ".3f"), mean([100 * row["label_accuracy"] for row in same], ".2f")]


def evaluation():
    plain, unguided = read("mnist_cpu/evaluation.json"), read("mnist_cpu/unguided.json")
    for name, key, factor, form in (("FD (classifier) to training digits", "fd_train", 1, ".3f"),
                                    ("FD (classifier) to test digits", "fd_test", 1, ".3f"),
                                    (r"kernel distance $\times 1000$", "kd", 1000, ".2f"),
                                    ("precision", "precision", 1, ".3f"), ("recall", "recall", 1, ".3f"),
                                    (r"label accuracy (\%)", "label_accuracy", 100, ".2f")):
        columns = plain["generated"], unguided["generated"], plain["floor"], plain["ceiling"]
        yield [name, *(format(factor * c[key], form) if key in c else "--" for c in columns)]


def controls():
    for row in read("memorization/controls.json")["sets"]:
        kind = "no copies" if row["kind"] == "none" else row["kind"]
        yield [kind, f"{100 * row['true_share']:g}",
               f"{100 * row['share']:.1f} ({100 * row['share_low']:.1f} to {100 * row['share_high']:.1f})",
               "yes" if row["detected"] else "no"]


def speed():
    names = {"training": "ours", "training, naively": "ours, written naively",
             "lucidrains, as it comes": "lucidrains', as it comes", "lucidrains": "lucidrains', attention as ours",
             "diffusers": "diffusers, two blocks a level", "diffusers, one block a level": "diffusers, one block a level"}
    found = read("benchmark.json")["by"]["mnist"]
    for kind, name in names.items():
        row = found[kind]
        yield [name, f"{row['parameters'] / 1e6:.2f}", f"{row['operations'] / 1e9:.2f}",
               f"{row['images_per_s']:.1f}", f"{row['peak_memory'] / 2 ** 30:.2f}", rf"{100 * row['share']:.0f}",
               f"{row['images_per_s_ratio']:.1f}" if "images_per_s_ratio" in row else "--"]


def rows(name):
    return "\n".join(" & ".join(map(str, cells)) + r" \\" for cells in globals()[name]())


def fill(text):
    """report.tex with its numbers and tables in it."""
    text = re.sub(r"\\val\{([^}]*)\}\{([^}]*)\}\{([^}]*)\}", lambda match: val(*match.groups()), text)
    return re.sub(r"\\rows\{([^}]*)\}", lambda match: rows(match[1]), text)


def as_jpeg(text):
    """report.tex with the grids of cats as JPEG files, a quarter as large as PNG."""
    for name in set(re.findall(r"\{(afhq\w*/[^}]*\.png)\}", text)):
        jpeg = Path(name).with_suffix(".jpg")
        (BUILD / jpeg).parent.mkdir(parents=True, exist_ok=True)
        Image.open(RESULTS / name).save(BUILD / jpeg, quality=92, subsampling=0)
        text = text.replace(f"{{{name}}}", f"{{{jpeg.as_posix()}}}")
    return text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.parse_args(argv)


def main(argv=None):
    parse_args(argv)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "report.log").unlink(missing_ok=True)
    (BUILD / "report.tex").write_text(as_jpeg(fill((HERE / "report.tex").read_text())))
    if not shutil.which("latexmk"):
        sys.exit("build.py: latexmk is missing: install TeX Live (Debian: texlive-latex-extra texlive-pictures latexmk)")
    done = subprocess.run(["latexmk", "-g", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "-silent", "report.tex"],
                          cwd=BUILD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = (BUILD / "report.log").read_text(errors="replace") if (BUILD / "report.log").exists() else ""
    wrong = re.findall(r"^(?:! .*|Overfull .*|LaTeX Warning: (?:Reference|Citation).*)$", log, re.M)
    if done.returncode or wrong:
        sys.exit("build.py: " + "\nbuild.py: ".join(wrong or ["LaTeX failed: see writeup/.build/report.log"]))
    shutil.copy(BUILD / "report.pdf", HERE / "report.pdf")
    pages = re.search(r"Output written on report.pdf \((\d+) pages", log)[1]
    print(f"report.pdf: {pages} pages")


if __name__ == "__main__":
    main()
