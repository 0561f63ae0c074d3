"""Films: a video beside what each guide takes it for, frame by frame."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference.errors import BadInput
from inference.latents import Values
from inference.observation import parts

from . import plots
from .compare import EXACT
from .draws import array
from .estimate import evenly
from .style import INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from xarray import DataTree

__all__ = ["Film", "film", "is_video", "record"]

Array = np.ndarray[Any, Any]
GROUP, AXES = "film", ("time", "pixel")
RATE = 3  # frames per second
ROOM = 0.1  # of the range of predicted pixels, on either side: observed ones are noisy
PATHS = 12  # draws shown as lines
COLOURS = 256  # of a GIF
WHITE = 246  # of 255: what is lighter is white, as pages are
VEIL = PALETTE[4]
THICK, THIN = 0.55, 0.2  # of veils: over what is observed, over what guides make of it


def is_video(model: Any) -> bool:
    """Its x is square frames (B, T, side^2), with dims ("time", "pixel")."""
    x, *others = parts(model.observations())
    named = AXES in {tuple(axes) for axes in getattr(model, "dims", {}).values()}
    return named and not others and x.dim() == 3 and math.isqrt(x.shape[2]) ** 2 == x.shape[2]


def record(model: Any, trees: Mapping[str, DataTree]) -> None:
    """Add the group `film` to draws of a model of videos; nothing to those of other models.

    Args:
        model: with `predict`. Two more are used where it has them: `position`, from states to rows
            and columns (..., 2), and `hidden` (T, F), whether a pixel says nothing of the latents.
        trees: draws by guide. Each gets `mean` (problem, time, pixel), the posterior mean of the
            video without noise; `hidden` (time, pixel); and, where the model has positions, `where`
            (problem, time, pixel), their posterior probabilities.
    """
    import xarray

    if not is_video(model):
        return
    like = parts(model.observations())[0]
    hidden = getattr(model, "hidden", torch.zeros(like.shape[1:], dtype=torch.bool))
    for tree in trees.values():
        data = tree["posterior"].dataset
        z = {str(n): torch.as_tensor(v.values).to(like.device) for n, v in data.data_vars.items()}
        with torch.no_grad():
            each = [
                _made_of(model, {n: v[:, :, k] for n, v in z.items()})
                for k in range(data.sizes["problem"])
            ]
        found = xarray.Dataset(
            {name: (("problem", *AXES), np.stack([one[name] for one in each])) for name in each[0]}
        )
        found["hidden"] = AXES, array(hidden.expand(like.shape[1:]))
        tree[GROUP] = xarray.DataTree(found)


def _made_of(model: Any, z: Values) -> dict[str, Array]:
    """Frames (T, F) by name, made of one problem's draws (chains, draws, *shape)."""
    frames = model.predict(z)
    found = {"mean": array(frames.mean((0, 1)))}
    if hasattr(model, "position"):
        (states,) = z.values()
        row, column = model.position(states).flatten(0, 1).unbind(-1)  # (S, T)
        cell = math.isqrt(frames.shape[-1]) * row + column
        places = torch.nn.functional.one_hot(cell.long(), frames.shape[-1])
        found["where"] = array(places.to(frames).mean(0))
    return found


class Film(bytes):
    """The bytes of a GIF; as the last value of a notebook's cell it plays."""

    def __repr__(self) -> str:
        return f"<film of {len(self):,} bytes>"

    def _repr_html_(self) -> str:
        return f"<img src='data:image/gif;base64,{base64.b64encode(self).decode()}' alt='film'>"


def film(trees: Mapping[str, DataTree], *, problem: int = 0) -> Film:
    """An animated picture of one problem: what is seen, and what each guide makes of it.

    Above, the observed frame, and of each guide the posterior mean of the frame without noise.
    Below, where the guide takes the object to be: a map of probabilities, or, of continuous
    latents, draws of their path with the 90 % interval. Hidden pixels are veiled.

    Args:
        trees: draws by guide, the exact posterior's among them, after :func:`record`.
        problem: which observation.

    Returns:
        A GIF that repeats for ever, three frames a second.

    Raises:
        BadInput: there is no group `film`, or no such problem.

    Example:
        >>> import diagnostics, zoo
        >>> from diagnostics.film import film, record
        >>> model = zoo.GaussianVideo()
        >>> trees = diagnostics.collect(model, {}, model.observations()[:1], draws=50, seed=0)
        >>> record(model, trees)
        >>> film(trees).startswith(b"GIF89a")
        True
    """
    missing = [name for name, tree in trees.items() if GROUP not in tree.children]
    if missing:
        raise BadInput(
            "trees", expected="the group film", got=f"none for {', '.join(missing)}",
            fix="Call record(model, trees), for a model of videos.",
        )  # fmt: skip
    sizes = trees[EXACT][GROUP].sizes
    if problem not in range(sizes["problem"]):
        wanted = f"0 to {sizes['problem'] - 1}"
        raise BadInput("problem", expected=wanted, got=repr(problem), fix="problem=0.")
    observed = next(iter(trees[EXACT]["observed_data"].dataset.data_vars.values()))
    views = {name: _view(name, tree, problem) for name, tree in trees.items()}
    return Film(_gif(list(_images(observed.values[problem], views))))


@dataclass(frozen=True)
class _View:
    """What a guide makes of a video: its mean, (T, F), and where something is, (T, F) or (S, T)."""

    ink: str
    hidden: Array
    mean: Array
    where: Array | None
    path: Array | None


def _gif(images: list[Array]) -> bytes:
    """Pictures (height, width, 3) one after the other."""
    from PIL import Image

    # one palette for all, so that what stays is not stored again
    palette = Image.fromarray(np.concatenate(images)).quantize(COLOURS)
    colours = np.reshape(palette.getpalette() or [], (-1, 3))
    colours[colours.min(1) >= WHITE] = 255
    palette.putpalette(colours.ravel().tolist())
    sharp = Image.Dither.NONE
    first, *rest = [Image.fromarray(i).quantize(palette=palette, dither=sharp) for i in images]
    found = io.BytesIO()
    beat = round(1000 / RATE)
    first.save(found, "GIF", save_all=True, append_images=rest, duration=beat, loop=0)
    return found.getvalue()


def _view(name: str, tree: DataTree, problem: int) -> _View:
    """Of one problem; the path is the first continuous latent with one number per frame."""
    seen = tree[GROUP].dataset.isel(problem=problem)
    frames = seen.sizes["time"]
    paths = [
        site.values[:, :, problem].reshape(-1, frames)
        for site in tree["posterior"].dataset.data_vars.values()
        if site.shape[3:] == (frames,) and np.issubdtype(site.dtype, np.floating)
    ]
    where = seen["where"].values if "where" in seen else None
    hidden = seen["hidden"].values.astype(bool)
    return _View(plots.colour(name), hidden, seen["mean"].values, where, next(iter(paths), None))


def _images(observed: Array, views: Mapping[str, _View]) -> Iterator[Array]:
    """A picture (height, width, 3) for each frame; what moves is drawn anew."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = new_figure(1.45 * (1 + len(views)) + 0.5, 4.2)
    canvas: Any = FigureCanvasAgg(figure)
    (first, *above), (legend, *below) = figure.subplots(2, 1 + len(views))
    mean, hidden = views[EXACT].mean, views[EXACT].hidden
    _title(first, "observed", INK)
    _legend(legend, hidden)
    for ax, (name, view) in zip(above, views.items(), strict=True):
        _title(ax, name, view.ink)
    _lines(below, list(views.values()))
    room = ROOM * np.ptp(mean)
    grey = {"vmin": mean.min() - room, "vmax": mean.max() + room, "cmap": "gray_r"}
    for t in range(len(observed)):
        moving = [legend.text(0, 0.95, f"frame {t + 1} of {len(observed)}", va="top", color=INK)]
        moving += _picture(first, observed[t], THICK * hidden[t], **grey)
        for over, under, view in zip(above, below, views.values(), strict=True):
            moving += _picture(over, view.mean[t], THIN * hidden[t], **grey)
            moving += _place(under, view, t)
        canvas.draw()
        figure.set_layout_engine("none")  # the first frame has settled it
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()
        for artist in moving:
            artist.remove()


def _title(ax: Axes, name: str, ink: str) -> None:
    ax.set_title(fill(name.replace("_", " "), 16), color=ink, fontsize=9)


def _legend(ax: Axes, hidden: Array) -> None:
    """What the veil means, if there is one."""
    from matplotlib.patches import Rectangle

    ax.set_axis_off()
    if hidden.any():
        ax.add_patch(Rectangle((0, 0.62), 0.12, 0.12, color=VEIL, alpha=THICK, lw=0))
        ax.text(0.18, 0.68, "hidden", va="center", fontsize=9, color=INK)


def _lines(axes: Sequence[Axes], views: Sequence[_View]) -> None:
    """Draws of paths with their 90 % intervals, for guides that have no map; on one scale."""
    shown = [(ax, v) for ax, v in zip(axes, views, strict=True) if v.where is None]
    paths = [view.path for _, view in shown if view.path is not None]
    for ax, view in shown:
        if view.path is None:
            ax.set_axis_off()
            continue
        frames = np.arange(1, view.path.shape[1] + 1)
        low, high = np.quantile(view.path, [0.05, 0.95], axis=0)
        ax.fill_between(frames, low, high, color=view.ink, alpha=0.25, lw=0)
        ax.plot(frames, evenly(view.path, PATHS).T, color=view.ink, lw=0.6)
        for frame in frames[view.hidden.all(1)]:
            ax.axvspan(frame - 0.5, frame + 0.5, color=VEIL, alpha=THICK / 2, lw=0)
        ax.set_ylim(*np.quantile(np.concatenate(paths), [0.001, 0.999]))
        ax.set_xlabel("frame", fontsize=9)
        ax.locator_params(axis="x", integer=True)
        ax.tick_params(labelsize=8)


def _place(ax: Axes, view: _View, t: int) -> list[Artist]:
    """Where the guide takes the object to be in frame t: a map, or a line across the paths."""
    from matplotlib.colors import PowerNorm

    if view.where is None:
        return [ax.axvline(t + 1, color=INK, lw=1.5)]
    faint = PowerNorm(0.5, 0, 1)  # so that places of little probability can be seen, too
    return _picture(ax, view.where[t], THIN * view.hidden[t], norm=faint, cmap="Blues")


def _picture(ax: Axes, frame: Array, veil: Array, **scale: Any) -> list[Artist]:
    """A frame (F,) under a veil (F,), the thicker the less is seen."""
    from matplotlib.colors import to_rgb

    side = math.isqrt(len(frame))
    cover = np.dstack([np.tile(to_rgb(VEIL), (side, side, 1)), veil.reshape(side, side)])
    ax.set(xticks=[], yticks=[])
    return [ax.imshow(frame.reshape(side, side), **scale), ax.imshow(cover)]
