"""What a model's latents are, learned from prototype traces, and how to pack them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.func import vmap

from .errors import Incompatible
from .observation import Observation, check_observation, parts, repeat, size, take
from .seeds import seeded
from .sites import Site, same_transform, site_of

__all__ = ["Energies", "Latents", "ModelLike", "Site", "Values", "isolated", "sum_right"]

Values = dict[str, Tensor]
PROTOTYPES = 4  # short traces beside the first: a fair coin hides a branch with probability 1/16
MAX_ROWS = 1 << 16  # rows of one call of a model; bounds memory
MAX_CELLS = 1 << 23  # numbers in the observations of one call, which may be pictures or films


@runtime_checkable
class ModelLike(Protocol):
    """All that inference asks of a model: a Pyro program with example observations."""

    def __call__(self, x: Any = None) -> Any:
        """Run the program; x is the observation."""

    def observations(self) -> Observation:
        """Example observations, (B, ...)."""


class Energies(NamedTuple):
    """What a noisy circuit achieves and pays, for each of B problems.

    Attributes:
        performance: E_q[-log p(x given u)], (B,), in nats.
        magnitude: E_q[-log p(u)], (B,), of packed latents u; the activity cost of neurons.
        log_sd: log sds of independent noise, (B, units).
    """

    performance: Tensor
    magnitude: Tensor
    log_sd: Tensor


class Latents:
    """Names, shapes, supports and plates of a model's latents, and their packed vector.

    The letters are B problems, D packed latents and `...` any draws. Where every latent is inside
    the plate "data", each row of x is a problem; where none is, the data set is one problem, B = 1.
    Discrete sites are packed as they are, without Jacobian.

    Args:
        model: a Pyro program called as model(x).
        x: example observations; by default the model's own.

    Attributes:
        plated: each row of x is a problem.
        separable: x is one problem whose rows are in a plate, so that some of them will do for a
            step of training.

    Raises:
        Incompatible: no latent, not exactly one observed site, some latents inside "data" and some
            outside, or a structure (names, shapes, supports) that changes from call to call.
    """

    def __init__(self, model: ModelLike, x: Observation | None = None) -> None:
        self.model = model
        self.like: Observation = model.observations() if x is None else x
        with torch.no_grad():
            first = _prototype(model, self.like, 0)
            self.observed, self.slot, self.factors = _observed(first, self.like)
            nodes = _latent_nodes(first)
            self.plated = _inside_data(nodes)
            frames = first.nodes[self.observed]["cond_indep_stack"]
            self.separable = not self.plated and size(self.like) in [f.size for f in frames]
            small = take(self.like, slice(0, 1)) if self.plated else self.like
            one = _latent_nodes(_prototype(model, small, 1))
            self.sites = tuple(site_of(n, node, plated=self.plated) for n, node in one.items())
            self._compare(nodes)
            for k in range(2, PROTOTYPES + 1):
                self._compare(_latent_nodes(_prototype(model, small, k)))
        self.inner = len(self.sites[0].shape) - self.sites[0].event_dim
        sizes = [s.unconstrained_shape.numel() for s in self.sites]
        self.splits = dict(zip(self.names, sizes, strict=True))
        self.size = sum(sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Site names in the order of the trace."""
        return tuple(s.name for s in self.sites)

    @property
    def continuous(self) -> bool:
        """No site is discrete."""
        return not any(s.discrete for s in self.sites)

    def described(self) -> str:
        """Each site, how many numbers it has for a problem and of which kind: "z: 8 real"."""
        return ", ".join(f"{s.name}: {s.shape.numel():,} {s.kind}" for s in self.sites)

    def problems(self, x: Observation) -> int:
        """Number of problems B in x."""
        return size(x) if self.plated else 1

    def check(self, x: Observation) -> None:
        """Raise :class:`BadInput` unless x has the shape, dtype and finiteness of the example."""
        check_observation(x, self.like, free_rows=self.plated)

    def require_continuous(self, who: str) -> None:
        """Raise :class:`Incompatible` if a site is discrete."""
        for s in self.sites:
            if s.discrete:
                raise Incompatible(
                    who,
                    expected="continuous latents",
                    got=f"the discrete site {s.name!r}",
                    fix="Use a guide for discrete latents, or enumerate the site.",
                )

    def plate(self, x: Observation) -> AbstractContextManager[Any]:
        """The plate "data" where the model has it."""
        if not self.plated:
            return nullcontext()
        plate: AbstractContextManager[Any] = pyro.plate(
            "data", self.problems(x), dim=-1 - self.inner
        )
        return plate

    def pack(self, z: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents (..., B, *shape) to the unconstrained vector u, with log |dz/du|.

        Returns:
            u of shape (..., B, D) and the log-Jacobian of shape (..., B).
        """
        us, jacobians = [], []
        for s in self.sites:
            value = z[s.name]
            lead = value.shape[: value.dim() - len(s.shape)]
            u = s.transform.inv(value)
            jacobians.append(sum_right(s.transform.log_abs_det_jacobian(u, value), len(lead)))
            us.append(u.reshape(*lead, -1))
        return torch.cat(us, -1), torch.stack(jacobians).sum(0)

    def unpack(self, u: Tensor) -> tuple[Values, Values]:
        """The vector u (..., B, D) to latents and, by site, log |dz/du| of shape (..., B)."""
        lead = u.shape[:-1]
        z, jacobians = {}, {}
        for s, piece in zip(self.sites, u.split(list(self.splits.values()), -1), strict=True):
            part = piece.reshape(*lead, *s.unconstrained_shape)
            z[s.name] = s.transform(part)
            log_jacobian = s.transform.log_abs_det_jacobian(part, z[s.name])
            jacobians[s.name] = sum_right(log_jacobian, len(lead))
        return z, jacobians

    def log_joint(self, z: Mapping[str, Tensor], x: Observation) -> Tensor:
        """log p(x, z) for latents (..., B, *shape): shape (..., B), in nats.

        Draws are handled as more problems, so the model need not broadcast.
        """
        return self._terms(z, x).sum(-1)

    def log_terms(self, u: Tensor, x: Observation) -> tuple[Tensor, Tensor]:
        """log p(u), Jacobian included, and log p(x given u) of packed latents (..., B, D).

        Both are (..., B), in nats. Factors count as likelihood.
        """
        z, jacobians = self.unpack(u)
        prior, likelihood = self._terms(z, x).unbind(-1)
        return prior + torch.stack(list(jacobians.values())).sum(0), likelihood

    def _terms(self, z: Mapping[str, Tensor], x: Observation) -> Tensor:
        """Prior and likelihood, (..., B, 2)."""
        s = self.sites[0]
        lead = z[s.name].shape[: z[s.name].dim() - len(s.shape)]
        rows = lead.numel()
        flat = {site.name: z[site.name].reshape(rows, *site.shape) for site in self.sites}
        if not self.plated:
            return self._score_each(flat, x).reshape(*lead, 2)
        b = size(x)
        most = min(MAX_ROWS, MAX_CELLS * b // sum(t.numel() for t in parts(x)))
        step = max(1, most // b) * b
        scores = [
            self._score({n: v[i : i + step] for n, v in flat.items()}, repeat(x, k // b))
            for i in range(0, rows, step)
            if (k := min(step, rows - i))
        ]
        return torch.cat(scores).reshape(*lead, 2)

    def log_density(self, u: Tensor, x: Observation) -> Tensor:
        """log p(x, u) of packed latents (..., B, D), Jacobian included: shape (..., B), in nats."""
        z, jacobians = self.unpack(u)
        return self.log_joint(z, x) + torch.stack(list(jacobians.values())).sum(0)

    def simulate(self, like: Observation) -> tuple[Values, Observation]:
        """One draw of latents and observation from the joint, with the inputs of `like`.

        Returns:
            latents by name, each (B, *shape), and an observation shaped as `like`.
        """
        if self.factors:
            raise Incompatible(
                "model",
                expected="a normalised generative model",
                got=f"pyro.factor sites {self.factors}",
                fix="Only models without factors can be simulated; train on data instead.",
            )
        with torch.no_grad(), isolated():
            trace = poutine.trace(poutine.uncondition(self.model)).get_trace(like)
        lift: Callable[[Tensor], Tensor] = (lambda v: v) if self.plated else (lambda v: v[None])
        z = {n: lift(trace.nodes[n]["value"]) for n in self.names}
        x = list(parts(like))
        x[self.slot] = trace.nodes[self.observed]["value"].to(x[self.slot].dtype)
        return z, tuple(x) if isinstance(like, tuple) else x[0]

    def replicate(self, z: Mapping[str, Tensor], x: Observation) -> Tensor:
        """One simulated observation for each draw of the latents.

        Args:
            z: latents (..., B, *shape).
            x: observation of B problems; its inputs are kept, the observed part is replaced.

        Returns:
            (..., B, *event) where each row of x is a problem, (..., *event) where x is one problem.
        """
        s = self.sites[0]
        lead = z[s.name].shape[: z[s.name].dim() - len(s.shape)]
        rows = lead.numel()
        flat = {site.name: z[site.name].reshape(rows, *site.shape) for site in self.sites}
        program = poutine.uncondition(self.model)

        def simulate(values: Values, like: Observation) -> Tensor:
            with isolated():
                trace = poutine.trace(poutine.condition(program, data=values)).get_trace(like)
            value: Tensor = trace.nodes[self.observed]["value"]
            return value

        with torch.no_grad():
            if self.plated:
                found = simulate(flat, repeat(x, rows // size(x)))
                return found.reshape(*lead, *found.shape[1:])
            each = [simulate({n: v[i] for n, v in flat.items()}, x) for i in range(rows)]
        return torch.stack(each).reshape(*lead[:-1], *each[0].shape)

    def joint(self, n: int, *, seed: int) -> tuple[Values, Observation]:
        """n problems from the joint; the inputs of the example observations are cycled."""
        with seeded(seed, n):
            if self.plated:
                rows = torch.arange(n, device=parts(self.like)[0].device) % size(self.like)
                return self.simulate(take(self.like, rows))
            draws = [self.simulate(self.like) for _ in range(n)]
        z = {name: torch.cat([d[0][name] for d in draws]) for name in self.names}
        xs = zip(*[parts(d[1]) for d in draws], strict=True)
        stacked = tuple(torch.stack(t) for t in xs)
        return z, stacked if isinstance(self.like, tuple) else stacked[0]

    def _score(self, z: Values, x: Observation) -> Tensor:
        with isolated():
            trace = poutine.trace(poutine.condition(self.model, data=z)).get_trace(x)
        extra = [n for n in _latent_nodes(trace, observed=True) if n not in z]
        if set(extra) != {self.observed, *self.factors}:
            raise _unstable(f"sites {sorted(z)} at first, {sorted({*z, *extra})} later")
        trace.compute_log_prob()
        keep = int(self.plated)
        sums = [
            torch.stack([sum_right(trace.nodes[n]["log_prob"], keep) for n in names]).sum(0)
            for names in (z, extra)
        ]
        terms = torch.stack(sums, -1)
        return terms if self.plated else terms[None]

    def _score_each(self, z: Values, x: Observation) -> Tensor:
        """Terms (S, 2) of draws (S, *shape), each a call of a model without the plate "data".

        All at once where torch can vectorise the program, for which argument checks must rest; one
        by one where it cannot.
        """
        if len(next(iter(z.values()))) == 1:
            return self._score({n: v[0] for n, v in z.items()}, x)
        chunk = max(1, MAX_ROWS // size(x))
        try:
            with pyro.validation_enabled(False):
                return vmap(lambda v: self._score(v, x)[0], chunk_size=chunk)(z)
        except RuntimeError:
            rows = range(len(next(iter(z.values()))))
            return torch.cat([self._score({n: v[i] for n, v in z.items()}, x) for i in rows])

    def _compare(self, nodes: dict[str, Any]) -> None:
        if tuple(nodes) != self.names:
            raise _unstable(f"sites {list(self.names)} in one call and {list(nodes)} in another")
        for s in self.sites:
            again = site_of(s.name, nodes[s.name], plated=self.plated)
            if again.shape != s.shape:
                raise _unstable(f"{s.name!r} of shape {tuple(s.shape)}, then {tuple(again.shape)}")
            if not same_transform(s, again, nodes[s.name]["value"]):
                raise _unstable(f"a support of {s.name!r} that depends on other sites or problems")


@contextmanager
def isolated() -> Iterator[None]:
    """Room for a call of the model while a guide is being traced, inside the guide's plates.

    `block` hides sites; the dims that plates have taken are hidden here.
    """
    allocator = pyro.poutine.runtime._DIM_ALLOCATOR
    taken, allocator._stack = allocator._stack, []
    try:
        with poutine.block():
            yield
    finally:
        allocator._stack = taken


def _prototype(model: ModelLike, x: Observation, seed: int) -> poutine.Trace:
    with seeded(seed), isolated():
        return poutine.trace(model).get_trace(x)


def _latent_nodes(trace: poutine.Trace, *, observed: bool = False) -> dict[str, Any]:
    """Latent sites by name; with `observed`, every scored site."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not poutine.util.site_is_subsample(node)
        and not node["infer"].get("_deterministic")  # pyro.deterministic is no latent, and no data
        and (observed or not (node["is_observed"] or node["infer"].get("is_auxiliary")))
    }


def _observed(trace: poutine.Trace, x: Observation) -> tuple[str, int, list[str]]:
    """Name of the observed site, its place among the tensors of x, and the factors."""
    scored = _latent_nodes(trace, observed=True)
    sites = {n: node for n, node in scored.items() if node["is_observed"]}
    factors = [n for n, node in sites.items() if node["value"].numel() == 0]
    names = [n for n in sites if n not in factors]
    if len(names) != 1:
        raise Incompatible(
            "model",
            expected="exactly one observed site",
            got=f"{names or 'none'}",
            fix="Pass x on as obs=x of one pyro.sample; join several observations into one site.",
        )
    value = sites[names[0]]["value"]
    matches = [k for k, t in enumerate(parts(x)) if t.data_ptr() == value.data_ptr()]
    matches = matches or [k for k, t in enumerate(parts(x)) if t.shape == value.shape]
    if not matches:
        raise Incompatible(
            "model",
            expected=f"an observed site shaped as x, {[tuple(t.shape) for t in parts(x)]}",
            got=f"{names[0]!r} of shape {tuple(value.shape)}",
            fix="Observe x as it is passed in.",
        )
    return names[0], matches[-1], factors


def _inside_data(nodes: dict[str, Any]) -> bool:
    if not nodes:
        raise Incompatible(
            "model", expected="at least one latent site", got="none", fix="Add a pyro.sample."
        )
    inside = {n: any(f.name == "data" for f in nodes[n]["cond_indep_stack"]) for n in nodes}
    if len(set(inside.values())) == 2:
        raise Incompatible(
            "model",
            expected='every latent inside the plate "data" (independent problems), or none',
            got=f"{[n for n in inside if not inside[n]]} outside it",
            fix="If the data set is one problem, rename the plate; else move the sites inside it.",
        )
    return all(inside.values())


def sum_right(t: Tensor, keep: int) -> Tensor:
    """The sum over all but the leading axes."""
    return t.sum(list(range(keep, t.dim()))) if t.dim() > keep else t


def _unstable(got: str) -> Incompatible:
    return Incompatible(
        "model",
        expected="the same latent sites, shapes and supports in every call",
        got=got,
        fix="Reparameterise, so that what is random is the value of a site and not its existence.",
    )
