"""What pictures of a circuit show: its score beside the true one, and its way from an onset on.

Coordinates are packed latents, in which a circuit moves; they are the latents themselves wherever
these are real numbers.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from inference.costs import Entropic
from inference.errors import Diverged, Incompatible
from inference.guide import Draws, Guide, HasNoiseLevels, HasScore, check_counts
from inference.latents import ModelLike
from inference.objective import Objective
from inference.objectives.oscillating import Oscillating
from inference.observation import Observation

from .draws import array, beside, packed
from .oscillations import ALTERNATION, oscillations
from .refinement import HasRefinement, recorded
from .reliability import accounted, is_priced
from .signature_fits import MIN_POINTS
from .signatures import oscillation_against_surprise
from .view import AXES, View, places, single, view, view_of

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["HasTrajectory", "score_field", "trajectories", "watch"]

POINTS = 1000  # reference draws at which scores are compared
RUNS = 8  # onsets that are followed
LEVELS = (1.0, 0.4, 0.15)  # noise levels at which the score is shown, too


@runtime_checkable
class HasTrajectory(Protocol):
    """A circuit that can be watched."""

    def trajectory(self, x: Observation, *, runs: int, seed: int) -> Draws:
        """Draws that are steps, from the onset of x on, with `time` and `noise` in `stats`."""


def score_field(
    model: ModelLike,
    guide: Guide,
    x: Observation,
    *,
    problem: int = 0,
    reference: Guide | None = None,
    draws: int = POINTS,
    seed: int = 0,
) -> Dataset:
    """A guide's score beside the true one, d log p(x, u) / du, for one problem.

    The relative error is sqrt(E |s_q - s_p|^2 / E |s_p|^2) over reference draws, with each latent
    in units of its posterior sd.

    Args:
        model: the model.
        guide: a guide with a score, such as a reservoir sampler.
        x: observation of B problems.
        problem: which of them.
        reference: whose draws show where the posterior is; by default the exact posterior's, and
            the guide's own where there is none.
        draws: number of these draws.
        seed: of the draws.

    Returns:
        At `points` (point, packed) the scores `model` and `guide`; `relative_error`, and
        `error_by_latent` (packed), each with `_se`. For one or two latents, on a grid (across) or
        (up, across): `density`, relative to its largest value, `model_field` and `guide_field`. Of
        guides with noise levels, too, the same at each `level` of noise, in units of the linear
        guess: `blurred_density`, `blurred_model`, `blurred_guide`, and `blurred_error` (level). The
        attribute `noise` is the level at which all else is.

    Raises:
        BadInput: no such problem, or x or `draws` is wrong.
        Incompatible: the guide has no score, or autograd cannot differentiate the model.
    """
    _needs(guide, HasScore, "a guide with a score, d log q / du")
    knobs: dict[str, Any] = {"reference": reference, "draws": draws, "seed": seed}
    return _scores(view(guide, x, problem, model=model, **knobs))


def trajectories(
    guide: Guide,
    x: Observation,
    *,
    problem: int = 0,
    runs: int = RUNS,
    reference: Guide | None = None,
    draws: int = POINTS,
    seed: int = 0,
) -> Dataset:
    """What a circuit does from the onset of a stimulus on, in a few runs.

    Args:
        guide: a circuit, such as a reservoir sampler; its `sampling` says how it is run.
        x: observation of B problems.
        problem: which of them.
        runs: onsets, each with noise of its own.
        reference: whose draws show where the posterior is; see :func:`score_field`.
        draws: number of these draws.
        seed: of runs and draws.

    Returns:
        `u` (run, step, packed), `time` in time constants and `noise` (step), `rates` (step, neuron)
        of the first run, `points` (point, packed) and, for one or two latents, `density` on a grid.

    Raises:
        BadInput: no such problem, or x or a count is wrong.
        Incompatible: the guide is no circuit that can be watched.
    """
    check_counts(runs=runs)
    _needs(guide, HasTrajectory, "a circuit with a trajectory")
    found = view(guide, x, problem, reference=reference, draws=draws, seed=seed)
    return _paths(found, runs, seed)


def watch(
    tree: DataTree,
    guide: Guide,
    x: Observation,
    *,
    reference: DataTree,
    problem: int = 0,
    seed: int,
    objective: Objective | None = None,
) -> None:
    """Add what there is to see of a circuit to its draws, each group where it applies.

    The groups are `score_field`, `trajectory`, `refinement` and `reliability`: what
    :func:`score_field`, :func:`trajectories`, :func:`diagnostics.refinement` and
    :func:`diagnostics.reliability` return, the latter with the entropic cost; and `oscillation`,
    after an oscillating game: :func:`diagnostics.oscillation_against_surprise`.

    Args:
        tree: of the guide, for the same x; gets the groups.
        guide: any guide.
        x: observation of B problems.
        reference: draws of the exact posterior.
        problem: the one that is looked at.
        seed: of the runs.
        objective: what the guide was trained with.
    """
    import xarray

    if isinstance(guide, HasScore):
        with suppress(Incompatible):  # autograd cannot differentiate the model
            found = _scores(view_of(guide, x, reference, problem))
            tree["score_field"] = xarray.DataTree(found)
    if isinstance(guide, HasTrajectory):
        with suppress(Diverged):  # no noise can be injected into fewer neurons than outputs
            found = _paths(view_of(guide, x, reference, problem), RUNS, seed)
            tree["trajectory"] = xarray.DataTree(found)
    known = reference.get("evidence")
    evidence = None if known is None else known.dataset["log_evidence"].values
    surprise = np.empty(0) if evidence is None else -evidence
    if isinstance(objective, Oscillating) and len(surprise) >= MIN_POINTS:
        waves = oscillations(objective, guide, x, seed=seed)
        found = oscillation_against_surprise(waves, surprise, seed=seed, band=ALTERNATION)
        tree["oscillation"] = xarray.DataTree(found)
    if isinstance(guide, HasRefinement):
        found = recorded(guide, beside(guide, x), evidence, problem=problem, seed=seed)
        tree["refinement"] = xarray.DataTree(found)
    if is_priced(guide):
        found = accounted(guide, beside(guide, x), evidence, cost=Entropic(), seed=seed)
        sds = {"sd": packed(tree).std(1), "exact_sd": packed(reference).std(1)}
        found = found.assign({n: (("problem", "latent"), v) for n, v in sds.items()})
        tree["reliability"] = xarray.DataTree(found)


def _needs(guide: Any, protocol: Any, expected: str) -> None:
    if not (isinstance(guide, Guide) and isinstance(guide, protocol)):
        raise Incompatible(
            "guide", expected=expected, got=getattr(guide, "__name__", type(guide).__name__),
            fix="Use a circuit, such as ReservoirSampler(model).",
        )  # fmt: skip


# --------------------------------------------------------------------------------------- scores


def _scores(seen: View) -> Dataset:
    import xarray

    points = _some(seen.points)
    learned, true = _learned(seen, points), seen.true_score(points)
    at = ("point", "packed")
    fields: dict[str, Any] = {
        "points": (at, array(points)),
        "model": (at, array(true)),
        "guide": (at, array(learned)),
        **_errors(points, learned, true),
    }
    found = xarray.Dataset(fields, coords={"packed": seen.labels})
    if isinstance(seen.guide, HasNoiseLevels):
        found.attrs["noise"] = seen.guide.noise[0]
    return found.merge(_fields(seen)) if seen.latents.size <= len(AXES) else found


def _some(points: Tensor) -> Tensor:
    """POINTS at most, at even distances, so that every chain is in."""
    return points[:: -(-len(points) // POINTS)]


def _learned(seen: View, u: Tensor) -> Tensor:
    """The guide's own score at u (..., D)."""
    z = seen.latents.unpack(u.flatten(0, -2)[:, None])[0]
    with torch.no_grad():
        return cast(HasScore, seen.guide).score(z, seen.x).reshape(u.shape)


def _errors(points: Tensor, learned: Tensor, true: Tensor) -> dict[str, Any]:
    """Relative errors of all latents and of each, with standard errors by the delta method."""
    sd = points.double().std(0)
    wrong, size = (array((sd * s.double()).square()) for s in (learned - true, true))
    kept = np.isfinite(wrong).all(1)
    wrong, size = wrong[kept], size[kept]
    every, each = _ratio(wrong.sum(1), size.sum(1)), _ratio(wrong, size)
    return {
        "relative_error": every[0],
        "relative_error_se": every[1],
        "error_by_latent": ("packed", each[0]),
        "error_by_latent_se": ("packed", each[1]),
    }


def _ratio(a: Any, b: Any) -> tuple[Any, Any]:
    """sqrt(mean a / mean b) over independent rows, and its standard error."""
    square = a.mean(0) / b.mean(0)
    value = np.sqrt(square)
    se = (a - square * b).std(0, ddof=1) / np.sqrt(len(a)) / b.mean(0)
    return value, np.divide(se, 2 * value, out=np.zeros_like(value), where=value > 0)


def _fields(seen: View) -> Dataset:
    """Density and scores on a grid of one or two latents."""
    import xarray

    grid = seen.grid()
    u, axes = places(grid), tuple(grid)
    density = seen.density(grid)
    fields: dict[str, Any] = {
        "density": (axes, single(density)),
        "model_field": ((*axes, "packed"), single(seen.true_score(u))),
        "guide_field": ((*axes, "packed"), single(_learned(seen, u))),
    }
    coords: dict[str, Any] = {name: array(line) for name, line in grid.items()}
    if levels := _levels(seen.guide):
        found = [_blurred(seen, u, density, sigma) for sigma in levels]
        tails = {
            "density": axes,
            "model": (*axes, "packed"),
            "guide": (*axes, "packed"),
            "error": (),
        }
        for name, dims in tails.items():
            values = single(torch.stack([f[name] for f in found]))
            fields[f"blurred_{name}"] = (("level", *dims), values)
        coords["level"] = list(levels)
    return xarray.Dataset(fields, coords=coords)


def _levels(guide: Guide) -> tuple[float, ...]:
    """Noise levels to show beside the smallest."""
    if not isinstance(guide, HasNoiseLevels) or bool(guide.single_level):
        return ()
    low, high = guide.noise
    return tuple(level for level in LEVELS if low < level <= high)


def _blurred(seen: View, u: Tensor, density: Tensor, sigma: float) -> dict[str, Tensor]:
    """Density, true and learned score of noisy latents at the grid u (..., D), and the error.

    The noise is spread by a sum over the grid, so that of the posterior only what is outside the
    grid is missed. The true score is (E[y | noisy y] - noisy y) / sigma^2.
    """
    guide = cast(HasNoiseLevels, seen.guide)

    def whiten(v: Tensor) -> Tensor:
        return guide.whiten(seen.latents.unpack(v[:, None])[0], seen.x)[:, 0]

    with torch.no_grad():
        # y is linear in u, so that one matrix pulls all gradients in y back to u
        y, back = torch.func.vjp(whiten, u.flatten(0, -2))[:2]
        near = density.flatten().log() - 0.5 * (torch.cdist(y, y) / sigma).square()
        height = near.logsumexp(1).reshape(u.shape[:-1])
        height = (height - height.max()).exp()
        true, own = (
            back(s)[0].reshape(u.shape)
            for s in (
                (near.softmax(1) @ y - y) / sigma**2,
                guide.smoothed_score(y, seen.x, y.new_full((len(y),), sigma)),
            )
        )
    sd = seen.points.std(0)
    wrong, size = ((height[..., None] * (sd * s).square()).sum() for s in (own - true, true))
    return {"density": height, "model": true, "guide": own, "error": (wrong / size).sqrt()}


# ----------------------------------------------------------------------------------------- paths


def _paths(seen: View, runs: int, seed: int) -> Dataset:
    import xarray

    found = cast(HasTrajectory, seen.guide).trajectory(seen.x, runs=runs, seed=seed)
    u = seen.latents.pack(found.values)[0][:, :, 0]
    fields: dict[str, Any] = {
        "u": (("run", "step", "packed"), array(u)),
        "points": (("point", "packed"), array(_some(seen.points))),
        **{name: ("step", array(t[0, :, 0])) for name, t in found.stats.items()},
    }
    if "rates" in found.circuit:
        rates = found.circuit["rates"][0, :, 0].flatten(1)
        fields["rates"] = (("step", "neuron"), single(rates))
    coords: dict[str, Any] = {"packed": seen.labels}
    if seen.latents.size <= len(AXES):
        grid = seen.grid()
        fields["density"] = (tuple(grid), single(seen.density(grid)))
        coords |= {name: array(line) for name, line in grid.items()}
    return xarray.Dataset(fields, coords=coords)
