"""Files that are whole or not there."""

import os
from contextlib import contextmanager

import torch

from .errors import RunError, first_line, display_path


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
