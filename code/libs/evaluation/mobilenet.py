"""MobileNetV1 (Howard et al. 2017) of width 0.75, trained on ImageNet: the judge of photographs."""

import os

import torch
import torch.nn.functional as F
from torch import nn

from ..common.errors import UsageError, display_path, first_line
from ..common.files import load_tensors, read_tensors
from .classifier import WEIGHTS as CLASSIFIER

WEIGHTS = os.path.join(os.path.dirname(CLASSIFIER), "mobilenet_imagenet.pth")
SIDE = 192  # of the square images it was trained on
STEP = 0.023528477  # of activations: it was trained to round them to 8 bits, the highest being 6
# (channels, stride) of each depthwise convolution and the 1 x 1 convolution that follows it
LAYERS = [(48, 1), (96, 2), (96, 1), (192, 2), (192, 1), (384, 2), *[(384, 1)] * 5, (768, 2), (768, 1)]
# class of a data set -> the classes of ImageNet, numbered from 0, that an image of it shows
KINDS = {"cat": range(281, 286), "dog": range(151, 269),
         "wild": [*range(269, 272), *range(277, 281), *range(286, 294)]}  # wolves; foxes; cougar to cheetah


class Conv(nn.Conv2d):
    """A convolution with its batch norm folded in, padded as TensorFlow pads even sizes, and ReLU6 in 255 steps."""

    def forward(self, x):
        x = super().forward(F.pad(x, (0, 1, 0, 1)) if self.stride == (2, 2) else x)
        return (x / STEP).round().clamp(0, 255) * STEP


def _conv(c_in, c_out, kernel=3, stride=1, groups=1):
    return Conv(c_in, c_out, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups)


class MobileNet(nn.Module):
    """Images, see `features` -> logits B x 1001 of the classes of ImageNet after 0, the background."""

    feature_dim = 768

    def __init__(self):
        super().__init__()
        layers, width = [_conv(3, 24, stride=2)], 24
        for channels, stride in LAYERS:
            layers += [_conv(width, width, stride=stride, groups=width), _conv(width, channels, kernel=1)]
            width = channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1001)

    def features(self, images):
        """The input of the last layer: uint8, or float in [0, 1], B x 3 x H x W -> B x 768, from 0 to 6."""
        x = images.float() if images.dtype == torch.uint8 else images * 255
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.body((x.round() - 128) / 128).mean((2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def load_mobilenet(path=WEIGHTS):
    """The network with the weights that ship, in eval mode, without gradients.

    The file has the original's 8-bit integers q, and scale s and zero point z of each tensor: a weight is s (q - z).
    Raises UsageError where it is missing or another network's.
    """
    if not os.path.isfile(path):
        raise UsageError(f"mobilenet: no file {display_path(path)}; tests/mobilenet_weights.py makes it")
    model = MobileNet()
    try:
        saved = read_tensors(path)
        state = {name: (q.float() - saved["zero_points"].get(name, 0)) * saved["scales"].get(name, 1)
                 for name, q in saved["weights"].items()}
    except Exception as e:  # a foreign file fails in torch's unpickler in many ways, all with the same meaning
        raise UsageError(f"mobilenet: {display_path(path)} is not a file of tests/mobilenet_weights.py "
                         f"({first_line(e)})") from None
    load_tensors(model.state_dict(), state, f"mobilenet: {display_path(path)}")
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def recognised(logits, labels, classes):
    """The share, 0 to 1, of images whose likeliest class of ImageNet belongs to their label; others than KINDS left out.

    Args:
        logits: N x 1001; labels: N, long; classes: the labels' names.

    Returns None where no label is in KINDS.
    """
    predicted = (logits.argmax(1) - 1).tolist()
    hits = [k in KINDS[classes[label]] for k, label in zip(predicted, labels.tolist()) if classes[label] in KINDS]
    return sum(hits) / len(hits) if hits else None
