"""Beliefs that are refined step by step: what circuits that iterate show to objectives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.distributions import Distribution

from .observation import Observation
from .synapses import Synapses

__all__ = ["HasBeliefs", "Moment", "State"]

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Moment:
    """What a circuit believes after t steps, and what its neurons tell one another then.

    Attributes:
        state: potentials, each (B, K).
        q: the belief, batch shape (B, K).
        p: what its divergence is counted from, batch shape (K,) or (B, K).
        relaxed: the belief as spikes are drawn from it, differentiable where it can be.
        signal: what neurons send, such a draw or the mean of q, (B, K).
        currents: what they receive in return, (B, K).
        synapses: the wiring.
        drawn: the signal is a draw.
    """

    state: State
    q: Distribution
    p: Distribution
    relaxed: Distribution
    signal: Tensor
    currents: Tensor
    synapses: Synapses
    drawn: bool = True

    def expected_energy(self) -> Tensor:
        """E_q[-log p(x given z)], (B,), in nats: exact if the decoder is linear, else by a draw."""
        return self.synapses.expected_energy(self.q, self.relaxed)

    def sampled_energy(self) -> Tensor:
        """The same at the signal sent, (B,), with the variance that it lacks put back.

        Relaxed spikes lack some of it, rates all. With a nonlinear decoder to second order only.
        """
        lost = self.q.variance - self.relaxed.variance * self.drawn
        spread = 0.5 * (self.synapses.curvature(self.signal) * lost).sum(-1)
        return self.synapses.energy(self.signal, self.currents) + spread


@runtime_checkable
class HasBeliefs(Protocol):
    """Beliefs that are refined step by step: for the free energy.

    Attributes:
        steps: of inference.
        training_steps: of one training step.
    """

    steps: int
    training_steps: int

    def unroll(
        self,
        x: Observation,
        *,
        steps: int,
        state: State | None = None,
        temperature: float = 0.0,
        truncate: int = 0,
    ) -> Iterator[Moment]:
        """Beliefs from the start on, steps + 1 of them."""
