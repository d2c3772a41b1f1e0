"""The documents: every command parses, what is cheap also runs, every link leads somewhere."""

import argparse
import importlib.util
import json
import re
import shlex
import statistics
import sys
from functools import cache
from pathlib import Path

import pytest

import libs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [ROOT / name for name in ("README.md", "results/README.md", "results/speed.md", "pretrained/README.md",
                                      "code/README.md", "code/libs/stable_diffusion/README.md")]
OWN_RUN = re.compile(r"\b(RUN|CONFIG)\b|logs/")  # a placeholder, or what the reader trains first


@cache
def script(name):
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text):
    """Every command that starts a script of this repository, as a list of words from the script on."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    for line in lines:
        for part in line.lstrip("!").split("&&"):
            if re.match(r"(\S*[/\\])?(python3?|torchrun) .*\.py", part.strip()):
                words = shlex.split(part.replace("\\", "/"), comments=True)
                yield words[next(i for i, word in enumerate(words) if word.endswith(".py")):]


COMMANDS = [(document.relative_to(ROOT), words) for document in DOCUMENTS if document.is_file()
            for words in commands(document.read_text("utf-8"))]


def test_the_commands_are_found():
    found = {words[0] for _, words in COMMANDS}
    assert len(COMMANDS) > 50 and {"code/train.py", "code/sample.py", "code/compare.py", "zip_submission.py"} <= found


class Parsed(Exception):
    """A script's arguments, in place of what it would do with them."""


@pytest.fixture
def parse(monkeypatch):
    original = argparse.ArgumentParser.parse_args

    def stop(parser, argv=None, namespace=None):
        raise Parsed(original(parser, argv, namespace))

    def parse(module, argv):
        monkeypatch.setattr(sys, "argv", [module.__name__, *argv])
        with pytest.raises(Parsed) as parsed:
            module.main()
        return parsed.value.args[0]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return parse


@pytest.mark.parametrize("name", sorted({words[0] for _, words in COMMANDS}))
def test_every_command_is_accepted(name, parse, monkeypatch):
    """By the script's own parser; train.py's settings by load_config; weights and configs that it names are there."""
    monkeypatch.chdir(ROOT)
    module = script(name)
    for document, (first, *argv) in COMMANDS:
        if first != name:
            continue
        args = parse(module, argv)
        if name == "code/train.py" and args.config and not OWN_RUN.search(args.config):
            libs.load_config(args.config, args.set)
        for before, word in zip(["", *argv], argv):
            if word.startswith(("pretrained/", "configs/")) and before != "--output":
                assert (ROOT / word).is_file(), f"{document}: {word}"


@pytest.mark.parametrize("words", [words for document, words in COMMANDS if str(document) == "README.md" and (
    words[0] == "code/train.py" and "configs/mnist" in words[1] or
    words[0] == "code/sample.py" and words[1].startswith("pretrained/"))], ids=" ".join)
def test_a_recipe_runs(words, monkeypatch, tmp_path):
    """Training as far as --dry-run, drawing with two steps."""
    monkeypatch.chdir(ROOT)
    if words[0] == "code/train.py":
        small = ["--dry-run", "--set", f"output_folder={tmp_path}"]
    else:
        small = ["--num", "1", "--steps", "2", "--output", str(tmp_path / "drawn.png")]
    assert not script(words[0]).main([*words[1:], *small])
    assert [path.name for path in tmp_path.iterdir()] == ([] if "--dry-run" in small else ["drawn.png"])


def test_the_two_lines_that_start_from_nothing():
    lines = README.splitlines()
    setup = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    train = f"{setup} && .venv/bin/python code/train.py configs/mnist_cpu.yaml -c 1"
    test = f"{setup} -r requirements-extra.txt && .venv/bin/python -m pytest -n 2 --dist worksteal"
    assert lines.count(train) == lines.count(test) == 1
    assert next(line for line in lines if "-m pytest" in line) == test
    for line in (train, test):
        assert lines[lines.index(line) - 1] == lines[lines.index(line) + 1] == "```"
    for name in re.findall(r"-r (\S+)", README):
        assert (ROOT / name).is_file()
    assert len(lines) <= 230


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_table_of_results_names_files():
    table = (ROOT / "results/README.md").read_text("utf-8").split("## All files and commands")[1]
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        names = re.findall(r"`([^`]+)`", row)
        folder = ROOT / "results" / Path(names[0]).parent
        for name in names:
            path = ROOT / "results" / name if "/" in name.rstrip("/") else folder / name
            assert path.exists() or path.parent.joinpath(Path(names[0]).stem + name).exists(), name


def test_the_table_of_results_has_the_measured_numbers():
    def row(name):
        return next(line for line in README.splitlines() if line.startswith("|") and f"`{name}`" in line)

    for folder in ("mnist_cpu", "mnist"):
        report = json.loads((ROOT / "results" / folder / "evaluation.json").read_text())
        numbers = (f"| {report['network_calls']} (", f"{report['generated']['fd_train']:.3f} | {report['floor']['fd_train']:.3f}",
                   f"{100 * report['generated']['label_accuracy']:.2f} %")
        assert all(number in row(f"{folder}.yaml") for number in numbers)
    cats = json.loads((ROOT / "results/afhq_guided/evaluation.json").read_text())
    assert row("pretrained/afhq_cpu.pth.tar").endswith(f"| {cats['generated']['fd_train']:.0f} | {cats['floor']['fd_train']:.0f} "
                                                       f"| {100 * cats['generated']['recognised']:.0f} % |")
    runs = json.loads((ROOT / "results/afhq_models/runs.json").read_text())

    def both(*folders):
        """The mean distances and shares of two kinds of run in 20 calls, as README has them."""
        found = [[x for x in runs["rows"] if f"/afhq_cpu_{folder}_" in x["run"] and x["network_calls"] == 20] for folder in folders]
        distances, shares = ([statistics.mean(x[key] for x in same) for same in found] for key in ("fd_train", "recognised"))
        return (f"{distances[0]:.0f}; {distances[1]:.0f} | {cats['floor']['fd_train']:.0f} "
                f"| {100 * shares[0]:.0f} %; {100 * shares[1]:.0f} % |")

    assert f"20 (Euler) | {both('edm_flow', 'edm_small')}" in README
    assert f"20 (DDIM; DPM++) | {both('ddpm_v', 'ddpm_small')}" in README


def test_the_table_of_the_handout_names_what_exists():
    table = README.split("## The handout, item by item")[1].split("##")[0]
    placed = re.findall(r"`([\w.]+)`(?: and `([\w.]+)`)? in \[`[^`]+`\]\(([^)]+)\)", table)
    assert len(placed) >= 5
    for first, second, path in placed:
        for name in filter(None, (first, second)):
            assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (ROOT / path).read_text("utf-8")), name
    for name in ("p_sample", "p_sample_loop", "compute_loss"):
        assert f"`DDPM.{name}`" in table and name in vars(libs.DDPM)


# ---- code/README.md

BLOCKS = code_blocks((ROOT / "code/README.md").read_text("utf-8"), "python")


@pytest.mark.parametrize("block", BLOCKS[:2], ids=["a model of one's own", "a trained model"])
def test_use_from_python(block, monkeypatch):
    monkeypatch.chdir(ROOT / "code")
    names = {}
    exec(block.replace("timesteps=1000", "timesteps=3").replace("dim=64", "dim=8").replace("steps=10", "steps=2"), names)
    assert names["digits"].shape == (10, 1, 28, 28) and 0 <= names["digits"].min() <= names["digits"].max() <= 1
