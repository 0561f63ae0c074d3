"""The iterative Poisson encoder: membrane potentials, spikes, and explaining away."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Poisson

from ..arguments import Positive
from ..beliefs import Moment, State
from ..latents import ModelLike
from ..relaxed_poisson import RelaxedPoisson
from .iterative import Iterative

__all__ = ["IterativePoisson", "OnlinePoisson"]

CEILING = 10.0  # of log rates: 22,000 spikes
FLOOR, NEVER = -8.0, -40.0  # of log rates, as published and where they need not be bounded
SMALL = -3.0  # log of the learned constant inhibition at first


class IterativePoisson(Iterative):
    """Spiking neurons whose potentials are log rates, and whose inference is their dynamics.

    q(z given x) = Poisson(exp(u)); in units of the noise, with Phi the decoder,

        u <- u + h (Phi' x - Phi' Phi s - d / 2 - beta (u - u0)),   d = diag(Phi' Phi):

    feed-forward drive, explaining away by the signal s, self-inhibition, leak to the prior's log
    rate u0. These are natural-gradient steps on the free energy. In the mode "fixed", by rates,
    with self-inhibition and beta = 1, u goes to the best factorised Poisson posterior; there is
    nothing to train. Without self-inhibition rates are too high; a learned inhibition exp(c) can
    make up for some of it. In the mode "online" each belief is the next one's prior, so that the
    leak is gone and each step counts the evidence of x anew.

    With a nonlinear decoder Phi' (x - Phi s) is its vector-Jacobian product, and self-inhibition
    the cost of one spike more, at K decodings per step.

    Args:
        model: Poisson latents, Gaussian noise behind a decoder, such as zoo.PoissonCoding.
        mode: "fixed" or "online".
        signal: "rates" or "spikes".
        self_inhibition: d / 2, or else a learned constant.
        steps: T, of inference.
        training_steps: T of one training step.
        beta: gain of the leak.
        step: h of neuron k at first, in units of 1 / (1 + load_k), load_k = sum_j |W_kj| r_j with
            W = Phi' Phi.
        learn_step: h is learned.
        cautious: r_j of the moment, so that no problem becomes unstable; else of the prior.
        ceiling: largest u.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025), the update of u, and its
        implementation https://arxiv.org/abs/2410.19315

    Differences:
        The published update lacks -d / 2, the effect of Poisson variability on the expected error;
        its code has the learned constant in that place. Bounds: log rates have the published
        ceiling of 10, reached by a bend of the last unit instead of a softplus, not annealed; steps
        have none but are shortened by the load, without which circuits overshoot and explode;
        decoders are not restricted to linear ones; one draw per step and not two.
    """

    family = Poisson

    def __init__(self, model: ModelLike, *, ceiling: Positive = CEILING, **knobs: Any) -> None:
        super().__init__(model, **knobs)
        self.knobs["ceiling"] = self.ceiling = ceiling
        learned = not self.exact_self
        inhibition = torch.full((self.reader.neurons,), SMALL if learned else -math.inf)
        self.log_inhibition = nn.Parameter(inhibition.to(self.log_step), requires_grad=learned)

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Of u."""
        return ((NEVER if self.mode.wide else FLOOR, self.ceiling),)

    def law(self, *state: Tensor, temperature: float = 0.0) -> Distribution:
        """Independent Poisson counts, relaxed at temperatures above zero."""
        return RelaxedPoisson(state[0], temperature, validate_args=False)

    def origin(self, prior: Distribution) -> State:
        """u0."""
        assert isinstance(prior, Poisson)
        return (prior.rate.log(),)

    def force(self, now: Moment, origin: State) -> State:
        """-dF/du divided by the Fisher information r."""
        (u,), (u0,) = now.state, origin
        inhibition = self.log_inhibition.exp()
        if self.exact_self:
            inhibition = inhibition + 0.5 * now.synapses.curvature(now.signal)
        force = now.currents - inhibition
        pull = self.mode.leak * self.beta
        return (force - pull * (u - u0) if pull else force,)


class OnlinePoisson(IterativePoisson):
    """The iterative Poisson encoder as published: spikes, a rolling prior, learned inhibition.

    See :class:`IterativePoisson`, whose knobs it has; these are other defaults.

    Args:
        model: Poisson latents, Gaussian noise behind a decoder, such as zoo.PoissonCoding.
        **knobs: see there.
    """

    def __init__(self, model: ModelLike, **knobs: Any) -> None:
        published = {"mode": "online", "signal": "spikes", "self_inhibition": False}
        super().__init__(model, **{**published, "learn_step": True, **knobs})
