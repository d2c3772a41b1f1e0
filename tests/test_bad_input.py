"""A user's mistakes, given to train.py: one line that names them, exit status 2, and nothing written."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
import train
from helpers import Evil, Place
from libs import RunError, UsageError, datasets, load_model
from libs.config import CODE
from libs.tiny_autoencoder import TAESD, build_decoder
from libs.common.cli import run


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def settings(options):
    return [x for key, value in options.items() for x in ("--set", f"{key}={value}")]


@pytest.fixture
def refused(place, monkeypatch):
    """refused(arguments of train.py, what the line must say): call it in this process."""
    def refused(arguments, *says):
        before = place.files()
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        with pytest.raises(UsageError) as error:
            train.main()
        message = str(error.value)
        assert message and "\n" not in message and "Traceback" not in message
        for words in says:
            assert str(words) in message
        assert not place.runs.exists() and place.files() == before
        return message
    return refused


def test_without_a_mistake(place, monkeypatch, capsys):
    """So that what follows is refused for the mistake alone."""
    before = place.files()
    for more in ([], settings(place.autoencoder())):
        monkeypatch.setattr(sys, "argv", ["train.py", str(place.config), "--dry-run", *more])
        assert not train.main()
    assert "2 updates an epoch" in capsys.readouterr().out
    assert set(place.files()) - set(before) == {str(place.root / "encoder.pth"), str(place.root / "decoder.pth")}


# ---- the config

def test_missing_config(place, refused):
    refused([place.root / "mnst.yaml"], "mnst.yaml", "did you mean configs/mnist.yaml?")


def test_broken_config(place, refused):
    broken = place.root / "broken.yaml"
    broken.write_text("model: {dim: 8")
    refused([broken], "broken.yaml", "no YAML")


@pytest.mark.parametrize("setting, says", [
    ("model.dimm=8", ["model.dimm", "did you mean model.dim"]),
    ("train_cfg.epochs=many", ["train_cfg.epochs", "'many'", "an integer"]),
    ("train_cfg.lr=-1", ["train_cfg.lr", "-1", "above 0"]),
    ("model.dim=12", ["model.dim", "12", "8 groups", "multiple of 8"]),
    ("model.attn_levels=[2]", ["model.attn_levels", "2", "0 to 1"]),
    ("dataset.img_size=17", ["17", "multiple of 2", "16 and 18"]),
    ("model.patch_size=3", ["16", "multiple of 6", "12 and 18"]),
    ("dataset.name=Cats", ["dataset.name", "'Cats'", "ImageFolder"]),
    ("dataset.data_folder=/no/such/place", ["dataset.data_folder", "/no/such/place"]),
    ("dataset.split=test", ["dataset.data_folder", "test"]),
    ("model.num_classes=5", ["model.num_classes", "5", "2 classes"]),
    ("model.num_classes=1", ["model.num_classes", "1", "2 classes"]),
    ("sample_cfg.sampler=hein", ["sample_cfg.sampler", "'hein'", "heun", "ddpm, ddim"]),
    ("sample_cfg.steps=11", ["sample_cfg.steps", "11", "at most model.timesteps", "10"]),
    ("sample_cfg.guidance_scale=3", ["sample_cfg.guidance_scale", "3", "model.label_dropout"]),
    ("seed", ["--set", "'seed'", "key.sub=value"]),
])
def test_setting(place, refused, setting, says):
    refused([place.config, "--set", setting], *says)


@pytest.mark.parametrize("flag", ["--print-freq", "--ckpt-freq"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_frequencies(place, refused, flag, value):
    refused([place.config, f"{flag}={value}"], flag, value)


@pytest.fixture
def small_mnist(place, monkeypatch):
    """Forty blank digits in MNIST's format, as --set arguments; their check sums are not asked for."""
    def small_mnist(label=0):
        raw = place.root / "digits" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for prefix in ("train", "t10k"):
            (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 2051, 40, 28, 28) + bytes(40 * 784))
            (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, 40) + bytes([label]) * 40)
        monkeypatch.setattr(datasets, "fetch_mnist", lambda root: None)
        return {"dataset.name": "MNIST", "dataset.data_folder": place.root / "digits", "dataset.img_size": "null"}
    return small_mnist


@pytest.mark.parametrize("size, near", [(30, "28 and 32"), (9, "8 and 12")])
def test_image_size_that_the_levels_cannot_halve(place, refused, small_mnist, size, near):
    options = small_mnist() | {"dataset.img_size": size, "model.dim_mults": "[1,2,4]"}
    refused([place.config, *settings(options)], "img_size", size, "multiple of 4", near)


def test_image_size_in_latents_is_told_in_pixels(place, refused):
    options = place.autoencoder() | {"dataset.img_size": 24}  # 3 x 3 latents, for two levels
    refused([place.config, *settings(options)], "img_size", "24", "16 and 32")


def test_digits_through_the_autoencoder(place, refused, small_mnist):
    options = small_mnist() | place.autoencoder()
    refused([place.config, *settings(options)], "model.img_shape", "1 x 28 x 28", "3 x H x W")


def test_labels_outside_the_classes(place, refused, small_mnist):
    refused([place.config, *settings(small_mnist(label=12))], "12", "10 classes")


# ---- data

def test_empty_class_folder(place, refused):
    (place.root / "images" / "emu").mkdir()
    refused([place.config], "dataset.data_folder", place.root / "images" / "emu", "no images")


def test_no_class_folders(place, refused):
    refused([place.config, "--set", f"dataset.data_folder={place.root / 'images' / 'cat'}"], "cat", "no class folders")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_broken_image(place, refused, content):
    path = place.root / "images" / "dog" / "broken.png"
    path.write_bytes(content)
    refused([place.config], "dataset.data_folder", path)


# ---- weights

@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["missing", "empty", "text", "page", "pointer", "other half", "half", "tensor", "evil",
                                  "folder"])
def test_autoencoder_weights(place, refused, part, kind):
    options, side_effect = place.autoencoder(), place.root / "side-effect"
    path = place.root / f"{part}.pth"
    good = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "evil":
        torch.save({"weight": Evil(side_effect)}, path)
    elif kind != "missing":
        other = place.root / ("decoder.pth" if part == "encoder" else "encoder.pth")
        path.write_bytes({"empty": b"", "text": b"hello", "page": b"<!DOCTYPE html>", "half": good[:len(good) // 2],
                          "pointer": b"version https://git-lfs.github.com/spec/v1\n",  # what a clone without LFS holds
                          "other half": other.read_bytes()}[kind])
    refused([place.config, *settings(options)], f"model.vae_{part}_weights", path)
    assert not side_effect.exists()


@pytest.mark.parametrize("content", [b"e", b"0", b"\x80", b"B", b"t", b"s", b"(i", b"I1\n", b"]a", b"V\n."])
def test_whatever_a_weight_file_begins_with(place, refused, content):
    """A pickle's first bytes decide what its reader trips over."""
    options = place.autoencoder()
    (place.root / "encoder.pth").write_bytes(content)
    refused([place.config, *settings(options)], "model.vae_encoder_weights", place.root / "encoder.pth")


# ---- --resume

@pytest.mark.parametrize("setting, says", [
    (("model.dim=16",), ["model.dim is 16 there and 8"]),
    (("model.dim_mults=[1,2,2]",), ["model.dim_mults is [1, 2, 2] there and [1, 2]"]),
    (("model.timesteps=20",), ["model.timesteps is 20 there and 10"]),
    (("model_name=EDM",), ["another architecture", "model_name is EDM there and DDPM"]),
])
def test_resume_from_another_architecture(place, refused, setting, says):
    path = place.checkpoint(*setting)
    for given in (path, path.parent):
        refused([place.config, "--resume", given], "--resume", path, *says)


def test_resume_from_weights_that_are_not_what_the_config_says(place, refused):
    path = place.checkpoint(state_dict={"model.conv_in.weight": torch.zeros(3)})
    refused([place.config, "--resume", path], path, "another architecture", "tensors differ")


def test_resume_runs_no_code(place, refused):
    side_effect = place.root / "side-effect"
    path = place.checkpoint(note=Evil(side_effect))
    refused([place.config, "--resume", path], path, "could run code")
    refused([place.config, "--resume", path.parent], path.parent, "no whole checkpoint")
    assert not side_effect.exists()


def test_resume_from_what_is_no_checkpoint(place, refused):
    (place.root / "empty").mkdir()
    refused([place.config, "--resume", place.root / "nothing"], place.root / "nothing")
    refused([place.config, "--resume", place.root / "empty"], "--resume", place.root / "empty")
    refused([place.config, "--resume", place.config], place.config)


def test_resume_from_a_damaged_checkpoint(place, refused):
    path = place.checkpoint()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused([place.config, "--resume", path], path, "damaged")


def test_the_latents_of_another_autoencoder(place, refused, monkeypatch):
    """Neither resumed nor drawn from; a checkpoint that does not say which it was passes."""
    options, slim = place.autoencoder(), place.root / "slim.pth.tar"
    model = [f"{key}={value}" for key, value in options.items()]
    hashes = TAESD(*(options[f"model.vae_{half}_weights"] for half in ("encoder", "decoder"))).hashes()
    path = place.checkpoint(*model, autoencoder=hashes)
    monkeypatch.setattr(sys, "argv", ["train.py", str(place.config), "--dry-run", "--resume", str(path),
                                      *settings(options)])
    assert not train.main()
    monkeypatch.setattr(sys, "argv", ["export.py", str(path), str(slim)])
    export.main()
    load_model(str(slim))
    torch.save(build_decoder().state_dict(), place.root / "decoder.pth")
    message = refused([place.config, "--resume", path, *settings(options)], "model.vae_decoder_weights: ",
                      "decoder.pth are not those in whose latents", path)
    assert "encoder" not in message
    for each in (path, slim):
        with pytest.raises(UsageError, match="decoder.pth are not those in whose latents"):
            load_model(str(each))
    load_model(str(place.checkpoint(*model)))


def test_resume_with_other_data(place, refused):
    refused([place.config, "--resume", place.checkpoint(classes=["cat", "cow"])], "number 1 is cow there and dog in")
    refused([place.config, "--resume", place.checkpoint(classes=["cat", "dog"], updates_per_epoch=3)],
            "has 3 updates an epoch", "give 2")


# ---- several processes

@pytest.mark.parametrize("size, says", [(2, "loader.batch_size: 2 images cannot be divided among 3 processes"),
                                        (64, "loader.batch_size: 64 is more than the data set's 4 images, which")])
def test_a_batch_that_cannot_be_shared(place, refused, monkeypatch, size, says):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(datasets, "read_files", lambda *a: pytest.fail("read before it was checked"))
    refused([place.config, "--set", f"loader.batch_size={size}"], says)


# ---- the run folder

def test_run_folder_that_exists(place, monkeypatch):
    folder = place.runs / "tiny_mine"
    folder.mkdir(parents=True)
    before = place.files()
    monkeypatch.setattr(sys, "argv", ["train.py", str(place.config), "--output", "mine"])
    with pytest.raises(UsageError) as error:
        train.main()
    assert "--output" in str(error.value) and str(folder) in str(error.value) and "--resume" in str(error.value)
    assert place.files() == before


def test_run_folder_that_cannot_be_written(place, refused):
    """Below a file, which stops root too."""
    (place.root / "file").write_text("x")
    refused([place.config, "--set", f"output_folder={place.root / 'file' / 'runs'}"],
            "output_folder", place.root / "file" / "runs", "Not a directory")
    refused([place.config, "--set", f"output_folder={place.root / 'file'}"], "output_folder", place.root / "file")


# ---- exit status

@pytest.mark.parametrize("error, status", [(UsageError("key: 3 is wrong"), 2), (RunError("disk full"), 1),
                                           (KeyboardInterrupt(), 130)])
def test_exit_status_of_errors(error, status, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == (status != 130)
    assert "Traceback" not in printed.err and str(error) in printed.err


@pytest.mark.parametrize("result, status", [(None, None), (0, 0), (143, 143)])
def test_exit_status_is_what_main_returns(result, status):
    with pytest.raises(SystemExit) as end:
        run(lambda: result)
    assert end.value.code == status


def test_other_errors_are_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.parametrize("mistake", ["setting", "image", "pickle"])
def test_the_script_itself(place, mistake):
    arguments, side_effect, name = [], place.root / "side-effect", "broken.png"
    if mistake == "setting":
        arguments, name = ["--set", "train_cfg.epochs=0"], "train_cfg.epochs is 0"
    elif mistake == "image":
        (place.root / "images" / "dog" / name).write_bytes(b"no image")
    else:
        arguments = ["--resume", str(place.checkpoint(note=Evil(side_effect)))]
        name = arguments[1]
    before = place.files()
    done = subprocess.run([sys.executable, str(Path(CODE) / "train.py"), str(place.config), *arguments],
                          capture_output=True, text=True, cwd=place.root, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("train.py: error: ") and name in done.stderr
    assert place.files() == before and not side_effect.exists()
