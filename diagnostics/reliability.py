"""What it costs a circuit to be reliable, and whether it varies where the posterior is unsure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference.costs import MECHANISMS, Cost
from inference.errors import BadInput, Incompatible, lookup
from inference.guide import Guide, HasEvidence, HasNoise, check_counts
from inference.objectives.reliability import ReliabilityCost
from inference.observation import Observation
from inference.seeds import seeded, stream

from . import signature_fits as fits
from .draws import array, beside, packed
from .signature_fits import Array
from .synapses import predicted_slope
from .view import exact_of

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

__all__ = ["TERMS", "accounted", "is_priced", "reliability", "variability_against_uncertainty"]

DRAWS = 1000  # draws per problem: an error of the total of sqrt(D / 2000) nats, D latents
ROUNDS = 20  # independent parts of these, whose spread is the standard error
TERMS = ("performance", "magnitude", "reliability")  # whose sum is the total
DILUTED = 0.1  # share of noise in a predictor from which on a slope is not told
BAYES = {"entropic": 1.0}  # slope of the variances of noise that is the posterior's


def reliability(
    guide: Guide,
    x: Observation,
    *,
    cost: Cost,
    magnitude: str = "expected",
    draws: int = DRAWS,
    seed: int,
) -> Dataset:
    """The account of a noisy circuit: what it achieves, what it pays, how far that is from Bayes.

    In nats, with q the circuit's answer and s_i the sds of its noise:

        performance   E_q[-log p(x given z)]
        magnitude     E_q[-log p(z)], the cost of activity
        reliability   sum_i R(s_i)
        total         their sum
        slack         how far reliability is above minus the entropy of the noise
        elbo          slack - total, where the magnitude is the expected one
        log_evidence  log p(x)
        gap           log_evidence - elbo = KL(q || posterior)

    and the energy sum_i E(s_i), in units of the cost.

    Args:
        guide: with Gaussian noise; any cost may be asked of it, not only the one it was fitted to.
        x: observation of B problems.
        cost: R; with Entropic() the total is minus the ELBO.
        magnitude: "expected", or "mean", that of the mean latents; the ELBO has the expected one.
        draws: per problem, about.
        seed: of the draws.

    Returns:
        The above (problem), each with its Monte Carlo error `_se`, log_evidence and gap if the
        exact posterior knows log p(x); `noise` (problem, unit), the sds s_i. Where there is an
        exact posterior of these x, sds of latents: `sd` and `exact_sd` (problem, latent).

    Raises:
        BadInput: x, `magnitude` or `draws` is wrong.
        Diverged: noise has reached zero or infinity.
        Incompatible: the guide has no Gaussian noise.

    References:
        Sampling-based probabilistic inference emerges from learning in neural circuits with a cost
        on reliability (Aitchison, Hennequin & Lengyel, 2018) https://arxiv.org/abs/1807.08952
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equations 2-4 and 42-49 https://doi.org/10.7554/eLife.92595

    Example:
        >>> import inference, zoo
        >>> model = zoo.FactorAnalysis()
        >>> guide = inference.MeanFieldEncoder(model)
        >>> x = model.observations()[:2]
        >>> found = reliability(guide, x, cost=inference.PowerLaw("actin", scale=0.1), seed=0)
        >>> bool((found.slack > 0).all() and (found.gap > 0).all())
        True
    """
    if not (isinstance(guide, Guide) and isinstance(guide, HasNoise)):
        raise Incompatible(
            "guide", expected="a guide with Gaussian noise of known size",
            got=getattr(guide, "__name__", type(guide).__name__), fix=ReliabilityCost.remedy,
        )  # fmt: skip
    x = beside(guide, x)
    guide.latents.check(x)
    judge, evidence = exact_of(guide.model), None
    with torch.no_grad():
        if isinstance(judge, HasEvidence):
            evidence = array(judge.log_evidence(x))
    knobs: dict[str, Any] = {"cost": cost, "magnitude": magnitude, "draws": draws, "seed": seed}
    found = accounted(guide, x, evidence, **knobs)
    if judge is not None:
        with suppress(BadInput):  # stored draws are of the model's own observations
            sds = {"exact_sd": _sds(judge, x, draws, seed), "sd": _sds(guide, x, draws, seed)}
            return found.assign({n: (("problem", "latent"), v) for n, v in sds.items()})
    return found


def accounted(
    guide: Guide,
    x: Observation,
    evidence: Array | None,
    *,
    cost: Cost,
    magnitude: str = "expected",
    draws: int = DRAWS,
    seed: int,
) -> Dataset:
    """What :func:`reliability` returns, without sds of latents, with log p(x) (B,) known or not."""
    check_counts(least=2, draws=draws)
    rounds = min(ROUNDS, draws)
    asked = ReliabilityCost(cost, magnitude=magnitude, particles=-(-draws // rounds))
    bound = ReliabilityCost(cost, particles=asked.particles)
    parts = []
    with torch.no_grad():
        for k in range(rounds):
            now = _priced(asked, guide, x, (seed, k))
            expected = _priced(bound, guide, x, (seed, k)) if asked.at_mean else now
            parts.append(now | {"elbo": expected["slack"] - expected["total"]})
        assert isinstance(guide, HasNoise)
        noise = array(guide.noise(x))
    stacked = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    fields: dict[str, Any] = {}
    for name, values in stacked.items():
        fields[name] = ("problem", values.mean(0))
        fields[f"{name}_se"] = ("problem", values.std(0, ddof=1) / np.sqrt(rounds))
    if evidence is not None:
        known = evidence.astype(np.float64)
        fields["log_evidence"] = ("problem", known)
        fields["gap"] = ("problem", known - fields["elbo"][1])
        fields["gap_se"] = fields["elbo_se"]
    fields["noise"] = (("problem", "unit"), noise)
    return fits.dataset(
        fields,
        measured=f"account of a noisy circuit under {cost!r}",
        units="nats",
        source="https://doi.org/10.7554/eLife.92595",
        magnitude=magnitude,
        draws=rounds * asked.particles,
    )


def is_priced(guide: Guide) -> bool:
    """Whether a guide was published with an objective that is about its noise."""
    goal = guide.objective
    return goal is not None and goal.needs is HasNoise


def _priced(
    objective: ReliabilityCost, guide: Guide, x: Observation, key: tuple[int, ...]
) -> dict[str, Array]:
    """The terms and their sum, each (B,), in double precision."""
    with seeded(*key):
        terms = objective.terms(guide, x)
    found: dict[str, Array] = {n: array(t).astype(np.float64) for n, t in terms.items()}
    return found | {"total": sum((found[n] for n in TERMS), np.zeros(()))}


def _sds(guide: Guide, x: Observation, draws: int, seed: int) -> Array:
    """Sds of latents as they are drawn, (B, D)."""
    values = guide.draw(x, draws=draws, chains=1, seed=stream(seed, ROUNDS)).values
    return np.concatenate([array(v[0]).std(0).reshape(v.shape[2], -1) for v in values.values()], -1)


# --------------------------------------------------------------------------------------- signature


def variability_against_uncertainty(
    tree: DataTree,
    reference: DataTree | None = None,
    *,
    variance: Array | None = None,
    kind: str = "marginal",
    mechanisms: Mapping[str, float] = MECHANISMS,
    seed: int,
) -> Dataset:
    """Does a circuit vary where the posterior is unsure? Slope of log variance on log uncertainty.

    Over problems and latents together. If noise costs s^-rho and the loss is quadratic, noise is a
    compressed posterior: log s^2 = 2 / (rho + 2) log s_posterior^2 + const. With the entropic cost
    the slope is 1, and the noise is the posterior.

    What independent noise can match of a correlated posterior is "conditional" variance, that of
    each latent given all others, which is below the "marginal" one. Noise with correlations can
    match both.

    Args:
        tree: draws of a guide.
        reference: draws of the exact posterior for the same x; this or
        variance: uncertainty that is known otherwise, (problem, latent), such as 1 / Lambda_ii.
        kind: of variance of the reference draws, "marginal" or "conditional"; the latter is
            1 / (C^-1)_ii, C their covariance, which is right for Gaussians.
        mechanisms: exponents rho by name.
        seed: of the bootstrap, over problems and latents; see :func:`fit_slope`.

    Returns:
        `value` (the slope), `low`, `high` (95 %), `se`, `intercept`, `r`; by mechanism, the
        "entropic" one first, `predicted`, and `accepted`, whether it is in the interval; the points
        `variance` and `uncertainty` (problem, latent). `dilution` is the share of the spread of
        log uncertainty that is noise of the reference draws, by which the slope is flattened; where
        it is above a tenth there is nothing to follow, and values are NaN.

    Raises:
        BadInput: both or neither of reference and variance, an unknown kind, draws that are too few
            or of other problems and latents, a variance that is not above 0, or fewer than five
            points.

    References:
        Sampling-based probabilistic inference emerges from learning in neural circuits with a cost
        on reliability (Aitchison, Hennequin & Lengyel, 2018), the claim
        https://arxiv.org/abs/1807.08952
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equation 54c, the slopes https://doi.org/10.7554/eLife.92595
    """
    laws = BAYES | {n: predicted_slope("posterior_variance", rho) for n, rho in mechanisms.items()}
    own = _marginal(fits.checked("draws", packed(tree, discrete=False)))
    known, noise = _uncertainty(reference, variance, kind)
    if known.shape != own.shape:
        raise BadInput(
            "reference", expected=f"{own.shape[0]} problems of {own.shape[1]} latents",
            got=f"{known.shape[0]} of {known.shape[1]}", fix="Draw from both for the same x.",
        )  # fmt: skip
    x, y = (fits.logarithm(*v) for v in (("uncertainty", known), ("variance", own)))
    dilution = noise / np.var(x) if np.var(x) > 0 else np.inf
    line, told = fits.Slope(*[np.nan] * 6), dilution <= DILUTED
    if told:
        line = fits.fit_slope(x.ravel(), y.ravel(), seed=seed)
    at, what = ("problem", "latent"), f"{kind} variance of the exact posterior"
    inside = [line.low <= slope <= line.high for slope in laws.values()]
    return fits.dataset(
        asdict(line)
        | {"predicted": ("mechanism", list(laws.values())), "accepted": ("mechanism", inside)}
        | {"variance": (at, own), "uncertainty": (at, known), "dilution": dilution},
        {"mechanism": list(laws)},
        measured=f"slope of log variance on log {'uncertainty' if reference is None else what}",
        units="1",
        source="https://doi.org/10.7554/eLife.92595",
        reason="" if told else "the posterior is nearly as unsure of all latents and problems",
        kind="" if reference is None else kind,
    )


def _uncertainty(
    reference: DataTree | None, variance: Array | None, kind: str
) -> tuple[Array, float]:
    """Variances (problem, latent), and the mean square error of their logarithms."""
    find = lookup(VARIANCES, kind, "kind")
    if (reference is None) == (variance is None):
        got = "neither" if reference is None else "both"
        fix = "Pass draws of the exact posterior, or variances."
        raise BadInput("reference, variance", expected="one of them", got=got, fix=fix)
    if reference is None:
        return np.atleast_2d(fits.checked("variance", variance)), 0.0
    z = fits.checked("reference", packed(reference, discrete=False))
    half = z.shape[1] // 2
    fits.enough("half of the reference's draws", half, fits.MIN_COUNTS)
    first, second = (fits.logarithm("variance", find(v)) for v in (z[:, :half], z[:, half:]))
    return find(z), float(((first - second) ** 2).mean() / 4)


def _marginal(z: Array) -> Array:
    """Of draws (problem, draw, latent)."""
    found: Array = z.var(1, ddof=1)
    return found


def _conditional(z: Array) -> Array:
    """Of each latent given the others, as of the residuals of a regression on them."""
    n, d = z.shape[1:]
    fits.enough("half of the reference's draws", n, d + 2)
    c = z - z.mean(1, keepdims=True)
    precision = np.linalg.inv(np.swapaxes(c, 1, 2) @ c / (n - d))
    found: Array = 1 / np.diagonal(precision, axis1=1, axis2=2)
    return found


VARIANCES = {"marginal": _marginal, "conditional": _conditional}
