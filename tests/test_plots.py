"""Pictures of models: something is drawn for every kind of latent and observation; about 10 s."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

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


def test_guide_and_problem_are_chosen():
    model = zoo.Banana()
    assert plots.model(model, zoo.Quadrature(model), problem=2, draws=100).axes
    with pytest.raises(BadInput, match="problem: expected 0 to 99; got 100"):
        plots.model(model, problem=100)
