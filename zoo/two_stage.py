"""One latent or two on a grid, and the others in closed form given the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from inference.latents import ModelLike
from inference.objectives.elbo import ELBO
from inference.observation import Observation
from inference.packed import PackedGuide

from .quadrature import GridPosterior, Quadrature

__all__ = ["Gridded", "Rest", "TwoStage"]

_Shape = torch.Size | list[int] | tuple[int, ...]
Rest = Callable[[Tensor, Observation], Distribution]


class Gridded(PackedGuide):
    """A posterior that rests on a smaller model's, whose latents are on a grid.

    Args:
        model: the model.
        marginal: a Pyro program of the gridded latents alone, x observed with all others summed or
            integrated out; it has the model's evidence.
        points: grid points per axis, as in :class:`Quadrature`.
    """

    kind: ClassVar[str] = "quadrature"
    objective = ELBO

    def __init__(self, model: ModelLike, marginal: ModelLike, *, points: int | None = None) -> None:
        super().__init__(model)
        self.__dict__["grid"] = Quadrature(marginal, points=points)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        evidence: Tensor = self.grid.log_evidence(x)
        return evidence

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Error of the gridded marginal, as of :class:`Quadrature`; the rest adds none."""
        found: dict[str, Tensor] = self.grid.error(x)
        return found


class TwoStage(Gridded):
    """p(z given x) = p(g given x) p(r given g, x): g by quadrature, r in closed form.

    The marginal of g comes from a second, smaller model in which r is integrated out, so the grid
    is as fine as a one-latent grid can be.

    Args:
        model: packed latents u = (g, r), the gridded ones first.
        marginal: a Pyro program whose latents are g alone, x observed with r integrated out.
        rest: gives the law of the packed r, batch (..., B), event (D - G,), from the packed g of
            shape (..., B, G) and x.
        points: grid points per axis, as in :class:`Quadrature`.
    """

    def __init__(
        self, model: ModelLike, marginal: ModelLike, rest: Rest, *, points: int | None = None
    ) -> None:
        super().__init__(model, marginal, points=points)
        self.__dict__["rest"] = rest

    def distribution(self, x: Observation) -> Distribution:
        """Grid and rest together: batch (B,), event (D,)."""
        return _Chain(self.grid.distribution(x), lambda g: self.rest(g, x), self.latents.size)


class _Chain(Distribution):
    """First g, then r given g."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self, first: GridPosterior, second: Callable[[Tensor], Distribution], size: int
    ) -> None:
        super().__init__(first.batch_shape, torch.Size([size]), validate_args=False)
        self.first, self.second = first, second

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, D)."""
        g = self.first.sample(sample_shape)
        return torch.cat([g, self.second(g).sample()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (..., B), in nats."""
        g, r = value.tensor_split([self.first.event_shape[0]], -1)
        score: Tensor = self.first.log_prob(g) + self.second(g).log_prob(r)
        return score
