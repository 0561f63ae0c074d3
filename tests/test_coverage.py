"""Coverage, TARP, checks along an axis, interruptions and pictures of calibration; about 20 s."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from matplotlib import pyplot
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from torch.distributions import MultivariateNormal

import diagnostics
import inference
import zoo
from diagnostics import plot_calibration
from diagnostics.coverage import HPD
from diagnostics.simulated import pit
from inference.errors import BadCheckpoint, BadInput, Incompatible

ALPHA = 0.001  # a right guide fails once in a thousand seeds
CHECKS = (diagnostics.sbc, diagnostics.coverage, diagnostics.tarp)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


class Planted(inference.PackedGuide):
    """The posterior of a linear Gaussian model, with an error of a known size in sds."""

    def __init__(self, model, *, shift=0.0, scale=1.0, correlated=True, only=None):
        super().__init__(model, shift=shift, scale=scale, correlated=correlated, only=only)
        self.shift, self.scale, self.correlated, self.only = shift, scale, correlated, only

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        sd = p.variance.sqrt()
        tril = p.scale_tril if self.correlated else torch.diag_embed(sd)
        here = torch.ones(sd.shape[-1])
        if self.only is not None:
            here = torch.nn.functional.one_hot(torch.tensor(self.only), len(here)).float()
        return MultivariateNormal(p.mean + self.shift * sd * here, scale_tril=self.scale * tril)


class Prior(inference.PackedGuide):
    """Does not look at x."""

    def distribution(self, x):
        return MultivariateNormal(torch.zeros(len(x), 3), torch.eye(3))


class WithoutDensity(inference.Guide):
    """Another guide's draws, whose density nobody knows."""

    def __init__(self, guide):
        super().__init__(guide.model)
        self.__dict__["guide"] = guide

    def draw(self, x, *, draws, chains, seed, progress=False):
        return self.guide.draw(x, draws=draws, chains=chains, seed=seed)


class IndependentSteps(WithoutDensity):
    """Exact paths cut at every step and joined at random: right at each time, and no right path."""

    def draw(self, x, *, draws, chains, seed, progress=False):
        z = super().draw(x, draws=draws, chains=chains, seed=seed).values["z"]
        g = torch.Generator().manual_seed(seed)
        steps = [z[:, torch.randperm(draws, generator=g), :, t] for t in range(z.shape[-1])]
        return inference.Draws({"z": torch.stack(steps, -1)})


@pytest.fixture(scope="module")
def sums():
    """Three causes whose sum is seen: strongly correlated posteriors."""
    return zoo.ExplainingAway(3, noise=0.3)


def covered(model, guide, **knobs):
    return diagnostics.coverage(model, guide, progress=False, **knobs)


def balls(model, guide, **knobs):
    return diagnostics.sbc_test(
        diagnostics.tarp(model, guide, progress=False, **knobs), alpha=ALPHA
    )


# coverage


def test_pit_is_uniform_over_ties_and_without_them():
    """With every value tied, or none, and at both ends of the ranks."""
    rng = np.random.default_rng(0)
    n = 4000
    for values in (torch.zeros(5, n), torch.from_numpy(rng.normal(size=(5, n)))):
        found = pit(values, rng)
        within(found.mean(), 0.5, np.sqrt(1 / 12 / n))
        within(found.var(), 1 / 12, np.sqrt(1 / 180 / n))
    assert (pit(torch.arange(5.0)[:, None].expand(5, n), rng) < 0.2).all()
    assert (pit(-torch.arange(5.0)[:, None].expand(5, n), rng) > 0.8).all()


@pytest.mark.parametrize("draws", [9, 99])
def test_coverage_of_the_exact_guide_is_nominal(sums, draws):
    """At few draws too, where intervals between quantiles of draws would be too narrow."""
    found = covered(sums, sums.exact(), problems=2000, draws=draws, seed=1)
    assert list(found.quantity.values) == ["z[0]", "z[1]", "z[2]", HPD]
    within(found.coverage, found.level, found.se)
    assert (found.reason == "").all()


def test_coverage_of_wrong_widths_has_the_known_value(sums):
    """A central interval of sds x s covers at 2 Phi(s Phi^-1((1 + a) / 2)) - 1."""
    from scipy.stats import chi2, norm

    for scale in (0.8, 1.25):
        found = covered(sums, Planted(sums, scale=scale), problems=3000, draws=299, seed=2)
        level = found.level.values
        central = 2 * norm.cdf(scale * norm.ppf((1 + level) / 2)) - 1
        joint = chi2.cdf(scale**2 * chi2.ppf(level, 3), 3)
        for name, truth in {"z[1]": central, HPD: joint}.items():
            value = found.coverage.sel(quantity=name)
            # 299 draws move the ends of an interval by less than 1 / 300 of probability
            within(value, truth, np.sqrt(truth * (1 - truth) / 3000) + 1 / 1500)
            assert (abs(value - found.level) > 5 * found.se)[:3].all()


# the power of 500 problems; a shift of .3 sd along the narrow direction leaves the joint region
@pytest.mark.parametrize(
    ("error", "seen_in"),
    [
        ({"shift": 0.3}, HPD),
        ({"scale": 0.8}, "z[0]"),
        ({"scale": 0.8}, HPD),
        ({"scale": 1.25}, HPD),
    ],
)
def test_coverage_sees_planted_errors(sums, error, seen_in):
    found = covered(sums, Planted(sums, **error), seed=3).sel(quantity=seen_in)
    z = ((found.coverage - found.level) / found.se).values
    assert np.abs(z).max() > 4
    assert np.sign(z[np.abs(z).argmax()]) == (1 if error.get("scale", 0) > 1 else -1)


def test_coverage_says_why_it_is_missing(sums):
    found = covered(sums, WithoutDensity(sums.exact()), problems=50, seed=0)
    assert found.coverage.sel(quantity=HPD).isnull().all()
    assert str(found.reason.sel(quantity=HPD).values) == "the guide has no density"
    assert found.coverage.sel(quantity="z[0]").notnull().all()

    chain = zoo.HiddenMarkov(5)
    found = covered(chain, chain.exact(), problems=1000, draws=49, seed=1)
    assert found.coverage.drop_sel(quantity=HPD).isnull().all()
    assert (found.reason.drop_sel(quantity=HPD) != "").all()
    within(found.coverage.sel(quantity=HPD), found.level, found.se)


def test_levels_are_checked(sums):
    for levels in ((0.5, 1.0), (), 0.9):
        with pytest.raises(BadInput, match=r"levels: expected .*between 0 and 1"):
            covered(sums, sums.exact(), levels=levels, seed=0)


# TARP


def test_tarp_accepts_exact_guides(sums):
    chain = zoo.HiddenMarkov(5)
    for model in (sums, chain, zoo.FactorAnalysis()):
        found = balls(model, model.exact(), seed=4)
        assert found.attrs["calibrated"], found
        assert list(found.quantity.values) == ["tarp[near]", "tarp[beside]"]


@pytest.mark.parametrize(
    "error",
    [{"shift": 0.3}, {"shift": 0.2}, {"scale": 0.8}, {"scale": 1.25}, {"correlated": False}],
)
def test_tarp_rejects_planted_errors(sums, error):
    guide = WithoutDensity(Planted(sums, **error))
    assert not balls(sums, guide, seed=5).attrs["calibrated"]


def test_tarp_rejects_the_prior(sums):
    """Whose ranks, latent by latent, and coverage are perfect."""
    assert balls(sums, Prior(sums), seed=6).rejected.sel(quantity="tarp[near]")
    found = covered(sums, Prior(sums), seed=6)
    within(found.coverage, found.level, found.se)
    ranks = diagnostics.sbc_test(diagnostics.sbc(sums, Prior(sums), seed=6, progress=False))
    assert not ranks.rejected.sel(quantity=["z[0]", "z[1]", "z[2]"]).any()
    assert ranks.rejected.sel(quantity="log_joint")


def test_tarp_is_uniform_under_the_null(sums):
    """3,000 problems: a bias of the reference, such as that of the draws' mean, would show."""
    tree = diagnostics.tarp(sums, sums.exact(), problems=3000, draws=9, seed=7, progress=False)
    values = tree["prior_sbc"]["tarp"].values[0]
    within(values.mean(0), 0.5, np.sqrt(1 / 12 / 3000))
    within(values.var(0), 1 / 12, np.sqrt(1 / 180 / 3000))
    within(
        np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1], 0.0, 3000**-0.5
    )  # problems independent


def test_tarp_of_a_data_set_that_is_one_problem():
    def program(inputs, targets):
        w = pyro.sample("w", dist.Normal(inputs.new_tensor(0.5), 1.0))
        with pyro.plate("rows", len(inputs)):
            pyro.sample("y", dist.Normal(inputs * w, 0.7), obs=targets)

    x = (torch.linspace(-1, 2, 6), torch.zeros(6))
    model = zoo.from_pyro(program, x, exact=zoo.Quadrature)
    assert balls(model, model.exact(), problems=40, draws=19, seed=8).attrs["calibrated"]


# along an axis


def test_by_time_accepts_exact_guides():
    for model in (zoo.StateSpace(steps=8), zoo.HiddenMarkov(6)):
        tree = diagnostics.sbc(model, model.exact(), seed=1, progress=False)
        found = diagnostics.sbc_by(tree, "time", alpha=ALPHA)
        assert found.attrs["calibrated"]
        assert found.p_value.dims == ("time",)
        within(found["shift"], 0.0, np.sqrt(1 / 12 / 500))
        within(found["spread"], 1.0, np.sqrt(0.2 / 500))


def test_by_time_finds_the_step():
    model = zoo.StateSpace(steps=8)
    tree = diagnostics.sbc(model, Planted(model, shift=0.4, only=5), seed=1, progress=False)
    found = diagnostics.sbc_by(tree, "time", alpha=ALPHA)
    assert found.time[found.rejected].values.tolist() == [5]
    assert float(found["shift"].sel(time=5)) < -0.05
    narrow = diagnostics.sbc(model, Planted(model, scale=0.8), seed=1, progress=False)
    assert (diagnostics.sbc_by(narrow, "time")["spread"] > 1.03).all()


def test_right_at_each_time_and_wrong_on_every_path():
    model = zoo.HiddenMarkov()
    guide = IndependentSteps(model.exact())
    tree = diagnostics.sbc(model, guide, seed=2, progress=False)
    assert diagnostics.sbc_by(tree, "time", alpha=ALPHA).attrs["calibrated"]
    assert diagnostics.sbc_test(tree, alpha=ALPHA).rejected.sel(quantity="log_joint")
    assert not balls(model, guide, seed=2).attrs["calibrated"]


def test_axis_must_exist(sums):
    tree = diagnostics.sbc(sums, sums.exact(), problems=20, draws=9, seed=0, progress=False)
    for dim in ("time", "draw"):
        with pytest.raises(BadInput, match=r"dim: expected one of \['cause'"):
            diagnostics.sbc_by(tree, dim)


# interruptions


class Interrupted(Exception):
    """The power went."""


def break_after(monkeypatch, guide, k):
    """The guide draws k times and no more."""
    draw, calls = guide.draw, []

    def few(*args, **knobs):
        calls.append(None)
        if len(calls) > k:
            raise Interrupted
        return draw(*args, **knobs)

    monkeypatch.setattr(guide, "draw", few)
    return calls


def same(a, b):
    group = (lambda t: t["prior_sbc"].dataset) if hasattr(a, "children") else (lambda t: t)
    return group(a).equals(group(b)) and list(group(a)) == list(group(b)) and a.attrs == b.attrs


@pytest.mark.parametrize("check", CHECKS)
def test_goes_on_where_it_stopped(check, sums, tmp_path, monkeypatch):
    knobs = {"problems": 230, "draws": 19, "seed": 3, "progress": False}
    whole = check(sums, sums.exact(), **knobs)
    knobs["checkpoint"] = tmp_path / "calibration.safetensors"
    guide = sums.exact()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        break_after(patch, guide, 3)
        check(sums, guide, **knobs)
    calls = break_after(monkeypatch, guide, 2)  # of five chunks two are left
    assert same(check(sums, guide, **knobs), whole)
    assert len(calls) == 2
    assert same(check(sums, guide, **knobs), whole)  # finished: nothing is drawn
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.safetensors"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "seed=4.*; got.*seed=3"),
        ({"problems": 70}, "problems=70"),
        ({"draws": 29}, "draws=29"),
        ({"thin": 2}, "thin=2"),
        ({"check": diagnostics.tarp}, "kind='TARP'.*; got kind='SBC'"),
        ({"guide": {"scale": 0.9}}, "knobs="),
        ({"noise": 0.4}, "model parameters="),
    ],
)
def test_other_settings_are_refused(changed, named, tmp_path):
    def run(check=diagnostics.sbc, guide=None, noise=0.3, **knobs):
        model = zoo.ExplainingAway(3, noise=noise)
        settings = {"problems": 60, "draws": 19, "seed": 3, "progress": False} | knobs
        path = tmp_path / "calibration.safetensors"
        return check(model, Planted(model, **(guide or {})), checkpoint=path, **settings)

    run()
    with pytest.raises(BadCheckpoint, match=named):
        run(**changed)


def test_guide_that_has_learned_since_is_refused(sums, tmp_path):
    guide = inference.FullCovarianceEncoder(sums)
    knobs = {"problems": 30, "draws": 9, "seed": 0, "progress": False, "checkpoint": tmp_path / "c"}
    diagnostics.sbc(sums, guide, **knobs)
    with torch.no_grad():
        next(guide.parameters()).add_(0.1)
    with pytest.raises(BadCheckpoint, match="guide parameters="):
        diagnostics.sbc(sums, guide, **knobs)
    (tmp_path / "c").write_bytes(b"cut short")
    with pytest.raises(BadCheckpoint, match="unreadable"):
        diagnostics.sbc(sums, guide, **knobs)


@pytest.mark.parametrize("check", CHECKS)
def test_guides_of_one_observation_are_refused(check, sums):
    with pytest.raises(Incompatible, match="answers for any x"):
        check(sums, inference.AutoNormal(sums), seed=0, progress=False)
    with pytest.raises(BadInput, match="thin: expected an integer >= 1"):
        check(sums, sums.exact(), thin=0, seed=0, progress=False)


# pictures


def test_pictures(sums):
    knobs = {"problems": 60, "draws": 19, "seed": 0, "progress": False}
    space = zoo.StateSpace(steps=8)
    tree = diagnostics.sbc(space, Planted(space, shift=1.0, only=2), **knobs)
    ranks = plot_calibration.ecdf(tree)
    titles = [ax.get_title() for ax in ranks.axes if ax.has_data()]
    assert len(titles) == 12
    assert "z[2]" in titles
    assert any(t.startswith("product of neighbours") for t in titles)
    near = plot_calibration.ecdf(diagnostics.tarp(sums, sums.exact(), **knobs)).axes[0]
    assert near.get_title() == "TARP near"
    held = plot_calibration.coverage(
        diagnostics.coverage(sums, WithoutDensity(sums.exact()), **knobs)
    )
    assert [t.get_text() for t in held.axes[0].get_legend().get_texts()] == [
        "95% band",
        "central, one latent each",
    ]
    steps = plot_calibration.by_time(diagnostics.sbc_by(tree, "time"))
    assert steps.axes[1].get_xlabel() == "time"
    for figure in (ranks, held, steps):
        assert isinstance(figure, Figure)
        figure.canvas.draw()
    assert not pyplot.get_fignums()
