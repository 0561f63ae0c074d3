"""Trained noise against the laws of reliability; S and T are numbers of the identities."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_reliability_cost import RHOS

import zoo
from inference import (
    AutoMultivariateNormal,
    AutoNormal,
    MeanFieldEncoder,
    PowerLaw,
    ReliabilityCost,
    StochasticSynapses,
    fit,
)
from inference.seeds import seeded


@pytest.mark.parametrize("rho", RHOS)
def test_trained_noise_follows_the_posterior_by_the_law(rho):
    """T4-T7: synapses of a linear neuron, each on its own and with correlations. 3 s each."""
    model = zoo.BayesianRegression(problems=3, seed=1)
    x = model.observations()
    precision = model.linear_gaussian(x)[0].posterior_precision()
    h = precision.diagonal(dim1=-2, dim2=-1)
    cost = PowerLaw(rho, scale=0.1)
    settings = {"objective": ReliabilityCost(cost, particles=8), "steps": 1500, "lr": 0.02}
    guide = fit(model, AutoNormal(model), x, progress=False, seed=1, **settings).guide
    with torch.no_grad():
        q = guide.distribution(x)
    assert float((q.stddev.double().log() - cost.optimal_sd(h).log()).abs().max()) < 0.10
    slope = _slope(1 / h, q.variance.double())
    assert slope == pytest.approx(2 / (rho + 2), abs=0.02)
    exact = model.exact().distribution(x)
    assert float(((q.mean - exact.mean) / exact.stddev).abs().max()) < 0.5


def _slope(a, b):
    x, y = a.log().flatten(), b.log().flatten()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def test_correlated_noise_of_a_trained_guide():
    """T7: eigenvalues of the covariance against those of the precision, slope -2 / (rho + 2)."""
    model = zoo.BayesianRegression(problems=2, seed=1)
    x = model.observations()
    objective = ReliabilityCost(PowerLaw("actin", scale=0.1), particles=8)
    guide = AutoMultivariateNormal(model)
    fit(model, guide, x, objective=objective, steps=1500, lr=0.02, seed=1, progress=False)
    precision = torch.linalg.eigvalsh(model.linear_gaussian(x)[0].posterior_precision())
    with torch.no_grad():
        found = guide.noise(x).double().square().sort().values
    assert _slope(precision.flip(-1), found) == pytest.approx(-2 / (4 / 3 + 2), abs=0.03)


DRIVES = (0.0, 0.5, 1.0, 2.0, 4.0)
EXACT_SD = (0.345, 0.374, 0.438, 0.499, 0.500)


def test_noise_of_a_sparse_neuron_grows_with_its_drive():
    """T14: sds within 4 % of the exact, which are of quadrature; means within .02. 5 s."""
    model = zoo.SparseCoding(1, noise=0.5, rate=2.0)
    x = torch.tensor(DRIVES)[:, None] * model.features.detach().T
    exact = model.exact().draw(x, draws=1, chains=1, seed=0)  # builds its grid
    assert exact.values["z"].shape == (1, 1, 5, 1)
    objective, guide = ReliabilityCost(particles=128), AutoNormal(model)
    fit(model, guide, x, objective=objective, steps=1000, lr=0.03, seed=0, progress=False)
    with torch.no_grad():
        q = guide.distribution(x)
    sd = q.stddev[:, 0]
    assert float((sd / torch.tensor(EXACT_SD) - 1).abs().max()) < 0.04
    assert bool((sd.diff()[:3] > 0).all())
    means = torch.tensor((0.0, 0.252, 0.581, 1.501, 3.500))
    assert float((q.mean[:, 0] - means).abs().max()) < 0.02


@pytest.mark.parametrize("rho", [1 / 2, 2.0])
def test_contrast_quenches_noise(rho):
    """T15: more contrast, less noise; slope on the factorised posterior 2 / (rho + 2). 4 s."""
    model = zoo.ObservedContrast()
    x = model.observations()
    precision = model.linear_gaussian(x)[0].posterior_precision()
    h = precision.diagonal(dim1=-2, dim2=-1).expand(len(x[0]), -1)
    objective = ReliabilityCost(PowerLaw(rho, scale=0.2), particles=8)
    guide = AutoNormal(model)
    fit(model, guide, x, objective=objective, steps=1500, lr=0.02, seed=0, progress=False)
    with torch.no_grad():
        variance = guide.distribution(x).variance.double()
    assert _slope(1 / h, variance) == pytest.approx(2 / (rho + 2), abs=0.05)
    order = x[0].flatten().argsort()
    levels = variance[order].reshape(5, -1).mean(1)
    assert bool((levels.diff() < 0).all())


# ------------------------------------------------------------------------------------- a budget


@pytest.mark.parametrize("budget", [3.0, 30.0])
def test_a_budget_is_met_at_the_price_that_solves_for_it(budget):
    """S14: s_i as if energy cost `price` times as much, and the energy is the budget. 4 s."""
    model, law = zoo.FactorAnalysis(7, 3, seed=1), PowerLaw("actin", scale=0.3)
    objective, guide = ReliabilityCost(law, budget=budget, particles=4), MeanFieldEncoder(model)
    fit(model, guide, objective=objective, steps=1500, seed=0, progress=False)
    x = model.observations()
    with torch.no_grad(), seeded(0):
        h = model.linear_gaussian(x)[0].posterior_precision().diagonal(dim1=-2, dim2=-1)
        spent = objective.terms(guide, x)["energy"].mean().item()
    priced = PowerLaw(law.rho, coefficient=law.coefficient * objective.price)
    solved = law.energy(priced.optimal_sd(h).log()).sum().item()
    assert solved == pytest.approx(budget, rel=0.05)
    assert spent == pytest.approx(budget, rel=0.03)
    assert abs(math.log(objective.price)) > 0.5  # it was not met at the start


# ------------------------------------------------------------------------------------- synapses


def test_the_noise_of_a_silent_input_is_held_by_the_prior_alone():
    """T11: H = 0 leaves s = (s0^rho / alpha)^(1 / (rho + 2)); without a prior s has no bound."""
    model = zoo.BayesianRegression(problems=1, alpha=4.0, seed=1)
    inputs = model.observations()[0].clone()
    inputs[..., 1] = 0
    model.keep_draws((inputs, torch.zeros(inputs.shape[:2])), 1, seed=0)
    x, cost = model.observations(), PowerLaw("actin", scale=0.1)
    found = {}
    for magnitude in ("expected", "mean"):
        objective = ReliabilityCost(cost, magnitude=magnitude)
        guide = StochasticSynapses(model, scale=0.3)
        fit(model, guide, x, objective=objective, steps=1500, lr=0.02, seed=0, progress=False)
        with torch.no_grad():
            found[magnitude] = guide.noise(x)[0]
    held = cost.optimal_sd(torch.tensor(4.0))
    assert found["expected"][1].item() == pytest.approx(held.item(), rel=0.02)
    assert found["mean"][1].item() > 10 * held.item()
    seen = [0, 2, 3]
    h = inputs.square().sum(1)[0, seen]
    assert torch.allclose(found["mean"][seen], cost.optimal_sd(h), rtol=0.05)


def line(inputs, targets):
    """Weights of a linear neuron that sees all rows: one problem."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(inputs)):
        return pyro.sample("y", dist.Normal(inputs @ w, 0.5), obs=targets)


def data_of_a_line():
    g = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 3, generator=g) * torch.tensor([0.5, 1.0, 2.0])
    targets = inputs @ torch.tensor([0.7, -1.0, 0.2]) + 0.5 * torch.randn(400, generator=g)
    return inputs, targets


def test_rows_count_for_all_of_the_data_set():
    """With one draw of the weights, the mean over batches is what the whole data set has."""
    x = data_of_a_line()
    guide = StochasticSynapses(zoo.from_pyro(line, x), local=False)
    found = []
    for rows in (slice(0, 400), slice(0, 100), slice(100, 200), slice(200, 300), slice(300, 400)):
        batch = tuple(t[rows] for t in x)
        with torch.no_grad(), seeded(5):
            terms = guide.energies(batch, share=len(batch[0]) / 400)
        found.append(terms.performance.item())
    assert sum(found[1:]) / 4 == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("batch", [20, 40, 400])
def test_the_size_of_a_batch_does_not_move_the_optimum(batch):
    """T17: likelihoods of some rows count for all of them."""
    inputs, targets = data_of_a_line()
    model = zoo.from_pyro(line, (inputs, targets))
    cost = PowerLaw("trafficking", scale=0.1)
    guide, objective = StochasticSynapses(model, scale=0.05), ReliabilityCost(cost)
    settings = {"steps": 2000, "batch_size": batch, "lr": 0.02, "seed": 0, "progress": False}
    fit(model, guide, (inputs, targets), objective=objective, **settings)
    best = cost.optimal_sd(1 + inputs.square().sum(0) / 0.25)
    with torch.no_grad():
        found = guide.noise((inputs, targets))[0]
    assert torch.allclose(found, best, rtol=0.03)
    wrong = cost.optimal_sd(1 + inputs[:batch].square().sum(0) / 0.25)  # unless scaled
    assert batch == 400 or not torch.allclose(found, wrong, rtol=0.03)
