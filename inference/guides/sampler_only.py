"""Sampler-only circuits: neurons that are themselves the samples, the baseline of the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..activation import ACTIVATIONS, Activation
from ..errors import lookup
from ..latents import ModelLike
from ..sampling import Sampling
from ..seeds import seeded
from ..tonic import Tonic
from .score_circuit import ScoreCircuit

__all__ = ["SamplerOnly", "SamplerOnlyCurrent", "SamplerOnlyRate"]


class SamplerOnly(ScoreCircuit):
    """D neurons without a reservoir: s = gamma F(y) A A'.

    Args:
        model: any model with continuous latents.
        activation: phi: relu, tanh, softplus or squareplus.
        gain: tonic inputs multiply, too.
        dropout: share of the perceptrons' units left out in training: for few simulations.
        hidden: widths of the perceptrons behind the tonic inputs.
        noise: smallest and largest noise level.
        seed: of the initial weights.
        sampling: how the circuit is run.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023)
        https://arxiv.org/abs/2308.11809
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        activation: str = "relu",
        gain: bool = True,
        dropout: float = 0.0,
        hidden: tuple[int, ...] = (64, 64),
        noise: tuple[float, float] = (0.02, 10.0),
        seed: int = 0,
        sampling: Sampling | None = None,
    ) -> None:
        lookup(ACTIVATIONS, activation, "activation")
        super().__init__(
            model, neurons=0, hidden=hidden, noise=noise, gain=gain, dropout=dropout,
            seed=seed, sampling=sampling, activation=activation,
        )  # fmt: skip
        like, d = self.whitening.root, self.latents.size
        with seeded(seed, 1):
            self.weights = nn.Parameter((0.1 * torch.randn(d, d) / d**0.5).to(like))
        self.gamma = nn.Parameter(like.new_ones(d))
        self.mixing = nn.Parameter(torch.eye(d).to(like))

    @property
    def phi(self) -> Activation:
        """Activation of the neurons."""
        return ACTIVATIONS[self.knobs["activation"]]

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
