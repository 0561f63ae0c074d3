"""Objectives: identities under exact guides, gradients against closed forms, refused pairs."""

from __future__ import annotations

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import zoo
from inference import (
    ELBO,
    NUTS,
    OBJECTIVES,
    ForwardKL,
    Guide,
    Implicit,
    Incompatible,
    MeanFieldEncoder,
    Objective,
    PackedGuide,
    fit,
)
from inference.seeds import seeded

B = 4


@pytest.fixture
def precise():
    """Factor analysis in float64, for tests that may change it."""
    return zoo.FactorAnalysis(7, 3, seed=1).double()


class Gaussians(PackedGuide):
    """A Normal per problem and latent, with start values away from every optimum."""

    objective = ELBO

    def __init__(self, model, b, loc=0.3, log_scale=-0.4):
        super().__init__(model)
        like = torch.zeros(b, self.latents.size, dtype=torch.float64)
        self.loc = nn.Parameter(like + loc)
        self.log_scale = nn.Parameter(like + log_scale)

    def distribution(self, x):
        copies = self.latents.problems(x) // len(self.loc)
        scale = self.log_scale.exp()
        return Independent(Normal(self.loc.repeat(copies, 1), scale.repeat(copies, 1)), 1)


class Sampler(Guide):
    """An implicit guide."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", Implicit(x[:, :3], event_dim=1))


# ------------------------------------------------------------------------------ the exact guide


def integrand(guide, x):
    z = guide.draw(x, draws=50, chains=2, seed=0).values
    return guide.latents.log_joint(z, x) - guide.log_prob(z, x)


def test_the_elbo_integrand_of_the_exact_guide_is_constant(precise):
    x = precise.observations()[:B]
    with torch.no_grad(), seeded(0):
        exact = precise.exact()
        found = integrand(exact, x)
        evidence = exact.log_evidence(x)
        loss = ELBO(particles=3)(precise, exact, x)["guide"]
    assert found.shape == (2, 50, B)
    assert found.var((0, 1)).max() < 1e-10
    torch.testing.assert_close(found, evidence.expand_as(found), rtol=1e-4, atol=0)
    torch.testing.assert_close(-loss, evidence.mean(), rtol=1e-4, atol=0)
    covariance = precise.loadings @ precise.loadings.T + precise.noise.square().diag()
    dense = torch.distributions.MultivariateNormal(precise.mean, covariance).log_prob(x)
    torch.testing.assert_close(evidence, dense, rtol=1e-8, atol=0)


def test_no_other_guide_has_a_constant_integrand(precise):
    x = precise.observations()[:B]
    guide = Gaussians(precise, B)
    with torch.no_grad(), seeded(0):
        found = integrand(guide, x)
        losses = torch.stack([ELBO(particles=50)(precise, guide, x)["guide"] for _ in range(20)])
        evidence = precise.exact().log_evidence(x).mean()
    assert found.var((0, 1)).min() > 0.1
    assert losses.mean() - 5 * losses.std() / 20**0.5 > -evidence


def test_learning_the_model_under_the_exact_guide_is_maximum_likelihood(precise):
    x = precise.observations()[:B]
    exact = precise.exact()
    parameters = list(precise.parameters())
    with seeded(0):
        loss = ELBO(particles=2)(precise, exact, x)["guide"]
    by_elbo = torch.autograd.grad(loss, parameters)
    by_evidence = torch.autograd.grad(-exact.log_evidence(x).mean(), parameters)
    assert len(parameters) == 3
    for mine, theirs in zip(by_elbo, by_evidence, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_fit_climbs_the_evidence(precise):
    x, exact = precise.observations()[:20], precise.exact()
    with torch.no_grad():
        before = exact.log_evidence(x).mean()
    fit(precise, exact, x, steps=5, batch_size=20, lr=1e-3, learn_model=True, progress=False)
    with torch.no_grad():
        assert exact.log_evidence(x).mean() > before + 1e-3


# --------------------------------------------------------------------------------- gradients


def gradients(model, guide, x, objective, repeats, seed):
    """Means and standard errors of repeated gradient estimates, one pair per parameter."""
    parameters = list(guide.parameters())
    with seeded(seed):
        found = [
            torch.autograd.grad(objective(model, guide, x)["guide"], parameters)
            for _ in range(repeats)
        ]
    stacked = [torch.stack(g) for g in zip(*found, strict=True)]
    return [(g.mean(0), g.std(0) / repeats**0.5) for g in stacked]


def test_the_mean_field_gradient_is_the_closed_form(precise):
    x = precise.observations()[:B]
    guide = Gaussians(precise, B)
    with torch.no_grad():
        weighted = precise.loadings / precise.noise.square()[:, None]
        precision = torch.eye(3) + precise.loadings.T @ weighted
        slope_loc = guide.loc @ precision - (x - precise.mean) @ weighted
        slope_scale = precision.diagonal() * (2 * guide.log_scale).exp() - 1
    found = gradients(precise, guide, x, ELBO(particles=100), repeats=60, seed=1)
    for (mean, se), truth in zip(found, (slope_loc / B, slope_scale / B), strict=True):
        within(mean, truth, se)


def coins(x):
    """Two hidden coins, F = 3."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor([0.3, 0.6])).to_event(1))
        loc = z @ x.new_tensor([[1.0, -0.5, 0.3], [0.4, 0.8, -1.0]])
        pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)


class Coins(Guide):
    """Independent coins per problem."""

    def __init__(self, model, b):
        super().__init__(model)
        self.logits = nn.Parameter(torch.linspace(-0.5, 1.0, 2 * b).double().reshape(b, 2))

    def forward(self, x):
        logits = self.logits.repeat(len(x) // len(self.logits), 1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    def log_prob(self, z, x):
        return Bernoulli(logits=self.logits).log_prob(z["z"]).sum(-1)


def test_the_discrete_gradient_is_that_of_enumeration():
    x = torch.tensor([[0.2, 1.0, -0.4], [1.5, 0.1, -0.8]], dtype=torch.float64)
    model = zoo.from_pyro(coins, x)
    guide = Coins(model, 2)
    states = torch.cartesian_prod(*2 * [torch.tensor([0.0, 1.0]).double()])[:, None].expand(4, 2, 2)
    log_q = guide.log_prob({"z": states}, x)
    log_p = guide.latents.log_joint({"z": states}, x)
    loss = (log_q.exp() * (log_q - log_p)).sum(0).mean()
    truth = torch.autograd.grad(loss, guide.logits)[0]
    ((mean, se),) = gradients(model, guide, x, ELBO(particles=100), repeats=80, seed=2)
    within(mean, truth, se)


def test_particles_of_one_problem_are_averaged():
    def program(x):
        z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.4, 1.1, -0.3], dtype=torch.float64)
    model = zoo.from_pyro(program, x)

    class One(Gaussians):
        def distribution(self, x):
            return Independent(Normal(self.loc, self.log_scale.exp()), 1)

    guide = One(model, 1)
    precision, drive = 1 / 4 + 3 / 0.25, 1 / 4 + x.sum() / 0.25
    with torch.no_grad():
        slope_loc = guide.loc * precision - drive
        slope_scale = precision * (2 * guide.log_scale).exp() - 1
    found = gradients(model, guide, x, ELBO(particles=10), repeats=50, seed=3)
    for (mean, se), truth in zip(found, (slope_loc, slope_scale), strict=True):
        within(mean, truth, se)


def test_forward_kl_is_minus_log_q_of_what_made_x(precise):
    guide = Gaussians(precise, B)
    z, x = precise.simulate(B, seed=0)
    by_hand = Normal(guide.loc, guide.log_scale.exp()).log_prob(z["z"]).sum(-1)
    torch.testing.assert_close(ForwardKL()(precise, guide, x, z)["guide"], -by_hand.mean())


# ------------------------------------------------------------------------------------- players


def test_there_is_a_loss_for_each_player(precise):
    """Of every objective that an encoder can be trained with; each player's own is the same."""
    guide = MeanFieldEncoder(precise, hidden=(4,))
    z, x = precise.simulate(B, seed=0)
    games = [o() for o in OBJECTIVES.values() if isinstance(guide, o.needs)]
    assert len(games) >= 7
    for objective in games:
        players = objective.players(guide)
        with seeded(1):
            losses = objective(precise, guide, x, z)
        with seeded(1):
            apart = {n: objective.loss(n, precise, guide, x, z) for n in players}
        assert "guide" in players
        assert list(losses) == list(players), type(objective).__name__
        for name, loss in losses.items():
            assert loss.shape == ()
            assert torch.equal(loss, apart[name])
            moved = [p for p in players[name].module.parameters() if p.requires_grad]
            assert any(g is not None for g in torch.autograd.grad(loss, moved, allow_unused=True))


# ------------------------------------------------------------------------------- refused pairs


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("make", [Sampler, NUTS])
def test_guides_without_a_density_are_refused_before_the_first_step(model, objective, make):
    name = objective.__name__
    wanted, remedy = objective.needs.__name__, re.escape(objective.remedy)
    message = rf"^{name} with {make.__name__}: .*{wanted}; got one without\. {remedy}"
    x = None if objective.joint_only else model.observations()[:B]
    with pytest.raises(Incompatible, match=message):
        fit(model, make(model), x, objective=objective(), steps=2, progress=False)


def test_forward_kl_refuses_data(model):
    guide = model.exact()
    message = r"^ForwardKL: .*model's joint; got observations.*x=None, or use ELBO"
    with pytest.raises(Incompatible, match=message):
        fit(model, guide, model.observations(), objective=ForwardKL(), progress=False)


class FixedModel(Objective):
    """An objective without a gradient for the model."""

    needs = Guide


@pytest.mark.parametrize(
    ("objective", "data", "got"),
    [
        (ELBO(), False, "draws from the model itself"),
        (ForwardKL(), False, "draws from the model itself"),
        (FixedModel(), True, "an objective without one"),
    ],
)
def test_the_model_is_not_learned_where_it_cannot_be(model, objective, data, got):
    guide = MeanFieldEncoder(model, hidden=(4,))
    before = [p.clone() for p in model.parameters()]
    x = model.observations() if data else None
    message = rf"^{type(objective).__name__} with learn_model=True: .*got {got}\. Pass x=data"
    with pytest.raises(Incompatible, match=message):
        fit(model, guide, x, objective=objective, steps=2, learn_model=True, progress=False)
    assert all(map(torch.equal, before, model.parameters()))


def test_a_model_is_not_silently_left_unlearned(model):
    """NUTS trains nothing, so with it there is no objective to learn the model by."""
    with pytest.raises(Incompatible, match="learn_model"):
        fit(model, NUTS(model), model.observations(), learn_model=True, progress=False)
