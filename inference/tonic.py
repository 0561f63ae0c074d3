"""What enters a circuit from outside: the observation and the noise level, as tonic inputs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Level", "Tonic", "TonicInput"]

WAVES = 3  # sines and cosines of the log noise level


class Tonic(NamedTuple):
    """Inputs that stay for as long as x and the noise level do.

    Attributes:
        current: into the neurons, (B, N).
        gain: of the neurons' recurrent input, (B, N).
        drive: into the outputs, (B, D), beside `centre`.
        zoom: gain of the outputs' way to the neurons, (B, D).
        centre: where the outputs rest without the neurons, (B, D); does not depend on noise.
    """

    current: Tensor
    gain: Tensor
    drive: Tensor
    zoom: Tensor
    centre: Tensor


class Level(NamedTuple):
    """A circuit's inputs at a noise level.

    Attributes:
        tonic: inputs.
        sigma: the level, (B, 1).
    """

    tonic: Tonic
    sigma: Tensor

    @property
    def variance(self) -> Tensor:
        """Of the outputs under the linear guess, noise included: 1 + sigma^2."""
        return 1 + self.sigma**2

    @property
    def amplitude(self) -> Tensor:
        """Of the neurons' effect on the outputs: sqrt(1 + sigma^2) / sigma."""
        return self.variance.sqrt() / self.sigma


class TonicInput(nn.Module):
    """Perceptrons from x and the noise level to tonic inputs, nearly neutral at the start.

    Args:
        features: numbers in x.
        neurons: N.
        outputs: D.
        hidden: widths of their layers.
        noise: smallest and largest noise level.
        gain: inputs multiply, too; otherwise they only add, as in the paper.
        dropout: share of hidden units left out while training, against few simulations.
    """

    def __init__(
        self,
        features: int,
        neurons: int,
        outputs: int,
        hidden: tuple[int, ...],
        noise: tuple[float, float],
        *,
        gain: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        low, high = (math.log(s) for s in noise)
        self.middle, self.range = (low + high) / 2, (high - low) / 2
        self.sizes = [neurons, outputs, *([neurons, outputs] if gain else [])]
        self.rest = perceptron(features, hidden, outputs, dropout)
        self.deep = perceptron(features + 1 + 2 * WAVES, hidden, sum(self.sizes), dropout)
        with torch.no_grad():
            for parameter in last(self.rest).parameters():
                parameter.zero_()
            self.head.weight[neurons : neurons + outputs] = 0
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()

    @property
    def head(self) -> nn.Linear:
        """The last layer; its bias is that of the neurons, then that of the outputs."""
        return last(self.deep)

    def forward(self, standard: Tensor, sigma: Tensor) -> Tonic:
        """Standardised features (B, F), or (1, F), and noise levels (B,)."""
        t = ((sigma.log() - self.middle) / self.range)[:, None]
        waves = [f(k * math.pi * t) for k in range(1, WAVES + 1) for f in (torch.sin, torch.cos)]
        seen = torch.cat([standard.expand(len(t), -1), t, *waves], -1)
        current, drive, *gains = self.deep(seen).split(self.sizes, -1)
        ones = current.new_ones(1, 1)
        gain, zoom = (1 + gains[0], gains[1].exp()) if gains else (ones, ones)
        return Tonic(current, gain, drive, zoom, self.rest(standard))


def perceptron(inputs: int, hidden: tuple[int, ...], outputs: int, dropout: float) -> nn.Sequential:
    """SiLU layers, each with dropout, and a linear one."""
    layers: list[nn.Module] = []
    widths = [inputs, *hidden]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def last(network: nn.Sequential) -> nn.Linear:
    """The last layer."""
    layer = network[-1]
    assert isinstance(layer, nn.Linear)
    return layer
