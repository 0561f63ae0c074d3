"""Pyro's own autoguides at the table: parameters per problem, nothing amortised."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import autoguide
from torch import nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from ..bound import BoundGuide
from ..latents import ModelLike
from ..noise import CorrelatedNoise, PrivateNoise
from ..objectives.elbo import ELBO
from ..observation import Observation, take

__all__ = ["AutoMultivariateNormal", "AutoNormal"]


class _Auto(BoundGuide):
    """Pyro's autoguides, made when x is known."""

    objective = ELBO

    def __init__(self, model: ModelLike) -> None:
        super().__init__(model)
        self.auto = nn.ModuleList()

    def create(self, x: Observation) -> None:
        """Pyro's guides for the problems of x."""
        self.auto = nn.ModuleList(self._make(x))

    def _make(self, x: Observation) -> list[autoguide.AutoGuide]:
        raise NotImplementedError

    def _started(self, guide: autoguide.AutoGuide, x: Observation) -> autoguide.AutoGuide:
        guide._setup_prototype(x)
        return guide


class AutoNormal(_Auto, PrivateNoise):
    """Pyro's `AutoNormal`: an independent Normal per latent, fitted to each problem on its own.

    Args:
        model: any model with continuous latents.
    """

    def _make(self, x: Observation) -> list[autoguide.AutoGuide]:
        return [self._started(autoguide.AutoNormal(self.model), x)]

    def distribution(self, x: Observation) -> Distribution:
        """Independent Normal: batch (B,), event (D,)."""
        lat, copies = self.latents, self.copies(x)
        only: Any = self.auto[0]
        pairs = [only._get_loc_and_scale(name) for name in lat.names]
        b = lat.problems(x) // copies
        loc, scale = (torch.cat([p[k].reshape(b, -1) for p in pairs], -1) for k in (0, 1))
        loc, scale = loc.repeat(copies, 1), scale.repeat(copies, 1)
        return Independent(Normal(loc, scale, validate_args=False), 1)


class AutoMultivariateNormal(_Auto, CorrelatedNoise):
    """Pyro's `AutoMultivariateNormal`, one for each problem: Gaussians with all correlations.

    Args:
        model: any model with continuous latents.

    Differences:
        On its own Pyro's guide would join all B problems in one Gaussian over B D latents, whose
        correlations between problems are zero at the optimum and noise before it.
    """

    def _make(self, x: Observation) -> list[autoguide.AutoGuide]:
        make: Any = autoguide.AutoMultivariateNormal
        rows = [slice(i, i + 1) for i in range(self.latents.problems(x))]
        problems = [take(x, row) for row in rows] if self.latents.plated else [x]
        return [self._started(make(self.model), problem) for problem in problems]

    def distribution(self, x: Observation) -> Distribution:
        """Multivariate Normal: batch (B,), event (D,)."""
        copies = self.copies(x)
        guides: Any = self.auto
        posteriors = [guide.get_posterior() for guide in guides]
        loc = torch.stack([q.loc for q in posteriors]).repeat(copies, 1)
        tril = torch.stack([q.scale_tril for q in posteriors]).repeat(copies, 1, 1)
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)
