"""One problem in packed latents: where its posterior is, how high, and how steep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference.errors import BadInput, Incompatible
from inference.guide import Guide, check_counts
from inference.latents import Latents
from inference.observation import Observation, parts, take
from inference.seeds import stream

from .draws import array, beside, draw, values_of
from .style import labels_of

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["AXES", "View", "exact_of", "single", "view", "view_of"]

GRID = {1: 201, 2: 45}  # points of a grid along each of one or two latents
ROWS = 1 << 12  # points of one call with gradients
AXES = ("up", "across")  # of a grid over two latents; of one latent the last of them


@dataclass(frozen=True)
class View:
    """One problem, as a circuit sees it.

    Attributes:
        guide: the circuit.
        x: observation of the problem alone.
        points: reference draws, packed, (S, D); those on the edge of a support are left out.
    """

    guide: Guide
    x: Observation
    points: Tensor

    @property
    def latents(self) -> Latents:
        """Of the model."""
        return self.guide.latents

    @property
    def labels(self) -> list[str]:
        """Names of packed latents, which say where these are not the latents themselves."""
        names, lat = [], self.latents
        for s in lat.sites:
            own = labels_of({s.name: lat.splits[s.name]})
            v = (
                torch.linspace(-1, 1, len(own))
                .to(parts(lat.like)[0])
                .reshape(s.unconstrained_shape)
            )
            same = s.shape == s.unconstrained_shape and torch.equal(s.transform(v), v)
            names += own if same else [f"{name}, unconstrained" for name in own]
        return names

    def grid(self) -> dict[str, Tensor]:
        """Values along each of one or two latents: around all but the outermost draws."""
        low, high = self.points.quantile(self.points.new_tensor([0.005, 0.995]), 0)
        edge = 0.2 * (high - low)
        ends = zip((low - edge).tolist(), (high + edge).tolist(), strict=True)
        lines = [torch.linspace(a, b, GRID[self.latents.size]).to(self.points) for a, b in ends]
        return dict(zip(AXES[-len(lines) :], lines[::-1], strict=True))

    def density(self, grid: dict[str, Tensor]) -> Tensor:
        """p(u given x) on a grid, relative to its largest value."""
        u = places(grid)
        with torch.no_grad():
            log_p = self.latents.log_density(u.flatten(0, -2)[:, None], self.x).reshape(
                u.shape[:-1]
            )
        log_p = log_p.masked_fill(~log_p.isfinite(), -torch.inf)
        return (log_p - log_p.max()).exp()

    def true_score(self, u: Tensor) -> Tensor:
        """d log p(x, u) / du at u (..., D), NaN where the density is zero.

        Raises:
            Incompatible: torch finds no gradient, which it says by a RuntimeError.
        """
        slopes = []
        for piece in u.flatten(0, -2).split(ROWS):
            at = piece[:, None].detach().requires_grad_()
            with torch.enable_grad():
                value = self.latents.log_density(at, self.x)
                try:
                    (slope,) = torch.autograd.grad(value.sum(), at)
                except RuntimeError as error:
                    raise Incompatible(
                        "model", expected="a log joint that autograd can differentiate",
                        got=str(error), fix="Write it in torch operations of the latents.",
                    ) from error  # fmt: skip
            slopes.append(slope.masked_fill(~value.isfinite()[..., None], torch.nan)[:, 0])
        return torch.cat(slopes).reshape(u.shape)


def view(
    guide: Guide,
    x: Observation,
    problem: int,
    *,
    reference: Guide | None,
    draws: int,
    seed: int,
    model: Any = None,
) -> View:
    """A view of one problem, with draws of a reference guide.

    Args:
        guide: the circuit.
        x: observation of B problems.
        problem: which of them.
        reference: by default `model.exact()`, and the guide itself where there is none.
        draws: number of draws.
        seed: of the draws.
        model: by default the guide's.

    Raises:
        BadInput: no such problem, or x or `draws` is wrong.
        Incompatible: some latent is discrete.
    """
    check_counts(draws=draws)
    guide.latents.require_continuous(type(guide).__name__)
    one = _one(guide, x, problem)
    model = guide.model if model is None else model
    judge = reference or exact_of(model) or guide
    return view_of(guide, one, draw(model, judge, one, draws=draws, chains=1, seed=stream(seed, 1)))


def view_of(guide: Guide, x: Observation, reference: DataTree, problem: int = 0) -> View:
    """A view of one problem, with draws that are there: of x, by the reference guide."""
    z = values_of(reference, guide)
    u = guide.latents.pack({n: v.flatten(0, 1)[:, problem, None] for n, v in z.items()})[0][:, 0]
    return View(guide, _one(guide, x, problem), u[u.isfinite().all(-1)])


def places(grid: dict[str, Tensor]) -> Tensor:
    """The points of a grid, (..., D)."""
    return torch.stack(torch.meshgrid(*grid.values(), indexing="ij")[::-1], -1)


def single(t: Tensor) -> Any:
    """An array in single precision: for pictures."""
    return array(t).astype(np.float32)


def _one(guide: Guide, x: Observation, problem: int) -> Observation:
    """One problem, beside the guide."""
    lat = guide.latents
    lat.check(x)
    if not 0 <= problem < lat.problems(x):
        known = f"0 to {lat.problems(x) - 1}"
        raise BadInput("problem", expected=known, got=str(problem), fix="problem=0.")
    x = beside(guide, x)
    return take(x, slice(problem, problem + 1)) if lat.plated else x


def exact_of(model: Any) -> Guide | None:
    """The model's exact posterior, if it has one."""
    try:
        guide: Guide = model.exact()
    except NotImplementedError:
        return None
    return guide
