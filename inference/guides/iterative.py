"""Circuits that infer by iteration: natural-gradient steps of a belief on the free energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributions import Distribution

from ..arguments import Index, NonNegative, Positive
from ..beliefs import Moment, State
from ..coding import Reader
from ..errors import lookup
from ..guide import Draws, Guide, check_counts, check_number
from ..latents import ModelLike, Values
from ..objectives.free_energy import FreeEnergy
from ..observation import Observation, repeat
from ..progress import bar
from ..seeds import seeded
from ..synapses import synapses

__all__ = ["MODES", "SIGNALS", "Iterative", "Mode", "limit"]

SLOW = 500  # iterations from which a bar is shown


@dataclass(frozen=True)
class Mode:
    """Which free energy the steps descend.

    Attributes:
        leak: pull of the model's prior, in units of beta.
        rolling: the divergence is counted from the belief before, not from the prior.
        wide: potentials are bounded only where numbers would overflow.
    """

    leak: float
    rolling: bool
    wide: bool


MODES: Mapping[str, Mode] = {
    "fixed": Mode(leak=1.0, rolling=False, wide=True),
    "online": Mode(leak=0.0, rolling=True, wide=False),
}


def _draw(q: Distribution) -> Tensor:
    return q.rsample() if q.has_rsample else q.sample()


SIGNALS: Mapping[str, Callable[[Distribution], Tensor]] = {
    "spikes": _draw,
    "rates": lambda q: q.mean,
}


class Iterative(Guide):
    """A guide whose belief q(z given x) starts at the prior and takes steps towards the posterior.

    Subclasses say what a belief is and what force its potentials feel: `family`, `law`, `origin`,
    `force`, `bounds`.

    Args:
        model: one layer of K independent latents of the family, Gaussian noise behind a decoder.
        mode: "fixed" or "online", see :class:`Mode`.
        signal: what neurons send, "spikes" (a draw from the belief) or "rates" (its mean). With
            spikes, draws are successive beliefs' spikes of running circuits, and correlated.
        self_inhibition: use the exact effect of a neuron's own variability; else a learned constant
            inhibition, or what noise happens to say, stands in for it.
        steps: T, of inference.
        training_steps: T of one training step.
        beta: gain of the leak; 1 makes the fixed mode descend the free energy itself.
        step: first step size of neuron k, in units of 1 / (max(1, leak) + load_k), where load_k is
            sum_j |W_kj| Var_q z_j with W = Phi' N^-2 Phi.
        learn_step: step sizes are parameters.
        cautious: the load is that of the moment, so that no problem becomes unstable; otherwise it
            is that of the prior, the largest, once and for all.
    """

    objective = FreeEnergy
    family: ClassVar[type[Distribution]]
    components: ClassVar[int] = 1

    def __init__(
        self,
        model: ModelLike,
        *,
        mode: str = "fixed",
        signal: str = "rates",
        self_inhibition: bool = True,
        steps: Index = 1000,
        training_steps: Index = 16,
        beta: NonNegative = 1.0,
        step: Positive = 1.0,
        learn_step: bool = False,
        cautious: bool = True,
    ) -> None:
        super().__init__(
            model, mode=mode, signal=signal, self_inhibition=self_inhibition, steps=steps,
            training_steps=training_steps, beta=beta, step=step, learn_step=learn_step,
            cautious=cautious,
        )  # fmt: skip
        self.mode = lookup(MODES, mode, "mode")
        self.emit_signal = lookup(SIGNALS, signal, "signal")
        self.independent = signal == "rates"
        check_number("beta", beta)
        check_number("step", step, least=1e-12)
        check_counts(least=0, steps=steps, training_steps=training_steps)
        self.steps, self.training_steps, self.beta = steps, training_steps, beta
        self.exact_self, self.cautious = self_inhibition, cautious
        self.reader = Reader(self.latents, self.family, type(self).__name__)
        like = self.latents.like
        assert isinstance(like, Tensor)
        log_step = like.new_full((self.components,), step).log()
        if not cautious:
            log_step -= self._stiffness()
        self.log_step = nn.Parameter(log_step, requires_grad=learn_step)
        self.eval()  # inference takes `steps`; only a fit trains

    @torch.no_grad()
    def _stiffness(self) -> Tensor:
        """Log of leak and load at the prior."""
        assert isinstance(self.latents.like, Tensor)
        coding = self.reader()
        state = tuple(o[None] for o in self.origin(coding.prior))
        prior = self.law(*state)
        wiring = synapses(coding, self.latents.like[:1], 1)
        return (self._leak + wiring.load(prior.variance, prior.mean).max()).log()

    @property
    def _leak(self) -> float:
        """What the leak adds to the stiffness, which is in units of it."""
        return max(1.0, self.mode.leak * self.beta)

    # ---------------------------------------------------------------------- what subclasses say

    def law(self, *state: Tensor, temperature: float = 0.0) -> Any:
        """The belief of potentials (B, ...): batch shape (B, ...)."""
        raise NotImplementedError

    def origin(self, prior: Distribution) -> State:
        """Potentials of the prior, each (K,)."""
        raise NotImplementedError

    def force(self, now: Moment, origin: State) -> State:
        """Natural gradient of the free energy, downhill, each (B, K)."""
        raise NotImplementedError

    @property
    def bounds(self) -> tuple[tuple[float, float], ...]:
        """Smallest and largest value of each potential."""
        raise NotImplementedError

    def start(self, x: Tensor, origin: State) -> State:
        """Potentials before the first step, each (B, K)."""
        return tuple(o.expand(len(x), -1) for o in origin)

    # -------------------------------------------------------------------------------- iteration

    def unroll(
        self,
        x: Observation,
        *,
        steps: int,
        state: State | None = None,
        temperature: float = 0.0,
        truncate: int = 0,
    ) -> Iterator[Moment]:
        """Beliefs from the start on, steps + 1 of them, with gradients where these are on.

        Args:
            x: observation of B problems.
            steps: T.
            state: potentials to start from; by default those of `start`.
            temperature: of relaxed spikes; at 0 they are whole and carry no gradient.
            truncate: after every so many steps gradients are cut; 0 means never.
        """
        assert isinstance(x, Tensor)
        coding = self.reader()
        wiring = synapses(coding, x, steps + 1)
        origin = self.origin(coding.prior)
        past, state, stiffness = origin, state or self.start(x, origin), x.new_ones(())
        for t in range(steps + 1):
            q = self.law(*state)
            relaxed = self.law(*state, temperature=temperature) if temperature else q
            signal = self.emit_signal(relaxed)
            now = Moment(
                state, q, self.law(*past), relaxed, signal,
                wiring.currents(signal), wiring, not self.independent,
            )  # fmt: skip
            yield now
            if t < steps:
                if truncate and t and t % truncate == 0:
                    now = _cut(now, origin, self.law)
                past = now.state if self.mode.rolling else origin
                if self.cautious:
                    stiffness = self._leak + wiring.load(now.q.variance, signal)
                state = self.advance(now, origin, stiffness)

    def advance(self, now: Moment, origin: State, stiffness: Tensor) -> State:
        """One step: each potential moves along its force, and stays within its bounds."""
        sizes = self.log_step.exp()
        moved = zip(now.state, self.force(now, origin), sizes, self.bounds, strict=True)
        return tuple(limit(s + h / stiffness * f, *edge) for s, f, h, edge in moved)

    def settle(self, x: Observation) -> State:
        """Potentials after the last step, each (B, K); no gradients outside of training."""
        self.reader.check(x)
        steps = self.training_steps if self.training else self.steps
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            for now in self.unroll(x, steps=steps):
                state = now.state
        return state

    # ------------------------------------------------------------------------------- as a guide

    def forward(self, x: Observation) -> Values:
        """Spikes of the last belief of a run for each problem."""
        state = self.settle(x)
        with self.latents.plate(x):
            return self.sample_sites(
                lambda s: self.law(*(t.reshape(-1, *s.shape) for t in state)).to_event(s.event_dim)
            )

    def log_prob(self, z: Values, x: Observation) -> Tensor:
        """log q(z given x) after one run, (..., B), in nats.

        With spikes the run is random, and its mean over runs is a lower bound of the log-density.
        """
        (site,) = self.latents.sites
        value = z[site.name]
        flat = value.reshape(*value.shape[: value.dim() - len(site.shape)], -1)
        log_q: Tensor = self.law(*self.settle(x)).log_prob(flat).sum(-1)
        return log_q

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Independent draws from the last belief, or, with spikes, the spikes of further steps.

        Args:
            x: observation of B problems.
            draws: draws per chain.
            chains: with spikes, so many runs.
            seed: draws depend on it alone.
            progress: show a bar.

        Returns:
            Latents; in `stats` log q given the run; of spiking circuits in `circuit` spikes, rates
            and potentials, and one time constant per step.
        """
        check_counts(draws=draws, chains=chains)
        (site,) = self.latents.sites
        with torch.no_grad(), seeded(seed):
            if self.independent:
                q = self.law(*self.settle(x))
                z = q.sample(torch.Size([chains, draws]))
                return Draws({site.name: z.reshape(*z.shape[:3], *site.shape)},
                             {"log_q": q.log_prob(z).sum(-1)})  # fmt: skip
            return self._run(x, draws, chains, progress=progress)

    def _run(self, x: Observation, draws: int, chains: int, *, progress: bool) -> Draws:
        """Spikes of `draws` steps after the first `steps`, in `chains` runs side by side."""
        self.reader.check(x)
        (site,) = self.latents.sites
        total = self.steps + draws
        kept: dict[str, list[Tensor]] = {"z": [], "rates": [], "log_q": []}
        show = progress and total > SLOW
        with bar(type(self).__name__, total, show=show) as advance:
            for t, now in enumerate(self.unroll(repeat(x, chains), steps=total - 1)):
                if t >= self.steps:
                    kept["z"].append(now.signal)
                    kept["rates"].append(now.q.mean)
                    kept["log_q"].append(now.q.log_prob(now.signal).sum(-1))
                advance()
        b = self.latents.problems(x)
        found = {
            n: torch.stack(v).reshape(draws, chains, b, *v[0].shape[1:]).transpose(0, 1)
            for n, v in kept.items()
        }
        values = {site.name: found["z"].reshape(chains, draws, b, *site.shape)}
        circuit = {"rates": found["rates"], "spikes": found["z"]}
        return Draws(values, {"log_q": found["log_q"]}, circuit, float(chains * total))


def _cut(now: Moment, origin: State, law: Callable[..., Distribution]) -> Moment:
    """The same moment without its past: gradients end here, but that the start moves all of it."""
    state = tuple(o + (s - o).detach() for s, o in zip(now.state, origin, strict=True))
    signal = now.signal.detach()
    return replace(
        now, state=state, q=law(*state), signal=signal, currents=now.synapses.currents(signal)
    )


class _Limit(torch.autograd.Function):
    """Keeps its result alone, from which its slope can be told."""

    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor, low: float, high: float) -> Tensor:
        """v, bounded."""
        edge = high - 1
        y = v.clamp(low, edge)
        if v.device.type != "cpu" or float(v.max()) > edge:  # looking would make a GPU wait
            y += torch.tanh((v - edge).clamp_min(0))
        ctx.save_for_backward(y)
        ctx.edge, ctx.low = edge, low  # type: ignore[attr-defined]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """1 inside, 0 at the floor, 1 - tanh^2 near the ceiling."""
        (y,) = ctx.saved_tensors
        slope = 1 - (y - ctx.edge).clamp_min(0).square()
        return grad * slope.masked_fill_(y <= ctx.low, 0), None, None


def limit(v: Tensor, low: float, high: float) -> Tensor:
    """v itself from low to high - 1; below it is low, above it bends and stays below high."""
    y: Tensor = _Limit.apply(v, low, high)  # type: ignore[no-untyped-call]
    return y
