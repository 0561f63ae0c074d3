"""A reservoir whose weights are random and fixed: only its read-out is learned, in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import Count
from ..errors import Incompatible
from ..latents import ModelLike, Values
from ..objective import Objective
from ..objectives.score_matching import ScoreMatching
from ..observation import Observation
from ..seeds import seeded
from .reservoir import ReservoirSampler

__all__ = ["RandomReservoir"]

RIDGE = 1e-6  # of the mean square activity


class RandomReservoir(ReservoirSampler):
    """A reservoir in the old sense: random neurons, and a read-out W1 by least squares.

    Score matching is quadratic in W1, with unit weight on

        |W1 phi(h) - ((1 + sigma^2) target + y) / a|^2 / 2

    so that `fit` takes its batches, adds up the normal equations and solves them once. Random
    currents carry x and the noise level into the neurons.

    Args:
        model: any model with continuous latents.
        neurons: N.
        **knobs: of :class:`ReservoirSampler`.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    rows: Tensor

    def __init__(self, model: ModelLike, *, neurons: Count = 512, **knobs: Any) -> None:
        super().__init__(model, neurons=neurons, gain=False, hidden=(), **knobs)
        del self.knobs["gain"], self.knobs["hidden"]  # no knobs of this one
        n, d, like = neurons, self.latents.size, self.inward
        head = self.input.head
        with seeded(self.knobs["seed"], 2), torch.no_grad():
            size = self.inward.norm(dim=-1, keepdim=True)
            random = torch.randn(n, head.in_features).to(like) / head.in_features**0.5
            head.weight[:n] = size * random
        for name, shape in (("gram", (n, n)), ("cross", (n, d)), ("square", ()), ("rows", ())):
            self.register_buffer(name, like.new_zeros(shape), persistent=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name == "outward")

    def regression(
        self, objective: Objective, x: Observation, z: Values | None
    ) -> tuple[Tensor, Tensor]:
        """Activity (n, N) and what W1 should make of it, (n, D).

        Raises:
            Incompatible: the objective is no regression of the score.
        """
        if not isinstance(objective, ScoreMatching):
            raise Incompatible(
                type(objective).__name__, expected="score matching", got="another objective",
                fix="Use DenoisingScoreMatching() or MixedScore().",
            )  # fmt: skip
        e = objective.example(self, x, z)
        level = self.level(self.standard(x), e.sigma)
        y = e.y - level.tonic.centre
        activity = self.activity(y / level.variance.sqrt(), level.tonic)
        scale = e.weight.sqrt()[:, None] * level.amplitude / level.variance
        wanted = (level.variance * e.target + y) / level.amplitude - level.tonic.drive
        return scale * activity, scale * wanted

    @torch.no_grad()
    def absorb(self, objective: Objective, x: Observation, z: Values | None) -> None:
        """Add a batch to the normal equations."""
        activity, wanted = self.regression(objective, x, z)
        self.gram += activity.T @ activity
        self.cross += activity.T @ wanted
        self.square += wanted.square().sum()
        self.rows += len(wanted)

    @torch.no_grad()
    def settle(self) -> float:
        """Solve them; returns the mean loss over the batches."""
        n = len(self.gram)
        ridge = RIDGE * self.gram.diagonal().mean() * torch.eye(n).to(self.gram)
        solved = torch.linalg.solve((self.gram + ridge).double(), self.cross.double()).to(self.gram)
        self.outward.copy_(solved.T)
        explained = 2 * (solved * self.cross).sum() - (solved * (self.gram @ solved)).sum()
        loss = float((self.square - explained) / (2 * self.rows))
        for buffer in (self.gram, self.cross, self.square, self.rows):
            buffer.zero_()
        return loss
