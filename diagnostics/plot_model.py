"""A picture of a model: what it makes, and one posterior beside the prior."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference.errors import BadInput
from inference.guide import Guide, check_counts
from inference.latents import Latents, ModelLike
from inference.observation import Observation, parts, take
from inference.seeds import stream
from inference.show import title_of

from .draws import draw, packed
from .style import GREY, INK, labels_of, new_figure
from .view import exact_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["model"]

Array = np.ndarray[Any, Any]
ACCENT = "#D55E00"  # the posterior and the observation it belongs to
SHOWN = 40  # latents at most


def model(
    model: ModelLike,
    guide: Guide | None = None,
    *,
    x: Observation | None = None,
    problem: int = 0,
    draws: int = 1000,
    seed: int = 0,
) -> Figure:
    """Prior-predictive observations with one real one, and prior and posterior of its latents.

    Args:
        model: the model.
        guide: whose posterior; by default the exact one, and none where there is none.
        x: observations; by default the model's own.
        problem: which of them.
        draws: draws of prior and posterior.
        seed: of the draws.

    Raises:
        BadInput: `draws` is not a positive integer, or there is no such problem.
    """
    check_counts(draws=draws)
    lat = Latents(model)
    chosen = model.observations() if x is None else x
    if not 0 <= problem < lat.problems(chosen):
        known = f"0 to {lat.problems(chosen) - 1}"
        raise BadInput("problem", expected=known, got=str(problem), fix="problem=0.")
    one = take(chosen, slice(problem, problem + 1)) if lat.plated else chosen
    judge = guide or exact_of(model)
    prior, seen = lat.joint(draws if lat.plated else min(draws, 100), seed=stream(seed, 0))
    posterior = draw(model, judge, one, draws=draws, chains=1, seed=seed) if judge else None
    groups = [g for g in (True, False) if any(s.discrete is g for s in lat.sites)]
    figure = new_figure(4.2 * (1 + len(groups)), 3.2)
    axes = figure.subplots(1, 1 + len(groups), squeeze=False)[0]
    made = parts(seen)[lat.slot].double().numpy()
    shown = parts(one)[lat.slot].double().numpy()
    if lat.plated:
        _observations(axes[0], made, shown[0], model)
    else:
        _rows(axes[0], made, shown)
    for ax, discrete in zip(axes[1:], groups, strict=True):
        sites = [s for s in lat.sites if s.discrete is discrete]
        columns = [prior[s.name].reshape(len(made), -1) for s in sites]
        before = torch.cat([c.double() for c in columns], -1).numpy()
        after = None if posterior is None else packed(posterior, discrete=discrete)[0]
        labels = labels_of({s.name: s.shape.numel() for s in sites})
        (_frequencies if discrete else _values)(ax, before, after, labels)
        if len(sites) > 1:
            ax.set_aspect("auto")  # each site has units of its own
    handles = {
        n: h for ax in axes[1:] for h, n in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles, loc="outside right upper", frameon=False, markerscale=3
    )
    figure.suptitle(title_of(model), color=INK)
    return figure


def _observations(ax: Axes, made: Array, seen: Array, model: Any) -> None:
    """Pictures, a band over features, a histogram, or a map of time by pixel."""
    shape = getattr(model, "image_shape", None)
    if shape and len(shape) == 2:
        tiles = [seen.reshape(shape), *(m.reshape(shape) for m in made[:3])]
        gap = np.full((shape[0], 1), np.nan)
        row = np.concatenate([p for t in tiles for p in (t, gap)][:-1], 1)
        ax.imshow(row, cmap="gray")
        ax.set(xticks=[], yticks=[], title="x, and three from the prior")
    elif seen.ndim == 2:
        _film(ax, seen)
    elif set(np.unique(made)) <= {0.0, 1.0}:
        ax.bar(np.arange(seen.size), made.reshape(len(made), -1).mean(0), color=GREY)
        ax.plot(np.arange(seen.size), seen.ravel(), "o", color=ACCENT)
        _integers(ax.xaxis)
        ax.set(xlabel="feature", ylabel="probability", title="prior predictive, and x")
    elif seen.size == 1:
        ax.hist(_clipped(made.ravel()), bins=40, color=GREY, density=True)
        ax.axvline(float(seen.ravel()[0]), color=ACCENT, lw=2)
        ax.set(xlabel="x", yticks=[], title="prior predictive, and x")
    elif seen.size == 2:
        first, second = made.reshape(len(made), 2).T
        ax.scatter(first, second, s=4, color=GREY, alpha=0.5, lw=0)
        ax.plot(seen.ravel()[0], seen.ravel()[1], "o", color=ACCENT)
        ax.set(xlabel="x[0]", ylabel="x[1]", title="prior predictive, and x")
    else:
        _band(ax, made.reshape(len(made), -1), seen.ravel())


def _rows(ax: Axes, made: Array, seen: Array) -> None:
    """All rows of a data set that is one problem, together."""
    edges = np.histogram_bin_edges(np.concatenate([_clipped(made.ravel()), seen.ravel()]), 30)
    bins = edges.tolist()
    ax.hist(made.ravel(), bins, density=True, color=GREY)
    ax.hist(seen.ravel(), bins, density=True, histtype="step", color=ACCENT, lw=2)
    ax.set(xlabel="value", yticks=[], title="prior predictive, and x, all rows")


def _film(ax: Axes, frames: Array) -> None:
    """Frames (T, F) side by side if they are squares, each with a contrast of its own."""
    side = math.isqrt(frames.shape[1])
    scaled = (frames - frames.mean(1, keepdims=True)) / frames.std(1, keepdims=True)
    if side**2 == frames.shape[1]:
        rows = -(-len(frames) // 5)
        wall = np.full((rows * (side + 1), 5 * (side + 1)), np.nan)
        for t, frame in enumerate(scaled):
            i, j = t // 5 * (side + 1), t % 5 * (side + 1)
            wall[i : i + side, j : j + side] = frame.reshape(side, side)
        ax.imshow(wall[:-1, :-1], cmap="gray", vmin=-2.5, vmax=2.5)
        ax.set(xticks=[], yticks=[], title="x, frame by frame")
    else:
        ax.imshow(scaled, aspect="auto", cmap="gray", vmin=-2.5, vmax=2.5)
        ax.set(xlabel="feature", ylabel="time", title="x")


def _band(ax: Axes, made: Array, seen: Array) -> None:
    at = np.arange(seen.size)
    low, high = np.quantile(made, [0.05, 0.95], axis=0)
    ax.fill_between(at, low, high, color=GREY, alpha=0.5, lw=0, step="mid")
    for row in made[:3]:
        ax.plot(at, row, color=GREY, lw=0.8)
    ax.plot(at, seen, "o-", color=ACCENT, ms=3, lw=1.2)
    _integers(ax.xaxis)
    ax.set(xlabel="feature", title="prior predictive (90 %), and x")


def _clipped(values: Array) -> Array:
    """Without the last hundredth on either side: heavy tails would leave nothing to see."""
    low, high = np.quantile(values, [0.01, 0.99])
    kept: Array = values[(values >= low) & (values <= high)]
    return kept


def _values(ax: Axes, before: Array, after: Array | None, labels: list[str]) -> None:
    """Densities of one latent, a scatter of two, intervals of more."""
    both = [(before, GREY, "prior")] + ([(after, ACCENT, "posterior")] if after is not None else [])
    for k, (z, ink, name) in enumerate(both):
        if len(labels) == 1:
            ax.hist(_clipped(z[:, 0]), bins=50, density=True, color=ink, alpha=0.6, label=name)
        elif len(labels) == 2:
            ax.scatter(z[:, 0], z[:, 1], s=4, color=ink, alpha=0.5, lw=0, label=name)
        else:
            at = np.arange(min(len(labels), SHOWN)) + 0.25 * k
            q = np.quantile(z[:, :SHOWN], [0.05, 0.5, 0.95], axis=0)
            ax.vlines(at, q[0], q[2], color=ink, lw=3, label=name)
            ax.plot(at, q[1], "_", color=INK, ms=6)
    if len(labels) == 1:
        ax.set(xlabel=labels[0], yticks=[])
    elif len(labels) == 2:
        low, high = np.quantile(before, [0.003, 0.997], axis=0)
        margin = 0.15 * (high - low)
        ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]))
        ax.set(ylim=(low[1] - margin[1], high[1] + margin[1]))
        ax.set(xlabel=labels[0], ylabel=labels[1], aspect="equal")
    else:
        _ticks(ax, labels)


def _frequencies(ax: Axes, before: Array, after: Array | None, labels: list[str]) -> None:
    """P(z = 1) of binary latents; of others a map of their marginals."""
    if before.max() <= 1:
        both = ((before, GREY, "prior"), (after, ACCENT, "posterior"))
        for k, (z, ink, name) in enumerate(both):
            if z is not None:
                at = np.arange(min(len(labels), SHOWN)) + 0.4 * k
                ax.bar(at, z[:, :SHOWN].mean(0), 0.38, color=ink, label=name)
        ax.set(ylabel="probability", ylim=(0, 1))
    else:
        z = (before if after is None else after)[:, :SHOWN].astype(int)
        counts = [np.bincount(column, minlength=z.max() + 1) for column in z.T]
        image = ax.imshow(
            np.stack(counts, 1) / len(z), origin="lower", aspect="auto", cmap="Oranges", vmin=0
        )
        ax.figure.colorbar(image, ax=ax, label="probability", shrink=0.8)
        _integers(ax.yaxis)
        ax.set(ylabel="value", title="prior" if after is None else "posterior")
    _ticks(ax, labels)


def _integers(axis: Any) -> None:
    axis.get_major_locator().set_params(integer=True)


def _ticks(ax: Axes, labels: list[str]) -> None:
    shown = labels[:SHOWN]
    step = max(1, len(shown) // 10)
    ax.set_xticks(range(0, len(shown), step), shown[::step], fontsize=7, rotation=45, ha="right")
