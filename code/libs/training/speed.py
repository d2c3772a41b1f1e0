"""What one process of benchmark.py measures: training in one of several ways, or every sampler."""

import copy
import math
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import libs
from .other_unets import OTHERS, build_other, parameters
from ..drawing import draw_images
from ..common.errors import UsageError
from .optimizers import build_optimizer
from .update import (ModelEMA, Updater, memory_format, peak_memory, pick_device, pick_precision,
                           prepare_network)

# what a process of its own measures: training in three ways, or all samplers
OURS, NAIVE, SAMPLERS = "training", "training, naively", "sampling"
KINDS = ("convolutions", "attention", "linear layers", "the rest")  # of operators, see `kind_of`


def written_out_attention(q, k, v, **_):
    """softmax(Q K^T / sqrt(d)) V as two matrix products and a softmax; B x heads x L x d. No masks, no dropout."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


@contextmanager
def attention_written_out():
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, written_out_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def operations_by_kind(network, *inputs):
    """Floating-point operations for one image, {kind: number}: (forward, backward); inputs: a batch, of any numbers.

    Those of convolutions and matrix products, where a multiplication and an addition are two. They are counted from
    the shapes alone, the attention written out: what the network asks for, not what a kernel computes twice.
    """
    network = copy.deepcopy(network).to("meta")
    with attention_written_out(), FlopCounterMode(display=False) as counter:
        out = network(*(x.to("meta") for x in inputs))
        forward = dict(counter.get_flop_counts()["Global"])
        out.sum().backward()
    kinds = [{}, {}]
    for operator, n in counter.get_flop_counts()["Global"].items():
        kind, before = kind_of(str(operator)), forward.get(operator, 0)
        for counts, part in zip(kinds, (before, n - before)):
            counts[kind] = counts.get(kind, 0) + part / len(out)
    return kinds


def operations(network, *inputs):
    """`operations_by_kind`, all kinds together: (forward, forward and backward)."""
    forward, backward = (sum(kind.values()) for kind in operations_by_kind(network, *inputs))
    return forward, forward + backward


def kind_of(operator):
    """What an operator of the profile, or of the count of operations, is there for."""
    if "convolution" in operator or "conv2d" in operator:
        return "convolutions"
    if "attention" in operator or "bmm" in operator:
        return "attention"
    return "linear layers" if operator in ("aten::mm", "aten::addmm", "aten.mm", "aten.addmm") else "the rest"


def inputs_of(model):
    """A batch for `operations` of a model's network: image, label, time."""
    return torch.zeros(2, *model.img_shape), *torch.zeros(2, 2, dtype=torch.long)


class RandomData:
    """Images, or latents, and labels that cost no time: what `prepare_network` and an update take."""

    encoded = True  # nothing that an autoencoder must see

    def __init__(self, model, n, device, dtype):
        self.images = torch.randn(n, *model.img_shape, device=device, dtype=dtype)
        self.labels = torch.randint(model.num_classes, (n,), device=device)

    def __len__(self):
        return len(self.labels)

    def batch(self, index, generator=None):
        return self.images[index], self.labels[index]


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device):
    """Seconds, after all work that was given to the device."""
    wait(device)
    return time.perf_counter()


def matmul_rate(device, dtype, at_least=0.5):
    """(operations a second, n) of the fastest of several n x n times n x n matrix products."""
    n = 8192 if device.type == "cuda" else 2048
    if device.type == "cuda":  # fp32 as cuDNN's convolutions take it: in TF32, where there is that
        torch.set_float32_matmul_precision("high")
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
    started, best = now(device), float("inf")
    while now(device) - started < at_least:
        before = now(device)
        a @ b
        best = min(best, now(device) - before)
    return 2 * n ** 3 / best, n


def build(config, kind=OURS, how=None):
    """The model of a config on the CPU; its network is one of OTHERS where `kind` names it, built as `how` says."""
    torch.manual_seed(config["seed"])
    model = libs.build_model(config)
    if kind in OTHERS:
        model.model = build_other(kind, model.model, config["model"], how)
    return model


def make_update(model, config, naive, device):
    """(function that makes one update of `model`, dtype that it computes in, what makes its network fast)."""
    cfg = config["train_cfg"]
    precision, dtype = (None, torch.float32) if naive else pick_precision(config["dtype"], device)
    model.to(device, dtype, memory_format=torch.contiguous_format if naive else memory_format(device))
    data = RandomData(model, config["loader"]["batch_size"], device, dtype)
    ema = ModelEMA(model, cfg["ema_decay"])
    # build_optimizer knows no fused kernel for "meta"
    optimizer = build_optimizer(model, cfg, torch.device("meta") if naive else device)
    updater = Updater(model, optimizer, precision, cfg["clip_grad_norm"], device)
    model.train()
    per_go = -(-len(data) // cfg["accumulate"])
    tricks = [] if naive else prepare_network(model, cfg, data, device, precision, per_go)

    def update():
        t = torch.randint(model.timesteps, data.labels.shape, device=device)
        for part in zip(*(x.split(per_go) for x in (data.images, data.labels, t))):
            with torch.autocast(device.type, precision, enabled=precision is not None):
                losses = model(*part, encoded=True)
            updater.backward(losses.sum() / len(data))
        updater.step()
        ema.update(model)

    return update, precision or dtype, tricks


def measure_training(config, kind, how, seconds, device):
    """{kind: its figures}, of at least one update."""
    if kind == NAIVE:
        F.scaled_dot_product_attention = written_out_attention
    model = build(config, kind, how)
    figures = {"parameters": parameters(model.model), "operations": operations(model.model, *inputs_of(model))[1]}
    update, dtype, tricks = make_update(model, config, kind == NAIVE, device)
    for _ in range(10 if device.type == "cuda" else 1):  # to warm up
        update()
    started, n = now(device), 0
    while n == 0 or time.perf_counter() - started < seconds:
        update()
        n += 1
    speed = n * config["loader"]["batch_size"] / (now(device) - started)
    figures |= {"images_per_s": speed, "peak_memory": peak_memory(device), "dtype": str(dtype).split(".")[-1],
                "tricks": tricks}
    figures["matmul_rate"], figures["matmul_n"] = matmul_rate(device, dtype)
    return {kind: figures}


class Enough(Exception):
    """A sampler's time is up."""


def sampler_options(model, config):
    """{sampler: keyword arguments of `model.sample`}: the config's for its own sampler, else the defaults."""
    options = {name: libs.sampling_options(config, sampler=name) for name in model.SAMPLERS}
    for name in list(options):
        try:
            model.plan(**options[name])
        except UsageError:  # a model with one noise level has no use for a solver
            del options[name]
    return options


def measure_samplers(config, seconds, device):
    """{sampler: its figures}: a batch is drawn as sample.py does it, for at least one step."""
    model = build(config).to(device, memory_format=memory_format(device)).eval()
    forward, _ = operations(model.model, *inputs_of(model))
    labels = torch.arange(config["loader"]["batch_size"]) % model.num_classes
    ways, seen = sampler_options(model, config), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    def look(step, steps, x):
        if step < steps and now(device) - started > seconds / len(ways):
            raise Enough

    def draw(options):
        try:
            next(draw_images(model, labels, options, batch_size=len(labels), device=device, callback=look))
        except Enough:
            pass

    started = -math.inf  # to warm up, for one step
    draw(next(iter(ways.values())))
    rows = {}
    for name, options in ways.items():
        seen.clear()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = now(device)
        draw(options)
        taken, calls = now(device) - started, model.network_calls(**options)
        rows[name] = {"steps": model.plan(**options).steps, "calls": calls, "images_per_s": sum(seen) / calls / taken,
                      "whole": sum(seen) == calls * len(labels), "operations": calls * forward,
                      "peak_memory": peak_memory(device), "parameters": parameters(model.model)}
    rate, n = matmul_rate(device, torch.float32)
    return {name: {**row, "matmul_rate": rate, "matmul_n": n} for name, row in rows.items()}


def measure(config, kind, how, seconds):
    """{row of the table: its figures} of this process. how: see `build`."""
    device = pick_device(config["devices"])
    if kind == SAMPLERS:
        return measure_samplers(config, seconds, device)
    return measure_training(config, kind, how, seconds, device)


def profile(config, device):
    """Lines of two tables: what a training update spends its time on, by kind and by operator (the first ten)."""
    for trick in ("compile", "cuda_graphs"):  # they hide the operators
        config["train_cfg"][trick] = False
    model = build(config)
    counts = [sum(part.get(kind, 0) for part in operations_by_kind(model.model, *inputs_of(model))) for kind in KINDS]
    update, dtype, _ = make_update(model, config, False, device)
    for _ in range(3):
        update()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * (device.type == "cuda")) as profiler:
        update()
        wait(device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(e, own), e.count, e.key) for e in profiler.key_averages()
                    if e.device_type == torch.autograd.DeviceType.CPU), reverse=True)  # kernels' time is in theirs
    total = sum(t for t, *_ in times)
    rate, n = matmul_rate(device, dtype)
    yield f"an update of {total / 1e3:.1f} ms on {device}, by the operators' own time:"
    for kind, per_image in zip(KINDS, counts):
        t = sum(t for t, _, key in times if kind_of(key) == kind)
        work = per_image * config["loader"]["batch_size"]
        yield f"{t / total:6.1%} {t / 1e3:9.1f} ms  {kind}" + (
            f": {work / 1e9:.1f} GFLOP, {work / t / 1e3:.0f} GFLOP/s, {work / t * 1e6 / rate:.0%} of matmul"
            if work and t else "")
    yield f"(matmul: {rate / 1e9:.0f} GFLOP/s, matrices of {n} x {n}.) The ten operators that take most of it:"
    for t, count, key in times[:10]:
        yield f"{t / total:6.1%} {t / 1e3:9.1f} ms {count:6} x  {key}"
