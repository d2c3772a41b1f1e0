"""Errors for people: one line each, and the exit status that goes with it."""

import os
import signal
import sys


class UsageError(ValueError):
    """A setting, file or flag that cannot work. The message is one line: its name, its value, what would be right.

    Scripts print it and exit with status 2; code that calls the library can catch it as ValueError.
    """


class RunError(RuntimeError):
    """Something outside failed: disk, network. The message is one line; scripts exit with status 1."""


def run(main):
    """Call a script's `main()` and end the process: 2 for bad usage, 1 for a failed run, neither with a traceback."""
    status = 0
    try:
        status = main()
    except UsageError as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        status = 2
    except RunError as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)
