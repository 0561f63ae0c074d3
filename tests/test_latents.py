"""Latents: what prototype traces teach, packing, scoring, simulating, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.distributions import Beta, Dirichlet, Gamma, LogNormal, Normal

import zoo
from inference import BadInput, Incompatible, Latents
from inference.observation import check_observation
from inference.seeds import seeded

X = torch.linspace(-1.0, 2.0, 8, dtype=torch.float64).reshape(4, 2)
LEADS = [(), (3,), (2, 3)]


def supports(x):
    """Real, positive, unit interval and simplex, in one model; D = 1 + 2 + 1 + 2 = 6."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.5), 2.0))
        b = pyro.sample("b", dist.Gamma(x.new_tensor([2.0, 1.5]), 3.0).to_event(1))
        c = pyro.sample("c", dist.Beta(x.new_tensor(2.0), 3.0))
        d = pyro.sample("d", dist.Dirichlet(x.new_tensor([1.0, 2.0, 3.0])))
        loc = torch.stack([a + c, b[..., 0] * d[..., 1]], -1)
        pyro.sample("x", dist.Normal(loc, b).to_event(1), obs=x)


def supports_density(z, x):
    loc = torch.stack([z["a"] + z["c"], z["b"][..., 0] * z["d"][..., 1]], -1)
    return (
        Normal(x.new_tensor(0.5), 2.0).log_prob(z["a"])
        + Gamma(x.new_tensor([2.0, 1.5]), 3.0).log_prob(z["b"]).sum(-1)
        + Beta(x.new_tensor(2.0), 3.0).log_prob(z["c"])
        + Dirichlet(x.new_tensor([1.0, 2.0, 3.0])).log_prob(z["d"])
        + Normal(loc, z["b"]).log_prob(x).sum(-1)
    )


def inner(x):
    """A site inside "data" alone, (B, 1), and one inside an inner plate too, (B, 2)."""
    with pyro.plate("data", len(x), dim=-2):
        s = pyro.sample("s", dist.Gamma(x.new_tensor(3.0), 2.0))
        with pyro.plate("pixel", 2, dim=-1):
            z = pyro.sample("z", dist.LogNormal(x.new_tensor(0.3), 0.5))
            pyro.sample("x", dist.Normal(z, s), obs=x)


def inner_density(z, x):
    return (
        Gamma(x.new_tensor(3.0), 2.0).log_prob(z["s"]).sum(-1)
        + LogNormal(x.new_tensor(0.3), 0.5).log_prob(z["z"]).sum(-1)
        + Normal(z["z"], z["s"]).log_prob(x).sum(-1)
    )


def regression(inputs, labels):
    """One problem: latents outside "data", and an observation of inputs and labels."""
    w = pyro.sample("w", dist.Normal(inputs.new_tensor([0.5, -1.0]), 0.7).to_event(1))
    s = pyro.sample("s", dist.Gamma(inputs.new_tensor(4.0), 8.0))
    with pyro.plate("data", len(inputs)):
        pyro.sample("y", dist.Normal(inputs @ w, s), obs=labels)


def regression_density(z, x):
    inputs, labels = x
    return (
        Normal(inputs.new_tensor([0.5, -1.0]), 0.7).log_prob(z["w"]).sum(-1)
        + Gamma(inputs.new_tensor(4.0), 8.0).log_prob(z["s"])
        + Normal(z["w"] @ inputs.T, z["s"][..., None]).log_prob(labels).sum(-1)
    )


DATA = (X[:, :2], X[:, 0] - 0.3)
CASES = {
    "supports": (supports, X, supports_density),
    "inner plate": (inner, X, inner_density),
    "one problem": (regression, DATA, regression_density),
}


def latents_of(case):
    program, x, density = CASES[case]
    return Latents(zoo.from_pyro(program, x)), x, density


def packed(lat, x, lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, lat.problems(x), lat.size)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------- sites and packing


def test_sites_of_each_kind():
    lat = latents_of("supports")[0]
    assert lat.names == ("a", "b", "c", "d")
    assert [tuple(s.shape) for s in lat.sites] == [(), (2,), (), (3,)]
    assert (lat.size, lat.plated, lat.observed, lat.continuous) == (6, True, "x", True)
    assert lat.splits == {"a": 1, "b": 2, "c": 1, "d": 2}
    lat = latents_of("inner plate")[0]
    assert {s.name: (tuple(s.shape), s.plates) for s in lat.sites} == {
        "s": ((1,), ()),
        "z": ((2,), (("pixel", -1, 2),)),
    }
    lat, x, _ = latents_of("one problem")
    assert not lat.plated
    assert lat.problems(x) == 1
    assert (lat.observed, lat.slot) == ("y", 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lead", LEADS)
def test_unpack_undoes_pack(case, lead):
    lat, x, _ = latents_of(case)
    u = packed(lat, x, lead)
    z, jacobians = lat.unpack(u)
    for s in lat.sites:
        assert z[s.name].shape == (*u.shape[:-1], *s.shape)
        assert s.support.check(z[s.name]).all()
    again, log_jacobian = lat.pack(z)
    torch.testing.assert_close(again, u, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(log_jacobian, sum(jacobians.values()), rtol=1e-8, atol=1e-8)


LATENTS = latents_of("supports")[0]


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(arrays(np.float64, (6,), elements=st.floats(-6, 6)))
def test_pack_inverts_unpack_and_the_jacobian_is_autograds(numbers):
    u = torch.from_numpy(numbers)[None]
    z, jacobians = LATENTS.unpack(u)
    again, log_jacobian = LATENTS.pack(z)
    torch.testing.assert_close(again, u, rtol=1e-6, atol=1e-6)

    def free(v):  # a simplex has one coordinate too many: its density is over all but the last
        z = LATENTS.unpack(v)[0]
        return torch.cat([z["a"][..., None], z["b"], z["c"][..., None], z["d"][..., :-1]], -1)

    by_autograd = torch.autograd.functional.jacobian(lambda v: free(v[None])[0], u[0]).slogdet()[1]
    torch.testing.assert_close(log_jacobian[0], by_autograd, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sum(jacobians.values())[0], by_autograd, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lead", LEADS)
def test_log_joint_is_the_density_written_by_hand(case, lead):
    lat, x, density = latents_of(case)
    u = packed(lat, x, lead)
    z, jacobians = lat.unpack(u)
    found = lat.log_joint(z, x)
    assert found.shape == u.shape[:-1]
    torch.testing.assert_close(found, density(z, x), rtol=1e-10, atol=1e-10)
    with_jacobian = density(z, x) + sum(jacobians.values())
    torch.testing.assert_close(lat.log_density(u, x), with_jacobian, rtol=1e-10, atol=1e-10)


def test_log_joint_in_many_calls_is_log_joint_in_one(monkeypatch):
    lat, x, _ = latents_of("supports")
    z = lat.unpack(packed(lat, x, (2, 5)))[0]
    whole = lat.log_joint(z, x)
    monkeypatch.setattr("inference.latents.MAX_ROWS", 13)  # three draws of four problems, then one
    torch.testing.assert_close(lat.log_joint(z, x), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["supports", "inner plate"])
def test_problems_are_independent_and_in_order(case):
    lat, x, _ = latents_of(case)
    z = lat.unpack(packed(lat, x, (3,)))[0]
    order = torch.tensor([2, 0, 3, 1])
    shuffled = lat.log_joint({n: v[:, order] for n, v in z.items()}, x[order])
    torch.testing.assert_close(shuffled, lat.log_joint(z, x)[:, order], rtol=1e-12, atol=1e-12)
    alone = lat.log_joint({n: v[:, 2:3] for n, v in z.items()}, x[2:3])
    torch.testing.assert_close(alone, shuffled[:, :1], rtol=1e-12, atol=1e-12)


def test_log_joint_carries_gradients():
    lat, x, _ = latents_of("supports")
    u = packed(lat, x, ()).requires_grad_()
    slope = torch.autograd.grad(lat.log_density(u, x).sum(), u)[0]
    step = 1e-6 * torch.ones_like(u)
    numeric = (lat.log_density(u + step, x) - lat.log_density(u - step, x)) / 2e-6
    torch.testing.assert_close(slope.sum(-1), numeric.detach(), rtol=1e-5, atol=1e-5)


def test_a_factor_counts_in_the_joint_and_cannot_be_simulated():
    def tilted(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.factor("tilt", 0.3 * z)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = X[:, 0]
    lat = Latents(zoo.from_pyro(tilted, x))
    z = {"z": packed(lat, x, (3,))[..., 0]}
    by_hand = Normal(0.0, 1.0).log_prob(z["z"]) + Normal(z["z"], 0.5).log_prob(x) + 0.3 * z["z"]
    torch.testing.assert_close(lat.log_joint(z, x), by_hand, rtol=1e-10, atol=1e-10)
    with pytest.raises(Incompatible, match=r"pyro\.factor sites \['tilt'\].*train on data"):
        lat.joint(3, seed=0)


# ------------------------------------------------------------------------------------- simulating


def test_joint_draws_have_the_models_moments(model):
    n = 4000
    z, x = Latents(model).joint(n, seed=3)
    assert z["z"].shape == (n, 3)
    assert x.shape == (n, 7)
    within(z["z"].mean(0), 0.0, 1 / math.sqrt(n))
    with torch.no_grad():
        w, mean, noise = model.loadings, model.mean, model.noise
        sd = (w.square().sum(1) + noise.square()).sqrt()
        residual = x - model.predict(z)
        within(x.mean(0), mean, sd / math.sqrt(n))
        # the sd of a variance estimate of n Gaussian draws is sqrt(2 / n) times the variance
        within(x.var(0), sd**2, sd**2 * math.sqrt(2 / n))
        within(residual.square().mean(0), noise**2, noise**2 * math.sqrt(2 / n))


def test_the_seed_alone_decides_joint_draws(model):
    z, x = model.simulate(5, seed=4)
    again_z, again_x = model.simulate(5, seed=4)
    other = model.simulate(5, seed=5)[1]
    assert torch.equal(x, again_x)
    assert torch.equal(z["z"], again_z["z"])
    assert not torch.equal(x, other)


def test_inputs_of_one_problem_are_kept_and_labels_replaced():
    lat, x, _ = latents_of("one problem")
    with seeded(0):
        z, simulated = lat.simulate(x)
    assert {n: tuple(v.shape) for n, v in z.items()} == {"w": (1, 2), "s": (1,)}
    assert torch.equal(simulated[0], x[0])
    assert simulated[1].shape == x[1].shape
    assert not torch.equal(simulated[1], x[1])


def test_joint_of_one_problem_stacks_data_sets():
    lat, x, _ = latents_of("one problem")
    n = 400
    z, (inputs, labels) = lat.joint(n, seed=1)
    assert z["w"].shape == (n, 2)
    assert z["s"].shape == (n,)
    assert torch.equal(inputs, x[0].expand(n, 4, 2))
    noise = (labels - torch.einsum("nif,nf->ni", inputs, z["w"])) / z["s"][:, None]
    within(z["w"].mean(0), [0.5, -1.0], 0.7 / math.sqrt(n))
    within(noise.mean(0), 0.0, 1 / math.sqrt(n))
    within(noise.square().mean(), 1.0, math.sqrt(2 / noise.numel()))


def test_inputs_of_independent_problems_are_cycled():
    def gain(inputs, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(inputs.new_tensor(1.0), 0.3))
            pyro.sample("y", dist.Normal(z * inputs, 0.2), obs=y)

    like = (torch.tensor([-4.0, 0.5, 9.0]), torch.zeros(3))
    z, (inputs, y) = zoo.from_pyro(gain, like).simulate(3000, seed=2)
    assert torch.equal(inputs, like[0].repeat(1000))
    within((y - z["z"] * inputs).reshape(1000, 3).mean(0), 0.0, 0.2 / math.sqrt(1000))


@pytest.mark.parametrize("lead", LEADS)
def test_replicate_shapes(lead, model):
    lat, x = Latents(model), model.observations()[:4]
    one, data, _ = latents_of("one problem")
    z = one.unpack(packed(one, data, lead))[0]
    with seeded(0):
        assert lat.replicate({"z": torch.zeros(*lead, 4, 3)}, x).shape == (*lead, 4, 7)
        assert one.replicate(z, data).shape == (*lead, 4)


def test_replicates_have_the_likelihoods_moments(model):
    lat, x, n = Latents(model), model.observations()[:2], 3000
    z = {"z": torch.tensor([[1.0, -0.5, 2.0], [0.0, 1.5, -1.0]]).expand(n, 2, 3)}
    with seeded(5), torch.no_grad():
        found = lat.replicate(z, x)
        within(found.mean(0), model.predict(z)[0], model.noise.expand(2, 7) / math.sqrt(n))
        within(found.var(0), model.noise**2, (model.noise**2 * math.sqrt(2 / n)).expand(2, 7))


# ----------------------------------------------------------------------------- models we refuse


def no_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def two_observed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 2.0), obs=x)


def nothing_observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def mixed(x):
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shared, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def changing_sites(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if torch.rand(()) < 0.5:
            z = z + pyro.sample("extra", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def changing_shape(x):
    with pyro.plate("data", len(x)):
        n = 1 + int(torch.rand(()) < 0.5)
        z = pyro.sample("z", dist.Normal(torch.zeros(n), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def wandering_support(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def data_not_leftmost(x):
    with pyro.plate("pixel", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, len(x)))


def another_shape(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample(
            "x", dist.Normal(z[:, None].expand(-1, 3), 1.0).to_event(1), obs=x.repeat(3, 1).T
        )


REFUSED = {
    no_latent: "at least one latent site; got none",
    two_observed: r"exactly one observed site; got \['x', 'y'\].*join several",
    nothing_observed: "exactly one observed site; got none.*obs=x",
    mixed: r'inside the plate "data".*got \[\'shared\'\] outside it.*rename the plate',
    changing_sites: "same latent sites.*extra.*Reparameterise",
    changing_shape: "same latent sites, shapes.*'z' of shape.*Reparameterise",
    wandering_support: "support of 'z' that depends on other sites",
    data_not_leftmost: "'z'.*\"data\" leftmost.*pixel.*leftmost dim",
    another_shape: "observed site shaped as x.*'x' of shape.*as it is passed in",
}


@pytest.mark.parametrize("program", REFUSED, ids=lambda p: p.__name__)
def test_models_we_refuse(program):
    with pytest.raises(Incompatible, match=REFUSED[program]):
        zoo.from_pyro(program, torch.linspace(-1.0, 1.0, 5))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: dist.Uniform(0.0, 2.0),
        lambda x: dist.Uniform(x.new_zeros(len(x)), 2.0),
        lambda x: dist.Pareto(1.5, 3.0),
        lambda x: dist.Dirichlet(torch.ones(3)),
        lambda x: dist.Bernoulli(0.4),
    ],
    ids=["interval", "interval per problem", "half line", "simplex", "boolean"],
)
def test_supports_that_stay_put_are_accepted(make):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make(x))
            pyro.sample("x", dist.Normal(z.reshape(len(x), -1).sum(-1), 1.0), obs=x)

    lat = Latents(zoo.from_pyro(program, torch.linspace(-1.0, 1.0, 5)))
    z, x = lat.joint(3, seed=0)
    u, log_jacobian = lat.pack(z)
    assert u.shape == (3, lat.size)
    assert log_jacobian.shape == lat.log_joint(z, x).shape == (3,)
    torch.testing.assert_close(lat.unpack(u)[0]["z"], z["z"])


def test_discrete_sites_are_packed_as_they_are():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    lat = Latents(zoo.from_pyro(program, torch.linspace(-1.0, 1.0, 4)))
    z = {"z": torch.tensor([[0.0, 1.0, 1.0, 0.0]])}
    u, log_jacobian = lat.pack(z)
    assert torch.equal(u[..., 0], z["z"])
    assert not log_jacobian.any()
    with pytest.raises(Incompatible, match=r"Flow: expected continuous latents; .* site 'z'"):
        lat.require_continuous("Flow")


# ------------------------------------------------------------------------ observations we refuse

GOOD = torch.linspace(-1.0, 2.0, 12).reshape(4, 3)
PAIR = (GOOD, torch.ones(4))


def with_entry(value):
    x = GOOD.clone()
    x[2, 1] = value
    return x


BAD_TENSORS = {
    "NaN": (with_entry(math.nan), "finite numbers", r"1 NaN.*\(2, 1\)", "Remove"),
    "infinity": (with_entry(-math.inf), "finite numbers", r"infinite entries.*\(2, 1\)", "Remove"),
    "other width": (GOOD[:, :2], r"shape \(B, 3\)", r"shape \(4, 2\)", "Reshape"),
    "an axis too many": (GOOD[None], r"shape \(B, 3\)", r"shape \(1, 4, 3\)", "Reshape"),
    "no problem axis": (GOOD[0], r"shape \(B, 3\)", r"shape \(3,\)", r"x\[None\]"),
    "dtype": (GOOD.double(), "dtype torch.float32", "torch.float64", r"x\.to\(torch\.float32\)"),
    "integers": (GOOD.long(), "dtype torch.float32", "torch.int64", r"x\.to\(torch\.float32\)"),
    "empty": (GOOD[:0], "at least one problem", "empty batch", "x"),
    "array": (GOOD.numpy(), "a tensor", "ndarray", "torch.as_tensor"),
    "list": (GOOD.tolist(), "a tensor", "list", "torch.as_tensor"),
    "nothing": (None, "a tensor", "NoneType", "torch.as_tensor"),
    "pair": (PAIR, "a tensor", "a tuple of 2", ""),
    "tuple of one": ((GOOD,), "a tensor", "a tuple of 1", ""),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case):
    x, expected, got, fix = BAD_TENSORS[case]
    with pytest.raises(BadInput, match=rf"^x: expected {expected}.*; got .*{got}.*\. .*{fix}"):
        check_observation(x, GOOD)


BAD_PAIRS = {
    "second part": ((GOOD, with_entry(1.0)), r"^x\[1\]: .*shape \(B\); got shape \(4, 3\)\. Resh"),
    "NaN inside": ((with_entry(math.nan), PAIR[1]), r"^x\[0\]: .*finite.*1 NaN.*\. Remove"),
    "lengths": ((GOOD, torch.ones(3)), r"^x: .*equal length; got lengths 4, 3\. Align"),
    "one tensor": (GOOD, "^x: expected a tuple of 2 tensors; got Tensor"),
    "list": (list(PAIR), "^x: expected a tuple of 2 tensors; got list"),
    "three": ((*PAIR, GOOD), "^x: expected a tuple of 2 tensors; got a tuple of 3"),
    "array inside": (
        (GOOD, PAIR[1].numpy()),
        "^x.*: expected .*tensor.*; got .*ndarray.*as_tensor",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_tuples(case):
    x, message = BAD_PAIRS[case]
    with pytest.raises(BadInput, match=message):
        check_observation(x, PAIR)


def test_one_problem_must_come_whole():
    lat, (inputs, labels), _ = latents_of("one problem")
    with pytest.raises(BadInput, match=r"x\[0\].*\(4, 2\).*got 3 rows\. Pass the whole"):
        lat.check((inputs[:3], labels[:3]))
    check_observation(GOOD[:1], GOOD)  # rows are free where each is a problem


# a data set that is one problem: many draws at once


def branching(inputs, labels):
    """Looks at the value of a latent, which torch cannot vectorise."""
    w = pyro.sample("w", dist.Normal(inputs.new_zeros(2), 1.0).to_event(1))
    noise = 0.5 if bool(w[0] > 0) else 2.0
    with pyro.plate("rows", len(inputs)):
        pyro.sample("y", dist.Normal(inputs @ w, noise), obs=labels)


def straight(inputs, labels):
    """The same without looking."""
    w = pyro.sample("w", dist.Normal(inputs.new_zeros(2), 1.0).to_event(1))
    noise = torch.where(w[0] > 0, w.new_tensor(0.5), w.new_tensor(2.0))
    with pyro.plate("rows", len(inputs)):
        pyro.sample("y", dist.Normal(inputs @ w, noise), obs=labels)


def one_data_set():
    inputs = torch.linspace(-1, 2, 14, dtype=torch.float64).reshape(7, 2)
    return inputs, inputs.sum(1).sin()


def test_many_draws_of_one_problem_are_scored_at_once(monkeypatch):
    """Vectorised as one call, in chunks, and one by one: the same numbers and gradients."""
    x, w = one_data_set(), torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(20, 1, 2)
    calls = []

    def counted(inputs, labels):
        calls.append(1)
        return straight(inputs, labels)

    model = zoo.from_pyro(counted, x)
    lat = Latents(model)
    calls.clear()
    w.requires_grad_()
    at_once = lat.log_joint({"w": w}, x)
    assert len(calls) == 1
    monkeypatch.setattr("inference.latents.MAX_ROWS", 3 * 7)
    torch.testing.assert_close(lat.log_joint({"w": w}, x), at_once, rtol=1e-12, atol=0)
    assert len(calls) == 1 + 7
    loop = Latents(zoo.from_pyro(branching, x)).log_joint({"w": w}, x)
    torch.testing.assert_close(loop, at_once, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(v.sum(), w)[0] for v in (at_once, loop)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)


def test_an_error_in_the_users_program_is_the_users_error():
    def broken(inputs, labels):
        w = pyro.sample("w", dist.Normal(inputs.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(inputs)):
            pyro.sample("y", dist.Normal(inputs @ w, 1.0), obs=labels)
        if len(inputs) and w.sum() > 100:
            raise RuntimeError("weights too large")

    x = one_data_set()
    lat = Latents(zoo.from_pyro(broken, x))
    with pytest.raises(RuntimeError, match="weights too large"):
        lat.log_joint({"w": torch.full((3, 1, 2), 99.0, dtype=torch.float64)}, x)


def test_chunks_are_small_where_observations_are_big(monkeypatch):
    """A film counts as many numbers, not as one row."""
    monkeypatch.setattr("inference.latents.MAX_CELLS", 60)
    rows = []

    def program(x):
        rows.append(len(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x",
                dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(x), 10]).to_event(1),
                obs=x,
            )

    x = torch.zeros(2, 10)
    lat = Latents(zoo.from_pyro(program, x))
    rows.clear()
    assert lat.log_joint({"z": torch.zeros(7, 2, 2)}, x).shape == (7, 2)
    assert max(rows) * 10 <= 60
    assert sum(rows) == 14


def test_deterministic_sites_are_neither_latents_nor_data():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            rate = pyro.deterministic("rate", z.exp())
            pyro.sample("x", dist.Normal(rate, 0.5), obs=x)

    x = torch.tensor([0.4, 1.3])
    lat = Latents(zoo.from_pyro(program, x))
    assert (lat.names, lat.observed) == (("z",), "x")
    z = torch.tensor([[0.1, -0.2]])
    want = Normal(0.0, 1.0).log_prob(z) + Normal(z.exp(), 0.5).log_prob(x)
    torch.testing.assert_close(lat.log_joint({"z": z}, x), want)
