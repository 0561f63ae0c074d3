"""ArviZ trees of anybody's Pyro guides and chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from inference.errors import BadInput, NoDensity
from inference.guide import Guide, HasDensity, check_counts
from inference.latents import Latents, Values
from inference.observation import Observation, parts
from inference.seeds import seeded

from .plated_tree import Dims, PlatedTree, deterministic

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["from_pyro_guide", "from_pyro_mcmc"]

CHUNK = 256  # draws replayed at once


def from_pyro_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Observation,
    *,
    draws: int = 1000,
    chains: int = 4,
    seed: int,
    dims: Dims | None = None,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
) -> DataTree:
    """Draw from a Pyro guide, yours, an autoguide or one of ours, into an ArviZ tree.

    Axes are named after the model's plates. Where all latents are inside the plate "data" its axis
    is `problem`, as in :func:`diagnostics.draw`, and the tree can be compared with any of those;
    otherwise the data set is one problem, and no axis is added for it. Pyro's parameter store is
    read, so that a guide trained by SVI is the trained one, and left as it was.

    Args:
        model: a Pyro program with one observed site, called as model(x), or model(*x) for a tuple.
        guide: a Pyro program with the model's latent sites, called with the same arguments; it is
            called once per draw. Guides of this package are asked for their `draw` instead.
        x: observation.
        draws: draws per chain.
        chains: chains; a guide's draws are independent, and chains a mere split of them.
        seed: everything depends on it alone.
        dims: names of each site's axes after the problem axis; by default `model.dims`, if any,
            and the names of plates.
        log_likelihood: add the group of that name, log p(x | z) in nats for each row of x.
        posterior_predictive: add the group of that name, one simulated x per draw.

    Returns:
        Groups `posterior` with the model's deterministic sites, `observed_data`, `constant_data`
        where x is a tuple, and `sample_stats`: `log_p_joint` in nats by problem, and where the
        guide has a density `log_q`; both are sums over problems if the guide ties them.

    Raises:
        BadInput: the guide misses a latent site, or gives it another shape; a count is below 1.
        Incompatible: the model is not one that this package can read; see `inference.Latents`.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> def program(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("row", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("mean", dist.Normal(x.sum() / (len(x) + 1), (len(x) + 1) ** -0.5))
        >>> tree = from_pyro_guide(program, guide, torch.tensor([0.3, 1.2]), draws=50, seed=0)
        >>> dict(tree.posterior["mean"].sizes)
        {'chain': 4, 'draw': 50}
    """
    check_counts(draws=draws, chains=chains)
    with _store_kept(), torch.no_grad():
        program = _Program(model, x)
        lat = Latents(program, x)
        source = _ours if isinstance(guide, Guide) else _theirs
        values, log_q = source(lat, guide, x, (chains, draws), seed)
        stats = {"log_p_joint": lat.log_joint(values, x)}
        if log_q is not None:
            stats["log_q"] = log_q
            if log_q.dim() < stats["log_p_joint"].dim():  # tied: both are sums, or neither
                stats["log_p_joint"] = stats["log_p_joint"].sum(-1)
        with seeded(seed, 2):
            replicas = {lat.observed: lat.replicate(values, x)} if posterior_predictive else {}
        flat = {n: _squeezed(lat, v) for n, v in values.items()}
        with seeded(seed, 3):
            seen = _seen(program, parts(x), flat, likelihood=log_likelihood)
    found = PlatedTree(seen.nodes, dims or getattr(model, "dims", {}), plated=lat.plated)
    found.add("posterior", flat | seen.deterministic)
    found.add("sample_stats", {n: _squeezed(lat, v) for n, v in stats.items()})
    found.add("log_likelihood", seen.log_likelihood)
    found.add("posterior_predictive", replicas)
    found.add_data(parts(x), lat.observed, lat.slot)
    return found.tree(
        model=_name(model),
        guide=_name(guide),
        seed=seed,
        independent_draws=int(getattr(guide, "independent", True)),
        discrete=",".join(s.name for s in lat.sites if s.discrete),
    )


def from_pyro_mcmc(
    mcmc: Any, *, model: Callable[..., Any] | None = None, x: Any = None, dims: Dims | None = None
) -> DataTree:
    """The chains of a finished `pyro.infer.MCMC` as an ArviZ tree.

    Args:
        mcmc: after `run`.
        model: the program that was sampled. With it the tree gets what Pyro does not keep: the
            deterministic sites, `log_p_joint`, `observed_data` and `log_likelihood`, and its axes
            the names of plates, `problem` for "data" where all latents are inside it. Discrete
            sites that Pyro summed out must not be in it.
        x: the arguments of `run`, in a tuple if there were several.
        dims: names of each site's axes, after the problem axis if there is one.

    Returns:
        Groups `posterior` and `sample_stats` with `diverging`, and with a model those above.

    Raises:
        BadInput: the sampler has not run, or the model has latent sites that were not sampled.
    """
    values: Values = mcmc.get_samples(group_by_chain=True) or {}
    if not values:
        raise BadInput("mcmc", expected="a finished run", got="no draws", fix="Call mcmc.run(x).")
    first = next(iter(values.values()))
    diverging = np.zeros(first.shape[:2], bool)
    for chain, indices in enumerate(mcmc.diagnostics().get("divergences", {}).values()):
        diverging[chain, list(indices)] = True
    stats: dict[str, Any] = {"diverging": diverging}
    seen, name = _Seen(), "" if model is None else _name(model)
    args = x if isinstance(x, tuple) else () if x is None else (x,)
    if model is not None:
        with _store_kept(), torch.no_grad(), seeded(0):
            seen = _seen(_Program(model, ()), args, values, likelihood=True)
        stats["log_p_joint"] = seen.log_joint
    plated = bool(seen.nodes) and all(_inside_data(seen.nodes[n]) for n in values)
    found = PlatedTree(seen.nodes, dims or {}, plated=plated)
    found.add("posterior", values | seen.deterministic)
    found.add("sample_stats", stats)
    found.add("log_likelihood", seen.log_likelihood)
    found.add("observed_data", seen.observed, lead=0)
    kernel = type(getattr(mcmc, "kernel", mcmc)).__name__
    return found.tree(model=name, guide=kernel, independent_draws=0, discrete="")


class _Program:
    """A Pyro program as `ModelLike`, its deterministic sites out of sight."""

    def __init__(self, program: Callable[..., Any], x: Observation) -> None:
        self.program, self.x = program, x
        self.like = hasattr(program, "observations")  # then a tuple is passed on as one argument

    def observations(self) -> Observation:
        """What the program is run on."""
        return self.x

    def __call__(self, x: Any = None) -> Any:
        hidden = poutine.block(self.run, hide_fn=deterministic)
        return hidden(*parts(self.x if x is None else x))

    def run(self, *args: Any) -> Any:
        """The program with its deterministic sites."""
        one = args if not self.like or len(args) < 2 else (args,)
        return self.program(*one)


@contextmanager
def _store_kept() -> Iterator[None]:
    """A copy of Pyro's parameter store to work on: parameters are read, new ones forgotten."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


def _ours(
    lat: Latents, guide: Any, x: Observation, shape: tuple[int, int], seed: int
) -> tuple[Values, Tensor | None]:
    """Draws of a guide of this package, each (chains, draws, B, *shape), and their log-density."""
    found = guide.draw(x, draws=shape[1], chains=shape[0], seed=seed)
    log_q = found.stats.get("log_q")
    if log_q is None and isinstance(guide, HasDensity):
        log_q = guide.log_prob(found.values, x)
    return found.values, log_q


def _theirs(
    lat: Latents, guide: Any, x: Observation, shape: tuple[int, int], seed: int
) -> tuple[Values, Tensor | None]:
    """The same of any callable, one call per draw."""
    with seeded(seed, 1):
        calls = [poutine.trace(guide).get_trace(*parts(x)) for _ in range(shape[0] * shape[1])]
    rows = lat.problems(x)
    values = {}
    for s in lat.sites:
        wanted = torch.Size([rows, *s.shape] if lat.plated else s.shape)
        site = calls[0].nodes.get(s.name)
        if site is None or site["value"].shape != wanted:
            raise BadInput(
                f"guide site {s.name!r}",
                expected=f"shape {tuple(wanted)}, as in the model",
                got="no such site" if site is None else f"shape {tuple(site['value'].shape)}",
                fix="Sample every latent of the model, inside the model's plates.",
            )
        stacked = torch.stack([c.nodes[s.name]["value"] for c in calls])
        values[s.name] = stacked.reshape(*shape, rows, *s.shape)
    if not _has_density(calls[0], rows * lat.size):
        return values, None
    try:
        log_q = torch.stack([_log_q(call, plated=lat.plated) for call in calls])
    except (NoDensity, NotImplementedError):
        return values, None
    return values, log_q.reshape(*shape, *log_q.shape[1:])


def _latent(trace: poutine.Trace) -> dict[str, Any]:
    """What a guide drew, auxiliary sites included."""
    return {n: node for n, node in _sites(trace).items() if not node["is_observed"]}


def _sites(trace: poutine.Trace) -> dict[str, Any]:
    """Sample statements, without the indices of plates."""
    nodes = {n: node for n, node in trace.nodes.items() if node["type"] == "sample"}
    return {n: node for n, node in nodes.items() if not poutine.util.site_is_subsample(node)}


def _has_density(trace: poutine.Trace, size: int) -> bool:
    """The guide's random numbers are as many as the latents they became.

    Fewer: a point mass. More: auxiliary variables that would have to be integrated out.
    """
    drawn = [node for node in _latent(trace).values() if not hasattr(node["fn"], "log_density")]
    return sum(_free(node) for node in drawn) == size


def _free(node: Mapping[str, Any]) -> int:
    fn, value = node["fn"], node["value"]
    if fn.support.is_discrete:
        return int(value.numel())
    shape = torch.distributions.biject_to(fn.support).inverse_shape(value.shape)
    return int(torch.Size(shape).numel())


def _log_q(trace: poutine.Trace, *, plated: bool) -> Tensor:
    """log q of one call: by problem, (B,), if all its sites are in "data", else the sum of all."""
    trace.compute_log_prob()
    nodes = _latent(trace).values()
    each = plated and all(_inside_data(n) for n in nodes)
    terms = [n["log_prob"] for n in nodes]
    sums = [t.reshape(len(t), -1).sum(1) if each else t.sum() for t in terms]
    return torch.stack(sums).sum(0)


def _inside_data(node: Mapping[str, Any]) -> bool:
    return any(f.name == "data" for f in node["cond_indep_stack"])


def _squeezed(lat: Latents, t: Tensor) -> Tensor:
    """Without the problem axis where the data set is one problem; a sum over problems as it is."""
    return t[:, :, 0] if not lat.plated and t.dim() > 2 else t


@dataclass
class _Seen:
    """What replays of a model show beside the latents, each (chains, draws, ...)."""

    nodes: dict[str, Any] = field(default_factory=dict)
    deterministic: Values = field(default_factory=dict)
    log_likelihood: Values = field(default_factory=dict)
    observed: Values = field(default_factory=dict)
    log_joint: Tensor | None = None


def _seen(program: _Program, args: Sequence[Any], values: Values, *, likelihood: bool) -> _Seen:
    """Run the model at every draw, values (chains, draws, ...), if there is anything to see."""
    shape = next(iter(values.values())).shape[:2]
    flat = {n: v.flatten(0, 1) for n, v in values.items()}
    first, found = _replay(program, args, {n: v[0] for n, v in flat.items()}), _Seen()
    found.nodes = _sites(first)
    free = [n for n, node in found.nodes.items() if not node["is_observed"] and n not in flat]
    if free:  # Pyro would draw them from the prior
        known, got = f"the latents {sorted(flat)}", f"{free} beside them"
        raise BadInput("model", expected=known, got=got, fix="Pass the model that was sampled.")
    made = [n for n, node in found.nodes.items() if deterministic(node)]
    scored = [n for n in first.observation_nodes if n not in {*made, *flat}]
    scored = [n for n in scored if first.nodes[n]["value"].numel()]  # not pyro.factor
    found.observed = {n: first.nodes[n]["value"] for n in scored}
    if not made and not likelihood:
        return found

    def read(one: Values) -> tuple[Values, Values, Tensor]:
        trace = _replay(program, args, one)
        values = {n: trace.nodes[n]["value"] for n in made}
        terms = {n: trace.nodes[n]["log_prob"] for n in scored if likelihood}
        return values, terms, trace.log_prob_sum()

    each = tree_map(lambda t: t.unflatten(0, shape), _at_each(read, flat))
    found.deterministic, found.log_likelihood, found.log_joint = each
    return found


def _replay(program: _Program, args: Sequence[Any], values: Values) -> poutine.Trace:
    """The model at one draw, scored."""
    replayed = poutine.condition(program.run, data=values)
    with poutine.block():
        trace = poutine.trace(replayed).get_trace(*args)
    trace.compute_log_prob()
    return trace


def _at_each(read: Callable[[Values], Any], values: Values) -> Any:
    """`read` of every draw: all at once where torch can vectorise it, else one by one."""
    rows = range(len(next(iter(values.values()))))
    try:
        with pyro.validation_enabled(False):  # checks of arguments look at numbers
            return vmap(read, chunk_size=CHUNK)(values)
    except RuntimeError:
        each = [read({n: v[k] for n, v in values.items()}) for k in rows]
        return tree_map(lambda *t: torch.stack(t), *each)


def _name(program: Any) -> str:
    return str(getattr(program, "title", getattr(program, "__name__", type(program).__name__)))
