"""Sets of images as uint8, from memory, a folder or an .npz file: the two sides of every comparison."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256

import numpy as np
import torch
from PIL import Image

from ..common.errors import UsageError, first_line, display_path
from ..common.files import atomic_file
from .folders import EXTENSIONS


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
        if size and size > min(images.shape[2:]):
            raise UsageError(f"size: {size}; the images are only {_times(images.shape[2:])}")

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

    def batches(self, batch_size=50):
        """Yield uint8 B x C x H x W in order. Images on disk are decoded as they are asked for.

        Raises UsageError where a file turns out to be broken.
        """
        for index in torch.arange(len(self)).split(batch_size):
            yield self._read(index)

    def take(self, index=None):
        """An ImageSet in memory, its `.images` a tensor: of the images `index` (long), or of all."""
        index = torch.arange(len(self)) if index is None else index
        return ImageSet(self._read(index), None if self.labels is None else self.labels[index], self.classes)

    def digest(self):
        """SHA-256, in hex, of shape and pixels: another one as soon as one pixel is another."""
        digest = sha256(repr(self.shape).encode())
        for batch in self.batches():
            digest.update(batch.cpu().contiguous().numpy())
        return digest.hexdigest()


class FolderImages:
    """Images that stay on disk: `images[index]` decodes those as uint8 B x C x H x W, in threads.

    Pixels as they are stored, neither resized nor turned: what pytorch-fid and torch-fidelity read too.
    """

    def __init__(self, paths, channels=None):
        self.paths, self.channels = paths, channels
        shapes = map(self._header, paths)  # all of them now: a run should not fail at its end for the last file
        first = next(shapes)
        for path, shape in zip(paths[1:], shapes):
            if shape != first:
                raise UsageError(f"{display_path(path)} is {_times(shape)}, but {display_path(paths[0])} is {_times(first)} "
                                 "(C x H x W); all images of a set must have one size and mode")
        self.shape = (len(paths), *first)

    def __getitem__(self, index):
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
            for i, image in enumerate(pool.map(self._decode, [self.paths[k] for k in index.tolist()])):
                images[i] = image
        return images

    def _header(self, path):
        """C x H x W, without decoding the pixels."""
        with _opened(path) as image:
            mode, (width, height) = image.mode, image.size
        if mode.startswith(("I", "F")) or (self.channels is None and mode not in ("1", "L", "P", "RGB")):
            raise UsageError(f"{display_path(path)}: Pillow's mode {mode}; must be grey or RGB of 8 bits")
        return (self.channels or (1 if _is_grey(mode) else 3), height, width)

    def _decode(self, path):
        with _opened(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("L" if _is_grey(image.mode) else "RGB")))
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        return to_channels(pixels, self.channels)


def _is_grey(mode):
    return mode in ("1", "L", "LA")


@contextmanager
def _opened(path):
    try:
        with Image.open(path) as image:
            yield image
    except Exception as e:  # a broken file makes its decoder raise almost anything
        raise UsageError(f"broken image file {display_path(path)} ({first_line(e)})") from None


def _times(shape):
    return " x ".join(map(str, shape))


def read_images(path, channels=None, classes=None):
    """Read images to compare: a folder, flat or of one sub-folder per class, or an .npz file.

    An .npz file holds uint8 `images` or `arr_0`, N x H x W, N x H x W x C or N x C x H x W, and perhaps `labels`, N
    integers. Only a folder stays on disk, so that large pictures need little memory.

    Args:
        channels: 1 or 3 turns grey into RGB and the reverse, and drops an alpha channel; None leaves images alone.
        classes: names of the classes that labels count in. A class folder is matched by its name, and some may be
            missing; None takes the folders' own names, sorted.

    Returns:
        ImageSet; labels are None for a flat folder and an .npz file without them.

    Raises:
        UsageError: nothing there, no images, sizes or modes that differ, a class that is none of `classes`, a broken
            file, an array of another type or shape.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"channels: {channels}; must be 1 (grey) or 3 (RGB)")
    if os.path.isdir(path):
        return _read_folder(path, channels, classes)
    if not os.path.exists(path):
        raise UsageError(f"no images {display_path(path)}: there is no such folder or file")
    if not path.endswith(".npz"):
        raise UsageError(f"images {display_path(path)}: must be a folder or an .npz file")
    return _read_npz(path, channels, classes)


def _image_files(folder):
    return sorted(e.path for e in os.scandir(folder) if e.is_file() and not e.name.startswith(".")
                  and e.name.lower().endswith(EXTENSIONS))


def _read_folder(path, channels, classes):
    by_class = {e.name: _image_files(e.path) for e in os.scandir(path) if e.is_dir() and not e.name.startswith(".")}
    flat = _image_files(path)
    if flat and any(by_class.values()):
        raise UsageError(f"folder {display_path(path)} has images and folders of images; must be the one or the other")
    if flat:
        return ImageSet(FolderImages(flat, channels))
    if not any(by_class.values()):
        raise UsageError(f"folder {display_path(path)} has no images, and no sub-folders with images")
    classes = sorted(by_class) if classes is None else list(classes)
    files, labels = [], []
    for name in sorted(by_class):
        if name not in classes:
            raise UsageError(f"class {name} in folder {display_path(path)} is none of {', '.join(classes)}")
        if not by_class[name]:
            raise UsageError(f"the class folder {display_path(os.path.join(path, name))} has no images")
        files += by_class[name]
        labels += [classes.index(name)] * len(by_class[name])
    return ImageSet(FolderImages(files, channels), torch.tensor(labels), classes)


def _read_npz(path, channels, classes):
    where = display_path(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:  # a pickle could run code
            key = next((k for k in ("images", "arr_0") if k in arrays.files), None)
            images = None if key is None else arrays[key]
            labels = arrays["labels"] if "labels" in arrays.files else None
    except Exception as e:  # a damaged file makes zipfile, zlib and NumPy raise almost anything
        raise UsageError(f"{where} is damaged or no .npz file of plain arrays ({first_line(e)})") from None
    if images is None:
        raise UsageError(f"{where}: has neither an array images nor arr_0")
    if images.dtype != np.uint8:
        raise UsageError(f"{where}: {key} is {images.dtype}; must be uint8, 0 to 255")
    shape = images.shape
    if len(shape) == 3:
        images = images[:, None]
    # channels first or last; a shape that is both could be read in two ways
    elif len(shape) == 4 and (shape[1] in (1, 3)) != (shape[3] in (1, 3)):
        images = images if shape[1] in (1, 3) else images.transpose(0, 3, 1, 2)
    else:
        raise UsageError(f"{where}: {key} is {_times(shape)}; must be N x H x W, N x H x W x C or N x C x H x W, "
                         "C being 1 or 3")
    if 0 in shape:
        raise UsageError(f"{where}: {key} is {_times(shape)}; must hold an image")
    images = torch.from_numpy(np.ascontiguousarray(images))
    images = torch.cat([to_channels(part, channels) for part in images.split(1000)])
    return ImageSet(images, _checked_labels(labels, len(images), classes, where), classes)


def _checked_labels(labels, n, classes, where):
    if labels is None:
        return None
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise UsageError(f"{where}: labels is {labels.dtype} of shape {labels.shape}; must be {n} integers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= len(classes)):
        raise UsageError(f"{where}: labels run from {low} to {high}; must be "
                         + ("at least 0" if classes is None else f"from 0 to {len(classes) - 1}"))
    return torch.from_numpy(labels.astype(np.int64))


def write_npz(path, images, labels=None):
    """Write what `read_images` reads, whole or not at all.

    The images become `arr_0`, N x H x W x C: the layout that guided-diffusion's evaluation takes too.

    Args:
        images: uint8, N x C x H x W.
        labels: N integers, or None.

    Raises:
        UsageError: a name without .npz, or images of another type.
        RunError: the disk is full or the folder cannot be written.
    """
    if not path.endswith(".npz"):
        raise UsageError(f"{path}: must end in .npz")
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise UsageError(f"{path}: images are {images.dtype}, {_times(images.shape)}; must be uint8 N x C x H x W")
    arrays = {"arr_0": images.permute(0, 2, 3, 1).cpu().numpy()}
    if labels is not None:
        arrays["labels"] = torch.as_tensor(labels).cpu().numpy()
    with atomic_file(path) as f:
        np.savez(f, **arrays)


def to_channels(images, channels):
    """uint8 ... x C x H x W to 1 or 3 channels, to the bit what Pillow's convert() makes. None: as they are."""
    if channels in (None, images.shape[-3]):
        return images
    if channels == 3:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    red, green, blue = images.int().unbind(-3)  # ITU-R 601-2 luma in 16-bit fixed point
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).byte().unsqueeze(-3)


def to_uint8(images):
    """Float images in [0, 1], N x C x H x W -> uint8, rounded as torchvision's save_image does it.

    So a drawn image has the same features as its PNG file. Values outside [0, 1] become 0 or 255.
    Raises UsageError where images are no floats or not finite.
    """
    if not images.is_floating_point():
        raise UsageError(f"images are {images.dtype}; must be floats in [0, 1]")
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise UsageError(f"{bad} of {len(images)} images are not finite (NaN or infinite)")
    return images.mul(255).add(0.5).clamp(0, 255).byte()
