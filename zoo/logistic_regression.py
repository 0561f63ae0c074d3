"""Bayesian logistic regression: uncertain synapses of a neuron that says yes or no."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive, Share
from inference.guide import Guide
from inference.latents import Values
from inference.observation import Observation

from .bayesian_regression import designs, drive
from .log_concave import LogConcave
from .model import Model, Paper
from .quadrature import FINE, Quadrature

__all__ = ["LogisticRegression"]

POINTS = 37  # per axis for three weights: moments to 1e-4 sd at half the cost of the default


class LogisticRegression(Model):
    """Weights of a neuron that decides between two classes: one problem, one data set.

    w ~ Normal(0, I_p / alpha); y_t given w ~ Bernoulli(1 / (1 + exp(-X_t w))), t = 1 ... n.

    A trial informs about the weights only as far as its outcome was in doubt, so strong inputs,
    which saturate the neuron, leave a skewed posterior: the weight is surely positive, and perhaps
    very large. It is log-concave, but no Gaussian.

    The posterior is on a grid for up to three weights; beyond that it is sampled by
    :class:`zoo.LogConcave`, near-exact. Inputs and labels of one's own come in as they do in
    :class:`zoo.BayesianRegression`.

    Args:
        trials: n.
        inputs: p.
        problems: data sets.
        alpha: prior precision of a weight.
        correlation: of the first input with the cause that all share, from 0, for independent
            inputs, to 1; it falls to a third of it for the last.
        seed: of inputs and labels.

    Raises:
        BadInput: a correlation that is not from 0 to 1.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), whose networks are trained on this likelihood with more classes
        https://doi.org/10.7554/eLife.92595
        Pattern Recognition and Machine Learning (Bishop, 2006), section 4.5, for the model

    Example:
        >>> inputs, labels = LogisticRegression().observations()
        >>> inputs.shape, labels.shape
        (torch.Size([10, 12, 3]), torch.Size([10, 12]))
    """

    title = "Bayesian logistic regression"
    paper = Paper(
        "Malkin et al.",
        2024,
        "Signatures of Bayesian inference emerge from energy-efficient synapses",
        "https://doi.org/10.7554/eLife.92595",
    )
    dims = {"w": ("input",), "y": ("trial",)}

    x_0: Tensor
    alpha: Tensor

    def __init__(
        self,
        trials: Count = 12,
        inputs: Count = 3,
        *,
        problems: Count = 10,
        alpha: Positive = 1.0,
        correlation: Share = 0.9,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        x = designs(problems, trials, inputs, correlation=correlation, seed=seed)
        self.keep_draws((x, torch.zeros(problems, trials)), problems, seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        inputs, labels = (self.x_0[:1], None) if x is None else x
        with pyro.plate("data", len(inputs)):
            origin = inputs.new_zeros(inputs.shape[-1])
            w = pyro.sample("w", dist.Normal(origin, self.alpha.rsqrt()).to_event(1))
            y_given_w = dist.Bernoulli(logits=drive(inputs, w)).to_event(1)
            observed: Tensor = pyro.sample("y", y_given_w, obs=labels)
            return observed

    def predict(self, z: Values) -> Tensor:
        """Probability of one for the model's own inputs: latents (..., B, p) to (..., B, n)."""
        return drive(self.x_0, z["w"]).sigmoid()

    def exact(self) -> Guide:
        """Quadrature for up to three weights, else independence Metropolis from the mode."""
        inputs = self.x_0.shape[-1]
        if inputs in FINE:
            return Quadrature(self, points={3: POINTS}.get(inputs))
        return LogConcave(self)
