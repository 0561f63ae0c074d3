"""Guides with a density over the packed, unconstrained latents."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from .errors import BadInput
from .guide import Draws, Guide, check_counts
from .latents import ModelLike, Site, Values
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
        """q(u given x): batch shape (B,), event shape (D,).

        A data set that is one problem, where no latent is inside the plate "data", has B = 1,
        however many rows it has: batch shape (1,), means of shape (1, D). Pool over rows.
        """
        raise NotImplementedError

    def _checked(self, x: Observation) -> Distribution:
        """`distribution(x)`, which is the user's.

        Raises:
            BadInput: its shape is wrong.
        """
        q, lat = self.distribution(x), self.latents
        batch, event = (lat.problems(x),), (lat.size,)
        if tuple(q.batch_shape) != batch or tuple(q.event_shape) != event:
            raise BadInput(
                f"{type(self).__name__}.distribution",
                expected=f"batch shape {batch}, one for each problem, and event shape {event}",
                got=f"{tuple(q.batch_shape)} and {tuple(q.event_shape)}",
                fix="Make the last axis the event, with Independent(q, 1)."
                if lat.plated
                else "The data set is one problem here: pool over its rows, and let the last axis "
                "be the event, as in Independent(Normal(loc, scale), 1) of loc (1, D).",
            )
        return q

    def forward(self, x: Observation) -> Values:
        """Sample the latent sites inside the plate "data"; returns them by name."""
        lat = self.latents
        base = self._checked(x)
        with lat.plate(x):
            q = _ForPyro(base, inner=lat.inner, whole=not lat.plated)
            u = q.squeeze(pyro.sample("_packed", q, infer={"is_auxiliary": True}))
            z, jacobians = lat.unpack(u)

            def image(s: Site) -> dist.Delta:
                value, log_jacobian = z[s.name], jacobians[s.name]
                if not lat.plated:
                    value, log_jacobian = value.squeeze(0), log_jacobian.squeeze(0)
                # the Jacobian belongs to the problem: share it out over the axes of inner plates
                batch = value.shape[: value.dim() - s.event_dim]
                shares = batch[log_jacobian.dim() :]
                each = log_jacobian / shares.numel()
                each = each.reshape(log_jacobian.shape + torch.Size([1] * len(shares)))
                return dist.Delta(value, -each.expand(batch), event_dim=s.event_dim)

            return self.sample_sites(image)

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """log q(z given x) of latents (..., B, *shape): shape (..., B), in nats."""
        u, log_jacobian = self.latents.pack(z)
        log_q: Tensor = self._checked(x).log_prob(u)
        return log_q - log_jacobian

    def rsample(self, x: Observation, shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Differentiable packed draws (*shape, B, D)."""
        u: Tensor = self._checked(x).rsample(shape)
        return u

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws, with x encoded once; `stats` has log q."""
        check_counts(draws=draws, chains=chains)
        lat = self.latents
        lat.check(x)
        with torch.no_grad(), seeded(seed):
            q = self._checked(x)
            return self.told(q.sample(torch.Size([chains, draws])), q)

    def told(self, u: Tensor, q: Distribution) -> Draws:
        """Packed draws (chains, draws, B, D) of q as latents; `stats` has log q."""
        z, jacobians = self.latents.unpack(u)
        return Draws(z, {"log_q": q.log_prob(u) - torch.stack(list(jacobians.values())).sum(0)})


class _ForPyro(TorchDistribution):  # type: ignore[misc]
    """Any torch distribution over (B, D), zuko's included, as a Pyro distribution.

    Args:
        base: batch (..., B), event (D,).
        inner: axes of size one to stand to the right of B, for the model's inner plates.
        whole: B is one problem without a plate: its axis belongs to the event.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base: Distribution, *, inner: int, whole: bool) -> None:
        self.base, self.inner, self.whole = base, 0 if whole else inner, whole
        batch, event = base.batch_shape, base.event_shape
        if whole:
            batch, event = batch[:-1], batch[-1:] + event
        ones = torch.Size([1] * self.inner)
        super().__init__(batch + ones, event, validate_args=False)

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
        batch = torch.Size(batch_shape)
        if batch == self.batch_shape:
            return self
        batch = batch[: len(batch) - self.inner] + (
            self.base.batch_shape[-1:] if self.whole else ()
        )
        return _ForPyro(self.base.expand(torch.Size(batch)), inner=self.inner, whole=self.whole)

    def squeeze(self, value: Tensor) -> Tensor:
        """Take the inner axes out again: (..., B, 1, ..., D) to (..., B, D)."""
        return value.reshape(*value.shape[: value.dim() - 1 - self.inner], value.shape[-1])

    def _pad(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape[:-1], *[1] * self.inner, value.shape[-1])

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients."""
        return self._pad(self.base.rsample(sample_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws without gradients."""
        return self._pad(self.base.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, batch-shaped."""
        score: Tensor = self.base.log_prob(self.squeeze(value))
        return score.sum(-1) if self.whole else score.reshape(*score.shape, *[1] * self.inner)
