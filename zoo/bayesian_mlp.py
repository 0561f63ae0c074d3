"""A Bayesian neural network: every weight is a latent, and the data set is one problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NoReturn, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from inference.arguments import Count, Positive
from inference.errors import BadInput, NoExactPosterior, lookup
from inference.guide import check_counts, check_positive
from inference.latents import Values
from inference.observation import Observation

from .data import Data, digits
from .model import Model, Paper

__all__ = ["BayesianMLP"]

T = TypeVar("T")
FEW = 200  # rows of the digits, where no data are given


def _normal(origin: Tensor, gain: Tensor, rate: Tensor) -> TorchDistribution:
    return dist.Normal(origin, gain * len(origin) ** -0.5)


def _laplace(origin: Tensor, gain: Tensor, rate: Tensor) -> TorchDistribution:
    return dist.Laplace(origin, 1 / rate)


PRIORS: Mapping[str, Callable[[Tensor, Tensor, Tensor], TorchDistribution]] = {
    "normal": _normal,
    "laplace": _laplace,
}


class BayesianMLP(Model):
    """Weights and biases of a network with one hidden layer that reads handwritten digits.

    w1 ~ Normal(0, a^2 / p), (p, h); b1 ~ Normal(0, 1), (h,);
    w2 ~ Normal(0, a^2 / h), (h, c); b2 ~ Normal(0, 1), (c,);
    y_t given these ~ Categorical(softmax(relu(x_t w1 + b1) w2 + b2)) for images x_t of p pixels,
    t = 1 ... n, and c classes. More layers go on with w3, b3 and so forth.

    It is there for circuits with stochastic synapses, where a draw of the weights is what the
    synapses release on one trial. There is no plate "data": all images share the weights, so the
    whole data set is one problem. Images are in the plate "rows", so that some of them will do for
    a step of training. Hidden units may trade places, so every mode has h! - 1 copies.

    With `prior="laplace"` weights are Laplace(0, 1 / lam): minus their log density is the magnitude
    cost lam sum |w| of Malkin et al., equation 3, up to a constant. Here lam is for a loss in nats
    that is a sum over images. So it is in the published code, where lam is .01 or .1. The paper
    says 1e-4, which on this scale is a prior that says nothing; on a mean over MNIST's 60,000
    images it would be lam = 6 here.

    There is no exact posterior. NUTS on a smaller network can be the reference; otherwise judge
    by held-out log-likelihood and calibration, with `zoo.data.digits().validation` and `logits`.
    The published network is `BayesianMLP(hidden=(100, 100), data=zoo.data.mnist())`, of 89,610
    latents.

    Args:
        rows: n, from the first on; by default 200 of the digits, and all training rows of `data`.
        hidden: h, units of the hidden layer, or of each of several; () for none.
        data: images with labels, by default `zoo.data.digits()`.
        prior: of the weights, "normal" or "laplace".
        gain: a, for normal weights. With 3 the activities are of order one, for pixels have a root
            mean square of .5 (MNIST .3); with 1 the prior is so narrow that the mode reads every
            second digit wrong.
        rate: lam, for Laplace weights.

    Raises:
        BadInput: more rows than there are, a layer without units, data without labels, an unknown
            prior, or a rate that is no number above zero.

    Differences:
        By default two layers of weights, 8 x 8 pixels and a normal prior; the paper has three, of
        784-100-100-10, MNIST and a Laplace prior. Biases are Normal(0, 1) with either prior.

    References:
        Signatures of Bayesian inference emerge from energy-efficient synapses (Malkin et al.,
        2024), equation 6 for the network https://doi.org/10.7554/eLife.92595
    """

    title = "Bayesian neural network"
    paper = Paper(
        "Malkin et al.",
        2024,
        "Signatures of Bayesian inference emerge from energy-efficient synapses",
        "https://doi.org/10.7554/eLife.92595",
        "equation 6",
    )

    x_0: Tensor
    gain: Tensor
    rate: Tensor

    def __init__(
        self,
        rows: Count | None = None,
        hidden: int | Sequence[int] = 16,
        *,
        data: Data | None = None,
        prior: str = "normal",
        gain: Positive = 3.0,
        rate: Positive = 1.0,
    ) -> None:
        super().__init__()
        layers = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        for units in layers:
            check_counts(hidden=units)
        check_positive("rate", rate, usual=1.0)
        self.prior = lookup(PRIORS, prior, "prior")
        images, labels, classes = _labelled(digits() if data is None else data)
        n = (FEW if data is None else len(images)) if rows is None else rows
        check_counts(rows=n)
        if n > len(images):
            limit = f"at most {len(images)}"
            raise BadInput("rows", expected=limit, got=str(n), fix=f"rows={len(images)}.")
        self.depth = len(layers) + 1
        numbered = [f"hidden{k}" for k in range(1, self.depth)]
        axes = numbered if self.depth > 2 else ["hidden"] * len(layers)
        self.dims = {**_by_site(["pixel", *axes, "class"]), "y": ("row",)}
        self.shapes = _by_site([images.shape[1], *layers, classes])
        self.register_buffer("gain", torch.tensor(float(gain)))
        self.register_buffer("rate", torch.tensor(float(rate)))
        # labels are floats: a model has one dtype
        self.keep((images[:n].clone(), labels[:n].to(images.dtype)))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        images, labels = (self.x_0, None) if x is None else x
        z = {}
        for name, shape in self.shapes.items():
            origin = images.new_zeros(shape)
            bias, weights = dist.Normal(origin, 1.0), self.prior(origin, self.gain, self.rate)
            prior = weights if len(shape) == 2 else bias
            z[name] = pyro.sample(name, prior.to_event(len(shape)))
        with pyro.plate("rows", len(images)):
            y_given_z = dist.Categorical(logits=self.logits(z, images))
            observed: Tensor = pyro.sample("y", y_given_z, obs=labels)
            return observed

    def logits(self, z: Values, images: Tensor) -> Tensor:
        """Log-odds of the classes for images (n, p): latents (..., *shape) to (..., n, c)."""
        rates = images
        for k in range(1, self.depth):
            rates = (rates @ z[f"w{k}"] + z[f"b{k}"][..., None, :]).relu()
        return rates @ z[f"w{self.depth}"] + z[f"b{self.depth}"][..., None, :]

    def predict(self, z: Values) -> Tensor:
        """Class probabilities of the model's own images: latents (..., *shape) to (..., n, c)."""
        return self.logits(z, self.x_0).softmax(-1)

    def exact(self) -> NoReturn:
        """There is none.

        Raises:
            NoExactPosterior: always; the message names what to use instead.
        """
        raise NoExactPosterior(
            type(self).__name__,
            expected="an exact posterior",
            got="a neural network",
            fix="Take inference.NUTS(BayesianMLP(50, hidden=3)) as reference on a smaller network, "
            "or compare held-out log-likelihood and calibration.",
        )


def _by_site(ends: Sequence[T]) -> dict[str, tuple[T, ...]]:
    """What the axes of w1, b1, w2, ... are, from what each layer of units is."""
    found: dict[str, tuple[T, ...]] = {}
    for k, (inputs, outputs) in enumerate(pairwise(ends), 1):
        found |= {f"w{k}": (inputs, outputs), f"b{k}": (outputs,)}
    return found


def _labelled(data: Data) -> tuple[Tensor, Tensor, int]:
    """Training images (N, p), labels (N,) and the number of classes."""
    if data.train_labels is None:
        fix = "Take zoo.data.digits() or zoo.data.mnist()."
        raise BadInput("data", expected="data with labels", got=repr(data.name), fix=fix)
    return data.train, data.train_labels, int(data.train_labels.max()) + 1
