"""A small network that reads digits: the judge of MNIST samples, for class accuracy and Frechet distances."""

import hashlib
import os

import torch
from torch import nn

from ..common.errors import UsageError, display_path
from ..common.files import load_tensors, read_tensors

WEIGHTS = os.path.join(os.path.dirname(__file__), "..", "..", "..", "pretrained", "mnist_classifier.pth")


def _conv(c_in, c_out, kernel=3):
    # BatchNorm has the bias
    return [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]


class DigitClassifier(nn.Module):
    """Images B x 1 x 28 x 28 in [0, 1], white ink on black -> logits B x 10."""

    feature_dim = 128

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *_conv(1, 32, 5), nn.MaxPool2d(2),
            *_conv(32, 64), *_conv(64, 64), nn.MaxPool2d(2),
            *_conv(64, 128), *_conv(128, self.feature_dim),
        )
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(self.feature_dim, 10)

    def features(self, x):
        """The input of the last layer: B x 1 x 28 x 28 in [0, 1] -> B x 128, none negative.

        The mean over all 7 x 7 positions keeps a channel from being exactly zero for most digits, as a
        single ReLU would: a Frechet distance fits a Gaussian to these numbers.
        """
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.drop(self.features(x)))


def load_classifier(path=WEIGHTS):
    """The trained classifier, in eval mode, without gradients.

    Its attributes `test_accuracy` (0 to 1, of all 10,000 test digits) and `recipe` say how it was trained.

    Raises:
        UsageError: the file is missing or not one of train_classifier.py.
    """
    if not os.path.isfile(path):
        raise UsageError(f"classifier: no file {display_path(path)}; train_classifier.py makes it")
    model = DigitClassifier()
    try:
        saved = read_tensors(path)
        weights = saved["state_dict"]
        model.test_accuracy, model.recipe = float(saved["test_accuracy"]), str(saved["recipe"])
    except Exception as e:  # a foreign file fails in torch's unpickler in many ways, all with the same meaning
        raise UsageError(f"classifier: {display_path(path)} is not a file of train_classifier.py "
                         f"({type(e).__name__})") from None
    load_tensors(model.state_dict(), weights, f"classifier: {display_path(path)}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model, images, labels):
    """Share of digits classified correctly, 0 to 1. images: N x 1 x 28 x 28 uint8; labels: N; model in eval mode."""
    hits = [(model(x.float() / 255).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500))]
    return torch.stack(hits).sum().item() / len(labels)


def file_hash(path=WEIGHTS):
    """First 12 hex digits of the file's SHA-256: printed beside every number made with this file."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()[:12]
