"""A perceptron of x and noise: an implicit guide without recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import Count, Index
from ..critic import perceptron
from ..latents import ModelLike
from ..recognition import Recognition, Temperature

__all__ = ["NoiseMLP"]


class NoiseMLP(Recognition):
    """Noise enters a perceptron beside x, once: c = V x + net(x, e), e ~ Normal(0, I).

    The feed-forward control of :class:`RecurrentRecognition`: what it can do as well needs no
    lateral connections.

    Args:
        model: latents continuous, or discrete with finitely many states.
        noises: numbers in e; at least one for each entry of a code, by default so many and eight.
        hidden: widths of the hidden layers.
        temperature: of the relaxed gradient of discrete states.
        seed: of the initial weights.

    References:
        Adversarial variational Bayes (Mescheder, Nowozin & Geiger, 2017), section 5
        https://arxiv.org/abs/1701.04722
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        noises: Count | None = None,
        hidden: tuple[Count, ...] = (64, 64),
        temperature: Temperature = 0.5,
        seed: Index = 0,
    ) -> None:
        super().__init__(model, noises=noises, hidden=hidden, temperature=temperature, seed=seed)

    def build(self, features: int, codes: int, **knobs: Any) -> None:
        """The layers."""
        self.noises = codes + 8 if knobs["noises"] is None else max(codes, knobs["noises"])
        self.net = perceptron(features + self.noises, *knobs["hidden"], codes)

    def respond(self, standard: Tensor, shape: torch.Size) -> Tensor:
        """The perceptron's outputs."""
        e = standard.new_empty(*shape, len(standard), self.noises).normal_()
        x = standard.expand(*shape, *standard.shape)
        outputs: Tensor = self.net(torch.cat([x, e], -1))
        return outputs
