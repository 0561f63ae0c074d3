"""Pictures of models: something is drawn for every kind of latent and observation; about 10 s."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

import inference
import zoo
from diagnostics import plots
from inference.errors import BadInput


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.mark.parametrize("name", list(zoo.MODELS))
def test_every_model_has_a_picture(name):
    figure = plots.model(zoo.MODELS[name](), draws=200)
    assert isinstance(figure, Figure)
    first, *others = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    assert others
    for ax in (first, *others):
        assert ax.has_data()
    figure.canvas.draw()


def test_model_without_exact_posterior_shows_its_prior():
    figure = plots.model(zoo.BayesianMLP(), draws=50)
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["prior"]


def metres_and_volts(x):
    """Two latents in units of their own."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 100.0))
        b = pyro.sample("b", dist.Normal(x.new_tensor(0.0), 0.1))
        pyro.sample("x", dist.Normal(a * b, 1.0), obs=x)


def test_axes_are_equal_within_a_site_alone():
    other = zoo.from_pyro(metres_and_volts, torch.tensor([0.5, 1.0]))
    aspects = [plots.model(m, draws=50).axes[1].get_aspect() for m in (zoo.TwoMoons(), other)]
    assert aspects == [1.0, "auto"]


def lightness(colour):
    """CIELAB of a colour, (L, a, b)."""
    c = np.array(to_rgb(colour))
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    f = np.cbrt(to_xyz @ c / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(inks):
    """Smallest distance of two of them."""
    return min(np.linalg.norm(lightness(a) - lightness(b)) for a, b in combinations(inks, 2))


def test_guides_that_stand_together_in_the_table_have_unlike_colours():
    inks = [plots.colour(name) for name in inference.GUIDES]
    assert min(apart(inks[k : k + 13]) for k in range(len(inks) - 12)) > 25
    assert apart(["#CC6677", "#CC79A7"]) < 25  # as those of two Poisson circuits once were


def test_guide_and_problem_are_chosen():
    model = zoo.Banana()
    assert plots.model(model, zoo.Quadrature(model), problem=2, draws=100).axes
    with pytest.raises(BadInput, match="problem: expected 0 to 99; got 100"):
        plots.model(model, problem=100)
