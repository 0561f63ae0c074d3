"""Four neurons: two that one neuron drives, and one of the two drives the other."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from inference.arguments import Index, Positive
from inference.observation import Observation, size

from .exact import ClosedForm
from .model import Model, Paper

__all__ = ["FourNeurons", "FourNeuronsPosterior"]

_Shape = torch.Size | list[int] | tuple[int, ...]


class FourNeurons(Model):
    """Neuron A drives B and C, and B drives C: whoever predicts each from A alone is wrong.

    A ~ Normal(0, s_A^2), observed; b given A ~ Normal(m_AB A + o_B, s_AB^2 A^2 + s_0^2);
    c given A, b ~ Normal(m_AC A + m_BC b + o_C, s_AC^2 A^2 + s_BC^2 b^2 + s_0^2).

    Synapses are Gaussian: each transmission has a weight of its own, with mean m and sd s, and
    neurons sum their inputs linearly. What the cells b and c do together is then correlated, with
    covariance m_BC var(b), and c is skewed, with third moment 6 m_BC s_BC^2 E[b] var(b). A guide
    whose cells have noise of their own can have both marginals right, and then misses .53, .34 and
    .30 nats of their mutual information at A = -1, 0, 1: only a critic that sees the pair can tell.

    The observation is the cause here, and the exact posterior the program's own conditional. What
    `Latents.log_terms` calls prior is log p(b, c given A): an objective that contrasts a guide with
    draws of a prior without x does not apply, one that sees (x, z) does.

    Args:
        lateral: m_BC.
        noise: s_0, of both cells without input.
        seed: of the canonical observations.

    Attributes:
        means: m_AB, m_AC and m_BC, (3,).
        sds: s_AB, s_AC and s_BC, (3,).
        biases: o_B and o_C, (2,).
        spread: s_A.
        scale: s_0.

    References:
        A role for cortical interneurons as adversarial discriminators (Benjamin & Kording, 2023),
        figure 2 https://doi.org/10.1371/journal.pcbi.1011484

    Differences:
        The figure's numbers were not available; ours are off centre and not symmetric. There T
        teaches B and C what A is to predict, and has synapses like those of A; here T is no neuron,
        and the lessons are draws of this model: A's synapses are right if they equal the first two
        `means` and `sds`. Biases and the noise s_0 are ours.
    """

    title = "four neurons"
    paper = Paper(
        "Benjamin & Kording",
        2023,
        "A role for cortical interneurons as adversarial discriminators",
        "https://doi.org/10.1371/journal.pcbi.1011484",
        "figure 2",
    )
    dims = {"b": (), "c": (), "x": ("neuron",)}

    means: Tensor
    sds: Tensor
    biases: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, *, lateral: float = 1.5, noise: Positive = 0.3, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor([0.8, -0.6, lateral]))
        self.register_buffer("sds", torch.tensor([0.5, 0.4, 0.7]))
        self.register_buffer("biases", torch.tensor([0.5, -0.4]))
        self.register_buffer("spread", torch.tensor(1.2))
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep_draws(torch.zeros(1, 1), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process, the observation first."""
        with pyro.plate("data", 1 if x is None else size(x)):
            observed: Tensor = pyro.sample("x", self.drive(), obs=x)
            a = observed[..., 0]
            b = pyro.sample("b", self.first(a))
            pyro.sample("c", self.second(a, b))
            return observed

    def drive(self) -> TorchDistribution:
        """p(A): batch (), event (1,)."""
        return dist.Normal(self.spread.new_zeros(1), self.spread).to_event(1)

    def first(self, a: Tensor) -> TorchDistribution:
        """p(b given A) for A of shape (...): batch (...)."""
        return self._sum(self.biases[0], slice(0, 1), a)

    def second(self, a: Tensor, b: Tensor) -> TorchDistribution:
        """p(c given A, b) for A and b of shape (...): batch (...)."""
        return self._sum(self.biases[1], slice(1, 3), a, b)

    def _sum(self, bias: Tensor, synapses: slice, *inputs: Tensor) -> TorchDistribution:
        """What a cell makes of its inputs, each through a synapse of its own."""
        rates = torch.stack(torch.broadcast_tensors(*inputs), -1)
        variance = rates.square() @ self.sds[synapses].square() + self.scale.square()
        return dist.Normal(bias + rates @ self.means[synapses], variance.sqrt())

    def exact(self) -> FourNeuronsPosterior:
        """The program's own conditional."""
        return FourNeuronsPosterior(self)


class FourNeuronsPosterior(ClosedForm):
    """b given A is Gaussian, and so is c given A and b.

    Args:
        model: four neurons.
    """

    model: FourNeurons

    def distribution(self, x: Observation) -> Distribution:
        """The law of (b, c): batch (B,), event (2,)."""
        assert isinstance(x, Tensor)
        return _Cells(self.model, x[:, 0])

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(A) for each problem, (B,), in nats."""
        evidence: Tensor = self.model.drive().log_prob(x)
        return evidence


class _Cells(Distribution):
    """The cells (b, c) when A is a, (...): batch (...), event (2,)."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, model: FourNeurons, a: Tensor) -> None:
        super().__init__(a.shape, torch.Size([2]), validate_args=False)
        self.model, self.a = model, a

    def expand(self, batch_shape: _Shape, _instance: Any = None) -> _Cells:
        """The same for more batch axes."""
        return _Cells(self.model, self.a.expand(batch_shape))

    def rsample(self, sample_shape: _Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Draws with gradients, (..., 2)."""
        b = self.model.first(self.a).rsample(torch.Size(sample_shape))
        return torch.stack([b, self.model.second(self.a, b).rsample()], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (...), in nats."""
        b, c = value.unbind(-1)
        first, second = self.model.first(self.a), self.model.second(self.a, b)
        score: Tensor = first.log_prob(b) + second.log_prob(c)
        return score
