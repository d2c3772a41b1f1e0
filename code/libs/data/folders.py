"""Image folders: one sub-folder per class, JPEG or PNG or whatever Pillow reads."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, Semaphore

import numpy as np
import torch
from PIL import Image, ImageOps

from ..common.cli import progress_bar
from ..common.errors import UsageError, display_path, first_line
from ..common.memory import available_memory

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # not EPS, for which Pillow starts Ghostscript
MEGAPIXELS = 100  # decoded at the same time, by all threads together; up to 2 GB
megapixels_left, one_at_a_time = Semaphore(MEGAPIXELS), Lock()
Image.core.set_block_size(2 ** 26)  # so large that malloc gives freed pixels back instead of keeping them per thread

warnings.filterwarnings("ignore", module=r"PIL\.")  # for what it cannot read it raises an error too


def find_split(root, train):
    """The folder that holds the classes: AFHQ v2 has train/ and test/, v1 train/ and val/.

    A folder with none of these is taken as it is, for training and for testing.
    """
    if not os.path.isdir(root):
        raise UsageError(f"dataset.data_folder: no folder {root}"
                         + ("; `sh download_dataset.sh` fetches AFHQ" if "afhq" in root.lower() else ""))
    splits = [name for name in ("train", "test", "val") if os.path.isdir(os.path.join(root, name))]
    wanted = ("train",) if train else ("test", "val")
    for name in splits:
        if name in wanted:
            return os.path.join(root, name)
    if splits:
        raise UsageError(f"dataset.data_folder: {root} has no folder {' or '.join(wanted)}")
    return root


def list_folder(folder, key="dataset.data_folder"):
    """(paths of image files, names of sub-folders), sorted, none hidden. key: what is blamed if it cannot be read."""
    try:
        with os.scandir(folder) as entries:  # hidden: such as ._0001.jpg, which macOS puts beside 0001.jpg
            entries = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        return [e.path for e in entries if e.name.lower().endswith(EXTENSIONS)], [e.name for e in entries if e.is_dir()]
    except OSError as e:
        raise UsageError(f"{key}: cannot read the folder {folder} ({e.strerror})") from None


def scan_folder(root, train):
    """(paths, labels, class names) of one split. Classes are the training split's, matched by name."""
    folder = find_split(root, train)
    _, present = list_folder(folder)
    if not present:
        raise UsageError(f"dataset.data_folder: {folder} has no class folders; it needs one sub-folder per class")
    training = os.path.join(root, "train")
    classes = list_folder(training)[1] if not train and os.path.isdir(training) else present
    paths, labels = [], []
    for name in present:
        if name not in classes:
            raise UsageError(f"dataset.data_folder: class {name} in {folder} is none of the training classes "
                             f"({', '.join(classes)})")
        files, _ = list_folder(os.path.join(folder, name))
        if not files:
            raise UsageError(f"dataset.data_folder: the class folder {os.path.join(folder, name)} has no images")
        paths += files
        labels += [classes.index(name)] * len(files)
    return paths, torch.tensor(labels), classes


@contextmanager
def open_image(path, key="dataset.data_folder", size=None):
    """A Pillow image, not yet decoded. What fails while it is open is a UsageError that names `key` and the file.

    size: where given, a JPEG may come at a lower resolution, of at least 2 `size` a side.
    """
    try:
        if not os.path.isfile(path):  # a pipe would be waited for without end
            raise ValueError("no regular file")
        with Image.open(path, formats=FORMATS) as image:
            if size and image.format == "JPEG":
                image.draft("RGB", (2 * size, 2 * size))  # decode at a lower resolution
            need = image.width * image.height // 10 ** 6 + 1
            if need > MEGAPIXELS:
                raise ValueError(f"{image.width} x {image.height}; must be below {MEGAPIXELS} megapixels")
            with one_at_a_time:  # so that no two threads with half of what they need wait for each other
                for _ in range(need):
                    megapixels_left.acquire()
            try:
                yield image
            finally:
                image.close()  # which frees its pixels
                megapixels_left.release(need)
    except UsageError:
        raise
    except Exception as e:  # a broken file makes its decoder raise almost anything
        raise UsageError(f"{key}: broken image file {path} ({first_line(e)})") from None


def decode(path, size):
    """Read an image as uint8 3 x size x size: shorter side resized to `size`, centre cropped to a square."""
    with open_image(path, size=size) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
            image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
        image = image.convert("RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class FileImages:
    """Images that stay on disk: `images[index]` decodes a batch, N x 3 x S x S uint8, in threads."""

    def __init__(self, paths, size, num_workers=4):
        self.paths, self.num_workers = paths, num_workers
        self.shape = (len(paths), 3, size, size)

    def _decode(self, path):
        return decode(path, self.shape[-1])

    def __getitem__(self, index):
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        with ThreadPoolExecutor(self.num_workers) as pool:  # Pillow decodes outside the interpreter's lock
            for out, image in zip(images, pool.map(self._decode, [self.paths[k] for k in index.tolist()])):
                out.copy_(image)
        return images


def read_files(paths, size, root):
    """Images of the folder `root`, N x 3 x size x size uint8; in memory if they need at most half of what is free."""
    need = len(paths) * 3 * size * size
    if need > available_memory() // 2:
        print(f"{len(paths)} images need {need / 2 ** 30:.1f} GiB of memory: they are read from disk in every epoch")
        return FileImages(paths, size)
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool, progress_bar(len(paths), "image", f"reading {display_path(root)}") as bar:
        for i, image in enumerate(pool.map(lambda path: decode(path, size), paths)):
            images[i] = image
            bar.update()
    return images
