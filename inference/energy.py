"""The energy score of draws: a proper score that needs no density."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["energy_score"]

TINY = 1e-12  # under the root of a distance, whose gradient at 0 is otherwise none


def energy_score(draws: Tensor, truth: Tensor) -> Tensor:
    """E|Z - z| - E|Z - Z'| / 2 of draws Z, Z' for the truth z; least on average for p(z given x).

    Args:
        draws: (M, ..., K), M at least 2.
        truth: (..., K).

    Returns:
        (...), without bias for any M.

    References:
        Strictly proper scoring rules, prediction, and estimation (Gneiting & Raftery, 2007),
        equation 21 https://doi.org/10.1198/016214506000001437
    """
    m = len(draws)
    first, second = torch.triu_indices(m, m, 1, device=draws.device)
    between = _distance(draws[first], draws[second]).mean(0)
    return _distance(draws, truth).mean(0) - between / 2


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).square().sum(-1) + TINY).sqrt()
