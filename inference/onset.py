"""One onset of a stimulus: what stays the same while a circuit runs, and what is taken from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import vjp

from .errors import Diverged
from .langevin import Target, run
from .observation import Observation
from .progress import Advance
from .sampling import Plan, Sampling
from .tonic import Level

if TYPE_CHECKING:
    from .guides.score_circuit import ScoreCircuit

__all__ = ["Onset"]

PROBES = 16  # states at which the curvature of a diverging circuit is taken
POWERS = 20  # power iterations for it


class Onset:
    """A circuit that sees x from now on.

    Args:
        circuit: the circuit.
        x: observation of B problems.
        how: what is corrected, weighted and recorded.
        plan: the steps.

    Attributes:
        time: simulated so far by all chains together, in time constants of the neurons.
    """

    def __init__(self, circuit: ScoreCircuit, x: Observation, how: Sampling, plan: Plan) -> None:
        self.circuit, self.x, self.how, self.plan = circuit, x, how, plan
        self.standard = circuit.standard(x)
        self.work = self.standard.new_empty(0)
        self.time = 0.0
        self._level: tuple[float, Level] | None = None

    def level(self, sigma: float) -> Level:
        """Inputs at a noise level; the latest are kept."""
        if self._level is None or self._level[0] != sigma:
            levels = self.standard.new_full((len(self.standard),), sigma)
            self._level = (sigma, self.circuit.level(self.standard, levels))
        return self._level[1]

    def score(self, sigma: float) -> Callable[[Tensor], Tensor]:
        """The score at a noise level as a function of y (R, B, D)."""
        level = self.level(sigma)
        return lambda y: self.circuit.at(y, level, self.work)

    def target(self) -> Target | None:
        """The log-density that corrects stationary steps."""
        lat, lowest = self.circuit.latents, self.circuit.noise[0]
        targets: dict[str, Target | None] = {
            "none": None,
            "model": lambda y: lat.log_density(self.unwhiten(y), self.x),
            "own": lambda y: self.circuit.potential(y, self.level(lowest)),
        }
        return targets[self.how.correction]

    def unwhiten(self, y: Tensor) -> Tensor:
        """y to packed latents."""
        return self.circuit.whitening.unwhiten(y, self.standard)

    def run(self, n: int, advance: Advance) -> dict[str, Tensor]:
        """n times through the plan.

        Returns:
            packed latents `u` (n, draws, B, D), what is recorded, and numbers (n, draws, B).

        Raises:
            Diverged: with the step size to use.
        """
        b, d = len(self.standard), self.circuit.latents.size
        self.work = self.standard.new_empty(n * b, self.circuit.neurons)
        first = self.plan.start * torch.randn_like(self.standard.new_empty(n, b, d))
        chains = self.circuit.chains(first.clone(), self)
        kept: dict[str, Tensor] = {}

        def take(k: int) -> None:
            found = {"u": self.unwhiten(chains.y), **chains.numbers()}
            if self.how.record:
                found["rates"] = chains.rates()
            if self.how.path_weights:
                found["log_q"] = self._log_q(first, found["u"], found.pop("log_path"))
            for name, t in found.items():
                if k == 0:
                    kept[name] = t.new_empty(n, len(self.plan.keep), *t.shape[1:])
                kept[name][:, k] = t

        try:
            run(chains, self.plan, take, advance)
        except Diverged as error:
            raise self._advice(error) from None
        self.time += n * chains.time
        return kept

    def _log_q(self, first: Tensor, u: Tensor, log_path: Tensor) -> Tensor:
        """log p(x, z) less the log importance weight of the whole path, (n, B)."""
        d, sd = first.shape[-1], self.plan.start
        log_start = -0.5 * (first / sd).square().sum(-1) - d * math.log(sd * math.sqrt(2 * math.pi))
        jacobians = torch.stack(list(self.circuit.latents.unpack(u)[1].values())).sum(0)
        inside = self.circuit.whitening.root.diagonal().log().sum()
        return log_start - log_path - jacobians - inside

    def _advice(self, error: Diverged) -> Diverged:
        """The error, with a step size under which the circuit is stable around the guess."""
        level = self.level(self.circuit.noise[0])
        y = level.tonic.centre + torch.randn(
            PROBES, len(self.standard), self.circuit.latents.size
        ).to(self.standard)
        v = torch.randn_like(y)
        for _ in range(POWERS):
            v = v / v.norm(dim=-1, keepdim=True)
            v = vjp(lambda at: self.circuit.at(at, level), y)[1](v)[0]
        good = 1 / float(v.norm(dim=-1).max())
        used = max((s.drift for s in self.plan.steps if s.stationary), default=0.0)
        fix = f"Use Sampling(step={good:.2g}); it was {used:.2g}."
        if used <= good:
            fix = (
                "The steps are short enough: the score leads away. Train longer, or with lower lr."
            )
        error.args = (f"{error}{fix}",)  # ends with a space: its own fix is empty
        return error
