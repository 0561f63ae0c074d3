"""Pictures of recognition learned in a game: its health, patterns awake and asleep, dreams."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput
from inference.gauges import COLLAPSED, DEFEATED

from .style import GREY, INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import Dataset

__all__ = ["GAUGES", "game", "patterns", "samples"]

Array = np.ndarray[Any, Any]
Health = Mapping[str, Mapping[str, Array]]
NORM = "gradient "  # what precedes the name of a player
LEAST = 1e-3  # dispersion that is shown; what is less is less than this
DASHES = ("-", (0, (4, 1.5)), ":", "-.")
FEW = 2  # decades of an axis with room for more than powers of ten
BAND_SE = 2  # of the band about equal frequencies, in standard errors


def game(health: Health, *, inks: Mapping[str, str] | None = None) -> Figure:
    """How games went: whether critics can tell, whether guides vary, who is pulled how hard.

    Panels for what any of the fits has: the critic's accuracy, .5 where it cannot tell draws of the
    guide from the model's; the dispersion, the smallest over latents of the sd of draws over the
    error of their mean, 1 in a calibrated guide and near 0 in one that has collapsed; and norms of
    gradients, a line for each player.

    Args:
        health: `Fit.health` by fit: "step", and for each gauge one number per step.
        inks: colours of fits.

    Raises:
        BadInput: no fit has any gauge.
    """
    colours = zip(health, cycle(PALETTE))
    inks = {name: (inks or {}).get(name, ink) for name, ink in colours}
    found = {gauge for fit in health.values() for gauge in fit}
    norms = sorted(g for g in found if g.startswith(NORM))[::-1]  # the guide's before the critic's
    panels = [[g] for g in DRESS if g in found] + ([norms] if norms else [])
    if not panels:
        raise BadInput(
            "health", expected="gauges of a fit", got="none", fix="Pass {name: fit.health}."
        )
    figure = new_figure(max(3.4 * len(panels), 4.6), 3.3)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, gauges in zip(axes, panels, strict=True):
        for gauge, dash in zip(gauges, DASHES, strict=False):
            for name in (n for n, fit in health.items() if gauge in fit):
                values = health[name][gauge]
                shown = values.clip(min=LEAST) if gauge == "dispersion" else values
                ax.plot(health[name]["step"], shown, ls=dash, color=inks[name], lw=1.4)
        ax.set_xlabel("step")
        DRESS.get(gauges[0], _norms)(ax)
        ax.title.set_size(10)
        ax.spines[["top", "right"]].set_visible(False)
    _legend(figure, inks, norms)
    return figure


def _accuracy(ax: Axes) -> None:
    _line(ax, 0.5, "cannot tell")
    if ax.get_ylim()[1] > DEFEATED:
        _line(ax, DEFEATED, "has won")
    low, high = ax.get_ylim()
    ax.set(ylim=(min(low, 0.42), max(high, 0.75)), title="critic's accuracy")


def _dispersion(ax: Axes) -> None:
    ax.set(yscale="log", title="dispersion of the guide's draws")
    _line(ax, 1, "calibrated")
    _line(ax, COLLAPSED, "collapsed")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.06), max(high, 1.5))
    _plain(ax.yaxis)


def _norms(ax: Axes) -> None:
    ax.set(yscale="log", title="norm of the gradient")
    _plain(ax.yaxis)


DRESS = {"accuracy": _accuracy, "dispersion": _dispersion}
GAUGES = DRESS.keys()  # of games; norms of gradients every fit has


def _line(ax: Axes, at: float, text: str) -> None:
    """A level to compare with, and what it means, beside the panel: no curve hides it there."""
    ax.axhline(at, color=GREY, lw=1, zorder=1)
    ax.annotate(
        text, (1, at), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="left", va="center", fontsize=8, color="#555555",
    )  # fmt: skip


def _plain(axis: Any) -> None:
    """Numbers rather than powers, and enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = np.log10(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high - low < FEW else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, inks: Mapping[str, str], norms: list[str]) -> None:
    """Colours are fits, and of gradients dashes are players."""
    from matplotlib.lines import Line2D

    lines = {name.replace("_", " "): Line2D([], [], color=ink, lw=2) for name, ink in inks.items()}
    for gauge, dash in zip(norms, DASHES, strict=False):
        lines[gauge] = Line2D([], [], color=INK, ls=dash, lw=1.4)
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )


def patterns(found: Mapping[str, Dataset] | Dataset) -> Figure:
    """How often each pattern of activity occurs asleep and awake, one panel per guide.

    A dot for each pattern, coloured by the number of active neurons. On the line a pattern is as
    frequent awake as asleep; the band is two standard errors of counts wide on either side. Those
    seen only awake or only asleep stand at half a count.

    Args:
        found: from :func:`diagnostics.wake_sleep_patterns`, of one guide or by name.
    """
    import xarray

    named = {"": found} if isinstance(found, xarray.Dataset) else dict(found)
    figure = new_figure(3.1 * len(named) + 1.5, 4.1)
    axes = figure.subplots(1, len(named), squeeze=False, sharex=True, sharey=True)[0]
    least = min(0.5 / one.attrs["problems"] for one in named.values())
    seen = np.concatenate([one[n].values for one in named.values() for n in ("wake", "sleep")])
    limits = 0.7 * max(least, seen.min()), 1.6 * seen.max()
    axes[0].set(xscale="log", yscale="log", xlim=limits, ylim=limits, ylabel="frequency awake")
    most = max(one.sizes["neuron"] for one in named.values())
    for ax, (name, one) in zip(axes, named.items(), strict=True):
        dots = _frequencies(ax, one, most)
        value, se, floor = (float(one[n]) for n in ("value", "se", "floor"))
        title = f"{name.replace('_', ' ')}\nKL = {value:.2g} ± {se:.1g} nats, floor {floor:.2g}"
        ax.set_title(title.strip(), fontsize=9, color=INK)
    bar: Any = figure.colorbar(dots, ax=axes, shrink=0.8, label="active neurons")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def _frequencies(ax: Axes, one: Dataset, most: int) -> Any:
    n = one.attrs["problems"]
    seen = one.isel(pattern=(one.wake + one.sleep > 0).values)
    line = np.geomspace(0.3 / n, 1.0, 100)
    width = BAND_SE * np.sqrt(2 * line * (1 - line) / n)
    ax.fill_between(line, (line - width).clip(0.1 / n), line + width, color=GREY, alpha=0.25, lw=0)
    ax.plot(line, line, color=GREY, lw=1)
    dots = ax.scatter(
        seen.sleep.clip(min=0.5 / n), seen.wake.clip(min=0.5 / n), c=seen.active, s=22,
        cmap="viridis", vmin=0, vmax=most, edgecolors=INK, linewidths=0.3, zorder=3,
    )  # fmt: skip
    ax.set(xlabel="frequency asleep", box_aspect=1)
    for axis in (ax.xaxis, ax.yaxis):
        _plain(axis)
    ax.spines[["top", "right"]].set_visible(False)
    return dots


def samples(rows: Mapping[str, Array], shape: tuple[int, ...], *, columns: int = 10) -> Figure:
    """Pictures in rows by name, such as data and what a model dreams, on one scale of grey.

    Args:
        rows: pictures (N, F) by name.
        shape: folds F numbers into a picture, (height, width) or (height, width, 3).
        columns: pictures per row at most.
    """
    few = {name: np.asarray(x)[:columns] for name, x in rows.items()}
    across = max(map(len, few.values()))
    low, high = np.quantile(np.concatenate([x.ravel() for x in few.values()]), [0.01, 0.99])
    figure = new_figure(1.3 + 0.85 * across, 0.95 * len(few))
    axes = figure.subplots(len(few), across, squeeze=False)
    for line, (name, x) in zip(axes, few.items(), strict=True):
        for ax, picture in zip(line, x, strict=False):
            scaled = ((picture.reshape(shape) - low) / max(high - low, 1e-12)).clip(0, 1)
            ax.imshow(scaled, cmap="gray_r", vmin=0, vmax=1)
        for ax in line:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(bool(ax.images))
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=INK, fontsize=9)
    return figure
