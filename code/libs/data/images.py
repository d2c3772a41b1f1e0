"""Sets of images as uint8, from memory, a folder or an .npz file: the two sides of every comparison."""

import os
from hashlib import sha256

import numpy as np
import torch

from ..common.errors import UsageError, display_path, first_line
from ..common.files import atomic_file
from ..common.memory import check_memory
from .folders import FileImages, list_folder, open_image


class ImageSet:
    """N images of one size, and their labels if they have any.

    Args:
        images: uint8, N x C x H x W: a tensor, or an object that is indexed like one (`FolderImages`, and
            `FileImages` of folders.py).
        labels: N, long, or None.
        classes: their names, or None.
        size: side of the square that is cut out of the centre, as `ImageDataset` does when it tests; None: all of it.
    """

    def __init__(self, images, labels=None, classes=None, size=None):
        self.images, self.labels, self.classes, self.size = images, labels, classes, size

    def __len__(self):
        return self.images.shape[0]

    @property
    def shape(self):
        """(N, C, H, W)"""
        n, channels, height, width = self.images.shape
        return (n, channels, self.size or height, self.size or width)

    def _read(self, index):
        images = self.images[index]
        top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], self.shape[-2:]))
        return images[:, :, top:, left:][:, :, :self.shape[-2], :self.shape[-1]]

    def batches(self, batch_size=200):
        """Yield uint8 B x C x H x W in order. Images on disk are decoded as they are asked for.

        Raises UsageError for a broken file.
        """
        for index in torch.arange(len(self)).split(batch_size):
            yield self._read(index)

    def take(self, index=None):
        """An ImageSet in memory, its `.images` a tensor: of the images `index` (long), or of all."""
        index = torch.arange(len(self)) if index is None else index
        return ImageSet(self._read(index), None if self.labels is None else self.labels[index], self.classes)

    def digest(self):
        """SHA-256, in hex, of shape and pixels."""
        digest = sha256(repr(self.shape).encode())
        for batch in self.batches():
            digest.update(batch.cpu().contiguous().numpy())
        return digest.hexdigest()


class FolderImages(FileImages):
    """Images that stay on disk: `images[index]` decodes those as uint8 B x C x H x W, in threads.

    Pixels as they are stored, neither resized nor rotated: what pytorch-fid and torch-fidelity read too. All images
    must have the first one's size; `channels`, 1 or 3, turns grey into RGB and the reverse, and drops an alpha channel.
    """

    def __init__(self, paths, channels):
        self.paths, self.num_workers, self.channels = paths, None, channels  # as many threads as fit the processors
        with open_image(paths[0], "images") as image:
            self.shape = (len(paths), channels, image.height, image.width)

    def _decode(self, path):
        with open_image(path, "images") as image:
            shape, mode = (self.channels, image.height, image.width), image.mode
            if shape != self.shape[1:]:
                raise UsageError(f"{display_path(path)} is {times(shape)}, but {display_path(self.paths[0])} is "
                                 f"{times(self.shape[1:])} (C x H x W); all images of a set must have one size")
            if mode.startswith(("I", "F")):
                raise UsageError(f"{display_path(path)}: Pillow's mode {mode}; must be grey or RGB of 8 bits")
            pixels = torch.from_numpy(np.array(image.convert("L" if mode in ("1", "L", "LA") else "RGB")))
        return to_channels(pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1), self.channels)


def read_images(path, channels, classes, size=None):
    """Read images to compare: a folder, flat or with one sub-folder per class, or an .npz file.

    An .npz file holds uint8 `arr_0`, N x H x W x C, as guided-diffusion's evaluation reads it and `write_npz` writes
    it, and perhaps `labels`, N integers. Only a folder stays on disk, so that large pictures need little memory.

    Args:
        channels: 1 or 3: what the images are converted to.
        classes: names of the classes that labels count in. A class folder is matched by its name, and some may be
            missing.
        size: (H, W) that they must have; None: any.

    Returns:
        ImageSet; labels are None for a flat folder and an .npz file without them.

    Raises:
        UsageError: nothing there, no images, a class that is none of `classes`, a broken file, an array of another
            type or shape. Sizes that differ are found when the images are read.
    """
    if not os.path.isdir(path) and not os.path.isfile(path):
        raise UsageError(f"no images {display_path(path)}: there is no such folder or file")
    images = (_read_folder if os.path.isdir(path) else _read_npz)(path, channels, classes)
    if size and images.shape[2:] != tuple(size):
        raise UsageError(f"{display_path(path)}: images are {times(images.shape[2:])}, those of the data set "
                         f"{times(size)}")
    return images


def _read_folder(path, channels, classes):
    flat, folders = list_folder(path, "images")
    by_class = {name: list_folder(os.path.join(path, name), "images")[0] for name in folders}
    if flat and any(by_class.values()):
        raise UsageError(f"folder {display_path(path)} has images and folders of images; must be the one or the other")
    if flat:
        return ImageSet(FolderImages(flat, channels))
    if not any(by_class.values()):
        raise UsageError(f"folder {display_path(path)} has no images, and no sub-folders with images")
    files, labels = [], []
    for name in sorted(by_class):
        if name not in classes:
            raise UsageError(f"class {name} in folder {display_path(path)} is none of {', '.join(classes)}")
        files += by_class[name]
        labels += [classes.index(name)] * len(by_class[name])
    return ImageSet(FolderImages(files, channels), torch.tensor(labels), classes)


def _read_npz(path, channels, classes):
    name = display_path(path)
    try:
        # a pickle could run code; a file of another kind is mapped, not read
        with np.load(path, mmap_mode="r", allow_pickle=False) as arrays:
            packed, unpacked = os.path.getsize(path), sum(member.file_size for member in arrays.zip.infolist())
            if unpacked > max(100 * packed, 2 ** 28):
                raise ValueError(f"it would unpack from {packed:,} to {unpacked:,} bytes, too much for images")
            check_memory(3 * unpacked, f"reading {name}", "take fewer images")
            images = np.asarray(arrays["arr_0"])
            labels = np.asarray(arrays["labels"]) if "labels" in arrays.files else None
    except UsageError:
        raise
    except Exception as e:  # a damaged file makes zipfile, zlib and NumPy raise almost anything
        raise UsageError(f"{name} is damaged or no .npz file with an array arr_0 ({first_line(e)})") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UsageError(f"{name}: arr_0 is {images.dtype.name} {times(images.shape)}; must be uint8 N x H x W x C, "
                         "C being 1 or 3")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    images = torch.cat([to_channels(part, channels) for part in images.split(1000)])
    if labels is not None:
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise UsageError(f"{name}: labels is {labels.dtype.name} of shape {labels.shape}; must be {len(images)} "
                             "integers")
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UsageError(f"{name}: labels run from {labels.min()} to {labels.max()}; must be from 0 to "
                             f"{len(classes) - 1}")
        labels = torch.from_numpy(labels.astype(np.int64))
    return ImageSet(images, labels, classes)


def write_npz(path, images, labels=None):
    """Write what `read_images` reads, whole or not at all. RunError where that is impossible.

    images: uint8, N x C x H x W; labels: N integers, or None.
    """
    arrays = {"arr_0": images.permute(0, 2, 3, 1).cpu().numpy()}
    if labels is not None:
        arrays["labels"] = torch.as_tensor(labels).cpu().numpy()
    with atomic_file(path) as f:
        np.savez(f, **arrays)


def to_channels(images, channels):
    """uint8 ... x C x H x W to 1 or 3 channels, to the bit what Pillow's convert() makes."""
    if channels == images.shape[-3]:
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    red, green, blue = images.int().unbind(-3)  # ITU-R 601-2 luma in 16-bit fixed point
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).byte().unsqueeze(-3)


def to_uint8(images):
    """Float images in [0, 1], N x C x H x W -> uint8, rounded as torchvision's save_image does it.

    So a drawn image has the same features as its PNG file. Values outside [0, 1] become 0 or 255.
    Raises UsageError where images are not finite, as those of a model whose training diverged.
    """
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise UsageError(f"{bad} of {len(images)} images are not finite (NaN or infinite)")
    return images.mul(255).add(0.5).clamp(0, 255).byte()


def times(shape):
    return " x ".join(map(str, shape))
