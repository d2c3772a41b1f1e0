"""Many images from one model, batch by batch."""

import math

import torch
from torchvision.utils import make_grid

from .models import sampling_options
from .samplers import image_generator


def draw_images(model, labels, options, seed=0, batch_size=100, device="cpu", noise=None, callback=None):
    """Yield images B x C x H x W in [0, 1] on the CPU, one per label.

    Image k depends on (seed, k, its label) alone, not on the batch it is in. options: of `sampling_options`.
    noise: N x *model.img_shape, where each image starts, in place of what the seed gives; callback: see `model.sample`.
    """
    for numbers in torch.arange(len(labels)).split(batch_size):
        yield model.sample(labels[numbers].to(device), noise=None if noise is None else noise[numbers],
                           generator=image_generator(seed, numbers), callback=callback, **options).cpu()


def interpolated_noise(start, end, n):
    """Standard normal noise along a quarter of a circle: n x *start.shape, from `start` to `end`.

    cos^2 + sin^2 = 1, so that between two independent standard normals the variance is 1 all the way; on a straight
    line it would fall to 1/2, which no model has seen.
    """
    angle = torch.linspace(0, math.pi / 2, n, dtype=torch.float64).reshape(-1, *[1] * start.dim())
    return (angle.cos() * start + angle.sin() * end).to(start.dtype)


def sample_grid(model, config, device):
    """A grid of `train_cfg.num_eval_samples` images a class, one row each, from the same noise every time."""
    per_class = config["train_cfg"]["num_eval_samples"]
    labels = torch.arange(model.num_classes).repeat_interleave(per_class)
    training = model.training
    model.eval()
    images = torch.cat(list(draw_images(model, labels, sampling_options(config), config["seed"], device=device)))
    model.train(training)
    return make_grid(images, nrow=per_class, padding=1)
