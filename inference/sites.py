"""One latent site, as seen by one problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, identity_transform
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from .errors import Incompatible

__all__ = ["Site", "same_transform", "site_of"]


@dataclass(frozen=True)
class Site:
    """One latent site, as seen by one problem.

    `shape` is the site's shape without the problem axis, its last `event_dim` axes the event and
    those before it the axes of `plates`, the plates inside "data" as (name, dim, size).
    """

    name: str
    shape: torch.Size
    unconstrained_shape: torch.Size
    support: Constraint
    transform: Transform
    discrete: bool
    event_dim: int
    dtype: torch.dtype
    plates: tuple[tuple[str, int, int], ...]

    @property
    def kind(self) -> str:
        """What sort of number it holds: real, positive, bounded, binary, counts or states."""
        base = getattr(self.support, "base_constraint", self.support)
        if base is constraints.boolean:
            return "binary"
        bounded = hasattr(base, "upper_bound")
        if self.discrete:
            return "states" if bounded else "counts"
        return "bounded" if bounded else "positive" if hasattr(base, "lower_bound") else "real"


def site_of(name: str, node: dict[str, Any], *, plated: bool) -> Site:
    """A latent site from its node in a trace.

    Raises:
        Incompatible: the plate "data" is not leftmost.
    """
    fn: TorchDistribution = node["fn"]
    value: Tensor = node["value"]
    frames = sorted(node["cond_indep_stack"], key=lambda f: f.dim)
    if plated and (frames[0].name != "data" or value.shape[0] != frames[0].size):
        raise Incompatible(
            f"site {name!r}",
            expected='the plate "data" leftmost',
            got=f"plates {[f.name for f in frames]} and a value of shape {tuple(value.shape)}",
            fix='Give "data" the leftmost dim, pyro.plate("data", B, dim=-1 - inner plates).',
        )
    support = _plain(fn.support)
    discrete = bool(support.is_discrete)
    transform = identity_transform if discrete else biject_to(support)
    shape = value.shape[1:] if plated else value.shape
    return Site(
        name=name,
        shape=shape,
        unconstrained_shape=torch.Size(transform.inverse_shape(value.shape)[int(plated) :]),
        support=support,
        transform=transform,
        discrete=discrete,
        event_dim=fn.event_dim,
        dtype=value.dtype,
        plates=tuple((f.name, f.dim, f.size) for f in frames if f.name != "data"),
    )


def same_transform(a: Site, b: Site, value: Tensor) -> bool:
    """The transforms of two prototypes of a site agree on a fixed test vector."""
    shape = a.unconstrained_shape
    u = torch.linspace(-1.0, 1.0, shape.numel(), device=value.device).reshape(1, *shape)
    return bool((a.transform(u) == b.transform(u)).all())


def _plain(support: Constraint) -> Constraint:
    """The support of a mixture is that of its components, which torch can transform."""
    if isinstance(support, MixtureSameFamilyConstraint):
        return _plain(support.base_constraint)
    if isinstance(support, constraints.independent):
        inner = _plain(support.base_constraint)
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    return support
