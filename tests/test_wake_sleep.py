"""Reweighted wake-sleep against enumeration, closed forms and its own fixed point."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from test_objectives import Gaussians, Sampler, gradients
from torch import nn
from torch.distributions import Bernoulli, MultivariateNormal, kl_divergence

import zoo
from inference import (
    AutoNormal,
    BadInput,
    ForwardKL,
    FullCovarianceEncoder,
    Guide,
    Incompatible,
    PackedGuide,
    fit,
)
from inference.guide import Draws
from inference.objectives.wake_sleep import ReweightedWakeSleep
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")

B, K = 4, 5
MODELS = {"noisy or": partial(zoo.NoisyOr, 2, 3), "sprinkler": partial(zoo.Sprinkler, dew=0.1)}


class Units(Guide):
    """Independent binary units driven by x, away from every optimum."""

    def __init__(self, model):
        super().__init__(model)
        features, d = model.observations().shape[1], self.latents.size
        like = torch.linspace(-1.0, 0.7, features * d, dtype=model.observations().dtype)
        self.weights = nn.Parameter(like.reshape(features, d))
        self.bias = nn.Parameter(0.3 - 0.5 * like[:d])

    def logits(self, x):
        return x @ self.weights + self.bias

    def forward(self, x):
        lat = self.latents
        pieces = self.logits(x).split(list(lat.splits.values()), -1)
        drive = dict(zip(lat.names, pieces, strict=True))
        with lat.plate(x):
            return self.sample_sites(
                lambda s: dist.Bernoulli(logits=drive[s.name].reshape(-1, *s.shape)).to_event(
                    s.event_dim
                )
            )

    def log_prob(self, z, x):
        return Bernoulli(logits=self.logits(x)).log_prob(self.latents.pack(z)[0]).sum(-1)


class Correlated(PackedGuide):
    """The exact Gaussian posterior of each problem, as parameters."""

    def __init__(self, model, x):
        super().__init__(model)
        p = model.exact().distribution(x)
        self.loc = nn.Parameter(p.mean.detach())
        self.tril = nn.Parameter(p.scale_tril.detach().expand(len(x), -1, -1).clone())

    def distribution(self, x):
        return MultivariateNormal(self.loc, scale_tril=self.tril)


@pytest.fixture
def precise():
    return zoo.FactorAnalysis(7, 3, seed=1).double()


def fixed(guide, values):
    """The guide, with draws (K, B, *shape) that are always the same."""
    guide.draw = lambda x, **_: Draws({n: v[:, None] for n, v in values.items()})
    return guide


def slopes(loss, module):
    found = torch.autograd.grad(
        loss, list(module.parameters()), allow_unused=True, retain_graph=True
    )
    return [g for g in found if g is not None]


def close(mine, theirs):
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("insomnia", [1.0, 0.3, 0.0])
def test_loss_and_gradients_of_given_draws_are_those_by_hand(precise, insomnia):
    x = precise.observations()[:B]
    made, seen = precise.simulate(B, seed=5)
    guide = Gaussians(precise, B)
    z = {"z": torch.randn(K, B, 3, generator=torch.Generator().manual_seed(0)).double()}
    objective = ReweightedWakeSleep(particles=K, insomnia=insomnia)
    log_p, log_q = guide.latents.log_joint(z, seen), guide.log_prob(z, seen)
    ratio = (log_p - log_q).exp().detach()
    w = ratio / ratio.sum(0)
    asleep = -guide.log_prob(made, seen).mean()
    taught = insomnia * -(w * log_q).sum(0).mean() + (1 - insomnia) * asleep
    loss = objective(precise, fixed(guide, z), seen, made)["guide"]
    torch.testing.assert_close(loss, taught - ratio.mean(0).log().mean())
    close(slopes(loss, guide), slopes(taught, guide))
    loss = objective(precise, guide, seen, made)["guide"]
    close(slopes(loss, precise), slopes(-(w * log_p).sum(0).mean(), precise))
    assert not torch.equal(objective(precise, guide, x, made)["guide"], loss)


def test_a_density_made_of_the_model_does_not_teach_the_model(precise):
    """Given draws of the exact guide: d log p(x, z) = d log p(x) + d log q, Fisher's identity."""
    x, exact = precise.observations()[:B], precise.exact()
    z = {n: v[:, 0] for n, v in exact.draw(x, draws=1, chains=K, seed=0).values.items()}
    loss = ReweightedWakeSleep(particles=K)(precise, fixed(exact, z), x)["guide"]
    evidence, log_q = exact.log_evidence(x), exact.log_prob(z, x)
    torch.testing.assert_close(loss, -(evidence + log_q.mean(0)).mean())
    mine = slopes(loss, precise)
    close(mine, slopes(-(evidence + exact.log_prob(z, x).mean(0)).mean(), precise))
    assert all(p.requires_grad for p in precise.parameters())


def test_draws_of_the_exact_guide_weigh_the_same(precise):
    """A fixed point: the gradient is minus the mean score of its own draws, zero on average."""
    x = precise.observations()[:B]
    guide = Correlated(precise, x)
    z = {n: v[:, 0] for n, v in guide.draw(x, draws=1, chains=K, seed=0).values.items()}
    objective = ReweightedWakeSleep(particles=K)
    for mean, se in gradients(precise, guide, x, objective, repeats=60, seed=1):
        within(mean[se > 0], 0.0, se[se > 0])
        assert not mean[se == 0].any()  # above the diagonal
    loss = objective(precise, fixed(guide, z), x)["guide"]
    close(slopes(loss, guide), slopes(-guide.log_prob(z, x).mean(), guide))


def test_asleep_on_the_joint_it_is_the_forward_kl(precise):
    z, x = precise.simulate(B, seed=0)
    guide = Gaussians(precise, B)
    with seeded(0):
        mine = slopes(ReweightedWakeSleep(insomnia=0.0)(precise, guide, x, z)["guide"], guide)
    close(mine, slopes(ForwardKL()(precise, guide, x, z)["guide"], guide))


def test_a_data_set_that_is_one_problem():
    def program(x):
        z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.4, 1.1, -0.3], dtype=torch.float64)
    model = zoo.from_pyro(program, x)
    precision = 1 / 4 + 3 / 0.25
    guide = Gaussians(model, 1, loc=(1 / 4 + x.sum() / 0.25) / precision,
                      log_scale=-0.5 * math.log(precision))  # fmt: skip
    z = guide.draw(x, draws=1, chains=K, seed=0).values["z"][:, 0]
    loss = ReweightedWakeSleep(particles=K)(model, fixed(guide, {"z": z}), x)["guide"]
    covariance = 0.25 * torch.eye(3).double() + 4
    evidence = MultivariateNormal(torch.ones(3).double(), covariance).log_prob(x)
    torch.testing.assert_close(loss, -evidence - guide.log_prob({"z": z}, x).mean())


def test_randomness_is_that_of_the_seed(precise):
    x, guide = precise.observations()[:B], FullCovarianceEncoder(precise, hidden=(4,)).double()
    losses = []
    for seed in (0, 0, 1):
        with seeded(seed):
            losses.append(ReweightedWakeSleep(insomnia=0.5)(precise, guide, x)["guide"].item())
    assert losses[0] == losses[1] != losses[2]


# ----------------------------------------------------------------------------------- expectations


def binary(n):
    return torch.cartesian_prod(*n * [torch.tensor([0.0, 1.0]).double()]).reshape(-1, n)


def densities(guide, x):
    """log p(x, z) and log q(z given x) of every state z, (states, B)."""
    states = binary(guide.latents.size)
    z, _ = guide.latents.unpack(states[:, None].expand(-1, len(x), -1))
    return guide.latents.log_joint(z, x), guide.log_prob(z, x)


def awake(guide, x, particles):
    """The expected loss over all sets of draws."""
    log_p, log_q = densities(guide, x)
    sets = torch.cartesian_prod(*particles * [torch.arange(len(log_q))])
    log_w, each = (log_p - log_q).detach()[sets], log_q[sets]
    chance = each.detach().sum(1, keepdim=True).exp()
    return -(chance * log_w.softmax(1) * each).sum((0, 1)).mean()


def asleep(guide):
    """Over all states and observations."""
    log_p, log_q = densities(guide, binary(guide.model.observations().shape[1]))
    return -(log_p.exp() * log_q).sum()


def problem(name):
    model = MODELS[name]().double()
    return model, Units(model), model.observations()[:3]


def agree(found, loss, module):
    for (mean, se), truth in zip(found, slopes(loss, module), strict=True):
        within(mean, truth, se)


def model_gradients(model, guide, x, *, particles, repeats):
    """Means and standard errors, one pair per parameter of the model."""
    objective = ReweightedWakeSleep(particles=particles)
    runs = [slopes(objective(model, guide, x)["guide"], model) for _ in range(repeats)]
    stacked = [torch.stack(g) for g in zip(*runs, strict=True)]
    return [(g.mean(0), g.std(0) / repeats**0.5) for g in stacked]


@pytest.mark.parametrize("insomnia", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_discrete_gradient_is_that_of_enumeration(name, insomnia):
    """The planted error is insomnia the wrong way round."""
    model, guide, x = problem(name)
    objective = ReweightedWakeSleep(particles=2, insomnia=insomnia)
    found = gradients(model, guide, x.repeat(50, 1), objective, repeats=60, seed=1)

    def mixed(share):
        return share * awake(guide, x, 2) + (1 - share) * asleep(guide)

    agree(found, mixed(insomnia), guide)
    with pytest.raises(AssertionError, match="standard errors"):
        agree(found, mixed(1 - insomnia), guide)


def test_two_draws_are_seen_to_be_two():
    """Planted error: the gradient of three draws, or of all, is not that of two."""
    model, guide, x = problem("noisy or")
    log_p, log_q = densities(guide, x)
    whole = -(log_p.softmax(0) * log_q).sum(0).mean()
    objective = ReweightedWakeSleep(particles=2)
    found = gradients(model, guide, x.repeat(50, 1), objective, repeats=60, seed=1)
    for other in (awake(guide, x, 3), whole):
        with pytest.raises(AssertionError, match="standard errors"):
            agree(found, other, guide)


def test_many_draws_teach_the_model_maximum_likelihood(precise):
    """The gradient of the model is that of the evidence, up to a bias of order 1 / K."""
    x = precise.observations()[:B]
    guide = Gaussians(precise, B, loc=precise.exact().distribution(x).mean.detach(), log_scale=0.0)
    truth = -precise.exact().log_evidence(x).mean()
    agree(model_gradients(precise, guide, x, particles=1000, repeats=30), truth, precise)
    with pytest.raises(AssertionError, match="standard errors"):
        agree(model_gradients(precise, guide, x, particles=2, repeats=200), truth, precise)


def test_the_exact_guide_teaches_the_model_maximum_likelihood(precise):
    """On average, with two draws: there is no bias."""
    x, exact = precise.observations()[:B], precise.exact()
    found = model_gradients(precise, exact, x, particles=2, repeats=150)
    agree(found, -exact.log_evidence(x).mean(), precise)


# ------------------------------------------------------------------------------------------- fits


@pytest.mark.parametrize(("insomnia", "joint"), [(1.0, False), (0.5, False), (0.5, True)])
def test_a_fit_lowers_the_divergence(insomnia, joint):
    model = zoo.ExplainingAway(3, noise=0.5)
    x, guide = model.observations(), FullCovarianceEncoder(model, hidden=(16,))

    def divergence():
        with torch.no_grad():
            p, q = model.exact().distribution(x), guide.distribution(x)
            q = MultivariateNormal(q.mean, q.covariance_matrix)
            return kl_divergence(MultivariateNormal(p.mean, p.covariance_matrix), q).mean().item()

    before = divergence()
    objective = ReweightedWakeSleep(insomnia=insomnia)
    run = fit(model, guide, None if joint else x, objective=objective, steps=150, batch_size=64,
              lr=0.02, progress=False)  # fmt: skip
    assert divergence() < 0.1 * before
    assert len(run.losses["guide"]) == 150


def test_a_fit_of_discrete_units_finds_the_marginals():
    """The minimum of KL(p || q) for independent units; probabilities to .05 with K = 50."""
    model = zoo.NoisyOr(2, 3)
    x, guide = model.observations()[:1], Units(model)
    fit(model, guide, x, objective=ReweightedWakeSleep(particles=50), steps=150, lr=0.03,
        progress=False)  # fmt: skip
    states = binary(2).float()
    weights = model.exact().logits(x).softmax(0)
    marginals = (weights * states).sum(0)
    assert (guide.logits(x).sigmoid()[0] - marginals).abs().max() < 0.05
    assert (Units(model).logits(x).sigmoid()[0] - marginals).abs().max() > 0.2


def test_a_fit_of_the_model_climbs_the_evidence():
    data = zoo.FactorAnalysis(7, 3, seed=1).observations()
    model = zoo.FactorAnalysis.for_data(data, latents=3)
    guide = FullCovarianceEncoder(model, hidden=(16,))
    with torch.no_grad():
        before = model.exact().log_evidence(data).mean().item()
    fit(model, guide, data, objective=ReweightedWakeSleep(insomnia=0.5), steps=150, batch_size=50,
        lr=0.02, learn_model=True, progress=False)  # fmt: skip
    with torch.no_grad():
        assert model.exact().log_evidence(data).mean().item() > before + 1.0


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        *(({"particles": k}, r"^particles: expected an integer >= 2; got") for k in (1, 2.5, True)),
        *(
            ({"insomnia": v}, r"^insomnia: expected a number from 0 to 1; got")
            for v in (-0.1, 1.1, math.nan)
        ),
    ],
)
def test_bad_knobs_are_refused(knobs, says):
    with pytest.raises(BadInput, match=says):
        ReweightedWakeSleep(**knobs)


def test_pairs_that_cannot_work_are_refused(model):
    x, half = model.observations()[:B], ReweightedWakeSleep(insomnia=0.5)
    with pytest.raises(Incompatible, match=r"HasDensity; got one without.*log q"):
        fit(model, Sampler(model), x, objective=half, progress=False)
    with pytest.raises(Incompatible, match="draws from the model itself"):
        fit(model, FullCovarianceEncoder(model), objective=half, learn_model=True, progress=False)
    with pytest.raises(Incompatible, match=r"with AutoNormal: .*each problem.*insomnia=1\.0"):
        fit(model, AutoNormal(model), x, objective=half, progress=False)
    run = fit(model, AutoNormal(model), x, objective=ReweightedWakeSleep(), steps=2, progress=False)
    assert len(run.losses["guide"]) == 2
