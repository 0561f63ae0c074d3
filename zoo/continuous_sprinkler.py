"""The continuous sprinkler: two causes that can each explain the wet grass."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Index
from inference.errors import BadInput
from inference.latents import Values
from inference.observation import Observation, size

from .model import Model, Paper
from .quadrature import GridPosterior, Quadrature

__all__ = ["ContinuousSprinkler", "SprinklerPosterior"]


class ContinuousSprinkler(Model):
    """Two causes, either of which explains a large observation: explaining away without Gaussians.

    z ~ Normal(0, 2 I_2); x given z ~ Exponential with mean 3 + max(0, z_1)^3 + max(0, z_2)^3.

    Small observations say little and leave the prior nearly round. Large ones need one large cause,
    no matter which: the posterior splits into two arms. The best factorised guide, which must
    choose one, misses log p(x) by .001, .001, .008, .043 and .607 nats at x = 0, 5, 8, 12, 50.

    Args:
        seed: of the canonical observations, whose first five are those of the paper, 0, 5, 8, 12
            and 50.

    References:
        Variational inference using implicit distributions (Huszar, 2017), whose toy example this is
        https://arxiv.org/abs/1702.08235
    """

    title = "continuous sprinkler"
    paper = Paper(
        "Huszar",
        2017,
        "Variational inference using implicit distributions",
        "https://arxiv.org/abs/1702.08235",
    )
    dims = {"z": ("cause",), "x": ("feature",)}

    prior_scale: Tensor
    base: Tensor

    def __init__(self, *, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("prior_scale", torch.tensor([2.0, 2.0]).sqrt())
        self.register_buffer("base", torch.tensor(3.0))
        known = torch.tensor([[0.0], [5.0], [8.0], [12.0], [50.0]])
        self.keep_draws(known, 95, before=known, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(0.0, self.prior_scale).to_event(1))
            x_given_z = dist.Exponential(1 / self.predict({"z": z})).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The mean: latents (..., B, 2) to (..., B, 1)."""
        return self.base + z["z"].relu().pow(3).sum(-1, keepdim=True)

    def exact(self) -> SprinklerPosterior:
        """The posterior on a grid."""
        return SprinklerPosterior(self)


class SprinklerPosterior(Quadrature):
    """The posterior on a grid, for observations that the model can make.

    Raises:
        BadInput: a negative observation.
    """

    def distribution(self, x: Observation) -> GridPosterior:
        """The gridded posterior: batch (B,), event (2,)."""
        assert isinstance(x, Tensor)
        if bool((x < 0).any()):
            raise BadInput(
                "x",
                expected="at least 0, for an Exponential makes a negative observation impossible",
                got=f"{float(x.min()):.4g}",
                fix="Leave such problems out.",
            )
        return super().distribution(x)
