"""Running a circuit: plans, the Langevin engine against closed forms, corrections and weights.

About twenty seconds on an idle core.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from scipy import special
from scipy.stats import wasserstein_distance

import zoo
from diagnostics import METRICS, compare, draw
from inference import (
    BadInput,
    Diverged,
    EnergyReservoir,
    Incompatible,
    ReservoirSampler,
    SamplerOnlyRate,
    Sampling,
)
from inference.langevin import OutputChains, run
from inference.onset import Onset
from inference.sampling import Plan, Step, plan
from inference.seeds import seeded

F64 = torch.float64


def float64(*rows):
    return torch.tensor(rows, dtype=F64)


def small(model, cls=ReservoirSampler, **knobs):
    """A circuit that is fast to build and to run; with tanh stable whatever its weights."""
    sizes = {} if issubclass(cls, SamplerOnlyRate) else {"neurons": 16}
    return cls(
        model, **sizes, **{"hidden": (8,), "noise": (0.1, 5.0), "activation": "tanh"} | knobs
    )


def lively(guide, size=0.3, seed=0):
    """The guide with weights away from their start, so that nothing is zero or one."""
    with torch.no_grad(), seeded(seed):
        for p in guide.parameters():
            p.add_(size * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return guide


@pytest.fixture(scope="module")
def precise():
    """Factor analysis with D = 3 in float64."""
    return zoo.FactorAnalysis(7, 3, seed=1).double()


# ----------------------------------------------------------------------------------------- settings

BAD = [
    ("correction", "mala", r"one of \('none', 'model', 'own'\)"),
    ("record", ("voltages",), r"a tuple out of \('rates', 'spikes'\)"),
    ("record", "rates", r"a tuple out of \('rates', 'spikes'\)"),
    *(("levels", v, "an integer >= 0") for v in (-1, 2.0, True)),
    *(("correctors", v, "an integer >= 0") for v in (-1, None, False)),
    ("warmup", -1, "an integer >= 0"),
    ("per_start", 0, "an integer >= 1"),
    ("thin", 0, "an integer >= 1"),
    *((n, v, "a positive, finite number") for n in ("ratio", "step") for v in (0.0, -1, math.inf)),
    ("step", math.nan, "a positive, finite number"),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_bad_settings_are_refused(name, value, expected):
    message = rf"^{name}: expected {expected}; got {re.escape(repr(value))}\. Sampling\({name}="
    with pytest.raises(BadInput, match=message):
        Sampling(**{name: value})


@pytest.mark.parametrize("correction", ["model", "own"])
def test_settings_that_exclude_each_other_are_refused(correction):
    with pytest.raises(BadInput, match=rf"^path_weights: .*got correction='{correction}'\. Choose"):
        Sampling(correction=correction, path_weights=True)
    for other in ({"correction": correction}, {"path_weights": True}):
        with pytest.raises(BadInput, match=r"^record: expected plain dynamics; got .*cannot take"):
            Sampling(record=("rates",), **other)


def test_settings_that_go_together_are_taken():
    how = Sampling(levels=0, correctors=0, warmup=0, step=1e-3, record=("spikes",), skew=-2.0)
    assert how.levels == 0
    assert Sampling().levels is None


# -------------------------------------------------------------------------------------------- plans


def test_a_plan_goes_down_and_stays_there():
    how = Sampling(levels=6, correctors=2, ratio=0.2, warmup=4, per_start=3, thin=5, step=0.01)
    route = plan(how, 0.1, 8.0)
    transient, rest = route.steps[:18], route.steps[18:]
    assert [s.onward is not None for s in transient] == 6 * [True, False, False]
    assert not any(s.stationary or s.tune for s in transient)
    assert all(s.stationary and s.onward is None and s.sigma == 0.1 for s in rest)
    assert [s.tune for s in rest] == 2 * [True] + 12 * [False]
    assert route.keep == (22, 27, 32)
    assert len(route.steps) == 32
    levels = np.array([transient[0].sigma, *(s.sigma for s in transient[1::3])])
    np.testing.assert_allclose(levels[[0, -1]], [8.0, 0.1], rtol=1e-12)
    gaps = np.diff(levels ** (1 / 7))  # equally spaced in sigma ** (1 / 7)
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)
    np.testing.assert_allclose([s.drift for s in transient[1::3]], 0.2 * levels[1:] ** 2)
    np.testing.assert_allclose([s.drift for s in rest], 0.01)
    langevin = [s for s in route.steps if s.onward is None]
    np.testing.assert_allclose(
        [s.noise for s in langevin], [(2 * s.drift) ** 0.5 for s in langevin]
    )
    assert route.start == pytest.approx(math.sqrt(1 + 8.0**2))
    assert route.time == pytest.approx(sum(s.drift / (1 + s.sigma**2) for s in route.steps))


def test_a_plan_without_a_transient_starts_at_the_guess():
    route = plan(Sampling(levels=0, warmup=0, correctors=3), 0.1, 8.0)
    assert (route.steps, route.keep, route.start, route.time) == ((), (0,), 1.0, 0)
    assert len(plan(Sampling(correctors=0), 0.1, 8.0).steps) == 100 + 10
    assert plan(Sampling(), 0.1, 8.0).steps[-1].drift == pytest.approx(0.15 * 0.1**2)


@pytest.mark.parametrize(
    ("how", "step", "warmup"),
    [({}, 0.05, 100), ({"step": 0.02}, 0.02, 250), ({"ratio": 2.0}, 0.02, 250),
     ({"warmup": 7}, 0.05, 7)],
)  # fmt: skip
def test_without_a_transient_the_guess_is_forgotten(how, step, warmup):
    """By default in five relaxation times, by steps of 5 sigma^2."""
    route = plan(Sampling(levels=0, **how), 0.1, 8.0)
    assert [s.drift for s in route.steps] == pytest.approx([step] * warmup)
    assert route.keep == (warmup,)


def at_a_point(place, sigma):
    """The score of a point mass, blurred: what is left to denoise is known."""
    return lambda y: (place - y) / sigma**2


def test_the_transient_is_exact_for_a_point():
    """The law is Normal(m, sigma^2) at each level, and all ways there weigh the same."""
    place, low, high = 0.7, 0.05, 6.0
    route = plan(Sampling(levels=15, correctors=0, warmup=0), low, high)
    variance = high**2
    for s in route.steps:
        variance = (1 - s.drift / s.sigma**2) ** 2 * variance + s.noise**2
    assert variance == pytest.approx(low**2, rel=1e-12)
    with seeded(0):
        start = place + high * torch.randn(50, 2, 3, dtype=F64)
        chains = OutputChains(start.clone(), lambda s: at_a_point(place, s), weighted=True)
        run(chains, route, lambda k: None, lambda: None)
    normal = torch.distributions.Normal
    there = normal(float64(place), high).log_prob(start).sum(-1)
    back = normal(float64(place), low).log_prob(chains.y).sum(-1) + chains.numbers()["log_path"]
    torch.testing.assert_close(back, there, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------- Gaussians, exactly


def gaussian(precision, place=0.0):
    """Score at every noise level of a Gaussian: what a perfectly trained circuit computes."""
    return lambda sigma: lambda y: (place - y) @ precision


def linear(score, d, step, skew=None):
    """The step of a linear engine as y M' + xi N' + c, read off what it does to unit vectors."""
    eye, none = torch.eye(d, dtype=F64)[:, None], torch.zeros(d, 1, d, dtype=F64)

    def after(y, xi):
        chains = OutputChains(y.clone(), score, skew=skew)
        chains.advance(step, xi)
        return chains.y[:, 0]

    still = after(none, none)
    return (after(eye, none) - still).T, (after(none, eye) - still).T, still[0]


def settled(move, noise):
    """Covariance that the recursion V = M V M' + N N' comes to."""
    covariance = torch.zeros_like(move)
    power, added = move, noise @ noise.T
    for _ in range(60):  # doubling: 2^60 steps
        covariance = covariance + added if not covariance.any() else covariance
        covariance = covariance + power @ covariance @ power.T
        power = power @ power
    return covariance


def langevin(h, sigma=0.1):
    return Step(sigma, h, math.sqrt(2 * h), stationary=True)


STRETCHED = float64([2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5])  # a covariance


@pytest.mark.parametrize("h", [1e-3, 0.05, 0.3])
def test_unadjusted_steps_widen_a_gaussian_as_known(h):
    """The variance v becomes v / (1 - h / 2v), and P becomes P (1 - h P^-1 / 2)^-1."""
    eye, precision = torch.eye(3, dtype=F64), torch.linalg.inv(STRETCHED)
    move, noise, _ = linear(gaussian(precision), 3, langevin(h))
    known = STRETCHED @ torch.linalg.inv(eye - h / 2 * precision)
    torch.testing.assert_close(settled(move, noise), known, rtol=1e-10, atol=1e-10)
    one = linear(gaussian(eye[:1, :1] / 0.7), 1, langevin(h))
    assert settled(*one[:2]).item() == pytest.approx(0.7 / (1 - h / 1.4), rel=1e-10)


def simulate(chains, step, n, seed=0):
    """The states after n equal steps."""
    with seeded(seed), torch.no_grad():
        run(chains, Plan((step,) * n, (n,), 1.0), lambda k: None, lambda: None)
    return chains.y


def test_chains_have_that_variance_and_show_a_wrong_step():
    v, h, n = 0.7, 0.08, 40_000
    score = gaussian(torch.eye(1, dtype=F64) / v)

    def squares(size):
        found = simulate(OutputChains(torch.zeros(n, 1, 1, dtype=F64), score), langevin(size), 100)
        return found.square().flatten()

    good, wrong = squares(h), squares(10 * h)
    known = v / (1 - h / (2 * v))
    within(good.mean(), known, good.std() / n**0.5, k=4)
    within(wrong.mean(), v / (1 - 10 * h / (2 * v)), wrong.std() / n**0.5, k=4)
    with pytest.raises(AssertionError, match="standard errors"):
        within(wrong.mean(), known, wrong.std() / n**0.5, k=4)
    with pytest.raises(AssertionError, match="standard errors"):  # and 6 % of bias are seen
        within(good.mean(), v, good.std() / n**0.5, k=4)


# --------------------------------------------------------------------------------------------- skew


def drift_matrix(precision, skew):
    """A of dy = A y dt + sqrt(2) dB."""
    h = 1e-3
    move = linear(gaussian(precision), len(precision), langevin(h), skew)[0]
    return (move - torch.eye(len(move), dtype=F64)) / h


@pytest.mark.parametrize("strength", [0.5, -3.0])
def test_skew_dynamics_keep_the_law(precise, strength):
    """A P + P A' + 2 I = 0 with the circuit's own skew matrix, whatever the covariance P."""
    turn = small(precise).turn
    torch.testing.assert_close(turn, -turn.T, rtol=0, atol=0)
    assert torch.linalg.matrix_norm(turn, 2).item() == pytest.approx(1.0)
    a = drift_matrix(torch.linalg.inv(STRETCHED), strength * turn)
    eye = torch.eye(3, dtype=F64)
    left = a @ STRETCHED + STRETCHED @ a.T + 2 * eye
    torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-10)
    assert (a - a.T).abs().max() > 0.1
    lopsided = strength * (turn + 0.1 * eye)  # not skew: the law moves
    a = drift_matrix(torch.linalg.inv(STRETCHED), lopsided)
    assert (a @ STRETCHED + STRETCHED @ a.T + 2 * eye).abs().max() > 0.05


def test_skew_chains_have_the_same_covariance(precise):
    n, h = 4000, 4e-3
    turn = 2.0 * small(precise).turn
    precision = torch.linalg.inv(STRETCHED)
    start = torch.zeros(n, 1, 3, dtype=F64)
    y = simulate(OutputChains(start, gaussian(precision), skew=turn), langevin(h), 1000)[:, 0]
    move, noise, _ = linear(gaussian(precision), 3, langevin(h), turn)
    known = settled(move, noise)
    assert (known - STRETCHED).abs().max() < 0.05  # what the steps add
    products = y[:, :, None] * y[:, None]
    within(products.mean(0), known, products.std(0) / n**0.5)


def test_skew_moves_faster_on_a_narrow_ridge():
    """Of a Gaussian with variances 1 and .01: the slow direction is turned into the fast one."""
    h, n, lag = 1e-4, 20_000, 2000
    precision, turn = float64([1.0, 0.0], [0.0, 100.0]), float64([0.0, 6.0], [-6.0, 0.0])
    memory = {}
    for name, skew in (("none", None), ("skew", turn)):
        move, noise, _ = linear(gaussian(precision), 2, langevin(h), skew)
        slowest = torch.linalg.eigvals(move).abs().max()
        covariance = settled(move, noise)
        later = torch.linalg.matrix_power(move, lag) @ covariance
        memory[name] = (slowest, (later[0, 0] / covariance[0, 0]).item())
    time = {name: -1 / math.log(slowest) for name, (slowest, _) in memory.items()}
    assert time["none"] == pytest.approx(1 / h, rel=1e-3)
    assert time["skew"] < time["none"] / 20
    assert memory["none"][1] == pytest.approx((1 - h) ** lag)
    assert abs(memory["skew"][1]) < 0.05
    # simulated, from states of the law
    sds = float64(1.0, 0.1)
    with seeded(1):
        start = sds * torch.randn(n // 10, 1, 2, dtype=F64)
    y = simulate(OutputChains(start.clone(), gaussian(precision), skew=turn), langevin(h), lag)
    product = (start * y)[:, 0, 0]
    within(product.mean(), memory["skew"][1], product.std() / (n // 10) ** 0.5)
    with pytest.raises(AssertionError, match="standard errors"):
        within(product.mean(), memory["none"][1], product.std() / (n // 10) ** 0.5)


def test_circuits_use_their_skew(precise):
    guide, x = lively(small(precise)), precise.observations()[:2]
    draws = {}
    for skew in (0.0, 1.0, -1.0):
        guide.sampling = Sampling(levels=5, warmup=20, step=0.05, skew=skew)
        draws[skew] = guide.draw(x, draws=3, chains=1, seed=0).values["z"]
    assert not torch.allclose(draws[0.0], draws[1.0])
    assert not torch.allclose(draws[-1.0], draws[1.0])


# ------------------------------------------------------------------------------------------- mixing

TABLE = {0.5: (0.347, 0.238, 0.201), 0.3: (0.440, 0.395, 0.260), 0.25: (0.476, 0.473, 0.436)}
TIMES, STEP, CHAINS = (1, 5, 20), 2e-3, 4000


def bimodal_drift(y, sd, weight):
    """Score of a mixture of two Normals at -1 and 1; `weight` of the one at 1."""
    half = 0.5 * math.log(weight / (1 - weight))
    return ((y / sd**2 + half).tanh() - y) / sd**2


def left_mass(sd, weight=0.8, times=TIMES):
    """Share of chains below zero at each time, from a uniform start on (-2, 2)."""
    keep = tuple(round(t / STEP) for t in times)
    route = Plan((langevin(STEP),) * keep[-1], keep, 1.0)
    found = []
    with seeded(0), torch.no_grad():
        start = 4 * torch.rand(CHAINS, 1, 1) - 2
        chains = OutputChains(start, lambda s: lambda y: bimodal_drift(y, sd, weight))
        run(chains, route, lambda k: found.append((chains.y < 0).double().mean()), lambda: None)
    return np.array(found)


def exact_left_mass(sd, weight=0.8, times=TIMES):
    """The same of the law itself: the transition density on a grid, and its powers."""
    y = torch.linspace(-4, 4, 801, dtype=F64)
    mean = y + STEP * bimodal_drift(y, sd, weight)
    kernel = (-(y - mean[:, None]).square() / (4 * STEP)).softmax(-1)
    start = (y.abs() < 2).double()
    below = (y < 0).double() + 0.5 * (y == 0)
    powers = [torch.linalg.matrix_power(kernel, round(t / STEP)) for t in times]
    return np.array([(start / start.sum() @ p @ below).item() for p in powers])


@pytest.mark.parametrize("sd", TABLE)
def test_modes_exchange_mass_as_slowly_as_known(sd):
    """The exact score is no help: with modes of sd .25, a time of 20 is not enough by far."""
    found, law = left_mass(sd), exact_left_mass(sd)
    np.testing.assert_allclose(found, TABLE[sd], atol=0.03)
    np.testing.assert_allclose(law, TABLE[sd], atol=0.03)
    se = np.sqrt(law * (1 - law) / CHAINS)
    within(found, law, se)
    with pytest.raises(AssertionError, match="standard errors"):  # another time is told from it
        within(found[0], law[2], se[2])
    truth = 0.8 * special.ndtr(-1 / sd) + 0.2 * special.ndtr(1 / sd)
    assert (abs(law[2] - truth) < 0.03) == (sd == 0.5)


# ----------------------------------------------------------------------------------- two exact sets


def test_two_exact_sets():
    """What no sampler can beat: C2ST of a half, and the distance of two sets of 2,000 draws."""
    model = zoo.Bimodal((0.5, 0.5))
    x, exact = model.observations()[:1], model.exact()
    z = exact.draw(x, draws=2000, chains=40, seed=0).values["z"][..., 0].numpy()
    distances = np.array([wasserstein_distance(a, b) for a, b in zip(z[::2], z[1::2], strict=True)])
    within(distances.mean(), 0.040, distances.std() / 20**0.5 + 5e-4)
    assert wasserstein_distance(z[0], z[1] + 0.15) > distances.max()
    chosen = {"c2st": METRICS["c2st"]}
    c2st = compare(model, {"again": exact}, x, draws=1000, chains=2, seed=0, metrics=chosen).value
    assert float(c2st.sel(guide="again", metric="c2st")[0]) == pytest.approx(0.5, abs=0.03)


# ------------------------------------------------------------------------------------- path weights


def log_weights(guide, x, draws, seed=0):
    """log p(x, z) less log q of the whole path, (draws, B)."""
    found = guide.draw(x, draws=draws, chains=1, seed=seed)
    with torch.no_grad():
        return (guide.latents.log_joint(found.values, x) - found.stats["log_q"])[0]


def log_evidence(model, x):
    with torch.no_grad():
        return model.exact().log_evidence(x)


WEIGHTED = {
    "factor analysis": (lambda: zoo.FactorAnalysis(7, 3, seed=1), {}),
    "explaining away": (lambda: zoo.ExplainingAway(2), {}),
    "mixture": (zoo.GaussianMixtureLatents, {}),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_without_a_path_are_those_of_the_guess(name):
    """Importance sampling from the linear guess, to rounding."""
    model = WEIGHTED[name][0]().double()
    guide, x = lively(small(model)), model.observations()[:3]
    guide.sampling = Sampling(levels=0, warmup=0, path_weights=True)
    found = guide.draw(x, draws=20, chains=2, seed=0)
    mean = guide.whitening.mean(guide.standard(x))
    guess = torch.distributions.MultivariateNormal(mean, scale_tril=guide.whitening.root)
    u, log_jacobian = guide.latents.pack(found.values)
    known = guess.log_prob(u) - log_jacobian
    torch.testing.assert_close(found.stats["log_q"], known, rtol=0, atol=1e-10)
    assert set(found.stats) == {"log_q"}


def test_weights_of_constrained_latents_know_their_jacobian():
    """u = log z: the evidence comes out right only with log |dz/du|."""
    model = zoo.SquareRoot().double()
    positive = zoo.from_pyro(rate, float64(0.0, 2.0, 5.0), exact=zoo.Quadrature)
    for m in (model, positive):
        guide, x = small(m), m.observations()[:3]
        guide.sampling = Sampling(levels=0, warmup=4, step=0.05, path_weights=True)
        weights = (log_weights(guide, x, 4000) - log_evidence(m, x)).exp()
        within(weights.mean(0), 1.0, weights.std(0) / 4000**0.5, k=4)


PATHS = {
    "guess": Sampling(levels=0, warmup=0, path_weights=True),
    "stationary": Sampling(levels=0, warmup=10, step=0.03, path_weights=True),
    "skew": Sampling(levels=0, warmup=10, step=0.01, skew=1.0, path_weights=True),
    "transient": Sampling(levels=60, correctors=0, warmup=0, path_weights=True),
    "both": Sampling(levels=60, correctors=1, warmup=3, path_weights=True),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_mean_weight_is_the_evidence(name, path):
    """E w = p(x) and E log w <= log p(x) for an untrained circuit, whatever its path."""
    model, n = WEIGHTED[name][0]().double(), 2000
    guide, x = small(model), model.observations()[:3]
    guide.sampling = PATHS[path]
    log_w = log_weights(guide, x, n) - log_evidence(model, x)
    within(log_w.exp().mean(0), 1.0, log_w.exp().std(0) / n**0.5, k=4)
    assert (log_w.mean(0) < 3 * log_w.std(0) / n**0.5).all()


def test_a_wrong_way_back_is_noticed(precise, monkeypatch):
    """The way there taken for the way back, which is no density of the earlier states."""
    guide, x, n = small(precise), precise.observations()[:3], 2000
    guide.sampling = Sampling(levels=0, warmup=10, step=0.03, path_weights=True)

    def forth(chains, step, before):
        after, chains.y = chains.y, before
        e = (after - before - step.drift * chains._direction(step)) / step.noise
        chains.y = after
        return -0.5 * e.square().sum(-1) - e.shape[-1] * math.log(step.noise)

    monkeypatch.setattr(OutputChains, "_back", forth)
    wrong = (log_weights(guide, x, n) - log_evidence(precise, x)).exp()
    with pytest.raises(AssertionError, match="standard errors"):
        within(wrong.mean(0), 1.0, wrong.std(0) / n**0.5)


def test_paths_of_small_steps_tell_the_ratio_of_densities():
    """log p(y_K) + log path - log p(y_0) goes to zero with the step, at a fixed time."""
    density = torch.distributions.Normal(float64(0.3), 0.8)
    score = gaussian(torch.eye(1, dtype=F64) / 0.64, 0.3)
    left = []
    for h in (1e-2, 1e-3):
        with seeded(3):
            start = density.sample((400, 1, 1))
        chains = OutputChains(start.clone(), score, weighted=True)
        y = simulate(chains, langevin(h), round(1 / h))
        rest = density.log_prob(y) - density.log_prob(start)
        left.append((rest[..., 0] + chains.numbers()["log_path"]).std().item())
    assert left[0] < 0.05
    assert left[1] < 0.2 * left[0]


# --------------------------------------------------------------------------------------- Metropolis


def corrected(h, score, steps, n=20_000, v=0.7, tune=0):
    """Chains in a Gaussian of variance v, corrected by its density."""
    with seeded(2), torch.no_grad():
        chains = OutputChains(
            v**0.5 * torch.randn(n, 1, 1, dtype=F64), score,
            target=lambda y: -0.5 * y[..., 0].square() / v,
        )  # fmt: skip
        first = Step(0.1, h, math.sqrt(2 * h), stationary=True, tune=True)
        route = Plan((first,) * tune + (langevin(h),) * steps, (tune + steps,), 1.0)
        run(chains, route, lambda k: None, lambda: None)
    return chains


def test_small_steps_are_accepted():
    v = 0.7
    score = gaussian(torch.eye(1, dtype=F64) / v)
    rates = [corrected(h * v, score, 20).numbers()["acceptance"].mean() for h in (1e-3, 0.1, 1.0)]
    assert rates[0] > 0.99
    assert rates[0] > rates[1] > rates[2] > 0.3


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_corrected_chains_are_unbiased_at_any_step(factor):
    """Also with a drift that is wrong; uncorrected chains with the same step are not."""
    v, h = 0.7, 0.6
    score = gaussian(factor * torch.eye(1, dtype=F64) / v)
    good = corrected(h, score, 30).y.square().flatten()
    plain = simulate(OutputChains(torch.zeros(20_000, 1, 1, dtype=F64), score), langevin(h), 60)
    bad = plain.square().flatten()
    within(good.mean(), v, good.std() / len(good) ** 0.5, k=4)
    with pytest.raises(AssertionError, match="standard errors"):
        within(bad.mean(), v, bad.std() / len(bad) ** 0.5)


def test_steps_are_tuned_before_the_first_draw_and_fixed_after_it():
    score = gaussian(torch.eye(1, dtype=F64) / 0.7)
    chains = corrected(1e-3, score, 200, n=500, tune=60)
    assert chains.numbers()["acceptance"].mean() == pytest.approx(0.574, abs=0.03)
    assert chains.tried == 200
    assert chains.size.item() > 100  # a thousand times too small, it was
    late = 200 * chains.size.item() * langevin(1e-3).time
    assert late < chains.time < 1.3 * late  # what was run, not what was asked for
    size = chains.size.clone()
    with seeded(0):
        chains.advance(langevin(1e-3), torch.zeros_like(chains.y))
    assert torch.equal(chains.size, size)


def rate(x):
    """A firing rate behind a spike count: a positive latent."""
    with pyro.plate("data", len(x)):
        r = pyro.sample("r", dist.Gamma(x.new_tensor(2.0), 0.5))
        pyro.sample("x", dist.Poisson(r), obs=x)


@pytest.mark.parametrize("model", ["explaining away", "rate"])
def test_correction_by_the_model_makes_any_circuit_exact(model):
    """A circuit that has learned nothing, and a step with which it is far off by itself."""
    if model == "rate":
        model = zoo.from_pyro(rate, float64(0.0, 2.0, 5.0), exact=zoo.Quadrature)
        low, high = 0.05, 0.95
    else:
        model = zoo.ExplainingAway(2).double()
        low, high = 0.1, 0.8
    n, x = 2000, model.observations()[:3]
    guide = lively(small(model, noise=(0.3, 5.0)))
    exact = model.exact().draw(x, draws=20 * n, chains=1, seed=1).values
    name = guide.latents.names[0]
    truth = exact[name][0].reshape(20 * n, -1)
    levels = float64(low, 0.5, high)
    marks = torch.quantile(truth, levels, dim=0)

    def misses(how):
        guide.sampling = how
        z = guide.draw(x, draws=n, chains=1, seed=2).values[name][0].reshape(n, -1)
        return (z < marks[:, None]).double().mean(1) - levels[:, None]

    se = (levels * (1 - levels) * (1 / n + 1 / (20 * n))).sqrt()[:, None]
    settings = {"levels": 0, "warmup": 150, "step": 0.5}
    within(misses(Sampling(**settings, correction="model")), 0.0, se)
    assert (misses(Sampling(**settings)).abs() > 5 * se).any()


@pytest.mark.parametrize("activation", ["relu", "tanh", "squareplus"])
def test_correction_by_its_own_potential_gives_the_density_it_names(activation):
    """Against quadrature of exp(potential), which uncorrected steps of that size miss."""
    model, n = zoo.Bimodal().double(), 2000
    guide = small(model, EnergyReservoir, activation=activation, noise=(0.5, 5.0))
    lively(guide.input)
    x = model.observations()[:1]
    grid = torch.linspace(-12, 12, 4001, dtype=F64)
    with torch.no_grad(), seeded(5):  # neurons that add less curvature than the leak has
        curvature = guide.inward.square().sum(-1) * guide.neurons**0.5
        guide.strength.copy_(0.25 * torch.randn(guide.neurons) / curvature)
        p = guide.potential(grid[:, None, None], guide.lowest(x))[:, 0].softmax(0)
    cumulative = p.cumsum(0) - p / 2

    def distance(how):
        guide.sampling = how
        z = guide.draw(x, draws=n, chains=1, seed=2).values
        y = guide.whiten(z, x)[0, :, 0, 0].sort().values.detach().numpy()
        return np.abs(np.interp(y, grid, cumulative) - (np.arange(n) + 0.5) / n).max()

    limit = 2.0 / n**0.5  # Kolmogorov and Smirnov's, at a level of .0007
    assert distance(Sampling(levels=0, warmup=150, step=0.8, correction="own")) < limit
    assert distance(Sampling(levels=0, warmup=150, step=1.6)) > limit


def test_circuits_without_a_potential_cannot_be_corrected_by_it(precise):
    guide = small(precise)
    guide.sampling = Sampling(correction="own", levels=3)
    with pytest.raises(Incompatible, match=r"^ReservoirSampler: .*Use EnergyReservoir, or corr"):
        guide.draw(precise.observations()[:2], draws=1, chains=1, seed=0)


def test_acceptance_is_told_for_each_draw(precise):
    guide, x = small(precise, EnergyReservoir), precise.observations()[:2]
    for correction in ("model", "own"):
        how = Sampling(correction=correction, levels=3, warmup=80, step=0.3, per_start=30, thin=2)
        guide.sampling = how
        stats = guide.draw(x, draws=30, chains=20, seed=0).stats
        assert set(stats) == {"acceptance"}
        assert stats["acceptance"].shape == (20, 30, 2)
        last = stats["acceptance"][:, -1]
        assert ((last > 0) & (last < 1)).all()
        assert last.mean() == pytest.approx(0.574, abs=0.15)


def test_acceptance_is_told_where_each_draw_has_its_own_onset(precise):
    """All steps are warm-up then, and many of them are taken."""
    guide, x = small(precise), precise.observations()[:2]
    guide.sampling = Sampling(correction="model", levels=0, warmup=40, step=0.3)
    stats = guide.draw(x, draws=30, chains=20, seed=0).stats
    assert not (stats["acceptance"] == 0).all()


# -------------------------------------------------------------------------------------- bookkeeping


@pytest.fixture(scope="module")
def neutral():
    """A circuit of one latent that has learned nothing: its score is -y / v with v = 2."""
    model = zoo.Bimodal().double()
    guide = small(model, noise=(1.0, 5.0))
    with torch.no_grad():
        guide.outward.zero_()
    return guide, model.observations()[:1]


def outputs(guide, x, how, **sizes):
    guide.sampling = how
    return guide.whiten(guide.draw(x, seed=4, **sizes).values, x)[..., 0, 0].detach()


@pytest.mark.parametrize("warmup", [0, 3, 40])
def test_warm_up_is_as_long_as_it_says(neutral, warmup):
    h, v, n = 0.2, 2.0, 20_000
    y = outputs(*neutral, Sampling(levels=0, warmup=warmup, step=h), draws=n, chains=1).flatten()
    limit = v / (1 - h / (2 * v))
    known = limit + (1 - h / v) ** (2 * warmup) * (1 - limit)
    within(y.square().mean(), known, y.square().std() / n**0.5)
    assert abs(known - limit) > 0.1 or warmup == 40


@pytest.mark.parametrize("thin", [1, 6])
def test_draws_of_one_onset_are_thin_steps_apart(neutral, thin):
    h, v, n = 0.2, 2.0, 10_000
    how = Sampling(levels=0, warmup=60, step=h, per_start=3, thin=thin)
    y = outputs(*neutral, how, draws=3 * n, chains=1).reshape(n, 3)
    limit = v / (1 - h / (2 * v))
    for lag in (1, 2):
        product = y[:, 0] * y[:, lag] / limit
        within(product.mean(), (1 - h / v) ** (lag * thin), product.std() / n**0.5)
    product = y[1:, 0] * y[:-1, 2] / limit  # the next onset is another matter
    within(product.mean(), 0.0, product.std() / n**0.5)


def test_onsets_fill_chains_one_after_the_other(neutral):
    guide, x = neutral
    how = Sampling(levels=2, correctors=0, warmup=1, per_start=3, step=1e-14)
    long, short = (outputs(guide, x, how, draws=n, chains=2) for n in (9, 7))
    assert long.shape == (2, 9)
    assert torch.equal(long[:, :7], short)  # three onsets for either
    groups = long.reshape(6, 3)
    assert groups.diff(dim=1).abs().max() < 1e-4  # steps of no length
    assert groups[:, 0].sort().values.diff().min() > 1e-3


def test_simulated_time_is_that_of_all_onsets(neutral):
    guide, x = neutral
    guide.sampling = Sampling(levels=4, warmup=2, per_start=3, step=0.1)
    once = plan(guide.sampling, *guide.noise).time
    for draws, onsets in ((1, 1), (3, 1), (4, 2)):
        found = guide.draw(x, draws=draws, chains=5, seed=0)
        assert found.time_constants == pytest.approx(5 * onsets * once)


def test_simulated_time_is_that_of_steps_as_they_were_tuned(precise, monkeypatch):
    """On average over problems, of which each has a step of its own."""
    guide, x = small(precise), precise.observations()[:2]
    guide.sampling = Sampling(levels=3, warmup=40, step=0.02, correction="model", per_start=3)
    sizes, metropolis = [], OutputChains._metropolis

    def watched(chains, step, *rest):
        sizes.append(chains.size.clone())
        metropolis(chains, step, *rest)

    monkeypatch.setattr(OutputChains, "_metropolis", watched)
    monkeypatch.setattr("inference.guides.score_circuit.CELLS", 4 * 2 * guide.neurons)
    found = guide.draw(x, draws=6, chains=5, seed=0).time_constants
    route = plan(guide.sampling, *guide.noise)
    still = [s for s in route.steps if s.stationary]
    assert len(sizes) == 3 * len(still)  # ten onsets, four at a time
    before = route.time - sum(s.time for s in still)
    parts = [n * sum(float(size.mean()) for size in sizes[k * len(still) : (k + 1) * len(still)])
             for k, n in enumerate((4, 4, 2))]  # fmt: skip
    assert found == pytest.approx(10 * before + still[0].time * sum(parts))
    assert found > 1.5 * 10 * route.time
    assert not torch.allclose(sizes[-1][0], sizes[-1][1])


def test_draws_are_independent_where_each_has_an_onset(neutral):
    guide, _ = neutral
    guide.sampling = Sampling(per_start=2)
    assert not guide.independent
    guide.sampling = Sampling()
    assert guide.independent


def close_by(x):
    """A latent that x all but tells."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.5), 2.0))
        pyro.sample("x", dist.Normal(z, 0.05), obs=x)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunks_do_not_mix_problems(monkeypatch, rows):
    model = zoo.from_pyro(close_by, float64(-3.0, 0.2, 4.0))
    guide, x = small(model), model.observations()
    guide.sampling = Sampling(levels=20, per_start=2)
    monkeypatch.setattr("inference.guides.score_circuit.CELLS", rows * 3 * guide.neurons)
    ran = []
    inside = Onset.run
    monkeypatch.setattr(
        Onset, "run", lambda self, n, advance: (ran.append(n), inside(self, n, advance))[1]
    )
    z = guide.draw(x, draws=9, chains=4, seed=0).values["z"]
    assert z.shape == (4, 9, 3)
    assert sum(ran) == 4 * 5
    assert max(ran) == min(rows, 20)
    assert ((z - x).abs() < 0.5).all()  # ten of its sds
    assert len(z.unique()) == z.numel()
    alone = guide.draw(x[1:2], draws=9, chains=4, seed=0).values["z"]
    assert ((alone - x[1]).abs() < 0.5).all()


def test_draws_depend_on_the_seed_alone(precise):
    guide, x = lively(small(precise)), precise.observations()[:2]
    for how in (
        Sampling(levels=5),
        Sampling(levels=5, correction="model", per_start=2),
        Sampling(levels=5, record=("rates", "spikes")),
        Sampling(levels=5, path_weights=True),
    ):
        guide.sampling = how
        one = guide.draw(x, draws=3, chains=2, seed=1)
        with seeded(99):  # whatever the global generator holds
            two = guide.draw(x, draws=3, chains=2, seed=1)
        for kind in ("values", "stats", "circuit"):
            mine, theirs = getattr(one, kind), getattr(two, kind)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(v, theirs[n]) for n, v in mine.items())
        other = guide.draw(x, draws=3, chains=2, seed=2)
        assert not torch.equal(one.values["z"], other.values["z"])


# ---------------------------------------------------------------------------------- one noise level


class Perfect(SamplerOnlyRate):
    """A circuit whose score is the model's own, at the one noise level that it knows."""

    seen = None

    def at(self, y, level, work=None):
        """The gradient of log p(x, y)."""
        with torch.enable_grad():
            here = y.detach().requires_grad_()
            height = self.latents.log_density(self.unwhiten(here, self.seen), self.seen)
            return torch.autograd.grad(height.sum(), here)[0]


def test_a_circuit_of_one_noise_level_leaves_the_linear_guess():
    """log z of a Gamma posterior: off the guess, and skewed; with the default sampling."""
    model = zoo.from_pyro(rate, float64(0.0, 2.0, 9.0))
    guide, x, n = small(model, Perfect, noise=(0.05, 5.0)), model.observations(), 2000
    guide.seen = x
    guide.single_level.fill_(True)
    mean, variance = (special.polygamma(k, 2 + x.numpy()) for k in (0, 1))
    mean = mean - math.log(1.5)

    def check():
        tree = draw(model, guide, x, draws=n, chains=1, seed=0)
        assert (METRICS["ess"].compute(tree, tree).value > 0.8 * n).all()
        u = np.log(tree["posterior"]["r"].values[0])
        within(u.mean(0), mean, u.std(0) / n**0.5)
        squares = (u - mean) ** 2
        within(squares.mean(0), variance, squares.std(0) / n**0.5)

    check()
    for short in (Sampling(warmup=0), Sampling(step=6e-5, warmup=10)):
        guide.sampling = short
        with pytest.raises(AssertionError, match="standard errors"):
            check()


# --------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("cls", [ReservoirSampler, EnergyReservoir, SamplerOnlyRate])
def test_too_long_a_step_is_told_what_would_do(precise, cls):
    guide, x = lively(small(precise, cls), 0.1), precise.observations()[:2]
    guide.sampling = Sampling(levels=5, warmup=200, step=40.0)
    message = r"^Langevin chains: expected states within 10000 sds of the linear guess; got \d+ of "
    with pytest.raises(Diverged, match=message) as caught:
        guide.draw(x, draws=5, chains=2, seed=0)
    advice = re.search(r"finite\. Use Sampling\(step=(\S+)\); it was 40\.$", str(caught.value))
    assert advice, caught.value
    step = float(advice[1])
    assert 1e-3 < step < 40
    guide.sampling = Sampling(levels=5, warmup=200, step=step)
    z = guide.draw(x, draws=50, chains=2, seed=0).values["z"]
    assert torch.isfinite(z).all()
    assert z.abs().max() < 50


def test_a_score_that_leads_away_is_told_from_too_long_a_step(precise):
    guide, x = small(precise, activation="relu"), precise.observations()[:2]
    with torch.no_grad():
        guide.outward.copy_(0.1 * guide.inward.T)  # positive feedback, far above the leak
    guide.sampling = Sampling(levels=0, warmup=3000, step=0.01)
    with pytest.raises(Diverged, match=r"finite\. The steps are short enough: .*Train longer"):
        guide.draw(x, draws=5, chains=2, seed=0)


def test_states_that_are_no_numbers_are_noticed(precise):
    guide, x = small(precise), precise.observations()[:2]
    with torch.no_grad():
        guide.outward[0, 0] = math.nan
    guide.sampling = Sampling(levels=3)
    with pytest.raises(Diverged, match=r"20 of 20 chains beyond, or not finite"):
        guide.draw(x, draws=5, chains=2, seed=0)
