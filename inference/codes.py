"""Codes: latents as numbers that a network can emit, and another can read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import gumbel_softmax, logsigmoid, one_hot

from .errors import Incompatible
from .latents import Latents, Values
from .sites import Site

__all__ = ["Codes"]


class Codes:
    """Latents as vectors c of C numbers, with gradients even where they are discrete.

    Site by site, c holds the unconstrained value of a continuous latent, 0 or 1 of one with two
    states, and a one-hot vector of one with more. Where all are continuous, c is the packed u.

    Args:
        latents: of the model.
        who: asks, for the message.

    Attributes:
        size: C.
        discrete: (C,), which entries belong to discrete latents.

    Raises:
        Incompatible: a discrete site without bounds, such as a count.
    """

    def __init__(self, latents: Latents, who: str) -> None:
        self.latents = latents
        self.states = {s.name: _states(s, who) for s in latents.sites}
        self.sizes = {s.name: _size(s, self.states[s.name]) for s in latents.sites}
        self.size = sum(self.sizes.values())
        known = [torch.full((n,), self.states[name] > 0) for name, n in self.sizes.items()]
        self.discrete = torch.cat(known)

    def encode(self, z: Values) -> Tensor:
        """Latents (..., B, *shape) to codes (..., B, C)."""
        pieces = []
        for s in self.latents.sites:
            value, k = z[s.name], self.states[s.name]
            lead = value.shape[: value.dim() - len(s.shape)]
            if k:
                value = value.long() - _lowest(s)
                value = (one_hot(value, k) if k > 2 else value).to(self.dtype)
            pieces.append((s.transform.inv(value) if not k else value).reshape(*lead, -1))
        return torch.cat(pieces, -1)

    def decode(self, c: Tensor) -> Values:
        """Codes (..., B, C) to latents (..., B, *shape)."""
        found = {}
        for s, piece in zip(
            self.latents.sites, c.split(list(self.sizes.values()), -1), strict=True
        ):
            k, lead = self.states[s.name], c.shape[:-1]
            if k > 2:
                state = piece.reshape(*lead, *s.shape, k).argmax(-1) + _lowest(s)
                found[s.name] = state.to(s.dtype)
            elif k:
                found[s.name] = (piece.reshape(*lead, *s.shape).round() + _lowest(s)).to(s.dtype)
            else:
                found[s.name] = s.transform(piece.reshape(*lead, *s.unconstrained_shape))
        return found

    def emit(self, raw: Tensor, temperature: float, *, steps: int = 1) -> Tensor:
        """A network's outputs (..., C) to a code: discrete latents are drawn, the others are as is.

        Outputs are the log odds of states, by Gumbel noise; the gradient is that of a relaxed state
        (straight through).

        Args:
            raw: (..., C), or (..., C / steps).
            temperature: of the relaxation.
            steps: where outputs are those of one step of so many.

        References:
            The concrete distribution (Maddison, Mnih & Teh, 2017) https://arxiv.org/abs/1611.00712
        """
        if self.latents.continuous:
            return raw
        pieces = []
        sizes = [n // steps for n in self.sizes.values()]
        for k, piece in zip(self.states.values(), raw.split(sizes, -1), strict=True):
            if k > 2:
                logits = piece.reshape(*piece.shape[:-1], -1, k)
                piece = gumbel_softmax(logits, tau=temperature, hard=True).reshape(piece.shape)
            elif k:
                piece = _threshold(piece, temperature)
            pieces.append(piece)
        return torch.cat(pieces, -1)

    @property
    def dtype(self) -> torch.dtype:
        """Of continuous sites where there are any, else of the observations."""
        kinds = [s.dtype for s in self.latents.sites if s.dtype.is_floating_point]
        like = self.latents.like
        return kinds[0] if kinds else (like[0] if isinstance(like, tuple) else like).dtype


def _threshold(logit: Tensor, temperature: float) -> Tensor:
    """A Bernoulli draw, with the gradient of its relaxation."""
    p = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
    noisy = logit + p.log() - torch.log1p(-p)
    soft = logsigmoid(noisy / temperature).exp()
    return (noisy > 0).to(logit.dtype) + soft - soft.detach()


def _states(site: Site, who: str) -> int:
    """How many states a discrete site has; 0 for a continuous one."""
    if not site.discrete:
        return 0
    support = _scalar(site.support)
    if support is constraints.boolean:
        return 2
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    bounds = [torch.as_tensor(b).unique() for b in ends if b is not None]  # plates repeat them
    if [len(b) for b in bounds] != [1, 1]:
        raise Incompatible(
            who,
            expected="continuous latents, or discrete ones with finitely many states",
            got=f"the site {site.name!r} with support {support}",
            fix="Use a guide for counts such as IterativePoisson.",
        )
    return int(bounds[1]) - int(bounds[0]) + 1


def _scalar(support: constraints.Constraint) -> constraints.Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _lowest(site: Site) -> int:
    return int(torch.as_tensor(getattr(_scalar(site.support), "lower_bound", 0)).min())


def _size(site: Site, states: int) -> int:
    if not states:
        return site.unconstrained_shape.numel()
    return site.shape.numel() * (states if states > 2 else 1)
