"""How a circuit is run: noise levels, steps, corrections, and what is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from .errors import BadInput

__all__ = ["Plan", "Sampling", "Step", "plan"]

LEVELS = 100  # of a transient, unless the user says otherwise
SPACING = 7.0  # noise levels are equally spaced in sigma ** (1 / SPACING)
AFTER = (0.15, 10)  # step in units of sigma^2, and warm-up: a transient leaves little to be done
# Without one the chain must go all the way from the guess. A feature of ten sigma has variance 100
# sigma^2; a step of 5 sigma^2 adds 5 / 200 to it. Exp(-5): .7 % of the guess's error is left.
ALONE, FORGOTTEN = 5.0, 5.0  # step in units of sigma^2; warm-up in relaxation times of the guess
CORRECTIONS = ("none", "model", "own")
RECORDS = ("rates", "spikes")
LEAST = {"levels": 0, "correctors": 0, "warmup": 0, "per_start": 1, "thin": 1}
OPTIONAL = ("levels", "ratio", "step", "warmup")


@dataclass(frozen=True)
class Sampling:
    """How a circuit is run, from the onset of a stimulus to its draws; may be changed at any time.

    First the tonic current that stands for the noise level falls from its largest to its smallest
    value (the transient); then the circuit follows Langevin dynamics at the smallest. A circuit
    that was taught one level alone has no transient. Its chains begin at the linear guess, and
    forgetting it takes 1 / sigma^2 steps, unless `step` or `warmup` says otherwise; the guess's
    weights of modes that are far apart they keep for much longer.

    Attributes:
        levels: noise levels of the transient, 100 by default; 0 starts at the linear guess and has
            none, the default of a circuit that was taught one level alone.
        correctors: Langevin steps at each level.
        ratio: step size in units of sigma^2, where `step` does not set it; .15 by default, and 5
            without a transient, which suits features of ten sigma.
        step: step size of the stationary part, in units of the guess's variance; with a correction
            it is only where the tuning of steps begins.
        warmup: stationary steps before the first draw; by default 10, and without a transient as
            many as take five relaxation times of the guess. The first half tunes corrected steps.
        per_start: draws from one onset; with 1 all draws are independent.
        thin: stationary steps from one draw to the next.
        correction: "none", or a Metropolis correction of the stationary part by the "model"'s joint
            density, or by the circuit's "own" potential, where it has one.
        skew: strength of the skew part of the dynamics, which moves faster and keeps the law.
        path_weights: keep log importance weights of whole paths, valid whatever the score.
        record: what to keep of the neurons: "rates", and "spikes", counts of a time constant whose
            means are the rectified rates.

    Raises:
        BadInput: a field is out of range.
    """

    levels: int | None = None
    correctors: int = 1
    ratio: float | None = None
    step: float | None = None
    warmup: int | None = None
    per_start: int = 1
    thin: int = 1
    correction: str = "none"
    skew: float = 0.0
    path_weights: bool = False
    record: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._require("correction", f"one of {CORRECTIONS}", good=self.correction in CORRECTIONS)
        known = isinstance(self.record, tuple) and set(self.record) <= set(RECORDS)
        self._require("record", f"a tuple out of {RECORDS}", good=known)
        for name, least in LEAST.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            good = whole or self._left_open(name)
            self._require(name, f"an integer >= {least}", good=good)
        for name in ("ratio", "step"):
            value = getattr(self, name)
            good = self._left_open(name) or (_number(value) and value > 0)
            self._require(name, "a positive, finite number", good=good)
        self._require("skew", "a finite number", good=_number(self.skew))
        corrected = self.correction != "none"
        if corrected and self.path_weights:
            raise BadInput(
                "path_weights", expected="plain dynamics", got=f"correction={self.correction!r}",
                fix="Choose one of the two.",
            )  # fmt: skip
        if self.record and (corrected or self.path_weights):
            raise BadInput(
                "record", expected="plain dynamics", got="a correction or path weights",
                fix="Neurons cannot take a step back: leave record=() or the others out.",
            )  # fmt: skip

    def _left_open(self, name: str) -> bool:
        return name in OPTIONAL and getattr(self, name) is None

    def _require(self, name: str, expected: str, *, good: bool) -> None:
        if not good:
            got = repr(getattr(self, name))
            raise BadInput(name, expected=expected, got=got, fix=f"Sampling({name}=...).")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Step:
    """y becomes y + drift * score(y; x, sigma) + noise * xi.

    Attributes:
        sigma: noise level of the score.
        drift: size of the step.
        noise: sd of its noise.
        onward: sd of the noise that leads back up in a transient; None in Langevin steps.
        stationary: belongs to the part after the transient.
        tune: comes early in the warm-up, so that its size may be tuned.
    """

    sigma: float
    drift: float
    noise: float
    onward: float | None = None
    stationary: bool = False
    tune: bool = False

    @property
    def time(self) -> float:
        """Simulated time, in time constants of the neurons."""
        return self.drift / (1 + self.sigma**2)


@dataclass(frozen=True)
class Plan:
    """The steps from an onset on.

    Attributes:
        steps: in their order.
        keep: after how many steps each draw is due.
        start: sd of the first states.
    """

    steps: tuple[Step, ...]
    keep: tuple[int, ...]
    start: float

    @property
    def time(self) -> float:
        """Simulated time of one onset, in time constants of the neurons."""
        return sum(s.time for s in self.steps)


def plan(how: Sampling, low: float, high: float) -> Plan:
    """Noise levels from high to low, then the stationary part at low."""
    n = LEVELS if how.levels is None else how.levels
    ratio = how.ratio or (AFTER[0] if n else ALONE)
    size = how.step or ratio * low**2
    usual = AFTER[1] if n else math.ceil(FORGOTTEN / size)
    warmup = usual if how.warmup is None else how.warmup
    a, b = (s ** (1 / SPACING) for s in (high, low))
    levels = [(a + k / n * (b - a)) ** SPACING for k in range(n)] + [low] if n else []
    steps: list[Step] = []
    for above, sigma in pairwise(levels):
        steps.append(_descend(above, sigma))
        steps += [_langevin(sigma, ratio * sigma**2)] * how.correctors
    told = warmup // 2  # steps of the warm-up that count for the acceptance
    steps += [_langevin(low, size, stationary=True, tune=True)] * (warmup - told)
    steps += [_langevin(low, size, stationary=True)] * told
    keep = tuple(len(steps) + k * how.thin for k in range(how.per_start))
    steps += [_langevin(low, size, stationary=True)] * (keep[-1] - len(steps))
    return Plan(tuple(steps), keep, math.sqrt(1 + high**2) if n else 1.0)


def _langevin(sigma: float, size: float, *, stationary: bool = False, tune: bool = False) -> Step:
    """Unadjusted Langevin step."""
    return Step(sigma, size, math.sqrt(2 * size), stationary=stationary, tune=tune)


def _descend(high: float, low: float) -> Step:
    """From one noise level to the next; exact where the denoised state is constant."""
    gap = high**2 - low**2
    return Step(high, gap, low / high * math.sqrt(gap), math.sqrt(gap))
