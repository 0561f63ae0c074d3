"""Gauges of a game: what they measure, on guides whose answer is known, and what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import within
from test_games import Planted, small
from torch import nn

import zoo
from inference import Adversarial, EnergyScore, Fit, FitWarning, fit
from inference.codes import Codes
from inference.gauges import dispersion, ordered, pooled, said

pytestmark = pytest.mark.usefixtures("same_noise")


@pytest.fixture(scope="module")
def precise():
    return zoo.FactorAnalysis(7, 3, seed=1).double()


# --------------------------------------------------------------------------------------- accuracy


def test_order_is_the_share_of_pairs_with_ties_halved():
    wake, sleep = torch.randint(0, 4, (9,)).float(), torch.randint(0, 4, (7,)).float()
    by_hand = np.mean([(a > b) + 0.5 * (a == b) for a in wake.tolist() for b in sleep.tolist()])
    assert ordered(wake, sleep) == pytest.approx(by_hand)
    assert ordered(sleep, wake) == pytest.approx(1 - by_hand)
    assert ordered(wake + 10, sleep) == 1.0
    assert ordered(wake - 10, sleep) == 0.0
    assert ordered(wake, wake) == pytest.approx(0.5)


def test_parts_are_compared_with_their_own_kind():
    """Scores (B, parts): the second part is far above the first, in wake as in sleep."""
    wake, sleep = torch.randn(400, 2) + torch.tensor([0.0, 50.0]), torch.randn(400, 2)
    sleep = sleep + torch.tensor([0.0, 50.0])
    by_hand = (ordered(wake[:, 0], sleep[:, 0]) + ordered(wake[:, 1], sleep[:, 1])) / 2
    assert ordered(wake, sleep) == pytest.approx(by_hand, abs=1e-6)
    assert abs(ordered(wake, sleep) - 0.5) < 5 * (1 / 12 / 400) ** 0.5


def test_the_order_of_two_normals_is_known():
    """P(a > b) = Phi(d / 2^.5) for a ~ Normal(d, 1), b ~ Normal(0, 1)."""
    found = [ordered(torch.randn(200) + 0.7, torch.randn(200)) for _ in range(30)]
    truth = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.7 / 2**0.5))
    within(np.mean(found), truth, np.std(found, ddof=1) / 30**0.5)


# ------------------------------------------------------------------------------------- dispersion


def measured(guide, batches=30, size=1000):
    """Mean dispersion over fresh batches, and its standard error."""
    z, x = guide.latents.joint(batches * size, seed=4)
    rows = [slice(k * size, (k + 1) * size) for k in range(batches)]
    found = [dispersion(guide, x[r], {n: v[r] for n, v in z.items()}) for r in rows]
    return np.mean(found), np.std(found, ddof=1) / batches**0.5


@pytest.mark.parametrize("factor", [1.0, 0.3, 0.1, 2.0])
def test_dispersion_is_the_factor_of_the_sd(factor):
    """One latent, for the smallest of many is smaller than each on average."""
    guide = Planted(zoo.ExplainingAway(1, noise=0.5).double(), scale=factor)
    mean, se = measured(guide)
    within(mean, factor, se)
    with pytest.raises(AssertionError, match="standard errors"):
        within(mean, 1.15 * factor, se)


def test_dispersion_is_that_of_the_most_certain_latent(precise):
    mean, se = measured(Planted(precise, scale=[1.0, 0.3, 1.0]))
    within(mean, 0.3, se)


def test_a_wrong_centre_counts_as_too_little_spread():
    """Moved by two sds, the error is 5^.5 sds."""
    mean, se = measured(Planted(zoo.ExplainingAway(1, noise=0.5).double(), shift=2.0))
    within(mean, 5**-0.5, se)


def test_far_too_much_spread_is_not_taken_for_collapse():
    """The error of the mean draw, less what its noise explains, can come out below zero."""
    guide = Planted(zoo.ExplainingAway(1, noise=0.05).double(), scale=500.0)
    z, x = guide.latents.joint(8 * 50, seed=4)
    for k in range(50):
        rows = slice(8 * k, 8 * k + 8)
        assert dispersion(guide, x[rows], {"z": z["z"][rows]}) > 1


class Fixed(nn.Module):
    """Draws that are given."""

    def __init__(self, latents, codes):
        super().__init__()
        self.latents, self.codes = latents, codes

    def rsample(self, x, shape):
        return self.codes(len(x), shape)


def test_discrete_latents_are_pooled():
    """Draws from the prior are calibrated; certain ones are not, though they be likely."""
    model = zoo.NoisyOr(3, 2, prior=(0.2, 0.5, 0.02)).double()
    lat = small(model).latents
    chance = model.prior

    def prior(b, shape):
        return torch.bernoulli(chance.expand(*shape, b, 3))

    def certain(b, shape):
        return (chance > 0.4).double().expand(*shape, b, 3)

    mean, se = measured(Fixed(lat, prior))
    within(mean, 1.0, se)
    assert measured(Fixed(lat, certain))[0] == 0.0
    mask = Codes(lat, "test").discrete
    assert torch.equal(pooled(torch.tensor([1.0, 2.0, 3.0]), mask), torch.tensor([6.0]))
    few = torch.tensor([True, False, True])
    assert torch.equal(pooled(torch.tensor([1.0, 2.0, 3.0]), few), torch.tensor([2.0, 4.0]))
    assert torch.equal(pooled(torch.tensor([1.0, 2.0]), few[:2] & False), torch.tensor([1.0, 2.0]))


# --------------------------------------------------------------------------------- what they say


def health(**gauges):
    return {n: np.array(v, np.float32) for n, v in gauges.items()}


def test_what_is_said():
    assert said({}) == []
    assert said(health(step=[], dispersion=[])) == []
    assert said(health(step=[50], dispersion=[0.9], accuracy=[0.6])) == []
    (collapsed,) = said(health(dispersion=[0.01]))
    assert collapsed.startswith("the guide has collapsed: the spread of its draws is 0.01")
    (won,) = said(health(accuracy=[1.0]))
    assert won.startswith("the critic has won: it tells 100% of draws")
    assert len(said(health(dispersion=[0.01], accuracy=[1.0]))) == 2


def test_sentences_rest_on_the_latest_looks():
    early = [0.01] * 10 + [0.9] * 5
    assert said(health(dispersion=early)) == []
    assert len(said(health(dispersion=early[::-1]))) == 1
    assert said(health(accuracy=[1.0] * 10 + [0.6] * 5)) == []


def played(guide, objective, steps=60):
    return fit(guide.model, guide, objective=objective, steps=steps, batch_size=64, progress=False)


def test_a_guide_without_noise_is_said_to_have_collapsed(tmp_path):
    guide = small(zoo.ExplainingAway(2, noise=0.5))
    with torch.no_grad():
        guide.noise.zero_()
    guide.noise.requires_grad_(False)
    with pytest.warns(
        FitWarning, match=r"^RecurrentRecognition: the guide has collapsed: .* is 0 "
    ):
        run = played(guide, EnergyScore())
    assert len(run.warnings) == 1
    assert run.warnings[0].startswith("the guide has collapsed")
    assert (run.health["dispersion"] == 0).all()
    run.save(tmp_path / "fit")
    again = Fit.load(tmp_path / "fit", small(zoo.ExplainingAway(2, noise=0.5)))
    assert again.warnings == run.warnings


def test_a_healthy_guide_is_not():
    """Warnings are errors in these tests."""
    run = played(small(zoo.ExplainingAway(2, noise=0.5)), EnergyScore(), steps=150)
    assert run.warnings == []
    assert run.health["dispersion"][-1] > 0.3
    assert played(Planted(zoo.ExplainingAway(2)), Adversarial(hidden=(8,))).warnings == []


def test_a_critic_that_has_won_is_reported():
    guide = Planted(zoo.ExplainingAway(2), shift=6.0).requires_grad_(False)
    with pytest.warns(FitWarning, match="^Planted: the critic has won: it tells (99|100)% of"):
        run = played(guide, Adversarial(hidden=(16,), warm_up=0.0))
    assert run.health["accuracy"][-1] > 0.98
    assert set(run.losses) == {"critic"}  # the guide has nothing to learn
