"""Guides with parameters for each problem of one observation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from .errors import BadInput
from .latents import ModelLike
from .noise import GaussianNoise
from .observation import Observation, parts, repeat, size
from .seeds import seeded

__all__ = ["BoundGuide"]


class BoundGuide(GaussianNoise):
    """A guide with parameters for the problems of one observation, made by `bind`.

    A subclass makes them in `create`.

    Raises:
        BadInput: asked about an observation it was not fitted to.
    """

    amortised = False

    def __init__(self, model: ModelLike, **knobs: Any) -> None:
        super().__init__(model, **knobs)
        self.bound = 0

    def create(self, x: Observation) -> None:
        """Make parameters for the problems of x."""
        raise NotImplementedError

    def bind(self, x: Observation) -> None:
        """Make parameters for x; a guide already bound to the same x keeps its own."""
        self.latents.check(x)
        if self.bound and all(map(torch.equal, parts(x), self._bound_parts())):
            return
        for k, t in enumerate(parts(x)):
            self.register_buffer(f"x_{k}", t.clone())
        self.bound = len(parts(x))
        with pyro.settings.context(module_local_params=True), seeded(0):
            self.create(x)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Bind to the checkpoint's observation, then take its parameters."""
        like = self.latents.like
        device = parts(like)[0].device
        x = tuple(t.to(device) for n, t in sorted(state.items()) if n.startswith("x_"))
        if x:
            self.bind(x if isinstance(like, tuple) else x[0])
        super().restore(state)

    def copies(self, x: Observation) -> int:
        """How often x repeats the bound observation."""
        mine = self._bound_parts()
        copies = size(x) // len(mine[0]) if mine else 0
        whole = copies > 0 and size(x) == copies * len(mine[0])
        if not whole or not all(map(torch.equal, parts(x), parts(repeat(mine, copies)))):
            raise BadInput(
                "x",
                expected="the observation this guide was fitted to",
                got="another one" if mine else "a guide that has not been fitted",
                fix=f"Call fit(model, {type(self).__name__}(model), x) first, or use an encoder.",
            )
        return copies

    def _bound_parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"x_{k}") for k in range(self.bound))
