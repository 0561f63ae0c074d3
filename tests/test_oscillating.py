"""The oscillating game: layers, what bounces back from them, and what pairs of them tell."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from conftest import within
from test_games import Planted, small
from test_guides import FLAT, WIDE, inner_plate, one_problem
from torch.distributions import MultivariateNormal

import zoo
from inference import BadInput, Oscillating, fit
from inference.critic import pairs
from inference.gauges import ordered
from inference.latents import Latents
from inference.objectives import oscillating
from inference.objectives.oscillating import bounce, split, views
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")

N = 4000


@cache
def layered():
    """z2 (2,), z1 (3,), x (5,)."""
    return zoo.LayeredGaussian().double()


def started(guide, **knobs):
    objective = Oscillating(hidden=(6,), **knobs)
    objective.players(guide)
    return objective


# ----------------------------------------------------------------------------------------- layers


def test_layers_go_up_from_the_observation():
    lat = Latents(layered())
    z, x = lat.joint(4, seed=0)
    layers = split(lat, x, torch.cat([z["z2"], z["z1"]], -1))
    assert all(map(torch.equal, layers, (x, z["z1"], z["z2"])))


def test_critics_see_neighbours_and_the_top_alone():
    low = [torch.full((4, n), k, dtype=torch.float64) for k, n in enumerate((5, 3, 2))]
    high = [t + 10 for t in low]
    found = views(low, high)
    assert [tuple(t.shape[1] for t in v) for v in found] == [(5, 3), (3, 2), (1, 2)]
    assert all(map(torch.equal, found[0], (low[0], high[1])))
    assert all(map(torch.equal, found[1], (low[1], high[2])))
    assert not found[2][0].any()
    assert torch.equal(found[2][1], low[2])


def test_there_is_a_critic_for_each_view():
    objective = started(small(layered()))
    lat = Latents(layered())
    layers = split(lat, *pairs(lat))
    assert len(objective.members) == 3
    for critic, (low, high) in zip(objective.members, views(layers, layers), strict=True):
        assert critic(low, high).shape == (len(low), 1)
    assert objective.score(layers, layers).shape == (2048, 3)
    weights = [next(c.net.parameters()) for c in objective.members]
    assert not torch.equal(weights[0][:, :3], weights[1][:, :3])


# ---------------------------------------------------------------------------------- bouncing back


def residuals(model, above, below):
    """What the program makes standard Normal: z2, z1 given `above`'s z2, x given its z1."""
    return {
        "z2": below["z2"] - model.mean,
        "z1": (below["z1"] - above["z2"] @ model.weights_2.T - model.bias_2) / model.scale_2,
        "x": (below["x"] - model.predict(above)) / model.scale_1,
    }


def standard_normal(r):
    """Moments to second order, within five standard errors."""
    within(r.mean(0), 0.0, r.std(0) / N**0.5)
    second = r[:, :, None] * r[:, None]
    within(second.mean(0), torch.eye(r.shape[1]), second.std(0) / N**0.5)


def test_each_layer_bounces_back_from_the_one_above():
    """Given far-off layers, so that no other law will do; the planted error is a layer's own."""
    model, lat = layered(), Latents(layered())
    z, x = lat.joint(N, seed=1)
    z = {n: 1.5 * v + 0.7 for n, v in z.items()}
    with torch.no_grad():
        back, c = bounce(lat, lat.pack(z)[0], x + 3.0)
        made = lat.unpack(c)[0] | {"x": back}
        found, wrong = residuals(model, z, made), residuals(model, made, made)
    for r in found.values():
        standard_normal(r)
    for name in ("z1", "x"):
        with pytest.raises(AssertionError, match="standard errors"):
            standard_normal(wrong[name])
    across = torch.corrcoef(torch.cat([made["z2"], z["z2"]], -1).T)[:2, 2:]
    within(across, 0.0, torch.full_like(across, N**-0.5))  # the top comes from its prior


def test_bouncing_keeps_shapes_inputs_and_supports():
    for model, like in (
        (zoo.from_pyro(inner_plate, WIDE[:, :2]), WIDE[:, :2]),
        (zoo.from_pyro(one_problem, FLAT), FLAT),
        (zoo.Sprinkler().double(), torch.ones(4, 1).double()),
    ):
        guide = small(model)
        c = guide.rsample(like)
        back, codes = bounce(guide.latents, c, like)
        assert codes.shape == c.shape
        assert codes.dtype == c.dtype
        for s in guide.latents.sites:
            assert s.support.check(guide.codes.decode(codes)[s.name]).all()
        if isinstance(like, tuple):
            assert torch.equal(back[0], like[0])
            assert back[1].shape == like[1].shape
            assert not torch.equal(back[1], like[1])
        else:
            assert back.shape == like.shape
            assert back.dtype == like.dtype


def test_oscillations_alternate_between_what_is_evoked_and_what_bounces_back():
    model, guide = layered(), Planted(layered())
    objective, x = started(guide), layered().observations()[:1].expand(600, -1)
    found = objective.oscillate(guide, x, cycles=3, trials=2, seed=2)
    again = objective.oscillate(guide, x, cycles=3, trials=2, seed=2)
    for s in guide.latents.sites:
        assert found.values[s.name].shape == (2, 6, 600, *s.shape)
        assert torch.equal(found.values[s.name], again.values[s.name])
    assert found.circuit["rates"].shape == (2, 6, 600, 3)
    assert (found.circuit["rates"] > 0).all()
    assert found.circuit["potentials"].shape == (2, 6, 600, 5 + 3 + 2)
    p = model.exact().distribution(x[:1])
    truths = p.mean[0, :2].detach(), model.mean.detach()
    for phase, truth in enumerate(truths):
        z2 = found.values["z2"][:, phase::2].reshape(-1, 2)
        within(z2.mean(0), truth, z2.std(0) / len(z2) ** 0.5)
        with pytest.raises(AssertionError, match="standard errors"):
            within(z2.mean(0), truths[1 - phase], z2.std(0) / len(z2) ** 0.5)
    seen = found.circuit["potentials"][:, ::2, :, :5]
    assert torch.equal(seen, seen[:1, :1, :1].expand_as(seen)), "evoked x is x itself"
    with pytest.raises(BadInput, match="cycles: expected an integer >= 1; got 0"):
        objective.oscillate(guide, x, cycles=0, seed=0)


def test_activity_is_in_units_of_the_joint():
    """Centre and scale of every layer, the top included, to the error of two thousand pilots."""
    guide = small(layered())
    objective = started(guide)
    z, x = guide.latents.joint(N, seed=3)
    activity = objective.activity(split(guide.latents, x, guide.codes.encode(z)))
    assert activity.shape == (N, 10)
    within(activity.mean(0), 0.0, activity.std(0) * (1 / N + 1.6 / 2048) ** 0.5)
    assert (activity.std(0) - 1).abs().max() < 0.15


# ----------------------------------------------------------------- pairs tell what layers do not


class Shuffled(Planted):
    """The exact marginals of each layer given x, independent of one another."""

    def distribution(self, x):
        p = self.truth.distribution(x)
        covariance = p.covariance_matrix.expand(len(x), -1, -1).clone()
        covariance[:, :2, 2:], covariance[:, 2:, :2] = 0.0, 0.0
        return MultivariateNormal(p.loc, covariance)


def alone(lower, upper):
    """Each layer by itself, beside zeros: the critics of the secondary account."""
    return [(torch.zeros_like(t[..., :1]), t) for t in lower]


def told(guide):
    """How well trained critics order fresh draws: mean accuracy and its standard error."""
    objective = Oscillating(hidden=(32,), critic_steps=1, critic_rate=1.0, penalty=0.0, warm_up=0.0)
    fit(guide.model, guide, objective=objective, steps=120, batch_size=256, lr=2e-2, progress=False)
    with torch.no_grad(), seeded(8):
        _, x = guide.latents.joint(4000, seed=7)
        found = [ordered(*objective.scores(guide, rows, None)) for rows in x.split(100)]
    return np.mean(found), np.std(found, ddof=1) / len(found) ** 0.5


def test_pairs_detect_a_wrong_joint_with_right_marginals(monkeypatch):
    """T10: critics of pairs see it, those of one layer each do not; the right joint passes."""
    model = zoo.LayeredGaussian(noise=2.0)
    mean, se = told(Shuffled(model).requires_grad_(False))
    assert mean > 0.6 + 5 * se
    mean, se = told(model.exact())
    within(mean, 0.5, se)
    monkeypatch.setattr(oscillating, "views", alone)
    mean, se = told(Shuffled(model).requires_grad_(False))
    within(mean, 0.5, se)
