"""Colours, figures and labels that all pictures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .picture import Picture

__all__ = ["GREY", "INK", "PALETTE", "labels_of", "new_figure"]

# Okabe & Ito (2008): told apart by the colour-blind
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
INK, GREY = "#222222", "#999999"


def new_figure(width: float, height: float) -> Picture:
    """A figure outside pyplot's global list, which a notebook shows."""
    from .picture import Picture

    return Picture(figsize=(width, height), layout="constrained", dpi=110)


def labels_of(sizes: Mapping[str, int]) -> list[str]:
    """Names of packed latents, site[0], site[1], ..., from the number each site has."""
    labels: list[str] = []
    for name, n in sizes.items():
        labels += [name] if n == 1 else [f"{name}[{k}]" for k in range(n)]
    return labels
