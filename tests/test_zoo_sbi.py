"""The six models of the benchmark of simulation-based inference, against its published problems."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy import stats
from threadpoolctl import threadpool_limits
from torch.distributions import MultivariateNormal

import zoo.slcp
from inference.errors import BadInput
from inference.latents import Latents
from inference.seeds import seeded
from zoo.bernoulli_glm import BernoulliGLM, SpikeStatistic
from zoo.gaussian_linear import GaussianLinear
from zoo.gaussian_linear_uniform import GaussianLinearUniform
from zoo.gaussian_mixture_sbi import GaussianMixtureSBI
from zoo.sbi import FILE, keep_trying, log_interval, published
from zoo.slcp import SLCP, covariance
from zoo.truncated_pair import TruncatedPair
from zoo.two_moons import Crescent, TwoMoons
from zoo.unit_cube import UnitCube, legendre

TASKS = {
    "gaussian_linear": GaussianLinear,
    "gaussian_linear_uniform": GaussianLinearUniform,
    "gaussian_mixture": GaussianMixtureSBI,
    "two_moons": TwoMoons,
    "slcp": SLCP,
    "bernoulli_glm": BernoulliGLM,
}
# log p(x) of the ten published observations, computed once with independent code (SciPy); the last
# column is its stated error
EVIDENCE = {
    "gaussian_linear": (
        [-8.071, -6.750, -6.897, -10.891, -4.271, -4.677, -5.892, -10.524, -6.593, -9.260],
        0.0,
    ),
    "gaussian_linear_uniform": (
        [-9.776, -10.713, -13.040, -8.835, -8.224, -8.290, -7.971, -9.660, -8.697, -9.477],
        0.0,
    ),
    "gaussian_mixture": (
        [-6.153, -6.039, -5.993, -6.004, -6.072, -5.991, -5.999, -6.004, -5.992, -6.134],
        0.0,
    ),
    "two_moons": (
        [-0.693, -0.693, -0.693, -0.693, -1.545, -0.693, -0.693, -0.693, -0.693, -0.829],
        0.001,
    ),
    "slcp": (
        [-20.826, -25.018, -28.302, -9.671, -28.188, -19.625, -24.324, -22.747, -19.050, -12.867],
        0.001,
    ),
    "bernoulli_glm": (
        [-28.415, -40.073, -29.991, -25.686, -57.299, -48.573, -46.946, -28.824, -25.766, -54.916],
        0.003,
    ),
}
ROUNDING = 0.0005  # of the table


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def model(task):
    return TASKS[task]().double()


def draws(model, x, n, seed=0):
    """Draws of "z", (n, B, D)."""
    return model.exact().draw(x, draws=n, chains=1, seed=seed).values["z"][0]


# all six


def test_observations_are_the_published_ones(task):
    found = TASKS[task]().observations()
    assert found.dtype == torch.float32
    assert found.shape[0] == 10
    assert torch.equal(found, published(task))
    assert len(found.unique(dim=0)) == 10


def test_the_file_says_where_it_comes_from():
    data = json.loads(FILE.read_text(encoding="utf-8"))
    assert set(data) == {"source", *TASKS}
    for part in ("sbi-benchmark/sbibm", "f0bc440", "MIT", "Copyright"):
        assert part in data["source"]


def test_evidence_of_the_published_observations(task, model):
    known, error = EVIDENCE[task]
    exact, x = model.exact(), model.observations()
    own = exact.error(x)["log_evidence"].numpy()
    gap = np.abs(exact.log_evidence(x).numpy() - known)
    assert (gap < ROUNDING + 1e-6 + 5 * np.hypot(error, own)).all()
    if task != "bernoulli_glm":
        assert gap.max() < 0.0015


def test_draws_are_strictly_inside_the_box(task):
    bounds = {"gaussian_linear_uniform": 1, "gaussian_mixture": 10, "two_moons": 1, "slcp": 3}
    if task not in bounds:
        pytest.skip("no box")
    model = TASKS[task]()
    z = draws(model, model.observations(), 2000)
    assert z.dtype == torch.float32
    assert (z.abs() < bounds[task]).all()


def test_predict_is_the_mean_of_x(task, model):
    n = 4000
    z = model.simulate(1, seed=3)[0]["z"].expand(n, -1)
    with seeded(4):
        x = Latents(model).replicate({"z": z}, model.observations()[:1].expand(n, -1))
    within(x.mean(0), model.predict({"z": z})[0], x.std(0) / math.sqrt(n))


# Gaussian linear


def test_gaussian_linear_is_half_of_x_with_variance_a_twentieth():
    model = GaussianLinear().double()
    x = model.observations()
    q = model.exact().distribution(x)
    torch.testing.assert_close(q.mean, x / 2, rtol=1e-7, atol=0)
    want = 0.05 * torch.eye(10, dtype=x.dtype)
    torch.testing.assert_close(q.covariance_matrix, want.expand(10, -1, -1), rtol=1e-7, atol=1e-12)


def test_gaussian_linear_takes_variances():
    model = GaussianLinear(prior=0.3, noise=0.2).double()
    x = model.simulate(4000, seed=0)[1]
    within(x.var(0), 0.5, 0.5 * math.sqrt(2 / 4000))


# Gaussian linear uniform


def test_gaussian_linear_uniform_against_scipy():
    model = GaussianLinearUniform().double()
    x, s, n = model.observations(), float(model.scale), 4000
    law = stats.truncnorm((-1 - x) / s, (1 - x) / s, loc=x, scale=s)
    z = draws(model, x, n)
    within(z.mean(0), law.mean(), law.std() / math.sqrt(n))
    square = (z - torch.as_tensor(law.mean())).square()
    within(square.mean(0), law.var(), square.std(0) / math.sqrt(n))
    scores = model.exact().log_prob({"z": z[:50]}, x)
    np.testing.assert_allclose(scores, law.logpdf(z[:50]).sum(-1), rtol=1e-9)


@pytest.mark.parametrize("far", [7.0, 70.0, 7e3])
def test_gaussian_linear_uniform_is_stable_far_outside(far):
    model = GaussianLinearUniform().double()
    x = torch.full((1, 10), far, dtype=torch.float64)
    t = (far - 1) / float(model.scale)
    each = stats.norm.logsf(t) - math.log(2)  # the other end of the box adds nothing
    np.testing.assert_allclose(model.exact().log_evidence(x), 10 * each, rtol=1e-9)
    z = draws(model, x, 1000)
    depth = (1 - z) * t / float(model.scale)  # about Exponential(1), as in the tail of a Normal
    assert 0.9 < depth.mean() < 1.02


# Gaussian mixture


def test_gaussian_mixture_weights_of_the_spike():
    model = GaussianMixtureSBI().double()
    law = model.exact().distribution(model.observations()).base_dist
    weights = law.mixture_distribution.probs[:, 1]
    published_weights = {0: 0.588, 1: 0.525, 4: 0.542, 9: 0.577}
    for row, known in published_weights.items():
        assert abs(float(weights[row]) - known) < ROUNDING + 1e-6
    others = [k for k in range(10) if k not in published_weights]
    assert (weights[others] > 0.4995).all()
    assert (weights[others] < 0.5065).all()


def test_gaussian_mixture_against_a_table():
    model = GaussianMixtureSBI().double()
    x, n = model.observations()[:1], 4000  # (-9.47, -1.50): the edge is half an sd away
    axes = [torch.linspace(a, b, 601, dtype=x.dtype) for a, b in ((-10, -4), (-7, 4))]
    z = torch.cartesian_prod(*axes)
    p = Latents(model).log_joint({"z": z[:, None]}, x)[:, 0].exp().reshape(601, 601)
    ends = torch.ones(601, dtype=x.dtype)
    ends[[0, -1]] = 0.5  # trapezoids: the density ends at -10
    p = p * ends[:, None] * ends * (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(float(p.sum().log() - model.exact().log_evidence(x))) < 2e-3
    found, q = draws(model, x, n)[:, 0], p.flatten() / p.sum()
    mean = (q[:, None] * z).sum(0)
    variance = (q[:, None] * (z - mean).square()).sum(0)
    within(found.mean(0), mean, (variance / n).sqrt())
    spike = (found - x).norm(dim=-1) < 0.4
    inside = float(q[(z - x).norm(dim=-1) < 0.4].sum())
    within(spike.double().mean(), inside, math.sqrt(inside * (1 - inside) / n) + 1e-3)


def test_gaussian_mixture_coin_is_shared_by_both_coordinates():
    model = GaussianMixtureSBI().double()
    z, x = model.simulate(4000, seed=1)
    square = (x - z["z"]).square()
    # E s^4 = (1 + 1e-4) / 2 with one coin; two coins give (1.01 / 2)^2
    product = square.prod(-1)
    within(product.mean(), (1 + 1e-4) / 2, product.std() / math.sqrt(4000))


# two moons


def fold(z):
    """(|g|, h), in which the two crescents are one."""
    g, h = z.sum(-1) / 2**0.5, z.diff(dim=-1)[..., 0] / 2**0.5
    return torch.stack([g.abs(), h], -1)


def table(model, x, n=1500):
    """p(x, z) on a grid of z: the points and their shares of log p(x)."""
    axis = (torch.arange(n, dtype=x.dtype) + 0.5) * 2 / n - 1
    low, high = draws(model, x, 500).aminmax(dim=0)
    axes = [axis[(axis > a - 0.1) & (axis < b + 0.1)] for a, b in zip(low[0], high[0], strict=True)]
    z = torch.cartesian_prod(*axes)
    return z, Latents(model).log_joint({"z": z[:, None]}, x)[:, 0].exp() * (2 / n) ** 2


@pytest.mark.parametrize(
    "x",
    [
        [-0.66463584, -0.42604533],  # observation 5: the box leaves 43 %
        [0.14563406, -1.170141],  # observation 10: 87 %
        [0.31, 0.2],  # x_1 > .25: the crescents are cut where they meet
        [0.335, -0.6],  # and only their tips are left
        [-0.4, 0.7],  # the edge of the box cuts both crescents
    ],
)
def test_two_moons_against_a_table(x):
    model, n = TwoMoons().double(), 4000
    x = torch.tensor([x], dtype=torch.float64)
    z, p = table(model, x)
    evidence = float(model.exact().log_evidence(x))
    assert abs(float(p.sum().log()) - evidence) < 0.004  # edges of a grid of half a radius' sd / 7
    found, f, q = fold(draws(model, x, n)[:, 0]), fold(z), p / p.sum()
    mean = (q[:, None] * f).sum(0)
    variance = (q[:, None] * (f - mean).square()).sum(0)
    within(found.mean(0), mean, (variance / n).sqrt() + 2e-5)
    square = (found - mean).square()
    within(square.mean(0), variance, square.std(0) / math.sqrt(n) + 2e-6)


def test_two_moons_signs_are_fair():
    model, n = TwoMoons().double(), 4000
    g = draws(model, model.observations(), n).sum(-1)
    within((g > 0).double().mean(0), 0.5, 0.5 / math.sqrt(n))


def test_two_moons_mean_radius():
    """Draws have r ~ N(.1, .01^2); with the public code's likelihood it would be .1010."""
    model, n = TwoMoons().double(), 20_000
    x = model.observations()[:1]
    g, h = fold(draws(model, x, n)[:, 0]).unbind(-1)
    r = torch.hypot(x[0, 0] + g - 0.25, x[0, 1] - h)
    within(r.mean(), 0.1, 0.01 / math.sqrt(n))
    within(r.std(), 0.01, 0.01 / math.sqrt(2 * n))


def test_crescent_has_mass_one_and_the_radius_it_says():
    knobs = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    origin = torch.tensor([0.2, -0.3], dtype=torch.float64)
    moon = Crescent(origin, *knobs)
    axis = (torch.arange(1200, dtype=torch.float64) + 0.5) * 0.4 / 1200 - 0.2
    density = moon.log_prob(origin + torch.cartesian_prod(axis, axis)).exp()
    assert abs(float(density.sum()) * (0.4 / 1200) ** 2 - 1) < 1e-4  # x_1 > origin is on the grid
    with seeded(0):
        r = (moon.sample((20_000,)) - origin).norm(dim=-1)
    within(r.mean(), 0.1, 0.01 / math.sqrt(20_000))


def test_two_moons_refuses_a_width_with_negative_radii():
    with pytest.raises(BadInput, match="at most a sixth of the radius"):
        TwoMoons(width=0.05)


def test_two_moons_names_the_impossible_problem():
    exact = TwoMoons().exact()
    x = torch.tensor([[0.0, 0.0], [0.9, 0.0]])
    for ask in (lambda: exact.draw(x, draws=1, chains=1, seed=0), lambda: exact.log_evidence(x)):
        with pytest.raises(BadInput, match=r"problem 1 with x = \(0.9, 0\), impossible"):
            ask()


def test_two_moons_hardly_possible_observations():
    """Only radii eight sds above the mean reach x: draws and evidence by the tail of a Normal."""
    model = TwoMoons().double()
    x = torch.tensor([[0.25 + 0.18, 0.1]], dtype=torch.float64)
    z = draws(model, x, 1000)[:, 0]
    r = torch.hypot(x[0, 0] + fold(z)[:, 0] - 0.25, x[0, 1] - fold(z)[:, 1])
    assert r.min() > 0.18
    a = np.linspace(-np.pi / 2, np.pi / 2, 20_001)[1:-1]
    mass = stats.norm.sf((0.18 / np.cos(a) - 0.1) / 0.01).sum() * (a[1] - a[0])
    want = math.log(mass / np.pi / 2)
    np.testing.assert_allclose(model.exact().log_evidence(x), want, rtol=1e-6)


# SLCP


def test_slcp_against_importance_sampling():
    """Observation 10; covariances from the prior, means from their law without the box."""
    model, n = SLCP().double(), 400_000
    x = model.observations()[9:10]
    points = x.reshape(4, 2)
    with seeded(0), torch.no_grad():
        w = 6 * torch.rand(n, 3, dtype=x.dtype) - 3
        sd = w[:, :2].square()
        corr = torch.eye(2, dtype=x.dtype).expand(n, 2, 2).clone()
        corr[:, 0, 1] = corr[:, 1, 0] = w[:, 2].tanh()
        jitter = 1e-6 * torch.eye(2, dtype=x.dtype)
        law = MultivariateNormal(points.mean(0), (sd[:, None] * corr * sd[..., None] + jitter) / 4)
        mean = law.sample()
        keep = mean.abs().amax(-1) < 3
        z = torch.cat([mean, w], -1)[keep]
        log_joint = Latents(model).log_joint({"z": z[:, None]}, x)[:, 0]
        weight = torch.zeros(n, dtype=x.dtype)
        weight[keep] = (log_joint - law.log_prob(mean)[keep]).exp() * 6**3
    se = weight.std() / weight.mean() / math.sqrt(n)
    assert se < 0.02  # gate
    within(weight.mean().log(), model.exact().log_evidence(x)[0], se)
    found, q = draws(model, x, 4000)[:, 0].abs(), (weight / weight.sum())[keep]
    moments = (q[:, None] * z.abs()).sum(0)
    spread = (q[:, None] * (z.abs() - moments)).square().sum(0).sqrt()
    within(found.mean(0), moments, spread.hypot(found.std(0) / math.sqrt(4000)))


def test_slcp_signs_are_fair():
    model, n = SLCP().double(), 4000
    x = model.observations()[:4]
    z = draws(model, x, n)
    modes = 2 * (z[..., 2] > 0) + (z[..., 3] > 0)
    share = torch.stack([(modes == k).double().mean(0) for k in range(4)])
    within(share, 0.25, math.sqrt(0.1875 / n))
    turned = z * torch.tensor([1, 1, -1, -1, 1])
    exact = model.exact()
    torch.testing.assert_close(exact.log_prob({"z": z}, x), exact.log_prob({"z": turned}, x))


def test_slcp_error_is_cautious(monkeypatch):
    """More nodes move the evidence by about as much as stated or less, also for x of the joint."""
    model = SLCP().double()
    x = torch.cat([model.observations(), model.simulate(5, seed=2)[1]])
    exact = model.exact()
    evidence, stated = exact.log_evidence(x), exact.error(x)["log_evidence"]
    assert stated.max() < 0.02
    monkeypatch.setattr(zoo.slcp, "NODES", (20, 52, 40))
    move = (exact.log_evidence(x) - evidence).abs()
    assert (move < 2 * stated).all()
    assert move.max() < 5e-4


def test_slcp_likelihood_is_that_of_four_points():
    model = SLCP().double()
    z, x = model.simulate(3, seed=0)
    c = covariance(z["z"][:, 2:], model.jitter)
    s_1, s_2, rho = z["z"][:, 2] ** 2, z["z"][:, 3] ** 2, z["z"][:, 4].tanh()
    for k in range(3):
        cov = np.array([[s_1[k] ** 2, rho[k] * s_1[k] * s_2[k]], [0, s_2[k] ** 2]])
        cov[1, 0] = cov[0, 1]
        cov += 1e-6 * np.eye(2)
        a, b = float(c.variance[k]), float(c.slope[k])
        np.testing.assert_allclose(
            [a, a * b, a * b * b + c.rest[k], c.other[k]],
            [cov[0, 0], cov[0, 1], cov[1, 1], cov[1, 1]],
            rtol=1e-6,
        )
        points = x[k].reshape(4, 2).numpy()
        want = stats.multivariate_normal(z["z"][k, :2].numpy(), cov).logpdf(points).sum()
        found = Latents(model).log_joint({"z": z["z"][k : k + 1]}, x[k : k + 1])
        np.testing.assert_allclose(found, want - 5 * math.log(6), rtol=1e-6)


@pytest.mark.parametrize("x", [0.0, 44.0])
def test_slcp_four_equal_points(x):
    """No scatter at all: the posterior is a spike at the jitter, or sits in a corner of the box."""
    model = SLCP().double()
    x = torch.full((1, 8), x, dtype=torch.float64)
    exact = model.exact()
    known = 21.74952 if x[0, 0] == 0 else -74.16378  # by a grid of 121^3 points in z_3, z_4, z_5
    assert abs(float(exact.log_evidence(x)) - known) < 1e-4
    assert draws(model, x, 100).isfinite().all()


# helpers


def pairs(n, seed):
    g = torch.Generator().manual_seed(seed)
    loc = 8 * torch.rand(n, 2, generator=g, dtype=torch.float64) - 4
    scale = (3 * torch.rand(n, 2, generator=g, dtype=torch.float64) - 1.5).exp()
    corr = (5 * torch.rand(n, generator=g, dtype=torch.float64) - 2.5).tanh()
    return TruncatedPair(loc, scale, corr, 3.0)


def square(pair, k, nodes=300):
    """Points of the square, and the probability of the uncut Normal at each."""
    at, weight = legendre(nodes, pair.loc)
    z = 6 * torch.cartesian_prod(at, at) - 3
    r = pair.sign[k] * (pair.cut.c[k] ** 2 - pair.cut.d[k] ** 2)
    s = pair.scale[k]
    cov = np.array([[s[0] ** 2, r * s[0] * s[1]], [r * s[0] * s[1], s[1] ** 2]])
    density = torch.as_tensor(stats.multivariate_normal(pair.loc[k].numpy(), cov).pdf(z))
    return z, 36 * torch.cartesian_prod(weight, weight).prod(-1) * density


def test_truncated_pair_mass_and_draws_against_quadrature():
    pair, n = pairs(12, 0), 4000
    with seeded(1):
        found = pair.sample((n,))
    assert (found.abs() <= 3).all()
    for k in range(12):
        z, p = square(pair, k)
        np.testing.assert_allclose(pair.log_mass[k], p.sum().log(), rtol=0, atol=2e-6)
        q = p / p.sum()
        mean = (q[:, None] * z).sum(0)
        rest = z - mean
        cov = rest.T @ (q[:, None] * rest)
        within(found[:, k].mean(0), mean, (cov.diagonal() / n).sqrt())
        products = (found[:, k] - mean)[:, [0, 0, 1]] * (found[:, k] - mean)[:, [0, 1, 1]]
        within(products.mean(0), cov[[0, 0, 1], [0, 1, 1]], products.std(0) / math.sqrt(n))


def test_truncated_pair_without_correlation_is_a_product():
    zero = torch.zeros(3, dtype=torch.float64)
    loc = torch.tensor([[0.5, -1.0], [9.0, 2.0], [40.0, -30.0]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 3.0], [0.5, 0.2], [1.0, 2.0]], dtype=torch.float64)
    pair = TruncatedPair(loc, scale, zero, 3.0)
    want = log_interval((-3 - loc) / scale, (3 - loc) / scale).sum(-1)
    torch.testing.assert_close(pair.log_mass, want, rtol=1e-5, atol=1e-6)
    with seeded(0):
        corner = pair.sample((200,))[:, 2]
    assert (corner[:, 0] > 2.5).all()
    assert (corner[:, 1] < -2.0).all()


def test_log_interval():
    low = torch.tensor([-1.0, 30.0, -31.0, 2.0, -1.0], dtype=torch.float64)
    high = torch.tensor([2.0, 31.0, -30.0, 1.0, torch.inf], dtype=torch.float64)
    tail = stats.norm.logsf(30.0)
    want = [
        math.log(stats.norm.cdf(2) - stats.norm.cdf(-1)),
        tail,
        tail,
        -math.inf,
        stats.norm.logcdf(1.0),
    ]
    np.testing.assert_allclose(log_interval(low, high), want, rtol=1e-9)


def test_keep_trying_gives_up():
    with pytest.raises(BadInput, match="all but impossible"):
        keep_trying(lambda rows: (rows[:, None], rows > 0), torch.zeros(2, 1, dtype=torch.long))


def test_unit_cube_of_known_densities():
    """Exponentials that end at an edge, one of them in a millionth of the cube."""
    rate = torch.tensor([[3.0, 1.0], [1e3, 1e3]], dtype=torch.float64)

    def log_density(at, rows):
        return -(rate[rows] * at).sum(-1)

    cube, n = UnitCube(log_density, 2, (12, 10), like=rate), 4000
    want = ((1 - (-rate).exp()) / rate).log().sum(-1)
    torch.testing.assert_close(cube.log_normaliser, want, rtol=0, atol=2e-6)
    assert (cube.error() < 1e-3).all()  # cautious
    with seeded(0):
        z = cube.sample((n,))
    mean = 1 / rate - 1 / rate.expm1()
    within(z.mean(0), mean, z.std(0) / math.sqrt(n))
    at = torch.tensor([0.3, 0.4], dtype=torch.float64)
    torch.testing.assert_close(cube.log_prob(at), -(rate * at).sum(-1) - cube.log_normaliser)


# Bernoulli GLM


def test_spike_statistic_has_the_probability_of_its_spikes():
    model = BernoulliGLM().double()
    z = model.simulate(4, seed=0)[0]["z"]
    rate = (z @ model.design.T).sigmoid()
    with seeded(1):
        spikes = torch.bernoulli(rate)
    want = torch.distributions.Bernoulli(rate).log_prob(spikes).sum(-1)
    torch.testing.assert_close(
        SpikeStatistic(z, model.design).log_prob(spikes @ model.design), want
    )


def test_bernoulli_glm_design_and_prior():
    model = BernoulliGLM().double()
    stimulus = np.random.RandomState(42).randn(100)
    np.testing.assert_allclose(model.design[:, 0], 1.0)
    np.testing.assert_allclose(model.design[:, 1], stimulus, rtol=1e-6)
    np.testing.assert_allclose(model.design[8:, 9], stimulus[:92], rtol=1e-6)
    assert (model.design[:8, 9] == 0).all()
    z = model.simulate(4000, seed=0)[0]["z"]
    cov = torch.linalg.inv(model.precision)
    within(z.var(0), cov.diagonal(), cov.diagonal() * math.sqrt(2 / 4000))
    assert abs(float(cov[0, 0]) - 2.0) < 1e-6  # the precision of the offset is 1/2
    counts = model.observations()[:, 0]
    assert torch.equal(counts, counts.round())
