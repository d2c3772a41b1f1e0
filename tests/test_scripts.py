"""The handout's commands and the README's, as a user types them, on small generated images."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import libs
from libs.evaluation.classifier import load_classifier
from libs.drawing import draw_images
from libs.tiny_autoencoder import build_decoder, build_encoder

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
CODE = os.path.join(ROOT, "code")
MODEL = os.path.join(ROOT, "pretrained", "mnist_cpu.pth.tar")


def python(*arguments, cwd=CODE):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture()
def faces(tmp_path):
    """An AFHQ-like tree, a TAESD pair in the official files' layout, and the --set that point afhq.yaml at them."""
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", 4), ("test", 1)):
        for name in ("cat", "dog", "wild"):
            os.makedirs(tmp_path / "afhq" / split / name)
            for i in range(n):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "afhq" / split / name / f"{i}.png")
    torch.manual_seed(0)
    torch.save(build_encoder().state_dict(), tmp_path / "encoder.pth")
    torch.save(build_decoder().state_dict(), tmp_path / "decoder.pth")
    changes = {"output_folder": tmp_path / "logs", "dataset.data_folder": tmp_path / "afhq", "dataset.img_size": 32,
               "model.vae_encoder_weights": tmp_path / "encoder.pth", "loader.batch_size": 4,
               "model.vae_decoder_weights": tmp_path / "decoder.pth", "model.dim": 32, "train_cfg.epochs": 2,
               "train_cfg.num_eval_samples": 2, "sample_cfg.steps": 3}
    return tmp_path, [x for k, v in changes.items() for x in ("--set", f"{k}={v}")]


def test_latent_diffusion_from_the_code_folder(faces):
    folder, changes = faces
    done = python("./train.py", "./configs/afhq.yaml", "-c", "1", "--output", "a", *changes)
    assert done.returncode == 0, done.stderr
    run = folder / "logs" / "afhq_a"
    assert {"epoch_000.pth.tar", "epoch_001.pth.tar", "sample-0.png", "sample-1.png"} <= set(os.listdir(run))
    assert Image.open(run / "sample-1.png").size == (2 * 33 + 1, 3 * 33 + 1)
    # the autoencoder's quality and the latents' scale are said, and random weights do not pass for good ones
    mean, std = map(float, re.search(r"latents \(autoencoder [\d.]+ dB PSNR\): mean (\S+), standard deviation (\S+)",
                                     done.stdout).groups())
    assert std < 0.5 and "warning: the latents are far from mean 0" in done.stdout
    state = torch.load(run / "model_final.pth.tar", weights_only=True)
    assert not any("vae" in key for key in state["state_dict"])
    assert tuple(state["state_dict"]["model.conv_in.weight"].shape) == (32, 4, 3, 3)

    done = python("./train.py", "./configs/afhq.yaml", "--resume", run / "epoch_000.pth.tar", *changes)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr


def test_the_same_from_the_projects_root(faces):
    folder, changes = faces
    done = python("code/train.py", "configs/afhq.yaml", "--output", "b", *changes, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (folder / "logs" / "afhq_b" / "model_final.pth.tar").exists()


@pytest.mark.parametrize("cwd, script, config", [(CODE, "./train.py", "./configs/mnist.yaml"),
                                                 (ROOT, "code/train.py", "./configs/mnist.yaml"),
                                                 (ROOT, "code/train.py", "code/configs/mnist.yaml")])
def test_dry_run_writes_nothing(tmp_path, cwd, script, config):
    done = python(script, config, "--dry-run", "--output", "x", "--set", f"output_folder={tmp_path}/logs", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "6,595,649 parameters" in done.stdout and "28,110 in all" in done.stdout
    assert os.listdir(tmp_path) == []


def test_real_mnist(real_data, tmp_path):
    """mnist.yaml on real digits, shortened: the test split, a narrow network, half an epoch."""
    import shutil

    shutil.copytree(os.path.join(real_data, "mnist"), tmp_path / "data")
    os.system(f"chmod -R u+w '{tmp_path}/data'")
    done = python("./train.py", "./configs/mnist.yaml", "-p", "10", "--output", "m", "--set", f"output_folder={tmp_path}",
                  "--set", f"dataset.data_folder={tmp_path}/data", "--set", "dataset.split=test", "--set",
                  "model.dim=16", "--set", "train_cfg.epochs=1", "--set", "sample_cfg.steps=4", "--set",
                  "train_cfg.lr=2e-3", "--set", "model.attn_levels=[1]", "--set", "train_cfg.num_eval_samples=1")
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 16 and losses[-1] < 0.3 * losses[0]  # noise is predictable once something is learnt


def test_sample_with_the_shipped_model(tmp_path):
    out = tmp_path / "digits.png"
    command = ("./sample.py", MODEL, "--labels", "3,7", "--num", "2", "--steps", "4", "--output", out)
    assert python(*command).returncode == 0
    assert Image.open(out).size == (2 * 29 + 1, 2 * 29 + 1)
    again = python(*command)
    assert again.returncode == 2 and "--overwrite" in again.stderr and len(again.stderr.splitlines()) == 1
    for flag, value, word in (("--labels", "3,10", "label 10"), ("--labels", "a", "--labels"), ("--steps", "0", "steps"),
                              ("--num", "0", "--num"), ("--sampler", "euclid", "heun")):
        done = python("./sample.py", MODEL, "--output", tmp_path / "no.png", flag, value)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1, (flag, done.stderr)
    assert not (tmp_path / "no.png").exists()


def test_a_batch_changes_no_image(tmp_path):
    for size in ("1", "6"):
        done = python("./sample.py", MODEL, "--labels", "1,4", "--num", "3", "--steps", "3", "--batch-size", size,
                      "--output", tmp_path / f"{size}.png")
        assert done.returncode == 0, done.stderr
    one, six = (torch.tensor(list(Image.open(tmp_path / f"{s}.png").convert("L").tobytes())) for s in ("1", "6"))
    assert (one - six).abs().max() <= 1  # rounding to grey levels, nothing more


def test_label_accuracy_of_the_shipped_model():
    model, config = libs.load_model(MODEL)
    labels = torch.arange(100) % 10
    images = torch.cat(list(draw_images(model, labels, libs.sampling_options(config))))
    # at least 99 % of 10,000 are right; of 100, fewer than 95 would be a chance of one in a thousand
    assert (load_classifier()(images).argmax(1) == labels).sum() >= 95


def test_the_whole_report_of_the_shipped_model(real_data, tmp_path):
    done = python("./evaluate.py", MODEL, "--num", "200", "--data-folder", os.path.join(real_data, "mnist"),
                  "--output", tmp_path / "a.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    for name in ("generated", "floor"):  # of 200 images, too few to tell which is the better
        assert 0 < figures[name]["fd_train"] < 0.05 * figures["ceiling"]["fd_train"]
    assert figures["generated"]["label_accuracy"] > 0.95 and not figures["memorization"]["copies"]["detected"]
