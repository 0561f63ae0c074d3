"""What a neuron makes of its input: activations with their slopes and integrals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]


@dataclass(frozen=True)
class Activation:
    """phi, its slope phi' and an integral Phi with Phi' = phi.

    Attributes:
        call: phi; writes into `out` where that is given.
        slope: phi'.
        integral: Phi; None where it is no elementary function.
        smooth: phi' has no jumps, so that a divergence can be a training signal.
    """

    call: Callable[[Tensor, Tensor | None], Tensor]
    slope: Callable[[Tensor], Tensor]
    integral: Callable[[Tensor], Tensor] | None
    smooth: bool

    def __call__(self, h: Tensor, out: Tensor | None = None) -> Tensor:
        """phi(h)."""
        return self.call(h, out)


def _squareplus(h: Tensor, out: Tensor | None) -> Tensor:
    return torch.add(h, (h.square() + 1).sqrt(), out=out).mul(0.5)


def _softplus(h: Tensor, out: Tensor | None) -> Tensor:
    return torch.logaddexp(h, torch.zeros_like(h[..., :1]), out=out)


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": Activation(
        lambda h, out: torch.clamp_min(h, 0, out=out),
        lambda h: (h > 0).to(h.dtype),
        lambda h: 0.5 * h.clamp_min(0).square(),
        smooth=False,
    ),
    "tanh": Activation(
        lambda h, out: torch.tanh(h, out=out),
        lambda h: 1 - torch.tanh(h).square(),
        lambda h: torch.logaddexp(h, -h),
        smooth=True,
    ),
    "softplus": Activation(_softplus, torch.sigmoid, None, smooth=True),
    "squareplus": Activation(
        _squareplus,
        lambda h: 0.5 * (1 + h * (h.square() + 1).rsqrt()),
        lambda h: 0.25 * (h.square() + h * (h.square() + 1).sqrt() + torch.asinh(h)),
        smooth=True,
    ),
}
