"""Pictures of inference by iteration: its neurons, its free energy, what it gains, its features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput

from .style import GREY, INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import Dataset

__all__ = ["dictionary", "free_energy", "raster", "rate_distortion"]

Array = np.ndarray[Any, Any]
NEURONS, COLUMNS = 128, 240  # of a raster at most
FEATURES = 100  # of a dictionary at most
FAINT = 1e-3  # rate that is told from zero, in units of the largest
DISTANCES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)  # from the corner where silent neurons show all of x
LEAST = 1e-3  # nats of a gap that are told from none
LOWEST = -0.25  # R^2 at the bottom, where paths only begin below it
DECADE = 4  # points of a path through moments in each decade of steps
CLOSE = 0.045  # labels that are nearer than this, in shares of the axes, would overlap
ROWS = 16  # neurons that are named
LINE = 8  # features that fit beside one another


def raster(found: Dataset) -> Figure:
    """What neurons did from the onset on, a row for each, the most active on top.

    Steps are on a logarithmic axis: a column is one step at first, and a mean over ever more later.
    Spikes or draws are above the rates they come from. Of many neurons some are shown, evenly from
    the most active to the least.

    Args:
        found: from :func:`diagnostics.refinement`.

    Raises:
        BadInput: an amortised guide, which takes no steps.
    """
    rates, sent = found["rates"].values, found["signal"].values
    if len(rates) < 2:
        raise BadInput("found", expected="two steps or more", got="one",
                       fix="Amortised guides take no steps; ask for some, steps=16.")  # fmt: skip
    order, whole = np.argsort(np.abs(rates).mean(0), kind="stable"), rates.shape[1]
    if whole > NEURONS:
        order = order[np.linspace(0, whole - 1, NEURONS).round().astype(int)]
    panels = {"rates": rates}
    if found.attrs["signal"] != "rates":
        panels = {str(found.attrs["signal"]): sent, **panels}
    height = float(np.clip(0.12 * len(order), 1.0, 3.0))
    figure = new_figure(9.6, 0.7 + (height + 0.15) * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (what, values) in zip(axes, panels.items(), strict=True):
        _rows(ax, values[:, order], what)
        if whole <= ROWS:
            ax.set_yticks(range(whole), order)
    some = f"{len(order)} of {whole} neurons" if whole > NEURONS else "neuron"
    figure.supylabel(f"{some}, by activity", fontsize=10)
    axes[-1].set_xlabel("step")
    return figure


def free_energy(
    found: Mapping[str, Dataset] | Dataset, *, inks: Mapping[str, str] | None = None
) -> Figure:
    """Free energy over steps, and what is left of it above -log p(x), where that is known.

    Bands are of one standard error. Guides that take no steps are horizontal lines.

    Args:
        found: from :func:`diagnostics.refinement`, of one guide or by name, for the same x.
        inks: colours by name.
    """
    curves = _named(found, inks)
    known = [one for _, one, _ in curves if "log_evidence" in one]
    figure = new_figure(4.8 * (1 + bool(known)), 3.4)
    axes = figure.subplots(1, 1 + bool(known), squeeze=False)[0]
    longest = max(int(one["moment"][-1]) for _, one, _ in curves)
    for name, one, ink in curves:
        _curve(axes[0], one, "free_energy", ink, longest, name)
        if "gap" in one:
            _curve(axes[1], one, "gap", ink, longest, name)
    for ax in axes:
        _step_axis(ax, longest)
    _near_the_end(axes[0], [one for _, one, _ in curves])
    axes[0].set_ylabel("free energy / nats")
    if known:
        least = -float(known[0]["log_evidence"])
        axes[0].axhline(least, color=INK, lw=1.2, ls="--", label="-log p(x)")
        axes[1].set_ylabel("free energy + log p(x) / nats")
        _log_axis(axes[1])
    _legend(figure, axes[0])
    return figure


def rate_distortion(
    points: Mapping[str, Dataset] | Dataset,
    *,
    inks: Mapping[str, str] | None = None,
    marks: Sequence[float] | None = None,
) -> Figure:
    """How well x is shown against how many neurons are silent; good is up and right.

    A curve for each name, through its points in their order: the moments of one inference, of which
    four in a decade of steps are shown, means over the steps around them; or the fits of a sweep,
    such as over beta. Bars are standard errors, and arcs of equal distance from the corner,
    sqrt((1 - R^2)^2 + (1 - zeros)^2).

    Args:
        points: datasets with `zeros` and `r2` along one dimension, perhaps `zeros_se` and `r2_se`,
            such as :func:`diagnostics.refinement` returns. The coordinate names the points.
        inks: colours by name.
        marks: coordinates of points to mark and label; by default 1, 10, 100, ... and the last of
            moments, and all of a sweep.

    Raises:
        BadInput: `zeros` or `r2` is missing or has no number, or they do not have one dimension.

    Example:
        >>> import xarray
        >>> sweep = {"zeros": ("beta", [0.6, 0.7, 0.8]), "r2": ("beta", [0.9, 0.85, 0.7])}
        >>> found = rate_distortion(xarray.Dataset(sweep, {"beta": [8, 16, 32]}))
        >>> found.axes[0].get_xlabel()
        'share of silent neurons'
    """
    curves = [(name, _plane(name, one), ink) for name, one, ink in _named(points, inks)]
    figure = new_figure(6.0, 4.6)
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    _limits(ax, [curve for _, curve, _ in curves])
    for name, curve, ink in curves:
        _path(ax, curve, ink, name)
        _marks(ax, curve, ink, marks)
    _arcs(ax)
    dims = dict.fromkeys(str(curve["zeros"].dims[0]) for _, curve, _ in curves)
    of_what = " and ".join({"moment": "steps"}.get(dim, dim) for dim in dims)
    ax.set_title(f"numbers: {of_what}", fontsize=10, color=INK)
    ax.set(xlabel="share of silent neurons", ylabel="R² of the reconstruction")
    _legend(figure, ax)
    return figure


def dictionary(found: Dataset, *, most: int = FEATURES) -> Figure:
    """What one spike of each neuron adds to the picture, the most active first, row by row.

    Each feature is scaled by its own largest size: red adds, blue takes away. Where observations
    are no pictures, a feature is a row.

    Args:
        found: from :func:`diagnostics.refinement`.
        most: features shown at most.

    Raises:
        BadInput: the decoder is not linear, so that there is no dictionary.
    """
    if "dictionary" not in found:
        raise BadInput("found", expected="a dictionary", got="a decoder that is not linear",
                       fix="Only linear decoders have one feature for each neuron.")  # fmt: skip
    features = found["dictionary"].values
    order = np.argsort(-found["activity"].values)[:most]
    largest = np.abs(features).max(1, keepdims=True)
    scaled = (features / np.where(largest > 0, largest, 1.0))[order]
    shape = tuple(int(n) for n in found["dictionary"].attrs.get("image_shape", ()))
    tiled = len(shape) == 2
    wall = _mosaic(scaled.reshape(-1, *shape)) if tiled else scaled
    width = min(6.2, 1.1 * (wall.shape[1] + 1) / (shape[1] + 1)) if tiled else 6.2
    height = width * wall.shape[0] / wall.shape[1] if tiled else 0.5 + 0.12 * len(order)
    figure = new_figure(width + 1.2, max(1.7, min(height, 7.0) + 0.4))
    ax = figure.subplots()
    image = ax.imshow(wall, cmap="RdBu_r", vmin=-1, vmax=1, aspect="equal" if tiled else "auto",
                      interpolation="nearest")  # fmt: skip
    figure.colorbar(image, ax=ax, label="weight / its largest", shrink=0.8, ticks=[-1, 0, 1])
    ax.set(xticks=[], yticks=[])
    if not tiled:
        ax.set(xlabel="feature of x", ylabel="neuron, by activity")
    ax.spines[:].set_visible(False)
    if len(order) < len(features):
        ax.set_title(f"the {len(order)} most active of {len(features)}", fontsize=10, color=INK)
    return figure


# ------------------------------------------------------------------------------------------ raster


def _rows(ax: Axes, values: Array, what: str) -> None:
    """Means over columns of steps, (T, N), from the least active neuron up."""
    from matplotlib.ticker import MaxNLocator

    steps = len(values)
    few = np.geomspace(1, steps, COLUMNS).round().astype(int)
    edges = np.arange(steps + 1) if steps <= COLUMNS else np.unique([0, *few])
    shown = np.add.reduceat(values, edges[:-1], 0) / np.diff(edges)[:, None]
    norm, cmap = _colours(shown, what)
    image = ax.pcolormesh(edges - 0.5, np.arange(shown.shape[1] + 1) - 0.5, shown.T,
                          norm=norm, cmap=cmap, rasterized=True)  # fmt: skip
    _step_axis(ax, len(values) - 1)
    ax.set_xlim(-0.5, len(values) - 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    label = f"{what} per step" if what == "spikes" else what
    ticks = MaxNLocator(nbins=4, integer=True) if what == "spikes" else None
    bar = ax.figure.colorbar(image, ax=ax, extend="max", pad=0.01, ticks=ticks)
    bar.set_label(label, fontsize=9)
    bar.minorticks_off()


def _colours(shown: Array, what: str) -> tuple[Any, str]:
    """Spikes from white to black; rates on a logarithmic scale, unless they have signs."""
    from matplotlib.colors import LogNorm, Normalize, PowerNorm

    sizes = np.abs(shown[np.isfinite(shown)])
    high = float(np.quantile(sizes, 0.998) if sizes.size else 0.0) or 1.0
    if (shown < 0).any():
        return Normalize(-high, high), "PuOr"
    if what == "spikes":
        return PowerNorm(0.5, 0, max(1.0, high)), "Greys"  # a single one can be seen
    low = max(FAINT * high, float(sizes.min(initial=high)))
    return LogNorm(0.99 * low, high, clip=True), "viridis"


# ------------------------------------------------------------------------------------- free energy


def _curve(ax: Axes, one: Dataset, what: str, ink: str, longest: int, name: str) -> None:
    """A line with its band; a horizontal one where there is one moment."""
    finite = one.where(np.isfinite(one[what]))
    t, value, se = one["moment"].values, finite[what].values, finite[f"{what}_se"].values
    label = name
    if len(t) == 1:
        t, value, se = np.array([0, longest]), value.repeat(2), se.repeat(2)
        label = f"{name} (no steps)".strip()
    ax.plot(t, value, "-." if label != name else "-", color=ink, lw=1.6, label=label)
    if what == "gap":  # the other's spread is that of log p(x)
        low = np.maximum(value - se, LEAST * value)
        ax.fill_between(t, low, value + se, color=ink, alpha=0.2, lw=0)


def _near_the_end(ax: Axes, curves: list[Dataset]) -> None:
    """Limits that show what is left: a bad start may be hundreds of nats higher."""
    values = np.concatenate([f["free_energy"].values for f in curves])
    ends = [v for f in curves if np.isfinite(v := float(f["free_energy"][-1]))]
    if not ends:
        return  # they diverged
    low = min([*ends, *(-float(f["log_evidence"]) for f in curves if "log_evidence" in f)])
    top = min(values[np.isfinite(values)].max(), low + 5 * max(max(ends) - low, 1.0))
    room = max(top - low, 1.0)
    ax.set_ylim(low - 0.08 * room, low + 1.05 * room)


def _log_axis(ax: Axes) -> None:
    """Nats at 1, 2 and 5 times powers of ten, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.set_ylim(bottom=max(LEAST, ax.get_ylim()[0]))
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _step_axis(ax: Axes, last: int) -> None:
    """Zero, and then decades."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    ax.set_xscale("symlog", linthresh=1, linscale=0.5)
    tens = [10**k for k in range(9) if 10**k <= max(1, last)]
    minor = [m * k for k in tens for m in range(2, 10) if m * k <= last]
    ax.xaxis.set_major_locator(FixedLocator([0, *tens]))
    ax.xaxis.set_minor_locator(FixedLocator(minor))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:,.0f}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlim(0, max(1, last))
    ax.set_xlabel("step")
    ax.spines[["top", "right"]].set_visible(False)


# --------------------------------------------------------------------------------- rate, distortion


PLANE = ("zeros", "r2", "zeros_se", "r2_se")


def _plane(name: str, one: Dataset) -> Dataset:
    """The points of a dataset along their dimension, with errors, those of moments thinned out."""
    missing = [n for n in PLANE[:2] if n not in one]
    if missing or one["zeros"].ndim != 1 or one["zeros"].dims != one["r2"].dims:
        got = f"none of {missing}" if missing else f"dims {one['zeros'].dims}, {one['r2'].dims}"
        raise BadInput(f"points {name!r}", expected="`zeros` and `r2` along one dimension", got=got,
                       fix="Dataset({'zeros': ('beta', z), 'r2': ('beta', r)}).")  # fmt: skip
    if not np.isfinite(one["zeros"] + one["r2"]).any():
        raise BadInput(f"points {name!r}", expected="numbers", got="none that is finite",
                       fix="There is no R² of an x without contrast: leave it out.")  # fmt: skip
    errors = {n: 0 * one[n[:-3]] for n in PLANE[2:] if n not in one}
    found = one.assign(errors)[list(PLANE)]
    return _thinned(found) if found.sizes.get("moment", 1) > 1 else found


def _thinned(found: Dataset) -> Dataset:
    """Moments at equal ratios of steps, each a mean over the steps around it."""
    import xarray

    at, reach = found["moment"].values, 10 ** (0.5 / DECADE)
    powers = 10 ** (np.arange(int(DECADE * math.log10(at[-1])) + 1) / DECADE)
    centres = np.unique([0, *powers.round().astype(int), at[-1]])
    near = [np.flatnonzero((at >= c / reach) & (at <= c * reach)) for c in centres]
    rows = [found.isel(moment=n).mean("moment") for n in near]
    return xarray.concat(rows, "moment").assign_coords(moment=centres)


def _limits(ax: Axes, curves: list[Dataset]) -> None:
    """Around all points, but for bad first halves of paths, with room for labels."""
    zeros, r2 = (np.concatenate([c[n].values for c in curves]) for n in PLANE[:2])
    late = np.concatenate([c["r2"].values[c["r2"].size // 2 :] for c in curves])
    seen = np.isfinite(zeros + r2)
    zeros, r2 = zeros[seen], r2[seen]
    right, top = (min(1.0, float(v.max()) + 0.1) + 0.01 for v in (zeros, r2))
    low = max(r2.min(), min(LOWEST, late[np.isfinite(late)].min(initial=LOWEST))) - 0.05
    ax.set(xlim=(max(0.0, float(zeros.min()) - 0.05), right), ylim=(min(low, top - 0.1), top))


def _path(ax: Axes, curve: Dataset, ink: str, name: str) -> None:
    """The line, or a point if that is all."""
    x, y = curve["zeros"].values, curve["r2"].values
    if len(x) > 1:
        ax.plot(x, y, color=ink, lw=1.4, label=name)
    else:
        still = f"{name} (no steps)".strip() if "moment" in curve.dims else name
        ax.plot(x, y, "D", ms=6, color=ink, mec=INK, mew=0.6, label=still)


def _marks(ax: Axes, curve: Dataset, ink: str, marks: Sequence[float] | None) -> None:
    """Points with their errors, and their coordinates where these have room, the last first."""
    from matplotlib.text import Annotation

    dim = str(curve["zeros"].dims[0])
    x, y, across, up = (curve[n].values for n in PLANE)
    at, tens = curve[dim].values, [10.0**k for k in range(9)]
    wanted = marks if marks is not None else tens if dim == "moment" else at
    shown = sorted({int(np.abs(at - m).argmin()) for m in wanted})
    ax.errorbar(x[shown], y[shown], np.nan_to_num(up[shown]), np.nan_to_num(across[shown]),
                fmt="none", ecolor=ink, elinewidth=1, alpha=0.45)  # fmt: skip
    if len(at) == 1:
        return
    ax.plot(x[shown], y[shown], "o", ms=5.5, color=ink, mec=INK, mew=0.6)
    size = np.array([np.ptp(ax.get_xlim()), np.ptp(ax.get_ylim())])
    for k in shown[::-1]:
        others = [np.array(t.xy) for t in ax.texts if isinstance(t, Annotation)]
        place = np.array([x[k], y[k]])
        if all(np.linalg.norm((place - other) / size) > CLOSE for other in others):
            ax.annotate(f"{at[k]:g}", tuple(place), xytext=(5, 4), textcoords="offset points",
                        fontsize=8, color=INK, annotation_clip=True)  # fmt: skip


def _arcs(ax: Axes) -> None:
    """Equal distances from the corner where silent neurons show all of x."""
    angle = np.linspace(np.pi, 1.5 * np.pi, 90)
    for k, d in enumerate(DISTANCES):
        name = "equal distance from (1, 1)" if k == 0 else None
        x, y = 1 + d * np.cos(angle), 1 + d * np.sin(angle)
        ax.plot(x, y, color=GREY, lw=0.7, zorder=0, label=name)


# ------------------------------------------------------------------------------------------ shared


def _mosaic(pictures: Array) -> Array:
    """Pictures (N, H, W) in rows, with gaps."""
    n, h, w = pictures.shape
    columns = n if n <= LINE else math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    wall = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1), np.nan)
    for k, picture in enumerate(pictures):
        i, j = k // columns * (h + 1), k % columns * (w + 1)
        wall[i : i + h, j : j + w] = picture
    return wall


def _named(
    found: Mapping[str, Dataset] | Dataset, inks: Mapping[str, str] | None
) -> list[tuple[str, Dataset, str]]:
    """Names, datasets and colours; a dataset alone has no name."""
    import xarray

    all_of_them = {"": found} if isinstance(found, xarray.Dataset) else found
    pick = {n: PALETTE[k % 6] for k, n in enumerate(all_of_them)} | dict(inks or {})
    return [(n.replace("_", " "), one, pick[n]) for n, one in all_of_them.items()]


def _legend(figure: Figure, ax: Axes) -> None:
    named = {n: h for h, n in zip(*ax.get_legend_handles_labels(), strict=True) if n}
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=3, frameon=False,
                      fontsize=9)  # fmt: skip
