"""Iterative guides: identities of the free energy and of its circuits, laws, learning. 25 s."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import optimize
from torch import Tensor
from torch.distributions import kl_divergence

import zoo
from inference import (
    GUIDES,
    BadInput,
    FixedPoint,
    FreeEnergy,
    HasBeliefs,
    Incompatible,
    IterativeGaussian,
    IterativePoisson,
    MeanFieldEncoder,
    OnlinePoisson,
    PoissonEncoder,
    SemiAmortisedPoisson,
    fit,
)
from inference import synapses as wiring
from inference.beliefs import Moment
from inference.coding import Reader
from inference.counts import poisson_kl
from inference.guides.iterative import limit
from inference.guides.iterative_poisson import CEILING
from inference.objectives.free_energy import DIVERGENCES
from inference.seeds import seeded
from inference.synapses import Lateral, Linear, Nonlinear, synapses

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
LONG = 500  # steps after which the circuits of this file are at rest
COUNTS = 30  # largest count of a lattice


@pytest.fixture(autouse=True)
def seed(untouched_globals):
    """What a test draws outside its own seeds is the same in every run."""
    with seeded(0):
        yield


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@dataclass
class Scene:
    """z_k ~ Poisson(exp(log_rate_k)); x given z ~ Normal(phi z + offset, noise).."""

    phi: Tensor
    noise: Tensor
    offset: Tensor
    log_rate: Tensor

    def __call__(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(self.log_rate.exp()).to_event(1))
            law = dist.Normal(z @ self.phi.T + self.offset, self.noise)
            pyro.sample("x", law.to_event(1), obs=x)

    @property
    def gram(self):
        """W = Phi' N^-2 Phi."""
        scaled = self.phi / self.noise[:, None]
        return scaled.T @ scaled

    def drive(self, x):
        """b = Phi' N^-2 (x - offset), (B, K)."""
        return ((x - self.offset) / self.noise.square()) @ self.phi

    def energy(self, z, x):
        """-log p(x given z), (..., B)."""
        error = (x - self.offset - z @ self.phi.T) / self.noise
        normaliser = self.noise.log().sum() + 0.5 * len(self.noise) * math.log(2 * math.pi)
        return 0.5 * error.square().sum(-1) + normaliser

    def free_energy(self, u, x, beta=1.0):
        """F by hand, (..., B): no term of it is the library's."""
        r = u.exp()
        kl = r * (u - self.log_rate) - r + self.log_rate.exp()
        return self.energy(r, x) + 0.5 * r @ self.gram.diag() + beta * kl.sum(-1)

    def slope(self, u, x, beta=1.0):
        """dF/du by autograd, (B, K)."""
        at = u.detach().requires_grad_()
        return torch.autograd.grad(self.free_energy(at, x, beta).sum(), at)[0]

    def learnable(self):
        """A copy with gradients, and its parameters."""
        copy = Scene(*[getattr(self, f.name).clone().requires_grad_() for f in fields(self)])
        return copy, [getattr(copy, f.name) for f in fields(self)]


SCENE = Scene(
    phi=float64([0.8, -0.3, 0.1], [0.2, 0.9, -0.5], [-0.4, 0.3, 0.7], [0.5, 0.1, 0.6],
                [0.1, 0.7, 0.2]),
    noise=float64(0.7, 1.0, 0.8, 1.3, 0.5),
    offset=float64(0.3, -0.2, 0.5, 0.0, 0.1),
    log_rate=float64(-0.5, 0.2, -1.0),
)  # fmt: skip
X = float64([1.0, -0.5, 2.0, 0.3, 0.4], [2.1, 1.2, -0.7, 1.5, 1.1], [-1.0, 2.5, 0.6, -0.4, 1.9],
            [0.3, 3.5, 2.0, 1.9, 2.6])  # fmt: skip
U = float64([0.1, -0.4, 0.5], [-2.0, 1.1, 0.0], [0.7, 0.6, -3.0], [1.2, -1.0, -0.2])
BARE = {"cautious": False}
D = 5  # factors


def model_of(scene, x=X):
    return zoo.from_pyro(scene, x, exact=lambda model: zoo.Enumerated(model, bound=COUNTS))


def circuit(scene=SCENE, x=X, kind=IterativePoisson, **knobs):
    """A circuit that has time to settle."""
    return kind(model_of(scene, x), **{"steps": LONG, **knobs})


def with_step(guide, h):
    """The guide with steps of size h, whatever the load."""
    assert not guide.cautious
    with torch.no_grad():
        guide.log_step.fill_(math.log(h))
    return guide


def one_step(guide, x, *state):
    """Potentials after a step from given ones."""
    *_, last = guide.unroll(x, steps=1, state=state)
    return last.state


@cache
def rest():
    """Potentials at which the circuit of the scene comes to rest, (B, K)."""
    (u,) = circuit().settle(X)
    return u


def nonlinear(bound=COUNTS):
    """Poisson coding with a layer between counts and dictionary, and uneven noise."""
    model = zoo.PoissonCoding(3, side=3, hidden=(4,), bound=bound, seed=2).double()
    model.scale = torch.linspace(0.3, 0.7, 9, dtype=torch.float64)
    return model


# Divergence, identities 1 and 19; and the limit


def test_divergence_of_beliefs_is_that_of_torch():
    """Identity 1, for the law of a circuit."""
    guide = circuit()
    q, p = guide.law(U), guide.law(SCENE.log_rate)
    theirs = kl_divergence(dist.Poisson(U.exp()), dist.Poisson(SCENE.log_rate.exp()))
    torch.testing.assert_close(kl_divergence(q, p), theirs, **TIGHT)
    torch.testing.assert_close(kl_divergence(q, guide.reader().prior), theirs, **TIGHT)
    assert (theirs > 0).all()
    assert not kl_divergence(p, p).any()
    at = U.clone().requires_grad_()
    slope = torch.autograd.grad(poisson_kl(at, SCENE.log_rate.expand(4, 3)).sum(), at)[0]
    torch.testing.assert_close(slope, U.exp() * (U - SCENE.log_rate), **TIGHT)


def test_published_divergence_is_too_large_by_the_ratio_of_rates():
    """Identity 19."""
    guide = circuit(kind=OnlinePoisson)
    q, p = guide.law(U), guide.law(SCENE.log_rate)
    exact, published = (DIVERGENCES[n](q, p) for n in ("exact", "published"))
    torch.testing.assert_close(published, (U - SCENE.log_rate).exp() * exact, **TIGHT)
    assert not torch.allclose(published, exact, rtol=0.1)
    two = [guide.law(float64(math.log(r))) for r in (2.0, 0.5)]
    assert [round(float(DIVERGENCES[n](*two)), 2) for n in ("exact", "published")] == [1.27, 5.09]


def test_published_divergence_is_that_of_counts():
    model = zoo.FactorAnalysis(7, 3, seed=1).double()
    guide = IterativeGaussian(model)
    with pytest.raises(Incompatible, match=r"divergence='published': expected Poisson beliefs"):
        FreeEnergy(divergence="published")(model, guide, model.observations()[:2])


def test_limit_is_the_identity_inside_and_bends_below_the_ceiling():
    inside = torch.linspace(-8.0, 9.0, 30, dtype=torch.float64)
    assert torch.equal(limit(inside, -8.0, 10.0), inside)
    wild = float64(-1e300, -50.0, -8.5, 9.5, 12.0, 1e300, math.inf)
    bounded = limit(wild, -8.0, 10.0)
    assert bounded.tolist()[:3] == [-8.0, -8.0, -8.0]
    assert ((bounded[3:] > 9) & (bounded[3:] <= 10)).all()
    v = float64(-9.0, -7.9, 0.0, 8.9, 9.1, 9.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: limit(t, -8.0, 10.0), v)


# Natural gradient, identity 2


def test_fisher_information_of_counts_is_the_rate():
    u, z = float64(0.3).requires_grad_(), torch.arange(60.0, dtype=torch.float64)
    log_q = circuit().law(u).log_prob(z)
    scores = torch.stack([torch.autograd.grad(t, u, retain_graph=True)[0] for t in log_q])
    assert float(log_q.exp().detach() @ scores.square()) == pytest.approx(math.exp(0.3), rel=1e-10)


@pytest.mark.parametrize("beta", [1.0, 0.3, 5.0])
def test_steps_are_natural_gradient_steps_on_the_exact_free_energy(beta):
    """Identity 2: a step is -h dF/du / r, by autograd of an F written by hand."""
    h = 0.01
    (moved,) = one_step(with_step(circuit(beta=beta, **BARE), h), X, U)
    downhill = -SCENE.slope(U, X, beta) / U.exp()
    torch.testing.assert_close((moved - U) / h, downhill, **TIGHT)
    by_hand = SCENE.drive(X) - U.exp() @ SCENE.gram - SCENE.gram.diag() / 2
    torch.testing.assert_close(downhill, by_hand - beta * (U - SCENE.log_rate), **TIGHT)


def test_without_self_inhibition_a_learned_constant_stands_in_its_place():
    h, bias = 0.01, math.exp(-3.0)
    (moved,) = one_step(with_step(circuit(self_inhibition=False, **BARE), h), X, U)
    downhill = -SCENE.slope(U, X) / U.exp() + SCENE.gram.diag() / 2 - bias
    torch.testing.assert_close((moved - U) / h, downhill, **TIGHT)
    guide = circuit(self_inhibition=False)
    assert guide.log_inhibition.requires_grad
    assert not circuit().log_inhibition.requires_grad


def test_rates_and_log_rates_flow_alike():
    """Identity 2: the natural gradient does not depend on coordinates, but for O(h^2) per step."""

    def gap(h):
        (moved,) = one_step(with_step(circuit(**BARE), h), X, U)
        slope_in_rates = SCENE.slope(U, X) / U.exp()
        rates = U.exp() - h * U.exp() * slope_in_rates  # the Fisher information of a rate is 1 / r
        return (moved.exp() - rates).abs().max()

    ratios = [float(gap(h) / gap(h / 2)) for h in (1e-2, 1e-3)]
    assert ratios[0] == pytest.approx(4, abs=0.1)
    assert ratios[1] == pytest.approx(4, abs=0.01)


def test_cautious_steps_are_shorter_by_the_load():
    free, cautious = with_step(circuit(**BARE), 0.01), circuit(step=0.01)
    (far,), (near,) = one_step(free, X, U), one_step(cautious, X, U)
    load = U.exp() @ SCENE.gram.abs()
    torch.testing.assert_close(near - U, (far - U) / (1 + load), **TIGHT)
    standing = circuit(step=0.01, **BARE)  # by the load of the prior, for all
    (moved,) = one_step(standing, X, U)
    at_prior = float((SCENE.log_rate.exp() @ SCENE.gram.abs()).max())
    torch.testing.assert_close(moved - U, (far - U) / (1 + at_prior), **TIGHT)


# Optimum, identities 3, 4, 5, 6, 8, 16


def test_the_circuit_comes_to_rest_at_a_minimum():
    """Identity 3."""
    u = rest()
    assert float(SCENE.slope(u, X).abs().max()) < 1e-10
    size = torch.logspace(-3, 0, 500, dtype=torch.float64)[:, None, None]
    shaken = u + size * torch.randn(500, *u.shape, dtype=torch.float64)
    assert (SCENE.free_energy(shaken, X) > SCENE.free_energy(u, X)).all()


def test_the_circuit_finds_what_lbfgs_finds():
    """Identity 4: F is convex in the rates, and has one minimum."""
    low = 1e-9

    def value(r, x):
        at = torch.from_numpy(r).requires_grad_()
        loss = SCENE.free_energy(at.log(), x)
        return loss.item(), torch.autograd.grad(loss, at)[0].numpy()

    for x, u in zip(X, rest(), strict=True):
        found = optimize.minimize(value, np.ones(3), (x,), "L-BFGS-B", jac=True,
                                  bounds=3 * [(low, None)],
                                  options={"ftol": 1e-15, "gtol": 1e-10})  # fmt: skip
        torch.testing.assert_close(torch.from_numpy(found.x), u.exp(), rtol=1e-6, atol=1e-8)
        assert found.fun == pytest.approx(float(SCENE.free_energy(u, x)), rel=1e-6)
    a, b = (5 * torch.rand(300, 1, 3, dtype=torch.float64) for _ in range(2))
    ends = (SCENE.free_energy(a.log(), X) + SCENE.free_energy(b.log(), X)) / 2
    assert (SCENE.free_energy(((a + b) / 2).log(), X) < ends).all()


def test_without_self_inhibition_the_optimum_is_missed():
    """The published drift has rates too high, by more than any tolerance here."""
    guide = circuit(self_inhibition=False)
    with torch.no_grad():
        guide.log_inhibition.fill_(-math.inf)
    (u,) = guide.settle(X)
    excess = SCENE.free_energy(u, X) - SCENE.free_energy(rest(), X)
    assert (excess > 0.01).all()
    assert (u.exp().sum(-1) > 1.05 * rest().exp().sum(-1)).all()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(u.exp(), rest().exp(), rtol=1e-2, atol=1e-2)


@cache
def lattice():
    """All counts (S, 3), and log p(x, z) of each, (S, B), by hand."""
    axis = torch.arange(COUNTS + 1.0, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis, axis)
    prior = (z * SCENE.log_rate - SCENE.log_rate.exp() - torch.lgamma(z + 1)).sum(-1)
    return z, prior[:, None] - SCENE.energy(z[:, None], X)


def test_the_lattice_is_the_models_exact_posterior():
    z, joint = lattice()
    exact = model_of(SCENE).exact()
    torch.testing.assert_close(exact.log_evidence(X), joint.logsumexp(0), rtol=0, atol=1e-9)
    edge = (z == COUNTS).any(-1)
    assert float(joint.softmax(0)[edge].sum(0).max()) < 1e-9


def test_the_bound_is_below_the_evidence_by_the_divergence():
    """Identity 5."""
    z, joint = lattice()
    evidence, bound = joint.logsumexp(0), -SCENE.free_energy(rest(), X)
    log_q = circuit().log_prob({"z": z[:, None].expand(-1, 4, -1)}, X)
    assert log_q.shape == joint.shape
    gap = (log_q.exp() * (log_q - joint.log_softmax(0))).sum(0)
    assert (bound <= evidence + 1e-9).all()
    assert (gap > 0.01).all()
    torch.testing.assert_close(evidence - bound, gap, rtol=0, atol=1e-8)
    with pytest.raises(AssertionError):  # half of a variance term forgotten
        spread = 0.5 * rest().exp() @ SCENE.gram.diag()
        torch.testing.assert_close(evidence - bound - spread / 2, gap, rtol=0, atol=1e-8)


def test_features_that_do_not_overlap_do_not_interact():
    """Identity 6: the posterior factorises, and a neuron alone finds what it finds among others."""
    q = torch.linalg.qr(SCENE.phi / SCENE.noise[:, None]).Q
    scene = replace(SCENE, phi=1.3 * q * SCENE.noise[:, None])
    exact = zoo.Enumerated(model_of(scene), bound=15)
    p = exact.logits(X).softmax(0).reshape(16, 16, 16, 4)
    a, b, c = p.sum((1, 2)), p.sum((0, 2)), p.sum((0, 1))
    product = torch.einsum("ax,bx,cx->abcx", a, b, c)
    torch.testing.assert_close(p, product, rtol=0, atol=1e-10)
    (u,) = circuit(scene).settle(X)
    for k in range(3):
        alone = replace(scene, phi=scene.phi[:, [k]], log_rate=scene.log_rate[[k]])
        torch.testing.assert_close(circuit(alone).settle(X)[0], u[:, [k]], **TIGHT)
    overlapping = model_of(SCENE).exact().logits(X).softmax(0).reshape(31, 31, 31, 4)
    ours = torch.einsum("ax,bx->abx", overlapping.sum((1, 2)), overlapping.sum((0, 2)))
    assert (overlapping.sum(2) - ours).abs().max() > 1e-3


def test_a_decoder_of_nothing_leaves_the_prior():
    """Identity 6."""
    scene = replace(SCENE, phi=1e-9 * SCENE.phi)
    (u,) = circuit(scene).settle(X)
    silent = replace(SCENE, phi=0 * SCENE.phi)
    (still,) = circuit(silent).settle(X)
    torch.testing.assert_close(u, SCENE.log_rate.expand(4, 3), rtol=0, atol=1e-7)
    torch.testing.assert_close(still, SCENE.log_rate.expand(4, 3), rtol=0, atol=1e-12)
    exact = model_of(silent).exact()
    z, _ = lattice()
    prior = dist.Poisson(SCENE.log_rate.exp()).log_prob(z).sum(-1)
    posterior = exact.log_prob({"z": z[:, None].expand(-1, 4, -1)}, X)
    torch.testing.assert_close(posterior, prior[:, None].expand(-1, 4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["counts", "Gaussian"])
def test_steps_are_stable_up_to_the_largest_curvature(kind):
    """Identity 8: below h = 2 / lambda_max a perturbation shrinks, and above it grows."""
    beta = 1.0
    if kind == "counts":
        guide, u = with_step(circuit(beta=beta, **BARE), 1.0), rest()[:1]
        stiff = SCENE.gram @ u.exp().diag_embed()[0] + beta * torch.eye(3)
        x, stay = X[:1], ()
    else:
        model = zoo.FactorAnalysis(7, 3, seed=1).double()
        x = model.observations()[:1]
        u, s = IterativeGaussian(model, steps=LONG).settle(x)
        guide = IterativeGaussian(model, **BARE)
        stiff, stay = (2 * s).exp().diag_embed()[0] @ precision_of(model), (s,)
    values, vectors = torch.linalg.eig(stiff)
    top = values.real.argmax()
    direction = vectors.real[:, top]
    perturbed = u + 1e-6 * direction / direction.norm()
    for share, shrinks in ((0.95, True), (1.05, False)):
        with_step(guide, share * 2 / float(values.real[top]))
        *_, last = guide.unroll(x, steps=60, state=(perturbed, *stay))
        assert bool((last.state[0] - u).norm() < 1e-6) is shrinks


@pytest.mark.parametrize("kind", [IterativePoisson, SemiAmortisedPoisson])
def test_cautious_steps_are_stable_wherever_they_start(kind):
    for beta in (0.1, 1.0, 24.0, 1e4):
        (u,) = circuit(kind=kind, beta=beta, steps=4 * LONG).settle(X)
        assert float(SCENE.slope(u, X, beta).abs().max()) < 1e-8 * max(1, beta)


def test_a_strong_leak_holds_the_prior_and_none_leaves_least_squares():
    """Identity 16."""
    (u,) = circuit(beta=1e6).settle(X)
    torch.testing.assert_close(u, SCENE.log_rate.expand(4, 3), rtol=0, atol=1e-4)
    assert not torch.equal(u, SCENE.log_rate.expand(4, 3))
    (u,) = circuit(beta=1e-7, steps=4 * LONG).settle(X)
    root = torch.linalg.cholesky(SCENE.gram)
    wanted = torch.linalg.solve_triangular(
        root, (SCENE.drive(X) - SCENE.gram.diag() / 2).T, upper=False
    )
    found = [torch.from_numpy(optimize.nnls(root.T.numpy(), y.numpy())[0]) for y in wanted.T]
    assert any((r == 0).any() for r in found)
    assert any((r > 0.1).all() for r in found)
    torch.testing.assert_close(u.exp(), torch.stack(found), rtol=0, atol=1e-6)


def test_enumeration_by_pyro_gives_the_evidence_of_the_lattice():
    """Identity 20."""
    axis = torch.arange(COUNTS + 1.0, dtype=torch.float64)
    pmf = axis * SCENE.log_rate[:, None] - SCENE.log_rate.exp()[:, None] - torch.lgamma(axis + 1)

    @config_enumerate
    def program(x):
        with pyro.plate("data", len(x)):
            z = [axis[pyro.sample(f"z{k}", dist.Categorical(logits=pmf[k]))] for k in range(3)]
            mean = sum(z[k][..., None] * SCENE.phi[:, k] for k in range(3)) + SCENE.offset
            pyro.sample("x", dist.Normal(mean, SCENE.noise).to_event(1), obs=x)

    evidence = model_of(SCENE).exact().log_evidence(X)
    for i in range(len(X)):
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        loss = elbo.loss(program, lambda x: None, X[i : i + 1])
        assert -loss == pytest.approx(float(evidence[i]), abs=1e-9)


# Synapses, identity 17


def wired(kind, scene, x=X):
    """Synapses of a kind, whose parameters are those of the scene."""
    return kind(circuit(scene, steps=1).reader(), x)


def everything(kind, z):
    """What synapses of a kind say, and its slopes with respect to z and all parameters."""
    scene, parameters = SCENE.learnable()
    at = z.clone().requires_grad_()
    found = wired(kind, scene)
    currents = found.currents(at)
    said = [currents, found.curvature(at).expand(4, 3), found.energy(at, currents)]
    weights = [torch.linspace(0.3, 1.7, t.numel()).reshape(t.shape).to(t) for t in said]
    slopes = [
        g if g is not None else torch.zeros_like(p)
        for t, w in zip(said, weights, strict=True)
        for p, g in zip(
            [at, *parameters],
            torch.autograd.grad((t * w).sum(), [at, *parameters], retain_graph=True,
                                allow_unused=True),
            strict=True,
        )
    ]  # fmt: skip
    return [t.detach() for t in said], slopes


@pytest.mark.parametrize("kind", [Lateral, Nonlinear])
def test_three_wirings_of_a_linear_decoder_say_the_same(kind):
    """Identity 17, for counts and for numbers that are none, and for all parameters."""
    for z in (U.exp(), float64([0, 3, 1], [2, 0, 0], [0, 0, 0], [5, 1, 7])):
        (said, slopes), (ours, our_slopes) = everything(Linear, z), everything(kind, z)
        for a, b in zip(said + slopes, ours + our_slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-9)
        assert sum(bool(g.any()) for g in slopes) >= 9
        by_hand = SCENE.drive(X) - z @ SCENE.gram, SCENE.gram.diag(), SCENE.energy(z, X)
        for a, b in zip(said, by_hand, strict=True):
            torch.testing.assert_close(a, b.expand(a.shape), **TIGHT)


@pytest.mark.parametrize("kind", [Linear, Lateral])
def test_expected_energy_is_that_of_the_mean_and_half_of_the_variance(kind):
    """Identity 17, and all slopes against an F written by hand."""
    at = U.clone().requires_grad_()
    scene, parameters = SCENE.learnable()
    guide = circuit(scene, steps=1)
    q = guide.law(at)
    ours = wired(kind, scene).expected_energy(q, q) + kl_divergence(q, guide.reader().prior).sum(-1)
    again = U.clone().requires_grad_()
    copy, theirs = SCENE.learnable()
    by_hand = copy.free_energy(again, X)
    torch.testing.assert_close(ours, by_hand, **TIGHT)
    a = torch.autograd.grad(ours.sum(), [at, *parameters])
    b = torch.autograd.grad(by_hand.sum(), [again, *theirs])
    for mine, true in zip(a, b, strict=True):
        torch.testing.assert_close(mine, true, **TIGHT)


def test_the_cheaper_wiring_is_chosen():
    coding = circuit(steps=1).reader()  # 5 pixels, 3 neurons
    assert type(synapses(coding, X, 100)) is Lateral
    assert type(synapses(coding, X[:1], 1)) is Linear
    wide = replace(SCENE, phi=torch.randn(5, 40).double(), log_rate=torch.zeros(40).double())
    assert type(synapses(circuit(wide, steps=1).reader(), X, 10_000)) is Linear
    model = nonlinear()
    bent = IterativePoisson(model, steps=1).reader()
    assert type(synapses(bent, model.observations()[:2], 100)) is Nonlinear


def test_a_nonlinear_decoder_is_wired_by_its_slopes_and_by_single_spikes(monkeypatch):
    model = nonlinear()
    x, noise = model.observations()[:4], model.scale.detach()
    found = Nonlinear(IterativePoisson(model, steps=1).reader(), x)

    def energy(z):
        law = dist.Normal(model.predict({"z": z}), noise)
        return -law.log_prob(x).sum(-1)

    z = U.exp()
    at = z.clone().requires_grad_()
    currents = torch.autograd.grad(-energy(at).sum(), at)[0]
    torch.testing.assert_close(found.currents(z), currents, **TIGHT)
    torch.testing.assert_close(found.energy(z, currents), energy(z), **TIGHT)
    eye = torch.eye(3, dtype=torch.float64)
    more = torch.stack([energy(z + e) for e in eye], -1)
    wanted = 2 * (more - energy(z)[:, None] + currents)
    torch.testing.assert_close(found.curvature(z), wanted, **TIGHT)
    assert not torch.allclose(found.curvature(z), found.curvature(z + 1), rtol=0.05)
    monkeypatch.setattr(wiring, "ROWS", 5)  # one neuron at a time
    torch.testing.assert_close(found.curvature(z), wanted, **TIGHT)
    spread = float64(0.5, 1.1, 0.2).expand(4, 3)  # of beliefs about numbers that are no counts
    both = torch.stack(
        [energy(z + s * e) + energy(z - s * e) for s, e in zip(spread[0], eye, strict=True)], -1
    )
    wanted = (both - 2 * energy(z)[:, None]) / spread.square()
    torch.testing.assert_close(found.curvature(z, spread), wanted, **TIGHT)
    hessian = torch.autograd.functional.hessian(lambda t: energy(t).sum(), z)
    second = hessian.reshape(12, 12).diag().reshape(4, 3)
    near = found.curvature(z, torch.full_like(z, 1e-4))
    torch.testing.assert_close(near, second.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder", ["linear", "nonlinear"])
def test_the_self_term_makes_the_slope_in_a_rate_exact(decoder):
    """E[energy(z + e_k) - energy(z)] = d E[energy] / d r_k, over all counts."""
    model = {"linear": lambda: model_of(SCENE), "nonlinear": nonlinear}[decoder]()
    x = model.observations()[:1]
    coding = IterativePoisson(model, steps=1).reader()
    u = float64(-0.5, 0.3, -1.2)
    z, _ = lattice()
    rates = u.exp().requires_grad_()
    weight = dist.Poisson(rates).log_prob(z).sum(-1).exp()
    found = Nonlinear(coding, x.expand(len(z), -1))
    with torch.no_grad():
        currents = found.currents(z)
        single = found.curvature(z) / 2 - currents
        energy = found.energy(z, currents)
    slope = torch.autograd.grad((weight * energy).sum(), rates)[0]
    mean = weight.detach() @ single
    torch.testing.assert_close(mean, slope, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(weight.detach() @ -currents, slope, rtol=0.05)


# Gaussians, identities 9 to 12


def precision_of(model):
    """L = I + W' Psi^-1 W."""
    scaled = (model.loadings / model.noise[:, None]).detach()
    return torch.eye(scaled.shape[1]).to(scaled) + scaled.T @ scaled


@pytest.fixture(scope="module")
def factors():
    """Factor analysis in float64, and eight observations."""
    model = zoo.FactorAnalysis(7, D, seed=1).double()
    return model, model.observations()[:8]


M0, SD0 = float64(0.6, -1.1, 0.2), float64(0.5, 1.6, 0.9)  # of a prior off centre


def numbers(x):
    """The scene with latents that are Normal, each with a prior of its own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(M0, SD0).to_event(1))
        law = dist.Normal(z @ SCENE.phi.T + SCENE.offset, SCENE.noise)
        pyro.sample("x", law.to_event(1), obs=x)


def test_gaussian_steps_are_natural_gradient_steps():
    """-v dF/dm and -(1/2) dF/ds, F written by hand; the Fisher information is (1 / v, 2)."""
    h, beta = 0.01, 0.7
    m, s = U.clone().requires_grad_(), (U.flip(0) / 2).requires_grad_()
    v, v0 = (2 * s).exp(), SD0.square()
    kl = 0.5 * (v / v0 + (m - M0).square() / v0 - 1 - (v / v0).log()).sum(-1)
    loss = SCENE.energy(m, X) + 0.5 * v @ SCENE.gram.diag() + beta * kl
    slopes = torch.autograd.grad(loss.sum(), (m, s))
    guide = with_step(IterativeGaussian(zoo.from_pyro(numbers, X), beta=beta, **BARE), h)
    moved = one_step(guide, X, m.detach(), s.detach())
    torch.testing.assert_close((moved[0] - m) / h, -v * slopes[0], **TIGHT)
    torch.testing.assert_close((moved[1] - s) / h, -slopes[1] / 2, **TIGHT)


def test_gaussian_circuit_rests_at_the_posterior_of_a_prior_off_centre():
    """Identity 9, by hand: L = W + 1 / v0, mean L^-1 (b + m0 / v0), variances 1 / L_kk."""
    m, s = IterativeGaussian(zoo.from_pyro(numbers, X), steps=2 * LONG).settle(X)
    precision = SCENE.gram + SD0.square().reciprocal().diag()
    mean = torch.linalg.solve(precision, (SCENE.drive(X) + M0 / SD0.square()).T).T
    torch.testing.assert_close(m, mean, rtol=0, atol=1e-12)
    wanted = precision.diag().reciprocal().expand(4, 3)
    torch.testing.assert_close((2 * s).exp(), wanted, rtol=1e-12, atol=0)


def test_gaussian_circuit_finds_the_mean_and_the_conditional_variances(factors):
    """Identities 9 and 10."""
    model, x = factors
    m, s = IterativeGaussian(model, steps=4 * LONG).settle(x)
    exact = model.exact().distribution(x)
    torch.testing.assert_close(m, exact.mean.detach(), rtol=0, atol=1e-12)
    wanted = (1 / precision_of(model).diag()).expand(8, D)
    torch.testing.assert_close((2 * s).exp(), wanted, rtol=1e-12, atol=0)
    over = (2 * s).exp() / exact.variance.detach()
    assert (over <= 1 + 1e-9).all()
    assert (over < 0.7).all()


def test_gaussian_circuit_is_right_where_factors_do_not_overlap(factors):
    model, x = zoo.FactorAnalysis(7, D, seed=1).double(), factors[1]
    with torch.no_grad():
        q = torch.linalg.qr(model.loadings / model.noise[:, None]).Q
        model.loadings.copy_(1.7 * q * model.noise[:, None])
    _, s = IterativeGaussian(model, steps=LONG).settle(x)
    exact = model.exact().distribution(x)
    torch.testing.assert_close((2 * s).exp(), exact.variance.detach(), rtol=1e-12, atol=0)


def test_a_rolling_prior_counts_the_evidence_again_and_again(factors):
    """Identity 11: precisions grow by h d per step; means lag behind the T-fold posterior's."""
    model, x = factors
    eye = torch.eye(D)
    gram = precision_of(model) - eye
    steps = 4000
    h = 20 / (steps * float(gram.diag().max()))
    guide = with_step(IterativeGaussian(model, mode="online", **BARE), h)
    *_, last = guide.unroll(x, steps=steps)
    m, s = last.state
    wanted = 1 + steps * h * gram.diag()
    torch.testing.assert_close((-2 * s).exp(), wanted.expand(8, D), rtol=1e-3, atol=0)
    assert not torch.allclose((-2 * s).exp(), 1 + 2 * steps * h * gram.diag(), rtol=0.1)
    drive = (((x - model.mean) / model.noise.square()) @ model.loadings).detach()
    fold = torch.linalg.solve(eye + steps * h * gram, steps * h * drive.T).T
    once = torch.linalg.solve(eye + gram, drive.T).T
    assert (m - fold).abs().max() > 0.02
    assert (m - fold).norm() < 0.5 * fold.norm()  # if not as close as one exact step
    assert (m - fold).norm() > (once - fold).norm()


def test_one_full_step_from_the_prior_is_the_conjugate_posterior(factors):
    """Identity 12, with b and W read off the synapses of the circuit."""
    model, x = factors
    coding = IterativeGaussian(model, steps=1).reader()
    eye = torch.eye(D, dtype=torch.float64)
    found = Linear(coding, x)
    drive = found.currents(torch.zeros(8, D, dtype=torch.float64))
    gram = torch.stack([drive[0] - Linear(coding, x[:1]).currents(e[None])[0] for e in eye])
    covariance = torch.linalg.inv(eye + gram)
    exact = model.exact().distribution(x)
    torch.testing.assert_close(drive @ covariance, exact.mean, **TIGHT)
    torch.testing.assert_close(covariance.expand(8, D, D), exact.covariance_matrix, **TIGHT)


def test_draws_tell_a_gaussian_circuit_its_variance(factors):
    """Without self-inhibition: the mean of currents times deviation is -v d."""
    model, x = factors
    n, h = 40_000, 1e-3
    m, s = float64(0.4, -0.3, 0.8, 0.1, -0.7), float64(-0.2, 0.1, -0.5, 0.0, 0.3)
    guide = IterativeGaussian(model, signal="spikes", self_inhibition=False, **BARE)
    with_step(guide, h)
    rows = (x[:1].expand(n, -1), m.expand(n, D), s.expand(n, D))
    with seeded(1), torch.no_grad():
        moved = (one_step(guide, *rows)[1] - s) / h
        wanted = one_step(with_step(IterativeGaussian(model, **BARE), h), *(t[:1] for t in rows))
    within(moved.mean(0), ((wanted[1] - s) / h)[0], moved.std(0) / math.sqrt(n))
    with pytest.raises(BadInput, match="self_inhibition: expected True where neurons send"):
        IterativeGaussian(model, self_inhibition=False)


# Spikes, identities 7 and 13


def test_the_first_step_of_spikes_by_hand():
    """Identity 13."""
    for kind, leak in ((OnlinePoisson, 0.0), (IterativePoisson, 1.0)):
        knobs = {"signal": "spikes", "self_inhibition": False, "beta": 0.8, **BARE}
        guide = with_step(circuit(kind=kind, **knobs), 0.05)
        with seeded(3), torch.no_grad():
            first, second, third = guide.unroll(X, steps=2)
        u0 = SCENE.log_rate.expand(4, 3)
        assert torch.equal(first.state[0], u0)
        for now, then in ((first, second), (second, third)):
            assert torch.equal(now.signal, now.signal.round())
            force = SCENE.drive(X) - now.signal @ SCENE.gram - math.exp(-3)
            u = now.state[0] + 0.05 * (force - leak * 0.8 * (now.state[0] - u0))
            torch.testing.assert_close(then.state[0], u, **TIGHT)
        assert first.signal.any()
        assert not torch.allclose(kl_divergence(third.q, third.p), kl_divergence(first.q, first.p))


def test_the_rolling_prior_is_the_belief_before():
    for guide, rolls in ((circuit(kind=OnlinePoisson, steps=5), True), (circuit(steps=5), False)):
        with seeded(4), torch.no_grad():
            path = list(guide.unroll(X, steps=5))
        assert not kl_divergence(path[0].q, path[0].p).any()
        for before, now in pairwise(path):
            prior = before.state[0] if rolls else SCENE.log_rate
            assert torch.equal(now.p.log_rate, prior)


def test_silent_neurons_are_a_tied_linear_encoder():
    """Identity 13: with a prior of no spikes u_1 is affine in x, with the decoder's weights."""
    scene = replace(SCENE, log_rate=torch.full((3,), -30.0, dtype=torch.float64))
    guide = with_step(circuit(scene, signal="spikes", self_inhibition=False, **BARE), 0.05)
    u = [one_step(guide, x, scene.log_rate.expand(4, 3))[0] for x in (X, X + 1, X + 2)]
    torch.testing.assert_close(u[2] - u[1], u[1] - u[0], **TIGHT)
    weights = 0.05 * scene.phi / scene.noise.square()[:, None]
    torch.testing.assert_close(u[1] - u[0], weights.sum(0).expand(4, 3), **TIGHT)


def time_average(h, copies, burn, keep, **knobs):
    """Mean rates of running circuits of the first problem, with standard errors, (3,) each."""
    guide = with_step(circuit(signal="spikes", **BARE, **knobs), h)
    x, total = X[:1].expand(copies, -1), 0
    with seeded(5), torch.no_grad():
        path = guide.unroll(x, steps=burn + keep, state=(rest()[:1].expand(copies, -1),))
        for t, now in enumerate(path):
            total = total + now.q.mean * (t > burn)
    mean = total / keep
    return mean.mean(0), mean.std(0) / math.sqrt(copies)


def test_time_averaged_spikes_approach_the_fixed_point():
    """Identity 7: rates of spiking circuits are off by O(h)."""
    truth = rest()[0].exp()
    biases = []
    for h, bound, keep in ((0.1, 0.015, 300), (0.02, 0.006, 900)):
        mean, se = time_average(h, 2000, int(20 / h), keep)
        assert (se < bound / 5).all()
        assert ((mean - truth).abs() < bound + 3 * se).all()
        biases.append((mean - truth, se))
    (wide, se_wide), (small, se_small) = biases
    assert (wide.abs() > 5 * se_wide).any()  # or the next line would have nothing to say
    within(small, wide / 5, (se_small**2 + (se_wide / 5) ** 2 + (0.2 * small) ** 2).sqrt())


def test_time_averages_without_self_inhibition_are_elsewhere():
    mean, se = time_average(0.1, 500, 200, 200, self_inhibition=False)
    assert ((mean - rest()[0].exp()) > 0.015 + 5 * se).any()


@pytest.mark.parametrize("kind", [IterativePoisson, OnlinePoisson])
def test_draws_of_a_spiking_circuit_are_the_spikes_of_its_run(kind):
    guide = circuit(kind=kind, signal="spikes", steps=7)
    draws = guide.draw(X, draws=5, chains=2, seed=1)
    z, rates = draws.values["z"], draws.circuit["rates"]
    assert torch.equal(z, draws.circuit["spikes"])
    assert z.shape == rates.shape == (2, 5, 4, 3)
    torch.testing.assert_close(draws.stats["log_q"], dist.Poisson(rates).log_prob(z).sum(-1))
    assert draws.time_constants == 2 * (7 + 5)
    assert not guide.independent
    with seeded(1), torch.no_grad():
        path = list(guide.unroll(X.repeat(2, 1), steps=11))
    assert torch.equal(
        torch.stack([now.signal for now in path[7:]]).reshape(5, 2, 4, 3), z.transpose(0, 1)
    )


def test_draws_of_rates_are_independent_draws_of_the_last_belief():
    guide = circuit()
    assert guide.independent
    draws = guide.draw(X, draws=20_000, chains=2, seed=2)
    z, r = draws.values["z"].reshape(-1, 4, 3), rest().exp()
    within(z.mean(0), r, (r / len(z)).sqrt())
    c = torch.corrcoef(z[:, 3].T)
    within(c[~torch.eye(3, dtype=torch.bool)], 0.0, len(z) ** -0.5)
    torch.testing.assert_close(draws.stats["log_q"].reshape(-1, 4), guide.log_prob({"z": z}, X))


# The objective, identity 15


def still(**knobs):
    """FreeEnergy as it is at the end of a fit whose spikes stay as they are."""
    return FreeEnergy(**{"warmup": 0.0, "temperature": (0.1, 0.1), **knobs})


@pytest.mark.parametrize(
    ("over", "divergence"), [("path", "exact"), ("end", "exact"), ("path", "published")]
)
def test_free_energy_is_the_mean_over_steps(over, divergence):
    guide, beta = circuit(training_steps=4), 0.6
    loss = still(over=over, beta=beta, divergence=divergence)(guide.model, guide, X)["guide"]
    with torch.no_grad():
        states = [now.state[0] for now in guide.unroll(X, steps=4)]
    scale = {"exact": lambda u: 1.0, "published": lambda u: (u - SCENE.log_rate).exp()}[divergence]
    terms = []
    for u in states[1:] if over == "path" else states[-1:]:
        likelihood = SCENE.free_energy(u, X, beta=0.0)
        kl = (scale(u) * poisson_kl(u, SCENE.log_rate.expand(4, 3))).sum(-1)
        terms.append((likelihood + beta * kl).mean())
    assert float(loss.detach()) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-12)


def test_with_a_rolling_prior_divergences_are_between_successive_beliefs():
    guide = circuit(kind=OnlinePoisson, signal="rates", training_steps=3)
    loss = still()(guide.model, guide, X)["guide"]
    states = [now.state[0] for now in guide.unroll(X, steps=3)]
    terms = [
        SCENE.free_energy(now, X, beta=0.0) + poisson_kl(now, before).sum(-1)
        for before, now in pairwise(states)
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), **TIGHT)


def test_backpropagation_through_time_is_the_slope_of_the_loss():
    """Of the path's mean, with respect to step size and model, by finite differences."""
    scene, parameters = SCENE.learnable()
    guide = circuit(scene, learn_step=True, training_steps=5, **BARE)

    def loss():
        return still()(guide.model, guide, X)["guide"]

    slopes = torch.autograd.grad(loss(), [guide.log_step, *parameters])
    for p, slope in zip([guide.log_step, *parameters], slopes, strict=True):
        direction = torch.randn_like(p)
        ends = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                p.add_(sign * 1e-5 * direction)
                ends.append(loss())
        finite = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(finite, (slope * direction).sum(), rtol=1e-6, atol=1e-8)


def test_slopes_go_through_the_sizes_of_cautious_steps():
    """Backpropagation through a run written by hand; with loads of no slope it would not agree."""
    scene, parameters = SCENE.learnable()
    guide = circuit(scene, learn_step=True, training_steps=3)
    loss = still(over="end")(guide.model, guide, X)["guide"]
    copy, theirs = SCENE.learnable()
    log_step = guide.log_step.detach().clone().requires_grad_()
    u = copy.log_rate.expand(4, 3)
    for _ in range(3):
        load = u.exp() @ copy.gram.abs()
        force = copy.drive(X) - u.exp() @ copy.gram - copy.gram.diag() / 2 - (u - copy.log_rate)
        u = u + log_step.exp() / (1 + load) * force
    by_hand = copy.free_energy(u, X).mean()
    torch.testing.assert_close(loss, by_hand, **TIGHT)
    a = torch.autograd.grad(loss, [guide.log_step, *parameters])
    b = torch.autograd.grad(by_hand, [log_step, *theirs])
    for mine, true in zip(a, b, strict=True):
        torch.testing.assert_close(mine, true, **TIGHT)


def test_a_guess_is_learned_through_the_steps_that_refine_it():
    """The best belief is reached; without the slope of the load guesses went to the ceiling."""
    model = zoo.PoissonCoding()
    x = model.observations()[:20]
    guide = SemiAmortisedPoisson(model, training_steps=16, seed=1)
    knobs = {"steps": 150, "batch_size": 64, "seed": 1, "progress": False}
    losses = fit(model, guide, **knobs).losses["guide"]
    assert losses.max() < 30
    best = IterativePoisson(model, steps=LONG)
    with torch.no_grad():
        ends = [[*g.unroll(x, steps=g.steps)][-1] for g in (guide, best)]
        prior = best.law(model.log_rate)
        mine, least = (e.expected_energy() + kl_divergence(e.q, prior).sum(-1) for e in ends)
    assert (mine > least - 1e-3).all()
    assert float((mine - least).mean()) < 0.02


def test_schedules_of_temperature_and_divergence(monkeypatch):
    guide = circuit(training_steps=2)
    objective = FreeEnergy(beta=3.0, temperature=(0.9, 0.1), cooled=0.5, warmup=0.2, over="end")
    seen, unroll = [], guide.unroll

    def spy(x, **knobs):
        seen.append(knobs["temperature"])
        return unroll(x, **knobs)

    monkeypatch.setattr(guide, "unroll", spy)
    losses = []
    for progress in (0.0, 0.1, 0.2, 0.25, 0.5, 0.99):
        objective.progress = progress
        losses.append(float(objective(guide.model, guide, X)["guide"].detach()))
    assert seen == pytest.approx([0.9, 0.74, 0.58, 0.5, 0.1, 0.1])
    (u,) = [now.state[0] for now in unroll(X, steps=2)][-1:]
    energy = float(SCENE.free_energy(u, X, beta=0.0).mean())
    kl = float(poisson_kl(u, SCENE.log_rate.expand(4, 3)).sum(-1).mean())
    weights = [(loss - energy) / kl for loss in losses]
    assert weights == pytest.approx([3e-4, 1.5, 3.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
def test_sampled_energy_is_unbiased_once_the_missing_variance_is_back(tau):
    """Identity 15 and its correction, in value and in slope."""
    n = 60_000
    guide = circuit(signal="spikes")
    u = U[1].expand(n, 3).clone().requires_grad_()
    with seeded(6):
        (now,) = guide.unroll(X[1:2].expand(n, -1), steps=0, state=(u,), temperature=tau)
    assert now.drawn
    sampled, raw = now.sampled_energy(), now.synapses.energy(now.signal, now.currents)
    at = U[1:2].clone().requires_grad_()
    closed = SCENE.free_energy(at, X[1:2], beta=0.0)
    mean = sampled.mean().detach()
    within(mean, closed.detach(), sampled.std().detach() / math.sqrt(n))
    slopes = torch.autograd.grad(sampled.sum(), u, retain_graph=True)[0]
    wanted = torch.autograd.grad(closed.sum(), at)[0]
    within(slopes.mean(0), wanted[0], slopes.std(0) / math.sqrt(n))
    lost = 0.5 * 9 * tau / 35 * float(SCENE.gram.diag() @ U[1].exp())
    se = float(raw.std().detach()) / math.sqrt(n)
    within(raw.mean().detach(), closed.detach() - lost, se)
    if lost > 10 * se:
        with pytest.raises(AssertionError):
            within(raw.mean().detach(), closed.detach(), se)


def test_sampled_energy_of_rates_has_all_the_variance_put_back():
    guide = circuit(training_steps=4, learn_step=True)
    by_kind = [
        still(reconstruction=r)(guide.model, guide, X)["guide"] for r in ("closed_form", "sample")
    ]
    torch.testing.assert_close(*by_kind, **TIGHT)
    slopes = [torch.autograd.grad(loss, guide.log_step)[0] for loss in by_kind]
    torch.testing.assert_close(*slopes, **TIGHT)


def test_sampled_free_energy_of_spikes_is_that_in_closed_form_in_the_mean():
    guide = circuit(kind=OnlinePoisson, training_steps=3)
    x = X[:1].expand(20_000, -1)
    found = []
    for reconstruction in ("closed_form", "sample"):
        path = []
        with seeded(7), torch.no_grad():
            for now in guide.unroll(x, steps=3, temperature=0.5):
                path.append(
                    {"closed_form": Moment.expected_energy, "sample": Moment.sampled_energy}[
                        reconstruction
                    ](now)
                )
        found.append(torch.stack(path).mean(0))
    difference = found[0] - found[1]
    within(difference.mean(), 0.0, difference.std() / math.sqrt(len(x)))


def test_energy_of_a_nonlinear_decoder_is_by_draws():
    model = nonlinear()
    guide = IterativePoisson(model, steps=1)
    n, x, u = 40_000, model.observations()[:1], float64(-0.5, 0.3, -1.2)
    z, _ = lattice()
    with torch.no_grad(), seeded(8):
        weight = guide.law(u).log_prob(z).sum(-1).exp()
        law = dist.Normal(model.predict({"z": z}), model.scale)
        truth = -(weight * law.log_prob(x).sum(-1)).sum()
        (now,) = guide.unroll(x.expand(n, -1), steps=0, state=(u.expand(n, 3),))
        energies = now.expected_energy()
        at_mean = float(now.synapses.energy(u.exp().expand(n, 3), now.currents)[0])
    within(energies.mean(), truth, energies.std() / math.sqrt(n))
    assert abs(at_mean - float(truth)) > 10 * float(energies.std()) / math.sqrt(n)


# Truncation


def truncated(truncate, over, signal="rates"):
    """Loss and its slopes by step size and parameters of the model."""
    scene, parameters = SCENE.learnable()
    guide = circuit(scene, signal=signal, learn_step=True, training_steps=4, **BARE)
    with seeded(9):
        loss = still(truncate=truncate, over=over)(guide.model, guide, X)["guide"]
    return loss.detach(), torch.autograd.grad(loss, [guide.log_step, *parameters])


@pytest.mark.parametrize("over", ["path", "end"])
@pytest.mark.parametrize("signal", ["rates", "spikes"])
def test_truncation_beyond_the_path_is_none(over, signal):
    loss, slopes = truncated(0, over, signal)
    for truncate in (4, 5, 9):
        again, others = truncated(truncate, over, signal)
        assert torch.equal(loss, again)
        for a, b in zip(slopes, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for truncate in (1, 2, 3):
        again, others = truncated(truncate, over, signal)
        torch.testing.assert_close(loss, again, **TIGHT)
        assert not torch.allclose(slopes[0], others[0], rtol=1e-3)
        assert others[0].any()


def test_truncation_to_one_step_leaves_the_slope_of_the_last_step_alone():
    scene, parameters = SCENE.learnable()
    guide = circuit(scene, learn_step=True, training_steps=4, **BARE)
    with torch.no_grad():
        *_, before, _ = guide.unroll(X, steps=4)
    (s,) = before.state
    h = guide.log_step.exp()
    start = scene.log_rate + (s - scene.log_rate).detach()  # a shift of the start shifts all
    force = scene.drive(X) - s.exp() @ scene.gram - scene.gram.diag() / 2
    last = start + h * (force - (start - scene.log_rate))
    loss = scene.free_energy(last, X).mean()
    by_hand = torch.autograd.grad(loss, [guide.log_step, *parameters])
    value, slopes = truncated(1, "end")
    torch.testing.assert_close(value, loss.detach(), **TIGHT)
    for a, b in zip(slopes, by_hand, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


# FixedPoint


def test_fixed_point_gives_the_slope_of_the_minimum():
    """Envelope theorem: finite differences of min_u F, for dictionary, noise, offset and prior."""
    scene, parameters = SCENE.learnable()
    guide = circuit(scene)
    loss = FixedPoint()(guide.model, guide, X)["guide"]
    assert float(loss.detach()) == pytest.approx(
        float(SCENE.free_energy(rest(), X).mean()), rel=1e-12
    )
    slopes = torch.autograd.grad(loss, parameters)
    for k, (p, slope) in enumerate(zip(parameters, slopes, strict=True)):
        direction = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            moved = [
                q.detach() + (sign * 1e-4 * direction if i == k else 0)
                for i, q in enumerate(parameters)
            ]
            there = Scene(*moved)
            (u,) = circuit(there).settle(X)
            ends.append(there.free_energy(u, X).mean())
        finite = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close((slope * direction).sum(), finite, rtol=1e-6, atol=1e-8)
    r, error = rest().exp(), X - SCENE.offset - rest().exp() @ SCENE.phi.T
    local = (error.T @ r / 4 - SCENE.phi * r.mean(0)) / -SCENE.noise.square()[:, None]
    torch.testing.assert_close(slopes[0], local, rtol=1e-8, atol=1e-8)


def test_fixed_point_away_from_the_minimum_is_not_its_slope():
    """The planted error: a circuit that has no time to settle, or that lacks self-inhibition."""
    wanted = None
    for knobs in ({}, {"steps": 2}, {"self_inhibition": False}):
        scene, parameters = SCENE.learnable()
        guide = circuit(scene, **knobs)
        loss = FixedPoint()(guide.model, guide, X)["guide"]
        slopes = torch.autograd.grad(loss, parameters)
        wanted = wanted or slopes
        assert bool(knobs) is not torch.allclose(slopes[0], wanted[0], rtol=1e-3)


def test_objectives_refuse_what_they_cannot_train(factors):
    model, x = factors
    encoder = MeanFieldEncoder(model, hidden=(4,))
    assert isinstance(IterativeGaussian(model, steps=1), HasBeliefs)
    assert not isinstance(encoder, HasBeliefs)
    with pytest.raises(Incompatible, match=r"FreeEnergy with MeanFieldEncoder: .*HasBeliefs.*ELBO"):
        fit(model, encoder, x, objective=FreeEnergy(), steps=1, progress=False)
    with pytest.raises(Incompatible, match=r"FixedPoint with MeanFieldEncoder: .*iterates"):
        fit(model, encoder, x, objective=FixedPoint(), learn_model=True, steps=1, progress=False)
    guide = IterativeGaussian(model, steps=1)
    with pytest.raises(
        Incompatible, match=r"FixedPoint: expected a model to learn.*learn_model=Tr"
    ):
        fit(model, guide, x, objective=FixedPoint(), steps=1, progress=False)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": -1.0}, "beta: expected a number >= 0"),
        ({"beta": math.nan}, "beta: expected a number >= 0"),
        ({"divergence": "exat"}, "Did you mean 'exact'"),
        ({"reconstruction": "samples"}, "Did you mean 'sample'"),
        ({"over": "all"}, "over: expected one of end, path"),
    ],
)
def test_wrong_knobs_of_the_free_energy_are_named(knobs, message):
    with pytest.raises(BadInput, match=message):
        FreeEnergy(**knobs)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mode": "onlin"}, "Did you mean 'online'"),
        ({"signal": "rate"}, "Did you mean 'rates'"),
        ({"steps": -1}, "steps: expected an integer >= 0; got -1"),
        ({"steps": 2.0}, "steps: expected an integer >= 0"),
        ({"training_steps": True}, "training_steps: expected an integer >= 0"),
        ({"beta": -0.1}, "beta: expected a number >= 0"),
        ({"step": 0.0}, "step: expected a positive, finite number"),
        ({"step": math.inf}, "step: expected a positive, finite number"),
    ],
)
def test_wrong_knobs_of_a_circuit_are_named(knobs, message):
    with pytest.raises(BadInput, match=message):
        circuit(**knobs)


# Hard observations


def wild(guide):
    """The guide with parameters far from their start."""
    with torch.no_grad(), seeded(1):
        for p in guide.parameters():
            p.add_(torch.randn_like(p).abs() if p.numel() == 1 else torch.randn_like(p))
    return guide


FAR_OUT = {
    "rates": lambda m: IterativePoisson(m, steps=300, learn_step=True),
    "spikes": lambda m: IterativePoisson(m, steps=300, signal="spikes", learn_step=True),
    "heedless": lambda m: IterativePoisson(m, steps=300, cautious=False, learn_step=True),
    "online": lambda m: OnlinePoisson(m, steps=300),
    "online, heedless": lambda m: OnlinePoisson(m, steps=300, cautious=False),
    "amortised": lambda m: wild(PoissonEncoder(m)),
    "semi-amortised": lambda m: wild(SemiAmortisedPoisson(m)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.5, 1e-3])
@pytest.mark.parametrize("name", FAR_OUT)
def test_the_largest_observations_in_range_overflow_nothing(name, noise, dtype):
    """Rates stay below their ceiling, counts are integers, and slopes are finite."""
    model = zoo.PoissonCoding(4, side=3, noise=noise).to(dtype)
    own = model.observations()
    far = float(own.abs().max() + 9 * max(own.max() - own.min(), own.abs().max()))
    x = torch.stack(
        [far * torch.ones(9), -far * torch.ones(9), far * own[0] / own[0].abs().max()]
    ).to(dtype)
    guide, largest = FAR_OUT[name](model).to(dtype), -math.inf
    with torch.no_grad(), seeded(2):
        for now in guide.unroll(x, steps=guide.steps):
            assert torch.isfinite(now.state[0]).all()
            largest = max(largest, float(now.state[0].max()))
        draws = guide.draw(x, draws=3, chains=2, seed=0)
    assert largest <= CEILING
    z = draws.values["z"]
    assert z.dtype == dtype
    assert torch.equal(z.to(torch.int32).to(dtype), z)
    assert largest > 2  # or nothing was far out
    assert torch.isfinite(draws.stats["log_q"]).all()
    with seeded(3):
        loss = FreeEnergy()(model, guide, x)["guide"]
    learned = [p for p in (*guide.parameters(), *model.parameters()) if p.requires_grad]
    slopes = torch.autograd.grad(loss, learned, allow_unused=True)
    found = [g for g in slopes if g is not None]
    assert len(found) >= 3  # dictionary, noise, rates of the prior
    assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("mode", ["fixed", "online"])
def test_gaussian_circuits_survive_the_largest_observations(mode):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = 9 * model.observations()[:3]
    guide = IterativeGaussian(model, mode=mode, learn_step=True)
    m, s = guide.settle(x)
    assert torch.isfinite(m).all()
    assert torch.isfinite(s).all()
    loss = FreeEnergy()(model, guide, x)["guide"]
    assert torch.isfinite(torch.autograd.grad(loss, guide.log_step)[0]).all()


def test_observations_in_other_units_are_named():
    guide = circuit(steps=5)
    message = r"^x: expected values in the range of the model's own, -1 to 3\.5; got 892\. Bring x"
    for call in (lambda x: guide.draw(x, draws=1, chains=1, seed=0), guide, guide.settle):
        with pytest.raises(BadInput, match=message):
            call(255 * X)
    guide.settle(9 * X)


def test_a_problem_alone_is_as_among_others():
    for guide in (
        circuit(),
        circuit(kind=SemiAmortisedPoisson, steps=50),
        circuit(mode="online", steps=50),
    ):
        (u,) = wild(guide).settle(X)
        for i in range(4):
            torch.testing.assert_close(
                guide.settle(X[i : i + 1])[0], u[i : i + 1], rtol=1e-9, atol=1e-9
            )
        assert not torch.allclose(u[0], u[1], rtol=0.1)


def test_a_silent_image_lowers_the_rates():
    """x = decode(0): at the optimum r'(u - u0) = -r'W r - d'r / 2, below zero."""
    x = SCENE.offset[None]
    (u,) = circuit().settle(x)
    r = u.exp()
    pull = (r * (u - SCENE.log_rate)).sum()
    torch.testing.assert_close(
        pull, -(r @ SCENE.gram @ r.T).squeeze() - 0.5 * (r @ SCENE.gram.diag()).squeeze()
    )
    assert float(pull) < -0.1
    nonlinear_guide = IterativePoisson(nonlinear(), steps=50)
    blank = nonlinear_guide.reader().offset[None].detach()
    assert torch.isfinite(nonlinear_guide.settle(blank)[0]).all()


def test_scalars_are_one_neuron_and_one_pixel():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(x.new_tensor(2.0)))
            pyro.sample("x", dist.Normal(0.7 * z + 0.2, 0.5), obs=x)

    x = float64(0.1, 2.0, 4.0)
    model = zoo.from_pyro(program, x, exact=lambda m: zoo.Enumerated(m, bound=COUNTS))
    scene = Scene(float64([0.7]), float64(0.5), float64(0.2), float64(math.log(2.0)))
    guide = IterativePoisson(model, steps=LONG)
    (u,) = guide.settle(x)
    torch.testing.assert_close(u, circuit(scene, x[:, None]).settle(x[:, None])[0], **TIGHT)
    draws = guide.draw(x, draws=4, chains=2, seed=0)
    assert draws.values["z"].shape == (2, 4, 3)
    torch.testing.assert_close(guide.log_prob(draws.values, x), draws.stats["log_q"])
    assert PoissonEncoder(model).draw(x, draws=4, chains=2, seed=0).values["z"].shape == (2, 4, 3)


# Unsuitable models


def tampered(prior=None, likelihood=None, factor=False):
    """The scene with another prior, another noise or a factor, as a program."""

    def program(x):
        with pyro.plate("data", len(x)):
            law = prior(x) if prior else dist.Poisson(SCENE.log_rate.exp())
            z = pyro.sample("z", law.to_event(1))
            mean = z @ SCENE.phi.T + SCENE.offset
            law = likelihood(mean, z) if likelihood else dist.Normal(mean, SCENE.noise)
            pyro.sample("x", law.to_event(1), obs=x)
            if factor:
                pyro.factor("tilt", z.sum(-1))

    return program


UNSUITABLE = {
    "other latents": ({"prior": lambda x: dist.Geometric(float64(0.3, 0.5, 0.4))},
                      "expected Poisson latents; got Geometric latents"),
    "other noise": ({"likelihood": lambda m, z: dist.StudentT(5.0, m, SCENE.noise)},
                    "expected Normal observations; got x of StudentT"),
    "a prior that depends on x": ({"prior": lambda x: dist.Poisson(x[:, :3].exp())},
                                  "expected the same independent prior for every problem"),
    "noise that depends on z": ({"likelihood": lambda m, z: dist.Normal(m, 1 + z.sum(-1, True))},
                                "expected noise of the same size for every z and problem"),
    "noise that depends on x": (
        {"likelihood": lambda m, z: dist.Normal(m, torch.linspace(1, 2, len(m)).to(m)[:, None])},
        "expected noise of the same size for every z and problem"),
    "a factor": ({"factor": True}, r"no factors; got sites \['z'\] and factors \['tilt'\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSUITABLE)
def test_unsuitable_models_are_refused(case):
    """Two sites, other latents and data sets that are one problem: see tests/test_guides.py."""
    knobs, message = UNSUITABLE[case]
    model = zoo.from_pyro(tampered(**knobs), X)
    with pytest.raises(Incompatible, match=rf"^IterativePoisson and the model: .*{message}"):
        IterativePoisson(model)
    IterativePoisson(zoo.from_pyro(tampered(), X))


def test_a_pair_of_tensors_is_no_image():
    def program(inputs, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(SCENE.log_rate.exp()).to_event(1))
            mean = z @ SCENE.phi.T + inputs
            pyro.sample("x", dist.Normal(mean, SCENE.noise).to_event(1), obs=x)

    with pytest.raises(Incompatible, match="one tensor observed"):
        IterativePoisson(zoo.from_pyro(program, (X, X)))


def test_decoders_are_told_apart():
    for model, linear in ((model_of(SCENE), True), (nonlinear(), False)):
        reader = Reader(IterativePoisson(model).latents, dist.Poisson, "test")
        coding = reader()
        assert reader.linear is linear
        assert (coding.weights is not None) is linear
        z = U.exp()
        torch.testing.assert_close(coding.offset, coding.decode(0 * z)[0], **TIGHT)
        if linear:
            torch.testing.assert_close(coding.weights, SCENE.phi, **TIGHT)
            torch.testing.assert_close(coding.noise, SCENE.noise, **TIGHT)
            torch.testing.assert_close(coding.decode(z), z @ SCENE.phi.T + SCENE.offset, **TIGHT)


# Learning


@cache
def images():
    """Training and held-out images of three features, and the exact -log p of those held out."""
    model = zoo.PoissonCoding(3, side=3, noise=0.5, bound=12, seed=3)
    _, x = model.simulate(700, seed=1)
    with torch.no_grad():
        return x[:400], x[400:], -model.exact().log_evidence(x[400:])


def held_out(model):
    """Free energy of the images held out, (B,), by a circuit that has nothing to learn."""
    guide = IterativePoisson(model, steps=300)
    with torch.no_grad():
        *_, last = guide.unroll(images()[1], steps=300)
        return last.expected_energy() + kl_divergence(last.q, last.p).sum(-1)


def blank():
    """A model that knows nothing yet of the images."""
    return zoo.PoissonCoding.for_data(images()[0], latents=3, seed=5)


def learner(kind=IterativePoisson, **knobs):
    model = blank()
    return model, kind(model, **{"steps": 40, "training_steps": 5, **knobs})


def learn(model, guide, objective, steps=60, **knobs):
    settings = {"batch_size": 100, "lr": 0.05, "seed": 0, "learn_model": True, "progress": False}
    return fit(model, guide, images()[0], objective=objective, steps=steps, **{**settings, **knobs})


LEARNERS = {
    "backpropagation through time": (IterativePoisson, FreeEnergy),
    "truncated": (IterativePoisson, lambda: FreeEnergy(truncate=2)),
    "of the end": (
        lambda m, **k: IterativePoisson(m, learn_step=True, **k),
        lambda: FreeEnergy(over="end"),
    ),
    "spikes": (
        lambda m, **k: IterativePoisson(m, signal="spikes", **k),
        lambda: FreeEnergy(reconstruction="sample"),
    ),
    "published": (OnlinePoisson, lambda: FreeEnergy(beta=5.0, divergence="published")),
    "fixed point": (IterativePoisson, FixedPoint),
    "amortised": (lambda m, **k: PoissonEncoder(m), FreeEnergy),
    "semi-amortised": (SemiAmortisedPoisson, FreeEnergy),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_dictionary_is_learned(name):
    """Held-out free energy falls, and not below what no model can do better than on average."""
    kind, objective = LEARNERS[name]
    model, guide = learner(kind)
    before, best = held_out(model), images()[2]
    run = learn(model, guide, objective())
    after = held_out(model)
    gain, left = before - after, after - best
    assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(len(gain))
    assert float(gain.mean()) > 0.4 * float((before - best).mean())
    assert float(left.mean()) > -5 * float(left.std()) / math.sqrt(len(left))
    assert np.isfinite(run.losses["guide"]).all()


def test_nothing_is_learned_where_nothing_may_be():
    model, guide = learner()
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = learn(model, guide, FreeEnergy(), steps=3, learn_model=False)
    assert run.steps == 0  # the circuit has nothing to learn
    model, guide = learner(learn_step=True)
    run = learn(model, guide, FreeEnergy(), steps=3, learn_model=False)
    assert run.steps == 3
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert float(guide.log_step.detach()) != 0.0


def test_a_learned_model_is_read_anew():
    """The circuit follows the parameters of its model, and its training ends with inference."""
    model, guide = learner()
    x = images()[1][:5]
    (before,) = guide.settle(x)
    learn(model, guide, FreeEnergy(), steps=5)
    assert not guide.training
    (after,) = guide.settle(x)
    assert not torch.allclose(before, after, rtol=1e-3)
    fresh = IterativePoisson(model, steps=40)
    torch.testing.assert_close(fresh.settle(x)[0], after, rtol=1e-4, atol=1e-4)


class Fragile(FreeEnergy):
    """FreeEnergy that is interrupted at one of its calls."""

    calls, breaks_at = 0, -1

    def forward(self, model, guide, x, z=None):
        Fragile.calls += 1
        if Fragile.calls - 1 == Fragile.breaks_at:
            raise KeyboardInterrupt
        return super().forward(model, guide, x, z)


@pytest.mark.parametrize("kind", [OnlinePoisson, SemiAmortisedPoisson])
def test_a_killed_run_ends_with_the_numbers_of_an_unbroken_one(kind, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"

    def run(breaks_at=-1, **knobs):
        monkeypatch.setattr(Fragile, "calls", 0)
        monkeypatch.setattr(Fragile, "breaks_at", breaks_at)
        model, guide = learner(kind)
        return learn(model, guide, Fragile(), steps=12, **knobs), model

    whole, model = run()
    with pytest.raises(KeyboardInterrupt):
        run(7, checkpoint=path)
    resumed, again = run(checkpoint=path)
    assert Fragile.calls == 5
    assert np.array_equal(whole.losses["guide"], resumed.losses["guide"])
    for a, b in ((whole.guide, resumed.guide), (model, again)):
        assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def test_every_iterative_guide_is_in_the_table():
    known = {
        IterativePoisson,
        OnlinePoisson,
        IterativeGaussian,
        PoissonEncoder,
        SemiAmortisedPoisson,
    }
    assert known <= set(GUIDES.values())
    assert all(c.objective is FreeEnergy for c in known)


@pytest.mark.parametrize("kind", [IterativePoisson, OnlinePoisson, SemiAmortisedPoisson])
def test_an_unknown_knob_is_refused(kind):
    """It was kept among the knobs, without effect and without a word."""
    with pytest.raises(TypeError, match="stepz"):
        circuit(kind=kind, stepz=3)
