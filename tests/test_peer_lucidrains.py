"""peer_lucidrains.py: what its training and its drawing are given, and that evaluate.py can read what it draws."""

import itertools
import re
from importlib.util import find_spec

import pytest
import torch

import peer_lucidrains as peer
from helpers import one_line
from libs import UsageError
from libs.data.images import read_images
from libs.datasets import ImageDataset
from libs.evaluation import labels_like

pytestmark = pytest.mark.skipif(not find_spec("denoising_diffusion_pytorch"), reason="see requirements-extra.txt")


def test_trained_drawn_and_drawn_again(tmp_path, monkeypatch, capsys):
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion
    labels = torch.arange(64) % 2  # of black and of white images
    data = ImageDataset(255 * labels.byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels, map(str, range(10)),
                        value_range=(0, 1))
    monkeypatch.setattr(peer, "SIZE", 8)
    monkeypatch.setattr(peer.libs, "build_dataset", lambda *_, value_range: [data])
    monkeypatch.setattr(peer.time, "monotonic", itertools.count().__next__)  # a second an update
    forward, sample, trained, drawn = GaussianDiffusion.forward, GaussianDiffusion.sample, [], []

    def watched_forward(self, images, classes):
        assert torch.equal(images.mean((1, 2, 3)), classes.float())
        trained.append((self, len(images)))
        return forward(self, images, classes=classes)

    def watched_sample(self, classes, *scales):
        drawn.append(classes)
        return sample(self, classes, *scales)

    def images(name, *arguments):
        drawn.clear()
        peer.main(["--output", str(tmp_path / name), "--num", "202", "--sampling-timesteps", "2", *arguments])
        read = read_images(str(tmp_path / name), 1, data.classes, (8, 8))
        assert torch.equal(torch.cat(drawn), read.labels) and torch.equal(read.labels, labels_like(labels, 10, 202))
        return read.images

    monkeypatch.setattr(GaussianDiffusion, "forward", watched_forward)
    monkeypatch.setattr(GaussianDiffusion, "sample", watched_sample)
    first = images("a.npz", "--minutes", "0.75", "--dim", "8", "--dim-mults", "1", "2", "--lr", "3e-3",
                   "--batch-size", "8", "--cond-scale", "1")
    out = capsys.readouterr().out
    early, late = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert late < 0.6 * early and "0.8 min: 45 updates" in out
    assert [n for _, n in trained] == [8] * 45
    saved, last = torch.load(tmp_path / "a.pt", weights_only=True)["unet"], trained[-1][0].model.state_dict()
    assert not torch.equal(saved["final_conv.weight"], last["final_conv.weight"])  # but the average

    again = ["--weights", str(tmp_path / "a.pt"), "--cond-scale"]
    assert torch.equal(images("b.npz", *again, "1"), first) and not torch.equal(images("c.npz", *again, "6"), first)
    assert len(trained) == 45 and {path.name for path in tmp_path.glob("*")} == {"a.npz", "a.pt", "b.npz", "c.npz"}


def test_bad_input(tmp_path):
    (tmp_path / "a.pt").touch()
    for arguments, message in ((["--output", "a.npz"], "--minutes --weights is required"),
                               (["--output", "a.png", "--minutes", "1"], "a.png must end in .npz"),
                               (["--output", f"{tmp_path}/a.npz", "--minutes", "1"], "a.pt exists"),
                               (["--output", "a.npz", "--minutes", "1", "--dim-mults", *"1111"], "at most 3")):
        with pytest.raises(UsageError) as error:
            peer.main(arguments)
        assert message in one_line(error)
