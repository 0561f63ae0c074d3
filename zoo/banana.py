"""The banana: a curved ridge in two dimensions."""

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

__all__ = ["Banana"]


class Banana(Model):
    """What the second latent must be depends on the square of the first.

    z ~ Normal(0, I_2); x given z ~ Normal(z_2 + z_1^2 / 2, s^2).

    The posterior is a thin curved ridge. The best factorised guide misses log p(x) by .41, .64 and
    1.11 nats at x = 0, 1, 2 (s = .2); a Gaussian with all correlations does little better, for the
    ridge has no slope on average.

    Args:
        noise: s.
        seed: of the canonical observations, whose first three are 0, 1 and 2.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2020), whose guide
        this is to test https://arxiv.org/abs/2006.10811
        Adaptive proposal distribution for random walk Metropolis algorithm (Haario et al., 1999),
        for the shape https://doi.org/10.1007/s001800050022
    """

    title = "banana"
    paper = Paper(
        "Haario et al.",
        1999,
        "Adaptive proposal distribution for random walk Metropolis algorithm",
        "https://doi.org/10.1007/s001800050022",
    )
    dims = {"z": ("latent",), "x": ("feature",)}

    scale: Tensor

    def __init__(self, *, noise: Positive = 0.2, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(noise)))
        known = torch.tensor([[0.0], [1.0], [2.0]])
        self.keep_draws(known, 97, before=known, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(self.scale.new_zeros(2), 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """z_2 + z_1^2 / 2: latents (..., B, 2) to (..., B, 1)."""
        first, second = z["z"][..., :1], z["z"][..., 1:]
        return second + first.square() / 2

    def exact(self) -> TwoStage:
        """z_1 by quadrature, z_2 given z_1 in closed form."""
        return TwoStage(self, from_pyro(self._marginal, self.observations()), self._rest)

    def _marginal(self, x: Tensor) -> None:
        """z_2 integrated out: x given z_1 ~ Normal(z_1^2 / 2, 1 + s^2)."""
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(self.scale.new_zeros(1), 1.0).to_event(1))
            spread = (1 + self.scale.square()).sqrt()
            pyro.sample("x", dist.Normal(first.square() / 2, spread).to_event(1), obs=x)

    def _rest(self, first: Tensor, x: Observation) -> Distribution:
        """z_2 given z_1: shrink what z_1 leaves of x by 1 / (1 + s^2)."""
        assert isinstance(x, Tensor)
        variance = self.scale.square()
        loc = (x - first.square() / 2) / (1 + variance)
        scale = (variance / (1 + variance)).sqrt()
        return Independent(Normal(loc, scale, validate_args=False), 1)
