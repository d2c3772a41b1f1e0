"""What one process of benchmark.py measures: a training, the samplers, or the parts of an update."""

import copy
import math
import time
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..models import build_model, draw_images, network_calls, samplers_of, sampling_settings
from .device import (autocast, fast_sampling, memory_format, peak_memory, pick_device, pick_precision,
                     prepare_network)
from .optimizers import build_optimizer
from .other_unets import OTHERS, build_other, parameters
from .update import Trainer

# the rows of the table, beside OTHERS, each measured in a process of its own; SAMPLERS gives several
OURS, NAIVE, SAMPLERS = "training", "training, naively", "sampling"
KINDS = ("convolutions", "attention", "linear layers", "the rest")  # of operators, see `kind_of`


# ---- operations

@contextmanager
def written_out_attention():
    """Attention as two matrix products and a softmax, softmax(Q K^T / sqrt(d)) V; B x heads x L x d."""
    def attention(q, k, v, **_):
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v

    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention
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
    with written_out_attention(), FlopCounterMode(display=False) as counter:
        out = network(*(x.to("meta") for x in inputs))
        forward = dict(counter.get_flop_counts()["Global"])
        out.sum().backward()
    kinds = {}, {}
    for operator, total in counter.get_flop_counts()["Global"].items():
        kind, before = kind_of(str(operator)), forward.get(operator, 0)
        for counts, n in zip(kinds, (before, total - before)):
            counts[kind] = counts.get(kind, 0) + n / len(out)
    return kinds


def inputs_of(model):
    """A batch for `operations_by_kind` of a model's network: image, label, time."""
    return torch.zeros(2, *model.img_shape), *torch.zeros(2, 2, dtype=torch.long)


def operations(model):
    """Those of a model's network for one image: (forward, forward and backward)."""
    forward, backward = (sum(kinds.values()) for kinds in operations_by_kind(model.model, *inputs_of(model)))
    return forward, forward + backward


def kind_of(operator):
    """One of KINDS, for an operator's name in a profile or a count of operations."""
    if "convolution" in operator or "conv2d" in operator:
        return "convolutions"
    if "attention" in operator or "bmm" in operator:
        return "attention"
    return "linear layers" if operator in ("aten::mm", "aten::addmm", "aten.mm", "aten.addmm") else "the rest"


# ---- time

def now(device):
    """Seconds, after all work that was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_rate(device, dtype, seconds=0.5):
    """{"matmul_rate": operations a second of the fastest of several n x n matrix products, "matmul_n": n}"""
    n = 8192 if device.type == "cuda" else 2048
    if device.type == "cuda":  # fp32 as cuDNN's convolutions take it: in TF32, where there is that
        torch.set_float32_matmul_precision("high")
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    started, best = now(device), float("inf")
    while now(device) - started < seconds:
        before = now(device)
        a @ b
        best = min(best, now(device) - before)
    return {"matmul_rate": 2 * n ** 3 / best, "matmul_n": n}


# ---- training

class RandomData:
    """Images, or latents, and labels that cost no time: what `prepare_network` and an update take."""

    encoded = True  # nothing that an autoencoder must see

    def __init__(self, model, n, device):
        self.images = torch.randn(n, *model.img_shape, device=device)
        self.labels = torch.randint(model.num_classes, (n,), device=device)

    def __len__(self):
        return len(self.labels)

    def batch(self, index, generator=None):
        return self.images[index], self.labels[index]


def build(config, kind=OURS, width=None):
    """The model of a config on the CPU; its network is one of OTHERS, of this width, where `kind` names it."""
    torch.manual_seed(config["seed"])
    model = build_model(config)
    if kind in OTHERS:
        model.model = build_other(kind, model.model, config["model"], width)
    return model


def make_update(model, config, naive, device):
    """(function that makes one update of `model` as train.py does, its precision, the methods of prepare_network)."""
    cfg = config["train_cfg"]
    precision = None if naive else pick_precision(config["dtype"], device)
    model.to(device, memory_format=torch.contiguous_format if naive else memory_format(device)).train()
    data = RandomData(model, config["loader"]["batch_size"], device)
    trainer = Trainer(model, cfg, device, precision, total_steps=10 ** 9)
    if naive:  # "meta": not fused
        trainer.optimizer = build_optimizer(model.model, cfg, torch.device("meta"))
    n = -(-len(data) // cfg["accumulate"])  # images in the network at once
    methods = [] if naive else prepare_network(model, cfg, data, device, precision, n)

    def update():
        t = torch.randint(model.timesteps, data.labels.shape, device=device)
        for part in zip(*(x.split(n) for x in (data.images, data.labels, t))):
            with autocast(device, precision):
                loss = model(*part, encoded=True)
            trainer.backward(loss, share=len(part[1]) / len(data))
        trainer.update()

    return update, precision or torch.float32, methods


def measure_training(config, kind, width, seconds, device):
    """{kind: its figures}, of at least one update."""
    with written_out_attention() if kind == NAIVE else nullcontext():
        model = build(config, kind, width)
        figures = {"parameters": parameters(model.model), "operations": operations(model)[1]}
        update, dtype, methods = make_update(model, config, kind == NAIVE, device)
        for _ in range(10 if device.type == "cuda" else 1):  # to warm up
            update()
        started, n = now(device), 0
        while n == 0 or time.perf_counter() - started < seconds:
            update()
            n += 1
        speed = n * config["loader"]["batch_size"] / (now(device) - started)
    return {kind: {**figures, "images_per_s": speed, "peak_memory": peak_memory(device),
                   "dtype": str(dtype).split(".")[-1], "methods": methods, **matmul_rate(device, dtype)}}


# ---- sampling

class TimeIsUp(Exception):
    """Raised to stop a sampler."""


def measure_samplers(config, seconds, device):
    """{sampler: its figures}: a batch is drawn as sample.py does it, for at least one step."""
    model = build(config).to(device, memory_format=memory_format(device)).eval()
    forward, _ = operations(model)
    labels = torch.arange(config["loader"]["batch_size"]) % model.num_classes
    names, seen = samplers_of(model), []
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))

    def draw(settings, seconds):
        """Seconds that it took to draw, or to draw until the time was up."""
        def check(step, steps, x):
            if step < steps and now(device) - started > seconds:
                raise TimeIsUp

        started = now(device)
        try:
            next(draw_images(model, labels, settings, batch_size=len(labels), device=device, callback=check))
        except TimeIsUp:
            pass
        return now(device) - started

    precision, rows = pick_precision(config["dtype"], device), {}
    with fast_sampling(model, device, precision):
        draw(sampling_settings(model, config, sampler=names[0]), -math.inf)  # to warm up, one step
        for name in names:
            settings = sampling_settings(model, config, sampler=name)
            calls = network_calls(model, settings)
            seen.clear()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            taken = draw(settings, seconds / len(names))
            rows[name] = {"steps": settings["steps"], "calls": calls, "images_per_s": sum(seen) / calls / taken,
                          "whole": sum(seen) == calls * len(labels), "operations": calls * forward,
                          "peak_memory": peak_memory(device), "parameters": parameters(model.model)}
    rate = matmul_rate(device, precision or torch.float32)
    return {name: row | rate for name, row in rows.items()}


def measure(config, kind, width, seconds):
    """{row of the table: its figures} of this process. width: of one of OTHERS, see `build`."""
    device = pick_device(config["devices"][0])
    if kind == SAMPLERS:
        return measure_samplers(config, seconds, device)
    return measure_training(config, kind, width, seconds, device)


# ---- the parts of an update

def profile(config, device):
    """Lines of a table: what a training update spends its time on, by kind of operator."""
    config["train_cfg"]["compile"] = False  # it would hide the operators
    model = build(config)
    forward, backward = operations_by_kind(model.model, *inputs_of(model))
    update, dtype, _ = make_update(model, config, False, device)
    for _ in range(3):
        update()
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU] + [activities.CUDA] * (device.type == "cuda")) as profiler:
        update()
        now(device)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"  # in microseconds
    times = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:  # the operators; kernels' time is in theirs
            times[kind_of(event.key)] += getattr(event, own)
    total, matmul = sum(times.values()), matmul_rate(device, dtype)
    yield f"an update of {total / 1e3:.1f} ms on {device}, by the operators' own time:"
    for kind, t in times.items():
        work = (forward.get(kind, 0) + backward.get(kind, 0)) * config["loader"]["batch_size"]
        yield f"{t / total:6.1%} {t / 1e3:9.1f} ms  {kind}" + (
            f": {work / 1e9:.1f} GFLOP, {work / t / 1e3:.0f} GFLOP/s, {work / t * 1e6 / matmul['matmul_rate']:.0%} of "
            "matmul" if work and t else "")
    yield "(matmul: {matmul_rate:.3g} operations/s, matrices of {matmul_n} x {matmul_n})".format(**matmul)
