"""Latents of a data set, encoded once and kept on disk, from which latent diffusion learns in every epoch."""

import json
import math
import os
import shutil
from hashlib import sha256

import numpy as np
import torch

from .. import config
from ..common.cli import progress_bar
from ..common.errors import RunError, display_path
from ..common.files import atomic_file
from ..common.memory import fits, send
from ..common.seeds import seeded_generator
from ..tiny_autoencoder import weights_hash
from .images import ImageSet

BATCH = 32  # images that are encoded at once
HEADER = 4096  # bytes before the latents: what they were made from, as JSON


class LatentDataset:
    """Same interface as ImageDataset, with latents in place of images.

    Args:
        latents: N x V x C x H x W, float32: V views of each image. A NumPy array in memory or on disk, or a tensor.
        labels: N, long, on the CPU; on the tensor's device if the latents are one.
        classes: names of the classes.
    """

    encoded = True

    def __init__(self, latents, labels, classes):
        self.latents, self.labels, self.classes = latents, labels, classes

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        """Move the latents to a GPU, if they need at most half of what is free there: batches are then made there."""
        if torch.device(device).type != "cpu" and fits(self.latents.nbytes, device, f"latents of {len(self)} images"):
            self.latents, self.labels = _read(self.latents, device), self.labels.to(device)
        return self

    def batch(self, index, generator=None, part=slice(None)):
        """Items `index` as `(latents B x C x H x W, labels B)`, each a random view; see ImageDataset.batch."""
        view = torch.randint(self.latents.shape[1], (len(index),), generator=generator)[part]
        index = index[part]
        if isinstance(self.latents, torch.Tensor):
            index, view = send(index, self.latents.device), send(view, self.latents.device)
            return self.latents[index, view], self.labels[index]
        return torch.from_numpy(self.latents[index.numpy(), view.numpy()]), self.labels[index]


def _read(latents, device):
    """A NumPy array as a tensor on `device`, image by image: the file may be larger than the host's memory."""
    out = torch.empty(latents.shape, device=device)
    for to, image in zip(out, latents):
        to.copy_(torch.from_numpy(image.copy()))
    return out


def kept_views(dataset, index, crops):
    """The views of the images `index` that are encoded: V pairs (corners 2 x B, mirrored B), see ImageDataset.view.

    `crops` random crops, or all possible ones where there are fewer, each also mirrored if the data set flips; without
    augmentation the centre. The crops of an image depend on its number alone, and are all different.
    """
    side = dataset.images.shape[-1] - dataset.img_size + 1  # possible rows, and columns, of a corner
    if dataset.augment:
        places = torch.stack([torch.randperm(side ** 2, generator=seeded_generator("latent crops", i))[:crops]
                              for i in index.tolist()])
        corners = [torch.stack([place // side, place % side]) for place in places.T]
    else:
        corners = [dataset.draw_view(len(index))[0]]
    plain = torch.zeros(len(index), dtype=torch.bool)
    flips = [plain, ~plain] if dataset.augment and dataset.flip else [plain]
    return [(corner, mirrored) for corner in corners for mirrored in flips]


def cached_latents(model, dataset, data, device, log=None):
    """The latents of a data set as a LatentDataset, from the cache or, where that does not fit, encoded.

    Args:
        model: Diffusion with an autoencoder, on `device`.
        dataset: ImageDataset of images in [0, 1].
        data: the configuration's section `dataset`, which the data set was built from.
        log: called with lines of text; None: silent.

    Raises RunError where they do not fit on the disk, UsageError for a broken image file.
    """
    log = log or (lambda line: None)
    views = len(kept_views(dataset, torch.arange(1), data["latent_crops"]))
    shape = (len(dataset), views, *model.img_shape)
    path, header = _cache_path(dataset, data), _header(model, dataset, data, shape)
    if _is_valid(path, header, shape):
        log(f"latents: {views} views of each image, from {display_path(path)}")
    else:
        if os.path.exists(path):
            log(f"latents: {display_path(path)} is of other images or another autoencoder, or damaged: encoding again")
        _write(path, header, shape, _encode(model, dataset, data["latent_crops"], device), log)
    latents = np.asarray(np.memmap(path, "<f4", "r", HEADER, shape))
    return LatentDataset(latents, dataset.labels.cpu(), dataset.classes)


def _cache_path(dataset, data):
    """One file for each data folder and these settings; what else matters is in the header."""
    folder = sha256(os.path.abspath(data["data_folder"]).encode()).hexdigest()[:8]
    words = (data["name"], data["split"], data["limit"], dataset.img_size, data["latent_crops"], folder)
    return os.path.join(config.CACHE, "latents", "-".join(str(word) for word in words if word) + ".latents")


def _header(model, dataset, data, shape):
    """What the latents depend on: weights of the encoder, images, shape."""
    if isinstance(dataset.images, torch.Tensor):
        images = ImageSet(dataset.images).digest()
    else:  # files that stay on disk: to read all pixels would take too long
        files = [(os.path.relpath(path, data["data_folder"]), os.stat(path)) for path in dataset.images.paths]
        images = sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in files]).encode()).hexdigest()
    key = {"autoencoder": weights_hash(model.vae.encoder), "images": images, "shape": shape}
    return json.dumps(key).encode().ljust(HEADER)


def _is_valid(path, header, shape):
    if not os.path.isfile(path) or os.path.getsize(path) != HEADER + 4 * math.prod(shape):
        return False
    with open(path, "rb") as f:
        return f.read(HEADER) == header


def _encode(model, dataset, crops, device):
    """Yield the latents of BATCH images after BATCH images, B x V x C x H x W."""
    for index in torch.arange(len(dataset)).split(BATCH):
        images = dataset.images[index].to(device)  # read once for all views
        latents = [model.encode(dataset.view(images, corner, mirrored)).cpu()
                   for corner, mirrored in kept_views(dataset, index, crops)]
        yield np.ascontiguousarray(torch.stack(latents, 1).numpy(), "<f4")


def _write(path, header, shape, batches, log):
    """Write the header and batches of latents; the file gets its name when it is whole."""
    folder, size = os.path.dirname(path), 4 * math.prod(shape)
    log(f"latents: encoding {shape[0]:,} images, {shape[1]} views of each, once: {size / 2 ** 20:,.1f} MiB "
        f"into {display_path(path)}")
    try:
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < size:  # fail before the work, not at its end
            raise OSError(f"{display_path(folder)} has {free / 2 ** 20:,.0f} MiB free")
        with atomic_file(path) as f, progress_bar(shape[0], "image", "encoding") as bar:
            f.write(header)
            for batch in batches:
                f.write(batch)
                bar.update(len(batch))
    except (OSError, RunError) as e:
        raise RunError(f"latents: {e}; make room, or encode images anew in every update: "
                       "--set dataset.latent_crops=0") from None
