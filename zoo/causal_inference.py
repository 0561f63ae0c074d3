"""Causal inference: do a flash and a sound come from one place?"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Positive, Probability
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian
from .model import Model, Paper
from .switching import SwitchingPosterior

__all__ = ["CausalInference"]


class CausalInference(Model):
    """A flash and a sound have one common place, or each has its own.

    common ~ Bernoulli(p); visual ~ Normal(0, sp^2); auditory ~ Normal(0, sp^2);
    x_v ~ Normal(visual, sv^2); x_a ~ Normal(common ? visual : auditory, sa^2).

    Signals that agree are fused, weighted by their precisions, and the sound is heard where the
    flash is seen: the ventriloquist's trick. Signals that disagree are kept apart. In between, the
    posterior of the place of the sound has two modes, whose weights no single estimate and no
    Gaussian can express.

    With a common cause nothing depends on the site "auditory", which keeps its prior. Setting it to
    `visual` instead would put mass on a line, where there is no density; like this both causes have
    latents of the same dimension, and weights of the causes can be compared. Where the sound is,
    under either cause, is `sound(z)`.

    Args:
        common: p.
        spread: sp, in degrees.
        visual_noise: sv, in degrees.
        auditory_noise: sa, in degrees.
        place: of the flash in all canonical observations, in degrees; the sound moves from 24
            degrees left of it to 33 degrees right.

    References:
        Causal inference in multisensory perception (Kording et al., 2007)
        https://doi.org/10.1371/journal.pone.0000943

    Differences:
        The paper reports estimates of the places, averaged over the causes; here they are draws,
        and its estimate is the mean of `sound(z)`.
    """

    title = "causal inference"
    paper = Paper(
        "Kording et al.",
        2007,
        "Causal inference in multisensory perception",
        "https://doi.org/10.1371/journal.pone.0000943",
    )
    dims = {"common": (), "visual": (), "auditory": (), "x": ("modality",)}

    probability: Tensor
    spread: Tensor
    noise: Tensor

    def __init__(
        self,
        common: Probability = 0.5,
        *,
        spread: Positive = 10.0,
        visual_noise: Positive = 2.0,
        auditory_noise: Positive = 8.0,
        place: float = 4.0,
    ) -> None:
        super().__init__()
        self.register_buffer("probability", torch.tensor(float(common)))
        self.register_buffer("spread", torch.tensor(float(spread)))
        self.register_buffer("noise", torch.tensor([visual_noise, auditory_noise]))
        disparity = torch.linspace(-24.0, 33.0, 20)
        self.keep(torch.stack([torch.full_like(disparity, place), place + disparity], -1))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            common = pyro.sample("common", dist.Bernoulli(self.probability))
            origin = torch.zeros_like(self.spread)
            visual = pyro.sample("visual", dist.Normal(origin, self.spread))
            auditory = pyro.sample("auditory", dist.Normal(origin, self.spread))
            mean = self.predict({"common": common, "visual": visual, "auditory": auditory})
            x_given_z = dist.Normal(mean, self.noise).to_event(1)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def sound(self, z: Values) -> Tensor:
        """Where the sound is: with the flash if they have a common cause, (..., B)."""
        return torch.where(z["common"] > 0, z["visual"], z["auditory"])

    def predict(self, z: Values) -> Tensor:
        """Places of flash and sound: latents (..., B) to (..., B, 2)."""
        return torch.stack([z["visual"], self.sound(z)], -1)

    def components(self, x: Observation) -> tuple[Tensor, LinearGaussian, Tensor]:
        """Systems for common = 0 and common = 1; their latents are (visual, auditory)."""
        assert isinstance(x, Tensor)
        log_prior = torch.stack([1 - self.probability, self.probability]).log()
        eye, origin = torch.eye(2).to(x), x.new_zeros(2)
        weights = torch.stack([eye, eye[[0, 0]]])[:, None]  # both see column 0 if common
        precision = eye / self.spread.square()
        return log_prior, LinearGaussian(origin, precision, weights, origin, self.noise), x

    def exact(self) -> SwitchingPosterior:
        """The cause by enumeration, the places in closed form."""
        return SwitchingPosterior(self)
