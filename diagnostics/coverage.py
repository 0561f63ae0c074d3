"""How often credible regions and balls hold the truth, over the model's own observations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference.arguments import Count, Index, Probability, check_call
from inference.errors import BadInput
from inference.guide import Guide, HasDensity
from inference.latents import Latents, ModelLike
from inference.observation import Observation, flatten
from inference.seeds import stream

from .calibration import columns
from .simulated import Chunk, Simulations, pit

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["HPD", "REFERENCES", "coverage", "tarp"]

Array = np.ndarray[Any, Any]
HPD = "joint HPD"  # name of the joint highest-density region in the table
INTERVALS = "intervals say little of discrete latents: see the joint HPD region"
REFERENCES = ("near", "beside")
POOL, SIDE = 3, 4  # streams of the seed
POOL_SIZE = 1000  # simulated problems among which the nearest observations are looked for
NEIGHBOURS = 50  # of them are near; they set the scale of distances
BESIDE = 2.0  # posterior sds along each axis from the near to the other reference
RIDGE = 1e-6  # added to variances in units of the prior's: neighbours may all be equal


def coverage(
    model: ModelLike,
    guide: Guide,
    *,
    problems: Count = 500,
    draws: Count = 99,
    levels: Sequence[Probability] = (0.5, 0.8, 0.9, 0.95),
    thin: Count | None = None,
    seed: Index,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Dataset:
    """Expected coverage: how often credible regions hold the latents that made x.

    Central (equal-tailed) intervals of each latent, and the joint region of highest density of q,
    which holds z* at level a if fewer than a share a of the draws have a larger q(z given x) than
    z* has. Both are read off ranks that are made continuous, (rank + u) / (L + 1): for a right
    guide they cover at exactly the nominal level, whatever the number of draws. The density is that
    of the latents in their own coordinates; that of discrete latents is their probability, with
    ties broken at random.

    A guide can cover and still be useless: the prior covers. Whether it is calibrated is for
    :func:`sbc` and :func:`tarp` to say; coverage says how far off it is.

    Args:
        model: the model; only those without factors can be simulated.
        guide: an amortised guide of it, the exact posterior included.
        problems: simulated observations.
        draws: L, nearly independent draws for each.
        levels: nominal, between 0 and 1.
        thin: keep every thin-th draw; by default 1, or 10 if the guide's draws are correlated.
        seed: everything depends on it alone.
        progress: show a bar.
        checkpoint: as in :func:`sbc`; other levels are no other settings.

    Returns:
        `coverage` (quantity, level), `se` (level), the binomial standard error at the nominal
        level, and `reason` (quantity), why a coverage is NaN: the intervals of a discrete latent,
        and the joint region of a guide without density. Attributes as of :func:`sbc`.

    Raises:
        Incompatible: the guide has parameters for each problem, or the model cannot be simulated.
        BadInput: a count is below 1, or a level is no number between 0 and 1.
        BadCheckpoint: the file is damaged or belongs to other settings.

    References:
        A Trust Crisis in Simulation-Based Inference? Your Posterior Approximations Can Be
        Unfaithful (Hermans et al., 2022), equation 2, for expected coverage
        https://arxiv.org/abs/2110.06581
    """
    check_call(coverage, locals())
    nominal = _checked(levels)
    simulations = Simulations(model, guide, problems, draws, thin, seed)

    def ranks(chunk: Chunk) -> dict[str, Array]:
        found = {n: pit(v.double(), chunk.rng) for n, v in chunk.z.items()}
        if isinstance(guide, HasDensity):
            found[HPD] = pit(-guide.log_prob(chunk.z, chunk.x), chunk.rng)
        return found

    tree = simulations.tree("coverage", ranks, progress=progress, checkpoint=checkpoint)
    return _table(tree, guide.latents, nominal)


def tarp(
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
    """Tests of accuracy with random points: ranks of the distance of z* from a point near it.

    The share of the draws that are nearer to a reference point r than z* is uniform for the
    posterior, whatever r(x) and the distance are, if neither has seen z*. If it is uniform for
    every r(x), the guide *is* the posterior; so r must depend on x, for otherwise the prior passes.
    It must not come from the guide, which would then choose its own test, nor be the mean of the
    draws, to which draws are nearer than z* is. Here r comes from other simulated problems:

    - "near": the latents of that one of 1,000 problems whose observation is nearest to x, roughly a
      draw from p(z given x). It sees widths, correlations and guides that do not look at x.
    - "beside": two sds from it along each axis, all in one direction that is the same in all
      problems. It sees bias, which is the same from all sides of "near".

    Distances are Euclidean once draws, z* and r have all been whitened by the (shrunk) covariance
    of the latents of the 50 nearest problems: a local z-score that the guide has no part in, where
    no latent and no direction of the posterior is lost among wider ones. Latents are packed, so
    unbounded; discrete ones enter as numbers. No density is needed. Ties are broken at random.

    Args:
        model: the model; only those without factors can be simulated.
        guide: an amortised guide of it, the exact posterior included.
        problems: simulated observations.
        draws: L, nearly independent draws for each.
        thin: keep every thin-th draw; by default 1, or 10 if the guide's draws are correlated.
        seed: everything depends on it alone.
        progress: show a bar.
        checkpoint: as in :func:`sbc`.

    Returns:
        Group `prior_sbc` for :func:`sbc_test` and `arviz_plots.plot_ecdf_pit`: `tarp` in [0, 1],
        dims (chain, draw, reference), one chain with a draw for each problem.

    Raises:
        Incompatible: the guide has parameters for each problem, or the model cannot be simulated.
        BadInput: a count is below 1.
        BadCheckpoint: the file is damaged or belongs to other settings.

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al.,
        2023), theorem 3 and algorithm 2 https://arxiv.org/abs/2302.03026

    Differences:
        The paper scales latents to the unit cube and takes uniform references; ranks are here
        tested by :func:`sbc_test` instead of compared with the diagonal by eye.
    """
    check_call(tarp, locals())
    simulations = Simulations(model, guide, problems, draws, thin, seed)
    balls = _Balls(guide.latents, seed)

    def ranks(chunk: Chunk) -> dict[str, Array]:
        return {"tarp": pit(balls.distances(chunk), chunk.rng)}

    dims = {"tarp": ["reference"]}
    tree = simulations.tree("TARP", ranks, progress=progress, checkpoint=checkpoint, dims=dims)
    named = tree["prior_sbc"].dataset.assign_coords(reference=list(REFERENCES))
    tree["prior_sbc"].dataset = named
    return tree


class _Balls:
    """Reference points and a metric for each x, from simulated problems that are no others' x."""

    def __init__(self, lat: Latents, seed: int) -> None:
        self.lat = lat
        z, x = lat.joint(POOL_SIZE, seed=stream(seed, POOL))
        u, features = _array(lat.pack(z)[0]), _features(x, POOL_SIZE)
        self.unit, self.feature_unit = _spread(u), _spread(features)
        self.latents, self.features = u / self.unit, features / self.feature_unit
        side = np.random.default_rng(stream(seed, SIDE)).normal(size=lat.size)
        self.side = BESIDE * np.sqrt(lat.size) * side / np.linalg.norm(side)

    def distances(self, chunk: Chunk) -> torch.Tensor:
        """Of z* and the draws from both references: (1 + L, B, 2)."""
        from scipy.spatial.distance import cdist

        u = _array(self.lat.pack(chunk.z)[0]) / self.unit
        x = _features(chunk.x, u.shape[1]) / self.feature_unit
        nearest = cdist(x, self.features).argsort(1, kind="stable")[:, :NEIGHBOURS]
        each = [self._from(u[:, b], self.latents[rows]) for b, rows in enumerate(nearest)]
        return torch.from_numpy(np.stack(each, 1))

    def _from(self, u: Array, near: Array) -> Array:
        """Distances of one problem's u (1 + L, D) from both references, (1 + L, 2)."""
        from scipy.linalg import solve_triangular
        from sklearn.covariance import ledoit_wolf

        covariance = ledoit_wolf(near)[0] + RIDGE * np.eye(near.shape[1])
        factor = np.linalg.cholesky(covariance)
        white = solve_triangular(factor, (u - near[0]).T, lower=True).T
        both = [np.linalg.norm(white - offset, axis=-1) for offset in (0.0, self.side)]
        return np.stack(both, -1)


def _checked(levels: Sequence[float]) -> Array:
    found = np.asarray(levels, dtype=float)
    if found.ndim != 1 or not len(found) or not ((found > 0) & (found < 1)).all():
        raise BadInput(
            "levels",
            expected="numbers between 0 and 1",
            got=repr(levels),
            fix="levels=(0.5, 0.9).",
        )
    return found


def _table(tree: DataTree, lat: Latents, levels: Array) -> Dataset:
    """Coverage by quantity and level, from ranks."""
    import xarray

    found = columns(tree)
    discrete = {s.name for s in lat.sites if s.discrete}
    reasons = {n: INTERVALS if n.split("[")[0] in discrete else "" for n in found}
    # 0 in the middle of the region, 1 at its edge
    depth = {n: v if n == HPD else 2 * np.abs(v - 0.5) for n, v in found.items()}
    held = {n: (v[:, None] < levels).mean(0) for n, v in depth.items()}
    held.setdefault(HPD, np.full(len(levels), np.nan))
    reasons.setdefault(HPD, "the guide has no density")
    values = [np.where(reasons[n] == "", v, np.nan) for n, v in held.items()]
    problems = tree["prior_sbc"].sizes["draw"]
    table = xarray.Dataset(
        {
            "coverage": (("quantity", "level"), np.array(values)),
            "se": ("level", np.sqrt(levels * (1 - levels) / problems)),
            "reason": ("quantity", [reasons[n] for n in held]),
        },
        coords={"quantity": list(held), "level": levels},
    )
    table.attrs = {**tree.attrs, "problems": problems}
    return table


def _array(t: torch.Tensor) -> Array:
    found: Array = t.detach().double().cpu().numpy()
    return found


def _features(x: Observation, problems: int) -> Array:
    return _array(flatten(x, problems))


def _spread(values: Array) -> Array:
    """Standard deviation by column; 1 for constants."""
    sd = values.std(0)
    return np.where(sd > 0, sd, 1.0)
