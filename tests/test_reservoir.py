"""Reservoir and sampler-only circuits: what they compute, in float64 and to rounding.

About fifteen seconds on an idle core.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import within

import zoo
from inference import (
    BadInput,
    DenoisingScoreMatching,
    Diverged,
    EnergyReservoir,
    ExactScore,
    ForwardKL,
    HasClosedForm,
    HasDivergence,
    HasNoiseLevels,
    HasScore,
    Incompatible,
    MixedScore,
    NoiseStaircase,
    RandomReservoir,
    ReservoirSampler,
    SamplerOnlyCurrent,
    SamplerOnlyRate,
    Sampling,
    fit,
)
from inference.activation import ACTIVATIONS
from inference.onset import Onset
from inference.sampling import plan
from inference.seeds import seeded

F64 = torch.float64
NOISE = (0.3, 5.0)
B, D = 2, 3


@pytest.fixture(scope="module")
def precise():
    """Factor analysis with D = 3 in float64."""
    return zoo.FactorAnalysis(7, D, seed=1).double()


def lively(guide, size=0.3, seed=0):
    """The guide with weights away from their start, so that nothing is zero or one."""
    with torch.no_grad(), seeded(seed):
        for p in guide.parameters():
            p.add_(size * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5)
    return guide


def circuit(model, cls=ReservoirSampler, *, neurons=20, **knobs):
    """A small circuit with tanh, which is stable whatever its weights."""
    sizes = {} if cls in (SamplerOnlyRate, SamplerOnlyCurrent) else {"neurons": neurons}
    shape = {} if cls is RandomReservoir else {"hidden": (8,)}
    return lively(cls(model, **sizes, **shape, **{"activation": "tanh", "noise": NOISE} | knobs))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def onset_of(guide, x, **settings):
    """A stimulus, with the settings of its run."""
    how = Sampling(**settings)
    onset = Onset(guide, x, how, plan(how, *guide.noise))
    onset.work = guide.whitening.root.new_empty(0)
    return onset


# ------------------------------------------------------------------------- the equations as printed


@pytest.mark.parametrize("sigma", [0.3, 2.0])
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_score_is_the_one_of_the_paper(precise, activation, gain, sigma):
    """s = (-y' + a (W1 phi(gain (W2 zoom y' / sqrt(v)) + current) + drive)) / v."""
    guide, x = circuit(precise, activation=activation, gain=gain), precise.observations()[:B]
    y, levels = normal(B, D), torch.full((B,), sigma, dtype=F64)
    tonic = guide.level(guide.standard(x), levels).tonic
    v = 1 + sigma**2
    amplitude = math.sqrt(v) / sigma
    h = (y - tonic.centre) / math.sqrt(v) * tonic.zoom @ guide.inward.T * tonic.gain
    neurons = ACTIVATIONS[activation](h + tonic.current)
    inside = -(y - tonic.centre) + amplitude * (neurons @ guide.outward.T + tonic.drive)
    found = guide.smoothed_score(y, x, levels)
    torch.testing.assert_close(found, inside / v, rtol=1e-12, atol=1e-12)
    moved = (tonic.gain - 1).abs().max() + (tonic.zoom - 1).abs().max()
    assert (moved > 0.01) == gain
    assert tonic.centre.abs().min() > 0
    assert tonic.drive.abs().min() > 0


@pytest.mark.parametrize("cls", [SamplerOnlyCurrent, SamplerOnlyRate])
def test_sampler_only_scores_are_those_of_the_paper(precise, cls):
    """s = gamma F(y) A A', F = -y + W phi(y) + b or -y + phi(W y + b), in units of the level."""
    guide, x = circuit(precise, cls, activation="softplus"), precise.observations()[:B]
    y, sigma = normal(B, D), 0.8
    levels = torch.full((B,), sigma, dtype=F64)
    tonic = guide.level(guide.standard(x), levels).tonic
    v = 1 + sigma**2
    scaled = (y - tonic.centre) / math.sqrt(v) * tonic.zoom
    phi = torch.nn.functional.softplus
    if cls is SamplerOnlyCurrent:
        inside = phi(tonic.gain * scaled + tonic.current) @ guide.weights.T
    else:
        inside = phi(tonic.gain * (scaled @ guide.weights.T) + tonic.current)
    f = (math.sqrt(v) / sigma * (inside + tonic.drive) - (y - tonic.centre)) / v
    known = guide.gamma * f @ (guide.mixing @ guide.mixing.T)
    torch.testing.assert_close(guide.smoothed_score(y, x, levels), known, rtol=1e-12, atol=1e-12)
    assert guide.neurons == D
    assert (guide.mixing - torch.eye(D)).abs().max() > 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_fit_their_slopes_and_integrals(activation):
    phi = ACTIVATIONS[activation]
    h = (normal(50) * 4).requires_grad_()
    (slope,) = torch.autograd.grad(phi(h).sum(), h)
    torch.testing.assert_close(phi.slope(h), slope, rtol=1e-9, atol=1e-9)
    room = torch.empty(50, dtype=F64)
    with torch.no_grad():
        written = phi(h, room)
        torch.testing.assert_close(written, phi(h), rtol=0, atol=0)
    if phi.integral is not None:
        (value,) = torch.autograd.grad(phi.integral(h).sum(), h)
        torch.testing.assert_close(phi(h), value, rtol=1e-9, atol=1e-9)
    steps = torch.linspace(-1, 1, 20_001, dtype=F64)  # a jump of the slope would show
    assert (phi.slope(steps).diff().abs().max() < 1e-3) == phi.smooth


@pytest.mark.parametrize(
    ("activation", "known"),
    [("relu", torch.relu), ("tanh", torch.tanh), ("softplus", torch.nn.functional.softplus),
     ("squareplus", lambda h: (h + (h * h + 1).sqrt()) / 2)],
)  # fmt: skip
def test_activations_are_what_they_are_called(activation, known):
    h = normal(50) * 4
    torch.testing.assert_close(ACTIVATIONS[activation](h), known(h), rtol=1e-12, atol=1e-12)


def test_an_untrained_circuit_knows_the_guess_alone(precise):
    """Without read-out, drive and centre the score is -y / (1 + sigma^2), to the last bit or so."""
    x, y = precise.observations()[:B], normal(B, D)
    for cls in (ReservoirSampler, EnergyReservoir, RandomReservoir):
        guide = circuit(precise, cls)
        with torch.no_grad():
            (guide.strength if cls is EnergyReservoir else guide.outward).zero_()
            guide.input.head.weight[guide.neurons : guide.neurons + D] = 0
            guide.input.head.bias[guide.neurons : guide.neurons + D] = 0
            for p in guide.input.rest.parameters():
                p.zero_()
        sigma = torch.tensor([0.3, 4.0], dtype=F64)
        known = -y / (1 + sigma.square())[:, None]
        torch.testing.assert_close(guide.smoothed_score(y, x, sigma), known, rtol=1e-14, atol=0)


def test_gains_multiply(precise):
    """Neurons by 1 + g, outputs by e^g, from one perceptron with currents and drives."""
    guide, x = circuit(precise), precise.observations()[:B]
    seen = []
    hook = guide.input.deep.register_forward_hook(lambda m, i, o: seen.append(o))
    tonic = guide.lowest(x).tonic
    hook.remove()
    current, drive, gain, zoom = seen[0].split([20, D, 20, D], -1)
    torch.testing.assert_close(tonic.current, current)
    torch.testing.assert_close(tonic.drive, drive)
    torch.testing.assert_close(tonic.gain, 1 + gain)
    torch.testing.assert_close(tonic.zoom, zoom.exp())
    torch.testing.assert_close(tonic.centre, guide.input.rest(guide.standard(x)))


def test_circuits_start_near_the_guess(precise):
    """No drive, no centre and no zoom or gain to speak of."""
    guide = ReservoirSampler(precise, neurons=20)
    x = precise.observations()[:B]
    for sigma in guide.noise:
        tonic = guide.level(guide.standard(x), torch.full((B,), sigma, dtype=F64)).tonic
        assert not tonic.drive.any()
        assert not tonic.centre.any()
        assert (tonic.gain - 1).abs().max() < 0.2
        assert (tonic.zoom - 1).abs().max() < 0.2
    y = normal(B, D)
    far = torch.full((B,), guide.noise[1], dtype=F64)
    near = -y / (1 + far.square())[:, None]
    assert (guide.smoothed_score(y, x, far) - near).abs().max() < 0.05 * near.abs().max()


# -------------------------------------------------------------------------------- rates and outputs

PATH = {
    "levels": 400, "correctors": 2, "warmup": 600, "per_start": 4, "thin": 100, "step": 0.02,
}  # fmt: skip


@pytest.mark.parametrize("skew", [0.0, 0.7])
@pytest.mark.parametrize("cls", [ReservoirSampler, EnergyReservoir])
def test_the_circuit_and_its_outputs_alone_are_the_same(precise, cls, skew):
    """2,100 steps down the noise levels and on, with x, gain and skew: equal to rounding."""
    guide, x = circuit(precise, cls, neurons=200), precise.observations()[:B]
    assert len(plan(Sampling(**PATH), *NOISE).steps) == 400 * 3 + 900
    sizes = {"draws": 4, "chains": 2, "seed": 0}
    guide.sampling = Sampling(**PATH, skew=skew)
    alone = guide.draw(x, **sizes)
    guide.sampling = Sampling(**PATH, skew=skew, record=("rates",))
    whole = guide.draw(x, **sizes)
    torch.testing.assert_close(alone.values["z"], whole.values["z"], rtol=0, atol=1e-10)
    rates = whole.circuit["rates"]
    assert rates.shape == (2, 4, B, 200)
    y = guide.whiten(whole.values, x)
    torch.testing.assert_close(rates @ guide.read_out().T, y, rtol=0, atol=1e-10)
    assert not alone.circuit
    assert alone.time_constants == whole.time_constants


def test_in_single_precision_they_stay_close():
    model = zoo.FactorAnalysis(7, D, seed=1)
    guide, x = circuit(model, neurons=200), model.observations()[:B]
    sizes = {"draws": 4, "chains": 2, "seed": 0}
    guide.sampling = Sampling(**PATH, skew=0.7)
    alone = guide.draw(x, **sizes).values["z"]
    guide.sampling = Sampling(**PATH, skew=0.7, record=("rates",))
    whole = guide.draw(x, **sizes).values["z"]
    assert whole.dtype == torch.float32
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-3)


def steps_of(guide, x, n=6, **settings):
    """Chains with neurons at an onset, and (step, noise) to move them by."""
    onset = onset_of(guide, x, record=("rates",), **settings)
    with torch.no_grad():
        chains = guide.chains(normal(n, B, D, seed=1), onset)
    noise = normal(len(onset.plan.steps), n, B, D, seed=2)
    return onset, chains, list(zip(onset.plan.steps, noise, strict=True))


def test_neurons_follow_the_printed_dynamics_with_a_dense_matrix(precise):
    """dr = (-r + a phi(gain (W_rec r / sqrt(v)) + b + current)) dt + Sigma (...), W_rec = W2 W1."""
    guide, x = circuit(precise), precise.observations()[:B]
    onset, chains, path = steps_of(guide, x, levels=5, correctors=2, warmup=5, step=0.05, skew=0.5)
    with torch.no_grad():
        sigma_matrix = torch.linalg.pinv(guide.outward)  # Sigma = W1' (W1 W1')^-1, (N, D)
        centre = onset.level(NOISE[0]).tonic.centre
        r = chains.rates() - centre @ sigma_matrix.T  # y = W1 r + m
        for step, xi in path:
            level = onset.level(step.sigma)
            tonic, v = level.tonic, 1 + step.sigma**2
            dt, amplitude = step.drift / v, math.sqrt(v) / step.sigma
            recurrent = torch.einsum("ni,bi,im->bnm", guide.inward, tonic.zoom, guide.outward)
            dense = (recurrent @ r[..., None])[..., 0]
            factorised = (r @ guide.outward.T * tonic.zoom) @ guide.inward.T
            torch.testing.assert_close(dense, factorised, rtol=1e-12, atol=1e-12)
            phi = torch.tanh(tonic.gain * dense / math.sqrt(v) + tonic.current)
            push = dt * amplitude * tonic.drive + step.noise * xi
            if step.onward is None:
                y = chains.y
                push = push + 0.5 * step.drift * guide.at(y, level) @ guide.turn.T
            r = r + dt * (-r + amplitude * phi) + push @ sigma_matrix.T
            chains.advance(step, xi)
            found = chains.rates() - centre @ sigma_matrix.T
            torch.testing.assert_close(found, r, rtol=1e-10, atol=1e-10)
            y = r @ guide.outward.T + centre
            torch.testing.assert_close(chains.y, y, rtol=1e-10, atol=1e-10)


def test_rates_can_be_read_off_the_outputs(precise):
    """r = Sigma y + r_perp, where r_perp is a low-pass of y without noise."""
    guide, x = circuit(precise, neurons=40), precise.observations()[:B]
    onset, chains, path = steps_of(guide, x, levels=60, correctors=2, warmup=100, step=0.05)
    with torch.no_grad():
        sigma_matrix = torch.linalg.pinv(guide.outward)
        rest = torch.eye(40, dtype=F64) - sigma_matrix @ guide.outward
        perp = torch.zeros_like(chains.rates())
        for step, xi in path:
            level = onset.level(step.sigma)
            v = 1 + step.sigma**2
            dt, amplitude = step.drift / v, math.sqrt(v) / step.sigma
            phi = guide.activity((chains.y - level.tonic.centre) / math.sqrt(v), level.tonic)
            perp = (1 - dt) * perp + dt * amplitude * phi @ rest.T
            chains.advance(step, xi)
        known = chains.y @ sigma_matrix.T + perp
        assert len(path) == 280
        assert perp.abs().max() > 0.1
        torch.testing.assert_close(chains.rates(), known, rtol=0, atol=1e-11)


def test_noise_enters_so_that_the_outputs_see_it_once(precise):
    """W1 Sigma = I."""
    guide, x = circuit(precise, neurons=200), precise.observations()[:B]
    _, chains, _ = steps_of(guide, x, levels=3)
    product = guide.outward @ chains.inject.T
    torch.testing.assert_close(product, torch.eye(D, dtype=F64), rtol=0, atol=1e-10)
    torch.testing.assert_close(chains.rates() @ guide.outward.T, chains.y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("broken", ["twin rows", "nearly", "zero", "too few neurons"])
def test_degenerate_read_outs_are_refused(precise, broken):
    few = broken == "too few neurons"
    guide, x = circuit(precise, neurons=D - 1 if few else 20), precise.observations()[:B]
    with torch.no_grad():
        if broken == "zero":
            guide.outward.zero_()
        elif not few:
            guide.outward[1] = guide.outward[0] + (1e-6 if broken == "nearly" else 0.0) * normal(20)
    guide.sampling = Sampling(levels=3, record=("rates",))
    message = r"^read-out W1 of the reservoir: expected a condition number .*Train the circuit"
    with pytest.raises(Diverged, match=message):
        guide.draw(x, draws=1, chains=1, seed=0)
    guide.sampling = Sampling(levels=3)  # the outputs alone need no Sigma
    guide.draw(x, draws=1, chains=1, seed=0)


def test_what_is_recorded_changes_no_draw(precise):
    guide, x = circuit(precise), precise.observations()[:B]
    found = {}
    for record in ((), ("rates",), ("spikes",), ("rates", "spikes"), ("spikes", "rates")):
        guide.sampling = Sampling(levels=10, per_start=2, record=record)
        found[record] = guide.draw(x, draws=40, chains=3, seed=1)
        assert tuple(found[record].circuit) == record
    both = found["rates", "spikes"]
    for record, draws in found.items():
        exactly = {} if record else {"rtol": 0, "atol": 1e-10}
        torch.testing.assert_close(draws.values["z"], both.values["z"], **exactly)
        for name, t in draws.circuit.items():
            assert torch.equal(t, both.circuit[name])
            assert t.shape == (3, 40, B, 20)


def test_spikes_are_counts_whose_means_are_the_rectified_rates(precise):
    guide, x = circuit(precise), precise.observations()[:B]
    guide.sampling = Sampling(levels=10, record=("rates", "spikes"))
    found = guide.draw(x, draws=3000, chains=1, seed=1).circuit
    mean, spikes = found["rates"][0].clamp_min(0), found["spikes"][0]
    assert torch.equal(spikes, spikes.round())
    assert (spikes >= 0).all()
    assert not spikes[mean == 0].any()
    miss, se = (spikes - mean).mean(0), (mean.mean(0) / 3000).sqrt()
    within(miss[se > 0], 0.0, se[se > 0])
    surplus = (spikes - mean).square() - mean  # the variance is the mean
    within(surplus.mean(0)[se > 0], 0.0, (surplus.std(0) / 3000**0.5)[se > 0])
    assert (se > 0).sum() > 20


def test_sampler_only_neurons_are_the_outputs(precise):
    guide, x = circuit(precise, SamplerOnlyRate), precise.observations()[:B]
    guide.sampling = Sampling(levels=5, record=("rates",))
    found = guide.draw(x, draws=3, chains=2, seed=0)
    y = guide.whiten(found.values, x)
    torch.testing.assert_close(found.circuit["rates"], y, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------- divergence


def autograd_jacobian(guide, y, x, sigma):
    """(B, D, D) of the score, problem by problem."""

    whole = torch.autograd.functional.jacobian(lambda t: guide.smoothed_score(t, x, sigma), y)
    own = torch.arange(len(y))
    return whole[own, :, own]


@pytest.mark.parametrize("activation", ["tanh", "softplus", "squareplus"])
@pytest.mark.parametrize("gain", [True, False])
def test_the_divergence_is_the_trace_of_the_jacobian(precise, activation, gain):
    guide, x = circuit(precise, activation=activation, gain=gain), precise.observations()[:4]
    y, sigma = normal(4, D), torch.tensor([0.3, 0.7, 2.0, 5.0], dtype=F64)
    trace = autograd_jacobian(guide, y, x, sigma).diagonal(dim1=1, dim2=2).sum(-1)
    assert isinstance(guide, HasDivergence)
    torch.testing.assert_close(guide.divergence(y, x, sigma), trace, rtol=1e-10, atol=1e-10)
    assert (trace + D / (1 + sigma.square())).abs().min() > 1e-4  # the neurons do take part


def test_kinks_have_no_divergence_to_train_on(precise):
    guide, x = circuit(precise, activation="relu"), precise.observations()[:B]
    message = r"^ReservoirSampler: expected a smooth activation; got relu\. .*'squareplus' or"
    with pytest.raises(Incompatible, match=message):
        guide.divergence(normal(B, D), x, torch.ones(B, dtype=F64))


# ------------------------------------------------------------------------------------------- energy


def asymmetry(guide, y, x, sigma):
    jacobian = autograd_jacobian(guide, y, x, sigma)
    return ((jacobian - jacobian.mT).norm() / jacobian.norm()).item()


@pytest.mark.parametrize("activation", ["relu", "tanh", "squareplus"])
def test_the_energy_circuits_score_is_the_gradient_of_its_potential(precise, activation):
    guide = circuit(precise, EnergyReservoir, activation=activation)
    x, sigma = precise.observations()[:4], torch.tensor([0.3, 0.7, 2.0, 5.0], dtype=F64)
    y = normal(6, 4, D).requires_grad_()
    level = guide.level(guide.standard(x), sigma)
    value = guide.potential(y, level)
    assert value.shape == (6, 4)
    (gradient,) = torch.autograd.grad(value.sum(), y)
    torch.testing.assert_close(guide.at(y, level), gradient, rtol=1e-10, atol=1e-10)
    assert asymmetry(guide, y[0].detach(), x, sigma) < 1e-10
    torch.testing.assert_close(guide.read_out(), guide.inward.T * guide.strength)


def test_a_plain_reservoirs_score_is_no_gradient(precise):
    guide, x = circuit(precise), precise.observations()[:4]
    sigma = torch.tensor([0.3, 0.7, 2.0, 5.0], dtype=F64)
    assert asymmetry(guide, normal(4, D), x, sigma) > 1e-3
    with pytest.raises(Incompatible, match=r"^ReservoirSampler: expected tied weights"):
        guide.potential(normal(4, D), guide.level(guide.standard(x), sigma))


def test_the_score_in_packed_latents_is_that_of_the_potential():
    """A positive latent: u = log z, whitened, and back by the transposed root."""
    model = zoo.EightSchools().double()
    guide, x = circuit(model, EnergyReservoir), model.observations()[:1]
    z = guide.draw(x, draws=5, chains=1, seed=0).values
    u = guide.latents.pack(z)[0].requires_grad_()
    value = guide.potential(guide.whitening.whiten(u, guide.standard(x)), guide.lowest(x))
    (gradient,) = torch.autograd.grad(value.sum(), u)
    assert isinstance(guide, HasScore)
    torch.testing.assert_close(guide.score(z, x), gradient, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------- what a reservoir can be


def affine(guide, matrix, offset):
    """Make 2 D + 1 relu neurons compute the score y A' + c at the smallest noise level."""
    sigma = guide.noise[0]
    v, d = 1 + sigma**2, len(offset)
    eye = torch.eye(d, dtype=F64)
    inner = sigma * (v * matrix + eye)  # what W1 phi has to be at scaled outputs
    constant = v * offset * sigma / math.sqrt(v)
    with torch.no_grad():
        for p in guide.input.parameters():
            p.zero_()
        guide.inward.copy_(torch.cat([eye, -eye, eye.new_zeros(1, d)]))
        guide.input.head.bias[2 * d] = 1.0
        guide.outward.copy_(torch.cat([inner, -inner, constant[:, None]], 1))
    return guide


def test_affine_scores_are_exact(precise):
    guide = ReservoirSampler(precise, neurons=2 * D + 1, gain=False, noise=(0.1, 5.0))
    matrix, offset = normal(D, D), normal(D, seed=1)
    affine(guide, matrix, offset)
    x, y = precise.observations()[:B], 3 * normal(50, B, D, seed=2)
    found = guide.at(y, guide.lowest(x))
    torch.testing.assert_close(found, y @ matrix.T + offset, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def planted(precise):
    """The exact score of one observation's posterior: circuit, x, mean and precision."""
    guide = ReservoirSampler(precise, neurons=2 * D + 1, gain=False, noise=(1e-3, 5.0))
    x = precise.observations()[3:4]
    with torch.no_grad():
        exact = precise.exact()
        mean, precision = exact.distribution(x).mean, exact.precision()
        root = guide.whitening.root
        centre = guide.whitening.whiten(mean, guide.standard(x))[0]
        inside = root.T @ precision @ root
    return affine(guide, -inside, inside @ centre), x, mean, precision


def test_a_linear_gaussian_posterior_is_in_the_family(planted):
    guide, x, mean, precision = planted
    z = mean + 2 * normal(40, 1, D)
    known = -(z - mean) @ precision
    torch.testing.assert_close(guide.score({"z": z}, x), known, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("record", [(), ("rates",)])
def test_its_chains_have_that_posterior(planted, record):
    """Up to what steps of this size add: P (1 - h P^-1 / 2)^-1 in whitened units."""
    guide, x, mean, precision = planted
    h, n = 0.1, 3000
    root = guide.whitening.root
    inside = root.T @ precision @ root
    eye = torch.eye(D, dtype=F64)
    known = root @ torch.linalg.inv(inside @ (eye - h / 2 * inside)) @ root.T
    guide.sampling = Sampling(levels=0, warmup=120, step=h, record=record)
    z = guide.draw(x, draws=n, chains=1, seed=3).values["z"][0, :, 0]
    away = z - mean
    within(away.mean(0), 0.0, away.std(0) / n**0.5, k=4)
    products = away[:, :, None] * away[:, None]
    within(products.mean(0), known, products.std(0) / n**0.5, k=4)
    wrong = guide.draw(x + 0.5, draws=n, chains=1, seed=3).values["z"][0, :, 0] - mean
    with pytest.raises(AssertionError, match="standard errors"):  # the guess of another x
        within(wrong.mean(0), 0.0, wrong.std(0) / n**0.5)


# ---------------------------------------------------------------------------------------- whitening


def test_whitening_can_be_undone(precise):
    guide, x = circuit(precise), precise.observations()[:4]
    z = {"z": normal(2, 5, 4, D)}
    y = guide.whiten(z, x)
    assert y.shape == (2, 5, 4, D)
    torch.testing.assert_close(guide.unwhiten(y, x), z["z"], rtol=1e-10, atol=1e-10)


def test_a_linear_gaussian_posterior_is_white(precise):
    """Mean zero, unit covariance, nothing of x left: within what 2,048 pilot draws can tell."""
    guide = circuit(precise)
    z, x = precise.simulate(20_000, seed=5)
    with torch.no_grad():
        y = guide.whiten(z, x)
        standard = guide.standard(x)
    se = (2 / 2048) ** 0.5
    assert y.mean(0).abs().max() < 5 * se
    assert (y.T.cov() - torch.eye(D)).abs().max() < 5 * se
    crossed = torch.corrcoef(torch.cat([y, standard], 1).T)[:D, D:]
    assert crossed.abs().max() < 5 * se
    with torch.no_grad():
        plain = torch.corrcoef(torch.cat([z["z"], standard], 1).T)[:D, D:]
    assert plain.abs().max() > 0.3


def test_whitening_survives_heavy_tails_and_constant_features():
    """Of a Laplace target with an observation that says nothing: finite, of scale one."""
    model = zoo.LaplaceMixture().double()
    guide = circuit(model)
    z, x = model.simulate(4000, seed=5)
    y = guide.whiten(z, x)
    assert torch.isfinite(y).all()
    assert 0.5 < y.std() < 2


# --------------------------------------------------------------------------------- random reservoir


def batches(model):
    """Six batches from the joint, and the seeds of their noise."""
    z, x = model.simulate(6 * 64, seed=7)
    for k in range(6):
        cut = slice(64 * k, 64 * (k + 1))
        yield k, x[cut], {name: v[cut] for name, v in z.items()}


def mean_loss(model, guide, objective):
    losses = []
    for k, x, z in batches(model):
        with seeded(k):
            losses.append(objective(model, guide, x, z)["guide"])
    return torch.stack(losses).mean()


OBJECTIVES = {
    "denoising": DenoisingScoreMatching,
    "exact": ExactScore,
    "mixed": MixedScore,
    "staircase": NoiseStaircase,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_settling_solves_the_least_squares_problem(precise, objective):
    """Its loss is the objective's own; no read-out does better; gradient descent ends there."""
    chosen = OBJECTIVES[objective]()
    guide = circuit(precise, RandomReservoir, neurons=8, activation="softplus")
    (before,) = torch.autograd.grad(mean_loss(precise, guide, chosen), guide.outward)
    start = mean_loss(precise, guide, chosen).item()
    for k, x, z in batches(precise):
        with seeded(k):
            guide.absorb(chosen, x, z)
    assert int(guide.rows) == 6 * 64
    loss = guide.settle()
    again = mean_loss(precise, guide, chosen)
    assert loss == pytest.approx(again.item(), rel=1e-9)
    (after,) = torch.autograd.grad(again, guide.outward)
    assert after.norm() < 1e-4 * before.norm()
    assert loss < start
    settled = guide.outward.detach().clone()
    with torch.no_grad():
        guide.outward.zero_()
    descend(guide, lambda: mean_loss(precise, guide, chosen))
    assert mean_loss(precise, guide, chosen).item() == pytest.approx(loss, rel=1e-6)
    with torch.no_grad():
        guide.outward.copy_(settled + 0.01 * normal(D, 8))
    assert mean_loss(precise, guide, chosen) > loss * (1 + 1e-6)
    for name in ("gram", "cross", "square", "rows"):
        assert not getattr(guide, name).any()


def descend(guide, loss):
    """Gradient descent with curvature learned on the way."""
    optimizer = torch.optim.LBFGS(
        [guide.outward], max_iter=400, history_size=50, tolerance_grad=1e-12,
        tolerance_change=1e-15, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad()


def test_only_the_read_out_of_a_random_reservoir_is_learned(precise):
    guide = circuit(precise, RandomReservoir)
    assert [n for n, p in guide.named_parameters() if p.requires_grad] == ["outward"]
    assert isinstance(guide, HasClosedForm)
    assert not {"gram", "cross", "square", "rows"} & set(guide.state_dict())
    before = {n: t.clone() for n, t in guide.state_dict().items()}
    fit(precise, guide, steps=3, batch_size=64, progress=False)
    changed = [n for n, t in guide.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == ["outward"]
    assert "hidden" not in guide.knobs
    with pytest.raises(Incompatible, match=r"^ForwardKL: expected score matching"):
        guide.regression(ForwardKL(), precise.observations()[:B], None)


def test_random_currents_carry_x_and_the_noise_level(precise):
    guide, x = circuit(precise, RandomReservoir), precise.observations()[:B]
    standard, ones = guide.standard(x), torch.ones(B, dtype=F64)
    low, high = (guide.level(standard, s * ones).tonic.current for s in (0.3, 5.0))
    assert (low - high).abs().max() > 0.1
    assert (low[0] - low[1]).abs().max() > 0.1


# ----------------------------------------------------------------------------------------- building


def test_seeds_of_weights(precise):
    for cls in (ReservoirSampler, RandomReservoir, EnergyReservoir, SamplerOnlyRate):
        sizes = {} if cls is SamplerOnlyRate else {"neurons": 10}
        one, two, other = (cls(precise, **sizes, seed=s).state_dict() for s in (0, 0, 1))
        assert all(torch.equal(t, two[n]) for n, t in one.items())
        differ = {n for n, t in one.items() if not torch.equal(t, other[n])}
        shared = {n for n in one if n.startswith("whitening")}
        assert not differ & shared
        assert "turn" in differ
        assert differ & {"inward", "weights"}


def test_first_weights_go_from_coarse_to_fine(precise):
    size = ReservoirSampler(precise, neurons=400).inward.norm(dim=-1)
    assert size.min() >= 0.5
    assert size.max() <= 8
    quarters = size.log().sort().values[[100, 200, 300]].exp()
    torch.testing.assert_close(quarters, quarters.new_tensor([1.0, 2.0, 4.0]), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "noise", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, math.inf)]
)
def test_bad_noise_levels_are_refused(model, noise):
    with pytest.raises(
        BadInput, match=r"^noise: expected (0 < smallest < largest|.*finite number.*); got \("
    ):
        ReservoirSampler(model, neurons=4, noise=noise)


def test_what_cannot_be_built(model):
    for cls in (ReservoirSampler, EnergyReservoir, SamplerOnlyCurrent):
        with pytest.raises(BadInput, match=r"^activation: got 'tanj'\. Did you mean 'tanh'"):
            cls(model, activation="tanj")
    with pytest.raises(Incompatible, match=r"^activation: .*got softplus\. Use .*'squareplus'"):
        EnergyReservoir(model, activation="softplus")
    for cls in (ReservoirSampler, RandomReservoir, SamplerOnlyRate):
        with pytest.raises(Incompatible, match=rf"^{cls.__name__}: expected continuous latents"):
            cls(zoo.NoisyOr())


def test_what_circuits_can_do_is_told_by_their_protocols(precise):
    for cls in (ReservoirSampler, RandomReservoir, EnergyReservoir):
        assert isinstance(circuit(precise, cls), HasDivergence)
    for cls in (SamplerOnlyCurrent, SamplerOnlyRate):
        guide = circuit(precise, cls)
        assert isinstance(guide, HasNoiseLevels)
        assert not isinstance(guide, HasDivergence)
    assert not isinstance(precise.exact(), HasNoiseLevels)


def test_dropout_is_for_training_alone(precise):
    plain, other = (circuit(precise, dropout=p) for p in (0.0, 0.5))
    assert other.knobs["dropout"] == 0.5
    x, how = precise.observations()[:B], {"draws": 3, "chains": 1, "seed": 0}
    assert torch.equal(plain.draw(x, **how).values["z"], other.draw(x, **how).values["z"])
    settings = {"steps": 4, "batch_size": 16, "progress": False}
    losses = [fit(precise, g, **settings).losses["guide"] for g in (plain, other)]
    assert (losses[0] != losses[1]).all()
    again = fit(precise, circuit(precise, dropout=0.5), **settings).losses["guide"]
    assert (again == losses[1]).all()
    assert not other.training
    one, two = (other.draw(x, **how).values["z"] for _ in range(2))
    assert torch.equal(one, two)


def test_how_it_is_run_is_no_part_of_the_guide(precise):
    """Neither knobs nor state: a checkpoint fits whatever the sampling."""
    short = circuit(precise, sampling=Sampling(levels=3))
    assert "sampling" not in short.knobs
    assert short.knobs == circuit(precise).knobs
    assert short.state_dict().keys() == circuit(precise).state_dict().keys()
