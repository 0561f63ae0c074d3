"""Observations: one tensor, or a tuple of tensors, with the problems along the first axis."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import BadInput

__all__ = [
    "Observation",
    "check_observation",
    "fingerprint",
    "flatten",
    "parts",
    "repeat",
    "size",
    "take",
]

Observation = Tensor | tuple[Tensor, ...]


def parts(x: Observation) -> tuple[Tensor, ...]:
    """The tensors of an observation."""
    return x if isinstance(x, tuple) else (x,)


def _like(x: Observation, tensors: Sequence[Tensor]) -> Observation:
    return tuple(tensors) if isinstance(x, tuple) else tensors[0]


def size(x: Observation) -> int:
    """Rows along the first axis."""
    return parts(x)[0].shape[0]


def fingerprint(*tensors: Tensor) -> str:
    """Check sum of shapes and values."""
    total = 0
    for t in tensors:
        total = zlib.crc32(repr(tuple(t.shape)).encode(), total)
        total = zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes(), total)
    return f"{total:08x}"


def take(x: Observation, index: Tensor | slice) -> Observation:
    """The chosen rows."""
    return _like(x, [t[index] for t in parts(x)])


def repeat(x: Observation, n: int) -> Observation:
    """Rows repeated n times, draws slow and problems fast: (B, ...) -> (n B, ...)."""
    return _like(x, [t.expand(n, *t.shape).reshape(-1, *t.shape[1:]) for t in parts(x)])


def flatten(x: Observation, problems: int) -> Tensor:
    """One feature vector per problem, (B, F)."""
    return torch.cat([t.reshape(problems, -1) for t in parts(x)], -1)


def check_observation(x: Observation, like: Observation, *, free_rows: bool = True) -> None:
    """Raise :class:`BadInput` unless x looks like the model's own observations.

    Args:
        x: what the user passed.
        like: the model's `observations()`.
        free_rows: the number of rows may differ (it may not where the data set is one problem).
    """
    given, wanted = parts(x), parts(like)
    if (
        isinstance(x, tuple) is not isinstance(like, tuple)
        or len(given) != len(wanted)
        or not all(isinstance(t, Tensor) for t in given)
    ):
        raise BadInput(
            "x",
            expected=f"a tuple of {len(wanted)} tensors" if isinstance(like, tuple) else "a tensor",
            got=_kinds(x),
            fix="Convert arrays with torch.as_tensor(x, dtype=torch.float32).",
        )
    for k, (t, w) in enumerate(zip(given, wanted, strict=True)):
        _check_tensor("x" if len(wanted) == 1 else f"x[{k}]", t, w, free_rows=free_rows)
    if free_rows and len({len(t) for t in given}) > 1:
        rows = ", ".join(str(len(t)) for t in given)
        raise BadInput(
            "x", expected="tensors of equal length", got=f"lengths {rows}", fix="Align them."
        )


def _kinds(x: object) -> str:
    """What x is, or what its entries are."""
    if not isinstance(x, tuple):
        return type(x).__name__
    kinds = ", ".join(f"x[{k}]: {type(t).__name__}" for k, t in enumerate(x))
    return f"a tuple of {len(x)} ({kinds})"


def _check_tensor(name: str, t: Tensor, like: Tensor, *, free_rows: bool) -> None:
    if not t.dim():
        fix = "Add the problem axis with x[None]."
        raise BadInput(
            name, expected="problems along the first axis", got="a single number", fix=fix
        )
    shape = [*(["B"] if free_rows else [like.shape[0]]), *like.shape[1:]]
    wanted = f"shape ({', '.join(map(str, shape))})"
    if t.dim() != like.dim() or t.shape[1:] != like.shape[1:]:
        hint = "Add the problem axis with x[None]." if t.shape == like.shape[1:] else "Reshape it."
        raise BadInput(name, expected=wanted, got=f"shape {tuple(t.shape)}", fix=hint)
    if len(t) == 0:
        raise BadInput(name, expected="at least one problem", got="an empty batch", fix="Pass x.")
    if not free_rows and len(t) != len(like):
        raise BadInput(name, expected=wanted, got=f"{len(t)} rows", fix="Pass the whole data set.")
    if t.dtype != like.dtype:
        fix = f"Convert it with x.to({like.dtype}), or the model with model.to({t.dtype})."
        raise BadInput(name, expected=f"dtype {like.dtype}", got=str(t.dtype), fix=fix)
    if t.device != like.device:
        wanted, fix = (
            f"a tensor on {like.device}, where the model is",
            f"x.to({str(like.device)!r}).",
        )
        raise BadInput(name, expected=wanted, got=f"one on {t.device}", fix=fix)
    bad = ~torch.isfinite(t)
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise BadInput(
            name,
            expected="finite numbers",
            got=f"{int(bad.sum())} NaN or infinite entries, the first at {where}",
            fix="Remove those rows or impute them.",
        )
