"""Between two lines of the log the CPU waits for the GPU once. The GPU is pretended, the training is real."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import libs
import train
from helpers import SMALL
from libs import config
from libs.common.seeds import seeded_generator
from libs.data.latents import LatentDataset
from libs.datasets import BatchLoader, ImageDataset
from libs.training.distributed import World
from libs.training.run_folder import RunFolder, TrainingLog
from libs.training.update import Trainer

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


class PretendedGPU(TorchFunctionMode):
    """All tensors are the CPU's, but some say that they are a GPU's: those made there or computed from such.

    What makes the CPU wait is noted in `.waits`: numbers read from them, and tensors that come there from other than
    pinned memory, also as an index.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [vars(x).get("on_gpu", False) for x in tensors]
        if function == torch.Tensor.device.__get__ or function is torch.device:
            return CUDA if any(on_gpu) else function(*args, **kwargs or {})
        name = function.__name__
        if any(on_gpu) and name in READS or name == "__getitem__" and any(on_gpu) > all(on_gpu):
            self.waits.append(name)
        there = any(isinstance(x, torch.device) and x.type == "cuda" for x in tree_leaves((args, kwargs)))
        arrives = there and name in ("to", "tensor", "as_tensor") and not any(on_gpu)
        if arrives and not (kwargs and kwargs.get("non_blocking") and any(vars(x).get("pinned") for x in tensors)):
            self.waits.append(name)
        if name == "pin_memory":
            out = tensors[0].clone()
            out.pinned = True
            return out
        args, kwargs = tree_map(lambda x: CPU if isinstance(x, torch.device) and x == CUDA else x, (args, kwargs or {}))
        out = function(*args, **kwargs)
        if arrives:
            out = out.clone()  # the one on the CPU stays there
        if there or any(on_gpu) and name != "cpu":
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    x.on_gpu = True
        return out


def data_set(kind):
    images, labels = torch.randint(0, 256, (12, 1, 10, 10), dtype=torch.uint8), torch.arange(12) % 4
    if kind == "latents":
        latents = torch.randn(12, 3, 1, 8, 8).to(CUDA)
        return LatentDataset(latents, labels.to(CUDA), "abcd")
    dataset = ImageDataset(images, labels, "abcd", 8, augment=True, flip=True)
    if kind == "on the GPU":
        dataset.images, dataset.labels = images.to(CUDA), labels.to(CUDA)
    return dataset


@pytest.mark.parametrize("kind, optimizer, data, precision", [
    ("DDPM", "adamw", "on the GPU", None), ("EDM", "muon", "on the host", None),
    ("Flow", "muon", "latents", torch.float16)])
def test_training_waits_once_a_line(kind, optimizer, data, precision, monkeypatch):
    settings = config.defaults_of(config.SETTINGS)
    cfg = settings["train_cfg"] | {"optimizer": optimizer, "accumulate": 2}
    lines, write = [], TrainingLog.write
    monkeypatch.setattr(TrainingLog, "write", lambda log: lines.append(log.trainer.step) or write(log))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(train, "seeded_generator", lambda *key, device: seeded_generator(*key))
    model = getattr(libs, kind)(**SMALL, label_dropout=0.1, dropout=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with PretendedGPU() as gpu:
        for x in (*model.parameters(), *model.buffers()):
            x.on_gpu = True
        loader = BatchLoader(data_set(data), 4)
        trainer = Trainer(model, cfg, CUDA, precision, total_steps=len(loader))
        folder = RunFolder("", settings, trainer, 4, SimpleNamespace(print_freq=2), claim=None)
        log = TrainingLog(folder, model, World(), 4, epochs=1)
        gpu.waits.clear()
        train.train_one_epoch(model.compute_loss, trainer, loader, log, 2, 0, None, stopped=lambda: False)
    assert lines == [2, 3] and gpu.waits == ["tolist"] * 2
    assert trainer.skipped == 0 and not any(map(torch.equal, before[:5], model.parameters()))
