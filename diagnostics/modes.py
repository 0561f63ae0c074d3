"""Metrics of modes, for models that say which mode a draw is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .chains import effective
from .estimate import Array, Estimate, missing

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["mode_occupancy"]


def mode_occupancy(tree: DataTree, reference: DataTree) -> Estimate:
    """Total variation between the modes' shares of the guide's and of the reference's draws.

    The modes are the model's own, from its method `modes`. Noise makes it about the standard error
    even for exact draws: read it beside its floor. The standard error is the delta method's, too
    large where shares are equal, and from the effective number of draws where they are correlated:
    chains that never leave their modes count once each.
    """
    if not all("modes" in t.children for t in (tree, reference)):
        return missing(tree, "the model names no modes")
    labels = [_labels(t) for t in (tree, reference)]
    modes = np.unique(np.concatenate([label.ravel() for label in labels]))
    shares = [_shares(label, modes) for label in labels]
    difference = shares[0] - shares[1]
    side = np.where(difference < 0, -0.5, 0.5)  # the distance is sum side * difference
    variance = np.zeros(len(side))
    for which, label in zip((tree, reference), labels, strict=True):
        each = np.take_along_axis(side, np.searchsorted(modes, label).reshape(len(side), -1), 1)
        size = each.shape[1]
        if not which.attrs["independent_draws"]:
            size = effective(each.reshape(*label.shape, 1))[:, 0]
        variance = variance + each.var(1) / size
    return Estimate(np.abs(difference).sum(1) / 2, np.sqrt(variance))


def _labels(tree: DataTree) -> Array:
    """(B, chains, draws)."""
    labels: Array = tree["modes"].dataset["label"].transpose("problem", "chain", "draw").values
    return labels


def _shares(labels: Array, modes: Array) -> Array:
    """How often each mode occurs, (B, K)."""
    flat = labels.reshape(len(labels), -1)
    return np.stack([(flat == mode).mean(1) for mode in modes], 1)
