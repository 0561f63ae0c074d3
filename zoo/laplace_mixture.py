"""Two crossed ridges with a spike where they meet and heavy tails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.special import scaled_modified_bessel_k0, scaled_modified_bessel_k1

from inference.arguments import Index, Positive
from inference.errors import BadInput

from .model import Paper
from .target import Target

__all__ = ["LaplaceMixture", "SymmetricLaplace"]

TINY = 1e-30  # of z' S^-1 z: nearer to the origin the density is held constant


class LaplaceMixture(Target):
    """An unconditional X: two correlated Laplace distributions, crossed.

    k ~ Categorical(w), summed out; z given k = sqrt(W) e, W ~ Exponential(1), e ~ Normal(0, S_k),
    S_k = [[1, +-c], [+-c, 1]]; x ~ Normal(0, 1), independent of z.

    Each arm is a symmetric multivariate Laplace distribution with covariance S_k and a kurtosis of
    6 in every direction. The density is infinite at the origin, where the arms cross, and falls as
    exp(-sqrt(2) r) far out: the score explodes in the middle and does not grow in the tails, where
    that of a Gaussian grows linearly. The latents have correlation c (w_1 - w_2); with equal
    weights it is zero, and they are far from independent.

    Args:
        weights: w, of the arms with correlation c and -c.
        correlation: c, within an arm.
        seed: of the observations, which say nothing of z.

    Raises:
        BadInput: the correlation is not inside (-1, 1).

    Differences:
        The paper has equal weights, `LaplaceMixture((0.5, 0.5))`, and no observation; .2 and .8 are
        ours, for equal weights hide wrong masses.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023)
        https://arxiv.org/abs/2308.11809
    """

    title = "Laplace mixture"
    paper = Paper(
        "Chen et al.",
        2023,
        "Expressive probabilistic sampling in recurrent neural networks",
        "https://arxiv.org/abs/2308.11809",
    )
    dims = {"z": ("latent",), "x": ("feature",)}

    weights: Tensor
    correlation: Tensor

    def __init__(
        self, weights: Sequence[Positive] = (0.2, 0.8), *, correlation: float = 0.9, seed: Index = 0
    ) -> None:
        super().__init__()
        if not -1 < correlation < 1:
            raise BadInput(
                "correlation", expected="inside (-1, 1)", got=str(correlation), fix="Use 0.9."
            )
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))
        self.register_buffer("correlation", torch.tensor([correlation, -correlation]))
        self.keep_draws(torch.zeros(1, 1), seed=seed)

    def target(self) -> TorchDistribution:
        """The mixture."""
        c = self.correlation
        one, zero = torch.ones_like(c), torch.zeros_like(c)
        rows = torch.stack([one, zero], -1), torch.stack([c, (1 - c.square()).sqrt()], -1)
        arms = SymmetricLaplace(torch.stack(rows, -2))
        return dist.MixtureSameFamily(dist.Categorical(self.weights), arms)


class SymmetricLaplace(TorchDistribution):  # type: ignore[misc]
    """z = sqrt(W) L e with W ~ Exponential(1), e ~ Normal(0, I_2): mean 0, covariance S = L L'.

    The density is K_0(sqrt(2 z' S^-1 z)) / (pi |S|^(1/2)), infinite at the origin. It is held
    constant where z' S^-1 z < 1e-30, with K_0 = 34.3; a mass of 4e-29 is that near the origin.

    Args:
        tril: L, (..., 2, 2).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, tril: Tensor) -> None:
        self.tril = tril
        super().__init__(tril.shape[:-2], tril.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> SymmetricLaplace:
        """The same distribution for more batch dims."""
        return SymmetricLaplace(self.tril.expand(*batch_shape, 2, 2))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients, (..., 2)."""
        shape = self._extended_shape(sample_shape)
        e = torch.randn(shape, dtype=self.tril.dtype, device=self.tril.device)
        w = torch.empty_like(e[..., :1]).exponential_()
        z: Tensor = w.sqrt() * (self.tril * e[..., None, :]).sum(-1)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (...), in nats."""
        (a, _), (b, c) = (row.unbind(-1) for row in self.tril.unbind(-2))
        first = value[..., 0] / a
        second = (value[..., 1] - b * first) / c
        radius = (2 * (first.square() + second.square()).clamp_min(TINY)).sqrt()
        bessel: Tensor = _LogBesselK0.apply(radius)  # type: ignore[no-untyped-call]
        return bessel - (math.pi * a * c).log()


class _LogBesselK0(torch.autograd.Function):
    """log K_0, for which torch has no derivative."""

    @staticmethod
    def forward(ctx: Any, radius: Tensor) -> Tensor:
        """The value, without overflow."""
        ctx.save_for_backward(radius)
        bessel: Tensor = scaled_modified_bessel_k0(radius).log() - radius
        return bessel

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """d log K_0 / dr = -K_1 / K_0."""
        ratio: Tensor = _BesselRatio.apply(*ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return -grad * ratio


class _BesselRatio(torch.autograd.Function):
    """K_1 / K_0, with a derivative in terms of itself, so that higher ones are right too."""

    @staticmethod
    def forward(ctx: Any, radius: Tensor) -> Tensor:
        """The value, without underflow."""
        ctx.save_for_backward(radius)
        ratio: Tensor = scaled_modified_bessel_k1(radius) / scaled_modified_bessel_k0(radius)
        return ratio

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """da / dr = a^2 - a / r - 1."""
        (radius,) = ctx.saved_tensors
        ratio: Tensor = _BesselRatio.apply(radius)  # type: ignore[no-untyped-call]
        slope: Tensor = ratio.square() - ratio / radius - 1
        return grad * slope
