"""Guides against the exact posterior, every number beside its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.arguments import Count, Index, check_call
from inference.errors import BadInput
from inference.guide import Guide, check_counts
from inference.latents import ModelLike
from inference.observation import Observation
from inference.progress import bar
from inference.seeds import stream

from .draws import draw
from .extras import extend
from .metrics import METRICS, Metric

if TYPE_CHECKING:
    from xarray import DataArray, Dataset, DataTree

__all__ = ["EXACT", "Collected", "collect", "compare", "compare_draws", "summary"]

EXACT = "exact"  # name of the reference row
TIMES = ("seconds", "time_constants")  # attributes that are totals over chains


class Collected(dict[str, "DataTree"]):
    """Draws by guide, the reference first, with a second reference set for the floors."""

    floor: DataTree


def compare(
    model: ModelLike,
    guides: Mapping[str, Guide],
    x: Observation,
    *,
    draws: Count = 1000,
    chains: Count = 4,
    seed: Index,
    reference: Guide | None = None,
    metrics: Mapping[str, Metric] | Sequence[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """Compare guides with the exact posterior.

    Args:
        model: the model.
        guides: by printable name.
        x: observation of B problems.
        draws: draws per chain.
        chains: chains.
        seed: every set of draws has its own stream of it.
        reference: by default `model.exact()`.
        metrics: names in `METRICS`, or metrics of your own by name; by default all of `METRICS`, of
            which the classifiers of C2ST take most of the time.
        progress: show a bar.

    Returns:
        Variables `value`, `floor` and `se` with dims (guide, metric, problem), and `reason`
        (guide, metric), which says why a value is NaN. The floor is the same metric between two
        independent sets of exact draws of the same size; it is also the row "exact".

    Raises:
        BadInput: a guide takes the name "exact", or x, a count or a metric's name is wrong.
        NoExactPosterior: the model has none and no reference was given.

    Example:
        >>> import zoo
        >>> model = zoo.FactorAnalysis()
        >>> x = model.observations()[:3]
        >>> found = compare(model, {"copy": model.exact()}, x, draws=250, seed=0)
        >>> dict(found.sizes) == {"guide": 2, "metric": len(METRICS), "problem": 3}
        True
    """
    check_call(compare, locals())
    sizes = {"draws": draws, "chains": chains}
    trees = collect(model, guides, x, **sizes, seed=seed, reference=reference, progress=progress)
    return compare_draws(trees, metrics, progress=progress)


def collect(
    model: ModelLike,
    guides: Mapping[str, Guide],
    x: Observation,
    *,
    draws: Count = 1000,
    chains: Count = 4,
    seed: Index,
    reference: Guide | None = None,
    progress: bool = True,
) -> Collected:
    """The draws behind :func:`compare`; takes the same arguments.

    Beside what :func:`draw` gives, each tree has what the metrics of :func:`compare_draws` need of
    the guide itself, where it applies: groups `at_reference`, `scores` and `modes`.
    """
    check_call(collect, locals())
    check_counts(draws=draws, chains=chains)
    if EXACT in guides:
        raise BadInput(
            "guides",
            expected=f"names other than {EXACT!r}",
            got=repr(EXACT),
            fix="The exact posterior is always the reference row; name a copy differently.",
        )
    judge: Guide = reference or model.exact()  # type: ignore[attr-defined]
    # one set of twice the size, so that stored draws never sit in both halves
    both = draw(model, judge, x, draws=draws, chains=2 * chains, seed=seed, progress=progress)
    found = Collected({EXACT: _chains(both, slice(0, chains))})
    found.floor = _chains(both, slice(chains, None))
    for k, (name, guide) in enumerate(guides.items()):
        found[name] = draw(
            model, guide, x, draws=draws, chains=chains, seed=stream(seed, 1 + k), progress=progress
        )
        extend(found[name], model, guide, x, reference=found[EXACT], judge=judge)
    for tree in (found[EXACT], found.floor):
        extend(tree, model, judge, x, reference=found[EXACT], judge=judge)
    return found


def _chains(tree: DataTree, chosen: slice) -> DataTree:
    """Some chains of a tree, renumbered from zero, with their share of the time drawing took."""

    def some(group: Dataset) -> Dataset:
        if "chain" not in group.dims:
            return group
        kept = group.isel(chain=chosen)
        return kept.assign_coords(chain=np.arange(kept.sizes["chain"]))

    half: DataTree = tree.map_over_datasets(some)
    half.attrs = dict(tree.attrs)
    share = half["posterior"].sizes["chain"] / tree["posterior"].sizes["chain"]
    half.attrs |= {name: share * half.attrs[name] for name in TIMES if name in half.attrs}
    return half


def compare_draws(
    trees: Collected,
    metrics: Mapping[str, Metric] | Sequence[str] | None = None,
    *,
    progress: bool = True,
) -> Dataset:
    """All metrics of all draws; see :func:`compare` for what comes back.

    Raises:
        BadInput: trees are not those of :func:`collect`, or there is no such metric.
    """
    import xarray

    if not isinstance(trees, Collected):
        raise BadInput(
            "trees",
            expected="what diagnostics.collect returns, with two sets of reference draws",
            got=f"a {type(trees).__name__}",
            fix="Call trees = diagnostics.collect(model, guides, x, seed=0); draws of your own can "
            "then be added, trees['mine'] = tree.",
        )
    check_call(compare_draws, locals())
    table = metrics if isinstance(metrics, Mapping) else _named(metrics or tuple(METRICS))
    rows = {EXACT: trees.floor} | {n: t for n, t in trees.items() if n != EXACT}
    found: dict[tuple[str, str], Any] = {}
    with bar("comparing", len(rows) * len(table), show=progress) as advance:
        for guide, tree in rows.items():
            for name, metric in table.items():
                found[guide, name] = metric.compute(tree, trees[EXACT])
                advance(f"{guide}: {metric.title}")
    dims = ("guide", "metric", "problem")

    def cube(field: str) -> Any:
        return np.array([[getattr(found[g, m], field) for m in table] for g in rows])

    value, se = cube("value"), cube("se")
    return xarray.Dataset(
        {
            "value": (dims, value),
            "floor": (dims, np.broadcast_to(value[:1], value.shape).copy()),
            "se": (dims, se),
            "reason": (dims[:2], cube("reason")),
        },
        coords={
            "guide": list(rows),
            "metric": list(table),
            "problem": np.arange(value.shape[2]),
            "ideal": ("metric", [np.nan if m.ideal is None else m.ideal for m in table.values()]),
            "title": ("metric", [m.title for m in table.values()]),
        },
        attrs={k: v for k, v in trees[EXACT].attrs.items() if k != "guide"},
    )


def summary(comparison: Dataset) -> Dataset:
    """Means over problems, and whether a guide is at the floor.

    Args:
        comparison: from :func:`compare`.

    Returns:
        With dims (guide, metric): `value` and its standard error `se`, `floor`, the `excess` of the
        distance from the ideal over the floor's, its standard error `excess_se`, and `at_floor`:
        the excess is below three standard errors, those of guide and floor. Where a metric has no
        ideal value or is NaN, the last three are NaN and False.
    """
    import xarray

    ideal = comparison.ideal if "ideal" in comparison.coords else _ideal(comparison.metric)
    problems = comparison.sizes["problem"]
    distance = abs(comparison.value - ideal) - abs(comparison.floor - ideal)
    each = comparison.se.fillna(0.0)
    noise = np.sqrt((each**2 + each.sel(guide=EXACT) ** 2).mean("problem") / problems)
    excess = distance.mean("problem")
    return xarray.Dataset(
        {
            "value": comparison.value.mean("problem", skipna=False),
            "se": np.sqrt((comparison.se**2).mean("problem", skipna=False) / problems),
            "floor": comparison.floor.mean("problem", skipna=False),
            "excess": excess,
            "excess_se": noise.where(excess.notnull()),
            "at_floor": excess < 3 * noise,
            "reason": comparison.reason,
        }
    )


def _named(names: Sequence[str]) -> dict[str, Metric]:
    return {name: METRICS[name] for name in names}


def _ideal(names: DataArray) -> DataArray:
    """Ideal values of metrics of the table, for comparisons that 0.6 and before had written."""
    known = {n: np.nan if m.ideal is None else m.ideal for n, m in METRICS.items()}
    return names.copy(data=[known.get(str(n), np.nan) for n in names.values])
