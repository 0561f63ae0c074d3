"""A hidden Markov model: discrete states that switch, and noisy signals of them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive, Probability
from inference.latents import Values
from inference.observation import Observation, size

from .markov import ForwardBackward, MarkovChain
from .model import Model, Paper

__all__ = ["HiddenMarkov"]


class HiddenMarkov(Model):
    """A world that keeps its state for a while and then jumps, seen through noise.

    z_1 ~ Categorical(p); z_t given z_t-1 ~ Categorical(P[z_t-1]);
    x_t given z_t ~ Normal(m[z_t], s^2).

    Neighbouring states are strongly correlated in the posterior, and an ambiguous stretch is
    explained as a whole by one state or another: a guide that is factorised in time gets every
    marginal right and no path.

    Args:
        steps: T.
        states: K.
        stay: probability of keeping a state; the rest is shared unequally.
        noise: s, in units of the distance between the levels m.
        seed: of the transitions and canonical observations.

    References:
        A tutorial on hidden Markov models (Rabiner, 1989), equations 19-27, for the messages
        https://doi.org/10.1109/5.18626
    """

    title = "hidden Markov model"
    paper = Paper(
        "Rabiner",
        1989,
        "A tutorial on hidden Markov models and selected applications in speech recognition",
        "https://doi.org/10.1109/5.18626",
        "equations 19-27",
    )
    dims = {"z": ("time",), "x": ("time",)}

    log_initial: Tensor
    log_transition: Tensor
    successors: Tensor
    levels: Tensor
    scale: Tensor

    def __init__(
        self,
        steps: Count = 12,
        states: Count = 3,
        *,
        stay: Probability = 0.8,
        noise: Positive = 0.8,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        self.steps = steps
        g = torch.Generator().manual_seed(seed)
        shares = (0.2 + torch.rand(states, states, generator=g)).fill_diagonal_(0.0)
        transition = (1 - stay) * shares / shares.sum(-1, keepdim=True)
        transition = transition + stay * torch.eye(states)
        start = 1.0 + torch.arange(states)
        self.register_buffer("log_initial", (start / start.sum()).log())
        self.register_buffer("log_transition", transition.log())
        self.register_buffer("successors", torch.arange(states).expand(states, -1).contiguous())
        self.register_buffer("levels", torch.arange(float(states)))
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep_draws(torch.zeros(1, steps), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", self._chain(self.levels.new_zeros(self.steps, len(self.levels))))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The levels: paths (..., B, T) to (..., B, T)."""
        return self.levels[z["z"]]

    def chain(self, x: Observation) -> MarkovChain:
        """The posterior chain: batch (B,), event (T,)."""
        assert isinstance(x, Tensor)
        return self._chain(dist.Normal(self.levels, self.scale).log_prob(x[..., None]))

    def exact(self) -> ForwardBackward:
        """Forward-backward; draws are whole paths."""
        return ForwardBackward(self)

    def _chain(self, log_weight: Tensor) -> MarkovChain:
        return MarkovChain(self.log_initial, self.log_transition, self.successors, log_weight)
