"""Latents of a data set, encoded once and kept on disk: what latent diffusion learns from, epoch after epoch."""

import json
import math
import os
import shutil
import time
from contextlib import suppress
from hashlib import sha256

import numpy as np
import torch
from tqdm import tqdm

from ..common.errors import RunError, display_path
from .folders import available_memory
from ..common.files import atomic_file
from .images import ImageSet
from ..common.seeds import seeded_generator
from ..tiny_autoencoder import weights_hash

BATCH = 32  # images that are encoded at once
HEAD = 4096  # bytes of a cache before the numbers: what it was made from, as JSON


class LatentDataset:
    """To the loader what an ImageDataset is, with latents for images.

    Args:
        latents: N x V x C x H x W, float32, a NumPy array in memory or on disk: V views of each image.
        labels: N, long, on the CPU.
        classes: names of the classes.
    """

    encoded = True

    def __init__(self, latents, labels, classes):
        self.latents, self.labels, self.classes = latents, labels, classes

    def __len__(self):
        return len(self.labels)

    def batch(self, index, generator=None, part=slice(None)):
        """Items `index` as `(latents B x C x H x W, labels B)`, each in one view at random; see ImageDataset.batch."""
        view = torch.randint(self.latents.shape[1], (len(index),), generator=generator)[part]
        mine = index[part]
        return torch.from_numpy(self.latents[mine.numpy(), view.numpy()]), self.labels[mine]


def kept_views(dataset, index, crops):
    """The views of images `index` that are encoded: V pairs (corners 2 x B, mirrored B), see ImageDataset.view.

    `crops` random crops, or all where there are fewer, each as it is and, if the data set flips, mirrored; without
    augmentation the centre. An image's crops are a function of its number alone, and no two are the same.
    """
    side = dataset.images.shape[-1] - dataset.img_size + 1  # so many places each way
    if dataset.augment:
        places = torch.stack([torch.randperm(side ** 2, generator=seeded_generator("latent crops", i))[:crops]
                              for i in index.tolist()])
        corners = [torch.stack([place // side, place % side]) for place in places.T]
    else:
        corners = [dataset.draw_view(len(index))[0]]
    plain = torch.zeros(len(index), dtype=torch.bool)
    ways = [plain, ~plain] if dataset.augment and dataset.flip else [plain]
    return [(corner, mirrored) for corner in corners for mirrored in ways]


def cached_latents(model, dataset, data, device, say=None):
    """The latents of a data set, from the cache in its data folder; if that is not there or does not fit, encoded.

    Args:
        model: Diffusion with an autoencoder, on `device`.
        dataset: ImageDataset of images in [0, 1].
        data: the configuration's section `dataset`, which the data set was built from.
        say: gets lines of text; None: in silence, for all processes but one.

    Returns a LatentDataset. Where the folder cannot be written or has too little room the latents stay in memory,
    and that is said. Raises RunError where they do not fit there either, or the disk fails on the way; UsageError
    for a broken image file.
    """
    def tell(line):
        if say:
            say(f"latents: {line}")

    views = len(kept_views(dataset, torch.arange(1), data["latent_crops"]))
    shape = (len(dataset), views, *model.img_shape)
    folder = os.path.join(data["data_folder"], ".latents")
    # a slot for each of these settings; what else can change is in the key, and is said when it did
    words = (data["name"], data["split"], data["limit"], dataset.img_size, data["latent_crops"])
    path = os.path.join(folder, "-".join(str(word) for word in words if word) + ".latents")
    key = {"autoencoder": weights_hash(model.vae.encoder), "images": [_images_hash(dataset, folder), *shape]}
    latents = None
    if os.path.exists(path):
        try:
            latents = _read(path, key, shape)
            tell(f"{views} views of each image, from {display_path(path)}")
        except (ValueError, OSError) as e:
            tell(f"{display_path(path)} {e}: encoded again")
    if latents is None:
        latents = _encode(model, dataset, data["latent_crops"], shape, device, path, key, tell, quiet=not say)
    return LatentDataset(latents, dataset.labels.cpu(), dataset.classes)


def _images_hash(dataset, folder):
    """Of the pixels, or of names, sizes and times of files that stay on disk, where all pixels would take too long."""
    if isinstance(dataset.images, torch.Tensor):
        return ImageSet(dataset.images).digest()
    files = [(os.path.relpath(path, folder), os.stat(path)) for path in dataset.images.paths]
    return sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in files]).encode()).hexdigest()


def _read(path, key, shape):
    """The numbers of a cache, mapped into memory. Raises ValueError, its text about the file, if they are not these."""
    with open(path, "rb") as f:
        try:
            head = dict(json.loads(f.read(HEAD)))
        except (ValueError, TypeError):
            raise ValueError("is damaged") from None
        digest = sha256()
        for block in iter(lambda: f.read(2 ** 20), b""):
            digest.update(block)
    if head.get("sha256") != digest.hexdigest():
        raise ValueError("is damaged")
    for name, what in (("autoencoder", "another autoencoder"), ("images", "other images")):
        if head.get(name) != key[name]:
            raise ValueError(f"is of {what}")
    return _map(path, shape)


def _map(path, shape):
    return np.asarray(np.memmap(path, "<f4", "r", HEAD, shape))


def _encode(model, dataset, crops, shape, device, path, key, tell, quiet):
    """All views of all images, N x V x C x H x W, written to `path` if that is possible."""
    size, where = 4 * math.prod(shape), display_path(path)
    obstacle = _obstacle(path, size)
    if obstacle:
        if size > available_memory() // 2:
            raise RunError(f"latents: {size / 2 ** 20:,.0f} MiB fit neither into {where} ({obstacle}) nor into memory; "
                           "make room, or encode images anew in every update: --set dataset.latent_crops=0")
        where = f"memory, for this run alone, as {where} cannot be written ({obstacle})"
    tell(f"encoding {shape[0]:,} images, {shape[1]} views each, once: {size / 2 ** 20:,.1f} MiB into {where}")
    with tqdm(total=shape[0] * shape[1], desc="encoding", unit="view", disable=True if quiet else None,
              mininterval=0.5) as bar:
        batches = _encoded(model, dataset, crops, device, bar)
        if obstacle:
            latents = np.empty(shape, "<f4")
            for start, batch in zip(range(0, shape[0], BATCH), batches):
                latents[start:start + BATCH] = batch
            return latents
        digest = sha256()
        with atomic_file(path) as f:
            f.write(bytes(HEAD))
            for batch in batches:
                digest.update(batch)
                f.write(batch)
            f.seek(0)
            f.write(json.dumps({**key, "sha256": digest.hexdigest()}).encode().ljust(HEAD))
    return _map(path, shape)


def _encoded(model, dataset, crops, device, bar):
    """Yield the latents of BATCH images after BATCH images, B x V x C x H x W."""
    for index in torch.arange(len(dataset)).split(BATCH):
        images = dataset.images[index].to(device)  # read once, however many views
        latents = []
        for corner, mirrored in kept_views(dataset, index, crops):
            latents.append(model.encode(dataset.view(images, corner, mirrored)).cpu())
            bar.update(len(index))
        yield np.ascontiguousarray(torch.stack(latents, 1).numpy(), "<f4")


def _obstacle(path, size):
    """Why `size` bytes cannot be written to `path`, None where they can. Removes what killed runs left there."""
    folder, name = os.path.split(path)
    try:
        os.makedirs(folder, exist_ok=True)
        for old in os.scandir(folder):
            if old.name.startswith(name) and old.name.endswith(".partial") and time.time() - old.stat().st_mtime > 3600:
                with suppress(OSError):  # another run does the same
                    os.remove(old)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        return e.strerror
    if not os.access(folder, os.W_OK):
        return "no permission"
    return f"{free / 2 ** 20:,.0f} MiB are free" if free < size else None
