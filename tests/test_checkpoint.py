"""Checkpoints: written whole or not at all, read without running code, resumed only where they fit."""

import builtins
import io
import os
import pickle
import random
import zipfile

import pytest
import torch

from helpers import Evil, one_line
from libs import RunError, UsageError, find_checkpoint, load_checkpoint, save_checkpoint
from libs.common import checkpoint
from libs.common.checkpoint import (FINAL, TO_RESUME, checkpoint_name, find_run, list_checkpoints, model_file,
                                    remove_old_checkpoints, set_aside_later)
from libs.common.files import load_tensors
from libs.config import complete_config, set_values
from libs.training.resume import check_resumable


def state(epoch=1, **more):
    """What train.py saves, small."""
    return {"epoch": epoch, "batch": 0, "step": 10 * epoch, "config": {"seed": 0},
            "state_dict": {"w": torch.full((1000,), float(epoch))}, "state_dict_ema": {"w": torch.zeros(1000)},
            "optimizer": {"state": {}}, "scaler": {}, **more}


# ---- writing

def test_save_and_load(tmp_path):
    folder = tmp_path / "new" / "folder"
    save_checkpoint(state(3), True, str(folder), "epoch_002.pth.tar")
    assert sorted(os.listdir(folder)) == ["epoch_002.pth.tar", FINAL] and FINAL == "model_final.pth.tar"
    loaded = load_checkpoint(str(folder / "epoch_002.pth.tar"))
    assert loaded.keys() == state().keys() and torch.equal(loaded["state_dict"]["w"], torch.full((1000,), 3.0))
    # the final one holds what drawing needs, not what training needs
    assert load_checkpoint(str(folder / FINAL)).keys() == state().keys() - {"optimizer", "scaler"}
    with pytest.raises(UsageError, match="holds no optimizer"):
        find_checkpoint(str(folder / FINAL))


class FullDisk(io.FileIO):
    """A file on a disk with room for 3,000 bytes."""

    def write(self, data):
        if self.tell() + memoryview(data).nbytes > 3000:
            raise OSError(28, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("cause", ["torch.save", "write", "open", "fsync"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, cause):
    path = str(tmp_path / "epoch_000.pth.tar")
    save_checkpoint(state(1), False, str(tmp_path), "epoch_000.pth.tar")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def failing_save(state, f):
        f.write(b"half a file")
        raise RuntimeError("PytorchStreamWriter failed writing file\nand more")

    with monkeypatch.context() as m:
        place, name, failing = {"torch.save": (torch, "save", failing_save), "fsync": (os, "fsync", full),
                                "open": (builtins, "open", full), "write": (builtins, "open", FullDisk)}[cause]
        m.setattr(place, name, failing)
        with pytest.raises(RunError) as error:
            save_checkpoint(state(2), False, str(tmp_path), "epoch_000.pth.tar")
    assert os.path.relpath(path) in one_line(error) and "earlier checkpoints are untouched" in one_line(error)
    assert ("failed writing" if cause == "torch.save" else "No space left") in one_line(error)
    assert os.listdir(tmp_path) == ["epoch_000.pth.tar"]  # no .partial
    assert load_checkpoint(path)["epoch"] == 1


def test_the_rename_comes_last(tmp_path, monkeypatch):
    """The old file stays until the new one has reached the disk."""
    calls = []
    for module, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    save_checkpoint(state(2), False, str(tmp_path), "epoch_000.pth.tar")
    assert calls == ["save", "fsync", "replace"]


# ---- names and their order

NAMES = ["epoch_000_batch_00000.pth.tar", "epoch_000_batch_00005.pth.tar", "epoch_000.pth.tar",
         "epoch_001_batch_00002.pth.tar", "epoch_009.pth.tar", "epoch_010_batch_00005.pth.tar", "epoch_010.pth.tar",
         "epoch_1000.pth.tar"]


def test_newest_first_whatever_the_file_times(tmp_path):
    progress = [(0, 0), (0, 5), (1, 0), (1, 2), (10, 0), (10, 5), (11, 0), (1001, 0)]
    assert [checkpoint_name(epoch, batch) for epoch, batch in progress] == NAMES
    for k, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 - k, 1000 - k))
    for other in (FINAL, "epoch_2000.pth.tar.partial", "epoch_.pth.tar", "sample-3.png"):
        (tmp_path / other).write_bytes(b"")
    assert [os.path.basename(p) for p in list_checkpoints(str(tmp_path))] == NAMES[::-1]


@pytest.mark.parametrize("keep, left", [(None, 8), (3, 3), (50, 8)])
def test_keep_last(tmp_path, keep, left):
    for name in NAMES + [FINAL, "config.txt"]:
        (tmp_path / name).write_bytes(b"")
    remove_old_checkpoints(str(tmp_path), keep)
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES[-left:] + [FINAL, "config.txt"])


def test_what_comes_after_the_resumed_checkpoint_is_set_aside(tmp_path, capsys):
    """Otherwise a later --resume of the folder would take the abandoned run, and keep_last delete the new one."""
    for name in ("epoch_004", "epoch_006_batch_00003", "epoch_009"):
        (tmp_path / f"{name}.pth.tar").write_bytes(name.encode())
    set_aside_later(str(tmp_path / "epoch_006_batch_00003.pth.tar"))
    assert sorted(os.listdir(tmp_path)) == ["epoch_004.pth.tar", "epoch_006_batch_00003.pth.tar",
                                            "epoch_009.pth.tar.superseded"]
    assert "superseded" in capsys.readouterr().out
    (tmp_path / "epoch_009.pth.tar").write_bytes(b"another run")
    set_aside_later(str(tmp_path / "epoch_004.pth.tar"))  # a second time: the first one stays
    assert (tmp_path / "epoch_009.pth.tar.superseded").read_bytes() == b"epoch_009"
    assert (tmp_path / "epoch_009.pth.tar.superseded2").read_bytes() == b"another run"


# ---- finding

def test_the_model_of_a_run_folder(tmp_path):
    """The final one; but not where a resumed run has gone beyond it."""
    with pytest.raises(UsageError, match="neither model_final.pth.tar nor"):
        model_file(str(tmp_path))
    for age, name in ((30, "epoch_009.pth.tar"), (20, "epoch_019.pth.tar"), (20, FINAL)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert model_file(str(tmp_path)).endswith(FINAL)
    (tmp_path / "epoch_024.pth.tar").touch()
    assert model_file(str(tmp_path)).endswith("epoch_024.pth.tar")
    assert model_file("x.pth.tar") == "x.pth.tar"


def test_a_run_is_found_by_its_name(tmp_path, monkeypatch):
    run = tmp_path / "logs" / "mnist_a"
    run.mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "code" / "libs" / "common" / "checkpoint.py"))
    assert [find_run(name) for name in ("mnist_a", "logs/mnist_a", str(run))] == [str(run)] * 3
    assert find_run("mnist_b") == "mnist_b"
    monkeypatch.chdir(tmp_path)
    assert find_run("logs/mnist_a/") == "logs/mnist_a/"  # it exists as it is given


@pytest.fixture
def run_folder(tmp_path):
    """epoch_009, epoch_010_batch_00005 and epoch_010, the newest."""
    for epoch, batch in ((10, 0), (10, 5), (11, 0)):
        save_checkpoint(state(epoch, batch=batch), False, str(tmp_path), checkpoint_name(epoch, batch))
    return tmp_path


def test_a_damaged_one_is_named_and_skipped(run_folder, capsys):
    newest, middle = run_folder / "epoch_010.pth.tar", run_folder / "epoch_010_batch_00005.pth.tar"
    assert find_checkpoint(str(run_folder))[0] == str(newest)
    newest.write_bytes(newest.read_bytes()[:-100])
    data = bytearray(middle.read_bytes())
    data[len(data) // 2] ^= 1
    middle.write_bytes(data)
    path, found = find_checkpoint(str(run_folder))
    assert os.path.basename(path) == "epoch_009.pth.tar" and found["epoch"] == 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and str(newest) in lines[0] and str(middle) in lines[1]
    for damaged in (newest, middle):  # asked for by name it is no second choice
        with pytest.raises(UsageError) as error:
            find_checkpoint(str(damaged))
        assert str(damaged) in one_line(error) and "damaged" in one_line(error)


# ---- reading

def test_an_archive_on_several_disks(tmp_path):
    path = tmp_path / "epoch_000.pth.tar"
    save_checkpoint(state(), False, str(tmp_path), path.name)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 16] = 2  # their number, in the locator of the directory's end
    path.write_bytes(data)
    with pytest.raises(UsageError, match="damaged or no checkpoint: zipfiles that span multiple disks"):
        load_checkpoint(str(path))


def test_many_classes(tmp_path):
    save_checkpoint(state(classes=[str(k) for k in range(1000)]), False, str(tmp_path), "epoch_000.pth.tar")
    assert len(load_checkpoint(str(tmp_path / "epoch_000.pth.tar"))["classes"]) == 1000


def test_no_damage_goes_unseen(tmp_path):
    """One changed byte, anywhere in the file: refused as damaged, or the very same content."""
    path, small = tmp_path / "epoch_000.pth.tar", state()
    save_checkpoint(small, False, str(tmp_path), path.name)
    data, rng, positions, refused = path.read_bytes(), random.Random(0), 0, 0
    for k in range(0, len(data), 23):
        changed = bytearray(data)
        changed[k] ^= rng.choice([1, 0x80, 0xff])
        path.write_bytes(changed)
        positions += 1
        try:
            found = load_checkpoint(str(path))
        except UsageError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            refused += 1
        else:  # padding, or a date
            assert all(torch.equal(found[d]["w"], small[d]["w"]) for d in ("state_dict", "state_dict_ema"))
            assert found["step"] == 10
    assert refused > positions / 2


def test_code_is_refused_and_not_run(tmp_path):
    path, side_effect = str(tmp_path / "epoch_000.pth.tar"), tmp_path / "side-effect"
    torch.save(state(extra=Evil(side_effect)), path)
    with pytest.raises(UsageError, match="could run code, so it is refused") as error:
        find_checkpoint(path)
    assert path in one_line(error)
    with pytest.raises(UsageError, match="no whole checkpoint"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil(side_effect)))
    with pytest.raises(UsageError, match="plain.pkl"):
        find_checkpoint(str(tmp_path / "plain.pkl"))
    assert not side_effect.exists()


def test_no_checkpoint(tmp_path):
    (tmp_path / "page").write_bytes(b"<html></html>")
    with zipfile.ZipFile(tmp_path / "zip", "w") as z:
        z.writestr("x", "y")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"w": torch.zeros(3)}, tmp_path / "weights")  # a state dict of something else
    for name in ("page", "zip", "list", "weights", "missing"):
        with pytest.raises(UsageError) as error:
            find_checkpoint(str(tmp_path / name))
        assert str(tmp_path / name) in one_line(error)


LOOP = []
LOOP.append(LOOP)


@pytest.mark.parametrize("key, value", [
    ("config", [1]), ("config", {1: 2}), ("config", torch.zeros(2)), ("classes", 7), ("classes", []), ("classes", LOOP),
    ("epoch", "x"), ("epoch", -5), ("epoch", True), ("epoch", 2 ** 2000), ("epoch", torch.ones(2, 2)), ("step", 2.0),
    ("batch", None), ("print_freq", 0), ("ckpt_freq", "often"), ("updates_per_epoch", [2]), ("autoencoder", {}),
    ("autoencoder", {"encoder": 1, "decoder": "a"}), ("labels_sha256", 3), ("state_dict", None), ("state_dict", [1, 2]),
    ("state_dict_ema", {1: torch.zeros(1)}), ("optimizer", None), ("optimizer", {}), ("optimizer", {"state": [1]}),
    ("optimizer", {"state": {"x": {}}}), ("scaler", []), ("scaler", {"skipped": "x"}),
    ("scaler", {"in_a_row": 2 ** 70}), ("scaler", {"scaler": {"scale": "x"}}), ("scaler", {"scaler": 1})], ids=lambda x: x if isinstance(x, str) else "")
def test_what_breaks_a_rule(tmp_path, key, value):
    path = str(tmp_path / "epoch_000.pth.tar")
    torch.save(state() | {key: value}, path)
    with pytest.raises(UsageError) as error:
        load_checkpoint(path)
    assert f"{path}: {key} is " in one_line(error) and "it must be" in one_line(error) and len(one_line(error)) < 600


@pytest.mark.parametrize("key", TO_RESUME)
def test_what_resuming_needs(tmp_path, key):
    path = str(tmp_path / "epoch_000.pth.tar")
    torch.save({k: v for k, v in state().items() if k != key}, path)
    load_checkpoint(path)
    with pytest.raises(UsageError, match=f"holds no {key}"):
        find_checkpoint(path)


@pytest.mark.parametrize("value", [
    3, None, [0.0] * 4, torch.zeros(5), torch.zeros(1).expand(10 ** 12), torch.zeros(4).long(), torch.zeros(4) + 0j,
    torch.zeros(4).to_sparse(), torch.zeros(4, device="meta"), torch.tensor([0, 0, 0, float("nan")]),
    torch.full((4,), 1e300, dtype=torch.float64)], ids=lambda x: "")
def test_tensors_that_do_not_fit(value):
    for given in ({"w": value}, {"w": torch.zeros(4), "v": value}, value):
        with pytest.raises(UsageError, match="^here(: w is not finite| is of another architecture)"):
            load_tensors({"w": torch.zeros(4)}, given, "here")
    own = {"w": torch.zeros(2, 2), "n": torch.tensor(0)}
    load_tensors(own, {"w": torch.nn.Parameter(torch.ones(1).half().expand(2, 2)), "n": torch.tensor(3)}, "here")
    assert own["w"].tolist() == [[1, 1], [1, 1]] and own["w"].dtype == torch.float32 and own["n"] == 3


# ---- what a run can be resumed with

def config(*settings):
    return complete_config(set_values({}, settings))


LATENTS = ["model.use_vae=true", "model.vae_encoder_weights=e", "model.vae_decoder_weights=d", "dataset.name=AFHQ"]


def test_resuming_prints_what_changes(capsys):
    check_resumable(config("train_cfg.lr=0.1", "train_cfg.epochs=3"), {"config": config()}, "path")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train_cfg.lr: 0.0002 until now, 0.1 from here on", "train_cfg.epochs: 30 until now, 3 from here on"]


@pytest.mark.parametrize("settings, kind", [
    (["model.dim=32"], "architecture"), (["model.dim_mults=[1, 2]"], "architecture"), (["model_name=EDM"], "architecture"),
    (["model.timesteps=10"], "architecture"), (["dataset.img_size=32"], "architecture"), (["loader.batch_size=32"], "run"),
    (["dataset.name=FashionMNIST"], "run"), (["train_cfg.optimizer=muon"], "run"), (["seed=7"], "run")])
def test_resuming_refuses_another_model_and_other_batches(settings, kind):
    with pytest.raises(UsageError, match=f"path is of another {kind}: ") as error:
        check_resumable(config(*settings), {"config": config()}, "path")
    assert settings[0].split("=")[0] in one_line(error) or "model.img_shape" in one_line(error)


def test_resuming_refuses_other_latents():
    before = config(*LATENTS)
    check_resumable(config(*LATENTS), {"config": before}, "path")
    with pytest.raises(UsageError, match="dataset.latent_crops is 4 there and 0 in the config"):
        check_resumable(config(*LATENTS, "dataset.latent_crops=0"), {"config": before}, "path")
    check_resumable(config("dataset.latent_crops=9"), {"config": config()}, "path")  # pixels


def test_the_folder_determines_the_classes():
    """The checkpoint knows how many there were; the config does not before the folder is read."""
    saved = config("dataset.name=ImageFolder")
    saved["model"]["num_classes"] = 7  # as train.py fills in
    check_resumable(config("dataset.name=ImageFolder"), {"config": saved}, "path")
