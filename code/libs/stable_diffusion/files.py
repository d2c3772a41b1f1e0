"""Read .safetensors files (github.com/huggingface/safetensors) and .ckpt files (torch.save) without running code.

Both are mapped into memory: a tensor's bytes are read from the disk when they are used.
"""

import json
import math
import mmap
import os
import re
import warnings
import zipfile
from collections import OrderedDict

import torch

from ..common.errors import UsageError, first_line
from ..common.files import check_archive

# the .safetensors format's names
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def check_exists(path):
    """Raise UsageError unless `path` is a file."""
    if os.path.isdir(path):
        raise UsageError(f"checkpoint: {path} is a folder (diffusers' layout is not supported); it must be one file, "
                         ".safetensors or .ckpt, such as v1-5-pruned-emaonly.safetensors")
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint: no file {path}")


def read_tensors(path):
    """{name: tensor} of a .safetensors or .ckpt file; the first bytes tell which it is.

    Raises UsageError when the file is missing, incomplete, damaged, something else, or holds code.
    """
    check_exists(path)
    with open(path, "rb") as f:
        start = f.read(9)
    if start[8:] == b"{":  # a length of eight bytes, then JSON
        return read_safetensors(path)
    return read_ckpt(path)


def read_safetensors(path):
    """{name: tensor}, views of the mapped file.

    The file is the header's length (8 bytes, little endian), the header (JSON), then the tensors' bytes.
    """
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as f:
            start = 8 + int.from_bytes(f.read(8), "little")
            if start > min(size, 10_000_000):  # a damaged length; Stable Diffusion's headers have 130 kB
                raise ValueError(f"its header should have {start - 8:,} bytes")
            header = json.loads(f.read(start - 8))
            # copy on write: nothing that happens to a tensor reaches the file
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        header.pop("__metadata__", None)
        end = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            if entry["data_offsets"][0] != end:
                raise ValueError("its tensors do not lie one after the other")
            end = entry["data_offsets"][1]
        if size < start + end:
            raise ValueError(f"it has {size:,} bytes of {start + end:,}; download it again")
        return {name: _view(mapped, start, entry) for name, entry in header.items()}
    except Exception as e:  # the header may hold anything
        raise UsageError(f"checkpoint {path} is damaged or no .safetensors file: {first_line(e)}") from None


def _view(mapped, start, entry):
    """A tensor of the mapped file, whose tensors begin at byte `start`."""
    dtype, count, (begin, end) = DTYPES[entry["dtype"]], math.prod(entry["shape"]), entry["data_offsets"]
    if min(entry["shape"], default=0) < 0 or end - begin != count * dtype.itemsize:
        raise ValueError(f"{entry['dtype']} of shape {entry['shape']} does not fill bytes {begin} to {end}")
    if begin == end:
        return torch.empty(entry["shape"], dtype=dtype)
    tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin)
    if (start + begin) % dtype.itemsize:
        tensor = tensor.clone()  # in old files the header may have any length, so the tensors are not aligned
    return tensor.reshape(entry["shape"])


class Inert:
    """Replaces a class that old files mention beside the weights: accepts everything, does and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# PyTorch Lightning wrote its callbacks' state, with NumPy numbers, and its settings into the files of 2022
STAND_INS = [
    (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (Inert, "numpy.core.multiarray.scalar"), (Inert, "numpy._core.multiarray.scalar"), (Inert, "numpy.dtype"),
]


def read_ckpt(path):
    """{name: tensor} of a file of torch.save, checked by common.files.check_archive; everything else is left out."""
    try:
        if not os.path.getsize(path):
            raise ValueError("it is empty; download it again")
        check_archive(path)
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the format before torch 1.6 is no zip file and cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged file makes torch raise almost anything
        code = re.search(r"GLOBAL (\S+)", str(e))
        if code:
            raise UsageError(f"checkpoint {path} holds {code[1]}, which could run code, so it is refused; take the "
                             ".safetensors file of this model") from None
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint "
                         f"({first_line(e) if type(e) is ValueError else type(e).__name__})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = state if isinstance(state, dict) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)
               and value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested}
    if not tensors:
        raise UsageError(f"checkpoint {path} holds no tensors by name")
    return tensors
