"""Noisy-OR and the sprinkler: against tables written out by hand, and the textbook's numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from inference.errors import BadInput
from inference.latents import Latents
from inference.seeds import seeded
from zoo.noisy_or import NoisyOr
from zoo.sprinkler import Sprinkler


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


# noisy-OR


@pytest.fixture(scope="module")
def textbook():
    """Two causes of one finding, which is present: P(00), P(01), P(10), P(11)."""
    model = NoisyOr(2, 1, prior=(0.1, 0.1), weights=((0.9,), (0.9,)), leak=(0.01,)).double()
    return model.exact().logits(torch.ones(1, 1).double()).softmax(0)[:, 0].numpy()


def test_textbook_table(textbook):
    np.testing.assert_allclose(textbook, [0.045, 0.450, 0.450, 0.055], atol=5e-4)
    marginal = textbook[2] + textbook[3]
    np.testing.assert_allclose(marginal, 0.505, atol=5e-4)
    explained_away = textbook[3] / (textbook[1] + textbook[3])
    np.testing.assert_allclose(explained_away, 0.109, atol=5e-4)
    phi = (textbook[3] - marginal**2) / (marginal * (1 - marginal))
    np.testing.assert_allclose(phi, -0.800, atol=5e-4)


def test_textbook_factorised_guides(textbook):
    """The smallest KL(q || p) by search, the smallest KL(p || q) by the marginals."""

    def product(first, second):
        return np.outer([1 - first, first], [1 - second, second]).reshape(-1)

    def reverse(a):
        q = product(*(1 / (1 + np.exp(-a))))
        return float((q * np.log(q / textbook)).sum())

    starts = itertools.product([-2.0, 0.1, 2.0], repeat=2)
    best = min(minimize(reverse, start, tol=1e-10).fun for start in starts)
    np.testing.assert_allclose(best, 0.499, atol=5e-4)
    q = product(*[textbook[2] + textbook[3]] * 2)
    forward = (textbook * np.log(textbook / q)).sum()
    np.testing.assert_allclose(forward, 0.369, atol=5e-4)


def by_hand(model, x):
    """States (2^K, K) and p(z, x), (2^K, B), with the product of the definition, one by one."""
    prior, w, leak = (t.double().numpy() for t in (model.prior, model.weights, model.leak))
    states = list(itertools.product([0, 1], repeat=len(prior)))
    table = np.zeros((len(states), len(x)))
    for k, z in enumerate(states):
        p_z = np.prod([p if on else 1 - p for p, on in zip(prior, z, strict=True)])
        for b, row in enumerate(x):
            p_x = 1.0
            for j, seen in enumerate(row):
                absent = 1 - leak[j]
                for i, on in enumerate(z):
                    absent *= (1 - w[i, j]) ** on
                p_x *= 1 - absent if seen else absent
            table[k, b] = p_z * p_x
    return np.array(states), table


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_noisy_or_table_by_hand(dtype, rtol):
    model = NoisyOr(4, 3, seed=2).to(dtype)
    x = model.observations()[:5]
    _, table = by_hand(model, x.tolist())
    exact = model.exact()
    np.testing.assert_allclose(exact.logits(x).exp(), table, rtol=rtol)
    np.testing.assert_allclose(exact.log_evidence(x), np.log(table.sum(0)), rtol=rtol)


def test_noisy_or_draws_have_the_frequencies_of_the_table():
    model, n = NoisyOr(4, 3, seed=2).double(), 4000
    x = model.observations()[:3]
    states, table = by_hand(model, x.tolist())
    z = model.exact().draw(x, draws=n, chains=1, seed=0).values["z"][0].numpy()
    code = z @ (2 ** np.arange(3, -1, -1))
    for b in range(3):
        p = table[:, b] / table[:, b].sum()
        found = np.bincount(code[:, b].astype(int), minlength=len(states)) / n
        within(found, p, np.sqrt(p * (1 - p) / n) + 1 / n)


def test_noisy_or_certain_causes_and_rare_findings_stay_finite():
    """Probabilities near their limits, where 1 - p would round to one in single precision."""
    model = NoisyOr(2, 2, prior=(1e-6, 0.999), weights=((0.0, 0.999999),) * 2, leak=(1e-9, 1e-9))
    x = torch.cartesian_prod(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    logits = model.exact().logits(x)
    assert logits.isfinite().all()
    _, table = by_hand(model, x.tolist())
    np.testing.assert_allclose(logits, np.log(table), rtol=1e-4, atol=1e-3)


def test_noisy_or_canonical_observations():
    model = NoisyOr()
    x = model.observations()
    assert x.shape == (100, 5)
    assert (x[0] == 1).all()
    assert (x.sum(-1) > 0).all()
    assert len(x.unique(dim=0)) > 10
    assert torch.equal(x, NoisyOr().observations())
    assert not torch.equal(x, NoisyOr(seed=1).observations())
    p = model.exact().logits(x[:1]).softmax(0)
    assert p.max() < 0.2  # ambiguous: no explanation of all findings stands out


def test_noisy_or_predicts_the_findings():
    model, n = NoisyOr().double(), 4000
    z = model.simulate(3, seed=1)[0]["z"]
    with seeded(2):
        many = {"z": z.expand(n, -1, -1)}
        x = Latents(model).replicate(many, model.observations()[:3])
    p = model.predict({"z": z})
    within(x.mean(0), p, (p * (1 - p) / n).sqrt())


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("prior", {"prior": (0.1,)}),
        ("prior", {"prior": (0.1, 1.0)}),
        ("weights", {"weights": ((0.9, 0.8), (0.5, 0.2))}),
        ("weights", {"weights": ((1.0,), (0.5,))}),
        ("weights", {"weights": ((-0.1,), (0.5,))}),
        ("leak", {"leak": (0.0,)}),
        ("leak", {"leak": (1.5,)}),
    ],
)
def test_noisy_or_refuses_what_is_no_probability(name, knobs):
    with pytest.raises(BadInput, match=f"{name}: expected probabilities of shape"):
        NoisyOr(2, 1, **knobs)


# sprinkler


def sprinkler_by_hand(dew):
    """P(cloudy, sprinkler, rain, wet), (2, 2, 2, 2)."""
    table = np.zeros((2, 2, 2, 2))
    for c, s, r in itertools.product([0, 1], repeat=3):
        on, rains = (0.1, 0.8) if c else (0.5, 0.2)
        wet = (dew, 0.9, 0.99)[s + r]
        p = 0.5 * (on if s else 1 - on) * (rains if r else 1 - rains)
        table[c, s, r] = p * (1 - wet), p * wet
    return table


@pytest.mark.parametrize("dew", [0.0, 0.001, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sprinkler_table_by_hand(dew, dtype):
    model = Sprinkler(dew=dew).to(dtype)
    x = model.observations()
    found = model.exact().logits(x).exp().reshape(2, 2, 2, 2).numpy()
    want = sprinkler_by_hand(dew)[..., [1, 0]]
    np.testing.assert_allclose(found, want, atol=1e-6)
    if dew > 0:
        np.testing.assert_allclose(np.log(found), np.log(want), atol=1e-6)


@pytest.mark.parametrize("dew", [0.0, 0.001])
def test_sprinkler_published_numbers(dew):
    """The book's network, and ours: the same to the digits printed."""
    exact = Sprinkler(dew=dew).double().exact()
    p = exact.logits(torch.ones(1, 1).double()).softmax(0).reshape(2, 2, 2).sum(0).numpy()
    np.testing.assert_allclose(p[1].sum(), 0.430, atol=5e-4)
    np.testing.assert_allclose(p[:, 1].sum(), 0.708, atol=5e-4)
    np.testing.assert_allclose(p[1, 1] / p[:, 1].sum(), 0.1945, atol=5e-5)


def test_sprinkler_draws_and_predictions():
    model, n = Sprinkler().double(), 4000
    z = model.exact().draw(model.observations(), draws=n, chains=1, seed=0).values
    table = sprinkler_by_hand(0.001)
    for row, wet in enumerate((1, 0)):
        posterior = table[..., wet] / table[..., wet].sum()
        for axis, name in enumerate(("cloudy", "sprinkler", "rain")):
            p = np.moveaxis(posterior, axis, 0)[1].sum()
            within(z[name][0, :, row].mean(), p, math.sqrt(p * (1 - p) / n))
    both = {k: torch.ones(3, 2).double() for k in ("sprinkler", "rain")}
    assert model.predict(both).shape == (3, 2, 1)
    np.testing.assert_allclose(model.predict(both), 0.99, rtol=1e-6)
    assert model.observations().tolist() == [[1.0], [0.0]]
