"""What a run leaves behind: checkpoints, sample grids, curves for TensorBoard, lines on the terminal."""

import os
import shlex
import sys
import time

import yaml
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from ..common.checkpoint import (check_resumable, checkpoint_name, find_checkpoint, remove_old_checkpoints,
                             save_checkpoint)
from ..config import portable
from ..drawing import sample_grid
from ..common.errors import RunError, UsageError, display_path
from ..evaluation.report import evaluate_model
from ..models import load_weights
from ..common.seeds import rng_state, set_rng_state
from .update import as_written


class RunFolder:
    """Everything that train.py writes. One of several processes writes (`active`), the others' calls do nothing."""

    def __init__(self, path, config, step, total_steps, batch_size, active=True):
        self.path, self.config, self.active, self.last_good = path, config, active, None
        self.bar = tqdm(total=total_steps, initial=step, unit_scale=batch_size, unit="img",
                        disable=None if active else True)
        if not active:
            return
        text = yaml.safe_dump(portable(config), sort_keys=False)
        try:
            os.makedirs(os.path.join(path, "logs"), exist_ok=True)
            with open(os.path.join(path, "config.txt"), "w") as f:
                f.write(text)
        except OSError as e:
            raise UsageError(f"output_folder: cannot write {path} ({e.strerror})") from None
        remove_old_checkpoints(path, None)
        self.board = SummaryWriter(os.path.join(path, "logs"), purge_step=step + 1 if step else None)
        self.board.add_text("config", f"```\n{text}```", step)

    def say(self, line):
        if self.active:
            self.bar.write(line)

    def scalars(self, values, step):
        for tag, value in values.items() if self.active else ():
            self.board.add_scalar(tag, value, step)

    def save(self, progress, model, ema, optimizer, updater, is_final=False):
        """A checkpoint; returns its path. progress: {"epoch", "batch", "step", ...}.

        Raises RunError where weights are not finite: the file before this one is better.
        """
        if not self.active:
            return None
        bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        if bad:
            raise RunError(f"the weights are not finite any more ({bad[0]}) at update {progress['step']}; "
                           + (f"resume from {display_path(self.last_good)}" if self.last_good else "start again")
                           + " with a lower train_cfg.lr")
        state = {**progress, "config": portable(self.config),
                 "state_dict": model.state_dict(), "state_dict_ema": ema.module.state_dict(),
                 "optimizer": optimizer.state_dict(), "scaler": updater.state_dict(), "rng": rng_state()}
        name = checkpoint_name(progress["epoch"], progress["batch"])
        save_checkpoint(state, is_final, self.path, name)
        remove_old_checkpoints(self.path, self.config["train_cfg"]["keep_last"])
        self.last_good = os.path.join(self.path, name)
        return self.last_good

    def sample(self, model, ema, epoch, step, device):
        """Grids: of the averaged weights into the folder, of both onto the board."""
        if self.active:
            grid = sample_grid(ema.module, self.config, device)
            save_image(grid, os.path.join(self.path, f"sample-{epoch - 1}.png"))
            self.board.add_image("samples/ema", grid, step)
            with as_written(model):
                self.board.add_image("samples/raw", sample_grid(model, self.config, device), step)
            self.say(f"saved {display_path(self.last_good)} and sample-{epoch - 1}.png")

    def update(self, done, left):
        """One update more on the bar; after 40 of this process, once, how long the `left` ones will take."""
        self.bar.update()
        if done == 10:  # the first updates are slower than those to come
            self.warm = time.time()
        elif done == 40:
            self.say(f"about {(time.time() - self.warm) / 30 / 60 * left:.0f} minutes lie ahead")

    def evaluate(self, ema, real, epoch, step, device):
        """Every `eval.every` epochs: Frechet distance and the like of a few samples of the averaged weights.

        real: RealImages, or None in a run without.
        """
        if real and epoch % self.config["eval"]["every"] == 0:
            scores = evaluate_model(ema.module, self.config, real, device)
            self.scalars({f"eval/{tag}": value for tag, value in scores.items()}, step)
            self.say(f"epoch {epoch}  " + "  ".join(f"{tag} {value:.3f}" for tag, value in scores.items()))

    def close(self):
        self.bar.close()
        if self.active:
            self.board.close()


def find_place(args, config):
    """(run folder, the checkpoint that --resume asks for or None, what is in it). Raises UsageError."""
    if args.resume and args.output:
        raise UsageError(f"--output: {args.output} cannot be given with --resume, which goes on in the same folder")
    if args.resume:
        path, state = find_checkpoint(args.resume)
        check_resumable(config, state, path)
        return os.path.dirname(os.path.abspath(path)), path, state
    name = os.path.splitext(os.path.basename(args.config))[0]
    folder = os.path.join(config["output_folder"], f"{name}_{args.output or time.strftime('%Y-%m-%d_%H-%M-%S')}")
    if os.path.exists(folder):
        raise UsageError(f"--output: {folder} exists; give another name, or --resume {display_path(folder)}")
    return folder, None, None


def restore(state, path, cfg, model, ema, optimizer, updater):
    """Put back from the checkpoint `path` what the next update depends on; returns how many updates it had."""
    load_weights(model, state["state_dict"], path)
    load_weights(ema.module, state["state_dict_ema"], path)
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:  # what the config says now holds
        group.update(betas=tuple(cfg["betas"]), weight_decay=cfg["weight_decay"])
    updater.load_state_dict(state["scaler"])
    set_rng_state(state["rng"])
    ema.updates = state["step"]
    return state["step"]


def resume_command(args, folder):
    """The command that goes on with the run in `folder`."""
    # a virtual environment's own python, which need not be the one that the shell finds
    python = display_path(sys.executable) if sys.prefix != sys.base_prefix else "python"
    words = [python, sys.argv[0], args.config, "-c", str(args.ckpt_freq), "-p", str(args.print_freq)]
    words += [x for item in args.set for x in ("--set", item)] + ["--resume", display_path(folder)]
    return shlex.join(words)


def describe(config, model, num_images, updates, device, precision, folder):
    """What is going to happen, before it does."""
    print(yaml.safe_dump(portable(config), sort_keys=False, default_flow_style=None).rstrip())
    print(f"{sum(p.numel() for p in model.model.parameters()):,} parameters, {num_images:,} images, "
          f"{updates:,} updates an epoch, {config['train_cfg']['epochs'] * updates:,} in all; on {device}, "
          f"{str(precision or next(model.model.parameters()).dtype).removeprefix('torch.')}")
    print(f"run folder: {display_path(folder)}", flush=True)
