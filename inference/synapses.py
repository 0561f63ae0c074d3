"""What neurons receive: the gradient of log p(x given z), by the cheapest wiring that gives it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from .coding import Coding

__all__ = ["Synapses", "synapses"]

ROWS = 1 << 16  # rows of one call of a nonlinear decoder
TIE = 1.1  # one product and its sum cost that much less than two of together the same size


class Synapses(Protocol):
    """Connections of one observation, of B problems, to K neurons."""

    def currents(self, z: Tensor) -> Tensor:
        """J' N^-2 (x - decode(z)), drive less explaining away: (B, K) to (B, K)."""

    def curvature(self, z: Tensor, spread: Tensor | None = None) -> Tensor:
        """Twice what one more spike costs beyond the currents; diag(Phi' N^-2 Phi), (K,) or (B, K).

        energy(z + e_k) - energy(z) = -currents_k + curvature_k / 2, so that the mean of the left
        side is the exact derivative of E energy with respect to a Poisson rate.

        Args:
            z: latents, (B, K).
            spread: sds of beliefs about real latents, (B, K): with it, the mean second derivative,
                by a point on either side.
        """

    def load(self, variance: Tensor, z: Tensor) -> Tensor:
        """A bound on how far one natural-gradient step of size 1 overshoots, (B, K) or (B, 1).

        sum_j |W_kj| v_j, W = Phi' N^-2 Phi: dividing row k of W diag(v) by 1 plus it leaves no
        eigenvalue above 1. Differentiable: to training, step sizes are part of the dynamics.
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

    def curvature(self, z: Tensor, spread: Tensor | None = None) -> Tensor:
        """d = diag(Phi' N^-2 Phi), (K,)."""
        return self.diagonal

    def load(self, variance: Tensor, z: Tensor) -> Tensor:
        """sum_j |W_kj| v_j, (B, K)."""
        return variance @ self.strength

    @cached_property
    def strength(self) -> Tensor:
        """|W|, (K, K)."""
        return (self.phi.T @ self.phi).abs()

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

    @cached_property
    def strength(self) -> Tensor:
        """|W|, (K, K)."""
        return self.weights.abs()

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

    def curvature(self, z: Tensor, spread: Tensor | None = None) -> Tensor:
        """By K decodings for each problem, or twice as many: (B, K)."""
        here = self._energies(z, self.x)[:, None]
        if spread is None:
            return 2 * (self._beside(z, torch.ones_like(z)) - here + self.currents(z))
        both = self._beside(z, spread) + self._beside(z, -spread)
        return (both - 2 * here) / spread.square()

    def _beside(self, z: Tensor, step: Tensor) -> Tensor:
        """Energies at z + step_k e_k, (B, K)."""
        eye = torch.eye(z.shape[1]).to(z)
        found = []
        for some in eye.split(max(1, ROWS // len(z))):
            rows = (z[:, None] + step[:, None] * some).flatten(0, 1)
            x = self.x.repeat_interleave(len(some), 0)
            found.append(self._energies(rows, x).reshape(len(z), len(some)))
        return torch.cat(found, 1)

    def load(self, variance: Tensor, z: Tensor) -> Tensor:
        """The trace of W diag(v), which bounds its eigenvalues, too, (B, 1)."""
        spread = None if self.coding.reader.site.discrete else variance.sqrt()
        return (self.curvature(z, spread) * variance).abs().sum(-1, keepdim=True)

    def energy(self, z: Tensor, currents: Tensor) -> Tensor:
        """At z."""
        return self._energies(z, self.x)

    def expected_energy(self, q: Distribution, relaxed: Distribution) -> Tensor:
        """By one draw, differentiable where the temperature is above zero."""
        z = relaxed.rsample() if relaxed.has_rsample else relaxed.sample()
        return self._energies(z, self.x)

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
    x = x.reshape(len(x), -1)
    if coding.weights is None:
        return Nonlinear(coding, x)
    features, neurons = coding.weights.shape
    rows = len(x) * visits
    lateral = neurons * (features + rows)  # multiplications, W included
    return (Lateral if lateral < TIE * 2 * features * rows else Linear)(coding, x)
