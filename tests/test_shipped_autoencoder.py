"""The autoencoder that ships for AFHQ's faces: its size, and how well it keeps a picture."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from libs.autoencoder_training import evaluate, load_images, psnr
from libs.tiny_autoencoder import TAESD

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def shipped():
    files = [ROOT / "pretrained" / f"afhq_{half}.pth" for half in ("encoder", "decoder")]
    if not all(map(Path.exists, files)):
        pytest.skip("no pretrained/afhq_*.pth")
    return list(map(str, files))


def test_shipped_weights(shipped):
    assert all(os.path.getsize(path) < 3e6 for path in shipped)
    model = TAESD(*shipped)
    # faces are not all they know: a smooth picture survives
    x = nn.functional.interpolate(torch.rand(1, 3, 4, 4), size=(64, 64), mode="bicubic").clamp(0, 1)
    assert float(psnr(x, model.decoder(model.encoder(x)).clamp(0, 1))) > 20


def test_shipped_weights_on_real_cats(shipped, real_data):
    data = {"name": "AFHQ", "data_folder": os.path.join(real_data, "afhq"), "img_size": 128}
    figures, _, _ = evaluate(TAESD(*shipped), load_images(data, "test"), torch.device("cpu"), n=40)
    assert figures["psnr"] > 25
    assert max(map(abs, figures["latents"]["mean"])) < 0.3 and 0.7 < min(figures["latents"]["std"])
