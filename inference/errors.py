"""Errors that say which thing, what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

__all__ = [
    "BadCheckpoint",
    "BadInput",
    "Diverged",
    "ExactWarning",
    "FitWarning",
    "Incompatible",
    "NeuroguideError",
    "NoDensity",
    "NoExactPosterior",
    "OutputError",
    "UnknownName",
    "lookup",
]

T = TypeVar("T")


class NeuroguideError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        subject: the argument, site or file at fault.
        expected: what would have been right.
        got: what came.
        fix: what to do about it.
    """

    def __init__(self, subject: str, *, expected: str, got: str, fix: str) -> None:
        super().__init__(f"{subject}: expected {expected}; got {got}. {fix}")


class BadInput(NeuroguideError, ValueError):
    """An argument has the wrong value, shape, dtype or name."""


class Incompatible(NeuroguideError, TypeError):
    """A model, guide and objective that cannot work together."""


class NoDensity(NeuroguideError, NotImplementedError):
    """A density was asked of something that can only be sampled."""


class NoExactPosterior(NeuroguideError, NotImplementedError):
    """The model has no exact posterior; the message names what to use instead."""


class BadCheckpoint(NeuroguideError, RuntimeError):
    """A checkpoint is missing, corrupt or belongs to something else."""


class OutputError(NeuroguideError, OSError):
    """A file could not be written; whatever was there before is untouched."""


class Diverged(NeuroguideError, ArithmeticError):
    """A loss stopped being finite."""


class FitWarning(UserWarning):
    """A fit has ended, and its gauges say that something went wrong on the way."""


class ExactWarning(UserWarning):
    """An exact posterior states an error that is too large for it to judge others by."""


class UnknownName(BadInput, KeyError):
    """A name that a table does not have; the message begins with the nearest, if there is one.

    Args:
        table: the names there are.
        name: the one that came.
        what: what it should have named, "guide".
    """

    def __init__(self, table: Mapping[str, object], name: object, what: str) -> None:
        near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.4)
        names = f"one of {', '.join(sorted(table))}"
        fix = f"Did you mean {near[0]!r}?" if near else "See `neuroguide list`."
        super().__init__(what, expected=names, got=repr(name), fix=fix)
        if near:  # a long list would hide it
            self.args = (f"{what}: got {name!r}. {fix} Expected {names}.",)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would put it in quotes


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of a table, or :class:`UnknownName`."""
    if name not in table:
        raise UnknownName(table, name, what)
    return table[name]
