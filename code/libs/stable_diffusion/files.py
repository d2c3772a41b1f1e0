"""Tensors in .safetensors files (github.com/huggingface/safetensors) and .ckpt files (torch.save). No code is run.

Both are mapped into memory: a tensor's bytes are read from the disk when they are used, and are not copied.
"""

import json
import mmap
import os
import re
import warnings
import zipfile
from collections import OrderedDict

import torch

from ..common.errors import UsageError, first_line
from ..common.files import atomic_file

# names of the .safetensors format, as far as this torch has the types
DTYPES = {name: getattr(torch, attribute) for name, attribute in (
    ("F64", "float64"), ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("F8_E4M3", "float8_e4m3fn"),
    ("F8_E5M2", "float8_e5m2"), ("I64", "int64"), ("I32", "int32"), ("I16", "int16"), ("I8", "int8"),
    ("U8", "uint8"), ("BOOL", "bool")) if hasattr(torch, attribute)}


def read_tensors(path):
    """{name: tensor} of a .safetensors or .ckpt file; tells them apart by their bytes.

    Raises UsageError when the file is missing, cut off, damaged, something else, or holds code.
    """
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint: no file {path}")
    with open(path, "rb") as f:
        start = f.read(9)
    if len(start) == 9 and start[8:] == b"{":  # a length of eight bytes, then JSON
        return read_safetensors(path)
    return read_ckpt(path)


# ---- .safetensors: the header's length (8 bytes, little endian), the header (JSON), the tensors' bytes

def read_safetensors(path):
    """{name: tensor}, each a view of the mapped file; see `aligned`."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError(f"its header should have {length:,} bytes")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            data = 8 + length
            wanted = data + _check_header(header)
            if size != wanted:
                raise ValueError(f"it has {size:,} bytes of {wanted:,}; fetch it again")
            # copy on write: nothing that happens to a tensor reaches the file
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:  # the header may hold anything
        raise UsageError(f"checkpoint {path} is damaged or no .safetensors file: {first_line(e)}") from None
    tensors = {}
    for name, entry in header.items():
        dtype, begin, end = DTYPES[entry["dtype"]], *entry["data_offsets"]
        if begin == end:
            tensor = torch.empty(0, dtype=dtype)
        else:
            tensor = torch.frombuffer(mapped, dtype=torch.uint8, count=end - begin, offset=data + begin).view(dtype)
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def aligned(tensor):
    """The tensor; a copy where its address is no multiple of its type's size. In old files the header may have any
    length, and shifts what follows."""
    if tensor.data_ptr() % tensor.dtype.itemsize == 0:
        return tensor
    return tensor.reshape(-1).view(torch.uint8).clone().view(tensor.dtype).reshape(tensor.shape)


def _check_header(header):
    """Bytes of all tensors, which must lie one after the other. ValueError, KeyError or TypeError if not."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} has the unknown type {entry['dtype']}")
        bytes_ = DTYPES[entry["dtype"]].itemsize
        for n in entry["shape"]:
            if not isinstance(n, int) or n < 0:
                raise ValueError(f"{name} has the shape {entry['shape']}")
            bytes_ *= n
        if entry["data_offsets"] != [end, end + bytes_]:
            raise ValueError(f"{name} is not where it should be")
        end += bytes_
    return end


def write_safetensors(path, specs, make, metadata=None):
    """Write a file tensor by tensor, whole or not at all (RunError); only one is in memory at a time.

    specs: {name: (dtype, shape)}; make(name) -> the tensor; metadata: {text: text}.
    """
    names, header, end = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": metadata or {}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in specs.items():
            tensor = make(name).detach().to("cpu", dtype).contiguous()
            assert tensor.shape == torch.Size(shape), name
            f.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


# ---- .ckpt: a pickle

class Inert:
    """In place of a class that old files mention beside the weights: takes everything, does and keeps nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


# for what PyTorch Lightning wrote into the files of 2022: its callbacks' state, with NumPy's numbers, and settings
STAND_INS = [
    (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (Inert, "numpy.core.multiarray.scalar"), (Inert, "numpy._core.multiarray.scalar"), (Inert, "numpy.dtype"),
]


def read_ckpt(path):
    """{name: tensor} of a file of torch.save, less everything in it that is no tensor."""
    try:
        with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the format before torch 1.6 is no zip file and cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged file makes torch raise almost anything
        found = re.search(r"GLOBAL (\S+)", str(e))
        if found:
            raise UsageError(f"checkpoint {path} holds {found[1]}, which could run code, so it is refused; take the "
                             ".safetensors file of this model") from None
        found = re.search(r"WeightsUnpickler error: (.+)", str(e))  # else hidden behind torch's advice
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: {found[1] if found else first_line(e)}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise UsageError(f"checkpoint {path} holds no tensors by name")
    return {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
