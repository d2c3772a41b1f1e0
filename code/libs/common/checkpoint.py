"""Checkpoints: written whole or not at all, and read without running code.

Keys: `epoch` (finished epochs), `batch` (finished batches of the next one), `step` (finished updates),
`state_dict`, `state_dict_ema`, `optimizer`, `scaler`, `rng`, `config`, `classes`, and of a model of latents
`autoencoder`, the hashes of its halves. Tensors and plain values only.
"""

import os
import pickle
import re
import zipfile
from itertools import zip_longest

import torch

from .errors import RunError, UsageError, first_line, display_path
from .files import save_tensors, atomic_file

FINAL = "model_final.pth.tar"
# epoch_009: after the tenth epoch; epoch_009_batch_00042: after 42 batches of it
PATTERN = re.compile(r"epoch_(\d+)(?:_batch_(\d+))?\.pth\.tar$")


def checkpoint_name(epoch, batch=0):
    """File name after `epoch` finished epochs and `batch` batches of the next."""
    if batch or not epoch:
        return f"epoch_{epoch:03d}_batch_{batch:05d}.pth.tar"
    return f"epoch_{epoch - 1:03d}.pth.tar"


def _progress(name):
    """(finished epochs, batches), by which checkpoints are ordered."""
    epoch, batch = PATTERN.match(name).groups()
    return (int(epoch), int(batch)) if batch else (int(epoch) + 1, 0)


def list_checkpoints(folder):
    """Paths of a run folder's checkpoints, newest first."""
    names = [n for n in os.listdir(folder) if PATTERN.match(n)]
    return [os.path.join(folder, n) for n in sorted(names, key=_progress, reverse=True)]


def save_checkpoint(state, is_final, file_folder, file_name="checkpoint.pth.tar"):
    """Save `state` as file_folder/file_name; with `is_final` also, less what only training needs, as FINAL.

    Whatever happens, the file under that name is whole: the old one or the new one.
    Raises RunError when the disk is full or the folder cannot be written.
    """
    _write(state, os.path.join(file_folder, file_name))
    if is_final:
        model = {k: v for k, v in state.items() if k not in ("optimizer", "scaler", "rng")}
        _write(model, os.path.join(file_folder, FINAL))


def _write(state, path):
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_file(path) as f:
            save_tensors(state, f)
    except (OSError, RunError) as e:
        raise RunError(f"checkpoint: {e}; earlier checkpoints are untouched") from None


def remove_old_checkpoints(folder, keep_last):
    """Delete all but the newest `keep_last` checkpoints (None: keep all) and what a killed run left half written."""
    for name in os.listdir(folder):
        if ".pth.tar." in name and name.endswith(".partial"):
            os.remove(os.path.join(folder, name))
    for path in list_checkpoints(folder)[keep_last:] if keep_last else ():
        os.remove(path)


def set_aside_later(path):
    """Resuming from a file leaves the run that came after it: its checkpoints get the ending `.superseded`."""
    folder, name = os.path.split(os.path.abspath(path))
    if not PATTERN.match(name):
        return
    for old in list_checkpoints(folder):
        if _progress(os.path.basename(old)) > _progress(name):
            new, n = f"{old}.superseded", 1
            while os.path.exists(new):  # not the first run that is left here
                n += 1
                new = f"{old}.superseded{n}"
            os.replace(old, new)
            print(f"{display_path(old)} is of the run that is left here: renamed to {os.path.basename(new)}")


def load_checkpoint(path):
    """Read a checkpoint of train.py onto the CPU.

    Raises UsageError when the file is missing, damaged (every byte is checked against the file's own
    checksums), holds more than tensors and plain values, or is something else.
    """
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint: no file {path}")
    try:
        with zipfile.ZipFile(path) as z:
            if z.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"checkpoint {path} holds more than tensors and plain values; loading it could run code, "
                         "so it is refused") from None
    except Exception as e:  # a damaged file makes zipfile and torch raise almost anything
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: {first_line(e)}") from None
    if not isinstance(state, dict) or not {"epoch", "state_dict_ema", "config"} <= state.keys():
        raise UsageError(f"checkpoint {path} is none of train.py's")
    return state


def find_checkpoint(path):
    """(path, state) to resume from: a file, or the newest whole checkpoint of a run folder.

    A damaged one in a folder is named on the terminal and the one before it is taken.
    """
    if not os.path.isdir(path):
        state = load_checkpoint(path)
        if "optimizer" not in state:
            raise UsageError(f"--resume: {path} holds no optimizer state; resume from an epoch_*.pth.tar beside it")
        return path, state
    for candidate in list_checkpoints(path):
        try:
            return candidate, load_checkpoint(candidate)
        except UsageError as e:
            print(f"{e}; trying the one before it", flush=True)
    raise UsageError(f"--resume: no whole checkpoint (epoch_*.pth.tar) in {path}")


def model_file(path):
    """The checkpoint to draw images from: the file itself, or of a run folder the final one, else the newest."""
    if not os.path.isdir(path):
        return path
    found, final = list_checkpoints(path), os.path.join(path, FINAL)
    # a run that was resumed leaves an older final one behind
    if os.path.isfile(final) and not (found and os.path.getmtime(found[0]) > os.path.getmtime(final)):
        return final
    if not found:
        raise UsageError(f"checkpoint: neither {FINAL} nor epoch_*.pth.tar in {path}")
    return found[0]


def check_resumable(config, state, path):
    """Refuse to go on with another model or other batches; name the training settings that change."""
    old = state["config"]
    family = {"DDIM": "DDPM"}  # the same model, sampled otherwise
    same = {"model_name": tuple(family.get(c["model_name"], c["model_name"]) for c in (old, config))}
    same |= {f"model.{k}": (old["model"].get(k, v), v) for k, v in config["model"].items()
             if not k.startswith("vae_") and k != "num_classes"}  # the data settle num_classes
    for key, (there, here) in same.items():
        if there != here:
            raise UsageError(f"--resume: {path} is of another architecture: "
                             f"{key} is {there} there and {here} in the config")
    same = {f"{a}.{b}": (old[a].get(b), config[a][b]) for a, b in (
        ("dataset", "name"), ("dataset", "img_size"), ("dataset", "limit"), ("loader", "batch_size"))}
    same["train_cfg.optimizer"] = old["train_cfg"].get("optimizer", "adamw"), config["train_cfg"]["optimizer"]
    if config["model"]["use_vae"]:  # before there was a cache, every update encoded anew
        same["dataset.latent_crops"] = tuple(c["dataset"].get("latent_crops") or 0 for c in (old, config))
    same["seed"] = old["seed"], config["seed"]
    for key, (there, here) in same.items():
        if there != here:
            raise UsageError(f"--resume: {path} is of another run: {key} is {there} there and {here} in the config")
    for key, value in config["train_cfg"].items():
        if old["train_cfg"].get(key, value) != value:
            print(f"train_cfg.{key}: {old['train_cfg'][key]} until now, {value} from here on")


def check_data(state, path, updates, folder, classes=()):
    """Refuse to go on with other data, of so many updates an epoch and these classes, than the checkpoint's."""
    there = state.get("updates_per_epoch", updates)
    if there != updates:
        raise UsageError(f"--resume: {path} has {there} updates an epoch, the data in {folder} give {updates}")
    for k, (there, here) in enumerate(zip_longest(state.get("classes", classes), classes)):
        if there != here:
            raise UsageError(f"--resume: {path} is of other classes: number {k} is {there} there "
                             f"and {here} in {folder}")
