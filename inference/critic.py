"""Critics: networks that tell what a guide draws from what the model draws."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .codes import Codes
from .latents import Latents
from .observation import flatten
from .seeds import seeded
from .units import Units, silent, squash
from .whitening import Whitening

__all__ = ["Critic", "HasCritic", "critic_for", "pairs", "perceptron"]

PILOT, PILOT_WHOLE = 2048, 64  # joint draws behind the linear guess; where data are one problem


class Critic(nn.Module):
    """Scores pairs (x, c) of an observation and a code: net(x, y) + y . (A x).

    It sees the code as the residual of a linear guess, c = m(x) + L y, so that a posterior a tenth
    as wide as the prior is as easy to see as the prior. The guess is the critic's, not the guide's.
    The perceptron need not learn to multiply: A x tells where codes should be, and of one-hot codes
    how likely each state is.

    Args:
        features: of pilot draws from the joint, (n, F).
        codes: their codes, (n, C).
        hidden: widths of the hidden layers; by default those of `widths`.
        seed: of the initial weights.
        guess: whether codes are continuous, so that such a guess makes sense.

    Attributes:
        widths: of the hidden layers where none are named.
        anchor: weight of the energy score beside it, where none is given.
        whole: a draw is judged as a whole, and not part by part.
    """

    widths: ClassVar[tuple[int, ...]] = (128, 128)
    anchor: ClassVar[float] = 0.0
    whole: bool = True

    def __init__(
        self,
        features: Tensor,
        codes: Tensor,
        hidden: tuple[int, ...] | None,
        seed: int,
        *,
        guess: bool,
    ) -> None:
        super().__init__()
        self.units = Units(features, codes)
        self.guess = Whitening(features, codes) if guess else None
        with seeded(seed):
            self.build(features.shape[1], codes.shape[1], hidden or self.widths)
        self.to(features)

    def build(self, features: int, codes: int, hidden: tuple[int, ...]) -> None:
        """Make the layers."""
        self.net = perceptron(features + codes, *hidden, 1)
        self.project = silent(features, codes)

    def standardise(self, features: Tensor) -> Tensor:
        """Features (B, F) in the critic's units, and bounded."""
        return squash(self.units.standardise(features))

    def relative(self, c: Tensor, standard: Tensor) -> Tensor:
        """Codes (..., B, C) as the critic sees them: y, or in prior units without a guess."""
        return self.prior(c) if self.guess is None else self.guess.whiten(c, standard)

    def prior(self, c: Tensor) -> Tensor:
        """Codes (..., B, C) in units of the prior."""
        return (c - self.units.u_loc) / self.units.u_scale

    def apart(self, y: Tensor) -> Tensor:
        """Parts of y (..., C) that are judged apart, (..., parts, C / parts): here the whole."""
        return y[..., None, :]

    def forward(self, standard: Tensor, y: Tensor) -> Tensor:
        """Scores of each pair, (B, parts): standardised features (B, F), relative codes (B, C)."""
        score: Tensor = self.net(torch.cat([standard, y], -1))
        told: Tensor = y * self.project(standard)
        return score + told.sum(-1, keepdim=True)


@runtime_checkable
class HasCritic(Protocol):
    """A guide that knows what should judge its draws."""

    def critic(
        self,
        features: Tensor,
        codes: Tensor,
        hidden: tuple[int, ...] | None,
        seed: int,
        *,
        guess: bool,
    ) -> Critic:
        """A critic of the structure that the guide has."""


def critic_for(
    guide: object, latents: Latents, hidden: tuple[int, ...] | None, seed: int
) -> Critic:
    """The critic of a guide: its own, or a perceptron."""
    features, codes = pairs(latents)
    make = guide.critic if isinstance(guide, HasCritic) else Critic
    return make(features, codes, hidden, seed, guess=latents.continuous)


def pairs(latents: Latents) -> tuple[Tensor, Tensor]:
    """Features (n, F) and codes (n, C) of pilot draws from the joint."""
    z, x = latents.joint(PILOT if latents.plated else PILOT_WHOLE, seed=0)
    codes = Codes(latents, "Critic").encode(z)
    return flatten(x, len(codes)), codes


def perceptron(*widths: int) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers[:-1])
