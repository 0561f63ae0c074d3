"""What it costs a neuron or a synapse to be reliable: R(s) of noise of sd s, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import BadInput, lookup
from .guide import check_number, check_positive

__all__ = [
    "GAUSSIAN",
    "MECHANISMS",
    "Cost",
    "Entropic",
    "PowerLaw",
    "Sum",
    "calibrated_scale",
    "mixture",
]

# exponent rho of the cost s^-rho of reliable transmission (Malkin et al., 2024, appendix 1)
MECHANISMS: Mapping[str, float] = {
    "calcium efflux": 1 / 2,
    "vesicle membrane": 2 / 3,
    "actin": 4 / 3,
    "trafficking": 2.0,
}
GAUSSIAN = 0.5 * math.log(2 * math.pi * math.e)  # entropy of noise of sd one
HALVINGS = 200  # of an interval of log sds: more than a float can tell apart
FAR = 200.0  # ends of that interval


class Cost:
    """R(s), the falling cost of a unit whose Gaussian noise has sd s, in nats.

    A subclass gives the `energy` E(s) and `marginal` = -dE / d log s. Called, a cost adds the
    constant for which R(s) >= -log s - (1/2) log(2 pi e), minus the entropy of the noise, with
    equality at s0 = `scale`: performance, activity and reliability together are then never below
    minus the ELBO. Noise with correlations is charged along its principal axes.
    """

    @property
    def positive(self) -> bool:
        """Whether energy is above zero for all s, so that a budget for it makes sense."""
        return True

    @property
    def scale(self) -> float:
        """s0, where marginal(log s0) = 1."""
        return math.exp(_root(lambda v: 1 - float(self.marginal(_double(v)))))

    def energy(self, log_sd: Tensor) -> Tensor:
        """E(s), elementwise."""
        raise NotImplementedError

    def marginal(self, log_sd: Tensor) -> Tensor:
        """-dE / d log s, elementwise: what it costs to have noise a little smaller."""
        raise NotImplementedError

    def __call__(self, log_sd: Tensor) -> Tensor:
        """R(s), elementwise."""
        return self.energy(log_sd) + self.offset

    @cached_property
    def offset(self) -> float:
        """R - E."""
        log_scale = _double(math.log(self.scale))
        return -float(self.energy(log_scale)) - float(log_scale) - GAUSSIAN

    def slack(self, log_sd: Tensor) -> Tensor:
        """How far R(s) is above minus the entropy of the noise, elementwise, in nats."""
        return self(log_sd) + log_sd + GAUSSIAN

    def optimal_sd(self, curvature: Tensor) -> Tensor:
        """s where H s^2 = marginal: the best noise under a loss of curvature H, elementwise.

        Malkin et al. (2024), equation 28, for any cost; infinite where H = 0.
        """
        h = curvature.double()
        low, high = torch.full_like(h, -FAR), torch.full_like(h, FAR)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            noisy = h.log() + 2 * middle > self.marginal(middle).log()
            low, high = torch.where(noisy, low, middle), torch.where(noisy, middle, high)
        return torch.where(h > 0, low.exp(), torch.inf).to(curvature)


@dataclass(frozen=True)
class Entropic(Cost):
    """R(s) = -log s - (1/2) log(2 pi e), minus the entropy of the noise.

    With it the cost of a circuit is minus the ELBO, exactly, and its noise is a posterior.
    """

    @property
    def positive(self) -> bool:
        """No: log s may be anything."""
        return False

    @property
    def scale(self) -> float:
        """Any sd would do: the bound is tight everywhere."""
        return 1.0

    def energy(self, log_sd: Tensor) -> Tensor:
        """-log s."""
        return -log_sd

    def marginal(self, log_sd: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(log_sd)


@dataclass(frozen=True, init=False)
class PowerLaw(Cost):
    """E(s) = c s^-rho; with c = s0^rho / rho it touches minus the entropy at s0.

    The noise of a unit is then between the posterior's sd and s0, on a log scale:
    log s = (2 log s_posterior + rho log s0) / (rho + 2) where the loss is quadratic.

    Args:
        rho: exponent > 0, or the name of a mechanism: "calcium efflux" (1/2), "vesicle membrane"
            (2/3), "actin" (4/3), "trafficking" (2).
        scale: s0 > 0; this or
        coefficient: c > 0.

    Raises:
        BadInput: a number is not above 0, a name is unknown, or both or neither of scale and
            coefficient are given.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equations 4 and 45-48 https://doi.org/10.7554/eLife.92595
    """

    rho: float
    coefficient: float

    def __init__(
        self, rho: float | str, *, scale: float | None = None, coefficient: float | None = None
    ) -> None:
        power = lookup(MECHANISMS, rho, "mechanism") if isinstance(rho, str) else rho
        check_positive("rho", power, usual=0.5)
        if (scale is None) == (coefficient is None):
            got = "neither" if scale is None else "both"
            raise BadInput("scale, coefficient", expected="one of them", got=got, fix="scale=0.1.")
        if coefficient is None:
            assert scale is not None
            check_positive("scale", scale, usual=0.1)
            coefficient = scale**power / power
        check_positive("coefficient", coefficient, usual=0.1)
        object.__setattr__(self, "rho", float(power))
        object.__setattr__(self, "coefficient", float(coefficient))

    @property
    def scale(self) -> float:
        """s0 = (c rho)^(1 / rho)."""
        return float((self.coefficient * self.rho) ** (1 / self.rho))

    def energy(self, log_sd: Tensor) -> Tensor:
        """c s^-rho."""
        return self.coefficient * (-self.rho * log_sd).exp()

    def marginal(self, log_sd: Tensor) -> Tensor:
        """rho c s^-rho."""
        return self.rho * self.energy(log_sd)

    def optimal_sd(self, curvature: Tensor) -> Tensor:
        """(c rho / H)^(1 / (rho + 2)), equation 28."""
        return (self.coefficient * self.rho / curvature) ** (1 / (self.rho + 2))


@dataclass(frozen=True)
class Sum(Cost):
    """Several costs that a unit pays at once.

    Args:
        costs: each with its own coefficient.
    """

    costs: tuple[Cost, ...]

    @property
    def positive(self) -> bool:
        """As all of them."""
        return all(cost.positive for cost in self.costs)

    def energy(self, log_sd: Tensor) -> Tensor:
        """The sum of theirs."""
        return torch.stack([cost.energy(log_sd) for cost in self.costs]).sum(0)

    def marginal(self, log_sd: Tensor) -> Tensor:
        """The sum of theirs."""
        return torch.stack([cost.marginal(log_sd) for cost in self.costs]).sum(0)


def mixture(weights: Mapping[str | float, float], *, scale: float) -> Sum:
    """A sum of power laws, sum_j w_j (s0 / s)^rho_j / rho_j, that touches minus the entropy at s0.

    Args:
        weights: w_j >= 0 by mechanism or exponent; they are divided by their sum.
        scale: s0.

    Raises:
        BadInput: a weight is negative, or all are zero.
    """
    for name, weight in weights.items():
        check_number(f"weights[{name!r}]", weight)
    total = sum(weights.values())
    check_positive("sum of weights", total, usual=1.0)
    laws = [(PowerLaw(name, scale=scale), w / total) for name, w in weights.items() if w > 0]
    return Sum(tuple(PowerLaw(k.rho, coefficient=w * k.coefficient) for k, w in laws))


def calibrated_scale(sd: Tensor, rho: float) -> float:
    """The s0 for which a power law leaves the least gap to the ELBO.

    s0^(2 rho / (rho + 2)) = n / sum_i sd_i^(-2 rho / (rho + 2)), where the loss is quadratic.

    Args:
        sd: of a factorised posterior, 1 / sqrt(H_ii), any shape.
        rho: exponent.
    """
    check_positive("rho", rho, usual=0.5)
    power = 2 * rho / (rho + 2)
    return float((sd.double() ** -power).mean() ** (-1 / power))


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of log s is zero."""
    low, high = -FAR, FAR
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
