"""Bernoulli GLM, of the benchmark of simulation-based inference."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from inference.arguments import Positive
from inference.latents import Values
from inference.observation import Observation, size

from .log_concave import LogConcave
from .model import Model
from .sbi import LUECKMANN, published

__all__ = ["BernoulliGLM", "SpikeStatistic"]

STEPS, LAGS = 100, 9


class SpikeStatistic(TorchDistribution):  # type: ignore[misc]
    """x = V'y of spikes y_t ~ Bernoulli(sigmoid(V_t z)); batch (...,), event (D,).

    The stimulus in V is generic: only one y makes a given x, so the probability of x is that of
    its y, which depends on y through x alone. For an x that no y makes, `log_prob` gives the same
    formula, the likelihood up to a constant.

    Args:
        z: (..., D).
        design: V, (T, D).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def __init__(self, z: Tensor, design: Tensor) -> None:
        self.z, self.design = z, design
        super().__init__(z.shape[:-1], z.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> SpikeStatistic:
        """The same distribution for more batch dims."""
        return SpikeStatistic(
            self.z.expand(torch.Size(batch_shape) + self.event_shape), self.design
        )

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Spikes, summed."""
        rate = (self.z @ self.design.T).sigmoid()
        spikes: Tensor = torch.bernoulli(rate.expand(torch.Size(sample_shape) + rate.shape))
        return spikes @ self.design

    def log_prob(self, value: Tensor) -> Tensor:
        """z'x - sum_t log(1 + exp(V_t z)), in nats."""
        score: Tensor = (self.z * value).sum(-1) - softplus(self.z @ self.design.T).sum(-1)
        return score


class BernoulliGLM(Model):
    """A neuron's spikes in response to a stimulus: the offset and filter of a linear model.

    z ~ Normal(0, B^-1); y_t given z ~ Bernoulli(sigmoid(V_t z)), t = 1 ... 100; x = V'y.

    V_t is 1 and the last nine values of a fixed white stimulus I, so x is the number of spikes and
    the spike-triggered sum of the stimulus, which is sufficient: the posterior is that of the spike
    train. The prior favours smooth filters: B = blockdiag(1/2, F'F), F = D D + diag(sqrt(k / 9))
    for k = 0 ... 8, D the first difference. B is a precision. The posterior is log-concave, with
    correlated neighbours along the filter.

    The observations are the ten published ones, which are no sample of the joint.

    Args:
        spread: of the prior, as a multiple of the benchmark's: B is divided by its square.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.5
        https://arxiv.org/abs/2101.04653
        Training deep neural density estimators to identify mechanistic models of neural dynamics
        (Gonçalves et al., 2020), for the neuron https://doi.org/10.7554/eLife.56261
    """

    title = "Bernoulli GLM (SBI)"
    paper = LUECKMANN
    dims = {"z": ("weight",), "x": ("statistic",)}

    design: Tensor
    precision: Tensor

    def __init__(self, *, spread: Positive = 1.0) -> None:
        super().__init__()
        # the benchmark's own stimulus; a generator of its own, so no global seed is touched
        stimulus = np.random.RandomState(42).randn(STEPS)
        lagged = [np.concatenate([np.zeros(k), stimulus[: STEPS - k]]) for k in range(LAGS)]
        design = np.stack([np.ones(STEPS), *lagged], -1)
        difference = np.eye(LAGS) - np.eye(LAGS, k=-1)
        factor = difference @ difference + np.diag(np.sqrt(np.arange(LAGS) / LAGS))
        precision = np.zeros((LAGS + 1, LAGS + 1))
        precision[0, 0], precision[1:, 1:] = 0.5, factor.T @ factor
        precision /= spread**2
        self.register_buffer("design", torch.as_tensor(design, dtype=torch.float32))
        self.register_buffer("precision", torch.as_tensor(precision, dtype=torch.float32))
        self.keep(published("bernoulli_glm"))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            origin = self.precision.new_zeros(len(self.precision))
            prior = dist.MultivariateNormal(origin, precision_matrix=self.precision)
            z = pyro.sample("z", prior)
            observed: Tensor = pyro.sample("x", SpikeStatistic(z, self.design), obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """V' sigmoid(V z): latents (..., B, 10) to (..., B, 10)."""
        return (z["z"] @ self.design.T).sigmoid() @ self.design

    def exact(self) -> LogConcave:
        """Independence Metropolis at the mode."""
        return LogConcave(self)
