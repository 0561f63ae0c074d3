"""What a metric returns, how its standard error comes from blocks, and draws on one scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .draws import packed

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = [
    "BLOCKS",
    "Array",
    "Estimate",
    "Metric",
    "by_blocks",
    "evenly",
    "missing",
    "scaled",
    "sds",
]

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


def sds(z: Array) -> Array:
    """Standard deviations of draws (B, S, D), 1 where a latent never moved: (B, D)."""
    sd: Array = z.std(1)
    return np.where(sd > 0, sd, 1.0)


def scaled(
    tree: DataTree, reference: DataTree, *, discrete: bool | None = None
) -> tuple[Array, Array]:
    """Both sets of draws, (B, S, D), standardised by the reference.

    Args:
        tree: the guide's draws.
        reference: the reference draws.
        discrete: only the discrete sites, only the others, or by default all of them.
    """
    q, p = (packed(t, discrete=discrete) for t in (tree, reference))
    centre, scale = p.mean(1, keepdims=True), sds(p)[:, None]
    return (q - centre) / scale, (p - centre) / scale


def evenly(z: Array, count: int) -> Array:
    """At most `count` of the draws (S, D), at even distances, so that every chain is in."""
    chosen: Array = z[np.linspace(0, len(z) - 1, min(count, len(z))).round().astype(int)]
    return chosen
