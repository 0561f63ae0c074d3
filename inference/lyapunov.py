"""Linear stochastic dynamics: the covariance at rest, with gradients, and exact steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .errors import Diverged

__all__ = ["lyapunov", "transition"]

DOUBLINGS = 40  # 10 do at a condition number of 1e4, 17 at 1e8
NEGLIGIBLE = 1e-9  # size of a power of A; what is left of the sum has its square


def lyapunov(drift: Tensor, noise: Tensor) -> Tensor:
    """S with K S + S K' = D, the covariance at rest of dz = -K z dt + D^(1/2) dB.

    With K = L and D = 2 I it is the inverse of L. Solved in float64.

    Args:
        drift: K, (..., n, n); its eigenvalues have positive real parts.
        noise: D, symmetric, (..., n, n).

    Returns:
        S, symmetric, (..., n, n), in the dtype of K.

    Raises:
        Diverged: there is no rest, for some K has another eigenvalue.

    References:
        Matrix Equation XA + BX = C (Smith, 1968) https://doi.org/10.1137/0116017
    """
    k, d = torch.broadcast_tensors(drift.double(), noise.double())
    found: Tensor = _Lyapunov.apply(k, d)  # type: ignore[no-untyped-call]
    return found.to(drift.dtype)


def transition(drift: Tensor, covariance: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """E and R of the exact step z(t + time) = E z(t) + R xi, xi standard normal.

    E = exp(-K time), and R R' = S - E S E' keeps the covariance at rest whatever the time.

    Args:
        drift: K, (..., n, n).
        covariance: S, (..., n, n).
        time: t >= 0, in the unit of the dynamics.
    """
    decay = torch.matrix_exp(-time * drift)
    # not by Cholesky: over no time there is no noise
    values, axes = torch.linalg.eigh(covariance - decay @ covariance @ decay.mT)
    return decay, axes * values.clamp_min(0).sqrt()[..., None, :]


class _Lyapunov(torch.autograd.Function):
    """Keeps K and S: the gradient solves an equation of the same kind."""

    @staticmethod
    def forward(ctx: FunctionCtx, k: Tensor, d: Tensor) -> Tensor:
        """S of K and D."""
        s = _solve(k, d)
        ctx.save_for_backward(k, s)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Y with K' Y + Y K = G is the gradient by D, and -2 Y S that by K."""
        k, s = ctx.saved_tensors
        y = _solve(k.mT, (grad + grad.mT) / 2)
        return -2 * y @ s, y


def _solve(k: Tensor, d: Tensor) -> Tensor:
    """Smith's doubling: S = sum_j A^j Q A'^j, with twice as many terms after each step.

    A = (p - K) (p + K)^-1 and Q = 2 p (p + K)^-1 D (p + K)^-T for any p > 0. Here that is the
    geometric mean of the absolute eigenvalues of K, between the slowest and the fastest.
    """
    eye = torch.eye(k.shape[-1]).to(k)
    p = (torch.linalg.slogdet(k)[1] / k.shape[-1]).exp()[..., None, None]
    inverse = torch.linalg.inv_ex(k + p * eye)[0]  # not finite where there is none: caught below
    power: Tensor = 2 * p * inverse - eye
    s: Tensor = 2 * p * inverse @ d @ inverse.mT
    for _ in range(DOUBLINGS):
        s, power = s + power @ s @ power.mT, power @ power
        if bool(power.abs().max() < NEGLIGIBLE):
            return (s + s.mT) / 2
    raise Diverged(
        "linear stochastic dynamics",
        expected="a drift -K z that leads back, with eigenvalues of K of positive real parts",
        got="some K that does not, or is not finite",
        fix="Lower lr, or look for observations far outside the model's range.",
    )
