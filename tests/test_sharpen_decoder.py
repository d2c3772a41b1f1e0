"""sharpen_decoder.py: what its two losses pull at, and the script from end to end."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import sharpen_decoder
from helpers import one_line, tree
from libs import UsageError
from libs.tiny_autoencoder import TAESD, weights_hash
from sharpen_decoder import Sharpener, build_critic

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = [str(ROOT / "pretrained" / f"afhq_{half}.pth") for half in ("encoder", "decoder")]


def test_the_critic_scores_patches():
    critic = build_critic(8)
    x = torch.randn(1, 7, 128, 128, requires_grad=True)
    scores = critic(x)
    assert scores.shape == (1, 1, 16, 16)
    seen = torch.autograd.grad(scores[0, 0, 8, 8], x)[0].abs().sum((0, 1)) > 0
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    assert len(rows) == len(columns) == 54  # a patch, not the whole image
    # spectral norm, about 1 after its power iterations
    norms = [torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) for layer in critic if hasattr(layer, "weight")]
    assert len(norms) == 5 and all(float(norm) < 1.5 for norm in norms)


def test_an_update_moves_decoder_and_critic_alone():
    torch.manual_seed(0)
    sharpener = Sharpener(TAESD(*SHIPPED))
    encoder, decoder, critic = map(weights_hash, (sharpener.model.encoder, sharpener.decoder, sharpener.critic))
    before = {name: w.clone() for name, w in sharpener.average.items()}
    loss, error = sharpener.update(torch.rand(2, 3, 32, 32), torch.randn(2, 4, 4, 4))
    assert loss == pytest.approx(2, abs=0.5) and 0 < error < 1  # a new critic knows nothing: 1 + 1
    assert weights_hash(sharpener.model.encoder) == encoder
    assert weights_hash(sharpener.decoder) != decoder and weights_hash(sharpener.critic) != critic
    for name, w in sharpener.decoder.state_dict().items():  # the first average: 9/11 of the new weights
        torch.testing.assert_close(sharpener.average[name], before[name].lerp(w, 1 - 2 / 11), rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad for p in sharpener.critic.parameters())


def test_the_critic_learns_and_its_gradient_weighs_half_of_the_pixels(monkeypatch):
    # a CPU without instructions for bf16 would take minutes; the other tests have it
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    torch.manual_seed(0)
    sharpener = Sharpener(TAESD(*SHIPPED))
    images, noise = torch.rand(2, 3, 16, 16), torch.zeros(2, 4, 2, 2)  # pixels that a decoder of cats cannot draw
    losses = [sharpener.update(images, noise, rate=4)[0] for _ in range(20)]
    assert losses[-1] < losses[0] - 0.3

    found = []
    monkeypatch.setattr(Sharpener, "descend", staticmethod(lambda _, output, gradient=None: found.append(gradient)))
    weights = []
    for step in (0, 150, 10 ** 6):  # the critic counts not at first, then by half, then in full
        sharpener.step = step
        found.clear()
        sharpener.update(images, noise)
        weights.append(found[1])
    pixels, half, full = weights
    ratio = [float((w - pixels).norm() / pixels.norm()) for w in (half, full)]
    assert ratio == pytest.approx([0.25, 0.5], rel=0.02)


def test_script(tmp_path, capsys, monkeypatch):
    tree(tmp_path / "data", {"train": ["cat"], "test": ["cat"]}, width=32, height=32)
    monkeypatch.setattr(sharpen_decoder, "SIZE", 16)
    output = tmp_path / "decoder.pth"
    arguments = ["--data", str(tmp_path / "data"), "--encoder", SHIPPED[0], "--decoder", SHIPPED[1],
                 "--output", str(output), "--updates", "2", "--batch-size", "2"]
    sharpen_decoder.main(arguments)
    assert "PSNR" in capsys.readouterr().out
    sharp, shipped = TAESD(SHIPPED[0], str(output)), TAESD(*SHIPPED)
    assert sharp.hashes()["encoder"] == shipped.hashes()["encoder"]
    assert sharp.hashes()["decoder"] != shipped.hashes()["decoder"]
    with pytest.raises(UsageError) as error:
        sharpen_decoder.main(arguments)
    assert "--overwrite" in one_line(error)
