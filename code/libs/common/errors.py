"""Errors for people: one line each."""

import os
from reprlib import Repr

_repr = Repr()
_repr.maxlevel = 2
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


class UsageError(ValueError):
    """A setting, file or flag that cannot work. The message is one line: its name, its value, what would be right.

    Scripts print it and exit with status 2; code that calls the library can catch it as ValueError.
    """


class RunError(RuntimeError):
    """Something outside failed: disk, network. The message is one line; scripts exit with status 1."""


def display_path(path):
    """A path for messages: relative to the current folder where that is possible."""
    try:
        return os.path.relpath(path)
    except ValueError:  # Windows: another drive
        return os.path.abspath(path)


def first_line(error, length=120):
    """The first line of an exception's message, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


def shown(value):
    """repr, cut short: a value from a file may be of any size and depth."""
    try:
        return " ".join(_repr.repr(value).split())  # a tensor's has several lines
    except ValueError:  # an integer of more digits than Python prints
        return type(value).__name__
