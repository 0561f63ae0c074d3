"""Pictures of signatures, each from what the function of the same name measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput

from .style import GREY, INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import Dataset

__all__ = [
    "convergence_time",
    "correlations",
    "fano_factor",
    "oscillation_against_surprise",
    "oscillation_amplitude",
    "sparsity",
    "synaptic_variance",
    "variance_against_contrast",
]

Array = np.ndarray[Any, Any]
BLUE, ACCENT = PALETTE[:2]
MAX_LINES = 7  # problems or neurons that are drawn one by one
MAX_POINTS = 3000  # synapses that are drawn
AXIS = {
    "rate": "presynaptic rate ⟨|x|⟩",
    "mean_square_rate": "mean square rate ⟨x²⟩",
    "curvature": "curvature H",
    "learning_rate": "learning rate η",
    "posterior_variance": "posterior variance",
}


def fano_factor(found: Dataset) -> Figure:
    """Fano factors of neurons and problems against their mean counts; Poisson is 1.

    Args:
        found: from `signatures.fano_factor`.
    """
    figure, ax = _one()
    x, y, se = (found[n].values.ravel() for n in ("mean", "value", "se"))
    shown = np.isfinite(y)
    ax.axhline(1, color=INK, lw=1, ls="--", label="Poisson")
    _points(ax, x[shown], y[shown], se[shown])
    ax.set_xscale("log")
    ax.set(xlabel="mean count / spikes per window", ylabel="Fano factor / spikes")
    ax.set_ylim(bottom=0)
    _silent(ax, int((~shown).sum()), len(y))
    ax.legend(frameon=False)
    return figure


def correlations(found: Dataset) -> Figure:
    """Histogram of the correlations of pairs, of all problems together.

    Args:
        found: from `signatures.noise_correlations` or `signatures.signal_correlations`.
    """
    figure, ax = _one()
    values = found["value"].values.ravel()
    values = values[np.isfinite(values)]
    edge = max(0.05, float(np.abs(values).max(initial=0)))
    ax.hist(values, np.linspace(-edge, edge, 41).tolist(), color=BLUE)
    ax.axvline(0, color=INK, lw=1, ls="--")
    if values.size:
        ax.axvline(values.mean(), color=ACCENT, lw=2, label=f"mean {values.mean():.2g}")
        ax.legend(frameon=False)
    kind = str(found.attrs["measured"]).split(" of ", 1)[0]
    ax.set(
        xlabel=f"{kind} r", ylabel="pairs" if found["value"].ndim == 1 else "pairs in all problems"
    )
    return figure


def variance_against_contrast(found: Dataset) -> Figure:
    """Response variance of neurons against contrast, with the fitted power.

    Args:
        found: from `signatures.variance_against_contrast`.
    """
    figure, ax = _one()
    x, variance = found["contrast"].values, found["variance"].values
    order = np.argsort(x)
    for column in variance.T[: 5 * MAX_LINES]:
        ax.plot(x[order], column[order], color=GREY, lw=0.8, alpha=0.6)
    with np.errstate(divide="ignore"):
        ax.plot(x, np.exp(np.log(variance).mean(1)), "o", color=BLUE, label="mean over neurons")
    ax.plot(x[order], np.exp(_line(found, np.log(x[order]))), color=ACCENT, lw=2, label=_fit(found))
    ax.set(
        xscale="log",
        yscale=_scale(variance),
        xlabel="contrast",
        ylabel="response variance / units²",
    )
    ax.legend(frameon=False)
    return figure


def sparsity(found: Dataset) -> Figure:
    """Zeros and population sparseness of problems, lifetime sparseness of neurons.

    Args:
        found: from `signatures.sparsity`.
    """
    figure = new_figure(8.4, 2.8)
    parts = (
        ("value", "se", "share of zeros", "problem"),
        ("population", "population_se", "population sparseness", "problem"),
        ("lifetime", "lifetime_se", "lifetime sparseness", "neuron"),
    )
    for ax, (name, error, label, dim) in zip(figure.subplots(1, 3), parts, strict=True):
        values = found[name].values
        _points(ax, np.arange(len(values)), values, found[error].values)
        ax.set(xlabel=dim, ylabel=label, ylim=(-0.04, 1.04))
        ax.xaxis.get_major_locator().set_params(integer=True)
        _bare(ax)
    return figure


def convergence_time(found: Dataset) -> Figure:
    """How far from its end a circuit is at each step, and when it has converged.

    Args:
        found: from `signatures.convergence_time`.
    """
    figure, ax = _one()
    tolerance = float(found.attrs["tolerance"])
    step, deviation = found["draw"].values, found["deviation"].values
    with np.errstate(divide="ignore", invalid="ignore"):
        for k, row in enumerate(deviation[:MAX_LINES]):
            ax.plot(step, row, color=PALETTE[k], lw=1.2, label=f"problem {k}")
            ax.plot(found["value"].values[k], tolerance, "v", color=PALETTE[k], ms=8, mec=INK)
    ax.axhline(tolerance, color=INK, lw=1, ls="--", label=f"tolerance {tolerance:g}")
    low = deviation[deviation > 0].min(initial=tolerance)
    ax.set(yscale="log", ylim=(max(low, tolerance / 30), None))
    ax.set(xlabel="step", ylabel="deviation from final value / units")
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def oscillation_amplitude(found: Dataset) -> Figure:
    """Spectra with the band shaded, and the amplitude of each problem.

    Args:
        found: from `signatures.oscillation_amplitude`.
    """
    figure = new_figure(8.0, 3.0)
    left, right = figure.subplots(1, 2)
    frequency, spectrum = found["frequency"].values[1:], found["spectrum"].values[:, 1:]
    left.axvspan(*found.attrs["band"], color=PALETTE[4], alpha=0.35, lw=0, label="band")
    for row in spectrum[: 5 * MAX_LINES]:
        left.plot(frequency, row, color=GREY, lw=0.6, alpha=0.6)
    left.plot(frequency, spectrum.mean(0), color=BLUE, lw=1.4, label="mean over problems")
    left.set(
        yscale=_scale(spectrum),
        xlabel="frequency / cycles per unit of time",
        ylabel="power / amplitude² per frequency",
    )
    left.legend(frameon=False)
    values = found["value"].values
    _points(right, np.arange(len(values)), values, found["se"].values)
    right.set(xlabel="problem", ylabel=f"amplitude / {found.attrs['units']}")
    right.set_ylim(bottom=0)
    right.xaxis.get_major_locator().set_params(integer=True)
    for ax in (left, right):
        _bare(ax)
    return figure


def oscillation_against_surprise(found: Dataset, *, group: Sequence[str] | None = None) -> Figure:
    """Amplitudes of problems against their surprise.

    Args:
        found: from `signatures.oscillation_against_surprise`.
        group: what each problem is, such as in or out of distribution, for its colour.

    Raises:
        BadInput: not one group for each problem, or more groups than colours.
    """
    figure, ax = _one()
    points = [found[n].values for n in ("surprise", "amplitude", "amplitude_se")]
    names = np.asarray([""] * len(points[0]) if group is None else list(group))
    if names.shape != points[0].shape or len(set(names)) > MAX_LINES:
        raise BadInput(
            "group", expected=f"one of at most {MAX_LINES} names for each of {len(points[0])} "
            "problems", got=f"{len(set(names))} names of {len(names)}", fix="Leave it out.",
        )  # fmt: skip
    for ink, name in zip(PALETTE, dict.fromkeys(names.tolist()), strict=False):
        _points(ax, *(v[names == name] for v in points), ink=ink, label=name)
    ax.set(xlabel="surprise -log p(x) / nats", ylabel="oscillation amplitude")
    ax.set_title(f"rank correlation {_fit(found, '')}", fontsize=10, color=INK)
    if group is not None:
        ax.legend(frameon=False, fontsize=9)
    return figure


def synaptic_variance(found: Dataset, synapses: Dataset) -> Figure:
    """Synaptic variance against each predictor: fit, and the slope each mechanism predicts.

    Args:
        found: from `synaptic_variance`.
        synapses: what it was measured on.
    """
    names = [str(n) for n in found["predictor"].values]
    figure = new_figure(2.9 * len(names) + 0.3, 3.9)
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    y = synapses["variance"]
    for ax, name in zip(axes, names, strict=True):
        x = synapses[name].transpose(*y.dims).values.ravel()
        _panel(ax, x, y.values.ravel(), found.sel(predictor=name))
        ax.set_xlabel(AXIS[name])
    axes[0].set_ylabel("synaptic variance σ²")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _panel(ax: Axes, x: Array, y: Array, at: Dataset) -> None:
    step = -(-len(x) // MAX_POINTS)
    ax.scatter(x[::step], y[::step], s=3, color=GREY, alpha=0.4, lw=0, rasterized=True)
    ends = np.quantile(np.log(x), [0.005, 0.995])
    ax.plot(np.exp(ends), np.exp(_line(at, ends)), color=INK, lw=4, alpha=0.45, label="fit")
    middle = np.log(x).mean()
    for k, name in enumerate(at["mechanism"].values):
        slope = float(at["predicted"].sel(mechanism=name))
        law = _line(at, middle) + slope * (ends - middle)
        ink = PALETTE[(0, 2, 3, 4, 5, 6)[k % 6]]
        ax.plot(np.exp(ends), np.exp(law), color=ink, lw=1.5, ls="--", label=str(name))
    ax.set(xscale="log", yscale="log")
    ax.set_title(_fit(at), fontsize=9, color=INK)
    _bare(ax)


def _one() -> tuple[Figure, Axes]:
    figure = new_figure(4.6, 3.4)
    ax = figure.subplots()
    _bare(ax)
    return figure, ax


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _scale(values: Array) -> str:
    return "log" if (values > 0).any() else "linear"  # of a dead circuit


def _points(ax: Axes, x: Array, y: Array, se: Array, *, ink: str = BLUE, label: str = "") -> None:
    """Points with bars of one standard error, where there is one."""
    bars = np.nan_to_num(se)
    ax.errorbar(x, y, bars, fmt="o", ms=4, lw=1, color=ink, alpha=0.8, label=label)


def _line(found: Dataset, x: Any) -> Any:
    return float(found["intercept"]) + float(found["value"]) * x


def _fit(found: Dataset, what: str = "slope ") -> str:
    value, low, high = (float(found[n]) for n in ("value", "low", "high"))
    return f"{what}{value:.2f} [{low:.2f}, {high:.2f}]"


def _silent(ax: Axes, silent: int, cells: int) -> None:
    if silent:
        ax.set_title(f"{silent} of {cells} silent, not shown", fontsize=9, color=INK)
