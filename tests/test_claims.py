"""One training at a time in a run folder; and what becomes of one whose terminal, curves, folder or disk goes away."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

from scripts import command, start, tiny_project


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of a training of two updates an epoch; its runs are in the folder runs beside it."""
    return tiny_project(tmp_path_factory.mktemp("claims"), 16, sample_cfg={"steps": 2, "sampler": "ddim"},
                        train_cfg={"epochs": 3, "num_eval_samples": 1, "keep_last": 2})


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def live(config):
    """live(name): a training that goes on and on, begun so far that it has a checkpoint. (folder, what waits for its
    end)"""
    started = []

    def live(name, *more):
        folder = config.parent / "runs" / f"tiny_{name}"
        wait = start("train.py", config, "-c", 1, "-p", 1, "--output", name, "--set", "train_cfg.epochs=100000", *more)
        started.append(wait)
        until(lambda: list(folder.glob("epoch_*.pth.tar")))
        return folder, wait
    yield live
    for wait in started:
        wait.process.kill()
        wait.process.join()


def seeds(folder):
    """The seeds of everything in a run folder."""
    found = {torch.load(p, weights_only=True)["config"]["seed"] for p in folder.glob("*.pth.tar")}
    return found | {yaml.safe_load((folder / "config.txt").read_text())["seed"]}


def test_two_trainings_of_one_name(config):
    both = [start("train.py", config, "-c", 1, "--output", "same", "--set", f"seed={k}") for k in (1, 2)]
    won, lost = sorted((wait() for wait in both), key=lambda r: r.status)
    folder = config.parent / "runs" / "tiny_same"
    assert won.status == 0 and "done: " in won.out and len(seeds(folder)) == 1
    assert "--output" in lost.message and "tiny_same" in lost.message and lost.status == 2
    assert not list(folder.glob("running")) and not list(folder.glob("*.partial"))


def test_two_trainings_in_the_same_second(config, tmp_path):
    more = ["--set", f"output_folder={tmp_path}", "-c", 1]
    time.sleep(1 - time.time() % 1)  # a second begins
    both = [start("train.py", config, *more, "--set", f"seed={k}") for k in (1, 2)]
    runs = [wait() for wait in both]
    assert [r.status for r in runs] == [0, 0], runs
    folders = {Path(re.search("done: (.*) has", r.out)[1]).name for r in runs}
    assert folders == set(os.listdir(tmp_path)) and len(folders) == 2
    assert sorted(map(sorted, (seeds(tmp_path / f) for f in folders))) == [[1], [2]]


def test_a_live_run_is_not_resumed_and_a_dead_one_is(config, live):
    folder, wait = live("live", "--set", "train_cfg.keep_last=null")
    r = command("train.py", config, "--resume", folder, seconds=5)
    assert socket.gethostname() in r.message and f"process {wait.process.pid}" in r.message and r.status == 2
    newest = next(folder.glob("epoch_*.pth.tar"))
    assert "process" in command("train.py", config, "--resume", newest, seconds=5).message
    assert wait.process.is_alive()

    wait.process.kill()
    wait()
    for name in ("epoch_000.pth.tar.17.partial", "of_others.png.17.partial"):
        (folder / name).write_bytes(b"half")
    step = max(torch.load(p, weights_only=True)["epoch"] for p in folder.glob("epoch_*.pth.tar"))
    more = ["--set", f"train_cfg.epochs={step + 2}"]
    ends = [wait() for wait in [start("train.py", config, "--resume", folder, *more) for _ in range(2)]]  # at once
    won, lost = sorted(ends, key=lambda r: r.status)
    assert won.status == 0 and f"taken over from a training that has ended ({socket.gethostname()}, process " in won.out
    assert lost.message.count("process") == 1 and "a training runs there" in lost.message
    assert [p.name for p in folder.glob("*.partial")] == ["of_others.png.17.partial"]

    (folder / "running").write_text("elsewhere, process 7, since yesterday\n")  # as a Colab session leaves it
    r = command("train.py", config, "--resume", folder, *more)
    assert r.status == 0 and "has ended (elsewhere, process 7" in r.out
    assert not (folder / "running").exists()


def test_a_closed_terminal(live):
    folder, wait = live("hangup", "--set", "train_cfg.keep_last=null")
    os.kill(wait.process.pid, signal.SIGHUP)
    r = wait()
    assert r.status == 128 + signal.SIGHUP and "a checkpoint is written first" in r.err and "--resume" in r.out
    saved = re.search("saved (.*); go on", r.out)[1]
    assert (folder / os.path.basename(saved)).exists() and not (folder / "running").exists()


def test_curves_that_cannot_be_written(live):
    folder, wait = live("curves")
    (folder / "logs").rename(folder / "away")
    until(lambda: "TensorBoard" in Path(wait.folder.name, "out").read_text() or not wait.process.is_alive())
    before = len(list(folder.glob("sample-*.png")))
    until(lambda: len(list(folder.glob("sample-*.png"))) > before or not wait.process.is_alive())
    wait.process.terminate()
    r = wait()
    assert r.status == 128 + signal.SIGTERM and r.out.count("TensorBoard cannot write") == 1
    assert "Traceback" not in r.err + r.out


def test_a_run_folder_that_vanishes(live):
    folder, wait = live("vanishes", "-c", 15)
    time.sleep(0.05)  # so that it is curves which are written next
    folder.rename(folder.with_name("elsewhere"))
    r = wait()
    assert r.status == 1 and "tiny_vanishes" in r.message and not folder.exists()


def test_a_full_disk(config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "none", disk],
                                                   capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    try:
        more = ["--set", f"output_folder={disk}", "-c", 1, "-p", 1, "--output"]
        r = command("train.py", config, *more, "a", "--set", "train_cfg.keep_last=null")
        assert r.status == 1 and re.search(r"tiny_a.epoch_00\d\.pth\.tar: .*No space left", r.message)
        assert torch.load(next((disk / "tiny_a").glob("epoch_*.pth.tar")), weights_only=True)["epoch"] > 0
        with open(disk / "filler", "wb", 0) as f, pytest.raises(OSError):
            while True:
                f.write(bytes(4096))
        r = command("train.py", config, *more, "b")
        assert "config.txt" in r.message and "No space left" in r.message and not (disk / "tiny_b").exists()
    finally:
        subprocess.run(["umount", disk], check=True)
