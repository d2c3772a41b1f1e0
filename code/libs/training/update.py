"""What an update consists of: gradients, the learning rate, averaged weights, meters, signals."""

import copy
import math
import os
import signal
from contextlib import suppress

import torch

from ..common.errors import RunError, display_path
from ..common.files import load_tensors
from .optimizers import build_optimizer


class ModelEMA:
    """Exponential moving average of a model's weights, in `.module`.

    The decay rises to `decay` as (1 + n) / (10 + n) with the number of updates n, so that the first,
    random weights are soon forgotten. An autoencoder (`.vae`) and a `.guide` are shared, not copied.
    """

    def __init__(self, model, decay=0.999):
        tools = [tool for tool in (getattr(model, "vae", None), getattr(model, "guide", None)) if tool is not None]
        self.module = copy.deepcopy(model, {id(tool): tool for tool in tools}).eval()
        self.module.requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model):
        """Move the average towards `model` after one more update."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = zip(self.module.parameters(), model.parameters())
        ours, theirs = zip(*[(own, new) for own, new in pairs if new.requires_grad])  # not the autoencoder, not the guide
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for own, new in zip(self.module.buffers(), model.buffers()):
            own.copy_(new)


class AverageMeter:
    """Average since the last reset; tensors stay on their device until `.avg` is read."""

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
        return float(self.sum) / max(float(self.count), 1)


class TenthsMeter:
    """Average loss in each tenth of the diffusion time, which the mean over all times hides."""

    def __init__(self, timesteps, device):
        self.timesteps = timesteps
        self.sum = torch.zeros(10, device=device)
        self.count = torch.zeros(10, device=device)

    def update(self, losses, t):
        tenth, finite = t.long() * 10 // self.timesteps, losses.isfinite()
        self.sum.index_add_(0, tenth, losses.where(finite, 0).float())
        self.count.index_add_(0, tenth, finite.float())

    def read(self, total=lambda *tensors: tensors):
        """Ten averages, a tensor, NaN where there was no image; then start again. total: see World.total."""
        losses, count = total(self.sum, self.count)
        averages = losses / count
        self.sum.zero_()
        self.count.zero_()
        return averages


def learning_rate(step, cfg, total_steps):
    """Learning rate of update `step` (from 0): warm-up, then constant, or down to zero: by a cosine, or in the second
    half in a straight line (trapezoid; Haegele et al. 2024, arXiv 2405.18392)."""
    warm = min(1.0, (step + 1) / (cfg["warmup"] + 1))
    left = 1 - step / total_steps
    decay = {"constant": 1.0, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "trapezoid": min(1.0, 2 * left)}
    return cfg["lr"] * warm * decay[cfg["lr_schedule"]]


class Trainer:
    """A model in training: its average, its optimizer, and how far it has come.

    `backward` adds the gradients of a loss, `update` applies them: clipped, and left out where they are not finite.
    GradScaler's scale keeps the small gradients of fp16 from becoming zero; in other precisions it is 1, and the scaler
    only leaves out updates that are not finite, without waiting for the GPU.

    Attributes: `epoch`, `batch`, `step`: all count what is finished; `batch` within the current epoch.
    """

    LIMIT = 20  # updates left out in a row, after which training stops
    LARGEST = torch.finfo(torch.float16).max  # weight that fp16 can hold, 65,504; a trained model's reach about 3

    def __init__(self, model, cfg, device, precision, total_steps, is_hidden=None):
        self.model, self.cfg, self.device, self.total_steps = model, cfg, device, total_steps
        self.epoch = self.batch = self.step = 0
        self.ema = ModelEMA(model, cfg["ema_decay"])
        self.optimizer = build_optimizer(model.model, cfg, device, is_hidden)
        self.parameters = [p for p in model.model.parameters() if p.requires_grad]
        self.precision, self.fp16 = precision, precision == torch.float16
        if device.type == "cuda" and precision:  # what autocast leaves in fp32, above all Muon's products, in TF32
            torch.set_float32_matmul_precision("high")
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 16 if self.fp16 else 1.0,
                                           enabled=device.type != "mps")
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.long, device=device)

    @property
    def lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def backward(self, loss, share=1.0):
        """Add the gradients of `loss`, a scalar: the mean over this share of the batch."""
        self.scaler.scale(loss if share == 1 else loss * share).backward()

    def update(self):
        """Apply the gradients and forget them. Returns (norm before clipping, whether it was finite), as tensors."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.cfg, self.total_steps)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg["clip_grad_norm"] or math.inf)
        if self.scaler.is_enabled() or norm.isfinite():  # the scaler looks itself
            self.scaler.step(self.optimizer)
        self.scaler.update(None if self.fp16 else 1.0)
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        self.step += 1
        finite = norm.isfinite()
        self.skipped += ~finite
        self.in_a_row = (self.in_a_row + 1) * ~finite
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return norm, finite

    def check(self, last_checkpoint, longest=None):
        """Raise RunError after LIMIT updates in a row that were left out. longest: what `.longest` holds, if read."""
        longest = int(self.longest if longest is None else longest)
        if longest >= self.LIMIT:
            raise RunError(f"the loss or its gradient was not finite in {longest} updates in a row, up to "
                           f"update {self.step}; {remedy(last_checkpoint)}")

    @torch.no_grad()
    def check_weights(self, last_checkpoint):
        """Raise RunError where weights or their averages are far too large: the checkpoint before is better."""
        named = [*self.model.named_parameters(), *self.ema.module.named_parameters()]
        for (name, _), size in zip(named, torch.stack([p.abs().max() for _, p in named]).tolist()):
            if not size <= self.LARGEST:
                raise RunError(f"weights up to {size:.3g} ({name}) at update {self.step}: training went astray; "
                               + remedy(last_checkpoint))

    def state_dict(self):
        """Everything that the next update depends on: tensors and plain values."""
        scaler = {"scaler": self.scaler.state_dict() if self.fp16 else {}, "skipped": int(self.skipped),
                  "in_a_row": int(self.in_a_row)}
        return {"epoch": self.epoch, "batch": self.batch, "step": self.step, "state_dict": self.model.state_dict(),
                "state_dict_ema": self.ema.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": scaler}

    def load_state_dict(self, state, path="the checkpoint"):
        """Put back a `state_dict`, less the weights. The optimizer's settings stay those that `train_cfg` says now.

        Raises UsageError where the optimizer's state, which its kernels take unchecked, is not of these parameters.
        """
        saved, own = state["optimizer"]["state"], {}
        for k, (p, group) in enumerate((p, group) for group in self.optimizer.param_groups for p in group["params"]):
            if k in saved:
                moments = ("exp_avg",) if group.get("orthogonal") else ("exp_avg", "exp_avg_sq")
                own[k] = {"step": torch.zeros(()), **{name: torch.zeros_like(p) for name in moments}}
                load_tensors(own[k], saved[k], f"--resume: {path}: the optimizer's state of parameter {k}")
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": own})
        counts, scaler = state["scaler"], state["scaler"].get("scaler")
        if self.fp16 and scaler:
            self.scaler.load_state_dict({key: type(x)(float(scaler.get(key, x)))
                                         for key, x in self.scaler.state_dict().items()})
        self.skipped.fill_(counts.get("skipped") or 0)
        self.in_a_row.fill_(counts.get("in_a_row") or 0)
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.ema.updates = self.step


def remedy(last_checkpoint):
    """What to do when training went astray."""
    start = f"resume from {display_path(last_checkpoint)}" if last_checkpoint else "start again"
    return f"{start} with a lower train_cfg.lr"


@torch.no_grad()
def measure_data(model, dataset, device, n=512, report=None):
    """Measure what the model diffuses, over `n` images spread over the data set; give an EDM its sigma_data.

    report: called with a line of text.
    """
    index = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long()
    data, squared_error = [], []
    for part in index.split(32):
        images = dataset.batch(part, torch.Generator().manual_seed(0))[0].to(device)
        data.append(model.encode(images))
        if model.use_vae:
            squared_error.append((model.postprocess(data[-1]) - images).pow(2).mean())
    std, mean = map(float, torch.std_mean(torch.cat(data)))
    if hasattr(model, "set_sigma_data"):
        model.set_sigma_data(std)
    if report:
        kind = "pixels"
        if model.use_vae:
            psnr = -10 * torch.stack(squared_error).mean().log10()
            kind = f"latents (autoencoder {psnr:.1f} dB PSNR)"
        report(f"{kind}: mean {mean:.3f}, standard deviation {std:.3f}")
        if model.use_vae and not (abs(mean) < 0.5 and 0.5 < std < 2):
            report("warning: the latents are far from mean 0 and standard deviation 1, which the noise schedule is made "
                   "for; are these the right autoencoder weights, and images in [0, 1]?")


class Signals:
    """Ctrl-C, SIGTERM and a closed terminal are noted, and obeyed between two updates; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received = None
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # nohup ignores it
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(OSError):  # the terminal may be closed
            os.write(2, b"\nstopping: a checkpoint is written first\n")  # print could be interrupted in itself
