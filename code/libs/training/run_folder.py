"""What a run leaves behind: checkpoints, sample grids, curves in TensorBoard, lines on the terminal."""

import os
import shlex
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image
from tqdm import tqdm

from ..common.checkpoint import checkpoint_name, remove_old_checkpoints, save_checkpoint
from ..common.errors import RunError, UsageError, display_path, first_line
from ..common.files import atomic_file
from ..config import portable
from ..models import GRID_SAMPLER, network_calls, sample_grid, sampling_settings
from .device import eager, fast_sampling, peak_memory
from .update import AverageMeter, TenthsMeter

try:
    import fcntl
except ImportError:  # Windows: as on a file system without locks
    fcntl = None

CHEAP_GRID = 100  # a grid of at most this many network calls an image is drawn from the raw weights too


class Stopped(Exception):
    """A signal arrived while a sample grid was drawn."""


class Claim(ExitStack):
    """The right to write into a run folder until the end of a `with` block: a lock on the file `running` in it.

    The system takes the lock from a process that dies. UsageError is raised where another training has the folder.
    """

    def new(self, path, numbered):
        """Make and claim a folder, `path` or if `numbered` the first of path, path_2, ... that is new. Returns it."""
        for n in count(1):
            folder = f"{path}_{n}" if n > 1 else path
            try:
                os.makedirs(folder)  # of several trainings one succeeds
            except FileExistsError:
                if not numbered:
                    raise UsageError(f"--output: {folder} exists; give another name") from None
            except OSError as e:
                raise UsageError(f"output_folder: cannot write {folder} ({e.strerror})") from None
            else:
                self.take(folder)
                if n > 1:
                    print(f"run folder: {display_path(folder)}, as another training began at the same time", flush=True)
                return folder

    def take(self, folder):
        """Claim a folder that exists."""
        self.path = os.path.join(folder, "running")
        self.file = self.enter_context(open(self.path, "a+", errors="replace"))
        free, remedy = True, "stop it first"
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)  # whoever has just got it writes its name
            free = False
        except (OSError, AttributeError):  # a file system without locks: the folder is theirs who wrote into the file
            free, remedy = os.path.getsize(self.path) == 0, f"if it has ended, delete {display_path(self.path)}"
        self.file.seek(0)
        owner = self.file.readline(200).strip()
        if not free or not self.holds():
            raise UsageError(f"{display_path(folder)}: a training runs there ({owner}); {remedy}")
        if owner:
            print(f"{display_path(folder)}: taken over from a training that has ended ({owner})", flush=True)
        self.callback(self._release)
        self.file.truncate(0)
        with suppress(OSError):  # a full disk: the config that comes next says so
            me = f"{socket.gethostname()}, process {os.getpid()}, since {time.ctime()}\n"
            os.write(self.file.fileno(), me.encode())

    def holds(self):
        """Whether the file is still the one that was opened."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))

    def _release(self):
        with suppress(OSError):
            if self.holds():
                self.file.truncate(0)  # Windows does not remove an open file
                os.remove(self.path)
                os.rmdir(os.path.dirname(self.path))  # where nothing else was written


class RunFolder:
    """Everything that a training run writes. One of several processes has the claim, the others' calls do nothing."""

    def __init__(self, path, config, trainer, batch_size, args, claim):
        self.path, self.config, self.trainer, self.args, self.active = path, config, trainer, args, claim is not None
        self.last_checkpoint, self.first_step, self.grid_steps, self.claim = None, trainer.step, 0, claim
        self.bar = tqdm(total=trainer.total_steps, initial=trainer.step, unit_scale=batch_size, unit="img",
                        disable=None if self.active else True)
        if not self.active:
            return
        if not args.resume:
            self.path = claim.new(path, numbered=not args.output)
        for name in ("epoch_*", "model_final.*", "sample-*", "config.*", "*coder.pth.*"):  # what a killed run left
            for leftover in Path(self.path).glob(f"{name}.partial"):
                leftover.unlink()
        text = yaml.safe_dump(portable(config), sort_keys=False)
        with atomic_file(os.path.join(self.path, "config.txt")) as f:
            f.write(text.encode())
        # TensorBoard's thread hands an error on to the next call, and need not print it
        threading.excepthook = lambda e: isinstance(e.exc_value, OSError) or threading.__excepthook__(e)
        step = trainer.step
        self.board = SummaryWriter(os.path.join(self.path, "logs"), purge_step=step + 1 if step else None)
        self.record("add_text", "config", f"```\n{text}```", step)

    def print(self, line):
        if self.active:
            with suppress(OSError):  # a closed terminal, a full disk
                self.bar.write(line)

    def record(self, method, *values):
        """Call a method of TensorBoard's SummaryWriter. Where it cannot write, training goes on without curves."""
        if self.board:
            try:
                getattr(self.board, method)(*values)
            except OSError as e:
                self.board = None
                self.print(f"TensorBoard cannot write {display_path(self.path)}/logs any more: {first_line(e)}")

    def scalars(self, values):
        for tag, value in values.items() if self.active else ():
            self.record("add_scalar", tag, value, self.trainer.step)

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
        """Write a checkpoint. facts: plain values beside the trainer's state."""
        if not self.active:
            return
        trainer = self.trainer
        trainer.check_weights(self.last_checkpoint)
        state = {**trainer.state_dict(), **facts, "config": portable(self.config),
                 "ckpt_freq": self.args.ckpt_freq, "print_freq": self.args.print_freq}
        name = checkpoint_name(trainer.epoch, trainer.batch)
        if not os.path.exists(self.claim.path):
            raise RunError(f"cannot write {display_path(os.path.join(self.path, name))}: the run folder was removed")
        save_checkpoint(state, is_final, self.path, name)
        remove_old_checkpoints(self.path, self.config["train_cfg"]["keep_last"])
        self.last_checkpoint = os.path.join(self.path, name)

    def sample(self, signals):
        """Grids: of the averaged weights, and where that is cheap of the raw ones. A DDPM's are drawn by Algorithm 2.

        Left out, with the exception Stopped, when a signal arrives between two steps of the sampler.
        """
        if not self.active:
            return
        trainer, config = self.trainer, self.config
        sampler = config["sample_cfg"]["sampler"]
        if all(config["sample_cfg"][key] is None for key in ("sampler", "steps", "eta", "spacing")):
            sampler = GRID_SAMPLER.get(config["model_name"])  # which takes none of these
        settings = sampling_settings(trainer.model, config, sampler=sampler)
        name = f"sample-{trainer.epoch - 1}.png"
        watch = _GridWatch(self, signals)
        with fast_sampling(trainer.ema.module, trainer.device, trainer.precision):
            grid = sample_grid(trainer.ema.module, config, settings, trainer.device, watch)
        with atomic_file(os.path.join(self.path, name)) as f:
            save_image(grid, f, "png")
        self.record("add_image", "samples/ema", grid, trainer.step)
        if trainer.device.type == "cuda" or network_calls(trainer.model, settings) <= CHEAP_GRID:
            with eager(trainer.model), fast_sampling(trainer.model, trainer.device, trainer.precision):
                raw = sample_grid(trainer.model, config, settings, trainer.device, watch)
            self.record("add_image", "samples/raw", raw, trainer.step)
        self.print(f"epoch {trainer.epoch}: saved {display_path(self.last_checkpoint)} and {name} (files count from 0)")

    def close(self):
        self.bar.close()
        if self.active:
            self.record("close")


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
        if self.trainer.step % self.folder.args.print_freq == 0 or self.trainer.step == self.trainer.total_steps:
            self.write()
        elif self.trainer.device.type != "cuda":  # there it would wait for the GPU
            self.trainer.check(self.folder.last_checkpoint)

    def write(self):
        trainer, step = self.trainer, self.trainer.step
        loss, count = self.world.total(self.loss.sum, self.loss.count)
        tenths = self.tenths.read(self.world.total) if self.tenths else []
        # read in one piece: the CPU waits for a GPU here, and in no other place between two lines
        loss, norm, skipped, longest, *averages = torch.stack([
            loss / count.clamp(min=1), self.norm.sum / self.norm.count.clamp(min=1), trainer.skipped, trainer.longest,
            *tenths]).tolist()
        trainer.check(self.folder.last_checkpoint, longest)
        rate, skipped = (step - self.clock_step) / (time.time() - self.clock), int(skipped)
        self.folder.print(f"epoch {trainer.epoch + 1}/{self.epochs}  update {step}/{trainer.total_steps}  "
                          f"loss {loss:.4f}  {rate * self.batch_size:.0f} images/s  "
                          f"{(trainer.total_steps - step) / rate / 60:.1f} minutes left"
                          + (f"  {skipped} updates left out" if skipped else ""))
        self.folder.bar.set_postfix(loss=f"{loss:.4f}")
        scalars = {"train/loss": loss, "train/lr": trainer.lr, "train/grad_norm": norm,
                   "train/skipped_updates": skipped, "train_speed/images_per_s": rate * self.batch_size,
                   "train_speed/peak_memory_GiB": peak_memory(trainer.device) / 2 ** 30}
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
