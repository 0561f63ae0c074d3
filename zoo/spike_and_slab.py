"""Sparse coding with on and off coefficients: as many modes as there are sets of features."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive, Probability
from inference.errors import BadInput
from inference.latents import Values
from inference.observation import Observation, size

from .gabor import gabors
from .linear_gaussian import LinearGaussian
from .mixture import MixturePosterior
from .model import Model, Paper

__all__ = ["SpikeAndSlab"]

SIDE = 8
MOST = 12  # 4,096 components


class SpikeAndSlab(Model):
    """Each feature of an image patch is nearly absent or clearly present.

    a_i ~ Bernoulli(p), summed out; z_i given a_i ~ Normal(0, slab^2) where a_i = 1 and
    Normal(0, spike^2) where a_i = 0; x given z ~ Normal(A z, s^2 I), A of K Gabor features.

    Given which features are present the model is linear Gaussian, so the posterior is a mixture
    over all 2^K sets of features. Features overlap, and several sets explain the same patch: in
    perplexity a typical posterior spreads over 7 of 64 sets, with twelve features over 80 of 4,096.

    Args:
        latents: K, at most 12.
        noise: s, of a pixel; features have norm one.
        present: p.
        spike: sd of a coefficient whose feature is absent.
        slab: sd of a coefficient whose feature is present.
        seed: of features and canonical observations.

    Raises:
        BadInput: more than 12 latents; their 2^K assignments are enumerated.

    References:
        Learning sparse codes with a mixture-of-Gaussians prior (Olshausen & Millman, 2000)
        https://proceedings.neurips.cc/paper/1999/hash/b0f2ad44d26e1a6f244201fe0fd864d1-Abstract.html
    """

    title = "spike and slab"
    paper = Paper(
        "Olshausen & Millman",
        2000,
        "Learning sparse codes with a mixture-of-Gaussians prior",
        "https://proceedings.neurips.cc/paper/1999/hash/b0f2ad44d26e1a6f244201fe0fd864d1-Abstract.html",
    )
    dims = {"z": ("coefficient",), "x": ("pixel",)}
    image_shape = (SIDE, SIDE)

    features: Tensor
    weights: Tensor
    spreads: Tensor
    scale: Tensor

    def __init__(
        self,
        latents: Count = 6,
        *,
        noise: Positive = 0.2,
        present: Probability = 0.25,
        spike: Positive = 0.1,
        slab: Positive = 1.0,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        if latents > MOST:
            raise BadInput(
                "latents",
                expected=f"at most {MOST}, for 2^latents assignments are enumerated",
                got=str(latents),
                fix="latents=12.",
            )
        self.register_buffer("features", gabors(latents, SIDE, seed=seed))
        self.register_buffer("weights", torch.tensor([1 - present, present]))
        self.register_buffer("spreads", torch.tensor([spike, slab]))
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep_draws(torch.zeros(1, SIDE**2), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process, the assignments summed out."""
        shape = self.features.shape[1], 2
        with pyro.plate("data", 1 if x is None else size(x)):
            present = dist.Categorical(self.weights.expand(shape))
            coefficient = dist.Normal(self.weights.new_zeros(shape), self.spreads)
            z = pyro.sample("z", dist.MixtureSameFamily(present, coefficient).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """A z: latents (..., B, K) to (..., B, F)."""
        return z["z"] @ self.features.T

    def assignments(self) -> Tensor:
        """All sets of features, (2^K, K): 1 where a feature is present."""
        latents = self.features.shape[1]
        states = torch.arange(2**latents, device=self.features.device)
        return (states[:, None] >> torch.arange(latents, device=states.device)) & 1

    def components(self, x: Observation) -> tuple[Tensor, LinearGaussian, Tensor]:
        """One linear Gaussian system for each assignment."""
        assert isinstance(x, Tensor)
        present = self.assignments()
        log_prior = (self.weights / self.weights.sum()).log()[present].sum(-1)
        precision = torch.diag_embed(self.spreads.double()[present] ** -2)[:, None]
        origin, noise = x.new_zeros(present.shape[1]), self.scale.reshape(1)
        system = LinearGaussian(origin, precision, self.features, x.new_zeros(1), noise)
        return log_prior, system, x

    def exact(self) -> MixturePosterior:
        """The mixture over all assignments."""
        return MixturePosterior(self)
