"""Signatures: the neural predictions of the papers, measured on what a circuit did.

A circuit returns `inference.Draws(values, circuit={...})`, of which `diagnostics.draw` makes the
group `circuit`: `spikes` (counts per step), `rates` (expected counts per step) and `potentials`
(of membranes), each (chain, draw, problem, neuron), where all axes after `problem` are neurons.
`draw` is neural time within a chain, in steps; chains are independent trials. To leave out a
transient of 200 steps, pass `tree.isel(draw=slice(200, None))`.

Every signature returns a Dataset with `value`, a standard error `se` and, where it is a fit, a 95 %
bootstrap interval from `low` to `high`. Its attributes are `measured`, `units`, `source`, and
`reason`, which says why values are NaN and is empty if none is. BadInput is raised if the group or
the quantity is missing, has other dims or holds NaN, and for what each function names.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput

from . import signature_fits as fits
from .signature_fits import Array

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = [
    "convergence_time",
    "fano_factor",
    "noise_correlations",
    "oscillation_against_surprise",
    "oscillation_amplitude",
    "signal_correlations",
    "sparsity",
    "variance_against_contrast",
]


def fano_factor(tree: DataTree, *, window: int, quantity: str = "spikes") -> Dataset:
    """Fano factor: variance over mean of spike counts; 1 if spikes are Poisson.

    Windows of all trials are pooled: a drifting mean counts as variance. The error allows for
    correlations of nearby windows; it is at least that of Poisson spikes, sqrt(2 / n), where those
    would fill fewer than ten of n windows twice, for unseen coincidences say nothing of their rate.

    Args:
        tree: with the group `circuit`.
        window: steps in a window; what is left over at the end is dropped.
        quantity: spike counts per step.

    Returns:
        `value`, `se` and `mean` (problem, neuron); NaN for silent neurons.

    Raises:
        BadInput: counts are not whole, or fewer than 20 windows.

    References:
        Stimulus onset quenches neural variability: a widespread cortical phenomenon (Churchland et
        al., 2010) https://doi.org/10.1038/nn.2501
    """
    spikes = fits.responses(tree, quantity)
    fits.require(quantity, (spikes >= 0) & (spikes == np.floor(spikes)), "whole numbers >= 0")
    counts = fits.windows(spikes, window)
    mean, variance = counts.mean((0, 1)), counts.var((0, 1), ddof=1)
    mu = np.where(mean > 0, mean, np.nan)
    value = variance / mu
    d = counts - mean
    influence = (d**2 - variance - value * d) / mu  # of a ratio, by the delta method
    n = counts.shape[0] * counts.shape[1]
    least = np.where(n * mu**2 / 2 < 10, 2.0, 0.0)
    se = np.sqrt(np.maximum(fits.long_run_variance(influence), least) / n)
    fields = {"value": value, "se": se, "mean": mean}
    return fits.dataset(
        {name: (("problem", "neuron"), v) for name, v in fields.items()},
        measured=f"Fano factor of {quantity} in windows of {window} steps",
        units="spikes",
        source="https://doi.org/10.1038/nn.2501",
        reason="the neuron was silent" * bool(np.isnan(value).any()),
    )


def noise_correlations(tree: DataTree, *, window: int = 1, quantity: str = "spikes") -> Dataset:
    """Correlations of pairs of neurons over windows and trials of one problem.

    Args:
        tree: with the group `circuit`.
        window: steps in a window, over which responses are summed.
        quantity: spikes, rates or potentials.

    Returns:
        `value` and `se` (problem, pair), with coordinates `first` and `second`; NaN if a neuron
        does not vary. The error is Bartlett's for stationary Gaussian series: autocorrelations are
        allowed for.

    Raises:
        BadInput: one neuron, or fewer than 20 windows.

    References:
        Measuring and interpreting neuronal correlations (Cohen & Kohn, 2011)
        https://doi.org/10.1038/nn.2842
    """
    seen = fits.windows(fits.responses(tree, quantity), window)
    first, second = fits.pairs(seen.shape[3])
    n = seen.shape[0] * seen.shape[1]
    value, se = [], []
    for b in range(seen.shape[2]):  # one problem at a time: pairs are many
        z = fits.z_scored(seen[:, :, b])
        r = (z.reshape(n, -1).T @ z.reshape(n, -1))[first, second] / n
        both = np.ones_like(r)
        for lag, weight in enumerate(fits.kernel(z.shape[1]), 1):
            own = (z[:, lag:] * z[:, :-lag]).sum((0, 1)) / n
            both += 2 * weight * own[first] * own[second]
        value.append(r)
        se.append((1 - r**2) * np.sqrt(np.maximum(both, 0.0) / n))
    measured = f"noise correlation of {quantity} in windows of {window} steps"
    return _correlations(value, se, (first, second), measured)


def signal_correlations(tree: DataTree, *, quantity: str = "rates") -> Dataset:
    """Correlations of pairs of neurons' mean responses over problems.

    Noise left in the means pulls them towards the noise correlations: draw long.

    Args:
        tree: with the group `circuit`.
        quantity: spikes, rates or potentials.

    Returns:
        `value` and `se` = (1 - r^2) / sqrt(B - 1), (pair), with coordinates `first` and `second`;
        NaN if a neuron answers all problems alike.

    Raises:
        BadInput: one neuron, or fewer than five problems.
    """
    means = fits.responses(tree, quantity).mean((0, 1))
    fits.enough("problems", len(means), 5)
    pairs = fits.pairs(means.shape[1])
    z = fits.z_scored(means[None])[0]
    r = (z.T @ z)[pairs] / len(z)
    se = (1 - r**2) / np.sqrt(len(z) - 1)
    return _correlations(r, se, pairs, f"signal correlation of mean {quantity}")


def variance_against_contrast(
    tree: DataTree, contrast: Array, *, quantity: str = "rates", group: str = "circuit", seed: int
) -> Dataset:
    """Quenching: slope of neurons' log variance on log contrast; -1: variance = a / contrast.

    Args:
        tree: with the group.
        contrast: (B,), in any units.
        quantity: rates, potentials or spikes, or of the group `posterior` the name of a latent.
        group: where it is, with dims (chain, draw, problem, ...).
        seed: of the bootstrap, over problems and neurons; see :func:`fit_slope`.

    Returns:
        `value`, `low`, `high`, `se`, `intercept` and `r`, and `variance` (problem, neuron) with the
        coordinate `contrast`. Neurons without variance in some problem are left out of the fit;
        NaN if none is left.

    Raises:
        BadInput: see :func:`fit_slope`; a contrast is not above 0; fewer than 20 draws.

    References:
        Neural variability and sampling-based probabilistic representations in the visual cortex
        (Orban et al., 2016) https://doi.org/10.1016/j.neuron.2016.09.038
    """
    seen = fits.responses(tree, quantity, group=group)
    fits.enough("draws in all chains", seen.shape[0] * seen.shape[1], fits.MIN_COUNTS)
    variance = seen.var((0, 1), ddof=1)
    x = fits.per_problem("contrast", contrast, len(variance))
    used = (variance > 0).all(0)
    line = fits.Slope(*[np.nan] * 6)
    if used.any():
        line = fits.fit_slope(fits.logarithm("contrast", x), np.log(variance[:, used]), seed=seed)
    return fits.dataset(
        asdict(line) | {"variance": (("problem", "neuron"), variance)},
        {"contrast": ("problem", x)},
        measured=f"slope of log variance of {quantity} on log contrast",
        units="1",
        source="https://doi.org/10.1016/j.neuron.2016.09.038",
        reason=f"{(~used).sum()} neurons without variance left out" * (not used.all()),
    )


def sparsity(tree: DataTree, *, quantity: str = "spikes") -> Dataset:
    """How few neurons answer, and to how few problems.

    The sparseness of n mean responses r is (1 - (mean r)^2 / mean r^2) / (1 - 1/n): 0 if they are
    equal, 1 if one is all there is; over problems it is called lifetime, over neurons population.

    Args:
        tree: with the group `circuit`.
        quantity: spikes or rates.

    Returns:
        `value`, the share of zeros among steps, trials and neurons, and `population` (problem),
        `lifetime` (neuron), with `se`, and `population_se` and `lifetime_se` by the jackknife. NaN
        where all responses are zero or there is only one; jackknife errors need three.

    Raises:
        BadInput: a response is negative.

    References:
        Sparse Coding and Decorrelation in Primary Visual Cortex During Natural Vision (Vinje &
        Gallant, 2000) https://doi.org/10.1126/science.287.5456.1273
    """
    seen = fits.responses(tree, quantity)
    fits.require(quantity, seen >= 0, "numbers >= 0")
    zeros = (seen == 0).mean(3)
    means = seen.mean((0, 1))
    se = np.sqrt(fits.long_run_variance(zeros) / zeros[..., 0].size)
    fields: dict[str, Any] = {"value": ("problem", zeros.mean((0, 1))), "se": ("problem", se)}
    for name, dim, rows in (("population", "problem", means), ("lifetime", "neuron", means.T)):
        found = _sparseness(rows)
        fields |= {name: (dim, found[0]), f"{name}_se": (dim, found[1])}
    undefined = any(np.isnan(fields[n][1]).any() for n in ("population", "lifetime"))
    return fits.dataset(
        fields,
        measured=f"share of zeros, population and lifetime sparseness of {quantity}",
        units="1",
        source="https://doi.org/10.1126/science.287.5456.1273",
        reason="all responses are zero, or there is only one" * undefined,
    )


def convergence_time(
    tree: DataTree,
    *,
    tolerance: float,
    quantity: str = "rates",
    group: str = "circuit",
    smooth: int = 1,
    final: float = 0.2,
) -> Dataset:
    """The first step from which a circuit stays near where it ends up.

    Followed is the mean over trials and over the last `smooth` steps; its final value is the mean
    over the last share `final` of the run; its deviation is the root mean square distance of the
    neurons from it. From the step that is returned on it never exceeds the tolerance, which must be
    above the noise, sd / sqrt(chains x smooth): spikes never come to rest.

    Args:
        tree: with the group.
        tolerance: in the units of the quantity.
        quantity: any series, such as `log_p_joint` of the group `sample_stats`.
        group: where it is, with dims (chain, draw, problem, ...).
        smooth: steps in the running mean, which looks back.
        final: share of the run, between 0 and 1.

    Returns:
        `value` (problem) in steps from 0, `se` by the jackknife over trials (rough for a first
        passage; NaN for one trial), and `deviation` (problem, draw). NaN where the tolerance is
        exceeded in the final stretch, so that nothing has converged.

    Raises:
        BadInput: tolerance, smooth or final is out of range.

    References:
        Brain-like Variational Inference (Vafaii et al., 2025) counts steps to convergence; the
        definition is this project's own https://arxiv.org/abs/2410.19315
    """
    if not (tolerance > 0 and 0 < final < 1):
        got, fix = f"{tolerance} and {final}", "tolerance=0.1, final=0.2."
        raise BadInput("tolerance, final", expected="> 0, and in (0, 1)", got=got, fix=fix)
    means = fits.windows(fits.responses(tree, quantity, group=group), smooth, running=True)
    value, deviation = fits.settled(means.mean(0), tolerance, final)
    se, trials = np.full(len(value), np.nan), len(means)
    if trials > 1:
        others = (means.sum(0) - means) / (trials - 1)
        times = [fits.settled(m, tolerance, final)[0] for m in others]
        se = np.sqrt((trials - 1) * np.var(times, axis=0))
    return fits.dataset(
        {
            "value": ("problem", value + smooth - 1),
            "se": ("problem", se),
            "deviation": (("problem", "draw"), deviation.T),
        },
        {"draw": np.arange(len(deviation)) + smooth - 1},
        measured=f"step from which {quantity} stay within {tolerance:g} of the final value",
        units="steps",
        source="https://arxiv.org/abs/2410.19315",
        reason="not converged before the final stretch" * bool(np.isnan(value).any()),
        tolerance=tolerance,
    )


def oscillation_amplitude(
    tree: DataTree, *, band: tuple[float, float], quantity: str = "potentials", step: float = 1.0
) -> Dataset:
    """Amplitude of oscillations in a band: A for A sin(2 pi f t), whatever the phases.

    It is sqrt(2 power), the power being that of Hann-windowed periodograms in the band, averaged
    over neurons and trials. White noise of variance v adds 2 v times the band's share of all
    frequencies to its square. From some f up to 1 / (2 step) it is sqrt(2) times the sd of the
    high-passed signal.

    Args:
        tree: with the group `circuit`.
        band: lowest and highest frequency, in cycles per unit of `step`.
        quantity: potentials, rates or spikes.
        step: duration of a step.

    Returns:
        `value` (problem), `se` from the spread over trials (NaN for one trial), and the power
        density `spectrum` (problem, frequency).

    Raises:
        BadInput: no frequency above zero is in the band.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2021)
        https://arxiv.org/abs/2006.10811
    """
    from scipy.signal import periodogram

    seen = fits.responses(tree, quantity)
    inside = fits.band(seen.shape[1], step, band)
    spectra = []
    for trial in seen:  # one at a time, to save memory
        frequency, density = periodogram(trial, 1 / step, window="hann", axis=0)
        spectra.append(density.mean(-1))
    power = np.array(spectra)[:, inside].sum(1) * frequency[1]  # (chain, problem)
    value = np.sqrt(2 * power.mean(0))
    se = np.full(len(value), np.nan)
    if len(power) > 1:
        spread = power.std(0, ddof=1) / np.sqrt(len(power))
        se = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    return fits.dataset(
        {
            "value": ("problem", value),
            "se": ("problem", se),
            "spectrum": (("problem", "frequency"), np.mean(spectra, axis=0).T),
        },
        {"frequency": frequency},
        measured=f"amplitude of {quantity} at {band[0]:g} to {band[1]:g} cycles per unit of time",
        units=f"units of {quantity}",
        source="https://arxiv.org/abs/2006.10811",
        reason="one trial has no standard error" * (len(power) == 1),
        band=list(band),
    )


def oscillation_against_surprise(
    tree: DataTree, surprise: Array, *, seed: int, **knobs: Any
) -> Dataset:
    """Do oscillations grow with surprise? Their amplitude's rank correlation with -log p(x).

    Args:
        tree: with the group `circuit`.
        surprise: (B,), -log p(x) in nats, such as minus an exact posterior's `log_evidence`.
        seed: of the bootstrap, over problems.
        **knobs: of :func:`oscillation_amplitude`; `band` among them.

    Returns:
        `value`, `low`, `high` and `se`; `amplitude` and `amplitude_se` (problem) with the
        coordinate `surprise`. NaN if all amplitudes are equal.
    """
    found = oscillation_amplitude(tree, **knobs)
    amplitude = found["value"].values
    x = fits.per_problem("surprise", surprise, len(amplitude))
    line = asdict(fits.rank_correlation(x, amplitude, seed=seed))
    return fits.dataset(
        {n: line[n] for n in ("value", "low", "high", "se")}
        | {"amplitude": ("problem", amplitude), "amplitude_se": found["se"]},
        {"surprise": ("problem", x)},
        measured=f"rank correlation of surprise and {found.attrs['measured']}",
        units="1",
        source=found.attrs["source"],
        reason="all amplitudes are equal" * bool(np.isnan(line["value"])),
    )


def _correlations(value: Any, se: Any, pairs: tuple[Array, Array], measured: str) -> Dataset:
    r, errors = np.array(value), np.array(se)
    dims = ("problem", "pair")[-r.ndim :]
    return fits.dataset(
        {"value": (dims, r), "se": (dims, errors)},
        {"first": ("pair", pairs[0]), "second": ("pair", pairs[1])},
        measured=measured,
        units="1",
        source="https://doi.org/10.1038/nn.2842",
        reason="a neuron does not vary" * bool(np.isnan(r).any()),
    )


def _sparseness(r: Array) -> tuple[Array, Array]:
    """Sparseness over the last axis and its jackknife error, from sums that leave one out."""
    n, total, square = r.shape[1], r.sum(1, keepdims=True), (r**2).sum(1, keepdims=True)

    def of(s: Array, q: Array, m: int) -> Array:
        mean_square = np.where(q > 0, q, np.nan) / m if m > 1 else np.full_like(q, np.nan)
        found: Array = (1 - (s / m) ** 2 / mean_square) / (1 - 1 / max(m, 2))
        return found

    left = of(total - r, np.maximum(square - r**2, 0.0), n - 1)
    return of(total, square, n)[:, 0], np.sqrt((n - 1) * left.var(1))
