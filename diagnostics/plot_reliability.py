"""Pictures of what reliability costs: its price, the account of a circuit, and where it varies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference.costs import MECHANISMS, Entropic, PowerLaw

from .reliability import TERMS
from .style import GREY, INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import Dataset

__all__ = ["account", "price", "variability"]

Array = np.ndarray[Any, Any]
TERM_INKS = dict(zip(TERMS, (PALETTE[0], PALETTE[4], PALETTE[2]), strict=True))
GAP_INKS = {"gap": PALETTE[1], "slack": PALETTE[5]}
GAP_NAMES = {"gap": "KL(q || posterior)", "slack": "slack of the cost"}
DASHES: tuple[Any, ...] = ((0, (6, 1)), (0, (4, 2)), (0, (5, 2, 1, 2)), (0, (1, 1.5)))
LEAST = 1e-6  # nats of slack; what is less is rounding
MAX_POINTS = 3000  # latents and problems that are drawn
MANY = 200  # points from which on they may lie under the fit
CLOUD = {"s": 14, "alpha": 0.45, "lw": 0, "zorder": 2}
POINTS = {"s": 26, "alpha": 0.9, "lw": 0.6, "zorder": 4, "ec": "white"}  # fewer are in front of it
FEW = 2.5  # decades of an axis with room for more than powers of ten
DECADES = 1.5  # of sds on either side of where costs touch


def price(
    *, scale: float = 0.1, mechanisms: Mapping[str, float] = MECHANISMS, decades: float = DECADES
) -> Figure:
    """What noise of sd s costs, and the best noise under a quadratic loss.

    On the left the cost R(s) of each mechanism, never below minus the entropy, which it touches at
    s0. On the right, for a loss whose curvature is 1 / s_posterior^2, the sd at which loss and cost
    together are least: between the posterior's sd and s0.

    Args:
        scale: s0.
        mechanisms: exponents rho by name.
        decades: shown on either side of s0.
    """
    figure = new_figure(8.6, 3.9)
    left, right = figure.subplots(1, 2)
    s = scale * 10 ** torch.linspace(-decades, decades, 200, dtype=torch.float64)
    bound = Entropic()(s.log())
    left.plot(s, bound, color=INK, lw=3, label="minus the entropy")
    right.plot(s, s, color=INK, lw=3)
    for k, (name, rho) in enumerate(mechanisms.items()):
        cost, ink = PowerLaw(rho, scale=scale), PALETTE[k % len(PALETTE)]
        left.plot(s, cost(s.log()), color=ink, label=f"{name}, rho = {_number(rho)}")
        right.plot(s, cost.optimal_sd(s**-2), color=ink)
    for ax in (left, right):
        ax.axvline(scale, color=GREY, lw=0.8, ls=":")
        ax.set_xscale("log")
        _bare(ax)
    top = float(bound.max() - bound.min())
    left.set_ylim(float(bound.min()) - 0.5, float(bound.max()) + top)
    left.set(xlabel=f"sd of the noise s; s0 = {scale:g}", ylabel="cost R(s) / nats per unit")
    right.axhline(scale, color=GREY, lw=0.8, ls=":")
    right.set(yscale="log", xlabel="sd of the posterior", ylabel="best sd of the noise")
    _legend(figure, left, 3)
    return figure


def account(
    found: Mapping[str, Dataset] | Dataset, *, inks: Mapping[str, str] | None = None
) -> Figure:
    """What circuits achieve and pay, and how far each is from the exact posterior.

    On the left the terms of the cost, stacked from zero up, or down where they are negative; the
    diamond is their sum. On the right, where log p(x) is known, what the sum is above -log p(x):
    divergence from the exact posterior, and slack of the cost. Means over problems; bars are Monte
    Carlo errors.

    Args:
        found: from :func:`diagnostics.reliability`, of one guide or by name, for the same x.
        inks: colours of names.
    """
    import xarray

    named = {"": found} if isinstance(found, xarray.Dataset) else dict(found)
    known = [one for one in named.values() if "gap" in one]
    loose = any(float(one["slack"].max()) > LEAST for one in known)
    above = {term: ink for term, ink in GAP_INKS.items() if term == "gap" or loose}
    figure = new_figure((2.6 + 0.9 * len(named)) * (1 + bool(known)), 4.2)
    axes = figure.subplots(1, 1 + bool(known), squeeze=False)[0]
    for k, one in enumerate(named.values()):
        _stack(axes[0], k, one, TERM_INKS, {})
        axes[0].errorbar(k, *_mean(one, "total"), fmt="D", ms=6, color=INK, mec="white",
                         label=_once(axes[0], "total"))  # fmt: skip
        if known:
            _stack(axes[1], k, one, above, GAP_NAMES)
            top = sum(float(one[term].mean()) for term in above)
            axes[1].errorbar(k, top, _mean(one, "gap")[1], color=INK, lw=1.2, capsize=3)
    axes[0].axhline(0, color=INK, lw=0.8)
    axes[0].set_ylabel("cost / nats per problem")
    if known:
        least = -_mean(known[0], "log_evidence")[0]
        axes[0].axhline(least, color=INK, lw=1.2, ls="--", label="-log p(x)")
        axes[1].set(ylabel="above -log p(x) / nats per problem")
        axes[1].axhline(0, color=INK, lw=0.8)
    for ax in axes:
        ax.set_xticks(range(len(named)), [n.replace("_", "\n") for n in named], fontsize=9)
        ax.set_xlim(-0.6, len(named) - 0.4)
        for label, name in zip(ax.get_xticklabels(), named, strict=True):
            label.set_color((inks or {}).get(name, INK))
        _bare(ax)
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)
    return figure


def variability(found: Mapping[str, Dataset] | Dataset, *, ink: str = PALETTE[0]) -> Figure:
    """A circuit's variance against the exact posterior's, with what costs predict.

    A point for each latent of each problem. On the thin line variances are equal: Bayes. Broken
    lines have the slope that each mechanism predicts, through the centre of the points, for the
    scale s0 is not known; the thick one is the fit.

    Args:
        found: from :func:`diagnostics.variability_against_uncertainty`, one or several by name,
            which become panels.
        ink: colour of the guide.
    """
    import xarray

    named = {"": found} if isinstance(found, xarray.Dataset) else dict(found)
    figure = new_figure(3.9 * len(named) + 0.4, 4.6)
    axes = figure.subplots(1, len(named), squeeze=False, sharey=True)[0]
    for ax, (name, one) in zip(axes, named.items(), strict=True):
        _scatter(ax, one, ink)
        ax.set_title("\n".join(filter(None, (name, ax.get_title()))), fontsize=9)
    axes[0].set_ylabel("variance of the circuit")
    _legend(figure, axes[0], 3)
    return figure


def _scatter(ax: Axes, found: Dataset, ink: str) -> None:
    x, y = (found[n].values.ravel() for n in ("uncertainty", "variance"))
    step = -(-len(x) // MAX_POINTS)
    many = len(x) > MANY
    ax.scatter(x[::step], y[::step], color=ink, rasterized=True, **(CLOUD if many else POINTS))
    low, high = np.log([x.min(), x.max()])
    room = max(0.05 * (high - low), 0.05)
    ends = np.array([low - room, high + room])
    ax.plot(np.exp(ends), np.exp(ends), color=INK, lw=1, label="equal: Bayes")
    centre, height = np.log(x).mean(), np.log(y).mean()
    told = bool(np.isfinite(found["value"]))
    if told:
        fit = height + float(found["value"]) * (ends - centre)
        ax.plot(np.exp(ends), np.exp(fit), color=ink, lw=4, alpha=0.6 if many else 0.35,
                label="fit")  # fmt: skip
    for k, (name, slope) in enumerate(_laws(found).items()):
        law = height + slope * (ends - centre)
        ax.plot(np.exp(ends), np.exp(law), color=INK, lw=1.3, ls=DASHES[k % len(DASHES)],
                label=f"{name}, {_number(slope)}")  # fmt: skip
    value, first, last = (float(found[n]) for n in ("value", "low", "high"))
    title = f"slope {value:.2f} [{first:.2f}, {last:.2f}]" if told else str(found.attrs["reason"])
    ax.set_title(title, fontsize=9, color=INK, wrap=True)
    kind = str(found.attrs["kind"])
    ax.set(xscale="log", yscale="log", xlabel=f"{kind} variance of the posterior".strip())
    for axis in (ax.xaxis, ax.yaxis):
        _plain(axis)
    _bare(ax)


def _plain(axis: Any) -> None:
    """Plain numbers at powers of ten, and if these are few, at 2 and 5 times them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = np.log10(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high - low < FEW else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _laws(found: Dataset) -> dict[str, float]:
    """Predicted slopes of mechanisms; that of the entropic cost is Bayes' line, moved."""
    slopes = dict(zip(found["mechanism"].values, found["predicted"].values, strict=True))
    return {str(n): float(v) for n, v in slopes.items() if n != "entropic"}


def _stack(
    ax: Axes, at: int, one: Dataset, inks: Mapping[str, str], names: Mapping[str, str]
) -> None:
    """Segments one on the other, positive ones up and negative ones down."""
    ends = {True: 0.0, False: 0.0}
    for term, ink in inks.items():
        value = float(one[term].mean())
        up = value >= 0
        name = names.get(term, term)
        ax.bar(at, value, 0.6, bottom=ends[up], color=ink, label=_once(ax, name))
        ends[up] += value


def _mean(one: Dataset, name: str) -> tuple[float, float]:
    """Over problems, and its Monte Carlo error: draws of problems are independent."""
    value = float(one[name].mean())
    se = one.get(f"{name}_se")
    return value, 0.0 if se is None else float(np.sqrt((se**2).sum()) / se.size)


def _once(ax: Axes, name: str) -> str:
    """A label, unless the legend has it."""
    return "" if name in ax.get_legend_handles_labels()[1] else name


def _number(value: float) -> str:
    return f"{value:.2g}"


def _bare(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, ax: Axes, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False,
                  fontsize=8)  # fmt: skip
