"""Markov chains over finitely many states, and their exact posteriors."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints

from inference.guide import Draws, Guide, check_counts
from inference.latents import ModelLike, Values
from inference.objectives.elbo import ELBO
from inference.observation import Observation
from inference.seeds import seeded

__all__ = ["ForwardBackward", "IsChain", "MarkovChain"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class MarkovChain(TorchDistribution):  # type: ignore[misc]
    """p(z) proportional to p(z_1) prod_t p(z_t given z_t-1) prod_t exp(log_weight[t, z_t]).

    With weights of one it is the prior of a hidden Markov model; with the log-likelihoods of the
    observations as weights, it is the posterior, and `log_normaliser` is the log-evidence.

    Args:
        log_initial: (K,).
        log_transition: (K, M), from a state to each of its M successors.
        successors: (K, M), which states those are.
        log_weight: (B, T, K), or (T, K) for a chain without batch.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False

    def __init__(
        self, log_initial: Tensor, log_transition: Tensor, successors: Tensor, log_weight: Tensor
    ) -> None:
        # normalised here, in the dtype at hand: a module's .double() leaves float32 rounding behind
        log_initial, log_transition = log_initial.log_softmax(-1), log_transition.log_softmax(-1)
        self.log_initial, self.log_transition = log_initial, log_transition
        self.successors, self.log_weight = successors, log_weight
        super().__init__(log_weight.shape[:-2], log_weight.shape[-2:-1], validate_args=False)
        future = [torch.zeros_like(log_weight[..., 0, :])]  # what comes after t, given z_t
        for t in range(log_weight.shape[-2] - 1, 0, -1):
            ahead = (log_weight[..., t, :] + future[0])[..., successors]
            future.insert(0, (log_transition + ahead).logsumexp(-1))
        self.potential = log_weight + torch.stack(future, -2)
        self.start = log_initial + self.potential[..., 0, :]
        self.log_normaliser = self.start.logsumexp(-1)

    @property
    def support(self) -> constraints.Constraint:
        """States 0 to K - 1."""
        states = constraints.integer_interval(0, len(self.log_initial) - 1)
        return constraints.independent(states, 1)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> MarkovChain:
        """The same chain for more batch dims; its messages are shared, not sent again."""
        batch = torch.Size(batch_shape)
        new: MarkovChain = self._get_checked_instance(MarkovChain, _instance)
        new.log_initial, new.log_transition = self.log_initial, self.log_transition
        new.successors = self.successors
        new.log_weight = self.log_weight.expand(*batch, *self.log_weight.shape[-2:])
        new.potential = self.potential.expand(*batch, *self.potential.shape[-2:])
        new.start = self.start.expand(*batch, *self.start.shape[-1:])
        new.log_normaliser = self.log_normaliser.expand(batch)
        super(MarkovChain, new).__init__(batch, self.event_shape, validate_args=False)
        return new

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Joint draws of the whole path, (..., T)."""
        shape = torch.Size(sample_shape)
        z = [Categorical(logits=self.start, validate_args=False).sample(shape)]
        for t in range(1, self.event_shape[0]):
            ahead = self.successors[z[-1]]
            potential = self.potential[..., t, :].expand(*z[-1].shape, -1).gather(-1, ahead)
            logits = self.log_transition[z[-1]] + potential
            pick = Categorical(logits=logits, validate_args=False).sample()
            z.append(ahead.gather(-1, pick[..., None])[..., 0])
        return torch.stack(z, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of paths (..., T), in nats; -inf for a step that cannot be."""
        steps = self.successors[value[..., :-1]] == value[..., 1:, None]
        moves = self.log_transition[value[..., :-1]].masked_fill(~steps, -torch.inf)
        weight = self.log_weight.expand(*value.shape, -1).gather(-1, value[..., None])[..., 0]
        path = self.log_initial[value[..., 0]] + moves.logsumexp(-1).sum(-1) + weight.sum(-1)
        score: Tensor = path - self.log_normaliser
        return score


class IsChain(ModelLike, Protocol):
    """A model whose latent site "z" is a Markov chain of states (B, T)."""

    def chain(self, x: Observation) -> MarkovChain:
        """The posterior chain of B problems, batch (B,)."""


class ForwardBackward(Guide):
    """The exact posterior of a hidden Markov model: messages backward, draws forward.

    Draws are joint draws of whole paths.

    Args:
        model: gives its posterior chain, by `chain(x)`.
    """

    kind: ClassVar[str] = "enumeration"
    objective = ELBO
    model: IsChain

    def distribution(self, x: Observation) -> MarkovChain:
        """The posterior chain: batch (B,), event (T,)."""
        return self.model.chain(x)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        return self.distribution(x).log_normaliser

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """log p(z given x) of paths (..., B, T): shape (..., B), in nats."""
        return self.distribution(x).log_prob(z["z"])

    def error(self, x: Observation) -> dict[str, Tensor]:
        """Error of the posterior by quantity, (B,): zero."""
        return {"log_evidence": torch.zeros(self.latents.problems(x))}

    def forward(self, x: Observation) -> Values:
        """Sample the site "z" inside the plate "data"."""
        with self.latents.plate(x):
            return self.sample_sites(lambda _: self.distribution(x))

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws, with the messages sent once; `stats` has log q."""
        check_counts(draws=draws, chains=chains)
        self.latents.check(x)
        with torch.no_grad(), seeded(seed):
            posterior = self.distribution(x)
            z = posterior.sample(torch.Size([chains, draws]))
            return Draws({"z": z}, {"log_q": posterior.log_prob(z)})
