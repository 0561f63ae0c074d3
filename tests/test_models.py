"""Factor analysis in detail, and models made by `from_pyro`."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from threadpoolctl import threadpool_limits
from torch.distributions import MultivariateNormal, kl_divergence

import inference
import zoo
from inference.errors import BadInput, Incompatible, NoExactPosterior
from inference.latents import Latents
from inference.seeds import seeded

NOISES = ("diagonal", "isotropic")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


# factor analysis


def by_numpy(model, x):
    """Posterior mean and covariance by conditioning the joint Gaussian, and log p(x)."""
    w, mu, sd, x = (
        t.detach().double().numpy() for t in (model.loadings, model.mean, model.noise, x)
    )
    cov = w @ w.T + np.diag(np.broadcast_to(sd**2, len(mu)))
    gain = np.linalg.solve(cov, w).T
    evidence = stats.multivariate_normal(mu, cov).logpdf(x)
    return (x - mu) @ gain.T, np.eye(w.shape[1]) - gain @ w, evidence


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("features", "latents"), [(7, 3), (4, 6)])
def test_posterior_against_numpy(noise, features, latents):
    model = zoo.FactorAnalysis(features, latents, noise=noise, seed=2).double()
    assert model.noise.shape == ((features,) if noise == "diagonal" else ())
    x = model.observations()[:5]
    q = model.exact().distribution(x)
    mean, cov, evidence = by_numpy(model, x)
    np.testing.assert_allclose(q.mean.detach(), mean, rtol=1e-9, atol=1e-9)
    found = q.covariance_matrix.detach()
    np.testing.assert_allclose(found, np.broadcast_to(cov, found.shape), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(model.exact().log_evidence(x).detach(), evidence, rtol=1e-9)


def test_exact_draws_have_the_moments_of_the_distribution(model):
    x, n = model.observations()[:3], 4000
    mean, cov, _ = by_numpy(model, x)
    found = model.exact().draw(x, draws=n // 2, chains=2, seed=0)
    z = found.values["z"].reshape(n, 3, 3).double().numpy()
    var = np.diag(cov)
    within(z.mean(0), mean, np.sqrt(var / n))
    for b in range(3):
        se = np.sqrt((np.outer(var, var) + cov**2) / n)  # of a Gaussian sample covariance
        within(np.cov(z[:, b].T), cov, se)


@pytest.mark.parametrize("noise", NOISES)
def test_mean_field_gap_is_the_smallest_kl(noise):
    model = zoo.FactorAnalysis(7, 3, noise=noise, seed=1).double()
    posterior = model.exact()
    with torch.no_grad():
        p = posterior.distribution(model.observations()[:1])
        sd = posterior.precision().diagonal().rsqrt()

        def gap(scale):
            return kl_divergence(MultivariateNormal(p.mean, scale_tril=torch.diag(scale)), p)[0]

        torch.testing.assert_close(posterior.mean_field_gap(), gap(sd), rtol=1e-10, atol=0)
        assert gap(sd) > 0.01
        for k in range(3):
            for factor in (0.95, 1.05):
                other = sd.clone()
                other[k] *= factor
                assert gap(other) > gap(sd)


def test_predict_is_the_mean_of_x(model):
    z = model.simulate(4000, seed=1)[0]["z"]
    with torch.no_grad(), seeded(2):
        x = Latents(model).replicate({"z": z}, model.observations()[:1].expand(4000, -1))
        rest = x - model.predict({"z": z})
        within(rest.mean(0), 0.0, model.noise / math.sqrt(4000))
        within(rest.std(0), model.noise, model.noise / math.sqrt(8000))


@pytest.mark.parametrize("noise", NOISES)
def test_for_data(noise):
    x = torch.linspace(-1.0, 3.0, 60).reshape(20, 3).sin()
    x[:, 1] = 0.5  # a pixel that never changes
    model = zoo.FactorAnalysis.for_data(x, latents=2, noise=noise)
    assert model.loadings.shape == (3, 2)
    torch.testing.assert_close(model.mean.detach(), x.mean(0))
    torch.testing.assert_close(model.observations(), x)
    assert (model.noise > zoo.factor_analysis.NOISE_FLOOR).all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.exact().log_evidence(x).isfinite().all()


def test_for_data_leaves_the_data_alone():
    x = torch.arange(12.0).reshape(4, 3)
    model = zoo.FactorAnalysis.for_data(x, latents=2)
    model.observations()[:] = 0
    assert torch.equal(x, torch.arange(12.0).reshape(4, 3))


def test_unknown_noise_is_refused():
    with pytest.raises(BadInput, match="diagonal or isotropic"):
        zoo.FactorAnalysis(noise="white")


def test_float32_agrees_with_float64():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = model.observations()[:5]
    single = model.exact().log_evidence(x)
    mean = model.exact().distribution(x).mean
    assert single.dtype == torch.float32
    assert model.exact().draw(x, draws=2, chains=1, seed=0).values["z"].dtype == torch.float32
    model = model.double()
    double = model.exact().log_evidence(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean.double(), model.exact().distribution(x.double()).mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sd", [None, 2e-4])
@pytest.mark.parametrize("latents", [3, 9])
def test_extreme_inputs_stay_finite(dtype, sd, latents):
    """x at ten prior-predictive sds; noise of a ten-thousandth of the signal."""
    model = zoo.FactorAnalysis(7, latents, noise_floor=1e-4, seed=1)
    if sd is not None:
        model.noise = torch.full((7,), sd)
    model = model.to(dtype)
    with torch.no_grad():
        w = model.loadings
        spread = (w.square().sum(1) + model.noise.square()).sqrt()
        x = torch.stack([model.mean + 10 * spread, model.mean - 10 * spread])
    exact = model.exact()
    z = exact.draw(x, draws=50, chains=1, seed=0).values
    assert z["z"].isfinite().all()
    for value in (exact.log_evidence(x), exact.log_prob(z, x), exact.latents.log_joint(z, x)):
        assert value.isfinite().all()
    if dtype == torch.float64:
        mean, _, evidence = by_numpy(model, x)
        np.testing.assert_allclose(exact.distribution(x).mean.detach(), mean, rtol=1e-5)
        np.testing.assert_allclose(exact.log_evidence(x).detach(), evidence, rtol=1e-5)


@pytest.mark.parametrize("noise", NOISES)
def test_learning_reaches_maximum_likelihood(noise):
    from sklearn.decomposition import PCA, FactorAnalysis

    x = zoo.FactorAnalysis(6, 2, noise=noise, seed=4).simulate(300, seed=0)[1]
    model = zoo.FactorAnalysis.for_data(x, latents=2, noise=noise)
    exact = model.exact()
    before = exact.log_evidence(x).sum().item()
    knobs = {"steps": 300, "lr": 0.08, "batch_size": 300, "seed": 0, "progress": False}
    inference.fit(model, exact, x, learn_model=True, **knobs)
    after = exact.log_evidence(x).double().sum().item()
    data = x.double().numpy()
    if noise == "diagonal":
        best = FactorAnalysis(2, tol=1e-10, max_iter=10_000).fit(data).score(data) * 300
    else:
        values = np.sort(np.linalg.eigvalsh(np.cov(data.T, bias=True)))[::-1]
        rest = values[2:].mean()  # Tipping & Bishop, equation 8
        logs = np.log(values[:2]).sum() + 4 * np.log(rest)
        best = -150 * (6 * np.log(2 * np.pi) + logs + 6)  # their equation 6 at the maximum
        assert abs(best - PCA(2).fit(data).score(data) * 300) < 0.1
    assert after > before + 10
    assert best - 0.5 < after < best + 0.01  # nats, of 300 rows together


def test_exact_posterior_follows_the_parameters():
    model = zoo.FactorAnalysis(5, 2)
    exact, x = model.exact(), model.observations()[:2]
    before = exact.log_evidence(x)
    with torch.no_grad():
        model.mean += 1.0
    assert not torch.allclose(exact.log_evidence(x), before)


# from_pyro


def normal(x):
    """z ~ N(1, 2); x ~ N(z, .5): the evidence is N(1, 4.25)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Regression(PyroModule):
    """One problem: weights shared by all rows of (inputs, targets)."""

    def __init__(self):
        super().__init__()
        self.sd = PyroParam(torch.tensor(0.3), dist.constraints.positive)

    def forward(self, inputs, targets):
        w = pyro.sample("w", dist.Normal(inputs.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(inputs)):
            pyro.sample("y", dist.Normal(inputs @ w, self.sd), obs=targets)


def test_from_pyro_function():
    x = torch.tensor([0.3, -1.2, 4.0])
    model = zoo.from_pyro(normal, x)
    assert (model.title, model.observations()) == ("normal", x)
    assert zoo.from_pyro(normal, x, title="mine").title == "mine"
    z, simulated = model.simulate(2000, seed=0)
    assert simulated.shape == z["z"].shape == (2000,)
    within(simulated.mean(), 1.0, math.sqrt(4.25 / 2000))
    within(simulated.var(), 4.25, 4.25 * math.sqrt(2 / 2000))
    within((simulated - z["z"]).std(), 0.5, 0.5 / math.sqrt(4000))


def test_from_pyro_with_exact_posterior():
    x = torch.tensor([0.3, -1.2, 40.0], dtype=torch.float64)
    model = zoo.from_pyro(normal, x, exact=zoo.Quadrature, dims={"z": ()})
    want = stats.norm(1, math.sqrt(4.25)).logpdf(x)
    np.testing.assert_allclose(model.exact().log_evidence(x), want, rtol=1e-8)


def test_from_pyro_without_exact_posterior_names_the_way_out():
    with pytest.raises(NoExactPosterior, match="NUTS"):
        zoo.from_pyro(normal, torch.zeros(2)).exact()


def test_from_pyro_module_with_tuple_observation():
    inputs = torch.linspace(-1, 2, 10).reshape(5, 2)
    x = (inputs, torch.tensor([0.1, 0.5, -0.3, 0.9, 2.0]))
    model = zoo.from_pyro(Regression(), x)
    assert [n for n, _ in model.named_parameters()] == ["program.sd_unconstrained"]
    assert all(map(torch.equal, model.observations(), x))
    lat = Latents(model)
    assert (lat.names, lat.observed, lat.slot, lat.plated) == (("w",), "y", 1, False)
    z, (same, y) = model.simulate(4, seed=0)
    assert (z["w"].shape, same.shape, y.shape) == ((4, 2), (4, 5, 2), (4, 5))
    assert torch.equal(same[3], inputs)


def test_from_pyro_module_is_learned_with_the_model():
    """y = 2 w + e with w known up to its prior: the noise sd is learned, and only locally."""
    inputs = torch.linspace(-1, 1, 40).reshape(20, 2)
    model = zoo.from_pyro(Regression(), (inputs, inputs @ torch.tensor([1.0, -0.5])))
    guide = inference.AutoNormal(model)
    x = model.observations()
    inference.fit(model, guide, x, steps=150, lr=0.05, learn_model=True, progress=False)
    assert model.program.sd < 0.15


def outside(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def with_param(x):
    sd = pyro.param("sd", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, sd), obs=x)


def no_latent(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def no_observed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def two_observed(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 1.0), obs=x)


def changing(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z[0] > 0:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (outside, "outside it"),
        (with_param, "pyro.param statement.*PyroParam"),
        (no_latent, "at least one latent site"),
        (no_observed, "exactly one observed site"),
        (two_observed, r"exactly one observed site.*'x', 'y'"),
        (changing, "the same latent sites"),
    ],
)
def test_from_pyro_refuses(program, words):
    with pytest.raises(Incompatible, match=words):
        zoo.from_pyro(program, torch.linspace(-1, 1, 4))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor([0.0, math.nan]), "NaN"),
        (np.zeros(3), "a tensor"),
        (torch.zeros(0), "at least one problem"),
        ((torch.zeros(2), torch.zeros(3)), "equal length"),
    ],
)
def test_from_pyro_refuses_observations(x, words):
    with pytest.raises(BadInput, match=words):
        zoo.from_pyro(normal, x)
