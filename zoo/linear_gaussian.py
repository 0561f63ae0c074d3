"""Linear Gaussian systems: the algebra that many exact posteriors share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from inference.latents import ModelLike
from inference.observation import Observation

from .exact import ClosedForm

__all__ = ["IsLinearGaussian", "LinearGaussian", "LinearGaussianPosterior", "precision_to_tril"]


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ Normal(mean, precision^-1); y given z ~ Normal(weights z + offset, diag(noise^2)).

    All leading axes `...` are batches and broadcast: assignments, grid points, problems. The
    algebra is done in float64, for with little noise the precision is ill-conditioned.

    Attributes:
        mean: (..., D).
        precision: of the prior, (..., D, D).
        weights: (..., F, D).
        offset: (..., F), or anything that broadcasts to it.
        noise: standard deviations, (..., F), or anything that broadcasts to it.
    """

    mean: Tensor
    precision: Tensor
    weights: Tensor
    offset: Tensor
    noise: Tensor

    def posterior_precision(self) -> Tensor:
        """L = P + W' N^-2 W, (..., D, D), in float64."""
        scaled = self._scaled_weights()
        total: Tensor = self.precision.double() + scaled.mT @ scaled
        return total

    def posterior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (..., D) and Cholesky factor of the covariance (..., D, D), in the dtype of y."""
        precision = self.posterior_precision()
        loc = self._mean(y, torch.linalg.cholesky(precision))
        return loc.to(y.dtype), precision_to_tril(precision).to(y.dtype)

    def log_evidence(self, y: Tensor) -> Tensor:
        """log p(y), (...), in nats: log p(y, z) - log p(z given y) at the posterior mean z.

        There it is a sum of squared residuals, without the cancellation of the textbook formula,
        and no F x F matrix is needed.
        """
        factor = torch.linalg.cholesky(self.posterior_precision())
        loc = self._mean(y, factor)
        prior = torch.linalg.cholesky(self.precision.double())
        noise = self._noise()
        error = (y.double() - self._predict(loc)) / noise
        shift = (prior.mT @ (loc - self.mean.double())[..., None])[..., 0]
        squares = error.square().sum(-1) + shift.square().sum(-1)
        volume = 2 * (_log_det(factor) - _log_det(prior) + noise.log().sum(-1))
        constant = self.weights.shape[-2] * math.log(2 * math.pi)
        evidence: Tensor = -0.5 * (squares + volume + constant)
        return evidence.to(y.dtype)

    def _noise(self) -> Tensor:
        return self.noise.double().expand(*self.noise.shape[:-1], self.weights.shape[-2])

    def _scaled_weights(self) -> Tensor:
        return self.weights.double() / self._noise()[..., None]

    def _predict(self, z: Tensor) -> Tensor:
        return (self.weights.double() @ z[..., None])[..., 0] + self.offset.double()

    def _mean(self, y: Tensor, factor: Tensor) -> Tensor:
        """Posterior mean, as the prior mean plus what the residual asks for."""
        origin = self.mean.double()
        error = (y.double() - self._predict(origin)) / self._noise()
        drive = (self._scaled_weights().mT @ error[..., None])[..., 0]
        if factor.dim() > 2 and factor.shape[-3] == 1:  # problems share it: one solve for them all
            lead = torch.broadcast_shapes(drive.shape[:-2], factor.shape[:-3])
            right = drive.expand(*lead, *drive.shape[-2:]).mT
            return origin + torch.cholesky_solve(right, factor[..., 0, :, :]).mT
        batch = torch.broadcast_shapes(drive.shape[:-1], factor.shape[:-2])
        wide = factor.expand(*batch, *factor.shape[-2:])
        step = torch.cholesky_solve(drive.expand(*batch, -1)[..., None], wide)[..., 0]
        return origin + step


def _log_det(factor: Tensor) -> Tensor:
    """Half the log determinant of factor factor', (...)."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def precision_to_tril(precision: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse, (..., D, D)."""
    origin = precision.new_zeros(precision.shape[-1])
    normal = MultivariateNormal(origin, precision_matrix=precision, validate_args=False)
    tril: Tensor = normal.scale_tril
    return tril


class IsLinearGaussian(ModelLike, Protocol):
    """A model whose packed latents and observation are jointly Gaussian."""

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system and what it observes, y of shape (B, F), of an observation of B problems."""


class LinearGaussianPosterior(ClosedForm):
    """z given x ~ Normal(m + L^-1 W' N^-2 (y - W m - o), L^-1), L = P + W' N^-2 W.

    Args:
        model: says what its system is, by `linear_gaussian(x)`.
    """

    model: IsLinearGaussian

    def distribution(self, x: Observation) -> Distribution:
        """Multivariate Normal: batch (B,), event (D,)."""
        system, y = self.model.linear_gaussian(x)
        loc, tril = system.posterior(y)
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        system, y = self.model.linear_gaussian(x)
        return system.log_evidence(y)

    def precision(self, x: Observation | None = None) -> Tensor:
        """Posterior precision L, (D, D) or (B, D, D) where it depends on x, in float64."""
        system, _ = self.model.linear_gaussian(self.model.observations() if x is None else x)
        return system.posterior_precision()

    def mean_field_gap(self, x: Observation | None = None) -> Tensor:
        """KL(q || p) of the best factorised Gaussian, (1/2)(sum log L_ii - log det L), in nats."""
        precision = self.precision(x).detach()
        diagonal = precision.diagonal(dim1=-2, dim2=-1)
        return (diagonal.log().sum(-1) - torch.logdet(precision)) / 2
