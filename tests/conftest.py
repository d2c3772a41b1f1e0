"""What all tests share: `code/` on the path, one thread, the real data where the environment names them."""

import gc
import gzip
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

# the networks of the tests are tiny, and threads would wait for each other; inherited by processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(20_000)  # each collection walks through all that was imported: fewer of them

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))


@pytest.fixture(scope="session")
def real_data():
    """The folder in REAL_DATA (read only; holds mnist/MNIST/raw), or skip."""
    folder = os.environ.get("REAL_DATA")
    if not folder:
        pytest.skip("REAL_DATA is not set: the folder that holds mnist/MNIST/raw")
    return folder


@pytest.fixture(scope="session")
def mnist_folder(real_data, tmp_path_factory):
    """A folder with MNIST that can be written to, unpacked."""
    raw = tmp_path_factory.mktemp("mnist") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in Path(real_data, "mnist", "MNIST", "raw").glob("*.gz"):
        shutil.copyfile(path, raw / path.name)
        with gzip.open(path) as packed, open(raw / path.stem, "wb") as f:
            shutil.copyfileobj(packed, f)
    return str(raw.parent.parent)


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch  # here, so that the process that hands out the tests does not wait for it

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Training scripts install handlers of their own: without this, Ctrl-C would not stop the tests any more."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def open_clip():
    """Skip where the package is missing that has CLIP's list of words. It is not imported, which takes seconds."""
    if not find_spec("open_clip"):
        pytest.skip("see requirements-extra.txt")


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="see requirements-extra.txt")
