"""Signatures on synthetic circuits whose answers are known; about 10 s."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray
from conftest import within
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

import diagnostics
import inference
import zoo
from diagnostics import plot_signatures, signatures
from diagnostics.signature_fits import fit_slope, long_run_variance, rank_correlation
from diagnostics.synapses import MECHANISMS, predicted_slope, synaptic_variance
from inference.errors import BadInput

C, T, B, N = 4, 1000, 3, 5  # chains, draws, problems, neurons


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def circuit(**arrays):
    """A tree as `diagnostics.draw` makes it, from arrays (chain, draw, problem, ...)."""
    variables = {}
    for name, a in arrays.items():
        more = [f"{name}_dim_{k}" for k in range(np.ndim(a) - 3)]
        variables[name] = (["chain", "draw", "problem", *more], a)
    return xarray.DataTree.from_dict({"circuit": xarray.Dataset(variables)})


def rng(seed=0):
    return np.random.default_rng(seed)


def autoregressive(shape, phi, seed=0):
    """Unit variance, autocorrelation phi^lag along the second axis."""
    z = rng(seed).normal(size=shape)
    z[:, 1:] *= math.sqrt(1 - phi**2)
    for t in range(1, shape[1]):
        z[:, t] += phi * z[:, t - 1]
    return z


# fits


def test_slope_is_that_of_least_squares():
    x = rng().normal(size=40)
    y = 3 - 2 * x + rng(1).normal(size=40)
    found = fit_slope(x, y, seed=0)
    slope, intercept = np.polyfit(x, y, 1)
    np.testing.assert_allclose([found.value, found.intercept], [slope, intercept])
    np.testing.assert_allclose(found.r, np.corrcoef(x, y)[0, 1])
    again = fit_slope(x, y, seed=0)
    assert again == found
    assert fit_slope(x, y, seed=1).low != found.low


@pytest.mark.parametrize("units", [1, 8])
def test_interval_of_a_slope_covers(units):
    """300 experiments of 30 points: of 95 % intervals at least 90 % cover; units are no worse."""
    covered = []
    for k in range(300):
        g = rng(k)
        x = g.uniform(size=30)
        y = 1 + 0.5 * x[:, None] + g.normal(size=(30, units)) + g.normal(size=units)
        found = fit_slope(x, y, resamples=300, seed=k)
        covered.append(found.low < 0.5 < found.high)
    assert np.mean(covered) > 0.9 - 5 * math.sqrt(0.09 / 300)


def test_errors_of_slopes_are_the_spread_of_repeats():
    slopes, errors = [], []
    for k in range(200):
        x = rng(k).normal(size=50)
        found = fit_slope(x, 0.5 * x + rng(k + 1000).normal(size=50), resamples=300, seed=k)
        slopes.append(found.value)
        errors.append(found.se)
    assert 0.8 < np.mean(errors) / np.std(slopes) < 1.25


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    x = rng().normal(size=30)
    y = np.exp(x) + rng(1).normal(size=30)
    found = rank_correlation(x, y, seed=0)
    np.testing.assert_allclose(found.value, spearmanr(x, y).statistic)
    assert found.low < found.value < found.high
    np.testing.assert_allclose(rank_correlation(x, x**3, seed=0).value, 1.0)
    assert math.isnan(rank_correlation(x, np.ones(30), seed=0).value)


@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_long_run_variance(phi):
    found = long_run_variance(autoregressive((4, 2000, 200), phi))
    truth = (1 + phi) / (1 - phi)
    assert 0.85 * truth < found.mean() < 1.05 * truth  # Bartlett's bias: below, about 5 %


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.arange(6), np.arange(7), "one for each y"),
        (np.arange(4), np.arange(4), "at least 5"),
        (np.ones(6), np.arange(6), "values that differ"),
        (np.arange(6), np.full(6, np.nan), "6 of 6"),
    ],
)
def test_fits_refuse(x, y, message):
    for fit in (fit_slope, rank_correlation):
        with pytest.raises(BadInput, match=message):
            fit(x, y, seed=0)


def test_fits_refuse_knobs():
    x = np.arange(6.0)
    with pytest.raises(BadInput, match="level"):
        fit_slope(x, x, level=95, seed=0)
    with pytest.raises(BadInput, match="resamples"):
        fit_slope(x, x, resamples=0, seed=0)
    with pytest.raises(BadInput, match="seed"):
        fit_slope(x, x, seed=-1)


# counts


@pytest.mark.parametrize("window", [1, 10])
def test_fano_factor_of_poisson_counts(window):
    rates = np.array([0.1, 0.5, 1.0, 3.0, 0.02])
    found = signatures.fano_factor(
        circuit(spikes=rng().poisson(rates, (C, T, B, N))), window=window
    )
    within(found.value, 1.0, found.se)
    np.testing.assert_allclose(found["mean"].mean("problem"), window * rates, rtol=0.25)
    assert found.attrs["reason"] == ""


def test_fano_factor_of_negative_binomial_counts():
    """Mean m and variance m + m^2 / k: Poisson is rejected."""
    k, m = 2.0, 3.0
    spikes = rng().negative_binomial(k, k / (k + m), (C, T, B, N))
    found = signatures.fano_factor(circuit(spikes=spikes), window=1)
    within(found.value, 1 + m / k, found.se)
    assert (found.value - 1 > 5 * found.se).all()


def test_error_of_the_fano_factor_knows_slow_rates():
    """Counts whose rate wanders over many windows: errors match the spread over problems."""
    rate = np.exp(0.5 * autoregressive((4, 1000, 150, 1), 0.7))
    found = signatures.fano_factor(circuit(spikes=rng(1).poisson(rate)), window=1)
    assert 0.75 < float(found.se.mean()) / float(found.value.std()) < 1.25


def test_error_of_the_fano_factor_of_rare_spikes():
    """In 400 steps at .01 spikes a step two rarely coincide; that is no evidence against it."""
    spikes = rng(8).poisson(0.01, (1, 400, 500, 1))
    found = signatures.fano_factor(circuit(spikes=spikes), window=1)
    seen = found.value.notnull()
    assert (spikes.max((0, 1)) < 2).mean() > 0.9
    z = (found.value - 1) / found.se
    assert float((abs(z.where(seen)) > 3).mean()) < 0.05
    counts = found["mean"] * 400
    assert bool((seen == (counts > 0)).all())


def test_fano_factor_of_regular_spikes_and_silence():
    spikes = np.zeros((2, 100, 1, 2))
    spikes[:, ::5, :, 0] = 1
    found = signatures.fano_factor(circuit(spikes=spikes), window=10)
    assert found.value.values[0, 0] == found.se.values[0, 0] == 0
    assert np.isnan(found.value.values[0, 1])
    assert np.isnan(found.se.values[0, 1])
    assert found.attrs["reason"] == "the neuron was silent"


# correlations


def correlated(r, phi=0.0):
    """Three neurons, correlations r between the first two, none with the third."""
    z = autoregressive((C, T, 40, 3), phi)
    z[..., 1] = r * z[..., 0] + math.sqrt(1 - r**2) * z[..., 1]
    return z


@pytest.mark.parametrize(("r", "phi"), [(0.6, 0.0), (-0.3, 0.0), (0.4, 0.8)])
def test_noise_correlations(r, phi):
    z = correlated(r, phi) + np.arange(40)[:, None]  # signals do not matter
    found = signatures.noise_correlations(circuit(rates=z), quantity="rates")
    assert found.value.dims == ("problem", "pair")
    assert list(zip(found.first.values, found.second.values, strict=True)) == [
        (0, 1), (0, 2), (1, 2)
    ]  # fmt: skip
    within(found.value, [r, 0.0, 0.0], found.se)
    assert (abs(found.value[:, 0]) > 5 * found.se[:, 0]).all()  # no correlation is rejected
    ratio = found.se.mean("problem") / found.value.std("problem", ddof=1)
    assert ((ratio > 0.6) & (ratio < 1.7)).all()


def test_noise_correlations_of_windows():
    """Sums of spikes that share a slow source: longer windows see more of it."""
    shared = np.repeat(rng().poisson(0.5, (4, 100, 1, 1)), 10, axis=1)
    spikes = shared + rng(1).poisson(5.0, (4, 1000, 1, 2))
    short, long = (signatures.noise_correlations(circuit(spikes=spikes), window=w) for w in (1, 10))
    within(short.value, 0.5 / 5.5, short.se)
    within(long.value, 50 / (50 + 50), long.se)


def test_signal_correlations():
    means = rng().normal(size=(400, 3))
    means[:, 1] = 0.5 * means[:, 0] + math.sqrt(0.75) * means[:, 1]
    z = means + 0.01 * rng(1).normal(size=(2, 250, 400, 3))
    found = signatures.signal_correlations(circuit(rates=z))
    within(found.value, [0.5, 0.0, 0.0], found.se)
    np.testing.assert_allclose(
        found.value, np.corrcoef(z.mean((0, 1)).T)[np.triu_indices(3, 1)], atol=1e-12
    )
    noise = signatures.noise_correlations(circuit(rates=z), quantity="rates")
    within(noise.value, 0.0, noise.se)


def test_correlations_without_variation_are_nan():
    z = rng().normal(size=(2, 30, 6, 3))
    z[..., 2] = 0.1
    for found in (
        signatures.noise_correlations(circuit(rates=z), quantity="rates"),
        signatures.signal_correlations(circuit(rates=z)),
    ):
        value = found.value.values.reshape(-1, 3)
        assert np.isfinite(value[:, 0]).all()
        assert np.isnan(value[:, 1:]).all()
        assert found.attrs["reason"] == "a neuron does not vary"


# variance against contrast


def contrasts(power, problems=30):
    contrast = np.geomspace(0.05, 1.0, problems)
    sd = contrast ** (power / 2) * np.array([0.5, 1.0, 4.0])[:, None]
    z = rng(3).normal(size=(C, 200, problems, 3)) * sd.T
    return circuit(rates=z + 10 * contrast[:, None]), contrast


@pytest.mark.parametrize("power", [0.0, -1.0, 0.5])
def test_variance_against_contrast(power):
    tree, contrast = contrasts(power)
    found = signatures.variance_against_contrast(tree, contrast, seed=0)
    within(found.value, power, found.se)
    if power:  # flatness is rejected
        assert not found.low < 0 < found.high
    assert found.variance.dims == ("problem", "neuron")


def test_neurons_without_variance_are_left_out():
    tree, contrast = contrasts(-1.0)
    tree["circuit"]["rates"].values[:, :, 4, 1] = 2.0
    found = signatures.variance_against_contrast(tree, contrast, seed=0)
    assert found.attrs["reason"] == "1 neurons without variance left out"
    within(found.value, -1.0, found.se)
    tree["circuit"]["rates"].values[:] = 2.0
    found = signatures.variance_against_contrast(tree, contrast, seed=0)
    assert np.isnan(found.value)


# sparsity


def test_zeros_of_poisson_counts():
    spikes = rng().poisson(0.3, (C, T, B, N))
    found = signatures.sparsity(circuit(spikes=spikes))
    within(found.value, math.exp(-0.3), found.se)
    assert (abs(found.value - 0.5) > 5 * found.se).all()


def test_sparseness_of_known_responses():
    r = np.array([[4.0, 0, 0, 0], [1, 1, 1, 1], [0, 3, 0, 0], [0, 0, 0, 0], [1, 3, 0, 0]])
    found = signatures.sparsity(circuit(rates=np.tile(r, (2, 3, 1, 1))), quantity="rates")
    last = (1 - 1.0 / 2.5) / 0.75  # mean 1, mean square 2.5
    np.testing.assert_allclose(found.population, [1.0, 0.0, 1.0, np.nan, last])
    column = r[:, 1]
    truth = (1 - column.mean() ** 2 / (column**2).mean()) / (1 - 1 / 5)
    np.testing.assert_allclose(found.lifetime[1], truth)
    assert "zero" in found.attrs["reason"]


def test_sparseness_of_exponential_rates():
    """mean square = 2 mean^2, so a half; the jackknife error is the spread over problems."""
    r = rng().exponential(size=(1, 1, 100, 4000))
    population = signatures.sparsity(circuit(rates=r), quantity="rates")
    value, se = population.population, population.population_se
    within(value.mean(), 0.5, value.std(ddof=1) / 10)
    assert 0.8 < float(se.mean() / value.std()) < 1.25


# convergence


def damped(tau, problems=(1.0, 2.0), steps=400, noise=0.0):
    t = np.arange(steps)[:, None, None]
    height = np.array(problems)[:, None]
    z = 5 + height * np.exp(-t / tau) * np.array([1.0, -1.0])  # two neurons, from both sides
    return circuit(rates=z + noise * rng(4).normal(size=(8, steps, len(problems), 2)))


@pytest.mark.parametrize("tau", [5.0, 20.0])
def test_convergence_of_a_damped_approach(tau):
    """|a| exp(-t / tau) <= tolerance from t = tau log(|a| / tolerance) on."""
    found = signatures.convergence_time(damped(tau), tolerance=0.01)
    truth = np.ceil(tau * np.log(np.array([1.0, 2.0]) / 0.01))
    np.testing.assert_allclose(found.value, truth, atol=1)  # rounding of the final value
    assert (found.se < 1e-9).all()
    np.testing.assert_allclose(found.deviation[1, :3], 2 * np.exp(-np.arange(3) / tau), rtol=1e-6)


def test_convergence_in_noise():
    found = signatures.convergence_time(damped(20.0, noise=0.2), tolerance=0.15, smooth=20)
    lag = 10  # the running mean looks back
    truth = 20 * np.log(np.array([1.0, 2.0]) / 0.15) + lag
    within(found.value, truth, np.maximum(found.se, 2.0))
    assert np.isfinite(found.se).all()


def test_what_does_not_converge():
    wave = np.sin(np.arange(300) / 3)[:, None, None] * np.ones((2, 300, 2, 1))
    wave[:, :, 1] = 0
    found = signatures.convergence_time(circuit(rates=wave), tolerance=0.1)
    assert np.isnan(found.value[0])
    assert found.value[1] == 0
    assert found.attrs["reason"] == "not converged before the final stretch"


def test_convergence_of_any_series():
    tree = damped(10.0)
    decay = np.exp(-np.arange(400) / 10.0)[:, None] * np.ones((1, 400, 1))
    series = xarray.Dataset({"log_p_joint": (("chain", "draw", "problem"), decay)})
    tree["sample_stats"] = xarray.DataTree(series)
    found = signatures.convergence_time(
        tree, group="sample_stats", quantity="log_p_joint", tolerance=0.01
    )
    np.testing.assert_allclose(found.value, math.ceil(10 * math.log(100)))
    assert np.isnan(found.se).all()  # one trial


# oscillations


def oscillating(amplitude, frequency=0.1, noise=1.0, trials=6, seed=5):
    """Amplitudes (problem), random phases of trials and neurons, white noise."""
    g = rng(seed)
    b = len(amplitude)
    phase = g.uniform(0, 2 * np.pi, (trials, 1, b, 4))
    t = np.arange(1000)[:, None, None]
    wave = np.asarray(amplitude)[:, None] * np.sin(2 * np.pi * frequency * t + phase)
    return circuit(potentials=3 + wave + noise * g.normal(size=(trials, 1000, b, 4)))


def test_amplitude_of_a_sinusoid_in_noise():
    amplitude = np.array([0.0, 0.5, 2.0])
    band = (0.09, 0.11)
    found = signatures.oscillation_amplitude(oscillating(amplitude, trials=40), band=band)
    share = 21 * 0.001 / 0.5  # 21 frequencies of the spectrum
    within(found.value, np.sqrt(amplitude**2 + 2 * share), found.se)
    other = signatures.oscillation_amplitude(oscillating(amplitude, trials=40), band=(0.3, 0.32))
    within(other.value, math.sqrt(2 * share), other.se)
    peak = found.frequency.values[found.spectrum.values.argmax(1)]
    np.testing.assert_allclose(peak[1:], 0.1)


def test_amplitude_has_the_units_of_time_and_is_the_high_passed_sd():
    tree = oscillating([2.0], noise=0.0)
    found = signatures.oscillation_amplitude(tree, band=(90.0, 110.0), step=1e-3)
    np.testing.assert_allclose(found.value, 2.0, rtol=1e-6)
    whole = signatures.oscillation_amplitude(oscillating([0.0], trials=40), band=(0.001, 0.5))
    within(whole.value, math.sqrt(2), whole.se)


def test_oscillations_against_surprise():
    surprise = rng().gamma(2.0, 5.0, size=25)
    grows = oscillating(0.1 * surprise)
    found = signatures.oscillation_against_surprise(grows, surprise, seed=0, band=(0.09, 0.11))
    assert found.low > 0.5
    same = oscillating(np.ones(25))
    found = signatures.oscillation_against_surprise(same, surprise, seed=0, band=(0.09, 0.11))
    within(found.value, 0.0, found.se)


# synapses


def synapses(rho, n=2000, noise=0.3, seed=6):
    """Law S5 of Aitchison et al.: sigma^2 = (s0^rho / H)^(2 / (rho + 2)), with scatter."""
    g = rng(seed)
    h = np.exp(g.normal(2.0, 1.5, size=n))
    s0 = 0.1
    variance = (s0**rho / h) ** (2 / (rho + 2)) * np.exp(noise * g.normal(size=n))
    fields = {
        "variance": variance,
        "posterior_variance": 1 / h,
        "learning_rate": 1e-3 / np.sqrt(h),
        "mean_square_rate": 0.2 * h,
        "rate": 0.3 * h,  # on or off: proportional to the mean square
        "curvature": h,
    }
    return xarray.Dataset({k: ("synapse", v) for k, v in fields.items()})


SLOPES = dict(zip(MECHANISMS, (0.8, 0.75, 0.6, 0.5), strict=True))


@pytest.mark.parametrize(("name", "slope"), SLOPES.items())
def test_synapses_follow_the_law(name, slope):
    found = synaptic_variance(synapses(MECHANISMS[name]), seed=0)
    signs = {
        "posterior_variance": 1,
        "learning_rate": 2,
        "mean_square_rate": -1,
        "rate": -1,
        "curvature": -1,
    }
    for predictor, times in signs.items():
        at = found.sel(predictor=predictor)
        np.testing.assert_allclose(at.predicted.sel(mechanism=name), times * slope)
        within(at.value, times * slope, at.se)
        assert np.sign(at.r) == np.sign(times)
        wrong = [m for m in MECHANISMS if m != name]  # the planted error: another exponent
        assert not at.accepted.sel(mechanism=wrong).any()


def test_intervals_accept_the_law():
    """Of 95 % intervals, over 60 sets of 100 synapses; another exponent is mostly rejected."""
    found = [
        synaptic_variance(synapses(0.5, 100, seed=k)[["variance", "curvature"]], seed=k).accepted
        for k in range(60)
    ]
    share = xarray.concat(found, "seed").mean("seed").sel(predictor="curvature")
    assert share.sel(mechanism="calcium efflux") > 0.95 - 5 * math.sqrt(0.95 * 0.05 / 60)
    assert share.sel(mechanism=["actin", "trafficking"]).max() < 0.05


def test_scale_of_synapses_does_not_matter():
    plain, scaled = synapses(0.5), synapses(0.5)
    for variable in scaled.data_vars.values():
        variable.values *= 7.0
    a, b = (synaptic_variance(s, seed=0) for s in (plain, scaled))
    np.testing.assert_allclose(a.value, b.value)
    np.testing.assert_allclose(a.low, b.low)


def test_synapses_in_matrices_and_exponents_of_ones_own():
    flat = synapses(2.0)
    matrix = xarray.Dataset(
        {
            "variance": (("out", "in"), flat.variance.values.reshape(40, 50)),
            "learning_rate": (("in", "out"), flat.learning_rate.values.reshape(40, 50).T),
        }
    )
    found = synaptic_variance(matrix, mechanisms={"mine": 2.0, "none": 0.9}, seed=0)
    assert found.predictor.values.tolist() == ["learning_rate"]
    inside = (found.low <= found.predicted) & (found.predicted <= found.high)
    np.testing.assert_array_equal(found.accepted, inside)
    assert not found.accepted.sel(mechanism="none").any()


def test_predicted_slopes():
    assert predicted_slope("rate", 2.0) == -0.5
    np.testing.assert_allclose(predicted_slope("learning_rate", 2 / 3), 1.5)
    with pytest.raises(BadInput, match="posterior_variance"):
        predicted_slope("posterior_varianc", 1.0)
    with pytest.raises(BadInput, match="rho"):
        predicted_slope("rate", 0.0)


def test_synapses_refused():
    good = synapses(1.0, n=20)
    cases = [
        (good[["rate"]], "variables 'variance'"),
        (good[["variance"]], "any of"),
        (good.assign(variance=0 * good.variance), "variance: expected numbers > 0"),
        (good.assign(rate=good.rate * np.nan), "rate: expected finite numbers"),
        (good.isel(synapse=slice(4)), "at least 5"),
        (good.assign(rate=("neuron", np.ones(3))), "Broadcast"),
    ]
    for bad, message in cases:
        with pytest.raises(BadInput, match=message):
            synaptic_variance(bad, seed=0)


# bad input


def test_circuits_that_are_none():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    tree = diagnostics.draw(model, model.exact(), model.observations()[:2], draws=5, seed=0)
    with pytest.raises(BadInput, match=r"'observed_data', 'posterior'.*Draws\(values, circuit="):
        signatures.fano_factor(tree, window=1)
    with pytest.raises(BadInput, match=r"a variable 'spikes'; got \['rates'\]"):
        signatures.fano_factor(circuit(rates=np.ones((2, 50, 1, 2))), window=1)
    flat = xarray.DataTree.from_dict(
        {"circuit": xarray.Dataset({"spikes": (("draw", "neuron"), np.ones((5, 2)))})}
    )
    with pytest.raises(BadInput, match="dims"):
        signatures.sparsity(flat)


ONES = np.ones((2, 50, 6, 2))
RAISES = [
    (signatures.fano_factor, {"window": 1}, {"spikes": np.full((2, 50, 1, 2), np.nan)}, "finite"),
    (signatures.fano_factor, {"window": 1}, {"spikes": 0.5 * ONES}, "whole numbers"),
    (signatures.fano_factor, {"window": 1}, {"spikes": -ONES}, "whole numbers"),
    (signatures.fano_factor, {"window": 0}, {"spikes": ONES}, "window"),
    (signatures.fano_factor, {"window": 60}, {"spikes": ONES}, "draws per chain"),
    (signatures.fano_factor, {"window": 10}, {"spikes": ONES}, "at least 20; got 10"),
    (signatures.noise_correlations, {}, {"spikes": ONES[:, :5]}, "at least 20; got 10"),
    (signatures.noise_correlations, {}, {"spikes": ONES[..., :1]}, "neurons"),
    (signatures.signal_correlations, {}, {"rates": ONES[:, :, :4]}, "problems"),
    (signatures.sparsity, {}, {"spikes": -ONES}, "numbers >= 0"),
    (signatures.convergence_time, {"tolerance": 0}, {"rates": ONES}, "tolerance"),
    (signatures.convergence_time, {"tolerance": 1, "final": 1}, {"rates": ONES}, "final"),
    (signatures.convergence_time, {"tolerance": 1, "smooth": 51}, {"rates": ONES}, "draws"),
    (signatures.oscillation_amplitude, {"band": (0.6, 0.7)}, {"potentials": ONES}, "band"),
    (
        signatures.oscillation_amplitude,
        {"band": (0.1, 0.2), "step": 0},
        {"potentials": ONES},
        "step",
    ),
]


@pytest.mark.parametrize(("signature", "knobs", "arrays", "message"), RAISES)
def test_signatures_refuse(signature, knobs, arrays, message):
    with pytest.raises(BadInput, match=message):
        signature(circuit(**arrays), **knobs)


@pytest.mark.parametrize(
    ("contrast", "message"),
    [
        (np.ones(5), r"contrast: expected shape \(6,\)"),
        (np.arange(6), "contrast: expected numbers > 0"),
        (np.full(6, np.nan), "contrast: expected finite"),
        (np.ones(6), "values that differ"),
    ],
)
def test_contrasts_refused(contrast, message):
    tree = circuit(rates=rng().normal(size=ONES.shape))
    with pytest.raises(BadInput, match=message):
        signatures.variance_against_contrast(tree, contrast, seed=0)


def test_surprise_of_the_wrong_length():
    tree = circuit(potentials=rng().normal(size=ONES.shape))
    with pytest.raises(BadInput, match="surprise"):
        signatures.oscillation_against_surprise(tree, np.ones(4), seed=0, band=(0.1, 0.2))


# through draw


class Spiking(inference.MeanFieldEncoder):
    """A guide that says its draws were made by Poisson neurons, in a sheet of 2 x 3."""

    def draw(self, x, *, draws, chains, seed, progress=False):
        found = super().draw(x, draws=draws, chains=chains, seed=seed)
        with inference.seeds.seeded(seed, 7):
            spikes = torch.poisson(torch.full((chains, draws, len(x), 2, 3), 0.4))
        return inference.Draws(found.values, circuit={"spikes": spikes})


def test_a_circuit_is_measured_after_draw():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = model.observations()[:2]
    tree = diagnostics.draw(model, Spiking(model), x, draws=250, chains=2, seed=0)
    found = signatures.fano_factor(tree, window=5)
    assert dict(found.sizes) == {"problem": 2, "neuron": 6}
    within(found.value, 1.0, found.se)
    later = signatures.fano_factor(tree.isel(draw=slice(50, None)), window=5)
    within(later.value, 1.0, later.se)


# pictures


def pictures():
    """Each signature with its picture, on circuits where there is something to see."""
    spikes = rng().poisson(np.geomspace(0.05, 2, 12), (C, T, 6, 12))
    spiking = circuit(spikes=spikes, rates=spikes + 0.1)
    quenched, contrast = contrasts(-1.0)
    surprise = rng().gamma(2.0, 5.0, size=25)
    waves, knobs = oscillating(0.1 * surprise), {"band": (0.09, 0.11)}
    s, p = signatures, plot_signatures
    return {
        "fano_factor": (p.fano_factor, s.fano_factor(spiking, window=10)),
        "noise": (p.correlations, s.noise_correlations(spiking)),
        "signal": (p.correlations, s.signal_correlations(spiking)),
        "contrast": (
            p.variance_against_contrast,
            s.variance_against_contrast(quenched, contrast, seed=0),
        ),
        "sparsity": (p.sparsity, s.sparsity(spiking)),
        "convergence": (
            p.convergence_time,
            s.convergence_time(damped(20.0, (0.5, 1, 2, 4), noise=0.05), tolerance=0.1, smooth=5),
        ),
        "amplitude": (p.oscillation_amplitude, s.oscillation_amplitude(waves, **knobs)),
        "surprise": (
            p.oscillation_against_surprise,
            s.oscillation_against_surprise(waves, surprise, seed=0, **knobs),
        ),
        "synapses": (
            lambda found: p.synaptic_variance(found, synapses(2 / 3)),
            synaptic_variance(synapses(2 / 3), seed=0),
        ),
    }


def test_pictures():
    for name, (plot, found) in pictures().items():
        figure = plot(found)
        assert isinstance(figure, Figure), name
        assert all(ax.has_data() for ax in figure.axes), name
        assert all(ax.get_xlabel() for ax in figure.axes), name
        assert figure.axes[0].get_ylabel(), name  # others may share it
        figure.canvas.draw()


def test_a_dead_circuit_has_reasons_and_pictures():
    zero = np.zeros((2, 40, 6, 3))
    dead, s, p = circuit(spikes=zero, rates=zero, potentials=zero), signatures, plot_signatures
    band = {"band": (0.1, 0.2)}
    found = {
        p.fano_factor: s.fano_factor(dead, window=1),
        p.correlations: s.noise_correlations(dead),
        p.variance_against_contrast: s.variance_against_contrast(dead, np.arange(1, 7), seed=0),
        p.oscillation_against_surprise: s.oscillation_against_surprise(
            dead, np.arange(6), seed=0, **band
        ),
    }
    for plot, measured in found.items():
        assert measured.value.isnull().all()
        assert measured.attrs["reason"]
        plot(measured).canvas.draw()
    p.oscillation_amplitude(s.oscillation_amplitude(dead, **band)).canvas.draw()
    sparse = s.sparsity(dead)
    assert (sparse.value == 1).all()
    assert sparse.population.isnull().all()
    p.sparsity(sparse).canvas.draw()


def test_results_go_to_files(tmp_path):
    for name, (_, found) in pictures().items():
        path = tmp_path / f"{name}.nc"
        found.to_netcdf(path, engine="h5netcdf")
        with xarray.open_dataset(path, engine="h5netcdf") as back:
            assert {"measured", "units", "source", "reason"} <= set(back.attrs)
            np.testing.assert_allclose(back["value"], found["value"])
