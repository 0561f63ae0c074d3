"""Metrics of chains: how fast a guide's draws become independent, and whether they have settled.

ESS and R-hat have no cheap standard error that is sound for slow chains, which are the ones that
matter, so theirs is NaN. Converged is not correct: a chain may mix well over the wrong posterior.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .draws import packed
from .estimate import Array, Estimate, missing

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = [
    "acceptance",
    "autocorrelation_time",
    "effective",
    "ess",
    "ess_per_second",
    "ess_per_time",
    "ess_tail",
    "rhat",
]

TAILS = (0.05, 0.95)  # quantiles behind the tail ESS
NEVER_MOVED = "in some problem a latent never moved"


def effective(series: Array, **knobs: Any) -> Array:
    """ArviZ's effective sample size of series (B, chains, draws, D): (B, D)."""
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.ess(series, chain_axis=1, draw_axis=2, **knobs))


def ess(tree: DataTree, reference: DataTree) -> Estimate:
    """Smallest bulk effective sample size over the latents (ArviZ).

    References:
        Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021)
        https://arxiv.org/abs/1903.08008
    """
    return _smallest(tree)


def ess_tail(tree: DataTree, reference: DataTree) -> Estimate:
    """Smallest tail effective sample size over the latents: of the 5 and 95 % quantiles (ArviZ)."""
    return _smallest(tree, method="tail", prob=TAILS)


def autocorrelation_time(tree: DataTree, reference: DataTree) -> Estimate:
    """Draws per effective draw, S / ESS, of the slowest latent: 1 if they are independent."""
    found = _smallest(tree)
    sizes = tree["posterior"].sizes
    return Estimate(sizes["chain"] * sizes["draw"] / found.value, found.se, found.reason)


def ess_per_second(tree: DataTree, reference: DataTree) -> Estimate:
    """Bulk ESS of each problem over the seconds that drawing took for all problems together."""
    return _per(tree, "seconds", "how long drawing took is not known")


def ess_per_time(tree: DataTree, reference: DataTree) -> Estimate:
    """Bulk ESS over the time that a circuit simulated for these draws, all chains together.

    In time constants of the circuit, as in the attribute `time_constants` of its draws.
    """
    return _per(tree, "time_constants", "the guide is no circuit with time constants")


def rhat(tree: DataTree, reference: DataTree) -> Estimate:
    """Largest rank-normalised split R-hat over the latents (ArviZ); infinite where chains stand.

    References:
        Rank-Normalization, Folding, and Localization: An Improved R-hat (Vehtari et al., 2021)
        https://arxiv.org/abs/1903.08008
    """
    if tree.attrs["independent_draws"]:
        return missing(tree, "independent draws have no chains to compare")
    if tree["posterior"].sizes["chain"] < 2:
        return missing(tree, "one chain cannot be compared with others")
    from arviz_stats.base import array_stats

    with np.errstate(divide="ignore", invalid="ignore"):
        table = array_stats.rhat(_series(tree), chain_axis=1, draw_axis=2)
    return _worst(tree, np.asarray(table), np.nanmax)


def acceptance(tree: DataTree, reference: DataTree) -> Estimate:
    """Mean probability of accepting a proposal, for guides that reject some."""
    stats = tree["sample_stats"].dataset
    if "acceptance" not in stats:
        return missing(tree, "the guide accepts or rejects nothing")
    rate = stats["acceptance"].transpose("problem", "chain", "draw").values.astype(np.float64)
    size = effective(rate[..., None])[:, 0]
    return Estimate(rate.mean((1, 2)), rate.std((1, 2)) / np.sqrt(size))


def _series(tree: DataTree) -> Array:
    """The packed latents by chain, (B, chains, draws, D)."""
    z = packed(tree)
    return z.reshape(len(z), tree["posterior"].sizes["chain"], -1, z.shape[2])


def _smallest(tree: DataTree, **knobs: Any) -> Estimate:
    return _worst(tree, effective(_series(tree), **knobs), np.nanmin)


def _worst(tree: DataTree, table: Array, pick: Any) -> Estimate:
    """The worst latent of a table (B, D).

    ArviZ takes a series that never moves for independent draws, which of chains is the wrong way
    round. A discrete latent may stand still since it is certain, so that says nothing; a continuous
    one may not.
    """
    if tree.attrs["independent_draws"]:
        value = pick(table, axis=1)
        return Estimate(value, np.full(len(value), np.nan))
    still = np.ptp(packed(tree), axis=1) == 0
    certain = still & _discrete(tree)
    stuck = (still & ~certain).any(1) | certain.all(1)
    value = np.full(len(table), np.nan)
    moving = np.where(certain, np.nan, table)
    value[~stuck] = pick(moving[~stuck], axis=1)
    return Estimate(value, np.full(len(value), np.nan), NEVER_MOVED if stuck.any() else "")


def _discrete(tree: DataTree) -> Array:
    """Which packed latents are discrete, (D,)."""
    counted = str(tree.attrs.get("discrete", "")).split(",")
    data = tree["posterior"].dataset
    sizes = data.sizes["chain"] * data.sizes["draw"] * data.sizes["problem"]
    each = [np.full(v.size // sizes, str(n) in counted) for n, v in data.data_vars.items()]
    return np.concatenate(each)


def _per(tree: DataTree, cost: str, reason: str) -> Estimate:
    spent = float(tree.attrs.get(cost, 0.0))
    if not spent > 0:
        return missing(tree, reason)
    found = _smallest(tree)
    return Estimate(found.value / spent, found.se, found.reason)
