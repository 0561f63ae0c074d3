"""Importance weights, scores, chains and modes: what they accept, what they see, what they miss.

About 20 s.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from arviz_base import from_dict
from conftest import within
from scipy.special import logsumexp
from threadpoolctl import threadpool_limits
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Uniform,
)

import diagnostics
import inference
import zoo
from diagnostics import METRICS, RunDirectory
from diagnostics.compare import Collected
from diagnostics.stein import stein_kernel
from diagnostics.weights import iwae_bound

K = 5.0  # standard errors
REVERSE = ("elbo_gap", "iwae_gap", "reverse_ess")
FORWARD = ("eubo_gap", "forward_ess")
SCORES = ("ksd", "fisher_divergence")
CHAINS = ("ess", "ess_tail", "autocorrelation_time", "ess_per_second", "ess_per_time")
MINE = {name: METRICS[name] for name in (*REVERSE, *FORWARD, *SCORES)}
WITH_MODES = MINE | {"mode_occupancy": METRICS["mode_occupancy"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def excess(found, guide, metric):
    """How many standard errors the mean over problems is from that of a perfect guide."""
    at = found.sel(guide=guide, metric=metric)
    se = math.sqrt(float((at.se**2).mean()) / at.sizes["problem"])
    return abs(float(at.value.mean()) - METRICS[metric].ideal) / max(se, 1e-9)


# planted errors, through `compare`


class Planted(inference.PackedGuide):
    """The exact posterior of factor analysis with an error of a known kind."""

    def __init__(self, model, *, shift=0.0, scale=1.0, apart=False):
        super().__init__(model, shift=shift, scale=scale, apart=apart)
        self.shift, self.scale, self.apart = shift, scale, apart

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        sd = p.variance.sqrt()
        tril = torch.diag_embed(sd) if self.apart else p.scale_tril
        return MultivariateNormal(p.mean + self.shift * sd, scale_tril=self.scale * tril)


GUIDES = {
    "copy": {},
    "far": {"shift": 2.0},
    "shifted": {"shift": 0.2},
    "narrow": {"scale": 0.8},
    "uncorrelated": {"apart": True},
}


@pytest.fixture(scope="module")
def double():
    """Factor analysis whose columns overlap so much that every correlation matters."""
    model = zoo.FactorAnalysis(7, 3, seed=1).double()
    with torch.no_grad():
        model.loadings += 0.5
    return model


@pytest.fixture(scope="module")
def table(double):
    guides = {name: Planted(double, **knobs) for name, knobs in GUIDES.items()}
    x = double.observations()[:4]
    return diagnostics.compare(double, guides, x, draws=1000, chains=4, seed=0, metrics=MINE)


@pytest.mark.parametrize("guide", ["exact", "copy"])
@pytest.mark.parametrize("metric", MINE)
def test_metrics_accept_the_exact_guide(table, guide, metric):
    assert excess(table, guide, metric) < K
    assert bool(diagnostics.summary(table).at_floor.sel(guide=guide, metric=metric))


@pytest.mark.parametrize("guide", ["shifted", "narrow", "uncorrelated"])
@pytest.mark.parametrize("metric", sorted(set(MINE) - {"iwae_gap"}))
def test_metrics_see(table, guide, metric):
    assert excess(table, guide, metric) > K
    assert not bool(diagnostics.summary(table).at_floor.sel(guide=guide, metric=metric))


def test_reweighting_mends_small_errors_but_not_large_ones(table):
    """What the IWAE gap is for: the others see the small ones."""
    assert excess(table, "far", "iwae_gap") > K
    for guide in ("shifted", "narrow", "uncorrelated"):
        assert excess(table, guide, "iwae_gap") < K < excess(table, guide, "elbo_gap")


def test_both_directions_of_kl_are_the_closed_form(double, table):
    p = double.exact().distribution(double.observations()[:1])
    for name, knobs in GUIDES.items():
        q = Planted(double, **knobs).distribution(double.observations()[:1])
        for metric, pair in (("elbo_gap", (q, p)), ("eubo_gap", (p, q))):
            at = table.sel(guide=name, metric=metric, problem=0)
            kl = torch.distributions.kl_divergence(*pair).item()
            within(at.value, kl, max(float(at.se), 1e-9))


# closed forms in one dimension, many problems at once


def tree_of(z, log_p, log_q, log_q_at=None, log_p_at=None, *, scores=None, independent=True):
    """A DataTree from draws (B, S) and their log-densities, four chains."""

    def fold(a):
        return a.reshape(len(a), 4, -1).transpose(1, 2, 0)

    stats = {"log_p_joint": fold(log_p), "log_q": fold(log_q), "log_weight": fold(log_p - log_q)}
    dims = {name: ["problem"] for name in ("z", *stats)}
    tree = from_dict({"posterior": {"z": fold(z)}, "sample_stats": stats}, dims=dims)
    three = ("chain", "draw", "problem")
    evidence = xarray.Dataset({"log_evidence": ("problem", np.zeros(len(z)))})
    tree["evidence"] = xarray.DataTree(evidence)
    if log_q_at is not None:
        found = {"log_q": (three, fold(log_q_at)), "log_p_joint": (three, fold(log_p_at))}
        tree["at_reference"] = xarray.DataTree(xarray.Dataset(found))
    if scores is not None:
        point = ("point", "problem", "packed")
        found = {n: (point, v.T[..., None]) for n, v in scores.items()}
        tree["scores"] = xarray.DataTree(xarray.Dataset(found))
    tree.attrs |= {"independent_draws": int(independent), "seconds": 2.0}
    return tree


def log_normal(z, m=0.0, s=1.0):
    return -0.5 * ((z - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)


def gaussians(m, s, *, rows=40, draws=2000, points=400, seed=0):
    """q = N(m, s^2) and p = N(0, 1): trees of both."""
    rng = np.random.default_rng(seed)
    p, z = rng.normal(size=(rows, draws)), m + s * rng.normal(size=(rows, draws))
    trees = []
    for draw, (loc, scale) in ((z, (m, s)), (p, (0.0, 1.0))):
        u = draw[:, :points]
        scores = {"u": u, "model": -u, "guide": -(u - loc) / scale**2}
        at = log_normal(p, loc, scale), log_normal(p)
        own = log_normal(draw), log_normal(draw, loc, scale)
        trees.append(tree_of(draw, *own, *at, scores=scores))
    return trees


def closed_forms(m, s):
    """Of q = N(m, s^2) against p = N(0, 1)."""
    efficiency = math.sqrt(2 * s**2 - 1) / s**2 * math.exp(-(m**2) / (2 * s**2 - 1))
    return {
        "elbo_gap": 0.5 * (m**2 + s**2 - 1) - math.log(s),
        "eubo_gap": math.log(s) + (1 + m**2) / (2 * s**2) - 0.5,
        "reverse_ess": efficiency,  # the same in both directions: neither drops anything
        "forward_ess": efficiency,
        "fisher_divergence": m**2 + (s - 1 / s) ** 2,
        "ksd": stein_discrepancy(m, s),
    }


def stein_discrepancy(m, s, n=120):
    """E of the Stein kernel over two draws of N(m, s^2), by Gauss-Hermite."""
    node, weight = np.polynomial.hermite_e.hermegauss(n)
    y = m + s * node[:, None]
    weight = weight / weight.sum()
    return float(weight @ stein_kernel(y, -y, y, -y) @ weight)


@pytest.mark.parametrize(("m", "s"), [(0.2, 1.0), (0.0, 1.2), (-0.3, 0.9), (0.4, 1.5)])
def test_gaussian_closed_forms(m, s):
    q, p = gaussians(m, s)
    for metric, truth in closed_forms(m, s).items():
        found = METRICS[metric].compute(q, p)
        assert found.reason == ""
        slack = 2e-3 * abs(truth)  # ratios of means and units from 400 draws: biased by 1 / S
        within(found.value.mean(), truth, np.hypot(found.se.mean() / math.sqrt(40), slack))


@pytest.mark.parametrize("metric", MINE)
def test_standard_errors_are_the_spread_of_repeats(metric):
    q, p = gaussians(0.2, 1.3, rows=80, draws=2000)
    found = METRICS[metric].compute(q, p)
    spread = found.value.std(ddof=1)
    assert spread / 1.5 < found.se.mean() < 1.5 * spread


def test_ksd_has_mean_zero_at_the_truth():
    q, p = gaussians(0.0, 1.0, rows=200, points=200)
    found = METRICS["ksd"].compute(q, p)
    spread = found.value.std(ddof=1)
    within(found.value.mean(), 0.0, spread / math.sqrt(200))
    assert spread / 1.3 < found.se.mean() < 1.3 * spread  # a degenerate U-statistic
    within(found.value, 0.0, 2 * found.se)  # its tail is that of a chi-squared


def test_stein_kernel_is_the_derivative_of_its_kernel():
    """s.s' k + s.d'k + s'.d k + d.d'k by autograd, in three dimensions."""
    g = torch.Generator().manual_seed(0)
    a, b, s, t = torch.randn(4, 3, generator=g, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    k = (1 + (a - b).square().sum()) ** -0.5
    by_a, by_b = torch.autograd.grad(k, (a, b), create_graph=True)
    mixed = sum(torch.autograd.grad(by_a[i], b, retain_graph=True)[0][i] for i in range(3))
    want = (s @ t) * k + s @ by_b + t @ by_a + mixed
    points, scores = (torch.stack(pair).detach().numpy() for pair in ((a, b), (s, t)))
    assert stein_kernel(points, scores, points, scores)[0, 1] == pytest.approx(
        want.item(), rel=1e-12
    )


def test_scores_are_read_in_units_of_the_reference():
    """Latents in other units are the same problem."""
    trees = gaussians(0.2, 1.3, rows=3)
    for metric in SCORES:
        value = METRICS[metric].compute(*trees).value
        for tree in (moved := [t.copy() for t in trees]):
            data = tree["scores"].dataset
            found = {"u": 100 * data["u"] + 7, "model": data["model"] / 100}
            found["guide"] = data["guide"] / 100
            tree["scores"] = xarray.DataTree(xarray.Dataset(found))
        np.testing.assert_allclose(METRICS[metric].compute(*moved).value, value, rtol=1e-9)


def test_iwae_gap_falls_with_every_draw():
    """By Jensen and for these very draws, as larger blocks are made of smaller ones."""
    q, p = gaussians(0.8, 1.4, rows=5, draws=4000)
    weights = q["sample_stats"]["log_weight"].transpose("problem", "chain", "draw").values
    gaps = [-iwae_bound(weights.reshape(5, -1), k).mean(1) for k in (1, 10, 100, 1000)]
    assert all((a > b).all() for a, b in itertools.pairwise(gaps))
    np.testing.assert_allclose(gaps[0], METRICS["elbo_gap"].compute(q, p).value)
    np.testing.assert_allclose(gaps[2], METRICS["iwae_gap"].compute(q, p).value)
    # what is left of K draws is half their weights' variance over K
    variance = 1 / closed_forms(0.8, 1.4)["reverse_ess"] - 1
    found = METRICS["iwae_gap"].compute(q, p)
    within(found.value, variance / 200, found.se)


# modes


class Modes(inference.PackedGuide):
    """The Normals at -4 and +4 with given weights, or the second alone."""

    def __init__(self, model, *, weights=(0.5, 0.5)):
        super().__init__(model, weights=weights)
        self.weights = weights

    def distribution(self, x):
        means, b = self.model.means, len(x)
        if self.weights is None:
            return Independent(Normal(means[1].expand(b, 1), self.model.scale), 1)
        one = Independent(Normal(means[:, None], self.model.scale), 1)
        weights = torch.as_tensor(self.weights, dtype=means.dtype)
        return MixtureSameFamily(Categorical(weights), one).expand([b])


@pytest.fixture(scope="module")
def two():
    """Equal modes sixteen sds apart."""
    model = zoo.Bimodal((0.5, 0.5)).double()
    model.means *= 4
    return model


@pytest.fixture(scope="module")
def modes(two):
    guides = {
        "copy": Modes(two),
        "one mode": Modes(two, weights=None),
        "wrong weights": Modes(two, weights=(0.6, 0.4)),
    }
    x = two.observations()[:1]
    return diagnostics.compare(two, guides, x, draws=1000, chains=4, seed=1, metrics=WITH_MODES)


@pytest.mark.parametrize("guide", ["exact", "copy"])
@pytest.mark.parametrize("metric", WITH_MODES)
def test_modes_are_accepted(modes, guide, metric):
    assert excess(modes, guide, metric) < K


def test_a_dropped_mode_costs_log_two_and_only_forward_metrics_say_how_bad_it_is(modes):
    at = modes.value.sel(guide="one mode", problem=0).to_series()
    for metric in ("elbo_gap", "iwae_gap"):
        assert at[metric] == pytest.approx(math.log(2), abs=1e-9)
    assert at["reverse_ess"] == pytest.approx(1.0, abs=1e-9)  # as if nothing were wrong
    assert excess(modes, "one mode", "ksd") < K
    assert at["fisher_divergence"] < 1e-9
    assert at["forward_ess"] < 1e-9
    se = float(modes.se.sel(guide="one mode", metric="eubo_gap", problem=0))
    # half of the draws are 16 sds off: KL = 16^2 / 2 / 2 - log 2
    within(at["eubo_gap"], 64 - math.log(2), se)
    se = float(modes.se.sel(guide="one mode", metric="mode_occupancy", problem=0))
    within(at["mode_occupancy"], 0.5, se)


def test_wrong_weights_of_modes(modes):
    w = np.array([0.6, 0.4])
    truth = {
        "elbo_gap": (w * np.log(2 * w)).sum(),
        "eubo_gap": -np.log(2 * w).mean(),
        "reverse_ess": 1 / (0.25 / w).sum(),
        "forward_ess": 1 / (0.25 / w).sum(),
        "mode_occupancy": 0.1,
    }
    for metric, value in truth.items():
        at = modes.sel(guide="wrong weights", metric=metric, problem=0)
        within(at.value, value, at.se)
        assert excess(modes, "wrong weights", metric) > K
    for metric in SCORES:  # blind, as documented
        assert excess(modes, "wrong weights", metric) < K


def labelled(labels, *, independent=True):
    """A tree of mode labels (B, chains, draws)."""
    z = labels.astype(float)
    tree = from_dict({"posterior": {"z": z.transpose(1, 2, 0)}}, dims={"z": ["problem"]})
    found = xarray.Dataset({"label": (("problem", "chain", "draw"), labels)})
    tree["modes"] = xarray.DataTree(found)
    tree.attrs["independent_draws"] = int(independent)
    return tree


def test_standard_error_of_mode_occupancy():
    rng, shape = np.random.default_rng(0), (200, 4, 100)
    p = labelled(rng.choice(3, shape, p=[0.5, 0.3, 0.2]))
    q = labelled(rng.choice(4, shape, p=[0.3, 0.4, 0.1, 0.2]))  # with a mode of its own
    found = METRICS["mode_occupancy"].compute(q, p)
    spread = found.value.std(ddof=1)
    assert spread / 1.2 < found.se.mean() < 1.2 * spread
    within(found.value.mean(), 0.3, spread / math.sqrt(200))


def test_chains_that_never_leave_their_modes_count_once():
    rng, rows = np.random.default_rng(1), 100
    stuck = np.repeat(rng.choice(2, (rows, 4, 1)), 250, 2)
    p = labelled(rng.choice(2, (rows, 4, 250)))
    found = METRICS["mode_occupancy"].compute(labelled(stuck, independent=False), p)
    mixed = found.value < 0.4  # some chain in each mode
    assert (found.se[mixed] > 0.15).all()  # one of four chains is worth a quarter
    assert (METRICS["mode_occupancy"].compute(labelled(stuck), p).se < 0.03).all()


@pytest.mark.parametrize(
    ("model", "z", "want"),
    [
        (zoo.Bimodal(), [[-1.0, 2.0]], [[0, 1]]),
        (zoo.SquareRoot(), [[[-1.0], [2.0]]], [[0, 1]]),
        (zoo.Product(), [[[-1.0, 3.0], [2.0, -0.1]]], [[0, 1]]),
        (zoo.TwoMoons(), [[[-0.5, 0.2], [0.5, -0.2]]], [[0, 1]]),
        (zoo.GaussianMixtureLatents(), zoo.GaussianMixtureLatents().centres[None], [[0, 1, 2]]),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, zoo.Model) else "",
)
def test_models_name_their_modes(model, z, want):
    found = model.modes({"z": torch.as_tensor(z)})
    assert found.tolist() == want
    drawn = model.exact().draw(model.observations()[:3], draws=5, chains=2, seed=0)
    label = model.modes(drawn.values)
    assert label.shape == (2, 5, len(model.observations()[:3]))
    assert not label.is_floating_point()


# what collect adds


def test_collect_adds_what_applies(double):
    x = double.observations()[:2]
    guides = {"shifted": Planted(double, shift=0.2)}
    trees = diagnostics.collect(double, guides, x, draws=600, chains=2, seed=0)
    guide = guides["shifted"]
    for tree, who in ((trees["shifted"], guide), (trees["exact"], double.exact())):
        at, known = tree["at_reference"], trees["exact"]["sample_stats"]
        np.testing.assert_array_equal(at["log_p_joint"], known["log_p_joint"])
        z = {"z": torch.as_tensor(trees["exact"]["posterior"]["z"].values)}
        np.testing.assert_allclose(at["log_q"], who.log_prob(z, x).detach(), rtol=1e-12)
        scores = tree["scores"]
        assert dict(scores.sizes) == {"point": 1000, "problem": 2, "packed": 3}
        u = torch.as_tensor(scores["u"].values)
        for name, q in (("model", double.exact().distribution(x)), ("guide", who.distribution(x))):
            want = ((q.mean - u) @ q.precision_matrix[0]).detach()
            np.testing.assert_allclose(scores[name], want, rtol=1e-8, atol=1e-8)
    assert "at_reference" in trees.floor.children
    assert "modes" not in trees["shifted"].children
    half = trees["exact"].attrs["seconds"]  # drawing took twice as long: the floor has its share
    assert half == trees.floor.attrs["seconds"]


def positive(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Gamma(x.new_tensor(3.0), 2.0))
        pyro.sample("x", dist.Normal(x.new_tensor(0.0), 1.0), obs=x)


class Scored(inference.Guide):
    """A guide with a score and no density."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Gamma(x.new_tensor(3.0), 2.0))

    log_prob = None

    def score(self, z, x):
        return 3 - 2 * z["z"][..., None]

    def __getattribute__(self, name):
        if name == "log_prob":
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_scores_hold_the_jacobian_and_a_guides_own_score_is_taken():
    """z = exp(u), z ~ Gamma(3, 2): log p(u) = 3 u - 2 exp(u) + const."""
    x = torch.zeros(2, dtype=torch.float64)
    model = zoo.from_pyro(positive, x, exact=zoo.Quadrature)
    trees = diagnostics.collect(model, {"scored": Scored(model)}, x, draws=200, chains=2, seed=0)
    for tree in trees.values():
        scores = tree["scores"]
        assert scores.sizes["point"] == 400
        for name in ("model", "guide"):
            np.testing.assert_allclose(scores[name], 3 - 2 * np.exp(scores["u"]), rtol=1e-6)
    assert "at_reference" not in trees["scored"].children
    found = diagnostics.compare_draws(trees, MINE)
    at = found.sel(guide="scored")
    assert (at.value.sel(metric="fisher_divergence") < 1e-9).all()
    assert at.reason.sel(metric="eubo_gap") == "the guide has no density"
    within(at.value.sel(metric="ksd"), 0.0, 2 * at.se.sel(metric="ksd"))


def blocked(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0).mask(False))
        pyro.sample("x", dist.Normal(z.detach(), 1.0), obs=x)


def switches(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor([0.3, 0.5])).to_event(1))
        pyro.sample("x", dist.Normal(z @ x.new_tensor([1.0, 1.2]), 0.5), obs=x)


@pytest.mark.parametrize("program", [blocked, switches])
def test_scores_are_left_out_where_there_are_none(program):
    x = torch.tensor([0.9, 1.7])
    exact = zoo.Enumerated if program is switches else zoo.Quadrature
    model = zoo.from_pyro(program, x, exact=exact)
    trees = diagnostics.collect(model, {}, x, draws=20, chains=2, seed=0)
    assert "scores" not in trees["exact"].children
    assert "at_reference" in trees["exact"].children
    found = METRICS["ksd"].compute(trees.floor, trees["exact"])
    assert np.isnan(found.value).all()
    assert found.reason.startswith("no score of the log joint")


class Box(inference.PackedGuide):
    """Uniform, and so 0 almost everywhere."""

    def distribution(self, x):
        edge = torch.ones(len(x), 1, dtype=x.dtype)
        return Independent(Uniform(-edge, edge), 1)


def bounded(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(x.new_tensor(0.0), 1.0), obs=x)


def test_a_guide_that_never_goes_somewhere_is_infinitely_far():
    x = torch.zeros(1, dtype=torch.float64)
    model = zoo.from_pyro(bounded, x, exact=zoo.Quadrature)
    found = diagnostics.compare(
        model, {"box": Box(model)}, x, draws=500, chains=4, seed=0, metrics=MINE
    )
    at = found.value.sel(guide="box", problem=0).to_series()
    assert at["eubo_gap"] == np.inf
    assert at["forward_ess"] == 0.0
    assert np.isfinite(at["elbo_gap"])
    verdict = diagnostics.summary(found).at_floor.sel(guide="box")
    assert not verdict.sel(metric=["eubo_gap", "forward_ess", "elbo_gap"]).any()


def test_a_guide_that_goes_where_nothing_is():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 2000))
    log_p = np.where(z < 2, log_normal(z), -np.inf)
    tree = tree_of(z, log_p, log_normal(z))
    for metric in ("elbo_gap", "reverse_ess", "iwae_gap"):
        found = METRICS[metric].compute(tree, tree)
        assert not np.isnan(found.value).any()
    assert (METRICS["elbo_gap"].compute(tree, tree).value == np.inf).all()
    share = np.mean(z < 2, axis=1)  # the weights are 0 or 1
    np.testing.assert_allclose(METRICS["reverse_ess"].compute(tree, tree).value, share)
    nowhere = tree_of(z, np.full_like(z, -np.inf), log_normal(z))
    found = METRICS["reverse_ess"].compute(nowhere, nowhere)
    assert np.isnan(found.value).all()
    assert found.reason.startswith("no draw has any weight")


def test_a_density_that_is_not_a_number_says_so():
    q, p = gaussians(0.0, 1.0, rows=2)
    q["at_reference"]["log_q"][1, 2, 1] = np.nan
    for metric in FORWARD:
        found = METRICS[metric].compute(q, p)
        assert np.isfinite(found.value[0])
        assert np.isnan(found.value[1])
        assert "not a number" in found.reason


def test_reasons():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 400))
    old = tree_of(z, log_normal(z), log_normal(z))  # a file without the new groups
    plain = tree_of(z, log_normal(z), log_normal(z))
    plain["sample_stats"] = xarray.DataTree()
    unknown = tree_of(z, log_normal(z), log_normal(z), log_normal(z), log_normal(z))
    del unknown["evidence"]
    scored = tree_of(z, z, z, scores={"u": z, "model": -z})
    cases = [
        ("iwae_gap", plain, old, "the guide has no density"),
        ("iwae_gap", old, unknown, "log p(x) is not known"),
        ("iwae_gap", old, old, "the bound of 100 draws and its error need 1000 draws"),
        ("reverse_ess", plain, old, "the guide has no density"),
        ("eubo_gap", plain, old, "the guide has no density"),
        ("eubo_gap", old, old, "the guide's density at the reference draws is not known"),
        ("eubo_gap", unknown, unknown, "log p(x) is not known"),
        ("forward_ess", plain, old, "the guide has no density"),
        ("forward_ess", unknown, unknown, "log p(x) is not known"),
        ("fisher_divergence", scored, scored, "the guide has no score"),
        ("mode_occupancy", old, old, "the model names no modes"),
        ("acceptance", old, old, "the guide accepts or rejects nothing"),
        ("ess_per_time", old, old, "the guide is no circuit with time constants"),
    ]
    for metric, tree, reference, reason in cases:
        found = METRICS[metric].compute(tree, reference)
        assert found.reason == reason, metric
        assert np.isnan(found.value).all()
        assert found.value.shape == (2,)


def test_compare_draws_works_without_the_new_groups():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 1000))
    trees = Collected({"exact": tree_of(z, log_normal(z), log_normal(z))})
    trees.floor = trees["exact"]
    found = diagnostics.compare_draws(trees, WITH_MODES)
    gone = ["eubo_gap", "forward_ess", "ksd", "fisher_divergence", "mode_occupancy"]
    assert np.isnan(found.value.sel(metric=gone)).all()
    assert (found.reason.sel(metric=gone) != "").all()
    assert np.isfinite(found.value.drop_sel(metric=gone)).all()


def test_a_score_that_is_not_finite_says_so():
    q, p = gaussians(0.0, 1.0, rows=2)
    q["scores"]["model"][3, 1, 0] = np.nan
    for metric in SCORES:
        found = METRICS[metric].compute(q, p)
        assert np.isfinite(found.value[0])
        assert np.isnan(found.value[1])
        assert "no finite score" in found.reason


def test_run_directories_keep_the_groups_without_scores(tmp_path, two):
    x = two.observations()[:1]
    trees = diagnostics.collect(two, {"copy": Modes(two)}, x, draws=50, chains=2, seed=0)
    run = RunDirectory.create(tmp_path / "run", {"seed": 0})
    run.write_draws(trees, model="bimodal")
    back = run.draws()
    for name, tree in trees.items():
        assert "scores" in tree.children  # of the caller's trees, none is lost
        assert set(back[name].children) == set(tree.children) - {"scores"}
        for group in ("at_reference", "modes"):
            xarray.testing.assert_equal(back[name][group].dataset, tree[group].dataset)


# chains


def chains(z, *, discrete="", **attrs):
    """Correlated draws (B, chains, draws, D)."""
    tree = from_dict({"posterior": {"z": z.transpose(1, 2, 0, 3)}}, dims={"z": ["problem", "d"]})
    tree["sample_stats"] = xarray.DataTree()
    tree.attrs |= {"independent_draws": 0, "discrete": discrete, **attrs}
    return tree


def autoregressive(rng, phi, rows, draws, d=1):
    z = rng.normal(size=(rows, 4, draws, d))
    z[:, :, 1:] *= math.sqrt(1 - phi**2)
    for t in range(1, draws):
        z[:, :, t] += phi * z[:, :, t - 1]
    return z


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_autocorrelation_time_and_efficiencies(phi):
    z = autoregressive(np.random.default_rng(0), phi, 24, 1000)
    tree = chains(z, seconds=8.0, time_constants=500.0)
    size = METRICS["ess"].compute(tree, tree).value
    tau = METRICS["autocorrelation_time"].compute(tree, tree)
    within(tau.value.mean(), (1 + phi) / (1 - phi), tau.value.std(ddof=1) / math.sqrt(24) + 0.02)
    np.testing.assert_allclose(tau.value, 4000 / size)
    np.testing.assert_allclose(METRICS["ess_per_second"].compute(tree, tree).value, size / 8)
    np.testing.assert_allclose(METRICS["ess_per_time"].compute(tree, tree).value, size / 500)


def test_tail_ess_sees_chains_that_are_slow_in_the_tails_only():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 4, 1000, 1))
    good = METRICS["ess_tail"].compute(chains(z), None).value
    assert (good > 2500).all()
    scale = np.where(np.arange(1000) % 250 < 125, 0.3, 1.7)  # slow in the scale, not in the mean
    slow = chains(z * scale[:, None])
    assert (METRICS["ess_tail"].compute(slow, None).value < 0.5 * good).all()
    assert (METRICS["ess"].compute(slow, None).value > 2000).all()


def test_chains_that_never_move_are_not_taken_for_good_ones():
    """ArviZ gives them the ESS of independent draws."""
    z = autoregressive(np.random.default_rng(0), 0.2, 2, 200, d=2)
    z[1, :, :, 1] = 3.0
    for metric in ("ess", "ess_tail", "autocorrelation_time", "rhat"):
        found = METRICS[metric].compute(chains(z), None)
        assert np.isfinite(found.value[0])
        assert np.isnan(found.value[1])
        assert found.reason == "in some problem a latent never moved"
        certain = METRICS[metric].compute(chains(z, discrete="z"), None)  # such as a sure cause
        assert np.isfinite(certain.value).all()
        assert certain.reason == ""
    z[1, :, :, 1] = np.arange(4)[:, None]  # each chain at a place of its own
    assert METRICS["rhat"].compute(chains(z), None).value[1] > 10
    assert METRICS["ess"].compute(chains(z), None).value[1] < 10


def test_acceptance():
    rng = np.random.default_rng(0)
    tree = chains(rng.normal(size=(30, 4, 250, 1)))
    rate = rng.beta(8, 2, size=(30, 4, 250))
    stats = xarray.Dataset({"acceptance": (("problem", "chain", "draw"), rate)})
    tree["sample_stats"] = xarray.DataTree(stats)
    found = METRICS["acceptance"].compute(tree, tree)
    within(found.value, 0.8, found.se)
    assert found.se.mean() == pytest.approx(found.value.std(ddof=1), rel=0.4)


def test_every_metric_of_these_files_is_tested():
    names = {*WITH_MODES, *CHAINS, "acceptance", "rhat"}
    assert names <= set(METRICS)
    for name in names:
        assert METRICS[name].title
        assert METRICS[name].why
    bound = logsumexp(np.zeros((1, 5)), axis=1) - math.log(5)
    np.testing.assert_allclose(iwae_bound(np.zeros((1, 5)), 5)[0], bound)


def test_sliced_distance_is_that_of_pot():
    """Sorted draws where there are as many, POT itself where there are not."""
    from ot import sliced_wasserstein_distance

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(1, 4, 250, 3)), 1.3 * rng.normal(size=(1, 4, 250, 3)) + 0.2
    for keep in (250, 200):
        q, p = chains(a), chains(b[:, :, :keep])
        y = b[:, :, :keep].reshape(-1, 3)
        z = [(t.reshape(-1, 3) - y.mean(0)) / y.std(0) for t in (a, y)]
        want = sliced_wasserstein_distance(*z, n_projections=200, seed=0)
        found = METRICS["sliced_wasserstein"].compute(q, p)
        assert found.value[0] == pytest.approx(want, rel=1e-9)
