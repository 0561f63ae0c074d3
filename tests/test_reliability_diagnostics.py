"""Accounts of noisy circuits and their signatures against closed forms; about 10 s."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray
from conftest import within
from torch.distributions import Independent, Normal

import diagnostics
import inference
import zoo
from diagnostics import plot_reliability as plots
from diagnostics import reliability, variability_against_uncertainty
from diagnostics.reliability import accounted
from inference import BadInput, Entropic, Incompatible, PowerLaw, ReliabilityCost
from inference.costs import MECHANISMS
from inference.guides.reliability_circuit import RecurrentCircuit
from inference.noise import CorrelatedNoise, PrivateNoise

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = ("performance", "magnitude", "reliability")
SLOPES = {"entropic": 1.0} | dict(zip(MECHANISMS, (0.8, 0.75, 0.6, 0.5), strict=True))


class Planted(PrivateNoise):
    """The exact means, and noise that is `times` the best independent one."""

    objective = ReliabilityCost

    def __init__(self, model, times=1.0):
        super().__init__(model)
        self.times = times

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        precision = p.precision_matrix.diagonal(dim1=-2, dim2=-1)
        return Independent(Normal(p.mean, self.times * precision.rsqrt()), 1)


class Whole(CorrelatedNoise):
    """The exact posterior."""

    def distribution(self, x):
        return self.model.exact().distribution(x)


@pytest.fixture(scope="module")
def smooth():
    return zoo.FactorAnalysis(7, 3, seed=1).double().requires_grad_(False)


@pytest.fixture(scope="module")
def x(smooth):
    return smooth.observations()[:4]


# the account


@pytest.mark.parametrize("times", [1.0, 1.7])
def test_account_of_the_best_independent_noise_is_the_closed_form(smooth, x, times):
    cost = PowerLaw(4 / 3, scale=0.2)
    found = reliability(Planted(smooth, times), x, cost=cost, draws=4000, seed=0)
    p = smooth.exact().distribution(x)
    precision = p.precision_matrix.diagonal(dim1=-2, dim2=-1)
    s = times * precision.rsqrt()
    magnitude = 0.5 * (p.mean**2 + s**2 + math.log(2 * math.pi)).sum(-1)
    within(found.magnitude, magnitude, found.magnitude_se)
    np.testing.assert_allclose(found.noise, s)
    np.testing.assert_allclose(found.energy, (0.75 * (0.2 / s) ** (4 / 3)).sum(-1))
    np.testing.assert_allclose(found.reliability, cost(s.log()).sum(-1))
    # S8, and what correlations are worth
    ratio = times**2
    gap = 0.5 * (precision.log().sum(-1) - torch.logdet(p.precision_matrix))
    gap = gap + 0.5 * 3 * (ratio - 1 - math.log(ratio))
    within(found.gap, gap, found.gap_se)
    np.testing.assert_allclose(found.log_evidence, smooth.exact().log_evidence(x))
    within(found.elbo, smooth.exact().log_evidence(x) - gap, found.elbo_se)
    within(found.sd, s, s / math.sqrt(2 * 4000))
    exact = p.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    within(found.exact_sd, exact, exact / math.sqrt(2 * 4000))


def test_the_exact_posterior_has_no_gap(smooth, x):
    found = reliability(Whole(smooth), x, cost=Entropic(), seed=0)
    within(found.gap, 0.0, found.gap_se)
    np.testing.assert_allclose(found.slack, 0.0, atol=1e-12)
    wrong = reliability(Planted(smooth, 2.0), x, cost=Entropic(), seed=0)
    assert (wrong.gap > 5 * wrong.gap_se).all()  # the planted error: too much noise


@pytest.mark.parametrize("magnitude", ["expected", "mean"])
def test_slack_is_what_separates_the_total_from_the_elbo(smooth, x, magnitude):
    cost, guide = PowerLaw("trafficking", scale=0.1), Planted(smooth, 0.6)
    found = reliability(guide, x, cost=cost, magnitude=magnitude, seed=3)
    np.testing.assert_allclose(found.total, sum(found[t] for t in TERMS))
    assert (found.slack > 0).all()
    bound = found.slack - found.total
    free = reliability(guide, x, cost=Entropic(), seed=3)
    np.testing.assert_allclose(found.elbo, free.elbo)  # it is the guide's, whatever it pays
    if magnitude == "expected":
        np.testing.assert_allclose(bound, found.elbo)
    else:  # |m|^2 < E |z|^2: below minus the ELBO, by (1/2) sum s^2
        np.testing.assert_allclose(
            (bound - found.elbo).mean(), 0.5 * (found.noise**2).sum("unit").mean(), rtol=0.2
        )


def test_errors_are_the_spread_of_repeats(smooth):
    """Of 100 problems and 10 runs, so that variances are known to 5 %."""
    x, guide = smooth.observations(), Planted(smooth)
    runs = [accounted(guide, x, None, cost=Entropic(), draws=40, seed=k) for k in range(10)]
    found = xarray.concat(runs, "run")
    spread = found.total.var("run", ddof=1).mean()
    within((found.total_se**2).mean() / spread, 1.0, math.sqrt(2 / 900))
    assert "gap" not in found
    assert (found.reliability_se < 1e-12).all()


def test_account_of_a_data_set_that_is_one_problem():
    model = zoo.BayesianMLP(20, hidden=2)
    guide = inference.AutoNormal(model)
    guide.bind(model.observations())
    found = reliability(guide, model.observations(), cost=Entropic(), draws=20, seed=0)
    assert found.sizes == {"problem": 1, "unit": guide.latents.size}
    assert found.attrs["draws"] == 20
    assert "exact_sd" not in found


def test_accounts_refused(smooth, x):
    knobs = {"cost": Entropic(), "seed": 0}
    with pytest.raises(Incompatible, match="Gaussian noise"):
        reliability(inference.Flow(smooth), x, **knobs)
    with pytest.raises(BadInput, match="draws"):
        reliability(Planted(smooth), x, **knobs, draws=1)
    with pytest.raises(BadInput, match="magnitude"):
        reliability(Planted(smooth), x, **knobs, magnitude="expect")
    with pytest.raises(BadInput, match="x: expected"):
        reliability(Planted(smooth), x[:, :3], **knobs)


# variability against uncertainty


def trees(slope, *, spread=1.5, draws=1000, seed=0):
    """Draws whose variance is a power of that of others, over 12 problems of 5 latents."""
    g = np.random.default_rng(seed)
    exact = np.exp(g.normal(-2, spread, size=(12, 5)))
    own = 0.3 * exact**slope
    tree = tree_of(g.normal(size=(2, draws // 2, 12, 5)) * np.sqrt(own))
    return tree, tree_of(g.normal(size=(2, draws // 2, 12, 5)) * np.sqrt(exact)), exact


def tree_of(z):
    """As `diagnostics.draw` makes it, of latents (chain, draw, problem, latent)."""
    data = xarray.Dataset({"z": (("chain", "draw", "problem", "latent"), z)})
    return xarray.DataTree.from_dict({"posterior": data})


@pytest.mark.parametrize(("name", "slope"), SLOPES.items())
def test_variability_accepts_its_cost_and_rejects_others(name, slope):
    tree, reference, exact = trees(slope)
    for knobs in ({"reference": reference}, {"variance": exact}):
        found = variability_against_uncertainty(tree, **knobs, seed=0)
        assert found.mechanism.values.tolist() == list(SLOPES)
        np.testing.assert_allclose(found.predicted, list(SLOPES.values()))
        assert [m for m, yes in zip(SLOPES, found.accepted.values, strict=True) if yes] == [name]
        within(found.value, slope, found.se)
        assert 0 <= found.dilution < 0.01
        assert found.attrs["reason"] == ""


def test_intervals_of_variability_cover():
    """Of 95 % intervals, over 60 planted circuits."""
    accepted = []
    for k in range(60):
        tree, _, exact = trees(0.6, draws=100, seed=k)
        found = variability_against_uncertainty(tree, variance=exact, seed=k)
        accepted.append(bool(found.accepted.sel(mechanism="actin")))
    assert np.mean(accepted) > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 60)


def test_independent_noise_follows_the_conditional_variance():
    """Noise of variance 1 / Lambda_ii is Bayesian; against marginal variance it looks otherwise."""
    g = np.random.default_rng(0)
    problems, d, shape = 12, 4, (2, 1000, 12, 4)
    own = np.exp(g.normal(size=(problems, d)))
    shared = 2 * own  # the more a latent varies, the more of it is shared
    covariance = np.eye(d) * own[:, None] + shared[:, :, None] * shared[:, None]
    mix = np.linalg.cholesky(covariance)
    best = 1 / np.diagonal(np.linalg.inv(covariance), axis1=1, axis2=2)
    reference = tree_of(np.einsum("bij,csbj->csbi", mix, g.normal(size=shape)))
    tree = tree_of(g.normal(size=shape) * np.sqrt(best))
    conditional, marginal = (
        variability_against_uncertainty(tree, reference, kind=kind, seed=0)
        for kind in ("conditional", "marginal")
    )
    assert conditional.accepted.sel(mechanism="entropic")
    assert not marginal.accepted.sel(mechanism="entropic")
    error = best * np.sqrt(2 / (2000 - d))
    within(conditional.uncertainty, best, error)
    true = np.diagonal(covariance, axis1=1, axis2=2)
    within(marginal.uncertainty, true, true * np.sqrt(2 / 1999))


def test_nothing_is_told_where_all_is_equally_uncertain():
    tree, reference, _ = trees(0.5, spread=0.0)
    found = variability_against_uncertainty(tree, reference, seed=0)
    assert found.dilution > 0.5
    assert np.isnan(found.value)
    assert not found.accepted.any()
    assert "nearly as unsure" in found.attrs["reason"]
    plots.variability(found).canvas.draw()


def test_variability_refused():
    tree, reference, exact = trees(1.0, draws=100)
    short = reference.isel(draw=slice(15))
    cases = [
        ({}, "neither"),
        ({"reference": reference, "variance": exact}, "both"),
        ({"reference": reference, "kind": "marginals"}, "kind"),
        ({"variance": exact[:5]}, "12 problems of 5 latents; got 5 of 5"),
        ({"variance": -exact}, "numbers > 0"),
        ({"reference": short}, "at least 20; got 15"),
        ({"variance": exact, "mechanisms": {"none": 0.0}}, "rho"),
    ]
    for knobs, message in cases:
        with pytest.raises(BadInput, match=message):
            variability_against_uncertainty(tree, **knobs, seed=0)


def test_quenching_of_posterior_draws():
    """Variance that falls with contrast, of a guide without a circuit."""
    contrast = np.geomspace(0.5, 4, 8)
    g = np.random.default_rng(0)
    z = g.normal(size=(2, 500, 8, 3)) / np.sqrt(contrast)[:, None]
    found = diagnostics.variance_against_contrast(
        tree_of(z), contrast, group="posterior", quantity="z", seed=0
    )
    within(found.value, -1.0, found.se)
    assert found.high < 0


def test_quenching_of_a_circuit():
    """Untrained, its noise is the same at all contrasts; the exact posterior's is not."""
    model = zoo.ObservedContrast()
    x = model.observations()
    guides = {"circuit": RecurrentCircuit(model), "posterior": model.exact()}
    found = {}
    for group, guide in guides.items():
        tree = diagnostics.draw(model, guide, x, draws=250, chains=4, seed=0)
        quantity = {"circuit": "potentials", "posterior": "u"}[group]
        found[group] = diagnostics.variance_against_contrast(
            tree, x[0].numpy(), group=group, quantity=quantity, seed=0
        )
    within(found["circuit"].value, 0.0, found["circuit"].se)
    assert found["posterior"].high < -0.5
