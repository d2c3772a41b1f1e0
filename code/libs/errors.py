"""Errors for people: one line each."""


class UsageError(ValueError):
    """A setting, file or flag that cannot work. The message is one line: its name, its value, what would be right.

    Scripts print it and exit with status 2; code that calls the library can catch it as ValueError.
    """


class RunError(RuntimeError):
    """Something outside failed: disk, network. The message is one line; scripts exit with status 1."""
