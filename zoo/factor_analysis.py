"""Factor analysis: linear Gaussian latents with noise of their own for every pixel."""

from __future__ import annotations

from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn

from inference.arguments import Count, Index, Positive
from inference.errors import BadInput
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper

__all__ = ["FactorAnalysis"]

NOISE_FLOOR = 0.02


class FactorAnalysis(Model):
    """A few hidden causes, added up, explain many pixels.

    z ~ Normal(0, I_D); x given z ~ Normal(W z + mu, Psi), W of shape (F, D), Psi diagonal.

    The posterior is Gaussian with precision L = I + W' Psi^-1 W, the same for every x. Columns of W
    that overlap compete to explain a pixel, so L is not diagonal: independent noise in each neuron
    cannot express it, correlated (recurrent) noise can.

    Args:
        features: F.
        latents: D.
        noise: "diagonal" (factor analysis) or "isotropic" (probabilistic PCA).
        noise_floor: smallest noise sd; pixels that never change would otherwise have none.
        seed: of the canonical loadings.

    References:
        EM algorithms for ML factor analysis (Rubin & Thayer, 1982), equations 1-3
        https://doi.org/10.1007/BF02293851
        Probabilistic Principal Component Analysis (Tipping & Bishop, 1999), for "isotropic"
        https://doi.org/10.1111/1467-9868.00196

    Example:
        >>> model = FactorAnalysis()
        >>> model.observations().shape
        torch.Size([100, 20])
    """

    title = "factor analysis"
    paper = Paper(
        "Rubin & Thayer",
        1982,
        "EM algorithms for ML factor analysis",
        "https://doi.org/10.1007/BF02293851",
        "equations 1-3",
    )
    dims = {"z": ("factor",), "x": ("pixel",)}

    def __init__(
        self,
        features: Count = 20,
        latents: Count = 8,
        *,
        noise: str = "diagonal",
        noise_floor: Positive = NOISE_FLOOR,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        sizes = {"diagonal": [features], "isotropic": []}
        if noise not in sizes:
            raise BadInput("noise", expected=" or ".join(sizes), got=repr(noise), fix="See help.")
        g = torch.Generator().manual_seed(seed)
        shared = torch.randn(features, 1, generator=g)  # common part: columns overlap
        own = torch.randn(features, latents, generator=g)
        self.loadings = nn.Parameter(0.5 * own + 0.4 * shared)
        self.mean = nn.Parameter(torch.linspace(-1.0, 2.0, features))
        sd = 0.4 + 0.8 * torch.rand(sizes[noise], generator=g)
        self.noise = PyroParam(sd, dist.constraints.greater_than(noise_floor))
        self.keep_draws(torch.zeros(1, features), seed=seed)

    @classmethod
    def for_data(cls, x: Tensor, **knobs: Any) -> Self:
        """A model for data (N, F): mean of the data, small loadings, noise that explains all."""
        model = cls(x.shape[1], **knobs)
        with torch.no_grad():
            model.mean.copy_(x.mean(0))
            model.loadings.mul_(0.2 * x.std())
        # half as much again as the floor: on it the unconstrained parameter would be infinite
        sd = x.std(0).clamp_min(1.5 * knobs.get("noise_floor", NOISE_FLOOR))
        model.noise = sd.pow(2).mean().sqrt() if model.noise.dim() == 0 else sd
        return model.belonging_to(x)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        d = self.loadings.shape[1]
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(self.loadings.new_zeros(d), 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.noise).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """W z + mu: latents (..., B, D) to (..., B, F)."""
        mean: Tensor = z["z"] @ self.loadings.T + self.mean
        return mean

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: loadings W, offset mu, noise Psi^(1/2)."""
        assert isinstance(x, Tensor)
        eye = torch.eye(self.loadings.shape[1]).to(self.loadings)
        origin = eye.new_zeros(len(eye))
        noise = self.noise.expand(self.mean.shape)
        return LinearGaussian(origin, eye, self.loadings, self.mean, noise), x

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior; it follows the model's parameters."""
        return LinearGaussianPosterior(self)
