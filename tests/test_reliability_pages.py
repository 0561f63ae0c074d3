"""Pictures and pages of circuits that pay for reliability; about 10 s."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import within
from matplotlib.figure import Figure
from test_reliability_diagnostics import SLOPES, TERMS, Planted, trees
from test_report import Page

import diagnostics
import inference
import zoo
from diagnostics import plot_reliability as plots
from diagnostics import reliability, variability_against_uncertainty
from diagnostics.reliability import is_priced
from inference import Entropic, PowerLaw
from inference.costs import MECHANISMS

pytestmark = pytest.mark.usefixtures("one_thread")

JUDGE = diagnostics.METRICS["sd_ratio"]


@pytest.fixture(scope="module")
def smooth():
    return zoo.FactorAnalysis(7, 3, seed=1).double().requires_grad_(False)


@pytest.fixture(scope="module")
def x(smooth):
    return smooth.observations()[:4]


def test_pictures(smooth, x):
    cost = PowerLaw("actin", scale=0.2)
    accounts = {"a_b": Planted(smooth), "c": Planted(smooth, 2.0)}
    accounts = {n: reliability(g, x, cost=cost, draws=40, seed=0) for n, g in accounts.items()}
    tree, reference, _ = trees(0.5, draws=200)
    kinds = {
        k: variability_against_uncertainty(tree, reference, kind=k, seed=0)
        for k in ("marginal", "conditional")
    }
    figures = {
        "accounts": plots.account(accounts, inks={"c": "#009E73"}),
        "account": plots.account(accounts["c"].drop_vars("gap")),
        "two kinds": plots.variability(kinds),
        "one kind": plots.variability(kinds["marginal"], ink="#009E73"),
        "price": plots.price(scale=0.3),
    }
    for name, figure in figures.items():
        assert isinstance(figure, Figure), name
        assert all(ax.has_data() for ax in figure.axes), name
        assert figure.axes[0].get_ylabel(), name
        figure.canvas.draw()
    left, right = figures["accounts"].axes
    heights = [sum(bar.get_height() for bar in c) for c in left.containers if len(c) == 1]
    totals = sum(float(a[t].mean()) for a in accounts.values() for t in TERMS)
    np.testing.assert_allclose(sum(heights), totals)
    names = [t.get_text() for t in right.get_legend().get_texts()]
    assert names == ["KL(q || posterior)", "slack of the cost"]
    assert len(figures["account"].axes) == 1
    free = reliability(Planted(smooth), x, cost=Entropic(), draws=40, seed=0)
    names = [t.get_text() for t in plots.account(free).axes[1].get_legend().get_texts()]
    assert names == ["KL(q || posterior)"]  # there is no slack


def test_prices_touch_the_entropy_and_are_never_below():
    left, right = plots.price(scale=0.2).axes
    bound, *laws = [line.get_ydata() for line in left.lines[: 1 + len(MECHANISMS)]]
    for law in laws:
        assert ((law - bound) > -1e-12).all()
        assert (law - bound).min() < 1e-3
    posterior, *noise = [line.get_ydata() for line in right.lines[: 1 + len(MECHANISMS)]]
    for (name, slope), sd in zip(list(SLOPES.items())[1:], noise, strict=True):
        found = np.polyfit(np.log(posterior), np.log(sd), 1)[0]
        np.testing.assert_allclose(found, slope, err_msg=name)


class Unpriced(Planted):
    """The same, published with another objective."""

    objective = inference.ELBO


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    guides = {"noisy": Planted(model), "quiet": Unpriced(model)}
    x = model.observations()[:2]
    trees = diagnostics.collect(model, guides, x, draws=250, seed=0)
    for name, guide in guides.items():
        diagnostics.watch(trees[name], guide, x, reference=trees["exact"], seed=0)
    path = tmp_path_factory.mktemp("priced") / "run"
    return finished(path, trees, diagnostics.compare_draws(trees, {"sd_ratio": JUDGE}))


def finished(path, trees, comparison):
    """A run, without the command line."""
    run = diagnostics.RunDirectory.create(path, {"model": "factor_analysis", "seed": 0})
    run.write_losses({})
    run.write_comparison(comparison)
    run.write_draws(trees)
    diagnostics.report(path)
    return path


def test_pages_show_the_noise_of_guides_that_pay_for_it(page):
    text = (page / "report.html").read_text()
    order = ["Posterior correlations", "What reliability costs", "Noise of noisy", "Every metric"]
    places = [text.index(f"<h2>{title}") for title in order]
    assert places == sorted(places)
    assert "Noise of quiet" not in text
    assert "variability against exact uncertainty" in Page(text).text
    assert "Terms of the cost by guide" in [a["alt"] for t, a in Page(text).tags if t == "img"]


def test_accounts_come_back_from_disk(page):
    draws = diagnostics.RunDirectory.open(page).draws()
    assert "reliability" not in draws["quiet"].children
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = model.observations()[:2]
    found = draws["noisy"]["reliability"].to_dataset()
    again = reliability(Planted(model), x, cost=Entropic(), seed=0)
    for name in (*TERMS, "elbo", "gap", "noise"):
        np.testing.assert_allclose(found[name], again[name], rtol=1e-4, err_msg=name)
    within(found.exact_sd, again.exact_sd, again.exact_sd / math.sqrt(1000))


def test_pages_of_other_guides_do_not(page, tmp_path):
    """The same run, had nobody paid."""
    old = diagnostics.RunDirectory.open(page)
    trees = {n: t.drop_nodes("reliability", errors="ignore") for n, t in old.draws().items()}
    run = finished(tmp_path / "run", trees, old.comparison())
    text = Page((run / "report.html").read_text()).text
    assert "Posterior correlations" in text
    assert "What reliability costs" not in text
    assert "Noise of" not in text


def test_who_pays():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    assert is_priced(Planted(model))
    for guide in (Unpriced(model), inference.MeanFieldEncoder(model), model.exact()):
        assert not is_priced(guide)
