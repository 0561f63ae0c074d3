"""Draws as ArviZ DataTrees: groups, names, numbers, files, and ArviZ itself."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from conftest import within
from pyro.nn import PyroModule

import diagnostics
import inference
import zoo
from inference.errors import BadInput
from inference.guide import Guide

SIZES = {"draws": 30, "chains": 2, "seed": 3}


@pytest.fixture(scope="module")
def x(model):
    return model.observations()[:4]


@pytest.fixture(scope="module")
def tree(model, x):
    knobs = {"prior": True, "posterior_predictive": True}
    return diagnostics.draw(model, model.exact(), x, **SIZES, **knobs)


def test_groups_dims_and_names(tree):
    assert set(tree.children) == {
        "posterior",
        "sample_stats",
        "observed_data",
        "evidence",
        "prior",
        "prior_predictive",
        "posterior_predictive",
    }
    dims = {g: {n: v.dims for n, v in tree[g].data_vars.items()} for g in tree.children}
    sample = ("chain", "draw")
    assert dims == {
        "posterior": {"z": (*sample, "problem", "factor")},
        "sample_stats": dict.fromkeys(("log_q", "log_p_joint", "log_weight"), (*sample, "problem")),
        "observed_data": {"x": ("problem", "pixel")},
        "evidence": {"log_evidence": ("problem",)},
        "prior": {"z": (*sample, "factor")},
        "prior_predictive": {"x": (*sample, "pixel")},
        "posterior_predictive": {"x": (*sample, "problem", "pixel")},
    }
    sizes = {"chain": 2, "draw": 30, "problem": 4, "factor": 3}
    assert dict(tree["posterior"].sizes) == sizes
    assert dict(tree["prior"].sizes) == {"chain": 1, "draw": 60, "factor": 3}
    assert tree["posterior"].coords["problem"].values.tolist() == [0, 1, 2, 3]


def test_attributes(model, tree):
    attrs = tree.attrs
    assert (attrs["model"], attrs["guide"]) == ("factor analysis", "LinearGaussianPosterior")
    assert (attrs["seed"], attrs["independent_draws"]) == (3, 1)
    assert 0 <= attrs["seconds"] < 60
    assert {f"version_{n}" for n in ("torch", "pyro-ppl", "numpy", "neuroguide")} <= set(attrs)


def test_groups_on_request_only(model, x):
    found = diagnostics.draw(model, model.exact(), x, **SIZES)
    assert set(found.children) == {"posterior", "sample_stats", "observed_data", "evidence"}


def test_draws_depend_on_the_seed_alone(model, x, tree):
    again = diagnostics.draw(model, model.exact(), x, **SIZES)
    np.testing.assert_array_equal(again["posterior"]["z"], tree["posterior"]["z"])
    other = diagnostics.draw(model, model.exact(), x, **(SIZES | {"seed": 4}))
    assert not np.array_equal(other["posterior"]["z"], tree["posterior"]["z"])


def test_numbers_are_those_of_guide_and_model(model, x, tree):
    stats, z = tree["sample_stats"], torch.as_tensor(tree["posterior"]["z"].values)
    np.testing.assert_array_equal(tree["observed_data"]["x"], x)
    exact = model.exact()
    with torch.no_grad():
        log_q, log_p = exact.log_prob({"z": z}, x), exact.latents.log_joint({"z": z}, x)
        evidence = exact.log_evidence(x)
    np.testing.assert_allclose(stats["log_q"], log_q, rtol=1e-4)
    np.testing.assert_allclose(stats["log_p_joint"], log_p, rtol=1e-5)
    np.testing.assert_array_equal(stats["log_weight"], stats["log_p_joint"] - stats["log_q"])
    np.testing.assert_allclose(tree["evidence"]["log_evidence"], evidence, rtol=1e-6)


def test_weights_of_the_exact_guide_are_the_evidence():
    model = zoo.FactorAnalysis(7, 3, seed=1).double()
    found = diagnostics.draw(model, model.exact(), model.observations()[:3], **SIZES)
    evidence = found["evidence"]["log_evidence"].values
    weights = found["sample_stats"]["log_weight"].values
    np.testing.assert_allclose(weights, np.broadcast_to(evidence, weights.shape), rtol=1e-11)


def test_replicas_have_the_predictive_moments(model, x):
    n = 2000
    knobs = {"prior": True, "posterior_predictive": True, "draws": n, "chains": 1, "seed": 5}
    found = diagnostics.draw(model, model.exact(), x, **knobs)
    with torch.no_grad():
        w, mean, sd = model.loadings.numpy(), model.mean.numpy(), model.noise.numpy()
        q = model.exact().distribution(x)
        location, inner = q.mean.numpy(), q.covariance_matrix[0].numpy()
    prior = found["prior_predictive"]["x"].values[0]
    variance = (w**2).sum(1) + sd**2
    within(prior.mean(0), mean, np.sqrt(variance / n))
    within(prior.var(0), variance, variance * np.sqrt(2 / n))
    z = found["prior"]["z"].values[0]
    within((z[:, :, None] * (prior - mean)[:, None]).mean(0), w.T, 2 * np.sqrt(variance / n))
    posterior = found["posterior_predictive"]["x"].values[0]
    variance = np.einsum("fd,de,fe->f", w, inner, w) + sd**2
    within(posterior.mean(0), location @ w.T + mean, np.sqrt(variance / n))
    within(posterior.var(0), np.broadcast_to(variance, (4, 7)), variance * np.sqrt(2 / n))


def test_packed_keeps_problems_chains_and_latents_in_order(tree):
    z = diagnostics.packed(tree)
    assert z.shape == (4, 60, 3)
    np.testing.assert_array_equal(z[2, 30 + 7], tree["posterior"]["z"].values[1, 7, 2])
    assert diagnostics.packed(tree, "posterior_predictive").shape == (4, 60, 7)


# other kinds of model


def regression(inputs, targets):
    w = pyro.sample("w", dist.Normal(inputs.new_zeros(2), 1.0).to_event(1))
    c = pyro.sample("c", dist.Normal(inputs.new_tensor(0.5), 2.0))
    with pyro.plate("rows", len(inputs)):
        pyro.sample("y", dist.Normal(inputs @ w + c, 0.7), obs=targets)


@pytest.mark.filterwarnings("ignore::inference.errors.ExactWarning")  # seven points an axis
def test_one_problem_with_inputs():
    inputs = torch.linspace(-1, 2, 12).reshape(6, 2).sin().double()
    x = (inputs, torch.linspace(0, 1, 6).double())
    model = zoo.from_pyro(regression, x, title="line", dims={"w": ["slope"]})
    guide = zoo.Quadrature(model, points=7, bounds=[(-2, 2), (-2, 2), (-1, 2)])
    found = diagnostics.draw(model, guide, x, **SIZES, prior=True, posterior_predictive=True)
    assert found.attrs["model"] == "line"
    assert dict(found["posterior"].sizes) == {"chain": 2, "draw": 30, "problem": 1, "slope": 2}
    assert found["posterior"]["c"].dims == ("chain", "draw", "problem")
    np.testing.assert_array_equal(found["observed_data"]["y"], x[1])
    np.testing.assert_array_equal(found["constant_data"]["input_0"], inputs)
    assert found["posterior_predictive"]["y"].shape == (2, 30, 6)
    assert found["prior_predictive"]["y"].shape == (1, 60, 6)
    assert found["evidence"]["log_evidence"].shape == (1,)
    assert diagnostics.packed(found).shape == (1, 60, 3)


def spikes(x):
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Bernoulli(x.new_tensor([0.2, 0.6])).to_event(1))
        k = pyro.sample("k", dist.Poisson(x.new_tensor(2.0)))
        pyro.sample("x", dist.Normal(s.sum(-1) + k, 0.5), obs=x)


def test_discrete_latents():
    x = torch.tensor([0.4, 3.0, 1.8])
    model = zoo.from_pyro(spikes, x)
    guide = zoo.Enumerated(model, bound=15)
    found = diagnostics.draw(model, guide, x, **SIZES, prior=True, posterior_predictive=True)
    s, k = found["posterior"]["s"].values, found["posterior"]["k"].values
    assert (s.shape, k.shape) == ((2, 30, 3, 2), (2, 30, 3))
    assert set(np.unique(s)) == {0, 1}
    assert set(np.unique(k)) <= set(range(16))
    weights = found["sample_stats"]["log_weight"].values
    evidence = found["evidence"]["log_evidence"].values
    np.testing.assert_allclose(weights, np.broadcast_to(evidence, weights.shape), rtol=1e-4)
    assert diagnostics.packed(found).shape == (3, 60, 3)


def test_guides_without_density_have_no_log_q(model, x):
    nuts = inference.NUTS(model, warmup=20)
    found = diagnostics.draw(model, nuts, x[:2], draws=15, chains=2, seed=0)
    assert set(found["sample_stats"].data_vars) == {"log_p_joint"}
    assert set(found.children) == {"posterior", "sample_stats", "observed_data"}
    assert found.attrs["independent_draws"] == 0
    assert np.isfinite(found["sample_stats"]["log_p_joint"]).all()


def test_refusals(model, x):
    for wrong in ({"draws": 0}, {"chains": 0}, {"draws": 2.5}, {"seed": -1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            diagnostics.draw(model, model.exact(), x, **(SIZES | wrong))
    with pytest.raises(BadInput, match="shape"):
        diagnostics.draw(model, model.exact(), x[:, :5], **SIZES)

    class Silent(Guide):
        def forward(self, x):
            return {}

    with pytest.raises(BadInput, match=r"none for \['z'\]"):
        diagnostics.draw(model, Silent(model), x, **SIZES)


class Wide(PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ z.new_ones(2, 3), 1.0).to_event(1), obs=x)


def test_axes_without_names_get_arviz_names():
    x = torch.zeros(2, 3)
    model = zoo.from_pyro(Wide().forward, x)
    found = diagnostics.draw(model, zoo.Quadrature(model, points=17), x, **SIZES)
    assert found["posterior"]["z"].dims == ("chain", "draw", "problem", "z_dim_0")
    assert found["observed_data"]["x"].dims == ("problem", "x_dim_0")


# files and ArviZ


def same(a, b):
    assert set(a.children) == set(b.children)
    for group in a.children:
        xarray.testing.assert_equal(a[group].to_dataset(), b[group].to_dataset())
    assert dict(a.attrs) == dict(b.attrs)


def test_netcdf_round_trip(tree, tmp_path):
    tree.to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "draws.nc", engine="h5netcdf") as back:
        same(tree, back.load())


@pytest.mark.filterwarnings("ignore")  # Zarr on consolidated metadata
def test_zarr_round_trip(tree, tmp_path):
    tree.to_zarr(tmp_path / "draws.zarr")
    with xarray.open_datatree(tmp_path / "draws.zarr", engine="zarr") as back:
        same(tree, back.load())


def test_arviz_statistics(model, x):
    import arviz_stats

    found = diagnostics.draw(model, model.exact(), x[:2], draws=400, chains=2, seed=0)
    table = arviz_stats.summary(found, round_to="none")
    assert len(table) == 6
    z = found["posterior"]["z"].values.reshape(800, 6)
    np.testing.assert_allclose(table["mean"].astype(float), z.mean(0), rtol=1e-5, atol=1e-6)
    size = arviz_stats.ess(found)["z"].values
    assert size.shape == (2, 3)
    # independent draws: 800, with Geyer's estimate a tenth or so off
    within(size.mean(), 800.0, size.std(ddof=1) / np.sqrt(6))
    assert arviz_stats.rhat(found)["z"].values.max() < 1.02


@pytest.mark.filterwarnings("ignore")  # of plotting libraries among themselves
def test_arviz_plot(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib

    matplotlib.use("Agg")
    import arviz_plots
    from matplotlib import pyplot

    plot = arviz_plots.plot_dist(tree, backend="matplotlib", coords={"problem": 0})
    plot.savefig(tmp_path / "z.png")
    pyplot.close("all")
    assert (tmp_path / "z.png").stat().st_size > 1000


@pytest.mark.parametrize("guide", [lambda x: None, inference.Flow])
def test_what_is_no_guide_is_refused(model, guide):
    """A function, or a class that was not built."""
    with pytest.raises(BadInput, match="from_pyro_guide"):
        diagnostics.draw(model, guide, model.observations()[:2], seed=0)
