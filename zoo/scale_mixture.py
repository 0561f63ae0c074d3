"""Contrast times pattern: the Gaussian scale mixture of natural images."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, constraints

from inference.arguments import Count, Index, Positive
from inference.latents import Values
from inference.observation import Observation, size

from .gabor import gabors
from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper, from_pyro
from .two_stage import TwoStage

__all__ = ["ObservedContrast", "ScaleMixture"]

SIDE = 8
OVERLAP = 0.5  # prior correlation of two coefficients, as a share of their features' overlap
CONTRASTS = 2.0, 1.0, 0.5, 0.25, 0.125
PAPER = Paper(
    "Wainwright & Simoncelli",
    2000,
    "Scale mixtures of Gaussians and the statistics of natural images",
    "https://proceedings.neurips.cc/paper/1999/hash/6a5dfac4be1502501489fc0f5a24b667-Abstract.html",
)


def _patterns(latents: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features A, (F, K), and the Cholesky factor of C = I / 2 + A'A / 2, (K, K)."""
    features = gabors(latents, SIDE, seed=seed)
    overlap = features.double().T @ features.double()
    covariance = torch.eye(latents) + OVERLAP * (overlap - torch.eye(latents))
    return features, torch.linalg.cholesky(covariance).float()


class ScaleMixture(Model):
    """Coefficients of features have one scale in common, the contrast of the patch.

    c ~ LogNormal(-v^2 / 2, v), of mean one; u ~ Normal(0, C); x given c, u ~ Normal(c A u, s^2 I).

    Contrast and coefficients trade off along a hyperbola: log c and log |u| have a correlation of
    -.85 in the posterior, on average. How wide it is in u depends on c: at low contrast u keeps its
    prior, at high contrast the image settles it, so that neurons that sample u vary less when a
    stimulus appears.

    Args:
        latents: K, coefficients besides the contrast.
        noise: s, of a pixel; features have norm one.
        spread: v, the sd of log contrast.
        seed: of features and canonical observations.

    References:
        Scale mixtures of Gaussians and the statistics of natural images (Wainwright & Simoncelli,
        2000) https://proceedings.neurips.cc/paper/1999/hash/6a5dfac4be1502501489fc0f5a24b667-Abstract.html
        Neural variability and sampling-based probabilistic representations in the visual cortex
        (Orban et al., 2016), for the latents as membrane potentials
        https://doi.org/10.1016/j.neuron.2016.09.038
    """

    title = "scale mixture"
    paper = PAPER
    dims = {"contrast": (), "u": ("coefficient",), "x": ("pixel",)}
    image_shape = (SIDE, SIDE)

    features: Tensor
    tril: Tensor
    scale: Tensor
    log_contrast: Tensor

    def __init__(
        self, latents: Count = 5, *, noise: Positive = 0.2, spread: Positive = 0.6, seed: Index = 0
    ) -> None:
        super().__init__()
        features, tril = _patterns(latents, seed)
        self.register_buffer("features", features)
        self.register_buffer("tril", tril)
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.register_buffer("log_contrast", torch.tensor([-(spread**2) / 2, spread]))
        self.keep_draws(torch.zeros(1, SIDE**2), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            contrast = pyro.sample("contrast", dist.LogNormal(*self.log_contrast))
            origin = self.tril.new_zeros(len(self.tril))
            u = pyro.sample("u", dist.MultivariateNormal(origin, scale_tril=self.tril))
            mean = self.predict({"contrast": contrast, "u": u})
            observed: Tensor = pyro.sample("x", dist.Normal(mean, self.scale).to_event(1), obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """c A u: latents (..., B) and (..., B, K) to (..., B, F)."""
        return z["contrast"][..., None] * (z["u"] @ self.features.T)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Basis U, (F, K), and gains S, (K,), of A C^(1/2) = U S V', in float64."""
        patterns = self.features.double() @ self.tril.double()
        basis, gains, _ = torch.linalg.svd(patterns, full_matrices=False)
        return basis, gains

    def exact(self) -> _ContrastFirst:
        """Contrast by quadrature, coefficients given the contrast in closed form."""
        return _ContrastFirst(self, from_pyro(self._marginal, self.observations()), self._rest)

    def _marginal(self, x: Tensor) -> None:
        """u integrated out: U'x given c ~ Normal(0, s^2 + c^2 S^2)."""
        basis, gains = (t.to(x.dtype) for t in self.spectrum())
        with pyro.plate("data", len(x)):
            contrast = pyro.sample("contrast", dist.LogNormal(*self.log_contrast))
            spread = (self.scale.square() + (contrast[:, None] * gains).square()).sqrt()
            pyro.sample("x", _Signal(basis, spread), obs=x)

    def _rest(self, log_contrast: Tensor, x: Observation) -> Distribution:
        """u given c, of which U'x says all that x says: its weights are c U'A."""
        assert isinstance(x, Tensor)
        basis, _ = self.spectrum()
        weights = log_contrast[..., None].double().exp() * (basis.T @ self.features.double())
        loc, tril = _given_contrast(self, weights).posterior((x.double() @ basis).to(x.dtype))
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)


class _Signal(TorchDistribution):  # type: ignore[misc]
    """The law of the signal U'x, (B, K), in an image (B, F); the noise outside is not scored.

    Args:
        basis: U, (F, K).
        spread: sd of each coordinate, (B, K).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.independent(constraints.real, 1)

    def __init__(self, basis: Tensor, spread: Tensor) -> None:
        super().__init__(spread.shape[:-1], basis.shape[:1], validate_args=False)
        self.basis, self.signal = basis, dist.Normal(torch.zeros_like(spread), spread).to_event(1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Images without noise, (..., B, F)."""
        images: Tensor = self.signal.sample(sample_shape) @ self.basis.T
        return images

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the signal, (..., B), in nats."""
        score: Tensor = self.signal.log_prob(value @ self.basis)
        return score


class _ContrastFirst(TwoStage):
    """p(c given x) p(u given c, x), by what x says about its K dimensions of signal.

    Neither factor depends on the F - K dimensions of pure noise; the evidence does.
    """

    model: ScaleMixture

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        assert isinstance(x, Tensor)
        basis, _ = self.model.spectrum()
        pixels, noise = x.double(), self.model.scale.double()
        outside = (pixels - pixels @ basis @ basis.T) / noise
        volume = (basis.shape[0] - basis.shape[1]) * (2 * math.pi * noise.square()).log()
        silent = -(outside.square().sum(-1) + volume) / 2
        return super().log_evidence(x) + silent.to(x.dtype)


class ObservedContrast(Model):
    """The scale mixture with the contrast known: more contrast, less uncertainty.

    u ~ Normal(0, C); x given u ~ Normal(c A u, s^2 I), the contrast c an input.

    The posterior precision is C^-1 + c^2 A'A / s^2, so that the sd falls with contrast in every
    direction, whatever the image: from a mean of .79 at c = 1/8 to .64, .46, .28 and .15 at c = 2.
    Without contrast a linear Gaussian model has one covariance for all images.

    Args:
        latents: K.
        noise: s, of a pixel; features have norm one.
        seed: of features and canonical observations, whose contrasts go from 2 to 1/8 in octaves.

    References:
        Scale mixtures of Gaussians and the statistics of natural images (Wainwright & Simoncelli,
        2000) https://proceedings.neurips.cc/paper/1999/hash/6a5dfac4be1502501489fc0f5a24b667-Abstract.html
    """

    title = "scale mixture, observed contrast"
    paper = PAPER
    dims = {"u": ("coefficient",), "x": ("pixel",)}
    image_shape = (SIDE, SIDE)

    features: Tensor
    tril: Tensor
    scale: Tensor

    def __init__(self, latents: Count = 5, *, noise: Positive = 0.2, seed: Index = 0) -> None:
        super().__init__()
        features, tril = _patterns(latents, seed)
        self.register_buffer("features", features)
        self.register_buffer("tril", tril)
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep_draws((torch.tensor(CONTRASTS), torch.zeros(len(CONTRASTS), SIDE**2)), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process; x is (contrast (B,), image (B, F))."""
        contrast, image = (self.x_0[:1], None) if x is None else x
        with pyro.plate("data", len(contrast)):
            origin = self.tril.new_zeros(len(self.tril))
            u = pyro.sample("u", dist.MultivariateNormal(origin, scale_tril=self.tril))
            x_given_u = dist.Normal(contrast[:, None] * (u @ self.features.T), self.scale)
            observed: Tensor = pyro.sample("x", x_given_u.to_event(1), obs=image)
            return observed

    def predict(self, z: Values) -> Tensor:
        """A u, the pattern at contrast one: latents (..., B, K) to (..., B, F)."""
        pattern: Tensor = z["u"] @ self.features.T
        return pattern

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: weights c A, (B, F, K), one for each problem."""
        contrast, image = x
        return _given_contrast(self, contrast[:, None, None] * self.features), image

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form posterior."""
        return LinearGaussianPosterior(self)


def _given_contrast(model: ScaleMixture | ObservedContrast, weights: Tensor) -> LinearGaussian:
    """u ~ Normal(0, C), seen through weights (..., K) with noise s."""
    precision = torch.cholesky_inverse(model.tril.double())
    origin = weights.new_zeros(weights.shape[-1])
    return LinearGaussian(origin, precision, weights, origin[:1], model.scale.reshape(1))
