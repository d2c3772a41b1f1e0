"""Image folders: one sub-folder per class, JPEG or PNG or whatever Pillow reads."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ..common.errors import UsageError, display_path, first_line
from ..common.memory import available_memory

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


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


def class_names(folder):
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def scan_folder(root, train):
    """(paths, labels, class names) of one split. Classes are the training split's, matched by name."""
    folder = find_split(root, train)
    present = class_names(folder)
    if not present:
        raise UsageError(f"dataset.data_folder: {folder} has no class folders; it needs one sub-folder per class")
    training = os.path.join(root, "train")
    classes = class_names(training) if not train and os.path.isdir(training) else present
    paths, labels = [], []
    for name in present:
        if name not in classes:
            raise UsageError(f"dataset.data_folder: class {name} in {folder} is none of the training classes "
                             f"({', '.join(classes)})")
        files = sorted(f for f in os.listdir(os.path.join(folder, name)) if f.lower().endswith(EXTENSIONS)
                       and not f.startswith("."))  # such as ._0001.jpg, which macOS puts beside 0001.jpg
        if not files:
            raise UsageError(f"dataset.data_folder: the class folder {os.path.join(folder, name)} has no images")
        paths += [os.path.join(folder, name, f) for f in files]
        labels += [classes.index(name)] * len(files)
    return paths, torch.tensor(labels), classes


def decode(path, size):
    """Read an image as uint8 3 x size x size: shorter side resized to `size`, centre cropped to a square."""
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                image.draft("RGB", (2 * size, 2 * size))  # decode at a lower resolution where that is enough
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
                image = Image.fromarray(np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8))
            image = image.convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    except Exception as e:  # a broken file makes its decoder raise almost anything
        raise UsageError(f"dataset.data_folder: broken image file {path} ({first_line(e)})") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class FileImages:
    """Images that stay on disk: `images[index]` decodes a batch, N x 3 x S x S uint8, in threads."""

    def __init__(self, paths, size, num_workers=4):
        self.paths, self.num_workers = paths, num_workers
        self.shape = (len(paths), 3, size, size)

    def __getitem__(self, index):
        with ThreadPoolExecutor(self.num_workers) as pool:  # Pillow decodes outside the interpreter's lock
            return torch.stack(list(pool.map(lambda i: decode(self.paths[i], self.shape[-1]), index.tolist())))


def read_files(paths, size, root):
    """Images of the folder `root`, N x 3 x size x size uint8; in memory if they need at most half of what is free."""
    need = len(paths) * 3 * size * size
    if need > available_memory() // 2:
        print(f"{len(paths)} images need {need / 2 ** 30:.1f} GiB of memory: they are read from disk in every epoch")
        return FileImages(paths, size)
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda path: decode(path, size), paths)
        bar = tqdm(decoded, total=len(paths), desc=f"reading {display_path(root)}", unit="image",
                   disable=None, mininterval=0.5)
        for i, image in enumerate(bar):
            images[i] = image
    return images
