"""Sampler-only circuits: neurons that are themselves the samples, the baseline of the paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..latents import ModelLike
from ..seeds import seeded
from ..tonic import Tonic
from .score_circuit import ScoreCircuit

__all__ = ["SamplerOnly", "SamplerOnlyCurrent", "SamplerOnlyRate"]


class SamplerOnly(ScoreCircuit):
    """D neurons without a reservoir: s = gamma F(y) A A'.

    Args:
        model: any model with continuous latents.
        **knobs: of :class:`ScoreCircuit`.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023)
        https://arxiv.org/abs/2308.11809
    """

    def __init__(self, model: ModelLike, **knobs: Any) -> None:
        super().__init__(model, neurons=0, **knobs)
        like, d = self.whitening.root, self.latents.size
        with seeded(self.knobs["seed"], 1):
            self.weights = nn.Parameter((0.1 * torch.randn(d, d) / d**0.5).to(like))
        self.gamma = nn.Parameter(like.new_ones(d))
        self.mixing = nn.Parameter(torch.eye(d).to(like))

    def precondition(self, s: Tensor) -> Tensor:
        """gamma s A A'."""
        return (self.gamma * s) @ self.mixing @ self.mixing.T


class SamplerOnlyCurrent(SamplerOnly):
    """Neurons that are the samples, with synaptic-current dynamics: F = -y + W phi(y) + b."""

    def field(self, y: Tensor, tonic: Tonic, work: Tensor | None = None) -> Tensor:
        """W phi(y + current): D basis functions, not adaptive."""
        h = tonic.gain * (y * tonic.zoom) + tonic.current
        return self.phi(h) @ self.weights.T


class SamplerOnlyRate(SamplerOnly):
    """Neurons that are the samples, with firing-rate dynamics: F = -y + phi(W y + b)."""

    def field(self, y: Tensor, tonic: Tonic, work: Tensor | None = None) -> Tensor:
        """phi(W y + current): D adaptive basis functions that are not summed."""
        h = tonic.gain * ((y * tonic.zoom) @ self.weights.T) + tonic.current
        return self.phi(h)
