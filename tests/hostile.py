"""Hostile values, tensors, bytes, images and arrays for fuzz.py, each drawn from a random.Random."""

import io
import json
import math
import struct
import zipfile
import zlib
from collections import Counter

import numpy as np
import torch
from PIL import Image

HUGE = [10 ** 9, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 10 ** 12, 2 ** 53, 2 ** 63 - 1, 2 ** 63, 2 ** 64, 10 ** 30, -2 ** 63,
        -10 ** 9]
SMALL = [0, 1, 2, 3, 4, 5, 7, 8, 10, 12, 16, 17, 24, 32, -1, -2, 0.5, 0.1, 1e-3, 1.5, True]
NUMBERS = ["nan", "inf", "-inf", "1e400", "-1e400", "1e-400", "-0.0", "1e10", "1e30", "-1", "0", "1.5", "٣", "1_0",
           "0x10", "1e1",
           " 2", "+2", "9" * 5000]
WORDS = ("DDPM EDM MNIST FashionMNIST CIFAR10 AFHQ MiniImageNet ImageFolder train test val ddpm ddim heun euler "
         "dpmpp_2m euler_ancestral cosine linear quadratic uniform eps v x0 adamw muon auto bf16 fp16 fp32 cuda:0 "
         "cuda:99 cpu mps meta xpu constant classifier inception autoencoder ema plain kl taesd cat dog").split()
TEXTS = ["", " ", "x", "-", "--", "-x", "--help", "\n", "a\nb.png", "a\rb", "\x1b[31mred", "é.png", "\u202ea.npz",
         "😀.json", "\udcff.png", "%s%d{0}", "${HOME}", "~", "~nobody/x", "~nosuchuser/x", ".", "..", "/proc",
         "a" * 300 + ".png", "a/" * 3000, "x" * 100_000, "images", "tiny.yaml", "run", "loop", "fifo", "nowhere",
         "empty", "new/", "s.png", "s.npz", "s.gif", "s.json", "good.npz", "no/such/folder/x.png", "/proc/self/mem",
         "/proc/nowhere/x.png", "*", ",", ":", "=", "a=b", "a=", "=b", "0,1", "1,99", "1,,2", "0,-1", "2,1", "nan,nan",
         "inf,-inf", "ddim:2", "ddim:", ":2", "heun:2,", "ddim:99999999999999999999", "heun:2 eta=1",
         "heun:2 S_churn=nan", "ddim:2,ddim:2", "dpmpp_2m:3 guidance_scale=2", "DDPM=ddim:2", "run/epoch_000.pth.tar",
         "run/model_final.pth.tar", "run/logs", "run/config.txt", "samplers.json"]
DEVICES = {"null": 3, "zero": 5, "full": 7}  # name in a case's folder -> its number
YAML = ["null", "~", "true", "no", "''", "[]", "{}", "[1, [2]]", "[1, 2, 3]", "[0]", "[-1]", "[0.5]", "[null]",
        "{a: 1}", "{1: 2}", "2020-01-01", "2020-99-99", "!!python/object/apply:os.system [id]", "!!binary aGk=",
        "!!binary é", "!!set {a}", "0o17", "1:30", "*a", "&a [*a]", "&a {b: *a}", "é", "'", "[" * 3000, "{a: " * 2000,
        "9" * 5000, "@x", "`", "%", "\t", "<<: 1", "{<<: [1]}", "? a", "- 1", "a: b: c", "--- 1", "\x07", "\ud800",
        "!!int x", "!!float x", "!!timestamp x", "!!omap [1]", "!!str", "! x", "'\\x'", '"\\ud800"', '"\\x00"', "|",
        ">", "[.nan, .inf]", ".nan", "-.inf", "0b2", "1e1000", "[1e9, 1e9]", "[8, 99999999999]"]

KEYS = ["x", "", ".", "model", "model.", ".dim", "model.dim.x", "model.x", "model.unet", "a" * 9999, "é", "1", "a.b.c",
        ".".join("a" * 3000), "\x1b[31m"]
_BOMB = "b: &b [x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("bcdefgh", "cdefghi"))
YAML_LINES = ["\n---\na: 1\n", "? [1]\n: 2\n", "model: {dim: 8}\n", "<<: {seed: 1}\n", "seed: &a [*a]\n", "\t\n", "\0",
              "\ufeff", "%YAML 9.9\n---\n", "x: " + "[" * 3000, _BOMB, _BOMB + "seed: *i\n", _BOMB + "seed: {<<: *i}\n",
              _BOMB + "*i : 1\n"]


def number(rng):
    return rng.choice(rng.choice([HUGE, SMALL, SMALL]))


def word(rng, names=()):
    """An argument of a command line."""
    return str(rng.choice(rng.choice([HUGE, SMALL, NUMBERS, WORDS, TEXTS, TEXTS, list(DEVICES), names or WORDS])))


def tensor(rng, like=None):
    like = torch.randn(3, 4) if like is None or like.numel() > 10 ** 6 else like
    floats = like.detach().float() if not like.is_complex() else like
    with torch.no_grad():
        return rng.choice([
            lambda: like.flatten()[:rng.randint(0, max(like.numel() - 1, 0))], lambda: like[None],
            lambda: like.flatten(), lambda: like.transpose(0, -1),
            lambda: like.expand(rng.choice([1, 2, 10 ** 6, 10 ** 12]), *like.shape),
            lambda: torch.zeros(1).expand(rng.choice([10 ** 6, 10 ** 9, 2 ** 40])),
            lambda: torch.zeros(()).expand(like.shape),
            lambda: torch.full_like(floats, rng.choice([math.nan, math.inf, -math.inf, 3e38, 1e-45, 0])),
            lambda: floats * rng.choice([1e10, 1e30, -1, 1e-30]),
            lambda: torch.where(torch.rand(like.shape) < .1, math.nan, floats),
            lambda: floats.to(rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                          torch.complex64, torch.int64, torch.int8, torch.uint8, torch.bool,
                                          torch.uint16])),
            lambda: floats.to_sparse(), lambda: floats.reshape(1, -1).to_sparse_csr(), lambda: floats.to("meta"),
            lambda: torch.quantize_per_tensor(floats, 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([floats, floats]), lambda: torch.nn.Parameter(floats),
            lambda: torch.empty(0), lambda: torch.tensor(number(rng)), lambda: floats.to_mkldnn(),
            lambda: torch.stack([like, like], -1)[..., 0], lambda: torch._neg_view(floats),
            lambda: torch.randn(8, 3, 3, 3),
        ])()


def value(rng, like=None):
    """Something that does not belong into a checkpoint at that place."""
    if isinstance(like, torch.Tensor) and rng.random() < 0.75:
        return tensor(rng, like)
    if isinstance(like, (int, float)) and rng.random() < 0.5:
        return number(rng)
    deep = [1]
    for _ in range(rng.choice([1, 5, 200])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice([
        None, True, number(rng), float("nan"), math.inf, 1e308, rng.choice(TEXTS), rng.choice(WORDS), [], {}, (), [1],
        {"a": 1}, {1: 2}, {None: None}, b"x", 1j, deep, torch.Size([1, 2]), torch.float32, torch.device("cpu"),
        torch.device("meta"), tensor(rng), {"a": tensor(rng)}, [like], {"x": like}, (like,), 10 ** 400, "9" * 100_000,
        set(), Counter(), [like] * 3, list(range(1000))])


def mutate(rng, state):
    """Change one place of nested dicts and lists; returns what was done, in words."""
    node, key, path = {"": state}, "", []
    while True:
        inner = node[key]
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        if not len(keys) or path and rng.random() < 0.2:
            break
        node, key = inner, rng.choice(list(keys))
        path.append(str(key)[:40])
    place = ".".join(path)
    if not path:
        return "nothing"
    action = rng.choice(["value", "value", "value", "delete", "rename", "swap", "add"])
    if action == "delete":
        del node[key]
    elif action in ("rename", "add") and isinstance(node, dict):
        new = rng.choice(["x", 0, 1, -1, None, 10 ** 30, True, 1.5, (1, 2), "", str(key) + "x", "é\n", b"x"])
        node[new] = node.pop(key) if action == "rename" else value(rng, node[key])
        place += f" {new!r}"
    elif action == "swap" and len(node) > 1:
        other = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node[key], node[other] = node[other], node[key]
        place += f" {other}"
    else:
        node[key] = value(rng, node[key])
        place += f" = {str(node[key])[:40]!r}"
    return f"{action} {place}"


# ---- bytes

def damage(rng, data):
    """Change bytes; of a zip archive perhaps its members, with the right checksums."""
    data = bytearray(data)
    if data[:2] == b"PK" and rng.random() < 0.6:
        with_members = _rezip(rng, bytes(data))
        if with_members:
            return with_members
    size, at = len(data), rng.randrange(len(data) + 1)
    if rng.random() < 0.5:  # headers and ends matter more
        at = min(size, rng.choice([rng.randrange(64), max(size - rng.randrange(1, 200), 0)]))
    n = rng.choice([1, 1, 2, 4, 16, 100, 5000])
    action = rng.choice(["flip", "flip", "cut", "insert", "delete", "zero", "repeat", "integer", "junk", "empty"])
    if action == "flip":
        for _ in range(min(n, 20)):
            if size:
                data[(at + rng.randrange(n)) % size] ^= 1 << rng.randrange(8)
    elif action == "cut":
        del data[at:]
    elif action == "insert":
        data[at:at] = rng.randbytes(n)
    elif action == "delete":
        del data[at:at + n]
    elif action == "zero":
        data[at:at + n] = bytes(len(data[at:at + n]))
    elif action == "repeat":
        data[at:at] = data[at:at + n] * rng.choice([1, 3, 100])
    elif action == "integer":
        data[at:at + 4] = rng.choice([b"\xff" * 4, b"\x7f" + b"\xff" * 3, bytes(4), b"\0\0\1\0", b"\xff" * 3 + b"\x7f",
                                      b"9999"])
    else:
        data = bytearray(rng.randbytes(n) if action == "junk" else b"")
    return bytes(data)


def _rezip(rng, data):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as z:
            members = [(name, z.read(name)) for name in z.namelist()]
    except Exception:
        return None
    k, out = rng.randrange(len(members)), io.BytesIO()
    if rng.random() < 0.4:  # the pickle, or a header, above all
        k = next((i for i, (name, _) in enumerate(members) if name.endswith((".pkl", ".npy"))), k)
    name, content = members[k]
    action = rng.choice(["member", "member", "member", "deflate", "rename", "twice", "drop", "extra", "order"])
    if action == "member":
        members[k] = name, damage(rng, content)
    elif action == "rename":
        members[k] = rng.choice(["x", "../x", "/x", name + "x", "a/" * 500, "é"]), content
    elif action == "twice":
        members.append((name, damage(rng, content)))
    elif action == "drop":
        del members[k]
    elif action == "extra":
        members.append((rng.choice(["x", "../../x", "archive/data/999", "constants.pkl", "labels.npy"]),
                        rng.randbytes(100)))
    elif action == "order":
        rng.shuffle(members)
    deflate = action == "deflate" or rng.random() < 0.1
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as z:
        for name, content in members:
            z.writestr(name, content)
    return out.getvalue()


def picture(rng):
    """(bytes, ending) of an image file, more or less in order."""
    kind, modes = rng.choice([("PNG", "RGB L RGBA P 1 LA I;16")] * 6 + [("JPEG", "RGB CMYK L")] * 3 + [("GIF",
                                                                                                        "P")] * 2 + [
        (kind, "RGB") for kind in "BMP TIFF WEBP PPM EPS ICO PDF TGA PCX JPEG2000 ICNS SGI DDS AVIF".split()])
    mode = rng.choice(modes.split())
    size = rng.choice([(36, 36), (36, 36), (32, 32), (1, 1), (1, 300), (40, 17), (16, 16), (3000, 1)])
    out, image = io.BytesIO(), Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    extra = {"exif": b"Exif\0\0" + rng.randbytes(40)} if kind in ("JPEG", "WEBP") and rng.random() < 0.3 else {}
    try:
        (image.convert("I") if mode == "I;16" else image).convert(mode).save(out, kind, **extra)
    except (OSError, ValueError, KeyError):
        image.save(out, "PNG")
    data = out.getvalue()
    if data[:4] == b"\x89PNG" and rng.random() < 0.4:  # other sizes and chunks, with the right checksums
        header, chunk = bytearray(data[16:29]), b""
        if rng.random() < 0.5:
            at = rng.choice([0, 4])
            header[at:at + 4] = struct.pack(">I", rng.choice([0, 1, 2 ** 31 - 1, 2 ** 32 - 1, 50_000, 13_000, 37]))
        elif rng.random() < 0.5:
            header[rng.randrange(8, 13)] = rng.randrange(256)
        else:
            kind = rng.choice([b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"eXIf", b"acTL", b"PLTE", b"tRNS"])
            large = zlib.compress(bytes(10 ** 7))
            text = rng.choice([rng.randbytes(20), b"a\0\0" + large, b"a\0\1\0\0\0" + large])
            chunk = struct.pack(">I", len(text)) + kind + text + struct.pack(">I", zlib.crc32(kind + text))
        data = data[:16] + header + struct.pack(">I", zlib.crc32(data[12:16] + header)) + chunk + data[33:]
    return bytes(data), rng.choice([".png", ".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".ppm"])


def array(rng):
    n = rng.choice([0, 1, 2, 4, 4, 4, 5])
    shape = rng.choice([(n, 32, 32, 3), (n, 32, 32, 3), (n, 32, 32, 1), (n, 32, 32), (n, 3, 32, 32), (n, 36, 36, 3),
                        (n,), (n,), (), (n, 1), (n, 0, 32, 3), (n, 32, 32, 4), (n, 1, 1, 3), (1, n, 32, 32, 3)])
    kind = rng.choice(["u1", "u1", "u1", "i1", "<i8", ">i8", "<u8", "<f4", "<f8", "<f2", "?", "c8", "U3", "S3", "O",
                       "M8[s]", "V4", [("a", "u1")], ">u2"])
    try:
        made = np.random.default_rng(rng.randrange(2 ** 32)).integers(0, rng.choice([2, 256]), shape).astype(kind)
        return np.asfortranarray(made) if rng.random() < 0.2 else made
    except (TypeError, ValueError):
        return np.zeros(n, "u1")


def arrays(rng, good=None):
    """(bytes of an .npz file, what it holds). good: images that are in order, or None."""
    held = {"arr_0": array(rng) if good is None else good}
    if rng.random() < 0.7:
        n = held["arr_0"].shape[0] if held["arr_0"].ndim else 1
        held["labels"] = array(rng) if rng.random() < 0.4 else np.asarray([number(rng) for _ in range(n)])
    if rng.random() < 0.1:
        held[rng.choice(["x", "a/b", "labels"])] = array(rng)
    out = io.BytesIO()
    (np.savez if rng.random() < 0.8 else np.savez_compressed)(out, **held)
    return out.getvalue(), ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in held.items())


# ---- files of torch.save, JSON

def mutate_state(rng, state, times):
    """(bytes of a file of torch.save, what was done)"""
    said, out = [], io.BytesIO()
    for _ in times:
        try:
            said.append(mutate(rng, state))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as e:  # not for this tensor
            said.append(f"({type(e).__name__})")
    if rng.random() < 0.02:
        state = rng.choice([[state], None, 1, (state,), torch.zeros(3), {}, {"state_dict": state}])
        said.append(f"{type(state).__name__} in place of all")
    try:
        torch.save(state, out, _use_new_zipfile_serialization=rng.random() < 0.95)
    except Exception as e:
        out = io.BytesIO()
        said.append(f"(cannot be saved: {type(e).__name__})")
        torch.save({}, out)
    return out.getvalue(), said


def mutate_json(rng, text, times):
    """(JSON with some places changed, what was done)"""
    content, said = json.loads(text), []
    for _ in times:
        try:
            said.append(mutate(rng, content))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as e:
            said.append(f"({type(e).__name__})")
    try:
        return json.dumps(content, default=str, skipkeys=True).encode(errors="replace"), said
    except (TypeError, ValueError, RecursionError):
        return text, said


# ---- what unpacks to gigabytes

def _bomb(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name, start in members.items():
            with z.open(name, "w", force_zip64=True) as f:
                f.write(start)
                for _ in range(50):
                    f.write(bytes(2 ** 26))


def bomb_npz(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                  "shape": (50 * 2 ** 26 // 3072, 32, 32, 3)})
    _bomb(path, {"arr_0.npy": header.getvalue()})


def bomb_checkpoint(path):
    whole = io.BytesIO()
    torch.save({"state_dict": {}, "a": torch.zeros(1)}, whole)
    with zipfile.ZipFile(whole) as z:
        _bomb(path, {name: z.read(name) for name in z.namelist() if "data/0" in name or "pkl" in name})


def bomb_png(path):
    Image.new("RGB", (13_300, 13_300)).save(path, "PNG")


BOMBS = {"bomb.npz": bomb_npz, "bomb.pth.tar": bomb_checkpoint, "bomb.png": bomb_png}
