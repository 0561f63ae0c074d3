"""Layered Gaussian: causes of causes, and still a posterior in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.arguments import Count, Index, Positive
from inference.errors import BadInput
from inference.guide import check_counts
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper

__all__ = ["LayeredGaussian"]


class LayeredGaussian(Model):
    """Two layers of latents over the observation, each a linear image of the one above.

    z2 ~ Normal(m, I); z1 given z2 ~ Normal(W2 z2 + b2, diag(s2^2));
    x given z1 ~ Normal(W1 z1 + b1, diag(s1^2)).

    It is the model for games between adjacent layers. For a guide that goes up one layer at a
    time, q(z1 given x) q(z2 given z1), the divergence of the joints is a sum,

        KL(q || p) = KL(q(z2) || p(z2)) + E KL(q(z1 given z2) || p(z1 given z2))
                     + E KL(q(x given z1) || p(x given z1)),

    expectations over q of what is conditioned on: a critic for each pair of layers is enough, if
    it sees the pair. The exact posterior has this form, for z2 and x are independent given z1.

    The posterior is Gaussian with one covariance for every x. The best factorised guide misses
    log p(x) by .76 nats.

    Args:
        latents: sizes of z2 and z1.
        features: size of x.
        noise: mean of s1, which differs from pixel to pixel.
        inner_noise: mean of s2, which differs from unit to unit.
        seed: of weights and canonical observations.

    Raises:
        BadInput: not two sizes, or a size that is no positive integer.

    References:
        A role for cortical interneurons as adversarial discriminators (Benjamin & Kording, 2023),
        whose second algorithm, oscillating between adjacent layers, this is to test
        https://doi.org/10.1371/journal.pcbi.1011484

    Differences:
        The paper's networks are not linear and have no exact posterior. The sum above is the chain
        rule of KL, not an equation of the paper.
    """

    title = "layered Gaussian"
    paper = Paper(
        "Benjamin & Kording",
        2023,
        "A role for cortical interneurons as adversarial discriminators",
        "https://doi.org/10.1371/journal.pcbi.1011484",
        "algorithm 2",
    )
    dims = {"z2": ("top",), "z1": ("middle",), "x": ("pixel",)}

    scale_2: Tensor
    scale_1: Tensor

    def __init__(
        self,
        latents: Sequence[Count] = (2, 3),
        features: Count = 5,
        *,
        noise: Positive = 0.4,
        inner_noise: Positive = 0.6,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        if len(latents) != 2:
            raise BadInput(
                "latents", expected="two sizes", got=repr(latents), fix="latents=(2, 3)."
            )
        top, middle = latents
        check_counts(latents=min(top, middle), features=features)
        g = torch.Generator().manual_seed(seed)
        self.mean = nn.Parameter(torch.linspace(0.5, -1.0, top))
        self.weights_2 = nn.Parameter(0.3 + torch.randn(middle, top, generator=g))
        self.bias_2 = nn.Parameter(torch.linspace(-0.5, 1.0, middle))
        self.weights_1 = nn.Parameter(0.4 + 0.7 * torch.randn(features, middle, generator=g))
        self.bias_1 = nn.Parameter(torch.linspace(1.0, -0.5, features))
        self.register_buffer("scale_2", inner_noise * torch.linspace(0.7, 1.3, middle))
        self.register_buffer("scale_1", noise * torch.linspace(1.3, 0.7, features))
        self.keep_draws(torch.zeros(1, features), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process, from the top down."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z2 = pyro.sample("z2", dist.Normal(self.mean, 1.0).to_event(1))
            below = z2 @ self.weights_2.T + self.bias_2
            z1 = pyro.sample("z1", dist.Normal(below, self.scale_2).to_event(1))
            x_given_z1 = dist.Normal(self.predict({"z1": z1}), self.scale_1).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z1, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """W1 z1 + b1: latents (..., B, D1) to (..., B, F)."""
        mean: Tensor = z["z1"] @ self.weights_1.T + self.bias_1
        return mean

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system of the packed (z2, z1): a prior that couples the layers, weights (0, W1)."""
        assert isinstance(x, Tensor)
        middle, top = self.weights_2.shape
        # rows are the residuals z2 - m and (z1 - W2 z2 - b2) / s2, which the prior makes standard
        root = torch.eye(top + middle).to(self.weights_2.double())
        root[top:] /= self.scale_2[:, None]
        root[top:, :top] = -self.weights_2.double() / self.scale_2[:, None]
        mean = torch.cat([self.mean, self.weights_2 @ self.mean + self.bias_2])
        weights = nn.functional.pad(self.weights_1, (top, 0))
        return LinearGaussian(mean, root.T @ root, weights, self.bias_1, self.scale_1), x

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior; it follows the model's parameters."""
        return LinearGaussianPosterior(self)
