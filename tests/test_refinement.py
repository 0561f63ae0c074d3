"""What is recorded of circuits that iterate, and its pictures, against sums by hand; about 15 s."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from conftest import within
from threadpoolctl import threadpool_limits

import diagnostics
import inference
import zoo
from diagnostics import plot_refinement as pictures
from diagnostics.refinement import DRAWS, ENOUGH, HasRefinement, refinement
from inference import BadInput, Incompatible
from inference.seeds import seeded

SURE, NEVER, OFTEN = -20.0, -40.0, 6.0  # a log sd, and log rates that leave no doubt


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def poisson_coding(latents=2, **knobs):
    return zoo.PoissonCoding(latents, side=3, seed=1, **knobs).double().requires_grad_(False)


def fixed(cls, model, *state, **knobs):
    """A guide of some class with the same belief for every problem, and no steps to take."""

    class Fixed(cls):
        def start(self, x, origin):
            return tuple(torch.as_tensor(s, dtype=x.dtype).expand(len(x), -1) for s in state)

    return Fixed(model, steps=0, **knobs)


def elbo(model, rates, x):
    """E_q[log p(x, z) - log q(z)] of independent Poisson counts, by enumeration: (S, K) to (S,)."""
    lattice = zoo.Enumerated(model, bound=40)
    log_p = lattice.logits(x)[:, 0]
    states = lattice._states("z")
    found = []
    for rate in torch.as_tensor(rates).clamp_min(1e-12):
        log_q = torch.distributions.Poisson(rate).log_prob(states).sum(-1)
        assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-12)
        found.append(float((log_q.exp() * (log_p - log_q)).sum()))
    return np.array(found)


# ------------------------------------------------------------------------------------ free energy

GUIDES = {
    "rates": lambda m: inference.IterativePoisson(m, steps=40),
    "spikes": lambda m: inference.IterativePoisson(m, steps=40, signal="spikes"),
    "online": lambda m: inference.OnlinePoisson(m, steps=40),
    "network": lambda m: inference.SemiAmortisedPoisson(m, steps=5),
    "at once": inference.PoissonEncoder,
}


@pytest.mark.parametrize("name", GUIDES)
def test_free_energy_is_the_negative_elbo_to_the_models_prior(name):
    """At every step, also where the circuit's own prior rolls."""
    model = poisson_coding()
    x = model.observations()[3:4]
    guide = GUIDES[name](model)
    found = refinement(guide, x, seed=2)
    assert found["rates"].shape == (guide.steps + 1, 2)
    np.testing.assert_allclose(found["free_energy"], -elbo(model, found["rates"].values, x))
    log_p = float(zoo.Enumerated(model, bound=40).log_evidence(x))
    assert float(found["log_evidence"]) == pytest.approx(log_p, abs=1e-9)
    np.testing.assert_allclose(found["gap"], found["free_energy"] + log_p, rtol=1e-9)
    assert (found["gap"] > 0).all()
    assert float(found["divergence"][0]) == pytest.approx(0, abs=1e-12) or guide.steps < 40


def test_inference_descends_to_the_best_factorised_posterior():
    model = poisson_coding()
    x = model.observations()[:1]
    found = refinement(inference.IterativePoisson(model, steps=300), x)
    assert (np.diff(found["gap"]) < 1e-12).all()
    best = np.log(found["rates"].values[-1])
    for change in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
        near = refinement(fixed(inference.IterativePoisson, model, best + change), x)
        assert float(near["gap"][0]) > float(found["gap"][-1])


def test_gaussian_beliefs_end_at_their_known_gap():
    """KL(q || p) of q_k = Normal(m_k, 1 / L_kk) is half of sum log L_kk - log det L."""
    model = zoo.FactorAnalysis(7, 3, seed=1).double().requires_grad_(False)
    x = model.observations()[:5]
    found = refinement(inference.IterativeGaussian(model, steps=400), x, problem=4)
    p = model.exact().distribution(x)
    precision = p.precision_matrix[0]
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert float(found["gap"][-1]) == pytest.approx(float(gap), abs=1e-9)
    np.testing.assert_allclose(found["rates"][-1], p.mean[4], atol=1e-7)
    assert found.attrs["signal"] == "rates"


def test_means_over_problems_and_their_errors():
    model = poisson_coding()
    guide, x = inference.IterativePoisson(model, steps=6), model.observations()[:4]
    found = refinement(guide, x, problem=2)
    each = [refinement(guide, x[b : b + 1]) for b in range(4)]
    for name in ("free_energy", "divergence", "gap", "r2_rates"):
        values = np.stack([one[name].values for one in each])
        np.testing.assert_allclose(found[name], values.mean(0), atol=1e-10)
        se = values.std(0, ddof=1) / 2
        np.testing.assert_allclose(found[f"{name}_se"], se, atol=1e-10)
        assert np.isnan(each[0][f"{name}_se"]).all()
    np.testing.assert_allclose(found["rates"], each[2]["rates"])
    last = np.stack([one["rates"].values[-1] for one in each])
    np.testing.assert_allclose(found["activity"], last.mean(0))


def test_expected_energy_of_a_nonlinear_decoder_is_right_on_average():
    """Of many copies of one problem, so that the error is that of the draws."""
    model = poisson_coding(hidden=(4,))
    x = model.observations()[:1]
    guide = inference.IterativePoisson(model, steps=3)
    found = refinement(guide, x.expand(400, -1))
    truth = -elbo(model, found["rates"].values, x)
    within(found["free_energy"][1:], truth[1:], found["free_energy_se"][1:])
    assert "dictionary" not in found
    few = refinement(guide, x.expand(5, -1))
    assert DRAWS * 5 < ENOUGH
    within(few["free_energy"][3], truth[3], found["free_energy_se"][3] * np.sqrt(400 / (DRAWS * 5)))


# ------------------------------------------------------------------------- reconstruction, silence


def test_a_perfect_reconstruction_has_an_r2_of_one():
    model = zoo.FactorAnalysis(7, 3, seed=1).double().requires_grad_(False)
    z = torch.tensor([[0.4, -1.0, 2.0]], dtype=torch.float64)
    guide = fixed(inference.IterativeGaussian, model, z[0], [SURE])
    x = guide.reader().decode(z).expand(3, -1)
    found = refinement(guide, x)
    for name in ("r2", "r2_rates", "r2_pooled", "r2_rates_pooled"):
        assert float(found[name][0]) == pytest.approx(1, abs=1e-12)
    shifted = refinement(guide, x + torch.linspace(-0.1, 0.3, 7, dtype=torch.float64))
    assert float(shifted["r2"][0]) < 0.999


def test_r2_is_relative_to_each_images_own_mean():
    """By hand, of each image and of all pixels together, whose error a jackknife knows."""
    model = poisson_coding(3)
    rates = torch.tensor([0.3, 1.2, 0.7], dtype=torch.float64)
    x = model.observations()[:80] + 0.1 * torch.arange(80.0, dtype=torch.float64)[:, None]
    found = refinement(fixed(inference.IterativePoisson, model, rates.log()), x).isel(moment=0)
    x = x.numpy()
    total = ((x - x.mean(1, keepdims=True)) ** 2).sum(1)
    wrong = ((x - model.dictionary.numpy() @ rates.numpy()) ** 2).sum(1)
    each = 1 - wrong / total
    assert float(found["r2_rates"]) == pytest.approx(each.mean())
    assert float(found["r2_rates_se"]) == pytest.approx(each.std(ddof=1) / np.sqrt(80))
    assert float(found["r2_rates_pooled"]) == pytest.approx(1 - wrong.sum() / total.sum())
    left_out = 1 - (wrong.sum() - wrong) / (total.sum() - total)
    assert float(found["r2_rates_pooled_se"]) == pytest.approx(
        np.sqrt(79 * left_out.var()), rel=0.1
    )
    assert abs(each.mean() - left_out.mean()) > 0.1  # they are not the same


def test_r2_of_spikes_is_right_within_its_error():
    """Of copies of one image: 1 - (|x - Phi r|^2 + sum_k |phi_k|^2 r_k) / |x - mean|^2."""
    model = poisson_coding()
    rates = torch.tensor([0.4, 1.5], dtype=torch.float64)
    x = model.observations()[1:2]
    found = refinement(
        fixed(inference.IterativePoisson, model, rates.log()), x.expand(ENOUGH, -1), seed=5
    )
    phi = model.dictionary
    wrong = (x[0] - phi @ rates).square().sum() + phi.square().sum(0) @ rates
    truth = 1 - float(wrong / (x - x.mean()).square().sum())
    for name in ("r2", "r2_pooled"):
        within(found[name], truth, found[f"{name}_se"])
    within(found["zeros"], float((-rates).exp().mean()), found["zeros_se"])
    assert float(found["r2"][0]) < float(found["r2_rates"][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_without_contrast_are_left_out(dtype):
    model = zoo.PoissonCoding(2, side=3, seed=1).to(dtype)
    guide = inference.IterativePoisson(model, steps=4)
    x = model.observations()[:3]
    flat = torch.full((2, 9), 0.1, dtype=dtype)
    some, all_ = refinement(guide, torch.cat([x, flat])), refinement(guide, x)
    for name in ("r2_rates", "r2_rates_se", "r2_rates_pooled", "r2_rates_pooled_se"):
        np.testing.assert_allclose(some[name], all_[name], rtol=1e-5)
    none = refinement(guide, flat)
    for name in ("r2", "r2_se", "r2_pooled"):
        assert np.isnan(none[name]).all()
    assert np.isfinite(none["free_energy"]).all()


def test_silent_neurons_by_hand():
    model = poisson_coding(3)
    x = model.observations()[:4]
    for log_rates, share in (([NEVER] * 3, 1), ([OFTEN] * 3, 0), ([NEVER, OFTEN, NEVER], 2 / 3)):
        found = refinement(fixed(inference.IterativePoisson, model, log_rates), x)
        assert float(found["zeros"][0]) == pytest.approx(share)


def test_negative_latents_are_silent_if_the_decoder_says_so():
    def program(rectify):
        def made(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                mean = rectify(z) @ torch.tensor([[1.0, 0.5], [0.2, 1.0], [0.3, 0.4]])
                pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

        return made

    x = torch.tensor([[1.0, 0.2], [0.1, 0.5]])
    for rectify, share in ((torch.relu, 2 / 3), (torch.nn.functional.softplus, 0), (abs, 0)):
        model = zoo.from_pyro(program(rectify), x)
        found = refinement(fixed(inference.IterativeGaussian, model, [-1.0, 1.0, -0.5], [SURE]), x)
        assert float(found["zeros"][0]) == pytest.approx(share)
        assert "log_evidence" not in found
        assert "gap" not in found


# ---------------------------------------------------------------------------------- what is kept


def test_measuring_does_not_disturb_the_circuit():
    model = poisson_coding()
    guide, x = inference.OnlinePoisson(model, steps=30), model.observations()[:3]
    found = refinement(guide, x, problem=1, seed=7)
    with torch.no_grad(), seeded(7):
        path = list(guide.unroll(x, steps=30))
    np.testing.assert_array_equal(found["signal"], [now.signal[1] for now in path])
    np.testing.assert_array_equal(found["rates"], [now.q.mean[1] for now in path])
    assert found.attrs == {"problem": 1, "signal": "spikes"}
    few = refinement(guide, x, problem=1, seed=7, moments=4)
    np.testing.assert_array_equal(few["signal"], found["signal"])
    xarray.testing.assert_identical(few["zeros"], found["zeros"].sel(moment=few["moment"]))
    other = refinement(guide, x, problem=1, seed=8)
    assert (other["signal"] != found["signal"]).any()


def test_draws_of_gaussian_neurons_are_no_spikes():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    guide = inference.IterativeGaussian(model, steps=3, signal="spikes")
    assert refinement(guide, model.observations()[:2]).attrs["signal"] == "draws"


@pytest.mark.parametrize("steps", [0, 1, 9, 1000])
def test_long_runs_are_measured_at_equal_ratios(steps):
    model = poisson_coding()
    found = refinement(
        inference.IterativePoisson(model), model.observations()[:2], steps=steps, moments=21
    )
    at = found["moment"].values
    assert found.sizes["step"] == steps + 1
    assert at[0] == 0
    assert at[-1] == steps
    assert len(at) <= 21 + 3
    assert {1, 10, 100, 1000} - set(at) == {t for t in (1, 10, 100, 1000) if t > steps}
    ratios = at[5:] / at[4:-1]
    assert steps < 21 or ratios.max() < 2
    assert steps >= 21 or len(at) == steps + 1


def test_dictionary_is_what_a_spike_adds():
    model = poisson_coding(3)
    found = refinement(inference.IterativePoisson(model, steps=2), model.observations()[:2])
    np.testing.assert_allclose(found["dictionary"], model.dictionary.T)
    assert tuple(found["dictionary"].attrs["image_shape"]) == (3, 3)


def test_what_is_refused():
    model = poisson_coding()
    guide, x = inference.IterativePoisson(model, steps=2), model.observations()[:2]
    assert isinstance(guide, HasRefinement)
    gaussian = zoo.FactorAnalysis(7, 3, seed=1)
    encoder = inference.MeanFieldEncoder(gaussian)
    for wrong, name in (
        (encoder, "MeanFieldEncoder"),
        (model.exact(), "Enumerated"),
        (inference.IterativePoisson, "IterativePoisson"),
    ):
        with pytest.raises(Incompatible, match=f"refined step by step; got {name}"):
            refinement(wrong, x)
    with pytest.raises(BadInput, match="problem: expected 0 to 1; got 2"):
        refinement(guide, x, problem=2)
    for steps in (-1, 2.5, True):
        with pytest.raises(BadInput, match="steps"):
            refinement(guide, x, steps=steps)
    with pytest.raises(BadInput, match="moments"):
        refinement(guide, x, moments=0)
    with pytest.raises(BadInput, match="range"):
        refinement(guide, 1e4 * x)


def test_watch_takes_log_p_from_the_reference():
    model = poisson_coding()
    x = model.observations()[:3]
    guides = {"iterative_poisson": inference.IterativePoisson(model, steps=12)}
    trees = diagnostics.collect(model, guides, x, draws=20, chains=1, seed=0)
    for name, guide in (*guides.items(), ("exact", model.exact())):
        diagnostics.watch(trees[name], guide, x, reference=trees["exact"], problem=1, seed=3)
    assert "refinement" not in trees["exact"].children
    seen = trees["iterative_poisson"]["refinement"].to_dataset()
    xarray.testing.assert_allclose(seen, refinement(guide=guides["iterative_poisson"], x=x,
                                                    problem=1, seed=3))  # fmt: skip
    del trees["exact"]["evidence"]
    diagnostics.watch(
        trees["iterative_poisson"], guides["iterative_poisson"], x,
        reference=trees["exact"], seed=3,
    )  # fmt: skip
    assert "gap" not in trees["iterative_poisson"]["refinement"]


# --------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def seen():
    """Of a rate circuit, a spiking one, and a network that takes no steps; for the same x."""
    model = zoo.PoissonCoding(seed=1)
    x = model.observations()[:5]
    guides = {
        "iterative_poisson": inference.IterativePoisson(model, steps=500),
        "online_poisson": inference.OnlinePoisson(model, steps=40),
        "poisson_encoder": inference.PoissonEncoder(model),
    }
    return {name: refinement(guide, x) for name, guide in guides.items()}


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def test_rasters_show_means_over_columns_the_most_active_on_top(seen):
    spiking = seen["online_poisson"]
    figure = pictures.raster(spiking)
    above, below = panels(figure)
    assert len(figure.axes) == 4
    order = np.argsort(spiking["rates"].values.mean(0))
    for ax, name in ((above, "signal"), (below, "rates")):
        shown = ax.collections[0].get_array()
        np.testing.assert_allclose(shown, spiking[name].values.T[order])
    assert [t.get_text() for t in above.get_yticklabels()] == [str(k) for k in order]
    long = seen["iterative_poisson"]
    (ax,) = panels(pictures.raster(long))
    shown, edges = ax.collections[0].get_array(), ax.collections[0].get_coordinates()[0, :, 0] + 0.5
    rates = long["rates"].values[:, np.argsort(long["rates"].values.mean(0))]
    assert shown.shape[1] == len(edges) - 1 <= pictures.COLUMNS
    assert (edges[0], edges[1], edges[-1]) == (0, 1, 501)
    last = rates[int(edges[-2]) :].mean(0)
    assert edges[-1] - edges[-2] > 5
    np.testing.assert_allclose(shown[:, -1], last, rtol=1e-5)
    np.testing.assert_allclose(shown[:, 0], rates[0])


def test_rasters_of_many_neurons_of_both_signs_and_of_no_steps(seen):
    t = np.linspace(0, 1, 12)[:, None]
    many = xarray.Dataset(
        {n: (("step", "neuron"), t * np.linspace(-1, 2, 300)) for n in ("rates", "signal")},
        attrs={"signal": "rates"},
    )
    figure = pictures.raster(many)
    (ax,) = panels(figure)
    assert ax.collections[0].get_array().shape == (pictures.NEURONS, 12)
    assert ax.collections[0].norm.vmin == -ax.collections[0].norm.vmax
    figure.canvas.draw()
    with pytest.raises(BadInput, match="Amortised guides take no steps"):
        pictures.raster(seen["poisson_encoder"])


def test_free_energy_is_shown_above_its_bound(seen):
    figure = pictures.free_energy(seen, inks={"online_poisson": "#123456"})
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines}
    assert list(lines) == [
        "iterative poisson", "online poisson", "poisson encoder (no steps)", "-log p(x)",
    ]  # fmt: skip
    one = seen["online_poisson"]
    np.testing.assert_array_equal(lines["online poisson"].get_ydata(), one["free_energy"])
    assert lines["online poisson"].get_color() == "#123456"
    np.testing.assert_array_equal(lines["-log p(x)"].get_ydata(), -one["log_evidence"])
    np.testing.assert_array_equal(right.lines[0].get_ydata(), seen["iterative_poisson"]["gap"])
    np.testing.assert_array_equal(lines["poisson encoder (no steps)"].get_xdata(), [0, 500])
    assert left.get_ylim()[0] < -float(one["log_evidence"])
    assert right.get_yscale() == "log"
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == list(lines)
    unknown = seen["iterative_poisson"].drop_vars(["log_evidence", "gap"])
    assert len(pictures.free_energy(unknown).axes) == 1


def test_what_diverged_is_still_drawn(seen):
    broken = seen["online_poisson"].copy(deep=True)
    for name in ("free_energy", "gap", "zeros", "r2"):
        broken[name][20:] = np.inf
    broken["rates"][20:] = np.nan
    pictures.free_energy({"a": broken, "b": seen["iterative_poisson"]}).canvas.draw()
    pictures.free_energy(broken * np.nan).canvas.draw()
    pictures.raster(broken).canvas.draw()
    pictures.rate_distortion({"a": broken}).canvas.draw()


def test_paths_in_the_plane_are_thinned_and_marked(seen):
    figure = pictures.rate_distortion(seen)
    (ax,) = figure.axes
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == [
        "iterative poisson", "online poisson", "poisson encoder (no steps)",
        "equal distance from (1, 1)",
    ]  # fmt: skip
    (line,) = [one for one in ax.lines if one.get_label() == "online poisson"]
    one = seen["online_poisson"]
    x, y = line.get_data()
    assert len(x) == 2 + 1 + 6  # 0, 1, 2, 3, 6, 10, 18, 32, 40
    assert (x[0], y[0]) == (float(one["zeros"][0]), float(one["r2"][0]))
    near = slice(8, 14)  # 10 by half a quarter of a decade either way
    np.testing.assert_allclose((x[5], y[5]), [one[n][near].mean() for n in ("zeros", "r2")])
    numbers = {t.get_text() for t in ax.texts}
    assert numbers <= {"1", "10", "100", "500", "40"}
    assert "500" in numbers


def test_sweeps_are_drawn_point_by_point():
    beta = [8, 16, 32]
    sweep = xarray.Dataset(
        {"zeros": ("beta", [0.6, 0.7, 0.8]), "r2": ("beta", [0.9, 0.85, 0.7])}, {"beta": beta}
    )
    figure = pictures.rate_distortion({"T = 16": sweep, "T = 32": sweep - 0.1})
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.texts] == ["32", "16", "8"] * 2
    assert ax.get_title() == "numbers: beta"
    marked = pictures.rate_distortion(sweep, marks=[15]).axes[0]
    assert [t.get_text() for t in marked.texts] == ["16"]
    for wrong, message in (
        (sweep.drop_vars("r2"), "r2"),
        (sweep.expand_dims("seed"), "dims"),
        (sweep * np.nan, "none that is finite"),
    ):
        with pytest.raises(BadInput, match=message):
            pictures.rate_distortion(wrong)


def test_dictionaries_are_walls_of_scaled_features(seen):
    shape, n = (3, 4), 9
    features = np.random.default_rng(0).normal(size=(n, 12))
    activity = np.arange(n)[::-1].astype(float)
    activity[4] = 99
    found = xarray.Dataset(
        {"dictionary": (("neuron", "pixel"), features), "activity": ("neuron", activity)}
    )
    found["dictionary"].attrs["image_shape"] = list(shape)
    figure = pictures.dictionary(found)
    wall = panels(figure)[0].images[0].get_array()
    assert wall.shape == (3 * 4 - 1, 3 * 5 - 1)
    first = features[4] / np.abs(features[4]).max()
    np.testing.assert_allclose(wall[:3, :4], first.reshape(shape))
    assert np.ma.getmaskarray(wall)[3].all()
    two = panels(pictures.dictionary(found, most=2))[0]
    assert two.images[0].get_array().shape == (3, 9)
    assert two.get_title() == "the 2 most active of 9"
    found["dictionary"].attrs = {}
    rows = panels(pictures.dictionary(found))[0].images[0].get_array()
    np.testing.assert_allclose(rows[0], first)
    with pytest.raises(BadInput, match="not linear"):
        pictures.dictionary(found.drop_vars("dictionary"))
