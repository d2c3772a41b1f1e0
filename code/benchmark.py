"""Training speed and memory of our attention against the written-out one:  python ./benchmark.py ./configs/mnist.yaml"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

import libs
from cli import Parser, positive, run
from libs import blocks
from libs.errors import RunError
from libs.optimizers import build_optimizer
from libs.training import memory_format, peak_memory, pick_device, pick_precision

KINDS = ("written out", "fused")


def written_out_attention(q, k, v):
    """softmax(Q K^T / sqrt(d)) V as two matrix products and a softmax; B x heads x L x d."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def measure(config, kind, updates):
    """Train on random images: {"images_per_s", "peak_memory"} of this process."""
    if kind == "written out":
        blocks.F.scaled_dot_product_attention = written_out_attention
    device = pick_device(config["devices"])
    precision, _ = pick_precision(config["dtype"], device)
    torch.manual_seed(0)
    model = libs.build_model(config).to(device, memory_format=memory_format(device))
    optimizer = build_optimizer(model, config["train_cfg"], device)
    n = config["loader"]["batch_size"]
    images = torch.rand(n, *config["model"]["img_shape"], device=device)
    labels = torch.randint(model.num_classes, (n,), device=device)
    t = torch.randint(model.timesteps, (n,), device=device)
    for i in range(updates + 1):
        if i == 1:  # the first update is a warm-up
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            loss = model.compute_loss(images, labels, t)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"images_per_s": n * updates / (time.perf_counter() - started), "peak_memory": peak_memory(device)}


def main():
    parser = Parser(__doc__)
    parser.add_argument("config", nargs="?", default="./configs/mnist.yaml")
    parser.add_argument("--updates", type=positive, default=4, help="timed updates a round (default 4)")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds, the two kinds in turn (default 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # how the script calls itself
    args = parser.parse_args()
    config = libs.load_config(args.config, args.set)
    config["model"]["num_classes"] = config["model"]["num_classes"] or 10
    if args.one:
        print(json.dumps(measure(config, args.one, args.updates)))
        return

    print(f"training {args.config} on random images, batch {config['loader']['batch_size']}: {args.rounds} rounds of "
          f"{args.updates} updates with each kind of attention, in turn, each in a process of its own", flush=True)
    results = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind in KINDS:
            command = [sys.executable, os.path.abspath(__file__), args.config, "--updates", str(args.updates),
                       "--one", kind] + [x for item in args.set for x in ("--set", item)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = done.stderr.strip() or f"exit status {done.returncode}"
                raise RunError(f"the benchmark of {kind} attention failed: {why.splitlines()[-1]}")
            results[kind].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'attention':<12} {'images/s':>9} {'peak memory':>12}")
    for kind in KINDS:
        speed = statistics.median(r["images_per_s"] for r in results[kind])
        memory = statistics.median(r["peak_memory"] for r in results[kind])
        print(f"{kind:<12} {speed:9.1f} {memory / 2 ** 30:8.2f} GiB")
    ratios = [(b["images_per_s"] / a["images_per_s"], b["peak_memory"] / a["peak_memory"])
              for a, b in zip(*(results[kind] for kind in KINDS))]
    print(f"fused / written out, median of {args.rounds} pairs: "
          f"{statistics.median(r[0] for r in ratios):.2f} times the images/s, "
          f"{statistics.median(r[1] for r in ratios):.2f} times the memory")


if __name__ == "__main__":
    run(main)
