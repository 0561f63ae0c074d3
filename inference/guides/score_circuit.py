"""Circuits whose output follows a learned score: what all of them have in common."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..activation import ACTIVATIONS, Activation
from ..arguments import Count, Index, Portion, Positive
from ..errors import BadInput, Incompatible, lookup
from ..guide import Draws, Guide, check_counts
from ..langevin import Chains, OutputChains
from ..latents import ModelLike, Values
from ..objectives.score_matching import DenoisingScoreMatching
from ..observation import Observation, flatten
from ..onset import Onset
from ..progress import bar
from ..sampling import Sampling, plan
from ..seeds import seeded
from ..tonic import Level, Tonic, TonicInput
from ..whitening import Whitening

__all__ = ["ScoreCircuit"]

CELLS = 1 << 21  # numbers in the widest buffer of one call of the circuit
PILOT, PILOT_WHOLE = 2048, 64  # joint draws behind the guess; where a data set is one problem


class ScoreCircuit(Guide):
    """A guide whose outputs y follow dy = s(y; x, sigma) dt + sqrt(2) dB.

    Latents are packed and whitened by a linear guess, so that the leak -y is the score of the guess
    and the neurons only learn what it leaves over. With y' = y - centre(x):

        s(y; x, sigma) = (-y' + a(sigma) (field(y'; x, sigma) + drive(x, sigma))) / (1 + sigma^2)

    and a(sigma) = sqrt(1 + sigma^2) / sigma. Subclasses write `field`.

    Args:
        model: any model with continuous latents.
        neurons: N; 0 means that the outputs are the neurons.
        activation: phi: relu, tanh, softplus or squareplus.
        gain: tonic inputs multiply, too, and do not only add.
        dropout: share of the perceptrons' units left out in training: for few simulations.
        hidden: widths of the perceptrons behind the tonic inputs.
        noise: smallest and largest noise level, in units of the linear guess's scale. The smallest
            blurs the posterior and should be a tenth of its narrowest feature; far below that the
            score gets worse, as the neurons' effect on it grows as 1 / sigma.
        seed: of the initial weights.
        sampling: how the circuit is run.

    Attributes:
        single_level: the circuit was taught its smallest noise level alone.
    """

    objective = DenoisingScoreMatching
    single_level: Tensor

    def __init__(
        self,
        model: ModelLike,
        *,
        neurons: Index = 0,
        activation: str = "relu",
        gain: bool = True,
        dropout: Portion = 0.0,
        hidden: tuple[Count, ...] = (64, 64),
        noise: tuple[Positive, Positive] = (0.02, 10.0),
        seed: Index = 0,
        sampling: Sampling | None = None,
    ) -> None:
        lookup(ACTIVATIONS, activation, "activation")
        super().__init__(
            model, activation=activation, gain=gain, dropout=dropout, hidden=hidden, noise=noise,
            seed=seed, **({"neurons": neurons} if neurons else {}),
        )  # fmt: skip
        if not 0 < noise[0] < noise[1] < math.inf:
            raise BadInput(
                "noise", expected="0 < smallest < largest", got=repr(noise), fix="(0.01, 10.0)"
            )
        lat = self.latents
        lat.require_continuous(type(self).__name__)
        self.sampling = sampling or Sampling()
        neurons = neurons or lat.size
        self.neurons, self.noise = neurons, noise
        z, x = lat.joint(PILOT if lat.plated else PILOT_WHOLE, seed=0)
        u = lat.pack(z)[0]
        features = flatten(x, len(u))
        self.whitening = Whitening(features, u)
        with seeded(seed):
            self.input = TonicInput(
                features.shape[1], neurons, lat.size, hidden, noise, gain=gain, dropout=dropout
            )
            turn = torch.randn(lat.size, lat.size)
        self.input.to(u)
        turn = turn - turn.T
        largest = torch.linalg.matrix_norm(turn, 2).clamp_min(1e-12)
        self.register_buffer("turn", (turn / largest).to(u))
        self.eval()  # dropout is for training
        self.register_buffer("single_level", torch.tensor(False, device=u.device))

    @property
    def phi(self) -> Activation:
        """Activation of the neurons."""
        return ACTIVATIONS[self.knobs["activation"]]

    @property
    def sampling(self) -> Sampling:
        """How the circuit is run; no part of a fit or of its checkpoint."""
        found: Sampling = self.__dict__["_sampling"]
        return found

    @sampling.setter
    def sampling(self, how: Sampling) -> None:
        """Run it in another way from now on."""
        self.__dict__["_sampling"] = how
        self.__dict__["independent"] = how.per_start == 1

    # ------------------------------------------------------------------------ what it computes

    def field(self, y: Tensor, tonic: Tonic, work: Tensor | None = None) -> Tensor:
        """What the neurons send to the outputs at y (..., B, D): (..., B, D).

        Args:
            y: outputs, scaled to unit size.
            tonic: inputs.
            work: room for the neurons' activity, (rows, N).
        """
        raise NotImplementedError

    def precondition(self, s: Tensor) -> Tensor:
        """A last linear map of the score, (..., B, D)."""
        return s

    def standard(self, x: Observation) -> Tensor:
        """Standardised features of x, (B, F)."""
        return self.whitening.standardise(flatten(x, self.latents.problems(x)))

    def level(self, standard: Tensor, sigma: Tensor) -> Level:
        """Inputs for features (B, F) at noise levels (B,)."""
        return Level(self.input(standard, sigma), sigma[:, None])

    def at(self, y: Tensor, level: Level, work: Tensor | None = None) -> Tensor:
        """The score at y (..., B, D)."""
        tonic, root = level.tonic, level.variance.sqrt()
        scaled = (y - tonic.centre) / root
        inside = self.field(scaled, tonic, work) + tonic.drive
        return self.precondition((inside / level.sigma - scaled) / root)

    def whiten(self, z: Values, x: Observation) -> Tensor:
        """Latents (..., B, *shape) to y (..., B, D)."""
        return self.whitening.whiten(self.latents.pack(z)[0], self.standard(x))

    def unwhiten(self, y: Tensor, x: Observation) -> Tensor:
        """y to packed latents (..., B, D)."""
        return self.whitening.unwhiten(y, self.standard(x))

    def smoothed_score(self, y: Tensor, x: Observation, sigma: Tensor) -> Tensor:
        """Score, in y, of q(. given x) blurred by noise of sd sigma.

        Args:
            y: (B, D).
            x: observation of B problems, or of one.
            sigma: (B,).
        """
        return self.at(y, self.level(self.standard(x), sigma))

    def score(self, z: Values, x: Observation) -> Tensor:
        """Gradient of log q at the smallest noise level, in packed latents, (..., B, D)."""
        y = self.whiten(z, x)
        s = self.at(y, self.lowest(x))[..., None]
        u: Tensor = torch.linalg.solve_triangular(self.whitening.root.T, s, upper=True)
        return u[..., 0]

    def lowest(self, x: Observation) -> Level:
        """Inputs at the smallest noise level."""
        standard = self.standard(x)
        return self.level(standard, standard.new_full((len(standard),), self.noise[0]))

    # ------------------------------------------------------------------------- how it is run

    def forward(self, x: Observation) -> Values:
        """One draw per problem, from an onset of its own."""
        values = self.draw(x, draws=1, chains=1, seed=int(torch.randint(2**31, ()))).values
        return self.emit({n: v[0, 0] for n, v in values.items()}, x)

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Run the circuit from the onset of x, many times at once.

        Args:
            x: observation of B problems.
            draws: draws per chain.
            chains: chains; each takes ceil(draws / sampling.per_start) onsets.
            seed: draws depend on it alone.
            progress: show a bar.

        Raises:
            Diverged: a chain has left for good; the message names a step size to use.
            Incompatible: the circuit has no potential, and `sampling` asks for its own correction.
        """
        check_counts(draws=draws, chains=chains)
        self.latents.check(x)
        how = self.how()
        route = plan(how, *self.noise)
        onsets = -(-draws // how.per_start)
        total, b = chains * onsets, self.latents.problems(x)
        rows = max(1, CELLS // (b * self.neurons))
        sizes = [min(rows, total - c) for c in range(0, total, rows)]
        steps = len(sizes) * len(route.steps)
        title = type(self).__name__
        with torch.no_grad(), seeded(seed), bar(title, steps, show=progress) as advance:
            onset = Onset(self, x, how, route)
            found = [onset.run(n, advance) for n in sizes]

        def chain_by_chain(name: str) -> Tensor:
            pieces = [f.pop(name) for f in found]
            t = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            return t.reshape(chains, onsets * how.per_start, *t.shape[2:])[:, :draws]

        parts = {name: chain_by_chain(name) for name in tuple(found[0])}
        values = self.latents.unpack(parts.pop("u"))[0]
        circuit = {"rates": parts.pop("rates")} if how.record else {}
        if "spikes" in how.record:
            with seeded(seed, 1):
                circuit["spikes"] = torch.poisson(circuit["rates"].clamp_min(0))
        circuit = {name: circuit[name] for name in how.record}
        return Draws(values, parts, circuit, time_constants=onset.time)

    def trajectory(self, x: Observation, *, runs: int, seed: int) -> Draws:
        """All that the neurons and outputs do from the onset of x on; uncorrected.

        Args:
            x: observation of B problems.
            runs: onsets, each with noise of its own.
            seed: everything depends on it alone.

        Returns:
            Draws that are steps, the onset first: latents and `rates`, each (runs, steps + 1, B,
            ...), and in `stats` the `time`, in time constants, and the `noise` level.
        """
        check_counts(runs=runs)
        self.latents.check(x)
        how = replace(self.how(), correction="none", path_weights=False, record=("rates",))
        route = plan(how, *self.noise)
        every = replace(route, keep=tuple(range(len(route.steps) + 1)))
        with torch.no_grad(), seeded(seed):
            found = Onset(self, x, how, every).run(runs, lambda _="": None)
        like = found["u"][..., 0]
        known = {
            "time": [0.0, *accumulate(s.time for s in route.steps)],
            "noise": [*(s.sigma for s in route.steps), self.noise[0]],
        }
        stats = {n: like.new_tensor(t)[:, None].expand(like.shape) for n, t in known.items()}
        values = self.latents.unpack(found["u"])[0]
        return Draws(values, stats, {"rates": found["rates"]}, runs * route.time)

    def how(self) -> Sampling:
        """`sampling`, without a transient where only the smallest noise level was taught."""
        how = self.sampling
        return replace(how, levels=0) if how.levels is None and bool(self.single_level) else how

    def potential(self, y: Tensor, level: Level) -> Tensor:
        """Log-density of y (..., B, D) up to a constant, (..., B), where the score has one.

        Raises:
            Incompatible: it has none.
        """
        raise Incompatible(
            type(self).__name__, expected="tied weights", got="a score that is no gradient",
            fix="Use EnergyReservoir, or correction='model'.",
        )  # fmt: skip

    def chains(self, y: Tensor, onset: Onset) -> Chains:
        """Chains that begin at y."""
        how = onset.how
        return OutputChains(
            y, onset.score, target=onset.target(), weighted=how.path_weights,
            skew=how.skew * self.turn if how.skew else None,
        )  # fmt: skip
