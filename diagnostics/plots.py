"""Pictures of draws and fits. A guide has the same colour in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference import GUIDES
from inference.errors import BadInput
from inference.guide import Guide
from inference.latents import ModelLike
from inference.observation import Observation

from . import circuits, plot_circuits, plot_scores
from .compare import EXACT
from .draws import packed
from .plot_circuits import rates
from .plot_model import model
from .style import INK, PALETTE, new_figure
from .verdict import labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from xarray import DataTree

__all__ = [
    "colour",
    "correlations",
    "forest",
    "losses",
    "marginals",
    "model",
    "ranks",
    "rates",
    "reconstructions",
    "scatter",
    "score_field",
    "traces",
    "trajectories",
]

Array = np.ndarray[Any, Any]
# yellow lines cannot be seen on white: darker inks instead, each far (26 in CIELAB) from all others
GUIDE_INKS = (
    *PALETTE[:6], "#882255", "#B0B0FF", "#8C6BB1", "#A50026", "#661100", "#332288", "#7FA800",
)  # fmt: skip
MAX_PANELS = 12
MAX_BARS, RARE = 10, 0.005  # values with bars of their own; share of the largest put together
MAX_DOTS = 2000  # draws that are dots
MAX_CHAINED = 4  # latents whose chains are shown
SMOOTH = 40  # losses are shown as means over 1/40 of the steps


def colour(name: str) -> str:
    """The colour of a guide, by its place in the table; the exact posterior is black."""
    others = [g for g in GUIDES if g != EXACT]
    place = others.index(name) if name in others else sum(map(ord, name))
    return INK if name == EXACT else GUIDE_INKS[place % len(GUIDE_INKS)]


def _title(name: str) -> str:
    return name.replace("_", " ")


def marginals(trees: Mapping[str, DataTree], *, problem: int = 0) -> Figure:
    """Exact (filled) against guide marginals of one problem's latents.

    Lines by ArviZ's KDE where a latent is continuous, bars of frequencies where it is discrete.

    Args:
        trees: draws by guide, the exact posterior's among them.
        problem: which observation.
    """
    counted = set(labels(trees[EXACT], discrete=True))
    names = labels(trees[EXACT])[:MAX_PANELS]
    draws = {name: packed(tree)[problem] for name, tree in trees.items()}
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    width = max(2.6 * columns, 5.0)
    beside = min(len(trees), int(width // 2.4))  # names of guides in a line of the legend
    figure = new_figure(width, 0.8 + 1.7 * rows + 0.2 * -(-len(trees) // beside))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for k, label in enumerate(names):
        panel = _bars if label in counted else _densities
        panel(axes[k], {name: z[:, k].astype(np.float64) for name, z in draws.items()})
        axes[k].set(xlabel=label, yticks=[])
        axes[k].spines[["top", "left", "right"]].set_visible(False)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    handles, texts = axes[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=beside, frameon=False)
    return figure


def scatter(
    trees: Mapping[str, DataTree], *, problem: int = 0, latents: tuple[int, int] = (0, 1)
) -> Figure:
    """Draws of two latents, the guides side by side.

    Args:
        trees: draws by guide.
        problem: which observation.
        latents: which two, counted as in the packed vector.

    Raises:
        BadInput: there are no such latents.
    """
    names = labels(next(iter(trees.values())))
    if len(set(latents)) < 2 or not set(latents) <= set(range(len(names))):
        raise BadInput(
            "latents", expected=f"two of the {len(names)} latents", got=repr(latents),
            fix="For one latent there is plots.marginals.",
        )  # fmt: skip
    figure = new_figure(2.5 * len(trees) + 0.4, 2.9)
    axes = figure.subplots(1, len(trees), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, tree) in zip(axes, trees.items(), strict=True):
        z = packed(tree)[problem][:MAX_DOTS, latents]
        ax.scatter(*z.T, s=4, alpha=0.4, lw=0, color=colour(name), rasterized=True)
        ax.set_xlabel(names[latents[0]])
        ax.set_title(_title(name), fontsize=10, color=colour(name))
    axes[0].set_ylabel(names[latents[1]])
    return figure


def _densities(ax: Axes, draws: Mapping[str, Array]) -> None:
    from arviz_stats.base import array_stats

    for name, z in draws.items():
        grid, density, _ = array_stats.kde(z)
        if name == EXACT:
            ax.fill_between(grid, density, color=INK, alpha=0.18, lw=0)
        ax.plot(grid, density, color=colour(name), lw=1.4, label=_title(name))


def _bars(ax: Axes, draws: Mapping[str, Array]) -> None:
    """Frequencies of each value, the guides' side by side; of many the rare largest together."""
    whole = np.concatenate(list(draws.values()))
    low, last = int(whole.min()), int(whole.max())
    if last - low >= MAX_BARS:
        tails = [np.quantile(z, 1 - RARE, method="inverted_cdf") for z in draws.values()]
        last = max(low + MAX_BARS - 1, int(max(tails)))
    values = np.arange(low, last + 1)
    width = 0.8 / len(draws)
    for k, (name, z) in enumerate(draws.items()):
        at = np.arange(len(values)) + (k - (len(draws) - 1) / 2) * width
        alpha = 0.4 if name == EXACT else 1.0
        shares = [(z.clip(max=last) == v).mean() for v in values]
        ax.bar(at, shares, 0.9 * width, color=colour(name), alpha=alpha, label=_title(name))
    step = -(-len(values) // 8)
    names = [f"{v}" for v in values[:-1]] + [f"{last}" + "+" * bool(whole.max() > last)]
    ticks = sorted({*range(0, len(values) - step, step), len(values) - 1})
    ax.set_xticks(ticks, [names[t] for t in ticks])
    ax.set_ylim(0, 1)


def forest(trees: Mapping[str, DataTree], *, problem: int = 0) -> Figure | None:
    """Medians, 50 and 89 % intervals of one problem's continuous latents, by ArviZ.

    Args:
        trees: draws by guide.
        problem: which observation.

    Returns:
        None where all latents are discrete.
    """
    some = {_title(n): _by_label(t, problem, MAX_PANELS) for n, t in trees.items()}
    names = labels(trees[EXACT], discrete=False)[:MAX_PANELS]
    if not names:
        return None
    size = (7.0, 1.3 + 0.1 * (len(trees) + 1) * len(names))
    return _arviz(
        "plot_forest", some, size, combined=True, aes={"color": ["model"]},
        color=[colour(n) for n in trees], legend="model",
    )  # fmt: skip


def ranks(tree: DataTree, *, problem: int = 0) -> Figure | None:
    """Ranks of each chain among all, with the band of chains that mix, by ArviZ.

    Args:
        tree: draws of a guide whose draws are correlated.
        problem: which observation.

    Returns:
        None where all latents are discrete.
    """
    return _chains(tree, problem, "plot_rank")


def traces(tree: DataTree, *, problem: int = 0) -> Figure | None:
    """Draws in their order, a line for each chain, by ArviZ; see :func:`ranks`."""
    return _chains(tree, problem, "plot_trace")


def _chains(tree: DataTree, problem: int, name: str) -> Figure | None:
    few = len(labels(tree, discrete=False)[:MAX_CHAINED])
    if not few:
        return None
    return _arviz(name, _by_label(tree, problem, MAX_CHAINED), (9.0, 2.2), color=PALETTE[:5])


def _by_label(tree: DataTree, problem: int, most: int) -> DataTree:
    """The first continuous latents of one problem as scalar variables."""
    from arviz_base import from_dict

    z = packed(tree, discrete=False)[problem]
    chains = tree["posterior"].sizes["chain"]
    names = labels(tree, discrete=False)[:most]
    return from_dict({"posterior": {n: z[:, k].reshape(chains, -1) for k, n in enumerate(names)}})


def _arviz(
    name: str, draws: Any, size: tuple[float, float], *, color: Sequence[str],
    legend: str | None = None, aes: Any = None, **knobs: Any,
) -> Figure:  # fmt: skip
    """A plot of ArviZ in our colours; its figure is taken out of pyplot's global list."""
    import arviz_plots
    import matplotlib.pyplot as plt

    from .picture import Picture

    kind = {"figsize": size, "layout": "constrained", "dpi": 110, "FigureClass": Picture}
    pc: dict[str, Any] = {"figure_kwargs": kind}
    pc |= {"color": list(color)} | ({"aes": aes} if aes else {})
    found = getattr(arviz_plots, name)(draws, backend="matplotlib", **pc, **knobs)
    if legend:
        found.add_legend(legend, title="")
    figure: Figure = found.viz["figure"].item()
    plt.close(figure)
    return figure


def correlations(trees: Mapping[str, DataTree], *, problem: int = 0) -> Figure:
    """Posterior correlations of one problem's latents, one panel per guide.

    Args:
        trees: draws by guide.
        problem: which observation.
    """
    figure = new_figure(2.6 * len(trees) + 0.6, 3.0)
    axes = figure.subplots(1, len(trees), squeeze=False)[0]
    for ax, (name, tree) in zip(axes, trees.items(), strict=True):
        with np.errstate(invalid="ignore"):  # a latent that never moved is left blank
            matrix = np.atleast_2d(np.corrcoef(packed(tree)[problem].T))
        image = ax.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        ax.set_title(_title(name), color=colour(name), fontsize=10)
        ticks = range(0, len(matrix), -(-len(matrix) // 10))
        ax.set(xlabel="latent", xticks=ticks, yticks=ticks)
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
        ends = []
        for k, (player, values) in enumerate(players.items()):
            width = max(1, len(values) // SMOOTH)
            used = len(values) // width * width
            means = values[:used].reshape(-1, width).mean(1)
            steps = width * (np.arange(len(means)) + 0.5)
            line = ("-", "--", ":")[k % 3]
            ax.plot(steps, means, line, color=colour(name), label=player)
            ends.append(np.quantile(means[len(means) // 10 :], [0, 1]))
        low, high = np.min(ends), np.max(ends)
        ax.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.3 * (high - low) + 1e-3)
        ax.set_title(_title(name), color=colour(name), fontsize=10)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        if len(players) > 1:
            ax.legend(frameon=False)
    axes[0].set_ylabel("loss / nats")
    return figure


def score_field(
    model: ModelLike, guide: Guide, x: Observation, *, problem: int = 0, **knobs: Any
) -> Figure:
    """A circuit's score beside the true one, for one problem.

    Args:
        model: the model.
        guide: a guide with a score, such as a reservoir sampler.
        x: observation of B problems.
        problem: which of them.
        **knobs: of :func:`diagnostics.score_field`, which says what is raised, too.
    """
    found = circuits.score_field(model, guide, x, problem=problem, **knobs)
    return plot_scores.score_field(found, ink=colour(_registered(guide)))


def trajectories(guide: Guide, x: Observation, *, problem: int = 0, **knobs: Any) -> Figure:
    """A circuit's outputs from the onset of a stimulus on, in a few runs.

    Args:
        guide: a circuit, such as a reservoir sampler.
        x: observation of B problems.
        problem: which of them.
        **knobs: of :func:`diagnostics.trajectories`, which says what is raised, too.
    """
    found = circuits.trajectories(guide, x, problem=problem, **knobs)
    return plot_circuits.trajectories(found, ink=colour(_registered(guide)))


def _registered(guide: Guide) -> str:
    """The name of its class on the command line, or in Python."""
    names = [name for name, made in GUIDES.items() if made is type(guide)]
    return names[0] if names else type(guide).__name__
