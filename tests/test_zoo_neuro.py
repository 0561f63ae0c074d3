"""Causes and percepts: against closed forms of the papers, brute force and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy import stats
from threadpoolctl import threadpool_limits

from inference.latents import Latents
from inference.seeds import seeded
from zoo.causal_inference import CausalInference
from zoo.necker import Ising, Necker
from zoo.plaid_motion import PlaidMotion


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


def cause(model, x):
    """p(second state given x), (B,), from the parts of the exact posterior."""
    log_prior, system, y = model.components(x)
    return (log_prior[:, None] + system.log_evidence(y)).softmax(0)[1]


# causal inference


def evidences(x, sp, sv, sa):
    """Densities of x under one cause and under two, as in the paper; x (B, 2)."""
    v, a = x.T
    volume = sv**2 * sa**2 + sv**2 * sp**2 + sa**2 * sp**2
    squares = (v - a) ** 2 * sp**2 + v**2 * sa**2 + a**2 * sv**2
    one = np.exp(-squares / volume / 2) / (2 * np.pi * np.sqrt(volume))
    two = stats.norm(0, np.hypot(sp, sv)).pdf(v) * stats.norm(0, np.hypot(sp, sa)).pdf(a)
    return one, two


def test_common_cause_in_closed_form():
    model = CausalInference(0.3, spread=9.0, visual_noise=1.5, auditory_noise=7.0).double()
    x = model.observations()
    one, two = evidences(x.numpy(), 9.0, 1.5, 7.0)
    p = float(model.probability)
    evidence = p * one + (1 - p) * two
    np.testing.assert_allclose(cause(model, x), p * one / evidence, rtol=1e-9)
    np.testing.assert_allclose(model.exact().log_evidence(x), np.log(evidence), rtol=1e-9)


def test_common_cause_of_draws():
    """State 1 of the components is common = 1, not 0."""
    model, n = CausalInference(0.3), 4000
    x = model.observations()[[0, 7, 14]]
    one, two = evidences(x.double().numpy(), 10.0, 2.0, 8.0)
    want = 0.3 * one / (0.3 * one + 0.7 * two)
    draws = model.exact().draw(x, draws=n, chains=1, seed=1).values["common"][0]
    within(draws.mean(0), want, np.sqrt(want * (1 - want) / n))


def test_common_cause_falls_with_disparity():
    model = CausalInference().double()
    a = torch.linspace(-60, 60, 41, dtype=torch.float64)
    p = cause(model, torch.stack([torch.zeros_like(a), a], -1))
    torch.testing.assert_close(p, p.flip(0))
    assert (p[20:].diff() < 0).all()
    assert p[20] > 0.6
    assert p[-1] < 1e-6
    off = cause(model, model.observations()).diff()  # off centre: up to one peak, then down
    assert (off.sign().diff() <= 0).all()
    assert off[0] > 0 > off[-1]


def test_causal_moments_against_brute_force():
    """Sums over a grid of common, visual and auditory."""
    model, n, step = CausalInference(0.4).double(), 4000, 0.5
    x = model.observations()[[6, 15]]
    places = torch.arange(-50, 50 + step, step, dtype=torch.float64)
    causes = torch.tensor([0.0, 1.0], dtype=torch.float64)
    grid = torch.cartesian_prod(causes, places, places)
    names = ("common", "visual", "auditory")
    z = {s: grid[:, k, None].expand(-1, 2) for k, s in enumerate(names)}
    log_joint = Latents(model).log_joint(z, x)
    exact = model.exact()
    evidence = log_joint.logsumexp(0) + 2 * math.log(step)
    torch.testing.assert_close(evidence, exact.log_evidence(x), rtol=0, atol=1e-6)
    weight = log_joint.softmax(0)
    draws = {k: v[0] for k, v in exact.draw(x, draws=n, chains=1, seed=0).values.items()}

    def moments(values):
        first = [values["common"], values["visual"], values["auditory"], model.sound(values)]
        return torch.stack([*first, *(f.square() for f in first[1:]), first[1] * first[2]])

    found, want = moments(draws), (weight * moments(z)).sum(1)
    within(found.mean(1), want, found.std(1) / math.sqrt(n))


def test_unused_sound_keeps_its_prior():
    model = CausalInference()
    x = model.observations()[8:9].expand(4000, -1)
    z = model.exact().draw(x, draws=1, chains=1, seed=0).values
    rest = z["auditory"][z["common"] > 0]
    n = len(rest)
    assert n > 1000
    within(rest.mean(), 0.0, 10 / math.sqrt(n))
    within(rest.var(), 100.0, 100 * math.sqrt(2 / n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_inference_with_little_noise_is_finite(dtype):
    model = CausalInference(visual_noise=0.002, auditory_noise=0.008).to(dtype)
    exact = model.exact()
    for x in (model.observations(), 5 * model.observations()):
        z = exact.draw(x, draws=20, chains=1, seed=0).values
        assert all(v.isfinite().all() for v in z.values())
        assert exact.log_evidence(x).isfinite().all()
        assert exact.log_prob(z, x).isfinite().all()
        within(model.sound(z), x[:, 1].expand(1, 20, -1), 0.008, k=6)  # of 400 draws


# Necker cube


def ising_by_loops(coupling):
    """Every state and its log-weight, by loops."""
    n = len(coupling)
    states = list(itertools.product((0, 1), repeat=n))
    pairs = list(itertools.combinations(range(n), 2))
    scores = [
        sum(coupling[i][j] * (2 * z[i] - 1) * (2 * z[j] - 1) for i, j in pairs) for z in states
    ]
    return np.array(states, dtype=float), np.array(scores)


def log_normaliser(scores):
    return math.log(math.fsum(math.exp(s) for s in scores))


def test_cube_has_twelve_edges():
    model = Necker(0.7)
    j, face = model.coupling, model.face
    assert torch.equal(j, j.T)
    assert j.count_nonzero(1).tolist() == [3] * 8
    same = face[:, None] == face
    assert (j[same] >= 0).all()
    assert (j[~same] <= 0).all()
    upper = j.triu(1)
    assert (upper > 0).sum() == 8
    assert (upper < 0).sum() == 4
    assert face.sum() == 0


def test_ising_against_loops():
    """Any couplings, not only those of the cube."""
    with seeded(3):
        coupling = torch.randn(5, 5, dtype=torch.float64)
    law = Ising(coupling, (2,))
    states, scores = ising_by_loops(coupling.tolist())
    assert law.log_normaliser.item() == pytest.approx(log_normaliser(scores), abs=1e-12)
    found = law.log_prob(torch.as_tensor(states)[:, None])
    want = np.broadcast_to(scores[:, None] - log_normaliser(scores), (32, 2))
    np.testing.assert_allclose(found, want, atol=1e-12)
    n = 4000
    with seeded(4):
        draws = law.expand((3, 2)).sample((n,))
    assert draws.shape == (n, 3, 2, 5)
    assert law.support.check(draws).all()
    pairs = draws[..., :, None] * draws[..., None, :]
    p = np.exp(scores - log_normaliser(scores))
    both = np.einsum("s,si,sj->ij", p, states, states)
    within(pairs.mean(0), np.broadcast_to(both, (3, 2, 5, 5)), np.sqrt(both * (1 - both) / n))


def test_necker_posterior_against_loops():
    model = Necker(0.6, gain=0.5).double()
    x = model.observations()[:4]
    states, scores = ising_by_loops(model.coupling.tolist())
    mean = 0.5 * model.face.numpy() * (2 * states - 1)
    seen = stats.norm(mean[:, None], 1).logpdf(x.numpy()).sum(-1)
    log_joint = scores[:, None] - log_normaliser(scores) + seen
    evidence = np.log(np.exp(log_joint).sum(0))
    exact = model.exact()
    np.testing.assert_allclose(exact.log_evidence(x), evidence, rtol=1e-12)
    z = torch.as_tensor(states)[:, None].expand(-1, 4, -1)
    np.testing.assert_allclose(exact.log_prob({"z": z}, x), log_joint - evidence, atol=1e-10)


def interpretations(model, x):
    """Posterior masses of the two ways to see the cube, (2, B)."""
    first = (1 + model.face) / 2
    z = torch.stack([first, 1 - first])[:, None].expand(-1, len(x), -1)
    return model.exact().log_prob({"z": z}, x).exp()


def test_necker_cube_is_bistable():
    model = Necker().double()
    masses = interpretations(model, model.observations()[:1])
    torch.testing.assert_close(masses[0], masses[1])
    assert masses.min() > 0.4
    assert masses[0].item() == pytest.approx(0.454, abs=5e-4)


def test_cues_break_the_tie():
    """Their log-odds are 2 g sum(x)."""
    model = Necker().double()
    x = model.observations()[1:6]
    masses = interpretations(model, x)
    odds = (masses[0] / masses[1]).log()
    torch.testing.assert_close(odds, 2 * model.gain * x.sum(-1), rtol=1e-9, atol=1e-9)
    assert x[0].count_nonzero() == 1
    assert masses[0, 0] > 1.5 * masses[1, 0]


def test_best_factorised_guide_keeps_one_percept():
    """Fixed points m = tanh(sum_j J_ij m_j) from many starts; the best misses .72 nats."""
    model = Necker().double()
    j = model.coupling.numpy()
    log_z = log_normaliser(ising_by_loops(j.tolist())[1])
    starts = np.random.default_rng(0).uniform(-1, 1, (20, 8))
    best = -np.inf
    for m in starts:
        for _ in range(200):
            for i in range(8):
                m[i] = np.tanh(j[i] @ m)
        energy = m @ np.triu(j, 1) @ m
        best = max(best, energy + stats.bernoulli((1 + m) / 2).entropy().sum())
    assert log_z - best == pytest.approx(0.72, abs=5e-3)


# plaids


def by_percept(model, x):
    """Prior, covariance of (z, x) and log-evidence of either percept, written with numpy."""
    first, second = model.normals.numpy()
    m, none = len(model.scale) // 2, np.zeros(2)
    rows = ([first, none], [second, none]), ([first, none], [none, second])
    found = []
    for percept in rows:
        w = np.repeat([np.concatenate(r) for r in percept], m, 0)
        prior = float(model.spread) ** 2
        cov = prior * w @ w.T + np.diag(model.scale.numpy() ** 2)
        gain = prior * np.linalg.solve(cov, w).T
        evidence = stats.multivariate_normal(np.zeros(2 * m), cov).logpdf(x)
        found.append((x @ gain.T, prior * (np.eye(4) - gain @ w), evidence))
    return found


def test_plaid_against_numpy():
    model = PlaidMotion(0.2, measurements=3, noise=0.4).double()
    x = model.observations()[:5]
    (_, _, coherent), (_, _, apart) = by_percept(model, x.numpy())
    p = float(model.probability)
    evidence = np.logaddexp(np.log(1 - p) + coherent, np.log(p) + apart)
    np.testing.assert_allclose(model.exact().log_evidence(x), evidence, rtol=1e-9)
    np.testing.assert_allclose(cause(model, x), np.exp(np.log(p) + apart - evidence), rtol=1e-9)


def test_plaid_draws_against_numpy():
    """Mixed moments: percept, velocities, products of velocities."""
    model, n = PlaidMotion().double(), 4000
    x = model.observations()[:3]
    found = model.exact().draw(x, draws=n, chains=1, seed=0).values
    p = cause(model, x).numpy()
    percepts = by_percept(model, x.numpy())
    z = torch.cat([found["v1"], found["v2"]], -1)[0]
    pairs = z[..., :, None] * z[..., None, :]
    weights = np.stack([1 - p, p])
    mean = sum(w[:, None] * m for w, (m, _, _) in zip(weights, percepts, strict=True))
    second = sum(
        w[:, None, None] * (c + m[:, :, None] * m[:, None])
        for w, (m, c, _) in zip(weights, percepts, strict=True)
    )
    within(found["transparent"][0].mean(0), p, np.sqrt(p * (1 - p) / n))
    within(z.mean(0), mean, z.std(0) / math.sqrt(n))
    within(pairs.mean(0), second, pairs.std(0) / math.sqrt(n))


def test_unused_velocity_keeps_its_prior():
    model = PlaidMotion()
    x = model.observations()[1:2].expand(4000, -1)
    z = model.exact().draw(x, draws=1, chains=1, seed=0).values
    rest = z["v2"][z["transparent"] == 0]
    n = len(rest)
    assert n > 1000
    within(rest.mean(0), 0.0, 1 / math.sqrt(n))
    within(rest.var(0), 1.0, math.sqrt(2 / n))


def velocity(model, x, percept=0):
    """Posterior mean of v1 under a percept, (B, 2)."""
    _, system, y = model.components(x)
    return system.posterior(y)[0][percept, :, :2]


def test_coherent_plaid_moves_with_the_intersection_of_constraints():
    model = PlaidMotion(noise=1e-4).double()
    x = model.observations()[:6]
    speeds = x.reshape(len(x), 2, 2).mean(-1)
    want = torch.linalg.solve(model.normals, speeds[..., None])[..., 0]
    torch.testing.assert_close(velocity(model, x), want, rtol=1e-5, atol=1e-5)
    rigid = torch.tensor([[-0.8, 2.8], [1.2, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(want[:2], rigid, rtol=1e-5, atol=1e-5)


def polar(v):
    return v.norm(dim=-1), torch.rad2deg(torch.atan2(v[..., 1], v[..., 0]))


def test_low_contrast_looks_slow():
    """The coherent percept of the first plaid: the docstring's numbers, and all in between."""
    speeds, angles = [], []
    for k in (1.0, 0.6, 0.3, 0.1):
        model = PlaidMotion(contrasts=(k, k / 2)).double()
        x = model.observations()[:1]
        speed, angle = polar(velocity(model, x)[0])
        speeds.append(speed.item())
        angles.append(angle.item())
        apart = torch.stack([velocity(model, x, 1)[0], model.normals[0]])
        assert polar(apart)[1].diff().abs() < 1e-6  # along the normal if transparent
    assert speeds == sorted(speeds, reverse=True)
    assert angles == sorted(angles, reverse=True)
    assert (round(speeds[0], 2), round(angles[0])) == (2.13, 103)
    assert (round(speeds[2], 2), round(angles[2])) == (0.68, 79)
    true_speed, true_angle = polar(torch.tensor([-0.8, 2.8]))
    assert (round(true_speed.item(), 2), round(true_angle.item())) == (2.91, 106)


def test_faintest_plaid_moves_with_the_weighted_sum_of_normals():
    model = PlaidMotion(contrasts=(2e-3, 1e-3)).double()
    x = model.observations()[:2]
    speeds = x[:, ::2] * torch.tensor([1.0, 0.25], dtype=torch.float64)
    want = polar(speeds @ model.normals)[1]
    torch.testing.assert_close(polar(velocity(model, x))[1], want, rtol=1e-3, atol=0)


def test_first_plaid_is_ambiguous():
    model = PlaidMotion().double()
    assert cause(model, model.observations()[:1]).item() == pytest.approx(0.60, abs=5e-3)
