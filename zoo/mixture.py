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
CELLS = 1 << 24  # scores of one chunk, draws x components; bounds memory


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
        step = max(1, min(MAX_ROWS, CELLS // self.loc.shape[1]))
        pieces = [self._score(rows[:, b], b, step) for b in range(rows.shape[1])]
        return torch.stack(pieces, -1).reshape(value.shape[:-1]).to(value.dtype)

    def _score(self, z: Tensor, b: int, step: int) -> Tensor:
        """Draws (S, D) of problem b: (S,)."""
        d, k = z.shape[-1], len(self.precision)
        i, j = torch.triu_indices(d, d, device=z.device)
        twice = torch.where(i == j, 0.5, 1.0).to(z)
        quadratic = (-self.precision[:, i, j] * twice).T  # (D (D + 1) / 2, K)
        linear = (self.precision @ self.loc[b, ..., None])[..., 0]  # (K, D)
        offset = self.component.logits[b] - (linear * self.loc[b]).sum(-1) / 2
        offset = offset + torch.logdet(self.precision) / 2 - d / 2 * math.log(2 * math.pi)
        weights = torch.cat([quadratic, linear.T, offset.reshape(1, k)])
        found = []
        for piece in z.split(step):
            ones = torch.ones_like(piece[:, :1])
            features = torch.cat([piece[:, i] * piece[:, j], piece, ones], -1)
            found.append((features @ weights).logsumexp(-1))
        return torch.cat(found)


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
