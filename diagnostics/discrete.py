"""Metrics of discrete latents: frequencies against exact probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .draws import packed
from .estimate import Array, Estimate, by_blocks, missing

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["marginal_tv", "pattern_kl"]


def marginal_tv(tree: DataTree, reference: DataTree) -> Estimate:
    """Largest total variation between the marginals of a discrete latent.

    Between two sets of N draws from p it is about (1/2) sum sqrt(4 p (1 - p) / (pi N)), not zero:
    read it beside its floor. The standard error is the spread over blocks, as of sliced W2.
    """
    q, p = packed(tree, discrete=True), packed(reference, discrete=True)
    if not q.shape[2]:
        return missing(tree, "no latent is discrete")

    def distance(a: Array, b: Array) -> float:
        return max(_total_variation(a[:, k], b[:, k]) for k in range(a.shape[1]))

    return by_blocks(distance, q, p)


def _total_variation(a: Array, b: Array) -> float:
    values, index = np.unique(np.concatenate([a, b]), return_inverse=True)
    f, g = (np.bincount(i, minlength=len(values)) for i in (index[: len(a)], index[len(a) :]))
    return float(np.abs(f / len(a) - g / len(b)).sum() / 2)


def pattern_kl(tree: DataTree, reference: DataTree) -> Estimate:
    """KL(q || p) between joint patterns: the guide's frequencies against exact probabilities.

    For models whose latents are all discrete; needs no density of the guide. With K patterns and N
    draws it is about (K - 1) / (2 N) too high, as its floor is. The standard error is the spread
    over blocks, as of sliced W2.
    """
    z = packed(tree, discrete=True)
    if not z.shape[2] or packed(tree, discrete=False).shape[2]:
        return missing(tree, "some latent is continuous")
    if "evidence" not in reference.children:
        return missing(tree, "log p(x) is not known")
    joint = tree["sample_stats"].dataset["log_p_joint"].transpose("problem", ...).values
    evidence = reference["evidence"].dataset["log_evidence"].values
    log_p = joint.reshape(len(joint), -1) - evidence[:, None]
    if max(_singles(rows) for rows in z) > 0.5:
        return missing(tree, "over half of the draws are patterns seen once: read the ELBO gap")
    both = np.concatenate([z, log_p[..., None]], -1)
    return by_blocks(lambda a, _: _plug_in_kl(a), both, both)


def _singles(rows: Array) -> float:
    """Share of draws (S, D) whose pattern occurs once."""
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    return float((counts == 1).sum() / len(rows))


def _plug_in_kl(rows: Array) -> float:
    """Mean of log frequency - log p over patterns (S, D) with log p in the last column."""
    _, first, counts = np.unique(rows[:, :-1], axis=0, return_index=True, return_counts=True)
    share = counts / len(rows)
    return float((share * (np.log(share) - rows[first, -1])).sum())
