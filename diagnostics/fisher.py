"""What each synapse is worth: the curvature of the loss, read off the gradients of single rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from inference.errors import BadInput, Incompatible, lookup
from inference.guide import Guide, check_counts
from inference.latents import Latents
from inference.local import Inputs, Run
from inference.noise import GaussianNoise
from inference.observation import Observation, parts, take
from inference.seeds import seeded

from .draws import array, beside
from .signature_fits import Array, dataset

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["synapse_statistics"]

CELLS = 1 << 24  # numbers in the gradients of one call
QUIET = -30.0  # log sd of weights that do not vary
TINY = float(np.finfo(float).tiny)  # stands for zero in a denominator
ROUNDING = 1e-3  # of a sum of log-likelihoods in single precision, as a share of their sizes


def synapse_statistics(
    guide: Guide,
    x: Observation,
    *,
    problem: int = 0,
    rows: int | None = None,
    replicas: int = 0,
    sites: Sequence[str] | None = None,
    seed: int,
) -> Dataset:
    """What each synapse is worth, for :func:`synaptic_variance`; the latents are the weights.

    With g_ti the derivative of log p(x_t given w) with respect to weight i at w = mu, one row t of
    the data set at a time, and a_t the input that the weight meets there:

        variance            s_i^2, of the noise
        curvature           H_ii = sum_t g_ti^2, the empirical Fisher information
        posterior_variance  1 / (H_ii + h_ii), h the curvature of -log p(w) at mu: what the best
                            factorised Gaussian has, where the loss is quadratic
        learning_rate       1 / rms_t g_ti, of an adaptive rule
        rate                mean_t |a_t|
        mean_square_rate    mean_t a_t^2

    In `curvature` and `learning_rate` only the likelihood counts; noise follows it only where that
    outweighs the prior, or the magnitude is "mean". `posterior_variance` has both, for priors that
    are independent over weights. Noise in the labels makes the empirical curvature differ from the
    true one, and a network that fits all its labels has none: with `replicas`, labels are simulated
    from the network itself, which is right whatever the data.

    Args:
        guide: with Gaussian noise on each weight, such as StochasticSynapses or AutoNormal.
        x: the data set, or data sets, one for each problem.
        problem: which of these.
        rows: of the data set that are used, chosen at random; by default all. Sums are scaled up.
        replicas: simulated sets of labels the curvature is a mean over; 0 takes the given labels.
        sites: whose synapses are returned; by default all.
        seed: of the choice of rows, and of simulated labels.

    Returns:
        The above (synapse), with the coordinate `site`; rates if all these weights are multiplied
        with inputs or added to them, once in a call of the model, so that it can be seen. Synapses
        without curvature, or whose input is never active, have no logarithm and are left out: the
        attribute `dropped` counts them.

    Raises:
        BadInput: no such problem or site, a count is wrong, or no synapse is left.
        Incompatible: the guide has no Gaussian noise, or rows of x are not independent given the
            weights.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), Methods and equations 7 and 54 https://doi.org/10.7554/eLife.92595

    Differences:
        The paper accumulates gradients of minibatches during further training; these are of single
        rows, at the mean, after training.

    Example:
        >>> import inference, zoo
        >>> model = zoo.LogisticRegression()
        >>> guide = inference.MeanFieldEncoder(model)
        >>> found = synapse_statistics(guide, model.observations(), problem=2, seed=0)
        >>> found.sizes["synapse"], sorted(found.data_vars)[:3]
        (3, ['curvature', 'learning_rate', 'mean_square_rate'])
    """
    check_counts(least=0, replicas=replicas)
    lat, x = guide.latents, beside(guide, x)
    lat.check(x)
    if not 0 <= problem < (b := lat.problems(x)):
        raise BadInput("problem", expected=f"0 to {b - 1}", got=str(problem), fix="problem=0.")
    mean, sd = (t[problem] for t in _weights(guide, x))
    data = _Rows(lat, take(x, slice(problem, problem + 1)) if lat.plated else x)
    with torch.no_grad(), seeded(seed):
        used = data.choose(rows)
        seen = data.squares(mean, used)
        worth = data.simulated_squares(mean, used, replicas) if replicas else seen
        rates = data.rates(mean, used)
    curvature = array(worth) * data.size
    fields = {
        "variance": array(sd).astype(np.float64) ** 2,
        "curvature": curvature,
        "posterior_variance": 1 / np.maximum(curvature + data.prior_curvature(mean), TINY),
        "learning_rate": np.maximum(array(seen), TINY) ** -0.5,
    }
    names = np.repeat(list(lat.splits), list(lat.splits.values()))
    wanted = np.isin(names, [_known(lat, site) for site in sites or lat.splits])
    if np.isin(names[wanted], list(rates)).all():
        fields |= _packed(lat, rates)
    useful = wanted & (array(seen) > 0) & np.all([v > 0 for v in fields.values()], 0)
    return _synapses({n: v[useful] for n, v in fields.items()}, names[useful], int(wanted.sum()))


def _weights(guide: Guide, x: Observation) -> tuple[Tensor, Tensor]:
    """Means and sds of the weights, (B, D)."""
    if not isinstance(guide, GaussianNoise):
        raise Incompatible(
            "guide", expected="Gaussian noise on each weight", got=type(guide).__name__,
            fix="Use StochasticSynapses, or AutoNormal with objective=ReliabilityCost(...).",
        )  # fmt: skip
    with torch.no_grad():
        q = guide.distribution(x)
    return q.mean, q.stddev


class _Rows:
    """One data set, whose rows are independent given the weights.

    Args:
        lat: of the model.
        x: observation of one problem.

    Raises:
        Incompatible: x has no rows.
    """

    def __init__(self, lat: Latents, x: Observation) -> None:
        self.lat, self.x = lat, x
        # a plated model has the rows inside the problem
        self.data = tuple(t[0] for t in parts(x)) if lat.plated else parts(x)
        sizes = {len(t) if t.dim() else 0 for t in self.data}
        rows = isinstance(x, tuple) and sizes != {0} if lat.plated else lat.separable
        if not rows or len(sizes) > 1:
            raise _no_rows(f"parts of shapes {[tuple(t.shape) for t in parts(x)]}")
        (self.size,) = sizes

    def choose(self, rows: int | None) -> Tensor:
        """Places of the rows that are used."""
        count = self.size if rows is None else rows
        check_counts(rows=count)
        if count > self.size:
            raise BadInput("rows", expected=f"at most {self.size}", got=str(rows), fix="rows=None.")
        return torch.randperm(self.size)[:count].to(self.data[0].device)

    def squares(self, u: Tensor, used: Tensor) -> Tensor:
        """Mean squares of the gradients of given rows at weights u (D,), (D,)."""
        found, value = self._squares(u, [t[used] for t in self.data])
        if len(used) == self.size:  # else there is no knowing
            whole = self.lat.log_terms(u[None], self.x)[1].sum().double()
            if float((value.sum() - whole).abs()) > ROUNDING * (1 + float(value.abs().sum())):
                raise _no_rows(f"{whole:.6g} nats together and {value.sum():.6g} one by one")
        return found

    def simulated_squares(self, u: Tensor, used: Tensor, replicas: int) -> Tensor:
        """The same with labels that are drawn from the model, a mean over replicas of them."""
        z = self.lat.unpack(u.expand(replicas, 1, -1))[0]
        labels = self.lat.replicate(z, self.x).reshape(replicas, *self.data[self.lat.slot].shape)
        total = torch.zeros_like(u, dtype=torch.float64)
        for each in labels.to(u):
            data = [each if k == self.lat.slot else t for k, t in enumerate(self.data)]
            total += self._squares(u, [t[used] for t in data])[0] / replicas
        return total

    def rates(self, u: Tensor, used: Tensor) -> dict[str, Inputs]:
        """What weights u (D,) meet in given rows, by site; of those of which it can be seen."""
        with torch.enable_grad(), suppress(Incompatible):
            mean = u[None].detach().clone().requires_grad_()
            rows = self._of(t[used] for t in self.data)
            return Run(self.lat, rows, mean, torch.full_like(mean, QUIET)).inputs()
        return {}

    def prior_curvature(self, u: Tensor) -> Array:
        """Second derivatives of -log p(w), (D,); zero where the prior is curved the other way."""
        x = self._of(t[:1] for t in self.data)  # any row will do

        def slopes(v: Tensor) -> Tensor:
            found: Tensor = grad(lambda w: -self.lat.log_terms(w[None], x)[0].sum())(v)
            return found.sum()  # whose gradient is the diagonal, where weights are independent

        with pyro.validation_enabled(False):
            return array(grad(slopes)(u).clamp_min(0)).astype(np.float64)

    def _squares(self, u: Tensor, data: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean squares (D,) and log-likelihoods (rows,) in double precision."""
        total, values = torch.zeros_like(u, dtype=torch.float64), []
        for piece in zip(*[t.split(max(1, CELLS // len(u))) for t in data], strict=True):
            g, value = self._gradients(u, piece)
            total += g.double().square().sum(0)
            values.append(value.double())
        return total / len(data[0]), torch.cat(values)

    def _gradients(self, u: Tensor, piece: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Gradients (rows, D) and log-likelihoods (rows,), all at once if torch can do that."""
        one = grad_and_value(self._likelihood)
        try:
            with pyro.validation_enabled(False):
                g, value = vmap(one, in_dims=(None, 0))(u, piece)
        except RuntimeError:
            each = [one(u, row) for row in zip(*piece, strict=True)]
            g, value = (torch.stack(t) for t in zip(*each, strict=True))
        return g, value

    def _likelihood(self, u: Tensor, row: tuple[Tensor, ...]) -> Tensor:
        return self.lat.log_terms(u[None], self._of(t[None] for t in row))[1].sum()

    def _of(self, rows: Iterable[Tensor]) -> Observation:
        """A data set of these rows."""
        found = tuple(t[None] if self.lat.plated else t for t in rows)
        return found if isinstance(self.x, tuple) else found[0]


def _no_rows(got: str) -> Incompatible:
    return Incompatible(
        "model", expected="a data set whose rows are independent given the weights", got=got,
        fix="Give it a plate of rows, with the weights outside; or a tuple such as (inputs, labels)"
        " of B data sets.",
    )  # fmt: skip


def _known(lat: Latents, site: str) -> str:
    lookup(lat.splits, site, "site")
    return site


def _packed(lat: Latents, rates: Mapping[str, Inputs]) -> dict[str, Array]:
    """Mean sizes and squares of inputs, (D,); zero where they are not known."""
    silent = {n: Inputs(*[torch.zeros(k)] * 2) for n, k in lat.splits.items()}
    pairs = [silent[n] if n not in rates else rates[n] for n in lat.names]
    names = ("rate", "mean_square_rate")
    return {
        name: np.concatenate([array(t).ravel() for t in column]).astype(np.float64)
        for name, column in zip(names, zip(*pairs, strict=True), strict=True)
    }


def _synapses(fields: dict[str, Array], sites: Array, wanted: int) -> Dataset:
    """A dataset of those that are left, with a count of the others."""
    dropped = wanted - len(sites)
    if not len(sites):
        raise BadInput(
            "synapses", expected="some with curvature and an active input", got="none",
            fix="Fit the guide first; with replicas=1 a network that fits all labels has some.",
        )  # fmt: skip
    return dataset(
        {name: ("synapse", values) for name, values in fields.items()},
        {"site": ("synapse", sites)},
        measured="noise of synapses, and what they are worth",
        units="of weights",
        source="https://doi.org/10.7554/eLife.92595",
        reason=f"{dropped} of {wanted} synapses have no curvature or no input, and are left out"
        * bool(dropped),
        dropped=dropped,
    )
