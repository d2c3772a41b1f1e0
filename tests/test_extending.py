"""code/README.md, "Your own data set, sampler or model": a name of each, added where it says, is used by the scripts."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchvision import datasets as tv

import libs
import sample
import train
from helpers import tree
from libs import config, datasets, models, samplers
from libs.diffusion import Diffusion

TEXT = (Path(config.CODE) / "README.md").read_text("utf-8").split("## Your own data set, sampler or model")[1]
DATA_SET, SAMPLER = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


class OwnModel(Diffusion):
    """A rectified flow: x_t = (1 - u) x_0 + u noise; the network predicts noise - x_0."""

    def compute_loss(self, x_start, label, t, noise=None, drop=None, encoded=False, return_each=False):
        u = ((t + 0.5) / self.timesteps)[:, None, None, None]
        each = (self.model((1 - u) * x_start + u * noise, label, t) - (noise - x_start)).pow(2).flatten(1).mean(1)
        return (each.mean(), each) if return_each else each.mean()

    def denoise(self, x, sigma, label, guidance_scale=1.0):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        u = sigma / (1 + sigma)
        x_t = x * (1 - u)[:, None, None, None]
        return x_t - u[:, None, None, None] * self.guided(x_t, label, u * self.timesteps, guidance_scale)

    @property
    def sigma_range(self):
        return 0.01, 100.0, 7.0


@pytest.fixture
def own_names(monkeypatch):
    """OwnModel, and the document's sampler as "mine", in the tables that the document names."""
    namespace = dict(vars(samplers))
    exec(SAMPLER, namespace)
    monkeypatch.setitem(samplers.SOLVERS, "mine", namespace["mine"])
    monkeypatch.setitem(models.SAMPLERS, "mine", models._solver("mine", 20))
    monkeypatch.setitem(models.MODELS, "OwnModel", OwnModel)
    monkeypatch.setitem(models.DEFAULT_SAMPLER, "OwnModel", "euler")
    monkeypatch.setitem(config.MODEL_SETTINGS, "OwnModel", {})
    for key, name in (("model_name", "OwnModel"), ("sample_cfg.sampler", "mine")):
        rule = config.one_of(*config.RULES[key][0].rpartition("one of ")[2].split(", "), name)
        monkeypatch.setitem(config.RULES, key, rule)


def test_a_model_and_a_sampler(own_names, tmp_path):
    tree(tmp_path / "images", {"": ["cat", "dog"]})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({
        "model_name": "OwnModel", "devices": ["cpu"], "output_folder": str(tmp_path / "runs"),
        "dataset": {"name": "ImageFolder", "data_folder": str(tmp_path / "images"), "img_size": 16},
        "loader": {"batch_size": 2}, "train_cfg": {"epochs": 1, "num_eval_samples": 2},
        "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [], "timesteps": 10},
        "sample_cfg": {"sampler": "mine", "steps": 2}}))
    assert not train.main([str(tmp_path / "own.yaml"), "--output", "run"])
    assert (tmp_path / "runs/own_run/sample-0.png").exists()
    for sampler in ("mine", "heun"):
        output = tmp_path / f"{sampler}.png"
        assert not sample.main([str(tmp_path / "runs/own_run"), "--sampler", sampler, "--steps", "2", "--output", str(output)])
        assert output.exists()


def test_the_sampler_is_euler_s(own_names):
    x, sigmas = 10 * torch.randn(2, 1, 4, 4, dtype=torch.float64), samplers.karras_sigmas(4, 0.1, 10)
    drawn = [samplers.SOLVERS[name](lambda x, sigma: x / (1 + sigma ** 2), x, sigmas) for name in ("mine", "euler")]
    assert torch.allclose(*drawn)


def test_a_data_set(tmp_path, monkeypatch):
    """In KMNIST's format, which is MNIST's, a few images of random pixels."""
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
    exec(DATA_SET, vars(datasets))
    dataset, num_classes, shape = libs.build_dataset("KMNIST", "train", str(tmp_path))
    assert (num_classes, shape, len(dataset), dataset[0][1]) == (10, (1, 28, 28), 5, 9)
    assert (((dataset[4][0] + 1) * 127.5).round().numpy()[0] == pixels[4]).all()
    assert dataset.classes == tv.KMNIST.classes
