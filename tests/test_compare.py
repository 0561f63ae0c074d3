"""Which metrics `compare` takes, and that all it says depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

import diagnostics
import inference
import zoo
from diagnostics import METRICS, Estimate, Metric
from inference.errors import BadInput

SMALL = {"draws": 100, "chains": 2, "seed": 0}


@pytest.fixture(scope="module")
def problem(request):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    return model, model.observations()[:3]


def test_metrics_can_be_named(problem):
    model, x = problem
    names = ["elbo_gap", "sd_ratio"]
    named = diagnostics.compare(model, {"copy": model.exact()}, x, **SMALL, metrics=names)
    table = {name: METRICS[name] for name in names}
    whole = diagnostics.compare(model, {"copy": model.exact()}, x, **SMALL, metrics=table)
    assert list(named.metric.values) == names
    assert named.identical(whole.assign_attrs(named.attrs))


def test_wrong_names_of_metrics_are_told(problem):
    model, x = problem
    with pytest.raises(BadInput, match="Did you mean 'sd_ratio'"):
        diagnostics.compare(model, {}, x, **SMALL, metrics=["sd_rati"])
    with pytest.raises(BadInput, match=r"metrics: expected .*sequence.*; got 'c2st'"):
        diagnostics.compare(model, {}, x, **SMALL, metrics="c2st")


def test_draws_in_a_plain_dict_are_refused(problem):
    model, x = problem
    trees = diagnostics.collect(model, {}, x, **SMALL)
    with pytest.raises(BadInput, match=r"^trees: .*got a dict\. Call trees = diagnostics\.collect"):
        diagnostics.compare_draws(dict(trees))


def test_a_metric_of_ones_own_has_an_excess(problem):
    """Its ideal value is the metric's, not looked up in the table."""
    model, x = problem

    def width(tree, reference):
        sd = tree.posterior.z.std(("chain", "draw")).mean("factor").values
        return Estimate(sd, np.full(sd.shape, 0.02))

    mine = {"width": Metric(width, "mean sd", 0.25, "spread")}
    found = diagnostics.compare(model, {"copy": model.exact()}, x, **SMALL, metrics=mine)
    assert found.title.values.tolist() == ["mean sd"]
    row = diagnostics.summary(found).sel(metric="width", guide="copy")
    by_hand = np.abs(found.value - 0.25) - np.abs(found.floor - 0.25)
    assert float(row.excess) == pytest.approx(float(by_hand.sel(guide="copy").mean()))
    assert bool(row.at_floor)


def test_comparisons_of_older_versions_have_ideals_by_name(problem):
    model, x = problem
    found = diagnostics.compare(
        model, {"copy": model.exact()}, x, **SMALL, metrics=["sd_ratio", "khat"]
    )
    older = found.drop_vars(["ideal", "title"])
    was, now = (diagnostics.summary(table).excess.values for table in (older, found))
    np.testing.assert_array_equal(was, now)


def test_circuits_that_run_anew_to_know_log_q_depend_on_the_seed_alone():
    model = zoo.PoissonCoding(3, side=3)
    x = model.observations()[:2]
    guides = {"online": inference.OnlinePoisson(model, steps=20)}
    knobs = SMALL | {"metrics": ["eubo_gap", "elbo_gap", "forward_ess"]}
    first, again = (diagnostics.compare(model, guides, x, **knobs) for _ in range(2))
    assert first.value.equals(again.value)
    assert np.isfinite(first.value.sel(metric="eubo_gap")).all()
    found = [
        diagnostics.coverage(model, guides["online"], problems=20, draws=19, seed=1)
        for _ in range(2)
    ]
    assert found[0].equals(found[1])
