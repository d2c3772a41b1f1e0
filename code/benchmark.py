"""Speed and memory in one table: training, the same network trained naively, every sampler.

python ./benchmark.py                                          mnist.yaml and mnist_cpu.yaml
python ./benchmark.py ./configs/mnist.yaml --compare           and other people's UNets
python ./benchmark.py ./configs/mnist.yaml --profile           what an update spends its time on"""

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
from tqdm import tqdm

import libs
from libs.training.speed import NAIVE, OURS, SAMPLERS, build, measure, profile
from libs.training.other_unets import OTHERS, fit, parameters
from libs.common.cli import Parser, check_output, positive, run
from libs.common.errors import RunError, UsageError, first_line
from libs.common.files import atomic_file
from libs.training.update import pick_device

LEGEND = """\
training: updates as train.py makes them, of random images in memory, after one to warm up.
naively: the same network and data in fp32, eager, attention as two matrix products and a softmax, tensors not in
channels_last, the optimizer not fused. (To one token of context attention is 1, in both: no query is computed.)
peak memory: of the GPU, or of the whole process, libraries and all; there a sampler's is the largest one so far.
GFLOP: 10^9 multiplications and additions of the network's matrix products and convolutions, per image; in training
forward and backward, without what a kernel computes twice; in sampling forward, times the network calls.
of matmul: GFLOP times images/s, in units of what a {n} x {n} matrix product reaches in the row's precision and
process (training: {rate:.0f} GFLOP/s). Above 100 %: convolutions go through another library, maybe a faster one.
~: stopped early and scaled to all network calls.
against it: the first row's images/s and memory in units of this row's, median of the rounds."""


def in_a_process(path, kind, how, args):
    """`measure` in a process of its own, so that the peak of its memory is its own."""
    command = [sys.executable, os.path.abspath(__file__), path, "--seconds", str(args.seconds),
               "--one", json.dumps([kind, how]), *(x for item in args.set for x in ("--set", item))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip() or f"exit status {done.returncode}"
        raise RunError(f"{path}, {kind}: {why.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


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
    cells = [["", "images/s", "peak memory", "GFLOP an image", "of matmul", "against it"]]
    for path in dict.fromkeys(row["config"] for row in rows):
        mine = [row for row in rows if row["config"] == path]
        cells.append([f"**{os.path.basename(path)}**"] + [""] * 5)
        for row in mine:
            what = (f"{row['row']}, {row['steps']} steps, {row['calls']} network calls" if "steps" in row else
                    f"{row['row']}, {row['parameters']:,} parameters, " + ", ".join([row["dtype"], *row["tricks"]]))
            ratio = (f"{row['images_per_s_ratio']:.2f} x images/s, {row['peak_memory_ratio']:.2f} x memory"
                     if "images_per_s_ratio" in row else "")
            speed = "~" * (not row.get("whole", True)) + digits(row["images_per_s"])
            cells.append([what, speed, f"{row['peak_memory'] / 2 ** 30:.2f} GiB", digits(row["operations"] / 1e9),
                          f"{row['share']:.0%}", ratio])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for k, line in enumerate(cells):
        yield "| " + " | ".join(f"{text:<{w}}" if i == 0 else f"{text:>{w}}"
                                for i, (text, w) in enumerate(zip(line, widths))) + " |"
        if k == 0:
            yield "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"


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


def seconds(text):
    """Type of --seconds."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value:g} is no time above 0")
    return value


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("configs", nargs="*", default=["./configs/mnist.yaml", "./configs/mnist_cpu.yaml"],
                        help="YAML files (default: ./configs/mnist.yaml ./configs/mnist_cpu.yaml)")
    parser.add_argument("--compare", action="store_true", help="train the UNets of diffusers and "
                        "denoising-diffusion-pytorch too,\nwith the first config's levels and number of parameters")
    parser.add_argument("--profile", action="store_true",
                        help="instead of the table: the ten operators that take most of the first config's update")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds, all rows in turn (default 3)")
    parser.add_argument("--seconds", type=seconds, default=2.0, help="of each measurement, at least (default 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--json", default=None, metavar="FILE.json", help="write the figures of every round there")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)  # how the script calls itself
    args = parser.parse_args()
    if args.profile and (args.json or args.compare):
        raise UsageError(f"--{'json' if args.json else 'compare'}: --profile measures nothing; leave one of them out")
    if args.json:
        if not args.json.endswith(".json"):
            raise UsageError(f"--json: {args.json} must end in .json")
        check_output(args.json, args.overwrite, "--json")
    return args


def load(path, overrides):
    config = libs.load_config(path, overrides)
    config["model"]["num_classes"] = config["model"]["num_classes"] or 10
    return config


def others(config):
    """{name: how to build it} of OTHERS; says how wide they are, and which package is missing."""
    ours, found = build(config).model, {}
    for name, other in OTHERS.items():
        try:
            found[name], n = fit(name, ours, config["model"])
        except ImportError as e:
            print(f"{name} is left out: it needs `pip install {other.package}` ({first_line(e)})")
        else:
            how = ", ".join(f"{key} {value}" for key, value in found[name].items())
            print(f"{name}: {how}: {n:,} parameters for our {parameters(ours):,}")
    return found


def main():
    args = parse_args()
    configs = {path: load(path, args.set) for path in args.configs}
    first = args.configs[0]
    if args.one:
        print(json.dumps(measure(configs[first], *json.loads(args.one), args.seconds)))
        return
    for config in configs.values():
        build(config)  # so that what cannot be is said now
    device = pick_device(configs[first]["devices"])
    if args.profile:
        print(f"{first}, batch {configs[first]['loader']['batch_size']}, {machine(device)}")
        print("\n".join(profile(configs[first], device)))
        return

    extra = others(configs[first]) if args.compare else {}
    jobs = [(path, kind, how) for path in configs
            for kind, how in {OURS: None, NAIVE: None, **(extra if path == first else {}), SAMPLERS: None}.items()]
    minutes = args.rounds * len(jobs) * (2.5 * args.seconds + 5) / 60
    print(f"{args.rounds} rounds of {len(jobs)} measurements in turn, each in a process of its own: about "
          f"{minutes:.0f} minutes on two CPU cores", flush=True)
    results = {}
    with tqdm(total=args.rounds * len(jobs), unit="measurement", disable=None) as bar:
        for _ in range(args.rounds):
            for job in jobs:
                for name, figures in in_a_process(*job, args).items():
                    results.setdefault((job[0], name), []).append(figures)
                bar.update()
    rows = list(summary(results))
    print(f"{machine(device)}; batch " + ", ".join(str(c["loader"]["batch_size"]) for c in configs.values()))
    print("\n".join(table(rows)))
    print(LEGEND.format(n=rows[0]["matmul_n"], rate=rows[0]["matmul_rate"] / 1e9))
    if args.json:
        figures = {"command": shlex.join(sys.argv), "machine": machine(device), "rows": rows}
        with atomic_file(args.json) as f:
            f.write(json.dumps(figures, indent=1).encode())


if __name__ == "__main__":
    run(main)
