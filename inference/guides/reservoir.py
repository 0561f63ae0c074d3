"""The reservoir sampler: rates of many neurons whose read-out follows Langevin dynamics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..activation import ACTIVATIONS
from ..arguments import Count
from ..errors import Diverged, Incompatible, lookup
from ..guide import check_counts
from ..langevin import Chains
from ..latents import ModelLike
from ..observation import Observation
from ..sampling import Step
from ..seeds import seeded
from ..tonic import Level, Tonic
from .score_circuit import ScoreCircuit

if TYPE_CHECKING:
    from ..onset import Onset

__all__ = ["EnergyReservoir", "ReservoirSampler"]

SCALES = (0.5, 8.0)  # of the first weights into neurons: coarse and fine features of y
WORST = 1e8  # condition number of the read-out beyond which noise cannot be injected


class ReservoirSampler(ScoreCircuit):
    """A firing-rate reservoir whose separate outputs sample from the posterior.

    N rates r and D outputs y = W1 r, with W_rec = W2 W1 of rank D and noise of rank D:

        dr = (-r + a phi(gain (W2 y' / sqrt(1 + sigma^2)) + b + current)) dt
             + Sigma ((m + a drive) dt + sqrt(2) dB),    Sigma = W1' (W1 W1')^-1,    y' = y - m

    whose outputs follow Langevin dynamics on the score

        s(y; x, sigma) = (-y' + a (W1 phi(...) + drive)) / (1 + sigma^2)

    in time units of 1 + sigma^2. Draws use the outputs alone, which have the same law and, given
    the noise, the same values; `Sampling(record=("rates",))` simulates the N neurons.

    Differences: x and the noise level enter as tonic inputs (the paper samples unconditional
    densities, and swaps weights to anneal); with `gain` they also multiply the neurons' input, at
    the neurons and at the outputs; the noise level sets the amplitude a = sqrt(1 + sigma^2) / sigma
    of the neurons' effect; the outputs rest at a linear guess plus m(x), in its units; weights
    W2 begin at scales from coarse to fine.

    Args:
        model: any model with continuous latents.
        neurons: N.
        **knobs: of :class:`ScoreCircuit`.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023)
        https://arxiv.org/abs/2308.11809
    """

    def __init__(self, model: ModelLike, *, neurons: Count = 512, **knobs: Any) -> None:
        check_counts(neurons=neurons)
        super().__init__(model, neurons=neurons, **knobs)
        like, d = self.whitening.root, self.latents.size
        with seeded(self.knobs["seed"], 1):
            inward, bias = features(neurons, d)
            self.inward = nn.Parameter(inward.to(like))
            self.outward = nn.Parameter((0.01 * torch.randn(d, neurons) / neurons**0.5).to(like))
        with torch.no_grad():
            self.input.head.bias[:neurons] = bias.to(like)

    def activity(self, y: Tensor, tonic: Tonic, work: Tensor | None = None) -> Tensor:
        """phi of the neurons' input at scaled outputs y (..., B, D): (..., B, N)."""
        flat = (y * tonic.zoom).reshape(-1, y.shape[-1])
        h = torch.mm(flat, self.inward.T, out=work).reshape(*y.shape[:-1], self.neurons)
        room = None if work is None else h
        return self.phi(torch.addcmul(tonic.current, h, tonic.gain, out=room), room)

    def read_out(self) -> Tensor:
        """W1, (D, N)."""
        return self.outward

    def field(self, y: Tensor, tonic: Tonic, work: Tensor | None = None) -> Tensor:
        """W1 phi(...), (..., B, D)."""
        return self.activity(y, tonic, work) @ self.read_out().T

    def divergence(self, y: Tensor, x: Observation, sigma: Tensor) -> Tensor:
        """Divergence of the score in closed form, O(N D): (B,) at y (B, D).

        (-D + sum_j phi'(h_j) gain_j (W2 zoom W1)_jj / sigma) / (1 + sigma^2).

        Raises:
            Incompatible: phi' jumps, so that training on it would miss the jumps.
        """
        if not self.phi.smooth:
            raise Incompatible(
                type(self).__name__, expected="a smooth activation", got=self.knobs["activation"],
                fix="Build it with activation='squareplus' or 'tanh'.",
            )  # fmt: skip
        level = self.level(self.standard(x), sigma)
        tonic = level.tonic
        scaled = (y - tonic.centre) / level.variance.sqrt() * tonic.zoom
        h = torch.addcmul(tonic.current, scaled @ self.inward.T, tonic.gain)
        own = tonic.zoom.expand(-1, y.shape[-1]) @ (self.inward.T * self.read_out())  # (B, N)
        trace = (self.phi.slope(h) * tonic.gain * own).sum(-1)
        return (trace / level.sigma[:, 0] - y.shape[-1]) / level.variance[:, 0]

    def chains(self, y: Tensor, onset: Onset) -> Chains:
        """Outputs alone, or all neurons where they are recorded."""
        return RateChains(self, y, onset) if onset.how.record else super().chains(y, onset)


class RateChains:
    """The circuit as it is: N rates per chain, never a weight matrix of N by N.

    What enters through Sigma leaks like the rest, so that it is kept as D numbers q and spread over
    the neurons only when their rates are asked for: r = p + Sigma q.

    Args:
        circuit: the reservoir.
        y: outputs at the onset, (R, B, D).
        onset: the stimulus.

    Raises:
        Diverged: the read-out weights are degenerate, so that noise cannot be injected.
    """

    def __init__(self, circuit: ReservoirSampler, y: Tensor, onset: Onset) -> None:
        self.circuit, self.onset = circuit, onset
        self.out = circuit.read_out()
        self.inject = injection(self.out)
        self.p, self.q = y.new_zeros(*y.shape[:-1], circuit.neurons), y.clone()
        self.y, self.time = y, 0.0

    def advance(self, step: Step, xi: Tensor) -> None:
        """One Euler step of all neurons."""
        self.time += step.time
        circuit, level = self.circuit, self.onset.level(step.sigma)
        tonic, dt, amplitude = level.tonic, step.time, level.amplitude
        push = dt * (tonic.centre + amplitude * tonic.drive) + step.noise * xi
        if self.onset.how.skew and step.onward is None:
            s = circuit.at(self.y, level, self.onset.work)
            push += step.drift * self.onset.how.skew * (s @ circuit.turn.T)
        scaled = (self.y - tonic.centre) / level.variance.sqrt()
        activity = circuit.activity(scaled, tonic, self.onset.work)
        self.p.mul_(1 - dt).addcmul_(activity, dt * amplitude)
        self.q.mul_(1 - dt).add_(push)
        self.y = self.p @ self.out.T + self.q

    def numbers(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def rates(self) -> Tensor:
        """r."""
        spread: Tensor = self.q @ self.inject
        return spread.add_(self.p)


def injection(out: Tensor) -> Tensor:
    """Sigma' (D, N) of a read-out W1 (D, N), so that W1 Sigma = I.

    Raises:
        Diverged: the read-out is degenerate, so that noise cannot be injected.
    """
    u, s, v = torch.linalg.svd(out.double(), full_matrices=False)
    condition = float((s[0] / s[-1]) ** 2) if out.shape[1] >= len(out) else math.inf
    if not condition < WORST:
        raise Diverged(
            "read-out W1 of the reservoir",
            expected=f"a condition number of W1 W1' < {WORST:g}",
            got=f"{condition:.3g}", fix="Train the circuit first, or use more neurons.",
        )  # fmt: skip
    found: Tensor = (u / s) @ v
    return found.to(out)


class EnergyReservoir(ReservoirSampler):
    """A reservoir with tied weights: its score is the gradient of a potential it can name.

        (1 + sigma^2) log q(y) = -|y'|^2 / 2 + a drive y' + (1 + sigma^2) / sigma sum_j c_j Phi(h_j)

    up to a constant, so that W1 = W2' diag(c). Its Langevin chains can be corrected by its own
    density, `Sampling(correction="own")`. Tonic inputs only add.

    Args:
        model: any model with continuous latents.
        neurons: N.
        activation: phi: relu, tanh or squareplus, whose integral is elementary.
        **knobs: of :class:`ReservoirSampler`.
    """

    def __init__(self, model: ModelLike, *, activation: str = "relu", **knobs: Any) -> None:
        if lookup(ACTIVATIONS, activation, "activation").integral is None:
            raise Incompatible(
                "activation", expected="one with an elementary integral", got=activation,
                fix="Use activation='squareplus'.",
            )  # fmt: skip
        super().__init__(model, activation=activation, gain=False, **knobs)
        del self.knobs["gain"]  # no knob of this one
        del self.outward
        with seeded(self.knobs["seed"], 2):
            strength = 0.01 * torch.randn(self.neurons).to(self.inward) / self.neurons**0.5
        self.strength = nn.Parameter(strength / self.inward.detach().square().sum(-1))

    def read_out(self) -> Tensor:
        """W2' diag(c)."""
        return self.inward.T * self.strength

    def potential(self, y: Tensor, level: Level) -> Tensor:
        """Log-density of y (..., B, D) up to a constant, (..., B)."""
        tonic = level.tonic
        y = y - tonic.centre
        h = torch.addcmul(tonic.current, y / level.variance.sqrt() @ self.inward.T, tonic.gain)
        assert self.phi.integral is not None
        inside = (self.phi.integral(h) * self.strength).sum(-1)
        linear = (y * tonic.drive).sum(-1) * level.amplitude[:, 0]
        whole = inside * (level.variance / level.sigma)[:, 0] + linear - 0.5 * y.square().sum(-1)
        return whole / level.variance[:, 0]


def features(neurons: int, d: int) -> tuple[Tensor, Tensor]:
    """First weights (N, D) and biases (N,): kinks where the outputs are, at many scales."""
    w = torch.randn(neurons, d)
    low, high = (math.log(s) for s in SCALES)
    size = torch.exp(low + (high - low) * torch.rand(neurons, 1))
    return size * w / w.norm(dim=-1, keepdim=True), size[:, 0] * torch.randn(neurons)
