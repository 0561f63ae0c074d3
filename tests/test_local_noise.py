"""Where local noise would be wrong, models are refused; where it is right, nothing stays behind."""

from __future__ import annotations

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_noisy_weights import numbers
from test_stochastic_synapses import LABELLED, MODELS, built

import zoo
from inference import Incompatible, StochasticSynapses
from inference.local import Run
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")


def centred(images, labels):
    """Rows meet: each sees the mean activity of all."""
    w = pyro.sample("w", dist.Normal(images.new_zeros(2, 3), 1.0).to_event(2))
    h = images @ w
    with pyro.plate("rows", len(images)):
        pyro.sample("y", dist.Categorical(logits=(h - h.mean(0)).exp()), obs=labels)


def correlated(images, labels):
    """Rows meet in the likelihood."""
    w = pyro.sample("w", dist.Normal(images.new_zeros(2), 1.0).to_event(1))
    covariance = torch.eye(len(images)).to(images) + 0.5
    pyro.sample("y", dist.MultivariateNormal(images @ w, covariance), obs=labels)


def in_time(images, labels):
    """Rows meet one after the other."""
    w = pyro.sample("w", dist.Normal(images.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(images)):
        pyro.sample("y", dist.Normal((images @ w).cumsum(0).tanh(), 0.5), obs=labels)


@pytest.mark.parametrize("program", [centred, correlated, in_time])
def test_models_whose_rows_meet_are_refused(program):
    model = zoo.from_pyro(program, LABELLED)
    x = model.observations()
    guide = StochasticSynapses(model)
    with pytest.raises(Incompatible, match=r"^site 'w': expected rows .*apart.*local=False"):
        guide.energies(x)
    assert StochasticSynapses(model, local=False).energies(x).performance.isfinite()


def recurrent(images, labels):
    """The same weights at each step."""
    w = pyro.sample("w", dist.Normal(images.new_zeros(2, 2), 1.0).to_event(2))
    h = (images @ w).tanh()
    with pyro.plate("rows", len(images)):
        pyro.sample("y", dist.Normal((h @ w).sum(-1), 0.5), obs=labels)


def test_models_that_use_a_weight_twice_are_refused():
    model = zoo.from_pyro(recurrent, LABELLED)
    with pytest.raises(Incompatible, match=r"^site 'w': .*used once.*local=False"):
        StochasticSynapses(model).energies(model.observations())


def moody(x):
    """A site that comes and goes."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
    if moody.extra:
        w = w + pyro.sample("v", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(w.exp(), 0.5), obs=x)


def test_models_that_change_their_sites_are_refused():
    moody.extra = False
    model = zoo.from_pyro(moody, numbers(3))
    guide = StochasticSynapses(model)
    guide.energies(model.observations())
    moody.extra = True
    with pytest.raises(Incompatible, match=r"sites \['w', 'x'\].*got \['v', 'w', 'x'\]"):
        guide.energies(model.observations())


def test_the_check_of_the_model_leaves_randomness_alone():
    model = MODELS["two layers"]()
    with seeded(0):
        first = built(model)[0].energies(model.observations()).performance
    guide = built(model)[0]
    guide.energies(model.observations())
    with seeded(0):
        later = guide.energies(model.observations()).performance
    assert torch.equal(first, later)


def test_runs_leave_nothing_behind():
    """Cycles would keep each step's graph until the collector comes round."""
    guide, x = built(MODELS["two layers"]())
    gc.disable()
    try:
        run = Run(guide.latents, x, *guide.moments(x))
        run.performance()
        dies = [weakref.ref(run), weakref.ref(run.ledger), weakref.ref(run.variance)]
        del run
        assert not any(ref() is not None for ref in dies)
    finally:
        gc.enable()
