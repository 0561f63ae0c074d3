"""Recurrent generator: a network with lateral connections that makes pictures of few causes."""

from __future__ import annotations

from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn

from inference.arguments import Count, Index, Positive
from inference.errors import NoExactPosterior
from inference.guide import check_counts
from inference.latents import Values
from inference.observation import Observation, size

from .model import Model, Paper
from .quadrature import FINE, Quadrature

__all__ = ["RecurrentGenerator"]


class RecurrentGenerator(Model):
    """A recurrent network goes on from z for some steps, and x is what it comes to, with noise.

    z ~ Normal(0, I_D); h_0 = 0, h_{k+1} = (1 - a) h_k + a tanh(U z + b + V h_k) for k < K;
    x given z ~ Normal(W h_K + c, s^2), units h of shape (N,), V of shape (N, N).

    The means of x are a curved and folded sheet, so posteriors are bent, and where two parts of the
    sheet are as near as the noise is large they have two modes: 15 of the 100 canonical ones have a
    second within three nats of the first. The Gaussian with the posterior's own mean and covariance
    misses it by .24 nats on average. Parameters are there to be learned, `fit(learn_model=True)`.

    Args:
        latents: D.
        units: N.
        steps: K.
        rate: a, above 0 and at most 1.
        features: F, the size of x.
        noise: s, the same for all features.
        seed: of weights and canonical observations.

    Raises:
        BadInput: a size that is no positive integer.

    References:
        A role for cortical interneurons as adversarial discriminators (Benjamin & Kording, 2023),
        whose generative network for MNIST is recurrent, stochastic and fully connected
        https://doi.org/10.1371/journal.pcbi.1011484
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2020)
        https://arxiv.org/abs/2006.10811

    Differences:
        All noise is in z and x: given z, the recurrence is deterministic, so that p(x given z) has
        a density and the ELBO and exact posteriors exist. Theirs is stochastic at each step, has
        512 units, and ELU or leaky rectified units; numbers of steps and of latents are not known.
    """

    title = "recurrent generator"
    paper = Paper(
        "Benjamin & Kording",
        2023,
        "A role for cortical interneurons as adversarial discriminators",
        "https://doi.org/10.1371/journal.pcbi.1011484",
        "algorithm 1",
    )
    dims = {"z": ("latent",), "x": ("pixel",)}

    scale: Tensor

    def __init__(
        self,
        latents: Count = 2,
        *,
        units: Count = 32,
        steps: Count = 4,
        rate: Positive = 0.5,
        features: Count = 6,
        noise: Positive = 0.5,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        check_counts(latents=latents, units=units, steps=steps, features=features)
        self.steps, self.rate = steps, rate
        g = torch.Generator().manual_seed(seed)

        def random(rows: int, columns: int, gain: float) -> nn.Parameter:
            return nn.Parameter(gain * columns**-0.5 * torch.randn(rows, columns, generator=g))

        self.inward = random(units, latents, 2.0)
        self.bias = nn.Parameter(torch.linspace(-1.0, 0.5, units))
        self.lateral = random(units, units, 1.5)
        self.outward = random(features, units, 2.0)
        self.mean = nn.Parameter(torch.linspace(-1.0, 0.5, features))
        self.scale = PyroParam(torch.tensor(float(noise)), dist.constraints.positive)
        self.keep_draws(torch.zeros(1, features), seed=seed)

    @classmethod
    def for_data(cls, x: Tensor, **knobs: Any) -> Self:
        """A model for data (N, F): mean of the data, small weights, noise that explains all.

        It has 20 latents and 128 units unless knobs say otherwise.
        """
        model = cls(**{"latents": 20, "units": 128, **knobs, "features": x.shape[1]})
        with torch.no_grad():
            model.mean.copy_(x.mean(0))
            model.outward.mul_(0.1 * x.std())
        model.scale = x.std(0).square().mean().sqrt()
        return model.belonging_to(x)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        origin = self.inward.new_zeros(self.inward.shape[1])
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(origin, 1.0).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """W h_K + c: latents (..., B, D) to (..., B, F)."""
        drive = z["z"] @ self.inward.T + self.bias
        h = self.rate * drive.tanh()  # the first step, from rest
        for _ in range(self.steps - 1):
            h = torch.lerp(h, (drive + h @ self.lateral.T).tanh(), self.rate)
        return h @ self.outward.T + self.mean

    def exact(self) -> Quadrature:
        """Quadrature, for one to three latents.

        Raises:
            NoExactPosterior: there are more; the message names what to use instead.
        """
        latents = self.inward.shape[1]
        if latents in FINE:
            return Quadrature(self)
        raise NoExactPosterior(
            type(self).__name__,
            expected="one to three latents",
            got=str(latents),
            fix="Take reference=inference.NUTS(model) for a few observations, or compare ELBOs.",
        )
