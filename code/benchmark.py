"""Speed and memory in one table: training, the same network trained naively, every sampler.

python code/benchmark.py                                       mnist.yaml and mnist_cpu.yaml
python code/benchmark.py configs/mnist.yaml --compare          and other libraries' UNets
python code/benchmark.py configs/mnist.yaml --profile          what an update spends its time on"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys

import torch

import libs
from libs.common.cli import Parser, check_output, positive, progress_bar, run
from libs.common.errors import RunError, UsageError, first_line
from libs.common.files import atomic_file
from libs.evaluation.comparison import markdown_table
from libs.training.device import pick_device
from libs.training.other_unets import OTHERS, nearest_width
from libs.training.speed import NAIVE, OURS, SAMPLERS, build, measure, profile

LEGEND = """\
training: updates as train.py makes them, of random images in memory. naively: in fp32, eager, attention written out,
tensors contiguous, the optimizer not fused.
peak memory: of the GPU; on a CPU of the whole process, where a sampler's includes those of the samplers above it.
GFLOP: 10^9 multiplications and additions of matrix products and convolutions, per image; in training forward and
backward, in sampling forward, times the network calls.
of matmul: GFLOP times images/s, in units of what a {matmul_n} x {matmul_n} matrix product reaches in that precision.
~: stopped early and scaled to all network calls.
ours: images/s and memory of this config's row "training" divided by this row's, median of the rounds."""


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("configs", nargs="*", default=["configs/mnist.yaml", "configs/mnist_cpu.yaml"],
                        help="YAML files (default: configs/mnist.yaml configs/mnist_cpu.yaml)")
    parser.add_argument("--compare", action="store_true", help="train the UNets of diffusers and "
                        "denoising-diffusion-pytorch too,\nwith the first config's levels and number of parameters")
    parser.add_argument("--profile", action="store_true",
                        help="instead of the table: the time of the first config's update, by kind of operator")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds, all rows in turn (default 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at least (default 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--json", default=None, metavar="FILE.json", help="write the figures of every round there")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)  # how the script calls itself
    args = parser.parse_args(argv)
    if args.profile and (args.json or args.compare):
        raise UsageError(f"--{'json' if args.json else 'compare'}: not with --profile, which makes another table")
    if not 0 < args.seconds <= 3600:
        raise UsageError(f"--seconds: {args.seconds}; must be above 0 and at most 3600")
    if args.json:
        check_output(args.json, args.overwrite, "--json")
    return args


def load(path, overrides):
    config = libs.load_config(path, overrides)
    config["model"]["num_classes"] = config["model"]["num_classes"] or 10
    return config


def machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        if os.path.exists("/proc/cpuinfo"):
            with open("/proc/cpuinfo") as f:
                name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
        name += f", threads: {torch.get_num_threads()}"
    return f"{name}, PyTorch {torch.__version__}"


# ---- measurements

def other_widths(config):
    """{name: width} of OTHERS that are as large as our network; prints which package is missing."""
    ours, widths = build(config).model, {}
    for name, other in OTHERS.items():
        try:
            widths[name] = nearest_width(name, ours, config["model"])
        except ImportError as e:
            print(f"{name} is left out: it needs `pip install {other.package}` ({first_line(e)})")
    return widths


def measure_apart(path, kind, width, args):
    """`measure` in a process of its own, so that the peak of its memory is its own."""
    command = [sys.executable, os.path.abspath(__file__), path, "--seconds", str(args.seconds),
               "--one", json.dumps([kind, width]), *(x for item in args.set for x in ("--set", item))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        error = done.stderr.strip() or f"exit status {done.returncode}"
        raise RunError(f"{path}, {kind}: {error.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(configs, args):
    """{(config, row): [figures of each round]}"""
    jobs = []
    for k, path in enumerate(configs):
        others = other_widths(configs[path]) if args.compare and k == 0 else {}
        jobs += [(path, kind, width) for kind, width in {OURS: None, NAIVE: None, **others, SAMPLERS: None}.items()]
    results = {}
    print(f"{args.rounds} rounds of {len(jobs)} measurements, each in a process of its own", flush=True)
    with progress_bar(args.rounds * len(jobs), "measurement") as bar:
        for path, kind, width in (job for _ in range(args.rounds) for job in jobs):
            for name, figures in measure_apart(path, kind, width, args).items():
                results.setdefault((path, name), []).append(figures)
            bar.update()
    return results


# ---- the table

def summary(results):
    """The table's rows from {(config, row): [figures of each round]}: medians, and ratios of the same round's."""
    for (path, name), rounds in results.items():
        row = {"config": path, "row": name, **rounds[0]}
        for figures in rounds:
            figures["share"] = figures["images_per_s"] * figures["operations"] / figures["matmul_rate"]
        for key in ("images_per_s", "peak_memory", "matmul_rate", "share"):
            row[key] = statistics.median(figures[key] for figures in rounds)
        if name != OURS and "dtype" in row:
            for key in ("images_per_s", "peak_memory"):
                row[f"{key}_ratio"] = statistics.median(
                    ours[key] / figures[key] for ours, figures in zip(results[path, OURS], rounds))
        yield {**row, "rounds": rounds}


def digits(x):
    """A positive number with three digits, more where they stand before the point."""
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


def table(rows):
    """Lines of a Markdown table."""
    lines = []
    for row in rows:
        name = f"{os.path.basename(row['config'])}: {row['row']}"
        what = (f"{row['steps']} steps, {row['calls']} network calls" if "steps" in row else
                f"{row['parameters']:,} parameters, " + ", ".join([row["dtype"], *row["methods"]]))
        ratio = (f"{row['images_per_s_ratio']:.2f} x images/s, {row['peak_memory_ratio']:.2f} x memory"
                 if "images_per_s_ratio" in row else "")
        speed = "~" * (not row.get("whole", True)) + digits(row["images_per_s"])
        lines.append([name, what, speed, f"{row['peak_memory'] / 2 ** 30:.2f} GiB", digits(row["operations"] / 1e9),
                      f"{row['share']:.0%}", ratio])
    return markdown_table(["", "", "images/s", "peak memory", "GFLOP an image", "of matmul", "ours"], lines)


def main(argv=None):
    args = parse_args(argv)
    configs = {path: load(path, args.set) for path in args.configs}
    first = args.configs[0]
    if args.one:
        print(json.dumps(measure(configs[first], *json.loads(args.one), args.seconds)))
        return
    for config in configs.values():
        build(config)  # fail before the work starts
    device = pick_device(configs[first]["devices"][0])
    if args.profile:
        print(f"{first}, batch {configs[first]['loader']['batch_size']}, {machine(device)}")
        print("\n".join(profile(configs[first], device)))
        return
    rows = list(summary(measure_all(configs, args)))
    print(f"{machine(device)}; batch " + ", ".join(str(c["loader"]["batch_size"]) for c in configs.values()))
    print("\n".join(table(rows)))
    print(LEGEND.format(**rows[0]))
    if args.json:
        command = shlex.join(["benchmark.py", *(sys.argv[1:] if argv is None else argv)])
        with atomic_file(args.json) as f:
            f.write(json.dumps({"command": command, "machine": machine(device), "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    run(main)
