"""Do `rsample` and `forward` of a guide draw from one law? A test that assumes nothing of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .codes import Codes
from .guide import Guide, HasRsample
from .latents import Values
from .observation import Observation, repeat, take
from .seeds import seeded

__all__ = ["Gap", "gap"]

FALSE_ALARM = 1e-4  # of a right guide, all latents and problems together
AT_ONCE, ONE_BY_ONE = 1000, 200  # draws of each
PROBLEMS = 3  # of x that are looked at
GRAIN = 0.01  # of a latent's spread: rounding must not tell two ways of drawing a number apart


class Gap(NamedTuple):
    """How far apart two sets of draws are.

    Attributes:
        size: largest distance of two distribution functions.
        chance: draws of one law exceed it with a probability of 1e-4 or less.
        site: the latent in which it is the largest.
    """

    size: float
    chance: float
    site: str


def gap(guide: Guide, codes: Codes, x: Observation, *, seed: int) -> Gap:
    """The largest Kolmogorov-Smirnov distance between draws of `rsample` and of `forward`.

    Compared are, for each problem, every latent, its distance from a typical value, which sees a
    wrong spread, and the product of each with the next, which sees lost correlations.

    Args:
        guide: has rsample.
        codes: from what rsample draws to latents.
        x: observation.
        seed: of all draws.
    """
    assert isinstance(guide, HasRsample)
    draw = guide.rsample
    ways: tuple[Callable[[Observation], Values], ...] = (
        lambda x: _traced(guide, x),
        lambda x: _traced(guide, x),
        lambda x: codes.decode(draw(x)),
    )
    with torch.no_grad():
        found = [_flat(guide, way, x, seed=seed, stream=k) for k, way in enumerate(ways)]
    # a lot of its own says what is typical, so that the two that are compared are independent of it
    pilot, forward, rsample = found
    centre = pilot.median(0).values
    spread = (pilot - centre).abs().median(0).values
    spread = torch.maximum(spread, 1e-4 * (1 + centre.abs()))
    a, b = (_features((v - centre) / spread) for v in (forward, rsample))
    distance = _distance(a, b).reshape(-1, a.shape[-1]).amax(0)
    k = int(distance.argmax())
    names = [s.name for s in guide.latents.sites for _ in range(s.shape.numel())]
    chance = _chance(len(a), a[0].numel())
    return Gap(float(distance[k]), chance, names[k % len(names)])


def _traced(guide: Guide, x: Observation) -> Values:
    nodes = guide.trace(x).nodes
    return {s.name: nodes[s.name]["value"].reshape(-1, *s.shape) for s in guide.latents.sites}


def _flat(
    guide: Guide, way: Callable[[Observation], Values], x: Observation, *, seed: int, stream: int
) -> Tensor:
    """Draws (S, B, K) of all latents, as they are: draws as more problems, where that will do."""
    lat = guide.latents
    with seeded(seed, stream):
        if lat.plated and guide.amortised:
            x = take(x, slice(0, PROBLEMS))
            n, calls = AT_ONCE, [way(repeat(x, AT_ONCE))]
        else:
            n, calls = ONE_BY_ONE, [way(x) for _ in range(ONE_BY_ONE)]
    b = lat.problems(x)
    pieces = [torch.cat([c[name] for c in calls]).reshape(n, b, -1) for name in lat.names]
    return torch.cat([p.double() for p in pieces], -1)


def _features(u: Tensor) -> Tensor:
    """Standardised latents (S, B, K) to what is compared, (S, B, 3 K)."""
    u = (u.nan_to_num() / GRAIN).round() * GRAIN
    return torch.cat([u, u.abs(), u * u.roll(-1, -1)], -1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance of each column of (S, B, K): (B, K)."""
    a, b = (t.movedim(0, -1).contiguous().sort(-1).values for t in (a, b))
    at = torch.cat([a, b], -1)
    f, g = (torch.searchsorted(t, at, right=True).double() / t.shape[-1] for t in (a, b))
    return (f - g).abs().amax(-1)


def _chance(n: int, columns: int) -> float:
    """What two samples of n exceed in any of some columns with probability 1e-4 at most.

    References:
        Two-sample Dvoretzky-Kiefer-Wolfowitz inequalities (Wei & Dudley, 2012), theorem 1:
        P(distance > t) <= e exp(-n t^2) https://arxiv.org/abs/1107.5356
    """
    return math.sqrt((1 + math.log(columns / FALSE_ALARM)) / n)
