"""Unconditional targets: a density to sample from, and an observation that says nothing of it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution

from inference.observation import Observation, size

from .exact import ClosedForm
from .model import Model

__all__ = ["Target", "TargetPosterior"]


class Target(Model):
    """z ~ target(); x ~ Normal(0, 1), independent of z.

    Work on sampling dynamics aims at one fixed density, not at a posterior. Here that density is
    the prior and the observation is pure noise, so the posterior is the target for every x.
    """

    def target(self) -> TorchDistribution:
        """The distribution of z, over all of R (batch and event ()) or R^D (event (D,))."""
        raise NotImplementedError

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", self.target())
            x_alone = dist.Normal(z.new_zeros(1), 1.0).to_event(1)
            observed: Tensor = pyro.sample("x", x_alone, obs=x)
            return observed

    def exact(self) -> TargetPosterior:
        """The target, whatever x is."""
        return TargetPosterior(self)


class TargetPosterior(ClosedForm):
    """The target itself for each problem.

    Args:
        model: says what its target is, by `target()`.
    """

    model: Target

    def distribution(self, x: Observation) -> Distribution:
        """The target once for each problem: batch (B,), event (D,)."""
        target = self.model.target()
        scalar = 1 - target.event_dim  # a scalar latent is packed as a vector of one
        batch = [self.latents.problems(x), *[1] * scalar]
        posterior: Distribution = target.expand(batch).to_event(scalar)
        return posterior

    def log_evidence(self, x: Observation) -> Tensor:
        """log Normal(x; 0, 1) for each problem, (B,), in nats."""
        assert isinstance(x, Tensor)
        evidence: Tensor = dist.Normal(x.new_zeros(1), 1.0).to_event(1).log_prob(x)
        return evidence
