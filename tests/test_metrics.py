"""Every metric accepts the exact guide and rejects the planted errors it is meant to see."""

from __future__ import annotations

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
from torch.distributions import MultivariateNormal

import diagnostics
import inference
import zoo
from diagnostics import METRICS
from diagnostics.compare import Collected
from diagnostics.weights import pareto_shape
from inference.errors import BadInput, NoExactPosterior

K = 5.0  # standard errors
TWO_SAMPLE = ("mean_error", "sd_ratio", "correlation_error", "sliced_wasserstein", "c2st")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


class Planted(inference.PackedGuide):
    """The exact posterior of factor analysis with an error of a known kind."""

    def __init__(self, model, *, shift=0.0, scale=1.0, marginals=None):
        super().__init__(model, shift=shift, scale=scale, marginals=marginals)
        self.shift, self.scale, self.marginals = shift, scale, marginals

    def distribution(self, x):
        exact = self.model.exact()
        p = exact.distribution(x)
        sd = p.variance.sqrt()
        tril = p.scale_tril
        if self.marginals == "right":  # correlations dropped
            tril = torch.diag_embed(sd)
        if self.marginals == "elbo":  # the best factorised Gaussian
            tril = torch.diag_embed(exact.precision().diagonal().rsqrt().expand_as(sd))
        return MultivariateNormal(p.mean + self.shift * sd, scale_tril=self.scale * tril)


GUIDES = {
    "copy": {},
    "shifted": {"shift": 0.3},
    "narrow": {"scale": 0.7},
    "uncorrelated": {"marginals": "right"},
    "mean field": {"marginals": "elbo"},
}
# what each metric must see, and must not; left out: either would do
SEES = {
    "shifted": {"mean_error", "sliced_wasserstein", "c2st", "elbo_gap"},
    "narrow": {"sd_ratio", "sliced_wasserstein", "c2st", "elbo_gap"},
    "uncorrelated": {"correlation_error", "sliced_wasserstein", "c2st", "elbo_gap"},
    "mean field": {"sd_ratio", "correlation_error", "c2st", "elbo_gap"},
    "one mode": {"mean_error", "sd_ratio", "sliced_wasserstein", "c2st", "elbo_gap"},
    "moment-matched": {"c2st", "elbo_gap"},
}
BLIND = {
    "shifted": {"sd_ratio", "correlation_error"},
    "narrow": {"mean_error", "correlation_error"},
    "uncorrelated": {"mean_error", "sd_ratio"},
    "mean field": {"mean_error"},
    "one mode": {"correlation_error"},
    "moment-matched": {"mean_error", "sd_ratio", "correlation_error", "sliced_wasserstein"},
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
    x = double.observations()[:1]
    return diagnostics.compare(double, guides, x, draws=1000, chains=4, seed=0)


def hand_made(z, log_weight=None, evidence=None, *, independent=True):
    """A DataTree from draws (B, chains, draws, D)."""
    groups = {"posterior": {"z": z.transpose(1, 2, 0, 3)}, "sample_stats": {}}
    if log_weight is not None:
        groups["sample_stats"]["log_weight"] = log_weight.transpose(1, 2, 0)
    tree = from_dict(
        {k: v for k, v in groups.items() if v},
        dims={"z": ["problem", "d"], "log_weight": ["problem"]},
    )
    if log_weight is None:
        tree["sample_stats"] = xarray.DataTree()
    if evidence is not None:
        known = xarray.Dataset({"log_evidence": ("problem", evidence)})
        tree["evidence"] = xarray.DataTree(known)
    tree.attrs["independent_draws"] = int(independent)
    return tree


@pytest.fixture(scope="module")
def bimodal():
    """Two unit modes at +-3 on one of five axes, one of them alone, and a matched Gaussian."""
    rng, shape = np.random.default_rng(0), (1, 4, 250, 5)

    def log_p(z):
        modes = [-0.5 * (z[..., 0] - m) ** 2 for m in (-3, 3)]
        return logsumexp(modes, axis=0) - math.log(2) - 0.5 * (z[..., 1:] ** 2).sum(-1)

    def exact():
        z = rng.normal(size=shape)
        z[..., 0] += 3 * rng.choice([-1, 1], shape[:-1])
        return hand_made(z, np.zeros(shape[:-1]), np.zeros(1))

    one = rng.normal(size=shape)
    log_q = -0.5 * (one**2).sum(-1)
    one[..., 0] += 3
    matched = rng.normal(size=shape)
    log_m = -0.5 * (matched**2).sum(-1) - 0.5 * math.log(10)
    matched[..., 0] *= math.sqrt(10)
    trees = Collected(
        {
            "exact": exact(),
            "one mode": hand_made(one, log_p(one) - log_q),
            "moment-matched": hand_made(matched, log_p(matched) - log_m),
        }
    )
    trees.floor = exact()
    return diagnostics.compare_draws(trees)


def excess(found, guide, metric):
    """How many standard errors a value is from that of a perfect guide."""
    at = found.sel(guide=guide, metric=metric, problem=0)
    value, se, base = float(at.value), float(at.se), METRICS[metric].ideal
    if metric == "sliced_wasserstein":  # its floor is not zero: both numbers are noisy
        floor = found.sel(guide="exact", metric=metric, problem=0)
        base, se = float(floor.value), math.hypot(se, float(floor.se))
    return abs(value - base) / max(se, 1e-9)


@pytest.mark.parametrize("guide", ["exact", "copy"])
@pytest.mark.parametrize("metric", [*TWO_SAMPLE, "elbo_gap"])
def test_metrics_accept_the_exact_guide(table, guide, metric):
    assert excess(table, guide, metric) < K


@pytest.mark.parametrize(
    ("guide", "metric"), [(g, m) for g, ms in SEES.items() for m in sorted(ms)]
)
def test_metrics_see(table, bimodal, guide, metric):
    assert excess(table if guide in table.guide else bimodal, guide, metric) > K


@pytest.mark.parametrize(
    ("guide", "metric"), [(g, m) for g, ms in BLIND.items() for m in sorted(ms)]
)
def test_metrics_do_not_see_what_is_right(table, bimodal, guide, metric):
    assert excess(table if guide in table.guide else bimodal, guide, metric) < K


def test_every_metric_is_tested():
    here = {*TWO_SAMPLE, "elbo_gap", "khat", "ess", "rhat", "marginal_tv", "pattern_kl"}
    assert here <= set(METRICS)  # the others have files of their own, tests/test_metrics_*.py
    for metric in METRICS.values():
        assert metric.title
        assert metric.why


def values(found, metric):
    return found.value.sel(metric=metric, problem=0).to_series().to_dict()


def test_sizes_of_planted_errors(table):
    """Not only seen, but of the right size."""
    se = {m: table.se.sel(metric=m, problem=0).to_series() for m in METRICS}
    within(values(table, "mean_error")["shifted"], 0.3, se["mean_error"]["shifted"])
    within(values(table, "sd_ratio")["narrow"], 0.7, se["sd_ratio"]["narrow"])


def test_elbo_gap_is_the_closed_form(double, table):
    gap, se = (v.sel(metric="elbo_gap", problem=0) for v in (table.value, table.se))
    exact, d = double.exact(), 3
    with torch.no_grad():
        precision, q = exact.precision(), exact.distribution(double.observations()[:1])
        unit = precision * q.variance[0].sqrt() * q.variance[0].sqrt()[:, None]
        want = {
            "mean field": exact.mean_field_gap(),
            "shifted": 0.5 * 0.3**2 * unit.sum(),
            "narrow": torch.tensor(d * (0.5 * (0.49 - 1) - math.log(0.7))),
        }
    for name, value in want.items():
        within(gap.sel(guide=name), float(value), se.sel(guide=name))
    assert abs(float(gap.sel(guide="copy"))) < 1e-10  # an identity: the integrand is constant


def test_elbo_gap_of_a_dropped_mode_is_log_two(bimodal):
    at = bimodal.sel(guide="one mode", metric="elbo_gap", problem=0)
    # exactly log 2 - E log(1 + exp(-6 z)) with z ~ N(3, 1); the second term by quadrature
    z, w = np.polynomial.hermite_e.hermegauss(80)
    lost = (w / w.sum() * np.logaddexp(0, -6 * (z + 3))).sum()
    within(at.value, math.log(2) - lost, at.se)


# k-hat


def test_khat_on_the_planted_guides(table, bimodal):
    khat = values(table, "khat")
    assert khat["exact"] == khat["copy"] == -np.inf
    # too narrow by s: weights have Pareto tails with k = 1 - s^2, in every direction of three
    assert khat["narrow"] > 0.3
    assert values(bimodal, "khat")["exact"] == -np.inf


def test_khat_of_tied_weights_is_not_a_number_and_says_so():
    rng = np.random.default_rng(0)
    tied = np.repeat([[5.0, 3.0, 2.0]], [5, 20, 1975], axis=1)  # few values, as of counts
    smooth = rng.standard_normal((1, 2000))
    with np.errstate(all="raise"):  # and no warning of a division by zero
        shape = pareto_shape(np.concatenate([tied, smooth]))
    assert np.isnan(shape[0])
    assert np.isfinite(shape[1])


@pytest.mark.parametrize("k", [1.0, 0.5, 0.25])
def test_khat_recovers_pareto_tails(k):
    """The sign: psislw takes minus the log weights."""
    rows, draws = 16, 4000
    log_w = k * np.random.default_rng(1).exponential(size=(rows, draws))
    found = pareto_shape(log_w)
    tail = 3 * math.sqrt(draws)
    expected = (tail * k + 5) / (tail + 10)  # psis shrinks by ten draws towards a half
    within(found.mean(), expected, found.std(ddof=1) / math.sqrt(rows))
    within(found, expected, (1 + k) / math.sqrt(tail))  # asymptotic sd of a Pareto shape
    # the other sign has bounded weights, exp(-k e): far from it
    assert pareto_shape(-log_w).mean() < found.mean() - 0.2


def test_khat_of_constant_weights():
    constant = np.zeros((1, 100)) + 3.0
    varied = np.random.default_rng(0).exponential(size=(1, 100))
    found = pareto_shape(np.concatenate([constant, varied, constant + 1e-5 * varied]))
    assert found[0] == found[2] == -np.inf
    assert np.isfinite(found[1])


def test_khat_of_few_draws_says_why():
    """ArviZ refuses tails of fewer than five draws; compare(draws=50, chains=2) is no error."""
    rng = np.random.default_rng(0)
    tree = hand_made(rng.normal(size=(1, 2, 50, 1)), rng.exponential(size=(1, 2, 50)))
    found = METRICS["khat"].compute(tree, tree)
    assert found.value.shape == found.se.shape == (1,)
    assert np.isfinite(found.value).all() or found.reason


def test_khat_threshold():
    """The table of truth.md, 2.3."""
    found = [round(diagnostics.khat_threshold(n), 2) for n in (100, 500, 1000, 2200, 10**6)]
    assert found == [0.50, 0.63, 0.67, 0.70, 0.70]


# chains


def autoregressive(rng, phi, rows, chains, draws):
    z = rng.normal(size=(rows, chains, draws))
    z[:, :, 1:] *= math.sqrt(1 - phi**2)
    for t in range(1, draws):
        z[:, :, t] += phi * z[:, :, t - 1]
    return z[..., None]


@pytest.mark.parametrize("phi", [0.0, 0.5, -0.3])
def test_ess_of_autoregression(phi):
    rows, total = 24, 4 * 1000
    z = autoregressive(np.random.default_rng(0), phi, rows, 4, 1000)
    found = METRICS["ess"].compute(hand_made(z, independent=False), None)
    assert np.isnan(found.se).all()
    theory = total * (1 - phi) / (1 + phi)
    within(found.value, theory, found.value.std(ddof=1))


def test_moments_of_chains_have_the_standard_error_of_their_ess():
    rows, phi = 200, 0.8
    rng = np.random.default_rng(2)
    chains = hand_made(autoregressive(rng, phi, rows, 4, 250), independent=False)
    reference = hand_made(rng.normal(size=(rows, 4, 250, 1)))
    found = METRICS["mean_error"].compute(chains, reference)
    # |N(0, se)|: root mean square is the se
    ratio = np.sqrt((found.value / found.se) ** 2).mean() / math.sqrt(2 / math.pi)
    assert 0.8 < ratio < 1.25


def test_rhat():
    rng = np.random.default_rng(3)
    z = autoregressive(rng, 0.3, 8, 4, 500)
    good = METRICS["rhat"].compute(hand_made(z, independent=False), None)
    assert (good.value < 1.02).all()
    z[:, 0] += 1.0
    bad = METRICS["rhat"].compute(hand_made(z, independent=False), None)
    assert (bad.value > 1.05).all()
    assert good.reason == bad.reason == ""


# reasons for NaN


def test_reasons(table):
    rng = np.random.default_rng(4)
    z, weights = rng.normal(size=(2, 4, 50, 1)), np.zeros((2, 4, 50))
    plain, dense = hand_made(z), hand_made(z, weights)
    chains = hand_made(z[:, :1], independent=False)
    cases = [
        ("elbo_gap", plain, plain, "the guide has no density"),
        ("khat", plain, plain, "the guide has no density"),
        ("elbo_gap", dense, plain, r"log p(x) is not known"),
        ("correlation_error", plain, plain, "one latent has no correlations"),
        ("rhat", plain, plain, "independent draws have no chains to compare"),
        ("rhat", chains, plain, "one chain cannot be compared with others"),
    ]
    for metric, tree, reference, reason in cases:
        found = METRICS[metric].compute(tree, reference)
        assert found.reason == reason
        assert np.isnan(found.value).all()
        assert found.value.shape == (2,)
    assert str(table.reason.sel(guide="copy", metric="rhat").item()).startswith("independent")
    assert table.reason.sel(guide="copy", metric="mean_error").item() == ""


# standard errors


@pytest.mark.parametrize("metric", ["mean_error", "sd_ratio", "correlation_error", "elbo_gap"])
def test_standard_errors_are_the_spread_of_repeats(metric):
    """Sixty repeats, as sixty problems, of a biased, narrow, uncorrelated guide."""
    rows, rho = 60, 0.6
    rng = np.random.default_rng(5)
    shape = (rows, 4, 200, 2)
    p, q = rng.normal(size=shape), 0.7 * rng.normal(size=shape)
    p[..., 1] = rho * p[..., 0] + 0.8 * p[..., 1]
    q[..., 0] += 0.5
    q[..., 1] *= 1.2  # 0.84: the first latent is the worse one
    weights = rng.normal(size=shape[:-1])
    tree, reference = hand_made(q, weights), hand_made(p, evidence=np.zeros(rows))
    found = METRICS[metric].compute(tree, reference)
    spread = found.value.std(ddof=1)
    assert spread / 1.5 < found.se.mean() < 1.5 * spread


def test_standard_error_of_the_sliced_distance():
    rng, shape = np.random.default_rng(6), (20, 4, 200, 2)
    p, q = rng.normal(size=shape), rng.normal(size=shape) + np.array([0.5, 0.0])
    found = METRICS["sliced_wasserstein"].compute(hand_made(q), hand_made(p))
    spread = found.value.std(ddof=1)
    assert spread / 2 < found.se.mean() < 2 * spread


def test_standard_error_of_c2st_at_the_null():
    rng, shape = np.random.default_rng(7), (2, 1, 200, 2)
    found = METRICS["c2st"].compute(*(hand_made(rng.normal(size=shape)) for _ in range(2)))
    np.testing.assert_allclose(found.se, 0.5 / math.sqrt(400), rtol=0.05)
    within(found.value, 0.5, found.se)


# compare


def test_compare_is_a_table(double, table):
    assert dict(table.sizes) == {"guide": 6, "metric": len(METRICS), "problem": 1}
    assert table.guide.values.tolist() == ["exact", *GUIDES]
    assert table.metric.values.tolist() == list(METRICS)
    assert {n: v.dims for n, v in table.data_vars.items()} == {
        "value": ("guide", "metric", "problem"),
        "floor": ("guide", "metric", "problem"),
        "se": ("guide", "metric", "problem"),
        "reason": ("guide", "metric"),
    }
    for name in table.guide.values:
        np.testing.assert_array_equal(table.floor.sel(guide=name), table.value.sel(guide="exact"))
    assert table.attrs["model"] == double.title
    assert table.attrs["seed"] == 0
    # the floor is a noise floor, not a distance of the draws from themselves
    assert 0 < float(table.floor.sel(guide="copy", metric="mean_error")[0]) < 0.1


def test_summary_says_who_is_at_the_floor(table, bimodal):
    """The verdict is for the copy and against every planted error a metric must see."""
    for found, guides in ((table, GUIDES), (bimodal, ("one mode", "moment-matched"))):
        verdict = diagnostics.summary(found).at_floor
        for guide in guides:
            for metric in SEES.get(guide, ()):
                assert not bool(verdict.sel(guide=guide, metric=metric)), (guide, metric)
    copy = diagnostics.summary(table).sel(guide="copy")
    assert all(bool(copy.at_floor.sel(metric=m)) for m in (*TWO_SAMPLE, "elbo_gap"))
    assert not bool(copy.at_floor.sel(metric="rhat"))  # NaN is no verdict
    np.testing.assert_allclose(copy.value, table.value.sel(guide="copy", problem=0))


CHEAP = {name: METRICS[name] for name in ("mean_error", "elbo_gap", "khat")}


def test_compare_knobs(double):
    x = double.observations()[:2]
    knobs = {"draws": 150, "chains": 2, "seed": 1, "metrics": CHEAP}
    found = diagnostics.compare(double, {"copy": Planted(double)}, x, **knobs)
    assert dict(found.sizes) == {"guide": 2, "metric": 3, "problem": 2}
    again = diagnostics.compare(double, {"copy": Planted(double)}, x, **knobs)
    np.testing.assert_array_equal(found.value, again.value)
    # draws of a guide do not depend on who else is at the table
    more = {"copy": Planted(double), "narrow": Planted(double, scale=0.7)}
    beside = diagnostics.compare(double, more, x, **knobs)
    np.testing.assert_array_equal(beside.value.sel(guide="copy"), found.value.sel(guide="copy"))


def test_compare_refuses(double):
    x = double.observations()[:2]
    with pytest.raises(BadInput, match="names other than 'exact'"):
        diagnostics.compare(double, {"exact": Planted(double)}, x, seed=0)
    with pytest.raises(BadInput, match="draws"):
        diagnostics.compare(double, {}, x, draws=0, seed=0)


def program(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.3), 1.0))
        pyro.sample("x", dist.Normal(z**2, 0.4), obs=x)


def test_compare_without_exact_posterior():
    x = torch.tensor([2.0, 0.5], dtype=torch.float64)
    model = zoo.from_pyro(program, x)
    guides = {"encoder": inference.MeanFieldEncoder(model).double()}
    with pytest.raises(NoExactPosterior, match="NUTS"):
        diagnostics.compare(model, guides, x, seed=0)
    grid = zoo.Quadrature(model)
    knobs = {"draws": 200, "chains": 2, "seed": 0, "reference": grid, "metrics": CHEAP}
    found = diagnostics.compare(model, guides, x, **knobs)
    assert found.guide.values.tolist() == ["exact", "encoder"]
    # the untrained encoder is the prior: far from a posterior with two modes
    assert (found.value.sel(guide="encoder", metric="elbo_gap") > 1).all()
    within(found.value.sel(guide="exact", metric="mean_error"), 0.0, math.sqrt(2 / 400))


def test_collected_draws_are_independent_of_the_floor(double):
    x = double.observations()[:1]
    trees = diagnostics.collect(double, {}, x, draws=20, chains=2, seed=0)
    a, b = (t["posterior"]["z"].values for t in (trees["exact"], trees.floor))
    assert a.shape == b.shape == (2, 20, 1, 3)
    assert trees.floor["posterior"].coords["chain"].values.tolist() == [0, 1]
    assert not np.intersect1d(a, b).size


# discrete latents


def switches(x):
    """Three causes of two findings, one of them certain."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor([0.3, 0.5, 1.0])).to_event(1))
        pyro.sample("x", dist.Normal(z @ x.new_tensor([1.0, 1.2, 0.3]), 0.5), obs=x)


class Tempered(inference.Guide):
    """The enumerated posterior to a power, or with independent latents; it has no density."""

    def __init__(self, model, *, power=1.0, independent=False):
        super().__init__(model, power=power, independent=independent)
        self.power, self.apart = power, independent

    def draw(self, x, *, draws, chains, seed, progress=False):
        exact = self.model.exact()
        with inference.seeds.seeded(seed):
            logits = self.power * exact.logits(x).T
            pick = torch.distributions.Categorical(logits=logits).sample((chains, draws))
            z = exact._states("z")[pick]
            if self.apart:
                z = torch.stack([z[..., k][:, torch.randperm(draws)] for k in range(3)], -1)
        return inference.Draws({"z": z})


@pytest.fixture(scope="module")
def patterns():
    x = torch.tensor([0.9, 1.7])
    model = zoo.from_pyro(switches, x, exact=zoo.Enumerated)
    guides = {
        "copy": model.exact(),
        "narrow": Tempered(model, power=2.0),
        "independent": Tempered(model, independent=True),
    }
    return diagnostics.compare(model, guides, x, seed=2)


def test_discrete_metrics_accept_the_exact_guide(patterns):
    table = diagnostics.summary(patterns)
    for metric in ("marginal_tv", "pattern_kl", "mean_error", "correlation_error"):
        assert bool(table.at_floor.sel(guide="copy", metric=metric)), metric


@pytest.mark.parametrize(
    ("guide", "metric"),
    [("narrow", "marginal_tv"), ("narrow", "pattern_kl"), ("independent", "pattern_kl")],
)
def test_discrete_metrics_see(patterns, guide, metric):
    table = diagnostics.summary(patterns).sel(guide=guide, metric=metric)
    assert float(table.excess) > 5 * float(table.excess_se)


def test_discrete_metrics_have_the_right_size(patterns):
    """Against the table of all patterns."""
    x = torch.tensor([0.9, 1.7])
    exact = zoo.from_pyro(switches, x, exact=zoo.Enumerated).exact()
    p = exact.logits(x).double().softmax(0)  # (8, B)
    q = (2 * exact.logits(x).double()).softmax(0)
    keep = p > 1e-6
    kl = torch.where(keep, q * (q.clamp_min(1e-30) / p.clamp_min(1e-30)).log(), 0.0).sum(0)
    states = exact._states("z").double()
    tv = ((q - p).T @ states).abs().max(1).values
    at = patterns.sel(guide="narrow")
    for metric, truth in (("pattern_kl", kl), ("marginal_tv", tv)):
        value, se = at.value.sel(metric=metric), at.se.sel(metric=metric)
        within(value, truth, se + 1e-3)


def test_discrete_metrics_say_when_they_do_not_apply(table, patterns):
    for metric, reason in (
        ("marginal_tv", "no latent is discrete"),
        ("pattern_kl", "some latent is continuous"),
    ):
        assert np.isnan(table.value.sel(metric=metric)).all()
        assert (table.reason.sel(metric=metric) == reason).all()
    assert (patterns.reason.sel(metric="sliced_wasserstein") == "no latent is continuous").all()


def test_pattern_kl_refuses_draws_that_are_all_different():
    model = zoo.HiddenMarkov(40)
    chosen = {"pattern_kl": METRICS["pattern_kl"]}
    x = model.observations()[:1]
    found = diagnostics.compare(model, {"copy": model.exact()}, x, seed=0, metrics=chosen)
    assert np.isnan(found.value).all()
    assert "seen once" in str(found.reason.values[0, 0])


# scales and errors, by hand


def two_sets():
    """400 draws of two latents; the guide's are half as wide and .3 (of sd 2) off in the second."""
    z = np.random.default_rng(3).normal(size=(1, 4, 100, 2)) * [1.0, 2.0]
    return hand_made(0.5 * z + [0.0, 0.6]), hand_made(z), z.reshape(400, 2)


def test_errors_are_in_sds_of_the_reference():
    tree, reference, z = two_sets()
    tree.attrs["discrete"] = reference.attrs["discrete"] = ""
    found = METRICS["mean_error"].compute(tree, reference)
    gap = np.abs(0.5 * z.mean(0) + [0.0, 0.6] - z.mean(0)) / z.std(0)
    np.testing.assert_allclose(found.value, gap.max())
    np.testing.assert_allclose(found.se, math.sqrt((0.25 + 1) / 400))
    ratio = METRICS["sd_ratio"].compute(tree, reference)
    np.testing.assert_allclose(ratio.value, 0.5)
    kurtosis = (((z - z.mean(0)) / z.std(0)) ** 4).mean(0)
    se = 0.5 * np.sqrt((kurtosis - 1) / 4 * 2 / 400)
    assert np.isclose(ratio.se, se).any()


def test_summary_adds_the_errors_of_guide_and_floor():
    dims, coords = ("guide", "metric", "problem"), {"guide": ["exact", "a"], "metric": ["c2st"]}
    value = np.array([[[0.52, 0.49]], [[0.60, 0.56]]])
    se = np.array([[[0.04, 0.04]], [[0.03, 0.03]]])
    given = xarray.Dataset(
        {
            "value": (dims, value),
            "floor": (dims, np.broadcast_to(value[:1], value.shape).copy()),
            "se": (dims, se),
            "reason": (dims[:2], np.full((2, 1), "")),
        },
        coords=coords,
    )
    a = diagnostics.summary(given).sel(guide="a", metric="c2st")
    np.testing.assert_allclose(float(a.excess), (0.08 + 0.05) / 2)  # of the distances from a half
    np.testing.assert_allclose(float(a.excess_se), 0.05 / math.sqrt(2))
    np.testing.assert_allclose(float(a.se), 0.03 / math.sqrt(2))


def test_guide_floor_and_reference_have_draws_of_their_own(double):
    trees = diagnostics.collect(
        double, {"a": double.exact(), "b": double.exact()}, double.observations()[:1], seed=0
    )
    sets = [
        t["posterior"]["z"].values for t in (trees["exact"], trees.floor, trees["a"], trees["b"])
    ]
    for k, one in enumerate(sets):
        assert not any(np.isin(one[..., 0], other[..., 0]).any() for other in sets[:k])
