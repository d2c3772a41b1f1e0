"""Files that are whole or not there, and tensors in files: one way to write them, one to read them."""

import mmap
import os
import pickle
import warnings
import zipfile
from contextlib import contextmanager

import torch

from .errors import RunError, UsageError, first_line, display_path, shown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def atomic_file(path):
    """A binary file to write, which gets its name when it is whole. RunError where that is impossible."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        try:
            with open(partial, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())  # on the disk before it gets its name
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)
    except OSError as e:
        raise RunError(f"cannot write {display_path(path)}: {first_line(e)}") from None


def save_tensors(state, f):
    """torch.save that reports a full disk as what it is, an OSError; torch makes a RuntimeError of it."""
    try:
        torch.save(state, f)
    except RuntimeError as e:
        raise (e.__context__ if isinstance(e.__context__, OSError) else OSError(first_line(e))) from None


def check_archive(path):
    """Raise ValueError where a file of torch.save is damaged, or would unpack to more bytes than it has.

    By the checksums in it, about a second for each GB. The format before torch 1.6 is no zip file, and is not checked.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as z:
            size = sum(member.file_size for member in z.infolist())
            if size > os.path.getsize(path) or any(member.compress_type for member in z.infolist()):
                raise ValueError(f"it would unpack to {size:,} bytes, and torch.save does not compress")
            if z.testzip():
                raise ValueError("wrong checksum; download it again")


def read_tensors(path):
    """What torch.save wrote, on the CPU. Runs no code, and takes no more memory than a few times the file's size.

    Raises pickle.UnpicklingError for a file that holds more than tensors and plain values, and almost anything for one
    that is damaged (every byte of a zip file is checked against its checksums) or something else.
    """
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"\nbytearray\n") >= 0:  # the one call with a size that torch lets a file make
            raise pickle.UnpicklingError("bytearray")
    check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that nobody here makes
        return torch.load(path, map_location="cpu", weights_only=True)


def matches(value, own):
    """Whether something from a file is a dense tensor on the CPU that can be copied into the tensor `own`."""
    return (isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided
            and not value.is_nested and value.shape == own.shape
            and (value.dtype in FLOATS if own.is_floating_point() else value.dtype == own.dtype))


@torch.no_grad()
def load_tensors(own, state, source):
    """Copy a dict of tensors from a file into `own`, such as a model's state_dict.

    Raises UsageError unless names, shapes and kinds agree and all is finite.
    """
    state = state if isinstance(state, dict) else {}
    differ = [k for k in own if not matches(state.get(k), own[k])] + [k for k in state if k not in own]
    if differ:
        raise UsageError(f"{source} is of another architecture: {len(differ)} tensors differ, first {shown(differ[0])}")
    for name, tensor in own.items():
        if not tensor.copy_(state[name]).isfinite().all():
            raise UsageError(f"{source}: {name} is not finite")
