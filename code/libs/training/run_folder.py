"""What a run leaves behind: checkpoints, sample grids, curves in TensorBoard, lines on the terminal."""

import os
import shlex
import sys
import time
from contextlib import contextmanager

import yaml
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from ..common.checkpoint import checkpoint_name, remove_old_checkpoints, save_checkpoint
from ..common.errors import UsageError, display_path
from ..config import portable
from ..models import GRID_SAMPLER, network_calls, sample_grid, sampling_settings
from .device import eager, peak_memory
from .update import AverageMeter, TenthsMeter

CHEAP_GRID = 100  # a grid of at most this many network calls an image is drawn from the raw weights too


class Stopped(Exception):
    """A signal arrived while a sample grid was drawn."""


class RunFolder:
    """Everything that a training run writes. One of several processes is `active`, the others' calls do nothing."""

    def __init__(self, path, config, trainer, batch_size, args, active=True):
        self.path, self.config, self.trainer, self.args, self.active = path, config, trainer, args, active
        self.last_checkpoint, self.first_step, self.grid_steps = None, trainer.step, 0
        self.bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit_scale=batch_size, unit="img",
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
        step = trainer.step
        self.board = SummaryWriter(os.path.join(path, "logs"), purge_step=step + 1 if step else None)
        self.board.add_text("config", f"```\n{text}```", step)

    def print(self, line):
        if self.active:
            self.bar.write(line)

    def scalars(self, values):
        for tag, value in values.items() if self.active else ():
            self.board.add_scalar(tag, value, self.trainer.step)

    def progress(self):
        """One update more on the bar; after 40 of this process, once, the time that the rest will take."""
        self.bar.update()
        done = self.trainer.step - self.first_step
        if done == 10:  # the first updates are slower than those to come
            self.warm = time.time()
        elif done == 40:
            minutes = (time.time() - self.warm) / 30 / 60 * (self.trainer.total_steps - self.trainer.step)
            self.print(f"about {minutes:.0f} minutes remain" if minutes >= 1 else "less than a minute remains")

    def save(self, facts, is_final=False):
        """A checkpoint; returns its path. facts: plain values beside the trainer's state."""
        if not self.active:
            return None
        trainer = self.trainer
        trainer.check_weights(self.last_checkpoint and display_path(self.last_checkpoint))
        state = {**trainer.state_dict(), **facts, "config": portable(self.config),
                 "ckpt_freq": self.args.ckpt_freq, "print_freq": self.args.print_freq}
        name = checkpoint_name(trainer.epoch, trainer.batch)
        save_checkpoint(state, is_final, self.path, name)
        remove_old_checkpoints(self.path, self.config["train_cfg"]["keep_last"])
        self.last_checkpoint = os.path.join(self.path, name)
        return self.last_checkpoint

    def sample(self, signals):
        """Grids: of the averaged weights, and where that is cheap of the raw ones. A DDPM's are drawn by Algorithm 2.

        Left out, with the exception Stopped, when a signal arrives between two steps of the sampler.
        """
        if not self.active:
            return
        trainer, config = self.trainer, self.config
        sampler = config["sample_cfg"]["sampler"]
        if sampler is None and config["sample_cfg"]["steps"] is None:  # a number of steps is meant for a faster sampler
            sampler = GRID_SAMPLER.get(config["model_name"])
        settings = sampling_settings(trainer.model, config, sampler=sampler)
        name = f"sample-{trainer.epoch - 1}.png"
        watch = _GridWatch(self, signals)
        grid = sample_grid(trainer.ema.module, config, settings, trainer.device, watch)
        save_image(grid, os.path.join(self.path, name))
        self.board.add_image("samples/ema", grid, trainer.step)
        if trainer.device.type == "cuda" or network_calls(trainer.model, settings) <= CHEAP_GRID:
            with eager(trainer.model):
                raw = sample_grid(trainer.model, config, settings, trainer.device, watch)
            self.board.add_image("samples/raw", raw, trainer.step)
        self.print(f"epoch {trainer.epoch}: saved {display_path(self.last_checkpoint)} and {name} (files count from 0)")

    def close(self):
        self.bar.close()
        if self.active:
            self.board.close()


class _GridWatch:
    """A sampler's callback: stops it on a signal, and says once how long a grid of many network calls takes."""

    def __init__(self, folder, signals):
        self.folder, self.signals, self.started = folder, signals, time.time()

    def __call__(self, step, steps, x):
        if self.signals.received:
            raise Stopped
        self.folder.grid_steps += 1
        if self.folder.grid_steps == 1:  # the first step is slower
            self.started = time.time()
        elif self.folder.grid_steps == 4 and steps > CHEAP_GRID:
            seconds = (time.time() - self.started) / 3 * steps
            faster = "; --set sample_cfg.sampler=ddim needs 50" if self.folder.config["model_name"] == "DDPM" else ""
            self.folder.print(f"drawing a sample grid: {steps} steps, about {seconds / 60:.1f} minutes{faster}")


class TrainingLog:
    """Averages of the updates since the last line, and the line: on the terminal and in TensorBoard.

    By tenths of the diffusion time too, if the model has one (`timesteps`; an autoencoder has none).
    """

    def __init__(self, folder, model, world, batch_size, epochs):
        self.folder, self.trainer, self.world, self.batch_size, self.epochs = (
            folder, folder.trainer, world, batch_size, epochs)
        self.loss, self.norm = AverageMeter(), AverageMeter()
        self.tenths = TenthsMeter(model.timesteps, self.trainer.device) if hasattr(model, "timesteps") else None
        self.clock, self.clock_step = time.time(), self.trainer.step

    def update(self, each, t, norm, finite):
        """After an update: the loss of each image and its t, the gradient's norm, and whether the update was made."""
        self.loss.update(each.mean().nan_to_num(0, 0, 0), finite)
        self.norm.update(norm.nan_to_num(0, 0, 0), finite)
        if self.tenths:
            self.tenths.update(each, t)
        self.folder.progress()
        self.trainer.check(self.folder.last_checkpoint)
        if self.trainer.step % self.folder.args.print_freq == 0 or self.trainer.step == self.trainer.total_steps:
            self.write()

    def write(self):
        trainer, step = self.trainer, self.trainer.step
        loss = self.loss.average(self.world.total)
        rate = (step - self.clock_step) / (time.time() - self.clock)
        skipped = int(trainer.skipped)
        self.folder.print(f"epoch {trainer.epoch + 1}/{self.epochs}  update {step}/{trainer.total_steps}  "
                          f"loss {loss:.4f}  {rate * self.batch_size:.0f} images/s  "
                          f"{(trainer.total_steps - step) / rate / 60:.1f} minutes left"
                          + (f"  {skipped} updates left out" if skipped else ""))
        self.folder.bar.set_postfix(loss=f"{loss:.4f}")
        scalars = {"train/loss": loss, "train/lr": trainer.lr, "train/grad_norm": self.norm.avg,
                   "train/skipped_updates": skipped, "train_speed/images_per_s": rate * self.batch_size,
                   "train_speed/peak_memory_GiB": peak_memory(trainer.device) / 2 ** 30}
        averages = self.tenths.read(self.world.total) if self.tenths else []
        scalars |= {f"train_loss_by_time/{k / 10:.1f}": x for k, x in enumerate(averages) if x == x}
        self.folder.scalars(scalars)
        self.loss.reset(), self.norm.reset()
        self.clock, self.clock_step = time.time(), step

    @contextmanager
    def paused(self):
        """Checkpoints, grids and metrics do not count in images/s."""
        started = time.time()
        yield
        self.clock += time.time() - started


def resume_command(folder):
    """The command that goes on with the run in `folder`."""
    # a virtual environment's own python, which need not be the one that the shell finds
    python = display_path(sys.executable) if sys.prefix != sys.base_prefix else "python"
    return shlex.join([python, sys.argv[0], "--resume", display_path(folder)])


def describe(config, model, num_images, updates, device, precision, folder):
    """Print what is going to happen, before it does."""
    print(yaml.safe_dump(portable(config) | {"devices": [str(device)]}, sort_keys=False,
                         default_flow_style=None).rstrip())
    epochs = config["train_cfg"]["epochs"]
    print(f"{sum(p.numel() for p in model.model.parameters()):,} parameters, {num_images:,} images, "
          f"{updates:,} updates an epoch, {epochs * updates:,} in all; on {device}, "
          f"{str(precision or 'float32').removeprefix('torch.')}")
    print(f"run folder: {display_path(folder)}", flush=True)
