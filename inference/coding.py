"""What a circuit of neurons needs to know of a model: their prior, the decoder, the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from .errors import BadInput, Incompatible
from .latents import Latents, isolated
from .observation import Observation, check_observation, parts
from .seeds import seeded

__all__ = ["Coding", "Reader"]

FAR = 10.0  # ranges of the model's own observations, beyond which x is in other units
ROUNDING = 1e-3  # share of its size by which a linear decoder may miss, in float32


@dataclass(frozen=True)
class Coding:
    """z_k ~ prior_k, independent; x given z ~ Normal(decode(z), diag(noise^2)).

    Attributes:
        reader: runs the decoder.
        prior: batch shape (K,).
        noise: standard deviations, (F,).
        weights: Phi, (F, K), where decode(z) = Phi z + offset; else None.
        offset: decode(0), (F,).
    """

    reader: Reader
    prior: Distribution
    noise: Tensor
    weights: Tensor | None
    offset: Tensor

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, K) to mean observations (B, F), with gradients."""
        return self.reader.run(z)[1].mean


class Reader:
    """Reads prior, decoder and noise off a Pyro program, whenever its parameters may have moved.

    Args:
        latents: of the model.
        family: distribution that the latents must have a priori.
        who: guide that asks, for messages.

    Raises:
        Incompatible: more than one latent site, another prior, a likelihood that is not Normal, a
            prior or noise that differs between problems, noise that depends on z, or a data set
            that is one problem.
    """

    def __init__(self, latents: Latents, family: type[Distribution], who: str) -> None:
        self.latents, self.family, self.who = latents, family, who
        paired = isinstance(latents.like, tuple)
        if len(latents.sites) != 1 or not latents.plated or latents.factors or paired:
            self._refuse(
                f"sites {list(latents.names)} and factors {latents.factors}",
                "one latent site inside the plate 'data', one tensor observed, and no factors",
            )
        (self.site,) = latents.sites
        self.neurons = self.site.shape.numel()
        with torch.no_grad():
            with seeded(0), isolated():  # no latents of our own yet, which a table would not have
                nodes = poutine.trace(latents.model).get_trace(self.like[:1]).nodes
            self._check_prior(_plain(nodes[self.site.name]["fn"]))
            probe = self._probe()
            ends = self.like[[0, -1]]
            (prior, likelihood), zeros = self.run(probe, ends), self.run(0 * probe, ends)
            same = [torch.equal(a, b) for a, b in zip(_numbers(prior), _numbers(zeros[0]),
                                                      strict=True)]  # fmt: skip
            if not all(same) or any((t != t[:1]).any() for t in _numbers(prior)):
                self._refuse("a prior that changes", "the same independent prior for every problem")
            scales = torch.cat([likelihood.scale, zeros[1].scale])
            if (scales != scales[:1]).any():
                self._refuse("noise that changes", "noise of the same size for every z and problem")
            answers = self.run(self._spikes())[1].mean
            exact = likelihood.mean - answers[0]
            error = (exact - probe @ (answers[1:] - answers[0])).abs().max()
            self.linear = bool(error <= ROUNDING * exact.abs().max())

    @property
    def like(self) -> Tensor:
        """The model's own observations, in the dtype and on the device that it has now."""
        return parts(self.latents.model.observations())[0]

    def __call__(self) -> Coding:
        """The model as it is now, with gradients to its parameters."""
        rows = self._spikes() if self.linear else self._spikes()[:1]
        prior, likelihood = self.run(rows)
        base, answers = self._law([t[0] for t in _numbers(prior)]), likelihood.mean
        weights = (answers[1:] - answers[0]).T if self.linear else None
        return Coding(self, base, likelihood.scale[0], weights, answers[0])

    def run(self, z: Tensor, x: Tensor | None = None) -> tuple[Distribution, Normal]:
        """Prior and likelihood of latents (n, K): batch shapes (n, K) and (n, F)."""
        x = self.like[:1].expand(len(z), *self.like.shape[1:]) if x is None else x
        value = {self.site.name: z.reshape(len(z), *self.site.shape)}
        with isolated():
            nodes = poutine.trace(poutine.condition(self.latents.model, data=value)).get_trace(x)
        prior = _plain(nodes.nodes[self.site.name]["fn"])
        likelihood = _plain(nodes.nodes[self.latents.observed]["fn"])
        self._check_prior(prior)
        if not isinstance(likelihood, Normal):
            self._refuse(f"x of {type(likelihood).__name__}", "Normal observations")
        rows, shape = len(z), value[self.site.name].shape
        flat = [t.expand(shape).reshape(rows, -1) for t in _numbers(prior)]
        loc, scale = (t.expand(x.shape).reshape(rows, -1) for t in _numbers(likelihood))
        return self._law(flat), Normal(loc, scale, validate_args=False)

    def check(self, x: Observation) -> None:
        """Raise :class:`BadInput` unless x looks like the model's own observations, range included.

        A circuit answers to x in other units (0 to 255 for 0 to 1) with neurons at their ceiling.
        """
        check_observation(x, self.like)
        low, high = float(self.like.min()), float(self.like.max())
        reach = FAR * max(high - low, float(self.like.abs().max()), 1e-12)
        worst = float(parts(x)[0].abs().max())
        if worst > max(abs(low), abs(high)) + reach:
            raise BadInput(
                "x", expected=f"values in the range of the model's own, {low:.3g} to {high:.3g}",
                got=f"{worst:.3g}", fix="Bring x into the units the model was made or learned for.",
            )  # fmt: skip

    def _law(self, numbers: list[Tensor]) -> Distribution:
        """The family's distribution of such parameters."""
        make: Any = self.family
        law: Distribution = make(*numbers, validate_args=False)
        return law

    def _probe(self) -> Tensor:
        """Two unlike latent vectors, (2, K): counts, or else of both signs."""
        z = torch.arange(self.neurons, device=self.like.device).remainder(3).to(self.like.dtype)
        return torch.stack([z + 1, 2 - z if self.site.discrete else -0.5 - z])

    def _spikes(self) -> Tensor:
        """No spike, and one of each neuron: (1 + K, K)."""
        eye = torch.eye(self.neurons).to(self.like)
        return torch.cat([torch.zeros_like(eye[:1]), eye])

    def _check_prior(self, prior: Distribution) -> None:
        if not isinstance(prior, self.family):
            self._refuse(f"{type(prior).__name__} latents", f"{self.family.__name__} latents")

    def _refuse(self, got: str, expected: str) -> None:
        raise Incompatible(
            f"{self.who} and the model", expected=expected, got=got,
            fix="Such circuits are made for one layer of neurons behind Gaussian noise.",
        )  # fmt: skip


def _plain(law: Distribution) -> Distribution:
    """Without the wrappers that only say which axes are the event."""
    while isinstance(law, Independent):
        law = law.base_dist
    return law


def _numbers(law: Distribution) -> list[Tensor]:
    """Parameters in the order of the constructor."""
    return [getattr(law, name) for name in law.arg_constraints]
