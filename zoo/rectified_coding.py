"""Rectified coding: Gaussian potentials, of which the image sees the positive part."""

from __future__ import annotations

from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily

from inference.arguments import Count, Index, Positive
from inference.errors import NoExactPosterior
from inference.guide import Guide
from inference.latents import Values
from inference.observation import Observation, size

from .exact import ClosedForm
from .gabor import gabors
from .linear_gaussian import LinearGaussian
from .model import Model
from .poisson_coding import NOISE_FLOOR, PoissonCoding, unlearned
from .quadrature import Quadrature
from .truncated import TruncatedNormal
from .truncated_pair import TruncatedPair

__all__ = ["RectifiedCoding", "RectifiedPosterior"]

PAIR = 2  # latents whose orthants have probabilities in closed form
MOST = 3  # latents on a grid
FAR = 1e3  # sds from any posterior mean at which orthants end
MASS_ERROR = 1e-6  # relative, of the probability of an orthant


class RectifiedCoding(Model):
    """Each neuron has a potential, and adds its feature as far as the potential is positive.

    z_k ~ Normal(m_k, v_k); x given z ~ Normal(A (exp(g) max(z, 0)), diag(s^2)).

    The image says nothing of how negative a potential is. Below zero the posterior is flat, as wide
    as the prior, and above zero it is a narrow Gaussian, with a kink between: for one neuron
    P(z < 0) is .69 where the image is blank, .19 where it shows the feature once and .002 where
    twice. Neurons whose features overlap decide together which of them are on, so that posteriors
    are mixtures of 2^K pieces of unlike widths. A Gaussian guide has one width for both sides of
    zero: the best factorised one misses log p(x) by .16 nats, on average over the canonical
    observations.

    Args:
        latents: K.
        side: pixels along a side of the image.
        noise: s, the same for all pixels at first; features have norm one.
        noise_floor: smallest noise sd; pixels that never change would otherwise have none.
        seed: of features and canonical observations.

    References:
        Brain-like variational inference (Vafaii, Galor & Yates, 2025), the model of iG-VAE with
        rectification and learned gains g https://arxiv.org/abs/2410.19315

    Differences:
        Gabor features stand for learned ones, until `dictionary` is learned. Noise has a floor
        where theirs is clamped.
    """

    title = "rectified coding"
    paper = PoissonCoding.paper
    dims = {"z": ("neuron",), "x": ("pixel",)}

    def __init__(
        self,
        latents: Count = 2,
        *,
        side: Count = 4,
        noise: Positive = 0.5,
        noise_floor: Positive = 1e-4,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        self.image_shape = (side, side)
        self.dictionary = nn.Parameter(gabors(latents, side, seed=seed))
        self.log_gain = nn.Parameter(torch.zeros(latents))
        self.prior_mean = nn.Parameter(torch.zeros(latents))
        self.prior_sd = PyroParam(torch.ones(latents), dist.constraints.positive)
        positive = dist.constraints.greater_than(noise_floor)
        self.scale = PyroParam(torch.full((side**2,), float(noise)), positive)
        self.keep_draws(torch.zeros(1, side**2), seed=seed)

    @classmethod
    def for_data(cls, x: Tensor, **knobs: Any) -> Self:
        """A model for data (N, F): small random dictionary, noise that explains all."""
        knobs = {"noise_floor": NOISE_FLOOR, **knobs}
        model = cls(**knobs)
        model.dictionary, model.scale = unlearned(
            x,
            model.dictionary.shape[1],
            noise_floor=knobs["noise_floor"],
            seed=knobs.get("seed", 0),
        )
        return model.belonging_to(x)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            z = pyro.sample("z", dist.Normal(self.prior_mean, self.prior_sd).to_event(1))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The decoder: potentials (..., B, K) to (..., B, F)."""
        # at zero, where beliefs start, the slope of clamp_min is one; with relu's none they stay
        mean: Tensor = (z["z"].clamp_min(0) * self.log_gain.exp()) @ self.dictionary.T
        return mean

    def exact(self) -> Guide:
        """The mixture over which neurons are on up to two latents, for three on a grid.

        Raises:
            NoExactPosterior: more than three latents.
        """
        latents = len(self.prior_mean)
        if latents > MOST:
            raise NoExactPosterior(
                f"RectifiedCoding with {latents} latents",
                expected=f"at most {MOST} latents",
                got=str(latents),
                fix="Compare with reference=inference.NUTS(model).",
            )
        return RectifiedPosterior(self) if latents <= PAIR else Quadrature(self)


class RectifiedPosterior(ClosedForm):
    """sum_a w_a Normal(m_a(x), L_a^-1) cut to the orthant a, over the 2^K sets a of neurons on.

    Where the signs of z are known the model is linear and Gaussian, with the features of neurons
    that are on: w_a is its evidence times the probability of the orthant.

    Args:
        model: :class:`RectifiedCoding` of one or two latents.
    """

    model: RectifiedCoding

    def distribution(self, x: Observation) -> Distribution:
        """Mixture of truncated Normals: batch (B,), event (K,)."""
        assert isinstance(x, Tensor)
        with torch.no_grad():  # the gradient of the ELBO is that of log p(x, z) alone: Fisher's
            log_weights, orthants = self._orthants(x)
        pick = Categorical(logits=log_weights.to(x.dtype), validate_args=False)
        return MixtureSameFamily(pick, orthants, validate_args=False)

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""
        assert isinstance(x, Tensor)
        evidence: Tensor = self._orthants(x)[0].logsumexp(-1)
        return evidence.to(x.dtype)

    def error(self, x: Observation) -> dict[str, Tensor]:
        """What the probabilities of orthants leave of log p(x), (B,)."""
        return {"log_evidence": torch.full((self.latents.problems(x),), MASS_ERROR)}

    def _orthants(self, x: Tensor) -> tuple[Tensor, _Orthants]:
        """log p(x, a), (B, 2^K), in float64, and the posteriors inside the orthants."""
        model = self.model
        k = len(model.prior_mean)
        bits = torch.arange(2**k, device=x.device)[:, None] >> torch.arange(k, device=x.device)
        on = (bits & 1).double()  # (2^K, K)
        features = model.dictionary * model.log_gain.exp() * on[:, None, None]
        precision = model.prior_sd.double().pow(-2).diag()
        origin = x.new_zeros(1)
        system = LinearGaussian(model.prior_mean, precision, features, origin, model.scale)
        y = x.double()
        loc, tril = system.posterior(y)
        orthants = _Orthants(loc.movedim(0, 1), (tril @ tril.mT)[:, 0], 2 * on - 1, x.dtype)
        return system.log_evidence(y).T + orthants.log_mass, orthants


class _Orthants(Distribution):
    """Normal(loc, covariance) where all z_k have given signs; batch (B, A), event (K,), K <= 2.

    Args:
        loc: (B, A, K), float64.
        covariance: (A, K, K).
        signs: -1 or 1, (A, K).
        dtype: of draws.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, loc: Tensor, covariance: Tensor, signs: Tensor, dtype: torch.dtype) -> None:
        super().__init__(loc.shape[:2], loc.shape[2:], validate_args=False)
        self.signs, self.dtype = signs, dtype
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        self.bound = FAR * float((loc.detach().abs() + scale.detach()).max())
        # signs turned, so that z is positive, and moved, so that it is above -bound
        at, wide = signs * loc - self.bound, scale.expand_as(loc)
        self.law: Distribution
        if loc.shape[-1] == 1:
            one = TruncatedNormal(at, wide, -self.bound, self.bound)
            self.law, self.log_mass = Independent(one, 1, validate_args=False), one.log_mass[..., 0]
        else:
            corr = signs.prod(-1) * covariance[:, 0, 1] / scale.prod(-1)
            pair = TruncatedPair(at, wide, corr.expand(loc.shape[:2]), self.bound)
            self.law, self.log_mass = pair, pair.log_mass

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Independent draws, (..., B, A, K)."""
        z: Tensor = self.signs * (self.law.sample(sample_shape) + self.bound)
        return z.to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (..., B, A), in nats; -inf outside."""
        score: Tensor = self.law.log_prob(self.signs * value.double() - self.bound)
        return score.to(value.dtype)
