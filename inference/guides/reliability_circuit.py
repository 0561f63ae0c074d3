"""Circuits that pay for their reliability: one layer, several layers, and a recurrent one.

A ladder of architectures, each of which contains the one below. One layer has the same noise for
all stimuli, several layers can let the noise depend on the stimulus, and recurrent connections
correlate it, too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

from ..arguments import Count, Index, NonNegative, Positive
from ..guide import Draws, check_counts, check_number
from ..latents import Latents, ModelLike
from ..lyapunov import lyapunov, transition
from ..noise import CorrelatedNoise, PrivateNoise
from ..objectives.reliability import ReliabilityCost
from ..observation import Observation, flatten
from ..seeds import seeded
from ..units import Units, pilot, silent
from .encoder import Encoder, MeanFieldEncoder, positive

__all__ = ["MultiLayerCircuit", "RecurrentCircuit", "SingleLayerCircuit"]

EAGER = 4.0  # times parameters of one layer, lest they learn slower than those of a perceptron
WEAK = 0.3  # root mean square of what interneurons do to a neuron at the start
FOREVER = 50.0  # time constants: exp(-50) of the start is less than rounding


class _Readout(Units):
    """Linear in standardised x, zero at the start."""

    def __init__(self, latents: Latents) -> None:
        features, z = pilot(latents)
        super().__init__(features, latents.pack(z)[0])
        with seeded(0):  # leaves the global generator alone; the weights are zero
            self.linear = silent(features.shape[1], latents.size)
        self.to(features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) to (B, D)."""
        mean: Tensor = EAGER * self.linear(self.standardise(features))
        return mean


class SingleLayerCircuit(PrivateNoise):
    """One layer of linear neurons, each with noise of a size of its own.

    u_i ~ Normal((V x + b)_i, s_i^2), independent over i in 1..D, s_i the same for all x.

    Of a linear Gaussian model with posterior precision L it learns the exact means, whatever the
    cost, and s_i^2 = 1 / L_ii with the entropic one, (s0^rho / L_ii)^(2 / (rho + 2)) with a power
    law.

    Args:
        model: any model with continuous latents.

    References:
        Sampling-based probabilistic inference emerges from learning in neural circuits with a cost
        on reliability (Aitchison, Hennequin & Lengyel, 2018) https://arxiv.org/abs/1807.08952

    Differences:
        Only the abstract of the paper was at hand, which names a ladder of circuits: single-layer
        feed-forward, multi-layer feed-forward, recurrent. What they are made of is ours.
    """

    objective = ReliabilityCost

    def __init__(self, model: ModelLike) -> None:
        super().__init__(model)
        self.encoder = _Readout(self.latents)
        self.raw = nn.Parameter(torch.zeros_like(self.encoder.u_loc))

    def distribution(self, x: Observation) -> Distribution:
        """Independent Normal: batch (B,), event (D,)."""
        e = self.encoder
        loc = e(flatten(x, self.latents.problems(x)))
        scale = (e.u_scale * positive(EAGER * self.raw)).expand(loc.shape)
        return Independent(Normal(e.u_loc + e.u_scale * loc, scale, validate_args=False), 1)


class MultiLayerCircuit(MeanFieldEncoder):
    """Layers of rate neurons before the noisy ones: means and noise that depend on the stimulus.

    u_i ~ Normal(m_i(x), s_i(x)^2), independent over i in 1..D. With the entropic cost this is the
    mean-field encoder; only the objective that it is trained with by default is another.

    Args:
        model: any model with continuous latents.
        hidden: widths of the hidden layers.
        seed: of the initial weights.

    References and differences: see :class:`SingleLayerCircuit`.
    """

    objective = ReliabilityCost  # type: ignore[assignment]


class RecurrentCircuit(CorrelatedNoise):
    """Recurrent neurons with private noise, which their connections correlate.

    In units of the prior's spread, about its centre, and in membrane time constants, potentials u
    follow

        du = (K(x) m(x) - K(x) u) dt + sqrt(2) s(x) dB,    K(x) = I + A' G(x) A + C - C'.

    Interneurons listen to the neurons and inhibit them, both with the weights A. G(x) > 0 is their
    gain, diagonal, which the stimulus sets by way of hidden layers, as it does the drive K m and
    the noise s; C - C' turns activity around. At rest

        u ~ Normal(m(x), S(x)),    K S + S K' = 2 diag(s^2).

    The symmetric part of K is at least I: for all weights and stimuli the circuit is stable, and
    forgets at least as fast as exp(-t). Every covariance is within reach: K = L / l and s^2 = 1 / l
    have the covariance L^-1, where l is the smallest eigenvalue of L. Without recurrent weights
    S = diag(s^2), and the circuit is a :class:`MultiLayerCircuit`.

    Reliability is charged along the principal axes of S. Draws are the trajectory of the dynamics,
    by steps that are exact whatever their length.

    Args:
        model: any model with continuous latents.
        interneurons: by default 2 D, enough for a precision of which one part scales with x.
        interval: from one draw of a chain to the next, in membrane time constants.
        transient: from the onset of x, before which u is standard normal, to the first draw, in the
            same unit; by default x has been there for ever.
        hidden: widths of the hidden layers.
        seed: of the initial weights.

    References:
        Sampling-based probabilistic inference emerges from learning in neural circuits with a cost
        on reliability (Aitchison, Hennequin & Lengyel, 2018) https://arxiv.org/abs/1807.08952

    Differences:
        See :class:`SingleLayerCircuit`: only the abstract was at hand, and that draws are those of
        linear stochastic dynamics is ours.
    """

    objective = ReliabilityCost
    independent = False

    def __init__(
        self,
        model: ModelLike,
        *,
        interneurons: Count | None = None,
        interval: Positive = 1.0,
        transient: NonNegative | None = None,
        hidden: tuple[Count, ...] = (64, 64),
        seed: Index = 0,
    ) -> None:
        super().__init__(
            model, interneurons=interneurons, interval=interval, transient=transient,
            hidden=hidden, seed=seed,
        )  # fmt: skip
        d = self.latents.size
        m = 2 * d if interneurons is None else interneurons
        check_counts(interneurons=m)
        check_number("interval", interval, least=1e-6)
        check_number("transient", transient or 0.0)
        self.interval, self.transient = interval, transient
        self.encoder = Encoder(self.latents, 2 * d + m, hidden, seed)
        with seeded(seed, 1):
            weights = WEAK / m**0.5 * torch.randn(m, d)
        self.inhibition = nn.Parameter(weights.to(self.encoder.u_loc))  # A
        self.rotation = nn.Parameter(self.encoder.u_loc.new_zeros(d, d))  # C

    def dynamics(self, x: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """Fixed point m (B, D), recurrent weights K (B, D, D) and noise s (B, D), in float64.

        In units of the prior's spread, about its centre, and in membrane time constants.
        """
        d, m = self.latents.size, len(self.inhibition)
        out = self.encoder(flatten(x, self.latents.problems(x)))
        rest, noise, gain = out.double().split([d, d, m], -1)
        a, c = self.inhibition.double(), self.rotation.double()
        drift = torch.eye(d).to(a) + (a.T * positive(gain)[:, None]) @ a + c - c.T
        return rest, drift, positive(noise)

    def distribution(self, x: Observation) -> Distribution:
        """Multivariate Normal, at rest: batch (B,), event (D,)."""
        e = self.encoder
        rest, drift, noise = self.dynamics(x)
        tril = torch.linalg.cholesky(_at_rest(drift, noise))
        return MultivariateNormal(
            e.u_loc + e.u_scale * rest.to(e.u_loc),
            scale_tril=e.u_scale[:, None] * tril.to(e.u_loc),
            validate_args=False,
        )

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """What the circuit goes through, at every `interval`.

        Args:
            x: observation of B problems.
            draws: draws per chain.
            chains: runs of the circuit, each with noise of its own.
            seed: draws depend on it alone.
            progress: there is no bar; a thousand draws take a moment.

        Returns:
            Latents; in `stats` log q, that of rest; in `circuit` the potentials, packed latents.
        """
        check_counts(draws=draws, chains=chains)
        self.latents.check(x)
        with torch.no_grad(), seeded(seed):
            u = self._run(x, draws, chains)
            told = self.told(u, self.distribution(x))
        time = chains * ((self.transient or 0.0) + draws * self.interval)
        return replace(told, circuit={"potentials": u}, time_constants=time)

    def _run(self, x: Observation, draws: int, chains: int) -> Tensor:
        """Packed latents (chains, draws, B, D)."""
        e = self.encoder
        rest, drift, noise = self.dynamics(x)
        s = _at_rest(drift, noise)
        first = transition(drift, s, FOREVER if self.transient is None else self.transient)
        later = transition(drift, s, self.interval)
        y = rest.new_empty(*rest.shape, chains).normal_() - rest[..., None]  # less the fixed point
        path = []
        for t in range(draws):
            decay, root = later if t else first
            y = decay @ y + root @ torch.randn_like(y)
            path.append(y)
        found = torch.stack(path).permute(3, 0, 1, 2) + rest
        return e.u_loc + e.u_scale * found.to(e.u_loc)


def _at_rest(drift: Tensor, noise: Tensor) -> Tensor:
    """The covariance (B, D, D) that recurrent weights make of private noise."""
    return lyapunov(drift, 2 * torch.diag_embed(noise.square()))
