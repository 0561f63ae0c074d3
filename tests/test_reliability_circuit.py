"""Circuits that pay for their reliability: stable, stationary, and the optima of known algebra."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from conftest import within
from torch.distributions import MultivariateNormal, kl_divergence

import diagnostics
import zoo
from diagnostics.chains import effective
from inference import (
    BadInput,
    Diverged,
    Entropic,
    MultiLayerCircuit,
    PowerLaw,
    RecurrentCircuit,
    ReliabilityCost,
    SingleLayerCircuit,
    fit,
)
from inference.guides import reliability_circuit
from inference.guides.encoder import SMALLEST, SOFTPLUS_ONE
from inference.lyapunov import lyapunov, transition
from inference.seeds import seeded

SIZES = (1, 2, 5, 8, 17)
COSTS = {"entropic": Entropic(), "power law": PowerLaw(2 / 3, scale=0.25)}
TIMES = (0.0, 1e-5, 0.3, 2.0, 50.0)


def dynamics(n, condition=30.0, batch=(3,)):
    """K with a symmetric part >= I and as much that is skew, and D = 2 diag(s^2)."""
    with seeded(n):
        axes = torch.linalg.qr(torch.randn(*batch, n, n, dtype=torch.float64)).Q
        skew = torch.randn(*batch, n, n, dtype=torch.float64)
        sd = 0.2 + torch.rand(*batch, n, dtype=torch.float64)
    speeds = torch.logspace(0, 1, n, base=condition, dtype=torch.float64)
    return axes * speeds @ axes.mT + skew - skew.mT, 2 * torch.diag_embed(sd**2)


def close(value, truth, relative):
    size = float(torch.linalg.matrix_norm(truth).max())
    torch.testing.assert_close(value, truth, rtol=0, atol=relative * size)


# --------------------------------------------------------------------- linear stochastic dynamics


@pytest.mark.parametrize("n", SIZES)
def test_the_covariance_at_rest_solves_its_equation(n):
    """And is what the textbook's n^2 linear equations give."""
    k, d = dynamics(n)
    s = lyapunov(k, d)
    close(k @ s + s @ k.mT, d, 1e-10)
    eye = torch.eye(n).to(k)
    for i in range(len(k)):
        big = torch.kron(k[i], eye) + torch.kron(eye, k[i])
        close(s[i], torch.linalg.solve(big, d[i].flatten()).reshape(n, n), 1e-10)
    assert torch.equal(s, s.mT)
    assert (torch.linalg.eigvalsh(s) > 0).all()


def test_langevin_dynamics_rest_at_the_posterior():
    """K = L and D = 2 I have the covariance L^-1."""
    precision = zoo.FactorAnalysis().exact().precision().detach()
    s = lyapunov(precision, 2 * torch.eye(8).to(precision))
    close(s, torch.linalg.inv(precision), 1e-10)


def test_gradients_of_the_covariance_at_rest():
    k, d = (t.requires_grad_() for t in dynamics(3, batch=(2, 1)))
    assert torch.autograd.gradcheck(lyapunov, (k, d))
    assert torch.autograd.gradcheck(lyapunov, (k, d[0, 0].detach().requires_grad_()))


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_single_precision_costs_no_more_than_its_rounding(condition):
    k, d = dynamics(6, condition)
    k, d = k.float(), d.float()
    s = lyapunov(k, d)
    assert s.dtype == torch.float32
    close(s.double(), lyapunov(k.double(), d.double()), 1e-7)


@pytest.mark.parametrize("speed", [-0.5, 0.0, torch.nan])
def test_dynamics_without_rest_are_refused(speed):
    k = torch.diag_embed(torch.tensor([[1.0, 2.0], [1.0, speed]]))
    with pytest.raises(Diverged, match=r"^linear stochastic dynamics: .*eigenvalues of K"):
        lyapunov(k, torch.eye(2))


@pytest.mark.parametrize("time", TIMES)
def test_exact_steps_keep_the_covariance_and_add_up(time):
    k, d = dynamics(4)
    s = lyapunov(k, d)
    decay, root = transition(k, s, time)
    close(decay @ s @ decay.mT + root @ root.mT, s, 1e-12)
    twice, long = transition(k, s, 2 * time)
    close(twice, decay @ decay, 1e-12)
    added = decay @ root @ root.mT @ decay.mT + root @ root.mT
    torch.testing.assert_close(long @ long.mT, added, rtol=0, atol=1e-12)


def test_a_short_step_has_the_drift_and_noise_of_the_dynamics():
    """(E - I) / t = -K and R R' / t = D up to |K| t."""
    k, d = dynamics(4)
    t = 1e-7
    decay, root = transition(k, lyapunov(k, d), t)
    close((decay - torch.eye(4).to(k)) / t, -k, 1e-4)
    close(root @ root.mT / t, d, 1e-4)


# ------------------------------------------------------------------------------ what circuits are


@cache
def analysis(features=9, latents=4, seed=3):
    """Factors that compete: the best factorised guide misses 1.6 nats."""
    model = zoo.FactorAnalysis(features, latents, seed=seed).double()
    return model.requires_grad_(requires_grad=False)


def circuit(model=None, *, size=0.3, **knobs):
    """A recurrent circuit with weights away from their start."""
    guide = RecurrentCircuit(model or analysis(), hidden=(8,), **knobs).double()
    with torch.no_grad(), seeded(1):
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("size", [0.0, 0.3, 3.0])
def test_all_weights_and_stimuli_leave_the_circuit_stable(size):
    """The symmetric part of K is at least I, for observations far outside the model, too."""
    guide, x = circuit(size=size), analysis().observations()[:5]
    x = torch.cat([x, 30 * x])
    with torch.no_grad():
        _, drift, noise = guide.dynamics(x)
        q = guide.distribution(x)
    assert float(torch.linalg.eigvalsh((drift + drift.mT) / 2).min()) > 1 - 1e-9
    scale = guide.encoder.u_scale
    s = q.covariance_matrix / (scale[:, None] * scale)
    close(drift @ s + s @ drift.mT, 2 * torch.diag_embed(noise**2), 1e-9)
    assert torch.allclose(s[0], s[1], rtol=1e-3) is (size == 0.0)  # depends on the stimulus


def test_without_recurrent_weights_it_is_a_multi_layer_circuit():
    model, d = analysis(), 4
    whole, part = circuit(), MultiLayerCircuit(model, hidden=(8,)).double()
    with torch.no_grad():
        whole.inhibition.zero_()
        whole.rotation.zero_()
        for mine, theirs in zip(part.parameters(), whole.encoder.parameters(), strict=True):
            mine.copy_(theirs[: len(mine)])
    x = model.observations()[:5]
    q, p = whole.distribution(x), part.distribution(x)
    torch.testing.assert_close(q.mean, p.mean)
    torch.testing.assert_close(q.covariance_matrix, torch.diag_embed(p.variance))
    assert part.encoder.deep[-1].out_features == 2 * d


def at(covariance):
    """A circuit with the exact means and a covariance of one's choice, its weights set by hand.

    With P = L in units of the prior and l its smallest eigenvalue: A'A = P / l - I, s^2 = 1 / l.
    """
    model, guide = analysis(), circuit(size=0.0)
    e, d = guide.encoder, len(covariance)
    precision = torch.linalg.inv(covariance) * e.u_scale[:, None] * e.u_scale
    values, axes = torch.linalg.eigh(precision)
    exact = model.exact()
    origin, slopes = exact.distribution(e.x_loc[None]).mean, torch.eye(len(e.x_loc)).to(covariance)
    slopes = exact.distribution(e.x_loc + slopes).mean - origin
    noise = (values[0] ** -0.5 - SMALLEST) / (1 - SMALLEST)
    with torch.no_grad():
        guide.inhibition.zero_()
        guide.inhibition[:d] = (values / values[0] - 1).clamp_min(0).sqrt()[:, None] * axes.mT
        e.deep[-1].bias[d : 2 * d] = noise.expm1().log() - SOFTPLUS_ONE
        e.linear.weight.copy_((slopes * e.x_scale[:, None] / e.u_scale).mT)
        e.linear.bias.copy_((origin[0] - e.u_loc) / e.u_scale)
    return guide


def compressed(cost):
    """S12: (c rho)^(2 / (rho + 2)) L^(-2 / (rho + 2)), and L^-1 of the entropic cost."""
    values, axes = torch.linalg.eigh(analysis().exact().precision())
    return axes * cost.optimal_sd(values).square() @ axes.mT


def test_the_exact_posterior_is_a_recurrent_circuit():
    model = analysis()
    x = model.observations()
    with torch.no_grad():
        p, q = model.exact().distribution(x), at(compressed(Entropic())).distribution(x)
    assert float(kl_divergence(q, p).abs().max()) < 1e-9


def slope(guide, cost):
    """The largest derivative of the expected cost, which has a closed form here, by any weight."""
    model = analysis()
    x = model.observations()[:9]
    precision, truth = model.exact().precision(), model.exact().distribution(x).mean
    q = guide.distribution(x)
    error = q.mean - truth
    quadratic = (precision * (q.covariance_matrix + error[..., None] * error[:, None])).sum() / 2
    loss = (quadratic + cost(guide.log_sd(q)).sum()) / len(x)
    gradients = torch.autograd.grad(loss, list(guide.parameters()))
    return max(float(g.abs().max()) for g in gradients)


@pytest.mark.parametrize("name", COSTS)
def test_the_optimum_is_a_compressed_posterior(name):
    """S12: the same axes, eigenvalues drawn to s0^2. The optimum of another cost has a slope."""
    cost = COSTS[name]
    assert slope(at(compressed(cost)), cost) < 1e-8
    for other in COSTS.values():
        if other is not cost:
            assert slope(at(compressed(other)), cost) > 1e-2


# ------------------------------------------------------------------------------ what circuits do


def moments(guide, x, *, draws=300, chains=40, seed=0):
    """Means, second moments and lagged ones of a trajectory, with standard errors from chains."""
    u = guide.draw(x, draws=draws, chains=chains, seed=seed).circuit["potentials"]
    series = u.permute(2, 0, 1, 3).detach().numpy()
    assert effective(series).min() > 500
    y = u - guide.distribution(x).mean.detach()
    products = y[..., None] * y[..., None, :]
    lagged = y[:, 1:, ..., None] * y[:, :-1, ..., None, :]
    each = [t.mean(1) for t in (y, products, lagged)]
    return [(t.mean(0), t.std(0) / chains**0.5) for t in each]


def stays_at_rest(guide, x):
    q = guide.distribution(x)
    s, scale = q.covariance_matrix.detach(), guide.encoder.u_scale
    drift = guide.dynamics(x)[1].detach() * scale[:, None] / scale
    (mean, mean_se), (second, second_se), (lagged, lagged_se) = moments(guide, x)
    within(mean, 0.0, mean_se)
    within(second, s, second_se)
    within(lagged, torch.matrix_exp(-guide.interval * drift) @ s, lagged_se)


@pytest.mark.parametrize("interval", [0.2, 1.5])
def test_trajectories_have_the_law_at_rest_whatever_their_step(interval):
    stays_at_rest(circuit(interval=interval), analysis().observations()[:2])


def test_the_steps_of_euler_are_found_out(monkeypatch):
    """Their noise is right for short steps alone: at a fifth of a time constant it is too large."""

    def euler(drift, covariance, time):
        if time > 1:
            return transition(drift, covariance, time)
        noise = drift @ covariance + covariance @ drift.mT
        return torch.eye(4).to(drift) - time * drift, torch.linalg.cholesky(time * noise)

    monkeypatch.setattr(reliability_circuit, "transition", euler)
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        stays_at_rest(circuit(interval=0.2), analysis().observations()[:2])


@pytest.mark.parametrize("transient", [0.0, 0.4])
def test_an_onset_leads_from_the_prior_to_the_posterior(transient):
    guide, x, n = circuit(transient=transient), analysis().observations()[:2], 4000
    found = guide.draw(x, draws=3, chains=n, seed=0)
    e = guide.encoder
    u = (found.circuit["potentials"][:, 0] - e.u_loc) / e.u_scale
    rest, drift, noise = (t.detach() for t in guide.dynamics(x))
    s = lyapunov(drift, 2 * torch.diag_embed(noise**2))
    decay = torch.matrix_exp(-transient * drift)
    mean = rest - (decay @ rest[..., None])[..., 0]
    covariance = s + decay @ (torch.eye(4).to(s) - s) @ decay.mT
    within(u.mean(0), mean, u.std(0) / n**0.5)
    y = u - mean
    products = y[..., None] * y[..., None, :]
    within(products.mean(0), covariance, products.std(0) / n**0.5)
    assert found.time_constants == pytest.approx(n * (transient + 3))


def test_potentials_are_packed_latents():
    model = zoo.ScaleMixture(2).double()
    x = model.observations()[:3]
    guide = circuit(model)
    found = guide.draw(x, draws=5, chains=2, seed=0)
    values = guide.latents.unpack(found.circuit["potentials"])[0]
    assert all(torch.equal(v, found.values[n]) for n, v in values.items())
    assert found.circuit["potentials"].shape == (2, 5, 3, 3)


def test_draws_become_a_tree_with_chains():
    model, guide = analysis(), circuit()
    tree = diagnostics.draw(model, guide, model.observations()[:2], draws=50, chains=2, seed=0)
    assert tree["circuit"]["potentials"].dims == ("chain", "draw", "problem", "neuron")
    assert not tree.attrs["independent_draws"]
    assert tree.attrs["time_constants"] == 100
    assert (diagnostics.chains.ess_per_time(tree, tree).value > 0).all()


@pytest.mark.parametrize("knobs", [{"interval": 0.0}, {"transient": -1.0}, {"interneurons": 0}])
def test_knobs_out_of_range_are_refused(knobs):
    (name,) = knobs
    with pytest.raises(BadInput, match=rf"^{name}: expected"):
        RecurrentCircuit(analysis(), **knobs)


# --------------------------------------------------------------------------- what circuits learn


def learned(kind, cost, model, **settings):
    """A trained guide; settings that differ from the defaults keep it short."""
    guide = kind(model)
    fit(model, guide, objective=ReliabilityCost(cost), progress=False, **settings)
    return guide.requires_grad_(requires_grad=False)


def problems(model):
    return model.simulate(300, seed=1)[1]


@pytest.mark.parametrize("name", COSTS)
def test_one_layer_learns_the_exact_means_and_the_optimal_noise(name):
    """T12: V = L^-1 W' N^-2, s_i^2 = (s0^rho / L_ii)^(2 / (rho + 2)), to 5 %."""
    model = zoo.FactorAnalysis(7, 3, seed=4).requires_grad_(requires_grad=False)
    guide = learned(SingleLayerCircuit, COSTS[name], model, steps=600, lr=0.02)
    x, precision = problems(model), model.exact().precision()
    q, p = guide.distribution(x), model.exact().distribution(x)
    optimal = COSTS[name].optimal_sd(precision.diagonal()).float()
    torch.testing.assert_close(q.stddev, optimal.expand_as(q.stddev), rtol=0.05, atol=0.0)
    e, w = guide.encoder, model.loadings / model.noise.square()[:, None]
    weights = reliability_circuit.EAGER * e.u_scale[:, None] * e.linear.weight / e.x_scale
    wanted = torch.linalg.solve(precision, w.mT.double()).float()
    assert float((weights - wanted).norm() / wanted.norm()) < 0.05
    marginal = COSTS[name].optimal_sd(1 / p.variance[0])
    assert float((marginal / optimal - 1).abs().max()) > 0.15, "S11: nothing told them apart"


@cache
def trained(kind, name):
    model = zoo.FactorAnalysis(9, 4, seed=3).requires_grad_(requires_grad=False)
    return learned(kind, COSTS[name], model, steps=800, lr=0.02)


def whole(q):
    """The same Gaussian with a covariance matrix."""
    return MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))


@pytest.mark.slow  # 25 s
def test_only_correlations_close_the_gap_to_the_posterior():
    """T13: KL(q || p) is (1/2) (sum log L_ii - log det L) without them and 0 with them, to 2 %."""
    guides = [trained(k, "entropic") for k in (SingleLayerCircuit, MultiLayerCircuit)]
    recurrent = trained(RecurrentCircuit, "entropic")
    exact, x = recurrent.model.exact(), problems(recurrent.model)
    p, gap = exact.distribution(x), float(exact.mean_field_gap())
    for guide in guides:
        kl = float(kl_divergence(whole(guide.distribution(x)), p).mean())
        assert kl == pytest.approx(gap, rel=0.02)
    assert float(kl_divergence(recurrent.distribution(x), p).mean()) < 0.02 * gap


@pytest.mark.slow  # 20 s
def test_a_power_law_compresses_the_learned_covariance_and_keeps_its_axes():
    """S12 and T12: covariance and noise to 5 %; neither depends on the stimulus, nor on |x|."""
    cost = COSTS["power law"]
    recurrent, feedforward = (
        trained(k, "power law") for k in (RecurrentCircuit, MultiLayerCircuit)
    )
    x, precision = problems(recurrent.model), recurrent.model.exact().precision()
    values, axes = torch.linalg.eigh(precision)
    found = axes.mT @ recurrent.distribution(x).covariance_matrix.double() @ axes
    best = cost.optimal_sd(values).square()
    scaled = found.mean(0) / (best[:, None] * best).sqrt()
    torch.testing.assert_close(scaled, torch.eye(4).to(scaled), rtol=0.0, atol=0.05)
    assert float((1 / values / best - 1).abs().max()) > 0.15, "nothing was compressed"
    sd = feedforward.distribution(x).stddev
    optimal = cost.optimal_sd(precision.diagonal()).float()
    torch.testing.assert_close(sd.mean(0), optimal, rtol=0.05, atol=0.0)
    size = x.norm(dim=1) - x.norm(dim=1).mean()
    assert float((size @ sd / size.square().sum()).abs().max()) < 0.02
