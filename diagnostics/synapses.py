"""The signature of synapses: how reliable each is, against what it is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.costs import MECHANISMS
from inference.errors import BadInput, lookup

from .signature_fits import Array, dataset, fit_slope, logarithm

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["MECHANISMS", "predicted_slope", "synaptic_variance"]

# slope of log variance on the log of each predictor, times rho + 2 (Malkin et al., 2024, equations
# 28 and 54)
NUMERATORS = {
    "rate": -2.0,
    "mean_square_rate": -2.0,
    "curvature": -2.0,
    "learning_rate": 4.0,
    "posterior_variance": 2.0,
}


def predicted_slope(predictor: str, rho: float) -> float:
    """Slope of log synaptic variance on a log predictor if reliability costs sigma^-rho.

    For `rate`, the mean of |x|, it holds where the mean square of the input is proportional to it,
    as of inputs that are on or off; where inputs differ by a factor, it is twice as steep.

    Raises:
        BadInput: an unknown predictor, or rho is not above 0.
    """
    if not rho > 0:
        raise BadInput("rho", expected="a number > 0", got=str(rho), fix="See MECHANISMS.")
    return lookup(NUMERATORS, predictor, "predictor") / (rho + 2)


def synaptic_variance(
    synapses: Dataset, *, mechanisms: Mapping[str, float] = MECHANISMS, seed: int
) -> Dataset:
    """Do synapses vary as if reliability were costly? Slopes of log variance on log predictors.

    Noise in a predictor flattens its slope. In deep networks expect the signs and the order of the
    slopes, not their values.

    Args:
        synapses: `variance` of each synapse, and any of the predictors `rate` (mean |x|),
            `mean_square_rate`, `learning_rate`, `posterior_variance` (mean field: 1 / Lambda_ii)
            and `curvature`, all of the same dims, positive, in any units.
        mechanisms: exponents rho by name; {"mine": 0.9} compares with one of your own.
        seed: of the bootstrap, over synapses.

    Returns:
        By predictor: `value` (the slope), `low`, `high` (95 %), `se`, `intercept`, `r`; by
        (predictor, mechanism): `predicted`, and `accepted`, whether it is in the interval.

    Raises:
        BadInput: a variable is missing, has other dims or is not positive, or there are fewer than
            five synapses.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), eqs. 28 and 54 https://doi.org/10.7554/eLife.92595
    """
    there = [n for n in NUMERATORS if n in synapses.data_vars]
    if "variance" not in synapses.data_vars or not there:
        raise BadInput(
            "synapses",
            expected=f"variables 'variance' and any of {list(NUMERATORS)}",
            got=str(sorted(str(n) for n in synapses.data_vars)),
            fix="xarray.Dataset({'variance': ('synapse', sd**2), 'rate': ('synapse', rate)}).",
        )
    columns = [_column(synapses, name) for name in there]
    y = _column(synapses, "variance")
    lines = [asdict(fit_slope(x, y, seed=seed)) for x in columns]
    fields: dict[str, Any] = {f: ("predictor", [k[f] for k in lines]) for f in lines[0]}
    law = np.array([[predicted_slope(n, rho) for rho in mechanisms.values()] for n in there])
    low, high = (np.array([k[end] for k in lines])[:, None] for end in ("low", "high"))
    both = ("predictor", "mechanism")
    fields |= {"predicted": (both, law), "accepted": (both, (low <= law) & (law <= high))}
    return dataset(
        fields,
        {"predictor": there, "mechanism": list(mechanisms)},
        measured=f"slope of log variance on log predictor, {len(y)} synapses",
        units="1",
        source="https://doi.org/10.7554/eLife.92595",
        reason="" if np.ptp(y) > 0 else "r is NaN, for the variance is the same everywhere",
    )


def _column(synapses: Dataset, name: str) -> Array:
    """The logarithm of a variable, one number per synapse."""
    variable, dims = synapses[name], synapses["variance"].dims
    if set(variable.dims) != set(dims):
        expected, fix = f"dims {dims}, as the variance has", "Broadcast it to all synapses."
        raise BadInput(name, expected=expected, got=str(variable.dims), fix=fix)
    return logarithm(name, variable.transpose(*dims).values.ravel())
