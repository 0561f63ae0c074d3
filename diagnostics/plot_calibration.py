"""Pictures of calibration: ranks, coverage, and what happens along an axis such as time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .calibration import columns, p_value
from .coverage import HPD
from .style import GREY, INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import Dataset, DataTree

__all__ = ["by_time", "coverage", "ecdf"]

MAX_PANELS = 12
UNIFORM_SD = 12**-0.5
SPREAD_SE = 0.2**0.5  # sd of the spread of n uniform numbers, times sqrt(n): sqrt(1.8 - 1) / 2
TITLES = {"log_joint": "log p(x, z)", "neighbours": "product of neighbours", "tarp": "TARP"}


def ecdf(tree: DataTree, *, probability: float = 0.99) -> Figure:
    """ECDF of the ranks less that of a right guide, with simultaneous bands, by ArviZ.

    A line that starts above the band and ends below it: the draws are too narrow; the other way
    round: too wide; above it all the way: the truth lies below the draws.

    Args:
        tree: from :func:`sbc` or :func:`tarp`. Of more than 12 quantities those furthest from
            uniform are shown.
        probability: that the line of a right guide stays inside a band.
    """
    from arviz_base import from_dict
    from arviz_plots import plot_ecdf_pit
    from matplotlib import pyplot

    from .picture import Picture

    found = columns(tree)
    names = sorted(found, key=lambda n: p_value(found[n]))[:MAX_PANELS]
    names = [n for n in found if n in names]
    values = np.stack([found[n] for n in names], -1)[None]
    chosen = from_dict(
        {"prior_sbc": {"rank": values}},
        dims={"rank": ["quantity"]},
        coords={"quantity": names},
    )
    across = min(4, len(names))
    down = -(-len(names) // across)
    collection = plot_ecdf_pit(
        chosen,
        backend="matplotlib",
        ci_prob=probability,
        col_wrap=across,
        visuals={"title": False, "remove_axis": False, "ylabel": False, "xlabel": False},
        figure_kwargs={
            "figsize": (2.7 * across + 0.6, 2.1 * down + 0.9),
            "layout": "constrained",
            "FigureClass": Picture,
        },
    )
    figure: Figure = collection.viz["figure"].item()
    pyplot.close(figure)  # out of pyplot's global list
    shown = [ax for ax in figure.axes if ax.has_data()]
    reach = max(abs(y) for ax in shown for y in ax.get_ylim())
    for ax, name in zip(shown, names, strict=True):
        ax.set_title(_title(name), fontsize=10)
        ax.set_ylim(-reach, reach)
        ax.tick_params(labelbottom=True)
        ax.axhline(0, color=GREY, lw=0.6, zorder=0)
        _tidy(ax)
    figure.supxlabel("rank of the truth among the draws, scaled to [0, 1]", fontsize=10)
    figure.supylabel("ECDF less uniform", fontsize=10)
    figure.suptitle(_heading(tree.attrs), fontsize=10)
    return figure


def coverage(found: Dataset, *, probability: float = 0.95) -> Figure:
    """Nominal against empirical coverage, with the binomial band of a right guide.

    Below the diagonal the guide is too sure of itself, above it not sure enough.

    Args:
        found: from :func:`coverage`.
        probability: that a point of a right guide lies in the band.
    """
    from scipy.stats import binom

    n = int(found.attrs["problems"])
    level = np.linspace(0.0, 1.0, 201)
    low, high = (binom.ppf(q, n, level) / n for q in ((1 - probability) / 2, (1 + probability) / 2))
    figure = new_figure(4.2, 4.4)
    ax = figure.subplots()
    ax.fill_between(level, low, high, color=GREY, alpha=0.25, lw=0, label=f"{probability:.0%} band")
    ax.plot([0, 1], [0, 1], color=INK, lw=0.8)
    singles = 0
    for name in found["quantity"].values:
        values = found["coverage"].sel(quantity=name)
        if values.isnull().all():
            continue
        joint = name == HPD
        label = str(name) if joint else "" if singles else "central, one latent each"
        singles += not joint
        ax.plot(found["level"], values, **_line(joint=joint), label=label or None)
    start = max(0.0, float(found["level"].min()) - 0.15)
    ax.set(
        xlabel="nominal level", ylabel="coverage", xlim=(start, 1), ylim=(max(0.0, start - 0.1), 1)
    )
    ax.set_title(_heading(found.attrs), fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    _tidy(ax)
    return figure


def by_time(found: Dataset) -> Figure:
    """Shift and spread of the ranks along an axis; rejected places are marked.

    Args:
        found: from :func:`sbc_by`. The bands hold all places of a right guide with probability
            1 - alpha, by the union bound.
    """
    from matplotlib.ticker import MaxNLocator
    from scipy.stats import norm

    (dim,) = (str(d) for d in found.dims)
    n, places = int(found.attrs["problems"]), found[dim].values
    reach = norm.isf(float(found.attrs["alpha"]) / 2 / len(places)) / np.sqrt(n)
    rows = (
        ("shift", 0.0, UNIFORM_SD * reach, "mean rank - 1/2\n(above 0: draws too small)"),
        ("spread", 1.0, SPREAD_SE * reach, "sd of ranks / uniform\n(above 1: draws too narrow)"),
    )
    figure = new_figure(6.4, 4.4)
    bad = found["rejected"].values
    for ax, (name, right, band, text) in zip(figure.subplots(2, 1, sharex=True), rows, strict=True):
        values = found[name].values
        ax.axhspan(right - band, right + band, color=GREY, alpha=0.25, lw=0, label="right guide")
        ax.axhline(right, color=INK, lw=0.8)
        ax.plot(places, values, "-o", color=PALETTE[0], ms=3, lw=1.2)
        if bad.any():
            ax.plot(places[bad], values[bad], "o", color=PALETTE[1], ms=6, label="rejected")
        ax.set_ylabel(text, fontsize=9)
        _tidy(ax)
    ax.set_xlabel(dim)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(_heading(found.attrs), fontsize=10, x=0.02, ha="left")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def _line(*, joint: bool) -> dict[str, Any]:
    look = {"color": PALETTE[1], "lw": 2.0, "ms": 5} if joint else {"color": PALETTE[0], "lw": 0.9}
    return {"marker": "o", "ms": 3, **look}


def _title(name: str) -> str:
    """log p(x, z) for log_joint, product of neighbours 3 for neighbours[3], z[3] for z[3]."""
    stem, bracket, place = name.partition("[")
    known = TITLES.get(stem)
    return name if known is None else f"{known} {place.rstrip(']')}" if bracket else known


def _heading(attrs: Any) -> str:
    return f"{attrs['model']}: {attrs['guide']}"


def _tidy(ax: Any) -> None:
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
