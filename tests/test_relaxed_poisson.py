"""Poisson counts, their relaxation and its gradient: identities, then laws, then Pyro. 15 s."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import integrate, stats
from torch.autograd.graph import saved_tensors_hooks
from torch.distributions import kl_divergence

from inference import counts, relaxed_poisson
from inference.counts import CELLS, FEW, LARGEST, poisson, poisson_kl
from inference.errors import BadInput, NoDensity
from inference.relaxed_poisson import INDICATORS, RelaxedPoisson, soft_counts
from inference.seeds import seeded

DTYPES = [torch.float32, torch.float64]
EDGES = [("cubic", 1.0), ("cubic", 0.5), ("cubic", 0.1), ("sigmoid", 1.0), ("sigmoid", 0.5),
         ("sigmoid", 0.1)]  # fmt: skip


@pytest.fixture(autouse=True)
def seed(untouched_globals):
    """What a test draws outside its own seeds is the same in every run."""
    with seeded(0):
        yield


def full(n, value, dtype=torch.float64):
    return torch.full((n,), value, dtype=dtype)


# Identities of counts


def wrong_decisions(rate, dtype):
    """In how many cells `_settle` is sure of a count that not every w of the cell has."""
    rates = full(CELLS, rate, dtype)
    z, left, gap, term = torch.empty(4, CELLS, dtype=dtype)
    cell = np.arange(CELLS)[:, None]
    counts._settle(rates, torch.arange(CELLS, dtype=dtype), z, left, gap, term)
    tails = stats.poisson.sf(np.arange(60), float(rates[0])) * CELLS
    least, most = (cell + 1 <= tails).sum(1), (cell < tails).sum(1)
    wrong = ((z.numpy() != least) | (least != most)) & (left.numpy() <= 0)
    return wrong.sum(), (left.numpy() > 0).mean()


SOME_RATES = [1e-7, 1e-3, 0.0101, 0.07, 0.31, 9.99, 10.0, *np.linspace(0.5, 9.5, 37)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sixteen_bits_decide_as_float64_would(dtype):
    found = [wrong_decisions(rate, dtype) for rate in SOME_RATES]
    assert sum(wrong for wrong, _ in found) == 0
    assert max(open_ for _, open_ in found) < 1 / 50  # or the slow way would have all the work


def test_without_slack_rounding_would_decide_wrongly(monkeypatch):
    monkeypatch.setattr(counts, "SLACK", 0.0)
    assert sum(wrong_decisions(rate, torch.float32)[0] for rate in SOME_RATES) > 0


@pytest.mark.parametrize(
    ("rate", "cell", "cells"), [(4e-10, 0, 10**9), (3e-5, 0, 13_333), (0.2, 0, 16), (4.0, 9, 16)]
)
def test_undecided_counts_follow_the_law_within_their_cell(rate, cell, cells):
    """Down to rates that 24 random bits could not tell from zero."""
    n, k = 200_000, np.arange(12)
    with seeded(1):
        z = counts._finish(np.full(n, rate), np.full(n, float(cell)), cells)
    more = (z[:, None] > k).mean(0)
    truth = np.clip(stats.poisson.sf(k, rate) * cells - cell, 0, 1)
    free = (truth > 1e-4) & (truth < 1)
    assert free.any()
    assert (more[truth == 1] == 1).all()
    within(more[free], truth[free], np.sqrt(truth * (1 - truth) / n)[free])


def test_counts_keep_shape_dtype_and_input():
    for shape in [(), (0,), (3,), (5, 0), (2, FEW), (FEW, 3)]:
        for dtype in [*DTYPES, torch.float16, torch.bfloat16]:
            rate = torch.full(shape, 0.75, dtype=dtype, requires_grad=True)
            z = poisson(rate)
            assert (z.shape, z.dtype, z.requires_grad) == (rate.shape, dtype, False)
            assert (rate == 0.75).all()
            assert torch.equal(z, z.round())
            assert (z >= 0).all()


def test_no_rate_no_spikes():
    rate = torch.zeros(4, FEW)
    assert not poisson(rate).any()
    rate[1] = 5.0
    z = poisson(rate)
    assert not z[[0, 2, 3]].any()
    assert (z[1] > 0).float().mean() > 0.97
    assert not poisson(torch.full((2 * FEW,), 1e-30)).any()


def test_a_seed_is_all_the_randomness():
    for rate in (torch.rand(3, FEW), 20 * torch.rand(3, FEW), torch.rand(7)):
        draws = []
        for seed in (3, 3, 4):
            with seeded(seed):
                draws.append(poisson(rate))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])


def test_buffers_outlive_inference_mode():
    counts._KEPT.__dict__.clear()
    with torch.inference_mode():
        poisson(torch.rand(FEW))
    assert poisson(torch.rand(FEW)).sum() > 0


@pytest.mark.parametrize("n", [3, FEW])
@pytest.mark.parametrize("bad", [-1e-3, math.nan, -math.inf])
def test_what_is_no_rate_is_refused(n, bad):
    rate = torch.ones(n)
    rate[n // 2] = bad
    with pytest.raises(BadInput, match="rate"):
        poisson(rate)


def test_integers_are_refused():
    with pytest.raises(BadInput, match="floating point"):
        poisson(torch.ones(3, dtype=torch.long))


@pytest.mark.parametrize("n", [100, FEW])
def test_large_rates_stay_poisson_and_the_largest_are_clamped(n):
    rates = torch.tensor([1e3, 1e6, 1e9, LARGEST, 1e25, math.inf], dtype=torch.float64)
    with seeded(0):
        z = poisson(rates.expand(n, -1))
    r = rates.clamp(max=LARGEST)
    within(z.mean(0), r, (r / n).sqrt())
    within(z.var(0) / r, torch.ones(6), math.sqrt(2 / n))
    assert poisson(torch.tensor([1e25])) == pytest.approx(LARGEST, rel=1e-4)


# Laws of counts


def expected_counts(rate, n):
    """Counts lo ... hi, the outer ones with their tails, of at least ten draws in n each."""
    k = np.arange(int(rate + 12 * math.sqrt(rate) + 12))
    often = np.flatnonzero(n * stats.poisson.pmf(k, rate) >= 10)
    lo, hi = often[0], often[-1]
    p = stats.poisson.pmf(k[lo : hi + 1], rate)
    p[0], p[-1] = stats.poisson.cdf(lo, rate), stats.poisson.sf(hi - 1, rate)
    return lo, hi, n * p


def chi_square(z, rate):
    """P-value of Pearson's test of counts z against Poisson(rate)."""
    lo, hi, expected = expected_counts(rate, z.numel())
    got = torch.bincount((z.flatten().long().clamp(lo, hi) - lo), minlength=hi - lo + 1).numpy()
    return stats.chi2.sf(((got - expected) ** 2 / expected).sum(), hi - lo)


def power(rate, other, n, level):
    """Chance that the test of n counts of rate `other` rejects `rate`."""
    lo, hi, expected = expected_counts(rate, n)
    p = stats.poisson.pmf(np.arange(lo, hi + 1), other)
    p[0], p[-1] = stats.poisson.cdf(lo, other), stats.poisson.sf(hi - 1, other)
    far = ((n * p - expected) ** 2 / expected).sum()
    return stats.ncx2.sf(stats.chi2.isf(level, hi - lo), hi - lo, far)


LEVEL = 1e-3


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.12, 0.13, 0.5, 1.0, 3.0, 7.5, 9.9, 12.0, 30.0])
def test_counts_pass_a_chi_square_that_sees_two_per_cent(rate):
    """Sparse way up to 1 / 8, dense to 10, torch beyond; float32 as the guides use it."""
    rate = float(np.float32(rate))
    n = int(1.2e5 / rate) + 60_000
    assert power(rate, 1.02 * rate, n, LEVEL) > 0.99
    with seeded(11):
        assert chi_square(poisson(full(n, rate, torch.float32)), rate) > LEVEL
        assert chi_square(poisson(full(n, 1.02 * rate, torch.float32)), rate) < LEVEL


@pytest.mark.parametrize("shift", [0.0, -4.0])
def test_rates_of_all_kinds_in_one_tensor(shift):
    """Every column has its own law, in columns that are not contiguous."""
    rates = torch.tensor([0.0, 0.02, 0.4, 2.0, 9.9, 14.0, 1e4]).mul(math.exp(shift))
    n = 150_000
    with seeded(12):
        z = poisson(rates[:, None].expand(-1, n).T)
    assert not z[:, 0].any()
    p = [chi_square(z[:, i], float(rates[i])) for i in range(1, 6)]
    assert min(p) > LEVEL / 10
    within(z[:, 6].mean(), rates[6], math.sqrt(rates[6] / n))
    assert chi_square(z[:, 3], 1.02 * float(rates[3])) < LEVEL or shift


@pytest.mark.parametrize("rate", [0.03, 0.7])
def test_neighbours_are_independent(rate):
    """Eight or four of them share a random word."""
    with seeded(13):
        z = (poisson(full(1 << 21, rate)) - rate) / math.sqrt(rate)
    products = torch.stack([(z[k:] * z[:-k]).mean() for k in (1, 2, 3, 4, 5, 7, 8)])
    within(products, torch.zeros(7), (1 << 21) ** -0.5)


# Divergence


def test_divergence_is_torchs():
    u, u0 = torch.randn(2, 50, dtype=torch.float64).mul(2).requires_grad_().unbind()
    ours, theirs = poisson_kl(u, u0), kl_divergence(dist.Poisson(u.exp()), dist.Poisson(u0.exp()))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    a, b = (torch.autograd.grad(kl.sum(), [u, u0]) for kl in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a[0], u.exp() * (u - u0), rtol=1e-12, atol=0)
    two = poisson_kl(torch.tensor(2.0).log(), torch.tensor(0.5).log())
    assert round(float(two), 4) == 1.2726


def test_published_divergence_is_too_large_by_the_ratio_of_rates():
    """Identity 19: e^u f where e^u0 f is right; a guard for whoever reproduces it."""
    u, u0 = torch.randn(2, 50, dtype=torch.float64)
    y = (u - u0).exp()
    f = 1 - y + y * y.log()
    torch.testing.assert_close(u0.exp() * f, poisson_kl(u, u0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(u.exp() * f / poisson_kl(u, u0), y, rtol=1e-8, atol=0)


def test_divergence_has_all_derivatives_and_broadcasts():
    u = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    u0 = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(poisson_kl, (u, u0))
    assert torch.autograd.gradgradcheck(poisson_kl, (u, u0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence_is_never_negative_and_never_nan(dtype):
    u = torch.cat([torch.linspace(-200, 80, 57), torch.linspace(-1e-3, 1e-3, 21)]).to(dtype)
    kl = poisson_kl(u[:, None], u)
    assert (kl >= 0).all()
    assert torch.isfinite(kl).all()
    assert not kl.diagonal().any()
    far = (u[:, None] - u).abs() > 1
    assert (kl[far & (u > -80)] > 0).all()


def test_every_pair_of_laws_has_its_divergence():
    u, u0 = torch.tensor([[0.3, -1.0], [1.2, -2.0]])
    truth = kl_divergence(dist.Poisson(u.exp()), dist.Poisson(u0.exp()))
    q, p = RelaxedPoisson(u, 0.3), RelaxedPoisson(u0, 0.0, "sigmoid")
    for left in (q, dist.Poisson(u.exp())):
        for right in (p, dist.Poisson(u0.exp()), torch.distributions.Poisson(u0.exp())):
            torch.testing.assert_close(kl_divergence(left, right), truth)
            both = kl_divergence(left.expand((5, 2)).to_event(1), dist.Independent(right, 0)
                                 .expand((5, 2)).to_event(1))  # fmt: skip
            torch.testing.assert_close(both, truth.sum().expand(5))


# Identities of the relaxation


def fixed_times(u, tau, indicator, seed=5):
    """Arrivals of a draw at u in the whole window of the edge: neuron and time of each."""
    end = 1 + INDICATORS[indicator].reach * tau
    with seeded(seed):
        entry = relaxed_poisson._arrivals(u.detach().exp().flatten() * end)
        return entry, torch.rand(len(entry), dtype=u.dtype) * end


def plain_sum(v, indicator):
    """Indicators of v = (1 - S) / tau, written once more."""
    if indicator == "sigmoid":
        return torch.sigmoid(v)
    w = (0.5 + 0.5 * v).clamp(0, 1)
    return 3 * w**2 - 2 * w**3


@pytest.mark.parametrize(("indicator", "tau"), EDGES)
def test_slope_is_that_of_autograd_on_the_same_arrivals(indicator, tau):
    """Identity 18: S = E / r with E fixed noise, all of z left to autograd."""
    u = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3).requires_grad_()
    entry, time = fixed_times(u, tau, indicator)
    noise = time * u.detach().exp().flatten()[entry]
    sure = torch.arange(12, dtype=torch.float64)
    g = plain_sum((1 - noise / u.exp().flatten()[entry]) / tau, indicator)
    theirs = sure.index_add(0, entry, g).view(4, 3)
    ours = soft_counts(u, sure, entry, time, INDICATORS[indicator], tau)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn(4, 3, dtype=torch.float64)
    a, b = (torch.autograd.grad((weight * z).sum(), u)[0] for z in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert (b != 0).any()


@pytest.mark.parametrize(("indicator", "tau"), EDGES)
def test_slope_is_the_finite_difference(indicator, tau):
    u = torch.linspace(-1, 2, 6, dtype=torch.float64).requires_grad_()
    entry, time = fixed_times(u, tau, indicator)

    def z(shift):
        edge, sure = INDICATORS[indicator], u.new_zeros(6)
        return soft_counts(u, sure, entry, time * math.exp(-shift), edge, tau)

    slope = torch.autograd.grad(z(0.0).sum(), u)[0]
    torch.testing.assert_close((z(1e-5) - z(-1e-5)).detach() / 2e-5, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("indicator", "tau"), EDGES)
def test_edges_have_the_slope_and_the_moments_they_claim(indicator, tau):
    """Campbell: mean and variance are the integrals of g and g squared over arrival times."""
    edge = INDICATORS[indicator]
    v = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64, requires_grad=True)
    g, slope = edge(v)
    torch.testing.assert_close(g, plain_sum(v, indicator))
    torch.testing.assert_close(torch.autograd.grad(plain_sum(v, indicator).sum(), v)[0], slope)

    def g_of(s, power):
        return (
            float(plain_sum(torch.tensor((1 - s) / tau, dtype=torch.float64), indicator)) ** power
        )

    ends = (0, max(0, 1 - tau), 1 + tau, 1 + 40 * tau)
    first, second = (
        sum(integrate.quad(g_of, a, b, (p,), epsabs=1e-12)[0] for a, b in pairwise(ends))
        for p in (1, 2)
    )
    assert edge.mean(tau) == pytest.approx(first, abs=1e-9)
    assert edge.variance(tau) == pytest.approx(second, abs=1e-9)
    beyond = sum(integrate.quad(g_of, 1 + edge.reach * tau, 1 + 60 * tau, (1,)))
    assert beyond < 7e-6 * tau


TABLE = {  # mean and variance at r = 2, tau = 1, .5 and .1
    "sigmoid": [(2.63, 1.16), (2.13, 1.25), (2.00, 1.80)],
    "cubic": [(2.0, 1.49), (2.0, 1.74), (2.0, 1.95)],
}


def test_moments_are_those_published():
    for name, rows in TABLE.items():
        for tau, row in zip((1.0, 0.5, 0.1), rows, strict=True):
            q = RelaxedPoisson(math.log(2), tau, name)
            assert (round(float(q.mean), 2), round(float(q.variance), 2)) == row
    for name in INDICATORS:
        cold = RelaxedPoisson(math.log(2), 0.0, name)
        assert float(cold.mean) == pytest.approx(2) == float(cold.variance)
        assert float(RelaxedPoisson(math.log(2), 1e-9, name).variance) == pytest.approx(2)


# Laws of the relaxation

N = 200_000


def draw(rate, tau, indicator, seed, n=N):
    """n draws and their slopes."""
    u = full(n, math.log(rate)).requires_grad_()
    with seeded(seed):
        z = RelaxedPoisson(u, tau, indicator).rsample()
    return z.detach(), torch.autograd.grad(z.sum(), u)[0]


def stored(rate, tau, indicator, seed, n=N):
    """The published form: many inter-arrival times for each neuron, and autograd."""
    longest = rate * (1 + 40 * tau if indicator == "sigmoid" else 1 + tau)
    u = full(n, math.log(rate)).requires_grad_()
    with seeded(seed):
        gaps = torch.empty(int(stats.poisson.isf(1e-9, longest)), n, dtype=u.dtype).exponential_()
    z = plain_sum((1 - gaps.cumsum(0) / u.exp()) / tau, indicator).sum(0)
    return z.detach(), torch.autograd.grad(z.sum(), u)[0]


def same(a, b):
    """P-value of the two-sample Kolmogorov-Smirnov test, which atoms make conservative.

    To two decimals: beyond the reach of the sigmoid there are terms below 1e-5 and no others, which
    make a zero no zero.
    """
    return stats.ks_2samp(a.numpy().round(2), b.numpy().round(2), method="asymp").pvalue


def moments(z):
    """Mean and variance with their standard errors."""
    d = (z - z.mean()).square()
    values = torch.stack([z.mean(), d.mean()])
    return values, torch.stack([z.std(), d.std()]) / math.sqrt(len(z))


@pytest.mark.parametrize("rate", [0.3, 2.0])  # at 2 sure arrivals are drawn apart
@pytest.mark.parametrize(("indicator", "tau"), EDGES)
def test_moments_by_campbell(indicator, tau, rate):
    """Identity 14, and the gradient of the mean: the mean itself, for it is proportional to r."""
    z, slope = draw(rate, tau, indicator, 21, 4 * N)
    q = RelaxedPoisson(full(1, math.log(rate)), tau, indicator)
    value, se = moments(z)
    within(value, torch.cat([q.mean, q.variance]), se, k=4)
    within(slope.mean(), q.mean, slope.std() / math.sqrt(len(slope)), k=4)
    with pytest.raises(AssertionError):  # a rate two per cent off
        within(value[0] * 1.02, q.mean, se[0], k=4)


@pytest.mark.parametrize(("indicator", "tau"), EDGES)
def test_law_and_gradient_are_those_of_stored_arrivals(indicator, tau):
    n = 20_000
    theirs, their_slope = stored(1.7, tau, indicator, 22, n)
    ours, our_slope = draw(1.7, tau, indicator, 23, n)
    assert min(same(ours, theirs), same(our_slope, their_slope)) > LEVEL
    assert same(draw(1.9, tau, indicator, 24, n)[0], theirs) < LEVEL
    assert same(our_slope * 1.15, their_slope) < LEVEL


@pytest.mark.parametrize("busy", [0.0, math.inf])
def test_sure_arrivals_may_be_drawn_apart(busy, monkeypatch):
    reference, slope = stored(3.0, 0.2, "cubic", 25, 20_000)
    monkeypatch.setattr(relaxed_poisson, "BUSY", busy)
    z, dz = draw(3.0, 0.2, "cubic", 26, 20_000)
    assert min(same(z, reference), same(dz, slope)) > LEVEL


def test_arrivals_of_a_neuron_are_its_own():
    """Neurons of different rates in one tensor, and draws of a batch."""
    u = torch.tensor([[-3.0, 0.0, 1.0], [-50.0, -1.0, 2.0]], dtype=torch.float64)
    q = RelaxedPoisson(u, 0.7)
    with seeded(27):
        z = q.rsample(torch.Size([100_000]))
    assert not z[:, 1, 0].any()
    seen = u > -50
    within(z.mean(0)[seen], q.mean[seen], (q.variance[seen] / 1e5).sqrt(), k=4)
    c = torch.corrcoef(z[:, seen].T)
    within(c[~torch.eye(5, dtype=torch.bool)], 0.0, 1e5**-0.5, k=4)


class Linear:
    """x ~ Normal(Phi z, s) of four pixels and three neurons, z ~ Poisson(exp(u0))."""

    phi = torch.tensor(
        [[0.8, -0.3, 0.1], [0.2, 0.9, -0.5], [-0.4, 0.3, 0.7], [0.5, 0.1, 0.6]]
    ).double()
    s = torch.tensor([0.7, 1.0, 0.8, 1.3]).double()
    x = torch.tensor([1.0, -0.5, 2.0, 0.3]).double()
    u0 = torch.tensor([-0.5, 0.2, -1.0]).double()
    u = torch.tensor([0.1, -0.4, 0.5]).double()

    def energy(self, z):
        return 0.5 * ((self.x - z @ self.phi.T) / self.s).square().sum(-1)

    def free_energy(self, u):
        """Exact: half the variance of Phi z adds to the energy at the mean."""
        d = (self.phi / self.s[:, None]).square().sum(0)
        return self.energy(u.exp()) + 0.5 * (d * u.exp()).sum() + poisson_kl(u, self.u0).sum()

    @property
    def constant(self):
        return float(self.s.log().sum() + 2 * math.log(2 * math.pi))


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_relaxed_free_energy_lacks_the_missing_variance(tau):
    """Identity 15: less than the exact one by half of W_kk r_k 9 tau / 35, in value and slope."""
    m = Linear()
    u = m.u.clone().requires_grad_()
    with seeded(28):
        z = RelaxedPoisson(u.expand(N, -1), tau).rsample()
    losses = m.energy(z) + poisson_kl(u, m.u0).sum()
    missing = 0.5 * (m.phi / m.s[:, None]).square().sum(0) * 9 * tau / 35
    within(losses.mean().detach(), m.free_energy(m.u) - (missing * m.u.exp()).sum(),
           losses.std().detach() / math.sqrt(N), k=4)  # fmt: skip
    exact = m.u.clone().requires_grad_()
    truth = torch.autograd.grad(m.free_energy(exact) - (missing * exact.exp()).sum(), exact)[0]
    wide = u.detach().expand(N, -1).clone().requires_grad_()
    with seeded(29):
        z = RelaxedPoisson(wide, tau).rsample()
    loss = (m.energy(z) + poisson_kl(wide, m.u0).sum(-1)).sum()
    slopes = torch.autograd.grad(loss, wide)[0]
    within(slopes.mean(0), truth, slopes.std(0) / math.sqrt(N), k=4)


# The distribution


def test_temperature_zero_is_hard_counts():
    u = torch.linspace(-2, 2, 7)
    q = RelaxedPoisson(u, 0.0)
    with seeded(30):
        hard = q.sample(torch.Size([2000]))
    with seeded(30):
        assert torch.equal(hard, poisson(u.exp().expand(2000, 7)))
    assert not q.has_rsample
    assert not q.to_event(1).has_rsample
    assert (q.support.check(hard)).all()
    torch.testing.assert_close(q.log_prob(hard), dist.Poisson(u.exp()).log_prob(hard))
    with pytest.raises(BadInput, match="temperature"):
        q.rsample()
    with pytest.raises(ValueError, match="support"):
        q.log_prob(hard + 0.5)


def test_above_zero_there_is_no_density():
    q = RelaxedPoisson(torch.zeros(3), 0.1)
    z = q.sample()
    assert q.has_rsample
    assert q.support.check(z + 0.5).all()
    for law, value in ((q, z), (q.to_event(1), z), (q, torch.ones(3))):
        with pytest.raises(NoDensity, match="kl_divergence"):
            law.log_prob(value)


def test_log_pmf_survives_rates_that_underflow():
    q = RelaxedPoisson(torch.tensor([-200.0, 30.0]), 0.0)
    value = q.log_prob(torch.tensor([3.0, 0.0]))
    assert value[0] == pytest.approx(-600 - math.log(6))
    assert value[1] == pytest.approx(-math.exp(30), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("indicator", list(INDICATORS))
def test_extreme_rates_stay_finite(indicator, tau, dtype):
    u = torch.tensor(
        [-300.0, -50.0, 0.0, 10.0, 13.0 if indicator == "sigmoid" else 15.0], dtype=dtype
    )
    u.requires_grad_()
    q = RelaxedPoisson(u, tau, indicator)
    with seeded(31):
        z = q.rsample()
    slope = torch.autograd.grad(z.sum(), u)[0]
    assert z.dtype == dtype
    assert torch.isfinite(z).all()
    assert torch.isfinite(slope).all()
    assert not z[:2].any()
    within(z[3:].detach(), q.mean[3:].detach(), q.variance[3:].detach().sqrt())


def test_more_arrivals_than_memory_are_refused():
    for u in (40.0, 100.0, math.nan):
        q = RelaxedPoisson(torch.tensor([0.0, u]), 0.5, validate_args=False)
        with pytest.raises(BadInput, match="rate: expected"):
            q.rsample()


@pytest.mark.parametrize(
    ("tau", "indicator"),
    [(-0.1, "cubic"), (1.01, "cubic"), (math.nan, "cubic"), (math.inf, "sigmoid"), (-1, "sigmoid")],
)
def test_temperatures_out_of_range_are_refused(tau, indicator):
    with pytest.raises(BadInput, match=r"^temperature: expected a number from 0 to"):
        RelaxedPoisson(torch.zeros(2), tau, indicator)


def test_unknown_indicators_and_rates_that_are_none_are_refused():
    with pytest.raises(BadInput, match="Did you mean 'cubic'"):
        RelaxedPoisson(torch.zeros(2), 0.1, "cubc")
    with pytest.raises(ValueError, match="log_rate"):
        RelaxedPoisson(torch.tensor([math.nan]), 0.1, validate_args=True)


def test_busy_neurons_are_drawn_in_pieces_of_the_same_law(monkeypatch):
    monkeypatch.setattr("inference.relaxed_poisson.AT_ONCE", 200)  # here a dozen pieces
    u = torch.linspace(-1.0, 4.0, 40).repeat(500, 1).requires_grad_()
    for tau in (0.3, 1.0):
        with seeded(3):
            q = RelaxedPoisson(u, tau)
            z = q.rsample()
        (gain,) = torch.autograd.grad(z.sum(), u)
        within(z.mean(0).detach(), q.mean[0].detach(), (q.variance[0] / 500).sqrt().detach())
        within(gain.mean(0), q.rate[0].detach(), gain.std(0) / 500**0.5)  # dE z / du = r


def test_memory_does_not_grow_with_the_arrivals():
    for level in (-4.0, 0.0, 5.0):
        u, kept = torch.full((30, 7), level, requires_grad=True), []
        with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # noqa: B023
            z = RelaxedPoisson(u, 0.5).rsample()
        assert kept == [u.numel()]
        assert z.requires_grad
    with saved_tensors_hooks(lambda t: pytest.fail("kept"), lambda t: t):
        assert not RelaxedPoisson(u, 0.5).sample().requires_grad
        assert not RelaxedPoisson(u.detach(), 0.5).rsample().requires_grad


def test_a_second_derivative_is_refused_not_zero():
    u = torch.zeros(50, requires_grad=True)
    slope = torch.autograd.grad(
        RelaxedPoisson(u, 0.5).rsample().square().sum(), u, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope[0].sum().backward()


def test_shapes_follow_pyro():
    u = torch.randn(4, 3, requires_grad=True)
    q = RelaxedPoisson(u, 0.4, "sigmoid", validate_args=False)
    wide = q.expand(torch.Size([5, 4, 3]))
    assert (wide.batch_shape, wide.event_shape, wide.indicator) == ((5, 4, 3), (), "sigmoid")
    assert (wide.temperature, wide._validate_args) == (0.4, False)
    assert RelaxedPoisson(u, 0.4, validate_args=True).expand(torch.Size([2, 4, 3]))._validate_args
    assert q.to_event(1).batch_shape == (4,)
    z = wide.to_event(2).rsample(torch.Size([2]))
    assert z.shape == (2, 5, 4, 3)
    assert torch.autograd.grad(z.sum(), u)[0].shape == u.shape
    assert q.mask(torch.tensor([True, False, True])).rsample().shape == (4, 3)
    assert q.expand_by([6]).sample().shape == (6, 4, 3)
    assert "log_rate" in repr(q)


# In Pyro


def program(prior, rows=5):
    m = Linear()

    def model():
        with pyro.plate("data", rows):
            z = pyro.sample("z", prior(m.u0.expand(rows, -1)).to_event(1))
            pyro.sample("x", dist.Normal(z @ m.phi.T, m.s).to_event(1), obs=m.x.expand(rows, -1))

    return model


def spiking(tau, rows=5):
    def guide():
        with pyro.plate("data", rows):
            return pyro.sample("z", RelaxedPoisson(Linear.u.expand(rows, -1), tau).to_event(1))

    return guide


PRIORS = {
    "poisson": lambda u0: dist.Poisson(u0.exp()),
    "unchecked": lambda u0: dist.Poisson(u0.exp(), validate_args=False),
    "relaxed": lambda u0: RelaxedPoisson(u0, 0.1),
}


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("prior", list(PRIORS))
def test_elbo_estimators_refuse_soft_counts(prior, estimator):
    """Pyro forms log q on its way in both, so that neither can use a density there is not."""
    wanted = (NoDensity, ValueError) if prior == "poisson" else NoDensity
    with pytest.raises(wanted, match=r"density|support"):
        estimator().loss(program(PRIORS[prior]), spiking(0.1))
    with pytest.raises(wanted, match=r"density|support"):
        estimator().differentiable_loss(program(PRIORS[prior]), spiking(0.1))


@pytest.mark.parametrize("prior", ["poisson", "hard"])
def test_elbo_of_hard_counts_is_the_free_energy(prior):
    m, law = Linear(), (PRIORS | {"hard": lambda u0: RelaxedPoisson(u0, 0.0)})[prior]
    with seeded(32):
        losses = [
            Trace_ELBO().loss(program(law, 1000), spiking(0.0, 1000)) / 1000 for _ in range(60)
        ]
    truth = float(m.free_energy(m.u)) + m.constant
    within(np.mean(losses), truth, np.std(losses) / math.sqrt(len(losses)))


@pytest.mark.gpu
def test_a_gpu_draws_the_same_laws():
    rates = torch.tensor([0.01, 0.5, 3.0, 20.0], device="cuda")
    with seeded(33):
        z = poisson(rates.expand(N, -1)).cpu()
        u = rates.log().expand(N, -1).clone().requires_grad_()
        soft = RelaxedPoisson(u, 0.5).rsample()
    assert min(chi_square(z[:, i], float(rates[i])) for i in range(4)) > LEVEL / 10
    slope = torch.autograd.grad(soft.sum(), u)[0].cpu()
    within(slope.mean(0), rates.cpu(), slope.std(0) / math.sqrt(N))
