"""The one noun: a guide answers "what are the latents, given x?"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from .errors import BadInput
from .implicit import Implicit
from .latents import MAX_ROWS, Energies, Latents, ModelLike, Site, Values
from .module import LocalModule
from .objective import Objective
from .observation import Observation, parts, repeat
from .seeds import seeded
from .show import card, first_line, knobs_of, title_of

__all__ = [
    "Draws",
    "Guide",
    "HasClosedForm",
    "HasDensity",
    "HasDivergence",
    "HasEvidence",
    "HasNoise",
    "HasNoiseLevels",
    "HasRsample",
    "HasScore",
]


@runtime_checkable
class HasDensity(Protocol):
    """log q(z given x): for ELBO, importance weights, k-hat."""

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """Latents (..., B, *shape) to log-density (..., B), in nats."""


@runtime_checkable
class HasScore(Protocol):
    """The gradient of log q(z given x) in packed latents: for score matching."""

    def score(self, z: Values, x: Observation) -> Tensor:
        """Latents (..., B, *shape) to score (..., B, D)."""


@runtime_checkable
class HasNoiseLevels(Protocol):
    """A score at every level of noise on whitened latents y: for score matching.

    Attributes:
        noise: smallest and largest level.
        single_level: whether the smallest is all it was taught; objectives set it.
    """

    noise: tuple[float, float]
    single_level: Tensor

    def whiten(self, z: Values, x: Observation) -> Tensor:
        """Latents (..., B, *shape) to y (..., B, D)."""

    def unwhiten(self, y: Tensor, x: Observation) -> Tensor:
        """y to packed latents (..., B, D)."""

    def smoothed_score(self, y: Tensor, x: Observation, sigma: Tensor) -> Tensor:
        """Score (B, D) at y (B, D) of q(y given x) blurred by noise of sd sigma (B,)."""


@runtime_checkable
class HasDivergence(HasNoiseLevels, Protocol):
    """The divergence of that score in closed form: for implicit score matching."""

    def divergence(self, y: Tensor, x: Observation, sigma: Tensor) -> Tensor:
        """Divergence (B,) of the smoothed score at y (B, D)."""


@runtime_checkable
class HasClosedForm(Protocol):
    """Learned in closed form: fit hands it batches, and then lets it settle."""

    def absorb(self, objective: Objective, x: Observation, z: Values | None) -> None:
        """Take in a batch."""

    def settle(self) -> float:
        """Learn from all of them; returns the mean loss."""


@runtime_checkable
class HasNoise(Protocol):
    """Gaussian noise of known size per unit or synapse: for the reliability cost."""

    def noise(self, x: Observation) -> Tensor:
        """Standard deviations of independent noise, (B, units)."""

    def energies(
        self, x: Observation, *, particles: int = 1, share: float = 1.0, at_mean: bool = False
    ) -> Energies:
        """What the noisy circuit achieves and pays; see :class:`inference.noise.GaussianNoise`."""


@runtime_checkable
class HasRsample(Protocol):
    """Differentiable draws: for adversarial objectives and the energy score.

    They are codes (:class:`inference.codes.Codes`): packed latents, where all are continuous.
    """

    def rsample(self, x: Observation, shape: torch.Size = ...) -> Tensor:
        """Draws (*shape, B, C) with gradients; by default one per problem, (B, C)."""


@runtime_checkable
class HasEvidence(Protocol):
    """An exact posterior that also knows log p(x)."""

    def log_evidence(self, x: Observation) -> Tensor:
        """log p(x) for each problem, (B,), in nats."""


@dataclass(frozen=True)
class Draws:
    """What a guide drew.

    Attributes:
        values: latents by site name, each (chains, draws, B, *shape).
        stats: one number per draw, each (chains, draws, B).
        circuit: what the neurons did, by quantity, each (chains, draws, B, ...).
        time_constants: simulated time of all chains together, where time is simulated.
    """

    values: Values
    stats: Values = field(default_factory=dict)
    circuit: Values = field(default_factory=dict)
    time_constants: float | None = None


class Guide(LocalModule):
    """A Pyro program q(z given x) with the latents of a model.

    Subclasses write `forward(x)` (sample statements inside the plate "data"), and `log_prob` or one
    of the other protocols where they can. The model is referred to, not owned: its parameters are
    not the guide's.

    Args:
        model: the model whose latents the guide samples.
        **knobs: what the subclass was built with; kept in checkpoints.

    Attributes:
        objective: the objective it was published with, used where none is named.
        amortised: it answers for any x; otherwise only for the x it was fitted to.
        takes_rows: answers for its data set, which is one problem, from some of the rows of it.
        independent: its draws are independent, so chains say nothing about convergence.
    """

    objective: ClassVar[type[Objective] | None] = None
    amortised: ClassVar[bool] = True
    takes_rows: ClassVar[bool] = False
    independent: bool = True

    def __init__(self, model: ModelLike, **knobs: Any) -> None:
        super().__init__()
        self.__dict__["model"] = model  # past nn.Module's registration of submodules
        self.__dict__["_latents"] = None
        self.knobs = knobs

    @property
    def latents(self) -> Latents:
        """The model's latents, on the device and in the dtype the model has now."""
        like = parts(self.model.observations())[0]
        known: Latents | None = self.__dict__["_latents"]
        if (
            known is None
            or (t := parts(known.like)[0]).device != like.device
            or t.dtype != like.dtype
        ):
            known = self.__dict__["_latents"] = Latents(self.model)
        return known

    def extra_repr(self) -> str:
        """The model and the knobs, inside the brackets."""
        return ", ".join([title_of(self.model), *knobs_of(self.knobs)])

    def __repr__(self) -> str:
        with seeded(0):  # zuko runs its flows to show them
            text: str = super().__repr__()
        return text

    def _repr_html_(self) -> str:
        objective = self.objective.__name__ if self.objective else "none: nothing to train"
        rows = [
            ("model", title_of(self.model)),
            ("latents", self.latents.described()),
            ("knobs", ", ".join(knobs_of(self.knobs)) or "none"),
            ("parameters", f"{sum(p.numel() for p in self.parameters()):,}"),
            ("answers for", "any x" if self.amortised else "the x it was fitted to"),
            ("density", "yes" if isinstance(self, HasDensity) else "no: it can only be sampled"),
            ("objective", objective),
        ]
        return card(f"{type(self).__name__}: {first_line(self)}", rows)

    def forward(self, x: Observation) -> Any:
        """Sample the model's latent sites inside the plate "data"."""
        raise NotImplementedError

    def bind(self, x: Observation) -> None:
        """Called before a fit: guides with parameters per problem create them here."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take parameters and buffers from a checkpoint."""
        self.load_state_dict(state)

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Sample q(z given x): by default independent draws, in big batches.

        Args:
            x: observation of B problems.
            draws: draws per chain.
            chains: chains.
            seed: draws depend on it alone.
            progress: show a bar where drawing takes long.
        """
        check_counts(draws=draws, chains=chains)
        lat = self.latents
        lat.check(x)
        b = lat.problems(x)
        with torch.no_grad(), seeded(seed):
            pieces = self._pieces(x, chains * draws, b)
        names = lat.names
        flat = {n: torch.cat([p[n] for p in pieces]) for n in names}
        return Draws({n: v.reshape(chains, draws, b, *v.shape[2:]) for n, v in flat.items()})

    def sample_sites(self, make: Callable[[Site], TorchDistribution]) -> Values:
        """A sample statement for each latent site, inside the site's own plates.

        Args:
            make: the distribution of a site; batch and event as in the model.
        """
        plates: dict[str, Any] = {}
        found = {}
        for s in self.latents.sites:
            with ExitStack() as stack:
                for name, dim, size in s.plates:
                    plates[name] = plates.get(name) or pyro.plate(name, size, dim=dim)
                    stack.enter_context(plates[name])
                found[s.name] = pyro.sample(s.name, make(s))
        return found

    def emit(self, values: Values, x: Observation) -> Values:
        """Sample statements, without a density, for draws made elsewhere: latents (B, *shape)."""
        lat = self.latents
        chosen = values
        if not lat.plated:
            chosen = {s.name: values[s.name].select(-1 - len(s.shape), 0) for s in lat.sites}
        with lat.plate(x):
            return self.sample_sites(lambda s: Implicit(chosen[s.name], event_dim=s.event_dim))

    def trace(self, x: Observation) -> poutine.Trace:
        """Trace of one call.

        Raises:
            BadInput: a latent site of the model is missing; Pyro would take it from the prior.
        """
        with poutine.block():
            trace = poutine.trace(self).get_trace(x)
        missing = [s for s in self.latents.names if s not in trace.nodes]
        if missing:
            raise BadInput(
                "guide",
                expected=f"sample statements for {list(self.latents.names)}",
                got=f"none for {missing}",
                fix="Add pyro.sample for each of them, with the model's site names.",
            )
        return trace

    def _pieces(self, x: Observation, total: int, b: int) -> list[Values]:
        """Draws through `forward`, as more problems: pieces of (S, B, *shape) by site."""
        step = max(1, MAX_ROWS // b) if self.latents.plated else 1
        pieces = []
        for start in range(0, total, step):
            n = min(step, total - start)
            nodes = self.trace(repeat(x, n)).nodes
            pieces.append(
                {s.name: nodes[s.name]["value"].reshape(n, b, *s.shape) for s in self.latents.sites}
            )
        return pieces


def check_counts(*, least: int = 1, **counts: int) -> None:
    """Raise :class:`BadInput` unless every count is an integer, and at least so large."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = f"an integer >= {least}"
            raise BadInput(name, expected=wanted, got=repr(value), fix=f"{name}=1000.")


def check_number(name: str, value: float, *, least: float = 0.0, usual: float = 1.0) -> None:
    """Raise :class:`BadInput` unless a number is finite, and at least so large."""
    if not least <= value < math.inf:
        wanted = f"a number >= {least:g}"
        raise BadInput(name, expected=wanted, got=repr(value), fix=f"{name}={usual:g}.")


def check_positive(name: str, value: float, *, usual: float) -> None:
    """Raise :class:`BadInput` unless a number is finite and above zero."""
    if not 0 < value < math.inf:
        wanted = "a positive, finite number"
        raise BadInput(name, expected=wanted, got=repr(value), fix=f"{name}={usual:g}.")
