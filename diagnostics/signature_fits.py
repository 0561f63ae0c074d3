"""What signatures share: slopes with intervals, errors of means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput
from inference.guide import check_counts
from inference.seeds import stream

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = [
    "Slope",
    "fit_slope",
    "rank_correlation",
]

Array = np.ndarray[Any, Any]
MIN_POINTS = 5  # fewer cannot be resampled into an interval
MIN_COUNTS = 20  # the variance of 20 counts is known to a third of itself
CELLS = 2_000_000  # numbers resampled at a time


@dataclass(frozen=True)
class Slope:
    """A slope or rank correlation with its bootstrap interval and error; intercept; Pearson's r."""

    value: float
    low: float
    high: float
    se: float
    intercept: float
    r: float


def fit_slope(
    x: Array, y: Array, *, resamples: int = 2000, level: float = 0.95, seed: int
) -> Slope:
    """Least-squares slope of y on x with a percentile bootstrap interval.

    If y holds several units at each x, they share one slope and each has an intercept of its own;
    points and units are then both resampled, which is conservative: where the noise of units is
    independent the interval is up to sqrt(3) times too wide. With fewer than about ten points a
    percentile interval is too narrow.

    Args:
        x: (P,), any units.
        y: (P,), or (P, U) for U units that were seen at the same points.
        resamples: bootstrap resamples.
        level: probability content of the interval, between 0 and 1.
        seed: the interval depends on it alone.

    Raises:
        BadInput: lengths differ, fewer than five points, NaN, or all x are equal.

    References:
        The pigeonhole bootstrap (Owen, 2007), resampling of points and units
        https://arxiv.org/abs/0712.1111
    """
    x, y = _pair(x, y)
    units = y.reshape(len(y), -1)
    rng = _generator(seed, resamples, level)
    draws = [_slopes(x[at], rows) for at, rows in _resampled(units, resamples, rng)]
    mean = units.mean(1)
    value = float(_slopes(x, mean))
    line = float(mean.mean() - value * x.mean()), _pearson(x, mean)
    return Slope(value, *_interval(draws, level), *line)


def rank_correlation(
    x: Array, y: Array, *, resamples: int = 2000, level: float = 0.95, seed: int
) -> Slope:
    """Spearman's rank correlation of x and y, both (P,); as :func:`fit_slope` otherwise."""
    from scipy.stats import rankdata

    x, y = _pair(x, y)
    rng = _generator(seed, resamples, level)
    draws = []
    for at, rows in _resampled(y[:, None], resamples, rng):
        a, b = (_standardised(rankdata(v, axis=-1)) for v in (x[at], rows))
        draws.append((a * b).mean(-1))
    value = _pearson(rankdata(x), rankdata(y))
    return Slope(value, *_interval(draws, level), np.nan, _pearson(x, y))


def responses(tree: DataTree, quantity: str, *, group: str = "circuit") -> Array:
    """What a circuit did, as one array (chain, draw, problem, neuron) in double precision.

    Args:
        tree: from `diagnostics.draw`.
        quantity: variable of the group.
        group: `circuit`, or another with dims (chain, draw, problem, ...).

    Raises:
        BadInput: group or variable is missing or has other dims, or values are NaN.
    """
    if group not in tree.children:
        raise _absent("tree", f"a group {group!r}", f"the groups {sorted(tree.children)}")
    data = tree[group].dataset
    if quantity not in data.data_vars:
        there = sorted(str(n) for n in data.data_vars)
        raise _absent(f"group {group!r}", f"a variable {quantity!r}", str(there))
    variable = data[quantity]
    if not {"chain", "draw", "problem"} <= set(variable.dims):
        raise _absent(quantity, "dims (chain, draw, problem, ...)", str(variable.dims))
    array = checked(quantity, variable.transpose("chain", "draw", "problem", ...).values)
    return array.reshape(*array.shape[:3], -1)


def _absent(subject: str, expected: str, got: str) -> BadInput:
    fix = (
        "A circuit returns inference.Draws(values, circuit={'spikes': (chains, draws, B, neurons)})"
        " and diagnostics.draw makes the group 'circuit' of it; other guides have no neurons."
    )
    return BadInput(subject, expected=expected, got=got, fix=fix)


def long_run_variance(series: Array) -> Array:
    """n times the variance of a mean over (chain, step), for n values (chain, step, ...).

    Bartlett's kernel over the square root of the number of steps: successive steps of a circuit are
    correlated. Correlations over many more steps than that are missed.

    References:
        A Simple, Positive Semi-Definite, Heteroskedasticity and Autocorrelation Consistent
        Covariance Matrix (Newey & West, 1987) https://doi.org/10.2307/1913610
    """
    centred = series - series.mean((0, 1))
    n = centred.shape[0] * centred.shape[1]
    found: Array = (centred**2).mean((0, 1))
    for lag, weight in enumerate(kernel(centred.shape[1]), 1):
        found = found + 2 * weight * (centred[:, lag:] * centred[:, :-lag]).sum((0, 1)) / n
    return np.maximum(found, 0.0)  # rounding


def windows(seen: Array, window: int, *, running: bool = False) -> Array:
    """Sums over windows of steps, (chain, window, problem, neuron), or means of running ones."""
    check_counts(window=window)
    steps = seen.shape[1]
    enough("draws per chain", steps, window)
    if running:
        total = np.cumsum(seen, 1)
        total[:, window:] -= total[:, :-window].copy()
        return total[:, window - 1 :] / window
    enough("windows in all trials", len(seen) * (steps // window), MIN_COUNTS)
    used = seen[:, : steps // window * window]
    sums: Array = used.reshape(len(seen), -1, window, *seen.shape[2:]).sum(2)
    return sums


def pairs(neurons: int) -> tuple[Array, Array]:
    """Places of all pairs of neurons."""
    enough("neurons", neurons, 2)
    first, second = np.triu_indices(neurons, 1)
    return first, second


def z_scored(seen: Array) -> Array:
    """Over the first two axes; NaN where nothing varies."""
    varies = np.ptp(seen, (0, 1)) > 0
    found: Array = (seen - seen.mean((0, 1))) / np.where(varies, seen.std((0, 1)), np.nan)
    return found


def per_problem(name: str, values: Any, problems: int) -> Array:
    """One number for each problem, or :class:`BadInput`."""
    array = checked(name, values)
    if array.shape != (problems,):
        expected, fix = f"shape ({problems},)", "Pass one number for each problem of the tree."
        raise BadInput(name, expected=expected, got=str(array.shape), fix=fix)
    return array


def settled(mean: Array, tolerance: float, final: float) -> tuple[Array, Array]:
    """Step (problem) and deviation (step, problem) of a mean response (step, problem, neuron)."""
    steps = len(mean)
    last = max(1, round(final * steps))
    deviation = np.sqrt(((mean - mean[-last:].mean(0)) ** 2).mean(-1))
    outside = deviation > tolerance
    first = np.where(outside.any(0), steps - outside[::-1].argmax(0), 0)
    return np.where(first > steps - last, np.nan, first.astype(float)), deviation


def band(steps: int, step: float, band: tuple[float, float]) -> Array:
    """Which frequencies of a spectrum are in the band."""
    require("step", np.array(step > 0), "a number > 0")
    frequency = np.fft.rfftfreq(steps, step)
    inside: Array = (frequency >= band[0]) & (frequency <= band[1]) & (frequency > 0)
    if not inside.any():
        expected = f"a frequency between {1 / (steps * step):g} and {1 / (2 * step):g}"
        raise BadInput("band", expected=expected, got=str(band), fix="Draw longer, or widen it.")
    return inside


def kernel(steps: int) -> Array:
    """Bartlett's weights of the lags 1, 2, ..., up to the square root of the steps."""
    lags = min(int(np.sqrt(steps)), steps - 1)
    return 1 - np.arange(1, lags + 1) / (lags + 1)


def checked(name: str, values: Any) -> Array:
    """Numbers in double precision, or :class:`BadInput` if some are not finite."""
    array = np.asarray(values, dtype=np.float64)
    require(name, np.isfinite(array), "finite numbers, not NaN")
    return array


def logarithm(name: str, values: Any) -> Array:
    """The logarithm of numbers, or :class:`BadInput` if some have none."""
    array = checked(name, values)
    require(name, array > 0, "numbers > 0")
    found: Array = np.log(array)
    return found


def require(name: str, good: Array, expected: str) -> None:
    """Raise :class:`BadInput` unless all are good."""
    if not good.all():
        got = f"{(~good).sum()} of {good.size} that are not"
        raise BadInput(name, expected=expected, got=got, fix="Leave them out, or find their cause.")


def enough(what: str, got: int, least: int) -> None:
    """Raise :class:`BadInput` if there is too little of something."""
    if got < least:
        raise BadInput(what, expected=f"at least {least}", got=str(got), fix="Measure more.")


def dataset(
    fields: Mapping[str, Any], coords: Mapping[str, Any] | None = None, **attrs: Any
) -> Dataset:
    """An xarray Dataset; xarray is imported late."""
    import xarray

    return xarray.Dataset(fields, coords, attrs)


def _pair(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = checked("x", x), checked("y", y)
    if x.ndim != 1 or y.shape[:1] != x.shape:
        got = f"shapes {x.shape} and {y.shape}"
        raise BadInput("x", expected="one for each y", got=got, fix="Pass equal lengths.")
    enough("points", len(x), MIN_POINTS)
    if np.ptp(x) == 0:
        raise BadInput("x", expected="values that differ", got="one value", fix="Vary it.")
    return x, y


def _generator(seed: int, resamples: int, level: float) -> np.random.Generator:
    check_counts(resamples=resamples)
    if not 0 < level < 1:
        raise BadInput("level", expected="between 0 and 1", got=str(level), fix="level=0.95.")
    return np.random.default_rng(stream(seed))


def _resampled(y: Array, resamples: int, rng: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Places (R, P) and what y (P, U) is there, averaged over resampled units, (R, P); chunked."""
    p, u = y.shape
    step = max(1, CELLS // p)
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        at = rng.integers(p, size=(n, p))
        weights = rng.multinomial(u, np.full(u, 1 / u), size=n) / u
        yield at, np.take_along_axis(weights @ y.T, at, axis=1)


def _slopes(x: Array, y: Array) -> Array:
    """Least-squares slopes over the last axis; NaN where x does not vary."""
    dx = x - x.mean(-1, keepdims=True)
    spread = np.where(np.ptp(x, -1) > 0, (dx**2).sum(-1), np.nan)
    found: Array = (dx * y).sum(-1) / spread
    return found


def _standardised(values: Array) -> Array:
    centred = values - values.mean(-1, keepdims=True)
    varies = np.ptp(values, -1, keepdims=True) > 0
    found: Array = centred / np.where(varies, centred.std(-1, keepdims=True), np.nan)
    return found


def _pearson(x: Array, y: Array) -> float:
    return float((_standardised(x) * _standardised(y)).mean())


def _interval(draws: list[Array], level: float) -> tuple[float, float, float]:
    """Ends of the interval, and the standard deviation; resamples of one value are left out."""
    values = np.concatenate(draws)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return np.nan, np.nan, np.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), float(values.std(ddof=1))
