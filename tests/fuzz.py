"""Hostile inputs for the scripts, by the thousand: configs, checkpoints, archives, images, weight files, command lines.

python tests/fuzz.py --cases 20000 --jobs 2               case k of a seed is always the same
python tests/fuzz.py --first 4711 --cases 1 --verbose     one of them again
python tests/fuzz.py --only checkpoint image

Whatever a script is given, it ends by itself within 30 seconds and 3 GiB, with status 0, 1 or 2, without a traceback,
with at most one line on standard error, exactly one with 1 or 2, and leaves no broken file. It changes nothing outside
the folder that it is started in, and with status 2 no file that was there. Inputs that fail are kept.
"""

import argparse
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image

import scripts
from fuzz_cases import KINDS, Case, environment, prepare, snapshot
from scripts import PROJECT, start

SECONDS, MEMORY = 30, 3 * 2 ** 30
PROGRESS = re.compile(r"(.*: )?[\d,]+ of [\d,]+ \w+$")  # of cli.progress_bar


def verdict(done, killed, before, after):
    """What is wrong with how a script ended, in words; empty if nothing is. before, after: snapshots of its folder."""
    wrong, lines = [], [line for line in done.err.splitlines() if not PROGRESS.match(line)]
    if killed:
        wrong.append("takes more than 4 GiB, killed")
    elif done.status == -14:
        wrong.append(f"does not end in {SECONDS} s")
    elif done.status not in (0, 1, 2):
        wrong.append(f"status {done.status}")
    elif done.memory > MEMORY:
        wrong.append("takes more than 3 GiB")
    if "Traceback" in done.err + done.out:
        wrong.append("traceback")
    elif len(lines) > 1 or done.status in (1, 2) and len(lines) != 1:
        wrong.append(f"{len(lines)} lines of error")
    elif re.search(r"[\r\x1b]", done.err):
        wrong.append("control characters in an error")
    elif len(done.err) > 10_000:
        wrong.append("an error of more than 10,000 characters")
    changed = [path for path in after if after[path] != before.get(path)]
    wrong += ["leaves a half-written file" for path in after if path.endswith(".partial")][:1]
    if done.status == 2:
        wrong += [f"changed {os.path.basename(path)} though refused" for path in before
                  if after.get(path) != before[path]][:1]
    readers = {".png": lambda path: Image.open(path).load(), ".gif": lambda path: Image.open(path).load(),
               ".npz": lambda path: np.load(path)["arr_0"], ".tar": lambda path: torch.load(path, weights_only=True),
               ".json": lambda path: json.loads(open(path).read())}
    for path in changed:
        try:
            readers.get(os.path.splitext(path)[1], len)(path)
        except Exception as e:
            wrong.append(f"leaves a broken {os.path.basename(path)} ({type(e).__name__})")
    return wrong


def attempt(base, seed, k, only, keep):
    """Run a case: what happened, as a dict; None for a kind that is not in `only`."""
    case, name = Case(seed, k), f"case-{os.getpid()}"
    if only and case.kind not in only:
        return None
    torch.manual_seed(case.rng.getrandbits(32))
    folder, beside = f"{base}/{name}/case", f"{base}/{name}/beside"
    os.makedirs(folder)
    os.makedirs(beside)
    case.build(base, folder)
    others = [beside, f"{base}/template", *(f"{PROJECT}/{name}" for name in ("code", "pretrained", "results"))]
    outside, inside = snapshot(*others), snapshot(folder)
    wait, killed = start(*case.line, cwd=folder, seconds=SECONDS, environment=environment(base, name)), False
    while wait.process.is_alive():
        wait.process.join(0.1)
        try:
            with open(f"/proc/{wait.process.pid}/statm") as f:  # rather than have the system kill something
                killed = killed or int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MEMORY + 2 ** 30
        except (OSError, IndexError):
            continue
        if killed:
            wait.process.kill()
    done = wait()
    wrong = verdict(done, killed, inside, snapshot(folder))
    if snapshot(*others) != outside:
        wrong.append("changed something outside its folder")
    if wrong:
        case.write("command.txt", f"{case.line}\n{case.notes}\n{wrong}\n{done}\n".encode(errors="replace"))
        shutil.rmtree(f"{keep}/{k}", ignore_errors=True)
        shutil.copytree(folder, f"{keep}/{k}", symlinks=True, ignore=lambda a, names: [
            n for n in names if not stat.S_IFMT(os.lstat(f"{a}/{n}").st_mode) in (stat.S_IFREG, stat.S_IFDIR)])
    shutil.rmtree(f"{base}/{name}")
    last = (done.err.strip().splitlines() or [""])[-1]
    frames = re.findall(rf'File "{re.escape(PROJECT)}/code/([^"]*)", line \d+, in (\S+)', done.err)
    where = " ".join(frames[-1] if frames else case.line[:1])
    return {"k": k, "wrong": wrong, "status": done.status, "seconds": done.seconds, "memory": done.memory,
            "group": f"{where}: {wrong[:1]} " + re.sub(r"'[^']*'|\d+|/\S+|checkpoint \S+", "_", last)[:120],
            "text": f"{k} {case.kind} | {'; '.join(case.notes)[:300]!r} | {' '.join(case.line)[:200]!r} | "
                    f"status {done.status}, {', '.join(wrong) or 'fine'} | {last[:200]!r}",
            "output": f"{done.out[-5000:]}\n{done.err[-5000:]}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=[])
    parser.add_argument("--keep", default=os.path.join(tempfile.gettempdir(), "fuzz-failures"), metavar="FOLDER")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    scripts.PRELOADED += ["hostile", "matplotlib.figure", "matplotlib.backends.backend_pdf",
                          "libs.stable_diffusion.checkpoint", "tensorboard.backend.event_processing.event_accumulator"]
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONIOENCODING="utf-8:strict", OMP_NUM_THREADS="1")
    warnings.simplefilter("ignore")
    del sys.modules["__main__"].__file__  # else every script's process would run this file first
    torch.set_num_threads(1)
    os.makedirs(args.keep, exist_ok=True)
    base = tempfile.mkdtemp(prefix="fuzz-")
    try:
        with ProcessPoolExecutor(args.jobs, get_context("fork")) as pool:
            pool.submit(prepare, base).result()
            return report(args, [pool.submit(attempt, base, args.seed, k, args.only, os.path.abspath(args.keep))
                                 for k in range(args.first, args.first + args.cases)])
    finally:
        shutil.rmtree(base, ignore_errors=True)


def report(args, results):
    """Print what becomes of the futures of `attempt`; returns an exit status."""
    started = printed = time.time()
    statuses, failed, memory, longest, count = Counter(), {}, 0, 0, 0
    for done in filter(None, (future.result() for future in results)):
        statuses[done["status"]] += 1
        count, memory, longest = count + 1, max(memory, done["memory"]), max(longest, done["seconds"])
        if done["wrong"]:
            failed.setdefault(done["group"], []).append(done["k"])
        if done["wrong"] or args.verbose:
            print(done["text"], *([done["output"]] if args.cases == 1 else []), sep="\n", flush=True)
        if time.time() - printed > 30:
            printed = time.time()
            print(f"{count:,} cases, {count / (printed - started):.1f} a second, "
                  f"{sum(map(len, failed.values()))} failures", flush=True)
    for name, cases in sorted(failed.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):5d}  {name}  ({', '.join(map(str, cases[:5]))})")
    print(f"{count / (time.time() - started):.1f} cases a second")
    ended = ", ".join(f"{status}: {n:,}" for status, n in sorted(statuses.items()))
    print(f"{count:,} cases, {sum(map(len, failed.values())):,} failures; statuses {ended}; most memory "
          f"{memory / 2 ** 30:.1f} GiB, longest {longest:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
