"""What some metrics need beside the draws: densities at reference draws, scores, modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.guide import Guide, HasDensity, HasScore
from inference.latents import MAX_CELLS, Latents, ModelLike, Values
from inference.observation import Observation, parts
from inference.seeds import seeded

from .draws import array, beside, values_of

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["POINTS", "extend"]

POINTS = 1000  # draws of each problem at which scores are kept: a kernel between all pairs of them
ROWS = 1 << 14  # rows of one call with gradients, whose graph is kept until its end
DRAW = ("chain", "draw", "problem")
POINT = ("point", "problem", "packed")


def extend(
    tree: DataTree,
    model: ModelLike,
    guide: Guide,
    x: Observation,
    *,
    reference: DataTree,
    judge: Guide,
) -> None:
    """Add groups to a guide's draws, each where it applies.

    `at_reference`, for guides with a density: `log_q` and `log_p_joint` (chain, draw, problem) at
    the reference draws, in nats. `scores`, for continuous latents: at up to 1,000 evenly spread
    draws of each problem, packed `u`, `model` = d log p(x, u) / du and, for guides with a score or
    a density, `guide` = d log q(u given x) / du, all (point, problem, packed), Jacobians included
    and NaN where the density is zero; left out where autograd cannot differentiate the program.
    `modes`, for models that name modes by `modes(z)`: `label` (chain, draw, problem).

    Args:
        tree: of the guide, for the same x; gets the groups.
        model: the model.
        guide: the guide.
        x: observation of B problems.
        reference: draws of `judge`.
        judge: the reference guide; its density at its own draws is known.
    """
    import xarray

    x = beside(guide, x)
    with seeded(int(tree.attrs["seed"]), 3):  # a spiking circuit runs anew to know log q
        groups = {
            "at_reference": _at_reference(guide, x, reference, judge),
            "scores": _scores(tree, guide, x),
            "modes": _modes(tree, model, guide),
        }
    for name, dataset in groups.items():
        if dataset is not None:
            tree[name] = xarray.DataTree(dataset)


def _at_reference(
    guide: Guide, x: Observation, reference: DataTree, judge: Guide
) -> Dataset | None:
    if not isinstance(guide, HasDensity):
        return None
    import xarray

    known = reference["sample_stats"].dataset
    if guide is judge and "log_q" in known:
        log_q = known["log_q"].transpose(*DRAW).values
    else:
        # without argument checks: outside a guide's support its density is 0, which is no mistake
        with torch.no_grad(), pyro.validation_enabled(False):
            log_q = array(guide.log_prob(values_of(reference, guide), x))
    log_p = known["log_p_joint"].transpose(*DRAW).values
    return xarray.Dataset({"log_q": (DRAW, log_q), "log_p_joint": (DRAW, log_p)})


def _scores(tree: DataTree, guide: Guide, x: Observation) -> Dataset | None:
    lat = guide.latents
    if not lat.continuous:
        return None
    import xarray

    z = {n: _spread(v.flatten(0, 1)) for n, v in values_of(tree, guide).items()}
    with torch.no_grad():
        u = lat.pack(z)[0]
    step = _rows(lat, x) // lat.problems(x)
    score = _gradient(lambda v: lat.log_density(v, x), u, step)
    if score is None:
        return None
    found = {"u": u, "model": score}
    if isinstance(guide, HasScore):
        with torch.no_grad():
            found["guide"] = guide.score(z, x)
    elif isinstance(guide, HasDensity):
        own = _gradient(_packed_density(guide, x), u, step)
        found |= {} if own is None else {"guide": own}
    return xarray.Dataset({n: (POINT, array(t)) for n, t in found.items()})


def _spread(z: Tensor) -> Tensor:
    """Up to POINTS of draws (S, ...) at even distances, so that every chain is in."""
    count = min(POINTS, len(z))
    return z[torch.linspace(0, len(z) - 1, count, device=z.device).round().long()]


def _rows(lat: Latents, x: Observation) -> int:
    """Rows of one call: bounded, as the numbers in their observations are."""
    each = sum(t.numel() for t in parts(x)) // lat.problems(x)
    return max(lat.problems(x), min(ROWS, MAX_CELLS // each))


def _packed_density(guide: Any, x: Observation) -> Callable[[Tensor], Tensor]:
    """log q(u given x) of packed latents (..., B, D), Jacobian included."""

    def log_q(u: Tensor) -> Tensor:
        z, jacobians = guide.latents.unpack(u)
        score: Tensor = guide.log_prob(z, x)
        return score + torch.stack(list(jacobians.values())).sum(0)

    return log_q


def _gradient(log_density: Callable[[Tensor], Tensor], points: Tensor, step: int) -> Tensor | None:
    """d log_density / du at points (S, B, D), `step` draws at once; NaN where it is not finite.

    None where torch finds no gradient, which it says by a RuntimeError.
    """
    pieces = []
    try:
        for piece in points.split(step):
            u = piece.detach().requires_grad_()
            with torch.enable_grad():
                value = log_density(u)
                (score,) = torch.autograd.grad(value.sum(), u)
            pieces.append(score.masked_fill(~value.isfinite()[..., None], torch.nan))
    except RuntimeError:
        return None
    return torch.cat(pieces)


def _modes(tree: DataTree, model: ModelLike, guide: Guide) -> Dataset | None:
    name_modes: Callable[[Values], Tensor] | None = getattr(model, "modes", None)
    if not callable(name_modes):
        return None
    import xarray

    with torch.no_grad():
        label = array(name_modes(values_of(tree, guide))).astype(np.int32)
    return xarray.Dataset({"label": (DRAW, label)})
