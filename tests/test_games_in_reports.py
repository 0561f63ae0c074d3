"""What a report shows of games: oscillations, dreams, the losses of all players."""

from __future__ import annotations

import numpy as np
import pytest

import diagnostics
import inference
import zoo
from diagnostics import plots

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("problems", [4, 6])
@pytest.mark.parametrize("game", [inference.Oscillating, inference.Adversarial])
def test_watching_adds_oscillations_where_the_game_has_them(game, problems):
    """And where there are problems enough for a correlation."""
    model = zoo.LayeredGaussian()
    x, guide = model.observations()[:problems], inference.NoiseMLP(model, hidden=(8,))
    trees = diagnostics.collect(model, {"circuit": guide}, x, draws=40, chains=1, seed=0)
    played = game(hidden=(4,))
    played.players(guide)
    tree = trees["circuit"]
    diagnostics.watch(tree, guide, x, reference=trees["exact"], seed=0, objective=played)
    assert ("oscillation" in tree.children) == (game is inference.Oscillating and problems == 6)
    if "oscillation" in tree.children:
        surprise = -model.exact().log_evidence(x).detach()
        np.testing.assert_allclose(tree["oscillation"]["surprise"], surprise, rtol=1e-5)


def test_dreams_are_what_the_model_shows_of_its_own_latents():
    model = zoo.LayeredGaussian()
    tree = diagnostics.draw(model, model.exact(), model.observations()[:2], draws=5, seed=0)
    diagnostics.dream(model, tree, n=3, seed=1)
    z, _ = model.simulate(3, seed=1)
    np.testing.assert_array_equal(tree["dreams"]["mean"], model.predict(z).detach())


def test_all_players_are_inside_the_picture_of_losses():
    losses = {"fit": {"critic": np.linspace(4.3, 4.1, 100), "guide": np.linspace(2.0, 0.1, 100)}}
    low, high = plots.losses(losses).axes[0].get_ylim()
    assert low < 0.15
    assert high > 4.25
