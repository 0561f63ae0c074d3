"""The table of models: one row for each, for the command line and the README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from inference.errors import NoExactPosterior
from inference.latents import Latents
from inference.observation import parts
from inference.show import first_line

from .model import Model

__all__ = ["Row", "rows"]


@dataclass(frozen=True)
class Row:
    """What the table says of a model.

    Attributes:
        name: key in `MODELS`.
        latents: how many of each kind, "8 real".
        observation: shape of one problem's observation.
        truth: kind of exact posterior, "closed form", or "none".
        paper: authors and year.
        title: first line of the docstring.
    """

    name: str
    latents: str
    observation: str
    truth: str
    paper: str
    title: str


def rows(models: Mapping[str, type[Model]]) -> list[Row]:
    """A row for each model, built at its canonical size."""
    return [_row(name, cls) for name, cls in models.items()]


def _row(name: str, cls: type[Model]) -> Row:
    model = cls()
    lat = Latents(model)
    kinds: Counter[str] = Counter()
    for s in lat.sites:
        kinds[s.kind] += s.shape.numel()
    seen = parts(model.observations())[lat.slot].shape
    shape = " x ".join(map(str, seen[1:] if lat.plated else seen)) or "1"
    latents = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())
    return Row(name, latents, shape, _truth(model), str(cls.paper), first_line(cls))


def _truth(model: Model) -> str:
    try:
        return str(getattr(model.exact(), "kind", "yes")).replace("_", " ")
    except NoExactPosterior:
        return "none"
