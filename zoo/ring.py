"""The ring: a radius that is seen and an angle that is not."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.special import log_ndtr

from inference.arguments import Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .exact import ClosedForm
from .model import Model, Paper
from .truncated import TruncatedNormal

__all__ = ["Ring", "RingPosterior"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class Ring(Model):
    """The energy of two latents: what is known is their sum of squares.

    z ~ Normal(0, I_2); x given z ~ Normal(|z|^2, s^2).

    The posterior is a ring, uniform in angle, or a disc where x is below the noise. Its mean is
    the origin, where for large x there is no mass, and its two latents are uncorrelated and far
    from independent: a Gaussian guide is either the hole or a piece of the ring. The energy
    q = |z|^2 is Exponential(1/2) a priori, so given x it is Normal(x - s^2/2, s^2) cut to q > 0,
    and p(x) = (1/2) exp(-x/2 + s^2/8) Phi((x - s^2/2) / s).

    Args:
        noise: s.
        seed: of the canonical observations, whose first five are 3, 1, 0, 6 and 12.

    References:
        Spatiotemporal energy models for the perception of motion (Adelson & Bergen, 1985), for the
        energy of two filters as what complex cells report https://doi.org/10.1364/JOSAA.2.000284
        Variational inference with normalizing flows (Rezende & Mohamed, 2015), for rings as tests
        of guides https://arxiv.org/abs/1505.05770
    """

    title = "ring"
    paper = Paper(
        "Adelson & Bergen",
        1985,
        "Spatiotemporal energy models for the perception of motion",
        "https://doi.org/10.1364/JOSAA.2.000284",
    )
    dims = {"z": ("latent",), "x": ("energy",)}

    scale: Tensor

    def __init__(self, *, noise: Positive = 0.5, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(float(noise)))
        known = torch.tensor([[3.0], [1.0], [0.0], [6.0], [12.0]])
        self.keep_draws(known, 95, before=known, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(self.scale.new_zeros(2), 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """|z|^2: latents (..., B, 2) to (..., B, 1)."""
        return z["z"].square().sum(-1, keepdim=True)

    def exact(self) -> RingPosterior:
        """The closed-form posterior."""
        return RingPosterior(self)


class RingPosterior(ClosedForm):
    """q = |z|^2 ~ Normal(x - s^2/2, s^2) cut to q > 0, and a uniform angle."""

    model: Ring

    def distribution(self, x: Observation) -> Annulus:
        """Uniform in angle: batch (B,), event (2,)."""
        assert isinstance(x, Tensor)
        scale = self.model.scale.double()
        return Annulus(x[..., 0].double() - scale.square() / 2, scale, x.dtype)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        assert isinstance(x, Tensor)
        scale, energy = self.model.scale.double(), x[..., 0].double()
        inside = log_ndtr(energy / scale - scale / 2)  # log Phi, exact however far below 0 x is
        evidence: Tensor = inside - energy / 2 + scale.square() / 8 - math.log(2)
        return evidence.to(x.dtype)


class Annulus(Distribution):
    """A uniform angle, and a squared radius that is a Normal cut to the positive numbers.

    Args:
        loc: of the squared radius before the cut, (B,), in float64.
        scale: of the squared radius before the cut, in float64.
        dtype: of draws and scores.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__(loc.shape, torch.Size([2]), validate_args=False)
        self.dtype = dtype
        self.energy = TruncatedNormal(loc, scale, 0.0, math.inf)

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, 2)."""
        radius = self.energy.sample(sample_shape).sqrt()
        angle = 2 * math.pi * torch.rand_like(radius)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (..., B), in nats: that of the squared radius over pi."""
        energy = value.double().square().sum(-1)
        # dz = r dr d(angle) = (1/2) d(r^2) d(angle), and the angle has density 1 / (2 pi)
        return (self.energy.log_prob(energy) - math.log(math.pi)).to(self.dtype)
