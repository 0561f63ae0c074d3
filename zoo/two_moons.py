"""Two moons, of the benchmark of simulation-based inference."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from inference.arguments import Positive
from inference.errors import BadInput
from inference.latents import Values
from inference.objectives.elbo import ELBO
from inference.observation import Observation, size
from inference.packed import PackedGuide

from .model import Model
from .sbi import LUECKMANN, keep_trying, log_interval, published, unconstrained
from .truncated import TruncatedNormal

__all__ = ["Crescent", "TwoMoons"]

_Shape = torch.Size | list[int] | tuple[int, ...]
OFFSET = 0.25
ANGLES = 8192
REACH = 40.0  # radii further from the mean, in widths, weigh e^-800: not possible
DROP = 28.0  # nats below the likeliest angle: what is left out weighs about 1e-12


class Crescent(TorchDistribution):  # type: ignore[misc]
    """origin + r (cos a, sin a), r ~ Normal(radius, width^2), a ~ Uniform(-pi/2, pi/2).

    Negative radii have the chance 1e-23 of ten standard deviations, and `log_prob` leaves them out.

    Args:
        origin: centre of the half circle, (..., 2).
        radius: mean of r.
        width: standard deviation of r.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, origin: Tensor, radius: Tensor, width: Tensor) -> None:
        self.origin, self.radius, self.width = origin, radius, width
        super().__init__(origin.shape[:-1], origin.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Crescent:
        """The same distribution for more batch dims."""
        origin = self.origin.expand(torch.Size(batch_shape) + self.event_shape)
        return Crescent(origin, self.radius, self.width)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """As defined."""
        centre = self.origin.expand(torch.Size(sample_shape) + self.origin.shape)
        a = math.pi * (torch.rand_like(centre[..., :1]) - 0.5)
        r = self.radius + self.width * torch.randn_like(a)
        return centre + r * torch.cat([a.cos(), a.sin()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log [Normal(r) / (pi r)], in nats; -inf on the empty side of the circle."""
        u, v = (value - self.origin).unbind(-1)
        r = torch.hypot(u, v)
        score: Tensor = dist.Normal(self.radius, self.width).log_prob(r) - (math.pi * r).log()
        return score.masked_fill(u <= 0, -torch.inf)


class TwoMoons(Model):
    """A point on a crescent whose place forgets a sign: the posterior is two thin crescents.

    z ~ Uniform(-1, 1)^2; g = (z_1 + z_2) / sqrt(2), h = (z_2 - z_1) / sqrt(2);
    a ~ Uniform(-pi/2, pi/2), r ~ Normal(.1, .01^2), both summed out;
    x given z = (r cos a + .25 - abs(g), r sin a + h).

    With u = x_1 + abs(g) - .25, v = x_2 - h and r = hypot(u, v), p(x given z) is
    Normal(r; .1, .01^2) / (pi r) where u > 0, and nothing elsewhere. Each of the two crescents is
    half a circle of radius .1 and width .01, and has exactly half the posterior. Since
    log p(x, z) is -inf over much of the box, a guide wider than the posterior has no ELBO.

    The observations are the ten published ones, which are no sample of the joint: at 5 and 10 the
    box leaves 43 % and 87 % of the crescents, at the others all of them, and none has x_1 > .25,
    where the crescents of the two signs meet.

    Args:
        radius: mean of r.
        width: standard deviation of r, at most a sixth of the radius.

    Raises:
        BadInput: a width with which negative radii would count.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.8
        https://arxiv.org/abs/2101.04653
        Automatic posterior transformation for likelihood-free inference (Greenberg et al., 2019),
        where the model comes from https://arxiv.org/abs/1905.07488

    Differences:
        The public code leaves 1 / (pi r) out of its log-likelihood, and its reference sampler does
        not reject draws with abs(g) < 0, which matters for x_1 > .25.
    """

    title = "two moons (SBI)"
    paper = LUECKMANN
    dims = {"z": ("latent",), "x": ("feature",)}

    radius: Tensor
    width: Tensor

    def __init__(self, *, radius: Positive = 0.1, width: Positive = 0.01) -> None:
        super().__init__()
        if not 0 < 6 * width <= radius:
            raise BadInput(
                "width",
                expected="above 0 and at most a sixth of the radius",
                got=f"{width} with a radius of {radius}",
                fix="width=0.01.",
            )
        self.register_buffer("radius", torch.tensor(float(radius)))
        self.register_buffer("width", torch.tensor(float(width)))
        self.keep(published("two_moons"))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            edge = self.radius.new_ones(2)
            z = pyro.sample("z", dist.Uniform(-edge, edge).to_event(1))
            moon = Crescent(_centre(z), self.radius, self.width)
            observed: Tensor = pyro.sample("x", moon, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """Centre of mass of the crescent: latents (..., B, 2) to (..., B, 2)."""
        mean = torch.stack([self.radius * 2 / math.pi, torch.zeros_like(self.radius)])
        return _centre(z["z"]) + mean

    def modes(self, z: Values) -> Tensor:
        """Crescent by the sign of z_1 + z_2, 1 if positive: latents (..., B, 2) to (..., B)."""
        return (z["z"].sum(-1) > 0).long()

    def exact(self) -> TwoMoonsPosterior:
        """Exact draws; the evidence is an integral over angles."""
        return TwoMoonsPosterior(self)


def _centre(z: Tensor) -> Tensor:
    """Centre of the half circle, (..., 2)."""
    first, second = z.unbind(-1)
    g, h = (first + second) / 2**0.5, (second - first) / 2**0.5
    return torch.stack([OFFSET - g.abs(), h], -1)


class TwoMoonsPosterior(PackedGuide):
    """Run backwards: from (a, r) to abs(g) = .25 + r cos a - x_1 and h = x_2 - r sin a.

    Draws of (a, r) from their prior that give abs(g) >= 0 and z inside the box, with a fair sign
    for g, are draws of the posterior; p(x) is half the fraction F kept. For each angle the radii
    kept are an interval, so F is an integral over angles alone.

    Args:
        model: two moons.
    """

    kind: ClassVar[str] = "quadrature"
    objective = ELBO
    model: TwoMoons

    def distribution(self, x: Observation) -> Distribution:
        """Batch (B,), event (2,).

        Raises:
            BadInput: an observation that no z in the box can make.
        """
        assert isinstance(x, Tensor)
        return unconstrained(_Moons(self.model, x), self.latents.sites[0])

    def log_evidence(self, x: Observation) -> Tensor:
        """log (F / 2) for each problem, (B,), in nats."""
        assert isinstance(x, Tensor)
        return (_Moons(self.model, x).log_fraction - math.log(2)).to(x.dtype)

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Half the angles against all of them, (B,)."""
        assert isinstance(x, Tensor)
        fine = _Moons(self.model, x).log_fraction
        move = (_Moons(self.model, x, ANGLES // 2).log_fraction - fine).abs()
        return {"log_evidence": (move + torch.finfo(x.dtype).eps).to(x.dtype)}


class _Moons(Distribution):
    """The posterior of z, batch (B,), event (2,)."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, model: TwoMoons, x: Tensor, angles: int = ANGLES) -> None:
        super().__init__(x.shape[:1], x.shape[1:], validate_args=False)
        self.dtype, self.x = x.dtype, x.double()
        self.radius, self.width = model.radius.double(), model.width.double()
        step = math.pi / angles
        a = step * (torch.arange(angles, device=x.device) + 0.5).double() - math.pi / 2
        low, high = self._radii(a)  # (B, A)
        score = log_interval((low - self.radius) / self.width, (high - self.radius) / self.width)
        self.log_fraction = score.logsumexp(-1) - math.log(angles)
        if bool(self.log_fraction.isneginf().any()):
            raise _impossible(x, int(self.log_fraction.isneginf().nonzero()[0]))
        # proposals cover the angles and radii that count, with a margin for what lies between
        # the grid's angles
        kept = score > score.max(-1, keepdim=True).values - DROP
        self.first = torch.where(kept, a, torch.inf).min(-1).values - 1.5 * step
        self.last = torch.where(kept, a, -torch.inf).max(-1).values + 1.5 * step
        margin = self.width / 100
        self.low = torch.where(kept, low, torch.inf).min(-1).values - margin
        self.high = torch.where(kept, high, -torch.inf).max(-1).values + margin

    def _radii(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest radius kept at angles (A,), (B, A).

        abs(g) = G + r cos a >= 0, and max(abs(z_1), abs(z_2)) = (abs(g) + abs(h)) / sqrt(2) <= 1.
        """
        start, x_2 = OFFSET - self.x[:, :1], self.x[:, 1:]
        low = (-start / a.cos()).clamp_min(0.0)
        high = torch.full_like(low, float(self.radius + REACH * self.width))
        for slope, room in (
            (a.cos() - a.sin(), 2**0.5 - start - x_2),
            (a.cos() + a.sin(), 2**0.5 - start + x_2),
        ):
            bound = room / slope
            high = torch.where(slope > 0, torch.minimum(high, bound), high)
            low = torch.where(slope < 0, torch.maximum(low, bound), low)
        return low, high

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, 2)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        z = keep_trying(self._propose, self.x.new_empty(shape.numel(), 2))
        return z.reshape(*shape, 2).to(self.dtype)

    def _propose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One point for each of the rows (N,), (N, 2), and whether it is kept."""
        problem = rows % len(self.x)
        eps = torch.finfo(self.dtype).eps
        first, last = self.first[problem], self.last[problem]
        a = first + (last - first) * torch.rand_like(first)
        a = a.clamp(-math.pi / 2 + 100 * eps, math.pi / 2 - 100 * eps)  # u > 0 after rounding
        bounds = self.low[problem], self.high[problem]
        r = TruncatedNormal(self.radius.expand(len(a)), self.width, *bounds).sample()
        size_g = OFFSET + r * a.cos() - self.x[problem, 0]
        g = torch.where(torch.rand_like(a) < 0.5, size_g, -size_g)
        h = self.x[problem, 1] - r * a.sin()
        z = torch.stack([g - h, g + h], -1) / 2**0.5
        kept = (size_g >= 0) & (z.abs().amax(-1) < 1) & (r > 0)
        return z.clamp(-1 + 2 * eps, 1 - 2 * eps), kept

    def log_prob(self, value: Tensor) -> Tensor:
        """log [Normal(r) / (pi r) / (2 F)], (..., B), in nats: the law of (a, r) and the sign."""
        g, h = value.double().sum(-1) / 2**0.5, value.double().diff(dim=-1)[..., 0] / 2**0.5
        u, v = self.x[:, 0] + g.abs() - OFFSET, self.x[:, 1] - h
        r = (u.square() + v.square()).sqrt()
        bump = -((r - self.radius) / self.width).square() / 2 - self.width.log()
        score = bump - 1.5 * math.log(2 * math.pi) - r.log() - self.log_fraction
        outside = (u <= 0) | (value.abs().amax(-1) > 1)
        return score.masked_fill(outside, -torch.inf).to(self.dtype)


def _impossible(x: Tensor, k: int) -> BadInput:
    place = ", ".join(f"{v:.4g}" for v in x[k].tolist())
    return BadInput(
        "x",
        expected="observations that the model can make",
        got=f"problem {k} with x = ({place}), impossible for any z in the box",
        fix="Leave it out.",
    )
