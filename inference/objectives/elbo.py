"""The evidence lower bound: a game with one player."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyro.infer import Trace_ELBO
from torch import Tensor

from ..arguments import Count
from ..guide import HasDensity
from ..objective import Objective
from ..observation import repeat

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = ["ELBO"]


class ELBO(Objective):
    """Minimise KL(q || p): loss = -E_q[log p(x, z) - log q(z given x)], in nats per problem.

    Pyro's estimators do the work, so discrete guides get their control variates. With an exact
    posterior as guide the bound is tight, and `learn_model=True` is maximum likelihood.

    Args:
        particles: draws per problem and step; handled as more problems.
        estimator: one of Pyro's ELBO estimators, a subclass of Trace_ELBO.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), equation 3
        https://arxiv.org/abs/1312.6114
    """

    needs = HasDensity
    learns_model = True
    remedy = "An implicit guide needs an objective made for draws; ELBO needs log q."

    def __init__(self, *, particles: Count = 1, estimator: type[Trace_ELBO] = Trace_ELBO) -> None:
        super().__init__(particles=particles, estimator=estimator.__name__)
        self.particles = particles
        self.estimator = estimator()

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": -ELBO / B}."""
        lat = guide.latents
        rounds = self.particles
        if lat.plated:
            x, rounds = repeat(x, self.particles), 1
        loss = sum(self.estimator.differentiable_loss(model, guide, x) for _ in range(rounds))
        return {"guide": loss / (lat.problems(x) * rounds)}
