"""Models of image patches: against numpy, quadrature and each other."""

from __future__ import annotations

import itertools
import math

import arviz_stats
import numpy as np
import pytest
import torch
from arviz_base import from_dict
from conftest import within
from scipy import integrate, stats
from threadpoolctl import threadpool_limits
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import inference
import zoo
import zoo.sparse_coding
from inference.errors import BadInput, NoExactPosterior
from inference.latents import Latents
from inference.seeds import seeded
from zoo.gabor import gabors
from zoo.mixture import GaussianMixture
from zoo.poisson_coding import PoissonCoding
from zoo.rectified_coding import RectifiedCoding, RectifiedPosterior
from zoo.scale_mixture import CONTRASTS, ObservedContrast, ScaleMixture
from zoo.sparse_coding import SparseCoding
from zoo.spike_and_slab import SpikeAndSlab


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


def draws_of(guide, x, n, seed=0):
    """Packed draws, (n, B, D)."""
    return guide.latents.pack(guide.draw(x, draws=n, chains=1, seed=seed).values)[0][0]


def conditioned(prior, weights, noise, x):
    """Mean and covariance of u ~ N(0, prior) given x ~ N(weights u, noise^2 I), and log p(x)."""
    joint = weights @ prior @ weights.T + noise**2 * np.eye(len(weights))
    gain = np.linalg.solve(joint, weights @ prior).T
    evidence = stats.multivariate_normal(np.zeros(len(joint)), joint).logpdf(x)
    return x @ gain.T, prior - gain @ weights @ prior, evidence


# features


@pytest.mark.parametrize(("count", "side"), [(2, 8), (3, 4), (5, 8), (6, 8), (8, 8), (12, 8)])
def test_gabors_are_unit_norm_and_overlap(count, side):
    features = gabors(count, side, seed=0)
    assert features.shape == (side**2, count)
    assert features.dtype == torch.float32
    overlap = (features.T @ features).double()
    torch.testing.assert_close(overlap.diagonal(), torch.ones(count).double(), rtol=0, atol=1e-6)
    assert torch.linalg.matrix_rank(overlap) == count
    covariance = torch.linalg.inv(torch.eye(count) + overlap / 0.2**2)
    sd = covariance.diagonal().sqrt()
    correlation = covariance / sd / sd[:, None] - torch.eye(count)
    assert correlation.abs().max() > 0.45  # of a Gaussian posterior, noise of a fifth


def test_gabors_depend_on_the_seed_alone():
    one = gabors(5, 8, seed=3)
    with seeded(7):
        assert torch.equal(one, gabors(5, 8, seed=3))
    assert not torch.allclose(one, gabors(5, 8, seed=4))


# sparse coding


def test_sparse_coding_of_one_feature_is_the_table_of_the_dossier():
    """Rate 2 and noise .5: the sd grows with drive; means and sds from shared quadrature."""
    model = SparseCoding(1, noise=0.5, rate=2.0).double()
    drive = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    x = drive[:, None] * model.dictionary.detach().T
    grid = model.exact().distribution(x)
    mean, sd = grid.moments(grid.log_density, grid.nodes)
    np.testing.assert_allclose(mean[:, 0], [0, 0.252, 0.581, 1.501, 3.5], atol=6e-4)
    np.testing.assert_allclose(sd[:, 0], [0.345, 0.374, 0.438, 0.499, 0.5], atol=6e-4)
    assert (sd[:, 0].diff() > 0).all()


def test_sparse_coding_evidence_by_gauss_legendre():
    """Log joint is smooth between the kinks: each quadrant by 60 x 60 nodes."""
    model = SparseCoding(2, noise=0.3, rate=1.5).double()
    x, a = model.observations()[:3].numpy(), model.dictionary.detach().double().numpy()
    node, weight = np.polynomial.legendre.leggauss(60)
    half, weight = 2.5 * (node + 1), 2.5 * weight  # 0 to 5
    total = []
    for one, two in itertools.product([-1, 1], repeat=2):
        z = np.stack(np.meshgrid(one * half, two * half, indexing="ij"), -1).reshape(-1, 2)
        w = np.outer(weight, weight).ravel()
        log = stats.laplace(0, 1 / 1.5).logpdf(z).sum(-1)[:, None]
        noise = float(model.scale)
        log = log + stats.norm(0, noise).logpdf(x - (z @ a.T)[:, None]).sum(-1)
        total.append(np.logaddexp.reduce(log + np.log(w)[:, None]))
    exact, y = model.exact(), torch.tensor(x)
    gap = np.abs(exact.log_evidence(y).numpy() - np.logaddexp.reduce(total))
    stated = exact.error(y)["log_evidence"].numpy()
    assert (gap <= stated).all()
    assert stated.max() < 2e-3


def test_sparse_coding_canonical_observations():
    model = SparseCoding()
    x = model.observations()
    assert (x.shape, x.dtype, model.dictionary.dtype) == ((6, 64), torch.float32, torch.float32)
    torch.testing.assert_close(100 * x, (100 * x).round(), rtol=0, atol=1e-4)
    assert torch.equal(x, SparseCoding().observations())
    assert not torch.equal(x, SparseCoding(seed=1).observations())
    norm = math.sqrt(2 * 8 / 2.0**2 + 64 * 0.2**2)  # rms from the prior
    torch.testing.assert_close(x[4:].norm(dim=1), torch.full((2,), norm), rtol=0, atol=0.03)
    drawn = model.simulate(4000, seed=2)[1].square().sum(1)
    within(drawn.mean(), norm**2, drawn.std() / math.sqrt(4000))


@pytest.mark.filterwarnings("ignore::inference.ExactWarning")  # of a grid of nine points
def test_sparse_coding_asks_for_reference_draws(monkeypatch, tmp_path):
    def path(name):
        return tmp_path / f"{name}.nc"

    monkeypatch.setattr(zoo.sparse_coding, "reference_path", path)
    model = SparseCoding(3)
    with pytest.raises(NoExactPosterior, match=r"3 latents.*inference\.NUTS"):
        model.exact()
    x, made = model.observations(), path("sparse_coding")
    guide = zoo.Quadrature(model, points=9, bounds=[(-2, 2)] * 3)
    zoo.StoredDraws.write(made, guide, x, draws=1000, chains=2, seed=0, command="a test")
    found = SparseCoding(3).exact()
    assert isinstance(found, zoo.StoredDraws)
    assert found.draw(x, draws=10, chains=1, seed=0).values["z"].shape == (1, 10, 6, 3)


def test_sparse_coding_knows_features_by_their_direction_alone():
    """Columns of the dictionary of any length: the model of the canonical ones, of length one."""
    model, other = SparseCoding().double(), SparseCoding().double()
    lengths = torch.logspace(-2, 2, 8).double()
    with torch.no_grad():
        other.dictionary.mul_(lengths)
    torch.testing.assert_close(other.features, model.features, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.features, model.dictionary, rtol=1e-6, atol=0)
    z, x = model.simulate(3, seed=0)
    assert not torch.allclose(z["z"] @ other.dictionary.T, other.predict(z), rtol=1e-2)
    log = [Latents(m).log_joint(z, x) for m in (model, other)]
    torch.testing.assert_close(log[1], log[0], rtol=1e-12, atol=0)
    slopes = torch.autograd.grad(log[1].sum(), other.dictionary)[0]
    along = (slopes * other.dictionary).sum(0)  # no gradient along a feature
    size = slopes.norm(dim=0) * other.dictionary.norm(dim=0)
    assert (along.abs() < 1e-12 * size).all()
    assert (size > 1e-3).all()


def test_sparse_coding_for_data_has_their_power():
    """Half the root mean square is noise, the rest is expected of the features."""
    x = 3 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    power = float(x.square().mean())
    for knobs in ({}, {"latents": 35, "seed": 1}):
        model = SparseCoding.for_data(x, **knobs)
        latents = knobs.get("latents", 20)
        assert model.features.shape == (20, latents)
        assert model.image_shape is None
        assert torch.equal(model.observations(), x[:100])
        assert float(model.scale) == pytest.approx(0.5 * math.sqrt(power), rel=1e-5)
        torch.testing.assert_close(model.features.norm(dim=0), torch.ones(latents))
        made = model.simulate(4000, seed=0)[1].square().mean(1)
        within(made.mean(), power, made.std() / math.sqrt(4000))
    given = SparseCoding.for_data(x.double(), noise=0.3, rate=1.7)
    assert given.dictionary.dtype == torch.float64
    assert (float(given.scale), float(given.rate)) == pytest.approx((0.3, 1.7))
    assert not torch.equal(given.features.float(), SparseCoding.for_data(x, seed=1).features)
    assert SparseCoding.for_data(torch.zeros(3, 4)).simulate(2, seed=0)[1].isfinite().all()
    with pytest.raises(NoExactPosterior, match="20 latents"):
        given.exact()


# spike and slab


def by_assignments(model, x):
    """Log p(x), posterior mean and assignment probabilities, one dense Gaussian at a time."""
    a, (spike, slab) = model.features.numpy(), model.spreads.numpy()
    p, noise = float(model.weights[1] / model.weights.sum()), float(model.scale)
    log, means = [], []
    for present in model.assignments().numpy():
        prior = np.diag(np.where(present, slab, spike) ** 2)
        mean, _, evidence = conditioned(prior, a, noise, x)
        log.append(evidence + np.log(np.where(present, p, 1 - p)).sum())
        means.append(mean)
    evidence = np.logaddexp.reduce(log)
    share = np.exp(log - evidence)
    return evidence, (share[..., None] * np.array(means)).sum(0), share


def test_spike_and_slab_against_dense_conditioning():
    model = SpikeAndSlab(4, present=0.3, spike=0.2, slab=1.3, seed=2).double()
    x = model.observations()[:5]
    evidence, mean, share = by_assignments(model, x.numpy())
    exact = model.exact()
    np.testing.assert_allclose(exact.log_evidence(x), evidence, rtol=1e-10)
    q = exact.distribution(x)
    np.testing.assert_allclose(q.mean, mean, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(q.component.probs, share.T, rtol=1e-8, atol=1e-12)


def test_spike_and_slab_assignments_are_all_sets():
    found = SpikeAndSlab(4).assignments().tolist()
    assert sorted(found) == sorted(map(list, itertools.product([0, 1], repeat=4)))


def test_spike_and_slab_prior_is_the_stated_mixture():
    model = SpikeAndSlab(2, present=0.2, spike=0.1, slab=1.5).double()
    z = torch.tensor([[0.05, -1.0], [2.0, 0.3]], dtype=torch.float64)
    x = model.observations()[:2]
    likelihood = stats.norm(model.predict({"z": z}), float(model.scale)).logpdf(x).sum(-1)
    prior = 0.8 * stats.norm(0, 0.1).pdf(z) + 0.2 * stats.norm(0, 1.5).pdf(z)
    found = Latents(model).log_joint({"z": z}, x)
    np.testing.assert_allclose(found, likelihood + np.log(prior).sum(-1), rtol=1e-6)


def test_spike_and_slab_of_one_spread_is_gaussian():
    model = SpikeAndSlab(5, spike=0.7, slab=0.7).double()
    x = model.observations()[:4]
    prior = float(model.spreads[0]) ** 2 * np.eye(5)
    want = conditioned(prior, model.features.numpy(), float(model.scale), x.numpy())
    exact = model.exact()
    np.testing.assert_allclose(exact.distribution(x).mean, want[0], rtol=1e-8)
    np.testing.assert_allclose(exact.log_evidence(x), want[2], rtol=1e-10)
    z = draws_of(exact, x, 4000).numpy()
    within(z.mean(0), want[0], np.sqrt(np.diag(want[1]) / 4000))


@pytest.mark.parametrize(("latents", "sets"), [(6, 7.2), (12, 82.7)])
def test_spike_and_slab_spreads_over_several_sets(latents, sets):
    """The perplexities of the docstring."""
    model = SpikeAndSlab(latents)
    entropy = model.exact().distribution(model.observations()).component.entropy()
    assert float(entropy.exp().median()) == pytest.approx(sets, rel=0.02)


def test_spike_and_slab_refuses_too_many_latents():
    with pytest.raises(BadInput, match="latents: expected at most 12"):
        SpikeAndSlab(13)


@pytest.mark.parametrize("shared", ["nothing", "off the diagonal", "all"])
def test_mixture_density_against_torch(shared):
    """Entries that the precisions share are taken out of the sum over components."""
    g = torch.Generator().manual_seed(0)
    size = {"generator": g, "dtype": torch.float64}
    root = torch.randn(5, 4, 4, **size)
    full = root @ root.mT + torch.eye(4)
    precision = {
        "nothing": full,
        "off the diagonal": full[:1] + torch.diag_embed(torch.rand(5, 4, **size)),
        "all": full[:1].expand(5, -1, -1),
    }[shared]
    logits, loc = torch.randn(3, 5, **size), torch.randn(3, 5, 4, **size)
    z = 2 * torch.randn(2, 7, 3, 4, **size)
    components = MultivariateNormal(loc, precision_matrix=precision.expand(3, -1, -1, -1))
    want = MixtureSameFamily(Categorical(logits=logits), components).log_prob(z)
    found = GaussianMixture(logits, loc, precision).log_prob(z)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


# scale mixture


def covariance(model):
    return (model.tril @ model.tril.T).numpy()


def test_contrast_has_mean_one_and_coefficients_unit_variance():
    model = ScaleMixture().double()
    z, _ = model.simulate(20_000, seed=3)
    within(z["contrast"].mean(), 1.0, z["contrast"].std() / math.sqrt(20_000))
    want = 0.5 * np.eye(5) + 0.5 * (model.features.T @ model.features).numpy()
    np.testing.assert_allclose(covariance(model), want, atol=1e-6)
    within(z["u"].T.cov(), want, np.sqrt((1 + want**2) / 20_000))


def test_scale_mixture_evidence_by_scipy():
    """The integral over log contrast, adaptively, of dense Gaussian densities."""
    model = ScaleMixture(3, seed=1).double()
    x = model.observations()[:3]
    signal = model.features.numpy() @ covariance(model) @ model.features.numpy().T
    centre, spread = model.log_contrast.tolist()

    def joint(log_c, row):
        total = math.exp(log_c) ** 2 * signal + float(model.scale) ** 2 * np.eye(64)
        given = stats.multivariate_normal(np.zeros(64), total).logpdf(row)
        return math.exp(given + stats.norm(centre, spread).logpdf(log_c))

    for b in range(3):
        row = x[b].numpy()
        total, mean = (
            integrate.quad(
                lambda t, k=k, row=row: t**k * joint(t, row),
                centre - 6 * spread,
                centre + 6 * spread,
                epsrel=1e-9,
                epsabs=0,
                limit=200,
            )[0]
            for k in (0, 1)
        )
        exact = model.exact()
        found = float(exact.log_evidence(x[b : b + 1]))
        assert found == pytest.approx(math.log(total), abs=1e-7)
        grid = exact.grid.distribution(x[b : b + 1])
        moment, sd = grid.moments(grid.log_density, grid.nodes)
        assert float(moment) == pytest.approx(mean / total, abs=1e-6)
        u = draws_of(exact, x[b : b + 1], 4000)[:, 0, 0]
        within(u.mean(), mean / total, float(sd) / math.sqrt(4000))


def test_coefficients_given_contrast_by_dense_conditioning():
    model = ScaleMixture(seed=1).double()
    x = model.observations()[:2]
    for contrast in (0.2, 1.7):
        log_c = torch.full((3, 2, 1), math.log(contrast), dtype=torch.float64)
        found = model.exact().rest(log_c, x)
        weights = contrast * model.features.numpy()
        mean, cov, _ = conditioned(covariance(model), weights, float(model.scale), x.numpy())
        np.testing.assert_allclose(found.mean[1], mean, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(found.covariance_matrix[2, 0], cov, rtol=1e-7, atol=1e-10)


def test_inferred_contrast_integrates_the_observed_one():
    """p(x) is the average over the prior of c of what the model of known contrast says."""
    inferred, observed = ScaleMixture().double(), ObservedContrast().double()
    x, n = inferred.observations()[:4], 4001
    centre, spread = inferred.log_contrast.tolist()
    log_c = torch.linspace(centre - 8 * spread, centre + 8 * spread, n, dtype=torch.float64)
    rows = (log_c.exp().repeat(4), x.repeat_interleave(n, 0))
    given = observed.exact().log_evidence(rows).reshape(4, n)
    prior = torch.distributions.Normal(*inferred.log_contrast).log_prob(log_c)
    total = (given + prior).logsumexp(1) + (log_c[1] - log_c[0]).log()
    torch.testing.assert_close(inferred.exact().log_evidence(x), total, rtol=0, atol=1e-8)


def test_scale_mixture_trades_contrast_for_coefficients():
    """The correlation of the docstring."""
    model = ScaleMixture()
    z = model.exact().draw(model.observations(), draws=1000, chains=1, seed=0).values
    log_c, log_u = z["contrast"][0].log(), z["u"][0].norm(dim=-1).log()
    found = [np.corrcoef(log_c[:, b], log_u[:, b])[0, 1] for b in range(100)]
    assert np.mean(found) == pytest.approx(-0.85, abs=0.01)


def test_scale_mixture_in_single_precision_when_noise_hides_nothing():
    """Pixels far outside the signal: their huge density must not blur the grid over contrast."""
    x = 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    moments = []
    for model in (ScaleMixture(noise=2e-4), ScaleMixture(noise=2e-4).double()):
        grid = model.exact().grid.distribution(x.to(model.scale))
        moments.append(grid.moments(grid.log_density, grid.nodes))
    (mean, sd), (mean_64, sd_64) = moments
    torch.testing.assert_close(mean.double(), mean_64, rtol=0, atol=1e-4)
    torch.testing.assert_close(sd.double(), sd_64, rtol=0, atol=1e-4)


# observed contrast


def test_observed_contrast_by_dense_conditioning():
    model = ObservedContrast(4, seed=3).double()
    contrast, image = (t[:6] for t in model.observations())
    exact = model.exact()
    q, evidence = exact.distribution((contrast, image)), exact.log_evidence((contrast, image))
    for b in range(6):
        weights = float(contrast[b]) * model.features.numpy()
        noise, row = float(model.scale), image[b].numpy()
        mean, cov, want = conditioned(covariance(model), weights, noise, row)
        np.testing.assert_allclose(q.mean[b], mean, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(q.covariance_matrix[b], cov, rtol=1e-7, atol=1e-10)
        assert float(evidence[b]) == pytest.approx(want, rel=1e-10)


def test_more_contrast_less_uncertainty():
    """The sds of the docstring, and the order of every direction."""
    model = ObservedContrast().double()
    contrast, image = model.observations()
    assert tuple(contrast[:5].tolist()) == CONTRASTS
    q = model.exact().distribution((contrast[:5], image[:5]))
    sd = q.variance.sqrt()
    np.testing.assert_allclose(sd.mean(1), [0.15, 0.28, 0.46, 0.64, 0.79], atol=6e-3)
    assert (sd.diff(dim=0) > 0).all()
    growth = torch.linalg.eigvalsh(q.covariance_matrix.diff(dim=0))
    assert (growth > 0).all()
    other = model.exact().distribution((contrast[:5], -3 * image[:5]))
    torch.testing.assert_close(other.covariance_matrix, q.covariance_matrix)


# Poisson coding


def lattice(model, x, bound):
    """Counts (N, K) and log p(x, z), (N, B), by numpy."""
    latents = len(model.log_rate)
    z = np.array(list(itertools.product(range(bound + 1), repeat=latents)))
    rate, a, sd = (
        t.detach().numpy() for t in (model.log_rate.exp(), model.dictionary, model.scale)
    )
    likelihood = stats.norm(0, sd).logpdf(x.numpy() - (z @ a.T)[:, None]).sum(-1)
    return z, likelihood + stats.poisson(rate).logpmf(z).sum(-1)[:, None]


def test_poisson_coding_against_a_lattice():
    model = PoissonCoding(2, side=3, seed=4).double()
    x, n = model.observations()[:5], 4000
    z, log = lattice(model, x, 30)
    evidence = np.logaddexp.reduce(log)
    exact = model.exact()
    with torch.no_grad():
        np.testing.assert_allclose(exact.log_evidence(x), evidence, rtol=1e-10)
    table = np.exp(log - evidence)
    found = exact.draw(x, draws=n, chains=1, seed=0).values["z"][0].numpy()
    for k in range(2):
        for count in range(3):
            want = table[z[:, k] == count].sum(0)
            se = np.sqrt(want * (1 - want) / n) + 1 / n
            within((found[:, :, k] == count).mean(0), want, se)


def test_poisson_coding_bound_keeps_the_tail():
    model = PoissonCoding().double()
    exact, rate = model.exact(), float(model.log_rate.detach().exp().max())
    bound = exact.knobs["bound"]
    assert stats.poisson(rate).sf(bound - 1) < 1e-14 < stats.poisson(rate).sf(bound - 2)
    with torch.no_grad():
        assert float(exact.error(model.observations())["edge_mass"].max()) < 1e-9
    assert PoissonCoding(5).exact().knobs["bound"] == 15  # a million states, not more
    assert PoissonCoding(bound=4).exact().knobs["bound"] == 4


def test_poisson_coding_factorises_with_an_orthogonal_dictionary():
    model = PoissonCoding(bound=9).double()
    with torch.no_grad():
        model.dictionary.copy_(2 * torch.linalg.qr(model.dictionary).Q)
        table = model.exact().logits(model.observations()[:4]).softmax(0).reshape(10, 10, 10, 4)
        one, two, three = (table.sum([a for a in range(3) if a != k]) for k in range(3))
    product = one[:, None, None] * two[None, :, None] * three[None, None]
    torch.testing.assert_close(table, product, rtol=0, atol=1e-12)


def test_poisson_coding_without_a_dictionary_leaves_the_prior():
    model = PoissonCoding(2).double()
    with torch.no_grad():
        model.dictionary.zero_()
        x = model.observations()[:1]
        found = model.exact().logits(x).softmax(0)[:, 0].reshape(19, 19).sum(1)
    want = stats.poisson(float(model.log_rate[0].detach().exp())).pmf(np.arange(19))
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_poisson_neurons_miss_the_variance():
    """The gap of the docstring: the free energy is convex in the rates, so L-BFGS finds the best.

    E |x - A z|^2 = |x - A r|^2 + sum_k r_k |a_k|^2 for independent Poisson z of rates r, and
    KL = sum_k r_k (log r_k - u_k) - r_k + exp(u_k).
    """
    model = PoissonCoding().double()
    x = model.observations()
    prior, a, sd = (t.detach() for t in (model.log_rate, model.dictionary, model.scale))
    u = prior.expand(100, -1).clone().requires_grad_()

    def elbo():
        r = u.exp()
        error = ((x - r @ a.T) / sd).square().sum(1) + r @ (a / sd[:, None]).square().sum(0)
        kl = (r * (u - prior) - r + prior.exp()).sum(1)
        return -(error + (2 * math.pi * sd.square()).log().sum()) / 2 - kl

    search = torch.optim.LBFGS([u], max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = -elbo().sum()
        loss.backward()
        return loss

    search.step(closure)
    with torch.no_grad():
        gap = model.exact().log_evidence(x) - elbo()
        assert (gap > 0).all()
        assert float(gap.mean()) == pytest.approx(2.34, abs=0.02)
        exact = model.exact()
        z = exact.draw(x, draws=2000, chains=1, seed=0).values["z"][0]
        assert 0.4 < float((z.var(0) / z.mean(0).clamp_min(1e-3)).mean()) < 0.7


def test_gibbs_agrees_with_enumeration():
    model = PoissonCoding().double()
    x = model.observations()[:3]
    gibbs = zoo.Gibbs(model, bound=12, warmup=50)
    found = gibbs.draw(x, draws=400, chains=4, seed=0).values
    data = from_dict({"posterior": {"z": found["z"].numpy()}})["posterior"].dataset
    assert float(arviz_stats.rhat(data)["z"].max()) < 1.02
    ess = arviz_stats.ess(data)["z"].to_numpy()
    with torch.no_grad():
        share = model.exact().logits(x).softmax(0)
        z = model.exact().states_z
        mean = share.T @ z
        sd = (share.T @ z.square() - mean.square()).sqrt()
    within(found["z"].mean((0, 1)), mean, sd.numpy() / np.sqrt(ess))


def test_poisson_coding_of_many_neurons_is_sampled():
    model = PoissonCoding(6)
    guide = model.exact()
    assert isinstance(guide, zoo.Gibbs)
    x = model.observations()[:2]
    assert guide.draw(x, draws=2, chains=1, seed=0).values["z"].shape == (1, 2, 2, 6)


def test_poisson_coding_with_hidden_layers():
    model = PoissonCoding(2, hidden=(7, 5), seed=2).double()
    z = model.simulate(6, seed=0)[0]
    h = z["z"].numpy()
    for layer in model.body:
        weight, bias = (p.detach().numpy() for p in layer[0].parameters())
        h = np.log1p(np.exp(h @ weight.T + bias))
    want = h @ model.dictionary.detach().numpy().T
    np.testing.assert_allclose(model.predict(z).detach(), want, rtol=1e-10)
    other = PoissonCoding(2, hidden=(7, 5), seed=3)
    again = PoissonCoding(2, hidden=(7, 5), seed=2)
    assert torch.equal(again.body[0][0].weight.double(), model.body[0][0].weight)
    assert not torch.equal(again.body[0][0].weight, other.body[0][0].weight)
    x = model.observations()[:3]
    exact = model.exact()
    with torch.no_grad():
        gap = exact.latents.log_joint(z := exact.draw(x, draws=5, chains=1, seed=0).values, x)
        gap = gap - exact.log_prob(z, x) - exact.log_evidence(x)
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-9)


def test_poisson_coding_for_data_learns():
    x = PoissonCoding(2, seed=5).simulate(60, seed=1)[1]
    x[:, 3] = 0.0  # a pixel that never changes
    model = PoissonCoding.for_data(x, latents=2)
    assert model.dictionary.shape == (16, 2)
    assert (model.scale > 0.02).all()
    torch.testing.assert_close(model.scale[4].detach(), x[:, 4].square().mean().sqrt())
    torch.testing.assert_close(model.observations(), x)
    exact = model.exact()
    before = float(exact.log_evidence(x).detach().mean())
    knobs = {"steps": 60, "lr": 0.1, "batch_size": 60, "seed": 0, "progress": False}
    inference.fit(model, exact, x, learn_model=True, **knobs)
    assert float(exact.log_evidence(x).detach().mean()) > before + 1
    model.observations()[:] = 9.0
    assert (x < 9.0).all()


def test_poisson_coding_for_data_keeps_its_pictures_where_they_fit():
    assert PoissonCoding.for_data(torch.eye(16)).image_shape == (4, 4)
    assert PoissonCoding.for_data(torch.eye(9), side=3).image_shape == (3, 3)
    assert PoissonCoding.for_data(torch.eye(9)).image_shape is None


@pytest.mark.parametrize("latents", [3, 512])
def test_poisson_coding_for_data_starts_with_cheap_spikes(latents):
    g = torch.Generator().manual_seed(0)
    x = torch.linspace(0.1, 2.0, 90) * torch.randn(50, 90, generator=g, dtype=torch.float64)
    model = PoissonCoding.for_data(x, latents=latents)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.image_shape is None
    with torch.no_grad():
        rate = model.log_rate.exp()
        torch.testing.assert_close(rate.sum(), torch.tensor(3.0).double())
        assert len(rate.unique()) == latents
        assert rate.max() / rate.min() < math.e
        # what one spike costs, |a|^2 / 2 s^2, is 3 / 2 K nats: a scaled chi-square of 90 degrees
        cost = (model.dictionary / model.scale[:, None]).square().sum(0) / 2
        within(cost.mean(), 1.5 / latents, 1.5 / latents * math.sqrt(2 / 90 / latents))
        torch.testing.assert_close(model.scale.double(), x.square().mean(0).sqrt())
    again, other = (PoissonCoding.for_data(x, latents=latents, seed=s) for s in (0, 1))
    assert torch.equal(again.log_rate, model.log_rate)
    assert not torch.equal(other.log_rate, model.log_rate)
    assert not torch.equal(other.dictionary, model.dictionary)


def test_poisson_coding_for_data_with_hidden_layers():
    x = torch.randn(20, 90, generator=torch.Generator().manual_seed(0))
    model = PoissonCoding.for_data(x, latents=4, hidden=(6, 30))
    assert model.dictionary.shape == (90, 30)
    with torch.no_grad():
        silent = model.predict({"z": torch.zeros(1, 4)}) / model.scale
    assert float(silent.abs().max()) < 1  # softplus units are never silent, and yet in the noise


def test_poisson_coding_of_many_neurons_learns_from_data():
    x = PoissonCoding(20, seed=5).simulate(100, seed=1)[1]
    model = PoissonCoding.for_data(x, latents=40)
    guide = inference.IterativePoisson(model, steps=30)
    goal = inference.FixedPoint()
    with torch.no_grad():
        before = float(goal(model, guide, x)["guide"])
    knobs = {"steps": 60, "lr": 0.03, "batch_size": 100, "seed": 0, "progress": False}
    inference.fit(model, guide, x, objective=goal, learn_model=True, **knobs)
    with torch.no_grad():
        assert float(goal(model, guide, x)["guide"]) < before - 1


# rectified coding


def rectified(latents, seed=0):
    """A model whose prior, gains and noise all differ from neuron to neuron, in float64."""
    model = RectifiedCoding(latents, seed=seed).double()
    with torch.no_grad():
        model.prior_mean.copy_(torch.linspace(-0.4, 0.5, latents))
        model.log_gain.copy_(torch.linspace(0.3, -0.2, latents))
    model.prior_sd = torch.linspace(0.8, 1.3, latents).double()
    model.scale = torch.linspace(0.3, 0.7, 16).double()
    return model


def by_pieces(model, x, nodes=120):
    """log p(x, signs of z), (2^K,): Gauss-Legendre in each orthant, by numpy; x is (F,)."""
    latents = len(model.prior_mean)
    mean, sd, s = (t.detach().numpy() for t in (model.prior_mean, model.prior_sd, model.scale))
    features = (model.dictionary * model.log_gain.exp()).detach().numpy()
    at, weight = np.polynomial.legendre.leggauss(nodes)
    size, volume = 5 * (at + 1), np.log(5 * weight)  # up to 10
    sizes = np.stack(np.meshgrid(*[size] * latents, indexing="ij"), -1).reshape(-1, latents)
    volume = sum(np.meshgrid(*[volume] * latents, indexing="ij")).reshape(-1)
    found = []
    for on in range(2**latents):
        z = sizes * [1 if on >> k & 1 else -1 for k in range(latents)]
        prior = stats.norm(mean, sd).logpdf(z).sum(-1)
        likelihood = stats.norm(0, s).logpdf(x - np.maximum(z, 0) @ features.T).sum(-1)
        found.append(np.logaddexp.reduce(prior + likelihood + volume))
    return np.array(found)


def test_rectified_coding_of_one_neuron_in_closed_form():
    """P(z < 0 given x = t a) against Normal integrals, and the numbers of the docstring."""
    model = RectifiedCoding(1).double()
    a = model.dictionary.detach()[:, 0]
    t = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    x = t[:, None] * a / a.norm()
    exact, n = model.exact(), 4000
    # with d = |a|^2 / s^2 and b = a'x / s^2 the part above zero is a Normal of precision 1 + d
    noise = float(model.scale[0].detach()) ** 2
    d, b = float(a @ a) / noise, (x @ a).numpy() / noise
    above = np.exp(b**2 / (2 * (1 + d))) / np.sqrt(1 + d) * stats.norm.cdf(b / np.sqrt(1 + d))
    below = 0.5 / (0.5 + above)
    np.testing.assert_allclose(below[:3].round(3), [0.691, 0.19, 0.002])
    law = exact.distribution(x)
    np.testing.assert_allclose(law.mixture_distribution.probs[:, 0], below, rtol=1e-9)
    z = draws_of(exact, x, n)[..., 0]
    within((z < 0).double().mean(0), below, np.sqrt(below * (1 - below) / n))
    # below zero the posterior is the prior, a half Normal of mean -sqrt(2 / pi)
    some = z[:, 0][z[:, 0] < 0]
    within(some.mean(), -math.sqrt(2 / math.pi), some.std() / math.sqrt(len(some)))


@pytest.mark.parametrize("latents", [1, 2])
def test_rectified_coding_against_gauss_legendre(latents):
    model = rectified(latents, seed=3)
    exact = model.exact()
    assert isinstance(exact, RectifiedPosterior)
    x = torch.cat([model.observations()[:5], 3 * model.observations()[:2]])
    pieces = np.stack([by_pieces(model, row) for row in x.numpy()])
    with torch.no_grad():
        found = exact.log_evidence(x)
        weights = exact.distribution(x).mixture_distribution.probs
    evidence = np.logaddexp.reduce(pieces, axis=1)
    np.testing.assert_allclose(found, evidence, rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights, np.exp(pieces - evidence[:, None]), rtol=0, atol=1e-6)


def test_rectified_coding_of_three_neurons_is_gridded_and_of_more_refused():
    model = rectified(3)
    exact = model.exact()
    assert isinstance(exact, zoo.Quadrature)
    x = model.observations()[:2]
    want = [np.logaddexp.reduce(by_pieces(model, row, nodes=40)) for row in x.numpy()]
    gap = (exact.log_evidence(x) - torch.tensor(want)).abs()
    assert (gap <= exact.error(x)["log_evidence"]).all()
    with pytest.raises(NoExactPosterior, match=r"at most 3 latents; got 4.*inference\.NUTS"):
        RectifiedCoding(4).exact()


def test_learning_rectified_coding_follows_the_evidence():
    """The ELBO's gradient with the exact posterior is that of log p(x), by central differences."""
    model = rectified(2)
    x, exact, n = model.observations(), model.exact(), 100
    leaves = list(model.parameters())

    def slopes(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])

    true = slopes(-exact.log_evidence(x).mean())
    first = list(itertools.accumulate((p.numel() for p in leaves), initial=0))
    with torch.no_grad():
        for k, leaf in enumerate(leaves):
            side, at = [], leaf.numel() // 2
            for step in (1e-4, -2e-4):
                leaf.view(-1)[at] += step
                side.append(float(-exact.log_evidence(x).mean()))
            leaf.view(-1)[at] += 1e-4
            slope = (side[0] - side[1]) / 2e-4
            assert slope == pytest.approx(float(true[first[k] + at]), abs=1e-6)
    found = []
    for seed in range(n):
        with seeded(seed):
            found.append(slopes(inference.ELBO()(model, exact, x)["guide"]))
    found = torch.stack(found)
    within(found.mean(0), true, found.std(0) / math.sqrt(n))


def test_gaussian_neurons_miss_the_kink():
    """The gap of the docstring: L-BFGS finds the best factorised Gaussian, from three starts.

    E max(z, 0) = m P + v p and E max(z, 0)^2 = (m^2 + v^2) P + m v p for z ~ Normal(m, v), with P
    and p the standard Normal's distribution function and density at m / v.
    """
    model = RectifiedCoding().double()
    x, a, s = model.observations(), model.dictionary.detach(), model.scale.detach()
    standard = torch.distributions.Normal(x.new_zeros(()), 1.0)

    def elbo(m, log_v):
        v = log_v.exp()
        below, density = standard.cdf(m / v), standard.log_prob(m / v).exp()
        first = m * below + v * density
        second = (m.square() + v.square()) * below + m * v * density
        error = ((x - first @ a.T) / s).square().sum(1)
        error = error + (second - first.square()) @ (a / s[:, None]).square().sum(0)
        kl = ((m.square() + v.square() - 1) / 2 - log_v).sum(1)
        return -(error + (2 * math.pi * s.square()).log().sum()) / 2 - kl

    def best(start):
        m = torch.full((100, 2), start).to(x).requires_grad_()
        log_v = torch.full((100, 2), -0.7).to(x).requires_grad_()
        search = torch.optim.LBFGS([m, log_v], max_iter=300, line_search_fn="strong_wolfe")

        def closure():
            search.zero_grad()
            loss = -elbo(m, log_v).sum()
            loss.backward()
            return loss

        search.step(closure)
        return elbo(m, log_v).detach()

    with torch.no_grad():
        evidence = model.exact().log_evidence(x)
    gap = evidence - torch.stack([best(start) for start in (-1.0, 0.3, 1.0)]).amax(0)
    assert (gap > 0).all()
    assert float(gap.mean()) == pytest.approx(0.159, abs=0.002)


def test_rectified_coding_for_data_learns():
    x = rectified(2, seed=1).simulate(100, seed=1)[1].float()
    x[:, 3] = 0.0
    model = RectifiedCoding.for_data(x)
    assert model.dictionary.shape == (16, 2)
    assert (model.scale > 0.02).all()
    assert RectifiedCoding.for_data(x, latents=30).dictionary.shape == (16, 30)
    torch.testing.assert_close(model.observations(), x)
    exact = model.exact()
    before = float(exact.log_evidence(x).detach().mean())
    knobs = {"steps": 60, "lr": 0.1, "batch_size": 100, "seed": 0, "progress": False}
    inference.fit(model, exact, x, learn_model=True, **knobs)
    assert float(exact.log_evidence(x).detach().mean()) > before + 1


@pytest.mark.parametrize("signal", ["rates", "spikes"])
def test_iterative_gaussian_infers_rectified_coding(signal):
    """Spikes are the published variant: their mean nears the exact one; rates leave the start."""
    model = RectifiedCoding().double()
    x = model.observations()[:40]
    steps, settled, step = {"spikes": (400, 100, 0.1), "rates": (40, 30, 1.0)}[signal]
    guide = inference.IterativeGaussian(
        model, signal=signal, self_inhibition=signal == "rates", step=step, steps=steps
    )
    assert not guide.reader.linear
    want = draws_of(model.exact(), x, 2000).mean(0)
    with torch.no_grad(), seeded(0):
        path = list(guide.unroll(x, steps=steps))
    assert all(t.isfinite().all() for now in path for t in now.state)
    assert (path[1].state[0] != path[0].state[0]).any()
    found = torch.stack([now.q.mean for now in path[settled:]]).mean(0)
    error, at_first = ((m - want).square().mean().sqrt() for m in (found, path[0].q.mean))
    # to decode the mean is not to average what is decoded: rates do worse
    assert error < (0.55 if signal == "spikes" else 0.75) * at_first
    drawn = guide.draw(x[:3], draws=5, chains=2, seed=0)
    assert drawn.values["z"].isfinite().all()
    with seeded(0):
        assert guide.log_prob(drawn.values, x[:3]).isfinite().all()


@pytest.mark.parametrize("name", [n for n, c in zoo.MODELS.items() if c.image_shape])
def test_models_of_pictures_say_what_they_predict(name):
    """A report shows it."""
    model = zoo.MODELS[name]()
    z, _ = model.simulate(3, seed=0)
    assert model.predict(z).shape == (3, math.prod(model.image_shape))
