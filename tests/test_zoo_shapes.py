"""Models whose posteriors have a shape: two modes, a cross, a ring, a ridge, two arms.

About fifteen seconds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy import integrate, special, stats
from threadpoolctl import threadpool_limits

import zoo
from inference.errors import BadInput
from inference.latents import Latents
from inference.seeds import seeded
from zoo.banana import Banana
from zoo.bimodal import Bimodal
from zoo.continuous_sprinkler import ContinuousSprinkler
from zoo.laplace_mixture import LaplaceMixture, SymmetricLaplace
from zoo.product import Product
from zoo.ring import Ring
from zoo.square_root import SquareRoot


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def column(*values):
    """One observation of one feature per problem, (B, 1)."""
    return f64(*values)[:, None]


# brute force in the plane


def on_grid(model, x, half, points):
    """An axis (N,) and log p(x, z) on its square, (N, N)."""
    axis = torch.linspace(-half, half, points, dtype=torch.float64)
    nodes = torch.cartesian_prod(axis, axis)[:, None]
    return axis, Latents(model).log_density(nodes, column(x)).reshape(points, points)


def mean_field_kl(axis, log_p, starts=(-1.0, 0.4, 2.0)):
    """KL(q || p) of the best q_1 q_2 of any form, in nats.

    Coordinate ascent, log q_i = E_{q_j} log p + constant, from a q_2 about each of the starts: a
    start at a point of symmetry would stay there.
    """
    log_p = log_p - log_p.flatten().logsumexp(0)
    centre = f64(*starts)[:, None]
    q_2 = (-((axis - centre) / 0.3).square() / 2).softmax(-1)
    for _ in range(400):
        q_1 = (q_2 @ log_p.T).softmax(-1)
        q_2 = (q_1 @ log_p).softmax(-1)
    entropies = -torch.xlogy(q_1, q_1).sum(-1) - torch.xlogy(q_2, q_2).sum(-1)
    return float((-entropies - ((q_1 @ log_p) * q_2).sum(-1)).min())


def summary(axis, log_p):
    """log p(x), means (2,) and second moments (2, 2) of the posterior."""
    step = float(axis[1] - axis[0])
    p = log_p.flatten().softmax(0).reshape(log_p.shape)
    one, two = p.sum(1), p.sum(0)
    mean = torch.stack([one @ axis, two @ axis])
    cross = axis @ p @ axis
    second = torch.stack([one @ axis**2, cross, cross, two @ axis**2]).reshape(2, 2)
    return float(log_p.flatten().logsumexp(0)) + 2 * math.log(step), mean, second


def check_draws(guide, x, mean, second, n=20_000):
    """First and second moments of draws of one problem."""
    z = guide.draw(column(x), draws=n, chains=1, seed=3).values["z"][0, :, 0]
    pairs = z[:, :, None] * z[:, None]
    within(z.mean(0), mean, z.std(0) / math.sqrt(n))
    within(pairs.mean(0), second, pairs.std(0) / math.sqrt(n))


def test_mean_field_of_a_gaussian_is_its_closed_form():
    model = zoo.ExplainingAway(2, noise=0.3).double()
    found = mean_field_kl(*on_grid(model, 0.7, 5.0, 281))
    assert abs(found - float(model.exact().mean_field_gap())) < 1e-6


@pytest.mark.parametrize(
    ("model", "x", "want", "tolerance"),
    [
        (Banana(), 0.0, 0.41, 0.01),
        (Banana(), 1.0, 0.64, 0.01),
        (Banana(), 2.0, 1.11, 0.01),
        (Product(), 1.0, 1.55, 0.01),
        (Product(), 2.0, 1.92, 0.01),
        (Product(noise=0.5), 1.0, 0.835, 0.01),
        (Product(noise=0.5), 2.0, 1.08, 0.01),
        (ContinuousSprinkler(), 0.0, 0.001, 0.0005),
        (ContinuousSprinkler(), 5.0, 0.001, 0.0005),
        (ContinuousSprinkler(), 8.0, 0.008, 0.0005),
        (ContinuousSprinkler(), 12.0, 0.043, 0.0005),
        (ContinuousSprinkler(), 50.0, 0.607, 0.0005),
    ],
)
def test_gap_of_the_best_factorised_guide(model, x, want, tolerance):
    half = 7.0 if isinstance(model, ContinuousSprinkler) else 6.0
    assert abs(mean_field_kl(*on_grid(model.double(), x, half, 281)) - want) < tolerance


# unconditional targets


def normal(z, mean):
    return stats.norm(mean, 0.5).pdf(z)


def test_bimodal_is_the_mixture():
    model = Bimodal().double()
    z = torch.linspace(-4.0, 4.0, 41, dtype=torch.float64)
    want = 0.2 * normal(z, -1.0) + 0.8 * normal(z, 1.0)
    x = column(-1.5, 0.0, 7.0)
    found = model.exact().log_prob({"z": z[:, None].expand(-1, 3)}, x)
    np.testing.assert_allclose(found, np.log(want)[:, None].repeat(3, 1), rtol=1e-7)
    np.testing.assert_allclose(model.exact().log_evidence(x), stats.norm.logpdf(x[:, 0]))


def left_mass(*weights):
    """P(z < 0)."""
    return weights[0] * stats.norm.cdf(2.0) + weights[1] * stats.norm.cdf(-2.0)


@pytest.mark.parametrize("weights", [(0.2, 0.8), (0.5, 0.5), (3.0, 1.0)])
def test_bimodal_masses(weights):
    n = 20_000
    want = left_mass(*np.array(weights) / sum(weights))
    z = Bimodal(weights).exact().draw(torch.tensor([[2.0]]), draws=n, chains=1, seed=0).values["z"]
    within((z < 0).float().mean(), want, math.sqrt(want * (1 - want) / n))
    assert z.shape == (1, n, 1)


def test_langevin_dynamics_are_slow_to_find_the_weights():
    """The docstring's .364 at time 1, and .214 in the end."""
    model, n, step = Bimodal().double(), 20_000, 2e-3
    target = model.target()
    with seeded(1):
        z = 4 * torch.rand(n, dtype=torch.float64) - 2
        for _ in range(500):
            z.requires_grad_()
            (score,) = torch.autograd.grad(target.log_prob(z).sum(), z)
            z = z.detach() + step * score + math.sqrt(2 * step) * torch.randn_like(z)
    within((z < 0).double().mean(), 0.364, math.sqrt(0.364 * 0.636 / n))
    assert abs(left_mass(0.2, 0.8) - 0.214) < 5e-4


COVARIANCE = np.array([[1.4, -0.6], [-0.6, 0.9]])


@pytest.fixture
def laplace():
    return SymmetricLaplace(torch.linalg.cholesky(torch.tensor(COVARIANCE)))


def by_scipy(z):
    """log [K_0(r) / (pi |S|^(1/2))], r^2 = 2 z' S^-1 z."""
    radius = np.sqrt(2 * np.einsum("ni,ij,nj->n", z, np.linalg.inv(COVARIANCE), z))
    log_k0 = np.log(special.k0e(radius)) - radius
    return log_k0 - math.log(math.pi) - np.linalg.slogdet(COVARIANCE)[1] / 2


def test_laplace_density_against_scipy(laplace):
    z = np.random.default_rng(0).normal(size=(50, 2)) * np.logspace(-12, 5, 50)[:, None]
    np.testing.assert_allclose(laplace.log_prob(torch.tensor(z)), by_scipy(z), rtol=1e-10)
    single = SymmetricLaplace(laplace.tril.float())
    score = single.log_prob(torch.tensor(z, dtype=torch.float32))
    assert score.dtype == torch.float32
    np.testing.assert_allclose(score, by_scipy(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_laplace_is_finite_at_the_origin_and_far_out(laplace, dtype):
    z = torch.tensor([[0.0, 0.0], [1e-25, 0.0], [1e-16, -1e-16], [3e4, -2e4]], dtype=dtype)
    z.requires_grad_()
    score = SymmetricLaplace(laplace.tril.to(dtype)).log_prob(z)
    (slope,) = torch.autograd.grad(score.sum(), z)
    assert score.isfinite().all()
    assert slope.isfinite().all()
    assert score[0] == score[1] == score.max()


def test_laplace_derivatives(laplace):
    def score(z, tril):
        return SymmetricLaplace(tril.tril()).log_prob(z)

    z = f64([0.3, -0.2], [0.02, 0.01], [-4.0, 5.0]).requires_grad_()
    tril = laplace.tril.clone().requires_grad_()
    with seeded(0):
        assert torch.autograd.gradcheck(score, (z, tril))
        assert torch.autograd.gradgradcheck(score, (z, tril))


def test_laplace_draws(laplace):
    """Each marginal is a Laplace distribution of its variance; so is every projection."""
    n = 50_000
    with seeded(2):
        z = laplace.sample((n,)).numpy()
    for direction in ([1.0, 0.0], [0.0, 1.0], [0.6, 0.8]):
        along = z @ direction
        scale = math.sqrt(np.dot(direction, COVARIANCE @ direction) / 2)
        assert stats.kstest(along, stats.laplace(scale=scale).cdf).pvalue > 1e-3
    pairs = z[:, :, None] * z[:, None]
    within(pairs.mean(0), COVARIANCE, pairs.std(0) / math.sqrt(n))
    form = np.einsum("ni,ij,nj->n", z, np.linalg.inv(COVARIANCE), z)
    # E W^2 = 2 and E chi^4 = 8: the square of the quadratic form has mean 16
    within((form**2).mean(), 16.0, (form**2).std() / math.sqrt(n))


def test_laplace_expands_and_has_gradients(laplace):
    tril = laplace.tril.clone().requires_grad_()
    wide = SymmetricLaplace(tril).expand(torch.Size([3, 1]))
    with seeded(0):
        z = wide.rsample(torch.Size([5]))
    assert z.shape == (5, 3, 1, 2)
    slope = torch.autograd.grad(z.square().sum(), tril)[0].tril()
    assert (slope.diagonal() > 0).all()  # wider factors, wider draws
    torch.testing.assert_close(wide.log_prob(z), SymmetricLaplace(tril).log_prob(z))


def test_laplace_mixture_integrates_to_one_with_its_covariance():
    """In polar coordinates, r = e^t, where the spike at the origin is no trouble."""
    t = torch.linspace(-18.0, 4.0, 1101, dtype=torch.float64)
    angle = 2 * math.pi * torch.arange(400, dtype=torch.float64) / 400
    ray = torch.stack([angle.cos(), angle.sin()], -1)
    z = t.exp()[:, None, None] * ray  # (T, angle, 2)
    model = LaplaceMixture().double()
    density = model.target().log_prob(z).exp() * (2 * t).exp()[:, None]
    weight = density * (t[1] - t[0]) * (angle[1] - angle[0])
    assert abs(float(weight.sum()) - 1) < 1e-7
    second = torch.einsum("ta,tai,taj->ij", weight, z, z)
    correlation = 0.9 * (0.2 - 0.8)
    want = f64([1.0, correlation], [correlation, 1.0])
    torch.testing.assert_close(second, want, rtol=0, atol=1e-6)


def test_laplace_mixture_refuses_a_correlation_of_one():
    with pytest.raises(BadInput, match=r"correlation: expected inside \(-1, 1\)"):
        LaplaceMixture(correlation=1.0)


@pytest.mark.parametrize("cls", [Bimodal, LaplaceMixture])
def test_x_says_nothing(cls):
    model = cls().double()
    exact = model.exact()
    z = model.simulate(5, seed=0)[0]["z"][:, None].repeat_interleave(2, 1)
    score = exact.log_prob({"z": z}, column(-3.0, 9.0))
    assert torch.equal(score[:, 0], score[:, 1])
    torch.testing.assert_close(score[:, 0], model.target().log_prob(z[:, 0]))


# the ring


@pytest.mark.parametrize("noise", [0.5, 0.05])
@pytest.mark.parametrize("x", [-0.4, 0.0, 2.0, 23.0])
def test_ring_evidence_by_integration(noise, x):
    model = Ring(noise=noise).double()
    s = float(model.scale)

    def joint(q):
        return math.exp(-q / 2) / 2 * stats.norm(q, s).pdf(x)

    want = integrate.quad(joint, max(0.0, x - 12 * s), max(0.0, x) + 12 * s, epsrel=1e-12)[0]
    found = float(model.exact().log_evidence(column(x)))
    assert abs(found - math.log(want)) < 1e-9


def test_ring_far_below_zero():
    """log Phi(t) = -t^2/2 - log(-t sqrt(2 pi)) - 1/t^2 + 5/(2 t^4) for t << 0."""
    model, x = Ring().double(), -18.6
    t = (x - 0.125) / 0.5
    tail = -(t**2) / 2 - math.log(-t * math.sqrt(2 * math.pi)) - t**-2 + 2.5 * t**-4
    want = -math.log(2) - x / 2 + 0.25 / 8 + tail
    assert abs(float(model.exact().log_evidence(column(x))) - want) < 1e-7


@pytest.mark.parametrize("x", [-0.5, 0.0, 1.0, 6.0])
def test_ring_against_the_grid(x):
    model = Ring().double()
    axis, log_p = on_grid(model, x, 5.0, 401)
    evidence, mean, second = summary(axis, log_p)
    assert abs(evidence - float(model.exact().log_evidence(column(x)))) < 1e-8
    check_draws(model.exact(), x, mean, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.5, 5e-4])
@pytest.mark.parametrize("x", [-18.6, -1.0, 0.3, 22.6])
def test_ring_draws(noise, x, dtype):
    """|z|^2 is a cut Normal, or nearly Exponential where x is far below 0; the angle is uniform."""
    model = Ring(noise=noise).to(dtype)
    z = model.exact().draw(torch.tensor([[x]], dtype=dtype), draws=5000, chains=1, seed=1)
    z = z.values["z"][0, :, 0].double()
    s = float(model.scale)
    mean = float(torch.tensor(x, dtype=dtype)) - s**2 / 2

    def survival(q):
        """P(|z|^2 > q)."""
        return np.exp(special.log_ndtr((mean - q) / s) - special.log_ndtr(mean / s))

    energy = z.square().sum(-1).numpy()
    assert stats.kstest(energy, lambda q: 1 - survival(q)).pvalue > 1e-3
    angle = torch.atan2(z[:, 1], z[:, 0]).numpy()
    assert stats.kstest(angle, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-3


def test_ring_density_is_exact_wherever_it_is_asked():
    model = Ring().double()
    x = column(3.0, -2.0, 40.0)
    z = {"z": torch.linspace(-30.0, 30.0, 21, dtype=torch.float64)[:, None, None].expand(-1, 3, 2)}
    exact = model.exact()
    integrand = exact.latents.log_joint(z, x) - exact.log_prob(z, x)
    torch.testing.assert_close(integrand, exact.log_evidence(x).expand(21, -1), rtol=0, atol=1e-8)


# the square root


def two_sided(model, x):
    """log p(x), mean and variance, each sign on a fine grid of its own."""
    c, s = float(model.centre), float(model.scale)
    r = np.linspace(0.0, math.sqrt(max(x, 0.0)) + 4.0, 2_000_001)
    z = np.concatenate([-r[:0:-1], r])
    log_p = stats.norm(c, 1).logpdf(z) + stats.norm(z**2, s).logpdf(x)
    p = np.exp(log_p - log_p.max())
    mean = np.sum(p * z) / p.sum()
    return (
        math.log(p.sum() * (r[1] - r[0])) + log_p.max(),
        mean,
        np.sum(p * (z - mean) ** 2) / p.sum(),
    )


@pytest.mark.parametrize("noise", [0.3, 0.03, 1e-3])
def test_square_root_finds_both_modes(noise):
    """Up to ten prior-predictive sds, 16.7: evidence and moments against brute force."""
    model, n = SquareRoot(noise=noise).double(), 4000
    values = (-14.5, -1.0, 0.0, 0.2, 1.0, 4.0, 9.0, 16.7)
    exact, x = model.exact(), column(*values)
    z = exact.draw(x, draws=n, chains=1, seed=3).values["z"][0, :, :, 0]
    evidence, mean, variance = np.array([two_sided(model, v) for v in values]).T
    np.testing.assert_allclose(exact.log_evidence(x), evidence, rtol=0, atol=1e-7)
    within(z.mean(0), mean, np.sqrt(variance / n))
    squares = (z.numpy() - mean) ** 2
    within(squares.mean(0), variance, squares.std(0) / math.sqrt(n))


def test_square_root_signs():
    n, x = 20_000, column(1.0, 4.0, 16.7)
    for centre, want in ((0.3, (0.636, 0.767, 0.920)), (0.0, (0.5, 0.5, 0.5))):
        exact = SquareRoot(centre=centre).double().exact()
        z = exact.draw(x, draws=n, chains=1, seed=0).values["z"][0, :, :, 0]
        p = np.array(want)
        # the published numbers are rounded: half a unit more
        within((z > 0).double().mean(0), p, np.sqrt(p * (1 - p) / n) + 1e-4)


# the product


@pytest.mark.parametrize("x", [0.0, -0.5, 1.0, 2.0, 10.0])
def test_product_against_the_grid(x):
    model = Product().double()
    evidence, mean, second = summary(*on_grid(model, x, 8.0, 1001))
    exact = model.exact()
    assert abs(evidence - float(exact.log_evidence(column(x)))) < 1e-6
    assert mean.abs().max() < 1e-9
    assert abs(float(second[0, 0] - second[1, 1])) < 1e-6
    check_draws(exact, x, mean, second)


def test_product_marginal_dips_at_zero_or_peaks_there():
    model, z = Product().double(), f64(0.0, 1.0)[:, None, None]
    first = model.exact().grid.distribution(column(1.0)).log_prob(z)[:, 0]
    assert first[0] < first[1] - 5
    first = model.exact().grid.distribution(column(0.0)).log_prob(z)[:, 0]
    assert first[0] > first[1] + 1


def test_product_evidence_with_little_noise():
    """The spike at x = 0 is smooth in t, z_1 = s sinh t; x = 0 is the hardest problem."""
    for noise in (0.2, 0.1, 0.04):
        model = Product(noise=noise).double()
        s = float(model.scale)
        t = np.linspace(-30, 30, 60_001)
        first = s * np.sinh(t)
        for x in (0.0, 0.1, 1.0):
            spread = np.sqrt(first**2 + s**2)
            log_p = stats.norm.logpdf(first) + stats.norm(0, spread).logpdf(x) + np.log(spread)
            want = special.logsumexp(log_p) + math.log(t[1] - t[0])
            assert abs(float(model.exact().log_evidence(column(x))) - want) < 1e-7


# the continuous sprinkler


@pytest.mark.parametrize("x", [0.0, 12.0, 50.0, 174.0])
def test_sprinkler_against_a_finer_grid(x):
    """174 is ten prior-predictive sds; the cubes have a kink in the third derivative."""
    model = ContinuousSprinkler().double()
    evidence, mean, second = summary(*on_grid(model, x, 12.0, 801))
    exact = model.exact()
    assert abs(evidence - float(exact.log_evidence(column(x)))) < 1e-5
    check_draws(exact, x, mean, second, n=5000)


def test_sprinkler_starts_with_the_observations_of_the_paper():
    assert ContinuousSprinkler().observations()[:5, 0].tolist() == [0.0, 5.0, 8.0, 12.0, 50.0]


def test_sprinkler_refuses_a_negative_observation():
    with pytest.raises(BadInput, match="impossible; got -2"):
        ContinuousSprinkler().exact().log_evidence(torch.tensor([[1.0], [-2.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sprinkler_at_ten_sds(dtype):
    exact = ContinuousSprinkler().to(dtype).exact()
    x = torch.tensor([[174.0]], dtype=dtype)
    found = exact.draw(x, draws=20, chains=1, seed=0)
    assert found.values["z"].isfinite().all()
    assert exact.log_evidence(x).isfinite().all()


# the banana


@pytest.mark.parametrize("x", [0.0, 1.0, 2.0])
def test_banana_against_quadrature(x):
    model = Banana().double()
    grid = zoo.Quadrature(model, points=257).distribution(column(x))
    exact = model.exact()
    assert abs(float(grid.log_evidence - exact.log_evidence(column(x)))) < 1e-6
    weight = grid.log_density.softmax(0)
    second = torch.einsum("gb,gbi,gbj->bij", weight, grid.nodes, grid.nodes)[0]
    mean = grid.moments(grid.log_density, grid.nodes)[0][0]
    check_draws(exact, x, mean, second)
