"""Score matching: a circuit learns in which direction its density rises, not how high it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from ..arguments import Count, NonNegative, Positive
from ..errors import BadInput, Incompatible
from ..guide import HasDivergence, HasNoiseLevels
from ..objective import Objective
from ..seeds import seeded

if TYPE_CHECKING:
    from ..guide import Guide
    from ..latents import ModelLike, Values
    from ..observation import Observation

__all__ = [
    "DenoisingScoreMatching",
    "ExactScore",
    "ImplicitScore",
    "MixedScore",
    "NoiseStaircase",
]

MIDDLE = (0.15, 0.65)  # of the range of noise levels, in log sigma: .05 to 1.1 of .02 to 10
FEWEST = 64  # rows of a batch: where a data set is one problem, its draw is noised so often
PILOT, PILOT_WHOLE = 512, 16  # joint draws that set the typical precision of a posterior


class Example(NamedTuple):
    """What a score is regressed on: .5 weight |s(y; x, sigma) - target|^2.

    Attributes:
        y: whitened latents, (n, D).
        sigma: noise level the circuit is told, (n,).
        target: (n, D).
        weight: (n,).
    """

    y: Tensor
    sigma: Tensor
    target: Tensor
    weight: Tensor


class ScoreMatching(Objective):
    """What all score matching has in common: noise on whitened joint draws, and the loss.

    The loss is .5 sigma^2 (1 + sigma^2) |s(y + sigma e; x, sigma) - target|^2, which gives the
    neurons the same say at each noise level. Levels are drawn evenly in log sigma, one half of them
    from the middle of the range, where posteriors take shape.
    """

    needs: ClassVar[type] = HasNoiseLevels
    joint_only = True
    remedy = "Score matching trains circuits with a score at each noise level: ReservoirSampler."
    single: ClassVar[bool] = False

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """{"guide": mean loss per problem}."""
        e = self.example(guide, x, z)
        miss = cast(HasNoiseLevels, guide).smoothed_score(e.y, x, e.sigma) - e.target
        return {"guide": (0.5 * e.weight * miss.square().sum(-1)).mean()}

    def example(self, guide: Guide, x: Observation, z: Values | None) -> Example:
        """A batch of joint draws with noise on them, and what the score should be there."""
        assert z is not None  # Objective.check has seen to it
        circuit = cast(HasNoiseLevels, guide)
        circuit.single_level.fill_(self.single)
        clean = circuit.whiten(z, x)
        clean = clean.expand(FEWEST, -1) if len(clean) == 1 else clean
        sigma = self.levels(circuit, clean[:, 0])
        return self.noised(guide, x, clean, sigma, torch.randn_like(clean))

    def levels(self, circuit: HasNoiseLevels, like: Tensor) -> Tensor:
        """Noise levels shaped as `like`."""
        low, high = circuit.noise
        ratio = high / low
        middle = spread(like, low * ratio ** MIDDLE[0], low * ratio ** MIDDLE[1])
        return torch.where(torch.rand_like(like) < 0.5, spread(like, low, high), middle)

    def noised(
        self, guide: Guide, x: Observation, clean: Tensor, sigma: Tensor, e: Tensor
    ) -> Example:
        """The example at clean + sigma e."""
        y = clean + sigma[:, None] * e
        return Example(y, sigma, -e / sigma[:, None], weight(sigma))


class DenoisingScoreMatching(ScoreMatching):
    """Learn to undo noise: needs simulations alone, and teaches all noise levels at once.

    The target is -e / sigma; its mean given the noisy latents is the score of the blurred
    posterior, for almost every x.

    Differences: Chen et al. use one network without noise input, fine-tuned down a staircase
    (:class:`NoiseStaircase`), and do not weight the loss.

    References:
        A Connection Between Score Matching and Denoising Autoencoders (Vincent, 2011)
        https://doi.org/10.1162/NECO_a_00142
    """


class NoiseStaircase(ScoreMatching):
    """Denoising score matching as Chen et al. published it: one noise level at a time, falling.

    loss = .5 |s(y + sigma e) + e / sigma|^2, unweighted. The circuit has no noise input and is left
    with the smallest level, so that its draws start at the linear guess and have no transient.

    Args:
        levels: noise levels, equally spaced in log sigma from `top` to the circuit's smallest; at
            least 2.
        top: first noise level.

    References:
        Expressive probabilistic sampling in recurrent neural networks (Chen et al., 2023)
        https://arxiv.org/abs/2308.11809
    """

    single = True

    def __init__(self, *, levels: Count = 10, top: Positive = 1.0) -> None:
        super().__init__(levels=levels, top=top)
        if levels < 2 or not 0 < top < math.inf:
            raise BadInput(
                "levels" if levels < 2 else "top", expected="levels >= 2 and top > 0",
                got=f"levels={levels!r}, top={top!r}", fix="NoiseStaircase(levels=10, top=1.0).",
            )  # fmt: skip
        self.steps, self.top = levels, top

    def levels(self, circuit: HasNoiseLevels, like: Tensor) -> Tensor:
        """The step of the staircase that the fit has come to."""
        k = int(self.progress * self.steps) / (self.steps - 1)
        return torch.full_like(like, self.top ** (1 - k) * circuit.noise[0] ** k)

    def noised(
        self, guide: Guide, x: Observation, clean: Tensor, sigma: Tensor, e: Tensor
    ) -> Example:
        """Unweighted, with the noise input held at its smallest value."""
        found = super().noised(guide, x, clean, sigma, e)
        return found._replace(sigma=lowest(guide, sigma), weight=torch.ones_like(sigma))


class ExactScore(ScoreMatching):
    """Regress on the gradient of the model's own log-joint: no noise in the target.

    loss = .5 sigma_min^2 |s(y; x, sigma_min) - grad log p(x, y)|^2 at joint draws with noise of up
    to `broaden` on them, which reaches the barriers between modes. Only the smallest noise level is
    taught, so that draws start at the linear guess and have no transient.

    Args:
        broaden: largest noise on the joint draws, in units of the guess's scale.
    """

    single = True

    def __init__(self, *, broaden: NonNegative = 0.5) -> None:
        super().__init__(broaden=broaden)
        self.broaden = broaden

    def levels(self, circuit: HasNoiseLevels, like: Tensor) -> Tensor:
        """Evenly in log sigma up to `broaden`."""
        return spread(like, circuit.noise[0], self.broaden)

    def noised(
        self, guide: Guide, x: Observation, clean: Tensor, sigma: Tensor, e: Tensor
    ) -> Example:
        """The clean score where the noise has led."""
        y, low = clean + sigma[:, None] * e, lowest(guide, sigma)
        return Example(y, low, model_score(guide, y, x), weight(low))


class MixedScore(ScoreMatching):
    """The model's own score where noise is small, denoising where it is large.

    Given the noisy latents, grad log p at the clean ones and -e / sigma both have the blurred score
    as their mean, and their errors have opposite signs. With weights a and 1 - a,
    a = 1 / (1 + precision sigma^2), they cancel where the posterior is Gaussian of that precision.

    The typical precision, E |grad log p|^2 / D over the joint, is taken once. Needs a log-joint
    that is differentiable: hard edges inside the support ruin it.

    References:
        Target Score Matching (De Bortoli et al., 2024)
        https://arxiv.org/abs/2402.08667
    """

    def __init__(self) -> None:
        super().__init__()
        self._precision: tuple[Any, float] | None = None

    def noised(
        self, guide: Guide, x: Observation, clean: Tensor, sigma: Tensor, e: Tensor
    ) -> Example:
        """a grad log p(clean) - (1 - a) e / sigma."""
        found = super().noised(guide, x, clean, sigma, e)
        a = 1 / (1 + self.precision(guide) * sigma.square())[:, None]
        return found._replace(target=a * model_score(guide, clean, x) + (1 - a) * found.target)

    def precision(self, guide: Guide) -> float:
        """Mean square of the clean score per latent, by the median over joint draws."""
        if self._precision is None or self._precision[0] is not guide:
            lat = guide.latents
            z, x = lat.joint(PILOT, seed=0) if lat.plated else (None, lat.like)
            z = z or lat.joint(PILOT_WHOLE, seed=0)[0]
            y = cast(HasNoiseLevels, guide).whiten(z, x)
            squares = model_score(guide, y, x).square().mean(-1)
            with seeded(0):  # nor may it have hard edges where the circuit will be
                model_score(guide, y + 0.5 * torch.randn_like(y), x)
            to_mean = (1 - 2 / (9 * y.shape[-1])) ** 3  # median over mean of a chi-square
            self._precision = (guide, float(squares.median()) / to_mean)
        return self._precision[1]


class ImplicitScore(ScoreMatching):
    """Minimise E[.5 |s|^2 + div s]: score matching with neither targets nor a differentiable model.

    Needs a circuit that knows its divergence, with a smooth activation.

    References:
        Estimation of Non-Normalized Statistical Models by Score Matching (Hyvarinen, 2005)
        https://jmlr.org/papers/v6/hyvarinen05a.html
    """

    needs = HasDivergence
    remedy = "ReservoirSampler has a divergence; or use DenoisingScoreMatching()."

    def check(self, guide: Guide, *, joint: bool, learn_model: bool) -> None:
        """Also that the circuit has a divergence that can be learned from."""
        super().check(guide, joint=joint, learn_model=learn_model)
        like, circuit = guide.latents.like, cast(HasDivergence, guide)
        y = next(guide.parameters()).new_zeros(guide.latents.problems(like), guide.latents.size)
        circuit.divergence(y, like, torch.full_like(y[:, 0], circuit.noise[0]))

    def forward(
        self, model: ModelLike, guide: Guide, x: Observation, z: Values | None = None
    ) -> dict[str, Tensor]:
        """Weighted as the rest; not bounded by zero."""
        e = self.example(guide, x, z)
        circuit = cast(HasDivergence, guide)
        s = circuit.smoothed_score(e.y, x, e.sigma)
        divergence = circuit.divergence(e.y, x, e.sigma)
        return {"guide": (e.weight * (0.5 * s.square().sum(-1) + divergence)).mean()}


def spread(like: Tensor, low: float, high: float) -> Tensor:
    """Levels evenly in log sigma, shaped as `like`."""
    a, b = math.log(low), math.log(high)
    return torch.exp(a + (b - a) * torch.rand_like(like))


def lowest(guide: Guide, like: Tensor) -> Tensor:
    """The guide's smallest noise level, shaped as `like`."""
    return torch.full_like(like, cast(HasNoiseLevels, guide).noise[0])


def weight(sigma: Tensor) -> Tensor:
    """sigma^2 (1 + sigma^2): the neurons' share of the score has size one."""
    square = sigma.square()
    return square * (1 + square)


def model_score(guide: Guide, y: Tensor, x: Observation) -> Tensor:
    """Gradient of log p(x, y) in whitened latents y (n, D).

    Raises:
        Incompatible: the model has no gradient there.
    """
    circuit, lat = cast(HasNoiseLevels, guide), guide.latents
    with torch.enable_grad():
        at = y.detach().requires_grad_()
        rows = at if lat.plated else at[:, None]
        log_p = lat.log_density(circuit.unwhiten(rows, x), x)
        (found,) = torch.autograd.grad(log_p.sum(), at)
    if not bool(torch.isfinite(found).all() and torch.isfinite(log_p).all()):
        raise Incompatible(
            "model", expected="a log-joint that is finite and differentiable",
            got="NaN or infinity: the density has hard edges",
            fix="Use DenoisingScoreMatching(), which needs simulations alone.",
        )  # fmt: skip
    return found
