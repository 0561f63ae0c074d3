"""Gaussian mixture, of the benchmark of simulation-based inference."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily

from inference.arguments import Positive
from inference.latents import Values
from inference.observation import Observation, size

from .exact import ClosedForm
from .model import Model
from .sbi import LUECKMANN, published, unconstrained
from .truncated import TruncatedNormal

__all__ = ["GaussianMixtureSBI"]


class GaussianMixtureSBI(Model):
    """A place in the plane, seen through noise that is wide or narrow, one cannot tell which.

    z ~ Uniform(-10, 10)^2; x given z ~ (1/2) Normal(z, s_1^2 I) + (1/2) Normal(z, s_2^2 I).

    One coin decides for both coordinates. The posterior is one mode at two scales, 1 and .1: a
    spike on a hill, each of about half the mass, where a Gaussian guide has to choose. Near an edge
    the hill loses more mass than the spike: the spike's weight is .588, .525, .542 and .577 at
    observations 1, 2, 5 and 10.

    The observations are the ten published ones, which are no sample of the joint.

    Args:
        noise: s_1 and s_2, standard deviations.
        bound: half the width of the box.

    References:
        Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.7
        https://arxiv.org/abs/2101.04653
        Sequential Monte Carlo without likelihoods (Sisson et al., 2007), for the shape
        https://doi.org/10.1073/pnas.0607208104
    """

    title = "Gaussian mixture (SBI)"
    paper = LUECKMANN
    dims = {"z": ("latent",), "x": ("feature",)}

    scales: Tensor

    def __init__(
        self, *, noise: tuple[Positive, Positive] = (1.0, 0.1), bound: Positive = 10.0
    ) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("scales", torch.tensor(noise))
        self.keep(published("gaussian_mixture"))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process, the coin summed out."""
        with pyro.plate("data", 1 if x is None else size(x)):
            edge = self.scales.new_full((2,), self.bound)
            z = pyro.sample("z", dist.Uniform(-edge, edge).to_event(1))
            parts = dist.Normal(z[..., None, :], self.scales[:, None]).to_event(1)
            coin = dist.Categorical(logits=self.scales.new_zeros(2))
            observed: Tensor = pyro.sample("x", dist.MixtureSameFamily(coin, parts), obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The latents themselves, (..., B, 2)."""
        return z["z"]

    def exact(self) -> _Posterior:
        """The closed-form posterior."""
        return _Posterior(self)


class _Posterior(ClosedForm):
    """sum_k w_k(x) Normal(x, s_k^2 I) cut to the box, w_k proportional to the mass left in it."""

    model: GaussianMixtureSBI

    def distribution(self, x: Observation) -> Distribution:
        """Batch (B,), event (2,)."""
        cut = self._cut(x)
        masses = cut.log_mass.sum(-1).log_softmax(-1)
        weights = Categorical(logits=masses.to(cut.dtype), validate_args=False)
        law = MixtureSameFamily(weights, Independent(cut, 1), validate_args=False)
        return unconstrained(law, self.latents.sites[0])

    def log_evidence(self, x: Observation) -> Tensor:
        """log [(P_1 + P_2) / 2 / 20^2] with the masses P_k in the box, (B,), in nats."""
        assert isinstance(x, Tensor)
        masses = self._cut(x).log_mass.sum(-1)
        area = math.log(2 * (2 * self.model.bound) ** 2)
        evidence: Tensor = (masses.logsumexp(-1) - area).to(x.dtype)
        return evidence

    def _cut(self, x: Observation) -> TruncatedNormal:
        """Wide and narrow, batch (B, 2, 2): problems, components, coordinates."""
        assert isinstance(x, Tensor)
        bound = self.model.bound
        return TruncatedNormal(x[:, None, :], self.model.scales[:, None], -bound, bound)
