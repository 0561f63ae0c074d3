"""Implicit: a value somebody else has drawn, with samples, gradients and no density."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO

from inference import Implicit, NoDensity

X = torch.tensor([[0.4, -1.0], [2.0, 0.3], [1.1, 0.7]])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        return pyro.sample("z", Implicit(2 * x + 1, event_dim=1))


def test_a_trace_holds_the_value_itself():
    node = poutine.trace(guide).get_trace(X).nodes["z"]
    assert torch.equal(node["value"], 2 * X + 1)
    assert node["fn"].batch_shape == (3,)
    assert node["fn"].event_shape == (2,)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_it(parallel):
    draws = Predictive(guide, num_samples=4, parallel=parallel)(X)["z"]
    assert torch.equal(draws.reshape(4, 3, 2), (2 * X + 1).expand(4, 3, 2))


def test_a_plate_expands_it_and_the_event_stays():
    wide = Implicit(X[0], event_dim=1).expand(torch.Size([3]))
    assert (wide.batch_shape, wide.event_shape) == ((3,), (2,))
    assert torch.equal(wide.sample(), X[0].expand(3, 2))
    assert wide.rsample(torch.Size([5])).shape == (5, 3, 2)
    assert Implicit(X).event_shape == ()


def test_gradients_flow_through_it():
    x = X.clone().requires_grad_()
    z = poutine.trace(guide).get_trace(x).nodes["z"]["value"]
    slope = torch.autograd.grad((z**2).sum(), x)[0]
    torch.testing.assert_close(slope, 4 * (2 * X + 1))


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
def test_no_elbo_takes_it_for_a_point_mass(estimator):
    with pytest.raises(NoDensity, match=r"^guide: expected a density.*only be sampled\. Train it"):
        estimator().loss(model, guide, X)
    with pytest.raises(NoDensity):
        estimator().differentiable_loss(model, guide, X)


def test_its_log_prob_is_refused():
    with pytest.raises(NoDensity):
        Implicit(X, event_dim=1).log_prob(X)
    with pytest.raises(NoDensity):
        poutine.trace(guide).get_trace(X).log_prob_sum()
