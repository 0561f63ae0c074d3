"""Poisson coding: spike counts explain an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn

from inference.arguments import Count, Index, Positive
from inference.guide import Guide
from inference.latents import Values
from inference.observation import Observation, size

from .exact import MAX_STATES, Enumerated
from .gabor import gabors
from .gibbs import Gibbs
from .model import Model, Paper

__all__ = ["PoissonCoding", "unlearned"]

NOISE_FLOOR = 0.02  # in `for_data`
SPIKES = 3.0  # expected of all neurons together, in `for_data`; published: about four of 512
SPREAD = 0.5  # of log rates about their mean, either way, in `for_data`
POWER = 3.0  # of all features not learned yet, their squared norms in units of the noise
MOST = 5  # latents that are enumerated: 16^5 states are a million
LARGEST = 255  # count that Gibbs sampling considers
TAIL = 1e-14


class PoissonCoding(Model):
    """Each neuron says how often its feature is there, in spikes.

    z_k ~ Poisson(exp(u_k)); x given z ~ Normal(dec(z), diag(s^2)), dec(z) = A z or A MLP(z).

    The posterior is discrete and one-sided, and features that overlap share spikes or compete for
    them. Its variance is half its mean, whereas independent Poisson neurons have the same variance
    as mean: the best of them miss log p(x) by 2.3 nats, on average over the canonical observations.

    Args:
        latents: K.
        side: pixels along a side of the image.
        hidden: widths of softplus layers between z and the dictionary A; none by default.
        noise: s, the same for all pixels at first; features have norm one.
        noise_floor: smallest noise sd; pixels that never change would otherwise have none.
        bound: largest count of the exact posterior. By default the smallest that the prior reaches
            with probability below 1e-14, or what a million states allow. Posterior tails average to
            that of the prior: for images of the model, mass beyond 1e-9 at the bound is a one in
            100,000 chance. `exact().error(x)` says what it is for any other.
        seed: of decoder and canonical observations.

    References:
        Brain-like variational inference (Vafaii, Galor & Yates, 2025), whose model this is
        https://arxiv.org/abs/2410.19315

    Differences:
        Gabor features stand for learned ones, until `dictionary` is learned. Noise has a floor
        where theirs is clamped.
    """

    title = "Poisson coding"
    paper = Paper(
        "Vafaii, Galor & Yates",
        2025,
        "Brain-like variational inference",
        "https://arxiv.org/abs/2410.19315",
    )
    dims = {"z": ("neuron",), "x": ("pixel",)}

    def __init__(
        self,
        latents: Count = 3,
        *,
        side: Count = 4,
        hidden: Sequence[Count] = (),
        noise: Positive = 0.5,
        noise_floor: Positive = 1e-4,
        bound: Count | None = None,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        self.bound, self.image_shape = bound, (side, side)
        g = torch.Generator().manual_seed(seed)
        sizes = latents, *hidden
        layers = [_layer(n, m, g) for n, m in pairwise(sizes)]
        self.body = nn.Sequential(*layers)  # with no layer, the identity
        self.dictionary = nn.Parameter(gabors(sizes[-1], side, seed=seed))
        self.log_rate = nn.Parameter(torch.linspace(-0.8, 0.2, latents))
        positive = dist.constraints.greater_than(noise_floor)
        self.scale = PyroParam(torch.full((side**2,), float(noise)), positive)
        self.keep_draws(torch.zeros(1, side**2), seed=seed)

    @classmethod
    def for_data(cls, x: Tensor, **knobs: Any) -> Self:
        """A model for data (N, F), ready to be learned, with hundreds of latents if need be.

        Three spikes are expected of all neurons together, the noise explains all of x, and features
        are random and, where they are many, so small that a spike costs next to nothing.
        """
        knobs = {"noise_floor": NOISE_FLOOR, **knobs}
        model = cls(**knobs)
        floor, seed = knobs["noise_floor"], knobs.get("seed", 0)
        width = model.dictionary.shape[1]
        model.dictionary, model.scale = unlearned(x, width, noise_floor=floor, seed=seed)
        g = torch.Generator().manual_seed(seed)
        uneven = SPREAD * (2 * torch.rand(len(model.log_rate), generator=g) - 1)
        model.log_rate = nn.Parameter(uneven - uneven.logsumexp(0) + math.log(SPIKES))
        shape = model.image_shape
        model = model.belonging_to(x)
        model.image_shape = shape if shape and math.prod(shape) == x.shape[1] else None
        return model

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Poisson(self.log_rate.exp()).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The decoder: counts (..., B, K) to (..., B, F)."""
        mean: Tensor = self.body(z["z"]) @ self.dictionary.T
        return mean

    def exact(self) -> Guide:
        """Enumeration of all counts up to five latents; beyond, Gibbs sampling."""
        bound = self._bound() if self.bound is None else self.bound
        guide = Enumerated if len(self.log_rate) <= MOST else Gibbs
        return guide(self, bound=bound)

    @torch.no_grad()
    def _bound(self) -> int:
        """The smallest count n with P(z_k >= n) < 1e-14 for every k, as far as states allow."""
        latents = len(self.log_rate)
        most = int(MAX_STATES ** (1 / latents) + 1e-9) - 1 if latents <= MOST else LARGEST
        counts = torch.arange(1.0, most, dtype=torch.float64)
        rate = self.log_rate.double().exp().max().cpu()
        return 1 + int((torch.special.gammainc(counts, rate) >= TAIL).sum())


def unlearned(
    x: Tensor, width: int, *, noise_floor: float, seed: int
) -> tuple[nn.Parameter, Tensor]:
    """A dictionary (F, width) and noise sds (F,) from which to learn data x (N, F).

    The noise explains all of x. Features are random, and the more there are the smaller: three have
    a norm of one in units of the noise, as large as can be told from noise in a few steps, whereas
    a spike of one of 512 costs .003 nats.
    """
    # half as much again as the floor: on it the unconstrained parameter would be infinite
    scale = x.square().mean(0).sqrt().clamp_min(1.5 * noise_floor)
    g = torch.Generator().manual_seed(seed)
    random = torch.randn(len(scale), width, generator=g).to(scale)
    return nn.Parameter((POWER / random.numel()) ** 0.5 * scale[:, None] * random), scale


def _layer(inputs: int, outputs: int, g: torch.Generator) -> nn.Module:
    """A linear layer and a softplus, initialised from g alone."""
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.normal_(linear.weight, std=inputs**-0.5, generator=g)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(linear, nn.Softplus())
