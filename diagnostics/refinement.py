"""What the belief of an iterative circuit is worth from step to step.

Free energy is counted in nats per problem, silence in neurons, reconstruction in R^2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from inference.beliefs import HasBeliefs, Moment
from inference.coding import Coding, Reader
from inference.errors import BadInput, Incompatible
from inference.guide import Guide, HasEvidence, check_counts
from inference.observation import Observation, parts
from inference.seeds import seeded

from .draws import array, beside
from .view import exact_of

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["HasRefinement", "recorded", "refinement"]

MOMENTS = 200  # steps that are measured
DRAWS, ENOUGH = 16, 256  # draws of a problem at most; of all problems together, if that allows
ROUNDING = 8  # spreads of x below so many units of rounding are none

Array = np.ndarray[Any, Any]
Fields = dict[str, tuple[Any, Any]]


@runtime_checkable
class HasRefinement(HasBeliefs, Protocol):
    """Beliefs that are refined step by step, about a model with a decoder.

    Attributes:
        reader: reads prior, decoder and noise off the model.
    """

    reader: Reader


def refinement(
    guide: Guide,
    x: Observation,
    *,
    problem: int = 0,
    steps: int | None = None,
    moments: int = MOMENTS,
    seed: int = 0,
) -> Dataset:
    """Follow a circuit's belief q_t from its start on: what it costs, shows and sends.

    Over problems of x the means, each with its standard error `_se` (NaN for one problem):

        free_energy   E_q[-log p(x given z)] + KL(q || prior), the negative ELBO / nats
        divergence    its second part / nats
        log_evidence  log p(x) / nats
        gap           free_energy + log_evidence = KL(q || posterior) / nats
        zeros         share of silent neurons, in draws of z from q
        r2            R^2 of what the decoder makes of one such draw, mean over problems
        r2_rates      the same of what it makes of the mean of q
        r2_pooled, r2_rates_pooled   R^2 over the pixels of all problems together

    The prior is always the model's, also where the circuit's own one rolls. R^2 is relative to the
    mean over pixels of each x itself; an x without contrast has none, and is left out. Where the
    decoder answers to no negative latent, these are silent, too. The expected energy is exact if
    the decoder is linear, and else a mean over the draws: 256 of all problems together, if up to 16
    of each are enough for that.

    Args:
        guide: a circuit that iterates, such as IterativePoisson. Of an amortised one, whose belief
            is there at once, one moment is seen, step 0.
        x: observation of B problems.
        problem: whose neurons are followed.
        steps: T; by default the guide's.
        moments: steps 0 to T are all measured if they are not more than this, and otherwise about
            so many, at equal ratios.
        seed: of spikes and draws. Measuring does not disturb the circuit's own spikes.

    Returns:
        The above over `moment`, `log_evidence` and `gap` if the exact posterior knows log p(x). Of
        the problem `rates`, the mean of q, and `signal`, what is sent (step, neuron); the attribute
        `signal` says what that is: spikes, draws or rates. `activity` (neuron), the mean size of
        rates at the end, over all problems. Of linear decoders `dictionary` (neuron, pixel), with
        the attribute `image_shape` if the model has one.

    Raises:
        BadInput: no such problem, or x, `steps` or `moments` is wrong.
        Incompatible: the guide has no beliefs that are refined.

    References:
        Brain-like Variational Inference (Vafaii, Galor & Yates, 2025): R^2, zeros
        https://arxiv.org/abs/2410.19315

    Example:
        >>> import inference, zoo
        >>> model = zoo.PoissonCoding()
        >>> found = refinement(inference.IterativePoisson(model, steps=50), model.observations())
        >>> float(found.gap[0]) > float(found.gap[-1]) > 0
        True
    """
    check_counts(moments=moments)
    if not (isinstance(guide, Guide) and isinstance(guide, HasRefinement)):
        raise Incompatible(
            "guide", expected="a circuit whose beliefs are refined step by step",
            got=getattr(guide, "__name__", type(guide).__name__),
            fix="Use one such as IterativePoisson(model).",
        )  # fmt: skip
    total = guide.steps if steps is None else steps
    check_counts(least=0, steps=total)
    x = beside(guide, x)
    guide.reader.check(x)
    if not 0 <= problem < (b := guide.latents.problems(x)):
        raise BadInput("problem", expected=f"0 to {b - 1}", got=str(problem), fix="problem=0.")
    judge = exact_of(guide.model)
    with torch.no_grad():
        evidence = array(judge.log_evidence(x)) if isinstance(judge, HasEvidence) else None
    at = _moments(total, moments)
    return recorded(guide, x, evidence, problem=problem, steps=total, at=at, seed=seed)


def recorded(
    guide: HasRefinement,
    x: Observation,
    evidence: Array | None,
    *,
    problem: int = 0,
    steps: int | None = None,
    at: Array | None = None,
    seed: int,
) -> Dataset:
    """What :func:`refinement` returns, with log p(x) (B,) known or not, measured at steps `at`."""
    import xarray

    steps = guide.steps if steps is None else steps
    at = _moments(steps, MOMENTS) if at is None else at
    with torch.no_grad(), seeded(seed):
        scale = _Scale(guide.reader(), parts(x)[0])
        kept: dict[str, list[Tensor]] = {"rates": [], "signal": []}
        rows: list[dict[str, Tensor]] = []
        for t, now in enumerate(guide.unroll(x, steps=steps)):
            kept["rates"].append(now.q.mean[problem].clone())  # views would keep all problems
            kept["signal"].append(now.signal[problem].clone())
            if t in at:
                with seeded(seed, 1, t):
                    rows.append(scale.measure(now))
        activity = now.q.mean.abs().mean(0)
    seen = {name: array(torch.stack(values)) for name, values in kept.items()}
    curves = {n: np.stack([array(row[n]) for row in rows]) for n in rows[0]}
    fields: Fields = {name: (("step", "neuron"), values) for name, values in seen.items()}
    fields["activity"] = ("neuron", array(activity))
    fields |= _curves(curves, array(scale.total), evidence)
    found = xarray.Dataset(fields, {"step": np.arange(steps + 1), "moment": at})
    draws = "spikes" if guide.reader.site.discrete else "draws"
    same = np.array_equal(seen["signal"], seen["rates"])
    found.attrs = {"problem": problem, "signal": "rates" if same else draws}
    _add_dictionary(found, scale.coding, getattr(guide, "model", None))
    return found


class _Scale:
    """What beliefs are held against, in double precision: x, and the model that explains it.

    Args:
        coding: prior, decoder and noise.
        x: (B, ...).

    Attributes:
        total: squares of x about its own mean, (B,), NaN where there is no contrast.
    """

    def __init__(self, coding: Coding, x: Tensor) -> None:
        self.coding, self.noise = coding, coding.noise.double()
        self.x = x.reshape(len(x), -1).double()
        self.normaliser = self.noise.log().sum() + 0.5 * self.x.shape[1] * math.log(2 * math.pi)
        centred = self.x - self.x.mean(1, keepdim=True)
        least = ROUNDING * torch.finfo(x.dtype).eps * self.x.abs().amax(1)
        flat = centred.abs().amax(1) <= least
        self.total = centred.square().sum(1).masked_fill(flat, torch.nan)
        self.rectified = False
        if not coding.reader.site.discrete:
            negative = -1.0 - torch.arange(coding.reader.neurons).remainder(3).to(x)
            self.rectified = torch.equal(coding.decode(negative[None])[0], coding.offset)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, K) to mean observations (B, F)."""
        if self.coding.weights is None:
            return self.coding.decode(z).double()
        return self.coding.offset + z.double() @ self.coding.weights.T.double()

    def measure(self, now: Moment) -> dict[str, Tensor]:
        """Numbers of each problem, (B,): nats, shares, and squared errors."""
        q = now.q
        count = min(DRAWS, -(-ENOUGH // len(self.x)))
        z = q.sample(torch.Size([count]))
        drawn = self.x - self.decode(z.flatten(0, 1)).reshape(count, *self.x.shape)
        mean = self.x - self.decode(q.mean)
        divergence = kl_divergence(q, self.coding.prior).sum(-1).double()
        silent = z <= 0 if self.rectified else z == 0
        return {
            "free_energy": self._energy(q, drawn, mean) + divergence,
            "divergence": divergence,
            "zeros": silent.double().mean((0, 2)),
            "r2": drawn.square().sum(-1).mean(0),
            "r2_rates": mean.square().sum(-1),
        }

    def _energy(self, q: Distribution, drawn: Tensor, mean: Tensor) -> Tensor:
        """E_q[-log p(x given z)], (B,), from errors of draws (S, B, F) and of q's mean (B, F)."""
        if self.coding.weights is None:
            squares = (drawn / self.noise).square().sum(-1).mean(0)
        else:
            size = (self.coding.weights / self.noise[:, None]).square().sum(0)
            squares = (mean / self.noise).square().sum(-1) + q.variance.double() @ size
        return 0.5 * squares + self.normaliser


def _moments(steps: int, most: int) -> Array:
    """Steps that are measured: the first, the last, powers of ten, and others at equal ratios."""
    if steps < most:
        return np.arange(steps + 1)
    tens = 10 ** np.arange(int(math.log10(steps)) + 1)
    some = np.geomspace(1, steps, max(2, most - 1)).round().astype(int)
    return np.unique([0, *tens, *some, steps])


def _curves(curves: dict[str, Array], total: Array, evidence: Array | None) -> Fields:
    """Means over problems, of numbers (moment, B)."""
    fields: Fields = {}
    for name in ("free_energy", "divergence", "zeros"):
        fields |= _mean(name, curves[name])
    if evidence is not None:
        known = evidence.astype(np.float64)
        value, se = (f[1] for f in _mean("", known[None]).values())
        fields |= {"log_evidence": ((), value[0]), "log_evidence_se": ((), se[0])}
        fields |= _mean("gap", curves["free_energy"] + known)
    some = np.isfinite(total)
    for name in ("r2", "r2_rates"):
        wrong, whole = curves[name][:, some], total[some]
        fields |= _mean(name, 1 - wrong / whole)
        pooled = wrong.sum(1, keepdims=True) / whole.sum() if some.any() else np.nan
        # of a ratio of means, by the delta method
        change = (wrong - pooled * whole) / whole.mean() if some.any() else wrong
        fields |= _mean(f"{name}_pooled", 1 - pooled - change)
    return fields


def _mean(name: str, values: Array) -> Fields:
    """Means of rows (moment, B) and their standard errors; NaN where there are too few."""
    n = values.shape[1]
    none = np.full(len(values), np.nan)
    mean = values.mean(1) if n else none
    se = values.std(1, ddof=1) / math.sqrt(n) if n > 1 else none
    return {name: ("moment", mean), f"{name}_se": ("moment", se)}


def _add_dictionary(found: Dataset, coding: Coding, model: Any) -> None:
    """What one spike of each neuron adds to the picture."""
    if coding.weights is not None:
        found["dictionary"] = (("neuron", "pixel"), array(coding.weights.T))
        if shape := getattr(model, "image_shape", None):
            found["dictionary"].attrs["image_shape"] = list(shape)
