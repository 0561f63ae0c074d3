"""Recognition networks: their equations, and where correlations come from."""

from __future__ import annotations

from functools import partial

import pyro
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from test_codes import switch, walk
from test_guides import FLAT, WIDE, inner_plate, one_problem, two_sites

import zoo
from inference import (
    Adversarial,
    BadInput,
    EnergyScore,
    Fit,
    HasDensity,
    Incompatible,
    NoDensity,
    NoiseMLP,
    RecurrentRecognition,
    fit,
)
from inference.guide import HasRsample
from inference.seeds import seeded
from inference.units import squash

pytestmark = pytest.mark.usefixtures("same_noise")

X = torch.tensor([[0.4, -1.0], [2.0, 0.3], [1.1, 0.7]], dtype=torch.float64)
MODELS = {
    "factor analysis": partial(zoo.FactorAnalysis, 7, 3, seed=1),
    "two sites": partial(zoo.from_pyro, two_sites, WIDE),
    "inner plate": partial(zoo.from_pyro, inner_plate, WIDE[:, :2]),
    "one problem": partial(zoo.from_pyro, one_problem, FLAT),
    "noisy or": partial(zoo.NoisyOr, 3, 2),
    "switch": partial(zoo.from_pyro, switch, X),
    "walk": partial(zoo.from_pyro, walk, X.new_zeros(2, 3)),
}
GUIDES = {
    "recurrent": partial(RecurrentRecognition, neurons=24, noises=5, steps=3),
    "private": partial(RecurrentRecognition, neurons=24, steps=3, private=True),
    "perceptron": partial(NoiseMLP, hidden=(9,)),
}
on_all = pytest.mark.parametrize(
    ("guide_name", "model_name"), [(g, m) for g in GUIDES for m in MODELS]
)


def shaken(guide, scale=0.3, seed=0):
    """The guide with random weights, where weights can move."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in guide.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=g).to(p))
    return guide


@pytest.fixture
def case(guide_name, model_name):
    model = MODELS[model_name]().double()
    x = model.observations()
    return model, shaken(GUIDES[guide_name](model), 0.1), x if isinstance(x, tuple) else x[:2]


# ----------------------------------------------------------------------------- draws of any guide


@on_all
def test_codes_have_shapes_and_gradients_to_every_parameter(case):
    _, guide, x = case
    b, size = guide.latents.problems(x), guide.codes.size
    assert isinstance(guide, HasRsample)
    assert not isinstance(guide, HasDensity)
    assert guide.rsample(x).shape == (b, size)
    c = guide.rsample(x, torch.Size([40, 2]))
    assert c.shape == (40, 2, b, size)
    assert c.dtype == torch.float64
    assert (c.reshape(80, b * size).std(0) > 0).any()
    named = [(n, p) for n, p in guide.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(c.square().sum(), [p for _, p in named], allow_unused=True)
    idle = [n for (n, _), g in zip(named, found, strict=True) if g is None or not g.any()]
    assert not idle


@on_all
def test_draws_are_decoded_codes(case):
    _, guide, x = case
    with seeded(4), torch.no_grad():
        z = guide.codes.decode(guide.rsample(x, torch.Size([6])))
    draws = guide.draw(x, draws=3, chains=2, seed=4)
    for s in guide.latents.sites:
        assert s.support.check(draws.values[s.name]).all()
        assert torch.equal(draws.values[s.name].flatten(0, 1), z[s.name])
    assert not draws.stats


def test_draws_in_pieces_are_all_different(monkeypatch):
    guide = NoiseMLP(MODELS["two sites"]().double(), hidden=(4,))
    monkeypatch.setattr("inference.recognition.MAX_ROWS", 7)  # two draws of three problems
    rate = guide.draw(WIDE, draws=5, chains=2, seed=0).values["rate"]
    assert rate.shape == (2, 5, 3)
    assert len(rate.unique()) == 30


@on_all
def test_elbos_are_refused(case):
    model, guide, x = case
    for vectorised in (False, True):
        elbo = Trace_ELBO(2, vectorize_particles=vectorised, max_plate_nesting=3)
        with pytest.raises(NoDensity, match="only be sampled"):
            elbo.loss(model, guide, x)
        with pytest.raises(NoDensity):
            elbo.differentiable_loss(model, guide, x)


@on_all
def test_vectorised_particles_have_draws_of_their_own(case):
    """An outer plate repeats a value that others have drawn; these are to be drawn for it."""
    _, guide, x = case
    one = poutine.trace(guide).get_trace(x)
    with pyro.plate("particles", 60, dim=-4):
        many = poutine.trace(guide).get_trace(x)
    found = Predictive(guide, num_samples=60, parallel=True)(x)
    for name in guide.latents.names:
        value, alone = many.nodes[name]["value"], one.nodes[name]["value"]
        assert value.numel() == 60 * alone.numel()
        for draws in (value.reshape(60, -1), found[name].reshape(60, -1)):
            assert (draws.double().std(0) > 0).all()


def test_two_problems_do_not_share_noise():
    guide = shaken(GUIDES["recurrent"](MODELS["factor analysis"]()))
    x = guide.model.observations()[:1].expand(2, -1)
    with torch.no_grad():
        c = guide.rsample(x, torch.Size([4000]))
    r = torch.corrcoef(torch.cat([c[:, 0], c[:, 1]], -1).T)[:3, 3:]
    within(r, 0.0, torch.full_like(r, 4000**-0.5))


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_precision_follows_the_model(make):
    model = MODELS["noisy or"]()
    guide = make(model)
    x = model.observations()[:2]
    assert guide.rsample(x).dtype == torch.float32
    model.double()
    guide.double()
    assert guide.rsample(x.double()).dtype == torch.float64
    assert guide.draw(x.double(), draws=2, chains=1, seed=0).values["z"].dtype == torch.float64


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_initial_weights_are_those_of_the_seed(make):
    model = MODELS["factor analysis"]()
    one, same, other = (make(model, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(v, same[n]) for n, v in one.items())
    assert not all(torch.equal(v, other[n]) for n, v in one.items())


def test_a_network_is_saved_with_its_knobs(tmp_path):
    model = MODELS["factor analysis"]()
    knobs = {"neurons": 12, "noises": 4, "steps": 2, "rate": 0.7, "private": True}
    guide = RecurrentRecognition(model, **knobs)
    fit(model, guide, objective=EnergyScore(), steps=2, progress=False).save(tmp_path / "f")
    again = RecurrentRecognition(model, **knobs, seed=0)
    Fit.load(tmp_path / "f", again)
    assert guide.objective is Adversarial
    x = model.observations()[:2]
    with torch.no_grad():
        with seeded(1):
            one = guide.rsample(x)
        with seeded(1):
            assert torch.equal(one, again.rsample(x))


# ------------------------------------------------------------------------------------- equations


def by_hand(guide, x, shape, *, private):
    """h_k+1 = (1 - a) h_k + a f(W_in x + b + W_lat h_k + W_e e_k), step by step."""
    s = squash((x - guide.units.x_loc) / guide.units.x_scale)
    drive = s @ guide.input.weight.T + guide.input.bias
    h, states = torch.zeros(*shape, *drive.shape, dtype=x.dtype), []
    for _ in range(guide.steps):
        states.append(h)
        e = torch.empty(*shape, len(x), guide.noise.shape[-1], dtype=x.dtype).normal_()
        noise = e * guide.noise if private else torch.einsum("...m,nm->...n", e, guide.noise)
        lateral = torch.einsum("...j,ij->...i", h, guide.lateral)
        h = (1 - guide.rate) * h + guide.rate * torch.tanh(drive + noise + lateral)
    return [*states, h]


@pytest.mark.parametrize("name", ["recurrent", "private"])
def test_states_follow_the_equation(name):
    model = MODELS["factor analysis"]().double()
    guide, x = shaken(GUIDES[name](model)), model.observations()[:2]
    shape = torch.Size([4])
    with seeded(2):
        states = by_hand(guide, x, shape, private=name == "private")
    standard = (x - guide.units.x_loc) / guide.units.x_scale
    out = guide.output
    if name == "private":  # neuron i speaks to output i mod 3 alone
        out = out * (torch.arange(24) % 3 == torch.arange(3)[:, None])
    linear = standard @ guide.linear.weight.T + guide.linear.bias
    truth = guide.units.u_loc + guide.units.u_scale * (linear + states[-1] @ out.T)
    with seeded(2):
        found = guide.rsample(x, shape)
    torch.testing.assert_close(found, truth)
    assert guide.linear.weight.abs().min() > 0
    with seeded(3):
        assert not torch.allclose(guide.rsample(x, shape), truth, rtol=1e-3)


def test_the_perceptron_follows_the_equation():
    model = MODELS["factor analysis"]().double()
    guide, x = shaken(GUIDES["perceptron"](model)), model.observations()[:2]
    standard = (x - guide.units.x_loc) / guide.units.x_scale
    with seeded(2):
        e = torch.empty(4, 2, 3 + 8, dtype=x.dtype).normal_()
    net = guide.net(torch.cat([squash(standard).expand(4, -1, -1), e], -1))
    linear = standard @ guide.linear.weight.T + guide.linear.bias
    with seeded(2):
        found = guide.rsample(x, torch.Size([4]))
    torch.testing.assert_close(found, guide.units.u_loc + guide.units.u_scale * (linear + net))
    assert NoiseMLP(model, noises=1).noises == 3  # no direction is without noise


@pytest.mark.parametrize("model_name", ["factor analysis", "two sites", "noisy or"])
def test_a_trajectory_ends_in_a_draw(model_name):
    model = MODELS[model_name]().double()
    guide, x = shaken(GUIDES["recurrent"](model)), model.observations()[:2]
    found = guide.trajectory(x, runs=6, seed=5)
    again = guide.trajectory(x, runs=6, seed=5)
    rates, time = found.circuit["rates"], found.stats["time"]
    assert rates.shape == (6, 4, 2, 24)
    assert not rates[:, 0].any()
    torch.testing.assert_close(time, (0.5 * torch.arange(4.0).double())[:, None].expand(6, 4, 2))
    assert (found.stats["noise"] == 1).all()
    assert found.time_constants == 6 * 3 * 0.5
    with seeded(5), torch.no_grad():
        states = torch.stack(by_hand(guide, x, torch.Size([6]), private=False), 1)
    torch.testing.assert_close(rates, states)
    with seeded(5), torch.no_grad():
        last = guide.codes.decode(guide.rsample(x, torch.Size([6])))
    for s in guide.latents.sites:
        assert found.values[s.name].shape == (6, 4, 2, *s.shape)
        assert torch.equal(found.values[s.name], again.values[s.name])
        if not s.discrete:  # of discrete ones, each step is a draw
            torch.testing.assert_close(found.values[s.name][:, -1], last[s.name])
    with pytest.raises(BadInput, match="runs: expected an integer >= 1; got 0"):
        guide.trajectory(x, runs=0, seed=0)


def test_outputs_of_discrete_latents_are_log_odds():
    model = MODELS["noisy or"]().double()
    guide, n = GUIDES["recurrent"](model), 8000
    with torch.no_grad():
        guide.output.zero_()
        guide.linear.bias.copy_(torch.tensor([-2.0, 0.4, 1.0]))
        z = guide.draw(model.observations()[:2], draws=n, chains=1, seed=0).values["z"][0]
    chance = guide.linear.bias.detach().sigmoid().expand(2, -1)
    within(z.mean(0), chance, z.std(0) / n**0.5)


# ----------------------------------------------------------------------------------- correlations


def correlations(guide, x, n=20_000):
    """Of codes given x, and of their squares, off the diagonal: (2, pairs)."""
    with torch.no_grad():
        c = guide.rsample(x, torch.Size([n]))[:, 0]
    i, j = torch.triu_indices(c.shape[1], c.shape[1], 1)
    return torch.stack([torch.corrcoef(t.T)[i, j] for t in (c, (c - c.mean(0)).square())])


WIRED = {  # whether outputs are dependent given x
    "private and without lateral weights": (False, {"private": True, "lateral": False}),
    "lateral weights": (True, {"private": True, "lateral": True}),
    "shared noise": (True, {"private": False, "lateral": False}),
}


@pytest.mark.parametrize("wiring", WIRED)
def test_dependence_comes_from_lateral_weights_or_shared_noise(wiring):
    dependent, knobs = WIRED[wiring]
    model = MODELS["factor analysis"]().double()
    guide = shaken(RecurrentRecognition(model, neurons=12, steps=4, **knobs))
    r, se = correlations(guide, model.observations()[:1]), 20_000**-0.5
    if dependent:
        assert (r[0].abs() > 10 * se).any()
    else:
        within(r[0], 0.0, torch.full_like(r[0], se))
        assert (r[1].abs() < 10 * se).all()  # of squares: tails are heavier, and so is the error


def test_lateral_weights_can_be_left_out():
    model = MODELS["factor analysis"]()
    guide = RecurrentRecognition(model, neurons=12, lateral=False)
    fit(model, guide, objective=EnergyScore(), steps=3, batch_size=8, progress=False)
    assert not guide.lateral.any()
    assert not guide.lateral.requires_grad


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        *(({"rate": a}, r"^rate: expected 0 < rate <= 1; got") for a in (0.0, 1.5, float("nan"))),
        ({"neurons": 2}, r"^neurons: expected one for each of 3 outputs.*got 2\. neurons=12"),
        ({"neurons": 0}, r"^neurons: expected an integer >= 1"),
        ({"noises": 0}, r"^noises: expected an integer >= 1"),
        ({"steps": 0}, r"^steps: expected an integer >= 1"),
        ({"activation": "tan"}, r"^activation: .*tanh"),
        ({"temperature": 0.0}, r"^temperature: expected a number >= 0\.001"),
    ],
)
def test_bad_knobs_are_refused(knobs, says):
    with pytest.raises(BadInput, match=says):
        RecurrentRecognition(MODELS["factor analysis"](), **knobs)


@pytest.mark.parametrize("make", [RecurrentRecognition, NoiseMLP])
def test_counts_are_refused(make):
    with pytest.raises(Incompatible, match=rf"^{make.__name__}: .*finitely many.*'z'.*Poisson"):
        make(zoo.PoissonCoding(3, side=3))
