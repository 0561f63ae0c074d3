"""Simulation-based calibration: is a guide right on average over the model's own observations?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference.errors import BadInput, Incompatible
from inference.guide import Guide, check_counts
from inference.latents import Latents, ModelLike, Values
from inference.observation import Observation, take
from inference.progress import bar
from inference.seeds import stream

from .draws import tree_of

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["sbc", "sbc_test"]

Array = np.ndarray[Any, Any]
CHUNK = 50  # problems drawn for at once
CIRCUIT_THIN = 10  # kept: every tenth draw of a guide whose draws are correlated
NULL = 10_000  # simulated experiments behind a p-value


def sbc(
    model: ModelLike,
    guide: Guide,
    *,
    problems: int = 500,
    draws: int = 99,
    thin: int | None = None,
    seed: int,
    progress: bool = True,
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

    Returns:
        Group `prior_sbc` for `arviz_plots.plot_ecdf_pit`: by latent site, and for `log_joint` and
        `neighbours`, values (rank + u) / (L + 1) in [0, 1], dims (chain, draw, ...), one chain with
        a draw for each problem.

    Raises:
        Incompatible: the guide has parameters for each problem, or the model cannot be simulated.
        BadInput: a count is below 1.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al.,
        2018), algorithm 2 https://arxiv.org/abs/1804.06788
        Simulation-Based Calibration Checking for Bayesian Computation (Modrak et al., 2023), for
        the joint quantities https://arxiv.org/abs/2211.02383
    """
    step = thin or (1 if guide.independent else CIRCUIT_THIN)
    check_counts(problems=problems, draws=draws, thin=step)
    lat = guide.latents
    if not guide.amortised:
        raise Incompatible(
            type(guide).__name__,
            expected="a guide that answers for any x",
            got="one with parameters for each problem",
            fix="Use an amortised guide, or compare it with the exact posterior.",
        )
    rng = np.random.default_rng(stream(seed, 2))
    found: dict[str, list[Array]] = {}
    with bar("SBC", -(-problems // CHUNK), show=progress) as advance:
        for k, (z, x) in enumerate(_problems(lat, problems, seed)):
            drawn = guide.draw(x, draws=draws * step, chains=1, seed=stream(seed, 1, k)).values
            kept = {n: v[0, step - 1 :: step] for n, v in drawn.items()}
            for name, pit in _pit(lat, z, kept, x, rng).items():
                found.setdefault(name, []).append(pit)
            advance()
    arrays = {n: np.concatenate(v)[None] for n, v in found.items()}
    names = {n: list(axes) for n, axes in getattr(model, "dims", {}).items() if n in arrays}
    tree = tree_of({"prior_sbc": arrays}, lat, names)
    tree.attrs = {
        "model": str(getattr(model, "title", type(model).__name__)),
        "guide": type(guide).__name__,
        "seed": seed,
        "draws": draws,
        "thin": step,
    }
    return tree


def sbc_test(tree: DataTree, *, alpha: float = 0.05) -> Dataset:
    """Is any quantity's rank not uniform? Simultaneous ECDF test, Holm over the quantities.

    The statistic is the smallest two-sided binomial tail of the ECDF over its points, compared with
    10,000 simulated uniform samples of the same size; where it is smaller than all of theirs, the
    union bound over the points is a valid p-value.

    Args:
        tree: from :func:`sbc`.
        alpha: probability of rejecting some quantity of a right guide.

    Returns:
        By quantity: `p_value`, `rejected` and `shift`, the mean of the values less a half: positive
        where the guide's draws are too small. Attribute `calibrated`: nothing was rejected.

    References:
        Graphical test for discrete uniformity (Säilynoja et al., 2022)
        https://doi.org/10.1007/s11222-022-10090-6
    """
    import xarray

    columns: dict[str, Array] = {}
    for name, variable in tree["prior_sbc"].dataset.data_vars.items():
        flat = variable.values.reshape(variable.shape[1], -1)
        for k, column in enumerate(flat.T):
            columns[f"{name}[{k}]" if flat.shape[1] > 1 else str(name)] = column
    p = np.array([_p_value(c) for c in columns.values()])
    order, rejected = np.argsort(p), np.zeros(len(p), bool)
    for place, k in enumerate(order):
        if p[k] > alpha / (len(p) - place):
            break
        rejected[k] = True
    shift = np.array([c.mean() - 0.5 for c in columns.values()])
    fields = {"p_value": p, "rejected": rejected, "shift": shift}
    found = xarray.Dataset(
        {n: ("quantity", v) for n, v in fields.items()}, coords={"quantity": list(columns)}
    )
    found.attrs["calibrated"] = int(not rejected.any())
    return found


def _problems(lat: Latents, n: int, seed: int) -> Iterator[tuple[Values, Observation]]:
    """Draws from the joint in chunks; one at a time where a data set is one problem."""
    z, x = lat.joint(n, seed=stream(seed, 0))
    step = CHUNK if lat.plated else 1
    for i in range(0, n, step):
        rows = slice(i, i + step)
        piece = take(x, rows)
        if not lat.plated:
            piece = tuple(t[0] for t in piece) if isinstance(piece, tuple) else piece[0]
        yield {name: v[rows] for name, v in z.items()}, piece


def _pit(
    lat: Latents, z: Values, drawn: Values, x: Observation, rng: np.random.Generator
) -> dict[str, Array]:
    """(rank + u) / (L + 1) of z (B, *shape) among drawn (L, B, *shape), by quantity."""
    found = {}
    with torch.no_grad():
        truth, others = (
            _quantities(lat, v, x) for v in ({n: v[None] for n, v in z.items()}, drawn)
        )
    for name, value in truth.items():
        below = (others[name] < value).sum(0).numpy()
        ties = (others[name] == value).sum(0).numpy()
        rank = below + np.floor(rng.uniform(size=below.shape) * (ties + 1))
        found[name] = (rank + rng.uniform(size=rank.shape)) / (len(others[name]) + 1)
    return found


def _quantities(lat: Latents, z: Values, x: Observation) -> dict[str, Tensor]:
    """What is ranked, each (S, B, ...), on the CPU."""
    found = {n: v.double() for n, v in z.items()}
    found["log_joint"] = lat.log_joint(z, x)
    u = lat.pack(z)[0].double()
    if lat.size > 1:
        found["neighbours"] = u[..., 1:] * u[..., :-1]
    return {n: v.cpu() for n, v in found.items()}


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


def _p_value(values: Array) -> float:
    if len(values) < 20:
        raise BadInput("problems", expected="at least 20", got=str(len(values)), fix="Use 500.")
    tail, null = _null(len(values))
    found = _statistic(values, tail)
    simulated = (1 + np.searchsorted(null, found, "right")) / (NULL + 1)
    return float(min(simulated, found * (len(values) - 1)))  # the union bound, for tiny values
