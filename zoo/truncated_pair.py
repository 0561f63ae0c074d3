"""A bivariate Normal cut to a square."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from .sbi import keep_trying, log_interval
from .truncated import TruncatedNormal

__all__ = ["TruncatedPair", "legendre"]

_Shape = torch.Size | list[int] | tuple[int, ...]
NODES = 12  # of each of the four panels; relative error of the mass below 1e-6
CUT = 25.0  # nats below the peak where an integral may stop: e^-25 is left out
FAR = 300.0  # nats; exp(-FAR - 2 CUT) is still a normal float64
ROWS = 4096


def legendre(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of Gauss and Legendre on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor((nodes + 1) / 2).to(like), torch.as_tensor(weights / 2).to(like)


class TruncatedPair(Distribution):
    """Normal(loc, scale, corr) of two variables on [-bound, bound]^2.

    Standardised, with a sign that makes the correlation r positive, the pair is p = c t - d e and
    q = c t + d e with independent t, e ~ Normal(0, 1), c^2 = (1 + r) / 2 and d^2 = (1 - r) / 2.
    Given e, the square cuts t to an interval whose ends have slopes of at most one in e. That
    leaves one smooth, log-concave integral over e, in panels between its kinks.

    Args:
        loc: of the Normal before the cut, (..., 2), float64.
        scale: of the Normal before the cut, (..., 2).
        corr: of the Normal before the cut, (...).
        bound: half the side of the square.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, corr: Tensor, bound: float) -> None:
        super().__init__(corr.shape, torch.Size([2]), validate_args=False)
        self.loc, self.scale = loc.expand(*corr.shape, 2), scale.expand(*corr.shape, 2)
        self.bound = bound
        self.sign = torch.where(corr < 0, -1.0, 1.0).to(loc)
        low, high = (-bound - self.loc) / self.scale, (bound - self.loc) / self.scale
        ends = torch.stack([low[..., 1], high[..., 1]]) * self.sign
        rows = low[..., 0], high[..., 0], ends.amin(0), ends.amax(0)
        r = corr.abs()
        self.cut = _Cut(*rows, ((1 + r) / 2).sqrt(), ((1 - r) / 2).sqrt())

    @cached_property
    def log_mass(self) -> Tensor:
        """Log-probability of the square, (...)."""
        flat = self.cut.map(lambda v: v.reshape(-1))
        n = flat.c.numel()
        pieces = [flat.map(lambda v, i=i: v[i : i + ROWS]).log_mass() for i in range(0, n, ROWS)]
        return torch.cat(pieces).reshape(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, in nats; -inf outside."""
        outside = value.abs().amax(-1) > self.bound
        return (self.log_normal(value) - self.log_mass).masked_fill(outside, -torch.inf)

    def log_normal(self, value: Tensor) -> Tensor:
        """Log-density before the cut, in nats."""
        p, q = ((value - self.loc) / self.scale).unbind(-1)
        q = q * self.sign
        c, d = self.cut.c, self.cut.d
        squares = ((p + q) / (2 * c)).square() + ((q - p) / (2 * d)).square()
        volume = self.scale.log().sum(-1) + (2 * c * d).log() + math.log(2 * math.pi)
        found: Tensor = -squares / 2 - volume
        return found

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., 2)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        rows = self.cut.map(lambda v: v.expand(shape).reshape(-1))
        pair = keep_trying(_Tangent(rows).propose, rows.c.new_empty(shape.numel(), 2))
        q = pair[:, 1].reshape(shape) * self.sign
        value = self.loc + self.scale * torch.stack([pair[:, 0].reshape(shape), q], -1)
        return value.clamp(-self.bound, self.bound)


class _Cut:
    """The square seen from e: a1 <= c t - d e <= b1 and a2 <= c t + d e <= b2, elementwise."""

    def __init__(self, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, c: Tensor, d: Tensor):
        self.a1, self.b1, self.a2, self.b2, self.c, self.d = a1, b1, a2, b2, c, d
        self.first, self.last = (a2 - b1) / (2 * d), (b2 - a1) / (2 * d)  # where e can be

    def map(self, f: Any) -> _Cut:
        """f of every tensor."""
        return _Cut(*(f(v) for v in (self.a1, self.b1, self.a2, self.b2, self.c, self.d)))

    def ends(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest t."""
        step = self.d * e
        low = torch.maximum(self.a1 + step, self.a2 - step) / self.c
        return low, torch.minimum(self.b1 + step, self.b2 - step) / self.c

    def slopes(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Of the two ends."""
        k, step = self.d / self.c, self.d * e
        low = torch.where(self.a1 + step > self.a2 - step, k, -k)
        return low, torch.where(self.b1 + step < self.b2 - step, k, -k)

    def nearest(self) -> tuple[Tensor, Tensor]:
        """e at the point of the square that is likeliest before the cut, and its nats below 0.

        It is the origin, or lies on the line through one of the origin's two projections.
        """
        r, zero = self.c.square() - self.d.square(), torch.zeros_like(self.c)
        p_1 = zero.clamp(self.a1, self.b1)
        q_2 = zero.clamp(self.a2, self.b2)
        q_1, p_2 = (r * p_1).clamp(self.a2, self.b2), (r * q_2).clamp(self.a1, self.b1)
        loss_1, loss_2 = self._loss(p_1, q_1), self._loss(p_2, q_2)
        e = torch.where(loss_1 <= loss_2, q_1 - p_1, q_2 - p_2) / (2 * self.d)
        return e, torch.minimum(loss_1, loss_2)

    def _loss(self, p: Tensor, q: Tensor) -> Tensor:
        return ((p + q) / self.c).square() / 8 + ((q - p) / self.d).square() / 8

    def tilt(self, e: Tensor) -> Tensor:
        """How fast e^2 / 2 plus half the squared distance of t from its interval rises."""
        low, high = self.ends(e)
        low_slope, high_slope = self.slopes(e)
        return e + low.clamp_min(0.0) * low_slope + high.clamp_max(0.0) * high_slope

    def log_mass(self) -> Tensor:
        """log of the integral of Normal(e) [Phi(high(e)) - Phi(low(e))]."""
        e, loss = self.nearest()
        nudge = 1e-9 * (1 + e.abs())
        up, down = self.tilt(e + nudge).clamp_min(0.0), (-self.tilt(e - nudge)).clamp_min(0.0)
        last = torch.minimum(self.last, e - up + (up.square() + 2 * CUT).sqrt())
        first = torch.maximum(self.first, e + down - (down.square() + 2 * CUT).sqrt())
        kinks = torch.stack([self.a2 - self.a1, self.b2 - self.b1]) / (2 * self.d)
        kinks = kinks.clamp(first, last)
        inner = torch.cat([kinks, e[None]]).sort(0).values
        edges = torch.cat([first[None], inner, last[None]])
        nodes, weights = legendre(NODES, e)
        total = torch.zeros_like(e)
        far = loss > FAR
        for start, width in zip(edges[:-1], edges.diff(dim=0), strict=True):
            for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
                at = start + node * width
                total += weight * width * (loss - at.square() / 2).exp() * _interval(*self.ends(at))
        log_total = total.log() - loss
        return log_total - math.log(2 * math.pi) / 2
