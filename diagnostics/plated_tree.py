"""ArviZ trees whose axes have the names of a Pyro program's plates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference.checkpoint import versions

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["Dims", "PlatedTree", "deterministic"]

Array = np.ndarray[Any, Any]
Dims = Mapping[str, Sequence[str]]
PROBLEM = "problem"  # name of the plate "data" where each of its rows is a problem


class PlatedTree:
    """Groups of arrays whose axes have the names of plates.

    Args:
        nodes: sites of the model by name.
        dims: names of axes that the user gave, after the problem axis.
        plated: the plate "data" holds problems.
    """

    def __init__(self, nodes: Mapping[str, Any], dims: Dims, *, plated: bool) -> None:
        self.groups: dict[str, tuple[int, dict[str, Array]]] = {}
        self.names = {n: _axes(node, plated=plated, taken=set(nodes)) for n, node in nodes.items()}
        row = [PROBLEM] if plated else []
        self.names |= {n: [*row, *axes] for n, axes in dims.items()}
        self.names |= {n: list(row) for n in ("log_p_joint", "log_q")}

    def add(self, group: str, values: Mapping[str, Any], *, lead: int = 2) -> None:
        """Values (chains, draws, ...), or without those two axes where lead is 0."""
        if values:
            arrays = {n: torch.as_tensor(v).detach().cpu().numpy() for n, v in values.items()}
            self.groups[group] = lead, arrays

    def add_data(self, tensors: Sequence[Tensor], observed: str, slot: int) -> None:
        """The observation, and the inputs beside it."""
        inputs = list(tensors)
        seen = inputs.pop(slot)
        named = {f"input_{k}": t for k, t in enumerate(inputs)}
        rows = self.names.get(observed, [])[:1]
        self.names |= {n: rows for n, t in named.items() if t.shape[:1] == seen.shape[:1]}
        self.add("observed_data", {observed: seen}, lead=0)
        self.add("constant_data", named, lead=0)

    def tree(self, **attrs: Any) -> DataTree:
        """All groups as one tree, in ArviZ's conventions."""
        from arviz_base import from_dict
        from xarray import DataTree

        pieces = {}
        for group, (lead, arrays) in self.groups.items():
            dims = {n: self.names.get(n, [])[: a.ndim - lead] for n, a in arrays.items()}
            piece = from_dict({group: arrays}, dims=dims, check_conventions=False)
            pieces[group] = piece[group].dataset
        found = DataTree.from_dict(pieces)
        attrs |= {f"version_{name}": v for name, v in versions().items()}
        found.attrs = attrs | {"inference_library": "pyro"}
        return found


def _axes(node: Mapping[str, Any], *, plated: bool, taken: set[str]) -> list[str | None]:
    """Names of a site's batch axes; ArviZ names the others, for which None stands."""
    value = node["value"]
    # pyro.deterministic takes all axes for the event unless told
    batch = value.dim() - (0 if deterministic(node) else node["fn"].event_dim)
    plates = {f.dim: (f.name, f.size) for f in node["cond_indep_stack"] if f.vectorized}
    named = {"data": PROBLEM} if plated else {}
    # xarray takes a variable with the name of its own axis for a coordinate
    named |= {n: f"{n}_plate" for n in taken}
    found = [plates.get(k - batch, ("", -1)) for k in range(batch)]
    fits = [size == value.shape[k] for k, (_, size) in enumerate(found)]
    return [named.get(n, n) if fit else None for (n, _), fit in zip(found, fits, strict=True)]


def deterministic(site: Mapping[str, Any]) -> bool:
    """A site of `pyro.deterministic`."""
    return bool(site["type"] == "sample" and (site["infer"] or {}).get("_deterministic"))
