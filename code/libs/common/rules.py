"""What the value of a setting may be: rules, each (in words, function value -> value that raises ValueError)."""

import difflib
import os
import re

from .errors import UsageError, shown


def integer(low, high=None):
    def check(v):
        if isinstance(v, bool) or not isinstance(v, int) or v < low or (high is not None and v > high):
            raise ValueError
        return v
    return f"an integer of {low} or more" if high is None else f"an integer from {low} to {high}", check


def number(low=None, high=None, above=None):
    def check(v):
        if isinstance(v, bool) or not isinstance(v, (int, float, str)):
            raise ValueError
        v = float(v)  # YAML reads 2e-4 as text
        if v != v or abs(v) == float("inf") or (low is not None and v < low) or (
                high is not None and v > high) or (above is not None and v <= above):
            raise ValueError
        return v
    bounds = [f"{word} {bound}" for word, bound in (("above", above), ("from", low), ("to", high))
              if bound is not None]
    return " ".join(["a number"] + bounds), check


def one_of(*choices):
    def check(v):
        if isinstance(v, bool) or v not in choices:
            raise ValueError
        return v
    return "one of " + ", ".join(choices), check


def boolean():
    def check(v):
        if not isinstance(v, bool):
            raise ValueError
        return v
    return "true or false", check


def text():
    def check(v):
        if not isinstance(v, str) or not v or b"\0" in os.fsencode(v):  # which raises for what no file can be called
            raise ValueError
        return v
    return "a piece of text", check


def device():
    def check(v):
        if not isinstance(v, str) or not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", v):
            raise ValueError
        return v
    return "cuda:0, cuda:1, ..., cpu or mps", check


def list_of(rule, length=None, empty=False, most=64):
    def check(v):
        if not isinstance(v, (list, tuple)) or len(v) > most or (length and len(v) != length) or not (v or empty):
            raise ValueError
        return [rule[1](x) for x in v]
    return f"a list of {length or f'up to {most}'}, each {rule[0]}", check


def mapping(kind, each=None, **entries):
    def check(v):
        if not isinstance(v, dict) or not all(isinstance(key, kind) for key in v):
            raise ValueError
        for rule, x in [(entries[key], v.get(key)) for key in entries] + [(each, x) for x in v.values() if each]:
            rule[1](x)
        return v
    return f"a dict with keys of type {kind.__name__}" + f", among them {', '.join(entries)}" * bool(entries), check


def optional(rule):
    return f"null or {rule[0]}", lambda v: None if v is None else rule[1](v)


def nearest_word(word, words):
    """The one of `words` that `word` was probably meant to be, or None."""
    lower = {str(w).lower(): str(w) for w in words}
    return next((lower[w] for w in difflib.get_close_matches(str(word).lower(), lower, 1)), None)


def check(key, value, rules, where="config: "):
    """The value as it is used. Raises UsageError with the key, the value, and what would be right."""
    wanted, convert = rules[key]
    try:
        return convert(value)
    except (ValueError, TypeError, OverflowError):
        _, choice, words = wanted.partition("one of ")
        near = nearest_word(value, words.split(", ")) if choice and isinstance(value, str) else None
        raise UsageError(f"{where}{key} is {shown(value)}; it must be {wanted}"
                         + (f" (did you mean {near}?)" if near else "")) from None
