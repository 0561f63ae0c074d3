"""What a user sees of tables, models, guides and fits: as text, in notebooks, by the tab key."""

import copy
import pickle

import numpy as np
import pytest
import torch

import diagnostics
import inference
import zoo
from inference.errors import BadInput, UnknownName
from inference.fit import Fit
from inference.show import columns, curve
from zoo.data import DATA

TABLES = {
    "models": zoo.MODELS,
    "guides": inference.GUIDES,
    "objectives": inference.OBJECTIVES,
    "metrics": diagnostics.METRICS,
    "data": DATA,
}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


@each_table
def test_tables_complete_names(table):
    assert set(table) <= set(dir(table))
    for name, entry in table.items():
        assert getattr(table, name) is entry
        assert table[name] is entry


@each_table
def test_tables_say_what_each_entry_is(table):
    shown = repr(table).splitlines()
    assert len(shown) == len(table)
    assert all(what.strip() for _, what in table.rows())
    html = table._repr_html_()
    assert html.count("<tr>") == len(table)


@each_table
def test_unknown_names_are_a_key_error_that_suggests(table):
    first = next(iter(table))
    wrong = first[:-1]
    assert wrong not in table
    assert table.get(wrong) is None
    with pytest.raises(KeyError):
        table[wrong]
    with pytest.raises(BadInput, match=r"Did you mean .*\? Expected one of ") as raised:
        table[wrong]
    assert isinstance(raised.value, UnknownName)
    with pytest.raises(AttributeError, match="Did you mean"):
        getattr(table, wrong)
    assert not hasattr(table, "_repr_mimebundle_")  # a notebook asks


def test_names_that_are_methods_of_dict_are_still_entries():
    """No table may hide an entry behind a method: items, copy, ..."""
    for table in TABLES.values():
        assert not set(table) & set(dir(dict))


def test_tables_copy_and_pickle():
    table = inference.Table("colour", {"red": 1}, say=str)
    assert copy.deepcopy(table) == {"red": 1}
    assert pickle.loads(pickle.dumps(table)) == {"red": 1}
    table["blue"] = 2  # a user's own entry
    assert table.blue == 2
    assert repr(table) == "red   1\nblue  2"


def test_a_guide_says_its_model_and_knobs():
    model = zoo.Banana()
    guide = inference.Flow(model, transforms=2)
    assert "banana, transforms=2, hidden=(64, 64)" in repr(guide)
    html = guide._repr_html_()
    for part in (
        "Flow",
        "z: 2 real",
        "ForwardKL",
        f"{sum(p.numel() for p in guide.parameters()):,}",
    ):
        assert part in html
    assert "can only be sampled" in inference.ReservoirSampler(model)._repr_html_()
    assert "any x" in html
    assert "the x it was fitted to" in inference.AutoNormal(model)._repr_html_()


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_model_says_its_latents_and_observations(name):
    model = zoo.MODELS[name]()
    assert model.extra_repr() in repr(model)
    assert ": " in model.extra_repr()
    assert "x: (" in model.extra_repr()
    html = model._repr_html_()
    assert model.title in html
    assert str(model.paper.year) in html


def test_a_users_program_has_its_own_name(two_normals):
    assert repr(two_normals).startswith("two_normals(z: 1 real")


@pytest.fixture
def two_normals():
    import pyro
    import pyro.distributions as dist

    def two_normals(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return zoo.from_pyro(two_normals, torch.tensor([0.3, 1.2]))


def test_objectives_show_their_knobs():
    assert repr(inference.EnergyScore(draws=6)) == "EnergyScore(draws=6, averaging=0.99)"


def test_a_fit_shows_how_it_ended():
    model = zoo.Banana()
    run = inference.fit(model, inference.MeanFieldEncoder(model), steps=40, seed=0, progress=False)
    text = repr(run)
    for part in ("MeanFieldEncoder", "ELBO", "steps: 40 in", "guide "):
        assert part in text
    assert len(text) < 300
    last = float(np.mean(run.losses["guide"][-4:]))
    assert f"guide {last:.4g}" in text
    assert "<svg" in run._repr_html_()
    exact = inference.fit(model, model.exact(), seed=0)
    assert "objective: ELBO" in repr(exact)
    nothing = inference.NUTS(model)
    assert "objective: none" in repr(inference.fit(model, nothing, seed=0))
    assert "steps: 0" in repr(exact)
    assert "<svg" not in exact._repr_html_()


def test_html_is_escaped():
    run = Fit(torch.nn.Identity(), {}, 0.0, {"objective": "<b>&"})
    assert "&lt;b&gt;&amp;" in run._repr_html_()


def test_curves_span_their_box():
    points = curve([3.0, 2.0, 1.0, 1.0], width=30, height=10).split("points='")[1].split("'")[0]
    pairs = [tuple(map(float, p.split(","))) for p in points.split()]
    assert pairs[0] == (0.0, 0.0)
    assert pairs[-1] == (30.0, 10.0)
    assert curve([1.0]) == ""
    assert columns([]) == ""


def test_pictures_show_themselves_in_notebooks():
    model = zoo.Banana()
    tree = diagnostics.draw(model, model.exact(), model.observations()[:1], draws=50, seed=0)
    for figure in (
        diagnostics.plots.marginals({"exact": tree}),
        diagnostics.plots.forest({"exact": tree}),
    ):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_scatter_shows_two_latents_of_each_guide():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = model.observations()[:2]
    tree = diagnostics.draw(model, model.exact(), x, draws=50, chains=2, seed=0)
    moved = tree.copy(deep=True)
    moved["posterior"]["z"].values[:] += 5.0
    figure = diagnostics.plots.scatter({"exact": tree, "flow": moved}, problem=1, latents=(2, 0))
    for ax, one in zip(figure.axes, (tree, moved), strict=True):
        z = one.posterior.z.sel(problem=1).values.reshape(-1, 3)
        dots = ax.collections[0].get_offsets()
        np.testing.assert_allclose(np.sort(dots, 0), np.sort(z[:, [2, 0]], 0), rtol=1e-6)
        assert ax.get_xlabel() == "z[2]"
    for wrong in ((0, 0), (0, 3), (-1, 0)):
        with pytest.raises(BadInput, match="two of the 3 latents"):
            diagnostics.plots.scatter({"exact": tree}, latents=wrong)
