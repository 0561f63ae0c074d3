"""Oscillating circuits: what alternates, how strongly, and whether surprise shows; about 15 s."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import within
from matplotlib.colors import to_hex
from torch import nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import softplus

import diagnostics
import inference
import zoo
from diagnostics import plot_signatures
from diagnostics.oscillations import ALTERNATION, oscillations
from inference import BadInput, Incompatible

pytestmark = pytest.mark.usefixtures("one_thread")

CYCLES = 32
SHARE = 3.5 / CYCLES  # of white noise that is in the band: three frequencies of 32 and the half one
EVOKED, DREAMT = slice(0, None, 2), slice(1, None, 2)


class Blind(inference.PackedGuide):
    """The prior, whatever x."""

    def distribution(self, x):
        size = self.latents.size
        return MultivariateNormal(x.new_zeros(len(x), size), torch.eye(size).to(x))


class Neuron(nn.Module):
    """The network of a critic that looks at one of its inputs."""

    def forward(self, inputs):
        return inputs[..., :1]


def played(guide):
    """A game with critics that have learned nothing."""
    game = inference.Oscillating(hidden=(8,))
    game.players(guide)
    return game


def amplitude(tree, quantity="potentials"):
    return diagnostics.oscillation_amplitude(tree, band=ALTERNATION, quantity=quantity)


def surprise(model, x):
    return -model.exact().log_evidence(x).detach().numpy()


@pytest.fixture(scope="module")
def additive():
    return zoo.ExplainingAway(3, noise=0.5).double()


@pytest.fixture(scope="module")
def layered():
    return zoo.LayeredGaussian().double()


def scales(game, *sizes):
    """What one unit of a potential is worth near zero, neuron by neuron, (sum of sizes,)."""
    low, high = ([torch.full((1, n), h).double() for n in sizes] for h in (-1e-4, 1e-4))
    return 2e-4 / (game.activity(high) - game.activity(low))[0]


def expected(model, game, x):
    """Squared amplitude 2 (gap / 2)^2 + 2 v share of each neuron (4, B), by hand.

    The gap is that of the means of evoked and dreamt states, v the mean of their variances. The
    first neuron is x, whose evoked state is given, and z are drawn afresh in either state.
    """
    d, s2 = 3, float(model.scale) ** 2
    total, around = x[:, 0] * d / (d + s2), d * s2 / (d + s2)  # of the sum of z given x
    gaps = torch.stack([x[:, 0] - total, *[total / d] * 3])
    variances = torch.tensor([around + s2, *[2 - 1 / (d + s2)] * 3])[:, None] / 2
    squares = gaps.square() / 2 + 2 * SHARE * variances
    return squares / scales(game, 1, d)[:, None].square()


def test_amplitude_of_the_exact_posterior_is_that_of_its_moments(additive):
    """In closed form, for three x off centre; that potentials are bounded costs one percent."""
    guide = additive.exact()
    game = played(guide)
    x = torch.tensor([[0.3], [-1.5], [2.6]], dtype=torch.float64)
    found = amplitude(oscillations(game, guide, x, cycles=CYCLES, trials=12, seed=0))
    truth = expected(additive, game, x)
    within(found["value"], truth.mean(0).sqrt(), found["se"])
    wrong = truth - expected(additive, game, 0 * x)  # without the noise: that error is seen
    assert (np.abs(found["value"] - wrong.mean(0).sqrt().numpy()) > 5 * found["se"]).all()


def test_states_alternate_and_have_names(layered):
    guide = inference.RecurrentRecognition(layered, neurons=12, steps=2)
    game = played(guide)
    x = layered.observations()[:3]
    seen = oscillations(game, guide, x, cycles=4, trials=2, seed=1)["circuit"].dataset
    assert dict(seen.sizes) == {"chain": 2, "draw": 8, "problem": 3, "neuron": 10, "critic": 3}
    assert seen.neuron.values[[0, 5, 8]].tolist() == ["x[0]", "z1[0]", "z2[0]"]
    assert seen.critic.values.tolist() == ["x | z1", "z1 | z2", "z2"]
    assert seen.state.values.tolist() == ["evoked", "dreamt"] * 4
    shown = seen.potentials[..., :5].values
    standard = game.members[0].standardise(x).numpy()
    np.testing.assert_allclose(shown[:, EVOKED], np.broadcast_to(standard, (2, 4, 3, 5)))
    assert np.abs(shown[:, DREAMT] - standard).min() > 0


def test_a_critic_that_sees_one_neuron_fires_as_that_neuron_does(layered):
    guide = layered.exact()
    game = played(guide)
    for critic in game.members:
        critic.net = Neuron()
    tree = oscillations(game, guide, layered.observations()[:4], cycles=3, trials=2, seed=1)
    seen = tree["circuit"].dataset
    for critic, neuron in (("x | z1", "x[0]"), ("z1 | z2", "z1[0]")):
        potential = torch.as_tensor(seen.potentials.sel(neuron=neuron).values)
        np.testing.assert_allclose(seen.rates.sel(critic=critic), softplus(potential))


def test_a_seed_is_all_the_randomness(layered):
    guide = layered.exact()
    game = played(guide)
    x = layered.observations()[:2]
    one, same, other = (
        oscillations(game, guide, x, cycles=2, trials=2, seed=s)["circuit"] for s in (3, 3, 4)
    )
    assert one.identical(same)
    assert not one.equals(other)


def test_amplitude_grows_with_surprise(layered):
    """And not with another problem's surprise."""
    guide = layered.exact()
    x = layered.simulate(60, seed=2)[1]
    tree = oscillations(played(guide), guide, x, trials=8, seed=0)
    s = surprise(layered, x)
    knobs = {"seed": 0, "band": ALTERNATION}
    assert diagnostics.oscillation_against_surprise(tree, s, **knobs).low > 0.3
    shuffled = diagnostics.oscillation_against_surprise(tree, np.roll(s, 17), **knobs)
    within(shuffled.value, 0.0, shuffled.se)


def test_latents_of_a_guide_that_ignores_x_do_not_oscillate_with_it(additive):
    """Their amplitude is that of white noise, however far x is."""
    x = torch.tensor([[0.0], [1.0], [12.0]], dtype=torch.float64)
    found = []
    for guide in (Blind(additive), additive.exact()):
        game = played(guide)
        tree = oscillations(game, guide, x, cycles=CYCLES, trials=12, seed=0)
        latents = tree.isel(neuron=slice(1, None))
        found.append(amplitude(latents))
    blind, exact = found
    noise = (2 * SHARE / scales(game, 1, 3)[1:].square()).mean().sqrt()
    within(blind["value"], noise, blind["se"])
    assert exact["value"][2] - blind["value"][2] > 5 * exact["se"][2]


def test_amplitude_is_larger_out_of_distribution(layered):
    guide = layered.exact()
    x = layered.simulate(40, seed=2)[1]
    both = torch.cat([x, x + 2 * x.std(0)])
    value = amplitude(oscillations(played(guide), guide, both, trials=8, seed=0))["value"].values
    more = value[40:] - value[:40]
    assert more.mean() > 5 * more.std(ddof=1) / np.sqrt(40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_that_of_the_model(dtype):
    model = zoo.LayeredGaussian().to(dtype)
    guide = inference.RecurrentRecognition(model, neurons=12, steps=2)
    tree = oscillations(played(guide), guide, model.observations()[:2], cycles=2, trials=1, seed=0)
    assert {str(v.dtype) for v in tree["circuit"].dataset.data_vars.values()} == {str(dtype)[6:]}


def test_what_cannot_be_watched_is_refused(additive, layered):
    guide, x = layered.exact(), layered.observations()[:2]
    with pytest.raises(BadInput, match="played"):
        oscillations(inference.Oscillating(), guide, x, seed=0)
    with pytest.raises(Incompatible, match="layers"):
        oscillations(played(additive.exact()), guide, x, seed=0)
    with pytest.raises(BadInput, match="cycles"):
        oscillations(played(guide), guide, x, cycles=0, seed=0)
    with pytest.raises(BadInput, match="shape"):
        oscillations(played(guide), guide, x[:, :2], seed=0)


# pictures


def measured(layered):
    guide, x = layered.exact(), layered.observations()[:6]
    tree = oscillations(played(guide), guide, x, cycles=10, trials=2, seed=0)
    s = surprise(layered, x)
    return diagnostics.oscillation_against_surprise(tree, s, seed=0, band=ALTERNATION)


def test_groups_have_colours_and_a_legend(layered):
    found = measured(layered)
    (ax,) = plot_signatures.oscillation_against_surprise(found, group=["in", "out"] * 3).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["in", "out"]
    lines = [bars.lines[0] for bars in ax.containers]
    np.testing.assert_array_equal(lines[1].get_xdata(), found.surprise.values[1::2])
    assert len({to_hex(line.get_color()) for line in lines}) == 2
    (plain,) = plot_signatures.oscillation_against_surprise(found).axes
    assert plain.get_legend() is None
    np.testing.assert_array_equal(plain.containers[0].lines[0].get_ydata(), found.amplitude.values)


@pytest.mark.parametrize("group", [["in"] * 5, [str(k) for k in range(6)] + ["more"], "in"])
def test_groups_that_do_not_fit_are_refused(layered, group):
    with pytest.raises(BadInput, match="group"):
        plot_signatures.oscillation_against_surprise(measured(layered), group=group)
