"""Broken guides, each of which exactly the right check of `inference.check_guide` catches."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

import inference
import zoo
from inference import (
    BadInput,
    Guide,
    HasDensity,
    Implicit,
    Incompatible,
    NoExactPosterior,
    PackedGuide,
)
from inference.codes import Codes
from inference.seeds import seeded
from inference.two_samples import gap


def line(x):
    """A positive and a real latent behind two numbers."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 2.0))
        shift = pyro.sample("shift", dist.Normal(x.new_tensor(1.5), 0.8))
        pyro.sample("x", dist.Normal(torch.stack([rate, shift], -1), 0.6).to_event(1), obs=x)


X = torch.tensor([[1.2, 1.9], [0.3, 0.7], [2.5, 1.0]])
MODEL = zoo.from_pyro(line, X)


class Good(PackedGuide):
    """A packed Gaussian of a hidden layer; what follows breaks one thing each."""

    objective = inference.ELBO

    def __init__(self, model, *, width=5, seed=0):
        super().__init__(model, width=width, seed=seed)
        with seeded(seed):
            self.hidden = torch.nn.Linear(2, width)
            self.out = torch.nn.Linear(width, 4)

    def distribution(self, x):
        loc, raw = self.out(self.hidden(x).tanh()).chunk(2, -1)
        return Independent(Normal(loc, raw.exp(), validate_args=False), 1)


class Sampler(Guide):
    """The same without a density."""

    def __init__(self, model, *, seed=0):
        super().__init__(model, seed=seed)
        with seeded(seed):
            self.out = torch.nn.Linear(2, 2)

    def law(self, value):
        return Implicit(value)

    def noise(self, x):
        return torch.randn(len(x), 2)

    def forward(self, x):
        u = self.out(x) + self.noise(x)
        with self.latents.plate(x):
            pyro.sample("rate", self.law(u[:, 0].exp()))
            pyro.sample("shift", self.law(u[:, 1]))


class WrongSite(Sampler):
    def forward(self, x):
        with self.latents.plate(x):
            pyro.sample("rate", Implicit(self.out(x)[:, 0].exp()))
            pyro.sample("shfit", Implicit(self.noise(x)[:, 1]))


class WrongShape(Sampler):
    def forward(self, x):
        with self.latents.plate(x):
            pyro.sample("rate", Implicit(self.out(x)[:, :1].exp(), event_dim=1))
            pyro.sample("shift", Implicit(self.noise(x)[:, 1]))


class NoPlate(Sampler):
    def forward(self, x):
        u = self.out(x) + self.noise(x)
        with pyro.plate("problems", len(x)):
            pyro.sample("rate", Implicit(u[:, 0].exp()))
            pyro.sample("shift", Implicit(u[:, 1]))


class OutOfSupport(Sampler):
    def forward(self, x):
        u = self.out(x) + self.noise(x)
        with self.latents.plate(x):
            pyro.sample("rate", Implicit(u[:, 0]))
            pyro.sample("shift", Implicit(u[:, 1]))


class DeltaForImplicit(Sampler):
    def law(self, value):
        return dist.Delta(value)


class Unseeded(Sampler):
    generator = torch.Generator()

    def noise(self, x):
        return torch.randn(len(x), 2, generator=self.generator)


class SameChains(Good):
    def draw(self, x, *, draws, chains, seed, progress=False):
        found = super().draw(x, draws=draws, chains=1, seed=seed)
        wide = {n: v.expand(chains, *v.shape[1:]) for n, v in found.values.items()}
        return inference.Draws(wide)


class Reseeds(Good):
    def draw(self, x, **sizes):
        torch.manual_seed(sizes["seed"])
        return super().draw(x, **sizes)


class Numpy(Sampler):
    def noise(self, x):
        np.random.standard_normal()
        return super().noise(x)


class ParameterStore(Good):
    def draw(self, x, **sizes):
        pyro.param("mine", torch.zeros(1))
        return super().draw(x, **sizes)


class OfAnotherScale(Good):
    """`log_prob` believes in half the spread."""

    def log_prob(self, z, x):
        u, log_jacobian = self.latents.pack(z)
        q = self.distribution(x).base_dist
        return Normal(q.loc, 0.5 * q.scale).log_prob(u).sum(-1) - log_jacobian


class Unnormalised(Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 0.5


class ConstantFactor(Good):
    def distribution(self, x):
        q = super().distribution(x).base_dist
        return Independent(Unnormalised(q.loc, q.scale, validate_args=False), 1)


class DrawsOfAnotherScale(Good):
    def told(self, u, q):
        return inference.Draws(super().told(q.mean + 0.5 * (u - q.mean), q).values)


class WrongLogQ(Good):
    def told(self, u, q):
        found = super().told(u, q)
        return inference.Draws(found.values, {"log_q": found.stats["log_q"] + 1})


class Detached(Good):
    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        return super().rsample(x, shape).detach()


class NarrowRsample(Good):
    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        q = self.distribution(x)
        return q.mean + 0.5 * (q.rsample(shape) - q.mean)


class MeanForRsample(Good):
    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        return self.distribution(x).mean.expand(*shape, -1, -1)


class RsampleOfOtherCodes(Good):
    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        return super().rsample(x, shape)[..., :1]


class TwoLayers(Guide):
    """Without a density, whose `forward` has a gain that `rsample` lacks."""

    def __init__(self, model, *, gain=1.0):
        super().__init__(model, gain=gain)
        self.gain = gain
        with seeded(0):
            self.out = torch.nn.Linear(2, 2)

    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        return self.out(x) + torch.randn(*shape, len(x), 2)

    def forward(self, x):
        z, _ = self.latents.unpack(self.gain * self.rsample(x))
        self.emit(z, x)


class NoiseInDistribution(Good):
    """Dropout, or a spike train, inside a density."""

    def distribution(self, x):
        return super().distribution(x + 0.1 * torch.randn_like(x))


class RunningMean(Good):
    """Batch norm: whoever asks twice gets another answer."""

    def __init__(self, model, **knobs):
        super().__init__(model, **knobs)
        self.register_buffer("mean", torch.zeros(2))

    def distribution(self, x):
        self.mean.lerp_(x.mean(0), 0.1)
        return super().distribution(x - self.mean)


class IdleParameter(Good):
    def __init__(self, model, **knobs):
        super().__init__(model, **knobs)
        self.gain = torch.nn.Parameter(torch.ones(3))


class ObjectiveOfOthers(Sampler):
    objective = inference.ELBO


class Deaf(Good):
    def distribution(self, x):
        return super().distribution(torch.ones_like(x))


class MixesProblems(Good):
    """Divisive normalisation over problems where it should be over neurons."""

    def distribution(self, x):
        r = self.hidden(x).exp()
        loc, raw = self.out(r / r.sum(0)).chunk(2, -1)
        return Independent(Normal(loc, raw.exp(), validate_args=False), 1)


class KeepsNoKnobs(Good):
    def __init__(self, model, *, width=5, seed=0):
        super().__init__(model, width=width, seed=seed)
        self.knobs = {}


class ForgetsAKnob(Good):
    def __init__(self, model, *, width=5, seed=0):
        super().__init__(model, width=width, seed=seed)
        self.knobs = {"seed": seed}


class NotInItsState(Good):
    def __init__(self, model, **knobs):
        super().__init__(model, **knobs)
        self.offset = torch.randn(2, generator=GENERATOR)

    def distribution(self, x):
        return super().distribution(x - self.offset)


class TakesAnyX(Sampler):
    def draw(self, x, *, draws, chains, seed, progress=False):
        with seeded(seed), torch.no_grad():
            u = self.out(x[:, :2]) + torch.randn(chains, draws, len(x), 2)
        return inference.Draws({"rate": u[..., 0].exp(), "shift": u[..., 1]})


class Raises(Good):
    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        return x @ self.out.weight


GENERATOR = torch.Generator().manual_seed(0)
BROKEN = {  # guide: the checks that it fails
    WrongSite: {"sites"},
    WrongShape: {"sites"},
    NoPlate: {"sites"},
    OutOfSupport: {"draws"},
    DeltaForImplicit: {"elbo"},
    Unseeded: {"seeds"},
    SameChains: {"seeds"},
    Reseeds: {"globals"},
    Numpy: {"globals"},
    ParameterStore: {"globals"},
    OfAnotherScale: {"density"},
    ConstantFactor: {"normalised"},
    DrawsOfAnotherScale: {"normalised"},
    WrongLogQ: {"log_q"},
    Detached: {"gradient"},
    Raises: {"gradient"},
    NarrowRsample: {"gradient"},
    MeanForRsample: {"gradient"},
    RsampleOfOtherCodes: {"gradient"},
    NoiseInDistribution: {"density"},
    RunningMean: {"buffers"},
    IdleParameter: {"learning"},
    ObjectiveOfOthers: {"learning"},
    Deaf: {"observation"},
    MixesProblems: {"rows"},
    KeepsNoKnobs: {"knobs"},
    ForgetsAKnob: {"knobs"},
    NotInItsState: {"state"},
    TakesAnyX: {"input"},
}


def failures(guide):
    return {
        f.name for f in inference.check_guide(guide, X, seed=0).findings if f.outcome == "failed"
    }


@pytest.mark.parametrize("cls", [Good, Sampler])
@pytest.mark.parametrize("seed", range(5))
def test_sound_guides_pass(cls, seed):
    found = inference.check_guide(cls(MODEL, seed=seed), X, seed=seed)
    found.require()
    assert found.passed
    assert [f.name for f in found.findings if f.outcome == "passed"][:5] == [
        "sites", "draws", "buffers", "seeds", "globals",
    ]  # fmt: skip
    assert isinstance(cls(MODEL), HasDensity) is (found["density"].outcome == "passed")


@pytest.mark.parametrize("cls", BROKEN)
def test_exactly_the_right_check_fails(cls):
    guide = cls(MODEL, **({"width": 7} if cls is ForgetsAKnob else {}))
    assert failures(guide) == BROKEN[cls]


def test_parameters_and_their_training_are_left_alone():
    guide = Good(MODEL)
    before = {n: v.clone() for n, v in guide.state_dict().items()}
    inference.check_guide(guide, X, seed=0)
    assert all(torch.equal(v, before[n]) for n, v in guide.state_dict().items())
    assert all(p.grad is None for p in guide.parameters())


def test_what_it_found_reads_well():
    found = inference.check_guide(DeltaForImplicit(MODEL), X, seed=0)
    assert not found.passed
    assert found["elbo"].outcome == "failed"
    assert "Implicit" in found["elbo"].fix
    text = repr(found)
    assert text.startswith("DeltaForImplicit: 10 passed, 1 failed, 6 not asked")
    assert max(map(len, text.splitlines())) <= 121
    assert "<table>" in found._repr_html_()
    message = r"^DeltaForImplicit, check 'elbo': expected NoDensity from Trace_ELBO; got a loss of"
    with pytest.raises(Incompatible, match=message):
        found.require()


def test_it_runs_where_gradients_are_off():
    with torch.no_grad():
        assert inference.check_guide(Good(MODEL), X, seed=0).passed
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize(("gain", "outcome"), [(1.0, "passed"), (0.6, "failed")])
def test_rsample_is_compared_with_forward(gain, outcome):
    found = inference.check_guide(TwoLayers(MODEL, gain=gain), X, seed=0)
    assert found["gradient"].outcome == outcome
    assert ("distribution functions of" in found["gradient"].got) is (outcome == "failed")


class Correlated(PackedGuide):
    """Full covariance, of which `rsample` keeps the variances only."""

    def distribution(self, x):
        tril = x.new_tensor([[1.0, 0.0], [0.8, 0.6]]).expand(len(x), 2, 2)
        return MultivariateNormal(x, scale_tril=tril)

    def rsample(self, x, shape=torch.Size()):  # noqa: B008
        return self.distribution(x).mean + torch.randn(*shape, *x.shape)


def test_a_lost_correlation_is_seen_and_chance_is_not():
    guide = Correlated(MODEL)
    codes = Codes(guide.latents, "test")
    found = gap(guide, codes, X, seed=0)
    assert found.size > found.chance
    guide.rsample = lambda x: guide.distribution(x).rsample()
    found = [gap(guide, codes, X, seed=k) for k in range(20)]
    assert max(f.size for f in found) < found[0].chance  # each exceeds it once in 10,000 times


def test_advice_names_what_was_done():
    noisy = inference.check_guide(NoiseInDistribution(MODEL), X, seed=0)
    assert not noisy.passed
    assert "Keep noise, and dropout, out of `distribution`" in noisy["density"].fix
    guide = RunningMean(MODEL)
    moved = inference.check_guide(guide, X, seed=0)
    assert moved["buffers"].got == "mean changed"
    assert moved["seeds"].outcome == "waits"  # whose advice, on generators, would mislead
    assert not guide.mean.any()  # put back


def test_checks_wait_for_those_that_they_rest_on():
    found = inference.check_guide(WrongSite(MODEL), X, seed=0)
    assert found["sites"].got == "['rate', 'shfit']"
    assert found["draws"].outcome == found["state"].outcome == "waits"
    assert found["knobs"].outcome == "passed"


def test_an_error_of_the_users_own_code_says_where():
    found = inference.check_guide(Raises(MODEL), X, seed=0)
    assert "RuntimeError" in found["gradient"].got
    assert "rsample, test_conformance.py" in found["gradient"].fix


def test_the_exact_posterior_is_a_guide():
    with pytest.raises(NoExactPosterior):
        MODEL.exact()
    exact = zoo.from_pyro(line, X, exact=zoo.Quadrature).exact()
    inference.check_guide(exact, X, seed=0).require()
    sprinkler = zoo.NoisyOr()
    found = inference.check_guide(sprinkler.exact(), sprinkler.observations()[:2], seed=0)
    found.require()
    assert found["normalised"].outcome == "passed"


def one_problem(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z.sum() * x.new_ones(2), 1.0).to_event(1), obs=x)


def test_distributions_of_a_wrong_shape_are_refused():
    class RowByRow(PackedGuide):
        """Forgets that all rows are one problem."""

        def distribution(self, x):
            return Independent(Normal(x.new_zeros(len(x), 3), 1.0), 1)

    class NoEvent(PackedGuide):
        def distribution(self, x):
            return Normal(x, 1.0)

    with pytest.raises(
        BadInput, match=r"batch shape \(1,\).* \(3,\); got \(3,\) and \(3,\)\. .*pool"
    ):
        RowByRow(zoo.from_pyro(one_problem, X)).draw(X, draws=2, chains=1, seed=0)
    with pytest.raises(
        BadInput, match=r"batch shape \(3,\).*got \(3, 2\) and \(\)\. .*Independent"
    ):
        NoEvent(MODEL)(X)
