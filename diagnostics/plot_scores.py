"""Pictures of scores: where a circuit goes, and where it should."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .plot_circuits import SHADE, legend, proportions, shade
from .style import INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import DataArray, Dataset

__all__ = ["score_field"]

Array = np.ndarray[Any, Any]
ARROWS = 15  # along each latent
FAINT = 0.01  # density, relative to its largest value, below which errors are not shown
TRUE, LEARNED = "true score", "learned score"


def score_field(found: Dataset, *, ink: str = PALETTE[0]) -> Figure:
    """The learned score beside the true one, and the error of it.

    Two latents: arrows over the density, and the error where there is any density. One latent:
    curves. Both again at larger noise levels, where the truth is the score of the blurred
    posterior. More latents: scores at posterior draws against one another, and the error of each.

    Args:
        found: from `circuits.score_field`.
        ink: colour of the guide.
    """
    return {1: _curves, 2: _arrows}.get(found.sizes["packed"], _scatter)(found, ink)


def _curves(found: Dataset, ink: str) -> Figure:
    """Scores of one latent over it."""
    z, levels = found["across"].values, _levels(found)
    figure = new_figure(4.8 * (1 + bool(levels)), 3.7)
    axes = figure.subplots(1, 1 + bool(levels), squeeze=False, sharey=True)[0]
    for kind, colour, line, name in (("model", INK, "-", TRUE), ("guide", ink, "--", LEARNED)):
        axes[0].plot(z, found[f"{kind}_field"][:, 0], line, color=colour, lw=2, label=name)
        for k in range(len(levels)):
            at = found.isel(level=k)
            seen = np.where(at["blurred_density"] > FAINT, at[f"blurred_{kind}"][:, 0], np.nan)
            axes[1].plot(z, seen, line, color=colour, lw=1.6)
    axes[0].set_title(_size(found), fontsize=10, color=INK)
    if levels:
        errors = [_percent(e) for e in found["blurred_error"].values]
        text = ", ".join(f"{level:g} ({e})" for level, e in zip(levels, errors, strict=True))
        axes[1].set_title(f"noise levels (and errors) {text}", fontsize=10, color=INK)
    low, high = np.nanquantile([found["model"], found["guide"]], [0.01, 0.99])
    edge = 0.3 * (high - low)
    for ax in axes:
        ax.set(xlabel=_name(found, 0), xlim=(z[0], z[-1]), ylim=(low - edge, high + edge))
        behind = ax.inset_axes((0, 0, 1, 1), zorder=-1)
        behind.fill_between(z, found["density"], color=SHADE, lw=0)
        behind.set(xlim=(z[0], z[-1]), ylim=(0, 1.1))
        behind.set_axis_off()
        ax.patch.set_visible(False)
    axes[0].set_ylabel("score / nats per unit")
    legend(figure, axes)
    return figure


def _arrows(found: Dataset, ink: str) -> Figure:
    """Score fields of two latents."""
    from matplotlib.lines import Line2D

    levels = _levels(found)
    shape = np.ptp(found["up"].values) / np.ptp(found["across"].values)
    height = 2.75 * float(np.clip(shape, 0.6, 1.1)) + 0.35
    figure = new_figure(9.6, height * (1 + bool(levels)) + 0.6)
    axes = figure.subplots(1 + bool(levels), 3, squeeze=False, sharex=True, sharey=True)
    _fields(axes[0, 0], found["density"], {INK: found["model_field"]})
    _fields(axes[0, 1], found["density"], {ink: found["guide_field"]})
    axes[0, 0].set_title(TRUE, fontsize=10, color=INK)
    axes[0, 1].set_title(LEARNED, fontsize=10, color=ink)
    _error(axes[0, 2], found)
    for ax in axes[1:].ravel()[len(levels) :]:
        ax.set_axis_off()
    for ax, level in zip(axes[1:].ravel(), levels, strict=False):
        at = found.sel(level=level)
        _fields(ax, at["blurred_density"], {INK: at["blurred_model"], ink: at["blurred_guide"]})
        text = f"noise level {level:g}: error {_percent(at['blurred_error'])}"
        ax.set_title(text, fontsize=10, color=INK)
    for ax in axes[-1]:
        ax.set_xlabel(_name(found, 0))
    for ax in axes[:, 0]:
        ax.set_ylabel(_name(found, 1))
    names = {TRUE: INK, LEARNED: ink}
    legend(figure, [], more={n: Line2D([], [], color=c, marker=">") for n, c in names.items()})
    return figure


def _fields(ax: Axes, density: DataArray, fields: dict[str, DataArray]) -> None:
    """Arrows along scores, by colour, long where these are steep, over the density.

    Lengths are compressed, m / (1 + m) with m in units of the first field's median, for scores grow
    without end. Of two fields the first is broad and pale.
    """
    across, up = density["across"].values, density["up"].values
    shade(ax, density)
    step = len(across) // ARROWS
    some = slice(step // 2, None, step)
    widths = np.array([np.ptp(across), np.ptp(up)])
    slopes = [f.values[some, some].astype(np.float64) / widths for f in fields.values()]
    sizes = [np.linalg.norm(s, axis=-1, keepdims=True) for s in slopes]
    typical = np.nanmedian(sizes[0])
    for k, (colour, s, size) in enumerate(zip(fields, slopes, sizes, strict=True)):
        u, v = np.moveaxis(s * widths * (1.3 / ARROWS) / (size + typical), -1, 0)
        pale = k < len(slopes) - 1
        ax.quiver(
            across[some], up[some], u, v, color=colour, alpha=0.35 if pale else 1, pivot="tail",
            width=0.012 if pale else 0.006, headwidth=3 if pale else 4, headlength=3 if pale else 4,
            headaxislength=3 if pale else 4, angles="xy", scale_units="xy", scale=1,
        )  # fmt: skip
    proportions(ax, across, up)


def _error(ax: Axes, found: Dataset) -> None:
    """Size of the difference over that of the score at posterior draws, in posterior sds."""
    sd = found["points"].values.std(0)
    wrong = np.linalg.norm(sd * (found["guide_field"] - found["model_field"]).values, axis=-1)
    typical = np.sqrt(np.nanmean(np.square(sd * found["model"].values).sum(1)))
    shown = np.where(found["density"].values > FAINT, wrong / typical, np.nan)
    top = max(0.1, float(np.nanquantile(shown, 0.98)))
    image = ax.pcolormesh(found["across"], found["up"], shown, vmin=0, vmax=top, cmap="viridis")
    beside = ax.inset_axes((1.04, 0, 0.05, 1))
    ax.figure.colorbar(image, cax=beside, label="error / rms score", extend="max")
    ax.set_title(_size(found), fontsize=10, color=INK)
    proportions(ax, found["across"].values, found["up"].values)


def _scatter(found: Dataset, ink: str) -> Figure:
    """Scores of many latents at posterior draws, in units of posterior sds."""
    figure = new_figure(9.6, 3.9)
    left, right = figure.subplots(1, 2)
    sd = found["points"].values.std(0)
    true, own = ((sd * found[n].values).ravel() for n in ("model", "guide"))
    low, high = np.nanquantile([true, own], [0.002, 0.998])
    ends = np.array([low, high]) + 0.1 * (high - low) * np.array([-1, 1])
    left.plot(ends, ends, color=INK, lw=1.2, label="learned = true")
    dots: dict[str, Any] = {"color": ink, "alpha": 0.4, "lw": 0, "rasterized": True}
    left.scatter(true, own, s=5, label="one latent of one draw", **dots)
    left.set(xlim=ends, ylim=ends, xlabel=f"{TRUE} / nats per sd")
    left.set(ylabel=f"{LEARNED} / nats per sd", aspect="equal")
    left.set_title(_size(found), fontsize=10, color=INK)
    value, se = found["error_by_latent"].values, found["error_by_latent_se"].values
    label = "one latent, ± standard error"
    right.errorbar(range(len(value)), value, se, fmt="o", ms=4, color=ink, label=label)
    whole = float(found["relative_error"])
    right.axhline(whole, color=INK, lw=1.2, ls="--", label="all latents")
    shown = range(0, len(value), -(-len(value) // 8))
    right.set_xticks(shown, [_name(found, k) for k in shown], fontsize=8)
    right.set(xlabel="latent", ylabel="error / rms score")
    right.set_ylim(bottom=0)
    right.spines[["top", "right"]].set_visible(False)
    legend(figure, [left, right], density=False)
    return figure


def _levels(found: Dataset) -> list[float]:
    return [float(v) for v in found["level"].values] if "level" in found.dims else []


def _percent(share: Any) -> str:
    value = 100 * float(share)
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def _size(found: Dataset) -> str:
    """The relative error in words, with the noise level it is at."""
    value, se = float(found["relative_error"]), 100 * float(found["relative_error_se"])
    where = f"noise level {found.attrs['noise']:g}: " if "noise" in found.attrs else ""
    return f"{where}error {_percent(value).removesuffix(' %')} ± {float(f'{se:.1g}'):g} %"


def _name(found: Dataset, k: int) -> str:
    return str(found["packed"].values[k])
