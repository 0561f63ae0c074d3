"""Gaussian linear uniform, of the benchmark of simulation-based inference."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from inference.arguments import Positive
from inference.latents import Values
from inference.observation import Observation, size

from .exact import ClosedForm
from .model import Model
from .sbi import LUECKMANN, published, unconstrained
from .truncated import TruncatedNormal

__all__ = ["GaussianLinearUniform"]


class GaussianLinearUniform(Model):
    """Ten latents in a box, each seen once through noise: the box cuts the posterior.

    z ~ Uniform(-1, 1)^10; x given z ~ Normal(z, w I_10), with variance w.

    The posterior is Normal(x, w I) cut to the box. With noise of .32 in a box of 2, every
    observation has coordinates whose posterior piles up at an edge, and some lie outside.

    The observations are the ten published ones, which are no sample of the joint.

    Args:
        noise: w, a variance.
        bound: half the width of the box.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.2
        https://arxiv.org/abs/2101.04653

    Differences:
        The public code calls the noise of 0.1 a standard deviation; it is a variance there too.
    """

    title = "Gaussian linear uniform (SBI)"
    paper = LUECKMANN
    dims = {"z": ("latent",), "x": ("feature",)}

    scale: Tensor

    def __init__(self, *, noise: Positive = 0.1, bound: Positive = 1.0) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("scale", torch.tensor(float(noise)).sqrt())
        self.keep(published("gaussian_linear_uniform"))
        self.latent_size = self.x_0.shape[1]

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            edge = self.scale.new_full((self.latent_size,), self.bound)
            z = pyro.sample("z", dist.Uniform(-edge, edge).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The latents themselves, (..., B, 10)."""
        return z["z"]

    def exact(self) -> _Posterior:
        """The closed-form posterior."""
        return _Posterior(self)


class _Posterior(ClosedForm):
    """z_i given x_i ~ Normal(x_i, w) cut to [-1, 1], independently."""

    model: GaussianLinearUniform

    def distribution(self, x: Observation) -> Distribution:
        """Batch (B,), event (D,)."""
        return unconstrained(Independent(self._cut(x), 1), self.latents.sites[0])

    def log_evidence(self, x: Observation) -> Tensor:
        """log prod_i [Phi((1 - x_i) / s) - Phi((-1 - x_i) / s)] / 2, (B,), in nats."""
        assert isinstance(x, Tensor)
        each: Tensor = self._cut(x).log_mass - math.log(2 * self.model.bound)
        return each.sum(-1).to(x.dtype)

    def _cut(self, x: Observation) -> TruncatedNormal:
        assert isinstance(x, Tensor)
        bound = self.model.bound
        return TruncatedNormal(x, self.model.scale, -bound, bound)
