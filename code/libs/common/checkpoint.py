"""Checkpoints: written whole or not at all, and read without running code.

Keys: `epoch` (finished epochs), `batch` (finished batches of the next one), `step` (finished updates),
`state_dict`, `state_dict_ema`, `optimizer`, `scaler`, `config`, of the data `updates_per_epoch`, `classes`,
`labels_sha256`, and of a model of latents `autoencoder`, the hashes of its halves. Tensors and plain values only.
"""

import os
import pickle
import re
import zipfile

from .errors import RunError, UsageError, display_path, first_line
from .files import atomic_file, read_tensors, save_tensors
from .rules import check, integer, list_of, mapping, number, optional, text

FINAL = "model_final.pth.tar"
# epoch_009: after the tenth epoch; epoch_009_batch_00042: after 42 batches of it
PATTERN = re.compile(r"epoch_(\d+)(?:_batch_(\d+))?\.pth\.tar$")

COUNT = integer(0, 2 ** 53)
# key -> rule, for the keys that are there; weights and the optimizer's state are compared with the model's own later
SCHEMA = {
    "epoch": COUNT, "batch": COUNT, "step": COUNT, "updates_per_epoch": COUNT,
    "ckpt_freq": integer(1, 2 ** 53), "print_freq": integer(1, 2 ** 53),
    "config": mapping(str), "classes": list_of(text(), most=10 ** 6), "labels_sha256": text(),
    "autoencoder": mapping(str, encoder=text(), decoder=text()),
    "state_dict": mapping(str), "state_dict_ema": mapping(str),
    "optimizer": mapping(str, state=mapping(int)),
    "scaler": mapping(str, skipped=optional(COUNT), in_a_row=optional(COUNT), scaler=optional(mapping(str, number(0)))),
}
TO_RESUME = ("optimizer", "scaler", "epoch", "batch", "step", "state_dict", "state_dict_ema")


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
        model = {k: v for k, v in state.items() if k not in ("optimizer", "scaler")}
        _write(model, os.path.join(file_folder, FINAL))


def _write(state, path):
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_file(path) as f:
            save_tensors(state, f)
    except (OSError, RunError) as e:
        raise RunError(f"checkpoint: {e}; earlier checkpoints are untouched") from None


def remove_old_checkpoints(folder, keep_last):
    """Delete all but the newest `keep_last` checkpoints (None: keep all)."""
    for path in list_checkpoints(folder)[keep_last:] if keep_last else ():
        os.remove(path)


def set_aside_later(path):
    """Rename the checkpoints newer than `path`, from which a run resumes, to `*.superseded`."""
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


def load_checkpoint(path, config=None, resume=False):
    """Read a checkpoint of train.py onto the CPU.

    config: the configuration of a checkpoint that holds none, as the course's do not; None: it must hold one.
    resume: it must hold what training needs to go on.
    Raises UsageError when the file is missing, damaged (every byte is checked against the file's own
    checksums), holds more than tensors and plain values, breaks a rule of SCHEMA, or is something else.
    """
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint: no file {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("those of train.py end in .pth.tar")
        state = read_tensors(path)
    except pickle.UnpicklingError:
        raise UsageError(f"checkpoint {path} holds more than tensors and plain values; loading it could run code, "
                         "so it is refused") from None
    except Exception as e:  # a damaged file makes zipfile and torch raise almost anything
        raise UsageError(f"checkpoint {path} is damaged or no checkpoint: {first_line(e)}") from None
    if not isinstance(state, dict) or not {"state_dict", "state_dict_ema"} & state.keys():
        raise UsageError(f"checkpoint {path} is none of train.py's")
    if config is not None and "config" in state:
        raise UsageError(f"--config: checkpoint {path} has a configuration of its own")
    if config is None and "config" not in state:
        raise UsageError(f"checkpoint {path} holds no configuration; give it one by --config FILE.yaml")
    missing = [key for key in TO_RESUME if resume and key not in state]
    if missing:
        raise UsageError(f"--resume: {path} holds no {missing[0]}; resume from an epoch_*.pth.tar of train.py")
    for key in SCHEMA.keys() & state.keys():
        check(key, state[key], SCHEMA, f"checkpoint {path}: ")
    return {"config": config, **state}


def find_run(path):
    """A checkpoint or run folder: as given, or by its name or logs/NAME in the project's logs. The path as it exists."""
    if os.path.exists(path):
        return path
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    name = os.path.normpath(path)
    for candidate in (os.path.join(root, name), os.path.join(root, "logs", name)):
        if not os.path.isabs(name) and os.path.exists(candidate):
            return candidate
    return path


def find_checkpoint(path):
    """(path, state) to resume from: a file, or the newest whole checkpoint of a run folder.

    A damaged one in a folder is reported and the one before it is taken.
    """
    path = find_run(path)
    if not os.path.isdir(path):
        return path, load_checkpoint(path, resume=True)
    for candidate in list_checkpoints(path):
        try:
            return candidate, load_checkpoint(candidate, resume=True)
        except UsageError as e:
            print(f"{e}; trying the one before it", flush=True)
    raise UsageError(f"--resume: no whole checkpoint (epoch_*.pth.tar) in {path}")


def model_file(path):
    """The checkpoint to draw images from: the file itself, or of a run folder the final one, else the newest."""
    path = find_run(path)
    if not os.path.isdir(path):
        return path
    found, final = list_checkpoints(path), os.path.join(path, FINAL)
    # a run that was resumed leaves an older final one behind
    if os.path.isfile(final) and not (found and os.path.getmtime(found[0]) > os.path.getmtime(final)):
        return final
    if not found:
        raise UsageError(f"checkpoint: neither {FINAL} nor epoch_*.pth.tar in {path}")
    return found[0]
