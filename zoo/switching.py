"""A discrete cause, and latents that are linear Gaussian once it is known."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Categorical, MultivariateNormal

from inference.guide import Draws, Guide, check_counts
from inference.latents import Values
from inference.objectives.elbo import ELBO
from inference.observation import Observation
from inference.seeds import seeded

from .mixture import IsMixture

__all__ = ["SwitchingPosterior"]


class SwitchingPosterior(Guide):
    """p(c given x) by enumeration, then p(s given c, x) in closed form.

    The first site is the cause, a state 0 to K - 1 of the model's components; the others, packed
    in order, are the Gaussian latents of a system.

    Args:
        model: says what its components are, by `components(x)`.
    """

    kind: ClassVar[str] = "closed_form"
    objective = ELBO
    model: IsMixture

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        log_joint, _, _ = self._parts(x)
        return log_joint.logsumexp(-1)

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Error of the posterior by quantity, (B,): zero."""
        return {"log_evidence": torch.zeros(self.latents.problems(x))}

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """log p(z given x) of latents (..., B, *shape): shape (..., B), in nats."""
        log_joint, loc, tril = self._parts(x)
        cause, *others = self.latents.sites
        pick = z[cause.name].long()
        rest = [z[s.name].reshape(*pick.shape, -1) for s in others]
        chosen = Categorical(logits=log_joint, validate_args=False).log_prob(pick)
        score: Tensor = chosen + self._given(pick, loc, tril).log_prob(torch.cat(rest, -1))
        return score

    def forward(self, x: Observation) -> Values:
        """Sample the cause, then the latents it leaves, inside the plate "data"."""
        log_joint, loc, tril = self._parts(x)
        cause = self.latents.sites[0]
        with self.latents.plate(x):
            which = pyro.sample(
                "_cause", dist.Categorical(logits=log_joint), infer={"is_auxiliary": True}
            )
            given = self._given(which, loc, tril)
            packed = pyro.sample(
                "_rest",
                dist.MultivariateNormal(given.loc, scale_tril=given.scale_tril),
                infer={"is_auxiliary": True},
            )
            pieces = self._split(packed)
            pieces[cause.name] = which.to(cause.dtype)
            return self.sample_sites(lambda s: dist.Delta(pieces[s.name], event_dim=s.event_dim))

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws; `stats` has log q."""
        check_counts(draws=draws, chains=chains)
        self.latents.check(x)
        cause = self.latents.sites[0]
        with torch.no_grad(), seeded(seed):
            log_joint, loc, tril = self._parts(x)
            causes = Categorical(logits=log_joint, validate_args=False)
            pick = causes.sample(torch.Size([chains, draws]))
            given = self._given(pick, loc, tril)
            packed = given.sample()
            log_q = causes.log_prob(pick) + given.log_prob(packed)
            values = {cause.name: pick.to(cause.dtype), **self._split(packed)}
            return Draws(values, {"log_q": log_q})

    def _parts(self, x: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """log p(c, x) of shape (B, K), means (B, K, D) and factors (K, D, D)."""
        log_prior, system, y = self.model.components(x)
        loc, tril = system.posterior(y)
        log_joint = (log_prior[:, None] + system.log_evidence(y)).T
        return log_joint, loc.movedim(0, 1), tril[:, 0]

    def _given(self, pick: Tensor, loc: Tensor, tril: Tensor) -> Any:
        rows = torch.arange(len(loc), device=loc.device)
        return MultivariateNormal(loc[rows, pick], scale_tril=tril[pick], validate_args=False)

    def _split(self, packed: Tensor) -> Values:
        others = self.latents.sites[1:]
        pieces = packed.split([s.shape.numel() for s in others], -1)
        lead = packed.shape[:-1]
        return {s.name: p.reshape(*lead, *s.shape) for s, p in zip(others, pieces, strict=True)}
