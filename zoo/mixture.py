"""Mixtures of Gaussians: posteriors with modes, and weights that depend on x."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, constraints

from inference.latents import MAX_ROWS, ModelLike
from inference.observation import Observation

from .exact import ClosedForm
from .linear_gaussian import LinearGaussian, precision_to_tril

__all__ = ["GaussianMixture", "IsMixture", "MixturePosterior"]

_Shape = torch.Size | list[int] | tuple[int, ...]
CELLS = 1 << 20  # scores of one chunk, draws x components; more would leave the cache


class GaussianMixture(Distribution):
    """sum_k w_bk Normal(loc_bk, precision_k^-1), batch (B,), event (D,).

    Scores are quadratic forms in the natural parameters, one matrix product for all components,
    in float64: 4,096 components of 12 latents take a microsecond per draw and component.

    Args:
        logits: of the weights, (B, K), normalised or not.
        loc: (B, K, D).
        precision: (K, D, D), shared by the problems.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, precision: Tensor) -> None:
        super().__init__(loc.shape[:1], loc.shape[2:], validate_args=False)
        self.component = Categorical(logits=logits.double(), validate_args=False)
        self.loc, self.precision = loc.double(), precision.double()
        self.dtype = loc.dtype

    @property
    def mean(self) -> Tensor:
        """(B, D)."""
        mean: Tensor = (self.component.probs[..., None] * self.loc).sum(1)
        return mean.to(self.dtype)

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, D)."""
        pick = self.component.sample(torch.Size(sample_shape))
        rows = torch.arange(len(self.loc), device=pick.device)
        tril = precision_to_tril(self.precision).to(self.dtype)[pick]
        loc = self.loc.to(self.dtype)[rows, pick]
        noise = torch.randn_like(loc)
        return loc + (tril @ noise[..., None])[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (..., B), in nats."""
        rows = value.reshape(-1, *self.loc.shape[::2]).double()  # (S, B, D)
        d, k = rows.shape[-1], self.loc.shape[1]
        i, j = torch.triu_indices(d, d, device=rows.device)
        twice = torch.where(i == j, 0.5, 1.0).to(rows)
        quadratic = (-self.precision[:, i, j] * twice).T  # (D (D + 1) / 2, K)
        # entries that all components share, often most of them, stay out of the big product
        common, quadratic = quadratic[:, 0], quadratic - quadratic[:, :1]
        varied = quadratic.ne(0).any(1)
        linear = (self.precision @ self.loc.permute(1, 2, 0)).permute(2, 1, 0)  # (B, D, K)
        offset = self.component.logits - (linear * self.loc.mT).sum(1) / 2
        offset = offset + torch.logdet(self.precision) / 2 - d / 2 * math.log(2 * math.pi)

        def score(z: Tensor, b: int) -> Tensor:
            pairs = z[:, i] * z[:, j]
            features = torch.cat([pairs[:, varied], z, torch.ones_like(z[:, :1])], -1)
            weights = torch.cat([quadratic[varied], linear[b], offset[b].reshape(1, k)])
            return (features @ weights).logsumexp(-1) + pairs @ common

        step = max(1, min(MAX_ROWS, CELLS // k))
        found = [[score(z, b) for z in rows[:, b].split(step)] for b in range(rows.shape[1])]
        scores = torch.stack([torch.cat(pieces) for pieces in found], -1)
        return scores.reshape(value.shape[:-1]).to(value.dtype)


class IsMixture(ModelLike, Protocol):
    """A model that is linear Gaussian once a discrete cause is known."""

    def components(self, x: Observation) -> tuple[Tensor, LinearGaussian, Tensor]:
        """Log prior weights (K,), systems with leading axes (K, 1), and y of shape (B, F)."""


class MixturePosterior(ClosedForm):
    """sum_k p(k given x) Normal(m_k(x), L_k^-1), the assignments k enumerated.

    Args:
        model: says what its components are, by `components(x)`.
    """

    model: IsMixture

    def distribution(self, x: Observation) -> GaussianMixture:
        """Gaussian mixture: batch (B,), event (D,)."""
        log_prior, system, y = self.model.components(x)
        loc = system.posterior(y)[0].movedim(0, 1)  # (B, K, D)
        precision = system.posterior_precision()[:, 0].expand(loc.shape[1], -1, -1)
        return GaussianMixture((log_prior[:, None] + system.log_evidence(y)).T, loc, precision)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        log_prior, system, y = self.model.components(x)
        evidence: Tensor = (log_prior[:, None] + system.log_evidence(y)).logsumexp(0)
        return evidence
