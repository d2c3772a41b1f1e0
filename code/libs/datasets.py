"""Data sets: images as one uint8 tensor, turned into float batches with no Python work per image."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets as tv

from .common.errors import RunError, UsageError, first_line
from .common.memory import fits, send
from .common.seeds import seeded_generator
from .config import KNOWN
from .data.folders import read_files, scan_folder
from .data.mnist import fetch_mnist

# numbers of training and of test images
SIZES = {"MNIST": (60000, 10000), "FashionMNIST": (60000, 10000), "CIFAR10": (50000, 10000)}
FOLDERS = ("AFHQ", "MiniImageNet", "ImageFolder")
# the handout sends these through the autoencoder, whose own range is [0, 1]
RANGE_01 = ("AFHQ", "MiniImageNet")


class ImageDataset(Dataset):
    """Images and labels; items are `(image C x H x W float, label int)`.

    Args:
        images: N x C x S x S, uint8: a tensor, or an object that is indexed like one (`FileImages`).
        labels: N, long.
        classes: names of the classes.
        img_size: side of the square that is cut out; random when `augment`, else the centre.
        augment: random crop, and with `flip` a random flip.
        value_range: (low, high) of the floats.
    """

    encoded = False  # images, not latents: see LatentDataset

    def __init__(self, images, labels, classes, img_size=None, augment=False, flip=False, value_range=(-1.0, 1.0)):
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.img_size = img_size or images.shape[-1]
        self.augment, self.flip, self.value_range = augment, flip, value_range
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise UsageError(f"labels run from {int(labels.min())} to {int(labels.max())}, "
                             f"but there are {len(self.classes)} classes")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        images, labels = self.batch(torch.tensor([range(len(self))[i]]))
        return images[0], int(labels[0])

    @property
    def img_shape(self):
        return (self.images.shape[1], self.img_size, self.img_size)

    def to(self, device):
        """Move images in memory to `device`, if they need at most half of what is free there: batches are then made there."""
        if isinstance(self.images, torch.Tensor) and self.images.device != torch.device(device):
            if fits(self.images.nbytes, device, f"{len(self)} images"):
                self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def batch(self, index, generator=None, part=slice(None)):
        """Items `index` (long, CPU) as `(images B x C x H x W float, labels B)`, where the data lives.

        generator: a CPU generator for crop and flip; None takes torch's global one.
        part: only this slice of the batch, cropped and flipped as in the whole of it.
        """
        corner, mirrored = self.draw_view(len(index), generator)
        index = send(index[part], self.labels.device)
        return self.view(self.images[index], corner[:, part], mirrored[part]), self.labels[index]

    def draw_view(self, n, generator=None):
        """Crops and flips of n images: top left corners (2 x n: row, column) and whether each is mirrored (n)."""
        margin = self.images.shape[-1] - self.img_size
        corner, mirrored = torch.full((2, n), margin // 2), torch.zeros(n, dtype=torch.bool)
        if self.augment and margin:
            corner = torch.randint(0, margin + 1, (2, n), generator=generator)
        if self.augment and self.flip:
            mirrored = torch.rand(n, generator=generator) < 0.5
        return corner, mirrored

    def view(self, x, corner, mirrored):
        """Crop and flip stored images, uint8 B x C x S x S, to B x C x img_size x img_size, floats in `value_range`."""
        if x.shape[-1] != self.img_size:
            side = torch.arange(self.img_size, device=x.device)
            rows, cols = send(corner, x.device)[:, :, None] + side  # each B x img_size
            i = torch.arange(len(x), device=x.device)[:, None, None]
            # channels last for the gather, then back
            x = x.permute(0, 2, 3, 1)[i, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        if mirrored.any():  # on the CPU, so that no GPU is waited for
            x = torch.where(send(mirrored, x.device)[:, None, None, None], x.flip(-1), x)
        low, high = self.value_range
        return x.float() * ((high - low) / 255) + low


class RandomViews:
    """One crop and flip of each image, as in training but always the same; indexed like a uint8 tensor, for ImageSet."""

    def __init__(self, dataset, name):
        self.dataset, self.shape = dataset, (len(dataset), *dataset.img_shape)
        dataset.augment = True
        self.corner, self.mirrored = dataset.draw_view(len(dataset), seeded_generator("views", name))

    def __getitem__(self, index):
        return self.dataset.view(self.dataset.images[index], self.corner[:, index], self.mirrored[index]).byte()


class BatchLoader:
    """Batches of an ImageDataset in an order that is a function of (seed, epoch) alone.

    Every epoch has `len(loader)` full batches and leaves out the images that do not fill another.
    share: function of the batch size that returns the slice of each batch for this process; None: the whole batch.
    """

    def __init__(self, dataset, batch_size, seed=0, share=None):
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.seed = seed
        self.part = share(self.batch_size) if share else slice(None)
        self.next_epoch = 0

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def epoch(self, epoch, start=0):
        """The batches of one epoch, from batch number `start` on."""
        order = torch.randperm(len(self.dataset), generator=seeded_generator(self.seed, "order", epoch))
        for k in range(start, len(self)):
            index = order[k * self.batch_size:(k + 1) * self.batch_size]
            yield self.dataset.batch(index, seeded_generator(self.seed, "augment", epoch, k), self.part)

    def __iter__(self):
        self.next_epoch += 1
        return self.epoch(self.next_epoch - 1)


def build_dataloader(dataset, batch_size, num_workers=0, seed=0, share=None):
    """Batches `(images B x C x H x W, labels B)` of a data set from `build_dataset`, shuffled anew each epoch.

    num_workers: threads that decode image files, for a data set too large for memory.
    share: see BatchLoader.
    """
    if not isinstance(dataset, ImageDataset):  # any other data set of torch's kind
        return DataLoader(dataset, batch_size, shuffle=True, num_workers=num_workers, drop_last=True)
    if hasattr(dataset.images, "num_workers"):
        dataset.images.num_workers = max(num_workers, 1)
    return BatchLoader(dataset, batch_size, seed, share)


def describe_dataset(name, split, data_folder, limit=None):
    """(number of classes, number of images) without reading or downloading an image; see `build_dataset`."""
    if name in FOLDERS:
        paths, _, classes = scan_folder(data_folder, split == "train")
        num_classes, n = len(classes), len(paths)
    else:
        num_classes, n = KNOWN[name][1], SIZES[name][split != "train"]
    return num_classes, min(n, limit or n)


def build_dataset(name, split, data_folder, img_size=None, value_range=None, limit=None, stored_size=None):
    """Load a data set by name.

    Args:
        name: a key of `config.KNOWN`. "ImageFolder" is any tree of one folder per class.
        split: "train" (random crop and flip for photographs) or "test" (centre crop); "val" means "test".
        data_folder: where it is, or where MNIST, FashionMNIST and CIFAR10 are downloaded to. Photographs are in one
            folder per class, below train/ and test/ (or val/), or directly, which serves for any split.
        img_size: side of the square images; None keeps the data's own, 128 for photographs.
        value_range: (low, high) of the pixels; None is (-1, 1), or (0, 1) for AFHQ and MiniImageNet.
        limit: at most this many images, spread evenly over the set; None: all.
        stored_size: side at which photographs are held; None is 9/8 of img_size, which leaves room for random crops.

    Returns:
        (dataset, num_classes, img_shape); items are (image C x H x W float, label int).

    Raises:
        UsageError: unknown name or split; a folder that is missing, empty or holds a broken image.
        RunError: a download failed.
    """
    if name not in KNOWN:
        raise UsageError(f"dataset.name: unknown {name!r}; it is one of {', '.join(KNOWN)}")
    if split not in ("train", "test", "val"):
        raise UsageError(f"dataset.split: unknown {split!r}; it is 'train' or 'test'")
    train = split == "train"
    if value_range is None:
        value_range = (0.0, 1.0) if name in RANGE_01 else (-1.0, 1.0)
    if name in FOLDERS:
        images, labels, classes = scan_folder(data_folder, train)  # paths so far
    else:
        images, labels, classes = _load_torchvision(name, train, data_folder)
    if limit and limit < len(labels):
        chosen = torch.linspace(0, len(labels) - 1, limit).long()
        images = [images[i] for i in chosen.tolist()] if name in FOLDERS else images[chosen]
        labels = labels[chosen]
    size = img_size or KNOWN[name][0][-1]
    if name in FOLDERS:
        images = read_files(images, stored_size or size * 9 // 8, data_folder)
    elif size != images.shape[-1]:
        images = _resize(images, size)
    flip = name in FOLDERS or name == "CIFAR10"  # a mirrored digit is another one
    dataset = ImageDataset(images, labels, classes, size, train, flip, tuple(map(float, value_range)))
    return dataset, len(dataset.classes), dataset.img_shape


def _load_torchvision(name, train, root):
    """A data set of torchvision's as (uint8 N x C x S x S, labels, class names); downloads what is missing."""
    folder = Path(root, "cifar-10-batches-py" if name == "CIFAR10" else f"{name}/raw")
    try:
        for path in folder.glob("*"):  # torchvision reads all of a file, and waits for a pipe without end
            if not path.is_dir() and (not path.is_file() or path.stat().st_size > 10 ** 8):
                raise ValueError(f"{path.relative_to(root)} is none of its files; delete it")
        if name == "MNIST":
            fetch_mnist(root)
        data = getattr(tv, name)(root, train=train, download=True)
    except RunError:
        raise
    except Exception as e:  # no network, no permission, a full disk; a damaged file makes its reader raise anything
        raise RunError(f"dataset.data_folder: cannot get {name} into {root} ({first_line(e)})") from None
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    classes = [name.split(" - ")[0] for name in data.classes]  # "7 - seven": the class of sevens is called 7
    labels = torch.as_tensor(data.targets, dtype=torch.long)
    if images.shape[1:] != KNOWN[name][0] or labels.shape != images.shape[:1]:
        raise RunError(f"dataset.data_folder: images {tuple(images.shape)} and labels {tuple(labels.shape)} are not "
                       f"{name}; delete {folder}")
    return images, labels, classes


def _resize(images, size):
    """uint8 N x C x S x S -> N x C x size x size, a thousand at a time to save memory."""
    parts = [F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
             .round().clamp(0, 255).byte() for part in images.split(1000)]
    return torch.cat(parts)
