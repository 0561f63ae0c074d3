"""Distances accept the exact guide, see what they are meant to see, and agree with closed forms."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from arviz_base import from_dict
from conftest import within
from scipy import stats
from scipy.spatial.distance import pdist
from threadpoolctl import threadpool_limits

import diagnostics
import inference
from diagnostics.distances import energy_distance, mmd, sliced_wasserstein, wasserstein
from diagnostics.estimate import scaled
from inference.errors import BadInput
from zoo.target import Target

K = 5.0  # standard errors
SQUARED = (energy_distance, mmd)
DISTANCES = (*SQUARED, wasserstein)
PROBLEMS = 8


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def median_mmd(tree, reference):
    """MMD as it is often used: one kernel, of the median width."""
    return mmd(tree, reference, widths=(1.0,))


def narrow_mmd(tree, reference):
    """Kernels that fit into a mode."""
    return mmd(tree, reference, widths=(0.25, 0.5))


class Fixed(Target):
    """A target that is the same for every observation."""

    def __init__(self, target):
        super().__init__()
        self.__dict__["law"] = target
        self.keep_draws(torch.zeros(1, 1), PROBLEMS, seed=0)

    def target(self):
        return self.law


class Wrong(inference.PackedGuide):
    """Another distribution in place of the target."""

    def __init__(self, model, law):
        super().__init__(model)
        self.__dict__["law"] = law

    def distribution(self, x):
        return self.law.expand([len(x)])


def gaussian(*, shift=0.0, scale=1.0, rho=0.5):
    """Five latents, off centre; shifts and scales are in sds and of each latent."""
    sd = torch.linspace(0.5, 2.0, 5)
    correlation = rho + (1 - rho) * torch.eye(5)
    tril = scale * sd[:, None] * torch.linalg.cholesky(correlation)
    return dist.MultivariateNormal(torch.linspace(-1.0, 3.0, 5) + shift * sd, scale_tril=tril)


def modes(weight=0.5):
    """Two unit modes at +-3 on one of five axes."""
    centres = torch.zeros(2, 5)
    centres[:, 0] = torch.tensor([-3.0, 3.0])
    weights = torch.tensor([1 - weight, weight])
    return dist.MixtureSameFamily(
        dist.Categorical(weights), dist.MultivariateNormal(centres, torch.eye(5))
    )


def matched():
    """The Gaussian with the moments of the two modes."""
    return dist.MultivariateNormal(torch.zeros(5), torch.diag(torch.tensor([10.0, 1, 1, 1, 1])))


LAWS = {
    "gaussian": {
        "copy": gaussian(),
        "shifted": gaussian(shift=0.2),
        "narrow": gaussian(scale=0.8),
        "uncorrelated": gaussian(rho=0.0),
    },
    "modes": {
        "copy": modes(),
        "one mode": modes(1.0),
        "weights": modes(0.6),
        "moment-matched": matched(),
    },
}
SEES = [
    *((f, "gaussian", g) for f in SQUARED for g in ("shifted", "narrow", "uncorrelated")),
    (wasserstein, "gaussian", "uncorrelated"),
    *((f, "modes", "one mode") for f in DISTANCES),
    (energy_distance, "modes", "weights"),
    (narrow_mmd, "modes", "moment-matched"),
]
# right, or wrong only where the metric cannot see it
BLIND = [
    *((f, "gaussian", "copy") for f in DISTANCES),
    *((f, "modes", "copy") for f in DISTANCES),
    (median_mmd, "modes", "moment-matched"),
    (energy_distance, "modes", "moment-matched"),
    (wasserstein, "gaussian", "narrow"),  # its floor hides it
]


@pytest.fixture(scope="module")
def trees():
    found = {}
    for name, laws in LAWS.items():
        model = Fixed(laws["copy"])
        guides = {guide: Wrong(model, law) for guide, law in laws.items()}
        x = model.observations()
        found[name] = diagnostics.collect(model, guides, x, draws=500, chains=4, seed=4)
    return found


@pytest.fixture(scope="module")
def excess(trees):
    """Mean excess over the floor in its standard errors, as `summary` judges it."""

    @cache
    def floor(metric, model):
        return metric(trees[model].floor, trees[model]["exact"])

    def judge(metric, model, guide):
        at, base = metric(trees[model][guide], trees[model]["exact"]), floor(metric, model)
        noise = math.sqrt((at.se**2 + base.se**2).sum())
        return (np.abs(at.value) - np.abs(base.value)).sum() / noise

    return judge


def name_of(value):
    return getattr(value, "__name__", value)


@pytest.mark.parametrize(("metric", "model", "guide"), SEES, ids=name_of)
def test_sees(excess, metric, model, guide):
    assert excess(metric, model, guide) > K


@pytest.mark.parametrize(("metric", "model", "guide"), BLIND, ids=name_of)
def test_is_at_the_floor(excess, metric, model, guide):
    assert excess(metric, model, guide) < 3


def hand_made(z, *, discrete="", **sites):
    """A DataTree from draws (B, chains, draws, D)."""
    found = {n: v.transpose(1, 2, 0, *range(3, v.ndim)) for n, v in {"z": z, **sites}.items()}
    dims = {n: ["problem", *[f"{n}_{k}" for k in range(v.ndim - 3)]] for n, v in found.items()}
    tree = from_dict({"posterior": found}, dims=dims)
    tree.attrs |= {"independent_draws": 1, "discrete": discrete}
    return tree


# closed forms


def test_energy_distance_is_that_of_scipy():
    """SciPy's is biased, with each draw paired with itself too, and a root."""
    rng = np.random.default_rng(0)
    q, p = hand_made(rng.gamma(2.0, size=(2, 3, 100, 1))), hand_made(rng.normal(size=(2, 2, 70, 1)))
    found = energy_distance(q, p)
    for row, (a, b) in enumerate(zip(*scaled(q, p), strict=True)):
        selves = sum(2 * pdist(z).sum() / len(z) ** 2 / (len(z) - 1) for z in (a, b))
        want = stats.energy_distance(a[:, 0], b[:, 0]) ** 2 - selves
        np.testing.assert_allclose(found.value[row], want, rtol=1e-10)


def test_mmd_of_gaussians_is_the_closed_form():
    """E k(z, y) of z - y ~ Normal(m, V) is |I + V / h^2|^(-1/2) exp(-m' (V + h^2 I)^-1 m / 2)."""
    rng = np.random.default_rng(1)
    rows, shift, scale = 60, np.array([0.5, 0.0]), np.array([1.0, 1.4])
    q, p = (rng.normal(size=(rows, 4, 125, 2)) for _ in range(2))
    tree, reference = hand_made(shift + scale * q), hand_made(p)
    found = mmd(tree, reference, widths=(0.7,))
    h2 = (0.7 * np.mean([np.median(pdist(b)) for b in scaled(tree, reference)[1]])) ** 2

    def kernel(mean, variance):
        return np.prod((1 + variance / h2) ** -0.5 * np.exp(-0.5 * mean**2 / (variance + h2)))

    cross, one = kernel(shift, 1 + scale**2), np.ones(2)
    want = kernel(0 * shift, 2 * scale**2) + kernel(0 * one, 2 * one) - 2 * cross
    within(found.value.mean(), want, found.value.std(ddof=1) / math.sqrt(rows))
    within(found.value, want, found.se)


@pytest.mark.parametrize("d", [1, 4])
def test_wasserstein_of_shifted_copies_is_the_shift(d):
    rng = np.random.default_rng(2)
    p = 3 + 2 * rng.normal(size=(2, 2, 200, d))
    shift = np.linspace(0.5, 2.0, d)
    found = wasserstein(hand_made(p + shift), hand_made(p))
    sd = p.reshape(2, 400, d).std(1)
    np.testing.assert_allclose(found.value, np.linalg.norm(shift / sd, axis=1), rtol=1e-10)
    within(found.value, np.linalg.norm(shift / 2), found.se + 0.2)


def test_wasserstein_in_one_dimension_sorts():
    rng = np.random.default_rng(3)
    q, p = (
        hand_made(rng.gamma(2.0, size=(1, 4, 100, 1))),
        hand_made(rng.normal(size=(1, 4, 100, 1))),
    )
    a, b = (np.sort(z[0, :, 0]) for z in scaled(q, p))
    np.testing.assert_allclose(wasserstein(q, p).value, math.sqrt(((a - b) ** 2).mean()))


@pytest.mark.parametrize("metric", [*DISTANCES, sliced_wasserstein], ids=name_of)
def test_units_do_not_matter(metric):
    rng = np.random.default_rng(4)
    q, p = rng.normal(size=(2, 1, 4, 50, 3))
    units = np.array([1e-3, 1.0, 50.0])
    plain = metric(hand_made(q), hand_made(p))
    scaled_up = metric(hand_made(7 + units * q), hand_made(7 + units * p))
    np.testing.assert_allclose(scaled_up.value, plain.value, rtol=1e-6)


@pytest.mark.parametrize("metric", DISTANCES, ids=name_of)
def test_problems_are_separate(metric):
    rng = np.random.default_rng(5)
    q, p = rng.normal(size=(2, 3, 2, 60, 2))
    both = metric(hand_made(q), hand_made(p))
    alone = metric(hand_made(q[1:2]), hand_made(p[1:2]))
    np.testing.assert_allclose((both.value[1], both.se[1]), (alone.value[0], alone.se[0]))


# standard errors


@pytest.mark.parametrize("metric", DISTANCES, ids=name_of)
@pytest.mark.parametrize("wrong", [True, False])
def test_standard_errors_are_the_spread_of_repeats(metric, wrong):
    """Forty repeats, as forty problems. A right guide's error may be too large, by about a half."""
    rng = np.random.default_rng(6)
    q, p = rng.normal(size=(2, 40, 4, 75, 3))
    if wrong:
        q = 0.7 * q + np.array([0.5, 0.0, 0.0])
    found = metric(hand_made(q), hand_made(p))
    spread = found.value.std(ddof=1)
    assert spread / 1.3 < found.se.mean() < (1.5 if wrong else 2.0) * spread


@pytest.mark.parametrize("metric", DISTANCES, ids=name_of)
def test_standard_errors_know_that_chains_are_correlated(metric):
    rng, phi = np.random.default_rng(7), 0.9
    p, q = rng.normal(size=(2, 40, 4, 150, 2))
    q[:, :, 1:] *= math.sqrt(1 - phi**2)
    for t in range(1, q.shape[2]):
        q[:, :, t] += phi * q[:, :, t - 1]
    found = metric(hand_made(q + 0.5), hand_made(p))
    spread = found.value.std(ddof=1)
    assert spread / 1.6 < found.se.mean() < 1.6 * spread


# what may come


@pytest.mark.parametrize("metric", DISTANCES, ids=name_of)
def test_repeated_and_constant_draws_and_unequal_numbers(metric):
    rng = np.random.default_rng(8)
    p = rng.normal(size=(1, 4, 100, 2))
    few = np.repeat(rng.normal(size=(1, 4, 25, 2)), 3, 2)  # 75 draws a chain, each three times
    still = np.zeros((1, 1, 90, 2))
    for q in (few, still):
        found = metric(hand_made(q), hand_made(p))
        assert np.isfinite(found.value).all()
        assert (found.se > 0).all()
        assert found.reason == ""
    assert metric(hand_made(still), hand_made(p)).value > 0.2
    none = metric(hand_made(still), hand_made(still))
    assert none.value == none.se == 0.0


@pytest.mark.parametrize("metric", [*DISTANCES, sliced_wasserstein], ids=name_of)
def test_discrete_latents_are_left_out(metric):
    rng = np.random.default_rng(9)
    q, p = rng.normal(size=(2, 1, 2, 100, 2))
    k = np.zeros((1, 2, 100))
    mixed = metric(hand_made(q, k=k + 1, discrete="k"), hand_made(p, k=k, discrete="k"))
    np.testing.assert_array_equal(mixed.value, metric(hand_made(q), hand_made(p)).value)
    counted = metric(hand_made(k, discrete="z"), hand_made(k, discrete="z"))
    assert np.isnan(counted.value).all()
    assert counted.reason == "no latent is continuous"


@pytest.mark.parametrize("metric", DISTANCES, ids=name_of)
def test_reasons(metric):
    rng = np.random.default_rng(10)
    q, p = rng.normal(size=(2, 2, 2, 30, 2))
    short = metric(hand_made(q[:, :1]), hand_made(p))
    assert np.isnan(short.value).all()
    assert "40 draws" in short.reason
    q[1, 0, 3, 0] = np.inf
    found = metric(hand_made(q), hand_made(p))
    assert np.isnan(found.value).tolist() == np.isnan(found.se).tolist() == [False, True]
    assert found.reason == "some draws are not finite"


@pytest.mark.parametrize("widths", [(), (1.0, 0.0)])
def test_mmd_refuses_widths(widths):
    tree = hand_made(np.zeros((1, 1, 50, 1)))
    with pytest.raises(BadInput, match="widths: expected positive numbers"):
        mmd(tree, tree, widths=widths)
