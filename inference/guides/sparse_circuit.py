"""Sparse coding: circuits that settle where the posterior is largest, most neurons silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Laplace, MultivariateNormal

from ..arguments import Count, NonNegative
from ..beliefs import State
from ..coding import Reader
from ..errors import Incompatible
from ..guide import Draws, Guide, check_counts, check_number
from ..latents import ModelLike, Values
from ..observation import Observation
from ..packed import PackedGuide
from ..seeds import seeded
from ..synapses import Synapses, synapses

__all__ = ["ISTA", "LCA", "Lasso", "SparseCircuit", "SparseLaplace"]

CHECK = 10  # steps between looks at whether all problems are solved
ROUNDING = 2.0  # twice what was seen in float32, in units of eps L |x| |phi|


def _soft(v: Tensor, threshold: Tensor) -> Tensor:
    """v moved towards zero by the threshold, and zero within it."""
    return v - v.clamp(-threshold, threshold)


def _one_sided(v: Tensor, threshold: Tensor) -> Tensor:
    """v less the threshold, and zero below it."""
    return (v - threshold).clamp_min(0)


@dataclass(frozen=True)
class Lasso:
    """For each of B problems: minimise -log p(x given loc + y) + sum_k rate_k |y_k| over y.

    But for a constant that is -log p(x, z) at z = loc + y.

    Attributes:
        wiring: of x to the neurons.
        shrink: the threshold, on both sides or on one.
        loc: of the prior, (K,).
        rate: one over the prior's scale, (K,).
        phi: decoder in units of the noise, (F, K); W = phi' phi.
        gain: D = diag(W), (K,).
        step: one over the largest eigenvalue of D^-1/2 W D^-1/2.
        rounding: violation that rounding may leave, (B,).
    """

    wiring: Synapses
    shrink: Callable[[Tensor, Tensor], Tensor]
    loc: Tensor
    rate: Tensor
    phi: Tensor
    gain: Tensor
    step: Tensor
    rounding: Tensor

    def currents(self, y: Tensor) -> Tensor:
        """b - W y, minus the slope of the first term: (B, K)."""
        return self.wiring.currents(self.loc + y)

    def violation(self, y: Tensor) -> Tensor:
        """Largest distance of zero from the subdifferential at y, in units of the rate, (B,)."""
        slope = self.currents(y)
        missed = torch.where(y == 0, self.shrink(slope, self.rate), slope - self.rate * y.sign())
        return (missed.abs() / self.rate).amax(-1)

    def solved(self, y: Tensor, tolerance: float) -> bool:
        """Whether no problem's violation exceeds the tolerance, or what rounding leaves."""
        return bool((self.violation(y) <= tolerance + self.rounding).all())


def _lasso_of(reader: Reader, x: Tensor, *, visits: int, nonnegative: bool) -> Lasso:
    """The problem that x (B, ...) poses, for so many visits of its currents."""
    coding = reader()
    prior = coding.prior
    assert isinstance(prior, Laplace)
    assert coding.weights is not None  # the guide has seen to it
    phi, rate = coding.weights / coding.noise[:, None], 1 / prior.scale
    info = torch.finfo(phi.dtype)
    gain = phi.square().sum(0).clamp_min(info.tiny)  # a feature that is zero gets no current
    unit = phi / gain.sqrt()
    gram = unit.T @ unit if len(gain) < len(phi) else unit @ unit.T
    largest = torch.linalg.eigvalsh(gram)[-1].clamp_min(1)
    centred = (x.flatten(1) - coding.offset) / coding.noise - phi @ prior.loc
    reach = centred.norm(dim=-1) * (gain.sqrt() / rate).max()
    return Lasso(
        synapses(coding, x, visits), _one_sided if nonnegative else _soft, prior.loc, rate, phi,
        gain, 1 / largest, ROUNDING * info.eps * largest * reach,
    )  # fmt: skip


class SparseCircuit(Guide):
    """Base: neurons that settle at the mode of the posterior, of which all draws are copies.

    It has no density: under an ELBO it would turn variational inference into maximum a posteriori
    without a word. `MAPEnergy` learns a model with it; `SparseLaplace` puts a width around it.

    Subclasses say how the neurons start, move and answer: `start`, `advance`, `answer`.

    Args:
        model: independent Laplace latents, Gaussian noise behind a linear decoder.
        nonnegative: latents stay above the prior's location, as under an exponential prior.
        steps: at most.
        tolerance: of the optimality conditions, in units of the prior's rate, at which all problems
            of a batch are taken for solved. What is left is `violation` in the stats of draws.

    Raises:
        Incompatible: the model is of another form.
        BadInput: a knob is out of range.
    """

    def __init__(
        self,
        model: ModelLike,
        *,
        nonnegative: bool = False,
        steps: Count = 5000,
        tolerance: NonNegative = 1e-6,
    ) -> None:
        super().__init__(model, nonnegative=nonnegative, steps=steps, tolerance=tolerance)
        check_counts(steps=steps)
        check_number("tolerance", tolerance, usual=1e-6)
        self.nonnegative, self.steps, self.tolerance = nonnegative, steps, tolerance
        self.reader = Reader(self.latents, Laplace, type(self).__name__)
        if not self.reader.linear:
            raise Incompatible(
                f"{type(self).__name__} and the model", expected="a linear decoder",
                got="a nonlinear one, behind which thresholds need not find the mode",
                fix="Use NUTS or an encoder.",
            )  # fmt: skip

    # ---------------------------------------------------------------------- what subclasses say

    def start(self, rest: Tensor) -> State:
        """Potentials at rest; `rest` is zeros (B, K)."""
        return (rest,)

    def advance(self, lasso: Lasso, state: State) -> State:
        """One step."""
        raise NotImplementedError

    def answer(self, lasso: Lasso, state: State) -> Tensor:
        """What neurons send, y (B, K)."""
        return state[0]

    # ---------------------------------------------------------------------------- the iteration

    @torch.no_grad()
    def _states(self, x: Observation, steps: int) -> Iterator[tuple[Lasso, State]]:
        """The problem, and potentials at the start and after each of so many steps."""
        self.reader.check(x)
        assert isinstance(x, Tensor)
        problem = _lasso_of(self.reader, x, visits=steps + 1, nonnegative=self.nonnegative)
        state = self.start(problem.loc.new_zeros(len(x), len(problem.loc)))
        for _ in range(steps):
            yield problem, state
            state = self.advance(problem, state)
        yield problem, state

    def path(self, x: Observation, *, steps: int) -> Iterator[Tensor]:
        """Latents (B, K) at the start and after each of so many steps, at rest or not."""
        for problem, state in self._states(x, steps):
            yield problem.loc + self.answer(problem, state)

    def settle(self, x: Observation) -> tuple[Lasso, State]:
        """The problem, and potentials once it is solved or the steps are done."""
        for t, (problem, state) in enumerate(self._states(x, self.steps)):
            if t % CHECK == 0 and problem.solved(self.answer(problem, state), self.tolerance):
                break
        return problem, state

    def posterior_mode(self, x: Observation) -> Values:
        """Where the posterior is largest: latents by site, (B, *shape)."""
        return self._by_site(*self.settle(x))

    def _by_site(self, problem: Lasso, state: State) -> Values:
        (site,) = self.latents.sites
        z = problem.loc + self.answer(problem, state)
        return {site.name: z.reshape(-1, *site.shape)}

    # ------------------------------------------------------------------------------- as a guide

    def forward(self, x: Observation) -> Values:
        """Sample statements of the mode, without a density."""
        return self.emit(self.posterior_mode(x), x)

    def activity(self, problem: Lasso, state: State) -> Values:
        """What the neurons do at rest, by quantity, (B, K)."""
        return {}

    def draw(
        self, x: Observation, *, draws: int, chains: int, seed: int, progress: bool = False
    ) -> Draws:
        """Copies of the mode.

        Args:
            x: observation of B problems.
            draws: copies per chain.
            chains: chains.
            seed: has no effect.
            progress: has no effect.

        Returns:
            Latents; in `stats` the `violation` of the conditions of optimality, in units of the
            prior's rate; of circuits in `circuit` what the neurons do at rest.
        """
        check_counts(draws=draws, chains=chains)
        with seeded(seed):  # checks it
            problem, state = self.settle(x)

        def copies(found: Values) -> Values:
            return {n: t.expand(chains, draws, *t.shape) for n, t in found.items()}

        missed = {"violation": problem.violation(self.answer(problem, state))}
        doing = self.activity(problem, state)
        return Draws(copies(self._by_site(problem, state)), copies(missed), copies(doing))


class LCA(SparseCircuit):
    """Locally competitive neurons: potentials leak, and what exceeds a threshold inhibits others.

    z = loc + a is the posterior's mode once potentials u are at rest. With W = Phi' N^-2 Phi,
    b = Phi' N^-2 (x - decode(loc)), D = diag(W), and r one over the prior's scale,

        tau du/dt = D^-1 (b - (W - D) a) - u,   a = T(u, r / D),

    T the soft threshold, T(u, l) = u - l where u > l, u + l where u < -l, and 0 in between. For
    features of norm one and noise s these are the published dynamics, with l = r s^2. Steps of
    tau / L, L the largest eigenvalue of D^-1/2 W D^-1/2, never raise -log p(x, z).

    Args:
        model: independent Laplace latents, Gaussian noise behind a linear decoder, such as
            zoo.SparseCoding.
        nonnegative: neurons do not answer below -l either, so that z >= loc.
        steps: of inference, at most.
        tolerance: of the conditions of optimality, see :class:`SparseCircuit`.

    References:
        Sparse Coding via Thresholding and Local Competition in Neural Circuits (Rozell, Johnson,
        Baraniuk & Olshausen, 2008) https://doi.org/10.1162/neco.2008.03-07-486

    Differences:
        Features may be of any norm: each neuron counts in units of its own. Of the thresholds the
        soft one alone, as the others belong to priors that are not Laplace.
    """

    def advance(self, lasso: Lasso, state: State) -> State:
        """u + (dt / tau) (D^-1 (b - W a) + a - u)."""
        (u,) = state
        a = self.answer(lasso, state)
        return (u + lasso.step * (lasso.currents(a) / lasso.gain + a - u),)

    def answer(self, lasso: Lasso, state: State) -> Tensor:
        """a."""
        return lasso.shrink(state[0], lasso.rate / lasso.gain)

    def activity(self, problem: Lasso, state: State) -> Values:
        """Potentials u, and rates |a|, both in units of the latents."""
        return {"potentials": state[0], "rates": self.answer(problem, state).abs()}


class ISTA(SparseCircuit):
    """Proximal gradient: a step along the currents, then the threshold; the mode in few steps.

    In the letters of :class:`LCA`, y <- T(y + h D^-1 (b - W y), h r / D) with h = 1 / L, and
    z = loc + y. No step raises -log p(x, z), unless there is momentum.

    Args:
        model: independent Laplace latents, Gaussian noise behind a linear decoder, such as
            zoo.SparseCoding.
        momentum: FISTA, which starts anew in a problem where momentum leads uphill.
        nonnegative: z >= loc.
        steps: at most.
        tolerance: of the conditions of optimality, see :class:`SparseCircuit`.

    References:
        An iterative thresholding algorithm for linear inverse problems with a sparsity constraint
        (Daubechies, Defrise & De Mol, 2004) https://doi.org/10.1002/cpa.20042
        A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems (Beck &
        Teboulle, 2009), equations 4.1-4.3 https://doi.org/10.1137/080716542
        Adaptive Restart for Accelerated Gradient Schemes (O'Donoghue & Candes, 2015), the gradient
        scheme https://doi.org/10.1007/s10208-013-9150-3

    Differences:
        Features may be of any norm: gradients are preconditioned by D.
    """

    def __init__(self, model: ModelLike, *, momentum: bool = False, **knobs: Any) -> None:
        super().__init__(model, **knobs)
        self.knobs["momentum"] = self.momentum = momentum

    def start(self, rest: Tensor) -> State:
        """y, the point gradients are taken at, and the counter of momentum (B, 1)."""
        return rest, rest, torch.ones_like(rest[:, :1])

    def advance(self, lasso: Lasso, state: State) -> State:
        """One step from where momentum has led."""
        y, v, t = state
        drift = lasso.currents(v) / lasso.gain
        new = lasso.shrink(v + lasso.step * drift, lasso.step * lasso.rate / lasso.gain)
        if not self.momentum:
            return new, new, t
        uphill = (lasso.gain * (v - new) * (new - y)).sum(-1, keepdim=True) > 0
        t = t.masked_fill(uphill, 1)
        longer = 0.5 + (0.25 + t.square()).sqrt()  # equation 4.2
        return new, new + (t - 1) / longer * (new - y), longer


class SparseLaplace(PackedGuide):
    """A Gaussian around the mode of a sparse posterior, wide where data and prior leave room.

    q(z given x) = Normal(z*, H^-1), H = W + diag(r / (|z* - loc| + 1 / r)), z* the mode as of
    :class:`ISTA`, W = Phi' N^-2 Phi, r one over the prior's scale.

    The Laplace prior has a kink in place of a curvature at loc, and none elsewhere. But it is a
    mixture of Gaussians of different variance, and the Gaussian that touches it at z* from below
    has the precision r / |z* - loc|, which leaves the mode where it is. At the kink that is
    infinite, as if silent neurons were certain of their silence; with 1 / r added it is r^2 there,
    an sd of 1 / r without data, the prior's own being sqrt(2) / r. Far from the kink H tends to the
    Hessian, which is W.

    Args:
        model: independent Laplace latents, Gaussian noise behind a linear decoder, such as
            zoo.SparseCoding.
        steps: of inference, at most.
        tolerance: of the conditions of optimality, see :class:`SparseCircuit`.

    References:
        A Variational Method for Learning Sparse and Overcomplete Representations (Girolami, 2001),
        the touching Gaussian https://doi.org/10.1162/089976601753196003

    Differences:
        The Gaussian touches at the mode, where theirs is optimised; the 1 / r is ours.
    """

    def __init__(
        self, model: ModelLike, *, steps: Count = 5000, tolerance: NonNegative = 1e-6
    ) -> None:
        super().__init__(model, steps=steps, tolerance=tolerance)
        self.circuit = ISTA(model, momentum=True, steps=steps, tolerance=tolerance)

    @torch.no_grad()
    def distribution(self, x: Observation) -> Distribution:
        """q(z given x): batch shape (B,), event shape (K,)."""
        problem, state = self.circuit.settle(x)
        y = self.circuit.answer(problem, state)
        width = torch.diag_embed(problem.rate / (y.abs() + 1 / problem.rate))
        precision = problem.phi.T @ problem.phi + width
        return MultivariateNormal(problem.loc + y, precision_matrix=precision, validate_args=False)
