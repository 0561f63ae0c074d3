"""Pictures of draws and fits. A guide has the same colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inference import GUIDES

from .compare import EXACT
from .draws import packed
from .plot_model import model
from .style import INK, PALETTE, labels_of, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import DataTree

__all__ = ["colour", "correlations", "losses", "marginals", "model", "reconstructions"]

MAX_PANELS = 12
SMOOTH = 40  # losses are shown as means over 1/40 of the steps


def colour(name: str) -> str:
    """The colour of a guide, by its place in the table; the exact posterior is black."""
    others = [g for g in GUIDES if g != EXACT]
    place = others.index(name) if name in others else sum(map(ord, name))
    return INK if name == EXACT else PALETTE[place % len(PALETTE)]


def _title(name: str) -> str:
    return name.replace("_", " ")


def marginals(trees: Mapping[str, DataTree], *, problem: int = 0) -> Figure:
    """Exact (filled) against guide (lines) marginals of one problem's latents, by ArviZ's KDE.

    Args:
        trees: draws by guide, the exact posterior's among them.
        problem: which observation.
    """
    from arviz_stats.base import array_stats

    draws = {name: packed(tree)[problem] for name, tree in trees.items()}
    labels = _labels(trees[EXACT])[:MAX_PANELS]
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    figure = new_figure(2.6 * columns, 1.0 + 1.7 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for k, label in enumerate(labels):
        for name, z in draws.items():
            grid, density, _ = array_stats.kde(z[:, k].astype(np.float64))
            if name == EXACT:
                axes[k].fill_between(grid, density, color=INK, alpha=0.18, lw=0)
            axes[k].plot(grid, density, color=colour(name), lw=1.4, label=_title(name))
        axes[k].set(xlabel=label, yticks=[])
        axes[k].spines[["top", "left", "right"]].set_visible(False)
    for ax in axes[len(labels) :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def _labels(tree: DataTree) -> list[str]:
    """Names of the packed latents."""
    data = tree["posterior"].dataset
    rows = int(np.prod([data.sizes[d] for d in ("chain", "draw", "problem")]))
    return labels_of({str(name): v.size // rows for name, v in data.data_vars.items()})


def correlations(trees: Mapping[str, DataTree], *, problem: int = 0) -> Figure:
    """Posterior correlations of one problem's latents, one panel per guide.

    Args:
        trees: draws by guide.
        problem: which observation.
    """
    figure = new_figure(2.6 * len(trees) + 0.6, 3.0)
    axes = figure.subplots(1, len(trees), squeeze=False)[0]
    for ax, (name, tree) in zip(axes, trees.items(), strict=True):
        matrix = np.atleast_2d(np.corrcoef(packed(tree)[problem].T))
        image = ax.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_title(_title(name), color=colour(name), fontsize=10)
        ax.set(xlabel="latent", xticks=range(len(matrix)), yticks=range(len(matrix)))
        ax.tick_params(labelsize=7)
    axes[0].set_ylabel("latent")
    figure.colorbar(image, ax=axes, label="correlation", shrink=0.8)
    return figure


def reconstructions(
    trees: Mapping[str, DataTree], image_shape: tuple[int, ...], *, problems: int = 10
) -> Figure:
    """Observations, and what each guide's posterior mean makes of them.

    Args:
        trees: draws by guide, with the group `reconstruction`.
        image_shape: folds an observation into a picture.
        problems: columns at most.
    """
    observed = next(iter(trees[EXACT]["observed_data"].dataset.data_vars.values())).values
    rows = {"observation": observed}
    rows |= {name: tree["reconstruction"]["mean"].values for name, tree in trees.items()}
    columns = min(problems, len(observed))
    figure = new_figure(1.6 + 0.85 * columns, 0.95 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for ax, picture, seen in zip(line, pictures, observed, strict=False):
            limits = {"vmin": seen.min(), "vmax": seen.max()}
            ax.imshow(picture.reshape(image_shape), cmap="gray_r", **limits)
            ax.set(xticks=[], yticks=[])
        ink = INK if name == "observation" else colour(name)
        line[0].set_ylabel(_title(name), rotation=0, ha="right", va="center", color=ink, fontsize=9)
    return figure


def losses(runs: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]) -> Figure:
    """Loss curves, one panel per fit, since objectives differ in units.

    Args:
        runs: losses by fit and player, one number per step.
    """
    figure = new_figure(3.0 * len(runs), 2.6)
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for ax, (name, players) in zip(axes, runs.items(), strict=True):
        for k, (player, values) in enumerate(players.items()):
            width = max(1, len(values) // SMOOTH)
            used = len(values) // width * width
            means = values[:used].reshape(-1, width).mean(1)
            steps = width * (np.arange(len(means)) + 0.5)
            line = ("-", "--", ":")[k % 3]
            ax.plot(steps, means, line, color=colour(name), label=player)
            low, high = np.quantile(means[len(means) // 10 :], [0, 1])
            ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
        ax.set_title(_title(name), color=colour(name), fontsize=10)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        if len(players) > 1:
            ax.legend(frameon=False)
    axes[0].set_ylabel("loss / nats")
    return figure
