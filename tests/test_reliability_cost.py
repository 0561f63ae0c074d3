"""Costs of reliability and the objective made of them; T and S are numbers of the identities."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import hessian
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

import inference
import zoo
from inference import (
    ELBO,
    BadInput,
    Diverged,
    Entropic,
    FullCovarianceEncoder,
    Incompatible,
    MeanFieldEncoder,
    PowerLaw,
    ReliabilityCost,
    Sum,
    calibrated_scale,
    fit,
    mixture,
)
from inference.noise import CorrelatedNoise, PrivateNoise
from inference.seeds import seeded

RHOS = (1 / 2, 2 / 3, 4 / 3, 2.0)
COSTS = {
    "entropic": Entropic(),
    "calcium efflux": PowerLaw("calcium efflux", scale=0.3),
    "trafficking": PowerLaw(2.0, coefficient=0.02),
    "mixture": mixture({"actin": 1.0, "vesicle membrane": 3.0}, scale=0.4),
    "sum": Sum((PowerLaw(2.0, coefficient=0.1), PowerLaw(0.5, coefficient=0.3))),
}
LOG_SD = torch.linspace(-3.0, 2.0, 41, dtype=torch.float64)
GAUSSIAN = 0.5 * math.log(2 * math.pi * math.e)
# an asymmetric precision; its diagonal is not that of its inverse
PRECISION = torch.tensor([[5.0, 1.5, -0.4], [1.5, 2.0, 0.3], [-0.4, 0.3, 0.7]]).double()


class Diagonal(PrivateNoise):
    """Means and log sds that a test sets, the same for each problem."""

    def __init__(self, model, mean, log_sd):
        super().__init__(model)
        self.mean, self.log_sds = torch.nn.Parameter(mean), torch.nn.Parameter(log_sd)

    def distribution(self, x):
        b = self.latents.problems(x)
        q: Distribution = Normal(self.mean.expand(b, -1), self.log_sds.exp().expand(b, -1))
        return Independent(q, 1)


class Full(CorrelatedNoise):
    """The same with a Cholesky factor."""

    def __init__(self, model, mean, tril):
        super().__init__(model)
        self.mean, self.tril = torch.nn.Parameter(mean), torch.nn.Parameter(tril)

    def distribution(self, x):
        b = self.latents.problems(x)
        return MultivariateNormal(self.mean.expand(b, -1), scale_tril=self.tril.expand(b, -1, -1))


def quadratic(x=None):
    """z ~ Normal(mu, PRECISION^-1), and data that say nothing of it."""
    with pyro.plate("data", 1 if x is None else len(x)):
        mu = torch.tensor([0.5, -1.0, 2.0]).double()
        z = pyro.sample("z", dist.MultivariateNormal(mu, precision_matrix=PRECISION))
        flat = dist.Normal(torch.zeros_like(z[..., :2]), 1.0).to_event(1)
        return pyro.sample("x", flat, obs=x)


def plain():
    return zoo.from_pyro(quadratic, torch.zeros(1, 2).double())


def factors():
    model = zoo.FactorAnalysis(7, 3, seed=1).double()
    return model, model.observations()[:5]


# ------------------------------------------------------------------------------------- the costs


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_bounds_minus_the_entropy_and_touches_it_at_its_scale(name):
    """T2: R(s) >= -log s - (1/2) log(2 pi e), with equality at s0 alone."""
    cost = COSTS[name]
    slack = cost.slack(LOG_SD)
    assert torch.allclose(slack, cost(LOG_SD) + LOG_SD + GAUSSIAN, atol=1e-12)
    assert bool((slack > -1e-12).all())
    at = torch.tensor(math.log(cost.scale)).double()
    assert abs(float(cost.slack(at))) < 1e-6
    if name != "entropic":
        assert float(cost.slack(at + 0.3)) > 1e-3
        assert float(cost.slack(at - 0.3)) > 1e-3


@pytest.mark.parametrize("name", COSTS)
def test_the_marginal_is_minus_the_slope_of_the_energy(name):
    v = LOG_SD.clone().requires_grad_()
    (slope,) = torch.autograd.grad(COSTS[name].energy(v).sum(), v)
    assert torch.allclose(COSTS[name].marginal(LOG_SD), -slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rho", RHOS)
def test_the_slack_of_a_power_law(rho):
    """T2: sum (a - 1 - log a) / rho, a = (s0 / s)^rho."""
    a = (0.3 / LOG_SD.exp()) ** rho
    assert torch.allclose(PowerLaw(rho, scale=0.3).slack(LOG_SD), (a - 1 - a.log()) / rho)


def test_a_small_exponent_is_entropic():
    """T3: for |log(s0 / s)| < 3 the difference is about rho / 2 log^2, 4.5e-4."""
    v = math.log(0.3) + torch.linspace(-3, 3, 61).double()
    difference = (PowerLaw(1e-4, scale=0.3)(v) - Entropic()(v)).abs().max()
    assert 4e-4 < float(difference) < 1e-3


def test_scale_and_coefficient_say_the_same():
    assert PowerLaw("actin", scale=0.2).rho == pytest.approx(4 / 3)
    assert PowerLaw(4 / 3, coefficient=PowerLaw("actin", scale=0.2).coefficient).scale == (
        pytest.approx(0.2)
    )
    assert mixture({"actin": 2.0, 0.5: 1.0}, scale=0.2).scale == pytest.approx(0.2)
    weighted = mixture({"actin": 2.0, 0.5: 1.0}, scale=0.2)(LOG_SD)
    both = [PowerLaw(rho, scale=0.2)(LOG_SD) for rho in ("actin", 0.5)]
    assert torch.allclose(weighted, (2 * both[0] + both[1]) / 3)  # S15


@pytest.mark.parametrize("name", COSTS)
def test_the_best_sd_is_where_gains_and_cost_balance(name):
    """S5: H s^2 = marginal, and H s^2 / 2 + R(s) is least there."""
    h = torch.tensor([0.02, 1.0, 37.0]).double()
    best = COSTS[name].optimal_sd(h).log()

    def loss(v):
        return 0.5 * h * (2 * v).exp() + COSTS[name](v)

    for step in (-1e-3, 1e-3):
        assert bool((loss(best + step) > loss(best)).all())
    assert bool(COSTS["entropic"].optimal_sd(torch.zeros(1)).isinf())


@pytest.mark.parametrize("rho", RHOS)
def test_noise_is_between_the_posterior_and_the_scale(rho):
    """S6 and S7: log s = (2 log s_VI + rho log s0) / (rho + 2), slope 2 / (rho + 2)."""
    h = torch.logspace(-2, 3, 9).double()
    log_s = PowerLaw(rho, scale=0.3).optimal_sd(h).log()
    assert torch.allclose(log_s, (-h.log() + rho * math.log(0.3)) / (rho + 2))
    slope = (log_s[-1] - log_s[0]) * 2 / (h[0].log() - h[-1].log())
    assert float(slope) == pytest.approx(2 / (rho + 2))


@pytest.mark.parametrize("rho", RHOS)
def test_the_calibrated_scale_leaves_the_least_gap(rho):
    """S8 and S9."""
    s_vi = torch.tensor([0.03, 0.2, 0.25, 1.4]).double()

    def gap(scale):
        r = PowerLaw(rho, scale=scale).optimal_sd(s_vi**-2).square() / s_vi.square()
        return float(0.5 * (r - 1 - r.log()).sum())

    best = calibrated_scale(s_vi, rho)
    assert gap(best) < min(gap(0.99 * best), gap(1.01 * best))


@pytest.mark.parametrize("rho", RHOS)
def test_noise_of_each_its_own_beats_common_noise_at_equal_energy(rho):
    """T16: U_het / U_hom = mean(H^(rho / (rho + 2)))^((rho + 2) / rho) / mean(H) < 1."""
    h, cost = torch.tensor([0.1, 1.0, 2.0, 30.0]).double(), PowerLaw(rho, scale=0.3)
    own = cost.optimal_sd(h)
    energy = cost.energy(own.log()).mean()
    common = (cost.coefficient / energy) ** (1 / rho)
    assert float(common) != pytest.approx(float(cost.optimal_sd(h.mean())))  # S13 is another price
    ratio = float((h * own.square()).sum() / (h * common.square()).sum())
    law = (h ** (rho / (rho + 2))).mean() ** ((rho + 2) / rho) / h.mean()
    assert ratio == pytest.approx(float(law))
    assert ratio < 1


# --------------------------------------------------------------------------------- the objective


@pytest.mark.parametrize("cls", [MeanFieldEncoder, FullCovarianceEncoder])
def test_entropic_cost_is_minus_the_elbo(cls):
    """T1: with the same draws, up to log q at the draws against its mean, the entropy."""
    model, x = factors()
    guide = cls(model, seed=2).double()
    with torch.no_grad(), seeded(0):
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    with seeded(3):
        mine = ReliabilityCost()(model, guide, x)["guide"]
    with seeded(3):
        elbo = ELBO()(model, guide, x)["guide"]
    with seeded(3):
        q = guide.distribution(x)
        log_q = q.log_prob(q.rsample())
    difference = (mine - elbo).item()
    assert difference == pytest.approx((-q.entropy() - log_q).mean().item(), abs=1e-10)
    assert abs(difference) > 1e-3  # of one draw


@pytest.mark.parametrize("name", COSTS)
def test_the_loss_is_above_minus_the_elbo_by_the_slack(name):
    """T2: at any noise, with constants."""
    model, x = factors()
    guide = MeanFieldEncoder(model, seed=2).double()
    objective = ReliabilityCost(COSTS[name])
    with seeded(3):
        loss = objective(model, guide, x)["guide"]
    with seeded(3):
        minus_elbo = ReliabilityCost()(model, guide, x)["guide"]
    with seeded(3):
        slack = objective.terms(guide, x)["slack"].mean()
    assert (loss - minus_elbo).item() == pytest.approx(slack.item(), abs=1e-10)
    assert slack.item() >= 0


def test_the_means_of_a_power_law_are_those_of_the_posterior():
    """S10: where the loss is quadratic, mean and noise do not know of each other."""
    model = plain()
    x, mu = model.observations(), torch.tensor([0.5, -1.0, 2.0]).double()
    guide = Diagonal(model, mu.clone(), torch.tensor([-1.0, 0.2, 0.4]).double())
    objective = ReliabilityCost(PowerLaw(2.0, scale=0.3), particles=4)
    total = torch.zeros(3).double()
    for seed in range(200):
        with seeded(seed):
            loss = objective(model, guide, x)["guide"]
        total += torch.autograd.grad(loss, guide.mean)[0] / 200
    noise = guide.log_sds.exp()
    se = ((PRECISION * noise).square().sum(1) / 800).sqrt()
    assert bool((total.abs() < 5 * se).all())


@pytest.mark.parametrize("rho", [None, 1 / 2, 2.0])
def test_correlated_noise_has_the_axes_of_the_posterior_and_compressed_lengths(rho):
    """S12: Sigma = (c rho)^(2 / (rho + 2)) Lambda^(-2 / (rho + 2)) is a minimum."""
    cost = Entropic() if rho is None else PowerLaw(rho, scale=0.3)
    values, axes = torch.linalg.eigh(PRECISION)
    best = axes @ torch.diag(cost.optimal_sd(values).square()) @ axes.T
    model = plain()
    x, mu = model.observations(), torch.tensor([0.5, -1.0, 2.0]).double()

    def loss(entries):
        tril = torch.zeros(3, 3).double()
        tril[*torch.tril_indices(3, 3)] = entries
        guide = Full(model, mu, torch.eye(3).double())
        q = MultivariateNormal(mu[None], scale_tril=tril[None])
        return 0.5 * (PRECISION * (tril @ tril.T)).sum() + cost(guide.log_sd(q)).sum()

    start = torch.linalg.cholesky(best)[*torch.tril_indices(3, 3)].requires_grad_()
    (slope,) = torch.autograd.grad(loss(start), start)
    assert float(slope.abs().max()) < 1e-6
    assert float(torch.linalg.eigvalsh(hessian(loss, start.detach())).min()) > 0
    assert Full(model, mu, torch.linalg.cholesky(best)).noise(x).shape == (1, 3)


def test_factorised_noise_is_narrower_than_the_marginals():
    """T7: 1 / Lambda_ii <= (Lambda^-1)_ii, and the best factorised noise has the former."""
    marginal = torch.linalg.inv(PRECISION).diagonal()
    best = Entropic().optimal_sd(PRECISION.diagonal()).square()
    assert bool((best < marginal).all())
    assert torch.allclose(best, 1 / PRECISION.diagonal(), rtol=1e-9)


def test_magnitude_of_the_mean_is_below_the_mean_magnitude():
    """Dossier of the synapses, trap 1: E|w| >= |mu|, so that |mu| is no bound."""
    model = zoo.SparseCoding(2)
    guide = Diagonal(model, torch.tensor([0.1, -0.3]), torch.tensor([-0.5, -1.5]))
    x = model.observations()[:3]
    with seeded(0):
        mean = ReliabilityCost(particles=2000).terms(guide, x)["magnitude"].mean().item()
    with seeded(0):
        at = ReliabilityCost(magnitude="mean").terms(guide, x)["magnitude"].mean().item()
    mu, s = torch.tensor([0.1, -0.3]), torch.tensor([-0.5, -1.5]).exp()
    expected = (
        mu * torch.erf(mu / (s * 2**0.5)) + s * (2 / math.pi) ** 0.5 * (-(mu**2) / (2 * s**2)).exp()
    )
    shortfall = float(model.rate * (expected - mu.abs()).sum())
    se = float(model.rate * s.square().sum().sqrt()) / 2000**0.5
    assert mean - at == pytest.approx(shortfall, abs=5 * se)
    assert shortfall > 20 * se


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PowerLaw(0.0, scale=0.1), "rho"),
        (lambda: PowerLaw(-1.0, scale=0.1), "rho"),
        (lambda: PowerLaw(math.nan, scale=0.1), "rho"),
        (lambda: PowerLaw(2.0, coefficient=-0.1), "coefficient"),
        (lambda: PowerLaw(2.0, scale=0.0), "scale"),
        (lambda: PowerLaw(2.0), "scale, coefficient"),
        (lambda: PowerLaw(2.0, scale=0.1, coefficient=0.1), "scale, coefficient"),
        (lambda: PowerLaw("actinn", scale=0.1), "actin"),
        (lambda: mixture({"actin": -1.0}, scale=0.1), "weights"),
        (lambda: mixture({"actin": 0.0}, scale=0.1), "weights"),
        (lambda: calibrated_scale(torch.ones(2), 0.0), "rho"),
        (lambda: ReliabilityCost(magnitude="median"), "magnitude"),
        (lambda: ReliabilityCost(particles=0), "particles"),
        (lambda: ReliabilityCost(PowerLaw(2.0, scale=0.1), budget=0.0), "budget"),
        (lambda: ReliabilityCost(PowerLaw(2.0, scale=0.1), budget=-3.0), "budget"),
        (lambda: ReliabilityCost(budget=3.0), "Entropic"),
    ],
)
def test_bad_costs_are_refused_by_name(make, says):
    with pytest.raises(BadInput, match=says):
        make()


def test_a_guide_without_gaussian_noise_is_refused():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    with pytest.raises(Incompatible, match="HasNoise"):
        fit(model, inference.Flow(model), objective=ReliabilityCost(), steps=1, progress=False)


@pytest.mark.parametrize("value", [-25.0, 25.0])
def test_noise_at_zero_or_infinity_names_the_units(value):
    model = plain()
    guide = Diagonal(model, torch.zeros(3).double(), torch.tensor([0.0, value, 0.0]).double())
    with pytest.raises(Diverged, match=r"z\[1\]"), seeded(0):
        ReliabilityCost()(model, guide, model.observations())


def test_the_energy_is_that_of_noise_alone():
    """A planted error, noise in the wrong units, is seen in the energy."""
    model, x = factors()
    guide = MeanFieldEncoder(model).double()
    law = PowerLaw("actin", scale=0.3)
    with torch.no_grad(), seeded(0):
        found = ReliabilityCost(law).terms(guide, x)["energy"]
    sds = guide.noise(x)
    assert torch.allclose(found, (law.coefficient * sds**-law.rho).sum(-1))
    assert not torch.allclose(found, (law.coefficient * (2 * sds) ** -law.rho).sum(-1))
