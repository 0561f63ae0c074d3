"""Metrics of scores: local errors of a guide, seen without any reference draws but for the units.

Packed coordinates are in sds of the reference, y = (u - mean) / sd, and scores d / dy with them.
Both metrics need a smooth log joint, and neither sees the weights of modes that are far apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .estimate import Array, Estimate, missing, sds

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["fisher_divergence", "ksd", "stein_kernel"]

NO_SCORE = "no score of the log joint: some latent is discrete, or autograd cannot find it"
NO_OWN_SCORE = "the guide has no score"
NOT_FINITE = "in some problem a draw has no finite score"
CHUNK = 128  # rows of the kernel at once, which stay in the cache
FLOAT_ERROR = 100  # units in the last place that a score may be off, as a sum of large terms


def _standard(tree: DataTree, reference: DataTree, score: str) -> tuple[Array, Array, float] | None:
    """y and a score, each (B, N, D) in float64, and the precision of the score."""
    if not all("scores" in t.children for t in (tree, reference)):
        return None
    data, known = tree["scores"].dataset, reference["scores"].dataset
    if score not in data:
        return None
    u, s, p = (
        v.transpose("problem", "point", "packed").values.astype(np.float64)
        for v in (data["u"], data[score], known["u"])
    )
    with np.errstate(invalid="ignore"):  # an infinite u, which has no score either
        centre, sd = p.mean(1, keepdims=True), sds(p)[:, None]
        return (u - centre) / sd, s * sd, float(np.finfo(data[score].dtype).eps)


def ksd(tree: DataTree, reference: DataTree) -> Estimate:
    """Squared kernel Stein discrepancy, inverse multiquadric kernel (1 + |y - y'|^2)^(-1/2).

    The U-statistic over pairs of up to 1,000 different draws of the guide, in standardised
    coordinates: it has mean 0 for draws of p and so may be negative. Its standard error is the
    closed form for U-statistics of independent draws, and too small for draws of slow chains.

    References:
        Measuring Sample Quality with Kernels (Gorham & Mackey, 2017)
        https://arxiv.org/abs/1703.01717
    """
    found = _standard(tree, reference, "model")
    if found is None:
        return missing(tree, NO_SCORE)
    values = [_u_statistic(y, s) for y, s in zip(*found[:2], strict=True)]
    value, se = np.array(values).T
    return Estimate(value, se, "" if np.isfinite(value).all() else NOT_FINITE)


def _u_statistic(y: Array, score: Array) -> tuple[float, float]:
    """Mean of the Stein kernel over pairs of different draws (N, D), and its standard error."""
    n = len(y)
    if n < 3 or not (np.isfinite(y).all() and np.isfinite(score).all()):
        return np.nan, np.nan
    sums, squares = [], 0.0
    for i in range(0, n, CHUNK):
        some = slice(i, i + CHUNK)
        kernel = stein_kernel(y[some], score[some], y, score)
        np.fill_diagonal(kernel[:, some], 0.0)
        sums.append(kernel.sum(1))
        squares += float(np.vdot(kernel, kernel))
    rows = np.concatenate(sums) / (n - 1)
    value = rows.mean()
    pairs = n * (n - 1)
    each = squares / pairs - value**2  # variance of one pair
    # rows of n - 1 pairs vary by the variance of E[kernel | y] and by what is left of `each`
    shared = max(0.0, (rows.var(ddof=1) - each / (n - 1)) * (n - 1) / (n - 2))
    variance = (4 * (n - 2) * shared + 2 * max(each, 0.0)) / pairs
    return float(value), float(np.sqrt(variance))


def stein_kernel(y: Array, s: Array, y_2: Array, s_2: Array) -> Array:
    """k_p between points y (N, D) with scores s and points y_2 (M, D) with scores s_2: (N, M).

    s.s' k + s.d'k + s'.d k + d.d'k for k = q^(-1/2), q = 1 + |r|^2, r = y - y':
    s.s' q^(-1/2) + (s - s').r q^(-3/2) + D q^(-3/2) - 3 |r|^2 q^(-5/2).
    """
    q = np.square(y).sum(1)[:, None] + np.square(y_2).sum(1) - 2 * y @ y_2.T
    q = 1 + np.maximum(q, 0.0)
    slope = (s * y).sum(1)[:, None] + (s_2 * y_2).sum(1) - s @ y_2.T - y @ s_2.T
    slope += y.shape[1] - 3 + 3 / q  # 3 |r|^2 / q = 3 - 3 / q
    kernel: Array = (s @ s_2.T + slope / q) / np.sqrt(q)
    return kernel


def fisher_divergence(tree: DataTree, reference: DataTree) -> Estimate:
    """E_q |d log q - d log p|^2 over up to 1,000 draws of the guide, in standardised coordinates.

    The score of q is the guide's own, or the derivative of its density. The standard error holds
    the rounding of the scores too.

    References:
        Estimation of Non-Normalized Statistical Models by Score Matching (Hyvarinen, 2005)
        https://jmlr.org/papers/v6/hyvarinen05a.html
    """
    model, own = (_standard(tree, reference, s) for s in ("model", "guide"))
    if model is None:
        return missing(tree, NO_SCORE)
    if own is None:
        return missing(tree, NO_OWN_SCORE)
    squared = np.square(own[1] - model[1]).sum(2)
    value = squared.mean(1)
    size = np.square(model[1]).sum(2).mean(1)
    rounding = (FLOAT_ERROR * max(own[2], model[2])) ** 2 * size
    se = np.hypot(squared.std(1) / np.sqrt(squared.shape[1]), rounding)
    return Estimate(value, se, "" if np.isfinite(value).all() else NOT_FINITE)
