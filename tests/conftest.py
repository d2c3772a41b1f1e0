"""What all tests share: `code/` on the path, and the real data where the environment says it is."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "code"))


@pytest.fixture(scope="session")
def real_data():
    """The folder in REAL_DATA (read only; holds mnist/MNIST/raw), or skip."""
    folder = os.environ.get("REAL_DATA")
    if not folder:
        pytest.skip("REAL_DATA is not set: the folder that holds mnist/MNIST/raw")
    return folder


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="see requirements-extra.txt")
