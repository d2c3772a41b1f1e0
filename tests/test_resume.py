"""A run that is killed and resumed ends with the very bits of one that was not. Real signals, in processes of their own."""

import errno
import io
import os
import random
import signal
import sys
from functools import partial

import pytest
import torch
from PIL import Image

import train
from helpers import differences, spawn, tree
from libs import UsageError
from libs.common.cli import run
from libs.tiny_autoencoder import TAESD, build_decoder, build_encoder
from libs.training import run_folder, update

UPDATES, EPOCHS = 4, 4  # 32 images in batches of 8

CONFIG = """
model_name: {kind}
devices: [cpu]
output_folder: {folder}/logs
dataset: {{name: ImageFolder, data_folder: {folder}/data, img_size: 16}}
loader: {{batch_size: 8}}
model: {{timesteps: 20, dim: 8, context_dim: 8, dim_mults: [1, 2], attn_levels: [1],
         label_dropout: 0.2, dropout: 0.1}}
train_cfg: {{epochs: 4, lr: 1e-3, warmup: 5, lr_schedule: cosine, num_eval_samples: 1}}
sample_cfg: {{steps: 2, guidance_scale: 1.5, sampler: {sampler}}}
"""


def interrupted_training(arguments, moment, n, number=signal.SIGKILL):
    """train.py in a process that sends itself a signal: after its update n, before it draws its grid n, or half way
    through its checkpoint n."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it from its start
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), number)

    average, save, draw = update.ModelEMA.update, torch.save, run_folder.sample_grid

    def patched_update(self, model):
        average(self, model)
        count()

    def patched_save(state, f):
        whole = io.BytesIO()
        save(state, whole)
        f.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        f.flush()
        count()
        f.seek(0), f.truncate(), f.write(whole.getvalue())

    def patched_grid(*given):
        count()
        return draw(*given)

    if moment == "update":
        update.ModelEMA.update = patched_update
    elif moment == "grid":
        run_folder.sample_grid = patched_grid
    else:
        torch.save = patched_save
    sys.argv = ["train.py", *arguments]
    run(partial(train.main, arguments))


def interrupted(*arguments):
    """Exit status, standard output and standard error of `interrupted_training`."""
    return spawn(interrupted_training, *arguments)()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return tree(folder / "data", {"": ["a", "b"]}, per_class=16, height=18, width=18)


@pytest.fixture
def project(tmp_path, images, monkeypatch):
    """project(kind): a config of such a model in an empty folder."""
    (tmp_path / "data").symlink_to(images)
    monkeypatch.setattr("libs.config.CACHE", str(tmp_path / "cache"))

    def project(kind="DDPM"):
        path = tmp_path / "tiny.yaml"
        path.write_text(CONFIG.format(kind=kind, folder=tmp_path.as_posix(), sampler={"DDPM": "ddim"}.get(kind, "heun")))
        return str(path)
    return project


def assert_same_end(a, b, epochs=EPOCHS):
    """Two run folders end with the same weights, states, and pictures."""
    assert not differences(*(torch.load(folder / f"epoch_{epochs - 1:03d}.pth.tar", weights_only=True)
                             for folder in (a, b)))
    assert (a / f"sample-{epochs - 1}.png").read_bytes() == (b / f"sample-{epochs - 1}.png").read_bytes()


@pytest.mark.parametrize("kind", ["DDPM", "Flow"])
def test_killed_again_and_again_ends_with_the_same_bits(project, tmp_path, kind):
    config, folder, rng = project(kind), tmp_path / "logs" / "tiny_broken", random.Random(kind)
    train.main([config, "-c", "1", "--output", "whole"])
    moment = ("update", UPDATES + rng.randint(1, 3)) if kind == "DDPM" else ("grid", rng.randint(1, 3))
    assert interrupted([config, "-c", "1", "--output", "broken"], *moment)[0] == -signal.SIGKILL
    assert (folder / "epoch_000.pth.tar").exists()
    assert interrupted(["--resume", str(folder)], "checkpoint", 2)[0] == -signal.SIGKILL
    assert list(folder.glob("*.partial")), "the kill was meant to come inside a write"
    if kind == "DDPM":  # Ctrl-C in the middle of an epoch
        status, out, err = interrupted(["--resume", str(folder)], "update", 3, signal.SIGINT)
        assert status == 128 + signal.SIGINT and "a checkpoint is written first" in err and "Traceback" not in err
        state = torch.load(folder / "epoch_002_batch_00003.pth.tar", weights_only=True)
        assert (state["epoch"], state["batch"], state["step"]) == (2, 3, 2 * UPDATES + 3)
        assert out.splitlines()[-1].endswith(f"train.py --resume {os.path.relpath(folder)}")
    assert not (folder / "model_final.pth.tar").exists()
    train.main(["--resume", str(folder)])  # -c 1 and all settings are the run's own
    assert not list(folder.glob("*.partial"))
    assert_same_end(tmp_path / "logs" / "tiny_whole", folder)


def test_every_option_at_once_and_latents_from_a_cache(project, tmp_path, capsys):
    """An EDM in half precision, Muon, accumulation, a stochastic sampler, latents read or encoded again: the same bits."""
    torch.save(build_encoder().state_dict(), tmp_path / "encoder.pth")
    torch.save(build_decoder().state_dict(), tmp_path / "decoder.pth")
    settings = ("model.use_vae=true", f"model.vae_encoder_weights={tmp_path / 'encoder.pth'}",
                f"model.vae_decoder_weights={tmp_path / 'decoder.pth'}", "train_cfg.epochs=2", "dtype=bf16",
                "train_cfg.optimizer=muon", "train_cfg.accumulate=2", "model.label_in_time=true", "model.zero_init=true",
                "sample_cfg.sampler=dpmpp_2m", "sample_cfg.eta=0.5")
    latent = [project("EDM"), "-c", "1", *(word for setting in settings for word in ("--set", setting))]
    train.main([*latent, "--output", "whole"])
    assert "encoding 32 images, 8 views of each" in capsys.readouterr().out
    moment = UPDATES + random.Random("latent").randint(1, 3)
    assert interrupted([*latent, "--output", "broken"], "update", moment)[0] == -signal.SIGKILL
    (cache,) = (tmp_path / "cache" / "latents").iterdir()
    cache.unlink()
    train.main(["--resume", str(tmp_path / "logs" / "tiny_broken")])
    assert "encoding 32 images" in capsys.readouterr().out
    assert_same_end(tmp_path / "logs" / "tiny_whole", tmp_path / "logs" / "tiny_broken", 2)
    final = torch.load(tmp_path / "logs" / "tiny_broken" / "model_final.pth.tar", weights_only=True)
    assert final["autoencoder"] == TAESD(tmp_path / "encoder.pth", tmp_path / "decoder.pth").hashes()


def test_run_folder(project, tmp_path, monkeypatch, capsys):
    """What design and handout promise to lie in a run folder, and what TensorBoard is given."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, folder = project(), tmp_path / "logs" / "tiny_run"
    train.main([config, "-c", "2", "-p", "5", "--output", "run"])
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.txt", "epoch_001.pth.tar", "epoch_003.pth.tar", "logs", "model_final.pth.tar", "sample-1.png",
        "sample-3.png"]
    assert Image.open(folder / "sample-3.png").size == (4 * (1 * 17 + 1), 4 * (2 * 17 + 1))  # a row per class
    final = torch.load(folder / "model_final.pth.tar", weights_only=True)
    assert "optimizer" not in final and final["epoch"] == EPOCHS and final["step"] == EPOCHS * UPDATES
    assert final["classes"] == ["a", "b"]

    board = EventAccumulator(str(folder / "logs"))
    board.Reload()
    scalars = board.Tags()["scalars"]
    assert {"train/loss", "train/lr", "train/grad_norm", "train_speed/images_per_s"} <= set(scalars)
    assert len([s for s in scalars if s.startswith("train_loss_by_time/")]) == 10
    assert [e.step for e in board.Scalars("train/loss")] == [5, 10, 15, 16]
    assert set(board.Tags()["images"]) == {"samples/ema", "samples/raw"}
    assert board.Tags()["tensors"] == ["config/text_summary"]

    train.main([config, "--resume", str(folder)])  # a finished run is not trained again
    assert not differences(final, torch.load(folder / "model_final.pth.tar", weights_only=True))
    train.main(["--resume", str(folder), "--set", "train_cfg.epochs=5", "-c", "1"])  # it can be prolonged
    assert "train_cfg.epochs: 4 until now, 5 from here on" in capsys.readouterr().out
    assert torch.load(folder / "epoch_004.pth.tar", weights_only=True)["ckpt_freq"] == 1


def test_grids_of_a_ddpm_are_algorithm_2(project, tmp_path, monkeypatch, capsys):
    """Drawn by p_sample_loop, with a word on how long it takes; a signal between two of its steps stops it."""
    calls, loop = [], train.libs.DDPM.p_sample_loop

    def counted(self, labels, **given):
        calls.append(len(labels))
        return loop(self, labels, **given)

    monkeypatch.setattr(train.libs.DDPM, "p_sample_loop", counted)
    plain = [project(), "--set", "sample_cfg={sampler: null, guidance_scale: 1, steps: null}", "--set", "train_cfg.epochs=1"]
    train.main([*plain, "--output", "short"])
    assert calls == [2, 2]  # averaged and raw weights
    calls.clear()
    train.main([*plain, "--output", "long", "--set", "model.timesteps=101"])
    assert calls == [2] and "drawing a sample grid: 101 steps" in capsys.readouterr().out

    class Stop(train.Signals):
        received = property(lambda self: signal.SIGTERM if calls else None, lambda self, value: None)

    calls.clear()
    monkeypatch.setattr(train, "Signals", Stop)
    train.main([*plain, "--output", "stopped"])
    assert calls == [2] and (tmp_path / "logs" / "tiny_stopped" / "model_final.pth.tar").exists()
    assert not list((tmp_path / "logs" / "tiny_stopped").glob("*.png"))


def test_a_claim_where_the_system_knows_no_locks(tmp_path, monkeypatch, capsys):
    """Whoever is named in the file has the folder, until the file is deleted."""
    def no_locks(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    for known in (type("fcntl", (), {"flock": no_locks, "LOCK_EX": 2, "LOCK_NB": 4}), None):
        monkeypatch.setattr(run_folder, "fcntl", known)
        with run_folder.Claim() as claim:
            folder = claim.new(str(tmp_path / "run"), numbered=False)
            assert folder == str(tmp_path / "run") and os.listdir(folder) == ["running"]
            with run_folder.Claim() as other, pytest.raises(UsageError, match=f"process {os.getpid()}.*delete .*running"):
                other.take(folder)
            assert claim.holds()
        assert not os.listdir(tmp_path) and not capsys.readouterr().out  # nothing was written into it


@pytest.mark.parametrize("virtual", [True, False])
def test_the_command_that_goes_on(tmp_path, monkeypatch, virtual):
    """With the python of the virtual environment, whose link to another is not followed."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env") if virtual else sys.base_prefix)
    monkeypatch.setattr(sys, "argv", ["code/train.py"])
    monkeypatch.chdir(tmp_path)
    assert run_folder.resume_command(str(tmp_path / "my run")) == (
        f"{os.path.join('env', 'bin', 'python') if virtual else 'python'} code/train.py --resume 'my run'")
