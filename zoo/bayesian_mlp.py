"""A Bayesian neural network: every weight is a latent, and the data set is one problem."""

from __future__ import annotations

from typing import NoReturn

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.errors import BadInput, NoExactPosterior
from inference.latents import Values
from inference.observation import Observation

from .data import digits
from .model import Model, Paper

__all__ = ["BayesianMLP"]

CLASSES = 10


class BayesianMLP(Model):
    """Weights and biases of a network with one hidden layer that reads handwritten digits.

    w1 ~ Normal(0, a^2 / 64), (64, h); b1 ~ Normal(0, 1), (h,);
    w2 ~ Normal(0, a^2 / h), (h, 10); b2 ~ Normal(0, 1), (10,);
    y_t given these ~ Categorical(softmax(relu(x_t w1 + b1) w2 + b2)) for images x_t, t = 1 ... n.

    It is there for circuits with stochastic synapses, where a draw of the weights is what the
    synapses release on one trial. There is no plate "data": all images share the weights, so the
    whole data set is one problem. Hidden units may trade places, so every mode has h! - 1 copies.

    There is no exact posterior. NUTS on a smaller network can be the reference; otherwise judge
    by held-out log-likelihood and calibration, with `zoo.data.digits().validation` and `logits`.

    Args:
        rows: n, at most 1,438.
        hidden: h.
        gain: a. With 3 the activities are of order one, for pixels have a root mean square of .5;
            with 1 the prior is so narrow that the mode reads every second digit wrong.

    Raises:
        BadInput: more rows than there are digits.

    Differences:
        Two layers of weights and 8 x 8 pixels; the paper has three, of 784-100-100-10, on MNIST,
        and a Laplace prior.

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
    dims = {
        "w1": ("pixel", "hidden"),
        "b1": ("hidden",),
        "w2": ("hidden", "class"),
        "b2": ("class",),
        "y": ("row",),
    }

    x_0: Tensor
    gain: Tensor

    def __init__(self, rows: int = 200, hidden: int = 16, *, gain: float = 3.0) -> None:
        super().__init__()
        data = digits()
        assert data.train_labels is not None
        if rows > len(data.train):
            limit = f"at most {len(data.train)}"
            raise BadInput("rows", expected=limit, got=str(rows), fix="rows=200.")
        pixels = data.train.shape[1]
        self.shapes = {
            "w1": (pixels, hidden),
            "b1": (hidden,),
            "w2": (hidden, CLASSES),
            "b2": (CLASSES,),
        }
        self.register_buffer("gain", torch.tensor(gain))
        images, labels = data.train[:rows].clone(), data.train_labels[:rows]
        self.keep((images, labels.to(images.dtype)))  # floats: a model has one dtype

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        images, labels = (self.x_0, None) if x is None else x
        z = {}
        for name, shape in self.shapes.items():
            spread = self.gain * shape[0] ** -0.5 if len(shape) == 2 else 1.0
            prior = dist.Normal(images.new_zeros(shape), spread)
            z[name] = pyro.sample(name, prior.to_event(len(shape)))
        with pyro.plate("rows", len(images)):
            y_given_z = dist.Categorical(logits=self.logits(z, images))
            observed: Tensor = pyro.sample("y", y_given_z, obs=labels)
            return observed

    def logits(self, z: Values, images: Tensor) -> Tensor:
        """Log-odds of the classes for images (n, 64): latents (..., *shape) to (..., n, 10)."""
        hidden = (images @ z["w1"] + z["b1"][..., None, :]).relu()
        return hidden @ z["w2"] + z["b2"][..., None, :]

    def predict(self, z: Values) -> Tensor:
        """Class probabilities of the model's own images: latents (..., *shape) to (..., n, 10)."""
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
