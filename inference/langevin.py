"""Many Langevin chains at once: the engine behind every circuit that follows a score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .errors import Diverged
from .progress import Advance
from .sampling import Plan, Step

__all__ = ["Chains", "OutputChains", "run"]

FAR = 1e4  # |y| of a state that has left for good, in sds of the guess
WANTED = 0.574  # acceptance that makes MALA fastest

Score = Callable[[float], Callable[[Tensor], Tensor]]
Target = Callable[[Tensor], Tensor]


class Chains(Protocol):
    """States of many chains, with outputs y (R, B, D), that can be moved.

    Attributes:
        y: outputs.
        time: simulated so far by each chain, on average, in time constants of the neurons.
    """

    y: Tensor
    time: float

    def advance(self, step: Step, xi: Tensor) -> None:
        """One step with noise xi, (R, B, D)."""

    def numbers(self) -> dict[str, Tensor]:
        """What is known of each chain, (R, B)."""

    def rates(self) -> Tensor:
        """What the neurons do, (R, B, N)."""


class OutputChains:
    """Chains that are their outputs alone.

    Args:
        y: first states, (R, B, D).
        score: of a noise level, a function of y.
        skew: skew part of the dynamics, (D, D), or None.
        target: log-density (R, B) of states, where stationary steps are to be corrected by it.
        weighted: keep log weights of paths.

    Attributes:
        y: states.
        time: of each chain, in time constants: steps as they were tuned, refused ones among them.
    """

    def __init__(
        self,
        y: Tensor,
        score: Score,
        *,
        skew: Tensor | None = None,
        target: Target | None = None,
        weighted: bool = False,
    ) -> None:
        self.y, self.score, self.skew, self.target = y, score, skew, target
        self.log_path = y.new_zeros(y.shape[:-1]) if weighted else None
        self.size = y.new_ones(y.shape[1], 1)  # of corrected steps, by problem
        self.accepted, self.tried = y.new_zeros(y.shape[:-1]), 0
        self.time = 0.0
        self._here: tuple[Tensor, Tensor] | None = None  # direction and log target of y

    def numbers(self) -> dict[str, Tensor]:
        """`acceptance`, the share of corrected steps taken since they were tuned; `log_path`, the
        log-density of all ways back less that of the ways there.
        """
        found = {} if self.target is None else {"acceptance": self.accepted / max(1, self.tried)}
        return found if self.log_path is None else found | {"log_path": self.log_path}

    def rates(self) -> Tensor:
        """The outputs are the neurons."""
        return self.y

    def advance(self, step: Step, xi: Tensor) -> None:
        """One step with noise xi."""
        if step.stationary and self.target is not None:
            self._metropolis(step, xi, self.target)
            return
        self.time += step.time
        before = None if self.log_path is None else self.y.clone()
        self.y.add_(self._direction(step), alpha=step.drift).add_(xi, alpha=step.noise)
        if before is not None and self.log_path is not None:
            self.log_path += self._back(step, before) - _log_normal(xi, step.noise)

    def _direction(self, step: Step) -> Tensor:
        s = self.score(step.sigma)(self.y)
        return s if self.skew is None or step.onward is not None else s + s @ self.skew.T

    def _back(self, step: Step, before: Tensor) -> Tensor:
        """Log-density of the way back: the noise that made a level, or the same Langevin step."""
        if step.onward is not None:
            return _log_normal((before - self.y) / step.onward, step.onward)
        mean = self.y + step.drift * self._direction(step)
        return _log_normal((before - mean) / step.noise, step.noise)

    def _metropolis(self, step: Step, xi: Tensor, target: Target) -> None:
        """Propose with the circuit's own drift, accept by the target: any drift is right."""
        self.time += step.time * float(self.size.mean())
        drift, level = self._here or (self._direction(step), target(self.y))
        h, sd = step.drift * self.size, step.noise * self.size.sqrt()
        old, self.y = self.y, self.y + h * drift + sd * xi
        there, level_there = self._direction(step), target(self.y)
        back = (old - self.y - h * there) / sd
        log_ratio = level_there - level + _log_normal(back, 1.0) - _log_normal(xi, 1.0)
        take = torch.rand_like(log_ratio).log() < log_ratio  # NaN is a refusal
        self.y = torch.where(take[..., None], self.y, old)
        self._here = (
            torch.where(take[..., None], there, drift),
            torch.where(take, level_there, level),
        )
        if step.tune:
            self.size *= (take.to(self.y.dtype).mean(0) - WANTED).exp()[:, None]
        else:
            self.accepted += take
            self.tried += 1


def _log_normal(e: Tensor, sd: float) -> Tensor:
    """Log-density of noise sd * e, up to a constant."""
    return -0.5 * e.square().sum(-1) - e.shape[-1] * math.log(sd)


def run(chains: Chains, plan: Plan, take: Callable[[int], None], advance: Advance) -> None:
    """Move the chains through the plan; take(k) is called when the k-th draw is due.

    Raises:
        Diverged: a state has left for good, or is no number.
    """
    xi = torch.empty_like(chains.y)
    due = 0
    for done in range(len(plan.steps) + 1):
        while due < len(plan.keep) and plan.keep[due] == done:
            _present(chains.y)
            take(due)
            due += 1
        if done < len(plan.steps):
            chains.advance(plan.steps[done], xi.normal_())
            advance()


def _present(y: Tensor) -> None:
    lost = ~(y.abs() < FAR).all(-1)
    if bool(lost.any()):
        raise Diverged(
            "Langevin chains",
            expected=f"states within {FAR:g} sds of the linear guess",
            got=f"{int(lost.sum())} of {lost.numel()} chains beyond, or not finite",
            fix="",
        )
