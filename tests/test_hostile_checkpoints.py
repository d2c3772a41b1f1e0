"""Checkpoints that were damaged, made up or moved: one line, status 2, and nothing is loaded, written or renamed."""

import glob
import json
import os
import shutil
import subprocess
import sys
import warnings
import zipfile

import pytest
import torch
from PIL import Image

from scripts import PROJECT, command, start, tiny_project

KERNEL, LAST = "model.conv_in.weight", 10 ** 9


def images(root, counts):
    for k, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20, 20), (100 * k + 20 * i,) * 3).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a config, and the run `runs/tiny_a` of two epochs; its first checkpoint as `.state()`."""
    class Place:
        root = tmp_path_factory.mktemp("place")
        config, run = root / "tiny.yaml", root / "runs" / "tiny_a"

        def state(self):
            return torch.load(self.run / "epoch_000.pth.tar", weights_only=True)

    place = Place()
    tiny_project(place.root, 20, train_cfg={"epochs": 2, "optimizer": "muon", "num_eval_samples": 1},
                 sample_cfg={"steps": 2})
    assert command("train.py", place.config, "--output", "a", "-c", 1).status == 0
    return place


def write(folder, state):
    """A run folder whose first of two checkpoints is `state`; returns its path."""
    folder.mkdir()
    torch.save(state, folder / "epoch_000.pth.tar")
    (folder / "epoch_001.pth.tar").write_bytes(b"later")
    (folder / "config.txt").write_text("as it was")
    return folder / "epoch_000.pth.tar"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- keys, types, ranges

def without(key):
    return lambda state: state.pop(key)


def with_(**values):
    return lambda state: state.update(values)


def weight(value):
    return lambda state: state["state_dict"].update({KERNEL: value})


def largest_state(name, value):
    """Replace a part of the optimizer's state of the largest parameter of AdamW's."""
    def change(state):
        entries = state["optimizer"]["state"].values()
        max(entries, key=lambda entry: entry.get("exp_avg_sq", torch.zeros(0)).numel())[name] = value
    return change


# a few of each kind, from end to end; the rules for each key are tested in test_checkpoint.py
CASES = {
    "epoch text": (with_(epoch="x"), "epoch", "'x'"), "step other": (with_(step=7), 7),
    "weight quantized": (weight("quantized"), KERNEL), "weight nested": (weight("nested"), KERNEL),
    "weight NaN": (weight("nan"), KERNEL, "finite"),
    "exp_avg short": (largest_state("exp_avg", torch.zeros(3)), "exp_avg", "optimizer"),
    "optimizer step": (largest_state("step", "x"), "step", "optimizer"),
}
KINDS = {"quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "nan": lambda w: w * torch.nan,
         "nested": lambda w: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}


@pytest.fixture(scope="module")
def outcomes(place, tmp_path_factory):
    """{case: (how train.py --resume ended, what the folder held before and afterwards)}; three processes at a time."""
    root, found, running = tmp_path_factory.mktemp("cases"), {}, []

    def finish():
        case, path, before, wait = running.pop(0)
        found[case] = wait(), before, contents(path.parent)

    for k, (case, (change, *_)) in enumerate(CASES.items()):
        state = place.state()
        kernel = state["state_dict"][KERNEL]
        change(state)
        weights = state.get("state_dict")
        if isinstance(weights, dict) and isinstance(weights.get(KERNEL), str):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # quantized and nested tensors are on their way out, or in
                weights[KERNEL] = KINDS[weights[KERNEL]](kernel)
        path = write(root / str(k), state)
        running.append((case, path, contents(path.parent), start("train.py", place.config, "--resume", path)))
        if len(running) == 3:
            finish()
    while running:
        finish()
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(outcomes, case):
    """train.py --resume says in one line what is wrong with the file, and leaves its folder as it was."""
    (r, before, after), (_, *words) = outcomes[case], CASES[case]
    assert r.status == 2 and all(str(word) in r.message for word in words) and len(r.message) < 1000, r
    assert after == before


def test_a_state_of_another_layout_is_only_copied(place, tmp_path):
    """Overlapping, shared, in half precision, of a subclass: what reaches the kernels is the parameter's own."""
    state = place.state()
    entries, weights = state["optimizer"]["state"], state["state_dict"]
    first, last = (entries[k] for k in (min(entries), max(entries)))
    first["exp_avg"] = torch.zeros(1).expand(first["exp_avg"].shape)
    last["exp_avg"] = last["exp_avg_sq"] = last["exp_avg"].half()
    weights[KERNEL] = torch.nn.Parameter(weights[KERNEL].half())
    state["optimizer"]["param_groups"][0] |= {"lr": "x", "eps": None, "fused": 3, "betas": 7, "params": torch.zeros(2)}
    path = tmp_path / "epoch_000.pth.tar"
    torch.save(state, path)
    r = command("train.py", place.config, "--resume", path)
    assert r.status == 0 and "done" in r.out, r


def test_no_resuming_beyond_the_end(place):
    """It would never end: the last epoch is never reached."""
    before = contents(place.run)
    r = command("train.py", place.config, "--resume", place.run, "--set", "train_cfg.epochs=1", seconds=8)
    assert r.status == 2 and "train_cfg.epochs" in r.message and contents(place.run) == before


# ---- size

@pytest.mark.parametrize("kind", ["compressed", "overlapping", "bytearray"])
def test_a_small_file_stays_small(place, tmp_path, kind):
    path, bomb = tmp_path / "model.pth.tar", tmp_path / "bomb.pth.tar"
    state = torch.load(place.run / "model_final.pth.tar", weights_only=True)
    torch.save({**state, "more": torch.zeros(2 ** 23) if kind == "compressed" else bytearray(8)}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(
            bomb, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED) as new:
        for member in old.namelist():
            content = old.read(member)
            if kind == "bytearray" and member.endswith("data.pkl"):
                start = content.index(b"\nbytearray\n") + len(b"\nbytearray\n")
                end = content.index(b"R", start)
                reduced = b"\x8a\x05" + (2 ** 32).to_bytes(5, "little") + b"\x85"  # bytearray(2 ** 32)
                content = content[:start] + reduced + content[end:]
            new.writestr(member, content)
        if kind == "overlapping":  # a hundred names for the largest member
            largest = max(new.infolist(), key=lambda m: m.file_size)
            for k in range(100):
                again = zipfile.ZipInfo(f"{largest.filename}{k}")
                again.CRC, again.file_size, again.compress_size = largest.CRC, largest.file_size, largest.compress_size
                again.header_offset, again.external_attr = largest.header_offset, largest.external_attr
                new.filelist.append(again)
    r = command("sample.py", bomb, "--output", tmp_path / "x.png", "--device", "cpu", cwd=tmp_path)
    assert r.status == 2 and "bomb.pth.tar" in r.message and r.memory < 2 * 2 ** 30
    assert not (tmp_path / "x.png").exists()


# ---- weights that are not finite, or astray

def test_sampling_needs_finite_weights(place, tmp_path):
    state = torch.load(place.run / "model_final.pth.tar", weights_only=True)
    state["state_dict_ema"][KERNEL][0] = torch.inf
    torch.save(state, tmp_path / "m.pth.tar")
    r = command("sample.py", tmp_path / "m.pth.tar", "--output", tmp_path / "x.png", "--device", "cpu")
    assert r.status == 2 and KERNEL in r.message and "m.pth.tar" in r.message and not (tmp_path / "x.png").exists()


def test_an_autoencoder_that_is_not_finite_stops_before_training(place, tmp_path):
    sets = []
    for half in ("encoder", "decoder"):
        weights = torch.load(os.path.join(PROJECT, "pretrained", f"afhq_{half}.pth"), weights_only=True)
        if half == "encoder":
            weights["0.weight"][0] = torch.nan
        torch.save(weights, tmp_path / f"{half}.pth")
        sets += ["--set", f"model.vae_{half}_weights={tmp_path / half}.pth"]
    r = command("train.py", place.config, "--dry-run", "--set", "model.use_vae=true", *sets)
    assert r.status == 2 and "encoder.pth" in r.message and "0.weight" in r.message and "finite" in r.message


def test_a_training_that_went_astray_keeps_nothing(place, tmp_path):
    r = command("train.py", place.config, "--set", "train_cfg.lr=1e10", "--set", "train_cfg.epochs=1", "--set",
                f"output_folder={tmp_path}", "--output", "astray")
    error = r.err.splitlines()[-1]
    assert r.status == 1 and "astray" in error and "train_cfg.lr" in error and "Traceback" not in r.err, r
    assert not list(tmp_path.rglob("*.pth.tar"))


# ---- a checkpoint that travels

def test_resuming_knows_the_labels(place, tmp_path):
    """An image that was moved to another class leaves number and classes as they are."""
    moved, path = images(tmp_path / "images", {"cat": 1, "dog": 3}), write(tmp_path / "run", place.state())
    before = contents(path.parent)
    r = command("train.py", place.config, "--resume", path, "--set", f"dataset.data_folder={moved}")
    assert r.status == 2 and "labels" in r.message and str(moved) in r.message and contents(path.parent) == before
    older = {key: value for key, value in place.state().items() if key != "labels_sha256"}
    torch.save(older, path)
    (tmp_path / "run" / "epoch_001.pth.tar").unlink()
    assert command("train.py", place.config, "--resume", path, "--set", f"dataset.data_folder={moved}").status == 0


def test_a_run_keeps_its_paths_and_an_export_none(place, tmp_path):
    assert place.state()["config"]["dataset"]["data_folder"] == str(place.root / "images")
    out = tmp_path / "model.pth.tar"
    assert command("export.py", place.run, out, "--half").status == 0
    config = torch.load(out, weights_only=True)["config"]
    assert (config["output_folder"], config["dataset"]["data_folder"]) == ("../logs", "../data")
    assert command("sample.py", out, "--output", tmp_path / "x.png", "--device", "cpu", "--num", 1).status == 0


@pytest.mark.parametrize("flags", [[], ["--half"]])
def test_no_export_of_what_cannot_be_drawn_with(place, tmp_path, flags):
    state, out = place.state(), tmp_path / "model.pth.tar"
    for change in (without("state_dict_ema"), lambda s: s["state_dict_ema"].update({KERNEL: None})):
        broken = dict(state, state_dict_ema=dict(state["state_dict_ema"]))
        change(broken)
        path = tmp_path / "epoch_000.pth.tar"
        torch.save(broken, path)
        r = command("export.py", path, out, *flags)
        assert r.status == 2 and "state_dict_ema" in r.message or KERNEL in r.message
        assert not out.exists()


DRIVER = """
import json, os, runpy, sys
sys.path[0] = "code"
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(os.path.join("code", script), run_name="__main__")
    except SystemExit as e:
        print(script, arguments[0], e.code or 0, file=sys.stderr)
"""


def test_a_clone_looks_for_data_in_itself(tmp_path):
    """The shipped models, in a copy of the project without data or network."""
    clone = tmp_path / "somewhere" / "clone"
    for part in ("code", "configs", "pretrained"):
        shutil.copytree(os.path.join(PROJECT, part), clone / part, ignore=shutil.ignore_patterns("__pycache__"))
    models = [f"pretrained/{os.path.basename(path)}" for path in
              sorted(glob.glob(os.path.join(PROJECT, "pretrained", "*_cpu.pth.tar")))]
    for model in models:
        config = torch.load(clone / model, weights_only=True)["config"]
        paths = [config["output_folder"], config["dataset"]["data_folder"],
                 *(config["model"][f"vae_{half}_weights"] for half in ("encoder", "decoder"))]
        assert all(path is None or path.startswith("../") and ".." not in path[3:] for path in paths)
    calls = [["evaluate.py", model, "--num", "200"] for model in models]
    calls += [["sample.py", model, *f"--steps 1 --num 1 --labels 0 --device cpu --output {k}.png".split()]
              for k, model in enumerate(models)]
    nowhere = "http://127.0.0.1:9"
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(calls)], cwd=clone, capture_output=True, text=True,
                          env=os.environ | {"http_proxy": nowhere, "https_proxy": nowhere, "PIP_RETRIES": "0",
                                            "OMP_NUM_THREADS": "1", "TORCH_HOME": str(clone / "torch"),
                                            "PYTHONDONTWRITEBYTECODE": "1"})
    assert "Traceback" not in done.stderr and models, done.stderr
    lines = done.stderr.splitlines()
    for model in models:
        status = next(line.split()[-1] for line in lines if line.startswith(f"evaluate.py {model} "))
        assert status in ("1", "2") and f"sample.py {model} 0" in lines
    errors = [line for line in lines if line.startswith("evaluate.py: error")]
    assert len(errors) == len(models) and all("data" in line and "../" not in line for line in errors), errors
    assert os.listdir(tmp_path) == ["somewhere"] and os.listdir(tmp_path / "somewhere") == ["clone"]
