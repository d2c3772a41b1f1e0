"""What training needs beside the model: averages, the learning rate, precision."""

import copy
import math
import os
import signal
import sys

import torch


class ModelEMA:
    """Exponential moving average of a model's weights, in `.module`.

    The decay rises to `decay` as (1 + n) / (10 + n) with the number of updates n, so that the first,
    random weights are soon forgotten. An autoencoder (`.vae`) is shared, not copied.
    """

    def __init__(self, model, decay=0.999):
        vae = getattr(model, "vae", None)
        self.module = copy.deepcopy(model, {id(vae): vae} if vae is not None else None).eval()
        self.module.requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        """Move the average towards `model` after one more update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = zip(self.module.named_parameters(), model.parameters())
        ours, theirs = zip(*[(own, new) for (name, own), new in pairs if not name.startswith("vae.")])
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for own, new in zip(self.module.buffers(), model.buffers()):
            own.copy_(new)


class AverageMeter:
    """Average of what was seen since the last reset; tensors stay on their device until `.avg` is read."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val = self.sum = self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum = self.sum + val * n
        self.count += n

    @property
    def avg(self):
        return float(self.sum) / max(self.count, 1)


class TenthsMeter:
    """Average loss in each tenth of the diffusion time, where a mean over all of it hides what happens."""

    def __init__(self, timesteps, device):
        self.timesteps = timesteps
        self.sum = torch.zeros(10, device=device)
        self.count = torch.zeros(10, device=device)

    def update(self, losses, t):
        tenth = t * 10 // self.timesteps
        self.sum.index_add_(0, tenth, losses)
        self.count.index_add_(0, tenth, torch.ones_like(losses))

    def read(self):
        """Ten averages, NaN where nothing was seen; then start again."""
        averages = (self.sum / self.count).tolist()
        self.sum.zero_()
        self.count.zero_()
        return averages


@torch.no_grad()
def measure_data(model, dataset, device, n=512):
    """Mean and standard deviation of what the model diffuses, and the autoencoder's PSNR in dB (None in pixels).

    Over `n` images spread over the data set. EDM takes its sigma_data from this.
    """
    index = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long()
    data, squared_error = [], []
    for part in index.split(32):
        images, _ = dataset.batch(part, torch.Generator().manual_seed(0))
        images = images.to(device)
        data.append(model.encode(images))
        if model.use_vae:
            squared_error.append((model.postprocess(data[-1]) - images).pow(2).mean())
    std, mean = torch.std_mean(torch.cat(data))
    if hasattr(model, "set_sigma_data"):
        model.set_sigma_data(float(std))
    psnr = -10 * math.log10(float(torch.stack(squared_error).mean())) if squared_error else None
    return float(mean), float(std), psnr


def learning_rate(step, cfg, total_steps):
    """Learning rate of update `step` (from 0): warm-up, then constant, cosine or linear down to zero."""
    warm = min(1.0, (step + 1) / (cfg["warmup"] + 1))
    left = 1 - step / total_steps
    decay = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left))}
    return cfg["lr"] * warm * decay[cfg["lr_schedule"]]


def pick_device(names):
    """The first of the config's devices, or the best there is when it is missing. Says so in one line."""
    for name in (names[0], "cuda:0", "mps", "cpu"):
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError):
            continue
        if name != names[0]:
            print(f"devices: {names[0]} is not here; using {name}", flush=True)
        return torch.device(name)


def pick_precision(name, device):
    """The dtype of autocast, or None for plain fp32. See DEFAULTS["dtype"]."""
    if device.type != "cuda":
        if name == "bf16" and device.type == "cpu":
            return torch.bfloat16
        if name in ("fp16", "bf16"):
            print(f"dtype: {name} does not work on {device.type}; using fp32", flush=True)
        return None
    if name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]


def memory_format(device):
    """The layout in which convolutions are fastest; on Apple's devices their own."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def peak_memory(device):
    """Bytes: allocated on the GPU, or held by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Signals:
    """Ctrl-C and SIGTERM are noted and obeyed between two updates; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping: a checkpoint is written first\n")  # print could be interrupted in itself
