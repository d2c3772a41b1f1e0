"""code/README.md's recipes for a data set, a sampler and a model of one's own, followed in a copy of the code."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from torchvision import datasets as tv

from helpers import spawn, tree
from libs.config import CODE

README = (Path(CODE) / "README.md").read_text()

# libs/flow.py at its shortest: x_t = (1 - u) x_0 + u noise, and the network predicts noise - x_0
MODEL = '''

import torch


class Mine(Diffusion):
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
'''


def run_copy(code, statements):
    """In a process that has imported the modules of the project: run Python with those of the copy `code`."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("libs", "train", "sample")]:
        del sys.modules[name]
    sys.path.insert(0, code)
    exec(statements, {})


def insert(path, marker, text, before=False):
    """Put `text` after, or before, the only place with `marker`."""
    whole = path.read_text()
    assert whole.count(marker) == 1, marker
    path.write_text(whole.replace(marker, text + marker if before else marker + text))


@pytest.fixture
def code(tmp_path):
    code = tmp_path / "code"
    shutil.copytree(CODE, code, ignore=shutil.ignore_patterns("__pycache__", "configs"))
    sampler = re.search(r"```python\n(def mine.*?)```", README, re.S)[1]
    samplers, models, config = (code / "libs" / f"{name}.py" for name in ("samplers", "models", "config"))
    insert(samplers, "SOLVERS = {", f"{sampler}\n\n", before=True)
    insert(samplers, "SOLVERS = {", '"mine": mine, ')
    line = re.search(r'"mine": _solver\("mine", \d+\)', README)[0]
    insert(models, "SAMPLERS = {", f"\n    {line},")
    insert(config, '"euler_ancestral", "dpmpp_2m"', ', "mine"')
    (code / "libs" / "mine.py").write_text("from .diffusion import Diffusion\n" + MODEL)
    insert(models, "from .edm import EDM\n", "from .mine import Mine\n")
    insert(models, "\nMODELS = {", '"Mine": Mine, ')
    insert(models, "DEFAULT_SAMPLER = {", '"Mine": "mine", ')
    insert(config, 'one_of("DDPM", "EDM"', ', "Mine"')
    insert(config, "MODEL_SETTINGS = {", '\n    "Mine": {},')
    return code


def test_a_model_and_a_sampler(code, tmp_path):
    tree(tmp_path / "images", {"": ["cat", "dog"]})
    (tmp_path / "flow.yaml").write_text(yaml.safe_dump({
        "model_name": "Mine", "devices": ["cpu"], "output_folder": str(tmp_path / "runs"),
        "dataset": {"name": "ImageFolder", "data_folder": str(tmp_path / "images"), "img_size": 16},
        "loader": {"batch_size": 2}, "train_cfg": {"epochs": 2, "num_eval_samples": 2},
        "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [], "timesteps": 10}}))
    both = ("import train, sample; "
            f"train.main(['{tmp_path / 'flow.yaml'}', '--output', 'flow']); "
            f"sample.main(['{tmp_path / 'runs/flow_flow'}', '--sampler', 'heun', '--output', '{tmp_path / 'drawn.png'}'])")
    status, _, err = spawn(run_copy, str(code), both)()
    assert status == 0, err
    assert (tmp_path / "runs/flow_flow/sample-1.png").exists() and (tmp_path / "drawn.png").exists()


def test_a_data_set(code, tmp_path):
    """KMNIST's own files cannot be had everywhere: MNIST's format, which it has, with a few images of ours."""
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (2051, 5, 28, 28)) + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (2049, 5)) + bytes([9, 0, 1, 2, 3]))
    known, size = re.findall(r'^ *"KMNIST": .*$', README, re.M)
    insert(code / "libs" / "config.py", "KNOWN = {", f"\n{known}")
    insert(code / "libs" / "datasets.py", "SIZES = {", f"\n{size}\n   ")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"dataset": {"name": "KMNIST", "data_folder": str(tmp_path)}}))
    both = ("import libs, train; "
            f"data, *facts = libs.build_dataset('KMNIST', 'train', {str(tmp_path)!r}); "
            "print(facts, data.classes, ((data[4][0] + 1) * 127.5).round().byte().tolist()[0]); "
            f"train.main(['{tmp_path / 'mine.yaml'}', '--dry-run'])")
    _, out, err = spawn(run_copy, str(code), both)()
    for expected in (f"{[10, (1, 28, 28)]} {tv.KMNIST.classes} {pixels[4].tolist()}", "parameters, 60,000 images"):
        assert expected in out, err
