"""Scripts as a user starts them, each in a process of its own that is watched: status, output and memory."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import tempfile
import warnings
from multiprocessing import forkserver
from typing import NamedTuple
from unittest import mock

import yaml
from PIL import Image

PROJECT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
# what scripts spend their first seconds on
PRELOADED = ["scripts", "torch.utils.tensorboard", "libs", "libs.evaluation", "libs.training.run_folder"]


class Ended(NamedTuple):
    """How a script ended. status: as a shell has it, or minus the signal that killed it; memory: most bytes held, NaN
    where it was killed."""
    status: int
    out: str
    err: str
    memory: float

    @property
    def message(self):
        """Standard error, which must be the one line of an error."""
        assert self.status in (1, 2) and self.err.count("\n") == 1 and "Traceback" not in self.err, self
        return self.err


def tiny_project(root, size, **sections):
    """Two class folders of pictures of `size` and a config that trains on them, tiny.yaml; runs go into root/runs."""
    for k, name in enumerate(["cat", "dog"]):
        (root / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (size, size), (100 * k + 50 * i,) * 3).save(root / "images" / name / f"{i}.png")
    (root / "tiny.yaml").write_text(yaml.safe_dump({
        "devices": ["cpu"], "output_folder": str(root / "runs"), "loader": {"batch_size": 2},
        "dataset": {"name": "ImageFolder", "data_folder": str(root / "images"), "img_size": 16},
        "model": {"dim": 8, "context_dim": 8, "dim_mults": [1, 2], "attn_levels": [], "timesteps": 10}, **sections}))
    return root / "tiny.yaml"


def command(script, *arguments, **options):
    """Run `script`, such as "train.py" of code/, to its end: Ended. options: see `start`."""
    return start(script, *arguments, **options)()


def start(script, *arguments, cwd=None, seconds=30, environment=None):
    """Start a script; returns the function that waits for its end: () -> Ended, whose `process` can be sent signals.

    seconds: after which it is killed (SIGALRM). Each process is a fork of one that has only imported modules.
    """
    context = multiprocessing.get_context("forkserver")
    path = os.pathsep.join([os.path.dirname(os.path.abspath(__file__)), os.path.join(PROJECT, "code")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):
        context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    path = os.path.join(PROJECT, "" if script.startswith("zip_") else "code", script)
    folder = tempfile.TemporaryDirectory()
    process = context.Process(target=_run, args=(path, [str(a) for a in arguments], cwd or folder.name, seconds,
                                                 environment or {}, folder.name))
    process.start()

    def wait():
        process.join()
        read = {}
        for name in ("out", "err", "memory"):
            with open(os.path.join(folder.name, name), "a+", errors="replace") as f:
                f.seek(0)
                read[name] = f.read()
        return Ended(process.exitcode, read["out"], read["err"], float(read["memory"] or "nan"))

    wait.process, wait.folder = process, folder  # the folder is deleted when nobody can wait any more
    return wait


def _run(path, arguments, cwd, seconds, environment, folder):
    os.environ.update(environment, OMP_NUM_THREADS="1")
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    sys.argv, sys.path[0] = [path, *arguments], os.path.dirname(path)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it from its start
    signal.alarm(seconds)
    warnings.filterwarnings("ignore", "model.timesteps")  # small models have few
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        with open(os.path.join(folder, "memory"), "w") as f:
            f.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)))
