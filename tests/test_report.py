"""Pages: what they say, that they stand alone, and that a browser shows them; about 25 s."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch.distributions import MultivariateNormal
from typer.testing import CliRunner

import diagnostics
import inference
import neuroguide
import zoo
from diagnostics import METRICS, RunDirectory, plots
from diagnostics.matrix import overview
from diagnostics.report import report
from diagnostics.verdict import AT_FLOOR
from inference import BadCheckpoint, BadInput
from inference.guide import Draws

WIDTHS = (420, 1100)  # of a telephone and of a window, in CSS pixels
FAST = ("mean_error", "sd_ratio", "correlation_error", "marginal_tv", "c2st", "rhat")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


class Narrow(inference.PackedGuide):
    """The exact posterior with sds 30 % too small."""

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        return MultivariateNormal(p.mean, scale_tril=0.7 * p.scale_tril)


class Sticky(Narrow):
    """The same, each draw given four times: a chain."""

    independent = False

    def draw(self, x, *, draws, chains, seed, progress=False):
        found = super().draw(x, draws=-(-draws // 4), chains=chains, seed=seed)
        values = {n: v.repeat_interleave(4, 1)[:, :draws] for n, v in found.values.items()}
        return Draws(values)


class Coins(inference.Guide):
    """Every cause on with the same probability, whatever x."""

    def forward(self, x):
        with self.latents.plate(x):
            return self.sample_sites(
                lambda s: dist.Bernoulli(torch.full(s.shape, 0.2)).to_event(s.event_dim)
            )


class Copy(inference.Guide):
    """The exact posterior under another name."""

    def forward(self, x):
        return self.model.exact()(x)


def written(path, name, model, guides, **config):
    """A finished run, without the command line."""
    x = model.observations()[:2]
    trees = diagnostics.collect(model, guides, x, draws=250, seed=0)
    for guide in guides:
        diagnostics.watch(trees[guide], guides[guide], x, reference=trees["exact"], seed=0)
    run = RunDirectory.create(path, {"command": "compare", "model": name, "seed": 0, **config})
    run.write_losses({})
    run.write_comparison(diagnostics.compare_draws(trees, {m: METRICS[m] for m in FAST}))
    run.write_draws(trees, model=name)
    report(path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("some runs")
    smooth = zoo.FactorAnalysis(7, 3, seed=1)
    binary = zoo.NoisyOr()
    return [
        written(
            base / "fa",
            "factor_analysis",
            smooth,
            {"narrow": Narrow(smooth), "sticky": Sticky(smooth)},
        ),
        written(base / "or", "noisy_or", binary, {"coins": Coins(binary), "copy": Copy(binary)}),
    ]


@pytest.fixture(scope="module")
def circuits(tmp_path_factory):
    """A run of a circuit that samples, untrained."""
    model = zoo.Ring()
    short = inference.Sampling(levels=20)
    guide = inference.ReservoirSampler(model, neurons=200, hidden=(8,), sampling=short)
    path = tmp_path_factory.mktemp("circuits")
    return written(path / "ring", "ring", model, {"reservoir_sampler": guide})


@pytest.fixture(scope="module")
def iterations(tmp_path_factory):
    """A run of circuits that iterate, one of them by spikes, and of a network that does not."""
    model = zoo.PoissonCoding()
    guides = {
        "iterative_poisson": inference.IterativePoisson(model, steps=40),
        "online_poisson": inference.OnlinePoisson(model, steps=15),
        "poisson_encoder": inference.PoissonEncoder(model),
    }
    return written(tmp_path_factory.mktemp("iterations") / "run", "poisson_coding", model, guides)


class Page(HTMLParser):
    """Tags, links and visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.targets, self.words = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.targets += [v for k, v in attrs if k in ("href", "src") and v]

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_begins_with_verdicts_then_pictures_then_tables(runs):
    page = (runs[0] / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    seen = Page(page)
    assert "narrow : over-confident by" in seen.text
    places = [page.index(s) for s in ("over-confident by", "data:image/png", "<table>", "<pre>")]
    assert places == sorted(places)
    assert all(METRICS[m].title in seen.text for m in ("mean_error", "c2st"))
    assert METRICS["marginal_tv"].title not in seen.text  # it says nothing of any guide


def test_chains_are_shown_of_guides_that_have_some(runs):
    seen = Page((runs[0] / "report.html").read_text())
    assert "Chains of sticky" in seen.text
    assert "Traces of sticky" in seen.text
    assert "Chains of narrow" not in seen.text
    assert "Chains of exact" not in seen.text


def test_discrete_latents_get_bars_and_no_densities(runs):
    seen = Page((runs[1] / "report.html").read_text())
    assert "coins : wrong marginal of" in seen.text or "coins : misses" in seen.text
    assert f"copy : {AT_FLOOR}" in seen.text
    assert "Intervals of the first problem" not in seen.text
    trees = dict(RunDirectory.open(runs[1]).draws().children)
    figure = plots.marginals(trees)
    filled = [ax for ax in figure.axes if ax.axison]
    assert all(ax.patches and not ax.lines for ax in filled)
    # heights are frequencies: each guide's sum to one
    heights = [bar.get_height() for bar in filled[0].containers[0]]
    assert sum(heights) == pytest.approx(1.0)
    assert plots.forest(trees) is None
    assert plots.ranks(trees["exact"]) is None


def test_circuits_are_shown_between_the_posterior_and_the_table(runs, circuits):
    page = (circuits / "report.html").read_text()
    order = ["Posterior correlations", "Score of", "Runs of", "Neurons of", "Every metric"]
    places = [page.index(f"<h2>{title}") for title in order]
    assert places == sorted(places)
    images = [a["alt"] for t, a in Page(page).tags if t == "img"]
    assert "Rates of neurons over time" in images
    for run in runs:
        other = Page((run / "report.html").read_text()).text
        assert not re.search(r"\b(Score|Runs|Neurons) of", other)


def test_iteration_is_shown_step_by_step_and_guides_beside_one_another(runs, circuits, iterations):
    page = (iterations / "report.html").read_text()
    order = [
        "Posterior correlations", "Inference by iterative poisson", "Inference by online poisson",
        "Free energy", "Reconstruction against silence", "Dictionary", "Every metric",
    ]  # fmt: skip
    places = [page.index(f"<h2>{title}") for title in order]
    assert places == sorted(places)
    assert "Inference by poisson encoder" not in page  # it takes no steps
    text = Page(page).text
    assert "never below -log p(x)" in text
    assert not re.search(r"{[{%]", page)
    for run in (*runs, circuits):
        other = Page((run / "report.html").read_text()).text
        assert not re.search(r"Inference by|Free energy|silence|Dictionary", other)


def test_records_of_inference_come_back_from_disk(iterations):
    draws = RunDirectory.open(iterations).draws()
    model = zoo.PoissonCoding()
    guide = inference.IterativePoisson(model, steps=40)
    found = draws["iterative_poisson"]["refinement"].to_dataset()
    again = diagnostics.refinement(guide, model.observations()[:2], seed=0)
    for name in again.data_vars:
        np.testing.assert_allclose(found[name], again[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert tuple(found["dictionary"].attrs["image_shape"]) == model.image_shape
    assert found.attrs["signal"] == "rates"


def test_pictures_without_contrast_have_no_plane_of_silence(tmp_path):
    """One pixel has no R²; the rest of the page is there."""
    model = zoo.ExplainingAway()
    guides = {"iterative_gaussian": inference.IterativeGaussian(model, steps=20)}
    page = written(tmp_path / "run", "explaining_away", model, guides) / "report.html"
    assert "Free energy over inference" in page.read_text()
    assert "against silence" not in page.read_text()


class Loud(inference.Guide):
    """Counts far above the exact posterior's, for every problem the same."""

    def forward(self, x):
        with self.latents.plate(x):
            return self.sample_sites(
                lambda s: dist.Poisson(torch.full(s.shape, 12.0)).to_event(s.event_dim)
            )


def test_bars_of_counts_stand_at_their_counts_and_the_rare_largest_together():
    model = zoo.PoissonCoding()
    trees = diagnostics.collect(
        model, {"loud": Loud(model)}, model.observations()[:1], draws=500, seed=0
    )
    figure = plots.marginals(trees)
    ax = figure.axes[0]
    z = diagnostics.packed(trees["loud"])[0, :, 0]
    exact, loud = ([bar.get_height() for bar in c] for c in ax.containers)
    last = len(loud) - 1
    assert plots.MAX_BARS <= last < z.max()
    assert (z > last).mean() <= plots.RARE
    assert sum(exact) == pytest.approx(1)
    assert sum(loud) == pytest.approx(1)
    assert loud[9] == pytest.approx((z == 9).mean())
    assert loud[last] == pytest.approx((z >= last).mean())
    assert ax.get_xticklabels()[-1].get_text() == f"{last}+"
    middle = np.mean([c[3].get_x() + c[3].get_width() / 2 for c in ax.containers])
    assert middle == pytest.approx(3)


def test_figures_leave_nothing_in_pyplot(runs):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    trees = dict(RunDirectory.open(runs[0]).draws().children)
    figure = plots.forest(trees, problem=1)
    assert plt.get_fignums() == before
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["exact", "narrow", "sticky"]


def test_nothing_needs_a_network(runs, tmp_path):
    for page in (*(r / "report.html" for r in runs), overview(runs, tmp_path / "all.html")):
        seen = Page(page.read_text())
        assert not [t for t in seen.targets if re.match(r"(\w+:)?//", t)]
        loaded = [a for t, a in seen.tags if t == "script" and "src" in a]
        assert not loaded + [t for t, _ in seen.tags if t in ("iframe", "object")]
        assert not re.findall(r"url\(|@import", page.read_text())
        images = [a for t, a in seen.tags if t == "img"]
        assert all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in images)


def test_overview_is_models_by_guides(runs, tmp_path):
    out = overview(runs, tmp_path / "pages" / "all.html")
    seen = Page(out.read_text())
    cells = [a for t, a in seen.tags if t == "td"][:8]  # two runs, four guides
    titles = [a["title"] for a in cells]
    assert sum(t == "not asked" for t in titles) == 4
    assert any(re.match(r"narrow on \w+.*: over-confident by", t) for t in titles)
    shown = [
        a["class"].split() for t, a in seen.tags if t == "div" and "q-c2st" in a.get("class", "")
    ]
    assert {state for *_, state in shown} == {"at", "above"}
    links = [t for t in seen.targets if t.endswith("report.html")]
    assert all("%20" in t for t in links)
    from urllib.parse import unquote

    assert all((out.parent / unquote(t)).exists() for t in links)


def test_overview_refuses_what_compared_nothing(runs, tmp_path):
    RunDirectory.create(tmp_path / "fit", {"command": "fit", "model": "banana"}).write_losses({})
    with pytest.raises(BadInput, match="neuroguide compare"):
        overview([*runs, tmp_path / "fit"], tmp_path / "all.html")
    with pytest.raises(BadCheckpoint):
        overview([tmp_path / "none"], tmp_path / "all.html")
    assert not (tmp_path / "all.html").exists()


def test_command_writes_reports_and_one_page(runs, tmp_path):
    before = (runs[0] / "report.html").read_text()
    (runs[0] / "report.html").unlink()
    done = CliRunner().invoke(
        neuroguide.app, ["report", *map(str, runs), "--out", str(tmp_path / "all.html")]
    )
    assert done.exit_code == 0, done.output
    assert (runs[0] / "report.html").read_text() == before
    assert (tmp_path / "all.html").exists()


def test_text_is_dark_on_light(runs):
    """WCAG contrast of at least 4.5 for every colour of text on every colour of background."""
    style = re.search(r"<style>(.*?)</style>", (runs[0] / "report.html").read_text(), re.S)[1]
    inks = set(re.findall(r"[ {;]color: (#\w+)", style))
    papers = set(re.findall(r"background: (#\w+)", style))
    assert len(inks) >= 3
    for ink in inks:
        for paper in papers:
            light, dark = _luminance(paper), _luminance(ink)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def _luminance(code):
    code = "".join(2 * c for c in code[1:]) if len(code) == 4 else code[1:]
    channels = np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_pages_without_complaint(
    runs, circuits, iterations, tmp_path, width, browse
):
    """No console error, no blank screenshot. About 15 s."""
    from PIL import Image

    pages = [run / "report.html" for run in (*runs, circuits, iterations)]
    for page in (*pages, overview(runs, tmp_path / "a.html")):
        shot = tmp_path / f"{page.stem}-{width}.png"
        done = browse(page, f"--window-size={width},1600", f"--screenshot={shot}")
        assert shot.exists(), done.stderr[-2000:]
        assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
        pixels = np.asarray(Image.open(BytesIO(shot.read_bytes())).convert("L"))
        assert pixels.shape[1] == width
        assert 0.002 < (pixels < 128).mean() < 0.5  # some ink, mostly paper


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out_at_the_side(runs, circuits, iterations, tmp_path, width, browse):
    """In a frame of that width, for windows of headless Chromium have at least 500. About 10 s."""
    frame, wide = tmp_path / "frame.html", tmp_path / "wide.html"
    wide.write_text('<!doctype html><body><p style="width: 2000px">planted</p></body>')
    sticks_out = {}
    for page in (*(run / "report.html" for run in (*runs, circuits, iterations)), wide):
        frame.write_text(
            f"""<!doctype html><body><iframe id="page" src="{page.as_uri()}"
            style="border: 0; width: {width}px; height: 20000px"></iframe><script>
            page.onload = () => {{
              const all = page.contentDocument.documentElement;
              document.body.dataset.seen = all.scrollWidth + " in " + all.clientWidth;
            }}</script></body>"""
        )
        found = browse(frame, "--allow-file-access-from-files", "--dump-dom").stdout
        inside, room = re.search(r'data-seen="(\d+) in (\d+)"', found).groups()
        assert int(room) == width
        sticks_out[page] = int(inside) > width
    assert [page for page, out in sticks_out.items() if out] == [wide]
