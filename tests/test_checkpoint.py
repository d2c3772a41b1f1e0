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
from libs import checkpoint
from libs.common.checkpoint import (FINAL, check_resumable, checkpoint_name, list_checkpoints, model_file,
                             remove_old_checkpoints, set_aside_later)
from libs.config import complete_config
from libs.common.seeds import rng_state


def state(epoch=1, **more):
    """What train.py saves, small."""
    return {"epoch": epoch, "batch": 0, "step": 10 * epoch, "config": {"seed": 0},
            "state_dict": {"w": torch.full((1000,), float(epoch))}, "state_dict_ema": {"w": torch.zeros(1000)},
            "optimizer": {"lr": 0.1}, "scaler": {}, "rng": rng_state(), **more}


# ---- writing

def test_save_and_load(tmp_path):
    save_checkpoint(state(3), False, str(tmp_path / "new" / "folder"), "epoch_002.pth.tar")
    loaded = load_checkpoint(str(tmp_path / "new" / "folder" / "epoch_002.pth.tar"))
    assert loaded["epoch"] == 3 and torch.equal(loaded["state_dict"]["w"], torch.full((1000,), 3.0))
    assert loaded.keys() == state().keys()
    assert os.listdir(tmp_path / "new" / "folder") == ["epoch_002.pth.tar"]


def test_final_holds_what_sampling_needs(tmp_path):
    save_checkpoint(state(), True, str(tmp_path), "epoch_000.pth.tar")
    assert sorted(os.listdir(tmp_path)) == ["epoch_000.pth.tar", FINAL] and FINAL == "model_final.pth.tar"
    final = load_checkpoint(str(tmp_path / FINAL))
    assert not {"optimizer", "scaler", "rng"} & final.keys()
    assert {"epoch", "state_dict", "state_dict_ema", "config"} <= final.keys()
    with pytest.raises(UsageError, match="no optimizer state"):  # not what one goes on from
        find_checkpoint(str(tmp_path / FINAL))


class FullDisk(io.FileIO):
    """A file on a disk with room for `room` more bytes."""

    room = 3000

    def write(self, data):
        n = memoryview(data).nbytes
        if self.tell() + n > self.room:
            raise OSError(28, "No space left on device")
        return super().write(data)


def failing_save(*args, **kwargs):
    args[1].write(b"half a file")
    raise RuntimeError("PytorchStreamWriter failed writing file\nand more")


@pytest.mark.parametrize("how", ["torch.save", "write", "open", "fsync"])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, how):
    save_checkpoint(state(1), False, str(tmp_path), "epoch_000.pth.tar")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        if how == "torch.save":
            m.setattr(torch, "save", failing_save)
        elif how == "fsync":
            m.setattr(checkpoint.os, "fsync", full)
        else:
            m.setattr(builtins, "open", full if how == "open" else FullDisk)
        with pytest.raises(RunError) as error:
            save_checkpoint(state(2), False, str(tmp_path), "epoch_000.pth.tar")
    path = str(tmp_path / "epoch_000.pth.tar")
    assert os.path.relpath(path) in one_line(error)
    assert ("failed writing" if how == "torch.save" else "No space left") in one_line(error)
    assert os.listdir(tmp_path) == ["epoch_000.pth.tar"]  # no .partial
    assert load_checkpoint(path)["epoch"] == 1


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """The rename comes last, after everything has reached the disk."""
    save_checkpoint(state(1), False, str(tmp_path), "epoch_000.pth.tar")
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(checkpoint.os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda *a: (calls.append("save"), save(*a)))
    save_checkpoint(state(2), False, str(tmp_path), "epoch_000.pth.tar")
    assert calls == ["save", "fsync", "replace"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError) as error:
        save_checkpoint(state(), False, str(tmp_path / "file" / "run"), "epoch_000.pth.tar")
    assert str(tmp_path / "file" / "run") in one_line(error)


# ---- names and their order

@pytest.mark.parametrize("epoch, batch, name", [
    (1, 0, "epoch_000.pth.tar"), (10, 0, "epoch_009.pth.tar"), (0, 5, "epoch_000_batch_00005.pth.tar"),
    (0, 0, "epoch_000_batch_00000.pth.tar"), (10, 42, "epoch_010_batch_00042.pth.tar"), (1001, 0, "epoch_1000.pth.tar"),
])
def test_names(epoch, batch, name):
    assert checkpoint_name(epoch, batch) == name


NAMES = ["epoch_000_batch_00000.pth.tar", "epoch_000_batch_00005.pth.tar", "epoch_000.pth.tar",
         "epoch_001_batch_00002.pth.tar", "epoch_009.pth.tar", "epoch_010_batch_00005.pth.tar", "epoch_010.pth.tar",
         "epoch_099.pth.tar", "epoch_1000.pth.tar"]


def test_newest_first_whatever_the_file_times(tmp_path):
    for k, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 - k, 1000 - k))
    for other in (FINAL, "epoch_2000.pth.tar.partial", "epoch_.pth.tar", "sample-3.png"):
        (tmp_path / other).write_bytes(b"")
    assert [os.path.basename(p) for p in list_checkpoints(str(tmp_path))] == NAMES[::-1]


@pytest.mark.parametrize("keep, left", [(None, 9), (3, 3), (1, 1), (50, 9)])
def test_keep_last(tmp_path, keep, left):
    for name in NAMES + [FINAL, "epoch_010.pth.tar.partial", "config.txt"]:
        (tmp_path / name).write_bytes(b"")
    remove_old_checkpoints(str(tmp_path), keep)
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES[-left:] + [FINAL, "config.txt"])


# ---- reading

@pytest.fixture
def run_folder(tmp_path):
    """epoch_009, epoch_010_batch_00005 and epoch_010, the newest."""
    for epoch, batch in ((10, 0), (10, 5), (11, 0)):
        save_checkpoint(state(epoch, batch=batch), False, str(tmp_path), checkpoint_name(epoch, batch))
    return tmp_path


def test_find_the_newest(run_folder):
    path, found = find_checkpoint(str(run_folder))
    assert os.path.basename(path) == "epoch_010.pth.tar" and found["epoch"] == 11
    (run_folder / "epoch_010.pth.tar").unlink()
    path, found = find_checkpoint(str(run_folder))
    assert os.path.basename(path) == "epoch_010_batch_00005.pth.tar" and (found["epoch"], found["batch"]) == (10, 5)
    path, found = find_checkpoint(str(run_folder / "epoch_009.pth.tar"))
    assert found["epoch"] == 10 and found["batch"] == 0


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def test_a_damaged_one_is_named_and_skipped(run_folder, capsys):
    newest, middle = run_folder / "epoch_010.pth.tar", run_folder / "epoch_010_batch_00005.pth.tar"
    newest.write_bytes(newest.read_bytes()[:-100])
    flip(middle, 0.5)
    path, found = find_checkpoint(str(run_folder))
    assert os.path.basename(path) == "epoch_009.pth.tar" and found["epoch"] == 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and str(newest) in lines[0] and str(middle) in lines[1]
    for damaged in (newest, middle):  # asked for by name it is no second choice
        with pytest.raises(UsageError) as error:
            find_checkpoint(str(damaged))
        assert str(damaged) in one_line(error) and "damaged" in one_line(error)


def test_no_damage_goes_unseen(tmp_path):
    """One changed byte, anywhere in the file: refused as damaged, or the very same content."""
    path = tmp_path / "epoch_000.pth.tar"
    small = {k: v for k, v in state().items() if k != "rng"}
    save_checkpoint(small, False, str(tmp_path), path.name)
    data, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for k in range(0, len(data), 11):
        changed = bytearray(data)
        changed[k] ^= rng.choice([1, 0x80, 0xff])
        path.write_bytes(changed)
        try:
            found = load_checkpoint(str(path))
        except UsageError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            refused += 1
        else:  # padding, or a date
            assert all(torch.equal(found[d]["w"], small[d]["w"]) for d in ("state_dict", "state_dict_ema"))
            assert found["step"] == 10
    assert refused > len(data) // 22


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_truncated(run_folder, part):
    path = run_folder / "epoch_010.pth.tar"
    data = path.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    with pytest.raises(UsageError, match="epoch_010.pth.tar is damaged or no checkpoint"):
        load_checkpoint(str(path))


def test_code_is_refused_and_not_run(tmp_path):
    path, side_effect = str(tmp_path / "epoch_000.pth.tar"), tmp_path / "side-effect"
    torch.save(state(extra=Evil(side_effect)), path)
    with pytest.raises(UsageError) as error:
        find_checkpoint(path)
    assert path in one_line(error) and "refused" in one_line(error)
    with pytest.raises(UsageError):
        find_checkpoint(str(tmp_path))
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Evil(side_effect)))
    with pytest.raises(UsageError, match="plain.pkl"):
        find_checkpoint(str(tmp_path / "plain.pkl"))
    assert not side_effect.exists()


def test_no_checkpoint(tmp_path):
    contents = {"text": b"hello", "empty": b"", "page": b"<html></html>"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "zip", "w") as z:
        z.writestr("x", "y")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"w": torch.zeros(3)}, tmp_path / "weights")  # a state dict of something else
    for name in [*contents, "zip", "list", "weights", "missing"]:
        with pytest.raises(UsageError) as error:
            find_checkpoint(str(tmp_path / name))
        assert str(tmp_path / name) in one_line(error)


def test_folder_without_a_checkpoint(tmp_path):
    (tmp_path / FINAL).write_bytes(b"")
    with pytest.raises(UsageError) as error:
        find_checkpoint(str(tmp_path))
    assert "--resume" in one_line(error) and str(tmp_path) in one_line(error)


def config(**changes):
    given = {section: {} for section in ("dataset", "loader", "model", "train_cfg")}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (given[section] if name else given)[name or key] = value
    return complete_config(given)


def test_resume_says_what_changes(capsys):
    check_resumable(config(train_cfg__lr=0.1, train_cfg__epochs=3), {"config": config(), "batch": 0}, "p")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "train_cfg.lr: 0.0002 until now, 0.1 from here on" in lines


@pytest.mark.parametrize("change", [{"model__dim": 32}, {"model__dim_mults": [1, 2]}, {"model__timesteps": 10},
                                    {"dataset__img_size": 32}])
def test_resume_refuses_another_model(change):
    with pytest.raises(UsageError) as error:
        check_resumable(config(**change), {"config": config(), "batch": 0}, "path")
    assert "path" in one_line(error) and "architecture" in one_line(error)


@pytest.mark.parametrize("change", [{"loader__batch_size": 32}, {"dataset__name": "FashionMNIST"}, {"seed": 7}])
def test_resume_refuses_other_batches(change):
    with pytest.raises(UsageError, match="path is of another run"):
        check_resumable(config(**change), {"config": config(), "batch": 0}, "path")


def test_resume_refuses_other_latents():
    latent = dict(model__use_vae=True, model__vae_encoder_weights="e", model__vae_decoder_weights="d")
    before = config(**latent)
    del before["dataset"]["latent_crops"]  # of a run before there was a cache
    with pytest.raises(UsageError, match="dataset.latent_crops is 0 there and 4 in the config"):
        check_resumable(config(**latent), {"config": before, "batch": 0}, "path")
    check_resumable(config(dataset__latent_crops=0, **latent), {"config": before, "batch": 0}, "path")
    check_resumable(config(dataset__latent_crops=9), {"config": config(), "batch": 0}, "path")  # pixels


def test_what_comes_after_the_resumed_checkpoint_is_set_aside(tmp_path, capsys):
    """Else a later --resume of the folder would take the run that was left, and keep_last delete the new one."""
    for name in ("epoch_004", "epoch_006_batch_00003", "epoch_009", "epoch_012"):
        (tmp_path / f"{name}.pth.tar").write_bytes(name.encode())
    set_aside_later(str(tmp_path / "epoch_006_batch_00003.pth.tar"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch_004.pth.tar", "epoch_006_batch_00003.pth.tar", "epoch_009.pth.tar.superseded",
        "epoch_012.pth.tar.superseded"]
    assert [os.path.basename(p) for p in list_checkpoints(tmp_path)] == ["epoch_006_batch_00003.pth.tar",
                                                                       "epoch_004.pth.tar"]
    assert capsys.readouterr().out.count("superseded") == 2

    (tmp_path / "epoch_009.pth.tar").write_bytes(b"another run")
    set_aside_later(str(tmp_path / "epoch_004.pth.tar"))  # a second time: the first ones stay as they are
    assert (tmp_path / "epoch_009.pth.tar.superseded").read_bytes() == b"epoch_009"
    assert (tmp_path / "epoch_009.pth.tar.superseded2").read_bytes() == b"another run"


@pytest.mark.parametrize("name, classes", [("ImageFolder", 7), ("MiniImageNet", 64), ("AFHQ", 2)])
def test_resume_where_the_folder_settles_the_classes(name, classes):
    """The checkpoint knows how many there were; the config does not before the folder is read."""
    saved = config(dataset__name=name)
    saved["model"]["num_classes"] = classes  # as train.py fills in
    check_resumable(config(dataset__name=name), {"config": saved, "batch": 0}, "path")


def test_the_model_of_a_run_folder(tmp_path):
    """The final one; but not where a resumed run has gone beyond it."""
    with pytest.raises(UsageError, match="neither model_final.pth.tar nor"):
        model_file(str(tmp_path))
    for age, name in ((30, "epoch_009.pth.tar"), (20, "epoch_019.pth.tar"), (20, "model_final.pth.tar")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert model_file(str(tmp_path)).endswith("model_final.pth.tar")
    (tmp_path / "epoch_024.pth.tar").touch()
    os.utime(tmp_path / "epoch_024.pth.tar", (1e9, 1e9))
    assert model_file(str(tmp_path)).endswith("epoch_024.pth.tar")
    assert model_file("x.pth.tar") == "x.pth.tar"
