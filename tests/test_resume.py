"""A run that is killed and resumed ends with the very bits of one that was not. Real train.py, real signals."""

import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
from PIL import Image

import libs.training.run_folder as run_folder
from libs.tiny_autoencoder import TAESD, build_decoder, build_encoder

CODE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code")
UPDATES, EPOCHS = 6, 8  # 48 images in batches of 8

CONFIG = """
model_name: {kind}
devices: [cpu]
output_folder: {folder}/logs
dataset: {{name: ImageFolder, data_folder: {folder}/data, img_size: 16}}
loader: {{batch_size: 8}}
model: {{timesteps: 20, dim: 16, context_dim: 8, dim_mults: [1, 2], attn_levels: [1],
         label_dropout: 0.2, dropout: 0.1}}
train_cfg: {{epochs: 8, lr: 1e-3, warmup: 5, lr_schedule: cosine, num_eval_samples: 1}}
sample_cfg: {{steps: 2, guidance_scale: 1.5}}
"""

# runs train.py in a process that kills itself: after update N, or half way through checkpoint N
WRAPPER = """
import os, signal, sys, torch
sys.path.insert(0, os.getcwd())
import cli, libs.checkpoint, libs.training
moment, n = sys.argv[1], int(sys.argv[2])
count = 0
def die(number):
    global count
    count += 1
    if count == n:
        os.kill(os.getpid(), number)
if moment in ("update", "ctrl-c"):
    update = libs.training.ModelEMA.update
    def patched(self, model):
        update(self, model)
        die(signal.SIGKILL if moment == "update" else signal.SIGINT)
    libs.training.ModelEMA.update = patched
else:
    save = torch.save
    def half(state, f):
        import io
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        f.flush()
        die(signal.SIGKILL)
        f.seek(0), f.truncate(), f.write(whole.getvalue())
    torch.save = half
sys.argv = sys.argv[3:]
import train
cli.run(train.main)
"""


@pytest.fixture()
def project(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, n in (("a", 30), ("b", 18)):
        os.makedirs(tmp_path / "data" / name)
        for i in range(n):
            pixels = torch.randint(0, 256, (18, 18, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path


def write_config(project, kind):
    path = project / "tiny.yaml"
    path.write_text(CONFIG.format(kind=kind, folder=project.as_posix()))
    return str(path)


def environment():
    # one thread, so that sums are added in one order
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def train(*arguments, wrapper=None):
    command = ["train.py"] if wrapper is None else ["-c", WRAPPER, *map(str, wrapper), "train.py"]
    return subprocess.run([sys.executable, *command, *arguments], cwd=CODE, env=environment(),
                          capture_output=True, text=True, timeout=300)


def final_state(folder, epochs=EPOCHS):
    return torch.load(folder / f"epoch_{epochs - 1:03d}.pth.tar", weights_only=True)


def assert_identical(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_identical(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_identical(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("kind", ["DDPM", "EDM"])
def test_killed_five_times_ends_with_the_same_bits(project, kind):
    config = write_config(project, kind)
    done = train(config, "-c", "1", "--output", "whole")
    assert done.returncode == 0, done.stderr
    folder = project / "logs" / "tiny_broken"

    rng = random.Random(kind)
    first = rng.randrange(1, UPDATES + 1)
    killed = train(config, "-c", "1", "--output", "broken", wrapper=("update", UPDATES + first))
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "epoch_000.pth.tar").exists()
    for moment in ("checkpoint", "update", "update", "update"):
        n = 1 if moment == "checkpoint" else rng.randrange(UPDATES + 1, 2 * UPDATES + 1)
        killed = train(config, "-c", "1", "--resume", str(folder), wrapper=(moment, n))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        if moment == "checkpoint":
            assert list(folder.glob("*.partial")), "the kill was meant to come inside a write"
    # and a sixth time by the clock, wherever that is: perhaps before the first update
    process = subprocess.Popen([sys.executable, "train.py", config, "-c", "1", "--resume", str(folder)], cwd=CODE,
                               env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(2, 6))
    process.kill()
    process.wait()

    done = train(config, "-c", "1", "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*.partial"))
    assert_identical(final_state(project / "logs" / "tiny_whole"), final_state(folder))
    grids = [(project / "logs" / run / "sample-7.png").read_bytes() for run in ("tiny_whole", "tiny_broken")]
    assert grids[0] == grids[1]


def test_ctrl_c_in_the_middle_of_an_epoch(project):
    config = write_config(project, "DDPM")
    assert train(config, "--output", "whole").returncode == 0
    folder = project / "logs" / "tiny_stopped"
    stopped = train(config, "--output", "stopped", wrapper=("ctrl-c", 2 * UPDATES + 3))
    assert stopped.returncode == 128 + signal.SIGINT, stopped.stderr
    assert (folder / "epoch_002_batch_00003.pth.tar").exists()
    assert "--resume" in stopped.stdout.splitlines()[-1]
    state = torch.load(folder / "epoch_002_batch_00003.pth.tar", weights_only=True)
    assert (state["epoch"], state["batch"], state["step"]) == (2, 3, 2 * UPDATES + 3)
    done = train(config, "--resume", str(folder))
    assert done.returncode == 0, done.stderr
    assert_identical(final_state(project / "logs" / "tiny_whole"), final_state(folder))


def test_every_option_at_once_and_latents_from_a_cache(project):
    """Half precision, Muon, accumulation, a stochastic sampler, latents found or made anew: the same bits."""
    torch.manual_seed(0)
    torch.save(build_encoder().state_dict(), project / "encoder.pth")
    torch.save(build_decoder().state_dict(), project / "decoder.pth")
    config = write_config(project, "EDM")
    latent = [word for setting in ("model.use_vae=true", f"model.vae_encoder_weights={project / 'encoder.pth'}",
                                   f"model.vae_decoder_weights={project / 'decoder.pth'}", "train_cfg.epochs=3",
                                   "dtype=bf16", "train_cfg.optimizer=muon", "train_cfg.accumulate=2",
                                   "model.label_in_time=true", "model.zero_init=true", "sample_cfg.sampler=dpmpp_2m",
                                   "sample_cfg.eta=0.5") for word in ("--set", setting)]
    done = train(config, *latent, "-c", "1", "--output", "whole")
    assert done.returncode == 0 and "encoding 48 images, 8 views each" in done.stdout, done.stderr
    folder, cache = project / "logs" / "tiny_broken", project / "data" / ".latents"
    killed = train(config, *latent, "-c", "1", "--output", "broken", wrapper=("update", UPDATES + 4))
    assert killed.returncode == -signal.SIGKILL and "encoding" not in killed.stdout
    for path in cache.iterdir():
        path.unlink()
    done = train(config, *latent, "-c", "1", "--resume", str(folder))
    assert done.returncode == 0 and "encoding 48 images" in done.stdout, done.stderr
    assert_identical(final_state(project / "logs" / "tiny_whole", 3), final_state(folder, 3))
    grids = [(project / "logs" / run / "sample-2.png").read_bytes() for run in ("tiny_whole", "tiny_broken")]
    assert grids[0] == grids[1]
    final = torch.load(folder / "model_final.pth.tar", weights_only=True)
    assert final["autoencoder"] == TAESD(project / "encoder.pth", project / "decoder.pth").hashes()


@pytest.mark.parametrize("virtual", [True, False])
def test_the_command_that_goes_on(tmp_path, monkeypatch, virtual):
    """With the python of the virtual environment, whose link to another is not followed."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env") if virtual else sys.base_prefix)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.chdir(tmp_path)
    args = Namespace(config="my run.yaml", ckpt_freq=5, print_freq=100, set=["seed=3"])
    assert run_folder.resume_command(args, str(tmp_path / "logs")) == (
        f"{os.path.join('env', 'bin', 'python') if virtual else 'python'} train.py 'my run.yaml' -c 5 -p 100 "
        "--set seed=3 --resume logs")


def test_run_folder(project):
    """What design and handout promise to lie in a run folder, and what TensorBoard is given."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_config(project, "DDPM")
    assert train(config, "-c", "4", "-p", "5", "--output", "run").returncode == 0
    folder = project / "logs" / "tiny_run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.txt", "epoch_003.pth.tar", "epoch_007.pth.tar", "logs", "model_final.pth.tar", "sample-3.png",
        "sample-7.png"]
    assert Image.open(folder / "sample-7.png").size == (1 * 17 + 1, 2 * 17 + 1)  # a row per class
    final = torch.load(folder / "model_final.pth.tar", weights_only=True)
    assert "optimizer" not in final and final["epoch"] == EPOCHS and final["step"] == EPOCHS * UPDATES

    board = EventAccumulator(str(folder / "logs"))
    board.Reload()
    scalars = board.Tags()["scalars"]
    assert {"train/loss", "train/lr", "train/grad_norm", "speed/images_per_s", "speed/peak_memory_GiB"} <= set(scalars)
    assert len([s for s in scalars if s.startswith("loss_by_time/")]) == 10
    assert [e.step for e in board.Scalars("train/loss")] == [5, 10, 15, 20, 25, 30, 35, 40, 45, 48]
    assert set(board.Tags()["images"]) == {"samples/ema", "samples/raw"}
    assert board.Tags()["tensors"] == ["config/text_summary"]

    # a finished run is not trained again
    again = train(config, "--resume", str(folder))
    assert again.returncode == 0
    assert_identical(final, torch.load(folder / "model_final.pth.tar", weights_only=True))


def test_full_disk_keeps_the_last_checkpoint(project):
    """A real full disk: a write beyond the process's file-size limit fails as one on a full disk does."""
    config = write_config(project, "DDPM")
    folder = project / "logs" / "tiny_full"
    assert train(config, "-c", "1", "--output", "full", "--set", "train_cfg.epochs=2").returncode == 0
    before = (folder / "epoch_001.pth.tar").read_bytes()
    limit = ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
             f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); ")
    done = subprocess.run([sys.executable, "-c", limit + "import sys, os; sys.path.insert(0, os.getcwd()); "
                           "import cli, train; cli.run(train.main)", config, "-c", "1",
                           "--resume", str(folder)],
                          cwd=CODE, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "checkpoint: cannot write" in last and "epoch_002.pth.tar" in last and "earlier checkpoints are untouched" in last
    assert (folder / "epoch_001.pth.tar").read_bytes() == before
    assert not list(folder.glob("*.partial")) and not (folder / "epoch_002.pth.tar").exists()
