"""Stochastic synapses: every weight of a network has a mean and a noise of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..arguments import Index, NonNegative, Positive
from ..bound import BoundGuide
from ..errors import lookup
from ..guide import check_number, check_positive
from ..latents import Energies, Latents, ModelLike
from ..local import Inputs, Run
from ..magnitude import Priors
from ..noise import PrivateNoise
from ..objectives.reliability import ReliabilityCost
from ..observation import Observation, parts
from ..seeds import seeded

__all__ = ["StochasticSynapses"]

NOISE: Mapping[str, Callable[[Latents], list[int]]] = {  # how many synapses share a noise
    "synapse": lambda latents: [],  # each has its own
    "layer": lambda latents: list(latents.splits.values()),
    "network": lambda latents: [latents.size],
}


class StochasticSynapses(BoundGuide, PrivateNoise):
    """Weights that are released anew, with noise, whenever they are used.

    w_i ~ Normal(m_i, s_i), independent over weights i = 1 ... D. How large the noise is, is learned
    with the means, against what it costs a synapse to be reliable: :class:`ReliabilityCost`.

    It is for models whose latents are weights: of one network that sees all of x, such as
    zoo.BayesianMLP, or of a network for each problem, such as zoo.BayesianRegression. The noise of
    a training step is local: each row of inputs meets weights of its own, which is done by drawing
    what the weights drive. For one row that is the same, and over many rows the gradient is much
    less noisy. It works in any Pyro program: inputs @ weights, their views, biases and
    torch.nn.functional.linear are seen to, and for everything else the weights are drawn.

    Args:
        model: any model with continuous latents.
        noise: "synapse", each has its own; "layer", all of a site share one; "network", all do.
        scale: sd of a synapse at the start. Where a power law makes reliability dear, begin at its
            scale s0: a synapse that starts far too reliable has a gradient that drowns all others.
        spread: means start uniform in (-spread, spread).
        local: noise is local; else all rows of a step share one draw of the weights.
        seed: of the first means.

    Raises:
        BadInput: an unknown kind of noise, or a number is not above 0.
        Incompatible: with local noise, a weight is used twice in the model, or rows that met the
            same weight meet again before they are scored.

    Differences:
        The paper draws the weights once for a minibatch, has s = softplus(phi) and starts it at
        1e-4. Here log s is the parameter.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equations 2-5 https://doi.org/10.7554/eLife.92595
        Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans & Welling,
        2015), section 2.2 https://arxiv.org/abs/1506.02557
    """

    objective = ReliabilityCost
    takes_rows = True

    mean: nn.Parameter
    log_scale: nn.Parameter

    def __init__(
        self,
        model: ModelLike,
        *,
        noise: str = "synapse",
        scale: Positive = 0.1,
        spread: NonNegative = 0.1,
        local: bool = True,
        seed: Index = 0,
    ) -> None:
        super().__init__(model, noise=noise, scale=scale, spread=spread, local=local, seed=seed)
        self.sharers = lookup(NOISE, noise, "noise")(self.latents)
        check_positive("scale", scale, usual=0.1)
        check_number("spread", spread, usual=0.1)
        self.scale, self.spread, self.local, self.seed = scale, spread, local, seed
        self.priors: dict[str, Priors] = {}
        self.plated, self.checked = self.latents.plated, False
        if not self.plated:
            self.create(self.latents.like)

    def create(self, x: Observation) -> None:
        """Parameters for the problems of x."""
        b, d, like = self.latents.problems(x), self.latents.size, parts(self.latents.like)[0]
        with seeded(self.seed):
            mean = torch.empty(b, d, dtype=like.dtype).uniform_(-self.spread, self.spread)
        log_scale = torch.full((b, len(self.sharers) or d), math.log(self.scale), dtype=like.dtype)
        self.mean = nn.Parameter(mean.to(like.device))
        self.log_scale = nn.Parameter(log_scale.to(like.device))

    def bind(self, x: Observation) -> None:
        """Make parameters for x, where each row of it is a problem."""
        if self.plated:
            super().bind(x)

    def moments(self, x: Observation) -> tuple[Tensor, Tensor]:
        """Means and log sds of packed weights, (B, D)."""
        copies = self.copies(x) if self.plated else 1
        mean: Tensor = self.mean
        log_sd: Tensor = self.log_scale
        if self.sharers:
            columns = zip(log_sd.split(1, -1), self.sharers, strict=True)
            log_sd = torch.cat([t.expand(-1, n) for t, n in columns], -1)
        return (mean, log_sd) if copies == 1 else (mean.repeat(copies, 1), log_sd.repeat(copies, 1))

    def distribution(self, x: Observation) -> Distribution:
        """Independent Normal: batch (B,), event (D,)."""
        mean, log_sd = self.moments(x)
        return Independent(Normal(mean, log_sd.exp(), validate_args=False), 1)

    def energies(
        self, x: Observation, *, particles: int = 1, share: float = 1.0, at_mean: bool = False
    ) -> Energies:
        """By local reparameterisation, and in closed form where the prior is Normal or Laplace.

        Args:
            x: observation of B problems.
            particles: runs of the model.
            share: of the rows of the data set that x has, where the data set is one problem.
            at_mean: magnitude of the mean weights instead of the mean magnitude.
        """
        if not self.local:
            return super().energies(x, particles=particles, share=share, at_mean=at_mean)
        mean, log_sd = self.moments(x)
        self._check(x, mean, log_sd)
        with pyro.validation_enabled(False):  # _check has looked
            runs = [Run(self.latents, x, mean, log_sd) for _ in range(particles)]
            performance = torch.stack([run.performance() for run in runs]).mean(0)
            magnitudes = [run.magnitude(self.priors, at_mean=at_mean) for run in runs]
        return Energies(performance / share, torch.stack(magnitudes).mean(0), log_sd)

    def presynaptic(
        self, x: Observation, *, at_mean: bool = False, seed: int = 0
    ) -> dict[str, Inputs]:
        """Mean size and mean square of what each weight receives, by site, each (B, *shape).

        Averages are over the rows of inputs in x. A bias receives 1. Weights that the model uses
        other than by inputs @ weights or as biases are left out.

        Args:
            x: observation of B problems.
            at_mean: without noise.
            seed: of the noise.
        """
        mean, log_sd = (t.detach() for t in self.moments(x))
        log_sd = torch.full_like(log_sd, -math.inf) if at_mean else log_sd
        with torch.enable_grad(), seeded(seed):
            found = Run(self.latents, x, mean.requires_grad_(), log_sd).inputs()
        lead = (self.latents.problems(x),)
        return {
            n: Inputs(*(t.reshape(lead + s.shape) for t in found[n]))
            for n, s in zip(self.latents.names, self.latents.sites, strict=True)
            if n in found
        }

    def _check(self, x: Observation, mean: Tensor, log_sd: Tensor) -> None:
        """Once: may this model's noise be local?"""
        if self.checked:
            return
        with torch.enable_grad(), seeded(0):
            run = Run(self.latents, x, mean.detach().requires_grad_(), log_sd.detach())
            run.require_separate_rows()
        self.checked = True
