"""The square root: two answers, one more likely than the other."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn.functional import logsigmoid

from inference.arguments import Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .model import Model, Paper, from_pyro
from .quadrature import GridPosterior
from .two_stage import Gridded

__all__ = ["SquareRoot", "SquareRootPosterior"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class SquareRoot(Model):
    """The sign of the latent is lost; only the prior still tells of it.

    z ~ Normal(m, 1); x given z ~ Normal(z^2, s^2).

    The posterior has a mode near each square root of x, with odds exp(2 m sqrt(x)) for the positive
    one: P(z > 0) is .64 at x = 1 and .77 at x = 4, and 1/2 for every x where m = 0. A guide that is
    right on the likelier side and blind to the other misses log p(x) by .45 and .27 nats.

    Args:
        centre: m.
        noise: s.
        seed: of the canonical observations, whose first five are 1, .5, 0, 4 and 9.

    References:
        Novel approach to nonlinear/non-Gaussian Bayesian state estimation (Gordon et al., 1993),
        whose benchmark observes a state through its square
        https://doi.org/10.1049/ip-f-2.1993.0015
        Spatiotemporal energy models for the perception of motion (Adelson & Bergen, 1985), for
        squares in the visual cortex https://doi.org/10.1364/JOSAA.2.000284
    """

    title = "square root"
    paper = Paper(
        "Gordon et al.",
        1993,
        "Novel approach to nonlinear/non-Gaussian Bayesian state estimation",
        "https://doi.org/10.1049/ip-f-2.1993.0015",
    )
    dims = {"z": ("latent",), "x": ("feature",)}

    centre: Tensor
    scale: Tensor

    def __init__(self, *, centre: float = 0.3, noise: Positive = 0.3, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("centre", torch.tensor([float(centre)]))
        self.register_buffer("scale", torch.tensor(float(noise)))
        known = torch.tensor([[1.0], [0.5], [0.0], [4.0], [9.0]])
        self.keep_draws(known, 95, before=known, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(self.centre, 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """z^2: latents (..., B, 1) to (..., B, 1)."""
        return z["z"].square()

    def modes(self, z: Values) -> Tensor:
        """The sign, 0 for negative and 1 for positive: latents (..., B, 1) to (..., B)."""
        return (z["z"][..., 0] > 0).long()

    def exact(self) -> SquareRootPosterior:
        """The size by quadrature, the sign in closed form."""
        return SquareRootPosterior(self)

    def size_alone(self, x: Tensor) -> None:
        """The sign summed out: r = |z| is a folded Normal, x given r ~ Normal(r^2, s^2)."""
        with pyro.plate("data", len(x)):
            folded = dist.FoldedDistribution(dist.Normal(self.centre, 1.0)).to_event(1)
            r = pyro.sample("r", folded)
            pyro.sample("x", dist.Normal(r.square(), self.scale).to_event(1), obs=x)


class SquareRootPosterior(Gridded):
    """r = |z| on a grid over log r, then z = r with probability sigmoid(2 m r), else -r.

    One narrow mode in log r instead of two far apart in z: exact however small the noise is.

    Args:
        model: a :class:`SquareRoot`.
    """

    model: SquareRoot

    def __init__(self, model: SquareRoot) -> None:
        super().__init__(model, from_pyro(model.size_alone, model.observations()))

    def distribution(self, x: Observation) -> Distribution:
        """Size and sign: batch (B,), event (1,)."""
        return _Signed(self.grid.distribution(x), self.model.centre)


class _Signed(Distribution):
    """z = +-exp(u), u from a grid, the sign positive with probability sigmoid(2 m exp(u))."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, log_size: GridPosterior, centre: Tensor) -> None:
        super().__init__(log_size.batch_shape, log_size.event_shape, validate_args=False)
        self.log_size, self.centre = log_size, centre

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, 1)."""
        r = self.log_size.sample(sample_shape).exp()
        positive = torch.rand_like(r) < (2 * self.centre * r).sigmoid()
        return torch.where(positive, r, -r)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (..., B), in nats."""
        u = value.abs().clamp_min(torch.finfo(value.dtype).tiny).log()
        sign = logsigmoid(2 * self.centre * value)  # of the odds, whichever sign it has
        score: Tensor = self.log_size.log_prob(u) + (sign - u)[..., 0]
        return score
