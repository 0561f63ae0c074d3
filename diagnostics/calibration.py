"""Simulation-based calibration: is a guide right on average over the model's own observations?"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.arguments import Count, Index, check_call
from inference.errors import BadInput
from inference.guide import Guide
from inference.latents import Latents, ModelLike

from .simulated import Chunk, Simulations, pit

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["columns", "p_value", "sbc", "sbc_by", "sbc_test"]

Array = np.ndarray[Any, Any]
NULL = 10_000  # simulated experiments behind a p-value


def sbc(
    model: ModelLike,
    guide: Guide,
    *,
    problems: Count = 500,
    draws: Count = 99,
    thin: Count | None = None,
    seed: Index,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> DataTree:
    """Simulation-based calibration: ranks of the latents that made x among the guide's draws.

    Problems (z*, x) come from the joint; if q(z given x) is the posterior, the rank of any f(z*, x)
    among f of the draws is uniform. Beside each latent there are two joint quantities, which need
    no density of the guide: log p(x, z), and the product of each packed latent with the next, which
    sees lost correlations. Ties, as of discrete latents, are broken at random.

    Args:
        model: the model; only those without factors can be simulated.
        guide: an amortised guide of it, the exact posterior included.
        problems: simulated observations.
        draws: L, nearly independent draws for each.
        thin: keep every thin-th draw; by default 1, or 10 if the guide's draws are correlated.
        seed: everything depends on it alone.
        progress: show a bar.
        checkpoint: a file, written after each chunk of problems, from which a later call with the
            same settings goes on; it ends with the numbers of an unbroken run.

    Returns:
        Group `prior_sbc` for `arviz_plots.plot_ecdf_pit`: by latent site, and for `log_joint` and
        `neighbours`, values (rank + u) / (L + 1) in [0, 1], dims (chain, draw, ...), one chain with
        a draw for each problem.

    Raises:
        Incompatible: the guide has parameters for each problem, or the model cannot be simulated.
        BadInput: a count is below 1.
        BadCheckpoint: the file is damaged or belongs to other settings.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al.,
        2018), algorithm 2 https://arxiv.org/abs/1804.06788
        Simulation-Based Calibration Checking for Bayesian Computation (Modrak et al., 2023), for
        the joint quantities https://arxiv.org/abs/2211.02383
    """
    check_call(sbc, locals())
    simulations = Simulations(model, guide, problems, draws, thin, seed)
    lat = guide.latents

    def ranks(chunk: Chunk) -> dict[str, Array]:
        return {n: pit(v, chunk.rng) for n, v in _quantities(lat, chunk).items()}

    return simulations.tree("SBC", ranks, progress=progress, checkpoint=checkpoint)


def sbc_test(tree: DataTree, *, alpha: float = 0.05) -> Dataset:
    """Is any quantity's rank not uniform? Simultaneous ECDF test, Holm over the quantities.

    The statistic is the smallest two-sided binomial tail of the ECDF over its points, compared with
    10,000 simulated uniform samples of the same size; where it is smaller than all of theirs, the
    union bound over the points is a valid p-value.

    Args:
        tree: from :func:`sbc`.
        alpha: probability of rejecting some quantity of a right guide.

    Returns:
        By quantity: `p_value`, `rejected`, `shift`, the mean of the values less a half, positive
        where the guide's draws are too small, and `spread`, their sd over that of a uniform
        number, above 1 where the draws are too narrow. Attribute `calibrated`: nothing was
        rejected.

    References:
        Graphical test for discrete uniformity (Säilynoja et al., 2022)
        https://doi.org/10.1007/s11222-022-10090-6
    """
    import xarray

    found = columns(tree)
    values = np.stack(list(found.values()), -1)
    p = np.array([p_value(c) for c in values.T])
    fields = {"p_value": p, "rejected": _holm(p, alpha), **_moments(values)}
    result = xarray.Dataset(
        {n: ("quantity", v) for n, v in fields.items()}, coords={"quantity": list(found)}
    )
    result.attrs["calibrated"] = int(not fields["rejected"].any())
    return result


def sbc_by(tree: DataTree, dim: str, *, alpha: float = 0.05) -> Dataset:
    """Where along an axis of the latents, such as time, are the ranks not uniform?

    Holm's method is applied twice: over the latents that share a place, and over the places. Joint
    quantities have no place and are left to :func:`sbc_test`: a guide that gets the values at every
    time right and no path right passes here.

    Args:
        tree: from :func:`sbc`.
        dim: the axis.
        alpha: probability of rejecting some place of a right guide.

    Returns:
        Along `dim`: `p_value`, the smallest at that place, adjusted for their number; `rejected`;
        `shift` and `spread` as in :func:`sbc_test`, of the latent with the smallest p-value there.
        Attributes of the tree, and `problems`, `alpha` and
        `calibrated`: nothing was rejected.

    Raises:
        BadInput: no latent has that axis.
    """
    import xarray

    data = tree["prior_sbc"].dataset
    chosen = [v for v in data.data_vars.values() if dim in v.dims]
    if not chosen or dim in ("chain", "draw"):
        axes = sorted({str(d) for d in data.dims} - {"chain", "draw"})
        raise BadInput("dim", expected=f"one of {axes}", got=repr(dim), fix="Name an axis of z.")
    lead = [v.isel(chain=0).transpose("draw", dim, ...).values for v in chosen]
    values = np.concatenate([v.reshape(*v.shape[:2], -1) for v in lead], -1)
    p = np.array([[p_value(c) for c in place.T] for place in values.swapaxes(0, 1)])
    worst = p.argmin(1)
    smallest = np.minimum(1.0, p.shape[1] * p.min(1))
    moments = _moments(values[:, np.arange(len(p)), worst])
    fields = {"p_value": smallest, "rejected": _holm(smallest, alpha), **moments}
    result = xarray.Dataset(
        {n: (dim, v) for n, v in fields.items()}, coords={dim: data[dim].values}
    )
    calibrated = int(not fields["rejected"].any())
    result.attrs = {**tree.attrs, "problems": len(values), "alpha": alpha, "calibrated": calibrated}
    return result


def columns(tree: DataTree) -> dict[str, Array]:
    """Values by scalar quantity, site[0], site[1], ..., one for each problem."""
    found: dict[str, Array] = {}
    for name, variable in tree["prior_sbc"].dataset.data_vars.items():
        flat = variable.values.reshape(variable.shape[1], -1)
        axes = variable.dims[2:]
        places = variable[axes[0]].values if len(axes) == 1 else range(flat.shape[1])
        for place, column in zip(places, flat.T, strict=True):
            found[f"{name}[{place}]" if flat.shape[1] > 1 else str(name)] = column
    return found


def _quantities(lat: Latents, chunk: Chunk) -> dict[str, Any]:
    """What is ranked, each (1 + L, B, ...)."""
    found = {n: v.double() for n, v in chunk.z.items()}
    found["log_joint"] = lat.log_joint(chunk.z, chunk.x)
    u = lat.pack(chunk.z)[0].double()
    if lat.size > 1:
        found["neighbours"] = u[..., 1:] * u[..., :-1]
    return found


def _holm(p: Array, alpha: float) -> Array:
    """Which hypotheses are rejected with family-wise error alpha."""
    order, rejected = np.argsort(p), np.zeros(len(p), bool)
    for place, k in enumerate(order):
        if p[k] > alpha / (len(p) - place):
            break
        rejected[k] = True
    return rejected


def _moments(values: Array) -> dict[str, Array]:
    """Mean and sd of values (problems, N) against those of uniform numbers."""
    return {"shift": values.mean(0) - 0.5, "spread": values.std(0) * np.sqrt(12)}


@lru_cache(maxsize=8)
def _null(n: int) -> tuple[Array, Array]:
    """Log of the two-sided tail for each point and count, and the statistic of uniform samples."""
    from scipy.stats import binom

    at = np.arange(1, n)[:, None] / n
    count = np.arange(n + 1)[None]
    low, high = binom.cdf(count, n, at), binom.sf(count - 1, n, at)
    tail = np.minimum(1.0, 2 * np.minimum(low, high))
    rng = np.random.default_rng(0)
    sizes = [_statistic(rng.uniform(size=n), tail) for _ in range(NULL)]
    return tail, np.sort(sizes)


def _statistic(values: Array, tail: Array) -> float:
    n = len(values)
    counts = np.bincount(np.minimum((values * n).astype(int), n - 1), minlength=n)
    below = counts.cumsum()[:-1]
    return float(tail[np.arange(n - 1), below].min())


def p_value(values: Array) -> float:
    """Probability that uniform numbers, (problems,), look less uniform than these.

    Raises:
        BadInput: fewer than 20 problems.
    """
    if len(values) < 20:
        raise BadInput("problems", expected="at least 20", got=str(len(values)), fix="Use 500.")
    tail, null = _null(len(values))
    found = _statistic(values, tail)
    simulated = (1 + np.searchsorted(null, found, "right")) / (NULL + 1)
    return float(min(simulated, found * (len(values) - 1)))  # the union bound, for tiny values
