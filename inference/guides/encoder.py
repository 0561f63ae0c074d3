"""Amortised Gaussian encoders: the mean-field baseline, and the one with all correlations."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal
from torch.nn.functional import softplus

from ..arguments import Count, Index
from ..latents import Latents, ModelLike
from ..noise import CorrelatedNoise, PrivateNoise
from ..objectives.elbo import ELBO
from ..observation import Observation, flatten
from ..seeds import seeded
from ..units import Units, pilot, squash

__all__ = ["Encoder", "FullCovarianceEncoder", "MeanFieldEncoder"]

SOFTPLUS_ONE = math.log(math.e - 1)  # softplus(SOFTPLUS_ONE) = 1: encoders start at the prior
SMALLEST = (
    1e-4  # floor of a scale, in prior scales: no overflow for observations far from the joint
)


class Encoder(Units):
    """x to `outputs` numbers, the first D of them a mean, all zero at the start.

    A multilayer perceptron gives them all and a linear map adds to the mean. The perceptron sees
    inputs squashed at ten scales, so that one pixel far from the model cannot upset a covariance.
    Inputs are standardised, and packed latents get their prior centre and scale.

    Args:
        latents: of the model; names the problem and makes the draws.
        outputs: numbers per problem.
        hidden: widths of the hidden layers.
        seed: of the initial weights.
    """

    def __init__(self, latents: Latents, outputs: int, hidden: tuple[int, ...], seed: int) -> None:
        features, z = pilot(latents)
        super().__init__(features, latents.pack(z)[0])
        widths = [features.shape[1], *hidden, outputs]
        layers: list[nn.Module] = []
        with seeded(seed):
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), nn.SiLU()]
            self.linear = nn.Linear(features.shape[1], latents.size)
        self.deep = nn.Sequential(*layers[:-1])
        for layer in (self.linear, self.deep[-1]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        self.to(features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) to (B, outputs)."""
        scaled = self.standardise(features)
        deep: Tensor = self.deep(squash(scaled))
        d = self.linear.out_features
        return torch.cat([deep[..., :d] + self.linear(scaled), deep[..., d:]], -1)


class MeanFieldEncoder(PrivateNoise):
    """The classic recognition network: independent Gaussians, read off x.

    u_i ~ Normal(m_i(x), s_i(x)), independent over i in 1..D.

    Where the posterior is Gaussian with precision L, its best fit by ELBO has variance 1 / L_ii,
    which is too small, and misses log p(x) by (1/2) (sum log L_ii - log det L) nats.

    Args:
        model: any model with continuous latents.
        hidden: widths of the hidden layers.
        seed: of the initial weights.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        https://arxiv.org/abs/1312.6114
    """

    objective = ELBO

    def __init__(
        self, model: ModelLike, *, hidden: tuple[Count, ...] = (64, 64), seed: Index = 0
    ) -> None:
        super().__init__(model, hidden=hidden, seed=seed)
        self.encoder = Encoder(self.latents, 2 * self.latents.size, hidden, seed)

    def distribution(self, x: Observation) -> Distribution:
        """Independent Normal: batch (B,), event (D,)."""
        e = self.encoder
        loc, raw = e(flatten(x, self.latents.problems(x))).chunk(2, -1)
        scale = e.u_scale * positive(raw)
        return Independent(Normal(e.u_loc + e.u_scale * loc, scale, validate_args=False), 1)


class FullCovarianceEncoder(CorrelatedNoise):
    """A recognition network with every posterior correlation.

    u ~ Normal(m(x), L(x) L(x)'), L lower triangular with a positive diagonal.

    Args:
        model: any model with continuous latents.
        hidden: widths of the hidden layers.
        seed: of the initial weights.
    """

    objective = ELBO

    def __init__(
        self, model: ModelLike, *, hidden: tuple[Count, ...] = (64, 64), seed: Index = 0
    ) -> None:
        super().__init__(model, hidden=hidden, seed=seed)
        d = self.latents.size
        self.encoder = Encoder(self.latents, 2 * d + d * (d - 1) // 2, hidden, seed)

    def distribution(self, x: Observation) -> Distribution:
        """Multivariate Normal: batch (B,), event (D,)."""
        loc, tril = self.affine(x)
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)

    def affine(self, x: Observation) -> tuple[Tensor, Tensor]:
        """Mean (B, D) and Cholesky factor (B, D, D)."""
        return gaussian_head(self.encoder, flatten(x, self.latents.problems(x)))


def positive(raw: Tensor) -> Tensor:
    """A scale that is 1 at 0."""
    return SMALLEST + (1 - SMALLEST) * softplus(raw + SOFTPLUS_ONE)


def gaussian_head(encoder: Encoder, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, D) and Cholesky factor (B, D, D) from 2 D + D (D - 1) / 2 outputs.

    The factor is marginal sds times the Cholesky factor of a correlation matrix, whose rows have
    norm one: were the rows free, float32 would lose log q in ill-conditioned factors.
    """
    d = encoder.u_loc.shape[0]
    loc, raw, below = encoder(features).split([d, d, d * (d - 1) // 2], -1)
    i, j = torch.tril_indices(d, d, -1, device=features.device)
    rows = torch.eye(d, dtype=loc.dtype, device=loc.device).repeat(len(loc), 1, 1)
    rows[:, i, j] = below
    correlations = rows / rows.norm(dim=-1, keepdim=True)
    scale = encoder.u_scale * positive(raw)
    return encoder.u_loc + encoder.u_scale * loc, scale[..., None] * correlations
