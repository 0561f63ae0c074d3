"""Poisson counts: an exact sampler, faster than torch.poisson on a CPU, and their divergence."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .errors import BadInput

__all__ = ["LARGEST", "poisson", "poisson_kl"]

LARGEST = 1e12  # from 1e14 on torch.poisson spreads too widely, from 1e19 on its counts overflow

INVERTED = 10.0  # rates up to here by inversion; above it torch rejects at 50 ns a count
FEW = 8192  # entries below which torch.poisson is as fast
BLOCK = 1 << 17  # entries at a time: buffers stay in the cache
CELLS = 1 << 16  # of the unit interval: 16 random bits say in which one a uniform lies
SLACK = 0.1  # cells on either side of a cell; rounding of float32 in `_settle` stays below it
SPARSE, REST = 1 / 8, 1 / 64  # mean rate, and share of undecided entries, for the slow way
LAST = 128  # P(count > LAST) < 1e-90 for every rate inverted

Array = NDArray[np.floating]


def poisson(rate: Tensor) -> Tensor:
    """Independent counts z ~ Poisson(rate), in rate's shape and dtype, without gradient.

    On a CPU by inversion: z is the number of k >= 0 with w < P(Z > k), w uniform. Of w only 16 bits
    (8 where rates are small) are drawn at first. They decide nearly every comparison, in a few
    passes over the whole tensor; where they do not, 53 more follow and the comparison is made in
    float64. So the probabilities are right to about 1e-16, and to 1e-15 of a small rate. On other
    devices, for rates above 10 and for less than 8192 entries this is torch.poisson. Random numbers
    come from torch's global generator.

    Args:
        rate: expected counts, any shape, floating point; above 1e12 (infinity included) they are
            taken as 1e12.

    Raises:
        BadInput: a rate is negative or NaN, or rates are no floating-point numbers. On other
            devices that is left to torch, for looking would make the CPU wait.

    Example:
        >>> import torch
        >>> poisson(torch.zeros(2, 3))
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
    """
    if not rate.is_floating_point():
        raise BadInput("rate", expected="floating point", got=str(rate.dtype), fix="rate.float()")
    rate = rate.detach()
    if rate.device.type != "cpu":
        return torch.poisson(rate.clamp(max=LARGEST))
    if rate.dtype not in (torch.float32, torch.float64):
        return poisson(rate.float()).to(rate.dtype)
    if not rate.numel():
        return torch.zeros_like(rate)
    low, high = (float(t) for t in rate.aminmax())  # NaN if any rate is
    if not low >= 0:
        raise BadInput("rate", expected="rates >= 0", got=f"{low:g}", fix="Rates are exp(u).")
    if high > LARGEST:
        rate = rate.clamp(max=LARGEST)
    if rate.numel() < FEW or low > INVERTED:
        return torch.poisson(rate)
    flat, z = rate.reshape(-1), torch.empty(rate.numel(), dtype=rate.dtype)
    large = torch.from_numpy(np.flatnonzero(flat.numpy() > INVERTED)) if high > INVERTED else None
    small = flat if large is None else flat.index_fill(0, large, 0)
    for rates, counts in zip(small.split(BLOCK), z.split(BLOCK), strict=True):
        _invert(rates, counts)
    if large is not None:
        z[large] = torch.poisson(flat[large])
    return z.view(rate.shape)


def _invert(rate: Tensor, z: Tensor) -> None:
    """Fill z with counts of rates up to INVERTED."""
    room, words = _room(rate.dtype)
    cell, left, gap, term = room[:, : len(rate)]
    if float(rate.sum()) > SPARSE * len(rate):
        cells = CELLS
        cell.copy_(_bits(words, torch.uint16, len(rate)))
        _settle(rate, cell, z, left, gap, term)
    else:  # P(Z > 0) < rate, so beyond rate all are zero
        cells = 256
        cell.copy_(_bits(words, torch.uint8, len(rate)))
        torch.sub(rate, cell, alpha=1 / cells, out=left)
        z.zero_()
    # NumPy finds the few undecided ten times faster, and its small operations cost less
    few = np.flatnonzero(left.numpy() > 0)
    z.numpy()[few] = _finish(rate.numpy()[few], cell.numpy()[few], cells)


_KEPT = threading.local()


def _room(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Buffers of this thread, (4, BLOCK) numbers and room for random bits.

    They are kept, 2 MB: the page faults of fresh ones can cost more than all the arithmetic. And
    they are NumPy's, because a tensor made in inference mode could not be written to outside.
    """
    kept, name = vars(_KEPT), f"f{dtype.itemsize}"
    if name not in kept:
        kept[name] = np.empty((4, BLOCK), name), np.empty(BLOCK // 4, np.int64)
    room, words = kept[name]
    return torch.from_numpy(room), torch.from_numpy(words)


def _bits(words: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    """n random integers, uniform on all values of an unsigned dtype."""
    words = words[: -(-n * dtype.itemsize // words.itemsize)]
    return words.random_(torch.iinfo(words.dtype).min, None).view(dtype)[:n]


def _settle(rate: Tensor, cell: Tensor, z: Tensor, left: Tensor, gap: Tensor, term: Tensor) -> None:
    """Counts that 16 bits decide; `left` is above zero where they do not.

    gap is CELLS P(Z > k) - cell, stretched such that clamped to [0, 1] it is 1 where w < P(Z > k)
    all over the cell, 0 where nowhere, and a fraction otherwise: then z is no integer. Fractions
    that add up to an integer would hide, but two thresholds share a cell only where P(Z = k) is
    less than one: not for small k, as P(Z = 0) is three cells at the largest rate, but in the last
    two cells of the tail. The last stays open, as its gap is above zero for all k.
    """
    scale = CELLS / (1 + 2 * SLACK)
    torch.neg(rate, out=term).exp_()
    torch.add(cell, term, alpha=CELLS, out=gap).sub_(CELLS + SLACK).mul_(-scale / CELLS)
    z.zero_()
    for k in range(1, LAST):
        z.add_(torch.clamp(gap, 0, 1, out=left))
        if float(left.sum()) <= REST * len(rate):
            break
        gap.sub_(term.mul_(rate), alpha=scale)  # term is P(Z = k) k!
        scale /= k + 1
    left.add_(torch.frac(z, out=gap))


def _finish(rate: Array, cell: Array, cells: int) -> Array:
    """Counts by inversion in float64, w anywhere in its cell."""
    r = rate.astype(np.float64)
    w = (torch.rand(len(r), dtype=torch.float64).numpy() + cell) / cells
    tail = -np.expm1(-r)
    term, z, scale = r - r * tail, np.zeros(len(r)), 1.0
    for k in range(1, LAST):
        more = w < tail  # P(Z >= k)
        if not np.count_nonzero(more):
            break
        z += more
        tail -= term * scale
        term *= r
        scale /= k + 1
    return z


class _KL(torch.autograd.Function):
    """Exact derivatives r (u - u0) and r0 - r; keeps its inputs and no other tensor."""

    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor, u0: Tensor) -> Tensor:
        """The divergence, of the shape both have."""
        ctx.save_for_backward(u, u0)
        d, r = u - u0, u.exp()
        near = r * (d + torch.expm1(-d.clamp_min(-1))).clamp_min_(0)  # no large terms to cancel
        return torch.where(d > -1, near, r * (d - 1) + u0.exp())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Differentiable in turn."""
        u, u0 = ctx.saved_tensors
        return grad * u.exp() * (u - u0), -grad * u0.exp() * torch.expm1(u - u0)


def poisson_kl(u: Tensor, u0: Tensor) -> Tensor:
    """KL(Poisson(e^u) || Poisson(e^u0)) = e^u (u - u0) - (e^u - e^u0) in nats, elementwise.

    From log rates, so that rates may underflow; to full relative precision but where u is close to
    u0, and never below zero.
    """
    kl: Tensor = _KL.apply(*torch.broadcast_tensors(u, u0))  # type: ignore[no-untyped-call]
    return kl
