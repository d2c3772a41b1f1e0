"""What training needs beside the model: averages, the learning rate, precision."""

import copy
import math
import os
import signal
import sys
import warnings
from contextlib import nullcontext

import torch

from ..common.errors import RunError, first_line


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
        return self.average()

    def average(self, total=lambda *tensors: tensors):
        """`avg`; over all processes with World.total."""
        total_sum, count = total(self.sum, self.count)
        return float(total_sum) / max(float(count), 1)


class TenthsMeter:
    """Average loss in each tenth of the diffusion time, where a mean over all of it hides what happens."""

    def __init__(self, timesteps, device):
        self.timesteps = timesteps
        self.sum = torch.zeros(10, device=device)
        self.count = torch.zeros(10, device=device)

    def update(self, losses, t):
        tenth, finite = t * 10 // self.timesteps, losses.isfinite()
        self.sum.index_add_(0, tenth, losses.where(finite, 0).float())
        self.count.index_add_(0, tenth, finite.float())

    def read(self, total=lambda *tensors: tensors):
        """Ten averages, NaN where nothing was seen; then start again. total: see World.total."""
        losses, count = total(self.sum, self.count)
        averages = (losses / count).tolist()
        self.sum.zero_()
        self.count.zero_()
        return averages


class Updater:
    """From the gradients to the weights: clip, and leave an update out where a gradient is not finite.

    With AdamW nothing here waits for the GPU, but `check`. The work is GradScaler's; its scale, 1 but for fp16, is what keeps
    the small gradients of half precision from becoming zero.
    """

    LIMIT = 20  # updates left out in a row, after which there is no point in going on

    def __init__(self, model, optimizer, precision, clip_norm, device):
        self.optimizer, self.clip_norm = optimizer, clip_norm or math.inf
        self.parameters = [p for p in model.model.parameters() if p.requires_grad]
        self.fp16 = precision == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 16 if self.fp16 else 1.0,
                                           enabled=device.type != "mps")
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.long, device=device)

    def backward(self, loss):
        """Add the gradients of `loss`, a scalar."""
        self.scaler.scale(loss).backward()

    def step(self):
        """Apply the gradients and forget them. Returns (norm before clipping, whether it was finite), as tensors."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        if self.scaler.is_enabled() or norm.isfinite():
            self.scaler.step(self.optimizer)
        self.scaler.update(None if self.fp16 else 1.0)
        self.optimizer.zero_grad()
        finite = norm.isfinite()
        self.skipped += ~finite
        self.in_a_row = (self.in_a_row + 1) * ~finite
        self.longest = torch.maximum(self.longest, self.in_a_row)
        return norm, finite

    def check(self, step, last_good):
        """Raise RunError after LIMIT updates in a row that were left out. last_good: the newest checkpoint, or None."""
        if self.longest >= self.LIMIT:
            raise RunError(f"the loss or its gradient was not finite in {int(self.longest)} updates in a row, up to "
                           f"update {step}; " + (f"resume from {last_good}" if last_good else "start again")
                           + " with a lower train_cfg.lr")

    def state_dict(self):
        return {"scaler": self.scaler.state_dict() if self.fp16 else {}, "skipped": int(self.skipped),
                "in_a_row": int(self.in_a_row)}

    def load_state_dict(self, state):
        if self.fp16 and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.skipped.fill_(state.get("skipped", 0))
        self.in_a_row.fill_(state.get("in_a_row", 0))


def prepare_network(model, cfg, dataset, device, precision=None, n=2, processes=1):
    """Make the UNet of `model` fast for training with n images at once, as `cfg`, a `train_cfg`, wants it.

    precision: autocast's. Only the call of the network in training mode changes: weights keep their names, and a copy
    of the model that was made before stays as it is. One line says how it went; what does not work is left out.
    Returns what was done: some of "compiled", "CUDA graphs".
    """
    on_gpu = device.type == "cuda"
    # a graph writes its gradients to the same place every time, so those of several parts cannot be added up
    record = (on_gpu if cfg["cuda_graphs"] is None else cfg["cuda_graphs"]) and processes == cfg["accumulate"] == 1
    compiled = on_gpu and not record if cfg["compile"] is None else cfg["compile"]
    done = []
    for name, wanted, prepare in ("compiled", compiled, _compile), ("CUDA graphs", record, _record):
        if wanted:
            try:
                with torch.random.fork_rng():
                    prepare(model, lambda: _trial_loss(model, dataset, device, precision, n), precision)
                done.append(name)
                print(f"network: {name}", flush=True)
            except Exception as e:  # no compiler, an operator it cannot take: it fails in many ways
                print(f"network: {name} does not work here, going on without ({first_line(e, 200)})", flush=True)
            model.model.zero_grad()
    return done


def _compile(model, trial, precision):
    """torch.compile. Its graph is of a batch size: another, a sample grid's for example, would be compiled anew."""
    model.model.forward = torch.compile(model.model.forward, dynamic=False)
    try:
        trial().backward()
    except Exception:
        del model.model.forward
        raise


def _record(model, trial, precision):
    """CUDA graphs: forward and backward become one launch each.

    Otherwise the CPU takes longer to launch a small network's thousand kernels than the GPU to run them.
    """
    inputs = []
    hook = model.model.register_forward_pre_hook(lambda _, args: inputs.extend(x.detach().clone() for x in args))
    try:
        trial()
    finally:
        hook.remove()
    # the graphs keep the nodes they were recorded with, of another stream; autograd waits for that one, and says so
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    with torch.autocast(inputs[0].device.type, precision, enabled=precision is not None, cache_enabled=False):
        torch.cuda.make_graphed_callables(model.model, tuple(inputs), allow_unused_input=True)


def _trial_loss(model, dataset, device, precision, n):
    """The loss of the first n images, computed just as in train.py."""
    images, labels = dataset.batch(torch.arange(min(n, len(dataset))), torch.Generator())
    images, labels = images.to(device, next(model.model.parameters()).dtype), labels.to(device)
    noise = torch.randn(len(labels), *model.img_shape, device=device).to(images.dtype)
    with torch.autocast(device.type, precision, enabled=precision is not None):
        return model(images, labels, torch.zeros_like(labels), noise, encoded=dataset.encoded).mean()


def as_written(model):
    """A context in which the UNet of `model` is not compiled: a sample grid is not worth the wait for its batch size."""
    return torch.compiler.set_stance("force_eager") if "forward" in vars(model.model) else nullcontext()


@torch.no_grad()
def measure_data(model, dataset, device, n=512, say=None):
    """Measure what the model diffuses, over `n` images spread over the data set; tell an EDM its sigma_data.

    Returns (mean, standard deviation, the autoencoder's PSNR in dB or None in pixels). say: gets it as text.
    """
    index = torch.linspace(0, len(dataset) - 1, min(n, len(dataset))).long()
    dtype = next(model.model.parameters()).dtype
    data, squared_error = [], []
    for part in index.split(32):
        images = dataset.batch(part, torch.Generator().manual_seed(0))[0].to(device, dtype)
        data.append(model.encode(images))
        if model.use_vae:
            squared_error.append((model.postprocess(data[-1]) - images).pow(2).mean())
    std, mean = map(float, torch.std_mean(torch.cat(data)))
    if hasattr(model, "set_sigma_data"):
        model.set_sigma_data(std)
    psnr = -10 * math.log10(float(torch.stack(squared_error).mean())) if squared_error else None
    if say:
        what = f"latents (autoencoder {psnr:.1f} dB PSNR)" if model.use_vae else "pixels"
        say(f"{what}: mean {mean:.3f}, standard deviation {std:.3f}")
        if model.use_vae and not (abs(mean) < 0.5 and 0.5 < std < 2):
            say("warning: the latents are far from mean 0 and standard deviation 1, which the noise schedule is made "
                "for; are these the right autoencoder weights, and images in [0, 1]?")
    return mean, std, psnr


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
    """(dtype of autocast, None where there is none; dtype of the weights). See DEFAULTS["dtype"]."""
    if name == "fp64" and device.type != "mps":
        return None, torch.float64
    if device.type != "cuda":
        if name == "bf16" and device.type == "cpu":
            if not _cpu_knows_bf16():
                print("dtype: this CPU has no instructions for bf16; fp32 will be many times as fast", flush=True)
            return torch.bfloat16, torch.float32
        if name not in ("auto", "fp32"):
            print(f"dtype: {name} does not work on {device.type}; using fp32", flush=True)
        return None, torch.float32
    if name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name != "fp32":  # what autocast leaves in fp32, Muon's products above all, then in TF32, as convolutions are anyway
        torch.set_float32_matmul_precision("high")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name], torch.float32


def _cpu_knows_bf16():
    """Whether oneDNN has kernels in bfloat16 for this CPU; yes where that cannot be told."""
    try:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):  # PyTorch without oneDNN
        return True


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
