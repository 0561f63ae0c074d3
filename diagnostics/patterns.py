"""Does a circuit dream what it sees? Patterns of activity given observations, and without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference.errors import BadInput, Incompatible
from inference.guide import Guide
from inference.latents import Latents, ModelLike, Values
from inference.observation import Observation
from inference.seeds import stream
from inference.show import title_of

from .draws import array, beside
from .style import labels_of

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["wake_sleep_patterns"]

Array = np.ndarray[Any, Any]
FIRST, MOST = 8, 12  # neurons by default, and at most: 2^12 patterns
FLOORS, BOOTSTRAPS = 20, 200
PRIOR = 0.5  # count added to each pattern: Jeffreys' prior
WAKE, SLEEP, AGAIN = 0, 1, 2  # streams of the seed


def wake_sleep_patterns(
    model: ModelLike,
    guide: Guide,
    x: Observation,
    *,
    neurons: Sequence[int] | None = None,
    threshold: float | None = None,
    seed: int,
) -> Dataset:
    """KL(wake || sleep) between frequencies of patterns of activity, against its floor.

    Packed latents are neurons, active above a threshold. Awake, the guide answers for each row of
    x once; asleep, the model dreams as many latents from its prior. Averaged over the x that the
    model makes, the exact posterior is the prior, so patterns have the same frequencies, and the
    divergence is at its floor: that of other dreams, as many, from the same ones. More than three
    standard errors above it lie guides that lose or add correlations, and models that do not fit
    the x they are shown.

    The converse does not hold: a guide that ignores x and draws from the prior is at the floor.

    Args:
        model: the model, each row of whose x is a problem.
        guide: any guide of it, the exact posterior included.
        x: observation of B problems, the more the better: the floor is about (2^n - 1) / B nats.
        neurons: places of n <= 12 of the packed latents, counted from 0; by default the first
            eight.
        threshold: of packed latents; by default, for each neuron, what comes nearest to half of its
            dreams being active: their median if they are continuous.
        seed: everything depends on it alone.

    Returns:
        `value` in nats; `se`, its standard error by bootstrap over problems and dreams, at the
        floor almost twice too large; `floor`, the mean of 20 sets of other dreams; `wake` and
        `sleep` (pattern), shares of the B draws; `threshold` (neuron). Coordinates `pattern`, such
        as "011", in the order of `neuron`, and `active`, how many of its neurons are.

    Raises:
        BadInput: x, neurons or the threshold are not what they should be.
        Incompatible: the data set is one problem, or the model cannot be simulated.

    References:
        Spontaneous cortical activity reveals hallmarks of an optimal internal model of the
        environment (Berkes, Orban, Lengyel & Fiser, 2011) https://doi.org/10.1126/science.1195870
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2020), for patterns
        of a recognition network awake and asleep https://arxiv.org/abs/2006.10811

    Differences:
        Neurons are latents of a model, not electrodes. Half a count is added to each pattern, and
        the bias is not subtracted but shown, as the floor.

    Example:
        >>> import zoo
        >>> from diagnostics.patterns import wake_sleep_patterns
        >>> model = zoo.ExplainingAway()
        >>> x = model.simulate(4000, seed=1)[1]
        >>> found = wake_sleep_patterns(model, model.exact(), x, seed=0)
        >>> bool(found["value"] < found["floor"] + 3 * found["se"])
        True
    """
    lat = guide.latents
    x = beside(guide, x)
    lat.check(x)
    if not lat.plated:
        raise Incompatible(
            "model", expected="problems of their own, one for each row of x",
            got="a data set that is one problem", fix="diagnostics.compare compares posteriors.",
        )  # fmt: skip
    chosen = _chosen(neurons, lat.size)
    n = lat.problems(x)
    drawn = guide.draw(x, draws=1, chains=1, seed=stream(seed, WAKE)).values
    awake = _packed(lat, {name: v[0, 0] for name, v in drawn.items()})[:, chosen]
    dreams = [
        _packed(lat, lat.joint(n, seed=stream(seed, SLEEP, k))[0])[:, chosen]
        for k in range(FLOORS + 1)
    ]
    limits = _middle(dreams[0]) if threshold is None else _given(threshold, len(chosen))
    wake, sleep, *others = (_counts(z > limits) for z in (awake, *dreams))
    found = _summary(wake, sleep, np.stack(others), np.random.default_rng(stream(seed, AGAIN)))
    labels = labels_of(lat.splits)
    found = found.assign_coords(neuron=[labels[k] for k in chosen])
    found["threshold"] = "neuron", limits
    found.attrs = {
        "model": title_of(model),
        "guide": type(guide).__name__,
        "problems": n,
        "seed": seed,
    }
    return found


def _summary(wake: Array, sleep: Array, others: Array, rng: np.random.Generator) -> Dataset:
    """Divergence, its error and its floor, of counts (2^n,) and those of other dreams."""
    import xarray

    problems = wake.sum()
    again = [rng.multinomial(problems, c / problems, BOOTSTRAPS) for c in (wake, sleep)]
    bits = len(wake).bit_length() - 1
    names = [format(k, f"0{bits}b") for k in range(len(wake))]
    return xarray.Dataset(
        {
            "value": _divergence(wake, sleep),
            "se": _divergence(*again).std(ddof=1),
            "floor": _divergence(others, sleep).mean(),
            "wake": ("pattern", wake / problems),
            "sleep": ("pattern", sleep / problems),
        },
        coords={"pattern": names, "active": ("pattern", [name.count("1") for name in names])},
    )


def _chosen(neurons: Sequence[int] | None, latents: int) -> list[int]:
    """Places of neurons, if there are such."""
    found = list(range(min(FIRST, latents)) if neurons is None else neurons)
    if not 1 <= len(found) <= MOST or len({*found} & {*range(latents)}) < len(found):
        raise BadInput(
            "neurons", expected=f"1 to {MOST} different places from 0 to {latents - 1}",
            got=str(found), fix="neurons=range(4) takes the first four.",
        )  # fmt: skip
    return found


def _given(threshold: float, neurons: int) -> Array:
    if not np.isfinite(threshold):
        raise BadInput(
            "threshold", expected="a finite number", got=repr(threshold), fix="Leave it out."
        )
    return np.full(neurons, float(threshold))


def _packed(lat: Latents, z: Values) -> Array:
    """Latents (B, *shape) as (B, D)."""
    return array(lat.pack(z)[0]).astype(np.float64)


def _middle(z: Array) -> Array:
    """A threshold for each neuron (B, n) that leaves about half of the draws above it.

    Where many draws are equal to the median, as of binary latents, that may lie below it.
    """
    middle = np.median(z, 0)
    above, with_it = (z > middle).mean(0), (z >= middle).mean(0)
    lower = np.where(z < middle, z, -np.inf).max(0)
    nearer = with_it + above < 1  # to a half is the share of those with the median
    return np.where(nearer, (lower + middle) / 2, middle)


def _counts(active: Array) -> Array:
    """How often each pattern occurs (2^n,) in draws (B, n), the first neuron's bit the highest."""
    n = active.shape[1]
    return np.bincount(active @ (1 << np.arange(n)[::-1]), minlength=1 << n)


def _divergence(wake: Array, sleep: Array) -> Array:
    """KL(wake || sleep) in nats of counts (..., 2^n)."""
    p, q = ((c + PRIOR) / (c + PRIOR).sum(-1, keepdims=True) for c in (wake, sleep))
    found: Array = (p * np.log(p / q)).sum(-1)
    return found
