"""Start trainings on top of each other, again and again: one has the run folder, the other is refused in one line.

python tests/race_runs.py --times 50

Then a live run is resumed, 20 times for 50: refused, and the live run ends with the bits of one that was left alone.
No test of the suite, as it takes minutes.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from kill_runs import compare, write_config
from scripts import command, start


def seeds(folder):
    """The seeds of everything in a run folder."""
    found = {torch.load(p, weights_only=True)["config"]["seed"] for p in folder.glob("*.pth.tar")}
    return found | {yaml.safe_load((folder / "config.txt").read_text())["seed"]}


def race(config, n):
    """Two trainings of one name at once: what is wrong with their ends, or None."""
    folder = config.parent / "runs" / f"{config.stem}_{n}"
    both = [start("train.py", config, "-c", 1, "--output", n, "--set", f"seed={seed}") for seed in (1, 2)]
    ends = [wait() for wait in both]
    won, lost = sorted(ends, key=lambda r: r.status)
    good = won.status == 0 and "done: " in won.out and lost.status == 2 and "Traceback" not in lost.err
    good = good and lost.err.count("\n") == 1 and folder.name in lost.err and seeds(folder) == {1 + ends.index(won)}
    shutil.rmtree(folder)
    return None if good and not list(folder.parent.glob(f"*_{n}*")) else ends


def intrude(config, n):
    """A live run is resumed as soon as it has a checkpoint: what is wrong, or None."""
    folder = config.parent / "runs" / f"{config.stem}_live{n}"
    wait = start("train.py", config, "-c", 1, "--output", f"live{n}")
    while wait.process.is_alive() and not any(folder.glob("epoch_*.pth.tar")):
        time.sleep(0.01)
    second = command("train.py", "--resume", folder)
    in_time = wait.process.is_alive()
    first = wait()
    if not in_time:
        return "the run had ended before it was resumed"
    good = second.status == 2 and f"process {wait.process.pid}" in second.err and second.err.count("\n") == 1
    good = good and first.status == 0 and not compare(folder, folder.with_name(f"{config.stem}_whole"))
    shutil.rmtree(folder)
    return None if good else (first, second)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    times, root = parser.parse_args().times, Path(tempfile.mkdtemp())
    config, failed = write_config(root, "DDPM"), False
    assert command("train.py", config, "-c", 1, "--output", "whole").status == 0
    for what, attempt, n in (("of one name at once", race, times), ("resumed while alive", intrude, times * 2 // 5)):
        wrong = [x for x in (attempt(config, k) for k in range(n)) if x]
        for x in wrong[:3]:
            print(x)
        print(f"{what}: {n - len(wrong)} of {n} as they should", flush=True)
        failed |= bool(wrong)
    shutil.rmtree(root)
    return failed


if __name__ == "__main__":
    sys.exit(main())
