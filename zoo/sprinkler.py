"""The sprinkler: the grass is wet, was it rain?"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Portion
from inference.latents import Values
from inference.observation import Observation, size

from .exact import Enumerated
from .model import Model, Paper

__all__ = ["Sprinkler"]


class Sprinkler(Model):
    """Wet grass is explained by rain or by the sprinkler, and both depend on the clouds.

    cloudy ~ Bernoulli(.5); sprinkler given cloudy ~ Bernoulli(.1 if cloudy else .5);
    rain given cloudy ~ Bernoulli(.8 if cloudy else .2);
    wet given sprinkler, rain ~ Bernoulli(.99 if both, .9 if one, e if none).

    The smallest network with a loop: rain and sprinkler exclude each other twice, as effects of
    opposite weather and as rival explanations. Wet grass means the sprinkler with probability .430
    and rain with .708; once rain is known, the sprinkler drops to .194.

    Args:
        dew: e, the probability that the grass is wet by itself.

    Differences:
        The book's e is 0; here it is .001, so that no log-probability is infinite, and the numbers
        above stay as they are.

    References:
        Artificial Intelligence: a Modern Approach (Russell & Norvig, 2020), the example of a
        multiply connected network in its chapter on probabilistic reasoning
        https://aima.cs.berkeley.edu
        Probabilistic Reasoning in Intelligent Systems (Pearl, 1988), for explaining away in
        networks https://doi.org/10.1016/C2009-0-27609-4

    Example:
        >>> model = Sprinkler()
        >>> states = model.exact().logits(torch.ones(1, 1)).softmax(0).reshape(2, 2, 2)
        >>> round(float(states[:, :, 1].sum()), 3)  # rain
        0.708
    """

    title = "sprinkler"
    paper = Paper(
        "Russell & Norvig",
        2020,
        "Artificial Intelligence: a Modern Approach",
        "https://aima.cs.berkeley.edu",
    )
    dims = {"cloudy": (), "sprinkler": (), "rain": (), "wet": ("lawn",)}

    cloudy: Tensor
    sprinkler: Tensor
    rain: Tensor
    wet: Tensor

    def __init__(self, *, dew: Portion = 0.001) -> None:
        super().__init__()
        self.register_buffer("cloudy", torch.tensor(0.5))
        self.register_buffer("sprinkler", torch.tensor([0.5, 0.1]))
        self.register_buffer("rain", torch.tensor([0.2, 0.8]))
        self.register_buffer("wet", torch.tensor([[dew, 0.9], [0.9, 0.99]]))
        self.keep(torch.tensor([[1.0], [0.0]]))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            cloudy = pyro.sample("cloudy", dist.Bernoulli(self.cloudy))
            sprinkler = pyro.sample("sprinkler", dist.Bernoulli(self.sprinkler[cloudy.long()]))
            rain = pyro.sample("rain", dist.Bernoulli(self.rain[cloudy.long()]))
            p = self.predict({"sprinkler": sprinkler, "rain": rain})
            observed: Tensor = pyro.sample("wet", dist.Bernoulli(p).to_event(1), obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """Probability of wet grass: latents (..., B) to (..., B, 1)."""
        return self.wet[z["sprinkler"].long(), z["rain"].long()][..., None]

    def exact(self) -> Enumerated:
        """All eight states."""
        return Enumerated(self)
