"""What is shown of a circuit that samples: its score, its runs and its neurons. About 30 s."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from conftest import within
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import diagnostics
import inference
import neuroguide
import zoo
from diagnostics import RunDirectory, plot_circuits, plot_scores, plots
from diagnostics.circuits import LEVELS, POINTS, RUNS, HasTrajectory
from inference import BadInput, HasScore, Incompatible, ReservoirSampler, Sampling
from inference.seeds import seeded

LOWEST = 0.02  # smallest noise level of these circuits
SHORT = Sampling(levels=20, warmup=3)
STEPS = 20 * 2 + 3
N = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


class Times(ReservoirSampler):
    """A score that is too steep along every latent, by a factor of its own."""

    factor = 1.0

    def score(self, z, x):
        return self.factor * super().score(z, x)


class Shifted(ReservoirSampler):
    """A score to which a constant is added."""

    shift = 0.0

    def score(self, z, x):
        return super().score(z, x) + self.shift


def perfect(latents, cls=ReservoirSampler, problem=0, strength=0.0):
    """A circuit of silent neurons whose linear guess is the exact posterior of one problem.

    With a strength they are weak, so that noise can be injected into them. The score of y at noise
    level sigma is then -y / (1 + sigma^2), that of the blurred posterior.
    """
    model = zoo.FactorAnalysis(7, latents, seed=1).double().requires_grad_(False)
    x = model.observations()
    guide = cls(model, neurons=N, hidden=(8,), sampling=SHORT)
    p = model.exact().distribution(x[problem : problem + 1])
    with torch.no_grad():
        guide.outward.mul_(strength)
        guide.whitening.slope.zero_()
        guide.whitening.offset.copy_(p.mean[0])
        guide.whitening.root.copy_(p.scale_tril[0])
    return model, guide, x


def small(model, cls=ReservoirSampler, **knobs):
    return cls(model, **({"neurons": N} if cls is ReservoirSampler else {}), hidden=(8,),
               sampling=SHORT, **knobs)  # fmt: skip


# ------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("problem", [0, 2])
@pytest.mark.parametrize("latents", [1, 2, 3])
def test_an_exact_score_has_no_error_but_that_of_its_noise_level(latents, problem):
    model, guide, x = perfect(latents, problem=problem)
    found = diagnostics.score_field(model, guide, x, problem=problem, draws=200)
    np.testing.assert_allclose(
        found["guide"] * (1 + LOWEST**2), found["model"], rtol=1e-9, atol=1e-9
    )
    assert float(found["relative_error"]) == pytest.approx(1 - 1 / (1 + LOWEST**2), rel=1e-5)
    assert found.attrs["noise"] == LOWEST
    assert dict(found["points"].sizes) == {"point": 200, "packed": latents}
    p = model.exact().distribution(x[problem : problem + 1])
    points = torch.as_tensor(found["points"].values)
    by_hand = -(points - p.mean) @ torch.linalg.inv(p.covariance_matrix[0])
    np.testing.assert_allclose(found["model"], by_hand, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("latents", [1, 2])
def test_fields_are_on_a_grid_and_agree_with_closed_forms(latents):
    model, guide, x = perfect(latents)
    found = diagnostics.score_field(model, guide, x, draws=500)
    axes = ("up", "across")[-latents:]
    assert found["density"].dims == axes
    assert found["model_field"].dims == (*axes, "packed")
    # the latents are in their places: across is the first
    grids = np.meshgrid(*(found[a].values for a in axes), indexing="ij")[::-1]
    u = torch.as_tensor(np.stack(grids, -1))
    p = model.exact().distribution(x[:1])
    log_p = p.log_prob(u[..., None, :])[..., 0]
    np.testing.assert_allclose(found["density"], (log_p - log_p.max()).exp(), atol=1e-6)
    by_hand = -(u - p.mean) @ torch.linalg.inv(p.covariance_matrix[0])
    np.testing.assert_allclose(found["model_field"], by_hand, rtol=1e-4, atol=1e-4)
    blurred = by_hand / (1 + LOWEST**2)
    np.testing.assert_allclose(found["guide_field"], blurred, rtol=1e-5, atol=1e-5)
    with seeded(0):
        inside = (p.sample((1000,))[:, 0] >= u.flatten(0, -2).min(0).values).all(1)
    assert float(inside.double().mean()) > 0.99


@pytest.mark.parametrize("latents", [1, 2])
def test_blurred_scores_are_those_of_the_noisy_posterior(latents):
    """Noise adds sigma^2 L L' to the covariance; only mass outside the grid is missed."""
    model, guide, x = perfect(latents)
    found = diagnostics.score_field(model, guide, x, draws=500)
    assert tuple(found["level"].values) == LEVELS
    p = model.exact().distribution(x[:1])
    grids = np.meshgrid(*(found[a].values for a in found["density"].dims), indexing="ij")[::-1]
    u = torch.as_tensor(np.stack(grids, -1))
    for level in LEVELS:
        at = found.sel(level=level)
        wide = p.covariance_matrix[0] * (1 + level**2)
        by_hand = -(u - p.mean) @ torch.linalg.inv(wide)
        np.testing.assert_allclose(at["blurred_guide"], by_hand, rtol=1e-4, atol=1e-4)
        assert float(at["blurred_error"]) < 0.05
        middle = (found["density"] > 0.1).values
        size = by_hand[middle].square().mean().sqrt()
        assert np.abs(at["blurred_model"].values - by_hand.numpy())[middle].max() < 0.02 * size


def test_a_planted_error_of_each_latent_is_told():
    model, guide, x = perfect(3, Times)
    guide.factor = torch.tensor([1.0, 1.3, 0.5], dtype=torch.float64)
    found = diagnostics.score_field(model, guide, x)
    want = np.abs(guide.factor.numpy() / (1 + LOWEST**2) - 1)
    np.testing.assert_allclose(found["error_by_latent"], want, rtol=1e-6)
    np.testing.assert_allclose(found["error_by_latent_se"], 0, atol=1e-9)  # whatever the draws
    assert 0.3 < float(found["relative_error"]) < 0.5
    assert found["points"].sizes["point"] == POINTS


def test_a_planted_constant_is_told_within_its_standard_error():
    """For a Normal posterior of precision P, E |s_i|^2 = P_ii."""
    model, guide, x = perfect(2, Shifted)
    guide.shift = torch.tensor([0.8, -0.4], dtype=torch.float64)
    p = model.exact().distribution(x[:1])
    precision = torch.linalg.inv(p.covariance_matrix[0]).diagonal()
    variance = p.covariance_matrix[0].diagonal()
    found = diagnostics.score_field(model, guide, x)
    each = (guide.shift.square() / precision).sqrt()
    within(found["error_by_latent"], each, found["error_by_latent_se"])
    whole = ((variance * guide.shift.square()).sum() / (variance * precision).sum()).sqrt()
    within(found["relative_error"], whole, found["relative_error_se"])
    assert float(found["relative_error_se"]) < 0.1 * float(whole)


def test_the_standard_error_is_the_spread_over_draws():
    model, guide, x = perfect(3, Shifted)
    guide.shift = torch.tensor([0.8, -0.4, 0.2], dtype=torch.float64)
    n = 80
    found = [diagnostics.score_field(model, guide, x, draws=100, seed=k) for k in range(n)]
    for name in ("relative_error", "error_by_latent"):
        spread = np.std([f[name] for f in found], axis=0, ddof=1)
        told = np.mean([f[f"{name}_se"] for f in found], axis=0)
        within(spread / told, 1.0, np.full(np.shape(told), 1 / np.sqrt(2 * n)))


def test_latents_with_a_support_are_shown_unconstrained():
    """r ~ Gamma(3, 2) with x ~ Normal(r, 10): of u = log r the score is nearly 3 - 2 exp(u)."""

    def program(x):
        with pyro.plate("data", len(x)):
            r = pyro.sample("r", dist.Gamma(x.new_tensor(3.0), 2.0))
            pyro.sample("x", dist.Normal(r[..., None], 1e3).to_event(1), obs=x)

    x = torch.zeros(2, 1, dtype=torch.float64)
    model = zoo.from_pyro(program, x, exact=zoo.Quadrature)
    found = diagnostics.score_field(model, small(model), x, draws=100)
    assert list(found["packed"].values) == ["r, unconstrained"]
    want = 3 - 2 * np.exp(found["points"])
    np.testing.assert_allclose(found["model"], want, atol=1e-4)
    figure = plots.score_field(model, small(model), x, draws=100)
    assert figure.axes[0].get_xlabel() == "r, unconstrained"


# ------------------------------------------------------------------------------------- trajectories


def test_a_trajectory_ends_in_the_draws_and_its_noise_falls():
    model = zoo.Ring().double()
    x = model.observations()[:2]
    guide = small(model)
    found = guide.trajectory(x, runs=5, seed=3)
    assert isinstance(guide, HasTrajectory)
    assert found.values["z"].shape == (5, STEPS + 1, 2, 2)
    assert found.circuit["rates"].shape == (5, STEPS + 1, 2, N)
    ends = guide.draw(x, draws=5, chains=1, seed=3)
    torch.testing.assert_close(found.values["z"][:, -1], ends.values["z"][0], rtol=1e-6, atol=1e-6)
    assert found.time_constants == pytest.approx(ends.time_constants)
    time, noise = (found.stats[n] for n in ("time", "noise"))
    assert time.shape == noise.shape == (5, STEPS + 1, 2)
    assert (time.diff(dim=1) > 0).all()
    assert (noise.diff(dim=1) <= 0).all()
    assert float(noise[0, 0, 0]) == pytest.approx(guide.noise[1])
    assert noise[0, -1, 0] == guide.noise[0]
    assert float(time[0, -1, 0]) == pytest.approx(found.time_constants / 5)
    # outputs are read out from the rates
    y = guide.whiten({"z": found.values["z"]}, x)
    torch.testing.assert_close(found.circuit["rates"] @ guide.read_out().T, y, rtol=1e-6, atol=1e-6)


def test_a_trajectory_is_plain_whatever_correction_draws_have():
    model = zoo.Ring()
    x = model.observations()[:1]
    guide = small(model)
    plain = guide.trajectory(x, runs=2, seed=0).values["z"]
    guide.sampling = Sampling(levels=20, warmup=3, correction="model")
    assert torch.equal(guide.trajectory(x, runs=2, seed=0).values["z"], plain)
    assert not torch.equal(guide.trajectory(x, runs=2, seed=1).values["z"], plain)


def test_trajectories_have_shapes_labels_and_a_density():
    model = zoo.Ring()
    x = model.observations()
    found = diagnostics.trajectories(small(model), x, problem=3, runs=4, draws=100)
    assert dict(found["u"].sizes) == {"run": 4, "step": STEPS + 1, "packed": 2}
    assert dict(found["rates"].sizes) == {"step": STEPS + 1, "neuron": N}
    assert found["time"].dims == found["noise"].dims == ("step",)
    assert found["density"].dims == ("up", "across")
    assert found["points"].sizes["point"] == 100
    radius = np.sqrt(np.square(found["points"]).sum("packed"))
    assert 2.1 < float(radius.mean()) < 2.7  # of problem 3, where x = 6


# ----------------------------------------------------------------------------------------- figures


def shown(figure):
    """Axes that show something, colour bars and what is inside of others left out."""
    return [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]


def words(figure):
    """All that is written in a figure."""
    import matplotlib.text

    return " ".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def in_legend(figure):
    return [t.get_text() for t in figure.legends[0].get_texts()]


@pytest.mark.parametrize("latents", [1, 2, 3])
def test_pictures_of_scores_have_labels_legends_and_the_error(latents):
    model, guide, x = perfect(latents, Times)
    guide.factor = 1.3
    figure = plots.score_field(model, guide, x, draws=200)
    assert in_legend(figure) == {
        1: ["true score", "learned score", "exact posterior"],
        2: ["true score", "learned score", "exact posterior"],
        3: ["learned = true", "one latent of one draw", "all latents",
            "one latent, ± standard error"],
    }[latents]  # fmt: skip
    assert len(shown(figure)) == {1: 2, 2: 6, 3: 2}[latents]
    bottom = shown(figure)[-3:] if latents == 2 else shown(figure)
    assert all(ax.get_xlabel() for ax in bottom)
    assert all(ax.has_data() for ax in shown(figure))
    assert shown(figure)[0].get_ylabel()
    assert f"noise level {LOWEST}: error 30 ± " in words(figure)
    figure.canvas.draw()


def test_arrows_point_along_the_scores_and_have_the_guides_colour():
    from matplotlib.colors import to_rgb
    from matplotlib.quiver import Quiver

    model, guide, x = perfect(2)
    found = diagnostics.score_field(model, guide, x, draws=200)
    figure = plot_scores.score_field(found, ink=plots.colour("reservoir_sampler"))
    true, own = (ax.findobj(Quiver)[0] for ax in shown(figure)[:2])
    assert true.N == own.N == 15**2
    assert tuple(own.get_facecolor()[0][:3]) == to_rgb(plots.colour("reservoir_sampler"))
    field = found["model_field"].values[1::3, 1::3].reshape(-1, 2)
    cosine = (field[:, 0] * true.U + field[:, 1] * true.V) / np.linalg.norm(field, axis=1)
    np.testing.assert_allclose(cosine, np.hypot(true.U, true.V), rtol=1e-4)
    np.testing.assert_allclose(own.U, true.U, rtol=1e-3, atol=1e-4)


def test_a_circuit_of_one_noise_level_is_shown_at_that_alone():
    model, guide, x = perfect(2, strength=1e-6)
    guide.single_level.fill_(True)
    found = diagnostics.score_field(model, guide, x, draws=100)
    assert "level" not in found.dims
    assert len(shown(plot_scores.score_field(found))) == 3
    paths = diagnostics.trajectories(guide, x, runs=2, draws=100)
    assert paths.sizes["step"] == STEPS + 1  # the transient that `sampling` asks for is there
    guide.sampling = Sampling(step=0.1, per_start=20)
    paths = diagnostics.trajectories(guide, x, runs=2, draws=100)
    assert set(paths["noise"].values) == {LOWEST}
    assert "noise level" not in words(plot_circuits.trajectories(paths))


@pytest.mark.parametrize("latents", [1, 2, 3])
def test_pictures_of_trajectories_have_labels_and_a_legend(latents):
    _, guide, x = perfect(latents, strength=1e-6)
    figure = plots.trajectories(guide, x, runs=3, draws=200)
    assert in_legend(figure) == ["a run", "its draw", "stationary part", "exact posterior"]
    assert len(shown(figure)) == {1: 1, 2: 3, 3: 3}[latents]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in shown(figure))
    assert "time constants" in shown(figure)[0].get_xlabel()
    assert "noise level" in words(figure)
    assert len(shown(figure)[0].lines) == 3 + 1
    figure.canvas.draw()


def recorded(neurons=300, draws=50, *, spikes=True):
    """A circuit whose k-th neuron has the rate k."""
    rng = np.random.default_rng(0)
    rates = np.broadcast_to(np.arange(neurons, dtype=float), (2, draws, 3, neurons)).copy()
    dims = ("chain", "draw", "problem")
    found = {"rates": ((*dims, "rates_dim_0"), rates)}
    if spikes:
        found["spikes"] = ((*dims, "spikes_dim_0"), rng.poisson(rates / neurons))
    return xarray.DataTree.from_dict({"circuit": xarray.Dataset(found)})


def test_rasters_show_some_of_many_neurons_and_say_so():
    figure = plots.rates(recorded(), problem=2, chain=1)
    top, bottom = shown(figure)
    assert top.get_ylabel() == bottom.get_ylabel() == "128 of 300 neurons, by mean"
    assert top.get_xlabel() == "draw"
    image = top.images[0].get_array()
    assert image.shape == (128, 50)
    assert (np.diff(image[:, 0]) > 0).all()  # sorted
    assert image[-1, 0] == 299  # the most active is there, on top
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert [bar.get_ylabel() for bar in bars] == ["rates", "spikes"]
    assert bottom.images[0].get_cmap().name == "Greys"


def test_few_neurons_are_all_shown_and_long_series_are_cut_with_a_word():
    figure = plots.rates(recorded(5, 1200, spikes=False))
    (ax,) = shown(figure)
    assert ax.get_ylabel() == "neuron, by mean"
    assert ax.images[0].get_array().shape == (5, 1000)
    assert ax.get_title() == "the first 1000 of 1200"


def test_rates_of_both_signs_get_a_scale_of_both_signs():
    tree = recorded(6, 20, spikes=False)
    tree["circuit"]["rates"] -= 3
    figure = plots.rates(tree)
    low, high = shown(figure)[0].images[0].get_clim()
    assert low == -high < 0
    dead = recorded(6, 20)
    for name in ("rates", "spikes"):
        dead["circuit"][name] *= 0
    plots.rates(dead).canvas.draw()


def test_what_a_circuit_recorded_is_shown():
    model = zoo.Ring()
    guide = small(model)
    guide.sampling = Sampling(levels=20, record=("rates", "spikes"))
    x = model.observations()[:2]
    tree = diagnostics.draw(model, guide, x, draws=20, chains=2, seed=0)
    figure = plots.rates(tree, problem=1)
    assert [ax.images[0].get_array().shape for ax in shown(figure)] == [(N, 20)] * 2


def test_colours_of_guides_can_be_seen_on_white_and_are_those_of_the_palette():
    for name in inference.GUIDES:
        red, green, blue = (int(plots.colour(name)[k : k + 2], 16) / 255 for k in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75, name


# ------------------------------------------------------------------------------------- wrong inputs


def test_wrong_inputs_are_told_with_a_fix():
    model = zoo.Ring()
    guide, x = small(model), model.observations()[:2]
    encoder = inference.MeanFieldEncoder(model)
    with pytest.raises(Incompatible, match=r"guide: .*a score.*; got MeanFieldEncoder\. .*Reserv"):
        plots.score_field(model, encoder, x)
    with pytest.raises(Incompatible, match=r"guide: .*trajectory.*; got MeanFieldEncoder"):
        plots.trajectories(encoder, x)
    with pytest.raises(Incompatible, match="got ReservoirSampler"):  # the class, not a guide
        plots.score_field(model, ReservoirSampler, x)
    for call in (plots.trajectories, lambda *a, **k: plots.score_field(model, *a, **k)):
        with pytest.raises(BadInput, match=r"problem: expected 0 to 1; got 2\. problem=0"):
            call(guide, x, problem=2)
        with pytest.raises(BadInput, match=r"x: expected shape \(B, 1\)"):
            call(guide, x[:, 0])
        with pytest.raises(BadInput, match="draws: expected an integer >= 1; got 0"):
            call(guide, x, draws=0)
    with pytest.raises(BadInput, match="runs: expected an integer >= 1"):
        plots.trajectories(guide, x, runs=0)
    with pytest.raises(BadInput, match=r"problem: expected 0 to 2; got 3"):
        plots.rates(recorded(), problem=3)
    with pytest.raises(BadInput, match=r"chain: expected 0 to 1; got -1"):
        plots.rates(recorded(), chain=-1)
    with pytest.raises(BadInput, match=r"tree: .*`circuit`.*groups \['posterior'\].*record="):
        plots.rates(xarray.DataTree.from_dict({"posterior": xarray.Dataset()}))


def test_a_model_without_exact_posterior_is_looked_at_where_the_guide_goes():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = torch.tensor([[0.3], [1.0]])
    model = zoo.from_pyro(program, x)
    guide = small(model)
    found = diagnostics.score_field(model, guide, x, draws=50)
    np.testing.assert_allclose(found["model"], 4 * 0.3 - 5 * found["points"], rtol=1e-4, atol=1e-4)
    assert "density" in found
    assert diagnostics.trajectories(guide, x, runs=2, draws=50)["points"].sizes["point"] == 50


# ------------------------------------------------------------------------------------------- report


def watched(model, guides, **sizes):
    """Draws as the command line collects them."""
    x = model.observations()[:2]
    trees = diagnostics.collect(model, guides, x, **sizes, seed=0)
    for name, guide in guides.items():
        diagnostics.watch(trees[name], guide, x, reference=trees["exact"], seed=0)
    return trees


def test_circuits_are_told_by_protocol_and_other_guides_are_left_alone():
    model = zoo.Ring()
    guides = {
        "mine": small(model),
        "rate": small(model, inference.SamplerOnlyRate),
        "flow": inference.Flow(model),
    }
    trees = watched(model, guides, draws=50, chains=2)
    seen = {"score_field", "trajectory"}
    assert all(isinstance(guides[n], HasScore) for n in ("mine", "rate"))
    assert not isinstance(guides["flow"], HasScore | HasTrajectory)
    assert seen <= set(trees["mine"].children)
    assert seen <= set(trees["rate"].children)
    assert not seen & set(trees["flow"].children)
    assert not seen & set(trees["exact"].children)
    assert trees["mine"]["trajectory"].sizes["run"] == RUNS
    assert trees["mine"]["score_field"].sizes["point"] == 100


@pytest.mark.parametrize("name", ["ring", "gaussian_mixture_latents"])
def test_reports_of_runs_show_their_circuits_and_nothing_of_others(tmp_path, name):
    """Through the command line; 10 s in all."""
    guides = "reservoir_sampler,mean_field_encoder"
    sizes = {"problems": 1, "draws": 50, "chains": 2, "steps": 5, "batch-size": 8}
    knobs = [str(part) for key, value in sizes.items() for part in (f"--{key}", value)]
    done = CliRunner().invoke(
        neuroguide.app, ["compare", name, "--guides", guides, *knobs, "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    for title in ("Score", "Runs", "Neurons"):
        assert page.count(f"<h2>{title} of reservoir sampler</h2>") == 1
        assert f"{title} of mean field encoder" not in page
    latents = inference.Latents(zoo.MODELS[name]()).size
    assert ("blurred posterior" in page) == (latents <= 2)
    found = RunDirectory.open(tmp_path).draws()["reservoir_sampler"]
    assert found["score_field"].sizes["packed"] == latents
    assert found["score_field"].sizes["point"] == 100
    assert found["trajectory"].sizes["run"] == RUNS
    assert np.isfinite(found["trajectory"]["u"]).all()


def test_files_keep_what_was_seen(tmp_path):
    model = zoo.Ring()
    trees = watched(model, {"mine": small(model)}, draws=50, chains=1)
    run = RunDirectory.create(tmp_path, {"command": "compare", "model": "ring", "seed": 0})
    run.write_draws(trees, model="ring")
    back = run.draws()["mine"]
    for group in ("score_field", "trajectory"):
        xarray.testing.assert_identical(back[group].to_dataset(), trees["mine"][group].to_dataset())


def test_watching_does_not_fail_where_neurons_cannot_be_driven():
    """Without a read-out no noise can be injected, and there is no trajectory."""
    model = zoo.FactorAnalysis(7, 3, seed=1)
    guide = small(model)
    with torch.no_grad():
        guide.outward.zero_()
    trees = watched(model, {"deaf": guide}, draws=50, chains=1)
    assert "score_field" in trees["deaf"].children
    assert "trajectory" not in trees["deaf"].children
