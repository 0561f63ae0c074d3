"""Games against critics: what each player minimises, and whom its gradient reaches."""

from __future__ import annotations

import math
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_guides import FLAT, one_problem, two_sites
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import grad, vmap
from torch.nn.functional import softplus

import zoo
from inference import (
    Adversarial,
    AutoNormal,
    BadInput,
    EnergyScore,
    Incompatible,
    Oscillating,
    PackedGuide,
    PriorContrastive,
    RecurrentRecognition,
    Wasserstein,
    fit,
)
from inference.codes import Codes
from inference.critic import critic_for
from inference.game import LAST_PENALTY, Game, energy_loss, slopes
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")

B = 6
GAMES = [Adversarial, Wasserstein, PriorContrastive, Oscillating]
on_games = pytest.mark.parametrize("game", GAMES, ids=lambda g: g.__name__)


class Planted(PackedGuide):
    """The exact Gaussian posterior, moved by so many sds and made so many times as wide."""

    def __init__(self, model, *, shift=0.0, scale=1.0):
        super().__init__(model)
        self.shift = nn.Parameter(torch.as_tensor(shift).double())
        self.scale = nn.Parameter(torch.as_tensor(scale).double())
        self.__dict__["truth"] = model.exact()

    def distribution(self, x):
        p = self.truth.distribution(x)
        tril = p.scale_tril.expand(len(x), -1, -1)
        sd = tril.square().sum(-1).sqrt()
        tril = (tril * self.scale.expand(tril.shape[-1])[:, None]).to(x)
        loc = (p.loc + self.shift * sd).to(x)
        return MultivariateNormal(loc, scale_tril=tril, validate_args=False)


def mixed(x):
    """Two coins, and a latent that is a thousand times as large."""
    with pyro.plate("data", len(x)):
        coin = pyro.sample("coin", dist.Bernoulli(x.new_tensor([0.3, 0.6])).to_event(1))
        size = pyro.sample("size", dist.Normal(x.new_tensor(2000.0), 700.0))
        loc = coin * 500.0 + size[..., None]
        pyro.sample("x", dist.Normal(loc, 300.0).to_event(1), obs=x)


@cache
def layered():
    return zoo.LayeredGaussian((1, 2), 3).double()


@pytest.fixture
def precise():
    return zoo.FactorAnalysis(7, 3, seed=1).double()


def started(game, guide, *, progress=0.5, **knobs):
    """A game whose players are at the table."""
    objective = game(hidden=(8,), **knobs)
    objective.players(guide)
    objective.progress = progress
    return objective


def small(model, **knobs):
    return RecurrentRecognition(model, neurons=12, noises=4, steps=2, **knobs)


def slopes_of(loss, module):
    """Gradients of a loss to a module's parameters, None where there is no way."""
    found = [p for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, found, allow_unused=True, retain_graph=True)


# --------------------------------------------------------------------------------- whom it reaches


@pytest.mark.parametrize("progress", [0.0, 0.5])
@pytest.mark.parametrize("joint", [False, True])
@on_games
def test_each_players_gradient_is_its_own(precise, game, joint, progress):
    guide = small(precise)
    objective = started(game, guide, progress=progress)
    z, x = precise.simulate(B, seed=2) if joint else (None, precise.observations()[:B])
    judged = objective.loss("critic", precise, guide, x, z)
    played = objective.loss("guide", precise, guide, x, z)
    assert all(g is None for m in (guide, precise) for g in slopes_of(judged, m))
    named = [n for n, p in objective.critic.named_parameters() if p.requires_grad]
    mine = dict(zip(named, slopes_of(judged, objective.critic), strict=True))
    # what is added to all scores of a critic, a Wasserstein game does not see
    assert {n for n, g in mine.items() if g is not None and g.any()} >= {
        n for n in named if n.endswith("weight")
    }
    assert all(g is not None and g.any() for g in slopes_of(played, guide))
    assert (game is PriorContrastive and progress > 0) or not [
        g for g in slopes_of(played, precise) if g is not None
    ]


def test_the_reference_follows_the_guide_and_nobody_else(precise):
    guide = small(precise)
    objective, x = started(PriorContrastive, guide), precise.observations()[:B]
    assert list(objective.players(guide)) == ["reference", "critic", "guide"]
    loss = objective.loss("reference", precise, guide, x)
    assert all(g is None for m in (guide, objective.critic) for g in slopes_of(loss, m))
    assert any(g is not None and g.any() for g in slopes_of(loss, objective.reference))
    with seeded(3), torch.no_grad():
        u = guide.rsample(x)
    with seeded(3):
        again = objective.loss("reference", precise, guide, x)
    truth = -objective.reference.distribution(x).log_prob(u).mean()
    torch.testing.assert_close(again, truth)
    played = objective.loss("guide", precise, guide, x)
    assert all(g is None for g in slopes_of(played, objective.reference))


@on_games
def test_the_loss_of_a_player_is_that_of_the_game(precise, game):
    guide = small(precise)
    objective, x = started(game, guide), precise.observations()[:B]
    with seeded(1):
        whole = objective(precise, guide, x)
    with seeded(1):
        apart = {n: objective.loss(n, precise, guide, x) for n in whole}
    assert set(whole) >= {"critic", "guide"}
    assert all(torch.equal(whole[n], v) for n, v in apart.items())


@on_games
def test_it_warms_up_by_the_energy_score(precise, game):
    guide = small(precise)
    objective = started(game, guide, progress=0.29, warm_up=0.3)
    z, x = precise.simulate(B, seed=2)
    found = []
    for progress in (0.29, 0.3):
        objective.progress = progress
        with seeded(1):
            found.append(objective.loss("guide", precise, guide, x, z))
    with seeded(1):
        energy = energy_loss(objective.judge, guide, x, z)
    assert torch.equal(found[0], energy)
    assert not torch.equal(found[1], energy)


@on_games
def test_a_model_that_learns_does_by_its_likelihood_at_the_guides_draws(precise, game):
    guide = small(precise)
    objective, x = started(game, guide), precise.observations()[:B]
    objective.learn_model = True
    with seeded(1):
        loss = objective.loss("guide", precise, guide, x)
    with seeded(1), torch.no_grad():
        z = guide.codes.decode(guide.rsample(x))
    truth = slopes_of(-guide.latents.log_joint(z, x).mean(), precise)
    for mine, theirs in zip(slopes_of(loss, precise), truth, strict=True):
        assert theirs.any()
        torch.testing.assert_close(mine, theirs)


@on_games
def test_a_step_moves_the_players_and_not_the_model(game):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    modules = {"guide": small(model), "model": model}
    before = {n: [p.clone() for p in m.parameters()] for n, m in modules.items()}
    calls = []

    class Counted(game):
        def critic_loss(self, guide, x, z):
            calls.append(x)
            return super().critic_loss(guide, x, z)

    objective = Counted(hidden=(8,), critic_steps=3)
    run = fit(model, modules["guide"], objective=objective, steps=1, batch_size=8, progress=False)
    assert len(calls) == 3
    assert len(torch.unique(torch.cat(calls), dim=0)) == 24  # fresh batches
    assert set(run.losses) >= {"critic", "guide"}
    moved = {n: not all(map(torch.equal, before[n], m.parameters())) for n, m in modules.items()}
    assert moved == {"guide": True, "model": False}
    critics = objective.critic, started(game, modules["guide"]).critic
    pairs = zip(*[c.parameters() for c in critics], strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


# ------------------------------------------------------------------------------------ what it pays


def test_slopes_are_autograds_by_hand(precise):
    guide = small(precise)
    critic = started(Adversarial, guide).critic
    s, y = torch.randn(B, 7).double(), torch.randn(B, 3).double()
    each = vmap(grad(lambda a, b: critic(a[None], b[None]).sum(), argnums=(0, 1)))(s, y)
    seen = [s.requires_grad_(), y.requires_grad_()]
    found = slopes(critic(*seen), seen)
    torch.testing.assert_close(found, sum(g.square().sum(-1) for g in each))
    weights = next(iter(critic.parameters()))
    slope = torch.autograd.grad(found.mean(), weights)[0]
    way = torch.randn_like(weights)
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weights.add_(step * way)
        values.append(slopes(critic(*seen), seen).mean().item())
        with torch.no_grad():
            weights.sub_(step * way)
    assert (slope * way).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_what_the_critic_of_wake_and_sleep_pays(precise, joint):
    guide, progress = Planted(precise, shift=0.5), 0.4
    objective = started(Adversarial, guide, progress=progress, penalty=0.7)
    z, x = precise.simulate(B, seed=2) if joint else (None, precise.observations()[:B])
    with seeded(1):
        loss = objective.loss("critic", precise, guide, x, z)
    with seeded(1):
        z, dreamt = (z, x) if joint else guide.latents.simulate(x)
        u = guide.rsample(x).detach()
    judge = objective.judge
    total = 0.0
    for v, w, sign in ((x, u, -1), (dreamt, z["z"], 1)):
        s = judge.standardise(v)
        seen = [s.requires_grad_(), judge.relative(w, s).detach().requires_grad_()]
        score = objective.critic(*seen)
        total += softplus(sign * score).mean()
        total += 0.7 * LAST_PENALTY**progress / 2 * slopes(score, seen).mean()
    torch.testing.assert_close(loss, total)


def test_what_the_critic_of_slope_one_pays(precise):
    guide = Planted(precise, shift=0.5)
    objective = started(Wasserstein, guide, penalty=3.0)
    z, x = precise.simulate(B, seed=2)
    with seeded(1):
        loss = objective.loss("critic", precise, guide, x, z)
    with seeded(1):
        u, share = guide.rsample(x).detach(), torch.rand(B, 1, dtype=x.dtype)
    s = objective.judge.standardise(x)
    awake, asleep = (objective.judge.relative(v, s) for v in (u, z["z"]))
    seen = [s.clone().requires_grad_(), ((1 - share) * awake + share * asleep).requires_grad_()]
    norm = slopes(objective.critic(*seen), seen).sqrt()
    gap = (objective.critic(s, asleep) - objective.critic(s, awake)).mean()
    torch.testing.assert_close(loss, gap + 3.0 * (norm - 1).square().mean())


class Ratio(nn.Module):
    """The critic that a game is to find, whatever it is shown."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value[:, None]


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("model", ["layers", "two sites"])
def test_the_best_critic_makes_the_loss_minus_the_elbo(model, adaptive):
    if model == "layers":
        guide, x = Planted(layered(), shift=0.3, scale=1.3), layered().observations()[:B]
    else:
        x = torch.tensor([[1.2, 1.9, -0.4], [0.3, 0.7, 0.1]]).double()
        program = zoo.from_pyro(two_sites, x)
        guide = AutoNormal(program)
        guide.bind(x)
    lat = guide.latents
    objective = started(PriorContrastive, guide, adaptive=adaptive)
    with torch.no_grad():
        for p in objective.reference.parameters():
            p.add_(0.1 * torch.randn_like(p))
    c = guide.rsample(x)
    log_q = guide.distribution(x).log_prob(c)
    reference = objective.reference.distribution(x).log_prob(c)
    log_r = reference if adaptive else lat.log_terms(c, x)[0]
    objective.critic = Ratio(log_q - log_r)
    elbo = (lat.log_density(c, x) - log_q).mean()
    torch.testing.assert_close(objective.guide_loss(guide, x, c), -elbo)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"critic_steps": 0}, "^critic_steps: expected an integer >= 1; got 0"),
        ({"critic_rate": -1.0}, "^critic_rate: expected a number >= 0"),
        ({"penalty": math.nan}, "^penalty: expected a number >= 0"),
        ({"warm_up": -0.1}, r"^warm_up: expected a share in \[0, 1\); got -0\.1"),
        ({"averaging": 1.0}, r"^averaging: expected a share in \[0, 1\); got 1\.0"),
    ],
)
@on_games
def test_bad_knobs_are_refused(game, knobs, says):
    with pytest.raises(BadInput, match=says):
        game(**knobs)


def test_pairs_that_cannot_work_are_refused(precise):
    coins = zoo.NoisyOr(3, 2)
    with pytest.raises(Incompatible, match=r"^PriorContrastive: .*continuous.*'z'"):
        fit(coins, small(coins), objective=PriorContrastive(), steps=2, progress=False)
    x = precise.observations()[:B]
    message = r"^Adversarial with AutoNormal: expected .*simulated.*got .*each problem"
    with pytest.raises(Incompatible, match=message):
        fit(precise, AutoNormal(precise), x, objective=Adversarial(), steps=2, progress=False)
    message = "^EnergyScore: expected batches from the model's joint"
    with pytest.raises(Incompatible, match=message):
        fit(precise, small(precise), x, objective=EnergyScore(), steps=2, progress=False)


def test_critics_see_all_latents_at_one_scale():
    """Where some are discrete there is no linear guess, and units are those of the prior."""
    model = zoo.from_pyro(mixed, torch.full((2, 2), 2000.0).double())
    guide = small(model)
    judge = critic_for(guide, guide.latents, (4,), 0)
    z, x = guide.latents.joint(500, seed=1)
    y = judge.relative(Codes(guide.latents, "test").encode(z), judge.standardise(x))
    assert (y.std(0) > 0.3).all()
    assert (y.std(0) < 3.0).all()
    assert isinstance(started(Adversarial, guide), Game)


@on_games
def test_a_data_set_that_is_one_problem_can_be_played(game):
    model = zoo.from_pyro(one_problem, FLAT)
    objective = game(hidden=(4,))
    run = fit(model, small(model), objective=objective, steps=3, batch_size=4, progress=False)
    assert all(math.isfinite(v[-1]) for v in run.losses.values())
    assert run.warnings == []  # one problem is too few to say anything


def test_games_start_from_the_seed_of_the_critic(precise):
    guide = small(precise)
    make = partial(started, Adversarial, guide)
    one, same, other = (make(seed=s).critic.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(v, same[n]) for n, v in one.items())
    assert not all(torch.equal(v, other[n]) for n, v in one.items())
