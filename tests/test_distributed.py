"""Two processes under torchrun train what one trains; one that is killed does not leave the other waiting."""

import os
import re
import signal
import socket
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import train
from helpers import one_line, spawn, tree
from libs import EDM, UsageError
from libs.common.cli import run
from libs.config import CODE
from libs.training import update
from libs.training.distributed import World

CONFIG = """
model_name: {kind}
devices: [cpu]
output_folder: {folder}/logs
dataset: {{name: ImageFolder, data_folder: {folder}/data, img_size: 16}}
loader: {{batch_size: 8}}
model: {{timesteps: 20, dim: 8, context_dim: 8, dim_mults: [1, 2], attn_levels: [1], label_dropout: 0.2}}
train_cfg: {{epochs: 2, lr: 1e-3, optimizer: {optimizer}, num_eval_samples: 1}}
sample_cfg: {{steps: 2, sampler: heun}}
"""
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")


def write_config(folder, kind="DDPM", optimizer="adamw"):
    tree(folder / "data", {"": ["a", "b"]}, per_class=16, height=18, width=18)
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(folder=folder.as_posix(), kind=kind, optimizer=optimizer))
    return str(path)


def spawn_two(function, *arguments):
    """`helpers.spawn` of two processes of one run."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [spawn(function, *arguments, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port)
            for rank in range(2)]


def assert_same_training(folder, outputs):
    """The same averaged gradients and losses, but for the order in which fp32 is summed. Not the same weights: where a
    gradient is zero, as of a bias before a GroupNorm, Adam makes steps of what rounding leaves."""
    a, b = (torch.load(folder / "logs" / name / "epoch_001.pth.tar", weights_only=True) for name in ("tiny_one", "tiny_two"))
    assert a["step"] == b["step"] == 8
    moments = [[state["exp_avg"] for state in x["optimizer"]["state"].values()] for x in (a, b)]
    assert len(moments[0]) == len(moments[1]) and max(m.abs().max() for m in moments[0]) > 0.01
    for one, two in zip(*moments):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-3)
    # the log is written once, and is of the whole batch
    losses = [[float(x) for x in re.findall(r"  loss (\S+)", out)] for out in outputs]
    assert len(losses[0]) == len(losses[1]) == 2 and losses[0] == pytest.approx(losses[1], abs=2e-4)


def torchrun(arguments):
    from torch.distributed.run import main
    main(arguments)


def test_torchrun_trains_what_one_process_trains(tmp_path, capsys):
    config = write_config(tmp_path)
    train.main([config, "-p", "4", "--output", "one"])
    status, out, err = spawn(torchrun, [
        "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", os.path.join(CODE, "train.py"), config,
        "-p", "4", "--output", "two"])()
    assert status == 0, err
    assert_same_training(tmp_path, (capsys.readouterr().out, out))


def training(arguments):
    train.main(arguments)


def test_with_edm_muon_and_a_batch_in_parts(tmp_path, capsys):
    config = write_config(tmp_path, "EDM", "muon")
    train.main([config, "-p", "4", "--output", "one"])
    both = spawn_two(training, [config, "-p", "4", "--output", "two", "--set", "train_cfg.accumulate=2"])
    ends = [wait() for wait in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert_same_training(tmp_path, (capsys.readouterr().out, ends[0][1] + ends[1][1]))


def training_with_dropout(arguments):
    """train.py, which prints a part of each dropout mask and what it sends to the others."""
    dropout, reduce = nn.Dropout.forward, []

    def forward(self, x):
        out = dropout(self, x)
        if self.training and not torch.is_inference_mode_enabled() and torch.is_grad_enabled():
            print("mask", (out == 0).flatten()[:40].int().tolist(), flush=True)
        return out

    def hook(state, bucket):
        reduce.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    nn.Dropout.forward, wrap = forward, World.wrap

    def wrapped(self, model, device):
        model = wrap(self, model, device)
        model.register_comm_hook(None, hook)
        return model

    World.wrap = wrapped
    train.main(arguments)
    print("reduced", reduce.count(0), flush=True)


def test_each_process_has_its_own_dropout_and_gradients_are_sent_once_an_update(tmp_path):
    arguments = [write_config(tmp_path), "--output", "two", "--set", "train_cfg.accumulate=2", "--set", "model.dropout=0.5"]
    first, second = (wait() for wait in spawn_two(training_with_dropout, arguments))
    assert first[0] == second[0] == 0, (first, second)
    one, two = ([line for line in out.splitlines() if line.startswith("mask")] for _, out, _ in (first, second))
    assert len(one) == len(two) > 16 and all(a != b for a, b in zip(one, two)) and len(set(one)) == len(one)
    assert "reduced 8\n" in first[1] and "reduced 8\n" in second[1]  # 8 updates of 2 parts


def killed_training(arguments):
    """train.py, of which the second process is killed after its third update."""
    average, calls = update.ModelEMA.update, []

    def patched(self, model):
        average(self, model)
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    update.ModelEMA.update = patched
    run(partial(train.main, arguments))


def test_a_killed_process_is_an_error_of_the_others(tmp_path):
    first, second = (wait() for wait in spawn_two(killed_training, [write_config(tmp_path), "--output", "x"]))
    assert (first[0], second[0]) == (1, -signal.SIGKILL)
    lines = [line for line in first[2].splitlines() if "error:" in line]
    assert len(lines) == 1 and "another process of this run has ended" in lines[0], first[2]


def slow_first_process():
    """It takes longer than TIMEOUT: to set up and to draw a grid, which is allowed, then in training."""
    World.TIMEOUT = timedelta(seconds=2)
    world = World()

    def main():
        world.connect(torch.device("cpu"))
        world.one_after_the_other()
        if world.first:
            time.sleep(2.5)
        world.one_after_the_other(done=True)
        print("set up", flush=True)
        if world.first:
            time.sleep(2.5)
        world.meet()
        print("met", flush=True)
        if world.first:
            time.sleep(3)
        else:
            world.agree(1)

    run(main)


def test_only_the_set_up_and_grids_may_take_long():
    first, second = (wait() for wait in spawn_two(slow_first_process))
    assert first[:2] == (0, "set up\nmet\n") and second[:2] == (1, "set up\nmet\n"), (first, second)
    assert "another process of this run has ended" in second[2]


def test_a_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    world = World()
    assert world.share(9) == slice(6, 9) and not world.first and world.share(64, 9) == slice(6, 9)
    with pytest.raises(UsageError) as e:
        world.share(8)
    assert "loader.batch_size: 8" in one_line(e) and "3 processes" in one_line(e)


def test_one_process_is_the_plain_case():
    world, model = World(), EDM((1, 8, 8), 4, 8, 8, 2, (1,), ())
    assert world.share(7) == slice(0, 7) and world.wrap(model, torch.device("cpu")) == model.compute_loss
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
