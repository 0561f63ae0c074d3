"""Draws of any guide as an ArviZ DataTree."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from inference.arguments import Count, Index, check_call
from inference.checkpoint import versions
from inference.errors import BadInput
from inference.guide import Draws, Guide, HasDensity, HasEvidence
from inference.latents import Latents, ModelLike, Values
from inference.observation import Observation, parts
from inference.seeds import seeded
from inference.show import title_of

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["array", "beside", "draw", "dream", "packed", "reconstruct", "tree_of", "values_of"]

Groups = dict[str, dict[str, np.ndarray[Any, Any]]]


class Predicts(ModelLike, Protocol):
    """A model that knows the mean of its observation."""

    def predict(self, z: Values) -> Tensor:
        """Latents (..., B, *shape) to mean observations (..., B, F)."""


class Dreams(Predicts, Protocol):
    """A model that can be simulated, too."""

    def simulate(self, n: int, *, seed: int) -> tuple[Values, Observation]:
        """Latents and observations of n problems from the joint."""


def draw(
    model: ModelLike,
    guide: Guide,
    x: Observation,
    *,
    draws: Count = 1000,
    chains: Count = 4,
    seed: Index,
    prior: bool = False,
    posterior_predictive: bool = False,
    progress: bool = True,
) -> DataTree:
    """Sample a guide and return everything ArviZ wants to know.

    Args:
        model: the model.
        guide: any guide of it, the exact posterior included.
        x: observation of B problems.
        draws: draws per chain.
        chains: chains; of independent draws they are a mere split.
        seed: the draws depend on it alone.
        prior: add groups `prior` and `prior_predictive`, as many draws as the posterior has.
        posterior_predictive: add the group of that name, one simulated x per draw.
        progress: show a bar where drawing takes long.

    Returns:
        Groups `posterior` (chain, draw, problem, ...), `observed_data`, `sample_stats` with
        `log_p_joint` and, for guides with a density, `log_q` and `log_weight` in nats; `evidence`
        with `log_evidence` (problem) for exact posteriors that know it; `circuit` where the guide
        is one. Attributes name model, guide, seed, versions, the seconds drawing took, the discrete
        sites, and whether the draws are independent.

    Raises:
        BadInput: x or a count is wrong, or the guide misses a latent site.
    """
    if not isinstance(guide, Guide):
        name = getattr(guide, "__name__", type(guide).__name__)
        raise BadInput(
            "guide",
            expected="a guide built for the model, GuideClass(model)",
            got=name,
            fix="Build it; for a Pyro guide of your own there is diagnostics.from_pyro_guide.",
        )
    check_call(draw, locals())
    lat = guide.latents
    x = beside(guide, x)
    began = time.perf_counter()
    found = guide.draw(x, draws=draws, chains=chains, seed=seed, progress=progress)
    seconds = time.perf_counter() - began
    with torch.no_grad(), seeded(seed, 2):  # a spiking circuit runs anew to know log q
        groups: Groups = {
            "posterior": _arrays(found.values),
            "sample_stats": _arrays(_stats(lat, guide, found, x)),
            **_observed(lat, x),
        }
        if found.circuit:
            groups["circuit"] = _arrays(found.circuit)
        if posterior_predictive:
            with seeded(seed, 1):
                replicas = lat.replicate(found.values, x)
            groups["posterior_predictive"] = {lat.observed: array(replicas)}
        if prior:
            groups |= _prior(lat, draws * chains, seed)
        evidence = guide.log_evidence(x) if isinstance(guide, HasEvidence) else None
    neurons = {name: ("neuron",) for name, t in found.circuit.items() if t.dim() == 4}
    tree = tree_of(groups, lat, {**getattr(model, "dims", {}), **neurons})
    if evidence is not None:
        tree["evidence"] = _evidence(evidence)
    tree.attrs = {
        "model": title_of(model),
        "guide": type(guide).__name__,
        "seed": seed,
        "seconds": seconds,
        "independent_draws": int(guide.independent),
        **({} if found.time_constants is None else {"time_constants": found.time_constants}),
        "discrete": ",".join(s.name for s in lat.sites if s.discrete),
        **{f"version_{name}": v for name, v in versions().items()},
    }
    return tree


def packed(
    tree: DataTree, group: str = "posterior", *, discrete: bool | None = None
) -> np.ndarray[Any, Any]:
    """The latents of a DataTree as one array, (problem, chain x draw, D).

    Args:
        tree: draws.
        group: which of its groups.
        discrete: only the discrete sites, only the others, or by default all of them.
    """
    data = tree[group].dataset
    counted = str(tree.attrs.get("discrete", "")).split(",")
    pieces = [np.empty((data.sizes["problem"], data.sizes["chain"] * data.sizes["draw"], 0))]
    for name, variable in data.data_vars.items():
        if discrete is not None and (name in counted) is not discrete:
            continue
        array = variable.transpose("problem", "chain", "draw", ...).values
        pieces.append(array.reshape(array.shape[0], array.shape[1] * array.shape[2], -1))
    return np.concatenate(pieces, -1)


def values_of(tree: DataTree, guide: Guide) -> Values:
    """The latents of a DataTree by site, each (chains, draws, B, *shape), beside the guide."""
    device = parts(guide.latents.like)[0].device
    data = tree["posterior"].dataset
    return {
        n: torch.as_tensor(data[n].transpose("chain", "draw", "problem", ...).values).to(device)
        for n in guide.latents.names
    }


def reconstruct(model: Predicts, tree: DataTree) -> None:
    """Add the group `reconstruction`: the posterior mean of the predicted observation.

    Args:
        model: a model that says what it would show, such as a `zoo.Model` with `predict`.
        tree: gets the variable `mean`, (problem, pixel).
    """
    import xarray

    data = tree["posterior"].dataset
    where = parts(model.observations())[0].device
    values = {str(n): torch.as_tensor(v.values).to(where) for n, v in data.data_vars.items()}
    with torch.no_grad():
        mean = model.predict(values).mean((0, 1))
    found = xarray.Dataset({"mean": (("problem", "pixel"), array(mean))})
    tree["reconstruction"] = xarray.DataTree(found)


def dream(model: Dreams, tree: DataTree, *, n: int = 10, seed: int) -> None:
    """Add the group `dreams`: what a model shows of latents from its own prior.

    Args:
        model: a model that says what it would show, such as a `zoo.Model` with `predict`.
        tree: gets the variable `mean`, (dream, pixel).
        n: dreams.
        seed: they depend on it alone.
    """
    import xarray

    z, _ = model.simulate(n, seed=seed)
    with torch.no_grad():
        mean = array(model.predict(z))
    tree["dreams"] = xarray.DataTree(xarray.Dataset({"mean": (("dream", "pixel"), mean)}))


def beside(guide: Guide, x: Observation) -> Observation:
    """x on the device of the guide's model, if x is made of tensors at all, and the guide, too.

    A guide stays behind where another guide's fit has moved the model that they share.
    """
    device = parts(guide.latents.like)[0].device
    guide.to(device)
    if isinstance(x, tuple):
        return tuple(t.to(device) for t in x)
    return x.to(device) if isinstance(x, Tensor) else x


def array(t: Tensor) -> np.ndarray[Any, Any]:
    """A tensor of any device as an array."""
    return t.detach().cpu().numpy()


def _arrays(values: Values) -> dict[str, np.ndarray[Any, Any]]:
    return {name: array(t) for name, t in values.items()}


def _stats(lat: Latents, guide: Guide, found: Draws, x: Observation) -> Values:
    stats = dict(found.stats)
    stats["log_p_joint"] = lat.log_joint(found.values, x)
    if "log_q" not in stats and isinstance(guide, HasDensity):
        stats["log_q"] = guide.log_prob(found.values, x)
    if "log_q" in stats:
        stats["log_weight"] = stats["log_p_joint"] - stats["log_q"]
    return stats


def _observed(lat: Latents, x: Observation) -> Groups:
    """The observed tensor, and the inputs beside it as constant data."""
    tensors = list(parts(x))
    groups: Groups = {"observed_data": {lat.observed: array(tensors.pop(lat.slot))}}
    if tensors:
        groups["constant_data"] = {f"input_{k}": array(t) for k, t in enumerate(tensors)}
    return groups


def _prior(lat: Latents, n: int, seed: int) -> Groups:
    z, x = lat.joint(n, seed=seed)
    observed = parts(x)[lat.slot]
    return {
        "prior": {name: array(t)[None] for name, t in z.items()},
        "prior_predictive": {lat.observed: array(observed)[None]},
    }


def tree_of(groups: Groups, lat: Latents, names: Any) -> DataTree:
    """Axes get the model's names for them; the rest get ArviZ's."""
    from arviz_base import from_dict

    row = ["problem"] if lat.plated else []
    leads = dict.fromkeys(("observed_data", "constant_data", "posterior_predictive"), row)
    leads |= {"prior": [], "prior_predictive": [], "prior_sbc": []}
    tail = {name: list(axes) for name, axes in names.items()}
    tree = None
    for group, arrays in groups.items():
        lead = leads.get(group, ["problem"])
        dims = {name: lead + tail.get(name, []) for name in arrays}
        piece = from_dict({group: arrays}, dims=dims, check_conventions=False)
        tree = piece if tree is None else tree.assign({group: piece[group]})
    assert tree is not None
    return tree


def _evidence(log_evidence: Tensor) -> Any:
    import xarray

    return xarray.DataTree(xarray.Dataset({"log_evidence": ("problem", array(log_evidence))}))
