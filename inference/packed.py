"""Guides with a density over the packed, unconstrained latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from .guide import Draws, Guide, check_counts
from .latents import Latents, ModelLike, Values
from .observation import Observation
from .seeds import seeded

__all__ = ["PackedGuide"]


class PackedGuide(Guide):
    """A guide given by one distribution over the unconstrained vector u = pack(z).

    The process is u ~ distribution(x), an auxiliary site, and each latent is the deterministic
    image of its part of u, with the log-Jacobian as density. Subclasses write `distribution`.
    """

    def __init__(self, model: ModelLike, **knobs: Any) -> None:
        super().__init__(model, **knobs)
        self.latents.require_continuous(type(self).__name__)

    def distribution(self, x: Observation) -> Distribution:
        """q(u given x): batch shape (B,), event shape (D,)."""
        raise NotImplementedError

    def forward(self, x: Observation) -> Values:
        """Sample the latent sites inside the plate "data"; returns them by name."""
        lat = self.latents
        with lat.plate(x):
            q = _ForPyro(self.distribution(x), 0 if lat.plated else 1)
            u = pyro.sample("_packed", q, infer={"is_auxiliary": True})
            z, jacobians = lat.unpack(u)
            keep = (lambda t: t) if lat.plated else _drop_problem_axis(lat)
            return {
                s.name: pyro.sample(
                    s.name,
                    dist.Delta(
                        keep(z[s.name]),
                        -keep(jacobians[s.name]),
                        event_dim=len(s.shape),
                    ),
                )
                for s in lat.sites
            }

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """log q(z given x) of latents (..., B, *shape): shape (..., B), in nats."""
        u, log_jacobian = self.latents.pack(z)
        log_q: Tensor = self.distribution(x).log_prob(u)
        return log_q - log_jacobian

    def rsample(self, x: Observation) -> Tensor:
        """One differentiable packed draw per problem, (B, D)."""
        u: Tensor = self.distribution(x).rsample()
        return u

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws, with x encoded once; `stats` has log q."""
        check_counts(draws=draws, chains=chains)
        lat = self.latents
        lat.check(x)
        with torch.no_grad(), seeded(seed):
            q = self.distribution(x)
            u = q.sample(torch.Size([chains, draws]))
            z, jacobians = lat.unpack(u)
            log_q = q.log_prob(u) - torch.stack(list(jacobians.values())).sum(0)
        return Draws(z, {"log_q": log_q})


def _drop_problem_axis(lat: Latents) -> Callable[[Tensor], Tensor]:
    """Where the data set is one problem, Pyro's sites have no axis for it."""

    def drop(t: Tensor) -> Tensor:
        return t.squeeze(0)

    return drop


class _ForPyro(TorchDistribution):  # type: ignore[misc]
    """Any torch distribution, zuko's included, as a Pyro distribution."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base: Distribution, event_axes: int = 0) -> None:
        self.base, self.event_axes = base, event_axes
        shape = base.batch_shape + base.event_shape
        cut = len(base.batch_shape) - event_axes
        super().__init__(shape[:cut], shape[cut:], validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients."""
        return bool(self.base.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        """All of R^D."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> _ForPyro:
        """The same distribution for more batch dims."""
        own = self.base.batch_shape[len(self.base.batch_shape) - self.event_axes :]
        return _ForPyro(self.base.expand(torch.Size(batch_shape) + own), self.event_axes)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients."""
        value: Tensor = self.base.rsample(sample_shape)
        return value

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws without gradients."""
        value: Tensor = self.base.sample(sample_shape)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, summed over the axes declared as event."""
        score: Tensor = self.base.log_prob(value)
        return score.sum(list(range(-self.event_axes, 0))) if self.event_axes else score
