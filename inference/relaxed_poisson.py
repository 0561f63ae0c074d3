"""Spike counts with a gradient: Poisson arrivals counted by a smooth edge, not a sharp one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributions import Poisson, constraints, register_kl

from .counts import poisson, poisson_kl
from .errors import BadInput, NoDensity, lookup

__all__ = ["INDICATORS", "Indicator", "RelaxedPoisson", "soft_counts"]

BUSY = 1.0  # mean rate above which sure arrivals are drawn apart, as a count
AT_ONCE = 1 << 21  # expected arrivals of neurons drawn together, some 40 bytes each while it lasts
MOST = 1e8  # expected arrivals of one neuron


@dataclass(frozen=True)
class Indicator:
    """A smooth edge g(v) in place of the step v > 0, v = (1 - S) / tau for an arrival at time S.

    Attributes:
        call: v to g(v) and its slope g'(v).
        reach: |v| beyond which g counts as 0 or 1.
        mean: of tau, the mean count of a process of rate 1, by Campbell's formula.
        variance: of tau, the variance of that count.
        warmest: largest tau.
    """

    call: Callable[[Tensor], tuple[Tensor, Tensor]]
    reach: float
    mean: Callable[[float], float]
    variance: Callable[[float], float]
    warmest: float

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """g(v) and g'(v)."""
        return self.call(v)


def _cubic(v: Tensor) -> tuple[Tensor, Tensor]:
    w = v.mul(0.5).add_(0.5).clamp_(0, 1)
    return w.square() * (3 - 2 * w), 3 * w * (1 - w)


def _sigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    g = v.sigmoid()
    return g, g * (1 - g)


def _cold(tau: float) -> float:
    return math.exp(-1 / tau) if tau else 0.0


def _sigmoid_mean(tau: float) -> float:
    return 1 + tau * math.log1p(_cold(tau))  # tau log(1 + exp(1 / tau))


INDICATORS: Mapping[str, Indicator] = {
    "cubic": Indicator(
        _cubic, reach=1.0, mean=lambda tau: 1.0, variance=lambda tau: 1 - 9 * tau / 35, warmest=1.0
    ),
    "sigmoid": Indicator(
        _sigmoid,
        reach=12.0,  # arrivals beyond would add 6e-6 rate tau to the mean
        mean=_sigmoid_mean,
        variance=lambda tau: _sigmoid_mean(tau) - tau / (1 + _cold(tau)),
        warmest=math.inf,
    ),
}


class RelaxedPoisson(TorchDistribution):  # type: ignore[misc]
    """Spike counts z of neurons of rate r = exp(log_rate), differentiable in log_rate.

    S_1 < S_2 < ... ~ Poisson process of rate r;   z = sum_m g((1 - S_m) / tau).

    A sharp edge g would count the arrivals up to time 1: z ~ Poisson(r). At temperature tau > 0 the
    edge is smooth and z is real. As all S_m scale as 1 / r, dz / dlog r = sum_m g' S_m / tau. Only
    arrivals where g' is not zero are drawn, and only that sum is kept for the backward pass: memory
    does not grow with the counts. At tau = 0, z are hard counts and have no gradient.

    There is no density of z at tau > 0, and the Poisson pmf is none: `log_prob` refuses. Use
    `torch.distributions.kl_divergence`, which gives the divergence between the counts themselves,
    Poisson(r) and Poisson(r0), from another RelaxedPoisson or a Poisson.

    Args:
        log_rate: membrane potentials u, log expected counts per window; finite, any shape.
        temperature: tau, in windows; 0 for hard counts.
        indicator: "cubic", whose mean is r exactly and whose variance is r (1 - 9 tau / 35), with
            tau <= 1; or "sigmoid", as published, whose mean is too large, by 31 % at tau = 1.
        validate_args: check log_rate and the values given to log_prob.

    Raises:
        BadInput: tau is out of range, or there is no such indicator; when drawing, if rates and
            temperature ask for more than 1e8 arrivals of one neuron.

    Differences: the authors store a fixed number of inter-arrival times, a quantile of the largest
    rate, and lose the arrivals beyond it; here none is lost.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025)
        https://arxiv.org/abs/2410.19315
        Hitchhiker's guide to Poisson gradient estimation (2026), the cubic
        https://arxiv.org/abs/2602.03896

    Example:
        >>> import torch
        >>> RelaxedPoisson(torch.zeros(3), temperature=0.5).variance
        tensor([0.8714, 0.8714, 0.8714])
    """

    arg_constraints = {"log_rate": constraints.real}

    def __init__(
        self,
        log_rate: Tensor | float,
        temperature: float,
        indicator: str = "cubic",
        validate_args: bool | None = None,
    ) -> None:
        self.log_rate = torch.as_tensor(log_rate)
        self.temperature = float(temperature)
        self.indicator = indicator
        warmest = lookup(INDICATORS, indicator, "indicator").warmest
        if not 0 <= self.temperature <= warmest or math.isinf(self.temperature):
            raise BadInput(
                "temperature",
                expected=f"a number from 0 to {warmest:g}",
                got=f"{self.temperature:g}",
                fix=f"{indicator!r} takes no other; at 0 counts are hard.",
            )
        super().__init__(self.log_rate.shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether draws have gradients: at temperatures above zero."""
        return self.temperature > 0

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Numbers >= 0; integers at temperature 0."""
        return constraints.nonnegative if self.has_rsample else constraints.nonnegative_integer

    @property
    def rate(self) -> Tensor:
        """r = exp(log_rate)."""
        return self.log_rate.exp()

    @property
    def mean(self) -> Tensor:
        """Mean of z; r unless the indicator is biased."""
        return self.rate * INDICATORS[self.indicator].mean(self.temperature)

    @property
    def variance(self) -> Tensor:
        """Variance of z; less than r at temperatures above zero."""
        return self.rate * INDICATORS[self.indicator].variance(self.temperature)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> RelaxedPoisson:
        """The same law for more batch dims."""
        new: RelaxedPoisson = self._get_checked_instance(RelaxedPoisson, _instance)
        new.log_rate = self.log_rate.expand(batch_shape)
        new.temperature, new.indicator = self.temperature, self.indicator
        super(RelaxedPoisson, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape sample_shape + batch_shape without gradient."""
        with torch.no_grad():
            if self.has_rsample:
                return self.rsample(sample_shape)
            return poisson(self.rate.expand(self._extended_shape(sample_shape)))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of shape sample_shape + batch_shape with gradients.

        Raises:
            BadInput: at temperature 0.
        """
        tau, edge = self.temperature, INDICATORS[self.indicator]
        if not self.has_rsample:
            raise BadInput(
                "temperature", expected="above 0", got="0", fix="Hard counts have sample() only."
            )
        log_rate = self.log_rate.expand(self._extended_shape(sample_shape))
        rate = log_rate.detach().exp().reshape(-1)
        busy = rate.numel() > 0 and float(rate.mean()) > BUSY
        start = max(0.0, 1 - edge.reach * tau) if busy else 0.0
        window = start, 1 + edge.reach * tau
        pieces = [
            self._draw(u, r, window)
            for u, r in zip(*_pieces(log_rate.reshape(-1), rate, window[1] - start), strict=True)
        ]
        return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).view(log_rate.shape)

    def _draw(self, log_rate: Tensor, rate: Tensor, window: tuple[float, float]) -> Tensor:
        """Soft counts of neurons (N,), whose arrivals before the window are sure."""
        start, end = window
        sure = poisson(rate * start) if start else torch.zeros_like(rate)
        entry = _arrivals(rate * (end - start))
        time = torch.rand(len(entry), dtype=rate.dtype, device=rate.device)
        time = time.mul_(end - start).add_(start)
        edge = INDICATORS[self.indicator]
        return soft_counts(log_rate, sure, entry, time, edge, self.temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-pmf of hard counts, in nats.

        Raises:
            NoDensity: at temperatures above zero.
        """
        if self.has_rsample:
            raise NoDensity(
                "RelaxedPoisson",
                expected="temperature 0, where log p(z) is the Poisson's",
                got=f"temperature {self.temperature:g}, where z has no density in closed form",
                fix="Use kl_divergence(q, p) in place of log q(z) - log p(z).",
            )
        if self._validate_args:
            self._validate_sample(value)
        return value * self.log_rate - self.rate - torch.lgamma(value + 1)


def _pieces(
    log_rate: Tensor, rate: Tensor, width: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Neurons (N,) in groups of about AT_ONCE arrivals, so that memory has a bound."""
    total = float(rate.sum()) * width
    if total <= AT_ONCE:
        return (log_rate,), (rate,)
    if not (most := float(rate.max()) * width) <= MOST:
        raise BadInput(
            "log_rate",
            expected=f"at most {MOST:g} arrivals to draw for each neuron",
            got=f"{most:g} expected",
            fix="Clamp the potentials, or lower the temperature.",
        )
    group = rate.double().cumsum(0).mul_(width / AT_ONCE).long()
    sizes = torch.unique_consecutive(group, return_counts=True)[1].tolist()
    return log_rate.split(sizes), rate.split(sizes)


def _arrivals(expected: Tensor) -> Tensor:
    """The neuron of each arrival, (M,), M ~ Poisson(sum of expected) and known only by drawing."""
    counts = poisson(expected)
    if counts.device.type != "cpu":
        return torch.repeat_interleave(counts.long())
    spikes = counts.numpy()  # NumPy does this three times faster
    active = np.flatnonzero(spikes > 0)
    return torch.from_numpy(active.repeat(spikes[active].astype(np.int64)))


class _SoftCounts(torch.autograd.Function):
    """Keeps dz / dlog r, which has the shape of z, and nothing of the arrivals."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        log_rate: Tensor,
        sure: Tensor,
        entry: Tensor,
        time: Tensor,
        edge: Indicator,
        tau: float,
    ) -> Tensor:
        """z."""
        g, slope = edge((1 - time).div_(tau))
        z = sure.to(torch.float64, copy=True)  # in float32 small terms would be lost to large sums
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            gain = torch.zeros_like(z).index_add_(0, entry, slope.mul_(time).div_(tau).double())
            ctx.save_for_backward(gain.to(sure.dtype).view(log_rate.shape))
        return z.index_add_(0, entry, g.double()).to(sure.dtype).view(log_rate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """For log_rate alone."""
        return grad * ctx.saved_tensors[0], None, None, None, None, None


def soft_counts(
    log_rate: Tensor, sure: Tensor, entry: Tensor, time: Tensor, edge: Indicator, tau: float
) -> Tensor:
    """z = sure + sum over arrivals of g((1 - S) / tau), of log_rate's shape; dS / dlog_rate = -S.

    Args:
        log_rate: potentials the arrivals were drawn with, N numbers of any shape.
        sure: arrivals too early for the edge, (N,).
        entry: which of the N neurons each other arrival belongs to, (M,).
        time: when it arrived, S, (M,).
        edge: the indicator g.
        tau: temperature, above 0.
    """
    z: Tensor = _SoftCounts.apply(log_rate, sure, entry, time, edge, tau)  # type: ignore[no-untyped-call]
    return z


@register_kl(RelaxedPoisson, RelaxedPoisson)  # type: ignore[untyped-decorator]
def _(p: RelaxedPoisson, q: RelaxedPoisson) -> Tensor:
    return poisson_kl(p.log_rate, q.log_rate)


@register_kl(RelaxedPoisson, Poisson)  # type: ignore[untyped-decorator]
def _(p: RelaxedPoisson, q: Poisson) -> Tensor:
    return poisson_kl(p.log_rate, q.rate.log())


@register_kl(Poisson, RelaxedPoisson)  # type: ignore[untyped-decorator]
def _(p: Poisson, q: RelaxedPoisson) -> Tensor:
    return poisson_kl(p.rate.log(), q.log_rate)
