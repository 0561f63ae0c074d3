"""Two modes of unequal weight, in one dimension."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference.arguments import Index, Positive
from inference.latents import Values

from .model import Paper
from .target import Target

__all__ = ["Bimodal"]


class Bimodal(Target):
    """An unconditional mixture of two Normals: how much mass a sampler gives to each mode.

    k ~ Categorical(w), summed out; z given k ~ Normal(m_k, .5^2), m = -1, +1;
    x ~ Normal(0, 1), independent of z.

    Langevin dynamics find both modes at once and their weights very late: with the exact score, a
    start that is uniform on (-2, 2) and a time of 1 put a mass of .364 on z < 0, where the truth is
    .214. Equal weights hide such errors, for a symmetric start has the right masses already.

    Args:
        weights: w, of the modes at -1 and +1.
        seed: of the observations, which say nothing of z.

    Differences:
        The paper has equal weights, `Bimodal((0.5, 0.5))`, and no observation; .2 and .8 are ours.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023)
        https://arxiv.org/abs/2308.11809
    """

    title = "bimodal"
    paper = Paper(
        "Chen et al.",
        2023,
        "Expressive probabilistic sampling in recurrent neural networks",
        "https://arxiv.org/abs/2308.11809",
    )
    dims = {"z": (), "x": ("feature",)}

    weights: Tensor
    means: Tensor
    scale: Tensor

    def __init__(self, weights: Sequence[Positive] = (0.2, 0.8), *, seed: Index = 0) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))
        self.register_buffer("means", torch.tensor([-1.0, 1.0]))
        self.register_buffer("scale", torch.tensor(0.5))
        self.keep_draws(torch.zeros(1, 1), seed=seed)

    def target(self) -> TorchDistribution:
        """The mixture."""
        modes = dist.Normal(self.means, self.scale)
        return dist.MixtureSameFamily(dist.Categorical(self.weights), modes)

    def modes(self, z: Values) -> Tensor:
        """0 for the mode at -1, 1 for that at +1: latents (..., B) to (..., B)."""
        return (z["z"] > 0).long()
