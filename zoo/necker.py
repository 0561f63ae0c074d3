"""The Necker cube: one drawing, two ways to see it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Categorical, constraints

from inference.arguments import Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .exact import Enumerated
from .model import Model, Paper

__all__ = ["Ising", "Necker"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class Ising(TorchDistribution):  # type: ignore[misc]
    """p(z) proportional to exp(sum_{i<j} J_ij s_i s_j), s = 2 z - 1, z in {0, 1}^N.

    Normalised by a table of all 2^N states.

    Args:
        coupling: J, (N, N); entries above the diagonal count.
        batch_shape: of identical copies.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = False

    def __init__(self, coupling: Tensor, batch_shape: _Shape = torch.Size()) -> None:  # noqa: B008
        n = len(coupling)
        self.coupling = coupling.triu(1)
        self.states = torch.cartesian_prod(*[torch.arange(2.0)] * n).reshape(-1, n).to(coupling)
        self.logits = self._score(self.states)
        self.log_normaliser = self.logits.logsumexp(0)
        super().__init__(torch.Size(batch_shape), torch.Size([n]), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> Ising:
        """The same distribution for more batch dims."""
        return Ising(self.coupling, batch_shape)

    def sample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., N)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.states[Categorical(logits=self.logits, validate_args=False).sample(shape)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability, in nats."""
        score = self._score(value) - self.log_normaliser
        return score.expand(torch.broadcast_shapes(score.shape, self.batch_shape))

    def _score(self, z: Tensor) -> Tensor:
        spin = 2 * z - 1
        return ((spin @ self.coupling) * spin).sum(-1)


class Necker(Model):
    """The corners of a cube drawn in outline, each of them near or far.

    z ~ p(z) proportional to exp(sum_edges J_ij s_i s_j), s_i = 2 z_i - 1, z_i = 1 where a corner is
    near; J_ij = J on the edges of either square face, -J on the four edges that join the faces;
    x_i given z ~ Normal(g f_i s_i, 1), f_i = 1 on the first face and -1 on the second.

    The two squares of the drawing are the front and the back of a cube, but nothing says which is
    which: the prior has two modes, all corners of one square near and those of the other far, with
    .454 of the mass each at J = .8. Cues x speak for the first interpretation where they are
    positive, for the second where negative; no one cue is strong, but all eight corners turn over
    together. A sampler that changes one neuron at a time must cross states of low probability to
    go from one percept to the other; the best factorised guide keeps to one of them and, without
    cues, misses log p(x) by .72 nats.

    Args:
        coupling: J.
        gain: g, strength of the cues in units of their noise.
        seed: of the canonical observations; the first is the drawing without cues, the second has a
            cue at one corner, the others are draws from the joint.

    References:
        Observations on some remarkable optical phaenomena seen in Switzerland (Necker, 1832), for
        the cube; London and Edinburgh Philosophical Magazine 1, 329-337
        Neural dynamics as sampling (Buesing, Bill, Nessler & Maass, 2011), for networks of spiking
        neurons that sample from Boltzmann machines https://doi.org/10.1371/journal.pcbi.1002211
    """

    title = "Necker cube"
    paper = Paper(
        "Buesing, Bill, Nessler & Maass",
        2011,
        "Neural dynamics as sampling: a model for stochastic computation in recurrent networks of "
        "spiking neurons",
        "https://doi.org/10.1371/journal.pcbi.1002211",
    )
    dims = {"z": ("corner",), "x": ("corner",)}

    coupling: Tensor
    gain: Tensor
    face: Tensor

    def __init__(self, coupling: float = 0.8, *, gain: Positive = 0.3, seed: Index = 0) -> None:
        super().__init__()
        corners = torch.cartesian_prod(*[torch.arange(2.0)] * 3)  # the first coordinate is depth
        edges = (corners[:, None] - corners).abs().sum(-1) == 1
        self.register_buffer("face", 1 - 2 * corners[:, 0])
        self.register_buffer("coupling", coupling * edges * self.face.outer(self.face))
        self.register_buffer("gain", torch.tensor(float(gain)))
        known = torch.zeros(2, 8)
        known[1, 1] = 2.0
        self.keep_draws(known, 98, before=known, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", Ising(self.coupling))
            mean = self.predict({"z": z})
            x_given_z = dist.Normal(mean, torch.ones_like(self.face)).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The cues without noise: latents (..., B, 8) to (..., B, 8)."""
        return self.gain * self.face * (2 * z["z"] - 1)

    def exact(self) -> Enumerated:
        """All 256 states."""
        return Enumerated(self)
