"""Codes: latents as numbers and back, and what a network's outputs become."""

from __future__ import annotations

from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from test_guides import WIDE, inner_plate, two_sites

import zoo
from inference import Incompatible
from inference.codes import Codes
from inference.latents import Latents
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")

B, S = 5, 3
X = torch.tensor([[0.4, -1.0], [2.0, 0.3], [1.1, 0.7]], dtype=torch.float64)


def simplex(x):
    """Shares of three kinds and a correlation: supports whose codes are smaller than they are."""
    with pyro.plate("data", len(x)):
        share = pyro.sample("share", dist.Dirichlet(x.new_tensor([2.0, 1.0, 0.5])))
        slope = pyro.sample("slope", dist.Uniform(x.new_tensor(-1.0), 3.0))
        loc = share[..., :2] * slope[..., None]
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def switch(x):
    """A switch with two states, of integers, and a dial with five in each of two plates."""
    with pyro.plate("data", len(x), dim=-2):
        side = pyro.sample("side", dist.Categorical(x.new_tensor([0.3, 0.7])))
        with pyro.plate("hand", 2, dim=-1):
            dial = pyro.sample("dial", dist.Binomial(4, x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(dial - side, 0.5), obs=x)


def walk(x):
    """Three steps, each with a lamp, one of three gears and a position in the plane."""
    with pyro.plate("data", len(x)):
        lamp = pyro.sample("lamp", dist.Bernoulli(x.new_tensor([0.2, 0.5, 0.9])).to_event(1))
        gear = pyro.sample("gear", dist.Categorical(x.new_ones(3, 3) / 3).to_event(1))
        place = pyro.sample("place", dist.Normal(x.new_zeros(3, 2), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(lamp + gear + place.sum(-1), 0.5).to_event(1), obs=x)


MODELS = {
    "two sites": partial(zoo.from_pyro, two_sites, WIDE),
    "inner plate": partial(zoo.from_pyro, inner_plate, WIDE[:, :2]),
    "simplex": partial(zoo.from_pyro, simplex, X),
    "layers": zoo.LayeredGaussian,
    "noisy or": partial(zoo.NoisyOr, 3, 2),
    "sprinkler": zoo.Sprinkler,
    "ball": partial(zoo.MovingBall, 3, steps=4, occluder=(1,)),
    "switch": partial(zoo.from_pyro, switch, X),
    "walk": partial(zoo.from_pyro, walk, X.new_zeros(2, 3)),
}
SIZES = {  # C, and how many of them are discrete
    "two sites": (2, 0),
    "inner plate": (3, 0),
    "simplex": (3, 0),
    "layers": (5, 0),
    "noisy or": (3, 3),
    "sprinkler": (3, 3),
    "ball": (4 * 36, 4 * 36),
    "switch": (1 + 2 * 5, 11),
    "walk": (3 + 3 * 3 + 6, 12),
}


@cache
def codes_of(name):
    return Codes(Latents(MODELS[name]().double()), "Tester")


def draws(codes, *lead):
    """Latents (*lead, B, *shape) from the prior."""
    z, _ = codes.latents.joint(torch.Size([*lead, B]).numel(), seed=1)
    return {n: v.reshape(*lead, B, *v.shape[1:]) for n, v in z.items()}


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("lead", [(), (S,), (2, S)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_latents_come_back(name, lead):
    codes = codes_of(name)
    z = draws(codes, *lead)
    c = codes.encode(z)
    assert (codes.size, int(codes.discrete.sum())) == SIZES[name]
    assert codes.discrete.shape == (codes.size,)
    assert c.shape == (*lead, B, codes.size)
    assert c.dtype == codes.dtype == torch.float64
    assert len(c.reshape(-1, codes.size).unique(dim=0)) > 1, "nothing varies"
    back = codes.decode(c)
    assert set(back) == set(codes.latents.names)
    for s in codes.latents.sites:
        assert back[s.name].dtype == z[s.name].dtype == s.dtype
        torch.testing.assert_close(
            back[s.name], z[s.name], rtol=0 if s.discrete else 1e-10, atol=0 if s.discrete else 1e-8
        )


@pytest.mark.parametrize("name", ["two sites", "inner plate", "simplex", "layers"])
def test_continuous_latents_are_packed(name):
    codes = codes_of(name)
    z = draws(codes, S)
    assert torch.equal(codes.encode(z), codes.latents.pack(z)[0])
    assert not codes.discrete.any()
    raw = torch.randn(4, codes.size).double()
    assert codes.emit(raw, 0.5) is raw


def test_discrete_latents_are_zeros_and_ones():
    codes = codes_of("walk")
    c = codes.encode(draws(codes, 40))
    assert set(c[..., codes.discrete].unique().tolist()) == {0.0, 1.0}
    gear = c.split(list(codes.sizes.values()), -1)[1].reshape(40, B, 3, 3)
    assert (gear.sum(-1) == 1).all()
    assert not codes.discrete[-6:].any()


def test_codes_of_a_float32_model_are_float32():
    for name in ("noisy or", "ball", "layers"):
        codes = Codes(Latents(MODELS[name]()), "Tester")
        assert codes.encode(draws(codes)).dtype == torch.float32


def test_gradients_pass_through_decode():
    codes = codes_of("two sites")
    c = torch.randn(4, codes.size).double().requires_grad_()
    found = torch.autograd.grad(codes.decode(c)["rate"].sum(), c)[0]
    torch.testing.assert_close(found[:, 0], c[:, 0].exp())  # a rate is the exponential of its code
    assert not found[:, 1].any()


# --------------------------------------------------------------------------------------- emission


def frequencies(codes, raw, temperature=0.5, n=20_000):
    """Mean and standard error of emitted entries, raw (C,) being the log odds."""
    found = codes.emit(raw.expand(n, -1), temperature)
    return found.mean(0), found.std(0) / n**0.5


def odds(codes, raw):
    """Chance of each state, site by site."""
    pieces = []
    for (name, k), piece in zip(
        codes.states.items(), raw.split(list(codes.sizes.values())), strict=True
    ):
        assert k, name
        pieces.append(piece.reshape(-1, k).softmax(-1).flatten() if k > 2 else piece.sigmoid())
    return torch.cat(pieces)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", ["noisy or", "sprinkler", "switch"])
def test_states_are_drawn_as_their_log_odds_say(name, temperature):
    codes = codes_of(name)
    raw = torch.linspace(-1.5, 2.0, codes.size).double()
    mean, se = frequencies(codes, raw, temperature)
    within(mean, odds(codes, raw), se)
    with pytest.raises(AssertionError, match="standard errors"):
        within(mean, odds(codes, 1.3 * raw), se)


def test_continuous_outputs_are_as_they_are_beside_discrete_ones():
    codes = codes_of("walk")
    raw = torch.linspace(-1.5, 2.0, codes.size).double().expand(7, -1)
    c = codes.emit(raw, 0.5)
    assert torch.equal(c[:, ~codes.discrete], raw[:, ~codes.discrete])
    states = c[:, codes.discrete]
    assert torch.equal(states.round(), codes.encode(codes.decode(c))[:, codes.discrete])
    assert (states - states.round()).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["noisy or", "sprinkler", "ball", "switch", "walk"])
def test_emitted_states_have_gradients_and_are_in_the_support(name, dtype):
    codes = codes_of(name)
    raw = torch.randn(50, codes.size, dtype=dtype).requires_grad_()
    c = codes.emit(raw, 0.5)
    assert c.dtype == dtype
    for s in codes.latents.sites:
        assert s.support.check(codes.decode(c)[s.name]).all()
    weights = torch.randn(codes.size, dtype=dtype)
    slope = torch.autograd.grad((c * weights).sum(), raw)[0]
    assert torch.isfinite(slope).all()
    assert slope.abs().sum(0).min() > 0


def test_the_straight_through_slope_is_that_of_the_relaxed_state():
    """d/dl sigmoid((l + noise) / t), on average over the noise; t -> 0 gives that of the chance."""
    codes = codes_of("noisy or")
    raw = torch.tensor([-1.0, 0.3, 1.2]).double().expand(50_000, -1).clone().requires_grad_()
    slope = torch.autograd.grad(codes.emit(raw, 0.05).sum(), raw)[0]
    chance = raw[0].detach().sigmoid()
    truth = chance * (1 - chance)  # the relaxation's bias is of order t^2, a hundredth of this
    within(slope.mean(0), truth, slope.std(0) / 50_000**0.5 + 0.002 * truth)


def test_extreme_log_odds_are_certain():
    codes = codes_of("walk")
    raw = torch.full((100, codes.size), -60.0).double()
    raw[:, [0, 3, 7, 11]] = 60.0  # lamp 1; gears 0, 1, 2
    z = codes.decode(codes.emit(raw, 0.5))
    assert torch.equal(z["lamp"], z["lamp"].new_tensor([1.0, 0.0, 0.0]).expand(100, -1))
    assert torch.equal(z["gear"], torch.tensor([0, 1, 2]).expand(100, -1))


def test_outputs_of_one_step_are_a_step_of_a_code():
    codes = codes_of("walk")
    raw = torch.full((codes.size,), -60.0).double()
    raw[[0, 3, 7, 11]] = 60.0
    raw[-6:] = torch.arange(6.0).double()
    whole = codes.emit(raw, 0.5)
    lamp, gear, place = (t.reshape(3, -1) for t in raw.split([3, 9, 6]))
    for t in range(3):
        step = codes.emit(torch.cat([lamp[t], gear[t], place[t]])[None], 0.5, steps=3)[0]
        parts = [p.reshape(3, -1)[t] for p in whole.split([3, 9, 6])]
        torch.testing.assert_close(step, torch.cat(parts))


def test_draws_follow_the_generator():
    codes = codes_of("switch")
    raw = torch.zeros(200, codes.size).double()
    found = []
    for seed in (0, 0, 1):
        with seeded(seed):
            found.append(codes.emit(raw, 0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --------------------------------------------------------------------------------------- refusals


def unequal(x):
    """Counts up to three and up to five in one site."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Binomial(x.new_tensor([3.0, 5.0]), 0.4).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize(
    "model", [partial(zoo.PoissonCoding, 3, side=3), partial(zoo.from_pyro, unequal, X)]
)
def test_states_that_cannot_be_listed_are_refused(model):
    message = r"^Tester: expected .*finitely many states; got the site 'z' with support .*Iterativ"
    with pytest.raises(Incompatible, match=message):
        Codes(Latents(model()), "Tester")
