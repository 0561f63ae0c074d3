"""The product: one number made of two, as an image is of light and surface."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from inference.arguments import Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .model import Model, Paper, from_pyro
from .two_stage import TwoStage

__all__ = ["Product"]


class Product(Model):
    """Two causes multiply: each can be anything if the other makes up for it.

    z ~ Normal(0, I_2); x given z ~ Normal(z_1 z_2, s^2).

    The posterior follows both branches of the hyperbola z_1 z_2 = x, and a pair and its negative
    are equally likely. The best factorised guide keeps to one branch and misses log p(x) by 1.55
    and 1.92 nats at x = 1, 2 (s = .2), by .835 and 1.08 with s = .5. At x = 0 the branches meet in
    a cross, with a spike of width s in each marginal; elsewhere the marginals dip at 0.

    Args:
        noise: s. The exact posterior's grid is fine enough from s = .04 up; below, as its `error`
            shows, it blurs the spike at x = 0.
        seed: of the canonical observations, whose first four are 1, 2, 0 and -.5.

    References:
        Bayesian color constancy (Brainard & Freeman, 1997), for light that is the product of
        illuminant and surface https://doi.org/10.1364/JOSAA.14.001393
    """

    title = "product"
    paper = Paper(
        "Brainard & Freeman",
        1997,
        "Bayesian color constancy",
        "https://doi.org/10.1364/JOSAA.14.001393",
    )
    dims = {"z": ("factor",), "x": ("product",)}

    scale: Tensor

    def __init__(self, *, noise: Positive = 0.2, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(noise)))
        known = torch.tensor([[1.0], [2.0], [0.0], [-0.5]])
        self.keep_draws(known, 96, before=known, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(self.scale.new_zeros(2), 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """z_1 z_2: latents (..., B, 2) to (..., B, 1)."""
        return z["z"].prod(-1, keepdim=True)

    def modes(self, z: Values) -> Tensor:
        """The branch, by the sign of z_1, 1 if positive: latents (..., B, 2) to (..., B)."""
        return (z["z"][..., 0] > 0).long()

    def exact(self) -> TwoStage:
        """z_1 by quadrature, z_2 given z_1 in closed form."""
        return TwoStage(self, from_pyro(self._marginal, self.observations()), self._rest)

    def _marginal(self, x: Tensor) -> None:
        """z_2 integrated out: x given z_1 ~ Normal(0, z_1^2 + s^2)."""
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(self.scale.new_zeros(1), 1.0).to_event(1))
            spread = (first.square() + self.scale.square()).sqrt()
            pyro.sample("x", dist.Normal(torch.zeros_like(first), spread).to_event(1), obs=x)

    def _rest(self, first: Tensor, x: Observation) -> Distribution:
        """z_2 given z_1: regress x on z_1."""
        assert isinstance(x, Tensor)
        total = first.square() + self.scale.square()
        loc, scale = first * x / total, self.scale / total.sqrt()
        return Independent(Normal(loc, scale, validate_args=False), 1)
