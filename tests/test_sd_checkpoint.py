"""Files of Stable Diffusion: what loads, and what is refused with which message."""

import _compat_pickle
import json
import os
import struct
import sys
import types

import numpy as np
import pytest
import torch

from helpers import Evil, one_line
from libs.common.errors import UsageError
from libs.stable_diffusion import load_checkpoint
from libs.stable_diffusion.checkpoint import AUTOENCODER, TEXT, UNET, build_parts, check_tensors, take_average
from libs.stable_diffusion.files import read_tensors
from random_sd_checkpoint import layout, random_tensor, write_safetensors
from sd_parity import SMALL, small_checkpoint

STEM = UNET + "input_blocks.0.0.weight"
OUT = UNET + "out.2.weight"

pytestmark = pytest.mark.usefixtures("open_clip")


@pytest.fixture(scope="module")
def tensors():
    """All tensors of a small model's file."""
    return {name: random_tensor(name, shape).to(dtype) for name, (dtype, shape) in layout(torch.float32, SMALL).items()}


def save(path, tensors):
    """Write .safetensors or .ckpt; returns the path as text."""
    if str(path).endswith(".safetensors"):
        write_safetensors(str(path), {k: (v.dtype, v.shape) for k, v in tensors.items()}, tensors.get)
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    return str(path)


def load(path, **options):
    return load_checkpoint(str(path), model=SMALL, **options)


def averages(tensors):
    """The tensors that a file has besides where it keeps the weights' average: here the weights plus 1."""
    return {"model_ema." + name[len("model."):].replace(".", ""): t + 1
            for name, t in tensors.items() if name.startswith(UNET)}


def refused(path, **options):
    with pytest.raises(UsageError) as error:
        load(path, **options)
    return one_line(error)


# ---- what loads

@pytest.mark.parametrize("ending, dtype", [("safetensors", torch.float16), ("ckpt", torch.float32),
                                           ("ckpt", torch.bfloat16)])
def test_all_formats_load_alike(tmp_path, tensors, ending, dtype):
    path = small_checkpoint(tmp_path, f"a.{ending}", dtype=dtype)
    sd = load(path)
    for prefix, part in ((UNET, sd.unet), (AUTOENCODER, sd.autoencoder), (TEXT, sd.text_encoder)):
        for name, value in part.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, tensors[prefix + name].to(dtype).float()), name
    half = load(path, dtype=torch.float16)
    assert {p.dtype for part in (half.unet, half.text_encoder) for p in part.parameters()} == {torch.float16}
    assert half.autoencoder.quant_conv.weight.dtype == torch.float32 and not half.training
    assert not any(p.requires_grad for p in half.parameters())


def test_format_before_torch_1_6(tmp_path, tensors):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load(path).unet.out[2].weight, tensors[OUT])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_weights_stay_in_the_file(tmp_path, tensors, ending):
    """So loading takes no memory for them; and changes to them never reach the file."""
    path = save(tmp_path / f"a.{ending}", tensors)
    sd = load(path)
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in open("/proc/self/maps") if path in line]
    for name, value in sd.named_parameters():
        assert any(lo <= value.data_ptr() < hi for lo, hi in ranges), name
    with torch.no_grad():
        sd.unet.out[2].weight.zero_()
    assert torch.equal(load(path).unet.out[2].weight, tensors[OUT])


def test_averaged_weights(tensors):
    """txt2img.py's test loads such a file."""
    parts, both = build_parts(SMALL), tensors | averages(tensors)
    assert take_average(both, parts)
    for name, value in tensors.items():
        assert torch.equal(both[name], value + 1 if name.startswith(UNET) else value), name
    check_tensors("file", both, parts)
    alone = averages(tensors)
    assert take_average(alone, parts) and torch.equal(alone[OUT], tensors[OUT] + 1)
    assert not take_average(dict(tensors), parts)


def test_names_of_some_fine_tuned_files(tmp_path, tensors):
    old = {name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}
    del old["cond_stage_model.transformer.embeddings.position_ids"], old["betas"]
    old["first_stage_model.loss.logvar"] = old["cond_stage_model.logit_scale"] = torch.zeros(1)
    sd = load(save(tmp_path / "a.safetensors", old))
    assert torch.equal(sd.text_encoder.final_layer_norm.bias, tensors[TEXT + "final_layer_norm.bias"])


def test_files_of_lightning(tmp_path, tensors, monkeypatch):
    """They hold its callbacks, with NumPy numbers, beside the weights; Lightning need not be installed to read them."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint",
             "pytorch_lightning.utilities", "pytorch_lightning.utilities.parsing"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def made(name, module, *bases):
        cls = type(name, bases, {"__module__": module})
        setattr(sys.modules[module], name, cls)
        return cls

    callback, settings = made("ModelCheckpoint", names[2]), made("AttributeDict", names[4], dict)
    path, instance = tmp_path / "old.ckpt", callback()
    instance.best = np.float64(0.5)
    # the name that pickle wrote before NumPy 2
    monkeypatch.setitem(_compat_pickle.REVERSE_IMPORT_MAPPING, np.float32(1).__reduce__()[0].__module__,
                        "numpy.core.multiarray")
    torch.save({"epoch": 1, "callbacks": {callback: {"best_model_score": np.float32(1), "it": instance}},
                "hyper_parameters": settings(lr=1e-4), "state_dict": tensors}, path)
    assert b"numpy.core.multiarray\nscalar\n" in path.read_bytes()
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(load(path).unet.out[2].weight, tensors[OUT])
    with pytest.raises(Exception):  # our stand-ins are for this reader alone
        torch.load(path, weights_only=True)


def test_files_of_the_safetensors_package_and_ours(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    kinds = {"f64": torch.randn(3, 2).double(), "half": torch.randn(4).half(), "bf": torch.randn(()).bfloat16(),
             "i": torch.arange(5), "bool": torch.tensor([True, False]), "u": torch.arange(3).byte()}
    safetensors.save_file(kinds, tmp_path / "theirs.safetensors", {"format": "pt"})
    read = read_tensors(str(tmp_path / "theirs.safetensors"))
    save(tmp_path / "ours.safetensors", kinds)
    again = safetensors.load_file(tmp_path / "ours.safetensors")
    assert read.keys() == again.keys() == kinds.keys()
    for name, value in kinds.items():
        for other in (read[name], again[name]):
            assert other.dtype == value.dtype and torch.equal(other, value), name


def test_tensors_that_are_not_aligned(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for spaces in range(4):
        text = header + b" " * spaces
        path = tmp_path / f"{spaces}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.5, -2))
        a = read_tensors(str(path))["a"]
        assert a.tolist() == [1.5, -2] and a.data_ptr() % 4 == 0


# ---- what is refused

def test_code_in_a_pickle(tmp_path, tensors):
    mark = tmp_path / "mark"
    message = refused(save(tmp_path / "evil.ckpt", {**tensors, "x": Evil(mark)}))
    assert "could run code" in message and "system" in message and not mark.exists()


@pytest.mark.parametrize("ending, share", [("safetensors", 0), ("safetensors", 1e-5), ("safetensors", 0.9999),
                                           ("ckpt", 0.5)])
def test_incomplete_files(tmp_path, tensors, ending, share):
    path = tmp_path / f"a.{ending}"
    save(path, tensors)
    os.truncate(path, int(share * path.stat().st_size))
    message = refused(path)
    assert str(path) in message and "damaged or no" in message and (share < 0.9 or "download it again" in message)


@pytest.mark.parametrize("entry", [dict(data_offsets=[0]), dict(data_offsets=[-8, 0]), dict(shape=[2.0]),
                                   dict(shape=None), dict(shape=[9]), dict(dtype="F33"), 3])
def test_wrong_headers(tmp_path, entry):
    good = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
    entry = {**good, **entry} if isinstance(entry, dict) else entry
    for text in (json.dumps({"a": entry}), json.dumps({"a": good, "b": entry}), json.dumps([entry]), "{"):
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))
        with pytest.raises(UsageError) as error:
            read_tensors(str(path))
        assert str(path) in one_line(error)


def test_missing_unexpected_and_misshapen_tensors(tmp_path, tensors):
    wrong = {name: t for name, t in tensors.items() if "output_blocks.0." not in name}
    wrong |= {"model.diffusion_model.extra": torch.zeros(1), STEM: torch.zeros(32, 4, 1, 1)}
    wrong[UNET + "out.2.bias"] = torch.zeros(4, dtype=torch.int8)
    message = refused(save(tmp_path / "a.safetensors", wrong))
    gone = [name for name in tensors if "output_blocks.0." in name]
    assert "a.safetensors is not of Stable Diffusion 1.x: " in message
    assert f"tensors missing: {len(gone)} (" in message and ", ...)" in message
    assert all(name in message for name in gone[:5]) and gone[5] not in message
    assert "tensors unexpected: 1 (model.diffusion_model.extra)" in message
    assert f"tensors of another shape: 1 ({STEM} [32, 4, 1, 1] instead of [32, 4, 3, 3])" in message
    assert f"tensors of integers: 1 ({UNET}out.2.bias)" in message
    # the true model has other shapes than the small one
    with pytest.raises(UsageError) as error:
        load_checkpoint(save(tmp_path / "b.safetensors", tensors))
    assert "[32, 4, 3, 3] instead of [320, 4, 3, 3]" in one_line(error)


@pytest.mark.parametrize("name, shape, says", [
    ("conditioner.embedders.0.transformer.text_model.x", [1], "Stable Diffusion XL"),
    ("cond_stage_model.model.transformer.resblocks.0.x", [1], "Stable Diffusion 2.x"),
    ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", [1], "a LoRA"),
    ("vae.encoder.down_blocks.0.resnets.0.conv1.weight", [1], "whose tensors have diffusers' names"),
    (STEM, [320, 9, 3, 3], "an inpainting model (its UNet takes 9 channels")])
def test_other_families_are_named(tmp_path, name, shape, says):
    message = refused(save(tmp_path / "a.safetensors", {name: torch.zeros(shape)}))
    assert says in message and "this is for Stable Diffusion 1.1 to 1.5" in message


def test_files_that_are_no_checkpoint(tmp_path):
    assert "no file" in refused(tmp_path / "no.safetensors") and "is a folder" in refused(tmp_path)
    (tmp_path / "a.ckpt").write_bytes(b"<!DOCTYPE html><html>")
    assert "damaged or no checkpoint" in refused(tmp_path / "a.ckpt")
    for state in ({"a": 3}, 3):
        torch.save({"state_dict": state}, tmp_path / "b.ckpt")
        assert "no tensors" in refused(tmp_path / "b.ckpt")


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_weights_that_are_not_finite(tmp_path, tensors, ending, value):
    bad = {**tensors, OUT: tensors[OUT].clone()}
    bad[OUT].view(-1)[7] = value
    assert f"a.{ending}: {OUT} is not finite" in refused(save(tmp_path / f"a.{ending}", bad))


def test_tensors_of_other_kinds_are_missing(tmp_path, tensors):
    path = str(tmp_path / "a.ckpt")
    torch.save({**tensors, OUT: tensors[OUT].to_sparse(), STEM: torch.empty(tensors[STEM].shape, device="meta")}, path)
    message = refused(path)
    assert "tensors missing: 2" in message and OUT in message and STEM in message
