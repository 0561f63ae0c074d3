"""Patterns awake and asleep, the health of games, and films; about 25 s."""

from __future__ import annotations

import base64
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from PIL import Image
from scipy.stats import multivariate_normal
from test_report import Page
from torch.distributions import MultivariateNormal

import diagnostics
import inference
import zoo
from diagnostics import RunDirectory, plot_recognition
from diagnostics.film import film, is_video, record
from diagnostics.patterns import _divergence, _middle, wake_sleep_patterns
from diagnostics.report import report
from inference import BadInput, Incompatible

pytestmark = pytest.mark.usefixtures("one_thread")

SHIFT = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)


class Planted(inference.PackedGuide):
    """The exact posterior, off centre and with sds half as large."""

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        return MultivariateNormal(p.mean + SHIFT.to(p.mean), scale_tril=0.5 * p.scale_tril)


class Factorised(inference.PackedGuide):
    """The best guide of independent latents by the ELBO: exact means, conditional variances."""

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        sd = p.precision_matrix.diagonal(dim1=-2, dim2=-1) ** -0.5
        return MultivariateNormal(p.mean, scale_tril=torch.diag_embed(sd))


class Blind(inference.Guide):
    """The prior, whatever x."""

    def forward(self, x):
        with self.latents.plate(x):
            return self.sample_sites(
                lambda s: dist.Normal(torch.zeros(s.shape).to(x), 1.0).to_event(s.event_dim)
            )


# --------------------------------------------------------------------------------------- patterns


def test_divergence_is_the_one_of_the_planted_frequencies():
    """Gaussians above thresholds that are not in the middle, by their distribution function."""
    model = zoo.ExplainingAway(3).double()
    x = model.simulate(4000, seed=3)[1]
    order = [2, 0, 1]
    found = wake_sleep_patterns(model, Planted(model), x, neurons=order, threshold=0.2, seed=0)
    posterior = model.exact().distribution(x[:1]).covariance_matrix[0]
    aggregate = torch.eye(3).double() - 0.75 * posterior  # cov of means, and the guide's own
    wake = orthants(SHIFT[order], aggregate[order][:, order])
    sleep = orthants(torch.zeros(3), torch.eye(3))
    truth = float((wake * np.log(wake / sleep)).sum())
    assert truth > 0.1
    within(found["value"], truth + float(found["floor"]), found["se"])
    for name, share in (("wake", wake), ("sleep", sleep)):
        assert found[name].sum() == pytest.approx(1)
        within(found[name], share, (share * (1 - share) / 4000) ** 0.5)
    assert list(found.neuron.values) == ["z[2]", "z[0]", "z[1]"]
    assert list(found.pattern.values[:3]) == ["000", "001", "010"]
    assert list(found.active.values) == [0, 1, 1, 2, 1, 2, 2, 3]


def orthants(mean, covariance):
    """P(pattern) of a Gaussian above .2, the first neuron's bit the highest."""
    below = multivariate_normal(mean.numpy(), covariance.numpy(), seed=0)
    return np.array(
        [
            below.cdf(np.where(bits, np.inf, 0.2), lower_limit=np.where(bits, 0.2, -np.inf))
            for bits in itertools.product([0, 1], repeat=3)
        ]
    )


def test_divergence_of_many_counts_is_that_of_their_shares():
    p, q = np.array([0.1, 0.2, 0.7, 0.0]), np.array([0.25, 0.25, 0.4, 0.1])
    truth = (p[:3] * np.log(p[:3] / q[:3])).sum()
    assert _divergence(p * 1e9, q * 1e9) == pytest.approx(truth, abs=1e-7)
    assert _divergence(p, p) == 0


@pytest.mark.parametrize("make", [zoo.ExplainingAway, zoo.GaussianVideo, zoo.NoisyOr])
def test_the_exact_posterior_dreams_what_it_sees(make):
    model = make()
    x = model.simulate(2000, seed=3)[1]
    found = wake_sleep_patterns(model, model.exact(), x, seed=0)
    within(found["value"], found["floor"], found["se"])


def test_lost_correlations_and_strange_observations_are_told():
    model = zoo.ExplainingAway().double()
    x = model.simulate(2000, seed=3)[1]
    for guide, seen in ((Factorised(model), x), (model.exact(), x + 1.5)):
        found = wake_sleep_patterns(model, guide, seen, seed=0)
        assert found["value"] > found["floor"] + 5 * found["se"]


def test_a_guide_that_ignores_what_it_sees_is_not_told():
    """As the docstring warns."""
    model = zoo.ExplainingAway()
    x = model.simulate(2000, seed=3)[1]
    found = wake_sleep_patterns(model, Blind(model), x, seed=0)
    within(found["value"], found["floor"], found["se"])


def test_all_depends_on_the_seed_alone():
    model = zoo.ExplainingAway()
    x = model.simulate(300, seed=3)[1]
    one, two, other = (wake_sleep_patterns(model, model.exact(), x, seed=s) for s in (0, 0, 1))
    assert one.identical(two)
    assert not one.identical(other)


def test_about_half_of_the_dreams_are_above_the_threshold():
    rng = np.random.default_rng(0)
    rare, common = (rng.uniform(size=1000) < p for p in (0.1, 0.9))
    counts = rng.poisson(0.4, size=1000)
    z = np.stack([rng.gamma(2.0, size=1000), rare, common, counts, np.full(1000, 3.0)], 1)
    active = (z > _middle(z)).mean(0)
    assert active[0] == 0.5
    np.testing.assert_array_equal(active[1:], [rare.mean(), common.mean(), (counts > 0).mean(), 0])


def test_patterns_say_what_they_need():
    model = zoo.ExplainingAway()
    x, exact = model.observations()[:3], model.exact()
    for wrong in ([], [0, 0], [5], [-1]):
        with pytest.raises(BadInput, match="1 to 12 different places from 0 to 4"):
            wake_sleep_patterns(model, exact, x, neurons=wrong, seed=0)
    with pytest.raises(BadInput, match="finite number"):
        wake_sleep_patterns(model, exact, x, threshold=float("nan"), seed=0)
    with pytest.raises(BadInput, match="shape"):
        wake_sleep_patterns(model, exact, x[0], seed=0)

    def program(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    whole = zoo.from_pyro(program, torch.zeros(3))
    with pytest.raises(Incompatible, match="one problem"):
        wake_sleep_patterns(whole, inference.NUTS(whole), torch.zeros(3), seed=0)


def test_pictures_of_patterns_and_dreams():
    model = zoo.ExplainingAway()
    x = model.simulate(300, seed=3)[1]
    found = {
        "exact": wake_sleep_patterns(model, model.exact(), x, seed=0),
        "mean_field_encoder": wake_sleep_patterns(model, Factorised(model), x, seed=0),
    }
    figure = plot_recognition.patterns(found)
    for ax, one in zip(figure.axes, found.values(), strict=False):
        dots = ax.collections[-1].get_offsets()
        assert len(dots) == ((one.wake + one.sleep) > 0).sum()
        assert dots.min() >= 0.5 / 300
        assert "floor" in ax.get_title()
    assert plot_recognition.patterns(found["exact"]).axes[0].get_title().startswith("KL")
    pictures = {"data": np.zeros((3, 6)), "dreams": np.ones((5, 6))}
    shown = [ax for ax in plot_recognition.samples(pictures, (2, 3), columns=4).axes if ax.images]
    assert len(shown) == 3 + 4


# ------------------------------------------------------------------------------------------ games


def health(accuracy=None, dispersion=None, looks=6):
    """Gauges that have these levels from the second look on."""
    found = {"step": 50 * np.arange(looks), "gradient guide": np.linspace(2.0, 1.0, looks)}
    if accuracy:
        found["gradient critic"] = np.linspace(0.1, 0.3, looks)
        found["accuracy"] = np.array([0.9] + [accuracy] * (looks - 1))
        found["dispersion"] = np.array([1.0] + [dispersion] * (looks - 1))
    return found


GAMES = {"sound": health(0.55, 1.02), "fallen": health(0.8, 0.0), "plain": health()}


def test_a_game_has_panels_for_its_gauges():
    figure = plot_recognition.game(GAMES, inks={"sound": "#0072B2"})
    accuracy, dispersion, norms = figure.axes
    assert "accuracy" in accuracy.get_title()
    assert dispersion.get_yscale() == norms.get_yscale() == "log"
    curves = [line for line in norms.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 2 + 2 + 1
    lowest = min(np.min(line.get_ydata()) for line in dispersion.lines)
    assert lowest == plot_recognition.LEAST  # zero has no logarithm
    levels = [line.get_ydata()[0] for line in dispersion.lines if len(line.get_xdata()) == 2]
    assert levels == [1, 0.1]
    assert accuracy.lines[0].get_color() == "#0072B2"
    assert len(plot_recognition.game({"plain": health()}).axes) == 1
    with pytest.raises(BadInput, match="gauges"):
        plot_recognition.game({"nothing": {}})


def run_of(path, **gauges):
    """A run that fitted guides and compared nothing."""
    run = RunDirectory.create(path, {"command": "fit", "model": "banana", "seed": 0})
    fits = {
        name: SimpleNamespace(losses={"guide": np.ones(50)}, health=seen)
        for name, seen in gauges.items()
    }
    run.write_losses(fits)
    run.write_health(fits)
    return run


def test_health_comes_back_from_disk(tmp_path):
    run = run_of(tmp_path / "run", **GAMES, none={})
    found = run.health()
    assert list(found) == list(GAMES)
    for name, gauges in GAMES.items():
        assert found[name].keys() == gauges.keys()
        for gauge, values in gauges.items():
            np.testing.assert_allclose(found[name][gauge], values, rtol=1e-5)
    (run.path / "health.csv").unlink()  # as of runs of earlier versions
    assert run.health() == {}
    assert "Health" not in report(run.path).read_text()


def test_a_page_warns_of_a_collapse_and_shows_the_game(tmp_path):
    page = Page(report(run_of(tmp_path / "run", **GAMES).path).read_text())
    assert "fallen , while it was trained: the guide has collapsed" in page.text
    assert "sound , while" not in page.text
    assert "Health of the game" in page.text
    (said,) = [a for t, a in page.tags if t == "ul" and a.get("class") == "warned"]
    assert said


def test_fits_that_are_no_games_have_no_section(tmp_path):
    page = report(run_of(tmp_path / "run", plain=health()).path).read_text()
    assert "Health of the game" not in page
    assert 'class="warned"' not in page


# ------------------------------------------------------------------------------------------ films


class Veiled(zoo.GaussianVideo):
    """A short video with a frame that is hidden, which the model says."""

    def __init__(self):
        super().__init__(steps=4, side=4, occluded=(2,))

    @property
    def hidden(self):
        return (self.scale > self.scale.min()).expand(4, 16)


@pytest.fixture(scope="module")
def smooth():
    """Draws of a video model, from the exact posterior and from a factorised guide."""
    model = Veiled()
    guides = {"mean_field_encoder": Factorised(model)}
    trees = diagnostics.collect(model, guides, model.observations()[:2], draws=100, seed=0)
    record(model, trees)
    return model, trees


def frames(data):
    image = Image.open(io.BytesIO(data))
    found = []
    for k in range(image.n_frames):
        image.seek(k)
        found.append(np.asarray(image.convert("RGB")).astype(int))
    return image, found


def test_what_is_a_video():
    assert is_video(zoo.GaussianVideo())
    assert is_video(zoo.MovingBall())
    assert not is_video(zoo.HiddenMarkov())
    assert not is_video(zoo.SparseCoding())
    assert not is_video(zoo.from_pyro(lambda x: pyro.sample("z", dist.Normal(0, 1)) and pyro.sample(
        "x", dist.Normal(torch.zeros(9), 1).to_event(1), obs=x), torch.zeros(9)))  # fmt: skip


def test_a_record_is_what_draws_predict(smooth):
    model, trees = smooth
    for tree in trees.values():
        seen = tree["film"].dataset
        assert seen["mean"].dims == ("problem", "time", "pixel")
        z = torch.as_tensor(tree["posterior"]["z"].values)
        np.testing.assert_allclose(seen["mean"], model.predict({"z": z}).mean((0, 1)), atol=1e-6)
        np.testing.assert_array_equal(seen["hidden"].all("pixel"), [False, False, True, False])
        assert "where" not in seen


def test_places_are_the_marginals_of_the_posterior():
    """Of a ball among four cells: by enumeration of all paths."""
    model = zoo.MovingBall(2, steps=3, occluder=(1,)).double()
    x = model.observations()[:2]
    trees = diagnostics.collect(model, {}, x, draws=1000, chains=1, seed=0)
    record(model, trees)
    where = trees["exact"]["film"]["where"].values
    np.testing.assert_allclose(where.sum(-1), 1)
    paths = torch.cartesian_prod(*[torch.arange(16)] * 3)
    log_p = inference.Latents(model).log_joint({"z": paths[:, None].expand(-1, 2, -1)}, x)
    cells = torch.nn.functional.one_hot(paths // 4, 4).double()
    truth = torch.einsum("sb,stc->btc", log_p.softmax(0), cells).numpy()
    within(where, truth, (truth * (1 - truth) / 1000) ** 0.5 + 1e-4)
    np.testing.assert_array_equal(trees["exact"]["film"]["hidden"], model.hidden)


def test_nothing_is_recorded_of_other_models():
    model = zoo.ExplainingAway()
    trees = diagnostics.collect(model, {}, model.observations()[:1], draws=10, seed=0)
    record(model, trees)
    assert "film" not in trees["exact"].children
    with pytest.raises(BadInput, match="group film"):
        film(trees)


def test_a_film_repeats_and_veils_what_is_hidden(smooth):
    _, trees = smooth
    image, found = frames(film(trees, problem=1))
    assert (image.n_frames, image.info["loop"]) == (4, 0)
    assert 250 <= image.info["duration"] <= 400  # about three frames a second
    np.testing.assert_array_equal(found[0][2, 2], 255)  # as white as the page
    height = len(found[0])
    for one, other in itertools.pairwise(found):
        assert (one[: height // 2] != other[: height // 2]).any()
        assert (one[height // 2 :] != other[height // 2 :]).any()
    yellow = [((f[..., 0] - f[..., 2])[: height // 2] > 25).mean() for f in found]
    assert yellow[2] > 10 * max(yellow[:2] + yellow[3:]) + 0.1
    for wrong in (2, -1):
        with pytest.raises(BadInput, match="0 to 1"):
            film(trees, problem=wrong)


@pytest.mark.parametrize("make", [zoo.GaussianVideo, zoo.MovingBall])
def test_films_of_many_guides_are_light(make):
    model = make()
    trees = diagnostics.collect(model, {}, model.observations()[:1], draws=50, seed=0)
    trees |= {f"guide_{k}": trees["exact"] for k in range(5)}
    record(model, trees)
    assert len(film(trees)) < 300_000


def test_a_page_of_videos_has_a_film(smooth, tmp_path):
    """Made of what the run directory holds, and of that alone."""
    _, trees = smooth
    run = RunDirectory.create(tmp_path / "run", {"command": "compare", "model": "v", "seed": 0})
    run.write_losses({})
    metrics = {name: diagnostics.METRICS[name] for name in ("mean_error", "sd_ratio")}
    run.write_comparison(diagnostics.compare_draws(trees, metrics))
    run.write_draws(trees, model="v")
    page = report(run.path).read_text()
    images = [a for t, a in Page(page).tags if t == "img"]
    (shown,) = [a for a in images if a["src"].startswith("data:image/gif;base64,")]
    assert base64.b64decode(shown["src"].split(",")[1]) == film(trees)
    assert all(a["alt"] for a in images)
    assert page.index("Film of the first problem") < page.index("Every metric")
