"""A short video of a blob that moves smoothly and disappears for a while."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive
from inference.errors import BadInput
from inference.latents import Values
from inference.observation import Observation, size

from .linear_gaussian import LinearGaussian, LinearGaussianPosterior
from .model import Model, Paper
from .state_space import autoregression

__all__ = ["GaussianVideo"]

HIDDEN = 100.0  # noise of a hidden frame, in units of the noise of the others


class GaussianVideo(Model):
    """Frames that are linear in the position of a blob, which moves along a smooth path.

    z_1 ~ Normal(0, P0); z_2 = a_1 z_1 + sqrt(q) e_2; z_t = a_1 z_t-1 + a_2 z_t-2 + sqrt(q) e_t;
    x_t given z_t ~ Normal(mean + C z_t, s_t^2 I), pixel by pixel.

    The mean frame is a blob in the middle of the picture, C its derivative when it moves to the
    right: to first order, z_t is the horizontal position in pixels. Values before the start are
    zero. In the frames in which the blob is occluded the noise s_t is 100 times s, so that only the
    motion before and after tells where it is. Neighbouring positions have posterior correlations of
    .71 to .88, highest behind the occluder; the best factorised guide misses log p(x) by 3.89 nats,
    and one that looks at a single frame has nothing to go by where the blob is hidden.

    Args:
        coefficients: a, of an autoregression of any order.
        steps: frames T.
        side: width and height of a frame, in pixels.
        width: standard deviation of the blob, in pixels.
        innovation: sqrt(q), in pixels.
        start: sqrt(P0), in pixels.
        noise: s, where the blob at its brightest is 1.
        occluded: frames in which the blob is hidden, counted from 0.
        seed: of the canonical observations.

    Raises:
        BadInput: an occluded frame that the video does not have.

    References:
        Learning to infer in recurrent biological networks (Benjamin & Kording, 2020), after whose
        use of video this is; the model is ours https://arxiv.org/abs/2006.10811
        A new approach to linear filtering and prediction problems (Kalman, 1960), for the exact
        posterior https://doi.org/10.1115/1.3662552
    """

    title = "Gaussian video"
    paper = Paper(
        "Benjamin & Kording",
        2020,
        "Learning to infer in recurrent biological networks",
        "https://arxiv.org/abs/2006.10811",
    )
    dims = {"z": ("time",), "x": ("time", "pixel")}

    coefficients: Tensor
    sd: Tensor
    mean: Tensor
    slope: Tensor
    scale: Tensor

    def __init__(
        self,
        coefficients: Sequence[float] = (1.6, -0.66),
        *,
        steps: Count = 10,
        side: Count = 6,
        width: Positive = 1.2,
        innovation: Positive = 0.2,
        start: Positive = 0.3,
        noise: Positive = 0.5,
        occluded: Sequence[Index] = (4, 5, 6),
        seed: Index = 0,
    ) -> None:
        super().__init__()
        if not set(occluded) <= set(range(steps)):
            frames = f"frames from 0 to {steps - 1}"
            raise BadInput("occluded", expected=frames, got=str(occluded), fix="Or add steps.")
        row, column = torch.cartesian_prod(*[torch.arange(side) - (side - 1) / 2] * 2).T
        blob = (-(row.square() + column.square()) / (2 * width**2)).exp()
        scale = torch.full((steps, 1), float(noise))
        scale[list(occluded)] *= HIDDEN
        self.register_buffer("coefficients", torch.tensor(coefficients))
        self.register_buffer("sd", torch.tensor([start] + [innovation] * (steps - 1)))
        self.register_buffer("mean", blob)
        self.register_buffer("slope", blob * column / width**2)
        self.register_buffer("scale", scale)
        self.keep_draws(torch.zeros(1, steps, side * side), seed=seed)

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        tril, _ = autoregression(self.coefficients, self.sd)
        with pyro.plate("data", 1 if x is None else size(x)):
            path = dist.MultivariateNormal(torch.zeros_like(self.sd), scale_tril=tril)
            z = pyro.sample("z", path)
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(2)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The video without noise: latents (..., B, T) to (..., B, T, F)."""
        return self.mean + z["z"][..., None] * self.slope

    @property
    def hidden(self) -> Tensor:
        """Which pixels of which frames are occluded, (T, F)."""
        return (self.scale > self.scale.min()).expand(len(self.sd), len(self.mean))

    def linear_gaussian(self, x: Observation) -> tuple[LinearGaussian, Tensor]:
        """The system: all frames side by side, each with weights C for its own time."""
        assert isinstance(x, Tensor)
        steps, pixels = len(self.sd), len(self.slope)
        _, precision = autoregression(self.coefficients, self.sd)
        weights = torch.kron(torch.eye(steps).to(self.slope), self.slope[:, None])  # (T F, T)
        noise = self.scale.expand(steps, pixels).reshape(-1)
        offset = self.mean.repeat(steps)
        system = LinearGaussian(torch.zeros_like(self.sd), precision, weights, offset, noise)
        return system, x.reshape(len(x), -1)

    def exact(self) -> LinearGaussianPosterior:
        """The closed-form smoother; draws are whole paths."""
        return LinearGaussianPosterior(self)
