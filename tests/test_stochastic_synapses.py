"""Stochastic synapses as guides: energies, gradients, presynaptic activity, fits.

About 30 s in all; the longest test, a fit, takes 8.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.nn import PyroModule, PyroSample
from test_noisy_weights import careless, numbers

import zoo
from inference import BadInput, Entropic, Fit, PowerLaw, ReliabilityCost, StochasticSynapses, fit
from inference import noisy as noisy_module
from inference.local import Run
from inference.seeds import seeded

pytestmark = pytest.mark.usefixtures("same_noise")


def regression(rows=6, problems=3, **knobs):
    return zoo.BayesianRegression(rows, 2, problems=problems, noise=0.7, **knobs).double()


def built(model, x=None, *, sd=0.3, **knobs):
    """A guide away from its start."""
    x = model.observations() if x is None else x
    guide = StochasticSynapses(model, spread=0.5, **knobs)
    guide.bind(x)
    with torch.no_grad(), seeded(1):
        guide.log_scale.copy_(math.log(sd) + 0.3 * torch.randn_like(guide.log_scale))
    return guide, x


def two_layers(images, labels):
    """Three rows, two pixels, three classes; the prior of the first layer is no Normal."""
    w1 = pyro.sample("w1", dist.Laplace(images.new_zeros(2, 4), 0.8).to_event(2))
    b1 = pyro.sample("b1", dist.Normal(images.new_zeros(4), 0.5).to_event(1))
    w2 = pyro.sample("w2", dist.StudentT(4.0, images.new_zeros(4, 3), 1.0).to_event(2))
    gain = pyro.sample("gain", dist.Gamma(images.new_tensor(4.0), 3.0))
    with pyro.plate("rows", len(images)):
        h = (images @ w1 + b1).tanh()
        pyro.sample("y", dist.Categorical(logits=gain * (h @ w2)), obs=labels)


class Modular(PyroModule):
    """As Pyro's documentation has it: linear layers with sampled weights."""

    def __init__(self):
        super().__init__()
        self.first = PyroModule[torch.nn.Linear](2, 3)
        self.second = PyroModule[torch.nn.Linear](3, 1)
        for layer in (self.first, self.second):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(layer.weight.shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(layer.bias.shape).to_event(1))

    def forward(self, x, y):
        loc = self.second(self.first(x).relu()).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 0.5), obs=y)


def group_effects(x):
    """A factor, and inputs that pick weights."""
    a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    pyro.factor("wish", -0.1 * (a**2).sum())
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(a[torch.tensor([0, 0, 1])], 0.5), obs=x)


LABELLED = (numbers(3, 2, seed=9), torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64))
MODELS = {
    "regression": regression,
    "logistic": lambda: zoo.LogisticRegression(5, 2, problems=3).double(),
    "two layers": lambda: zoo.from_pyro(two_layers, LABELLED),
    "modules": lambda: zoo.from_pyro(Modular(), tuple(t.float() for t in LABELLED)),
    "groups": lambda: zoo.from_pyro(group_effects, numbers(3, seed=9)),
    "factor analysis": lambda: zoo.FactorAnalysis(5, 2, seed=1).double(),
}
LOCAL = {  # sites whose noise is local
    "regression": {"w"},
    "logistic": {"w"},
    "two layers": {"w1", "b1", "w2"},
    "modules": {f"program.{a}.{b}" for a in ("first", "second") for b in ("weight", "bias")},
    "groups": set(),
    "factor analysis": {"z"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_energies_agree_with_those_of_drawn_weights(kind):
    """Performance and magnitude of each problem, 5 standard errors."""
    model, n = MODELS[kind](), 40
    found = []
    for local in (True, False):
        guide, x = built(model, local=local)
        with torch.no_grad():
            draws = [guide.energies(x, particles=5) for _ in range(n)]
        found.append([torch.stack([d[k] for d in draws]).double() for k in (0, 1)])
    for mine, plain in zip(*found, strict=True):
        assert mine.shape == plain.shape
        se = (mine.var(0) / n + plain.var(0) / n).sqrt()
        within(mine.mean(0), plain.mean(0), se)


@pytest.mark.parametrize("kind", [k for k in MODELS if k != "two layers"])
def test_magnitude_of_the_mean(kind):
    """The same for all; where a prior is not in closed form too."""
    model = MODELS[kind]()
    mine, plain = (
        guide.energies(x, at_mean=True).magnitude
        for guide, x in (built(model, local=local) for local in (True, False))
    )
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("kind", MODELS)
def test_which_sites_are_local(kind):
    guide, x = built(MODELS[kind]())
    run = Run(guide.latents, x, *guide.moments(x))
    assert set(run.ledger.uses) == LOCAL[kind]
    assert set(guide.presynaptic(x)) == LOCAL[kind]


def copies(n, **knobs):
    """A guide for n copies of three data sets; each copy is a draw."""
    model = regression()
    x = tuple(t.repeat(n, *[1] * (t.dim() - 1)) for t in model.observations())
    guide, _ = built(model, x, **knobs)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.copy_(parameter[:3].repeat(n, 1))
    return model, guide, x


def linear_gaussian(model, guide, x):
    """E[-log p(y given w)] and its gradients by mean and log sd, in closed form."""
    (inputs, targets), (mean, log_sd) = x, guide.moments(x)
    s, var = model.scale, (2 * log_sd).exp()
    error = (inputs @ mean[..., None])[..., 0] - targets
    curvature = inputs.square().sum(1) / s**2
    square = error.square().sum(-1) / s**2 + (curvature * var).sum(-1)
    value = square / 2 + targets.shape[-1] * (math.sqrt(2 * math.pi) * s).log()
    by_mean = (inputs.mT @ error[..., None])[..., 0] / s**2
    return value, torch.cat([by_mean, curvature * var], -1)


def samples(guide, x, n):
    """Performance (n, 3) and its gradients (n, 3, 2 D)."""
    value = guide.energies(x).performance
    slopes = torch.autograd.grad(value.sum(), [guide.mean, guide.log_scale])
    return value.detach().reshape(n, 3), torch.cat(slopes, -1).reshape(n, 3, -1)


def test_energies_and_gradients_of_a_linear_model_are_those_of_the_closed_form():
    n = 4000
    variances = []
    for local in (True, False):
        model, guide, x = copies(n, local=local)
        truth = linear_gaussian(model, guide, x)
        found = samples(guide, x, n)
        for draws, true in zip(found, truth, strict=True):
            within(draws.mean(0), true[:3].detach(), draws.std(0) / n**0.5)
        variances.append(found[1].var(0).sum())
    assert variances[0] < 0.7 * variances[1]  # six rows, each with noise of its own


def test_magnitude_of_normal_weights_is_exact():
    model = regression()
    guide, x = built(model)
    mean, log_sd = guide.moments(x)
    size = (mean**2 + (2 * log_sd).exp()).sum(-1) * model.alpha / 2
    truth = size + (2 * math.pi / model.alpha).log()
    torch.testing.assert_close(guide.energies(x).magnitude, truth)


def test_without_the_square_of_the_inputs_gradients_are_wrong(monkeypatch):
    """Planted error."""
    monkeypatch.setattr(noisy_module, "_drive", careless)
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        test_energies_and_gradients_of_a_linear_model_are_those_of_the_closed_form()


def test_entropic_loss_is_the_divergence_from_the_posterior():
    """KL(q || p(w given x)) - log p(x), both in closed form."""
    n = 4000
    model, guide, x = copies(n)
    terms = ReliabilityCost(Entropic()).terms(guide, x)
    found = sum(terms[k] for k in ("performance", "magnitude", "reliability")).detach()
    posterior, q = model.exact().distribution(x), guide.distribution(x)
    q = torch.distributions.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    truth = torch.distributions.kl_divergence(q, posterior) - model.exact().log_evidence(x)
    draws = found.reshape(n, 3)
    within(draws.mean(0), truth[:3].detach(), draws.std(0) / n**0.5)


def test_a_share_of_the_rows_stands_for_all():
    """Without noise the shares add up; with a wrong factor they would not."""
    model = zoo.BayesianMLP(12, 3).double()
    guide, x = built(model)
    with torch.no_grad():
        guide.log_scale.fill_(-40.0)
        whole = guide.energies(x)
        parts = [guide.energies(tuple(t[k : k + 4] for t in x), share=1 / 3) for k in (0, 4, 8)]
    torch.testing.assert_close(
        torch.stack([p.performance for p in parts]).mean(0), whole.performance
    )
    torch.testing.assert_close(parts[0].magnitude, whole.magnitude)


@pytest.mark.parametrize(("noise", "columns"), [("synapse", 85), ("layer", 4), ("network", 1)])
def test_synapses_may_share_their_noise(noise, columns):
    model = zoo.BayesianMLP(12, 1).double()
    guide, x = built(model, noise=noise)
    assert guide.log_scale.shape == (1, columns)
    sds = guide.noise(x)
    assert sds.shape == (1, 85)
    assert len(sds.unique()) == columns
    assert all(len(t.unique()) == 1 or columns == 85 for t in sds.split([64, 1, 10, 10], -1))
    assert torch.equal(guide.energies(x).log_sd.exp(), sds)
    loss = ReliabilityCost(PowerLaw("actin", scale=0.1))(model, guide, x)["guide"]
    (slope,) = torch.autograd.grad(loss, guide.log_scale)
    assert slope.all()


def test_each_problem_has_synapses_of_its_own():
    model = regression()
    guide = StochasticSynapses(model, noise="layer", scale=0.2)
    with pytest.raises(BadInput, match="has not been fitted"):
        guide.energies(model.observations())
    x = model.observations()
    guide.bind(x)
    assert (guide.mean.shape, guide.log_scale.shape) == ((3, 2), (3, 1))
    torch.testing.assert_close(guide.noise(x), torch.full((3, 2), 0.2, dtype=torch.float64))
    with pytest.raises(BadInput, match=r"^x: .*was fitted to; got another one"):
        guide.energies(tuple(t[:2] for t in x))
    twice = tuple(t.repeat(2, *[1] * (t.dim() - 1)) for t in x)
    assert guide.energies(twice).performance.shape == (6,)
    torch.testing.assert_close(guide.noise(twice)[3:], guide.noise(x))


@pytest.mark.parametrize("kind", ["regression", "two layers"])
def test_fits_are_restored(kind, tmp_path):
    model = MODELS[kind]()
    guide = StochasticSynapses(model, noise="layer")
    run = fit(model, guide, model.observations(), steps=5, progress=False)
    run.save(tmp_path / "fit.safetensors")
    again = StochasticSynapses(model, noise="layer")
    Fit.load(tmp_path / "fit.safetensors", again)
    for a, b in zip(guide.moments(model.observations()), again.moments(model.observations())):  # noqa: B905
        assert torch.equal(a, b)


def test_bad_knobs_are_refused():
    model = regression()
    with pytest.raises(BadInput, match=r"^noise: got 'synapses'\. Did you mean 'synapse'"):
        StochasticSynapses(model, noise="synapses")
    with pytest.raises(BadInput, match=r"^scale: expected a positive, finite number; got 0"):
        StochasticSynapses(model, scale=0)
    with pytest.raises(BadInput, match=r"^spread: expected a number >= 0; got -1"):
        StochasticSynapses(model, spread=-1)


# -------------------------------------------------------------------------- what synapses receive


def test_presynaptic_activity_has_the_shape_of_the_weights():
    model = zoo.BayesianMLP(12, 3).double()
    guide, x = built(model)
    images, found = x[0], guide.presynaptic(x, at_mean=True)
    assert {n: t.rate.shape for n, t in found.items()} == {
        "w1": (1, 64, 3), "b1": (1, 3), "w2": (1, 3, 10), "b2": (1, 10),
    }  # fmt: skip
    w1, b1 = (guide.latents.unpack(guide.mean)[0][n][0] for n in ("w1", "b1"))
    for name, activity in (("w1", images), ("w2", (images @ w1 + b1).relu())):
        for each, truth in zip(found[name], (activity.abs(), activity**2), strict=True):
            torch.testing.assert_close(each, truth.mean(0)[:, None].expand_as(each[0])[None])
    assert (found["b1"].rate == 1).all()
    assert not torch.equal(guide.presynaptic(x)["w2"].rate, found["w2"].rate)


def test_presynaptic_activity_of_each_problem_and_of_turned_and_scaled_weights():
    model = regression()
    guide, x = built(model)
    found = guide.presynaptic(x)["w"]
    torch.testing.assert_close(found.rate, x[0].abs().mean(1))
    torch.testing.assert_close(found.square, x[0].square().mean(1))
    modules = MODELS["modules"]()
    guide, x = built(modules)
    found = guide.presynaptic(x)["program.first.weight"]
    torch.testing.assert_close(found.rate[0], x[0].abs().mean(0).expand(3, 2))


# ------------------------------------------------------------------------------------------ fit


@pytest.mark.parametrize("rho", [1 / 2, 2])
def test_fitted_noise_and_means_of_a_linear_neuron(rho):
    """s_i^2 = (s0^rho / L_ii)^(2 / (rho + 2)), and the exact posterior means.

    Tolerances, of the stochastic fit: .1 of log variance, half a posterior sd.
    """
    model, s0 = regression(30, problems=4), 0.1
    guide, x = StochasticSynapses(model, scale=s0), model.observations()
    objective = ReliabilityCost(PowerLaw(rho, scale=s0))
    fit(model, guide, x, objective=objective, steps=1000, lr=0.05, progress=False)
    precision = x[0].mT @ x[0] / model.scale**2 + model.alpha * torch.eye(2).double()
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    law = (s0**rho / diagonal) ** (2 / (rho + 2))
    assert (guide.noise(x).square() / law).log().abs().max() < 0.1
    exact = torch.linalg.solve(precision, (x[0].mT @ x[1][..., None]) / model.scale**2)[..., 0]
    sd = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((guide.mean - exact) / sd).abs().max() < 0.5
