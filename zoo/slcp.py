"""SLCP, simple likelihood and complex posterior, of the benchmark of simulation-based inference."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, ReshapeTransform, constraints

from inference.arguments import NonNegative
from inference.latents import Values
from inference.objectives.elbo import ELBO
from inference.observation import Observation, size
from inference.packed import PackedGuide

from .model import Model
from .sbi import LUECKMANN, published, unconstrained
from .truncated_pair import TruncatedPair
from .unit_cube import UnitCube

__all__ = ["SLCP", "SLCPPosterior"]

_Shape = torch.Size | list[int] | tuple[int, ...]
BOUND, POINTS = 3.0, 4
NODES = (14, 36, 28)  # of z_5, z_3 and z_4
SPAN = 50.0  # twice the nats below the peak at which a range may stop
BOX_ERROR = 1e-6  # of the log-probability of a box that holds more than 1e-6


class SLCP(Model):
    """Four points of a Gaussian in the plane, parametrised so that its posterior is hard.

    z ~ Uniform(-3, 3)^5; x given z is four points ~ Normal((z_1, z_2), S), S of standard
    deviations z_3^2 and z_4^2 and correlation tanh(z_5), with 1e-6 added to both variances.

    The signs of z_3 and z_4 leave no trace, so there are four modes of weight exactly 1/4, the box
    cuts most of them, and z_3, z_4, z_5 share curved ridges. The likelihood is simple: given
    |z_3|, |z_4| and z_5, the mean is Normal(mean of the points, S / 4) cut to the box.

    The observations are the ten published ones, which are no sample of the joint: the authors left
    out "extremely spiked posteriors".

    Args:
        jitter: added to the variances.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.3
        https://arxiv.org/abs/2101.04653
        Sequential neural likelihood (Papamakarios et al., 2019), where the model comes from
        https://arxiv.org/abs/1805.07226
    """

    title = "SLCP (SBI)"
    paper = LUECKMANN
    dims = {"z": ("latent",), "x": ("feature",)}

    jitter: Tensor

    def __init__(self, *, jitter: NonNegative = 1e-6) -> None:
        super().__init__()
        self.register_buffer("jitter", torch.tensor(float(jitter)))
        self.keep(published("slcp"))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            edge = self.jitter.new_full((5,), BOUND)
            z = pyro.sample("z", dist.Uniform(-edge, edge).to_event(1))
            observed: Tensor = pyro.sample("x", self._points(z), obs=x)
            return observed

    def _points(self, z: Tensor) -> dist.TorchDistribution:
        """Four points in a row, event (8,)."""
        c = covariance(z[..., 2:], self.jitter)
        first = torch.stack([c.variance.sqrt(), torch.zeros_like(c.slope)], -1)
        second = torch.stack([c.slope * c.variance.sqrt(), c.rest.sqrt()], -1)
        tril = torch.stack([first, second], -2)[..., None, :, :]
        point = dist.MultivariateNormal(z[..., None, :2], scale_tril=tril)
        points = point.expand(torch.Size([*z.shape[:-1], POINTS])).to_event(1)
        return dist.TransformedDistribution(
            points, [ReshapeTransform(torch.Size([POINTS, 2]), torch.Size([2 * POINTS]))]
        )

    def predict(self, z: Values) -> Tensor:
        """The mean, four times: latents (..., B, 5) to (..., B, 8)."""
        return torch.cat([z["z"][..., :2]] * POINTS, -1)

    def exact(self) -> SLCPPosterior:
        """The covariance by quadrature, the mean given it in closed form."""
        return SLCPPosterior(self)


class Covariance(NamedTuple):
    """S as a regression of the second coordinate on the first; no two numbers cancel.

    Attributes:
        variance: S_11.
        slope: S_12 / S_11.
        rest: S_22 - S_12^2 / S_11.
        other: S_22.
    """

    variance: Tensor
    slope: Tensor
    rest: Tensor
    other: Tensor


def covariance(w: Tensor, jitter: Tensor) -> Covariance:
    """S of w = (z_3, z_4, z_5), (..., 3)."""
    s_1, s_2, rho = w[..., 0].square(), w[..., 1].square(), w[..., 2].tanh()
    variance, squared = s_1.square() + jitter, s_2.square()
    free = w[..., 2].cosh().reciprocal().square() + rho.square() * jitter / variance
    return Covariance(
        variance, rho * s_1 * s_2 / variance, squared * free + jitter, squared + jitter
    )


class Statistics(NamedTuple):
    """What the likelihood needs of x: mean (B, 2), and sums of squares about it, each (B,)."""

    mean: Tensor
    first: Tensor
    cross: Tensor
    second: Tensor
    slope: Tensor
    rest: Tensor


def statistics(x: Tensor) -> Statistics:
    """Of observations (B, 8), in float64."""
    points = x.double().reshape(len(x), POINTS, 2)
    mean = points.mean(1)
    u, v = (points - mean[:, None]).unbind(-1)
    first, cross = u.square().sum(-1), (u * v).sum(-1)
    slope = cross / first.clamp_min(1e-300)
    rest = (v - slope[:, None] * u).square().sum(-1)
    return Statistics(mean, first, cross, v.square().sum(-1), slope, rest)


class SLCPPosterior(PackedGuide):
    """|z_3|, |z_4|, z_5 by quadrature; the mean given them in closed form; then fair signs.

    With the mean integrated over the box, p(x given S) is a Gaussian integral times the probability
    of the box under Normal(mean of the points, S / 4). The grid is a product of Gauss-Legendre
    rules: z_5 on its interval, then 1 / z_3^2, then 1 / z_4^2 in a range that follows its ridge,
    for in 1 / z_4^2 the likelihood is a Gaussian. Draws are picked from the cells of the rule and
    take ten independence Metropolis steps on p(S given x) itself, which remove the cells. The error
    of log p(x) is below 1e-4 nats for nearly all observations; `error` gives a cautious estimate.

    Args:
        model: SLCP.
    """

    kind: ClassVar[str] = "quadrature"
    objective = ELBO
    model: SLCP

    def distribution(self, x: Observation) -> Distribution:
        """Batch (B,), event (5,)."""
        return unconstrained(self._law(x), self.latents.sites[0])

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        law = self._law(x)
        return law.cube.log_normaliser.to(law.dtype)

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Three quarters of the nodes of every axis against all of them, and the box, (B,)."""
        law = self._law(x)
        return {"log_evidence": (law.cube.error() + BOX_ERROR).to(law.dtype)}

    def _law(self, x: Observation) -> _Law:
        assert isinstance(x, Tensor)
        return _Law(x, self.model.jitter.double())


class _Law(Distribution):
    """The posterior of z, batch (B,), event (5,)."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, x: Tensor, jitter: Tensor) -> None:
        super().__init__(x.shape[:1], torch.Size([5]), validate_args=False)
        self.dtype, self.jitter, self.known = x.dtype, jitter, statistics(x)
        self.cube = UnitCube(self._log_cube, len(x), NODES, like=self.known.first)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(S given x) + log p(mean given S, x) - log 4, (..., B), in nats."""
        z = value.double()
        score, pair = self._log_marginal(z[..., 2:], self.known)
        # the mass of the box divides p(mean given S, x) and multiplies p(S given x)
        score = score + pair.log_normal(z[..., :2]) - math.log(4) - self.cube.log_normaliser
        outside = z.abs().amax(-1) > BOUND
        return score.masked_fill(outside, -torch.inf).to(self.dtype)

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, 5)."""
        w, _ = self._unfold(self.cube.sample(sample_shape), self.known)
        mean = self._log_marginal(w, self.known)[1].sample()
        signs = 1 - 2 * torch.bernoulli(torch.full_like(w[..., :2], 0.5))
        z = torch.cat([mean, signs * w[..., :2], w[..., 2:]], -1)
        inside = BOUND * (1 - 4 * torch.finfo(self.dtype).eps)
        return z.clamp(-inside, inside).to(self.dtype)

    def _log_cube(self, at: Tensor, rows: slice) -> Tensor:
        """log p(x, S) over the unit cube, from which `_unfold` makes S."""
        known = Statistics(*(v[rows] for v in self.known))
        w, log_jacobian = self._unfold(at, known)
        score, pair = self._log_marginal(w, known)
        return score + pair.log_mass + log_jacobian

    def _log_marginal(self, w: Tensor, known: Statistics) -> tuple[Tensor, TruncatedPair]:
        """log p(x, S) with the mean integrated over the plane, and its law in the box."""
        c = covariance(w, self.jitter)
        squares = known.rest + known.first * (c.slope - known.slope).square()
        score = -(known.first / c.variance + squares / c.rest + 3 * (c.variance * c.rest).log()) / 2
        constant = 3 * math.log(2 * math.pi) + math.log(4)
        prior = 2 * math.log(6) + 2 * math.log(3) + math.log(6)  # of z_1, z_2; |z_3|, |z_4|; z_5
        scale = torch.stack([c.variance, c.other], -1).sqrt()
        corr = c.slope * (c.variance / c.other).sqrt()
        return score - constant - prior, TruncatedPair(known.mean, scale / 2, corr, BOUND)

    def _unfold(self, at: Tensor, known: Statistics) -> tuple[Tensor, Tensor]:
        """The unit cube to (z_3, z_4, z_5), with log |dw/du|."""
        at = at.expand(*at.shape[:-2], len(known.first), 3)
        z_5 = BOUND * (2 * at[..., 0] - 1)
        # exp(-first / 2 variance) falls by SPAN / 2 nats from its value at the edge
        least = 1 / (1 / BOUND**4 + SPAN / known.first.clamp_min(1e-300))
        low = (least - self.jitter).clamp_min(0.0) ** 0.25
        soft = self.jitter**0.25  # where z^4 meets the jitter
        z_3, jacobian_3 = _reciprocal(at[..., 1], low, torch.full_like(low, BOUND), soft)
        low, high = self._ridge(z_3, z_5, known)
        z_4, jacobian_4 = _reciprocal(at[..., 2], low, high, soft)
        return torch.stack([z_3, z_4, z_5], -1), jacobian_3 + jacobian_4 + math.log(2 * BOUND)

    def _ridge(self, z_3: Tensor, z_5: Tensor, known: Statistics) -> tuple[Tensor, Tensor]:
        """Range of z_4 given the others.

        In y = 1 / z_4^2 the squares are (A y^2 - 2 h y + ...) / (q + jitter y^2); the range ends
        where they have grown by SPAN.
        """
        c = covariance(torch.stack([z_3, torch.ones_like(z_3), z_5], -1), self.jitter)
        q, h = c.rest - self.jitter, c.slope * known.cross
        a = known.second.clamp_min(1e-300)
        edge = BOUND**-2
        span = SPAN + a * (edge - h / a).clamp_min(0.0).square() / (q + self.jitter * edge**2)
        k = a - span * self.jitter
        root = (span * (q * k + self.jitter * h.square() / a).clamp_min(0.0)).sqrt()
        first = torch.where(k > 0, (h - root) / k, 0.0).clamp_min(edge)
        last = torch.where(k > 0, (h + root) / k, torch.inf)
        return last.rsqrt(), first.rsqrt()


def _reciprocal(at: Tensor, low: Tensor, high: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
    """[0, 1] to z in [high, low], linear in 1 / (z + soft)^2; and log |dz/du|."""
    first, last = (high + soft) ** -2, (low + soft) ** -2
    y = first + (last - first) * at
    return y.rsqrt() - soft, (last - first).log() - 1.5 * y.log() - math.log(2)
