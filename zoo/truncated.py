"""Independent Normals cut to an interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.special import log_ndtr, ndtri

__all__ = ["TruncatedNormal"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class TruncatedNormal(Distribution):
    """Normal(loc, scale) on the interval [low, high], elementwise; all of batch shape.

    Draws invert the distribution function in float64, from the tail that lies nearer, so that an
    interval ten standard deviations away is no trouble.

    Args:
        loc: of the Normal before the cut.
        scale: of the Normal before the cut.
        low: lower end.
        high: upper end.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self, loc: Tensor, scale: Tensor, low: float | Tensor, high: float | Tensor
    ) -> None:
        loc, scale = torch.broadcast_tensors(loc, scale)
        super().__init__(loc.shape, validate_args=False)
        self.dtype, self.low, self.high = loc.dtype, low, high
        self.loc, self.scale = loc.double(), scale.double()
        a, b = (low - self.loc) / self.scale, (high - self.loc) / self.scale
        self.flip = a + b > 0  # mirror, so that the lower tail holds the mass
        self.a, self.b = torch.where(self.flip, -b, a), torch.where(self.flip, -a, b)
        top, bottom = log_ndtr(self.b), log_ndtr(self.a)
        self.bottom = bottom
        self.log_mass = top + torch.log1p(-(bottom - top).exp())

    @property
    def support(self) -> constraints.Constraint:
        """The interval."""
        return constraints.interval(self.low, self.high)

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, strictly inside the interval."""
        shape = torch.Size(sample_shape) + self.batch_shape
        u = torch.rand(shape, dtype=torch.float64, device=self.loc.device)
        log_p = torch.logaddexp(self.bottom, u.log() + self.log_mass)
        t = _inverse_log_ndtr(log_p).clamp(self.a, self.b)
        z = self.loc + self.scale * torch.where(self.flip, -t, t)
        ends = (torch.as_tensor(e).to(z.device, self.dtype) for e in (self.low, self.high))
        low, high = ends
        # rounding to the dtype may reach the ends: the nearest numbers inside
        inside: Tensor = z.to(self.dtype).clamp(low.nextafter(high), high.nextafter(low))
        return inside

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, in nats; -inf outside."""
        t = (value.double() - self.loc) / self.scale
        score = -t.square() / 2 - self.scale.log() - math.log(2 * math.pi) / 2 - self.log_mass
        inside = (value >= self.low) & (value <= self.high)
        cut: Tensor = score.masked_fill(~inside, -torch.inf).to(value.dtype)
        return cut


def _inverse_log_ndtr(log_p: Tensor) -> Tensor:
    """t with log_ndtr(t) = log_p, by Newton steps where ndtri has run out of numbers."""
    far = log_p < -600.0  # exp(-600) is still a normal float64
    t: Tensor = ndtri(log_p.clamp(-600.0, 0.0).exp())
    if bool(far.any()):
        s = -(-2 * log_p).clamp_min(1.0).sqrt()
        for _ in range(20):
            value = log_ndtr(s)
            slope = (-s.square() / 2 - math.log(2 * math.pi) / 2 - value).exp()
            s = s - (value - log_p) / slope
        t = torch.where(far, s, t)
    return t
