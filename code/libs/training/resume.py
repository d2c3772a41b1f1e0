"""Where a run starts: a new folder, or the checkpoint that it goes on from."""

import copy
import os
import time

from ..common.checkpoint import find_checkpoint, find_run
from ..common.errors import UsageError, display_path, shown
from ..config import complete_config, load_config, set_values
from ..models import config_of, load_weights


def find_place(args, claim, load_config=load_config, complete_config=complete_config):
    """(configuration, run folder, the checkpoint that --resume asks for or None, its state). Raises UsageError.

    With --resume, the run's own settings are the default; a config that is given must fit them.
    args: of cli.add_training_flags; `ckpt_freq` and `print_freq` are filled in. claim: a Claim, or None in a process
    that writes nothing.
    """
    path = state = None
    if args.resume:
        if args.output:
            raise UsageError(f"--output: {args.output} cannot be given with --resume, which goes on in the same folder")
        path = find_run(args.resume)
        if claim and os.path.exists(path):  # before it is read: a training that runs would go on writing
            claim.take(path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path)))
        path, state = find_checkpoint(path)
        state["config"] = config_of(state, path, complete_config)
    if args.config:
        config = load_config(args.config, args.set)
    elif state:
        config = complete_config(set_values(copy.deepcopy(state["config"]), args.set))
    else:
        raise UsageError("config: name a YAML file, for example configs/mnist.yaml, or --resume RUN")
    saved = state or {}
    args.ckpt_freq = args.ckpt_freq or saved.get("ckpt_freq", 5)
    args.print_freq = args.print_freq or saved.get("print_freq", 100)
    if state:
        check_resumable(config, state, path)
        return config, os.path.dirname(os.path.abspath(path)), path, state
    name = os.path.splitext(os.path.basename(args.config))[0]
    folder = os.path.join(config["output_folder"], f"{name}_{args.output or time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if args.output and os.path.exists(folder):
        raise UsageError(f"--output: {folder} exists; give another name, or --resume {display_path(folder)}")
    return config, folder, None, None


def check_resumable(config, state, path):
    """Refuse to go on with another model or other batches; print the training settings that change."""
    old = state["config"]
    same = {"model_name": (old["model_name"], config["model_name"])}
    same |= {f"model.{k}": (old["model"].get(k, v), v) for k, v in config["model"].items()
             if not k.startswith("vae_") and k != "num_classes"}  # the data determine num_classes
    for key, (there, here) in same.items():
        if there != here:
            raise UsageError(f"--resume: {path} is of another architecture: "
                             f"{key} is {there} there and {here} in the config")
    same = {f"{a}.{b}": (old[a].get(b), config[a].get(b)) for a, b in (
        ("dataset", "name"), ("dataset", "img_size"), ("dataset", "limit"), ("loader", "batch_size"))}
    same["train_cfg.optimizer"] = old["train_cfg"]["optimizer"], config["train_cfg"]["optimizer"]
    if config["model"]["use_vae"]:
        same["dataset.latent_crops"] = tuple(c["dataset"]["latent_crops"] or 0 for c in (old, config))
    same["seed"] = old["seed"], config["seed"]
    for key, (there, here) in same.items():
        if there != here:
            raise UsageError(f"--resume: {path} is of another run: {key} is {there} there and {here} in the config")
    epochs = config["train_cfg"]["epochs"]
    if (state.get("epoch", 0), state.get("batch", 0)) > (epochs, 0):
        raise UsageError(f"--resume: {path} is beyond the end, train_cfg.epochs={epochs}; give more, or an earlier one")
    for key, value in config["train_cfg"].items():
        if old["train_cfg"].get(key, value) != value:
            print(f"train_cfg.{key}: {old['train_cfg'][key]} until now, {value} from here on")


def check_data(state, path, folder, facts):
    """Refuse to go on with other data than the checkpoint's. facts: of these data, as they are saved."""
    for key, here in facts.items():
        there = state.get(key, here)
        if there != here:
            raise UsageError(f"--resume: {path} is of other data: {key} is {shown(there)} there and {shown(here)} in "
                             f"{folder}")
    epoch, batch, step, updates = state["epoch"], state["batch"], state["step"], facts["updates_per_epoch"]
    if batch >= updates or step != epoch * updates + batch:
        raise UsageError(f"--resume: {path} is none of train.py's: its step is {step}, after {epoch} epochs of "
                         f"{updates} updates and {batch} batches")


def restore(trainer, state, path):
    """Put everything back that the next update depends on."""
    load_weights(trainer.model, state["state_dict"], path)
    load_weights(trainer.ema.module, state["state_dict_ema"], path)
    trainer.load_state_dict(state, path)
