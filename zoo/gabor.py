"""Gabor features: what simple cells respond to, and what small image models here are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["gabors"]

SPREAD = 0.15  # centres lie within this share of the side around the middle
TURN = math.pi / 6  # mean step of orientation while features are few
WAVELENGTHS = 0.5, 1.0  # shortest and longest, in sides
ENVELOPE = 0.3  # its sd in wavelengths, a bandwidth of about two octaves
PHASE = 0.25  # largest, in cycles: from even to odd features


def gabors(count: int, side: int, *, seed: int) -> Tensor:
    """Gratings under Gaussian windows, each of norm one, that overlap.

    Places, orientations, wavelengths and phases come from a scrambled Sobol sequence, which covers
    them evenly. Up to six features share a part of the orientations only, so that neighbours
    overlap as much as they do where there are many. All is computed in float64 and rounded once:
    machines agree on the last digit.

    Args:
        count: features K.
        side: pixels along a side of the image.
        seed: of the scrambling.

    Returns:
        (side^2, K), float32.

    Example:
        >>> gabors(3, 8, seed=0).shape
        torch.Size([64, 3])
    """
    sobol = SobolEngine(5, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    row, column, turn, octave, phase = sobol.T[:, :, None]  # (K, 1) each
    middle, margin = (side - 1) / 2, SPREAD * side
    pixels = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
    down = pixels[:, 0] - middle - margin * (2 * row - 1)  # (K, side^2)
    right = pixels[:, 1] - middle - margin * (2 * column - 1)
    shortest, longest = WAVELENGTHS
    wavelength = side * shortest * (longest / shortest) ** octave
    angle = min(math.pi, count * TURN) * turn
    cycles = (right * angle.cos() + down * angle.sin()) / wavelength + PHASE * (2 * phase - 1)
    window = (-(down.square() + right.square()) / (2 * (ENVELOPE * wavelength).square())).exp()
    wave = window * (2 * math.pi * cycles).cos()
    features: Tensor = (wave / wave.norm(dim=1, keepdim=True)).T.float().contiguous()
    return features
