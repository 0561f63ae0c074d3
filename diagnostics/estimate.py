"""What a metric returns, and how its standard error comes from blocks of draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["BLOCKS", "Array", "Estimate", "Metric", "by_blocks", "missing"]

Array = np.ndarray[Any, Any]
BLOCKS = 8  # disjoint blocks of draws behind a standard error


@dataclass(frozen=True)
class Estimate:
    """A metric's value and standard error for each problem, (B,); why it is NaN, if it is."""

    value: Array
    se: Array
    reason: str = ""


@dataclass(frozen=True)
class Metric:
    """An entry of the table.

    Attributes:
        compute: from the guide's draws and the reference draws to an estimate.
        title: printable name, with the unit.
        ideal: value of a perfect guide with endless draws; None where there is no such value.
        why: what it sees, in a few words.
    """

    compute: Callable[[DataTree, DataTree], Estimate]
    title: str
    ideal: float | None
    why: str


def missing(tree: DataTree, reason: str) -> Estimate:
    """NaN for every problem, and why."""
    nan = np.full(tree["posterior"].sizes["problem"], np.nan)
    return Estimate(nan, nan, reason)


def by_blocks(distance: Callable[[Array, Array], float], q: Array, p: Array) -> Estimate:
    """A distance between two sets of draws (B, S, D), with its spread over disjoint blocks."""
    values, errors = [], []
    for a, b in zip(q, p, strict=True):
        blocks = [distance(a[k::BLOCKS], b[k::BLOCKS]) for k in range(BLOCKS)]
        values.append(distance(a, b))
        errors.append(np.std(blocks, ddof=1) / np.sqrt(BLOCKS))
    return Estimate(np.array(values), np.array(errors))
