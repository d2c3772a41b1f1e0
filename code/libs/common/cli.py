"""What the scripts share: a parser whose errors are one line, and errors without a traceback."""

import argparse
import os
import signal
import sys
import time
import warnings

import torch
from tqdm import tqdm

from .errors import RunError, UsageError, first_line, shown


class Parser(argparse.ArgumentParser):
    """argparse, with the script's docstring as it is and each error as a UsageError."""

    def __init__(self, description, prog=None):
        super().__init__(prog, description=description, formatter_class=argparse.RawTextHelpFormatter)

    def error(self, message):
        raise UsageError(message)


def positive(text):
    """Type of a flag that counts something."""
    value = int(text)
    if not 1 <= value <= 10 ** 9:
        raise argparse.ArgumentTypeError(f"{shown(value)}; must be from 1 to 10^9")
    return value


def add_training_flags(parser):
    """The flags of the scripts that train."""
    parser.add_argument("config", nargs="?", help="YAML file, for example configs/mnist.yaml; with --resume the "
                        "run's own settings are the default")
    parser.add_argument("-p", "--print-freq", type=positive, default=None, metavar="N",
                        help="updates between two lines of the log (default 100)")
    parser.add_argument("-c", "--ckpt-freq", type=positive, default=None, metavar="N",
                        help="epochs between two checkpoints, each with a sample grid (default 5)")
    parser.add_argument("--output", default="", metavar="NAME",
                        help="name of the run folder, <config>_NAME (default: the starting time)")
    parser.add_argument("--resume", default="", metavar="RUN",
                        help="go on from a checkpoint, or from the newest one of a run folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="change a setting of the config, for example --set train_cfg.epochs=5")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; write nothing")


def check_output(path, overwrite=None, flag="--output"):
    """Refuse to replace a file unasked, and to write where no folder is, before the work instead of after it.

    overwrite: what --overwrite says; None where a script has no such flag.
    """
    if os.path.exists(path) and not (overwrite and os.path.isfile(path)):
        raise UsageError(f"{flag}: {path} exists; give another name" + (", or --overwrite" if overwrite is False else ""))
    folder = os.path.dirname(os.path.abspath(path))
    if "\0" in path or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UsageError(f"{flag}: cannot write into {folder}")


class progress_bar(tqdm):
    """tqdm's bar on a terminal; elsewhere, in a pipe or a log file, a line about every 30 seconds. Both on stderr."""

    def __init__(self, total, unit, desc=None, **options):
        super().__init__(total=total, unit=unit, desc=desc, disable=None, **options)
        self.units, self.what, self.printed = f"{unit}s", f"{desc}: " if desc else "", time.monotonic()

    def update(self, n=1):
        if not self.disable:
            return super().update(n)
        self.n += n
        if time.monotonic() - self.printed > 30:
            self.printed = time.monotonic()
            print(f"{self.what}{self.n:,} of {self.total:,} {self.units}" if self.total else
                  f"{self.what}{self.n:,} {self.units}", file=sys.stderr, flush=True)


def one_line(message):
    """A message for the terminal, cut short; a newline in a file's name, and the like, as an escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message)[:2000])


def run(main):
    """Call a script's `main()` and end the process: 2 for bad usage, 1 for a failed run, neither with a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold what is no text
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has ended; Python itself flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as e:
        text = _explanation(e)
        if not text:
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {one_line(text)}", file=sys.stderr)
        status = 2 if isinstance(e, UsageError) else 1
    sys.exit(status)


def _explanation(error):
    """The line that says what happened; None for an exception that is a fault of the program."""
    if isinstance(error, (UsageError, RunError)):
        return str(error)
    text = first_line(error, 1000)
    if isinstance(error, (OSError, MemoryError, RecursionError, torch.OutOfMemoryError)) or "CPUAllocator" in text:
        return text  # the disk, the network, memory
    if isinstance(error, RuntimeError) and torch.distributed.is_initialized() and any(
            word in str(error).lower() for word in ("gloo", "nccl", "connection")):
        return f"another process of this run has ended ({first_line(error)}); resume from the last checkpoint"
