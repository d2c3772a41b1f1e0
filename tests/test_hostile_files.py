"""Files that somebody else made: each that cannot be used ends the script in one line, with little time and memory."""

import json
import os
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import PROJECT, command, tiny_project

GIB = 2 ** 30
SD = os.path.join(PROJECT, "configs", "sd15.yaml")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two classes of images and tiny.yaml, which would train on them."""
    root = tmp_path_factory.mktemp("hostile")
    tiny_project(root, 20, train_cfg={"epochs": 1})
    return root


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    """A black picture, grey, whose rows are made once and packed."""
    packer, rows = zlib.compressobj(1), bytes((width + 1) * 1000)
    data = b"".join(packer.compress(rows) for _ in range(height // 1000)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


# ---------------------------------------------------------------- images

def train(place, tmp_path, files, **options):
    """train.py, with these files in a third class: Ended."""
    folder = tmp_path / "images" / "emu"
    folder.mkdir(parents=True)
    for name, content in files.items():
        if content is None:
            os.mkfifo(folder / name)
        else:
            (folder / name).write_bytes(content)
    runs = tmp_path / "runs"
    r = command("train.py", place / "tiny.yaml", "--set", f"dataset.data_folder={tmp_path / 'images'}", "--set",
                f"output_folder={runs}", cwd=tmp_path, **options)
    assert str(folder / next(iter(files))) in r.message and "dataset.data_folder" in r.message and not runs.exists()
    return r


def test_an_eps_file_starts_no_ghostscript(place, tmp_path):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    (tmp_path / "gs").chmod(0o755)
    train(place, tmp_path, {"z.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n"},
          environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert not (tmp_path / "started").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_place_of_an_image(place, tmp_path):
    assert "no regular file" in train(place, tmp_path, {"z.png": None}, seconds=5).message


def test_images_that_unpack_to_gigabytes(place, tmp_path):
    bomb = png(13300, 13000)
    assert len(bomb) < 10 ** 6
    r = train(place, tmp_path, {f"{k}.png": bomb for k in range(5)})
    assert "13300 x 13000" in r.message and r.memory < GIB


# ---------------------------------------------------------------- sets of images to evaluate

def evaluate(place, source, **options):
    r = command("evaluate.py", source, "--config", place / "tiny.yaml", "--no-memorization", "--features", "inception",
                cwd=place, **options)
    assert os.path.basename(source) in r.message
    return r


def npz(path, header=None, size=0, change=None, **arrays):
    """An .npz file; `header` and `size` bytes of zeros are an arr_0 by hand, `change` changes what the archive lists."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as z:
        warnings.simplefilter("ignore")  # names given twice
        if header:
            with z.open("arr_0.npy", "w") as f:
                np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, **header})
                f.write(bytes(size))
        for name, array in arrays.items():
            with z.open(f"{name}.npy", "w") as f:
                np.lib.format.write_array(f, array)
        for member in z.filelist if change else ():
            change(member)
    return path


IMAGES = np.zeros((4, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("said, arrays", [
    ("damaged", dict(header={"shape": (2 ** 31, 28, 28, 1)}, size=784)),
    ("damaged", dict(header={"shape": (-1, -28, 28, 1)}, size=784)),
    ("encrypted", dict(arr_0=IMAGES, change=lambda member: setattr(member, "flag_bits", member.flag_bits | 1))),
    ("labels run from 0 to 9; must be from 0 to 1", dict(arr_0=IMAGES, labels=np.array([0, 0, 9, 1]))),
    ("images are 28 x 28, those of the data set 16 x 16", dict(arr_0=np.zeros((4, 28, 28, 3), np.uint8))),
], ids=["large", "negative", "encrypted", "labels", "size"])
def test_an_npz_file_is_refused_before_the_work(place, tmp_path, said, arrays):
    """Before the real images are measured: Inception's weights, which that needs, are not here."""
    r = evaluate(place, npz(tmp_path / "x.npz", **arrays))
    assert said in r.message and r.memory < GIB


def test_an_npz_file_that_unpacks_to_gigabytes(place, tmp_path):
    packer, block = zlib.compressobj(9, wbits=-15), bytes(2 ** 24)
    block = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)  # such blocks can be put one after the other
    n = 3 * 2 ** 30 // 784

    def change(member):
        member.compress_type, member.file_size = zipfile.ZIP_DEFLATED, 128 + n * 784

    path = tmp_path / "x.npz"
    header = np.lib.format.magic(1, 0) + struct.pack("<H", 118) + str(
        {"descr": "|u1", "fortran_order": False, "shape": (n, 28, 28, 1)}).ljust(117).encode() + b"\n"
    with zipfile.ZipFile(path, "w") as z:
        start = zlib.compressobj(9, wbits=-15)
        z.writestr("arr_0.npy", start.compress(header) + start.flush(zlib.Z_FULL_FLUSH) + block * 192 + b"\x03\x00")
        change(z.filelist[0])
    assert path.stat().st_size < 2 ** 23
    assert evaluate(place, path).memory < GIB


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_in_place_of_an_npz_file(place, tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    evaluate(place, tmp_path / "x.npz", seconds=5)


def test_a_folder_is_refused_before_the_work(place, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 17)).save(tmp_path / "b.png")
    assert "b.png is 3 x 17 x 16, but" in evaluate(place, tmp_path).message
    (tmp_path / "a.png").unlink()
    assert "images are 17 x 16, those of the data set 16 x 16" in evaluate(place, tmp_path).message


# ---------------------------------------------------------------- data sets of torchvision

def test_a_data_file_that_is_too_large(place, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03")
    os.truncate(raw / "train-images-idx3-ubyte", 3 * GIB // 2)
    r = command("train.py", place / "tiny.yaml", "--set", "dataset.name=FashionMNIST", "--set", "dataset.img_size=28",
                "--set", f"dataset.data_folder={tmp_path}", cwd=tmp_path)
    assert "dataset.data_folder" in r.message and "train-images-idx3-ubyte" in r.message and r.memory < GIB


# ---------------------------------------------------------------- files of Stable Diffusion

def draw(path, content=None):
    """txt2img.py with this file: its one line."""
    if content is not None:
        path.write_bytes(content)
    r = command("txt2img.py", SD, "--ckpt", path, "--prompt", "x", "--device", "cpu", cwd=path.parent)
    assert str(path) in r.message and os.listdir(path.parent) == [path.name] and r.memory < GIB
    return r.message


def safetensors(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content, said", [
    (safetensors({"a": {**A, "shape": [0, 2 ** 63], "data_offsets": [0, 0]}}, b""), "damaged"),
    (safetensors({"a": {**A, "shape": [-1, -2]}}), "damaged"),
    (safetensors({"a": A, "b": A}), "damaged"),
    (safetensors(b'{"a":' + b"[" * 100_000), "damaged"),
    (safetensors(b'{"a":[' + b"{}," * 4_000_000 + b"{}]}"), "its header should have 12,000,010 bytes"),
    (b"", "it is empty"),
], ids=["overflow", "negative", "overlap", "deep", "large header", "empty"])
def test_safetensors(tmp_path, content, said):
    assert said in draw(tmp_path / "x.safetensors", content)


def test_inverted_bytes_in_a_ckpt(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"betas": torch.arange(10_000.0)}}, path)
    content = bytearray(path.read_bytes())
    content[20_000:20_020] = bytes(255 - x for x in content[20_000:20_020])
    assert "checksum" in draw(path, bytes(content))


def test_a_compressed_ckpt(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"betas": torch.zeros(2 ** 20)}}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name in plain.namelist():
            z.writestr(name, plain.read(name))
    (tmp_path / "plain").unlink()
    assert "does not compress" in draw(path)
