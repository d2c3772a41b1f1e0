"""Two processes under torchrun train what one trains; one that is killed does not leave the other waiting."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from helpers import one_line, tree
from libs import UsageError
from libs.training.distributed import World

CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code")
CONFIG = """
model_name: {kind}
devices: [cpu]
dtype: fp64
output_folder: {folder}/logs
dataset: {{name: ImageFolder, data_folder: {folder}/data, img_size: 16}}
loader: {{batch_size: 8}}
model: {{timesteps: 20, dim: 8, context_dim: 8, dim_mults: [1, 2], attn_levels: [1], label_dropout: 0.2}}
train_cfg: {{epochs: 5, lr: 1e-3, optimizer: {optimizer}, num_eval_samples: 1, accumulate: {accumulate}}}
sample_cfg: {{steps: 2}}
"""
# kills its own process after the third update
WRAPPER = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
import libs.training.update
update, calls = libs.training.update.ModelEMA.update, []
def patched(self, model):
    update(self, model)
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
libs.training.update.ModelEMA.update = patched
import train
cli.run(train.main)
"""
# the first process takes longer than TIMEOUT: to set up, then in training
SLOW = """
import os, sys, time
from datetime import timedelta
sys.path.insert(0, os.getcwd())
import torch
from libs.training.distributed import World, lost_peer
World.TIMEOUT = timedelta(seconds=3)
child = os.fork()
os.environ["RANK"] = "0" if child else "1"
world = World()
world.connect(torch.device("cpu"))
world.one_after_the_other()
if world.first:
    time.sleep(5)
world.one_after_the_other(done=True)
if world.first:
    time.sleep(5)
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
try:
    world.agree(1)
except RuntimeError as error:
    print("set up, then given up", lost_peer(error))
"""
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


@pytest.fixture
def project(tmp_path):
    tree(tmp_path / "data", {"": ["a", "b"]}, per_class=16, height=18, width=18)
    return tmp_path


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in more.items()}}


def config(project, **options):
    path = project / "tiny.yaml"
    path.write_text(CONFIG.format(folder=project.as_posix(), **{"kind": "DDPM", "optimizer": "adamw", "accumulate": 1,
                                                                **options}))
    return str(path)


def weights(project, name):
    state = torch.load(project / "logs" / f"tiny_{name}" / "model_final.pth.tar", weights_only=True)
    assert state["step"] == 20
    return state


def train(project, name, *launcher, **options):
    done = subprocess.run([sys.executable, *launcher, "train.py", config(project, **options), "--output", name, "-p", "5"],
                          cwd=CODE, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "  loss " in line]


@pytest.mark.parametrize("options", [{}, {"kind": "EDM", "optimizer": "muon", "accumulate": 2}])
def test_two_processes_train_what_one_trains(project, options):
    one = train(project, "one", **{**options, "accumulate": 1})
    two = train(project, "two", "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
                "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", **options)
    a, b = weights(project, "one"), weights(project, "two")
    for key in ("state_dict", "state_dict_ema"):
        for name, x in a[key].items():
            assert (x - b[key][name]).abs().max() <= 1e-9, name
    # the log is said once, and of the whole batch
    losses = [[float(line.split("loss ")[1].split()[0]) for line in lines] for lines in (one, two)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_killed_process_is_an_error_of_the_others(project):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    path = config(project)
    both = [subprocess.Popen([sys.executable, "-c", WRAPPER, path, "--output", "x"], cwd=CODE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=environment(RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="localhost",
                                             MASTER_PORT=port)) for rank in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [1, -signal.SIGKILL]
    lines = [line for line in said[0][1].splitlines() if "error:" in line]
    assert len(lines) == 1 and "another process of this run has ended" in lines[0], said[0][1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_only_the_set_up_may_take_long():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    done = subprocess.run([sys.executable, "-c", SLOW], cwd=CODE, capture_output=True, text=True, timeout=120,
                          env=environment(WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port))
    assert done.returncode == 0 and done.stdout == "set up, then given up True\n", done.stderr


def test_a_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    world = World()
    assert world.share(9) == slice(6, 9) and not world.first
    with pytest.raises(UsageError) as e:
        world.share(8)
    assert "loader.batch_size: 8" in one_line(e) and "3 processes" in one_line(e)
    assert world.share(64, 9) == slice(6, 9)


def test_one_process_is_the_plain_case(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world, model = World(), torch.nn.Linear(2, 2)
    assert world.share(7) == slice(0, 7) and world.wrap(model, torch.device("cpu")) is model
    assert world.total(3, 4) == (3, 4) and world.agree(5) == 5 and world.device_name(["cuda:1"]) == "cuda:1"


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert World().device_name(["cuda:0"]) == "cuda:1" and World().device_name(["cuda:4", "cuda:6"]) == "cuda:6"
    assert World().device_name(["cpu"]) == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError) as e:
        World().device_name(["cuda:0"])
    assert "cuda:1, for process 1 of this machine, is not among its 1 GPU;" in one_line(e)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # left to pick_device, which takes the CPU
    assert World().device_name(["cuda:0"]) == "cuda:1"
