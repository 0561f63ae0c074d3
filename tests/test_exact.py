"""Exact posteriors on tables, on grids and on file."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from scipy import integrate, stats

import diagnostics
import inference
import zoo
import zoo.stored
from inference.errors import BadCheckpoint, BadInput, ExactWarning, Incompatible, NoDensity
from inference.guide import Draws, Guide
from inference.seeds import seeded
from zoo.quadrature import LARGE_ERROR


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def from_pyro(program, x, **knobs):
    return zoo.from_pyro(program, x, **knobs)


# enumeration

W = (0.8, -1.1)


def binary(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)))
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
        s = pyro.sample("s", dist.Bernoulli(x.new_tensor([0.4, 0.7])).to_event(1))
        pyro.sample("x", dist.Normal(1.5 * a - 0.7 * b + s @ x.new_tensor(W), 0.6), obs=x)


def binary_table(x):
    """States (16, 4) and log p(x, z), (16, B), one by one."""
    states = np.array(list(itertools.product([0, 1], repeat=4)))
    rows = []
    for a, b, s, t in states:
        p = [0.3, 0.2 + 0.5 * a, 0.4, 0.7]
        prior = sum(stats.bernoulli(q).logpmf(v) for q, v in zip(p, (a, b, s, t), strict=True))
        rows.append(prior + stats.norm(1.5 * a - 0.7 * b + W[0] * s + W[1] * t, 0.6).logpdf(x))
    return states, np.array(rows)


@pytest.fixture(scope="module")
def table():
    x = f64(0.4, -1.3, 2.2)
    return zoo.Enumerated(from_pyro(binary, x)), x, *binary_table(x.numpy())


def test_enumerated_against_brute_force(table):
    guide, x, states, logits = table
    evidence = np.logaddexp.reduce(logits)
    np.testing.assert_allclose(guide.log_evidence(x), evidence, rtol=1e-12)
    z = {"a": states[:, 0], "b": states[:, 1], "s": states[:, 2:]}
    z = {n: torch.tensor(v).double()[:, None].expand(16, 3, *v.shape[1:]) for n, v in z.items()}
    posterior = guide.log_prob(z, x)
    np.testing.assert_allclose(posterior, logits - evidence, rtol=1e-10)
    torch.testing.assert_close(posterior.exp().sum(0), torch.ones(3).double())
    assert guide.error(x)["edge_mass"].tolist() == [0, 0, 0]


def test_enumerated_draws_have_the_frequencies_of_the_table(table):
    guide, x, states, logits = table
    found = guide.draw(x, draws=2000, chains=2, seed=1)
    z = found.values
    assert {n: v.shape for n, v in z.items()} == {
        "a": (2, 2000, 3),
        "b": (2, 2000, 3),
        "s": (2, 2000, 3, 2),
    }
    joined = torch.cat([z["a"][..., None], z["b"][..., None], z["s"]], -1).flatten(0, 1).numpy()
    p = np.exp(logits - np.logaddexp.reduce(logits))
    for b in range(3):
        counts = (joined[:, None, b] == states).all(-1).mean(0)
        within(counts, p[:, b], np.sqrt(p[:, b] * (1 - p[:, b]) / 4000) + 1 / 4000)
    torch.testing.assert_close(found.stats["log_q"], guide.log_prob(z, x))


def test_enumerated_draws_keep_the_dtype_of_the_model(table):
    guide, x = table[:2]
    assert {v.dtype for v in guide.draw(x, draws=2, chains=1, seed=0).values.values()} == {
        torch.float64
    }


def test_enumerated_in_trace_elbo(table):
    guide, x, _, logits = table
    with seeded(0):
        losses = [Trace_ELBO().loss(guide.model, guide, x) for _ in range(3)]
    evidence = np.logaddexp.reduce(logits).sum()
    np.testing.assert_allclose(losses, -evidence, rtol=1e-12)


MEANS, PRIOR = (-2.0, 0.5, 3.0), (0.5, 0.2, 0.3)


def indexed(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_tensor(PRIOR)))
        pyro.sample("x", dist.Normal(x.new_tensor(MEANS)[k], 0.8), obs=x)


def test_enumerated_categorical_that_indexes():
    """A Categorical draw is an index of integer dtype, and must stay one."""
    x = f64(-1.0, 1.7)
    guide = zoo.Enumerated(from_pyro(indexed, x))
    logits = np.log(PRIOR)[:, None] + stats.norm(np.array(MEANS)[:, None], 0.8).logpdf(x)
    np.testing.assert_allclose(guide.log_evidence(x), np.logaddexp.reduce(logits), rtol=1e-12)
    assert guide.draw(x, draws=3, chains=1, seed=0).values["k"].dtype == torch.int64


def interval(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Binomial(4, x.new_tensor(0.3)))
        c = pyro.sample("c", dist.Categorical(x.new_tensor(PRIOR)))
        pyro.sample("x", dist.Normal(k - 2.0 * c, 0.8), obs=x)


def test_enumerated_integer_intervals():
    x = f64(-1.0, 1.7)
    guide = zoo.Enumerated(from_pyro(interval, x))
    k, c = np.array(list(itertools.product(range(5), range(3)))).T[:, :, None]
    prior = stats.binom(4, 0.3).logpmf(k) + np.log(PRIOR)[c]
    logits = prior + stats.norm(k - 2.0 * c, 0.8).logpdf(x)
    np.testing.assert_allclose(guide.log_evidence(x), np.logaddexp.reduce(logits), rtol=1e-12)
    assert guide.error(x)["edge_mass"].max() == 0  # nothing was cut


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Poisson(x.new_tensor(3.0)))
        pyro.sample("x", dist.Normal(z, 1.5), obs=x)


@pytest.mark.parametrize("bound", [4, 40])
def test_enumerated_counts_and_the_mass_at_their_bound(bound):
    x = f64(1.0, 5.5)
    guide = zoo.Enumerated(from_pyro(counts, x), bound=bound)
    z = np.arange(bound + 1)[:, None]
    logits = stats.poisson(3).logpmf(z) + stats.norm(z, 1.5).logpdf(x)
    evidence = np.logaddexp.reduce(logits)
    np.testing.assert_allclose(guide.log_evidence(x), evidence, rtol=1e-10)
    edge = guide.error(x)["edge_mass"].numpy()
    np.testing.assert_allclose(edge, np.exp(logits[-1] - evidence), rtol=1e-8, atol=1e-30)
    assert (edge < 1e-6).all() == (bound == 40)


def coin(x):
    heads = pyro.sample("heads", dist.Bernoulli(x.new_tensor(0.3)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(heads, 1.0), obs=x)


def test_enumerated_one_problem():
    x = f64(0.4, 1.2, -0.3, 0.9)
    guide = zoo.Enumerated(from_pyro(coin, x))
    logits = np.log([0.7, 0.3]) + stats.norm([[0.0], [1.0]], 1).logpdf(x).sum(1)
    evidence = np.logaddexp.reduce(logits)
    np.testing.assert_allclose(guide.log_evidence(x), [evidence], rtol=1e-12)
    draws = guide.draw(x, draws=1000, chains=2, seed=0).values["heads"]
    assert draws.shape == (2, 1000, 1)
    p = math.exp(logits[1] - evidence)
    within(draws.double().mean(), p, math.sqrt(p * (1 - p) / 2000))
    with seeded(0):
        loss = Trace_ELBO().loss(guide.model, guide, x)
    assert abs(loss + evidence) < 1e-10


def both(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Bernoulli(x.new_tensor(0.3)))
        z = pyro.sample("z", dist.Normal(s, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("exact", [zoo.Enumerated, zoo.Quadrature])
def test_latents_of_both_kinds_are_sent_where_something_works(exact):
    with pytest.raises(
        Incompatible, match=r"discrete \['s'\] and continuous \['z'\]\. Sum \['s'\]"
    ):
        exact(from_pyro(both, f64(1.0, 0.3)))

    def summed(x):
        with pyro.plate("data", len(x)):
            mix = dist.Categorical(x.new_tensor([0.7, 0.3]))
            parts = dist.Normal(x.new_tensor([0.0, 1.0]), 1.0)
            z = pyro.sample("z", dist.MixtureSameFamily(mix, parts))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = f64(1.0, 0.3)
    found = zoo.Quadrature(from_pyro(summed, x)).log_evidence(x)
    want = [
        0.7 * stats.norm(0, 1.25**0.5).pdf(v) + 0.3 * stats.norm(1, 1.25**0.5).pdf(v) for v in x
    ]
    np.testing.assert_allclose(found, np.log(want), rtol=1e-6)


def many(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Bernoulli(x.new_full((21,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(s.sum(-1), 1.0), obs=x)


def test_enumerated_refuses():
    with pytest.raises(Incompatible, match=r"'z'.*use Quadrature"):
        zoo.Enumerated(zoo.FactorAnalysis(4, 2))
    with pytest.raises(Incompatible, match="bound=20"):
        zoo.Enumerated(from_pyro(counts, f64(1.0)))
    with pytest.raises(Incompatible, match="2,097,152"):
        zoo.Enumerated(from_pyro(many, f64(1.0)))


# quadrature

OUTSIDE = 1e-8  # the search leaves out cells 20 nats below the peak, which weigh about e^-20


def rates(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(x.new_tensor(2.5), 0.8))
        pyro.sample("x", dist.Poisson(z[:, None].expand(-1, 3)).to_event(1), obs=x)


def test_quadrature_gamma_poisson():
    x = torch.tensor([[0, 0, 0], [3, 1, 5], [40, 38, 51]], dtype=torch.float64)
    guide, n = zoo.Quadrature(from_pyro(rates, x)), 4000
    a, b, k = 2.5, 0.8, x.sum(1).numpy()
    evidence = stats.nbinom(a, b / (b + 3)).logpmf(k) + stats.multinomial.logpmf(
        x.numpy(), k, [1 / 3] * 3
    )
    error = guide.error(x)
    gap = np.abs(guide.log_evidence(x).numpy() - evidence)
    assert (gap <= error["log_evidence"].numpy() + OUTSIDE).all()
    assert error["log_evidence"].max() < 1e-6
    assert error["edge_mass"].max() < 1e-6
    z = guide.draw(x, draws=n // 2, chains=2, seed=0).values["z"].reshape(n, 3).numpy()
    posterior = stats.gamma(a + k, scale=1 / (b + 3))
    within(z.mean(0), posterior.mean(), posterior.std() / math.sqrt(n))
    excess = 6 / (a + k)
    within(z.var(0), posterior.var(), posterior.var() * np.sqrt((2 + excess) / n))
    density = guide.log_prob({"z": torch.as_tensor(posterior.median())[None]}, x)[0]
    np.testing.assert_allclose(density, posterior.logpdf(posterior.median()), atol=1e-6)


def grid_moments(guide, x):
    """Posterior mean (B, D) and second moments about it (B, D, D) of the gridded density."""
    grid = guide.distribution(x)
    weight = grid.log_density.softmax(0)
    mean = torch.einsum("gb,gbd->bd", weight, grid.nodes)
    rest = grid.nodes - mean
    return mean, torch.einsum("gb,gbd,gbe->bde", weight, rest, rest)


@pytest.mark.parametrize("latents", [1, 2, 3])
def test_quadrature_against_a_correlated_gaussian(latents):
    model = zoo.FactorAnalysis(5, latents, seed=3).double()
    x = model.observations()[:2]
    guide, exact = zoo.Quadrature(model), model.exact()
    with torch.no_grad():
        q, evidence = exact.distribution(x), exact.log_evidence(x)
        error = guide.error(x)
        gap = (guide.log_evidence(x) - evidence).abs()
        assert (gap <= error["log_evidence"] + OUTSIDE).all()
        assert error["log_evidence"].max() < 1e-3
        mean, cov = grid_moments(guide, x)
        sd = q.variance.sqrt()
        gap = (mean - q.mean).abs() / sd
        assert (gap <= error["mean"][:, None] + OUTSIDE).all()
        ratio = cov.diagonal(dim1=-2, dim2=-1).sqrt() / sd
        assert ((ratio - 1).abs() <= error["sd"][:, None] + 40 * OUTSIDE).all()  # lost at 6 sd
        torch.testing.assert_close(cov, q.covariance_matrix, rtol=1e-4, atol=1e-4)


def test_quadrature_draws_have_the_moments_of_the_posterior():
    """The four Metropolis steps: interpolation on 25 points alone would widen the draws."""
    model, n = zoo.FactorAnalysis(5, 2, seed=3).double(), 4000
    x = model.observations()[:2]
    q = model.exact().distribution(x)
    found = zoo.Quadrature(model, points=25).draw(x, draws=n // 2, chains=2, seed=0)
    z = found.values["z"].reshape(n, 2, 2).numpy()
    mean, cov = q.mean.detach().numpy(), q.covariance_matrix.detach().numpy()
    for b in range(2):
        var = np.diag(cov[b])
        within(z[:, b].mean(0), mean[b], np.sqrt(var / n))
        within(np.cov(z[:, b].T), cov[b], np.sqrt((np.outer(var, var) + cov[b] ** 2) / n))


@pytest.mark.parametrize(("latents", "points"), [(1, 11), (2, 9), (3, 9)])
def test_halving_the_step_moves_moments_by_less_than_the_error(latents, points):
    model = zoo.FactorAnalysis(5, latents, seed=3).double()
    x = model.observations()[:2]
    with torch.no_grad():
        coarse = zoo.Quadrature(model, points=points)
        fine = zoo.Quadrature(model, points=2 * points - 1)
        error = coarse.error(x)
        (m_1, c_1), (m_2, c_2) = grid_moments(coarse, x), grid_moments(fine, x)
        s_1, s_2 = (c.diagonal(dim1=-2, dim2=-1).sqrt() for c in (c_1, c_2))
        assert (((m_1 - m_2).abs() / s_2).amax(1) <= error["mean"]).all()
        assert ((s_1 / s_2 - 1).abs().amax(1) <= error["sd"]).all()
        moved = (coarse.log_evidence(x) - fine.log_evidence(x)).abs()
        assert (moved <= error["log_evidence"]).all()
        assert (error["log_evidence"] > 1e-6).all()  # so coarse that there is an error to state
        assert (fine.error(x)["log_evidence"] < error["log_evidence"]).all()


def squared(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.3), 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.4), obs=x)


def test_quadrature_two_modes():
    x, n = f64(4.0, 9.0), 4000
    guide = zoo.Quadrature(from_pyro(squared, x))
    z = guide.draw(x, draws=n, chains=1, seed=2).values["z"][0].numpy()
    for b, value in enumerate(x.tolist()):
        density = lambda u, v=value: stats.norm.pdf(u, 0.3) * stats.norm.pdf(v, u * u, 0.4)  # noqa: E731
        left, right = (integrate.quad(density, *sorted((0, s)), limit=200)[0] for s in (-6, 6))
        np.testing.assert_allclose(guide.log_evidence(x)[b], math.log(left + right), rtol=1e-7)
        p = right / (left + right)
        assert 0.7 < p < 0.9  # asymmetric
        within((z[:, b] > 0).mean(), p, math.sqrt(p * (1 - p) / n))


def ring(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.norm(dim=-1), 0.1), obs=x)


def test_quadrature_ring():
    x, n = f64(1.7), 4000
    guide = zoo.Quadrature(from_pyro(ring, x))
    density = lambda r: r * math.exp(-r * r / 2) * stats.norm.pdf(1.7, r, 0.1)  # noqa: E731
    mass, first, second = (
        integrate.quad(lambda r, k=k: r**k * density(r), 0.5, 3)[0] for k in range(3)
    )
    np.testing.assert_allclose(guide.log_evidence(x), [math.log(mass)], rtol=1e-6)
    z = guide.draw(x, draws=n, chains=1, seed=0).values["z"][0, :, 0].numpy()
    sd = math.sqrt(second / mass - (first / mass) ** 2)
    within(np.hypot(*z.T).mean(), first / mass, sd / math.sqrt(n))
    quadrant = np.bincount((z[:, 0] > 0) * 2 + (z[:, 1] > 0), minlength=4) / n
    within(quadrant, 0.25, math.sqrt(0.1875 / n))


def box(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(x.new_tensor(-2.0), 5.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("value", [0.5, 4.9, 10.0])
def test_quadrature_uniform_prior(value):
    """The posterior is a truncated Normal, at 10 a sliver at the upper bound."""
    x, n = f64(value), 4000
    guide = zoo.Quadrature(from_pyro(box, x))
    cut = stats.truncnorm((-2 - value) / 0.5, (5 - value) / 0.5, value, 0.5)
    low, high = stats.norm(value, 0.5).logcdf([-2, 5])
    evidence = high + math.log1p(-math.exp(low - high)) - math.log(7)
    np.testing.assert_allclose(guide.log_evidence(x), [evidence], atol=1e-6)
    z = guide.draw(x, draws=n, chains=1, seed=0).values["z"][0, :, 0].numpy()
    assert (z > -2).all()
    assert (z < 5).all()
    within(z.mean(), cut.mean(), cut.std() / math.sqrt(n))


def mixed(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), 3.0))
        s = pyro.sample("s", dist.HalfNormal(x.new_tensor(1.0)))
        pyro.sample("x", dist.Normal(p, 0.1 + s), obs=x)


def test_quadrature_two_bounded_sites():
    x = f64(0.8, 2.5)
    guide = zoo.Quadrature(from_pyro(mixed, x))
    for b, value in enumerate(x.tolist()):
        joint = lambda s, p, v=value: (  # noqa: E731
            stats.beta.pdf(p, 2, 3) * stats.halfnorm.pdf(s) * stats.norm.pdf(v, p, 0.1 + s)
        )
        mass = integrate.dblquad(joint, 0, 1, 0, 8, epsabs=1e-8)[0]
        np.testing.assert_allclose(guide.log_evidence(x)[b], math.log(mass), atol=1e-5)
    assert guide.error(x)["edge_mass"].max() < 1e-6


def scaled(sd):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    return program


@pytest.mark.parametrize("sd", [0.5, 1e-2, 1e-4])
def test_quadrature_extreme_observations_and_tiny_noise(sd):
    spread = math.hypot(2.0, sd)
    x = f64(1.3, 1 + 10 * spread, 1 - 10 * spread)
    guide = zoo.Quadrature(from_pyro(scaled(sd), x))
    np.testing.assert_allclose(
        guide.log_evidence(x), stats.norm(1, spread).logpdf(x.numpy()), atol=1e-5
    )
    variance = 1 / (1 / 4 + sd**-2)
    mean = variance * (1 / 4 + x.numpy() / sd**2)
    grid = guide.distribution(x)
    found, sd_found = (t[:, 0].numpy() for t in grid.moments(grid.log_density, grid.nodes))
    np.testing.assert_allclose((found - mean) / variance**0.5, 0, atol=1e-5)
    np.testing.assert_allclose(sd_found / variance**0.5, 1, atol=1e-5)


@pytest.mark.parametrize("latents", [2, 3])
def test_quadrature_tiny_noise_in_more_dimensions(latents):
    model = zoo.FactorAnalysis(5, latents, noise_floor=1e-3, seed=3)
    model.noise = torch.full((5,), 2e-3)
    model = model.double()
    x = model.observations()[:2]
    with torch.no_grad():
        found, evidence = zoo.Quadrature(model).log_evidence(x), model.exact().log_evidence(x)
    np.testing.assert_allclose(found, evidence, atol=0.01)


def roots(sd):
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.3), 1.0))
            pyro.sample("x", dist.Normal(z**2, sd), obs=x)

    return program


@pytest.mark.parametrize(("sd", "points"), [(1e-2, None), (1e-3, 16385)])
def test_quadrature_two_modes_of_tiny_width(sd, points):
    x, n = f64(4.0), 2000
    guide = zoo.Quadrature(from_pyro(roots(sd), x), points=points)
    weights = stats.norm.pdf([-2.0, 2.0], 0.3) / 4  # p(z) / |dx/dz| at either root, for small sd
    np.testing.assert_allclose(guide.log_evidence(x), [math.log(weights.sum())], atol=1e-3)
    p = weights[1] / weights.sum()
    drawn = []
    said = told(lambda: drawn.append(guide.draw(x, draws=n, chains=1, seed=0)))
    assert len(said) == (points is None)  # the weights of modes 400 sds apart are rough
    z = drawn[0].values["z"].numpy()
    within((z > 0).mean(), p, math.sqrt(p * (1 - p) / n))


def test_quadrature_too_coarse_says_so():
    """Two modes 16 000 sds apart cannot be seen on 1025 points."""
    x = f64(4.0)
    guide = zoo.Quadrature(from_pyro(roots(1e-3), x))
    truth = math.log(stats.norm.pdf([-2.0, 2.0], 0.3).sum() / 4)
    assert abs(float(guide.log_evidence(x)) - truth) > 0.1
    assert guide.error(x)["log_evidence"] > 0.1


def change(x):
    """The rate of spikes steps up at an unknown time, between two of twelve bins."""
    time = torch.arange(1, 13) / 12
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(x.new_tensor(0.0), 1.0))
        rate = torch.where(time < z[:, None], 1.0, 4.0).to(x)
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def at(time):
    """Spikes of a rate that steps up at some bins, (B, 12)."""
    bins = torch.arange(12)
    return torch.where(bins < torch.as_tensor(time)[:, None], 1.0, 4.0).double()


def told(use):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        use()
    assert all(w.category is ExactWarning for w in found)
    return [str(w.message) for w in found]


def test_quadrature_of_a_step_says_once_that_it_is_wrong():
    """On 65 points; on 2049 of them the same is right, and silent."""
    x = at([3, 7, 8])
    model = from_pyro(change, x)
    rough, sizes = zoo.Quadrature(model, points=65), {"draws": 50, "seed": 0, "progress": False}
    first, *more = told(lambda: diagnostics.draw(model, rough, x, **sizes))
    worst = max(float(rough.error(x)[name].max()) for name in ("mean", "sd"))
    assert worst > LARGE_ERROR
    assert f"up to {worst:.2g} posterior sds" in first
    assert first.startswith("change: ")
    assert "kink or a step" in first
    assert "points=129" in first
    assert not more
    assert not told(lambda: diagnostics.draw(model, rough, x, **sizes))
    assert not told(lambda: diagnostics.draw(model, zoo.Quadrature(model, points=2049), x, **sizes))


def test_quadrature_of_a_step_warns_as_guide_and_as_reference():
    x = at([3, 7, 8])
    model = from_pyro(change, x)

    def rough():
        return zoo.Quadrature(model, points=65)

    sizes = {"draws": 50, "seed": 0, "progress": False}
    fine = zoo.Quadrature(model, points=2049)
    for reference, guide in ((rough(), fine), (fine, rough())):
        use = {"reference": reference, "metrics": ["mean_error"], **sizes}
        assert len(told(lambda: diagnostics.compare(model, {"copy": guide}, x, **use))) == 1  # noqa: B023
    few = {"problems": 20, "draws": 9, "seed": 0, "progress": False}
    assert len(told(lambda: diagnostics.sbc(model, rough(), **few))) == 1
    assert not told(lambda: diagnostics.sbc(model, fine, **few))


@pytest.mark.parametrize("name", ["recurrent_generator", "logistic_regression"])
def test_quadrature_is_silent_on_the_models_of_the_zoo(name):
    """The greatest error of any at its own observations is 0.007 posterior sds."""
    model = zoo.MODELS[name]()
    exact = model.exact()
    assert isinstance(exact, zoo.Quadrature)
    x = model.observations()[:5]
    assert not told(lambda: exact.draw(x, draws=1, chains=1, seed=0))


def test_quadrature_with_fixed_bounds():
    x = f64(0.4, 2.0)
    guide = zoo.Quadrature(from_pyro(scaled(0.5), x), points=1001, bounds=[(0.0, 1.5)])
    v = 1 / (1 / 4 + 4)
    posterior = stats.norm(v * (1 / 4 + 4 * x.numpy()), math.sqrt(v))
    inside = posterior.cdf(1.5) - posterior.cdf(0.0)
    want = stats.norm(1, math.sqrt(4.25)).logpdf(x.numpy()) + np.log(inside)
    # the rectangle rule counts the half-cells beyond the box: h/2 of density at either end
    half = 1.5 / 1000 / 2 * (posterior.pdf(0.0) + posterior.pdf(1.5)) / inside
    np.testing.assert_allclose(guide.log_evidence(x), want + half, atol=1e-5)
    assert (guide.error(x)["edge_mass"] > 1e-4).all()
    z = guide.draw(x, draws=200, chains=1, seed=0).values["z"]
    assert ((z >= 0) & (z <= 1.5)).all()


def test_quadrature_one_problem():
    def program(x):
        z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = f64(0.3, 1.8, 0.9)
    guide = zoo.Quadrature(from_pyro(program, x), points=257)
    want = stats.multivariate_normal(np.ones(3), 4 + 0.25 * np.eye(3)).logpdf(x.numpy())
    np.testing.assert_allclose(guide.log_evidence(x), [want], rtol=1e-9)
    assert guide.draw(x, draws=3, chains=2, seed=0).values["z"].shape == (2, 3, 1)


def test_quadrature_in_trace_elbo():
    x = f64(0.4, 2.0)
    guide = zoo.Quadrature(from_pyro(scaled(0.5), x))
    with seeded(0):
        loss = Trace_ELBO().loss(guide.model, guide, x)
    assert abs(loss + stats.norm(1, math.sqrt(4.25)).logpdf(x.numpy()).sum()) < 1e-6


def test_quadrature_refuses():
    with pytest.raises(Incompatible, match="one to three packed latents; got 4"):
        zoo.Quadrature(zoo.FactorAnalysis(5, 4))
    with pytest.raises(Incompatible, match="discrete site 'z'"):
        zoo.Quadrature(from_pyro(counts, f64(1.0)))
    model = from_pyro(scaled(0.5), f64(1.0))
    for points in (128, 3):
        with pytest.raises(BadInput, match="odd, at least 5"):
            zoo.Quadrature(model, points=points)
    with pytest.raises(BadInput, match=r"1 pairs \(low, high\); got 2"):
        zoo.Quadrature(model, bounds=[(0, 1), (0, 1)])


# stored draws


@pytest.fixture
def stored(model, tmp_path):
    """An exact posterior's draws on file: (path, guide, x, StoredDraws)."""
    path, x = tmp_path / "fa.nc", model.observations()[:3]
    guide = model.exact()
    zoo.StoredDraws.write(path, guide, x, draws=1000, chains=2, seed=4, command="make fa.nc")
    return path, guide, x, zoo.StoredDraws(model, path)


def test_stored_provenance(stored):
    path, guide, x, reader = stored
    attrs = reader.attrs
    assert attrs["method"] == "LinearGaussianPosterior"
    assert (attrs["command"], attrs["seed"]) == ("make fa.nc", 4)
    assert attrs["source_hash"] == zoo.stored.source_hash(guide.model)
    assert attrs["version_torch"].startswith(torch.__version__.split("+")[0])
    assert 0.99 < attrs["rhat_max"] < 1.01
    assert 1000 < attrs["ess_min"] < 4000
    np.testing.assert_allclose(reader.error(x)["mean"], attrs["ess_min"] ** -0.5)
    assert [p.name for p in path.parent.iterdir()] == ["fa.nc"]  # nothing half-written


def test_stored_draws_are_those_written_none_twice(stored):
    _, guide, x, reader = stored
    want = guide.draw(x, draws=1000, chains=2, seed=4).values["z"].flatten(0, 1)
    found = reader.draw(x, draws=1000, chains=2, seed=0).values["z"]
    assert found.shape == (2, 1000, 3, 3)
    found = found.flatten(0, 1)
    step = float(want.abs().max()) / 32767  # kept in 16 bits
    assert step < float(want.std(0).min()) / 500
    assert not torch.allclose(found, want, rtol=0, atol=step)  # shuffled
    codes = [(t / step).round().long() for t in (found, want)]
    for b in range(3):
        assert torch.equal(*[c[np.lexsort(c[:, b].T.numpy()), b] for c in codes])


def test_stored_draws_by_problem(stored):
    _, _, x, reader = stored
    both = reader.draw(x[[2, 0]], draws=50, chains=2, seed=1).values["z"]
    whole = reader.draw(x, draws=50, chains=2, seed=1).values["z"]
    assert torch.equal(both, whole[:, :, [2, 0]])
    assert not torch.equal(reader.draw(x, draws=50, chains=2, seed=2).values["z"], whole)


def test_stored_draws_refuse(stored):
    _, _, x, reader = stored
    with pytest.raises(BadInput, match="at most 2000 in all"):
        reader.draw(x, draws=1001, chains=2, seed=0)
    other = x.clone()
    other[1, 0] += 1e-4
    with pytest.raises(BadInput, match=r"some of the 3 observations.*problem 1"):
        reader.draw(other, draws=1, chains=1, seed=0)


def test_stored_draws_as_pyro_guide_have_no_density(stored):
    _, _, x, reader = stored
    with seeded(0):
        trace = poutine.trace(reader).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert ((reader.pool_z - z) == 0).all(-1).any(0).all()
    with pytest.raises(NoDensity, match="C2ST"):
        trace.compute_log_prob()


def test_stored_draws_of_nuts_agree_with_quadrature(tmp_path):
    x = f64(0.4, 2.0)
    model = from_pyro(scaled(0.5), x)
    path = tmp_path / "deep" / "nuts.nc"
    nuts = inference.NUTS(model, warmup=100)
    zoo.StoredDraws.write(path, nuts, x, draws=300, chains=2, seed=1, command="-")
    reader = zoo.StoredDraws(model, path)
    assert reader.attrs["method"] == "NUTS"
    z = reader.draw(x, draws=600, chains=1, seed=0).values["z"][0]
    assert z.dtype == torch.float64
    v = 1 / (1 / 4 + 4)
    se = math.sqrt(v / reader.attrs["ess_min"])
    within(z.mean(0), v * (1 / 4 + 4 * x), se)


MODEL_SOURCE = """
import zoo
class Mine(zoo.FactorAnalysis):
    shift = {shift}
"""


def test_stored_draws_of_another_source_are_refused(tmp_path):
    models = []
    for shift in (0, 1):
        source = tmp_path / f"mine_{shift}.py"
        source.write_text(MODEL_SOURCE.format(shift=shift))
        spec = importlib.util.spec_from_file_location(f"mine_{shift}", source)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(importlib.sys.modules, spec.name, module)
            spec.loader.exec_module(module)
            model = module.Mine(4, 2)
            if shift == 0:
                x, knobs = model.observations()[:2], {"draws": 500, "chains": 2, "seed": 0}
                zoo.StoredDraws.write(
                    tmp_path / "a.nc", model.exact(), x, **knobs, command="python make.py"
                )
                zoo.StoredDraws(model, tmp_path / "a.nc")
            else:
                with pytest.raises(BadCheckpoint, match=r"source hash.*again: python make\.py"):
                    zoo.StoredDraws(model, tmp_path / "a.nc")
        models.append(model)
    assert type(models[0]) is not type(models[1])


def test_stored_draws_of_another_users_program_are_refused(tmp_path):
    """The source that counts is the user's program, not the wrapper around it."""
    x = f64(0.4, 2.0)
    guide = zoo.Quadrature(from_pyro(scaled(0.5), x), points=65)
    path = tmp_path / "a.nc"
    zoo.StoredDraws.write(path, guide, x, draws=500, chains=2, seed=0, command="-")
    with pytest.raises(BadCheckpoint):
        zoo.StoredDraws(from_pyro(squared, x), path)


def test_stored_draws_missing_or_corrupt(model, stored, tmp_path):
    path = stored[0]
    whole = path.read_bytes()
    for name, content in {"text": b"no such thing", "half": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadCheckpoint, match="Check the path"):
            zoo.StoredDraws(model, tmp_path / name)
    with pytest.raises(BadCheckpoint, match=r"missing\.nc"):
        zoo.StoredDraws(model, tmp_path / "missing.nc")


class Stuck(Guide):
    """Chains that sit in different places."""

    independent = False

    def draw(self, x, *, draws, chains, seed, progress=False):
        with seeded(seed):
            noise = torch.randn(chains, draws, len(x), 3)
        return Draws({"z": noise + 3.0 * torch.arange(chains)[:, None, None, None]})


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.filterwarnings("ignore")  # ArviZ on one chain
def test_stored_draws_that_have_not_converged_are_not_written(model, stored, chains):
    path, _, x, _ = stored
    before = path.read_bytes()
    knobs = {"draws": 50, "chains": chains, "seed": 0, "command": "-"}
    with pytest.raises(BadInput, match=r"R-hat below 1\.01"):
        zoo.StoredDraws.write(path, Stuck(model), x, **knobs)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["fa.nc"]


# truncation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("loc", "scale", "low", "high"),
    [
        (0.3, 1.0, -1.0, 2.0),
        (-4.0, 0.2, -1.0, 1.0),
        (9.0, 0.1, -1.0, 1.0),
        (2.0, 3.0, 0.0, math.inf),
    ],
)
def test_truncated_normal_against_scipy(dtype, loc, scale, low, high):
    """In the middle, fifteen and eighty sds away, and with no upper end."""
    q = zoo.TruncatedNormal(torch.tensor([loc], dtype=dtype), torch.tensor(scale), low, high)
    with seeded(0):
        z = q.sample((4000,))
    assert z.dtype == dtype
    assert ((z > low) & (z < high)).all()
    exact = stats.truncnorm((low - loc) / scale, (high - loc) / scale, loc, scale)
    grid = torch.linspace(low + 1e-3, min(high, 9.0) - 1e-3, 50, dtype=torch.float64)
    wide = zoo.TruncatedNormal(f64(loc), f64(scale), low, high)
    np.testing.assert_allclose(wide.log_prob(grid), exact.logpdf(grid), rtol=1e-8)
    if dtype == torch.float64:
        assert stats.kstest(z[:, 0], exact.cdf).pvalue > 1e-3
    assert q.log_prob(torch.tensor([low - 1.0], dtype=dtype)).item() == -math.inf


def test_stored_counts_come_back_as_whole_numbers(tmp_path):
    """With 16 bits and a scale for each draw they did not, and the model refused them."""
    model = zoo.PoissonCoding(6, bound=12)  # Gibbs sampling
    x, path = model.observations()[:2], tmp_path / "counts.nc"
    fixed = inference.IterativePoisson(model, steps=50)
    zoo.StoredDraws.write(path, fixed, x, draws=400, chains=2, seed=0, command="-")
    z = zoo.StoredDraws(model, path).draw(x, draws=300, chains=2, seed=0).values
    assert z["z"].max() > 1
    assert torch.equal(z["z"], z["z"].round())
    assert torch.isfinite(inference.Latents(model).log_joint(z, x)).all()


class LinearPair(PyroModule):
    """One latent, two pixels; its evidence is Gaussian."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.7, 1.3]))
        self.offset = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, x=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            loc = z[:, None] * self.weights + self.offset
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def test_a_model_is_learned_with_a_gridded_posterior_by_maximum_likelihood():
    """The gradient of the ELBO is that of log p(x); with half of log q's gradient it was not."""
    with seeded(0):
        program, x = LinearPair(), torch.randn(30, 2) + 0.3
    model = zoo.from_pyro(program, x, exact=zoo.Quadrature)
    guide, objective = model.exact(), inference.ELBO(particles=100)
    found = []
    for k in range(20):
        with seeded(k):
            loss = objective(model, guide, x)["guide"]
        found.append(torch.autograd.grad(loss, program.weights)[0])
    w = program.weights
    marginal = dist.MultivariateNormal(
        program.offset.expand(2), torch.outer(w, w) + torch.eye(2) / 4
    )
    (truth,) = torch.autograd.grad(-marginal.log_prob(x).mean(), w)
    found = torch.stack(found)
    within(found.mean(0), truth, found.std(0) / 20**0.5)


def test_other_constructors_are_no_part_of_a_models_source():
    """Stored draws do not go stale when `for_data` changes."""
    source = zoo.SparseCoding().source()
    assert "def forward" in source
    assert "def for_data" not in source
