"""Pictures of what circuits do: their way from the onset of a stimulus on, and their neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput

from .style import INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import DataArray, Dataset, DataTree

__all__ = ["SHADE", "legend", "proportions", "rates", "shade", "trajectories"]

Array = np.ndarray[Any, Any]
SHADES = {0.02: "#f0f0f0", 0.1: "#e0e0e0", 0.25: "#cfcfcf", 0.5: "#bdbdbd", 0.75: "#ababab"}
SHADE = SHADES[0.5]  # of the exact posterior, where there is one grey
TIMED = 2  # latents that are shown over time
NEAR = 1.0  # noise level from which on paths are shown over the density
MARKS = (10, 3, 1, 0.3, 0.1, 0.03, 0.01)  # noise levels on an axis
NEURONS, STEPS = 128, 1000  # rows and columns of a raster at most
SIGNED = 0.25  # rates are signed if they reach this far below zero, in units of the largest
DECADES = 1e-3  # of rates that are not: the smallest that is told from zero, in the same units


def trajectories(found: Dataset, *, ink: str = PALETTE[0]) -> Figure:
    """Runs of a circuit from the onset of a stimulus on: over time, and over the density.

    Args:
        found: from `circuits.trajectories`.
        ink: colour of the guide.
    """
    names = [str(n) for n in found["packed"].values]
    timed, flat = names[:TIMED], len(names) > 1
    figure = new_figure(9.6 if flat else 6.4, 3.5)
    axes = figure.subplots(1, len(timed) + flat, squeeze=False)[0]
    for k, name in enumerate(timed):
        _over_time(axes[k], found, k, ink)
        axes[k].set_ylabel(name)
    if flat:
        _over_density(axes[-1], found, names, ink)
    legend(figure, axes)
    return figure


def rates(tree: DataTree, *, problem: int = 0, chain: int = 0) -> Figure:
    """What neurons did: a row for each, the most active on top; spikes in black.

    Of many neurons some are shown, evenly from the most active to the least.

    Args:
        tree: of a circuit, with the group `circuit`, recorded draw by draw, or `trajectory`.
        problem: which observation, of `circuit`.
        chain: which chain, of `circuit`.

    Raises:
        BadInput: no such group, problem or chain.
    """
    panels = _recorded(tree, problem, chain)
    figure = new_figure(9.6, 3.2 * len(panels) + 0.2)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, (what, values, steps) in zip(axes, panels, strict=True):
        _raster(ax, values, what)
        if steps is None:
            ax.set_xlabel("draw")
        else:
            _noise_axis(ax, steps)
    return figure


# ----------------------------------------------------------------------------------------- paths


def _over_time(ax: Axes, found: Dataset, k: int, ink: str) -> None:
    """One latent of each run; on the right what it should come to."""
    paths, points = found["u"].values[:, :, k], found["points"].values[:, k]
    low, high = np.quantile(points, [0.005, 0.995])
    edge = 0.6 * (high - low)
    last = paths.shape[1] - 1
    for n, path in enumerate(paths):
        ax.plot(path, color=ink, lw=0.8, alpha=0.6, label="a run" if n == 0 else None)
    ax.plot([last] * len(paths), paths[:, -1], "o", ms=4, color=ink, mec=INK, label="its draw")
    settled = int((found["noise"] > found["noise"].min()).sum())
    ax.axvspan(settled, last, color=PALETTE[4], alpha=0.25, lw=0, label="stationary part")
    _noise_axis(ax, found)
    ax.set(xlim=(0, max(1, last) / 0.84), ylim=(low - edge, high + edge))
    ax.set_xticks([t for t in ax.get_xticks() if 0 <= t <= last])
    side = ax.inset_axes((0.86, 0, 0.14, 1), sharey=ax)
    bins = np.linspace(low - edge, high + edge, 45).tolist()
    side.hist(points, bins=bins, orientation="horizontal", color=SHADE)
    side.set_axis_off()


def _over_density(ax: Axes, found: Dataset, names: list[str], ink: str) -> None:
    """The first two latents of each run against one another, once its noise has fallen."""
    points, noise = found["points"].values, found["noise"].values
    paths = found["u"].values[:, noise <= max(NEAR, noise.min())]
    if "density" in found:
        shade(ax, found["density"])
        proportions(ax, found["across"].values, found["up"].values)
    else:
        ax.scatter(points[:, 0], points[:, 1], s=5, color=SHADE, lw=0, rasterized=True)
        low, high = np.quantile(points[:, :2], [0.005, 0.995], axis=0)
        edge = 0.25 * (high - low)
        proportions(ax, *np.stack([low - edge, high + edge], 1))
    for path in paths:
        ax.plot(path[:, 0], path[:, 1], color=ink, lw=0.8, alpha=0.6)
    ax.plot(paths[:, -1, 0], paths[:, -1, 1], "o", ms=4, color=ink, mec=INK)
    ax.set(xlabel=names[0], ylabel=names[1])
    if noise.max() > NEAR:
        ax.set_title(f"from noise level {NEAR:g} on", fontsize=10, color=INK)


def _noise_axis(ax: Axes, steps: Dataset) -> None:
    """Steps below, with the time they took; above them the noise level that is falling."""
    noise = steps["noise"].values
    ax.set_xlabel(f"step ({float(steps['time'][-1]):.3g} time constants)")
    if noise.max() > noise.min():
        places: dict[int, str] = {}
        for mark in (m for m in MARKS if noise.min() <= m <= noise.max()):
            at = int((noise > mark).sum())
            if not places or at - max(places) > len(noise) / 9:  # there is room for it
                places[at] = f"{mark:g}"
        above = ax.secondary_xaxis("top")
        above.set_xticks(list(places), list(places.values()))
        above.tick_params(labelsize=8)
        above.set_xlabel("noise level", fontsize=9)


# ---------------------------------------------------------------------------------------- neurons

Panel = tuple[str, Array, "Dataset | None"]  # a name, values (T, N), and the steps if T are steps


def _recorded(tree: DataTree, problem: int, chain: int) -> list[Panel]:
    """What was recorded."""
    if "circuit" in tree.children:
        data = tree["circuit"].to_dataset()
        for name, index in (("problem", problem), ("chain", chain)):
            if not 0 <= index < data.sizes[name]:
                known = f"0 to {data.sizes[name] - 1}"
                raise BadInput(name, expected=known, got=str(index), fix=f"{name}=0.")
        one = data.isel(problem=problem, chain=chain)
        rows = {str(n): v.transpose("draw", ...).values for n, v in one.data_vars.items()}
        return [(name, v.reshape(len(v), -1), None) for name, v in rows.items()]
    if "trajectory" in tree.children and "rates" in tree["trajectory"].data_vars:
        steps = tree["trajectory"].to_dataset()
        return [("rates", steps["rates"].values, steps)]
    raise BadInput(
        "tree", expected="the group `circuit`, or `trajectory` with rates",
        got=f"groups {sorted(tree.children)}",
        fix="Draw with guide.sampling = Sampling(record=('rates', 'spikes')).",
    )  # fmt: skip


def _raster(ax: Axes, values: Array, what: str) -> None:
    """Neurons by their mean, the most active on top."""
    from matplotlib.ticker import MaxNLocator

    order, whole = np.argsort(values.mean(0)), values.shape[1]
    if whole > NEURONS:
        order = order[np.linspace(0, whole - 1, NEURONS).round().astype(int)]
    shown = values[:STEPS, order].T
    norm, cmap = _colours(shown, what)
    image = ax.imshow(
        shown, origin="lower", aspect="auto", interpolation="nearest", cmap=cmap, norm=norm
    )
    beyond = "max" if what == "spikes" else "both"
    ax.figure.colorbar(image, ax=ax, label=what, extend=beyond, pad=0.01)
    ax.set_ylabel(
        f"{len(order)} of {whole} neurons, by mean" if whole > NEURONS else "neuron, by mean"
    )
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if len(values) > STEPS:
        ax.set_title(f"the first {STEPS} of {len(values)}", fontsize=10, color=INK)


def _colours(shown: Array, what: str) -> tuple[Any, str]:
    """Spikes from white to black; rates on a logarithmic scale, of both signs if they have both."""
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    if what == "spikes":
        return Normalize(
            0, float(np.median(shown[shown > 0])) if (shown > 0).any() else 1.0
        ), "Greys"
    low, high = np.quantile(shown, [0.005, 0.995])
    high = float(max(high, np.abs(shown).max() / 10)) or 1.0
    if low < -SIGNED * high:
        top = float(max(-low, high))
        return SymLogNorm(0.03 * top, vmin=-top, vmax=top, base=10), "PuOr"
    return LogNorm(DECADES * high, high, clip=True), "viridis"


# ----------------------------------------------------------------------------------------- shared


def shade(ax: Axes, density: DataArray) -> None:
    """A density on a grid (up, across), relative to its largest value, in greys."""
    edges, greys = [*SHADES, 1.01], list(SHADES.values())
    ax.contourf(density["across"], density["up"], density.values, edges, colors=greys)


def proportions(ax: Axes, across: Array, up: Array) -> None:
    """Limits; one unit is as long on both axes, unless that would leave a stripe."""
    ax.set(xlim=(across[0], across[-1]), ylim=(up[0], up[-1]))
    if 0.5 < np.ptp(up) / np.ptp(across) < 2:
        ax.set_aspect("equal", adjustable="box")


def legend(
    figure: Figure,
    axes: Sequence[Axes],
    *,
    more: Mapping[str, Any] | None = None,
    density: bool = True,
) -> None:
    """One legend for all panels, below them.

    Args:
        figure: the figure.
        axes: those whose artists have names.
        more: handles by name.
        density: add the grey of the exact posterior.
    """
    from matplotlib.patches import Patch

    found: dict[str, Any] = {}
    for ax in axes:
        found |= {n: h for h, n in zip(*ax.get_legend_handles_labels(), strict=True)}
    found |= more or {}
    found |= {"exact posterior": Patch(color=SHADE, lw=0)} if density else {}
    figure.legend(
        found.values(), found, loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
