"""Simulation-based calibration accepts what is right and rejects what is not; about 15 s."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from threadpoolctl import threadpool_limits
from torch.distributions import MultivariateNormal

import diagnostics
import inference
import zoo
from diagnostics.calibration import p_value
from inference.errors import BadInput, Incompatible


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


class Planted(inference.PackedGuide):
    """The posterior of a linear Gaussian model, with an error of a known size in sds."""

    def __init__(self, model, *, shift=0.0, scale=1.0, correlated=True):
        super().__init__(model, shift=shift, scale=scale, correlated=correlated)
        self.shift, self.scale, self.correlated = shift, scale, correlated

    def distribution(self, x):
        p = self.model.exact().distribution(x)
        sd = p.variance.sqrt()
        tril = p.scale_tril if self.correlated else torch.diag_embed(sd)
        return MultivariateNormal(p.mean + self.shift * sd, scale_tril=self.scale * tril)


@pytest.fixture(scope="module")
def sums():
    """Three causes whose sum is seen: strongly correlated posteriors."""
    return zoo.ExplainingAway(3, noise=0.3)


def run(model, guide, seed, **knobs):
    tree = diagnostics.sbc(model, guide, seed=seed, progress=False, **knobs)
    return diagnostics.sbc_test(tree, alpha=0.001)  # a right guide fails once in a thousand seeds


def test_accepts_the_exact_guide(sums):
    found = run(sums, sums.exact(), 1)
    assert found.attrs["calibrated"]
    assert list(found.quantity.values) == [
        *("z[0]", "z[1]", "z[2]", "log_joint", "neighbours[0]", "neighbours[1]")
    ]


# at the powers that 500 problems have: bias .2 sd .97, sd x .8 and x 1.25 about 1
@pytest.mark.parametrize(
    ("error", "seen_in"),
    [
        ({"shift": 0.3}, "z[0]"),
        ({"scale": 0.75}, "z[0]"),
        ({"scale": 1.3}, "log_joint"),
        ({"correlated": False}, "neighbours[0]"),
    ],
)
def test_rejects_planted_errors(sums, error, seen_in):
    found = run(sums, Planted(sums, **error), 2)
    assert not found.attrs["calibrated"]
    assert bool(found.rejected.sel(quantity=seen_in))


def test_sign_of_the_shift(sums):
    """Draws too high: the truth ranks low."""
    found = run(sums, Planted(sums, shift=0.5), 3)
    assert float(found["shift"].sel(quantity="z[1]")) < -0.05


def test_marginals_alone_do_not_see_the_prior(sums):
    """The prior has uniform marginal ranks; the joint quantity tells."""

    class Prior(inference.PackedGuide):
        def distribution(self, x):
            return MultivariateNormal(torch.zeros(len(x), 3), torch.eye(3))

    found = run(sums, Prior(sums), 4)
    assert not found.rejected.sel(quantity=["z[0]", "z[1]", "z[2]"]).any()
    assert bool(found.rejected.sel(quantity="log_joint"))


def test_shape_is_that_of_arviz(sums):
    import arviz_plots

    tree = diagnostics.sbc(sums, sums.exact(), problems=40, draws=9, seed=0, progress=False)
    data = tree["prior_sbc"].dataset
    assert data["z"].dims == ("chain", "draw", "cause")
    assert data["log_joint"].shape == (1, 40)
    assert all(((v > 0) & (v < 1)).all() for v in data.data_vars.values())
    arviz_plots.plot_ecdf_pit(tree, backend="none")
    assert tree.attrs["draws"] == 9


def test_depends_on_the_seed_alone(sums):
    knobs = {"problems": 30, "draws": 9, "progress": False}
    one, two, other = (diagnostics.sbc(sums, sums.exact(), seed=s, **knobs) for s in (5, 5, 6))
    assert one["prior_sbc"].dataset.equals(two["prior_sbc"].dataset)
    assert not one["prior_sbc"].dataset.equals(other["prior_sbc"].dataset)


def test_discrete_latents_break_ties_at_random():
    model = zoo.HiddenMarkov(5)
    assert run(model, model.exact(), 7, problems=300, draws=19).attrs["calibrated"]


def test_data_set_that_is_one_problem():
    def program(inputs, targets):
        w = pyro.sample("w", dist.Normal(inputs.new_tensor(0.5), 1.0))
        with pyro.plate("rows", len(inputs)):
            pyro.sample("y", dist.Normal(inputs * w, 0.7), obs=targets)

    x = (torch.linspace(-1, 2, 6), torch.zeros(6))
    model = zoo.from_pyro(program, x, exact=zoo.Quadrature)
    assert run(model, model.exact(), 8, problems=60, draws=19).attrs["calibrated"]


def test_refuses_guides_of_one_observation(sums):
    with pytest.raises(Incompatible, match="answers for any x"):
        diagnostics.sbc(sums, inference.AutoNormal(sums), seed=0, progress=False)
    with pytest.raises(BadInput, match="draws: expected an integer >= 1"):
        diagnostics.sbc(sums, sums.exact(), draws=0, seed=0, progress=False)
    tree = diagnostics.sbc(sums, sums.exact(), problems=10, seed=0, progress=False)
    with pytest.raises(BadInput, match="at least 20"):
        diagnostics.sbc_test(tree)


def testp_values_are_uniform_under_the_null():
    rng = np.random.default_rng(0)
    p = np.array([p_value(rng.uniform(size=100)) for _ in range(400)])
    for level in (0.01, 0.05, 0.2):
        se = math.sqrt(level * (1 - level) / 400)
        assert abs((p <= level).mean() - level) < 5 * se
    assert p_value(rng.uniform(size=100) ** 3) < 1e-10  # the union bound goes on where 1e-4 ends
    assert stats.kstest(p, "uniform").pvalue > 1e-3
