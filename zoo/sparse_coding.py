"""Sparse coding: most features of an image patch are nearly absent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from inference.errors import BadCheckpoint, NoExactPosterior
from inference.guide import Guide
from inference.latents import Values
from inference.observation import Observation, size

from .data import patches, whiten
from .gabor import gabors
from .model import Model, Paper
from .quadrature import Quadrature
from .stored import StoredDraws, reference_path

__all__ = ["SparseCoding"]

SIDE = 8
NOISE = 0.5  # in `for_data`, of the root mean square of x
FAINT = 1e-4  # smallest root mean square that counts
PATCHES = 2000  # to whiten with; as many again would take as long as building the model


class SparseCoding(Model):
    """An image patch is a sum of features, each of which is rarely needed.

    z ~ Laplace(0, 1/r) for each of K features; x given z ~ Normal(A z, s^2 I), where the K columns
    of A are those of the parameter `dictionary`, brought to norm one. With lengths of their own
    features would grow without end as they are learned, and coefficients shrink: the prior asks for
    small ones.

    The posterior has a kink wherever a coefficient is 0, and its width depends on the image: with
    one feature, r = 2 and s = .5 the sd is .345 where the image is blank and .5 where it drives the
    feature. Features that overlap explain each other away. A Gaussian guide of fixed covariance
    can do neither.

    Args:
        latents: K. Up to two, the exact posterior is on a grid; the canonical eight have stored
            reference draws.
        noise: s, of a pixel.
        rate: r, one over the mean size of a coefficient.
        seed: of features and canonical observations, four from the joint and two whitened patches
            of photographs.

    References:
        Emergence of simple-cell receptive field properties by learning a sparse code for natural
        images (Olshausen & Field, 1996) https://doi.org/10.1038/381607a0

    Differences:
        Gabor features stand for learned ones, until `dictionary` is learned, with
        inference.MAPEnergy as they did. Norms are one at every moment, where theirs follow a target
        for the variance of coefficients. Of their three sparse priors this is the absolute value,
        and the posterior is asked for, not its mode.
    """

    title = "sparse coding"
    paper = Paper(
        "Olshausen & Field",
        1996,
        "Emergence of simple-cell receptive field properties by learning a sparse code for "
        "natural images",
        "https://doi.org/10.1038/381607a0",
    )
    dims = {"z": ("coefficient",), "x": ("pixel",)}
    image_shape: tuple[int, ...] | None = (SIDE, SIDE)

    rate: Tensor
    scale: Tensor

    def __init__(
        self, latents: int = 8, *, noise: float = 0.2, rate: float = 2.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(gabors(latents, SIDE, seed=seed))
        self.register_buffer("rate", torch.tensor(rate))
        self.register_buffer("scale", torch.tensor(noise))
        self._keep_canonical(seed)

    @classmethod
    def for_data(cls, x: Tensor, **knobs: Any) -> Self:
        """A model for data (N, F) about zero, such as whitened patches: random features to learn.

        Unless they are given, K = F, a quarter of the power of x is noise, s^2 = E x^2 / 4, and the
        rate gives the features the rest, 2 K / r^2 = 3/4 F E x^2. Neither is learned.
        """
        features = x.shape[1]
        latents = knobs.get("latents", features)
        rms = max(float(x.square().mean().sqrt()), FAINT)
        rate = (2 * latents / ((1 - NOISE**2) * features)) ** 0.5 / rms
        model = cls(**{"latents": latents, "noise": NOISE * rms, "rate": rate, **knobs})
        g = torch.Generator().manual_seed(knobs.get("seed", 0))
        random = torch.randn(features, latents, generator=g)
        model.dictionary = nn.Parameter(normalize(random, dim=0))
        return model.belonging_to(x)

    @property
    def features(self) -> Tensor:
        """A: columns of norm one, (F, K)."""
        return normalize(self.dictionary, dim=0)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            origin = self.rate.new_zeros(self.dictionary.shape[1])
            z = pyro.sample("z", dist.Laplace(origin, 1 / self.rate).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """A z: latents (..., B, K) to (..., B, F)."""
        mean: Tensor = z["z"] @ self.features.T
        return mean

    def exact(self) -> Guide:
        """On a grid up to two latents, else stored draws, for the canonical observations only.

        Raises:
            NoExactPosterior: more than two latents, and not the model whose draws are on file.
        """
        latents = self.dictionary.shape[1]
        if latents <= 2:
            return Quadrature(self)
        try:
            return StoredDraws(self, reference_path("sparse_coding"))
        except BadCheckpoint as error:
            raise NoExactPosterior(
                f"SparseCoding with {latents} latents",
                expected="at most two latents, or the canonical model, whose draws are on file",
                got="another model",
                fix="Compare with reference=inference.NUTS(model), or keep its draws with "
                "zoo.StoredDraws.write.",
            ) from error

    @torch.no_grad()
    def _keep_canonical(self, seed: int) -> None:
        """Four patches from the joint and the two photographed ones that the features fit best.

        Made in float64 and rounded, so that every machine has the very ones that were stored.
        """
        self.double()
        self.keep(self.dictionary.new_zeros(1, SIDE**2))
        _, drawn = self.simulate(4, seed=seed)
        assert isinstance(drawn, Tensor)
        raw = patches(side=SIDE, n=PATCHES)
        seen = whiten(replace(raw, train=raw.train.double(), validation=raw.validation.double()))
        basis = torch.linalg.qr(self.features).Q
        unit = seen.validation / seen.validation.norm(dim=1, keepdim=True)
        best = unit[(unit @ basis).norm(dim=1).topk(2).indices]
        # of norm as expected from the model, where the sd of a coefficient is sqrt(2) / r
        power = 2 * self.features.square().sum() / self.rate.square()
        norm = (power + SIDE**2 * self.scale.square()).sqrt()
        self.float()
        self.keep(torch.cat([drawn, norm * best]).round(decimals=2).float())
