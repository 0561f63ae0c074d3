"""Bayesian linear regression: a neuron's uncertainty about its synapses."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive, Share
from inference.errors import BadInput
from inference.latents import Values
from inference.observation import Observation

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper

__all__ = ["BayesianRegression", "designs", "drive"]

SPREAD = 0.7  # decades that the input scales extend either side of one


def designs(
    problems: int, trials: int, inputs: int, *, correlation: float = 0.9, seed: int
) -> Tensor:
    """Inputs of many data sets, (problems, trials, inputs).

    Column k has a scale of its own, from 10^-.7 to 10^.7, and shares a cause with the others: two
    columns have the correlation l_j l_k. The loadings l fall from `correlation`, that of the first
    column with the cause, to a third of it.

    Raises:
        BadInput: a correlation that is not from 0 to 1.
    """
    if not 0 <= correlation <= 1:
        wanted = "a number from 0 to 1"
        raise BadInput("correlation", expected=wanted, got=repr(correlation), fix="0.9.")
    g = torch.Generator().manual_seed(seed)
    loading = torch.linspace(correlation, correlation / 3, inputs)
    shared = torch.randn(problems, trials, 1, generator=g)
    own = torch.randn(problems, trials, inputs, generator=g)
    scale = 10 ** torch.linspace(-SPREAD, SPREAD, inputs)
    return scale * (loading * shared + (1 - loading.square()).sqrt() * own)


def drive(inputs: Tensor, weights: Tensor) -> Tensor:
    """Inputs (B, n, p) times weights (..., B, p): (..., B, n)."""
    return (inputs @ weights[..., None])[..., 0]


class BayesianRegression(Model):
    """Weights of a linear neuron, inferred from its inputs and targets: one problem, one data set.

    w ~ Normal(0, I_p / alpha); y_t given w ~ Normal(X_t w, s^2) for trials t = 1 ... n.

    The posterior precision is L = X'X / s^2 + alpha I, another for every data set. A weight whose
    input is strong is known well: among uncorrelated inputs of mean square m, the variance is
    1 / (alpha + n m / s^2). The inputs here are correlated, so that weights are anti-correlated,
    and the best factorised guide has the variances 1 / L_ii, below the true (L^-1)_ii; L is
    `model.exact().precision()`. Synapses that pay an energy proportional to sd^-rho for being
    reliable end at sd^2 proportional to L_ii^(-2 / (rho + 2)).

    `model.keep((X, y))` takes inputs (B, n, p) and targets (B, n) of one's own, and
    `model.keep_draws((X, y), B, seed=0)` the inputs alone. An input that is always zero, of a
    neuron that never fires, leaves L_ii = alpha.

    Args:
        trials: n.
        inputs: p.
        problems: data sets.
        alpha: prior precision of a weight.
        noise: s.
        correlation: of the first input with the cause that all share, from 0, for independent
            inputs, to 1; it falls to a third of it for the last.
        seed: of inputs and targets.

    Raises:
        BadInput: a correlation that is not from 0 to 1.

    Differences:
        The paper's prior is a Laplace; its analysis is of this likelihood.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equations 26 and 28 for the reliability of a linear neuron's synapses
        https://doi.org/10.7554/eLife.92595
        Pattern Recognition and Machine Learning (Bishop, 2006), equations 3.49-3.51, for the
        posterior

    Example:
        >>> inputs, targets = BayesianRegression().observations()
        >>> inputs.shape, targets.shape
        (torch.Size([50, 30, 4]), torch.Size([50, 30]))
    """

    title = "Bayesian linear regression"
    paper = Paper(
        "Malkin et al.",
        2024,
        "Signatures of Bayesian inference emerge from energy-efficient synapses",
        "https://doi.org/10.7554/eLife.92595",
        "equations 26 and 28",
    )
    dims = {"w": ("input",), "y": ("trial",)}

    x_0: Tensor
    alpha: Tensor
    scale: Tensor

    def __init__(
        self,
        trials: Count = 30,
        inputs: Count = 4,
        *,
        problems: Count = 50,
        alpha: Positive = 1.0,
        noise: Positive = 1.0,
        correlation: Share = 0.9,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("scale", torch.tensor(float(noise)))
        x = designs(problems, trials, inputs, correlation=correlation, seed=seed)
        self.keep_draws((x, torch.zeros(problems, trials)), problems, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        inputs, targets = (self.x_0[:1], None) if x is None else x
        with pyro.plate("data", len(inputs)):
            origin = inputs.new_zeros(inputs.shape[-1])
            w = pyro.sample("w", dist.Normal(origin, self.alpha.rsqrt()).to_event(1))
            y_given_w = dist.Normal(drive(inputs, w), self.scale).to_event(1)
            observed: Tensor = pyro.sample("y", y_given_w, obs=targets)
            return observed

    def predict(self, z: Values) -> Tensor:
        """X w for the model's own inputs: latents (..., B, p) to (..., B, n)."""
        return drive(self.x_0, z["w"])

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: weights X, one system for each data set."""
        inputs, targets = x
        eye = torch.eye(inputs.shape[-1]).to(inputs)
        origin, offset = inputs.new_zeros(len(eye)), inputs.new_zeros(1)
        system = LinearGaussian(origin, self.alpha * eye, inputs, offset, self.scale.reshape(1))
        return system, targets

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior."""
        return LinearGaussianPosterior(self)
