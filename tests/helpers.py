"""What several test files share. (Fixtures that several share are in conftest.py.)"""

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing import forkserver
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from libs import build_model, config, load_config, save_checkpoint
from libs.config import CODE, portable
from libs.tiny_autoencoder import build_decoder, build_encoder
from scripts import tiny_project

# a network that costs nothing
SMALL = dict(img_shape=(1, 8, 8), timesteps=50, dim=8, context_dim=8, num_classes=4, dim_mults=(1, 2),
             attn_levels=(0,))


def spawn(function, *arguments, **environment):
    """Start function(*arguments) in a process of its own, with these environment variables.

    Returns a function that waits for the process: () -> (exit status, standard output, standard error). Each is a
    fork of one process that has imported train.py, which takes seconds, and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "helpers"])
    path = os.pathsep.join([CODE, os.path.dirname(os.path.abspath(__file__))])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        forkserver.ensure_running()
    folder = tempfile.TemporaryDirectory()
    streams = [os.path.join(folder.name, name) for name in ("out", "err")]
    process = context.Process(target=_child, args=(function, arguments, environment, config.CACHE, streams))
    process.start()

    def wait():
        process.join(120)
        if process.is_alive():
            process.kill()
        output = []
        for path in streams:
            with open(path) as f:
                output.append(f.read())
        return process.exitcode, *output

    wait.folder = folder  # deleted when nobody can wait any more
    return wait


def _child(function, arguments, environment, cache, streams):
    os.environ.update({key: str(value) for key, value in environment.items()})
    config.CACHE = cache
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


def differences(a, b, where=""):
    """Where two nested values differ, to the last bit: a list, empty where they are the same."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, dict):
        return [x for k in a.keys() | b.keys() for x in differences(a.get(k), b.get(k), f"{where}.{k}")]
    if isinstance(a, (list, tuple)):
        nested = [x for k, pair in enumerate(zip(a, b)) for x in differences(*pair, f"{where}[{k}]")]
        return [where] * (len(a) != len(b)) + nested
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [where]


def picture(seed, height=40, width=40):
    """A smooth picture that JPEG and resizing leave alone, another for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def tree(root, splits, per_class=3, **size):
    """Write {split: [class, ...]} as folders of PNG files; the split "" is the root itself."""
    seed = 0
    for split, classes in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(per_class):
                seed += 1
                picture(seed, **size).save(folder / f"{k}.png")
    return str(root)


class Evil:
    """Unpickling this would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


class Place:
    """A folder with four images and a config that would train on them."""

    def __init__(self, root):
        self.root, self.runs = root, root / "runs"
        self.config = tiny_project(root, 20, sample_cfg={"steps": 2})

    def checkpoint(self, *overrides, **more):
        """Path of a checkpoint in a run folder, as if trained with these settings."""
        config = load_config(str(self.config), overrides)
        config["model"]["num_classes"] = 2
        weights = build_model(config).state_dict()
        folder = self.root / "old-run"
        save_checkpoint({"epoch": 1, "batch": 0, "step": 2, "config": portable(config), "state_dict": weights,
                         "state_dict_ema": weights, "optimizer": {"state": {}}, "scaler": {}, **more},
                        False, str(folder), "epoch_000.pth.tar")
        return folder / "epoch_000.pth.tar"

    def autoencoder(self):
        """{setting: value} of an autoencoder with weights of the right shapes, for --set."""
        torch.save(build_encoder().state_dict(), self.root / "encoder.pth")
        torch.save(build_decoder().state_dict(), self.root / "decoder.pth")
        return {"model.use_vae": "true", "model.vae_encoder_weights": self.root / "encoder.pth",
                "model.vae_decoder_weights": self.root / "decoder.pth"}

    def latents(self, per_class=6):
        """--set arguments for a model of latents of other images, in 32 pixels; per_class: of each split."""
        shutil.rmtree(self.root / "images")
        tree(self.root / "images", {split: ["cat", "dog"] for split in ("train", "test")}, per_class, height=40, width=40)
        return ["dataset.img_size=32", "eval.features=autoencoder", *(f"{k}={v}" for k, v in self.autoencoder().items())]

    def files(self):
        return sorted(str(p) for p in self.root.rglob("*"))


class Recorder(nn.Module):
    """In place of the network: says `value`, remembers what it was called with."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value, self.calls = value, []

    def forward(self, x, label, time):
        self.calls.append((x.clone(), label.clone(), time.clone()))
        return torch.zeros_like(x) + self.value


class GaussianOracle(nn.Module):
    """The exact network for data N(mu[label], s^2) per pixel: E[eps | x_t]."""

    def __init__(self, abar, mu, s):
        super().__init__()
        self.abar, self.mu, self.s = abar, torch.as_tensor(mu, dtype=torch.float64), s

    def forward(self, x, label, time):
        abar = self.abar[time][:, None, None, None]
        mu = self.mu[label][:, None, None, None]
        x = x.double()
        return ((1 - abar).sqrt() * (x - abar.sqrt() * mu) / (abar * self.s ** 2 + 1 - abar)).float()


def as_diffusers(diffusers, taesd):
    """diffusers' AutoencoderTiny with a TAESD's weights; its images are in [-1, 1]."""
    theirs = diffusers.AutoencoderTiny().eval()
    theirs.encoder.load_state_dict({f"layers.{key}": w for key, w in taesd.encoder.state_dict().items()})
    # it has no module for the clamp in front: the decoder's numbers start one lower
    numbers = [(key.split(".", 1), w) for key, w in taesd.decoder.state_dict().items()]
    theirs.decoder.load_state_dict({f"layers.{int(n) - 1}.{rest}": w for (n, rest), w in numbers})
    return theirs


def reference(diffusers, schedule, timesteps, prediction="epsilon"):
    """diffusers' DDPMScheduler, with its tables in float64."""
    first, last = (0.00085, 0.012) if schedule == "scaled_linear" else (1e-4, 0.02)
    scheduler = diffusers.DDPMScheduler(timesteps, first, last, schedule, clip_sample=False,
                                        variance_type="fixed_small", prediction_type=prediction)
    # its own fp32 products lose four digits of 1 - abar where that is small
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler
