"""Models for adversarial recognition: four neurons, layers, a recurrent generator.

About fifteen seconds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy import stats
from threadpoolctl import threadpool_limits
from torch.distributions import MultivariateNormal, kl_divergence

import diagnostics
import inference
import zoo
from inference.errors import BadInput, NoExactPosterior
from inference.guide import Draws
from inference.latents import Latents
from inference.seeds import seeded
from zoo.four_neurons import FourNeurons
from zoo.layered_gaussian import LayeredGaussian
from zoo.recurrent_generator import RecurrentGenerator


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


def column(*values):
    """One observation of one feature per problem, (B, 1)."""
    return torch.tensor(values, dtype=torch.float64)[:, None]


# four neurons


def cells(model, a):
    """Mean, variance and third moment of b and c given A, and their covariance, by hand."""
    (ab, ac, bc), (s_ab, s_ac, s_bc) = model.means.tolist(), model.sds.tolist()
    (o_b, o_c), noise = model.biases.tolist(), float(model.scale) ** 2
    b, v = ab * a + o_b, s_ab**2 * a**2 + noise
    w = s_ac**2 * a**2 + noise + s_bc**2 * (b**2 + v) + bc**2 * v
    return (b, v, 0 * a), (ac * a + bc * b + o_c, w, 6 * bc * s_bc**2 * b * v), bc * v


@pytest.mark.parametrize("lateral", [1.5, -0.7])
def test_simulated_cells_have_the_moments_of_gaussian_synapses(lateral):
    """Centred by hand at each A, products of cells and powers of A average to what they should."""
    n = 100_000
    model = FourNeurons(lateral=lateral).double()
    z, x = model.simulate(n, seed=1)
    a = x[:, 0]
    within(a.square().mean(), float(model.spread) ** 2, a.square().std() / math.sqrt(n))
    first, second, covariance = cells(model, a)
    b, c = z["b"] - first[0], z["c"] - second[0]
    gaps = [b, c, b**2 - first[1], c**2 - second[1], b * c - covariance]
    gaps += [b**3 - first[2], c**3 - second[2]]
    for power in (0, 1):
        for gap in gaps:
            terms = gap * a**power
            within(terms.mean(), 0.0, terms.std() / math.sqrt(n))


def test_exact_draws_have_them_too():
    """At A = 1 the cells are correlated by .62 and c is skewed by .68, as no Gaussian is."""
    n, x = 100_000, column(-1.0, 0.4, 1.0)
    model = FourNeurons().double()
    z = model.exact().draw(x, draws=n, chains=1, seed=0).values
    first, second, covariance = cells(model, x[:, 0])
    b, c = z["b"][0] - first[0], z["c"][0] - second[0]
    pairs = [(b, 0.0), (c, 0.0), (b**2, first[1]), (c**2, second[1]), (b * c, covariance)]
    for value, truth in [*pairs, (c**3, second[2])]:
        within(value.mean(0), truth, value.std(0) / math.sqrt(n))
    correlation = covariance / (first[1] * second[1]).sqrt()
    skewness = second[2] / second[1] ** 1.5
    np.testing.assert_allclose(correlation[2], 0.617, atol=5e-4)
    np.testing.assert_allclose(skewness[2], 0.684, atol=5e-4)


def test_density_of_the_cells():
    model, x = FourNeurons().double(), column(-0.8, 1.3)
    b, c = torch.linspace(-2, 2, 7).double()[:, None], torch.linspace(-3, 1, 7).double()[:, None]
    a = x[:, 0].numpy()
    (ab, ac, bc), (s_ab, s_ac, s_bc) = model.means.numpy(), model.sds.numpy()
    (o_b, o_c), s = model.biases.numpy(), float(model.scale)
    first = stats.norm(ab * a + o_b, np.sqrt(s_ab**2 * a**2 + s**2)).logpdf(b)
    sd = np.sqrt(s_ac**2 * a**2 + s_bc**2 * b.numpy() ** 2 + s**2)
    want = first + stats.norm(ac * a + bc * b.numpy() + o_c, sd).logpdf(c)
    z = {"b": b.expand(-1, 2), "c": c.expand(-1, 2)}
    np.testing.assert_allclose(model.exact().log_prob(z, x), want, rtol=1e-12)
    evidence = stats.norm(0, float(model.spread)).logpdf(a)
    np.testing.assert_allclose(model.exact().log_evidence(x), evidence, rtol=1e-12)


def test_differentiable_draws_of_the_cells():
    """db/dA = m_AB + (db / db's noise) s_AB^2 A / sd, and c follows b through its synapse."""
    model = FourNeurons().double()
    x = column(-0.8, 1.3).requires_grad_()
    with seeded(3):
        b, c = model.exact().rsample(x).unbind(-1)
    slope = torch.autograd.grad(b.sum(), x, retain_graph=True)[0][:, 0]
    a, law = x[:, 0].detach(), model.first(x[:, 0].detach())
    noise = (b.detach() - law.mean) / law.stddev
    want = model.means[0] + noise * model.sds[0] ** 2 * a / law.stddev
    torch.testing.assert_close(slope, want)
    assert torch.autograd.grad(c.sum(), x)[0].abs().min() > 0


def test_mutual_information_of_the_cells():
    """The numbers of the docstring, on a grid."""
    model, n = FourNeurons().double(), 401
    unit = torch.linspace(-1, 1, n, dtype=torch.float64)
    found = []
    for x in column(-1.0, 0.0, 1.0):
        first, second, _ = cells(model, x)
        b, c = first[0] + 8 * first[1].sqrt() * unit, second[0] + 12 * second[1].sqrt() * unit
        grid = torch.stack(torch.meshgrid(b, c, indexing="ij"), -1)
        p = model.exact().distribution(x[None]).log_prob(grid).exp()
        p = p / p.sum()
        apart = p.sum(1, keepdim=True) * p.sum(0)
        found.append(float((torch.xlogy(p, p) - torch.xlogy(p, apart)).sum()))
    np.testing.assert_allclose(found, [0.535, 0.343, 0.301], atol=1e-3)


class Apart(inference.Guide):
    """Exact draws whose two cells come from different draws: the marginals are right."""

    def draw(self, x, *, draws, chains, seed, progress=False):
        z = self.model.exact().draw(x, draws=draws + 1, chains=chains, seed=seed).values
        return Draws({"b": z["b"][:, 1:], "c": z["c"][:, :-1]})


def test_factorised_cells_are_rejected_by_what_sees_the_pair():
    model = FourNeurons().double()
    tree = diagnostics.sbc(model, Apart(model), problems=300, draws=49, seed=0, progress=False)
    rejected = diagnostics.sbc_test(tree, alpha=0.001).rejected
    assert bool(rejected.sel(quantity="log_joint"))
    assert not rejected.sel(quantity=["b", "c"]).any()


# layered Gaussian


def layers():
    model = LayeredGaussian().double()
    model.requires_grad_(False)
    return model


def joint_of(model):
    """Mean (10,) and covariance of the program's (z2, z1, x), which is Gaussian, by autograd."""
    lat = Latents(model)

    def log_joint(v):
        return lat.log_joint({"z2": v[None, :2], "z1": v[None, 2:5]}, v[None, 5:]).sum()

    origin = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    covariance = torch.linalg.inv(-torch.autograd.functional.hessian(log_joint, origin))
    return covariance @ torch.autograd.grad(log_joint(origin), origin)[0], covariance


def bottom_up(g, past=0.0):
    """Mean and covariance of a chain x, z1, z2 upwards; `past` lets z2 see x past z1."""

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    noise = [normal(n, n) / n + 0.5 * torch.eye(n) for n in (2, 3, 5)]
    up_1, up_2, direct = 0.3 * normal(3, 5), 0.5 * normal(2, 3), past * normal(2, 5)
    root = torch.zeros(10, 10, dtype=torch.float64)  # of what noise makes of (z2, z1, x)
    root[5:, 5:] = noise[2]
    root[2:5, 5:], root[2:5, 2:5] = up_1 @ noise[2], noise[1]
    root[:2] = up_2 @ root[2:5] + direct @ root[5:]
    root[:2, :2] = noise[0]
    return normal(10), root @ root.T


def expected_kl(q, low, high, weights, bias, scale):
    """E_{q(high)} KL(q(low given high) || Normal(weights high + bias, scale^2)), q Gaussian."""
    mean, cov = q
    slope = torch.linalg.solve(cov[high, high], cov[high, low]).T
    rest = cov[low, low] - slope @ cov[high, low]
    bend, shift = slope - weights, mean[low] - weights @ mean[high] - bias
    inner = MultivariateNormal(shift, rest)
    outer = MultivariateNormal(torch.zeros_like(shift), torch.diag(scale**2))
    moved = (bend @ cov[high, high] @ bend.T).diagonal() / scale**2
    return kl_divergence(inner, outer) + moved.sum() / 2


def both_sides(model, q):
    """KL of the joints, and the sum over layers."""
    z2, z1, x = slice(0, 2), slice(2, 5), slice(5, 10)
    whole = kl_divergence(MultivariateNormal(*q), MultivariateNormal(*joint_of(model)))
    top = MultivariateNormal(q[0][z2], q[1][z2, z2])
    parts = kl_divergence(top, MultivariateNormal(model.mean, torch.eye(2).double()))
    for low, high, n in ((z1, z2, 2), (x, z1, 1)):
        names = (f"{what}_{n}" for what in ("weights", "bias", "scale"))
        parts = parts + expected_kl(q, low, high, *(getattr(model, name) for name in names))
    return float(whole), float(parts)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_divergence_is_a_sum_over_adjacent_layers(seed):
    """The chain rule of KL, the program on one side and its parameters on the other."""
    model, g = layers(), torch.Generator().manual_seed(seed)
    whole, parts = both_sides(model, bottom_up(g))
    assert whole > 1
    np.testing.assert_allclose(whole, parts, rtol=1e-9, atol=1e-6)


def test_no_sum_over_layers_where_the_guide_skips_one():
    whole, parts = both_sides(layers(), bottom_up(torch.Generator().manual_seed(0), past=0.5))
    assert whole > parts + 0.1


def test_layers_condition_as_the_joint_does():
    """Posterior, evidence and prior precision against the joint of the program."""
    model = layers()
    mean, cov = joint_of(model)
    x, exact = model.observations()[:4], model.exact()
    gain = torch.linalg.solve(cov[5:, 5:], cov[5:, :5]).T
    found = exact.distribution(x)
    torch.testing.assert_close(found.mean, mean[:5] + (x - mean[5:]) @ gain.T)
    wanted = cov[:5, :5] - gain @ cov[5:, :5]
    torch.testing.assert_close(found.covariance_matrix, wanted.expand(4, -1, -1))
    evidence = MultivariateNormal(mean[5:], cov[5:, 5:]).log_prob(x)
    torch.testing.assert_close(exact.log_evidence(x), evidence)
    prior = model.linear_gaussian(x)[0]
    torch.testing.assert_close(torch.linalg.inv(prior.precision), cov[:5, :5])
    torch.testing.assert_close(prior.mean, mean[:5])


def test_the_posterior_goes_up_one_layer_at_a_time():
    """Given z1, z2 has the same regression on it in prior and posterior: x adds nothing."""
    model = layers()
    prior = torch.linalg.inv(model.linear_gaussian(model.observations())[0].precision)
    posterior = torch.linalg.inv(model.exact().precision())
    one, two = (torch.linalg.solve(c[2:, 2:], c[2:, :2]) for c in (prior, posterior))
    torch.testing.assert_close(one, two)


def test_layers_keep_what_the_docstring_says():
    assert round(float(layers().exact().mean_field_gap()), 2) == 0.76
    model = LayeredGaussian((4, 1), 2, noise=0.7, inner_noise=0.2, seed=3)
    assert model.observations().shape == (100, 2)
    assert Latents(model).splits == {"z2": 4, "z1": 1}
    for wrong in ((2,), (2, 3, 4), (2, 0)):
        with pytest.raises(BadInput, match="latents"):
            LayeredGaussian(wrong)


# recurrent generator


def test_the_network_goes_on_for_some_steps():
    model = RecurrentGenerator(3, units=5, steps=3, rate=0.3, features=4, seed=2).double()
    z = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 4, 3)
    u, v, w = (p.detach().numpy() for p in (model.inward, model.lateral, model.outward))
    b, c = model.bias.detach().numpy(), model.mean.detach().numpy()
    h = np.zeros((2, 4, 5))
    for _ in range(3):
        h = 0.7 * h + 0.3 * np.tanh(z.numpy() @ u.T + b + h @ v.T)
    found = model.predict({"z": z}).detach()
    np.testing.assert_allclose(found, h @ w.T + c, rtol=1e-12)


def test_gradients_reach_every_parameter():
    model = RecurrentGenerator().double()
    x = model.observations()[:7]
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    Latents(model).log_joint({"z": z}, x).sum().backward()
    found = {n: float(p.grad.abs().max()) for n, p in model.named_parameters()}
    assert set(found) == {"inward", "bias", "lateral", "outward", "mean", "scale_unconstrained"}
    assert min(found.values()) > 1e-3


def test_posteriors_are_bent_and_some_have_two_modes():
    """The numbers of the docstring."""
    model = RecurrentGenerator().double()
    with torch.no_grad():
        grid = zoo.Quadrature(model, points=65).distribution(model.observations())
    weight = grid.log_density.softmax(0)
    away = grid.nodes - (weight[..., None] * grid.nodes).sum(0)
    covariance = torch.einsum("gb,gbi,gbj->bij", weight, away, away)
    entropy = -(weight * (grid.log_density - grid.log_evidence)).sum(0)
    gap = 1 + math.log(2 * math.pi) + torch.logdet(covariance) / 2 - entropy
    assert (gap > 0).all()
    np.testing.assert_allclose(gap.mean(), 0.24, atol=5e-3)
    f = grid.log_density.T.reshape(-1, grid.n, grid.n)
    around = torch.nn.functional.max_pool2d(f, 3, stride=1, padding=1)
    high = (f == around) & (f > f.amax((1, 2), keepdim=True) - 3)
    assert int((high.sum((1, 2)) > 1).sum()) == 15


def test_more_latents_have_no_exact_posterior():
    assert RecurrentGenerator(3, units=4).exact().kind == "quadrature"
    with pytest.raises(NoExactPosterior, match=r"got 4\. .*inference\.NUTS"):
        RecurrentGenerator(4, units=4).exact()


def test_a_generator_for_data():
    x = torch.randn(200, 9, generator=torch.Generator().manual_seed(0)).double() * 3 + 5
    model = RecurrentGenerator.for_data(x)
    assert (model.inward.shape, model.lateral.shape) == ((128, 20), (128, 128))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.image_shape is None
    assert torch.equal(model.observations(), x[:100])
    mean = model.predict(model.simulate(500, seed=0)[0])
    torch.testing.assert_close(model.mean.detach(), x.mean(0))
    assert mean.std(0).max() < 0.2 * x.std()  # the noise explains all
    torch.testing.assert_close(model.scale.detach(), x.var(0).mean().sqrt())
    smaller = RecurrentGenerator.for_data(x, latents=3, units=10, steps=2)
    assert (smaller.inward.shape, smaller.steps) == ((10, 3), 2)


def test_a_generator_learns():
    """log p(x) of held-out data of another generator, exact, before and after."""
    x = RecurrentGenerator(seed=3).simulate(300, seed=0)[1]
    seen, held = x[:250], x[250:]
    model = RecurrentGenerator.for_data(seen, latents=2, units=12, steps=3)
    guide = inference.FullCovarianceEncoder(model, hidden=(32,))
    before = model.exact().log_evidence(held)
    knobs = {"steps": 200, "batch_size": 125, "lr": 0.02, "progress": False, "device": "cpu"}
    inference.fit(model, guide, seen, learn_model=True, **knobs)
    gain = model.exact().log_evidence(held) - before
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))
    assert gain.mean() > 1  # nats, of an observation
