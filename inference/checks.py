"""The checks of :func:`inference.check_guide`: one function each, the table at the end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from safetensors.torch import load, save
from torch import Tensor

from .case import Case, does_not_apply, expect, states
from .errors import BadInput, Incompatible, NoDensity
from .guide import Draws, Guide, HasDensity, HasRsample, HasScore
from .integral import mass
from .latents import Values
from .objectives.map_energy import HasPosteriorMode
from .observation import Observation, parts, take
from .sampling import Sampling
from .seeds import seeded

__all__ = ["CHECKS", "WAIT_FOR"]

SHAKES = (1e-3, 0.1)  # moves of parameters
BATCHES = 5  # a rectifier may rest for a few observations
SURE, ENOUGH = 5.0, 50.0  # standard errors; draws that an estimate should rest on


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


def _seeds(case: Case) -> None:
    """The same seed gives the same draws, another seed or chain others."""
    first = case.draws
    same = _equal(first, case.draw(case.seed))
    fix = "Take all randomness from torch's generator, with no generator or seed of your own."
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


def _density(case: Case) -> None:
    """`log_prob` is the log-density of the Pyro program, one number for each problem."""
    with seeded(case.seed), torch.no_grad():  # the same run, where runs are random
        log_q = case.scored.log_prob(case.traced, case.x)
    shape, wanted = tuple(log_q.shape), (case.latents.problems(case.x),)
    expect(shape == wanted, f"log_prob of shape {wanted}", f"{shape}", "Sum over latents only.")
    mine, theirs = log_q.sum(), case.trace.log_prob_sum()
    fix = "log_prob(z, x) must be the log-density that forward samples from, Jacobian included."
    right = _close(mine, theirs, case.tolerance)
    expect(right, f"the trace's {theirs:.4f} nats", f"{mine:.4f} from log_prob", fix)


def _log_q(case: Case) -> None:
    """The "log_q" that comes with draws is `log_prob` of them."""
    n = 4 if case.guide.independent else 1
    found = case.guide.draw(case.x, draws=n, chains=1, seed=case.seed)
    if not isinstance(case.scored, HasDensity) or "log_q" not in found.stats:
        does_not_apply("draws come without log_q")
    with seeded(case.seed), torch.no_grad():
        again = case.scored.log_prob(found.values, case.x)
    off = float((again - found.stats["log_q"]).abs().max())
    right = _close(again, found.stats["log_q"], case.tolerance)
    expect(right, "log_prob of the draws", f"up to {off:.3g} nats apart", "Look at draw.")


def _normalised(case: Case) -> None:
    """The density that draws come from integrates to one."""
    _steady(case)
    found = mass(case.guide, case.x, seed=case.seed)
    if found is None:
        does_not_apply("too many latents, or latents of both kinds")
    if float(found.effective.min()) < ENOUGH:
        does_not_apply("the density is too uneven to be integrated with draws")
    off = (found.value - 1).abs() / found.se
    k = int(off.argmax())
    expect(
        float(off[k]) < SURE, "an integral of 1", f"{found.value[k]:.3f} ± {found.se[k]:.3f}",
        "Either log_prob lacks a term, such as a normaliser or the log-Jacobian, or draw samples "
        "from something else.",
    )  # fmt: skip


def _elbo(case: Case) -> None:
    """Pyro's Trace_ELBO is log q - log p; without a density it is refused."""
    has = isinstance(case.guide, HasDensity)
    try:
        with seeded(case.seed), pyro.settings.context(module_local_params=True):
            loss = Trace_ELBO().loss(case.guide.model, case.guide, case.x)
    except NoDensity:
        fix = "Give forward a density that can be scored, or leave out log_prob."
        expect(not has, "an ELBO, for there is a log_prob", "NoDensity", fix)
        return
    expect(
        has, "NoDensity from Trace_ELBO", f"a loss of {loss:.3f}",
        "A guide that can only be sampled samples from inference.Implicit, never from Delta; one "
        "with a density has log_prob(z, x), too.",
    )  # fmt: skip
    with torch.no_grad():
        log_p = case.latents.log_joint(case.traced, case.x).sum()
        wanted = case.trace.log_prob_sum() - log_p
    right = _close(torch.as_tensor(loss).to(wanted), wanted, case.tolerance)
    expect(right, f"{wanted:.4f}", f"{loss:.4f}", "Let forward sample each latent once.")


def _gradient(case: Case) -> None:
    """`rsample` is differentiable in the guide's parameters."""
    if not isinstance(case.guide, HasRsample):
        does_not_apply("the guide has no rsample")
    named = _trainable(case.guide)
    with seeded(case.seed):
        draws = case.guide.rsample(case.x)
    fix = "Let draws be a differentiable function of noise and parameters."
    expect(draws.requires_grad, "draws with a gradient", "draws without", fix)
    slopes = torch.autograd.grad(draws.sum(), list(named.values()), allow_unused=True)
    flows = [g for g in slopes if g is not None]
    finite = all(bool(g.isfinite().all()) for g in flows)
    expect(flows and finite, "a finite gradient", "none" if finite else "infinite numbers", fix)


def _learning(case: Case) -> None:
    """The gradient of its default objective reaches every parameter."""
    guide, x = case.guide, case.x
    if guide.objective is None:
        does_not_apply("the guide names no objective")
    objective, named = guide.objective(), _trainable(guide)
    objective.check(guide, joint=objective.joint_only, learn_model=not objective.learns_guide)
    objective.players(guide)
    for objective.progress in (0.0, 0.9):  # games begin with something else
        idle = set(named)
        for seed in range(case.seed, case.seed + BATCHES):
            with case.shaken(SHAKES[0]), seeded(seed):
                z, seen = guide.latents.simulate(x) if objective.joint_only else (None, x)
                loss = objective(guide.model, guide, seen, z)["guide"]
                slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            flows = {n: g for n, g in zip(named, slopes, strict=True) if g is not None}
            bad = [n for n, g in flows.items() if not g.isfinite().all()]
            expect(not bad, "finite gradients", f"NaN or infinite ones for {bad}", "Bound scales.")
            idle -= {n for n, g in flows.items() if g.any()}
            if not idle:
                break
        fix = "Use them in forward; what is not to be learned is a buffer."
        expect(not idle, "a gradient for each parameter", f"none for {sorted(idle)}", fix)


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
        _close(alone, among[:, :, one], case.tolerance), "the same answer", "another one",
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


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance))


def _trainable(guide: Guide) -> dict[str, Tensor]:
    named = {n: p for n, p in guide.named_parameters() if p.requires_grad}
    return named or does_not_apply("the guide has no parameters")


def _simulated(case: Case) -> Observation:
    try:
        with seeded(case.seed + 1):
            return case.latents.simulate(case.x)[1]
    except Incompatible:
        does_not_apply("the model cannot be simulated")


def _steady(case: Case) -> None:
    """Leave where log q is given one random run of the circuit."""
    found = []
    for seed in (case.seed, case.seed + 1):
        with seeded(seed), torch.no_grad():
            found.append(case.scored.log_prob(case.traced, case.x))
    if not torch.equal(*found):
        does_not_apply("log_prob is that of one run, and runs are random")


def _measure(case: Case, z: Values, x: Observation) -> Tensor:
    """What the guide says about latents, (chains, draws, B, ...)."""
    guide = case.guide
    with torch.no_grad(), seeded(case.seed):
        if isinstance(guide, HasScore) and not isinstance(guide, HasDensity):
            score: Tensor = guide.score(z, x)
            return score
        if not isinstance(guide, HasDensity):
            does_not_apply("the guide has neither log_prob nor score")
        _steady(case)
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
    "seeds": _seeds,
    "globals": _globals,
    "predictive": _predictive,
    "density": _density,
    "log_q": _log_q,
    "normalised": _normalised,
    "elbo": _elbo,
    "gradient": _gradient,
    "learning": _learning,
    "observation": _observation,
    "rows": _rows,
    "knobs": _knobs,
    "state": _state,
    "input": _input,
}
WAIT_FOR: Mapping[str, tuple[str, ...]] = {  # checks that say nothing until others pass
    "draws": ("sites",),
    "seeds": ("draws",),
    "globals": ("draws",),
    "predictive": ("sites",),
    "density": ("sites",),
    "log_q": ("draws", "density"),
    "normalised": ("draws", "density"),
    "elbo": ("draws",),
    "learning": ("sites",),
    "observation": ("seeds",),
    "rows": ("draws",),
    "state": ("seeds", "knobs"),
}
