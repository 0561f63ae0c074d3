"""Gaussian linear, of the benchmark of simulation-based inference."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Positive
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model
from .sbi import LUECKMANN, published

__all__ = ["GaussianLinear"]


class GaussianLinear(Model):
    """Ten latents, each seen once through noise as large as its prior.

    z ~ Normal(0, v I_10); x given z ~ Normal(z, w I_10), with variances v and w.

    The posterior is Normal(v x / (v + w), v w / (v + w) I): x / 2 with variance .05 here. It is the
    sanity check of the benchmark, for a guide has nothing to learn but a slope and a width.

    The observations are the ten published ones, which are no sample of the joint.

    Args:
        prior: v, a variance.
        noise: w, a variance.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.1
        https://arxiv.org/abs/2101.04653

    Differences:
        The public code calls both 0.1 a standard deviation; they are variances there too.
    """

    title = "Gaussian linear (SBI)"
    paper = LUECKMANN
    dims = {"z": ("latent",), "x": ("feature",)}

    prior_scale: Tensor
    scale: Tensor

    def __init__(self, *, prior: Positive = 0.1, noise: Positive = 0.1) -> None:
        super().__init__()
        self.register_buffer("prior_scale", torch.tensor(float(prior)).sqrt())
        self.register_buffer("scale", torch.tensor(float(noise)).sqrt())
        self.keep(published("gaussian_linear"))
        self.latent_size = self.x_0.shape[1]

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            origin = self.scale.new_zeros(self.latent_size)
            z = pyro.sample("z", dist.Normal(origin, self.prior_scale).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The latents themselves, (..., B, 10)."""
        return z["z"]

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: weights I, noise sqrt(w)."""
        assert isinstance(x, Tensor)
        eye = torch.eye(self.latent_size).to(x)
        origin = x.new_zeros(self.latent_size)
        precision = eye.double() / self.prior_scale.double().square()
        return LinearGaussian(origin, precision, eye, origin, self.scale.reshape(1)), x

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior."""
        return LinearGaussianPosterior(self)
