"""Metrics of importance weights p(x, z) / q(z given x), for guides with a density.

Reverse quantities average over the guide's draws and cannot see a mode the guide never visits;
forward ones average over the reference draws and can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .estimate import BLOCKS, Array, Estimate, missing

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = [
    "IWAE_DRAWS",
    "elbo_gap",
    "eubo_gap",
    "forward_ess",
    "iwae_bound",
    "iwae_gap",
    "khat",
    "khat_threshold",
    "pareto_shape",
    "reverse_ess",
]

IWAE_DRAWS = 100  # K
IWAE_BLOCKS = 10  # fewest blocks of K draws behind a standard error
ROUNDING = 10  # units in the last place that a log-density may be off, as a sum of many terms

NO_DENSITY = "the guide has no density"
NO_EVIDENCE = "log p(x) is not known"
UNDEFINED = "in some problem the guide's density is not a number at a reference draw"
TIED = "the largest weights are tied, as those of counts may be"
NOT_EVALUATED = "the guide's density at the reference draws is not known"


def _log_weights(tree: DataTree) -> Array | None:
    """log p(x, z) - log q(z given x), (B, S), or None for a guide without density."""
    stats = tree["sample_stats"].dataset
    return _by_problem(stats["log_weight"]) if "log_weight" in stats else None


def _log_weights_at_reference(tree: DataTree) -> Array | None:
    """The same at the reference draws; infinite where the guide never goes."""
    if "at_reference" not in tree.children:
        return None
    found = tree["at_reference"].dataset
    return _by_problem(found["log_p_joint"]) - _by_problem(found["log_q"])


def _by_problem(variable: object) -> Array:
    """(chain, draw, problem) to (B, S), in float64."""
    values: Array = variable.transpose("problem", "chain", "draw").values  # type: ignore[attr-defined]
    return values.reshape(len(values), -1).astype(np.float64)


def _no_forward(tree: DataTree) -> str:
    """Why there are no weights at the reference draws."""
    return NOT_EVALUATED if _log_weights(tree) is not None else NO_DENSITY


def _undefined(value: Array) -> str:
    """Why a mean over the reference draws is NaN, if it is."""
    return UNDEFINED if np.isnan(value).any() else ""


def _evidence(reference: DataTree) -> tuple[Array, Array] | None:
    """log p(x) and the rounding of log-densities of that size, (B,), in nats."""
    if "evidence" not in reference.children:
        return None
    evidence = reference["evidence"].dataset["log_evidence"].values
    return evidence.astype(np.float64), _rounding(evidence, evidence.dtype)


def _rounding(log_density: Array, dtype: np.dtype[np.floating]) -> Array:
    return ROUNDING * float(np.finfo(dtype).eps) * np.abs(log_density)


def _mean(sample: Array) -> tuple[Array, Array]:
    """Mean of (B, S) over S and its standard error, 0 where the mean is infinite."""
    with np.errstate(invalid="ignore"):
        mean = sample.mean(1)
        se = sample.std(1, ddof=1) / np.sqrt(sample.shape[1])
    return mean, np.where(np.isinf(mean), 0.0, se)


def elbo_gap(tree: DataTree, reference: DataTree) -> Estimate:
    """log p(x) - ELBO = KL(q || p), in nats: the only absolute and additive scale.

    Infinite where the guide goes where p is 0; half of the mass missing costs no more than log 2.
    The standard error holds the rounding of the log-densities too.
    """
    weights = _log_weights(tree)
    if weights is None:
        return missing(tree, NO_DENSITY)
    known = _evidence(reference)
    if known is None:
        return missing(tree, NO_EVIDENCE)
    mean, se = _mean(weights)
    return Estimate(known[0] - mean, np.hypot(se, known[1]))


def eubo_gap(tree: DataTree, reference: DataTree) -> Estimate:
    """EUBO - log p(x) = KL(p || q), in nats, with EUBO = E_p[log p(x, z) - log q(z given x)].

    Over the reference draws; infinite where q is 0 at one of them, and so for a mode dropped.

    References:
        Beyond ELBOs: A Large-Scale Evaluation of Variational Methods for Sampling (Blessing et al.,
        2024) https://arxiv.org/abs/2406.07423
    """
    weights = _log_weights_at_reference(tree)
    if weights is None:
        return missing(tree, _no_forward(tree))
    known = _evidence(reference)
    if known is None:
        return missing(tree, NO_EVIDENCE)
    mean, se = _mean(weights)
    return Estimate(mean - known[0], np.hypot(se, known[1]), _undefined(mean))


def iwae_gap(tree: DataTree, reference: DataTree) -> Estimate:
    """log p(x) - E log (w_1 + ... + w_K) / K, in nats, with K = 100 draws: below the ELBO's gap.

    What is left of KL(q || p) when K draws are reweighted: about (1 / ESS - 1) / 2 K of errors that
    reweighting can mend, with ESS their `reverse_ess`, and log 2 of half the mass missing. The mean
    is over disjoint blocks of K draws, the standard error their spread; it needs ten blocks.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016)
        https://arxiv.org/abs/1509.00519
    """
    weights = _log_weights(tree)
    if weights is None:
        return missing(tree, NO_DENSITY)
    known = _evidence(reference)
    if known is None:
        return missing(tree, NO_EVIDENCE)
    least = IWAE_BLOCKS * IWAE_DRAWS
    if weights.shape[1] < least:
        return missing(tree, f"the bound of {IWAE_DRAWS} draws and its error need {least} draws")
    mean, se = _mean(iwae_bound(weights, IWAE_DRAWS))
    return Estimate(known[0] - mean, np.hypot(se, known[1]))


def iwae_bound(log_weights: Array, k: int) -> Array:
    """log mean weight of disjoint blocks of k draws: log weights (B, S) to (B, S // k).

    The draws of a block are as far apart as they can be, and a block of 2 k is two blocks of k.
    """
    from scipy.special import logsumexp

    rows, total = log_weights.shape
    blocks = log_weights[:, : total // k * k].reshape(rows, k, -1)
    bound: Array = logsumexp(blocks, axis=1) - np.log(k)
    return bound


def reverse_ess(tree: DataTree, reference: DataTree) -> Estimate:
    """(sum w)^2 / (S sum w^2) over S draws of the guide: the efficiency of reweighting, in (0, 1].

    Blind to modes the guide never visits. The standard error is the delta method's and, with the
    weights' second moment, too small where k-hat is above .25; it holds the rounding too.

    References:
        Sequential Imputations and Bayesian Missing Data Problems (Kong et al., 1994)
        https://doi.org/10.1080/01621459.1994.10476469
    """
    log_w = _log_weights(tree)
    if log_w is None:
        return missing(tree, NO_DENSITY)
    with np.errstate(invalid="ignore"):  # no draw has any weight: NaN
        w = np.exp(log_w - log_w.max(1, keepdims=True))
    first, second = w.mean(1), np.square(w).mean(1)
    value = first**2 / second
    # d log value = 2 d first / first - d second / second
    influence = 2 * w / first[:, None] - np.square(w) / second[:, None]
    se = value * influence.std(1) / np.sqrt(w.shape[1])
    dtype = tree["sample_stats"].dataset["log_weight"].dtype
    rounding = _rounding(np.median(log_w, axis=1), dtype)
    nothing = "" if np.isfinite(value).all() else "no draw has any weight in some problem"
    return Estimate(value, np.hypot(se, rounding), nothing)


def forward_ess(tree: DataTree, reference: DataTree) -> Estimate:
    """1 / E_p[p / q] over the reference draws: the same efficiency, but it sees dropped modes.

    0 where q is 0 at a reference draw; above 1 only by noise. The standard error is the delta
    method's: too small where p / q has heavy tails, that is where q is narrow.

    References:
        Beyond ELBOs: A Large-Scale Evaluation of Variational Methods for Sampling (Blessing et al.,
        2024) https://arxiv.org/abs/2406.07423
    """
    log_w = _log_weights_at_reference(tree)
    if log_w is None:
        return missing(tree, _no_forward(tree))
    known = _evidence(reference)
    if known is None:
        return missing(tree, NO_EVIDENCE)
    top = log_w.max(1)
    finite = ~np.isposinf(top)
    peak = np.where(finite, top, 0.0)
    ratio = np.exp(np.where(finite[:, None], log_w - peak[:, None], 0.0))  # p / q over its largest
    mean, se = _mean(ratio)
    value = np.where(finite, np.exp(known[0] - peak - np.log(mean)), 0.0)
    return Estimate(value, value * np.hypot(se / mean, known[1]), _undefined(value))


def khat(tree: DataTree, reference: DataTree) -> Estimate:
    """Pareto shape of the largest importance weights; -inf where the largest weights do not vary.

    The standard error is the spread over eight disjoint blocks of draws, divided by the fourth root
    of eight: the tail that is fitted grows as the square root of the draws.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024)
        https://arxiv.org/abs/1507.02646
    """
    weights = _log_weights(tree)
    if weights is None:
        return missing(tree, NO_DENSITY)
    least = 25 * BLOCKS  # ArviZ fits a tail of at least five of 25 draws, here in each block
    if weights.shape[1] < least:
        return missing(tree, f"k-hat and its error need {least} draws")
    blocks = np.stack([pareto_shape(weights[:, k::BLOCKS]) for k in range(BLOCKS)])
    shape = pareto_shape(weights)
    with np.errstate(invalid="ignore"):
        se = np.where(np.isfinite(shape), blocks.std(0, ddof=1) / BLOCKS**0.25, 0.0)
    return Estimate(shape, se, TIED if np.isnan(shape).any() else "")


def pareto_shape(log_weights: Array) -> Array:
    """k-hat of log weights (B, S), (B,); -inf where the largest are within a thousandth of a nat.

    NaN where a quarter of them are tied with the smallest, as weights of counts may be.
    ArviZ wants minus the log weights, and fits the largest min(S / 5, 3 sqrt(S)) of them.
    """
    from arviz_stats.base import array_stats

    draws = log_weights.shape[1]
    tail = 1 + int(np.ceil(min(draws / 5, 3 * draws**0.5)))
    largest = np.sort(log_weights, axis=1)[:, -tail:]
    # float32 rounding or one atom, not a tail; the smallest is where the tail begins
    flat = np.ptp(largest[:, 1:], axis=1) < 1e-3
    shape = np.full(len(log_weights), -np.inf)
    if not flat.all():
        with np.errstate(divide="ignore", invalid="ignore"):  # ties
            shape[~flat] = array_stats.psislw(-log_weights[~flat])[1]
        tied = largest[:, -(-tail // 4)] - largest[:, 0] < 1e-6  # their fit divides by a quartile
        shape[tied & ~flat] = np.nan
    return shape


def khat_threshold(draws: int) -> float:
    """k-hat above this is not to be trusted with so many draws: min(1 - 1/log10 S, 0.7)."""
    return float(min(1 - 1 / np.log10(draws), 0.7))
