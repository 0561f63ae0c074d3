"""Models of time against smoothers and enumerations written a second time, in numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import within
from scipy import stats
from threadpoolctl import threadpool_limits

import zoo
from inference.errors import BadInput
from inference.latents import Latents
from inference.seeds import seeded
from zoo.gaussian_video import HIDDEN, GaussianVideo
from zoo.markov import MarkovChain
from zoo.moving_ball import MovingBall
from zoo.state_space import StateSpace, autoregression


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


# linear Gaussian paths


def smooth(coefficients, sd, weights, offset, noise, x):
    """Kalman filter and Rauch-Tung-Striebel smoother in companion form.

    weights and offset (F,), noise (T, F), x (T, F). Returns smoothed means, variances and lag-1
    covariances of z, and log p(x) by prediction errors.
    """
    p = len(coefficients)
    move = np.eye(p, k=-1)
    move[0] = coefficients
    first = np.zeros((p, p))
    first[0, 0] = 1.0
    mean, cov, evidence, filtered, predicted = np.zeros(p), first * sd[0] ** 2, 0.0, [], []
    seen = np.outer(weights, first[0])  # (F, p)
    for t in range(len(sd)):
        if t:
            mean, cov = move @ mean, move @ cov @ move.T + first * sd[t] ** 2
        predicted.append((mean, cov))
        total = seen @ cov @ seen.T + np.diag(noise[t] ** 2)
        evidence += stats.multivariate_normal(seen @ mean + offset, total).logpdf(x[t])
        gain = np.linalg.solve(total, seen @ cov).T
        mean, cov = mean + gain @ (x[t] - offset - seen @ mean), cov - gain @ seen @ cov
        filtered.append((mean, cov))
    means, variances, lagged = [mean[0]], [cov[0, 0]], []
    for t in range(len(sd) - 2, -1, -1):
        (m, c), (m_next, c_next) = filtered[t], predicted[t + 1]
        back = c @ move.T @ np.linalg.pinv(c_next)
        lagged.insert(0, (back @ cov)[0, 0])
        mean, cov = m + back @ (mean - m_next), c + back @ (cov - c_next) @ back.T
        means.insert(0, mean[0])
        variances.insert(0, cov[0, 0])
    return np.array(means), np.array(variances), np.array(lagged), evidence


def check_smoother(model, x, weights, offset, noise):
    """The model's exact posterior is that of `smooth`; x of shape (B, T, F)."""
    exact = model.exact()
    seen = model.observations()[: len(x)]
    q, evidence = exact.distribution(seen), exact.log_evidence(seen)
    for b in range(len(x)):
        mean, variance, lagged, log_x = smooth(
            model.coefficients.numpy(), model.sd.numpy(), weights, offset, noise, x[b]
        )
        cov = q.covariance_matrix[b]
        np.testing.assert_allclose(q.mean[b], mean, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(cov.diagonal(), variance, rtol=1e-8)
        np.testing.assert_allclose(cov.diagonal(1), lagged, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(evidence[b], log_x, rtol=1e-9)


@pytest.mark.parametrize(
    ("coefficients", "steps"), [((0.9,), 20), ((1.2, -0.5), 7), ((0.3, 0.2, 0.4), 9), ((0.5,), 1)]
)
def test_state_space_is_kalman_and_rts(coefficients, steps):
    knobs = {"innovation_variance": 0.3, "noise_variance": 0.6, "start_variance": 2.0}
    model = StateSpace(coefficients, steps=steps, seed=1, **knobs).double()
    x = model.observations()[:3, :, None].numpy()
    noise = np.full((steps, 1), float(model.scale))
    check_smoother(model, x, np.ones(1), np.zeros(1), noise)


@pytest.mark.parametrize(
    ("a", "q", "r", "steps", "kl", "lag", "mid_lag", "variance", "factorised"),
    [
        (0.9, 0.19, 0.5, 20, 2.44, 0.533, 0.524, 0.152, 0.087),
        (0.99, 0.02, 1.0, 20, 6.20, 0.893, 0.879, 0.078, 0.010),
        (0.95, 0.0975, 1.0, 10, 2.30, 0.759, 0.737, 0.166, 0.049),
    ],
)
def test_state_space_numbers(a, q, r, steps, kl, lag, mid_lag, variance, factorised):
    """The table in the docstring: half a unit of the last digit."""
    model = StateSpace((a,), steps=steps, innovation_variance=q, noise_variance=r).double()
    precision = model.exact().precision()
    cov = torch.linalg.inv(precision)
    sd = cov.diagonal().sqrt()
    correlation = cov.diagonal(1) / (sd[1:] * sd[:-1])
    mid = steps // 2
    assert model.exact().mean_field_gap().item() == pytest.approx(kl, rel=5e-3)
    assert abs(correlation.mean() - lag) < 5e-4
    assert abs(correlation[mid - 1] - mid_lag) < 5e-4
    assert abs(cov[mid, mid] - variance) < 5e-4
    assert abs(1 / precision[mid, mid] - factorised) < 5e-4


def test_autoregression_is_the_recursion():
    """Paths from the factor obey it with unit innovations; the precision inverts the covariance."""
    a = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    sd = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    tril, precision = autoregression(a, sd)
    want = torch.zeros(6, 6, dtype=torch.float64)  # row t: z_t in terms of the innovations
    for t in range(6):
        want[t, t] = sd[t]
        for k in range(1, min(t, 3) + 1):
            want[t] += a[k - 1] * want[t - k]
    torch.testing.assert_close(tril, want, rtol=1e-12, atol=1e-12)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(precision @ tril @ tril.T, eye, rtol=0, atol=1e-10)


def test_more_lags_than_steps_do_not_matter():
    short, long = (StateSpace(a, steps=2, seed=3) for a in ((0.9,), (0.9, 0.5, 0.4)))
    assert torch.equal(short.observations(), long.observations())


def test_state_space_simulates_its_variances():
    n = 4000
    z, x = StateSpace((0.9, -0.2)).simulate(n, seed=1)
    path = z["z"]
    steps = path[:, 2:] - 0.9 * path[:, 1:-1] + 0.2 * path[:, :-2]
    for found, variance in ((path[:, :1], 1.0), (steps, 0.19), (x - path, 0.5)):
        within(found.var(0), variance, variance * math.sqrt(2 / n))


def test_state_space_draws_are_paths():
    """Neighbours in time covary in the draws as in the posterior."""
    model, n = StateSpace().double(), 4000
    x = model.observations()[:2]
    z = model.exact().draw(x, draws=n, chains=1, seed=0).values["z"][0]
    cov = torch.linalg.inv(model.exact().precision())
    centred = z - model.exact().distribution(x).mean
    pairs = centred[..., 1:] * centred[..., :-1]
    within(pairs.mean(0), cov.diagonal(1).expand(2, -1), pairs.std(0) / math.sqrt(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_space_with_little_noise_is_finite(dtype):
    model = StateSpace(noise_variance=0.5e-6).to(dtype)
    x = 10 * model.observations()[:3]
    exact = model.exact()
    z = exact.draw(x, draws=20, chains=1, seed=0).values
    assert (z["z"] - x).abs().max() < 0.01
    assert exact.log_evidence(x).isfinite().all()
    assert exact.log_prob(z, x).isfinite().all()


def test_gaussian_video_is_kalman_and_rts():
    model = GaussianVideo(steps=8, side=4, occluded=(2, 3)).double()
    x = model.observations()[:2].numpy()
    noise = np.broadcast_to(model.scale.numpy(), x.shape[1:])
    check_smoother(model, x, model.slope.numpy(), model.mean.numpy(), noise)


def test_gaussian_video_slope_is_the_derivative_of_the_blob():
    side, width, step = 6, 1.2, 1e-4
    model = GaussianVideo(side=side, width=width).double()
    row, column = np.meshgrid(*[np.arange(side) - 2.5] * 2, indexing="ij")

    def blob(right):
        return np.exp(-(row**2 + (column - right) ** 2) / (2 * width**2)).reshape(-1)

    np.testing.assert_allclose(model.mean, blob(0.0), atol=1e-6)
    np.testing.assert_allclose(model.slope, (blob(step) - blob(-step)) / (2 * step), atol=1e-6)


def test_gaussian_video_knows_little_where_the_blob_is_hidden():
    """The numbers of the docstring, and what one hidden frame tells."""
    model = GaussianVideo().double()
    assert model.scale.squeeze().tolist() == pytest.approx(
        [0.5] * 4 + [0.5 * HIDDEN] * 3 + [0.5] * 3
    )
    exact = model.exact()
    sd = torch.linalg.inv(exact.precision()).diagonal().sqrt()
    assert sd[4:7].min() > sd[[2, 3, 7, 8]].max()
    cov = torch.linalg.inv(exact.precision())
    lag = cov.diagonal(1) / (sd[1:] * sd[:-1])
    assert (round(lag.min().item(), 2), round(lag.max().item(), 2)) == (0.71, 0.88)
    assert lag.argmax() in (4, 5)
    assert exact.mean_field_gap().item() == pytest.approx(3.89, abs=5e-3)
    x = model.observations()[:3]
    moved = x.clone()
    moved[:, 5] += model.slope  # one pixel to the right, in a hidden frame
    shift = exact.distribution(moved).mean - exact.distribution(x).mean
    assert shift.abs().max() < 1e-3
    moved = x.clone()
    moved[:, 3] += model.slope
    shift = exact.distribution(moved).mean - exact.distribution(x).mean
    assert (shift[:, 4] > 0.1).all()


def test_gaussian_video_refuses_frames_it_does_not_have():
    with pytest.raises(BadInput, match="frames from 0 to 4"):
        GaussianVideo(steps=5)


# hidden Markov models


@pytest.fixture(scope="module")
def small():
    """Five steps of three states: all 243 paths fit in a table."""
    return zoo.HiddenMarkov(5, 3, seed=2).double()


def path_table(model, x):
    """All paths (K^T, T) and log p(path, x) of each, (K^T, B), in numpy."""
    k, steps = len(model.levels), model.steps
    paths = np.array(list(itertools.product(range(k), repeat=steps)))
    start = np.exp(model.log_initial.numpy())
    move = np.exp(model.log_transition.numpy())
    start, move = start / start.sum(), move / move.sum(1, keepdims=True)
    log_p = np.log(start[paths[:, 0]]) + np.log(move[paths[:, :-1], paths[:, 1:]]).sum(1)
    levels = model.levels.numpy()[paths]
    seen = stats.norm(levels[:, None], float(model.scale)).logpdf(x.numpy()).sum(-1)
    return paths, log_p[:, None] + seen


def test_forward_backward_against_all_paths(small):
    x = small.observations()[:4]
    exact = small.exact()
    paths, log_joint = path_table(small, x)
    evidence = np.log(np.exp(log_joint).sum(0))
    np.testing.assert_allclose(exact.log_evidence(x), evidence, rtol=1e-11)
    z = torch.as_tensor(paths)[:, None].expand(-1, 4, -1)
    np.testing.assert_allclose(exact.log_prob({"z": z}, x), log_joint - evidence, atol=1e-10)
    np.testing.assert_allclose(Latents(small).log_joint({"z": z}, x), log_joint, atol=1e-10)


def test_marginals_and_pairs_of_draws(small):
    """Frequencies of states, and of pairs of neighbours, against the table of all paths."""
    x, n = small.observations()[:2], 20_000
    paths, log_joint = path_table(small, x)
    posterior = np.exp(log_joint)
    posterior = posterior / posterior.sum(0)
    z = small.exact().draw(x, draws=n, chains=1, seed=0).values["z"][0].numpy()
    for t, k in itertools.product(range(5), range(3)):
        p = posterior[paths[:, t] == k].sum(0)
        within((z[:, :, t] == k).mean(0), p, np.sqrt(p * (1 - p) / n))
    for t, i, j in itertools.product(range(4), range(3), range(3)):
        p = posterior[(paths[:, t] == i) & (paths[:, t + 1] == j)].sum(0)
        found = ((z[:, :, t] == i) & (z[:, :, t + 1] == j)).mean(0)
        within(found, p, np.sqrt(p * (1 - p) / n))


def test_expanded_chain_is_many_copies(small):
    chain = small.chain(small.observations()[:2])
    wide = chain.expand((3, 2))
    assert (wide.batch_shape, wide.event_shape) == ((3, 2), (5,))
    with seeded(0):
        z = wide.sample((7,))
    assert z.shape == (7, 3, 2, 5)
    torch.testing.assert_close(wide.log_prob(z), chain.log_prob(z))
    torch.testing.assert_close(wide.log_normaliser, chain.log_normaliser.expand(3, 2))
    assert wide.support.check(z).all()


def dense(chain):
    """The same chain with every state as a successor of every state."""
    k = len(chain.log_initial)
    table = torch.full((k, k), -torch.inf, dtype=chain.log_transition.dtype)
    table.scatter_(1, chain.successors, chain.log_transition)
    every = torch.arange(k).expand(k, -1).contiguous()
    return MarkovChain(chain.log_initial, table, every, chain.log_weight)


def test_sparse_chain_is_the_dense_chain():
    model = MovingBall(3, steps=5, occluder=(1,), seed=3).double()
    chain = model.chain(model.observations()[:4])
    full = dense(chain)
    torch.testing.assert_close(chain.log_normaliser, full.log_normaliser, rtol=1e-12, atol=0)
    torch.testing.assert_close(chain.potential, full.potential, rtol=1e-10, atol=1e-10)
    with seeded(1):
        mine, other = chain.sample((200,)), full.sample((200,))
    for z in (mine, other):
        torch.testing.assert_close(chain.log_prob(z), full.log_prob(z), rtol=1e-10, atol=1e-10)
        assert chain.log_prob(z).isfinite().all()
    jump = mine[0].clone()
    jump[:, 2] = (jump[:, 1] + 18) % 36  # another row altogether
    assert (chain.log_prob(jump) == -torch.inf).all()
    assert (full.log_prob(jump) == -torch.inf).all()


# the moving ball


def bounce(place, velocity, side):
    return (place + velocity, velocity) if 0 <= place + velocity < side else (place, -velocity)


def transitions(model, flip):
    """The transition matrix, written with loops."""
    side, signs = model.side, (-1, 1)
    table = np.zeros((4 * side**2, 4 * side**2))
    for row, column in itertools.product(range(side), repeat=2):
        for down, right in itertools.product(signs, repeat=2):
            start = model.state(row, column, (down, right))
            (r, dr), (c, dc) = bounce(row, down, side), bounce(column, right, side)
            for a, b in itertools.product(signs, repeat=2):
                p = (flip if a < 0 else 1 - flip) * (flip if b < 0 else 1 - flip)
                table[start, model.state(r, c, (a * dr, b * dc))] += p
    return table


def test_ball_moves_and_bounces():
    model = MovingBall(4, steps=3, flip=0.2).double()
    want = transitions(model, 0.2)
    found = np.zeros_like(want)
    np.put_along_axis(found, model.successors.numpy(), model.log_transition.exp().numpy(), 1)
    np.testing.assert_allclose(found, want, atol=1e-7)
    np.testing.assert_allclose(want.sum(1), 1.0)
    np.testing.assert_allclose(want.sum(0), 1.0)  # the uniform law stays uniform


def test_ball_states_and_positions():
    model = MovingBall(5, steps=2)
    places = list(itertools.product(range(5), range(5), (-1, 1), (-1, 1)))
    states = [model.state(row, column, (down, right)) for row, column, down, right in places]
    assert states == list(range(100))
    want = torch.tensor([p[:2] for p in places])
    assert torch.equal(model.position(torch.tensor(states)), want)
    frames = model.predict({"z": torch.tensor(states)}).reshape(-1, 5, 5)
    visible = ~torch.isin(want[:, 1], torch.tensor(model.occluder))
    at = frames[torch.arange(100), want[:, 0], want[:, 1]]
    assert (at[visible] == 1.0).all()
    assert (frames[:, :, list(model.occluder)] == 0.5).all()


def test_ball_likelihood_is_that_of_every_pixel():
    model = MovingBall(4, steps=3, noise=0.2, occluder=(1,)).double()
    x = model.observations()[:3]
    table = model.chain(x).log_weight
    frames = model.predict({"z": torch.arange(64)})
    want = stats.norm(frames.numpy(), float(model.scale)).logpdf(x[:, :, None].numpy()).sum(-1)
    np.testing.assert_allclose(table, want, rtol=1e-10)


def test_ball_evidence_against_filtering_in_numpy():
    model = MovingBall(4, steps=5, occluder=(2,)).double()
    x = model.observations()[:3]
    weight = np.exp(model.chain(x).log_weight.numpy())
    move = transitions(model, 0.1)
    state, evidence = np.full((3, 64), 1 / 64), 0.0
    for t in range(5):
        state = (state @ move if t else state) * weight[:, t]
        evidence = evidence + np.log(state.sum(1))
        state = state / state.sum(1, keepdims=True)
    np.testing.assert_allclose(model.exact().log_evidence(x), evidence, rtol=1e-6)


def test_ball_observations_begin_behind_the_occluder():
    """They are draws from the joint in another order; the ball crosses in the first two."""
    model = MovingBall()
    z, x = model.simulate(100, seed=0)
    seen = model.observations()
    order = (seen[:, None, 0] == x[:, 0]).all(-1).int().argmax(1)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(x[order], seen)
    for column in model.position(z["z"][order[:2]])[..., 1].tolist():
        assert {3, 4} <= set(column)
        assert (column[0] < 3 and column[-1] > 4) or (column[0] > 4 and column[-1] < 3)


def test_ball_branches_behind_the_occluder():
    """Mean entropies of the path of positions, those of the docstring."""
    model = MovingBall()
    z, x = model.simulate(1000, seed=6)
    column = model.position(z["z"])[..., 1]
    hidden = ((column == 3) | (column == 4)).sum(-1)
    log_q = model.exact().draw(x, draws=50, chains=1, seed=0).stats["log_q"]
    # the velocity after the last frame is free: two Bernoulli(.1)
    last = -2 * (0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    entropy = -log_q.mean((0, 1)) - last
    for found, mean in ((entropy[hidden <= 3], 1.60), (entropy[hidden > 3], 2.44)):
        within(found.mean(), mean, found.std() / math.sqrt(len(found)))
    short, long = entropy[hidden <= 3], entropy[hidden > 3]
    assert long.mean() - short.mean() > 5 * long.std() / math.sqrt(len(long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ball_with_little_noise_is_finite(dtype):
    model = MovingBall(noise=0.5e-3).to(dtype)
    exact = model.exact()
    x = model.observations()[:2]
    for seen in (x, 10 * x):
        z = exact.draw(seen, draws=20, chains=1, seed=0).values
        assert exact.log_evidence(seen).isfinite().all()
        assert exact.log_prob(z, seen).isfinite().all()
