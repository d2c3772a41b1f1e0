"""Files of Stable Diffusion: what loads, what is refused, and how that is said."""

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
from libs.stable_diffusion import checkpoint, load_checkpoint, memory
from libs.stable_diffusion.checkpoint import AUTOENCODER, TEXT, UNET
from libs.stable_diffusion.files import aligned, read_tensors, write_safetensors
from random_sd_checkpoint import layout, random_tensor
from sd_parity import SMALL, small_checkpoint

STEM = UNET + "input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def tensors():
    """All tensors of a small model's file."""
    return {name: random_tensor(name, shape).to(dtype) for name, (dtype, shape) in layout(torch.float32, SMALL).items()}


@pytest.fixture(scope="module", autouse=True)
def vocabulary():
    pytest.importorskip("open_clip")


def save(path, tensors):
    """Write .safetensors or .ckpt; returns the path as text."""
    if str(path).endswith(".safetensors"):
        write_safetensors(str(path), {k: (v.dtype, v.shape) for k, v in tensors.items()}, tensors.get)
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    return str(path)


def load(path, **options):
    return load_checkpoint(str(path), model=SMALL, **options)


def weights(sd):
    return {f"{name}.{k}": v for name in ("unet", "autoencoder", "text_encoder")
            for k, v in getattr(sd, name).state_dict().items()}


def refused(path, **options):
    with pytest.raises(UsageError) as error:
        load(path, **options)
    return one_line(error)


# ---- what loads

@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_formats_load_alike(tmp_path, tensors, ending, dtype):
    path = small_checkpoint(tmp_path, f"a.{ending}", dtype=dtype)
    sd = load(path)
    for prefix, part in ((UNET, sd.unet), (AUTOENCODER, sd.autoencoder), (TEXT, sd.text_encoder)):
        for name, value in part.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, tensors[prefix + name].to(dtype).float()), name
    assert "12 tensors of the noise schedule" in sd.summary and "1 tensor of positions" in sd.summary
    half = load(path, dtype=torch.float16)
    assert {v.dtype for k, v in weights(half).items() if k[:4] != "auto"} == {torch.float16}
    assert half.autoencoder.dtype == torch.float32 and not half.training
    assert not any(p.requires_grad for p in half.parameters())


def test_the_format_of_before_torch_1_6(tmp_path, tensors):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load(path).unet.state_dict()["out.2.weight"], tensors[UNET + "out.2.weight"])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_weights_stay_in_the_file(tmp_path, tensors, ending):
    """So loading takes no memory for them; and what happens to them never reaches the file."""
    path = save(tmp_path / f"a.{ending}", tensors)
    sd = load(path)
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in open("/proc/self/maps") if path in line]
    for name, value in weights(sd).items():
        assert any(lo <= value.data_ptr() < hi for lo, hi in ranges), name
    with torch.no_grad():
        sd.unet.out[2].weight.zero_()
    assert torch.equal(load(path).unet.out[2].weight, tensors[UNET + "out.2.weight"])


def test_averaged_or_plain_weights(tmp_path, tensors):
    averages = {"model_ema." + name[len("model."):].replace(".", ""): t + 1
                for name, t in tensors.items() if name.startswith(UNET)}
    path = save(tmp_path / "full.ckpt", tensors | averages)
    averaged, plain = load(path), load(path, ema=False)
    for name, value in plain.unet.state_dict().items():
        assert torch.equal(value, tensors[UNET + name])
        assert torch.equal(averaged.unet.state_dict()[name], value + 1)
    assert torch.equal(averaged.autoencoder.quant_conv.weight, plain.autoencoder.quant_conv.weight)
    assert (averaged.weights, plain.weights) == ("ema", "plain")
    assert averaged.summary.startswith("averaged weights taken")
    assert "2 tensors of the weights' average" in averaged.summary
    assert "686 tensors of plain weights, as the averaged ones are taken" in averaged.summary
    assert plain.summary.startswith("ignored: ") and "688 tensors of the weights' average" in plain.summary
    # the average alone
    alone = load(save(tmp_path / "ema.ckpt", averages | {k: v for k, v in tensors.items() if not k.startswith(UNET)}))
    for name, value in alone.unet.state_dict().items():
        assert torch.equal(value, tensors[UNET + name] + 1)
    assert alone.weights == "ema" and "plain" not in alone.summary
    # an average that lacks one
    name = "model_ema.diffusion_modelout2weight"
    del averages[name]
    half = load(save(tmp_path / "half.ckpt", tensors | averages), ema=False)
    assert torch.equal(half.unet.out[2].weight, tensors[UNET + "out.2.weight"])
    assert f"of the averaged weights 1 tensor is missing ({name}); take" in refused(tmp_path / "half.ckpt")


def test_names_of_some_fine_tuned_files(tmp_path, tensors):
    old = {name.replace("transformer.text_model.", "transformer."): t for name, t in tensors.items()}
    del old["cond_stage_model.transformer.embeddings.position_ids"], old["betas"]
    old["first_stage_model.loss.logvar"] = old["cond_stage_model.logit_scale"] = torch.zeros(())
    sd = load(save(tmp_path / "a.safetensors", old))
    assert torch.equal(sd.text_encoder.final_layer_norm.bias, tensors[TEXT + "final_layer_norm.bias"])
    assert "11 tensors of the noise schedule" in sd.summary and "1 tensor of the autoencoder's loss" in sd.summary


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])  # before NumPy 2, and since
def test_what_lightning_wrote(tmp_path, tensors, monkeypatch, module):
    """Its callbacks by their class, with NumPy's numbers, beside the weights; Lightning is not here when it is read."""
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
    # how pickle gives what it writes for older readers their names
    monkeypatch.setitem(_compat_pickle.REVERSE_IMPORT_MAPPING, np.float32(1).__reduce__()[0].__module__, module)
    torch.save({"epoch": 1, "callbacks": {callback: {"best_model_score": np.float32(1), "it": instance}},
                "hyper_parameters": settings(lr=1e-4), "state_dict": tensors}, path)
    assert f"{module}\nscalar\n".encode() in path.read_bytes()
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    assert torch.equal(load(path).unet.out[2].weight, tensors[UNET + "out.2.weight"])
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    with pytest.raises(Exception):  # our stand-ins are for our reading alone
        torch.load(path, weights_only=True)


def test_files_of_the_safetensors_package_and_ours(tmp_path, tensors):
    safetensors = pytest.importorskip("safetensors.torch")
    kinds = {"f64": torch.randn(3, 2).double(), "half": torch.randn(4).half(), "bf": torch.randn(()).bfloat16(),
             "i": torch.arange(5), "none": torch.zeros(0, 3), "bool": torch.tensor([True, False]),
             "u": torch.arange(3).byte()}
    safetensors.save_file(kinds, tmp_path / "theirs.safetensors", {"format": "pt"})
    read = read_tensors(str(tmp_path / "theirs.safetensors"))
    save(tmp_path / "ours.safetensors", kinds)
    again = safetensors.load_file(tmp_path / "ours.safetensors")
    assert read.keys() == again.keys() == kinds.keys()
    for name, value in kinds.items():
        for other in (read[name], again[name]):
            assert other.dtype == value.dtype and torch.equal(other, value), name


def test_a_header_of_any_length(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    for spaces in range(9):
        text = header + b" " * spaces
        path = tmp_path / f"{spaces}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.5, -2))
        a = aligned(read_tensors(str(path))["a"])
        assert a.tolist() == [1.5, -2] and a.data_ptr() % 4 == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_that_is_not_aligned(tmp_path, dtype):
    path, askew = small_checkpoint(tmp_path, dtype=dtype), str(tmp_path / "askew.safetensors")
    with open(path, "rb") as f, open(askew, "wb") as g:  # a header one byte longer
        length = int.from_bytes(f.read(8), "little")
        g.write((length + 1).to_bytes(8, "little") + f.read(length) + b" " + f.read())
    read = read_tensors(askew)  # copies nothing, so that another model's file is refused first
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in open("/proc/self/maps") if askew in line]
    assert all(any(lo <= t.data_ptr() < hi for lo, hi in ranges) for t in read.values())
    straight, copy = (weights(load(p, dtype=torch.float32)) for p in (path, askew))
    for name, value in straight.items():
        assert torch.equal(value, copy[name]) and copy[name].data_ptr() % 4 == 0, name


# ---- what is refused

def test_code_in_a_pickle(tmp_path, tensors):
    mark = tmp_path / "mark"
    path = save(tmp_path / "evil.ckpt", {**tensors, "x": Evil(mark)})
    message = refused(path)
    assert "could run code" in message and "system" in message and not mark.exists()


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("share", [0, 1e-5, 0.5, 0.9999])
def test_a_file_that_was_cut_off(tmp_path, tensors, ending, share):
    path = tmp_path / f"a.{ending}"
    save(path, tensors)
    os.truncate(path, int(share * path.stat().st_size))
    message = refused(path)
    assert str(path) in message and "damaged or no" in message
    if share >= 0.5 and ending == "safetensors":
        assert "fetch it again" in message


@pytest.mark.parametrize("entry", [
    dict(data_offsets=[0, 16]), dict(data_offsets=[4, 12]), dict(data_offsets=[-8, 0]), dict(data_offsets=[0]),
    dict(data_offsets="08"), dict(shape=[-2]), dict(shape=[2.0]), dict(shape=None), dict(shape=[2 ** 62, 4]),
    dict(dtype="F33"), dict(dtype=[1]), None, 3])
def test_a_header_that_lies(tmp_path, entry):
    good = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
    entry = {**good, **entry} if isinstance(entry, dict) else entry
    for text in (json.dumps({"a": entry}), json.dumps({"a": good, "b": entry}), json.dumps([entry]), "{", "{" * 5000):
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
    assert f"{len(gone)} tensors are missing (" in message and ", ...)" in message
    assert all(name in message for name in gone[:5]) and gone[5] not in message
    assert "1 tensor is unexpected (model.diffusion_model.extra)" in message
    assert f"1 tensor is of another shape ({STEM} [32, 4, 1, 1] instead of [32, 4, 3, 3])" in message
    assert "out.2.bias torch.int8" in message
    # one that has all, and more
    more = {**tensors, "model.diffusion_model.extra": torch.zeros(1)}
    message = refused(save(tmp_path / "c.safetensors", more))
    assert "has all tensors of Stable Diffusion 1.x, but 1 tensor is unexpected (model.diff" in message
    message = refused(save(tmp_path / "c.safetensors", more | {"other": torch.zeros(1)}))
    assert "but 2 tensors are unexpected (model.diffusion_model.extra, other)" in message
    # the true model wants other shapes than the small one has
    with pytest.raises(UsageError) as error:
        load_checkpoint(save(tmp_path / "b.safetensors", tensors))
    assert "of another shape" in one_line(error) and "[32, 4, 3, 3] instead of [320, 4, 3, 3]" in str(error.value)


@pytest.mark.parametrize("name, shape, says", [
    ("conditioner.embedders.0.transformer.text_model.x", [1], "Stable Diffusion XL"),
    ("cond_stage_model.model.transformer.resblocks.0.x", [1], "Stable Diffusion 2.x"),
    ("model.diffusion_model.joint_blocks.0.x", [1], "Stable Diffusion 3"),
    ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", [1], "a LoRA"),
    ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", [1], "a LoRA"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight", [1], "a LoRA"),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight", [1], "a LoRA"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight", [1], "a LoRA"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight", [1], "a LoRA"),
    ("lycoris_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a", [1], "a LoRA"),
    ("down_blocks_0_attentions_0_proj_in.lokr_w1", [1], "a LoRA"),
    ("unet.down_blocks.0.resnets.0.conv1.weight", [1], "whose tensors have diffusers' names"),
    ("vae.encoder.down_blocks.0.resnets.0.conv1.weight", [1], "whose tensors have diffusers' names"),
    ("model.diffusion_model.label_emb.0.0.weight", [1], "Stable Diffusion XL"),
    ("down_blocks.0.resnets.0.conv1.weight", [1], "diffusers' folder layout"),
    ("text_model.encoder.layers.0.self_attn.k_proj.weight", [1], "a text encoder alone"),
    ("decoder.mid.block_1.conv1.weight", [1], "an autoencoder alone"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight", [1], "diffusers' folder layout"),
    ("emb_params", [1, 768], "a textual inversion"),
    ("control_model.input_blocks.0.0.weight", [1], "a ControlNet"),
    ("model.encoder.0.2.op.weight", [1], "sample.py draws from"),
    (STEM, [320, 9, 3, 3], "an inpainting model (its UNet takes 9 channels"),
    (STEM, [320, 8, 3, 3], "InstructPix2Pix")])
def test_other_families_are_named(tmp_path, name, shape, says):
    message = refused(save(tmp_path / "a.safetensors", {name: torch.zeros(shape)}))
    assert says in message and "this is for Stable Diffusion 1.1 to 1.5" in message


def test_2_x_with_labels_is_no_xl(tmp_path):
    names = "cond_stage_model.model.transformer.x", "model.diffusion_model.label_emb.0.0.weight"
    assert "Stable Diffusion 2.x" in refused(save(tmp_path / "a.safetensors", {n: torch.zeros(1) for n in names}))


def test_the_real_names_are_of_no_other_family(tensors):
    checkpoint.check_family("a", tensors)
    checkpoint.check_family("a", {"model_ema." + k[len("model."):].replace(".", ""): v for k, v in tensors.items()})


def test_things_that_are_no_checkpoint(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "diffusers' folder layout" in refused(tmp_path)
    assert "no file" in refused(tmp_path / "no.safetensors") and "is a folder" in refused(os.path.dirname(__file__))
    (tmp_path / "a.ckpt").write_bytes(b"<!DOCTYPE html><html>")
    assert "damaged or no checkpoint" in refused(tmp_path / "a.ckpt")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "b.ckpt")
    assert "no tensors" in refused(tmp_path / "b.ckpt")


def test_too_little_memory(tmp_path, tensors, monkeypatch):
    path = save(tmp_path / "a.safetensors", tensors)
    need = sum(4 * v.numel() for k, v in tensors.items() if k.startswith((UNET, AUTOENCODER, TEXT)) and "_ids" not in k)
    monkeypatch.setattr(memory, "memory_available", lambda device: need - 1)
    assert "memory: the model takes about" in refused(path)
    monkeypatch.setattr(memory, "memory_available", lambda device: need)
    load(path)


def test_memory_that_is_there(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n"}
    monkeypatch.setattr(memory, "_read", lambda path: files.get(path, ""))
    assert memory.memory_available(torch.device("cpu")) == 2 ** 21
    files |= {"/sys/fs/cgroup/memory.max": "1000000\n", "/sys/fs/cgroup/memory.current": "400000\n"}
    assert memory.memory_available(torch.device("cpu")) == 600_000
    files["/sys/fs/cgroup/memory.stat"] = "anon 100000\nfile 300000\nfile_mapped 7\n"
    assert memory.memory_available(torch.device("cpu")) == 900_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.memory_available(torch.device("cpu")) == 2 ** 21
    files.clear()
    assert memory.memory_available(torch.device("cpu")) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_peak_memory():
    with memory.PeakMemory() as small:
        pass
    with memory.PeakMemory() as large:
        block = torch.ones(50_000_000)
        while large.peak < small.peak + 190_000_000:  # the thread has looked
            assert block[0] == 1
        del block
    assert large.peak < small.peak + 300_000_000
