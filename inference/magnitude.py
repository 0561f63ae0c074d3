"""What weights cost by their size: E[-log p(w)] under Gaussian noise, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, Laplace, Normal

__all__ = ["Penalty", "Priors", "penalty"]

Slopes = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Penalty(NamedTuple):
    """-log p(w) = weight |w - loc|^degree + offset, elementwise, in nats.

    Attributes:
        loc: where the prior is largest.
        weight: price of a size.
        offset: what remains.
        degree: of the power.
        slopes: gradients of E|N(d, s^2)|^degree by d and by log s, given d and s^2. Given d and
            None, there is no noise, and no second gradient.
    """

    loc: Tensor
    weight: Tensor
    offset: Tensor
    degree: int
    slopes: Slopes

    def __call__(self, mean: Tensor, variance: Tensor | None) -> tuple[Tensor, ...]:
        """E[-log p(w)] for w ~ Normal(mean, variance), summed over the last axis; its gradients.

        The gradients are those by mean and by log sd. The mean size is homogeneous in d and s, so
        by Euler's theorem degree E|w - loc|^degree = d times the first plus the second.
        """
        d = mean - self.loc
        by_d, by_log_sd = self.slopes(d, variance)
        by_d = self.weight * by_d
        size = torch.linalg.vecdot(d, by_d)
        if by_log_sd is None:
            return size / self.degree + self.offset, by_d
        by_log_sd = self.weight * by_log_sd
        return (size + by_log_sd.sum(-1)) / self.degree + self.offset, by_d, by_log_sd


@singledispatch
def penalty(prior: Distribution) -> Penalty | None:
    """The penalty that a prior is, or None where there is no closed form.

    Register another family of priors with `penalty.register`.

    Args:
        prior: with a batch as large as the weights, and no event.
    """
    return None


@penalty.register
def _normal(prior: Normal) -> Penalty:
    offset = (math.sqrt(2 * math.pi) * prior.scale).log()
    return Penalty(prior.loc, 0.5 / prior.scale.square(), offset, 2, _square)


@penalty.register
def _laplace(prior: Laplace) -> Penalty:
    return Penalty(prior.loc, 1 / prior.scale, (2 * prior.scale).log(), 1, _absolute)


def _square(d: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of d^2 + s^2."""
    return 2 * d, None if variance is None else 2 * variance


def _absolute(d: Tensor, variance: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of d erf(d / s sqrt 2) + s sqrt(2 / pi) exp(-d^2 / 2 s^2)."""
    if variance is None:
        return d.sign(), None
    sd = variance.sqrt()
    z = d / sd
    return (math.sqrt(0.5) * z).erf(), math.sqrt(2 / math.pi) * sd * (-0.5 * z * z).exp()


class _Fixed(Function):
    """A penalty without parameters to learn: its gradients come with it."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, log_sd: Tensor, variance: Tensor | None, penalty: Penalty
    ) -> Tensor:
        """(B, D) to (B,)."""
        value, *slopes = penalty(mean, variance)
        ctx.save_for_backward(*slopes)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Chain rule."""
        by_mean, *by_log_sd = (g[:, None] * slope for slope in ctx.saved_tensors)
        return by_mean, by_log_sd[0] if by_log_sd else None, None, None


class Priors:
    """The priors of many weights as one penalty; prices are kept as long as they stay the same."""

    def __init__(self) -> None:
        self.scales: Sequence[Tensor] = ()
        self.prices: Penalty | None = None

    def __call__(
        self, priors: Sequence[Any], mean: Tensor, log_sd: Tensor, variance: Tensor | None
    ) -> Tensor | None:
        """E[-log p(w)], (B,), or None where there is no closed form.

        Args:
            priors: distributions of one family, with batches as large as the weights.
            mean: of all their weights, (B, D).
            log_sd: of the weights.
            variance: of the weights; None for -log p(mean).
        """
        scales = [_distinct(getattr(p, n)) for p in priors for n in p.arg_constraints if n != "loc"]
        learned = any(t.requires_grad for t in scales)
        if learned or self.prices is None or not _same(scales, self.scales):
            self.scales, self.prices = scales, _join([penalty(p) for p in priors], len(mean))
        if self.prices is None:
            return None
        now = self.prices._replace(loc=_flat([p.loc for p in priors], len(mean)))
        if learned or now.loc.requires_grad:
            return now(mean, variance)[0]
        value: Tensor = _Fixed.apply(mean, log_sd, variance, now)  # type: ignore[no-untyped-call]
        return value


def _join(found: Sequence[Penalty | None], rows: int) -> Penalty | None:
    """One penalty for the weights of all sites, (B, D), but for their loc."""
    known = [p for p in found if p is not None]
    if not known:
        return None
    weight, offset = (
        _flat(ts, rows) for ts in zip(*((p.weight, p.offset) for p in known), strict=True)
    )
    return known[0]._replace(weight=weight, offset=offset.sum(-1))


def _flat(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Tensors (B, ...) side by side."""
    return torch.cat([t.reshape(rows, -1) for t in tensors], -1)


def _same(now: Sequence[Tensor], last: Sequence[Tensor]) -> bool:
    return len(now) == len(last) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(now, last, strict=True)
    )


def _distinct(t: Tensor) -> Tensor:
    """t without the copies that `expand` made, whose axes have stride 0."""
    strides = t.stride()
    return t[tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)] if 0 in strides else t
