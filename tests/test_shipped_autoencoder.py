"""The autoencoder that ships for AFHQ's faces: its size, and how well it keeps a picture."""

import json
import os
from pathlib import Path

import torch
from torch import nn

from helpers import as_diffusers
from libs.evaluation.classifier import file_hash
from libs.tiny_autoencoder import TAESD
from libs.training.autoencoder import evaluate, load_images, psnr

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [str(ROOT / "pretrained" / f"afhq_{half}.pth") for half in ("encoder", "decoder")]


def test_shipped_weights():
    assert all(os.path.getsize(path) < 3e6 for path in SHIPPED)
    figures = json.loads((ROOT / "results" / "afhq_autoencoder" / "evaluation.json").read_text())
    assert all(figures[half] == file_hash(path) for half, path in zip(("encoder", "decoder"), SHIPPED))
    assert figures["images"] == 400 and figures["psnr"] > 25


def test_shipped_weights_keep_pictures_here_and_in_diffusers(diffusers):
    ours = TAESD(*SHIPPED)
    # smooth pictures of muted colours (saturated ones it has not seen)
    grey, colour = torch.rand(1, 1, 4, 4), torch.rand(1, 3, 4, 4)
    x = nn.functional.interpolate(0.9 * grey + 0.1 * colour, size=(128, 128), mode="bicubic").clamp(0, 1)
    latents = ours.encoder(x)
    images = ours.decoder(latents)
    assert float(psnr(x, images.clamp(0, 1))) > 30
    theirs = as_diffusers(diffusers, ours)
    with torch.no_grad():
        assert torch.allclose(latents, theirs.encode(2 * x - 1).latents, rtol=1e-4, atol=1e-4)
        assert torch.allclose(images, (theirs.decode(latents).sample + 1) / 2, rtol=1e-4, atol=1e-4)


def test_shipped_weights_on_real_cats(real_data):
    data = {"name": "AFHQ", "data_folder": os.path.join(real_data, "afhq"), "img_size": 128}
    figures, _, _ = evaluate(TAESD(*SHIPPED), load_images(data, "test", 5), torch.device("cpu"))
    assert figures["psnr"] > 25
    assert max(map(abs, figures["latents"]["mean"])) < 0.3 and 0.7 < min(figures["latents"]["std"])
