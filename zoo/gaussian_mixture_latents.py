"""Clustered latents behind a linear observation: a posterior whose modes have weights."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian
from .mixture import MixturePosterior
from .model import Model, Paper

__all__ = ["GaussianMixtureLatents"]


class GaussianMixtureLatents(Model):
    """Latents come in clusters, and an ambiguous observation leaves several of them possible.

    k ~ Categorical(w), summed out; z given k ~ Normal(m_k, S_k); x given z ~ Normal(A z, s^2 I).

    The posterior is a mixture too, with weights w_k N(x; A m_k, A S_k A' + s^2 I). Langevin
    dynamics with a perfect score settle inside each mode at once and exchange mass between modes
    exponentially slowly, so right modes with wrong weights are the typical failure; with equal
    weights nobody would notice.

    Args:
        weights: w, one per cluster.
        latents: D.
        features: F.
        noise: s.
        spread: distance of the cluster centres from the origin.
        seed: of centres, covariances, loadings and canonical observations.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023), whose
        targets are unconditional mixtures https://arxiv.org/abs/2308.11809
        Machine Learning: a Probabilistic Perspective (Murphy, 2012), equation 4.125, for the
        conditional of each cluster
    """

    title = "Gaussian mixture latents"
    paper = Paper(
        "Chen et al.",
        2023,
        "Expressive probabilistic sampling in recurrent neural networks",
        "https://arxiv.org/abs/2308.11809",
    )
    dims = {"z": ("latent",), "x": ("feature",)}

    weights: Tensor
    centres: Tensor
    tril: Tensor
    loadings: Tensor
    scale: Tensor

    def __init__(
        self,
        weights: Sequence[Positive] = (0.6, 0.25, 0.15),
        *,
        latents: Count = 3,
        features: Count = 2,
        noise: Positive = 0.8,
        spread: Positive = 2.5,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        k = len(weights)
        centres = torch.randn(k, latents, generator=g)
        factors = 0.15 * torch.randn(k, latents, latents, generator=g).tril(-1)
        sds = 0.4 + 0.4 * torch.rand(k, latents, generator=g)
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))
        self.register_buffer("centres", spread * centres / centres.norm(dim=-1, keepdim=True))
        self.register_buffer("tril", factors + torch.diag_embed(sds))
        self.register_buffer("loadings", torch.randn(features, latents, generator=g))
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep_draws(torch.zeros(1, features), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process, the cluster summed out."""
        with pyro.plate("data", 1 if x is None else size(x)):
            clusters = dist.MultivariateNormal(self.centres, scale_tril=self.tril)
            prior = dist.MixtureSameFamily(dist.Categorical(self.weights), clusters)
            z = pyro.sample("z", prior)
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """A z: latents (..., B, D) to (..., B, F)."""
        return z["z"] @ self.loadings.T

    def modes(self, z: Values) -> Tensor:
        """The cluster whose density is largest: latents (..., B, D) to (..., B)."""
        clusters = dist.MultivariateNormal(self.centres, scale_tril=self.tril)
        nearest: Tensor = clusters.log_prob(z["z"][..., None, :]).argmax(-1)
        return nearest

    def components(self, x: Observation) -> tuple[Tensor, LinearGaussian, Tensor]:
        """One linear Gaussian system for each cluster."""
        assert isinstance(x, Tensor)
        precision = torch.cholesky_inverse(self.tril.double())[:, None]
        offset, noise = x.new_zeros(x.shape[-1]), self.scale.expand(x.shape[-1])
        system = LinearGaussian(self.centres[:, None], precision, self.loadings, offset, noise)
        return (self.weights / self.weights.sum()).log(), system, x

    def exact(self) -> MixturePosterior:
        """The closed-form mixture."""
        return MixturePosterior(self)
