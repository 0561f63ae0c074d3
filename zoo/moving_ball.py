"""A ball that bounces about a box and passes behind an occluder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.arguments import Count, Index, Positive, Probability
from inference.latents import Values
from inference.observation import Observation, size

from .markov import ForwardBackward, MarkovChain
from .model import Model, Paper

__all__ = ["MovingBall"]

SHADE = 0.5  # of the occluder; the ball at its brightest is 1, the background 0


class MovingBall(Model):
    """Position and velocity of a ball on a grid, seen in noisy frames with a part hidden.

    z_1 ~ Categorical(1/K); z_t given z_t-1: the ball moves by its velocity, one of (-1, -1),
    (-1, 1), (1, -1), (1, 1), and then each component of the velocity changes sign ~ Bernoulli(f);
    x_t given z_t ~ Normal(frame[z_t], s^2), pixel by pixel.

    A state is a position (row, column) with a velocity, K = 4 side^2 of them. The walls lie half a
    cell outside the outermost cells: a ball that would leave is back in its cell, its velocity
    reversed. So the uniform law of z_1 is that of every z_t. Pixels of the occluder have the same
    mean whatever the state, so the turns that the ball may have taken there are told apart by where
    and when it comes out, if they are. A path of positions has a mean posterior entropy of 1.60
    nats (five paths) if the ball is hidden for three frames or less, and of 2.44 nats (eleven) if
    it is hidden for longer.

    Args:
        side: width and height of the box, in cells and in pixels.
        steps: frames T.
        flip: f.
        width: standard deviation of the ball's picture, in pixels.
        noise: s.
        occluder: hidden columns, counted from 0; by default the two in the middle, 3 and 4.
        seed: of the canonical observations, draws from the joint; those in which the ball goes from
            one side of the occluder to the other come first, those hidden longest before the rest.

    References:
        A tutorial on hidden Markov models (Rabiner, 1989), for the messages; the model is ours
        https://doi.org/10.1109/5.18626
    """

    title = "moving ball"
    paper = Paper(
        "Rabiner",
        1989,
        "A tutorial on hidden Markov models and selected applications in speech recognition",
        "https://doi.org/10.1109/5.18626",
    )
    dims = {"z": ("time",), "x": ("time", "pixel")}

    log_initial: Tensor
    log_transition: Tensor
    successors: Tensor
    frames: Tensor
    scale: Tensor

    def __init__(
        self,
        side: Count = 8,
        *,
        steps: Count = 10,
        flip: Probability = 0.1,
        width: Positive = 0.6,
        noise: Positive = 0.5,
        occluder: Sequence[Index] | None = None,
        seed: Index = 0,
    ) -> None:
        super().__init__()
        middle = (side // 2 - 1, side // 2)
        self.side, self.steps = side, steps
        self.occluder = middle if occluder is None else tuple(occluder)
        successors = _successors(side)
        turn = torch.tensor([1 - flip, flip])
        self.register_buffer("log_initial", torch.zeros(len(successors)).log_softmax(-1))
        moves = turn.outer(turn).reshape(-1).log().expand(len(successors), -1)
        self.register_buffer("log_transition", moves.contiguous())
        self.register_buffer("successors", successors)
        self.register_buffer("frames", _frames(side, width, self.occluder))
        self.register_buffer("scale", torch.tensor(float(noise)))
        self.keep(torch.zeros(1, steps, side * side))
        self.keep(self._passing_first(*self.simulate(100, seed=seed)))

    def forward(self, x: Observation | None = None) -> Tensor:
        """The generative process."""
        with pyro.plate("data", 1 if x is None else size(x)):
            free = self.frames.new_zeros(self.steps, len(self.successors))
            z = pyro.sample("z", self._chain(free))
            x_given_z = dist.Normal(self.predict({"z": z}), self.scale).to_event(2)
            observed: Tensor = pyro.sample("x", x_given_z, obs=x)
            return observed

    def predict(self, z: Values) -> Tensor:
        """The frames without noise: paths (..., B, T) to (..., B, T, side^2)."""
        return self.frames[z["z"] // 4]

    def position(self, z: Tensor) -> Tensor:
        """Row and column of states (...): (..., 2)."""
        cell = z // 4
        return torch.stack([cell // self.side, cell % self.side], -1)

    @property
    def hidden(self) -> Tensor:
        """Which pixels of which frames are behind the occluder, (T, F)."""
        return (self.frames == self.frames[:1]).all(0).expand(self.steps, -1)

    def state(self, row: int, column: int, velocity: tuple[int, int]) -> int:
        """The state at a position with a velocity (down, right), each -1 or 1."""
        down, right = velocity
        return 4 * (self.side * row + column) + (down + 1) + (right + 1) // 2

    def chain(self, x: Observation) -> MarkovChain:
        """The posterior chain: batch (B,), event (T,)."""
        assert isinstance(x, Tensor)
        return self._chain(self._log_likelihood(x).repeat_interleave(4, -1))

    def exact(self) -> ForwardBackward:
        """Forward-backward; draws are whole paths."""
        return ForwardBackward(self)

    def _chain(self, log_weight: Tensor) -> MarkovChain:
        return MarkovChain(self.log_initial, self.log_transition, self.successors, log_weight)

    def _log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x_t given position), (B, T, side^2), by |x - m|^2 = |x|^2 - 2 x'm + |m|^2.

        In float64, for the squares cancel.
        """
        y, m, s = x.double(), self.frames.double(), self.scale.double()
        squares = y.square().sum(-1, keepdim=True) - 2 * y @ m.T + m.square().sum(-1)
        constant = m.shape[-1] * (s.log() + math.log(2 * math.pi) / 2)
        return (-squares / (2 * s.square()) - constant).to(x.dtype)

    def _passing_first(self, z: Values, x: Observation) -> Tensor:
        """The observations x, first those in which the ball goes from one side to the other."""
        assert isinstance(x, Tensor)
        column = self.position(z["z"])[..., 1]
        columns = torch.tensor(self.occluder).to(column)
        hidden, right = torch.isin(column, columns), column > columns.float().mean()
        seen_at_ends = ~hidden[:, 0] & ~hidden[:, -1]
        crosses = seen_at_ends & (right[:, 0] != right[:, -1])
        score = crosses * hidden.sum(-1)
        return x[score.argsort(descending=True, stable=True)]


def _successors(side: int) -> Tensor:
    """The four states (K, 4) that can follow: no turn, right turns, down turns, both turn."""
    places, signs = torch.arange(side), torch.tensor([-1, 1])
    row, column, down, right = torch.cartesian_prod(places, places, signs, signs).T
    row, down = _bounce(row, down, side)
    column, right = _bounce(column, right, side)
    turns = torch.cartesian_prod(torch.tensor([1, -1]), torch.tensor([1, -1])).T[:, None]
    downs, rights = turns[0] * down[:, None], turns[1] * right[:, None]
    return 4 * (side * row + column)[:, None] + (downs + 1) + (rights + 1) // 2


def _bounce(place: Tensor, velocity: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """One step along an axis, reflected by the walls."""
    moved = place + velocity
    inside = (moved >= 0) & (moved < side)
    return torch.where(inside, moved, place), torch.where(inside, velocity, -velocity)


def _frames(side: int, width: float, occluder: tuple[int, ...]) -> Tensor:
    """A frame for each position of the ball, (side^2, side^2)."""
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    distances = (cells[:, None] - cells).square().sum(-1)
    frames = (-distances / (2 * width**2)).exp().reshape(-1, side, side)
    frames[:, :, list(occluder)] = SHADE
    return frames.flatten(1)
