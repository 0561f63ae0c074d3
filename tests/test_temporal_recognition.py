"""A recognition network for sequences: what a step may know, and what its critic may see."""

from __future__ import annotations

from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from test_codes import walk
from test_guides import FLAT, WIDE, one_problem, two_sites

import zoo
from inference import (
    Adversarial,
    BadInput,
    EnergyScore,
    Incompatible,
    Oscillating,
    PriorContrastive,
    TemporalRecognition,
    fit,
)
from inference.codes import Codes
from inference.critic import critic_for
from inference.game import energy_loss
from inference.guides.temporal_recognition import TemporalCritic
from inference.seeds import seeded
from inference.units import squash

pytestmark = pytest.mark.usefixtures("same_noise")

T = 3
ROWS = torch.tensor([[[0.4, -1.0]] * T, [[2.0, 0.3]] * T], dtype=torch.float64)


def paths(x):
    """A positive path and one in the plane, seen by two sensors."""
    with pyro.plate("data", len(x)):
        size = pyro.sample("size", dist.LogNormal(x.new_zeros(T), 0.5).to_event(1))
        place = pyro.sample("place", dist.Normal(x.new_zeros(T, 2), 1.0).to_event(2))
        loc = torch.cumsum(place * size[..., None], -2)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(2), obs=x)


def both_inputs(x, y):
    """An observation of two tensors, both in time."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(T), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z + x.sum(-1), 0.5).to_event(1), obs=y)


MODELS = {
    "line": partial(zoo.StateSpace, (0.9,), steps=4),
    "paths": partial(zoo.from_pyro, paths, ROWS),
    "walk": partial(zoo.from_pyro, walk, ROWS[..., 0]),
    "ball": partial(zoo.MovingBall, 3, steps=4, occluder=(1,)),
}
SMALL = {"neurons": 6, "noises": 3}


@cache
def guide_of(name, causal=False):
    """A small guide in float64, with random weights where they can move."""
    guide = TemporalRecognition(MODELS[name]().double(), causal=causal, **SMALL)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in guide.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g).double())
    return guide


def observations(name):
    x = guide_of(name).model.observations()[:2]
    return x + 0.1 * torch.arange(len(x)).reshape(-1, *[1] * (x.dim() - 1))


on_models = pytest.mark.parametrize("name", MODELS)
in_both_ways = pytest.mark.parametrize("causal", [False, True])


# ------------------------------------------------------------------------------------ order in time


@on_models
def test_the_order_is_that_of_time(name):
    """Latents that are the number of their step have codes that are, too, step by step."""
    guide = guide_of(name)
    assert torch.equal(guide.order.sort().values, torch.arange(guide.codes.size))
    z, _ = guide.latents.joint(2, seed=0)
    steps = guide.in_steps(guide.codes.encode(z))
    assert steps.shape == (2, guide.duration, guide.codes.size // guide.duration)
    for t in range(guide.duration):
        other = {n: v.roll(1, 0) for n, v in z.items()}
        for n, v in other.items():
            v[:, t] = z[n][:, t]
        found = guide.in_steps(guide.codes.encode(other))
        assert torch.equal(found[:, t], steps[:, t])
        assert not torch.equal(found, steps)
    assert torch.equal(steps.flatten(1)[:, guide.order.argsort()], guide.codes.encode(z))


@in_both_ways
@on_models
def test_codes_have_shapes_and_gradients_to_every_parameter(name, causal):
    guide, x = guide_of(name, causal), observations(name)
    assert guide.rsample(x).shape == (2, guide.codes.size)
    c = guide.rsample(x, torch.Size([30, 2]))
    assert c.shape == (30, 2, 2, guide.codes.size)
    assert c.dtype == torch.float64
    assert (c.flatten(0, 1).std(0).amax(-1) > 0).all()
    named = [(n, p) for n, p in guide.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(c.square().sum(), [p for _, p in named], allow_unused=True)
    assert not [n for (n, _), g in zip(named, found, strict=True) if g is None or not g.any()]
    draws = guide.draw(x, draws=3, chains=2, seed=1)
    for s in guide.latents.sites:
        assert draws.values[s.name].shape == (2, 3, 2, *s.shape)
        assert s.support.check(draws.values[s.name]).all()


def by_hand(guide, x):
    """c_t = V x + out([.., s_t]), s_t = tanh(W [f, b, g_t e_t, r_t-1] + k_t), r_t = c_t - V x."""
    units, t = guide.units, guide.duration
    standard = (x - units.x_loc) / units.x_scale
    squashed = 10 * torch.tanh(standard / 10)
    e = torch.empty(len(x), t, guide.noises).double().normal_()
    direct, r, found = guide.linear(squash(standard)), x.new_zeros(len(x), 1), []
    f, b = x.new_zeros(1, len(x), 6), x.new_zeros(1, len(x), 6)
    past, future = [], []
    for k in range(t):
        _, f = guide.past(squashed[:, k : k + 1, None], f)
        _, b = guide.future(squashed[:, t - 1 - k, None, None], b)
        past.append(f[0])
        future.insert(0, b[0])
    for k in range(t):
        known = torch.cat([past[k], future[k], guide.gain[k] * e[:, k], r], -1)
        state = torch.tanh(guide.inward(known) + guide.clock[k])
        r = guide.outward(torch.cat([known, state], -1))
        found.append(direct[:, k : k + 1] + r)
    return units.u_loc + units.u_scale * torch.cat(found, -1)


def test_draws_follow_the_equations():
    guide, x = guide_of("line"), observations("line")
    with seeded(3):
        truth = by_hand(guide, x)
    with seeded(3):
        torch.testing.assert_close(guide.rsample(x), truth)


# -------------------------------------------------------------------------------- what a step knows


def by_step(gradients, steps):
    """Whether anything came: gradients (B, ...) of each of n numbers to (n, steps)."""
    sizes = [g.abs().reshape(len(g), steps, -1).sum((0, 2)) for g in gradients]
    return torch.stack(sizes) > 0


def influence(guide, x):
    """Whether x at step s moves the code of step t, the noise being the same: (t, s)."""
    x = x.clone().requires_grad_()
    with seeded(2):
        steps = guide.in_steps(guide.rsample(x))
    weighed = steps * torch.linspace(0.5, 2.0, steps.shape[-1])  # relaxed states sum to one
    found = [torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for s in weighed.unbind(1)]
    return by_step(found, guide.duration)


@on_models
def test_a_causal_guide_does_not_look_ahead_and_a_smoothing_one_does(name):
    x = observations(name)
    ones = torch.ones(guide_of(name).duration, guide_of(name).duration, dtype=torch.bool)
    assert torch.equal(influence(guide_of(name, causal=True), x), ones.tril())
    assert torch.equal(influence(guide_of(name, causal=False), x), ones)


@pytest.mark.parametrize("name", ["line", "paths"])
def test_the_future_of_x_changes_nothing_that_a_causal_guide_said(name):
    guide, x = guide_of(name, causal=True), observations(name)
    changed = x.clone()
    changed[:, -1] += 3.0
    both = []
    for seen in (x, changed):
        with seeded(5), torch.no_grad():
            both.append(guide.in_steps(guide.rsample(seen, torch.Size([4]))))
    assert torch.equal(both[0][..., :-1, :], both[1][..., :-1, :])
    assert not torch.equal(both[0][..., -1, :], both[1][..., -1, :])


def test_the_linear_path_of_a_causal_guide_looks_back_alone():
    """A fit leaves what lies ahead at zero, also where the optimiser moves all else."""
    model = MODELS["line"]()
    for causal in (True, False):
        guide = TemporalRecognition(model, causal=causal, **SMALL)
        fit(model, guide, objective=EnergyScore(), steps=3, batch_size=8, progress=False)
        steps, features = guide.duration, guide.linear.in_features // guide.duration
        blocks = guide.linear.weight[guide.order].unflatten(1, (steps, features))
        blocks = blocks.unflatten(0, (steps, -1)).abs().sum((1, 3)) > 0
        ones = torch.ones(steps, steps, dtype=torch.bool)
        assert torch.equal(blocks, ones.tril() if causal else ones)


def test_the_linear_path_begins_as_a_regression():
    """Against least squares on other draws: of linear Gaussian paths it is the exact mean."""
    model = zoo.StateSpace((0.9,), steps=4).double()
    guide, (x, exact) = TemporalRecognition(model, **SMALL), (model.observations(), model.exact())
    told = guide.units.u_loc + guide.units.u_scale * guide.linear(
        squash(guide.units.standardise(x))
    )
    error = (told - exact.distribution(x).loc).detach()
    scale = exact.distribution(x).covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    rms = (error / scale).square().mean().sqrt()
    within(rms, 0.0, (5 / 1536) ** 0.5)  # the error of five coefficients
    filtering = TemporalRecognition(model, causal=True, **SMALL)
    assert not torch.equal(filtering.linear.weight, guide.linear.weight)


def test_steps_depend_on_one_another_only_in_a_path():
    x, n = observations("line")[:1], 20_000
    i, j = torch.triu_indices(4, 4, 1)
    for causal in (True, False):
        with torch.no_grad():
            c = guide_of("line", causal).rsample(x, torch.Size([n]))[:, 0]
        r = torch.corrcoef(c.T)[i, j]
        if causal:
            within(r, 0.0, torch.full_like(r, n**-0.5))
        else:
            assert (r.abs() > 10 * n**-0.5).any()


# ------------------------------------------------------------------------------------- its critic


def judge_of(name, causal, hidden=(5, 4)):
    """A guide and its critic, with random weights also where they start from zero."""
    guide = guide_of(name, causal)
    judge = critic_for(guide, guide.latents, hidden, 0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in judge.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g).double())
    return guide, judge


def seen_by(judge, guide, name, n=2):
    """Standardised features and relative codes of draws from the joint."""
    z, x = guide.latents.joint(n, seed=3)
    standard = judge.standardise(x.reshape(n, -1))
    return standard, judge.relative(Codes(guide.latents, name).encode(z), standard)


@on_models
def test_a_critic_scores_the_path_or_each_step(name):
    for causal in (False, True):
        guide, judge = judge_of(name, causal)
        assert isinstance(judge, TemporalCritic)
        assert next(judge.parameters()).dtype == torch.float64
        assert not set(map(id, judge.parameters())) & set(map(id, guide.parameters()))
        standard, y = seen_by(judge, guide, name)
        assert judge(standard, y).shape == (2, guide.duration if causal else 1)
        seen = {*judge.apart(y).flatten().tolist()}
        assert seen == {*y.flatten().tolist()}, "energy scores leave something out"


def reach(judge, guide, name, of):
    """Whether step s of x (of = 0) or of the code (1) moves score t: (scores, s)."""
    seen = [t.requires_grad_() for t in seen_by(judge, guide, name)]
    scores = judge(*seen)
    found = [torch.autograd.grad(s.sum(), seen[of], retain_graph=True)[0] for s in scores.T]
    return by_step([guide.in_steps(g) if of else g for g in found], guide.duration)


@on_models
def test_a_causal_critic_sees_the_past_of_x_and_the_step_itself(name):
    guide, judge = judge_of(name, causal=True)
    ones = torch.ones(guide.duration, guide.duration, dtype=torch.bool)
    assert torch.equal(reach(judge, guide, name, of=0), ones.tril())
    assert torch.equal(reach(judge, guide, name, of=1), torch.eye(guide.duration) > 0)


@on_models
def test_a_critic_of_paths_sees_everything(name):
    guide, judge = judge_of(name, causal=False)
    assert reach(judge, guide, name, of=0).all()
    assert reach(judge, guide, name, of=1).all()


@in_both_ways
def test_energy_scores_are_those_of_steps_or_of_neighbours(causal):
    """Sums over steps of a causal guide, and over pairs of neighbours in a path."""
    guide, judge = judge_of("paths", causal)
    z, x = guide.latents.joint(4, seed=3)
    standard = judge.standardise(x.reshape(4, -1))
    with seeded(1):
        found = energy_loss(judge, guide, x, z, draws=2)
    with seeded(1):
        codes = [*guide.rsample(x, torch.Size([2])), guide.codes.encode(z)]
    steps = [guide.in_steps(judge.relative(c, standard)) for c in codes]
    total = torch.zeros(4).double()
    for k in range(T if causal else T - 1):
        a, b, t = (s[:, k : k + (1 if causal else 2)].flatten(1) for s in steps)
        total += ((a - t).norm(dim=-1) + (b - t).norm(dim=-1) - (a - b).norm(dim=-1)) / 2
    torch.testing.assert_close(found, total.mean(), rtol=1e-9, atol=1e-9)


@in_both_ways
@pytest.mark.parametrize("objective", [Adversarial, EnergyScore])
def test_games_can_be_played(objective, causal):
    model = MODELS["walk"]()
    guide = TemporalRecognition(model, causal=causal, **SMALL)
    knobs = {"hidden": (4,)} if objective is Adversarial else {}
    run = fit(model, guide, objective=objective(**knobs), steps=4, batch_size=16, progress=False)
    assert all(torch.isfinite(torch.tensor(v)).all() for v in run.losses.values())
    assert guide.linear.weight.any()


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (partial(zoo.FactorAnalysis, 7, 3), r"'z' of shape \(3,\), 'x' of shape \(7,\)"),
        (partial(zoo.from_pyro, two_sites, WIDE), r"'rate' of shape \(\), 'shift' of shape \(1,\)"),
        (partial(zoo.from_pyro, one_problem, FLAT), "'w' of shape"),
        (zoo.Sprinkler, r"'cloudy' of shape \(\)"),
        (partial(zoo.from_pyro, both_inputs, (ROWS, ROWS[..., 0])), r"shape \(3, 2\)"),
    ],
)
def test_models_without_a_common_time_axis_are_refused(model, shapes):
    """Of an observation in parts, one tensor's features would stand beside another's steps."""
    message = rf"^TemporalRecognition: expected time as the first axis.*{shapes}.*Recurrent"
    with pytest.raises(Incompatible, match=message):
        TemporalRecognition(model())


@pytest.mark.parametrize("game", [PriorContrastive, Oscillating])
def test_games_about_whole_paths_refuse_a_guide_that_filters(game):
    """Its draws are to be judged step by step: together they are no path."""
    model = MODELS["line"]()
    guide = TemporalRecognition(model, causal=True, **SMALL)
    with pytest.raises(Incompatible, match=rf"^{game.__name__} with Temporal.*filters"):
        fit(model, guide, objective=game(hidden=(4,)), steps=2, progress=False)


def test_counts_and_bad_knobs_are_refused():
    with pytest.raises(Incompatible, match=r"^TemporalRecognition: .*finitely many.*'z'.*Poisson"):
        TemporalRecognition(zoo.PoissonCoding(3, side=3))
    for knob in SMALL:
        with pytest.raises(BadInput, match=f"^{knob}: expected an integer >= 1; got 0"):
            TemporalRecognition(MODELS["line"](), **{knob: 0})
