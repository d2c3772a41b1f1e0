"""The README's lines for a data set, a sampler and a model of one's own, put into a copy of the code and used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from torchvision import datasets as tv

import libs
from helpers import tree
from libs import datasets
from libs.config import CODE

README = (Path(CODE).parent / "README.md").read_text()

SAMPLER = '''

def mine(denoise, x, sigmas, callback=None, generator=None):
    for i, sigma, sigma_next in _steps(sigmas):
        x = x + (sigma_next - sigma) * (x - denoise(x, sigma)) / sigma
        if callback:
            callback(i, len(sigmas) - 1, x)
    return x


'''
# a rectified flow: x_t = (1 - u) x_0 + u noise, and the network says noise - x_0
MODEL = '''

import torch
from .diffusion import Diffusion


class Flow(Diffusion):
    def losses(self, x_start, label, t, noise):
        u = ((t + 0.5) / self.timesteps)[:, None, None, None]
        return (self.model((1 - u) * x_start + u * noise, label, t) - (noise - x_start)).pow(2).flatten(1).mean(1)

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        u = sigma / (1 + sigma)
        x_t = x * (1 - u)[:, None, None, None]
        return x_t - u[:, None, None, None] * self.guided(x_t, label, u * self.timesteps, guidance_scale)

    @property
    def sigma_range(self):
        return 0.01, 100.0, 7.0


'''


def line(beginning):
    """The README's line that begins so, without its comment."""
    return re.search(rf"^{re.escape(beginning)}[^#\n]*", README, re.M)[0].strip() + "\n"


@pytest.fixture
def code(tmp_path):
    code = tmp_path / "code"
    shutil.copytree(CODE, code, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "configs"))
    for name, text in (("samplers", SAMPLER + line('SOLVERS["mine"]')), ("models", MODEL + line('MODELS["Flow"]')),
                       ("config", line('MODEL_OPTIONS["Flow"]'))):
        path = code / "libs" / f"{name}.py"
        whole = path.read_text()
        if name == "config":  # its rules are made from the table
            head, tail = whole.split('MODEL_OPTIONS["DDIM"]', 1)
            path.write_text(head + text + 'MODEL_OPTIONS["DDIM"]' + tail)
        else:
            path.write_text(whole + text)
    return code


def test_a_model_and_a_sampler(code, tmp_path):
    tree(tmp_path / "images", {"": ["cat", "dog"]})
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({
        "model_name": "Flow", "devices": ["cpu"], "output_folder": str(tmp_path / "runs"),
        "dataset": {"name": "ImageFolder", "data_folder": str(tmp_path / "images"), "img_size": 16},
        "loader": {"batch_size": 2}, "train_cfg": {"epochs": 2, "num_eval_samples": 2},
        "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [], "timesteps": 10},
        "sample_cfg": {"sampler": "mine"}}))
    done = subprocess.run([sys.executable, "train.py", str(tmp_path / "flow.yaml"), "-p", "1", "--output", "flow"],
                          cwd=code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "update 6/6" in done.stdout + done.stderr and (tmp_path / "runs/flow_flow/sample-1.png").exists()
    drawn = subprocess.run([sys.executable, "sample.py", str(tmp_path / "runs/flow_flow"), "--sampler", "heun", "--steps", "2",
                            "--output", str(tmp_path / "drawn.png")], cwd=code, capture_output=True, text=True)
    assert drawn.returncode == 0 and (tmp_path / "drawn.png").exists(), drawn.stderr


def test_a_data_set(tmp_path, monkeypatch):
    """KMNIST's own files cannot be had everywhere: MNIST's format, which it has, with a few images of ours."""
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (2051, 5, 28, 28)) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (2049, 5)) + bytes([9, 0, 1, 2, 3]))
    monkeypatch.setattr(datasets, "KNOWN", dict(datasets.KNOWN))
    monkeypatch.setattr(datasets, "SIZES", dict(datasets.SIZES))
    exec(line('KNOWN["KMNIST"]'), vars(datasets))
    dataset, num_classes, shape = libs.build_dataset("KMNIST", "train", str(tmp_path))
    assert (num_classes, shape, len(dataset), dataset[0][1]) == (10, (1, 28, 28), 5, 9)
    assert (((dataset[4][0] + 1) * 127.5).round().numpy()[0] == pixels[4]).all()
    assert dataset.classes == tv.KMNIST.classes
