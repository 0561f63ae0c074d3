"""The checks of :func:`inference.check_guide`: one function each, the table at the end."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive
from safetensors.torch import load, save
from torch import Tensor

from .case import Case, close, does_not_apply, expect, states, steady
from .checks_density import density, elbo, log_q, normalised
from .checks_gradient import SHAKES, gradient, learning
from .errors import BadInput, Incompatible
from .guide import Draws, Guide, HasDensity, HasRsample, HasScore
from .latents import Values
from .objectives.map_energy import HasPosteriorMode
from .observation import Observation, parts, take
from .sampling import Sampling
from .seeds import seeded

__all__ = ["CHECKS", "WAIT_FOR"]


def _sites(case: Case) -> None:
    """A call samples the model's latents, each of its shape, inside the plate "data"."""
    lat = case.latents
    nodes = case.trace.nodes
    with seeded(case.seed):
        theirs = poutine.trace(case.guide.model).get_trace(case.x).nodes
    found = {
        n: node
        for n, node in nodes.items()
        if node["type"] == "sample"
        and not poutine.util.site_is_subsample(node)
        and not node["infer"].get("is_auxiliary")
    }
    names = sorted(lat.names)
    fix = "Use the model's site names; sites of your own need infer={'is_auxiliary': True}."
    expect(sorted(found) == names, f"the sites {names}", f"{sorted(found)}", fix)
    for name in names:
        shape, wanted = found[name]["value"].shape, theirs[name]["value"].shape
        fix = "Give it the model's event: .to_event(k), or Implicit(value, event_dim=k)."
        expect(shape == wanted, f"{name!r} of shape {tuple(wanted)}", f"{tuple(shape)}", fix)
        dims = {f.dim for f in found[name]["cond_indep_stack"] if f.name == "data"}
        right = {-1 - lat.inner} if lat.plated else set()
        fix = "Sample inside `with self.latents.plate(x):`."
        expect(dims == right, f"the plate 'data' at dim {right} of {name!r}", f"{dims}", fix)


def _predictive(case: Case) -> None:
    """Pyro's Predictive draws from it, and from the model given its draws."""
    lat, model = case.latents, case.guide.model
    with seeded(case.seed):
        found = Predictive(case.guide, num_samples=3)(case.x)
        onwards = Predictive(poutine.uncondition(model), guide=case.guide, num_samples=3)(case.x)
    for name in lat.names:
        got, wanted = found[name].shape, (3, *case.trace.nodes[name]["value"].shape)
        expect(got == wanted, f"{name!r} of shape {wanted}", f"{tuple(got)}", "Look at forward.")
        stuck = torch.equal(found[name][0], found[name][1])
        expect(
            not stuck or isinstance(case.guide, HasPosteriorMode),
            f"other values of {name!r} in each call", "the same twice",
            "Let forward draw at random; a guide of one value has the method posterior_mode.",
        )  # fmt: skip
    expect(len(onwards[lat.observed]) == 3, "three replications", "others", "Look at forward.")


def _draws(case: Case) -> None:
    """`draw` returns each latent as (chains, draws, B, ...), of its dtype and in its support."""
    lat, found = case.latents, case.draws
    lead = (2, 6, lat.problems(case.x))
    fix = "Leave `draw` to the base class, or return Draws of the values that `unpack` gives."
    names = sorted(found.values)
    expect(names == sorted(lat.names), f"values of {sorted(lat.names)}", f"{names}", fix)
    for s in lat.sites:
        value = found.values[s.name]
        shape, wanted = tuple(value.shape), (*lead, *s.shape)
        expect(shape == wanted, f"{s.name!r} of shape {wanted}", f"{shape}", fix)
        expect(value.dtype == s.dtype, f"{s.name!r} as {s.dtype}", f"{value.dtype}", fix)
        bad = int((~s.support.check(value)).sum())
        expect(not bad, f"{s.name!r} in {s.support}", f"{bad} values outside", fix)
    for name, stat in found.stats.items():
        expect(stat.shape == lead, f"stats[{name!r}] {lead}", f"{tuple(stat.shape)}", fix)
    for name, done in found.circuit.items():
        right = done.shape[:3] == lead
        expect(right, f"circuit[{name!r}] {(*lead, '...')}", f"{tuple(done.shape)}", fix)


def _buffers(case: Case) -> None:
    """Calling it and drawing leave its parameters and buffers as they were."""
    _ = case.trace, case.draws
    if isinstance(case.guide, HasRsample):
        with contextlib.suppress(Exception), torch.no_grad(), seeded(case.seed):
            case.guide.rsample(case.x)  # whose errors are told by a check of its own
    changed = case.changed()
    expect(
        not changed, "parameters and buffers untouched", f"{', '.join(changed)} changed",
        "What a guide says depends on x, its parameters and the seed alone, and not on how often "
        "it was called: set buffers when it is built, or in `bind`. Batch norm keeps running means "
        "of x; LayerNorm does not.",
    )  # fmt: skip


def _seeds(case: Case) -> None:
    """The same seed gives the same draws, another seed or chain others."""
    first = case.draws
    same = _equal(first, case.draw(case.seed))
    fix = (
        "Take all randomness from torch's generator, with no generator or seed of your own, and "
        "keep nothing from one call for the next."
    )
    expect(same, "the same draws from the same seed", "others", fix)
    if not isinstance(case.guide, HasPosteriorMode):
        other = _equal(first, case.draw(case.seed + 1))
        expect(not other, "other draws from another seed", "the same", fix)
        chains = all(torch.equal(v[0], v[1]) for v in first.values.values())
        expect(not chains, "chains that differ", "two equal chains", fix)


def _globals(case: Case) -> None:
    """Drawing leaves generators, Pyro's parameter store and torch's switches as they were."""
    pyro.clear_param_store()  # put back when all checks are done
    before = states()
    case.guide.draw(case.x, draws=1, chains=1, seed=case.seed)
    after = states()
    changed = [n for n in before if before[n] != after[n]]
    fix = "Draw inside `with inference.seeds.seeded(seed):`, and use torch's generator alone."
    expect(not changed, "global states untouched", f"{' and '.join(changed)} changed", fix)


def _observation(case: Case) -> None:
    """Another observation gives other draws."""
    if not case.guide.amortised:
        does_not_apply("it answers for the x it was fitted to")
    other = _simulated(case)
    for size in SHAKES:
        with case.shaken(size):
            if not _equal(case.draw(case.seed), case.draw(case.seed, other)):
                return
    fix = "forward, or distribution, has to use x; else amortised = False."
    expect(False, "draws that depend on x", "the same for two observations", fix)


def _rows(case: Case) -> None:
    """A problem is answered the same alone as among others."""
    if not (case.guide.amortised and case.latents.plated and case.latents.problems(case.x) > 1):
        does_not_apply("there are no rows that it could answer alone")
    one = slice(1, 2)
    z = {n: v[:, :, one] for n, v in case.draws.values.items()}
    with case.shaken(SHAKES[0]):
        among, alone = (
            _measure(case, case.draws.values, case.x),
            _measure(case, z, take(case.x, one)),
        )
    expect(
        close(alone, among[:, :, one], case.tolerance), "the same answer", "another one",
        "A mean or a norm over dim 0 mixes problems; take it over neurons, dim=-1.",
    )  # fmt: skip


def _knobs(case: Case) -> None:
    """The guide can be built again from its knobs."""
    guide = case.guide
    kinds = inspect.signature(type(guide)).parameters.values()
    takes = {p.name for p in kinds if p.kind == p.KEYWORD_ONLY}
    fix = "Hand all knobs on: super().__init__(model, width=width)."
    kept = sorted(guide.knobs)
    expect(not takes or kept, f"knobs {sorted(takes)}", f"{kept}", fix)
    again = _again(case)
    mine, theirs = ({n: tuple(t.shape) for n, t in g.state_dict().items()} for g in (guide, again))
    off = sorted(n for n in {*mine, *theirs} if mine.get(n) != theirs.get(n))
    expect(not off and again.knobs == guide.knobs, "the same guide", f"another {off[:3]}", fix)


def _state(case: Case) -> None:
    """Its state, written and read again, draws the same values."""
    state = {n: t.detach().cpu().contiguous().clone() for n, t in case.guide.state_dict().items()}
    again = _again(case)
    again.restore(load(save(state)) if state else state)
    found = again.draw(case.x, draws=6, chains=2, seed=case.seed)
    fix = "Whatever forward uses is a knob, a parameter or a buffer (register_buffer)."
    expect(_equal(case.draws, found), "the same draws", "others", fix)


def _input(case: Case) -> None:
    """Observations of a wrong width or with NaN, and draws=0, are refused with BadInput."""

    def wider(t: Tensor) -> Tensor:
        return torch.cat([t, t[..., :1]], -1) if t.dim() > 1 else t[:, None]

    wrong: dict[str, tuple[Observation, int]] = {
        "an observation of a wrong width": (_like(case.x, [wider(t) for t in parts(case.x)]), 1),
        "draws=0": (case.x, 0),
    }
    if parts(case.x)[0].is_floating_point():
        holes = _like(case.x, [t * torch.nan for t in parts(case.x)])
        wrong["an observation with NaN"] = (holes, 1)
    for what, (x, n) in wrong.items():
        try:
            case.guide.draw(x, draws=n, chains=1, seed=case.seed)
        except BadInput:
            continue
        except Exception as error:  # torch's own, from somewhere inside
            got = type(error).__name__
        else:
            got = "draws"
        fix = "In your own draw call check_counts(draws=draws) and self.latents.check(x) first."
        expect(False, f"BadInput for {what}", got, fix)


def _equal(a: Draws, b: Draws) -> bool:
    return all(torch.equal(a.values[n], b.values[n]) for n in a.values)


def _simulated(case: Case) -> Observation:
    try:
        with seeded(case.seed + 1):
            return case.latents.simulate(case.x)[1]
    except Incompatible:
        does_not_apply("the model cannot be simulated")


def _measure(case: Case, z: Values, x: Observation) -> Tensor:
    """What the guide says about latents, (chains, draws, B, ...)."""
    guide = case.guide
    with torch.no_grad(), seeded(case.seed):
        if isinstance(guide, HasScore) and not isinstance(guide, HasDensity):
            score: Tensor = guide.score(z, x)
            return score
        if not isinstance(guide, HasDensity):
            does_not_apply("the guide has neither log_prob nor score")
        steady(case)
        log_q: Tensor = guide.log_prob(z, x)
        return log_q


def _again(case: Case) -> Guide:
    guide = type(case.guide)(case.guide.model, **case.guide.knobs)
    guide.bind(case.x)
    if isinstance(getattr(case.guide, "sampling", None), Sampling):
        guide.sampling = case.guide.sampling  # how it is run is no knob
    like = next(iter(case.guide.parameters()), parts(case.x)[0])
    return guide.to(like.device, like.dtype)  # type: ignore[no-any-return]


def _like(x: Observation, tensors: list[Tensor]) -> Observation:
    return tuple(tensors) if isinstance(x, tuple) else tensors[0]


CHECKS: Mapping[str, Callable[[Case], None]] = {
    "sites": _sites,
    "draws": _draws,
    "buffers": _buffers,
    "seeds": _seeds,
    "globals": _globals,
    "predictive": _predictive,
    "density": density,
    "log_q": log_q,
    "normalised": normalised,
    "elbo": elbo,
    "gradient": gradient,
    "learning": learning,
    "observation": _observation,
    "rows": _rows,
    "knobs": _knobs,
    "state": _state,
    "input": _input,
}
WAIT_FOR: Mapping[str, tuple[str, ...]] = {  # checks that say nothing until others pass
    "draws": ("sites",),
    "buffers": ("draws",),
    "seeds": ("buffers",),
    "globals": ("draws",),
    "predictive": ("sites",),
    "density": ("sites", "buffers"),
    "log_q": ("draws", "density"),
    "normalised": ("draws", "density"),
    "elbo": ("buffers",),
    "gradient": ("buffers",),
    "learning": ("sites",),
    "observation": ("seeds",),
    "rows": ("buffers",),
    "state": ("seeds", "knobs"),
}
