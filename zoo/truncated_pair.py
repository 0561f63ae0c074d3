"""A bivariate Normal cut to a square."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from .sbi import keep_trying, log_interval
from .truncated import TruncatedNormal
from .unit_cube import legendre

__all__ = ["TruncatedPair"]

_Shape = torch.Size | list[int] | tuple[int, ...]
NODES = 12  # in each of four panels: relative error of the mass below 1e-6
CUT = 25.0  # nats below the peak at which an integral may stop
FAR = 300.0  # nats; exp(-FAR - 2 CUT) is still a normal float64
ROWS = 4096  # of one chunk: fits the cache
HALVINGS = 24


class TruncatedPair(Distribution):
    """Two Normals with a correlation on the square [-bound, bound]^2; event (2,).

    In standard units, with the sign of one of them turned so that the correlation r is positive,
    the pair is p = c t - d e and q = c t + d e with independent t, e ~ Normal(0, 1),
    c^2 = (1 + r) / 2 and d^2 = (1 - r) / 2. Given e, the square cuts t to an interval whose ends
    have slopes d / c <= 1 in e, however strong the correlation. What is left is one smooth
    log-concave function of e, integrated in panels between its kinks and sampled by rejection from
    the Normal that touches it at its mode.

    Args:
        loc: before the cut, (..., 2), float64.
        scale: before the cut, (..., 2).
        corr: before the cut, (...).
        bound: half the side of the square.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, corr: Tensor, bound: float) -> None:
        super().__init__(corr.shape, torch.Size([2]), validate_args=False)
        self.loc, self.scale, self.bound = loc.expand_as(scale), scale, bound
        self.sign = torch.where(corr < 0, -1.0, 1.0).to(loc)
        low, high = (-bound - loc) / scale, (bound - loc) / scale
        other = torch.stack([low[..., 1], high[..., 1]]) * self.sign
        c, d = ((1 + corr.abs()) / 2).sqrt(), ((1 - corr.abs()) / 2).sqrt()
        self.cut = _Cut(low[..., 0], high[..., 0], other.amin(0), other.amax(0), c, d)

    @cached_property
    def log_mass(self) -> Tensor:
        """Log-probability of the square before the cut, (...)."""
        flat = self.cut.map(lambda v: v.reshape(-1))
        far = flat.nearest()[1] > FAR
        found = torch.empty_like(flat.c)
        for rows, interval in ((~far, _interval), (far, _far_interval)):
            for piece in rows.nonzero()[:, 0].split(ROWS):
                found[piece] = flat.take(piece).log_mass(interval)
        return found.reshape(self.batch_shape)

    def log_normal(self, value: Tensor) -> Tensor:
        """Log-density before the cut, in nats."""
        p, q = ((value - self.loc) / self.scale).unbind(-1)
        volume = self.scale.log().sum(-1) + (2 * self.cut.c * self.cut.d).log()
        return -self.cut.loss(p, self.sign * q) - volume - math.log(2 * math.pi)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, in nats; -inf outside."""
        outside = value.abs().amax(-1) > self.bound
        return (self.log_normal(value) - self.log_mass).masked_fill(outside, -torch.inf)

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., 2)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        pair = self.cut.map(lambda v: v.expand(shape).reshape(-1)).sample().reshape(*shape, 2)
        pair = torch.stack([pair[..., 0], self.sign * pair[..., 1]], -1)
        return (self.loc + self.scale * pair).clamp(-self.bound, self.bound)


class _Cut:
    """a_1 < c t - d e < b_1 and a_2 < c t + d e < b_2, elementwise."""

    def __init__(
        self, a_1: Tensor, b_1: Tensor, a_2: Tensor, b_2: Tensor, c: Tensor, d: Tensor
    ) -> None:
        self.a_1, self.b_1, self.a_2, self.b_2, self.c, self.d = a_1, b_1, a_2, b_2, c, d
        self.first, self.last = (a_2 - b_1) / (2 * d), (b_2 - a_1) / (2 * d)  # where e can be

    def map(self, f: Callable[[Tensor], Tensor]) -> _Cut:
        """f of every tensor."""
        return _Cut(*map(f, (self.a_1, self.b_1, self.a_2, self.b_2, self.c, self.d)))

    def take(self, rows: Tensor) -> _Cut:
        """Some of the elements."""
        return self.map(lambda v: v[rows])

    def interval(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Ends of the interval of t."""
        step = self.d * e
        low = torch.maximum(self.a_1 + step, self.a_2 - step) / self.c
        return low, torch.minimum(self.b_1 + step, self.b_2 - step) / self.c

    def slopes(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of the ends in e."""
        slope, step = self.d / self.c, self.d * e
        low = torch.where(self.a_1 + step > self.a_2 - step, slope, -slope)
        return low, torch.where(self.b_1 + step < self.b_2 - step, slope, -slope)

    def loss(self, p: Tensor, q: Tensor) -> Tensor:
        """(t^2 + e^2) / 2 at a point."""
        return ((p + q) / self.c).square() / 8 + ((q - p) / self.d).square() / 8

    def nearest(self) -> tuple[Tensor, Tensor]:
        """e and the loss at the point of the square with the smallest loss.

        That is the origin, or lies on an edge that faces it, in line with one coordinate.
        """
        r, origin = self.c.square() - self.d.square(), torch.zeros_like(self.c)
        p_1, q_2 = origin.clamp(self.a_1, self.b_1), origin.clamp(self.a_2, self.b_2)
        q_1, p_2 = (r * p_1).clamp(self.a_2, self.b_2), (r * q_2).clamp(self.a_1, self.b_1)
        loss_1, loss_2 = self.loss(p_1, q_1), self.loss(p_2, q_2)
        e = torch.where(loss_1 <= loss_2, q_1 - p_1, q_2 - p_2) / (2 * self.d)
        return e, torch.minimum(loss_1, loss_2)

    def log_mass(self, interval: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """log of the integral of Normal(e; 0, 1) [Phi(high(e)) - Phi(low(e))]."""
        e, loss = self.nearest()
        # e^2 / 2 and half the squared distance to the interval rise at least as fast as a parabola
        nudge = 1e-9 * (1 + e.abs())
        up, down = self._rise(e + nudge).clamp_min(0.0), -self._rise(e - nudge).clamp_max(0.0)
        first = torch.maximum(self.first, e + down - (down.square() + 2 * CUT).sqrt())
        last = torch.minimum(self.last, e - up + (up.square() + 2 * CUT).sqrt())
        kinks = torch.stack([self.a_2 - self.a_1, self.b_2 - self.b_1]) / (2 * self.d)
        inner = torch.cat([kinks, e[None]]).clamp(first, last).sort(0).values
        edges = torch.cat([first[None], inner, last[None]])
        nodes, weights = (v.tolist() for v in legendre(NODES, e))
        total = torch.zeros_like(e)
        for start, width in zip(edges[:-1], edges.diff(dim=0), strict=True):
            for node, weight in zip(nodes, weights, strict=True):
                at = start + node * width
                total += weight * width * interval(*self.interval(at), loss - at.square() / 2)
        return total.log() - loss - math.log(2 * math.pi) / 2

    def _rise(self, e: Tensor) -> Tensor:
        (low, high), (low_slope, high_slope) = self.interval(e), self.slopes(e)
        return e + low.clamp_min(0.0) * low_slope + high.clamp_max(0.0) * high_slope

    def sample(self) -> Tensor:
        """One (p, q) for each of the elements (N,): (N, 2)."""
        left, right = self._tangents()
        to_right = (right.log_mass - left.log_mass).sigmoid()

        def propose(rows: Tensor) -> tuple[Tensor, Tensor]:
            side = torch.rand_like(to_right[rows]) < to_right[rows]
            at, peak, slope, first, last = (
                torch.where(side, r[rows], v[rows])
                for v, r in zip(left.line, right.line, strict=True)
            )
            ends: Any = first, last
            e = TruncatedNormal(slope, torch.ones_like(slope), *ends).sample()
            height = self.take(rows).height(e)[0]
            return e[:, None], torch.rand_like(e).log() < height - peak - slope * (e - at)

        e = keep_trying(propose, self.c.new_empty(len(self.c), 1))[:, 0]
        ends: Any = self.interval(e)
        t = TruncatedNormal(torch.zeros_like(e), torch.ones_like(e), *ends).sample()
        return torch.stack([self.c * t - self.d * e, self.c * t + self.d * e], -1)

    def _tangents(self) -> tuple[_Tangent, _Tangent]:
        """From the left and the right of the mode of e; `height` is concave, so both are above."""
        e = self.nearest()[0]
        low, high = torch.maximum(self.first, e - 8), torch.minimum(self.last, e + 8)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            rising = self.height(middle)[1] > middle
            low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
        middle = (low + high) / 2
        left = _Tangent(low, *self.height(low), self.first, middle)
        return left, _Tangent(high, *self.height(high), middle, self.last)

    def height(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """log [Phi(high(e)) - Phi(low(e))] and its slope."""
        (low, high), (low_slope, high_slope) = self.interval(e), self.slopes(e)
        height = log_interval(low, high)
        constant = height + math.log(2 * math.pi) / 2
        fall = (-low.square() / 2 - constant).exp() * low_slope
        return height, (-high.square() / 2 - constant).exp() * high_slope - fall


class _Tangent:
    """Normal(e; 0, 1) exp(peak + slope (e - at)) from `first` to `last`: a piece of an envelope."""

    def __init__(
        self, at: Tensor, peak: Tensor, slope: Tensor, first: Tensor, last: Tensor
    ) -> None:
        self.line = at, peak, slope, first, last
        inside = log_interval(first - slope, last - slope)
        self.log_mass = peak - slope * at + slope.square() / 2 + inside


def _interval(low: Tensor, high: Tensor, shift: Tensor) -> Tensor:
    """exp(shift) [Phi(high) - Phi(low)], from the nearer tail."""
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    root = 2**-0.5
    return shift.exp() * (torch.erfc(-root * high) - torch.erfc(-root * low)) / 2


def _far_interval(low: Tensor, high: Tensor, shift: Tensor) -> Tensor:
    """The same where the factors are no numbers; three times slower."""
    return (shift + log_interval(low, high)).exp()
