"""Is a game going well? Gauges of a fit, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from .codes import Codes
from .guide import HasRsample

if TYPE_CHECKING:
    from .guide import Guide
    from .latents import Values
    from .observation import Observation

__all__ = ["dispersion", "ordered", "pooled", "said"]

DRAWS = 16  # for each problem
FEW = 4  # problems in a batch that are too few to say anything
RECENT = 5  # looks that a sentence rests on
COLLAPSED = 0.1  # dispersion below which draws no longer speak of uncertainty
DEFEATED = 0.98  # accuracy above which the guide has lost

Health = dict[str, np.ndarray[Any, Any]]


def ordered(wake: Tensor, sleep: Tensor) -> float:
    """Share of pairs of a wake and a sleep score that a critic orders rightly: .5 is chance.

    A guide as good as the exact posterior cannot be told from the model, whatever the critic.

    Args:
        wake: (B, ...).
        sleep: (B, ...).
    """
    right = (wake[:, None] > sleep).float() + 0.5 * (wake[:, None] == sleep).float()
    return float(right.mean())


def dispersion(guide: Guide, x: Observation, z: Values) -> float:
    """Is the spread of draws as large as their error? 1 if calibrated, near 0 if collapsed.

    On latents z and observations x from the joint, E (z - E_q z)^2 = E Var_q(z) for the exact
    posterior. This is the root of the ratio, right over left, of the latent where it is smallest;
    entries of one-hot codes are pooled.

    Args:
        guide: with draws.
        x: observation of B problems from the joint.
        z: the latents that made it.
    """
    drawn = cast(HasRsample, guide)
    codes = Codes(guide.latents, "dispersion")
    with torch.no_grad():
        c, truth = drawn.rsample(x, torch.Size([DRAWS])), codes.encode(z)
        spread = c.var(0)
        error = (c.mean(0) - truth).square() - spread / DRAWS
    spreads, errors = (pooled(t.mean(0), codes.discrete) for t in (spread, error))
    return float((spreads / errors.clamp_min(torch.finfo(c.dtype).tiny)).sqrt().min())


def pooled(values: Tensor, discrete: Tensor) -> Tensor:
    """Each continuous entry, and the sum of all discrete ones."""
    kept, rest = values[~discrete], values[discrete]
    return torch.cat([kept, rest.sum()[None]]) if len(rest) else kept


def said(health: Health) -> list[str]:
    """What the latest gauges say that a user should know, in sentences."""
    recent = {name: float(np.mean(v[-RECENT:])) for name, v in health.items() if len(v)}
    found = []
    if (ratio := recent.get("dispersion", 1.0)) < COLLAPSED:
        found.append(
            f"the guide has collapsed: the spread of its draws is {ratio:.2g} of their error; "
            "train it with EnergyScore first, or give the critic a larger penalty"
        )
    if (share := recent.get("accuracy", 0.5)) > DEFEATED:
        found.append(
            f"the critic has won: it tells {share:.0%} of draws from the model's, and its slope is "
            "of little use to the guide; lengthen warm_up, or lower critic_rate or critic_steps"
        )
    return found
