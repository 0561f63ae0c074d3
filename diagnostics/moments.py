"""Metrics of means, standard deviations and correlations: readable in posterior sds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .draws import packed
from .estimate import Array, Estimate, missing, sds

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["correlation_error", "mean_error", "sd_ratio"]


def _size(tree: DataTree) -> Array:
    """Effective draws of each packed latent, (B, D): all of them where they are independent."""
    z = packed(tree)
    if tree.attrs["independent_draws"]:
        return np.full((z.shape[0], z.shape[2]), float(z.shape[1]))
    from arviz_stats.base import array_stats

    chains = tree["posterior"].sizes["chain"]
    by_chain = z.reshape(z.shape[0], chains, -1, z.shape[2])
    return np.asarray(array_stats.ess(by_chain, chain_axis=1, draw_axis=2))


def _pick(table: Array, index: Array) -> Array:
    return np.take_along_axis(table, index[:, None], 1)[:, 0]


def mean_error(tree: DataTree, reference: DataTree) -> Estimate:
    """Largest |difference of means| over the latents, in sds of the reference."""
    q, p = packed(tree), packed(reference)
    error = np.abs(q.mean(1) - p.mean(1)) / sds(p)
    worst = error.argmax(1)
    spread = q.std(1) / sds(p)
    se = np.sqrt(spread**2 / _size(tree) + 1 / _size(reference))
    return Estimate(_pick(error, worst), _pick(se, worst))


def sd_ratio(tree: DataTree, reference: DataTree) -> Estimate:
    """The guide's sd over the reference's, for the latent where it is furthest from 1.

    The standard error knows the kurtosis of the draws, which is large for rare binary latents.
    """
    q, p = packed(tree), packed(reference)
    ratio = np.where((q.std(1) > 0) | (p.std(1) > 0), q.std(1) / sds(p), 1.0)
    worst = np.abs(np.log(np.maximum(ratio, 1e-12))).argmax(1)
    se = ratio * np.sqrt(_log_sd_variance(q) / _size(tree) + _log_sd_variance(p) / _size(reference))
    return Estimate(_pick(ratio, worst), _pick(se, worst))


def _log_sd_variance(z: Array) -> Array:
    """Variance of log sd for one draw, (kurtosis - 1) / 4, of draws (B, S, D): (B, D)."""
    squares = np.square((z - z.mean(1, keepdims=True)) / sds(z)[:, None])
    # at least that of a constant sign, so that a latent that never moved has some error
    kurtosis = np.square(squares).mean(1)
    variance: Array = np.maximum(kurtosis - 1, 0.5) / 4
    return variance


def correlation_error(tree: DataTree, reference: DataTree) -> Estimate:
    """Largest |difference of correlations| over the pairs of latents."""
    q, p = packed(tree), packed(reference)
    d = q.shape[2]
    if d < 2:
        return missing(tree, "one latent has no correlations")
    pairs = np.triu_indices(d, 1)
    r_q, r_p = (np.stack([_correlations(z)[pairs] for z in draws]) for draws in (q, p))
    error = np.abs(r_q - r_p)
    worst = error.argmax(1)
    n_q, n_p = _size(tree).min(1)[:, None], _size(reference).min(1)[:, None]
    se = np.sqrt((1 - r_q**2) ** 2 / n_q + (1 - r_p**2) ** 2 / n_p)
    return Estimate(_pick(error, worst), _pick(se, worst))


def _correlations(z: Array) -> Array:
    """Correlations of draws (S, D); 0 with a latent that never moved."""
    centred = (z - z.mean(0)) / sds(z[None])[0]
    matrix: Array = centred.T @ centred / len(z)
    return matrix
