"""Accounts of noisy circuits, their signatures and pictures, against closed forms; about 25 s."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from conftest import within
from matplotlib.figure import Figure
from test_report import Page
from threadpoolctl import threadpool_limits
from torch.distributions import Independent, Normal

import diagnostics
import inference
import zoo
from diagnostics import plot_reliability as plots
from diagnostics import reliability, synapse_statistics, variability_against_uncertainty
from diagnostics.reliability import accounted, is_priced
from inference import BadInput, Entropic, Incompatible, PowerLaw, ReliabilityCost
from inference.costs import MECHANISMS
from inference.guides.reliability_circuit import RecurrentCircuit
from inference.noise import CorrelatedNoise, PrivateNoise
from inference.seeds import seeded

TERMS = ("performance", "magnitude", "reliability")
JUDGE = diagnostics.METRICS["sd_ratio"]
SLOPES = {"entropic": 1.0} | dict(zip(MECHANISMS, (0.8, 0.75, 0.6, 0.5), strict=True))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


class Planted(PrivateNoise):
    """The exact means, and noise that is `times` the best independent one."""

    objective = ReliabilityCost

    def __init__(self, model, times=1.0):
        super().__init__(model)
        self.times = times

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        precision = p.precision_matrix.diagonal(dim1=-2, dim2=-1)
        return Independent(Normal(p.mean, self.times * precision.rsqrt()), 1)


class Whole(CorrelatedNoise):
    """The exact posterior."""

    def distribution(self, x):
        return self.model.exact().distribution(x)


@pytest.fixture(scope="module")
def smooth():
    return zoo.FactorAnalysis(7, 3, seed=1).double().requires_grad_(False)


@pytest.fixture(scope="module")
def x(smooth):
    return smooth.observations()[:4]


# the account


@pytest.mark.parametrize("times", [1.0, 1.7])
def test_account_of_the_best_independent_noise_is_the_closed_form(smooth, x, times):
    cost = PowerLaw(4 / 3, scale=0.2)
    found = reliability(Planted(smooth, times), x, cost=cost, draws=4000, seed=0)
    p = smooth.exact().distribution(x)
    precision = p.precision_matrix.diagonal(dim1=-2, dim2=-1)
    s = times * precision.rsqrt()
    magnitude = 0.5 * (p.mean**2 + s**2 + math.log(2 * math.pi)).sum(-1)
    within(found.magnitude, magnitude, found.magnitude_se)
    np.testing.assert_allclose(found.noise, s)
    np.testing.assert_allclose(found.energy, (0.75 * (0.2 / s) ** (4 / 3)).sum(-1))
    np.testing.assert_allclose(found.reliability, cost(s.log()).sum(-1))
    # S8, and what correlations are worth
    ratio = times**2
    gap = 0.5 * (precision.log().sum(-1) - torch.logdet(p.precision_matrix))
    gap = gap + 0.5 * 3 * (ratio - 1 - math.log(ratio))
    within(found.gap, gap, found.gap_se)
    np.testing.assert_allclose(found.log_evidence, smooth.exact().log_evidence(x))
    within(found.elbo, smooth.exact().log_evidence(x) - gap, found.elbo_se)
    within(found.sd, s, s / math.sqrt(2 * 4000))
    exact = p.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    within(found.exact_sd, exact, exact / math.sqrt(2 * 4000))


def test_the_exact_posterior_has_no_gap(smooth, x):
    found = reliability(Whole(smooth), x, cost=Entropic(), seed=0)
    within(found.gap, 0.0, found.gap_se)
    np.testing.assert_allclose(found.slack, 0.0, atol=1e-12)
    wrong = reliability(Planted(smooth, 2.0), x, cost=Entropic(), seed=0)
    assert (wrong.gap > 5 * wrong.gap_se).all()  # the planted error: too much noise


@pytest.mark.parametrize("magnitude", ["expected", "mean"])
def test_slack_is_what_separates_the_total_from_the_elbo(smooth, x, magnitude):
    cost, guide = PowerLaw("trafficking", scale=0.1), Planted(smooth, 0.6)
    found = reliability(guide, x, cost=cost, magnitude=magnitude, seed=3)
    np.testing.assert_allclose(found.total, sum(found[t] for t in TERMS))
    assert (found.slack > 0).all()
    bound = found.slack - found.total
    free = reliability(guide, x, cost=Entropic(), seed=3)
    np.testing.assert_allclose(found.elbo, free.elbo)  # it is the guide's, whatever it pays
    if magnitude == "expected":
        np.testing.assert_allclose(bound, found.elbo)
    else:  # |m|^2 < E |z|^2: below minus the ELBO, by (1/2) sum s^2
        np.testing.assert_allclose(
            (bound - found.elbo).mean(), 0.5 * (found.noise**2).sum("unit").mean(), rtol=0.2
        )


def test_errors_are_the_spread_of_repeats(smooth):
    """Of 100 problems and 10 runs, so that variances are known to 5 %."""
    x, guide = smooth.observations(), Planted(smooth)
    runs = [accounted(guide, x, None, cost=Entropic(), draws=40, seed=k) for k in range(10)]
    found = xarray.concat(runs, "run")
    spread = found.total.var("run", ddof=1).mean()
    within((found.total_se**2).mean() / spread, 1.0, math.sqrt(2 / 900))
    assert "gap" not in found
    assert (found.reliability_se < 1e-12).all()


def test_account_of_a_data_set_that_is_one_problem():
    model = zoo.BayesianMLP(20, hidden=2)
    guide = inference.AutoNormal(model)
    guide.bind(model.observations())
    found = reliability(guide, model.observations(), cost=Entropic(), draws=20, seed=0)
    assert found.sizes == {"problem": 1, "unit": guide.latents.size}
    assert found.attrs["draws"] == 20
    assert "exact_sd" not in found


def test_accounts_refused(smooth, x):
    knobs = {"cost": Entropic(), "seed": 0}
    with pytest.raises(Incompatible, match="Gaussian noise"):
        reliability(inference.Flow(smooth), x, **knobs)
    with pytest.raises(BadInput, match="draws"):
        reliability(Planted(smooth), x, **knobs, draws=1)
    with pytest.raises(BadInput, match="magnitude"):
        reliability(Planted(smooth), x, **knobs, magnitude="expect")
    with pytest.raises(BadInput, match="x: expected"):
        reliability(Planted(smooth), x[:, :3], **knobs)


# variability against uncertainty


def trees(slope, *, spread=1.5, draws=1000, seed=0):
    """Draws whose variance is a power of that of others, over 12 problems of 5 latents."""
    g = np.random.default_rng(seed)
    exact = np.exp(g.normal(-2, spread, size=(12, 5)))
    own = 0.3 * exact**slope
    tree = tree_of(g.normal(size=(2, draws // 2, 12, 5)) * np.sqrt(own))
    return tree, tree_of(g.normal(size=(2, draws // 2, 12, 5)) * np.sqrt(exact)), exact


def tree_of(z):
    """As `diagnostics.draw` makes it, of latents (chain, draw, problem, latent)."""
    data = xarray.Dataset({"z": (("chain", "draw", "problem", "latent"), z)})
    return xarray.DataTree.from_dict({"posterior": data})


@pytest.mark.parametrize(("name", "slope"), SLOPES.items())
def test_variability_accepts_its_cost_and_rejects_others(name, slope):
    tree, reference, exact = trees(slope)
    for knobs in ({"reference": reference}, {"variance": exact}):
        found = variability_against_uncertainty(tree, **knobs, seed=0)
        assert found.mechanism.values.tolist() == list(SLOPES)
        np.testing.assert_allclose(found.predicted, list(SLOPES.values()))
        assert [m for m, yes in zip(SLOPES, found.accepted.values, strict=True) if yes] == [name]
        within(found.value, slope, found.se)
        assert 0 <= found.dilution < 0.01
        assert found.attrs["reason"] == ""


def test_intervals_of_variability_cover():
    """Of 95 % intervals, over 60 planted circuits."""
    accepted = []
    for k in range(60):
        tree, _, exact = trees(0.6, draws=100, seed=k)
        found = variability_against_uncertainty(tree, variance=exact, seed=k)
        accepted.append(bool(found.accepted.sel(mechanism="actin")))
    assert np.mean(accepted) > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 60)


def test_independent_noise_follows_the_conditional_variance():
    """Noise of variance 1 / Lambda_ii is Bayesian; against marginal variance it looks otherwise."""
    g = np.random.default_rng(0)
    problems, d, shape = 12, 4, (2, 1000, 12, 4)
    own = np.exp(g.normal(size=(problems, d)))
    shared = 2 * own  # the more a latent varies, the more of it is shared
    covariance = np.eye(d) * own[:, None] + shared[:, :, None] * shared[:, None]
    mix = np.linalg.cholesky(covariance)
    best = 1 / np.diagonal(np.linalg.inv(covariance), axis1=1, axis2=2)
    reference = tree_of(np.einsum("bij,csbj->csbi", mix, g.normal(size=shape)))
    tree = tree_of(g.normal(size=shape) * np.sqrt(best))
    conditional, marginal = (
        variability_against_uncertainty(tree, reference, kind=kind, seed=0)
        for kind in ("conditional", "marginal")
    )
    assert conditional.accepted.sel(mechanism="entropic")
    assert not marginal.accepted.sel(mechanism="entropic")
    error = best * np.sqrt(2 / (2000 - d))
    within(conditional.uncertainty, best, error)
    true = np.diagonal(covariance, axis1=1, axis2=2)
    within(marginal.uncertainty, true, true * np.sqrt(2 / 1999))


def test_nothing_is_told_where_all_is_equally_uncertain():
    tree, reference, _ = trees(0.5, spread=0.0)
    found = variability_against_uncertainty(tree, reference, seed=0)
    assert found.dilution > 0.5
    assert np.isnan(found.value)
    assert not found.accepted.any()
    assert "nearly as unsure" in found.attrs["reason"]
    plots.variability(found).canvas.draw()


def test_variability_refused():
    tree, reference, exact = trees(1.0, draws=100)
    short = reference.isel(draw=slice(15))
    cases = [
        ({}, "neither"),
        ({"reference": reference, "variance": exact}, "both"),
        ({"reference": reference, "kind": "marginals"}, "kind"),
        ({"variance": exact[:5]}, "12 problems of 5 latents; got 5 of 5"),
        ({"variance": -exact}, "numbers > 0"),
        ({"reference": short}, "at least 20; got 15"),
        ({"variance": exact, "mechanisms": {"none": 0.0}}, "rho"),
    ]
    for knobs, message in cases:
        with pytest.raises(BadInput, match=message):
            variability_against_uncertainty(tree, **knobs, seed=0)


def test_quenching_of_posterior_draws():
    """Variance that falls with contrast, of a guide without a circuit."""
    contrast = np.geomspace(0.5, 4, 8)
    g = np.random.default_rng(0)
    z = g.normal(size=(2, 500, 8, 3)) / np.sqrt(contrast)[:, None]
    found = diagnostics.variance_against_contrast(
        tree_of(z), contrast, group="posterior", quantity="z", seed=0
    )
    within(found.value, -1.0, found.se)
    assert found.high < 0


def test_quenching_of_a_circuit():
    """Untrained, its noise is the same at all contrasts; the exact posterior's is not."""
    model = zoo.ObservedContrast()
    x = model.observations()
    guides = {"circuit": RecurrentCircuit(model), "posterior": model.exact()}
    found = {}
    for group, guide in guides.items():
        tree = diagnostics.draw(model, guide, x, draws=250, chains=4, seed=0)
        quantity = {"circuit": "potentials", "posterior": "u"}[group]
        found[group] = diagnostics.variance_against_contrast(
            tree, x[0].numpy(), group=group, quantity=quantity, seed=0
        )
    within(found["circuit"].value, 0.0, found["circuit"].se)
    assert found["posterior"].high < -0.5


# what synapses are worth


def bound(model, seed=0):
    """A guide of a model's weights, away from its start."""
    guide = inference.AutoNormal(model)
    guide.bind(model.observations())
    with torch.no_grad(), seeded(seed):
        for name, p in guide.named_parameters():
            scale = 0.4 if "loc" in name else 0.2
            p.add_(scale * torch.randn_like(p))
    return guide


@pytest.mark.parametrize("problem", [0, 2])
def test_curvature_of_a_logistic_neuron(problem):
    model = zoo.LogisticRegression(trials=60, inputs=4, problems=3, alpha=2.0).double()
    guide, x = bound(model), model.observations()
    q = guide.distribution(x)
    inputs, labels = (t[problem] for t in x)
    p = (inputs @ q.mean[problem]).sigmoid()
    found = synapse_statistics(guide, x, problem=problem, seed=0)
    empirical = ((labels - p)[:, None] * inputs).square().sum(0)
    np.testing.assert_allclose(found.curvature, empirical.detach())
    np.testing.assert_allclose(found.learning_rate, (60 / empirical.detach()) ** 0.5)
    np.testing.assert_allclose(found.posterior_variance, 1 / (empirical.detach() + 2.0))
    np.testing.assert_allclose(found.variance, q.variance[problem].detach())
    np.testing.assert_allclose(found.rate, inputs.abs().mean(0))
    np.testing.assert_allclose(found.mean_square_rate, inputs.square().mean(0))
    assert found.site.values.tolist() == ["w"] * 4
    # the true Fisher information, p (1 - p) x^2
    again = synapse_statistics(guide, x, problem=problem, replicas=400, seed=0)
    var = p * (1 - p)
    true = (var[:, None] * inputs**2).sum(0).detach()
    se = ((var * (1 - 2 * p) ** 2)[:, None] * inputs**4).sum(0).detach().sqrt() / 20
    within(again.curvature, true, se)
    np.testing.assert_allclose(again.learning_rate, found.learning_rate)


def test_curvature_of_a_linear_neuron():
    model = zoo.BayesianRegression(trials=40, noise=0.7, problems=2).double()
    guide, x = bound(model), model.observations()
    inputs, targets = (t[1] for t in x)
    residual = targets - inputs @ guide.distribution(x).mean[1]
    found = synapse_statistics(guide, x, problem=1, seed=0)
    each = (residual[:, None] * inputs / 0.49).square().sum(0)
    np.testing.assert_allclose(found.curvature, each.detach())
    again = synapse_statistics(guide, x, problem=1, replicas=400, seed=0)
    within(
        again.curvature,
        inputs.square().sum(0) / 0.49,
        (2 * inputs**4).sum(0).sqrt() / 0.49 / math.sqrt(400),
    )


def test_synapses_of_a_network_that_do_nothing_are_counted():
    model = zoo.BayesianMLP(30, hidden=5).double()
    guide, x = bound(model), model.observations()
    found = synapse_statistics(guide, x, seed=0)
    lat, (images, labels) = guide.latents, x
    u = guide.distribution(x).mean.detach()
    total = torch.zeros(lat.size).double()
    for row in range(30):
        at = u.clone().requires_grad_()
        one = (images[row : row + 1], labels[row : row + 1])
        (g,) = torch.autograd.grad(lat.log_terms(at, one)[1].sum(), at)
        total += g[0].square()
    np.testing.assert_allclose(found.curvature, total[total > 0])
    silent = int((images == 0).all(0).sum())
    assert found.attrs["dropped"] == int((total == 0).sum()) >= 5 * silent > 0
    assert f"{found.attrs['dropped']} of {lat.size} synapses" in found.attrs["reason"]
    assert set(found.site.values) == {"w1", "b1", "w2", "b2"}
    first = synapse_statistics(guide, x, sites=["w1"], seed=0)
    assert set(first.site.values) == {"w1"}
    rates = images.abs().mean(0)[:, None].expand(64, 5).reshape(-1)[(total > 0)[:320]]
    np.testing.assert_allclose(first.rate, rates)
    assert first.attrs["dropped"] == int((total[:320] == 0).sum())


def test_some_rows_stand_for_all():
    """Over many choices of 20 of 60 rows, the mean is the sum over all."""
    model = zoo.LogisticRegression(trials=60, inputs=4, problems=1).double()
    guide, x = bound(model), model.observations()
    whole = synapse_statistics(guide, x, seed=0).curvature
    some = [synapse_statistics(guide, x, rows=20, seed=k).curvature for k in range(100)]
    values = xarray.concat(some, "choice")
    within(values.mean("choice"), whole, values.std("choice", ddof=1) / 10)
    np.testing.assert_allclose(synapse_statistics(guide, x, rows=60, seed=1).curvature, whole)


def rows_model(extra=None, *, stubborn=False):
    """A linear neuron whose data set is one problem, perhaps with more than its rows."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(25, 3, generator=g).double()
    targets = inputs @ torch.tensor([1.0, -0.5, 2.0]).double() + 0.3

    def program(a, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        if stubborn and float(w.sum().detach()) > 1e9:  # torch cannot vectorise a branch
            w = 2 * w
        if extra:
            pyro.factor("more", extra * w.sum())
        with pyro.plate("rows", len(a)):
            pyro.sample("y", dist.Normal(a @ w, 0.5), obs=y)

    return zoo.from_pyro(program, (inputs, targets))


def test_programs_that_cannot_be_vectorised_go_row_by_row():
    plain, stubborn = (rows_model(stubborn=s) for s in (False, True))
    found = [synapse_statistics(bound(m), m.observations(), seed=0) for m in (plain, stubborn)]
    np.testing.assert_allclose(found[0].curvature, found[1].curvature)
    inputs = plain.observations()[0]
    np.testing.assert_allclose(found[0].rate, inputs.abs().mean(0))
    assert "rate" not in found[1]  # its weights are summed: what else they meet cannot be seen


def test_statistics_go_straight_into_the_signature():
    """Noise by equation 28 follows its own law; the planted error is another exponent."""
    model = zoo.LogisticRegression(trials=300, inputs=12, problems=1).double()
    x = model.observations()
    guide = bound(model)
    worth = synapse_statistics(guide, x, seed=0)
    law = PowerLaw("actin", scale=0.1).optimal_sd(torch.as_tensor(worth.curvature.values))
    noisy = worth.assign(variance=("synapse", (law**2).numpy()))
    found = diagnostics.synaptic_variance(noisy, seed=0)
    assert set(found.predictor.values) == set(worth.data_vars) - {"variance"}
    at = found.sel(predictor=["curvature", "learning_rate"])
    assert at.accepted.sel(mechanism="actin").all()
    assert not at.accepted.sel(mechanism=["calcium efflux", "trafficking"]).any()


def test_statistics_refused(smooth):
    model = zoo.LogisticRegression(trials=20, inputs=3, problems=2)
    x, guide = model.observations(), bound(model)
    whole, silent = zoo.FactorAnalysis(7, 3, seed=1), zoo.LogisticRegression(20, problems=2)
    silent.keep((0 * x[0], x[1]))
    cases = [
        (guide, x, {"problem": 2}, "problem"),
        (guide, x, {"rows": 21}, "at most 20"),
        (guide, x, {"rows": 0}, "rows"),
        (guide, x, {"replicas": -1}, "replicas"),
        (guide, x, {"sites": ["v"]}, "site"),
        (bound(silent), silent.observations(), {}, "got none"),
        (bound(whole), whole.observations(), {}, "rows are independent"),
        (inference.Flow(model), x, {}, "Gaussian noise"),
    ]
    for who, data, knobs, message in cases:
        with pytest.raises((BadInput, Incompatible), match=message):
            synapse_statistics(who, data, **knobs, seed=0)
    factor = rows_model(extra=2.0)
    with pytest.raises(Incompatible, match="one by one"):
        synapse_statistics(bound(factor), factor.observations(), seed=0)


# pictures and pages


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
