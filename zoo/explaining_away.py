"""Explaining away: one observation, many causes that could have made it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper

__all__ = ["ExplainingAway"]


class ExplainingAway(Model):
    """Causes add up to one noisy sum, so that evidence for one is evidence against the others.

    z ~ Normal(0, I_D); x given z ~ Normal(sum_i z_i, s^2).

    The posterior precision is I + 11' / s^2 for every x: all pairs of causes have the correlation
    -1 / (D - 1 + s^2), and the best factorised guide misses log p(x) by
    (1/2) [D log(1 + 1/s^2) - log(1 + D/s^2)] nats, .922 at D = 2, s = .3. Only lateral or recurrent
    connections can close that gap.

    Args:
        latents: D.
        noise: s.
        seed: of the canonical observations.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2020), whose
        motivating case this is; the closed form is standard
        https://arxiv.org/abs/2006.10811

    Example:
        >>> model = ExplainingAway(2, noise=0.3)
        >>> round(float(model.exact().mean_field_gap()), 3)
        0.922
    """

    title = "explaining away"
    paper = Paper(
        "Benjamin & Kording",
        2020,
        "Learning to infer in recurrent biological networks",
        "https://arxiv.org/abs/2006.10811",
    )
    dims = {"z": ("cause",), "x": ("sum",)}

    scale: Tensor

    def __init__(self, latents: Count = 5, *, noise: Positive = 0.3, seed: Index = 0) -> None:
        super().__init__()
        self.latent_size = latents
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep_draws(torch.zeros(1, 1), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            origin = self.scale.new_zeros(self.latent_size)
            z = pyro.sample("z", dist.Normal(origin, 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The sum: latents (..., B, D) to (..., B, 1)."""
        return z["z"].sum(-1, keepdim=True)

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: weights 1', noise s."""
        assert isinstance(x, Tensor)
        eye = torch.eye(self.latent_size).to(x)
        ones, origin = x.new_ones(1, self.latent_size), x.new_zeros(self.latent_size)
        return LinearGaussian(origin, eye, ones, x.new_zeros(1), self.scale.reshape(1)), x

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior."""
        return LinearGaussianPosterior(self)
