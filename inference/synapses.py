"""What neurons receive: the gradient of log p(x given z), by the cheapest wiring that gives it."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from .coding import Coding

__all__ = ["Synapses", "synapses"]

ROWS = 1 << 16  # rows of one call of a nonlinear decoder


class Synapses(Protocol):
    """Connections of one observation, of B problems, to K neurons."""

    def currents(self, z: Tensor) -> Tensor:
        """J' N^-2 (x - decode(z)), drive less explaining away: (B, K) to (B, K)."""

    def curvature(self, z: Tensor) -> Tensor:
        """Twice what one more spike costs beyond the currents; diag(Phi' N^-2 Phi), (K,) or (B, K).

        energy(z + e_k) - energy(z) = -currents_k + curvature_k / 2, so that the mean of the left
        side is the exact derivative of E energy with respect to a Poisson rate.
        """

    def energy(self, z: Tensor, currents: Tensor) -> Tensor:
        """-log p(x given z) at z (B, K), whose currents are known, (B,), in nats."""

    def expected_energy(self, q: Distribution, relaxed: Distribution) -> Tensor:
        """E_q[-log p(x given z)], (B,), in nats, from q's moments or by a differentiable draw."""


class Linear:
    """decode(z) = Phi z + offset, with x and Phi in units of the noise.

    Args:
        coding: of a linear decoder.
        x: (B, F).
    """

    def __init__(self, coding: Coding, x: Tensor) -> None:
        assert coding.weights is not None
        self.phi = coding.weights / coding.noise[:, None]
        self.x = (x - coding.offset) / coding.noise
        self.drive = self.x @ self.phi
        self.diagonal = self.phi.square().sum(0)
        squares = self.x.square().sum(-1) + 2 * coding.noise.log().sum()
        self.silent = 0.5 * (squares + x.shape[1] * math.log(2 * math.pi))

    def currents(self, z: Tensor) -> Tensor:
        """Through the prediction error, two products of (B, F, K)."""
        error: Tensor = torch.addmm(self.x, z, self.phi.T, alpha=-1)
        return error @ self.phi

    def curvature(self, z: Tensor) -> Tensor:
        """d = diag(Phi' N^-2 Phi), (K,)."""
        return self.diagonal

    def energy(self, z: Tensor, currents: Tensor) -> Tensor:
        """Quadratic in z, and W z is in the currents."""
        return self.silent - 0.5 * (z * (self.drive + currents)).sum(-1)

    def expected_energy(self, q: Distribution, relaxed: Distribution) -> Tensor:
        """That of the mean, and d'v / 2."""
        spread: Tensor = 0.5 * (q.variance * self.diagonal).sum(-1)
        return self.energy(q.mean, self.currents(q.mean)) + spread


class Lateral(Linear):
    """The same with the prediction error left out: x drives, W = Phi' N^-2 Phi inhibits."""

    def __init__(self, coding: Coding, x: Tensor) -> None:
        super().__init__(coding, x)
        self.weights = self.phi.T @ self.phi

    def currents(self, z: Tensor) -> Tensor:
        """b - W z, one product of (B, K, K)."""
        return torch.addmm(self.drive, z, self.weights, alpha=-1)


class Nonlinear:
    """Any decoder, by a vector-Jacobian product.

    Args:
        coding: of any decoder.
        x: (B, F).
    """

    def __init__(self, coding: Coding, x: Tensor) -> None:
        self.coding, self.x = coding, x
        normaliser = coding.noise.log().sum() + 0.5 * x.shape[1] * math.log(2 * math.pi)
        self.normaliser = normaliser

    def currents(self, z: Tensor) -> Tensor:
        """Differentiable in turn where gradients are on."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            at = z if again and z.requires_grad else z.detach().requires_grad_()
            value = -self._energies(at, self.x).sum()
            (slope,) = torch.autograd.grad(value, at, create_graph=again)
        return slope

    def curvature(self, z: Tensor) -> Tensor:
        """By one more spike in each neuron, K decodings for each problem: (B, K)."""
        eye = torch.eye(z.shape[1]).to(z)
        here = self._energies(z, self.x)[:, None] - self.currents(z)
        step = max(1, ROWS // len(z))
        more = []
        for some in eye.split(step):
            rows = (z[:, None] + some).flatten(0, 1)
            x = self.x.repeat_interleave(len(some), 0)
            more.append(self._energies(rows, x).reshape(len(z), len(some)))
        return 2 * (torch.cat(more, 1) - here)

    def energy(self, z: Tensor, currents: Tensor) -> Tensor:
        """At z."""
        return self._energies(z, self.x)

    def expected_energy(self, q: Distribution, relaxed: Distribution) -> Tensor:
        """By one differentiable draw."""
        return self._energies(relaxed.rsample(), self.x)

    def _energies(self, z: Tensor, x: Tensor) -> Tensor:
        error = (x - self.coding.decode(z)) / self.coding.noise
        return 0.5 * error.square().sum(-1) + self.normaliser


def synapses(coding: Coding, x: Tensor, visits: int) -> Synapses:
    """Connections of x (B, F); lateral ones where they take fewer multiplications.

    Args:
        coding: prior, decoder and noise.
        x: observation.
        visits: how often currents will be asked for.
    """
    x = x.flatten(1)
    if coding.weights is None:
        return Nonlinear(coding, x)
    features, neurons = coding.weights.shape
    rows = len(x) * visits
    cheaper = neurons * (features + rows) < 2 * features * rows
    return (Lateral if cheaper else Linear)(coding, x)
