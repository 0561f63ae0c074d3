"""Pyro's own autoguides at the table: parameters per problem, nothing amortised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.infer import autoguide
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from ..errors import BadInput
from ..latents import ModelLike
from ..noise import CorrelatedNoise, GaussianNoise, PrivateNoise
from ..objectives.elbo import ELBO
from ..observation import Observation, parts, repeat, size, take
from ..seeds import seeded

__all__ = ["AutoMultivariateNormal", "AutoNormal"]


class _Bound(GaussianNoise):
    """A guide with parameters for the problems of one observation, made by `bind`.

    Raises:
        BadInput: asked about an observation it was not fitted to.
    """

    objective = ELBO
    amortised = False

    def __init__(self, model: ModelLike) -> None:
        super().__init__(model)
        self.auto = nn.ModuleList()
        self.bound = 0

    def bind(self, x: Observation) -> None:
        """Create Pyro's guide for x; a guide already bound to the same x keeps its parameters."""
        self.latents.check(x)
        if self.bound and all(map(torch.equal, parts(x), self._bound_parts())):
            return
        for k, t in enumerate(parts(x)):
            self.register_buffer(f"x_{k}", t.clone())
        self.bound = len(parts(x))
        with pyro.settings.context(module_local_params=True), seeded(0):
            self.auto = nn.ModuleList(self._make(x))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Bind to the checkpoint's observation, then take its parameters."""
        mine = tuple(t for n, t in sorted(state.items()) if n.startswith("x_"))
        like = self.latents.like
        device = parts(like)[0].device
        x = tuple(t.to(device) for t in mine)
        self.bind(x if isinstance(like, tuple) else x[0])
        super().restore(state)

    def _make(self, x: Observation) -> list[autoguide.AutoGuide]:
        raise NotImplementedError

    def _bound_parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"x_{k}") for k in range(self.bound))

    def _copies(self, x: Observation) -> int:
        """How often x repeats the bound observation."""
        mine = self._bound_parts()
        copies = size(x) // len(mine[0]) if mine else 0
        whole = copies > 0 and size(x) == copies * len(mine[0])
        if not whole or not all(map(torch.equal, parts(x), parts(repeat(mine, copies)))):
            raise BadInput(
                "x",
                expected="the observation this guide was fitted to",
                got="another one" if mine else "a guide that has not been fitted",
                fix=f"Call fit(model, {type(self).__name__}(model), x) first, or use an encoder.",
            )
        return copies

    def _started(self, guide: autoguide.AutoGuide, x: Observation) -> autoguide.AutoGuide:
        guide._setup_prototype(x)
        return guide


class AutoNormal(_Bound, PrivateNoise):
    """Pyro's `AutoNormal`: an independent Normal per latent, fitted to each problem on its own.

    Args:
        model: any model with continuous latents.
    """

    def _make(self, x: Observation) -> list[autoguide.AutoGuide]:
        return [self._started(autoguide.AutoNormal(self.model), x)]

    def distribution(self, x: Observation) -> Distribution:
        """Independent Normal: batch (B,), event (D,)."""
        lat, copies = self.latents, self._copies(x)
        only: Any = self.auto[0]
        pairs = [only._get_loc_and_scale(name) for name in lat.names]
        b = lat.problems(x) // copies
        loc, scale = (torch.cat([p[k].reshape(b, -1) for p in pairs], -1) for k in (0, 1))
        loc, scale = loc.repeat(copies, 1), scale.repeat(copies, 1)
        return Independent(Normal(loc, scale, validate_args=False), 1)


class AutoMultivariateNormal(_Bound, CorrelatedNoise):
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
        copies = self._copies(x)
        guides: Any = self.auto
        posteriors = [guide.get_posterior() for guide in guides]
        loc = torch.stack([q.loc for q in posteriors]).repeat(copies, 1)
        tril = torch.stack([q.scale_tril for q in posteriors]).repeat(copies, 1, 1)
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)
