"""Latents behind Gaussian noise of known size: what a cost on reliability needs to know."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from .errors import Diverged
from .latents import Energies, Latents
from .observation import Observation
from .packed import PackedGuide

__all__ = ["CorrelatedNoise", "GaussianNoise", "PrivateNoise", "check_noise"]

LIMIT = 20.0  # of |log sd|: beyond 2e-9 and 5e8 the noise has reached zero or infinity


class GaussianNoise(PackedGuide):
    """A guide whose packed latents are Gaussian; a subclass says along which axes, by `log_sd`."""

    def log_sd(self, q: Distribution) -> Tensor:
        """Log sds of independent noise, (B, units)."""
        raise NotImplementedError

    def noise(self, x: Observation) -> Tensor:
        """Standard deviations of independent noise, (B, units)."""
        return self.log_sd(self.distribution(x)).exp()

    def energies(
        self, x: Observation, *, particles: int = 1, share: float = 1.0, at_mean: bool = False
    ) -> Energies:
        """By draws with gradients.

        Args:
            x: observation of B problems.
            particles: draws per problem.
            share: of the rows of the data set that x has, where the data set is one problem.
            at_mean: magnitude of the mean latents instead of the mean magnitude.
        """
        q = self.distribution(x)
        u = q.rsample(torch.Size([particles]))
        prior, likelihood = self.latents.log_terms(u, x)
        if at_mean:
            prior, _ = self.latents.log_terms(q.mean[None], x)
        return Energies(-likelihood.mean(0) / share, -prior.mean(0), self.log_sd(q))


class PrivateNoise(GaussianNoise):
    """Each packed latent has noise of its own."""

    def log_sd(self, q: Distribution) -> Tensor:
        """Of the latents, (B, D)."""
        return q.stddev.log()


class CorrelatedNoise(GaussianNoise):
    """Noise with correlations: independent along its principal axes."""

    def log_sd(self, q: Distribution) -> Tensor:
        """Of the principal axes, (B, D)."""
        assert isinstance(q, MultivariateNormal)
        sds: Tensor = torch.linalg.svdvals(q.scale_tril)
        return sds.log()


def check_noise(latents: Latents, log_sd: Tensor) -> None:
    """Raise :class:`Diverged`, naming the units, if noise has reached zero or infinity.

    Args:
        latents: name the units where there is one for each packed latent.
        log_sd: (B, units).
    """
    size = log_sd.detach()
    low, high = size.aminmax()  # in one pass; NaN comes through
    if low > -LIMIT and high < LIMIT:
        return
    bad = ~(size.abs() < LIMIT)
    units = bad.any(0).nonzero()[:, 0].tolist()
    named = _names(latents) if size.shape[-1] == latents.size else []
    shown = [named[k] if named else f"axis {k}" for k in units[:5]]
    row, k = (int(i) for i in bad.nonzero()[0])
    raise Diverged(
        "noise of " + ", ".join(shown) + (f" and {len(units) - 5} more" if len(units) > 5 else ""),
        expected="standard deviations above zero and finite",
        got=f"{float(size[row, k].exp()):.3g}",
        fix="Where it grows, nothing depends on the unit: give it a prior, with "
        "magnitude='expected'. Where it vanishes, raise the cost or lower lr.",
    )


def _names(latents: Latents) -> list[str]:
    """One name for each packed latent, such as w1[3, 7]."""
    return [
        f"{s.name}[{', '.join(map(str, at))}]" if at else s.name
        for s in latents.sites
        for at in np.ndindex(*s.unconstrained_shape)
    ]
