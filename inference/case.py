"""What the checks of a guide look at, and how they say what they found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from .guide import Draws, Guide, HasDensity
from .latents import Latents, Values
from .observation import Observation, parts
from .seeds import seeded

__all__ = [
    "Case",
    "Failed",
    "NotHere",
    "close",
    "does_not_apply",
    "expect",
    "log_qs",
    "states",
    "steady",
]


@dataclass
class Case:
    """A guide, an observation, and what several checks look at.

    Attributes:
        before: the guide's parameters and buffers by name, before it was first called.
    """

    guide: Guide
    x: Observation
    seed: int
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {n: t.detach().clone() for n, t in _tensors(self.guide).items()}

    def changed(self) -> list[str]:
        """Names of parameters and buffers that are not what they were before."""
        now = _tensors(self.guide)
        return [n for n in {**self.before, **now} if not _same(self.before.get(n), now.get(n))]

    def put_back(self) -> None:
        """Parameters and buffers as they were before."""
        now = _tensors(self.guide)
        with torch.no_grad():
            for n in self.changed():
                if n in now and n in self.before and now[n].shape == self.before[n].shape:
                    now[n].copy_(self.before[n])

    @property
    def latents(self) -> Latents:
        """The model's latents."""
        return self.guide.latents

    @cached_property
    def trace(self) -> poutine.Trace:
        """Of one call of the guide."""
        with seeded(self.seed):
            return poutine.trace(self.guide).get_trace(self.x)

    @cached_property
    def draws(self) -> Draws:
        """Two chains of six draws."""
        return self.draw(self.seed)

    def draw(self, seed: int, x: Observation | None = None) -> Draws:
        """Two chains of six draws."""
        return self.guide.draw(self.x if x is None else x, draws=6, chains=2, seed=seed)

    @cached_property
    def traced(self) -> Values:
        """Latents of the trace, (B, *shape)."""
        nodes = self.trace.nodes
        return {s.name: nodes[s.name]["value"].reshape(-1, *s.shape) for s in self.latents.sites}

    @property
    def scored(self) -> HasDensity:
        """The guide, where it has a density."""
        if not isinstance(self.guide, HasDensity):
            does_not_apply("the guide has no log_prob")
        return self.guide

    @cached_property
    def tolerance(self) -> float:
        """Of numbers that should agree, relative and absolute."""
        double = parts(self.x)[0].dtype == torch.float64 or self._doubles
        return 1e-6 if double else 1e-3

    @property
    def _doubles(self) -> bool:
        return any(p.dtype == torch.float64 for p in self.guide.parameters())

    @contextmanager
    def shaken(self, size: float) -> Iterator[None]:
        """Parameters moved at random and put back: many networks start where they ignore x."""
        before = [(p, p.detach().clone()) for p in self.guide.parameters()]
        try:
            with torch.no_grad(), seeded(self.seed):
                for p, _ in before:
                    p.add_(size * torch.randn_like(p))
            yield
        finally:
            with torch.no_grad():
                for p, value in before:
                    p.copy_(value)


class Failed(Exception):
    """A check found something wrong."""


class NotHere(Exception):
    """A check has nothing to ask of this guide."""


def expect(right: Any, expected: str, got: str, fix: str) -> None:
    """Let a check fail unless all is right."""
    if not right:
        raise Failed(expected, got, fix)


def does_not_apply(reason: str) -> NoReturn:
    """Leave a check."""
    raise NotHere(reason)


def log_qs(case: Case) -> tuple[Tensor, Tensor]:
    """log q of the same latents from two calls of `log_prob`, each with its own randomness."""
    with torch.no_grad():
        found = []
        for seed in (case.seed, case.seed + 1):
            with seeded(seed):
                found.append(case.scored.log_prob(case.traced, case.x))
    return found[0], found[1]


def steady(case: Case) -> None:
    """Leave where log q is given one random run of the circuit."""
    if not torch.equal(*log_qs(case)):
        does_not_apply("log_prob is that of one run, and runs are random")


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """The same numbers but for rounding, in the same shape."""
    return bool(a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance))


def _tensors(guide: Guide) -> dict[str, Tensor]:
    return {**dict(guide.named_parameters()), **dict(guide.named_buffers())}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a != a) & (b != b)).all())  # NaN stays NaN


def states() -> dict[str, Any]:
    """What a guide must leave as it was, by name."""
    return {
        "torch's generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's generator": str(np.random.get_state()),
        "Python's generator": random.getstate(),
        "Pyro's parameter store": sorted(pyro.get_param_store().keys()),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's checks of arguments": torch.distributions.Distribution._validate_args,
        "Pyro's module_local_params": pyro.settings.get("module_local_params"),
    }
