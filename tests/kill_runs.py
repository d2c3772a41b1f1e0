"""Kill trainings at random moments and resume them, until they end with the bits of one that was never killed.

python tests/kill_runs.py --times 100 --seed 0

DDPM, EDM and latent runs in turn. No test of the suite, as it takes minutes.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from scripts import PROJECT, start

EPOCHS, UPDATES = 6, 6
KINDS = {
    "DDPM": {"model_name": "DDPM"},
    "EDM": {"model_name": "EDM", "sample_cfg": {"sampler": "heun", "steps": 4}},
    "latent": {"model_name": "EDM", "sample_cfg": {"sampler": "heun", "steps": 4}, "model": {
        "use_vae": True, **{f"vae_{half}_weights": os.path.join(PROJECT, "pretrained", f"afhq_{half}.pth")
                            for half in ("encoder", "decoder")}}}}


def write_config(root, kind, **train_cfg):
    """A config of a training of a second or two, on images beside it; its runs are in root/runs. Returns its path."""
    rng = np.random.default_rng(0)
    for k in range(UPDATES * 4):
        folder = root / "images" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    given = KINDS[kind]
    size = 32 if kind == "latent" else 16
    path = root / f"{kind}.yaml"
    path.write_text(yaml.safe_dump({
        "sample_cfg": {"sampler": "ddim", "steps": 4}, **given, "devices": ["cpu"], "output_folder": str(root / "runs"),
        "dataset": {"name": "ImageFolder", "data_folder": str(root / "images"), "img_size": size, "latent_crops": 0},
        "loader": {"batch_size": 4}, "train_cfg": {"epochs": EPOCHS, "warmup": 5, "num_eval_samples": 1, **train_cfg},
        "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [1], "timesteps": 20,
                  "label_dropout": 0.2, "dropout": 0.1, **given.get("model", {})}}))
    return path


def differences(a, b, where="checkpoint"):
    """Where two nested values differ, to the last bit."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        return [x for k in a.keys() | b.keys() for x in differences(a.get(k), b.get(k), f"{where}.{k}")]
    if isinstance(a, (list, tuple)):
        nested = [x for k, y in enumerate(zip(a, b)) for x in differences(*y, f"{where}[{k}]")]
        return [where] * (len(a) != len(b)) + nested
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [where]


def compare(folder, other):
    """Differences of two finished run folders: final checkpoints, weights, grids; leftovers of the first."""
    found = [str(p) for pattern in ("*.partial", "running") for p in folder.glob(pattern)]
    for name in (f"epoch_{EPOCHS - 1:03d}.pth.tar", "model_final.pth.tar"):
        found += differences(*(torch.load(f / name, weights_only=True) for f in (folder, other)), name)
    name = f"sample-{EPOCHS - 1}.png"
    return found + [name] * ((folder / name).read_bytes() != (other / name).read_bytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="kills (default 100)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, root = random.Random(args.seed), Path(tempfile.mkdtemp())
    whole, kills, runs, equal = {}, 0, 0, 0
    while kills < args.times:
        kind = list(KINDS)[runs % len(KINDS)]
        if kind not in whole:
            config = write_config(root, kind)
            for _ in range(2):  # the second time everything is in the page cache
                shutil.rmtree(root / "runs" / f"{kind}_whole", ignore_errors=True)
                ended = start("train.py", config, "-c", 1, "--output", "whole", seconds=100)()
                assert ended.status == 0, ended
            whole[kind] = config, ended.seconds
        config, seconds = whole[kind]
        folder, done = root / "runs" / f"{kind}_{runs}", False
        while not done:
            resumed = any(folder.glob("epoch_*.pth.tar"))
            if not resumed:  # killed before its first checkpoint: begun again
                shutil.rmtree(folder, ignore_errors=True)
            go_on = ["--resume", folder] if resumed else ["--output", runs]
            wait = start("train.py", config, "-c", 1, *go_on, seconds=100)
            if kills < args.times:
                delay = rng.uniform(0, seconds)
                wait.process.join(delay)
                wait.process.kill()
            ended = wait()
            done = ended.status == 0
            if not done:
                assert ended.status == -signal.SIGKILL, ended
                kills += 1
                newest = max((p.name for p in folder.glob("epoch_*.pth.tar")), default="no checkpoint")
                half = " and a file half written" * any(folder.glob("*.partial"))
                print(f"kill {kills} of {args.times}: {kind} run {runs} after {delay:.2f} s, with {newest}{half}",
                      flush=True)
        found = compare(folder, root / "runs" / f"{kind}_whole")
        print(f"{kind} run {runs} is done: " + ("the same bits" if not found else "differs in " + ", ".join(found[:5])))
        runs, equal = runs + 1, equal + (not found)
        shutil.rmtree(folder)
    shutil.rmtree(root)
    print(f"{kills} kills; {equal} of {runs} equal")
    return equal != runs


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(status)
