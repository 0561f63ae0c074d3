"""A plaid: two gratings that move together or slide over each other."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive, Probability
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian
from .model import Model, Paper
from .switching import SwitchingPosterior

__all__ = ["PlaidMotion"]


class PlaidMotion(Model):
    """Two gratings behind an aperture, each showing only its speed across its own stripes.

    transparent ~ Bernoulli(p); v1 ~ Normal(0, sp^2 I_2); v2 ~ Normal(0, sp^2 I_2);
    x_1m ~ Normal(n_1 . v1, (s / c_1)^2);
    x_2m ~ Normal(n_2 . (transparent ? v2 : v1), (s / c_2)^2), m = 1 to M.

    A grating moves along its stripes unseen: the posterior of its velocity is a ridge, thin across
    the stripes and as wide as the prior along them. Seen as one coherent pattern, two ridges cross
    where one velocity explains both (the intersection of constraints); seen as transparent, each
    grating keeps its ridge, near its slowest velocity. The prior prefers slow motion, the more so
    the lower the contrasts: the coherent velocity shrinks, and turns towards the sum of the normals
    weighted by speed and squared contrast. The first observation is a pattern that moves at 2.91
    degrees per second towards 106 degrees, outside the angle between the normals (type II). It is
    ambiguous, transparent with probability .60; if coherent, it is seen to move at 2.13 towards 103
    degrees, and with contrasts of .3 and .15 at .68 towards 79 degrees.

    Where the percept is coherent nothing depends on v2, which keeps its prior, so that both
    percepts have latents of the same dimension.

    Args:
        transparent: p.
        angles: directions of the normals n_1 and n_2, in degrees from the right, anticlockwise.
        contrasts: c_1 and c_2, in (0, 1].
        slow: sp, in degrees per second.
        noise: s, in degrees per second: of one measurement at full contrast.
        measurements: M, of each grating.
        seed: of the canonical observations; the first two are the speeds, without noise, of
            patterns that move with one velocity, the others are draws from the joint.

    References:
        Motion illusions as optimal percepts (Weiss, Simoncelli & Adelson, 2002)
        https://doi.org/10.1038/nn858

    Differences:
        The paper measures local gradients of images and knows one velocity; here the measurements
        are normal speeds, and the gratings may be transparent.
    """

    title = "plaid motion"
    paper = Paper(
        "Weiss, Simoncelli & Adelson",
        2002,
        "Motion illusions as optimal percepts",
        "https://doi.org/10.1038/nn858",
    )
    dims = {"transparent": (), "v1": ("component",), "v2": ("component",), "x": ("measurement",)}

    probability: Tensor
    normals: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(
        self,
        transparent: Probability = 0.3,
        *,
        angles: tuple[float, float] = (20.0, 50.0),
        contrasts: tuple[Positive, Positive] = (1.0, 0.5),
        slow: Positive = 1.0,
        noise: Positive = 0.2,
        measurements: Count = 2,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        theta = torch.tensor(angles) * math.pi / 180
        self.register_buffer("probability", torch.tensor(float(transparent)))
        self.register_buffer("normals", torch.stack([theta.cos(), theta.sin()], -1))
        self.register_buffer("spread", torch.tensor(float(slow)))
        scale = noise / torch.tensor(contrasts)
        self.register_buffer("scale", scale.repeat_interleave(measurements))
        self.keep_draws(torch.zeros(1, 2 * measurements), 98, seed=seed)
        rigid = torch.tensor([[-0.8, 2.8], [1.2, 0.8]]) @ self.normals.T
        self.keep(torch.cat([rigid.repeat_interleave(measurements, -1), self.x_0]))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            transparent = pyro.sample("transparent", dist.Bernoulli(self.probability))
            slow = dist.Normal(torch.zeros_like(self.normals[0]), self.spread).to_event(1)
            v1, v2 = pyro.sample("v1", slow), pyro.sample("v2", slow)
            mean = self.predict({"transparent": transparent, "v1": v1, "v2": v2})
            x_given_z = dist.Normal(mean, self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """Normal speeds: latents (..., B), (..., B, 2), (..., B, 2) to (..., B, 2 M)."""
        second = torch.where(z["transparent"][..., None] > 0, z["v2"], z["v1"])
        speeds = (torch.stack([z["v1"], second], -2) * self.normals).sum(-1)
        return speeds.repeat_interleave(len(self.scale) // 2, -1)

    def components(self, x: Observation) -> tuple[Tensor, LinearGaussian, Tensor]:
        """Systems for transparent = 0 and transparent = 1; their latents are (v1, v2)."""
        assert isinstance(x, Tensor)
        log_prior = torch.stack([1 - self.probability, self.probability]).log()
        first, second = self.normals
        none = torch.zeros_like(first)
        coherent = torch.stack([torch.cat([first, none]), torch.cat([second, none])])
        apart = torch.stack([torch.cat([first, none]), torch.cat([none, second])])
        weights = torch.stack([coherent, apart])[:, None]
        weights = weights.repeat_interleave(len(self.scale) // 2, -2)  # (2, 1, 2 M, 4)
        precision = torch.eye(4).to(x) / self.spread.square()
        origin, offset = x.new_zeros(4), torch.zeros_like(self.scale)
        return log_prior, LinearGaussian(origin, precision, weights, offset, self.scale), x

    def exact(self) -> SwitchingPosterior:
        """The percept by enumeration, the velocities in closed form."""
        return SwitchingPosterior(self)
