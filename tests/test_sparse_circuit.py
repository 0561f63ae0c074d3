"""Circuits of sparse coding: against scikit-learn, optimality, the published dynamics; 15 s."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO
from sklearn.linear_model import Lasso
from threadpoolctl import threadpool_limits

import diagnostics
import inference
import zoo
from inference import (
    ELBO,
    ISTA,
    LCA,
    BadInput,
    FreeEnergy,
    HasBeliefs,
    HasDensity,
    HasPosteriorMode,
    Incompatible,
    MAPEnergy,
    NoDensity,
    SparseLaplace,
    fit,
)
from inference.seeds import seeded

TIGHT = {"steps": 50_000, "tolerance": 1e-11}
CIRCUITS = {
    "lca": (LCA, {}),
    "ista": (ISTA, {}),
    "fista": (ISTA, {"momentum": True}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


class Uneven:
    """Nothing is the same twice: features, rates and locations of K latents, noise of F pixels."""

    def __init__(self, latents, pixels, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = {"generator": g, "dtype": torch.float64}
        self.loc = torch.linspace(-0.7, 1.1, latents).double()
        self.scale = torch.linspace(0.3, 1.4, latents).double()
        features = torch.randn(pixels, latents, **draw)
        self.weights = features * torch.logspace(-0.5, 0.7, latents).double()
        self.offset = torch.randn(pixels, **draw)
        self.noise = 0.4 + torch.rand(pixels, **draw)
        z = self.loc + self.scale * torch.randn(4, latents, **draw)
        self.x = self.decode(z) + self.noise * torch.randn(4, pixels, **draw)

    def decode(self, z):
        return z @ self.weights.T.to(z) + self.offset.to(z)

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            prior = dist.Laplace(self.loc.to(x), self.scale.to(x)).to_event(1)
            mean = self.decode(pyro.sample("z", prior))
            pyro.sample("x", dist.Normal(mean, self.noise.to(x)).to_event(1), obs=x)

    def lasso(self, *, positive):
        """z by coordinate descent, with coefficients in units of their prior's scale."""
        design = (self.weights * self.scale / self.noise[:, None]).numpy()
        target = ((self.x - self.decode(self.loc)) / self.noise).numpy()
        solver = Lasso(
            alpha=1 / len(design), fit_intercept=False, positive=positive, tol=1e-15,
            max_iter=1_000_000, random_state=0,
        )  # fmt: skip
        found = np.array([solver.fit(design, row).coef_ for row in target])
        return self.loc + self.scale * torch.tensor(found)


def model_of(program):
    return zoo.from_pyro(program, program.x)


def mode_of(guide, x):
    return guide.posterior_mode(x)["z"]


def slope(guide, z, x):
    """d log p(x, z) / dz by autograd; the prior's slope is 0 on its kink."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(guide.latents.log_joint({"z": z}, x).sum(), z)[0]


each_circuit = pytest.mark.parametrize(("circuit", "knobs"), CIRCUITS.values(), ids=CIRCUITS)
each_shape = pytest.mark.parametrize("shape", [(5, 7), (9, 6)], ids=["complete", "overcomplete"])


# ------------------------------------------------------------------------------------- the mode


@each_shape
@pytest.mark.parametrize("nonnegative", [False, True])
@each_circuit
def test_mode_is_that_of_scikit_learn(circuit, knobs, nonnegative, shape):
    program = Uneven(*shape)
    guide = circuit(model_of(program), nonnegative=nonnegative, **knobs, **TIGHT)
    found, want = mode_of(guide, program.x), program.lasso(positive=nonnegative)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-7)
    silent = found == program.loc
    assert torch.equal(silent, want == program.loc)
    assert 0.1 < silent.double().mean() < 0.9
    if nonnegative:
        assert (found >= program.loc).all()
        assert not torch.allclose(found, program.lasso(positive=False), atol=0.01)


def missed(program, guide, z):
    """How far the conditions of optimality are missed, by autograd on the Pyro program, (B,)."""
    still = z == program.loc
    excess = (slope(guide, z, program.x).abs() - still / program.scale).clamp_min(0)
    return excess.amax(-1)


@each_shape
@each_circuit
def test_conditions_of_optimality(circuit, knobs, shape):
    program = Uneven(*shape, seed=1)
    guide = circuit(model_of(program), **knobs, **TIGHT)
    z = mode_of(guide, program.x)
    assert float(missed(program, guide, z).max()) < 1e-8
    stated = guide.draw(program.x, draws=1, chains=1, seed=0).stats["violation"]
    assert float(stated.max()) < 1e-8
    active = (z != program.loc).double()
    for planted in (1e-3 * active, -1e-3 * active, 1e-3 * (1 - active)):
        assert float(missed(program, guide, z + planted).min()) > 1e-4
    few = circuit(model_of(program), steps=3, **knobs)
    stated = few.draw(program.x, draws=1, chains=1, seed=0).stats["violation"]
    assert float(stated.min()) > 1e-3


def test_violation_is_the_distance_to_the_subdifferential():
    """In units of the rate, against autograd, at points that are no solution."""
    program = Uneven(5, 7)
    guide = ISTA(model_of(program), steps=4)
    z = mode_of(guide, program.x)
    stated = guide.draw(program.x, draws=2, chains=3, seed=0).stats["violation"]
    still = z == program.loc
    excess = (slope(guide, z, program.x).abs() * program.scale - still.double()).clamp_min(0)
    torch.testing.assert_close(stated, excess.amax(-1).expand(3, 2, 4))


def test_circuits_agree_on_the_canonical_patches():
    model = zoo.SparseCoding().double()
    x = model.observations()
    modes = [mode_of(circuit(model, **knobs, **TIGHT), x) for circuit, knobs in CIRCUITS.values()]
    for z in modes[1:]:
        torch.testing.assert_close(z, modes[0], rtol=0, atol=1e-9)
    assert 0.1 < (modes[0] == 0).double().mean() < 0.9


def test_lca_is_the_published_one():
    """tau du/dt = b - u - (G - 1) a, a = T(u, lambda), for features of norm one, by numpy."""
    model = zoo.SparseCoding(6, noise=0.3, rate=1.5).double()
    x, a = model.simulate(5, seed=1)[1], model.features.detach().numpy()
    gram, b, threshold = a.T @ a, x.numpy() @ a, float(model.rate * model.scale**2)
    size = 1 / np.linalg.eigvalsh(gram)[-1]
    u = np.zeros((5, 6))
    for found in LCA(model).path(x, steps=30):
        answer = np.sign(u) * np.maximum(np.abs(u) - threshold, 0)
        np.testing.assert_allclose(found, answer, rtol=0, atol=1e-12)
        u += size * (b - u - answer @ (gram - np.eye(6)))
    assert (answer != 0).any()


@each_circuit
def test_units_of_features_do_not_matter(circuit, knobs):
    """Features c times as long, of latents c times as rare: z / c at every step."""
    one, other = Uneven(5, 7), Uneven(5, 7)
    c = torch.logspace(-2, 2, 5).double()
    other.weights, other.loc, other.scale = one.weights * c, one.loc / c, one.scale / c
    paths = [
        torch.stack(list(circuit(model_of(p), **knobs).path(one.x, steps=40))) for p in (one, other)
    ]
    torch.testing.assert_close(c * paths[1], paths[0], rtol=1e-9, atol=1e-9)


def energies(guide, x, steps):
    path = torch.stack(list(guide.path(x, steps=steps)))
    return -guide.latents.log_joint({"z": path}, x)


def hasty(circuit):
    """Steps beyond 2 / L."""

    class Hasty(circuit):
        def advance(self, lasso, state):
            return super().advance(replace(lasso, step=3 * lasso.step), state)

    return Hasty


@each_shape
@pytest.mark.parametrize("circuit", [LCA, ISTA])
def test_no_step_raises_the_energy(circuit, shape):
    program = Uneven(*shape)
    found = energies(circuit(model_of(program)), program.x, 300)
    slack = 1e-13 * found.abs().max()
    assert found.diff(dim=0).max() <= slack
    assert (found[0] - found[-1]).min() > 1
    hurried = energies(hasty(circuit)(model_of(program)), program.x, 300)
    assert hurried.diff(dim=0).max() > 1e-3


def fista(model, x, steps):
    """Equations 4.1 to 4.3 of Beck & Teboulle, by numpy, without restarts."""
    phi = (model.features / model.scale).detach().numpy()
    gram, b, rate = phi.T @ phi, x.numpy() @ phi / float(model.scale), float(model.rate)
    size = 1 / np.linalg.eigvalsh(gram)[-1]
    y = v = np.zeros_like(b)
    t = 1.0
    yield y
    for _ in range(steps):
        u = v + size * (b - v @ gram)
        new = np.sign(u) * np.maximum(np.abs(u) - size * rate, 0)
        longer = (1 + np.sqrt(1 + 4 * t**2)) / 2
        y, v, t = new, new + (t - 1) / longer * (new - y), longer
        yield y


def test_momentum_is_the_published_one_until_it_leads_uphill():
    """A restart makes up for what momentum without one loses by running past the mode."""
    model = zoo.SparseCoding(6, noise=0.3, rate=1.5).double()
    x, guide = model.simulate(5, seed=1)[1], ISTA(model, momentum=True)
    found = torch.stack(list(guide.path(x, steps=200)))
    plain = torch.tensor(np.array(list(fista(model, x, 200))))
    torch.testing.assert_close(found[:11], plain[:11], rtol=0, atol=1e-12)
    assert not torch.allclose(found[11], plain[11], atol=1e-3)
    energy = -guide.latents.log_joint({"z": torch.stack([found, plain])}, x)
    excess = (energy - energy[0, -1]).amax(-1)  # (2, steps)
    assert excess[1, 40] > 1e-6 > 100 * excess[0, 40]
    without = energies(ISTA(model), x, 40)[-1] - energy[0, -1]
    assert without.max() > 100 * excess[0, 40]


# ------------------------------------------------------------------------------ inputs and knobs


@each_circuit
def test_a_problem_alone_is_answered_as_among_others(circuit, knobs):
    program = Uneven(5, 7)
    guide = circuit(model_of(program), **knobs, **TIGHT)
    among = mode_of(guide, program.x)
    for b in range(4):
        alone = mode_of(guide, program.x[b : b + 1])
        assert alone.shape == (1, 5)
        torch.testing.assert_close(alone[0], among[b], rtol=0, atol=1e-9)


@each_circuit
def test_a_silent_input_leaves_every_neuron_silent(circuit, knobs):
    program = Uneven(5, 7)
    x = program.decode(program.loc)[None]
    assert torch.equal(mode_of(circuit(model_of(program), **knobs), x), program.loc[None])
    model = zoo.SparseCoding()
    z = mode_of(circuit(model, **knobs), torch.zeros(2, 64))
    assert torch.equal(z, torch.zeros(2, 8))


@each_circuit
def test_a_feature_of_length_zero_is_silent(circuit, knobs):
    model = zoo.SparseCoding(4)
    with torch.no_grad():
        model.dictionary[:, 1] = 0
    z = mode_of(circuit(model, **knobs), model.observations())
    assert z.isfinite().all()
    assert (z[:, 1] == 0).all()
    assert (z[:, [0, 2, 3]] != 0).any(0).all()


@each_circuit
def test_both_precisions_agree_and_the_guide_follows_its_model(circuit, knobs):
    """As well as strong convexity says: |z - z*| <= |subgradient| / smallest eigenvalue of W."""
    model = zoo.SparseCoding()
    x, guide = model.observations(), circuit(model, **knobs)
    found = guide.draw(x, draws=1, chains=1, seed=0)
    single, missed = found.values["z"][0, 0], float(found.stats["violation"].max())
    assert single.dtype == torch.float32
    model.double()
    double = mode_of(guide, x.double())
    assert double.dtype == torch.float64
    phi = model.features / model.scale
    steep = 8**0.5 * (2 * missed + 1e-6) * model.rate / torch.linalg.eigvalsh(phi.T @ phi)[0]
    assert (single - double).norm(dim=1).max() < steep < 1e-3


def test_single_precision_is_done_before_the_last_step():
    """Rounding counts: without allowance for it no tolerance of 1e-6 would be met."""
    model = zoo.SparseCoding()
    guide = ISTA(model, momentum=True)
    counted = []
    advance = guide.advance
    guide.advance = lambda lasso, state: counted.append(1) or advance(lasso, state)
    found = guide.draw(model.observations(), draws=1, chains=1, seed=0)
    assert len(counted) < 200
    assert 1e-6 < found.stats["violation"].max() < 1e-4


def test_an_inner_plate_and_a_picture():
    """Latents in a plate, pixels (2, 3): the same mode as of the flat program."""
    flat = Uneven(4, 6)

    def program(x):
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("neuron", 4, dim=-1):
                z = pyro.sample("z", dist.Laplace(flat.loc, flat.scale))
            mean = flat.decode(z).reshape(-1, 1, 2, 3)
            noise = dist.Normal(mean, flat.noise.reshape(2, 3)).to_event(2)
            pyro.sample("x", noise, obs=x)

    x = flat.x.reshape(4, 1, 2, 3)
    found = LCA(zoo.from_pyro(program, x), **TIGHT).draw(x, draws=2, chains=1, seed=0)
    want = mode_of(LCA(model_of(flat), **TIGHT), flat.x)
    torch.testing.assert_close(found.values["z"], want.expand(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"steps": 0}, r"steps: expected an integer >= 1; got 0"),
        ({"steps": 2.5}, r"steps: expected an integer >= 1; got 2.5"),
        ({"tolerance": -1e-3}, r"tolerance: expected a number >= 0; got -0.001"),
        ({"tolerance": float("nan")}, r"tolerance: .*got nan"),
        ({"tolerance": float("inf")}, r"tolerance: .*got inf"),
    ],
)
@pytest.mark.parametrize("guide", [LCA, ISTA, SparseLaplace])
def test_bad_knobs_are_refused(guide, knobs, message):
    with pytest.raises(BadInput, match=message):
        guide(zoo.SparseCoding(2), **knobs)


def test_a_gaussian_has_no_one_sided_variant():
    with pytest.raises(TypeError, match="nonnegative"):
        SparseLaplace(zoo.SparseCoding(2), nonnegative=True)


@pytest.mark.parametrize("guide", [LCA, ISTA, SparseLaplace])
def test_bad_observations_are_refused(guide):
    model = zoo.SparseCoding(2)
    x, made = model.observations(), guide(model)
    with pytest.raises(BadInput, match=r"x: expected shape \(B, 64\)"):
        made.draw(x[:, :5], draws=1, chains=1, seed=0)
    with pytest.raises(BadInput, match="units"):
        made.draw(255 * x, draws=1, chains=1, seed=0)
    with pytest.raises(BadInput, match="draws"):
        made.draw(x, draws=0, chains=1, seed=0)
    with pytest.raises(BadInput, match="seed"):
        made.draw(x, draws=1, chains=1, seed=-1)


def rectified(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.relu() @ x.new_ones(2, 3), 0.5).to_event(1), obs=x)


@pytest.mark.parametrize("guide", [LCA, ISTA, SparseLaplace])
def test_other_models_are_refused(guide):
    with pytest.raises(Incompatible, match="linear decoder; got a nonlinear one"):
        guide(zoo.from_pyro(rectified, torch.tensor([[0.3, 1.0, -0.4]])))
    with pytest.raises(Incompatible, match="Laplace latents; got Normal"):
        guide(zoo.FactorAnalysis())


# ------------------------------------------------------------------------- a point has no density


@each_circuit
def test_a_point_is_no_variational_guide(circuit, knobs):
    model = zoo.SparseCoding(2)
    x, guide = model.observations(), circuit(model, **knobs)
    assert isinstance(guide, HasPosteriorMode)
    assert not isinstance(guide, HasDensity | HasBeliefs)
    with seeded(0), pytest.raises(NoDensity, match="only be sampled"):
        Trace_ELBO().loss(model, guide, x)
    for objective in (ELBO(), FreeEnergy()):
        with pytest.raises(Incompatible, match="got one without"):
            fit(model, guide, x, objective=objective, steps=2, progress=False)


def test_draws_are_copies_and_the_circuit_tells_what_it_does():
    model = zoo.SparseCoding()
    x, guide = model.observations(), LCA(model)
    found = guide.draw(x, draws=3, chains=2, seed=0)
    z = found.values["z"]
    assert z.shape == (2, 3, 6, 8)
    assert torch.equal(z, mode_of(guide, x).expand_as(z))
    u, rates = found.circuit["potentials"], found.circuit["rates"]
    threshold = float(model.rate * model.scale**2)
    torch.testing.assert_close(z, u.sign() * (u.abs() - threshold).clamp_min(0))
    assert torch.equal(rates, z.abs())
    assert (u[z == 0] != 0).any()
    tree = diagnostics.draw(model, guide, x, draws=3, chains=2, seed=0)
    silent = diagnostics.sparsity(tree, quantity="rates")
    np.testing.assert_allclose(silent["value"], (z == 0)[0, 0].float().mean(-1))


def test_the_pyro_program_samples_the_mode():
    model = zoo.SparseCoding(3)
    x, guide = model.observations(), ISTA(model, momentum=True)
    node = poutine.trace(guide).get_trace(x).nodes["z"]
    assert torch.equal(node["value"], mode_of(guide, x))


# ------------------------------------------------------------------------------------ a Gaussian


def dense(program, z):
    """H of the docstring, by numpy, (B, K, K)."""
    phi = (program.weights / program.noise[:, None]).numpy()
    rate, far = 1 / program.scale.numpy(), np.abs((z - program.loc).numpy())
    return phi.T @ phi + np.stack([np.diag(row) for row in rate / (far + 1 / rate)])


@each_shape
def test_the_gaussian_is_that_of_the_docstring(shape):
    program = Uneven(*shape)
    model = model_of(program)
    guide, z = SparseLaplace(model, **TIGHT), mode_of(ISTA(model, **TIGHT), program.x)
    h = dense(program, z)
    points = z + 0.3 * torch.linspace(-1, 1, 3 * z.numel()).double().reshape(3, *z.shape)
    gap = (points - z).numpy()
    want = 0.5 * (
        np.linalg.slogdet(h)[1]
        - np.einsum("sbi,bij,sbj->sb", gap, h, gap)
        - shape[0] * np.log(2 * np.pi)
    )
    np.testing.assert_allclose(guide.log_prob({"z": points}, program.x), want, rtol=1e-6)
    with seeded(1):
        trace = poutine.trace(guide).get_trace(program.x)
    drawn = {"z": trace.nodes["z"]["value"]}
    total = guide.log_prob(drawn, program.x).sum()
    torch.testing.assert_close(trace.log_prob_sum(), total)


def test_draws_follow_the_density():
    """Means, covariances, and E log q = minus the entropy; too narrow draws are told."""
    program, n = Uneven(5, 7), 4000
    guide = SparseLaplace(model_of(program))
    found = guide.draw(program.x, draws=n, chains=1, seed=0)
    z, centre = found.values["z"][0], mode_of(guide.circuit, program.x)
    covariance = torch.tensor(np.linalg.inv(dense(program, centre)))
    sd = covariance.diagonal(dim1=1, dim2=2).sqrt()
    within(z.mean(0), centre, sd / n**0.5)
    for b in range(4):
        spread = sd[b, :, None] * sd[b]
        within(z[:, b].T.cov(), covariance[b], ((spread**2 + covariance[b] ** 2) / n).sqrt())
    log_q = guide.log_prob({"z": z}, program.x)
    torch.testing.assert_close(found.stats["log_q"][0], log_q)
    entropy = guide.distribution(program.x).entropy()
    within(log_q.mean(0), -entropy, log_q.std(0) / n**0.5)
    narrow = guide.log_prob({"z": centre + 0.9 * (z - centre)}, program.x)
    with pytest.raises(AssertionError, match="standard errors"):
        within(narrow.mean(0), -entropy, narrow.std(0) / n**0.5)


def strong(program, by):
    """Inputs that drive every latent `by` scales away from its location, in either direction."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]).double()
    return program.decode(program.loc + by * program.scale * signs)[None]


def test_where_all_neurons_answer_the_precision_is_the_hessian_plus_the_touching_gaussians():
    program = Uneven(5, 7)
    program.x = torch.cat([program.x, strong(program, 200.0)])
    guide = SparseLaplace(model_of(program), **TIGHT)
    excess = []
    for by in (20.0, 200.0):
        x = strong(program, by)
        z = mode_of(guide.circuit, x)
        assert (z != program.loc).all()
        hessian = torch.autograd.functional.hessian(
            lambda v, x=x: -guide.latents.log_joint({"z": v[None]}, x).sum(), z[0]
        )
        found = guide.distribution(x).precision_matrix[0]
        touching = 1 / (program.scale * ((z - program.loc).abs()[0] + program.scale))
        torch.testing.assert_close(found, hessian + touching.diag(), rtol=1e-8, atol=1e-8)
        excess.append(((found - hessian).diagonal() / hessian.diagonal()).max())
    assert excess[1] < 0.12 * excess[0] < 0.12
    silent = guide.distribution(program.decode(program.loc)[None]).precision_matrix[0]
    torch.testing.assert_close(silent, hessian + (1 / program.scale**2).diag())


def test_the_touching_gaussian_leaves_the_mode_where_it_is():
    """Under the prior Normal(loc, |z* - loc| / r) the posterior mean is z*, silent neurons too."""
    program = Uneven(5, 7)
    z = mode_of(ISTA(model_of(program), **TIGHT), program.x)
    phi = program.weights / program.noise[:, None]
    drive = (program.x - program.decode(program.loc)) / program.noise
    assert (z == program.loc).any()
    for row, target in zip(z - program.loc, drive, strict=True):
        prior = (row.abs() * program.scale).diag()
        gain = prior @ phi.T @ torch.linalg.inv(phi @ prior @ phi.T + torch.eye(7))
        torch.testing.assert_close(gain @ target, row, rtol=0, atol=1e-9)


def test_the_gaussian_against_the_exact_posterior():
    """KL(q || p) from the grid: small, and several times that without the prior's curvature."""
    model = zoo.SparseCoding(2, noise=0.5).double()
    x, n = model.simulate(40, seed=1)[1], 400
    guide = SparseLaplace(model)
    with torch.no_grad(), seeded(0):
        q, evidence = guide.distribution(x), model.exact().log_evidence(x)
        flat = torch.distributions.MultivariateNormal(
            q.mean, precision_matrix=(model.features.T @ model.features / model.scale**2)
        )
        gaps = []
        for law in (q, flat):
            z = law.sample((n,))
            terms = evidence - guide.latents.log_joint({"z": z}, x) + law.log_prob(z)
            gaps.append((terms.mean(), terms.mean(1).std() / n**0.5))
    assert 5 * gaps[0][1] < gaps[0][0] < 0.25
    assert gaps[1][0] - 5 * gaps[1][1] > 2 * gaps[0][0]


def test_the_gaussian_is_a_variational_guide():
    model = zoo.SparseCoding(2).double()
    x, guide = model.observations(), SparseLaplace(model)
    assert isinstance(guide, HasDensity)
    assert not isinstance(guide, HasPosteriorMode)
    with seeded(0):
        loss = ELBO(particles=100)(model, guide, x)["guide"]
    evidence = model.exact().log_evidence(x).mean()
    assert -evidence < loss < -evidence + 1
    guides = {"lca": LCA(model), "gaussian": guide}
    metrics = {name: diagnostics.METRICS[name] for name in ("sd_ratio", "elbo_gap")}
    knobs = {"draws": 200, "chains": 2, "seed": 0, "metrics": metrics}
    table = diagnostics.summary(diagnostics.compare(model, guides, x, **knobs)).value
    assert float(table.sel(guide="lca", metric="sd_ratio")) < 1e-6
    assert np.isnan(table.sel(guide="lca", metric="elbo_gap"))
    assert 0.7 < float(table.sel(guide="gaussian", metric="sd_ratio")) < 1.3
    assert 0 < float(table.sel(guide="gaussian", metric="elbo_gap")) < 0.3


# ------------------------------------------------------------------------------------- learning


def test_map_energy_is_minus_the_log_joint_at_the_mode():
    model = zoo.SparseCoding(3).double()
    x, guide = model.observations(), LCA(model, **TIGHT)
    loss = MAPEnergy()(model, guide, x)["guide"]
    z = mode_of(guide, x)
    by_hand = dist.Normal(z @ model.features.T, model.scale).log_prob(x).sum(-1)
    by_hand = by_hand + dist.Laplace(0.0, 1 / model.rate).log_prob(z).sum(-1)
    torch.testing.assert_close(loss, -by_hand.mean())


@each_circuit
def test_the_gradient_is_that_of_the_smallest_energy(circuit, knobs):
    """Envelope theorem, against differences of the minimum, which moves with the model."""
    model = zoo.SparseCoding(3).double()
    x, guide = model.observations(), circuit(model, **knobs, **TIGHT)
    (slopes,) = torch.autograd.grad(MAPEnergy()(model, guide, x)["guide"], model.dictionary)
    assert slopes.abs().max() > 0.1
    for pixel, feature in ((20, 0), (27, 1), (36, 2)):
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                model.dictionary[pixel, feature] += step
                ends.append(MAPEnergy()(model, guide, x)["guide"])
            model.dictionary[pixel, feature] += 1e-5
        want = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(slopes[pixel, feature], want, rtol=1e-5, atol=1e-6)


def test_map_energy_refuses_what_it_cannot_learn():
    model = zoo.SparseCoding(2)
    x = model.observations()
    with pytest.raises(Incompatible, match=r"MAPEnergy: .*learn_model=False"):
        fit(model, LCA(model), x, objective=MAPEnergy(), steps=1, progress=False)
    with pytest.raises(Incompatible, match=r"HasPosteriorMode; got one without.*LCA or ISTA"):
        knobs = {"objective": MAPEnergy(), "learn_model": True}
        fit(model, model.exact(), x, **knobs, steps=1, progress=False)
    with pytest.raises(Incompatible, match="draws from the model itself"):
        fit(model, LCA(model), objective=MAPEnergy(), learn_model=True, progress=False)


def sparse_data(pixels, features, n, *, present, seed):
    """Features of norm one, each present in a share of the rows; a little noise."""
    g = torch.Generator().manual_seed(seed)
    a = torch.nn.functional.normalize(torch.randn(pixels, features, generator=g), dim=0)
    here = torch.rand(n, features, generator=g) < present
    z = here * torch.randn(n, features, generator=g)
    return a, z @ a.T + 0.05 * torch.randn(n, pixels, generator=g)


def likeness(a, model):
    """For each true feature the cosine of the one found that is most like it."""
    return (a.T @ model.features.detach()).abs().amax(1)


@pytest.mark.parametrize(
    ("circuit", "knobs"), [(LCA, {}), (ISTA, {"momentum": True})], ids=["lca", "fista"]
)
def test_learning_recovers_the_features_of_sparse_data(circuit, knobs):
    a, x = sparse_data(12, 16, 2000, present=0.1, seed=0)
    model = zoo.SparseCoding.for_data(x, latents=16, seed=3)
    before = likeness(a, model)
    guide = circuit(model, tolerance=1e-2, **knobs)
    plan = {"steps": 300, "batch_size": 64, "lr": 3e-2, "learn_model": True, "progress": False}
    done = fit(model, guide, x, objective=MAPEnergy(), **plan)
    assert done.losses["guide"][-20:].mean() < done.losses["guide"][:20].mean() - 3
    assert before.mean() < 0.7
    assert likeness(a, model).mean() > 0.93
    _, dull = sparse_data(12, 16, 2000, present=1.0, seed=0)  # Gaussian: no feature is special
    other = zoo.SparseCoding.for_data(dull, latents=16, seed=3)
    fit(other, circuit(other, tolerance=1e-2, **knobs), dull, objective=MAPEnergy(), **plan)
    assert likeness(a, other).mean() < 0.85


def test_guides_are_in_the_table():
    table = inference.GUIDES
    assert (table["lca"], table["ista"]) == (LCA, ISTA)
    assert table["sparse_laplace"] is SparseLaplace
    assert inference.OBJECTIVES["map_energy"] is MAPEnergy
