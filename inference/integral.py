"""Does a density integrate to one? Asked of draws, problem by problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .guide import Guide, HasDensity
from .latents import Latents, Values
from .observation import Observation

__all__ = ["Mass", "mass"]

PILOT, FRESH = 200, 1000
SHARE = 0.3  # of draws that lie in the ellipsoid


class Mass(NamedTuple):
    """An estimate of the integral of exp(log_prob), which is 1.

    Attributes:
        value: for each problem, (B,).
        se: its standard error, (B,).
        effective: draws that it rests on, (B,); below some 50 it says nothing.
    """

    value: Tensor
    se: Tensor
    effective: Tensor


def mass(guide: Guide, x: Observation, *, seed: int) -> Mass | None:
    """E_q[r / q] for a density r that draws from q cover; None where latents are of both kinds.

    Of continuous latents r is uniform in an ellipsoid amid a first lot of draws; of discrete ones
    it is q itself on the states that were drawn.
    """
    assert isinstance(guide, HasDensity)
    lat = guide.latents
    kinds = {s.discrete for s in lat.sites}
    if len(kinds) > 1 or (lat.continuous and lat.size > PILOT // 4):
        return None
    with torch.no_grad():
        pilot, fresh = (
            {k: v[0] for k, v in guide.draw(x, draws=n, chains=1, seed=s).values.items()}
            for n, s in ((PILOT, seed), (FRESH, seed + 1))
        )
        log_q = guide.log_prob(pilot, x)
        if not lat.continuous:
            return _of_states(lat, pilot, fresh, log_q)
        u, log_jacobian = lat.pack(pilot)
        inside, log_volume = _ball(u, log_q + log_jacobian)
        u, log_jacobian = lat.pack(fresh)
        w = inside(u) * (-log_volume - log_jacobian - guide.log_prob(fresh, x)).exp()
    effective = w.sum(0).square() / w.square().sum(0)
    return Mass(w.mean(0), w.std(0) / FRESH**0.5, effective)


def _ball(u: Tensor, log_q: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """An ellipsoid amid draws (S, B, D), near the densest: who is inside, and its log volume (B,).

    Nothing smooth will do: its tails would reach over the edge of densities that have one.
    """
    s, b, d = u.shape
    loc = u[log_q.argmax(0), torch.arange(b)]
    spread = _spread(u - loc)
    nearest = _distance(u - loc, spread).argsort(0)[: s // 2]
    kept = u.gather(0, nearest[..., None].expand(-1, -1, d))
    loc, spread = kept.mean(0), _spread(kept - kept.mean(0))
    radius = _distance(u - loc, spread).quantile(SHARE, dim=0)
    unit = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    log_volume = unit + d / 2 * radius.log() + 0.5 * torch.logdet(spread)
    return lambda v: (_distance(v - loc, spread) < radius).to(v), log_volume


def _spread(away: Tensor) -> Tensor:
    """Second moments (B, D, D) of (S, B, D), with a ridge."""
    second = torch.einsum("sbi,sbj->bij", away, away) / len(away)
    return second + 1e-6 * second.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(len(second[0])).to(
        away
    )


def _distance(away: Tensor, spread: Tensor) -> Tensor:
    """Squared distances (S, B)."""
    return torch.einsum("sbi,bij,sbj->sb", away, torch.linalg.inv(spread), away)


def _of_states(lat: Latents, pilot: Values, fresh: Values, log_q: Tensor) -> Mass:
    """Share of fresh draws (S, B) among the states seen before, over the q of these states."""
    seen, drawn = lat.pack(pilot)[0], lat.pack(fresh)[0]
    shares, masses = [], []
    for b in range(seen.shape[1]):
        _, which = torch.unique(seen[:, b], dim=0, return_inverse=True)
        first = [int((which == k).nonzero()[0]) for k in range(int(which.max()) + 1)]
        masses.append(log_q[first, b].exp().sum())
        same = (drawn[:, None, b] == seen[None, first, b]).all(-1)
        shares.append(same.any(1).to(log_q).mean())
    share, q = torch.stack(shares), torch.stack(masses)
    se = (share * (1 - share)).sqrt().clamp_min(1 / FRESH) / FRESH**0.5
    return Mass(share / q, se / q, FRESH * share)
