"""What synapses are worth: curvatures and statistics of weights against closed forms; about 5 s."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from conftest import within

import diagnostics
import inference
import zoo
from diagnostics import synapse_statistics
from inference import BadInput, Incompatible, PowerLaw
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_statistics_refused():
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
