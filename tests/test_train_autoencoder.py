"""Training of the autoencoder: its measures against slow ones, its loss and crops, and the script from end to end."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train_autoencoder
from helpers import as_diffusers, differences, one_line, tree
from libs import ModelEMA, UsageError, load_checkpoint, load_config
from libs.tiny_autoencoder import TAESD, Block
from libs.training import autoencoder
from libs.training.autoencoder import (TrainedTAESD, complete_settings, draw_crops, evaluate, is_taesd_kernel,
                                       load_images, load_settings, psnr, ssim)
from libs.training.optimizers import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
CONFIG = str(ROOT / "configs" / "afhq_autoencoder.yaml")


# ---- the measures

def test_psnr_of_known_errors():
    a = torch.rand(3, 3, 16, 20)
    b = a + torch.tensor([0.1, 0.01, -0.5])[:, None, None, None]
    assert psnr(a, b).tolist() == pytest.approx([20, 40, 20 * math.log10(2)], rel=1e-4)


def slow_ssim(a, b):
    """Wang et al. 2004, window by window, for one channel."""
    def moments(x, y, weight):
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        return mx, my, vx, vy, (weight * (x - mx) * (y - my)).sum()

    radius = np.add.outer(np.arange(-5, 6) ** 2, np.arange(-5, 6) ** 2)
    weight = np.exp(-radius / (2 * 1.5 ** 2))
    weight /= weight.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            mx, my, vx, vy, cov = moments(a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11], weight)
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx ** 2 + my ** 2 + 1e-4) * (vx + vy + 9e-4)))
    return np.mean(values)


def test_ssim_against_one_window_at_a_time():
    a = torch.rand(2, 3, 14, 19, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(a.shape, dtype=torch.float64)).clamp(0, 1)
    wanted = [np.mean([slow_ssim(a[i, c].numpy(), b[i, c].numpy()) for c in range(3)]) for i in range(2)]
    assert ssim(a, b).tolist() == pytest.approx(wanted, rel=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    # of flat images only their brightness is compared
    flat = torch.full((1, 3, 11, 11), 0.3, dtype=torch.float64)
    assert float(ssim(flat, flat + 0.4)) == pytest.approx((2 * 0.3 * 0.7 + 1e-4) / (0.3 ** 2 + 0.7 ** 2 + 1e-4))


class Shrinker(nn.Module):
    """In TAESD's place: 4 latents for 3 colours, and back with an error of 0.1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def encoder(self, x):
        return torch.cat([x, x[:, :1]], 1) * self.scale

    def decoder(self, z):
        return z[:, :3] / self.scale + 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six training and six test images of two classes, larger than they will be read."""
    return tree(tmp_path_factory.mktemp("images"), {"train": ["a", "b"], "test": ["a", "b"]}, width=64, height=64)


def section(folder, size):
    return {"name": "ImageFolder", "data_folder": folder, "img_size": size, "limit": None}


def test_evaluate_is_the_mean_over_all_images(folder):
    images = load_images(section(folder, 32), "test")
    figures, kept, others = evaluate(Shrinker(), images, torch.device("cpu"), keep=4)
    pixels = images.images.double() / 255
    shifted = (pixels + 0.1).clamp(0, 1)
    assert len(pixels) == 6
    wanted = [-10 * math.log10(((a - b) ** 2).mean()) for a, b in zip(pixels, shifted)]
    assert figures["psnr"] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert figures["ssim"] == pytest.approx(float(ssim(pixels, shifted).mean()), rel=1e-4)
    latents = 4 * pixels[:, [0, 1, 2, 0]]
    assert figures["latents"]["mean"] == pytest.approx(latents.mean((0, 2, 3)).tolist(), rel=1e-4)
    assert figures["latents"]["std"] == pytest.approx(latents.std((0, 2, 3)).tolist(), rel=1e-3)
    assert figures["latents"]["largest"] == pytest.approx(float(latents.max()))
    assert figures["latents"]["beyond_2.5"] == pytest.approx(float((latents > 2.5).double().mean()), abs=1e-6)
    assert torch.allclose(kept.double(), pixels[:4]) and torch.allclose(others.double(), shifted[:4])
    assert evaluate(Shrinker(), images, torch.device("cpu"), n=1)[0]["psnr"] == pytest.approx(wanted[0], rel=1e-5)


# ---- crops

def test_images_are_read_at_their_own_size(folder):
    for split, size in (("train", 64), ("test", 48), ("train", 80)):
        data = load_images(section(folder, size), split)
        assert data.images.shape == (6, 3, size, size) and data.img_shape == (3, size, size)
    first = np.asarray(Image.open(os.path.join(folder, "test", "a", "0.png")))
    item = load_images(section(folder, 64), "test")[0][0]
    assert torch.equal((item * 255).round().byte(), torch.from_numpy(first.copy()).permute(2, 0, 1))


def test_crops_are_a_function_of_seed_and_update(folder):
    data, cpu = load_images(section(folder, 32), "train"), torch.device("cpu")
    config = {"seed": 3, "dataset": {"img_size": 32}, "loader": {"batch_size": 6}}
    first = [draw_crops(data, config, step, 8, cpu) for step in range(8)]
    for step in (7, 2, 5, 0):
        assert all(torch.equal(a, b) for a, b in zip(first[step], draw_crops(data, config, step, 8, cpu)))
    assert not torch.equal(first[0][0], first[1][0]) and not torch.equal(first[0][1], first[1][1])
    assert not torch.equal(first[0][0], draw_crops(data, {**config, "seed": 4}, 0, 8, cpu)[0])
    # the last quarter: whole images, and a quarter as many, rounded up
    assert [tuple(images.shape) for images, _ in first] == [(6, 3, 16, 16)] * 6 + [(2, 3, 32, 32)] * 2
    assert [tuple(noise.shape) for _, noise in first] == [(6, 4, 2, 2)] * 6 + [(2, 4, 4, 4)] * 2
    assert 0.85 < torch.cat([noise.flatten() for _, noise in first]).std() < 1.15

    # each is cut out of an image, as it is or mirrored
    whole = data.images.float() / 255
    windows = whole.unfold(2, 16, 1).unfold(3, 16, 1)
    seen = torch.tensor([[(windows - x[None, :, None, None]).abs().amax((1, 4, 5)).amin() < 1e-6
                          for x in (crop, crop.flip(-1))] for images, _ in first[:6] for crop in images])
    assert seen.any(1).all() and seen.any(0).all()
    assert all(any(torch.allclose(image, w) or torch.allclose(image, w.flip(-1)) for w in whole)
               for image in first[-1][0])


# ---- the loss

def rms(error):
    """Root of each image's mean square and 1e-4, mean over the images."""
    return np.mean([math.sqrt((image ** 2).mean() + 1e-4) for image in error])


def test_loss():
    model = TrainedTAESD().double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    noise = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.model.encoder[-1].weight *= 6  # so that some latents are beyond 2.5
        loss = float(model(images, noise))
        z = model.model.encoder(images)
        out = model.model.decoder(z + autoencoder.LATENT_NOISE * noise)
    error = (out - images).numpy()
    edges = rms(error[:, :, 1:] - error[:, :, :-1]) + rms(error[..., 1:] - error[..., :-1])
    channels = z.transpose(0, 1).flatten(1).numpy()
    away = np.maximum(np.abs(channels) - 2.5, 0)
    assert (away > 0).any()
    moments = (channels.mean(1) ** 2 + (channels.std(1, ddof=1) - 1) ** 2).mean() + (away ** 2).mean()
    assert loss == pytest.approx(rms(error) + 0.1 * edges + 0.1 * moments)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model.float()(images.float(), noise.float())
    assert rounded.dtype == torch.float32 and float(rounded) == pytest.approx(loss, rel=0.02)


def test_training_starts_with_blocks_that_pass_things_on_and_usable_latents():
    model = TrainedTAESD().model
    x = torch.rand(1, 64, 8, 8)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    assert len(blocks) == 20 and all(torch.equal(block(x), x) for block in blocks)
    images = torch.rand(4, 3, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    latents = model.encoder(images)
    assert 0.2 < latents.std() < 5
    assert 0.4 < model.decoder(latents).mean() < 0.6
    assert all(p.requires_grad for p in model.parameters())


def test_start_from_weights(tmp_path):
    given = TAESD()
    torch.save(given.encoder.state_dict(), tmp_path / "e.pth")
    half = TrainedTAESD(str(tmp_path / "e.pth")).model
    assert all(torch.equal(a, b) for a, b in zip(half.encoder.parameters(), given.encoder.parameters()))
    assert half.encoder[1].conv[4].weight.any() and not half.decoder[3].conv[4].weight.any()


def test_muon_is_for_the_inner_kernels():
    network, cfg = TrainedTAESD().model, load_settings(CONFIG)["train_cfg"]
    groups = {g["orthogonal"]: g["params"]
              for g in build_optimizer(network, cfg, torch.device("cpu"), is_taesd_kernel).param_groups}
    assert {tuple(p.shape) for p in groups[True]} == {(64, 64, 3, 3)} and len(groups[True]) == 66
    assert {tuple(p.shape[:2]) for p in groups[False]} == {(64,), (3,), (4,), (64, 3), (4, 64), (64, 4), (3, 64)}
    assert sum(map(len, groups.values())) == len(list(network.parameters()))


# ---- the script

@pytest.fixture
def script(folder, tmp_path):
    """script(arguments): runs train_autoencoder.py on small images; `script.runs` holds its run folders."""
    def script(*arguments, epochs=4, batch_size=2):
        sets = {"devices": "[cpu]", "output_folder": tmp_path / "runs", "dataset.name": "ImageFolder",
                "dataset.data_folder": folder, "dataset.img_size": 16, "loader.batch_size": batch_size,
                "train_cfg.epochs": epochs, "train_cfg.num_eval_samples": 3}
        changes = [x for key, value in sets.items() for x in ("--set", f"{key}={value}")]
        return train_autoencoder.main([CONFIG, *changes, *map(str, arguments)])

    script.runs = tmp_path / "runs"
    return script


def test_from_images_to_files(script, folder, monkeypatch, capsys, diffusers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not script("--output", "whole", "-c", "2", "-p", "5")
    said = capsys.readouterr().out
    whole = script.runs / "afhq_autoencoder_whole"
    assert "3 updates an epoch, 12 in all" in said and "run folder: " in said and "update 10/12" in said
    assert sorted(p.name for p in whole.iterdir()) == [
        "config.txt", "decoder.pth", "encoder.pth", "epoch_001.pth.tar", "epoch_003.pth.tar", "evaluation.json",
        "evaluation.png", "logs", "model_final.pth.tar", "sample-1.png", "sample-3.png"]
    width, height = Image.open(whole / "sample-3.png").size
    assert 2.8 < width / height < 3  # three reconstructions and the lines between them
    board = EventAccumulator(str(whole / "logs"))
    board.Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "eval/psnr", "eval/ssim"} <= set(board.Tags()["scalars"])
    assert [e.step for e in board.Scalars("train/loss")] == [5, 10, 12]
    assert [e.step for e in board.Scalars("eval/psnr")] == [6, 12]

    # the files: small, in half precision, TAESD's layout, the averaged weights
    files = [str(whole / f"{half}.pth") for half in ("encoder", "decoder")]
    averaged = load_checkpoint(str(whole / "model_final.pth.tar"))["state_dict_ema"]
    for path, half in zip(files, ("encoder", "decoder")):
        assert os.path.getsize(path) < 3e6
        state = torch.load(path, weights_only=True)
        assert all(torch.equal(w, averaged[f"model.{half}.{key}"].half()) for key, w in state.items())
    theirs = as_diffusers(diffusers, TAESD(*files))

    # the figures, by way of diffusers
    figures = json.loads((whole / "evaluation.json").read_text())
    images = load_images(section(folder, 16), "test").images.float() / 255
    with torch.no_grad():
        others = ((theirs(2 * images - 1).sample + 1) / 2).clamp(0, 1)
    assert figures["psnr"] == pytest.approx(float(psnr(images, others).mean()), abs=1e-3)
    assert (figures["split"], figures["images"], figures["img_size"]) == ("test", 6, 16)

    # --evaluate gives the same
    assert not script("--evaluate", *files, "--output", script.runs / "again.json")
    assert json.loads((script.runs / "again.json").read_text()) == figures
    assert (script.runs / "again.png").read_bytes() == (whole / "evaluation.png").read_bytes()

    # stopped twice and resumed, with the run's own settings: the same bits
    update, broken = ModelEMA.update, script.runs / "afhq_autoencoder_broken"
    for stop in (2, 5):
        def patched(self, model):
            update(self, model)
            if self.updates == stop:
                os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(ModelEMA, "update", patched)
        status = script("--output", "broken", "-c", "2") if stop == 2 else train_autoencoder.main(
            ["--resume", str(broken)])
        assert status == 128 + signal.SIGINT and "--resume" in capsys.readouterr().out.split("go on with: ")[1]
        assert not (broken / "encoder.pth").exists()
    monkeypatch.setattr(ModelEMA, "update", update)
    assert not script("--resume", broken)
    assert "update 5" in capsys.readouterr().out
    assert set(differences(*(load_checkpoint(str(run / "epoch_003.pth.tar")) for run in (whole, broken)))) <= {".print_freq"}
    assert figures == json.loads((broken / "evaluation.json").read_text())

    # from a checkpoint of a run that went on
    assert not script("--resume", whole / "epoch_001.pth.tar")
    assert (whole / "epoch_003.pth.tar.superseded").exists()
    assert set(differences(*(load_checkpoint(str(run / "epoch_003.pth.tar")) for run in (whole, broken)))) <= {".print_freq"}

    # mistakes of resuming
    refused(lambda: script("--resume", broken, batch_size=3), "loader.batch_size is 2 there and 3")
    refused(lambda: script("--output", "broken"), "--output: ", "exists")


def test_learns_without_held_out_images(script, tmp_path, capsys):
    """From 50 updates on six images of a few colours, which it then knows better than by their means."""
    data = tree(tmp_path / "plain", {"": ["a", "b"]}, width=32, height=32)
    assert not script("--output", "run", "-c", "1000", "--set", f"dataset.data_folder={data}",
                      "--set", "dataset.img_size=32", "--set", "train_cfg.warmup=5", "--set", "train_cfg.ema_decay=0.9",
                      epochs=50, batch_size=6)
    figures = json.loads((script.runs / "afhq_autoencoder_run" / "evaluation.json").read_text())
    assert "has no folder test or val: quality is measured on training images" in capsys.readouterr().out
    assert figures["split"] == "train"
    images = load_images(section(data, 32), "train").images.float() / 255
    flat = float(psnr(images, images.mean((2, 3), keepdim=True).expand_as(images)).mean())
    assert figures["psnr"] > flat + 0.5


# ---- mistakes

def refused(call, *says):
    with pytest.raises(UsageError) as error:
        call()
    message = one_line(error)
    assert all(words in message for words in says), message


@pytest.mark.parametrize("settings, says", [
    (["model.dim=32"], "model.dim is no setting of the autoencoder's training; model has use_vae, vae_encoder_weights"),
    (["eval.features=inception"], "eval.features is no setting"),
    (["dataset.name=MNIST"], "dataset.name is MNIST; the autoencoder learns from a folder of photographs: one of AFHQ"),
    (["dataset.img_size=40"], "dataset.img_size is 40; it must be a multiple of 16"),
    (["train_cfg.lrr=1"], "unknown key train_cfg.lrr; did you mean train_cfg.lr?")])
def test_settings_that_cannot_work_are_refused(settings, says):
    refused(lambda: load_settings(CONFIG, settings), says)


def test_settings_are_train_pys():
    config, given = load_settings(CONFIG), load_config(CONFIG)
    assert config["model_name"] == "TAESD" and config["dataset"]["img_size"] == 128
    assert all(config[part].items() <= given[part].items() for part in ("loader", "train_cfg"))
    assert complete_settings(config) == config  # those of a checkpoint
    refused(lambda: load_settings(str(ROOT / "configs" / "afhq.yaml")), "no setting of the autoencoder's training")


def test_own_vae_is_afhq_with_other_weights():
    ours, handouts = (load_config(str(ROOT / "configs" / name)) for name in ("afhq_own_vae.yaml", "afhq.yaml"))
    for half in ("encoder", "decoder"):
        path = ours["model"].pop(f"vae_{half}_weights")
        assert Path(path) == (ROOT / "pretrained" / f"afhq_{half}.pth").resolve()
        assert Path(handouts["model"].pop(f"vae_{half}_weights")).name == f"taesd_{half}.pth"
    assert ours == handouts


def test_mistakes_are_one_line_and_leave_nothing(script, tmp_path):
    assert not script("--dry-run")
    torch.save(TAESD().encoder.state_dict(), tmp_path / "e.pth")
    (tmp_path / "r.json").touch()
    for arguments, *says in (
            (["--set", f"dataset.data_folder={tmp_path / 'nowhere'}"], "dataset.data_folder: no folder", "nowhere"),
            (["--set", f"model.vae_decoder_weights={tmp_path / 'e.pth'}"], "model.vae_decoder_weights: ", "another arch"),
            (["--evaluate", tmp_path / "no.pth", "d", "--output", tmp_path / "a.json"], "no file", "no.pth"),
            (["--evaluate", "e", "d", "--output", "a"], "--output: a must end in .json"),
            (["--evaluate", "e", "d", "--dry-run"], "--evaluate", "--dry-run"),
            (["--evaluate", tmp_path / "e.pth", tmp_path / "e.pth", "--output", tmp_path / "r.json"], "r.json exists")):
        refused(lambda: script(*arguments), *says)
    assert not script.runs.exists() and {p.name for p in tmp_path.iterdir()} == {"e.pth", "r.json"}
