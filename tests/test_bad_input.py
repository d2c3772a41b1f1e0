"""A user's mistakes, given to train.py: one line that names them, exit status 2, and nothing written."""

import os
import struct
import sys
import warnings

import pytest
import torch

import export
import train
from helpers import Place, one_line
from libs import RunError, UsageError, build_model, datasets, load_config, load_model
from libs.common import memory
from libs.common.cli import run
from libs.tiny_autoencoder import TAESD, build_decoder


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def settings(options):
    return [x for key, value in options.items() for x in ("--set", f"{key}={value}")]


@pytest.fixture
def refused(place):
    """refused(arguments of train.py, words of the message)"""
    def refused(arguments, *words):
        before = place.files()
        with pytest.raises(UsageError) as error:
            train.main([str(x) for x in arguments])
        message = one_line(error)
        assert all(str(word) in message for word in words), message
        assert not place.runs.exists() and place.files() == before
        return message
    return refused


def test_without_a_mistake(place, capsys):
    """So that what follows is refused for the mistake alone."""
    options = place.autoencoder()
    before = place.files()
    for more in ([], settings(options)):
        assert not train.main([str(place.config), "--dry-run", *more])
    assert "2 updates an epoch" in capsys.readouterr().out and place.files() == before


# ---- the config and the command line

@pytest.mark.parametrize("setting, words", [
    ("model.dimm=8", ["model.dimm", "did you mean model.dim"]),
    ("train_cfg.lr=-1", ["train_cfg.lr", "-1", "above 0"]),
    ("model.dim=12", ["model.dim", "12", "8 groups", "multiple of 8"]),
    ("model.attn_levels=[2]", ["model.attn_levels", "2", "0 to 1"]),
    ("dataset.img_size=17", ["17", "multiple of 2", "16 and 18"]),
    ("model.patch_size=3", ["16", "multiple of 6", "12 and 18"]),
    ("dataset.data_folder=/no/such/place", ["dataset.data_folder", "/no/such/place"]),
    ("model.num_classes=5", ["model.num_classes", "5", "2 classes"]),
    ("sample_cfg.steps=11", ["sample_cfg.steps", "11", "at most model.timesteps", "10"]),
    ("seed", ["--set", "'seed'", "key.sub=value"]),
])
def test_setting(place, refused, setting, words):
    refused([place.config, "--set", setting], *words)


def test_flags(place, refused):
    refused([], "config: name a YAML file", "--resume RUN")
    refused([place.root / "mnst.yaml"], "mnst.yaml", "did you mean configs/mnist.yaml?")
    refused([place.config, "--ckpt-freq=0"], "--ckpt-freq", "0")
    refused([place.config, "--resume", place.root, "--output", "a"], "--output", "--resume")


@pytest.fixture
def small_mnist(place, monkeypatch):
    """Forty blank digits in MNIST's format, as settings; their check sums are not asked for."""
    def small_mnist(label=0):
        raw = place.root / "digits" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for prefix in ("train", "t10k"):
            (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, 40, 28, 28) + bytes(40 * 784))
            (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 40) + bytes([label]) * 40)
        monkeypatch.setattr(datasets, "fetch_mnist", lambda root: None)
        return {"dataset.name": "MNIST", "dataset.data_folder": place.root / "digits", "dataset.img_size": "null"}
    return small_mnist


def test_images_that_do_not_fit_the_model(place, refused, small_mnist):
    latents, digits = place.autoencoder(), small_mnist(label=12)
    refused([place.config, *settings(latents | {"dataset.img_size": 24})], "img_size", "24", "16 and 32")  # 3 x 3 latents
    refused([place.config, *settings(digits | latents)], "model.img_shape", "1 x 28 x 28", "3 x H x W")
    refused([place.config, *settings(digits)], "12", "10 classes")


# ---- weights

def test_whatever_a_weight_file_begins_with(place, refused):
    """A pickle's first bytes decide what its reader trips over."""
    options, path = place.autoencoder(), place.root / "encoder.pth"
    for content in (b"e", b"0", b"\x80", b"B", b"t", b"(i", b"I1\n", b"]a", b"V\n."):
        path.write_bytes(content)
        refused([place.config, *settings(options)], "model.vae_encoder_weights", path)


# ---- --resume

def test_resume_from_another_architecture(place, refused):
    path = place.checkpoint("model.dim_mults=[1,2,2]")
    for given in (path, path.parent):
        refused([place.config, "--resume", given], "--resume", path, "model.dim_mults is [1, 2, 2] there and [1, 2]")
    refused([place.config, "--resume", place.checkpoint("model_name=EDM")], "model_name is EDM there and DDPM")
    path = place.checkpoint(state_dict={"model.conv_in.weight": torch.zeros(3)})  # which its config does not tell
    refused(["--resume", path], path, "another architecture", "tensors differ")


def test_resume_with_other_data(place, refused):
    refused(["--resume", place.checkpoint(classes=["cat", "cow"])],
            "classes is ['cat', 'cow'] there and ['cat', 'dog'] in")
    refused(["--resume", place.checkpoint(classes=["cat", "dog"], updates_per_epoch=3)],
            "updates_per_epoch is 3 there and 2 in")


def test_the_latents_of_another_autoencoder(place, refused):
    """Neither resumed nor drawn from; a checkpoint that does not say which it was passes."""
    options, slim = place.autoencoder(), place.root / "slim.pth.tar"
    model = [f"{key}={value}" for key, value in options.items()]
    hashes = TAESD(*(options[f"model.vae_{half}_weights"] for half in ("encoder", "decoder"))).hashes()
    path = place.checkpoint(*model, autoencoder=hashes)
    assert not train.main(["--dry-run", "--resume", str(path)])
    export.main([str(path), str(slim)])
    load_model(str(slim))
    torch.save(build_decoder().state_dict(), place.root / "decoder.pth")
    message = refused(["--resume", path], "model.vae_decoder_weights: ", "decoder.pth are not those that", path)
    assert "encoder" not in message
    for each in (path, slim):
        with pytest.raises(UsageError, match="decoder.pth are not those that"):
            load_model(str(each))
    load_model(str(place.checkpoint(*model)))


# ---- several processes, the run folder

def test_a_batch_that_cannot_be_shared(place, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(datasets, "read_files", lambda *a: pytest.fail("read before it was checked"))
    refused([place.config], "loader.batch_size: 2 images cannot be divided among 3 processes")
    refused([place.config, "--set", "loader.batch_size=64"], "loader.batch_size: 64 is more than the data set's 4 images")


def test_run_folder(place, refused):
    below_a_file = place.config / "runs"  # which stops root too
    refused([place.config, "--set", f"output_folder={below_a_file}"], "output_folder", below_a_file, "Not a directory")
    folder = place.runs / "tiny_mine"
    folder.mkdir(parents=True)
    with pytest.raises(UsageError) as error:
        train.main([str(place.config), "--output", "mine"])
    assert "--output" in one_line(error) and str(folder) in one_line(error) and "--resume" in one_line(error)


# ---- exit status

@pytest.mark.parametrize("result, status", [(UsageError("key: 3 is wrong"), 2), (RunError("disk full"), 1),
                                            (OSError("no disk"), 1), (KeyboardInterrupt(), 130), (None, None), (143, 143)])
def test_exit_status(result, status, capsys):
    def main():
        if isinstance(result, BaseException):
            raise result
        return result

    with pytest.raises(SystemExit) as end:
        run(main)
    printed = capsys.readouterr()
    assert end.value.code == status and printed.out == "" and printed.err.count("\n") == (status in (1, 2))
    assert status not in (1, 2) or str(result) in printed.err


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "MemoryError"), (RecursionError("too deep"), "too deep"),
    (UsageError("a\nb\x1b[31m"), "a\\nb\\x1b[31m"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"), "10 bytes")])
def test_one_line_whatever_happened(error, words, capsys):
    def main():
        warnings.warn("first\nsecond")
        raise error

    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *args, **_: sys.stderr.write(warnings.formatwarning(*args[:4]))  # pytest records
        run(main)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: first\\nsecond" and second.endswith(words)
    assert end.value.code == (2 if isinstance(error, UsageError) else 1)


def test_a_closed_pipe_ends_quietly(monkeypatch, capfd):
    """As of `python sample.py ... | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", stdout)
        run(lambda: print("drawing"))
    assert end.value.code == 1 and capfd.readouterr().err == ""


def test_memory_is_checked_before_a_model_is_built(place, monkeypatch):
    config = load_config(str(place.config), ["model.num_classes=2"])
    size = sum(4 * p.numel() for p in build_model(config).model.parameters())
    monkeypatch.setattr(memory, "available_memory", lambda device: 5 * size - 1)
    build_model(config)
    with pytest.raises(UsageError, match="memory: training a network of .* lower model.dim"):
        build_model(config, training=torch.device("cpu"))


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
