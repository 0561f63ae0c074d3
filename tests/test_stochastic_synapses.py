"""Stochastic synapses: local reparameterisation in any program, and what it costs to be large.

About 40 s in all; the longest test, a fit, takes 8.
"""

from __future__ import annotations

import gc
import math
import weakref
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.nn import PyroModule, PyroSample
from scipy.integrate import quad
from torch.nn import functional as nnf

import zoo
from inference import (
    BadInput,
    Entropic,
    Fit,
    Incompatible,
    PowerLaw,
    ReliabilityCost,
    StochasticSynapses,
    fit,
)
from inference import noisy as noisy_module
from inference.local import Run
from inference.magnitude import Priors
from inference.noisy import Ledger, NoisyDrive, NoisyWeight, Use, UsedTwice
from inference.seeds import seeded

ROWS, INS, OUTS = 5, 3, 4


@pytest.fixture(autouse=True)
def same_noise():
    with seeded(0):
        yield


def numbers(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64) + 0.3


M, V, BM, BV = (
    numbers(INS, OUTS),
    numbers(INS, OUTS, seed=1) ** 2,
    numbers(OUTS, seed=2),
    numbers(OUTS, seed=3) ** 2,
)
X = numbers(ROWS, INS, seed=4)


def weights():
    ledger = Ledger()
    return ledger, ledger.weight("w", M, V), ledger.weight("b", BM, BV)


# ------------------------------------------------------------------------------ noisy weights

AS_WRITTEN = {
    "x @ w": lambda w, b: (X @ w, X @ M, X**2 @ V),
    "matmul": lambda w, b: (torch.matmul(X, w), X @ M, X**2 @ V),
    "w' x": lambda w, b: (w.T @ X.T, (X @ M).T, (X**2 @ V).T),
    "x @ w + b": lambda w, b: (X @ w + b, X @ M + BM, X**2 @ V + BV),
    "b + x @ w": lambda w, b: (b[None, :] + X @ w, X @ M + BM, X**2 @ V + BV),
    "x @ w - b": lambda w, b: (X @ w - b, X @ M - BM, X**2 @ V + BV),
    "linear": lambda w, b: (nnf.linear(X, w.mT, b), X @ M + BM, X**2 @ V + BV),
    "linear by name": lambda w, b: (
        nnf.linear(X, bias=b, weight=w.t()), X @ M + BM, X**2 @ V + BV,
    ),
    "bias alone": lambda w, b: (X @ M + b, X @ M + BM, BV.expand(ROWS, OUTS)),
    "plain weights": lambda w, b: (nnf.linear(X, M.T, b), X @ M + BM, BV.expand(ROWS, OUTS)),
    "one output": lambda w, b: (X @ w[:, 1], X @ M[:, 1], X**2 @ V[:, 1]),
    "one row": lambda w, b: (X[0] @ w, X[0] @ M, X[0] ** 2 @ V),
    "some inputs": lambda w, b: (X[:, 1:] @ w[1:], X[:, 1:] @ M[1:], X[:, 1:] ** 2 @ V[1:]),
    "scaled": lambda w, b: (X @ (1 - w / 2), X @ (1 - M / 2), X**2 @ (V / 4)),
    "each its scale": lambda w, b: (X @ (M * w), X @ M**2, X**2 @ (M**2 * V)),
    "negative": lambda w, b: (X @ -w, -X @ M, X**2 @ V),
    "reshaped": lambda w, b: (
        X @ w.reshape(-1).view(INS, OUTS).unsqueeze(0).squeeze(0), X @ M, X**2 @ V,
    ),
    "many sets": lambda w, b: (X.expand(2, ROWS, INS) @ w, (X @ M).expand(2, ROWS, OUTS),
                               (X**2 @ V).expand(2, ROWS, OUTS)),
}  # fmt: skip


@pytest.mark.parametrize("how", AS_WRITTEN)
def test_what_weights_drive_has_the_mean_and_variance_of_its_cells(how):
    ledger, w, b = weights()
    drive, mean, variance = AS_WRITTEN[how](w, b)
    assert type(drive) is NoisyDrive
    assert not ledger.draws
    torch.testing.assert_close(drive.means, mean)
    torch.testing.assert_close(drive.variances.expand(mean.shape), variance)
    assert type(drive + 0.0) is torch.Tensor


def test_draws_of_what_weights_drive():
    """Means, variances, and no correlation between cells: 5 standard errors."""
    n = 20_000
    _, w, b = weights()
    found = (X.repeat(n, 1) @ w + b).relu().reshape(n, ROWS, OUTS)
    drive = (X.repeat(n, 1) @ weights()[1] * 1.0).reshape(n, ROWS, OUTS)
    mean, var = X @ M, X**2 @ V
    within(drive.mean(0), mean, (var / n).sqrt())
    within(drive.var(0), var, var * (2 / n) ** 0.5)
    flat = ((drive - mean) / var.sqrt()).reshape(n, -1)
    off = (flat.T @ flat / n)[torch.triu_indices(ROWS * OUTS, ROWS * OUTS, 1).unbind()]
    within(off, torch.zeros_like(off), torch.full_like(off, n**-0.5))
    loc, sd = mean + BM, (var + BV).sqrt()
    z = loc / sd
    standard = torch.distributions.Normal(0.0, 1.0)
    rectified = loc * standard.cdf(z) + sd * standard.log_prob(z).exp()
    within(found.mean(0), rectified, found.std(0) / n**0.5)


def careless(inputs, weight, product):
    weight.ledger.claim(weight.site, Use(inputs, weight.means, product))
    variances = product(inputs.abs(), weight.variances)
    return weight.ledger.drive(product(inputs, weight.means), variances, (weight.site,))


def test_without_the_square_of_the_inputs_the_variance_is_wrong(monkeypatch):
    """Planted error."""
    monkeypatch.setattr(noisy_module, "_drive", careless)
    with pytest.raises(AssertionError, match="not close"):
        test_what_weights_drive_has_the_mean_and_variance_of_its_cells("x @ w")


OTHERWISE = {
    "exp": lambda w: w.exp(),
    "einsum": lambda w: torch.einsum("ni,io->no", X, w),
    "rows by index": lambda w: w[torch.tensor([0, 0, 2])],
    "copies": lambda w: w.expand(2, INS, OUTS),
    "product that grows": lambda w: X[:, :, None] * w,
    "square": lambda w: w * w,
    "reciprocal": lambda w: 1 / w,
    "joined": lambda w: torch.cat([w, w]),
    "norm": lambda w: w.norm(),
    "pieces": lambda w: w.chunk(2)[0],
    "in place": lambda w: w.add_(1.0),
    "compared": lambda w: w > 0,
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_whatever_else_is_done_is_done_with_one_draw(how):
    ledger, w, _ = weights()
    with seeded(3):
        found = OTHERWISE[how](w)
    with seeded(3):
        draw = M + V.sqrt() * torch.randn_like(M)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, OTHERWISE[how](draw.clone()))
    later = X @ w + w.sum()  # now a plain tensor for everybody
    assert type(later) is torch.Tensor
    torch.testing.assert_close(later, X @ ledger.draws["w"] + ledger.draws["w"].sum())


def test_asking_for_the_shape_is_no_use_of_a_weight():
    ledger, w, _ = weights()
    assert (w.shape, w.dim(), len(w), w.dtype) == ((INS, OUTS), 2, INS, torch.float64)
    assert w.new_zeros(2).shape == (2,)
    assert torch.zeros_like(w).sum() == 0
    assert "NoisyWeight" in repr(w)
    assert isinstance(w.T, NoisyWeight)
    assert not ledger.draws
    assert not ledger.uses


def test_what_gets_past_the_rules_is_not_a_number():
    with torch._C.DisableTorchFunctionSubclass():
        assert weights()[1].isnan().all()


def test_rows_of_zeros_have_neither_noise_nor_gradient():
    mean, sd = M.clone().requires_grad_(), V.sqrt().requires_grad_()
    drive = torch.zeros(2, INS, dtype=torch.float64) @ Ledger().weight("w", mean, sd**2)
    drive.relu().sum().backward()
    assert not mean.grad.any()
    assert not sd.grad.any()


TWICE = {
    "two products": lambda w, b: (X @ w, X @ w),
    "tied weights": lambda w, b: (X @ w).tanh() @ w.T,
    "two parts": lambda w, b: (X[:, :1] @ w[:1], X[:, 1:] @ w[1:]),
    "drawn later": lambda w, b: (X @ w, w.sum()),
    "two sums": lambda w, b: (X @ M + b, X @ M + b),
}


@pytest.mark.parametrize("how", TWICE)
def test_a_weight_used_twice_is_refused(how):
    _, w, b = weights()
    with pytest.raises(UsedTwice, match=r"^[wb]$"):
        TWICE[how](w, b)


def test_what_a_bias_was_put_on_is_not_to_be_used_again():
    _, w, b = weights()
    drive = X @ w
    assert (drive + b).sum().isfinite()
    with pytest.raises(UsedTwice, match=r"^w$"):
        drive.relu()


# ---------------------------------------------------------------------------------- magnitude


def price(priors, mean, log_sd, *, at_mean=False):
    variance = None if at_mean else (2 * log_sd).exp()
    return Priors()(priors, mean, log_sd, variance)


PRIORS = {"normal": dist.Normal, "laplace": dist.Laplace}
MEAN, LOG_SD = numbers(1, 6, seed=5), 0.5 * numbers(1, 6, seed=6) - 0.7
LOC, SCALE = numbers(6, seed=7), numbers(6, seed=8).abs() + 0.2


@pytest.mark.parametrize("family", PRIORS)
def test_mean_sizes_agree_with_quadrature(family):
    prior = PRIORS[family](LOC, SCALE)
    truth = 0.0
    for k in range(6):
        one = PRIORS[family](LOC[k], SCALE[k])
        m, s = MEAN[0, k].item(), LOG_SD[0, k].exp().item()

        def integrand(w, one=one, m=m, s=s):
            density = math.exp(-0.5 * ((w - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
            return -one.log_prob(torch.tensor(w, dtype=torch.float64)).item() * density

        ends = sorted([m - 12 * s, m + 12 * s, min(max(LOC[k].item(), m - 12 * s), m + 12 * s)])
        for a, b in pairwise(ends):
            truth += quad(integrand, a, b, epsabs=1e-12, epsrel=1e-12, limit=200)[0]
    assert price([prior], MEAN, LOG_SD).item() == pytest.approx(truth, abs=1e-10)
    at_mean = price([prior], MEAN, LOG_SD, at_mean=True)
    torch.testing.assert_close(at_mean, -prior.log_prob(MEAN).sum(-1))
    assert at_mean < price([prior], MEAN, LOG_SD)


@pytest.mark.parametrize("at_mean", [False, True])
@pytest.mark.parametrize("family", PRIORS)
def test_gradients_of_mean_sizes(family, at_mean):
    """Of fixed priors, whose gradients are written out, and of priors that are learned."""
    inputs = tuple(t.clone().requires_grad_() for t in (MEAN, LOG_SD, LOC, SCALE))
    fixed = PRIORS[family](LOC, SCALE)
    torch.autograd.gradcheck(
        lambda m, s: price([fixed], m, s, at_mean=at_mean) + 0 * s.sum(), inputs[:2]
    )
    torch.autograd.gradcheck(
        lambda m, s, loc, scale: (
            price([PRIORS[family](loc, scale)], m, s, at_mean=at_mean) + 0 * s.sum()
        ),
        inputs,
    )


def test_prices_follow_the_priors():
    """They are kept between steps; a prior that changes is seen."""
    joined = Priors()
    variance = (2 * LOG_SD).exp()
    for loc, scale in ((0.0, 1.0), (0.0, 1.0), (0.0, 2.0), (1.0, 2.0)):
        shapes = ((2,), (2, 2))
        priors = [dist.Normal(torch.tensor(loc).double(), scale).expand(s) for s in shapes]
        whole = dist.Normal(torch.full((6,), loc).double(), scale)
        found = joined(priors, MEAN, LOG_SD, variance)
        torch.testing.assert_close(found, price([whole], MEAN, LOG_SD))


def test_other_priors_have_no_closed_form():
    assert price([dist.StudentT(5.0, LOC, SCALE)], MEAN, LOG_SD) is None


# ------------------------------------------------------------------------------------- guides


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
    with pytest.raises(BadInput, match=r"^noise: .*layer, network, synapse; got 'synapses'"):
        StochasticSynapses(model, noise="synapses")
    with pytest.raises(BadInput, match=r"^scale: expected a finite number > 0; got 0"):
        StochasticSynapses(model, scale=0)
    with pytest.raises(BadInput, match=r"^spread: expected a number >= 0; got -1"):
        StochasticSynapses(model, spread=-1)


# ------------------------------------------------------------ where local noise would be wrong


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
