"""Regressions, the neural network and eight schools: against numpy, grids and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy import stats
from scipy.special import expit, logsumexp
from test_data import REAL
from threadpoolctl import threadpool_limits

import zoo
from inference.errors import BadInput, NoExactPosterior
from inference.latents import Latents
from inference.observation import take
from inference.seeds import seeded
from zoo.bayesian_mlp import BayesianMLP
from zoo.bayesian_regression import BayesianRegression, designs
from zoo.data import Data, digits, mnist
from zoo.eight_schools import EFFECTS, ERRORS, EightSchools
from zoo.linear_gaussian import LinearGaussian
from zoo.logistic_regression import LogisticRegression


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


# inputs


@pytest.mark.parametrize("knobs", [{}, {"correlation": 0.6}, {"correlation": 0.0}])
def test_designs_have_scales_and_correlations_of_their_own(knobs):
    x = designs(50, 400, 4, seed=3, **knobs).double().flatten(0, 1)
    scale = 10 ** np.array([-0.7, -0.7 / 3, 0.7 / 3, 0.7])
    loading = np.array([0.9, 0.7, 0.5, 0.3]) * knobs.get("correlation", 0.9) / 0.9
    correlation = np.outer(loading, loading)
    np.fill_diagonal(correlation, 1.0)
    covariance = correlation * np.outer(scale, scale)
    var = np.diag(covariance)
    se = np.sqrt((np.outer(var, var) + covariance**2) / len(x))
    within(np.cov(x.T), covariance, se)
    within(x.mean(0), 0.0, scale / math.sqrt(len(x)))
    one, two = designs(2, 5, 4, seed=3)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("cls", [BayesianRegression, LogisticRegression])
@pytest.mark.parametrize("correlation", [-0.1, 1.01, math.nan])
def test_designs_refuse(cls, correlation):
    with pytest.raises(BadInput, match="correlation: expected a number from 0 to 1"):
        cls(5, 2, problems=1, correlation=correlation)


@pytest.mark.parametrize("cls", [BayesianRegression, LogisticRegression])
def test_own_inputs_and_own_data(cls):
    model = cls(8, 3, problems=2)
    inputs, targets = designs(4, 7, 5, seed=1) + 0.2, torch.ones(4, 7)
    model.keep_draws((inputs, targets), 4, seed=0)
    drawn = model.observations()
    assert torch.equal(drawn[0], inputs)
    assert not torch.equal(drawn[1], targets)
    model.keep((inputs, targets))
    assert all(map(torch.equal, model.observations(), (inputs, targets)))
    z = model.exact().draw(model.observations(), draws=3, chains=1, seed=0).values["w"]
    assert z.shape == (1, 3, 4, 5)


# linear regression


@pytest.fixture(scope="module")
def linear():
    return BayesianRegression(9, 3, problems=6, alpha=0.7, noise=0.4, seed=2).double()


def bishop(x, y, alpha, noise):
    """Mean and covariance by equations 3.50 and 3.51 of Bishop, log p(y) from the marginal."""
    beta = noise**-2
    covariance = np.linalg.inv(alpha * np.eye(x.shape[1]) + beta * x.T @ x)
    marginal = noise**2 * np.eye(len(y)) + x @ x.T / alpha
    return (
        covariance @ (beta * x.T @ y),
        covariance,
        stats.multivariate_normal(None, marginal).logpdf(y),
    )


def test_linear_posterior_of_every_data_set_is_bishops(linear):
    x = linear.observations()
    q, evidence = linear.exact().distribution(x), linear.exact().log_evidence(x)
    alpha, noise = float(linear.alpha), float(linear.scale)
    for b, (inputs, targets) in enumerate(zip(*(t.numpy() for t in x), strict=True)):
        mean, covariance, log_p = bishop(inputs, targets, alpha, noise)
        np.testing.assert_allclose(q.mean[b], mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(q.covariance_matrix[b], covariance, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(evidence[b], log_p, rtol=1e-10)


def test_linear_draws_have_the_moments_of_bishop(linear):
    x, n = take(linear.observations(), slice(0, 2)), 4000
    z = linear.exact().draw(x, draws=n, chains=1, seed=0).values["w"][0]
    for b in range(2):
        args = (x[0][b].numpy(), x[1][b].numpy(), float(linear.alpha), float(linear.scale))
        mean, covariance, _ = bishop(*args)
        var = np.diag(covariance)
        within(z[:, b].mean(0), mean, np.sqrt(var / n))
        se = np.sqrt((np.outer(var, var) + covariance**2) / n)
        within(np.cov(z[:, b].T), covariance, se)


def test_linear_precision_is_the_curvature_plus_the_prior(linear):
    """H_ii = noise^-2 sum_t X_ti^2, equation 26 of Malkin et al., and alpha from the prior."""
    precision = linear.exact().precision()
    curvature = linear.x_0.square().sum(1) / linear.scale.square()
    found = precision.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, curvature + linear.alpha, rtol=1e-12, atol=0)


def test_linear_independent_inputs_and_a_silent_one():
    """Twenty inputs: no weight is known better with the others known, and a silent one not at all.

    Among n = 1,000 trials the correlations are of order n^-1/2, so that 1 / L_ii falls short of the
    variance by 19 / n of it; five standard errors of that chi-squared are 31 / n.
    """
    model = BayesianRegression(1000, 20, problems=2, correlation=0.0, alpha=0.3).double()
    inputs, targets = model.observations()
    inputs[..., 3] = 0.0
    model.keep_draws((inputs, targets), 2, seed=1)
    precision = model.exact().precision()
    alone = 1 / precision.diagonal(dim1=-2, dim2=-1)
    marginal = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1)
    assert (alone / marginal > 1 - (19 + 31) / 1000).all()
    silent = torch.full((2,), 1 / 0.3, dtype=torch.float64)
    torch.testing.assert_close(alone[:, 3], silent, rtol=1e-6, atol=0)
    torch.testing.assert_close(marginal[:, 3], silent, rtol=1e-6, atol=0)
    z = model.exact().draw(model.observations(), draws=2000, chains=1, seed=0).values["w"][0]
    within(z[..., 3].var(0), silent, silent * math.sqrt(2 / 2000))


def test_linear_factorised_guides_are_too_narrow(linear):
    """Correlated inputs: 1 / L_ii is below the marginal variance, and the gap is a KL."""
    exact = linear.exact()
    precision = exact.precision()
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    marginal = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1)
    assert (1 / diagonal < marginal).all()
    q = torch.distributions.MultivariateNormal(
        exact.distribution(linear.observations()).mean, torch.diag_embed(1 / diagonal)
    )
    p = exact.distribution(linear.observations())
    kl = torch.distributions.kl_divergence(q, p)
    assert kl.min() > 0.01
    torch.testing.assert_close(exact.mean_field_gap(), kl, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_little_noise_gives_least_squares(dtype):
    model = BayesianRegression(30, 4, noise=1e-3).to(dtype)
    inputs, targets = x = take(model.observations(), slice(0, 5))
    mean = model.exact().distribution(x).mean
    want = torch.linalg.lstsq(inputs.double(), targets.double()[..., None]).solution[..., 0]
    torch.testing.assert_close(mean.double(), want, rtol=1e-3, atol=1e-4)
    assert model.exact().log_evidence(x).isfinite().all()


@pytest.mark.parametrize("cls", [BayesianRegression, LogisticRegression])
def test_predict_is_the_mean_of_the_targets(cls):
    model, n = cls(8, 2, problems=3).double(), 4000
    z = {"w": model.simulate(3, seed=4)[0]["w"]}
    many = {"w": z["w"].expand(n, -1, -1)}
    with seeded(1):
        y = Latents(model).replicate(many, model.observations())
    sure = y.std(0) == 0  # of a saturated neuron
    mean, se = model.predict(z), y.std(0) / math.sqrt(n)
    within(y.mean(0)[~sure], mean[~sure], se[~sure])
    assert ((y.mean(0) - mean)[sure].abs() < 5e-3).all()


# logistic regression


def test_logistic_posterior_on_another_grid():
    """Two weights: the sum over a fixed grid of 601 x 601 points, in numpy."""
    model = LogisticRegression(15, 2, alpha=0.6, seed=1).double()
    x = take(model.observations(), slice(0, 3))
    alpha = float(model.alpha)
    axis = np.linspace(-11.0, 11.0, 601) / math.sqrt(alpha)
    first, second = (a.reshape(-1) for a in np.meshgrid(axis, axis, indexing="ij"))
    w = np.stack([first, second], -1)
    grid = model.exact().distribution(x)
    mean, sd = grid.moments(grid.log_density, grid.nodes)
    for b, (inputs, labels) in enumerate(zip(*(t.numpy() for t in x), strict=True)):
        logits = w @ inputs.T
        score = stats.norm(0, alpha**-0.5).logpdf(w).sum(-1)
        score = score - np.logaddexp(0, np.where(labels == 1, -logits, logits)).sum(-1)
        evidence = logsumexp(score) + 2 * math.log(axis[1] - axis[0])
        weight = np.exp(score - logsumexp(score))[:, None]
        centre = (weight * w).sum(0)
        np.testing.assert_allclose(grid.log_evidence[b], evidence, atol=1e-7)
        np.testing.assert_allclose(mean[b], centre, atol=1e-7)
        spread = np.sqrt((weight * (w - centre) ** 2).sum(0))
        np.testing.assert_allclose(sd[b], spread, rtol=1e-6)


@pytest.fixture(scope="module")
def logistic():
    """Three weights: the model, three problems, and their grid."""
    model = LogisticRegression(12, 3).double()
    x = take(model.observations(), slice(0, 3))
    return model, x, model.exact().distribution(x)


def test_logistic_grid_is_fine_enough(logistic):
    """Half the grid is off by a hundredth of an sd, the grid itself by less than 1e-4."""
    model, x, grid = logistic
    error = grid.error()
    assert (error["edge_mass"] < 1e-6).all()
    assert all((error[k] < 0.02).all() for k in ("mean", "sd", "log_evidence"))
    fine = zoo.Quadrature(model, points=61).distribution(x)
    pairs = [grid.moments(grid.log_density, grid.nodes), fine.moments(fine.log_density, fine.nodes)]
    (mean, sd), (mean_2, sd_2) = pairs
    assert ((mean - mean_2).abs() / sd < 1e-4).all()
    assert ((sd - sd_2).abs() / sd < 1e-4).all()
    assert ((grid.log_evidence - fine.log_evidence).abs() < 1e-4).all()


def test_logistic_grid_agrees_with_metropolis_from_the_mode(logistic):
    model, x, grid = logistic
    mean, sd = grid.moments(grid.log_density, grid.nodes)
    other, n = zoo.LogConcave(model), 4000
    within(other.log_evidence(x), grid.log_evidence, other.error(x)["log_evidence"])
    for guide in (other, model.exact()):
        w = guide.draw(x, draws=n, chains=1, seed=3).values["w"][0]
        within(w.mean(0), mean, sd / math.sqrt(n))
        spread = (w - mean).square()
        within(spread.mean(0), sd.square(), spread.std(0) / math.sqrt(n))


@pytest.mark.parametrize(
    ("inputs", "kind"), [(2, "quadrature"), (3, "quadrature"), (4, "reference")]
)
def test_logistic_posterior_by_number_of_weights(inputs, kind):
    model = LogisticRegression(10, inputs, problems=2)
    x = model.observations()
    exact = model.exact()
    assert exact.kind == kind
    assert exact.draw(x, draws=20, chains=1, seed=0).values["w"].shape == (1, 20, 2, inputs)
    assert exact.log_evidence(x).isfinite().all()


def stein(inputs, labels, w, alpha):
    """Means and standard errors over draws w (S, p) of g_i and of w_i g_i, g the score in numpy."""
    g = (labels - expit(w @ inputs.T)) @ inputs - alpha * w
    both = np.concatenate([g, w * g], 1)
    return both.mean(0), both.std(0) / math.sqrt(len(w))


def test_logistic_posterior_of_twenty_weights_and_a_thousand_trials():
    """Under the posterior E g = 0 and E w_i g_i = -1, whatever the sampler. Takes 5 s."""
    model = LogisticRegression(1000, 20, problems=1, correlation=0.0).double()
    x, exact = model.observations(), model.exact()
    assert exact.error(x)["left"] < 1e-3  # obtained 2e-4
    w = exact.draw(x, draws=1000, chains=1, seed=0).values["w"][0, :, 0].numpy()
    inputs, labels = (t[0].numpy() for t in x)
    want = np.repeat([0.0, -1.0], 20)
    mean, se = stein(inputs, labels, w, 1.0)
    within(mean, want, se)
    centre, sd = w.mean(0), w.std(0)
    for planted in (w + sd / 4, centre + 1.3 * (w - centre)):
        mean, se = stein(inputs, labels, planted, 1.0)
        with pytest.raises(AssertionError, match="standard errors"):
            within(mean, want, se)


# neural network


LABELS = torch.tensor([3, 0, 9, 9, 1, 4, 2])
PUBLISHED = 89_610  # weights and biases of 784-100-100-10


def pictures(pixels=784, labels=LABELS):
    """Seven pictures of noise."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(7, pixels, generator=g)
    return Data("noise", x, x[:2], (1, pixels), train_labels=labels)


@pytest.fixture(scope="module")
def network():
    return BayesianMLP(30, hidden=4).double()


def test_network_is_one_problem(network):
    lat = Latents(network)
    shapes = {"w1": (64, 4), "b1": (4,), "w2": (4, 10), "b2": (10,)}
    assert {s.name: tuple(s.shape) for s in lat.sites} == shapes
    assert (lat.plated, lat.observed, lat.problems(network.observations())) == (False, "y", 1)
    assert lat.size == 64 * 4 + 4 + 4 * 10 + 10
    images, labels = network.observations()
    assert images.shape == (30, 64)
    assert labels.dtype == images.dtype
    assert set(labels.tolist()) <= set(range(10))


def test_network_as_published():
    model = BayesianMLP(hidden=(100, 100), data=pictures())
    lat = Latents(model)
    shapes = [(784, 100), (100,), (100, 100), (100,), (100, 10), (10,)]
    assert [tuple(s.shape) for s in lat.sites] == shapes
    assert (lat.names, lat.size) == (("w1", "b1", "w2", "b2", "w3", "b3"), PUBLISHED)
    assert model.dims["w2"] == ("hidden1", "hidden2")  # an axis has one name only
    assert model.predict(model.simulate(1, seed=0)[0]).shape == (1, 7, 10)


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="no MNIST files beside the project")
def test_network_reads_mnist(monkeypatch):
    monkeypatch.setenv("NEUROGUIDE_DATA", str(REAL))
    data = mnist()
    model = BayesianMLP(500, hidden=(100, 100), data=data)
    assert Latents(model).size == PUBLISHED
    images, labels = model.observations()
    assert torch.equal(images, data.train[:500])
    assert torch.equal(labels.long(), data.train_labels[:500])


def test_network_takes_all_rows_of_data_and_copies_them():
    data = digits()
    model = BayesianMLP(hidden=2, data=data)
    images, labels = model.observations()
    assert (images.shape, labels.shape) == ((1438, 64), (1438,))
    assert all(
        map(torch.equal, BayesianMLP(40, hidden=2).observations(), (images[:40], labels[:40]))
    )
    images.zero_()
    assert data.train.any()
    few = BayesianMLP(2, data=pictures(5, LABELS.clamp_max(2)), hidden=3)
    shapes = {"w1": (5, 3), "b1": (3,), "w2": (3, 3), "b2": (3,)}
    assert {s.name: tuple(s.shape) for s in Latents(few).sites} == shapes


NETWORKS = {
    "normal": ({"hidden": 4}, {"w1": stats.norm(0, 3 / 8), "w2": stats.norm(0, 3 / 2)}),
    "no hidden layer": ({"hidden": (), "gain": 2.0}, {"w1": stats.norm(0, 1 / 4)}),
    "deep": (
        {"hidden": (9, 4), "gain": 1.5},
        {"w1": stats.norm(0, 1.5 / 8), "w2": stats.norm(0, 0.5), "w3": stats.norm(0, 0.75)},
    ),
    "laplace": (
        {"hidden": [5, 4], "prior": "laplace", "rate": 2.5},
        dict.fromkeys(["w1", "w2", "w3"], stats.laplace(0, 0.4)),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_network_log_joint_of_several_draws(kind):
    """Against numpy, draw by draw."""
    knobs, laws = NETWORKS[kind]
    network = BayesianMLP(30, **knobs).double()
    lat, x = Latents(network), network.observations()
    z = network.simulate(6, seed=1)[0]
    shaped = {n: v.reshape(2, 3, 1, *v.shape[1:]) for n, v in z.items()}
    u = lat.pack(shaped)[0]
    assert u.shape == (2, 3, 1, lat.size)
    assert all(torch.equal(v, shaped[n]) for n, v in lat.unpack(u)[0].items())
    torch.testing.assert_close(lat.log_density(u, x), lat.log_joint(shaped, x))
    found = [term.flatten() for term in lat.log_terms(u, x)]
    images, labels = (t.numpy() for t in x)
    for k in range(6):
        one = {n: v[k].numpy() for n, v in z.items()}
        prior = sum(laws.get(n, stats.norm(0, 1)).logpdf(v).sum() for n, v in one.items())
        rates = images
        for layer in range(1, len(laws) + 1):
            logits = rates @ one[f"w{layer}"] + one[f"b{layer}"]
            rates = np.maximum(logits, 0)
        own = logits[np.arange(30), labels.astype(int)]
        np.testing.assert_allclose(found[0][k], prior, rtol=1e-9)
        np.testing.assert_allclose(found[1][k], (own - logsumexp(logits, axis=-1)).sum(), rtol=1e-9)


@pytest.mark.parametrize("rate", [1e-4, 2.5])
def test_network_magnitude_cost_is_the_laplace_prior(rate):
    """lam sum |w| and a constant, beside the biases' own prior."""
    model = BayesianMLP(3, hidden=2, prior="laplace", rate=rate).double()
    lat, zero = Latents(model), torch.zeros(1, 160, dtype=torch.float64)
    u = torch.linspace(-1.0, 2.0, lat.size, dtype=torch.float64)[None]
    z = lat.unpack(u)[0]
    want = sum(rate * z[f"w{k}"].abs().sum() + z[f"b{k}"].square().sum() / 2 for k in (1, 2))
    prior, at_zero = (lat.log_terms(v, model.observations())[0] for v in (u, zero))
    torch.testing.assert_close(at_zero - prior, want[None], rtol=1e-9, atol=0)


def test_network_rows_are_separable(network):
    """The likelihood is a sum over rows, and the prior is counted once."""
    lat, x = Latents(network), network.observations()
    assert lat.separable
    u = 0.3 * torch.randn(
        4, 1, lat.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    prior, likelihood = lat.log_terms(u, x)
    pieces = [lat.log_terms(u, take(x, slice(i, i + 10))) for i in (0, 10, 20)]
    torch.testing.assert_close(sum(p[1] for p in pieces), likelihood)
    assert all(torch.equal(p[0], prior) for p in pieces)


class Spy(torch.Tensor):
    """Writes down what is done with it, and lets go of the results."""

    seen: set[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.add(func.__name__)
        plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_network_does_with_weights_what_synapses_do(network):
    """Inputs times weights, plus biases, and no more: noise can move to the currents."""
    z = {n: v[0].as_subclass(Spy) for n, v in network.simulate(1, seed=0)[0].items()}
    Spy.seen = set()
    network.logits(z, network.x_0)
    allowed = {"matmul", "__matmul__", "__rmatmul__", "add", "__getitem__"}
    assert Spy.seen <= allowed
    assert Spy.seen & {"matmul", "__matmul__", "__rmatmul__"}
    network.logits(z | {"w2": 2 * z["w1"].relu().sum()[None, None].expand(4, 10)}, network.x_0)
    assert Spy.seen - allowed == {"relu"}  # the rest is of plain tensors


def test_network_predicts_probabilities(network):
    z = {n: v.reshape(2, 3, 1, *v.shape[1:]) for n, v in network.simulate(6, seed=1)[0].items()}
    p = network.predict(z)
    assert p.shape == (2, 3, 1, 30, 10)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, 1, 30).double())
    one = {n: v[1, 2, 0] for n, v in z.items()}
    n = 3000
    with seeded(3):
        many = {name: v.expand(n, 1, *v.shape) for name, v in one.items()}
        y = Latents(network).replicate(many, network.observations())
    share = torch.stack([(y == c).double().mean(0) for c in range(10)], -1)
    want = p[1, 2, 0]
    within(share, want, (want * (1 - want) / n + 1 / n**2).sqrt())


def test_network_learns_to_read():
    """The mode reads most held-out digits, so the prior is no narrower than the task."""
    model = BayesianMLP()
    lat, x, held = Latents(model), model.observations(), zoo.data.digits()
    g = torch.Generator().manual_seed(0)
    u = (0.3 * torch.randn(1, lat.size, generator=g)).requires_grad_()
    optimiser = torch.optim.Adam([u], lr=0.05)
    for _ in range(250):
        optimiser.zero_grad()
        (-lat.log_density(u, x).sum()).backward()
        optimiser.step()
    with torch.no_grad():
        guess = model.logits(lat.unpack(u)[0], held.validation)[0].argmax(-1)
    assert (guess == held.validation_labels).float().mean() > 0.85  # obtained .92; chance .1


def test_network_has_no_exact_posterior(network):
    with pytest.raises(NoExactPosterior, match=r"NUTS.*held-out log-likelihood and calibration"):
        network.exact()


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"rows": 2000}, "at most 1438; got 2000"),
        ({"rows": 0}, "rows: expected an integer >= 1"),
        ({"hidden": 0}, "hidden: expected an integer >= 1"),
        ({"hidden": (3, -1)}, "hidden: expected an integer >= 1; got -1"),
        ({"hidden": (2.5,)}, "hidden: expected an integer"),
        ({"prior": "laplac"}, "prior: got 'laplac'. Did you mean 'laplace'"),
        ({"rate": -1.0}, "rate: expected a positive, finite number"),
        ({"rate": math.nan, "prior": "laplace"}, "rate: expected a positive, finite number"),
        ({"data": pictures(labels=None)}, "data: expected data with labels; got 'noise'"),
        ({"data": pictures(), "rows": 8}, "at most 7; got 8"),
    ],
)
def test_network_refuses(knobs, match):
    with pytest.raises(BadInput, match=match):
        BayesianMLP(**knobs)


# eight schools


@pytest.fixture(scope="module")
def schools():
    return EightSchools().double()


def schools_by_grid(y, c=5.0, m=5.0):
    """log p(y) and posterior means and sds, over a grid of (log tau, mu); theta in closed form."""
    y, s = np.array(y), np.array(ERRORS)
    u, mu = np.linspace(-22.0, 7.0, 2501)[:, None], np.linspace(-45.0, 45.0, 801)[None]
    tau = np.exp(u)
    score = stats.halfcauchy(scale=c).logpdf(tau) + u + stats.norm(0, m).logpdf(mu)
    for value, sd in zip(y, s, strict=True):
        score = score + stats.norm(mu, np.hypot(sd, tau)).logpdf(value)
    evidence = logsumexp(score) + math.log(u[1, 0] - u[0, 0]) + math.log(mu[0, 1] - mu[0, 0])
    weight = np.exp(score - logsumexp(score))
    share = tau**2 / (tau**2 + s[0] ** 2)
    theta, variance = mu + share * (y[0] - mu), share * s[0] ** 2
    moments = {"tau": (tau, 0.0), "log_tau": (u, 0.0), "mu": (mu, 0.0), "theta": (theta, variance)}
    found = {}
    for name, (mean, inner) in moments.items():
        centre = (weight * mean).sum()
        found[name] = centre, math.sqrt((weight * ((mean - centre) ** 2 + inner)).sum())
    return evidence, found


@pytest.fixture(scope="module")
def rubin():
    """Brute force on the real observation."""
    return schools_by_grid(EFFECTS)


def test_schools_known_posterior(rubin):
    """As Stan has it with these priors: tau 3.6, mu 4.4 and theta_1 6.2 to two digits."""
    _, found = rubin
    assert abs(found["tau"][0] - 3.6) < 0.05
    assert abs(found["mu"][0] - 4.4) < 0.05
    assert abs(found["theta"][0] - 6.2) < 0.05


def test_schools_evidence_against_brute_force(schools, rubin):
    found = schools.exact().log_evidence(schools.observations())
    np.testing.assert_allclose(found[0], rubin[0], atol=1e-8)
    for b in (1, 7):
        evidence = schools_by_grid(schools.observations()[b].tolist())[0]
        np.testing.assert_allclose(found[b], evidence, atol=1e-8)


def test_schools_grid_moments_against_brute_force(schools, rubin):
    grid = schools.exact().grid.distribution(schools.observations()[:1])
    mean, sd = grid.moments(grid.log_density, grid.nodes)
    np.testing.assert_allclose([mean.item(), sd.item()], rubin[1]["log_tau"], rtol=1e-6)


def test_schools_draws_against_brute_force(schools, rubin):
    n = 20_000
    z = schools.exact().draw(schools.observations()[:1], draws=n, chains=1, seed=0).values
    draws = {"tau": z["tau"], "log_tau": z["tau"].log(), "mu": z["mu"], "theta": z["theta"][..., 0]}
    for name, (mean, sd) in rubin[1].items():
        value = draws[name].flatten()
        within(value.mean(), mean, sd / math.sqrt(n))
        spread = (value - mean).square()
        within(spread.mean(), sd**2, spread.std() / math.sqrt(n))


def test_schools_edges_of_the_grid_are_empty(schools):
    error = schools.exact().error(schools.observations())
    assert (error["edge_mass"] < 1e-6).all()
    assert all((error[k] < 1e-6).all() for k in ("mean", "sd", "log_evidence"))


@pytest.mark.parametrize("tau", [1e-3, 0.4, 7.0, 300.0])
def test_schools_rest_is_the_gaussian_conditional(schools, tau):
    """(mu, theta) given tau by the algebra of linear Gaussian systems, nine latents."""
    y = schools.observations()[:3]
    law = schools._rest(torch.full((3, 1), math.log(tau), dtype=torch.float64), y)
    ones, eye = torch.ones(8, 1).double(), torch.eye(8).double()
    top = 1 / 25 + 8 * tau**-2
    precision = torch.cat(
        [
            torch.cat([ones.new_tensor([[top]]), -ones.T * tau**-2], 1),
            torch.cat([-ones * tau**-2, eye * tau**-2], 1),
        ]
    )
    weights = torch.cat([torch.zeros(8, 1).double(), eye], 1)
    zero = torch.zeros(9).double()
    system = LinearGaussian(zero, precision, weights, zero[:1], schools.errors)
    loc, tril = system.posterior(y)
    slack = 1e-12 + 1e-13 * tau**-2  # of the check: its precision loses digits as tau falls
    torch.testing.assert_close(law.mean, loc, rtol=slack, atol=slack)
    covariance = (tril @ tril.mT).expand(3, 9, 9)
    torch.testing.assert_close(law.covariance_matrix, covariance, rtol=slack, atol=slack)


def test_schools_without_differences_are_pooled(schools):
    """tau = 1e-6: all effects are mu, whose precision is the sum of all."""
    y, precision = schools.observations()[:3], schools.errors**-2
    law = schools._rest(torch.full((3, 1), math.log(1e-6), dtype=torch.float64), y)
    variance = 1 / (1 / 25 + precision.sum())
    mean = variance * (y * precision).sum(-1, keepdim=True)
    torch.testing.assert_close(law.mean, mean.expand(3, 9), rtol=1e-10, atol=1e-10)
    want = variance.expand(3, 9, 9)
    torch.testing.assert_close(law.covariance_matrix, want, rtol=1e-10, atol=1e-10)


def test_schools_effects_approach_the_mean_as_tau_falls(schools):
    """The neck of the funnel: theta - mu has the sd tau, down to a millionth of a point."""
    with seeded(0):
        law = schools._rest(
            torch.full((1, 1), math.log(1e-6), dtype=torch.float64), schools.observations()[:1]
        )
        draws = law.sample((4000,))
    apart = (draws[..., 1:] - draws[..., :1])[:, 0] / 1e-6
    within(apart.square().mean(0), 1.0, math.sqrt(2 / 4000))
    z = {
        "tau": torch.full((4000, 1), 1e-6, dtype=torch.float64),
        "mu": draws[..., 0],
        "theta": draws[..., 1:],
    }
    score = Latents(schools).log_joint(z, schools.observations()[:1]) - law.log_prob(draws)
    assert float(score.std()) < 1e-6


def test_schools_canonical_observations(schools):
    y = schools.observations()
    assert y.shape == (20, 8)
    assert y[0].tolist() == [28, 8, -3, 7, -1, 1, 18, 12]
    assert schools.errors.tolist() == [15, 10, 16, 11, 9, 11, 10, 18]
    assert (y.abs() <= 200).all()
    assert len(y.unique(dim=0)) == 20
    assert torch.equal(y, EightSchools(seed=0).observations().double())
    assert not torch.equal(y, EightSchools(seed=1).observations().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1e-3])
def test_schools_far_observations_and_small_errors(dtype, factor):
    model = EightSchools()
    model.errors *= factor
    model = model.to(dtype)
    y = torch.stack([torch.full((8,), 3.0), 1e4 * torch.linspace(-1.0, 2.0, 8), torch.zeros(8)])
    y = y.to(dtype)
    z = model.exact().draw(y, draws=100, chains=1, seed=0).values
    assert all(v.isfinite().all() for v in z.values())
    assert model.exact().log_evidence(y).isfinite().all()
    if factor < 1:  # the effects are what was measured
        assert ((z["theta"] - y).abs() < 10 * model.errors).all()
