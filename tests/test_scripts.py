"""The handout's commands from end to end, on small generated images; the shipped model; and real digits."""

import json
import os
import re

import torch
from PIL import Image

import evaluate
import export
import libs
import sample
import train
from helpers import tree
from libs import datasets
from libs.config import CODE
from libs.evaluation.classifier import load_classifier
from libs.tiny_autoencoder import build_decoder, build_encoder
from scripts import command

ROOT = os.path.dirname(CODE)
MODEL = os.path.join(ROOT, "pretrained", "mnist_cpu.pth.tar")


def test_latent_diffusion_of_faces(tmp_path, monkeypatch, capsys):
    """configs/afhq.yaml on a small AFHQ: trained, resumed, drawn from, exported."""
    monkeypatch.setattr("libs.config.CACHE", str(tmp_path / "cache"))
    tree(tmp_path / "afhq", {"train": ["cat", "dog", "wild"], "test": ["cat", "dog", "wild"]}, per_class=4)
    torch.save(build_encoder().state_dict(), tmp_path / "encoder.pth")
    torch.save(build_decoder().state_dict(), tmp_path / "decoder.pth")
    changes = {"output_folder": tmp_path / "logs", "dataset.data_folder": tmp_path / "afhq", "dataset.img_size": 32,
               "model.vae_encoder_weights": tmp_path / "encoder.pth", "loader.batch_size": 4, "train_cfg.epochs": 2,
               "model.vae_decoder_weights": tmp_path / "decoder.pth", "model.dim": 16, "model.timesteps": 10,
               "dataset.latent_crops": 2, "train_cfg.num_eval_samples": 2}
    train.main(["./configs/afhq.yaml", "-c", "1", "--output", "a",
                *(x for key, value in changes.items() for x in ("--set", f"{key}={value}"))])
    out, run = capsys.readouterr().out, tmp_path / "logs" / "afhq_a"
    assert {"epoch_000.pth.tar", "epoch_001.pth.tar", "sample-0.png", "sample-1.png"} <= set(os.listdir(run))
    assert Image.open(run / "sample-1.png").size == (2 * (2 * 33 + 1), 2 * (3 * 33 + 1))  # small images are enlarged
    # the autoencoder's quality and the latents' scale are printed, and random weights do not pass for good ones
    std = float(re.search(r"latents \(autoencoder \S+ dB PSNR\): mean \S+, standard deviation (\S+)", out)[1])
    assert std < 0.5 and "warning: the latents are far from mean 0" in out
    state = torch.load(run / "model_final.pth.tar", weights_only=True)
    assert not any("vae" in key for key in state["state_dict"])
    assert tuple(state["state_dict"]["model.conv_in.weight"].shape) == (16, 4, 3, 3)

    train.main(["--resume", str(run / "epoch_000.pth.tar")])
    assert "1 epochs and 0 batches done" in capsys.readouterr().out
    assert (run / "epoch_001.pth.tar.superseded").exists()

    half = tmp_path / "half.pth.tar"
    export.main([str(run), str(half), "--half"])
    assert half.stat().st_size < 0.3 * (run / "model_final.pth.tar").stat().st_size
    for checkpoint, name in ((run, "a.npz"), (half, "b.npz")):
        sample.main([str(checkpoint), "--num", "1", "--steps", "3", "--output", str(tmp_path / name), "--device", "cpu"])
    a, b = (libs.data.images.read_images(str(tmp_path / name), 3, list("abc")).images.int() for name in ("a.npz", "b.npz"))
    assert a.shape == (3, 3, 32, 32) and (a - b).abs().float().mean() < 2


def test_dry_run_writes_nothing(tmp_path):
    """In the handout's form, in a process of its own; test_readme.py has the form from the root."""
    done = command("./train.py", "./configs/mnist.yaml", "--dry-run", "--set", f"output_folder={tmp_path}/logs", cwd=CODE)
    assert done.status == 0, done.err
    assert "6,595,649 parameters" in done.out and "28,110 in all" in done.out
    assert os.listdir(tmp_path) == []


def test_label_accuracy_of_the_shipped_model():
    model, config = libs.load_model(MODEL)
    labels = torch.arange(100) % 10
    images = torch.cat(list(libs.draw_images(model, labels, libs.sampling_settings(model, config, steps=8))))
    # at least 99 % of 10,000 are right; of 100, fewer than 95 would be a chance of one in a thousand
    assert (load_classifier()(images).argmax(1) == labels).sum() >= 95


def test_real_mnist(mnist_folder, tmp_path, capsys):
    """mnist.yaml on real digits, shortened: a few of the test digits, a narrow network, one epoch."""
    settings = [f"output_folder={tmp_path}", f"dataset.data_folder={mnist_folder}", "dataset.split=test",
                "dataset.limit=480", "loader.batch_size=32", "model.dim=8", "model.attn_levels=[1]",
                "train_cfg.epochs=1", "train_cfg.lr=4e-3", "train_cfg.num_eval_samples=1",
                "sample_cfg.sampler=ddim", "sample_cfg.steps=4", "devices=[cpu]"]
    train.main(["configs/mnist.yaml", "-p", "8", "--output", "m", *(x for s in settings for x in ("--set", s))])
    losses = [float(x) for x in re.findall(r"  loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 2 and losses[-1] < 0.6 * losses[0]  # noise is predictable once something is learnt


def test_the_report_of_the_shipped_model(mnist_folder, tmp_path, monkeypatch):
    """Beside 1,000 digits of each set, and less the search for copies, which test_memorization.py tests."""
    def few(*arguments, load=datasets._load_torchvision):
        images, labels, classes = load(*arguments)
        return images[:1000], labels[:1000], classes

    monkeypatch.setattr(datasets, "_load_torchvision", few)
    monkeypatch.setattr("libs.config.CACHE", str(tmp_path / "cache"))
    evaluate.main([MODEL, "--num", "100", "--steps", "8", "--data-folder", mnist_folder, "--no-memorization",
                   "--output", str(tmp_path / "a.json")])
    figures = json.loads((tmp_path / "a.json").read_text())
    for name in ("generated", "floor"):  # of 100 images, too few to tell which is the better
        assert 0 < figures[name]["fd_train"] < 0.05 * figures["ceiling"]["fd_train"]
    assert figures["generated"]["label_accuracy"] > 0.95
