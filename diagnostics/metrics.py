"""Metrics: functions of a guide's draws and reference draws, one number per problem.

Each takes two DataTrees, the guide's and the reference's, and returns an :class:`Estimate`. Where a
metric cannot be computed its value is NaN and `reason` says why; it is never a plausible number.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .discrete import marginal_tv, pattern_kl
from .draws import packed
from .estimate import BLOCKS, Array, Estimate, Metric, by_blocks, missing

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["METRICS", "Estimate", "Metric", "khat_threshold"]

DIRECTIONS = 200  # of the sliced distance
C2ST_DRAWS = 2000  # of each kind: the null sd of the accuracy is then .008


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


def _sd(z: Array) -> Array:
    """Standard deviations of draws (B, S, D), 1 where a discrete latent never moved: (B, D)."""
    sd: Array = z.std(1)
    return np.where(sd > 0, sd, 1.0)


def mean_error(tree: DataTree, reference: DataTree) -> Estimate:
    """Largest |difference of means| over the latents, in sds of the reference."""
    q, p = packed(tree), packed(reference)
    error = np.abs(q.mean(1) - p.mean(1)) / _sd(p)
    worst = error.argmax(1)
    spread = q.std(1) / _sd(p)
    se = np.sqrt(spread**2 / _size(tree) + 1 / _size(reference))
    return Estimate(_pick(error, worst), _pick(se, worst))


def sd_ratio(tree: DataTree, reference: DataTree) -> Estimate:
    """The guide's sd over the reference's, for the latent where it is furthest from 1."""
    q, p = packed(tree), packed(reference)
    ratio = np.where((q.std(1) > 0) | (p.std(1) > 0), q.std(1) / _sd(p), 1.0)
    worst = np.abs(np.log(np.maximum(ratio, 1e-12))).argmax(1)
    se = ratio * np.sqrt(0.5 / _size(tree) + 0.5 / _size(reference))
    return Estimate(_pick(ratio, worst), _pick(se, worst))


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
    centred = (z - z.mean(0)) / _sd(z[None])[0]
    matrix: Array = centred.T @ centred / len(z)
    return matrix


def sliced_wasserstein(tree: DataTree, reference: DataTree) -> Estimate:
    """Sliced 2-Wasserstein distance over 200 directions, each latent in sds of the reference.

    Of the continuous latents. The standard error is the spread over eight disjoint blocks of draws,
    divided by sqrt(8).
    """
    from ot import sliced_wasserstein_distance

    def distance(a: Array, b: Array) -> float:
        return float(sliced_wasserstein_distance(a, b, n_projections=DIRECTIONS, seed=0))

    q, p = _scaled(tree, reference, discrete=False)
    if not q.shape[2]:
        return missing(tree, "no latent is continuous")
    return by_blocks(distance, q, p)


def c2st(tree: DataTree, reference: DataTree) -> Estimate:
    """Classifier two-sample test: cross-validated accuracy in telling the guide's draws from exact.

    The better of two classifiers, each over five folds on 2,000 draws of each kind in sds of the
    reference: a quadratic logistic regression (location, scale, correlation) and boosted trees
    (shape, modes). A half means indistinguishable; the Bayes classifier would reach (1 + TV) / 2.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2017)
        https://arxiv.org/abs/1610.06545
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler
    from threadpoolctl import threadpool_limits

    quadratic = make_pipeline(
        PolynomialFeatures(2, include_bias=False), StandardScaler(), LogisticRegression()
    )
    classifiers = (quadratic, HistGradientBoostingClassifier(random_state=0))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    values, count = [], 0
    for a, b in zip(*_scaled(tree, reference), strict=True):
        count = min(C2ST_DRAWS, len(a), len(b))
        both = np.concatenate([_spread(a, count), _spread(b, count)])
        label = np.repeat([0, 1], count)
        # one thread: OpenMP threads that wait for one another are a hundred times slower on a
        # machine that has other work to do
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.filterwarnings("ignore", category=UserWarning)  # convergence of the logistic
            scores = [cross_val_score(c, both, label, cv=folds).mean() for c in classifiers]
        values.append(max(scores))
    accuracy = np.array(values)
    return Estimate(accuracy, np.sqrt(accuracy * (1 - accuracy) / (2 * count)))


def _spread(z: Array, count: int) -> Array:
    """`count` draws at even distances, so that every chain is in."""
    chosen: Array = z[np.linspace(0, len(z) - 1, count).round().astype(int)]
    return chosen


def _scaled(
    tree: DataTree, reference: DataTree, *, discrete: bool | None = None
) -> tuple[Array, Array]:
    """Both sets of draws, (B, S, D), standardised by the reference."""
    q, p = (packed(t, discrete=discrete) for t in (tree, reference))
    centre, scale = p.mean(1, keepdims=True), _sd(p)[:, None]
    return (q - centre) / scale, (p - centre) / scale


NO_DENSITY = "the guide has no density"


def _log_weights(tree: DataTree) -> Array | None:
    """log p(x, z) - log q(z given x), (B, S), or None for a guide without density."""
    stats = tree["sample_stats"].dataset
    if "log_weight" not in stats:
        return None
    weights = stats["log_weight"].transpose("problem", "chain", "draw").values
    array: Array = weights.reshape(weights.shape[0], -1).astype(np.float64)
    return array


def elbo_gap(tree: DataTree, reference: DataTree) -> Estimate:
    """log p(x) - ELBO = KL(q || p), in nats: the only absolute and additive scale.

    The standard error holds the rounding of the log-densities too.
    """
    weights = _log_weights(tree)
    if weights is None:
        return missing(tree, NO_DENSITY)
    if "evidence" not in reference.children:
        return missing(tree, "log p(x) is not known")
    evidence = reference["evidence"].dataset["log_evidence"].values
    rounding = 10 * np.finfo(evidence.dtype).eps * np.abs(evidence)
    se = np.hypot(weights.std(1, ddof=1) / np.sqrt(weights.shape[1]), rounding)
    return Estimate(evidence - weights.mean(1), se)


def khat(tree: DataTree, reference: DataTree) -> Estimate:
    """Pareto shape of the largest importance weights; -inf where the weights do not vary.

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
    return Estimate(shape, se)


def pareto_shape(log_weights: Array) -> Array:
    """k-hat of log weights (B, S), (B,); -inf where they stay within a thousandth of a nat.

    ArviZ wants minus the log weights.
    """
    from arviz_stats.base import array_stats

    flat = np.ptp(log_weights, axis=1) < 1e-3  # float32 rounding, not a tail
    shape = np.full(len(log_weights), -np.inf)
    if not flat.all():
        shape[~flat] = array_stats.psislw(-log_weights[~flat])[1]
    return shape


def khat_threshold(draws: int) -> float:
    """k-hat above this is not to be trusted with so many draws: min(1 - 1/log10 S, 0.7)."""
    return float(min(1 - 1 / np.log10(draws), 0.7))


def ess(tree: DataTree, reference: DataTree) -> Estimate:
    """Smallest bulk effective sample size over the latents (ArviZ)."""
    import arviz_stats

    return _arviz(tree, arviz_stats.ess, np.min)


def rhat(tree: DataTree, reference: DataTree) -> Estimate:
    """Largest rank-normalised split R-hat over the latents (ArviZ)."""
    import arviz_stats

    if tree.attrs["independent_draws"]:
        return missing(tree, "independent draws have no chains to compare")
    if tree["posterior"].sizes["chain"] < 2:
        return missing(tree, "one chain cannot be compared with others")
    return _arviz(tree, arviz_stats.rhat, np.max)


def _arviz(tree: DataTree, statistic: Any, pick: Any) -> Estimate:
    found = statistic(tree["posterior"].dataset)
    tables = [v.transpose("problem", ...).values for v in found.data_vars.values()]
    value = pick(np.concatenate([t.reshape(len(t), -1) for t in tables], 1), axis=1)
    return Estimate(value, np.full(len(value), np.nan))


METRICS: Mapping[str, Metric] = {
    "mean_error": Metric(mean_error, "mean error / sd", 0.0, "bias"),
    "sd_ratio": Metric(sd_ratio, "sd ratio", 1.0, "over- and under-confidence"),
    "correlation_error": Metric(correlation_error, "correlation error", 0.0, "lost correlations"),
    "sliced_wasserstein": Metric(
        sliced_wasserstein, "sliced W2 / sd", 0.0, "location, scale, tails"
    ),
    "c2st": Metric(c2st, "C2ST", 0.5, "anything a classifier can learn"),
    "marginal_tv": Metric(marginal_tv, "marginal TV", 0.0, "discrete marginals"),
    "pattern_kl": Metric(pattern_kl, "pattern KL / nats", 0.0, "joint patterns, discrete"),
    "elbo_gap": Metric(elbo_gap, "log p(x) - ELBO / nats", 0.0, "KL(q || p)"),
    "khat": Metric(khat, "k-hat", None, "q too narrow or light-tailed"),
    "ess": Metric(ess, "ESS", None, "mixing of chains"),
    "rhat": Metric(rhat, "R-hat", 1.0, "convergence of chains"),
}
