"""One conformance suite for every guide in GUIDES, on models it is made for, in float64."""

from __future__ import annotations

from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine

import diagnostics
import inference
import zoo
from inference import (
    GUIDES,
    BadInput,
    DenoisingScoreMatching,
    Guide,
    HasDensity,
    HasRsample,
    HasScore,
    Incompatible,
    Sampling,
)
from inference.errors import lookup
from inference.guides.encoder import positive
from inference.guides.score_circuit import ScoreCircuit
from inference.observation import parts
from inference.seeds import seeded

B = 3
# grids of 9 points an axis, here for speed, say that they are too coarse
pytestmark = pytest.mark.filterwarnings("ignore::inference.errors.ExactWarning")


def two_sites(x):
    """A positive and a real latent of unlike shapes, both off centre."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 2.0))
        shift = pyro.sample("shift", dist.Normal(x.new_tensor([1.5]), 0.8).to_event(1))
        loc = torch.stack([rate, shift[..., 0], rate - shift[..., 0]], -1)
        pyro.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)


def inner_plate(x):
    """A latent for the problem, (B, 1), and two more inside an inner plate, (B, 2)."""
    with pyro.plate("data", len(x), dim=-2):
        scale = pyro.sample("scale", dist.Gamma(x.new_tensor(3.0), 2.0))
        with pyro.plate("pixel", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.3), 0.5))
            pyro.sample("x", dist.Normal(z, scale), obs=x)


def one_problem(inputs, labels):
    """The whole data set is one problem, an observation of inputs and labels."""
    w = pyro.sample("w", dist.Normal(inputs.new_tensor([0.5]), 0.7).to_event(1))
    s = pyro.sample("s", dist.Gamma(inputs.new_tensor(4.0), 8.0))
    with pyro.plate("data", len(inputs)):
        pyro.sample("y", dist.Normal(inputs * w, s), obs=labels)


def counts_in_a_plate(x):
    """Counts (B, 3) and pixels (B, 4), each in an inner plate, and a decoder with an offset."""
    mixing = torch.linspace(-1.0, 2.0, 12).reshape(3, 4).to(x)
    with pyro.plate("data", len(x), dim=-2):
        with pyro.plate("neuron", 3, dim=-1):
            z = pyro.sample("z", dist.Poisson(x.new_tensor([2.0, 1.0, 0.5])))
        with pyro.plate("pixel", 4, dim=-1):
            pyro.sample("x", dist.Normal(z @ mixing - 0.3, 0.6), obs=x)


def paths(x):
    """A path and a positive one, seen together in six steps."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.4), 0.8).expand([6]).to_event(1))
        size = pyro.sample("size", dist.LogNormal(x.new_zeros(6, 2), 0.5).to_event(2))
        loc = torch.cumsum(z, -1)[..., None] * size
        pyro.sample("x", dist.Normal(loc, 0.6).to_event(2), obs=x)


def grid(points, bounds=None):
    return lambda model: zoo.Quadrature(model, points=points, bounds=bounds)


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


WIDE = float64([1.2, 1.9, -0.4], [0.3, 0.7, 0.1], [2.5, 1.0, 1.8])
COUNTED = float64([0.5, -1.0, 2.0, 0.3], [2.5, 1.9, 0.7, -0.6], [-1.1, 0.2, 3.1, 4.0])
MOVED = WIDE.repeat(1, 4).reshape(3, 6, 2).cumsum(1)
FLAT = (float64(-1.0, 0.2, 0.9, 1.7), float64(-0.9, 0.4, 0.2, 1.3))


KINDS = {
    "factor analysis": lambda: zoo.FactorAnalysis(7, 3, seed=1),
    "two sites": lambda: zoo.from_pyro(two_sites, WIDE, exact=grid(33)),
    "inner plate": lambda: zoo.from_pyro(
        inner_plate, WIDE[:, :2], exact=grid(9, 3 * [(-2.0, 2.0)])
    ),
    "one problem": lambda: zoo.from_pyro(
        one_problem, FLAT, exact=grid(33, [(-1.5, 2.5), (-2.5, 0.5)])
    ),
    "counts": lambda: zoo.PoissonCoding(4, side=3),
    "nonlinear counts": lambda: zoo.PoissonCoding(3, side=3, hidden=(4,)),
    "counts in a plate": lambda: zoo.from_pyro(counts_in_a_plate, COUNTED),
    "sparse coding": lambda: zoo.SparseCoding(2),
    "state space": lambda: zoo.StateSpace((0.9,), steps=6),
    "paths": lambda: zoo.from_pyro(paths, MOVED),
}
GENERAL = ("factor analysis", "two sites", "inner plate", "one problem")
COUNTS = ("counts", "nonlinear counts", "counts in a plate")
MADE_FOR = {  # other guides: GENERAL
    "iterative_poisson": COUNTS,
    "online_poisson": COUNTS,
    "poisson_encoder": COUNTS,
    "semi_amortised_poisson": COUNTS,
    "iterative_gaussian": ("factor analysis",),
    "lca": ("sparse coding",),
    "ista": ("sparse coding",),
    "sparse_laplace": ("sparse coding",),
    "temporal_recognition": ("state space", "paths"),
}
CLASSES = {n: c for n, c in GUIDES.items() if isinstance(c, type)}
BOUND = [n for n, c in CLASSES.items() if not c.amortised]
# "exact" is a function; each of the posteriors that it makes here has a density
WITH_DENSITY = [n for n in GUIDES if n not in CLASSES or issubclass(CLASSES[n], HasDensity)]
IMPLICIT = [n for n in GUIDES if n not in WITH_DENSITY]
SPIKING = ["online_poisson"]  # log q is given one run of the circuit, and runs are random
STEADY = [n for n in WITH_DENSITY if n not in SPIKING]
CIRCUITS = [n for n, c in CLASSES.items() if issubclass(c, ScoreCircuit)]
LEARNERS = [n for n, c in CLASSES.items() if c.objective is not None]
KNOBS = {
    "nuts": {"warmup": 10},
    "reservoir_sampler": {"neurons": 32, "hidden": (8,)},
    "random_reservoir": {"neurons": 32},
    "energy_reservoir": {"neurons": 32, "hidden": (8,)},
    "sampler_only_rate": {"hidden": (8,)},
    "sampler_only_current": {"hidden": (8,)},
    "iterative_poisson": {"steps": 20, "training_steps": 3, "learn_step": True},
    "online_poisson": {"steps": 20, "training_steps": 3},
    "iterative_gaussian": {"steps": 20, "training_steps": 3, "learn_step": True},
    "poisson_encoder": {"hidden": (8,)},
    "recurrent_circuit": {"interval": 10.0},  # time constants: chains, but as good as independent
    "semi_amortised_poisson": {"hidden": (8,), "steps": 5, "training_steps": 3, "learn_step": True},
    "recurrent_recognition": {"neurons": 12, "noises": 4, "steps": 3},
    "noise_mlp": {"hidden": (8,)},
    "temporal_recognition": {"neurons": 6, "noises": 3},
}


@cache
def model_of(kind):
    return KINDS[kind]().double()


def observation_of(kind):
    x = model_of(kind).observations()
    return x if isinstance(x, tuple) else x[:B]


def make(name, model):
    """A guide as it starts, small and short where it is a circuit or a chain."""
    short = {"sampling": Sampling(levels=10)} if name in CIRCUITS else {}
    return GUIDES[name](model, **KNOBS.get(name, {}), **short)


def build(name, model, x=None):
    """A guide with parameters away from their start, bound to x."""
    guide = make(name, model).to(parts(model.observations())[0].dtype)
    if x is not None:
        guide.bind(x)
    with torch.no_grad(), seeded(0):
        for p in guide.parameters():
            # circuits amplify by 1 / sigma: a larger move of their weights would destabilise them
            p.add_((1e-3 if name in CIRCUITS else 0.1) * torch.randn_like(p))
    return guide


@cache
def guide_of(name, kind):
    return build(name, model_of(kind), observation_of(kind))


def on_its_kinds(names):
    """Each guide on each kind of model it is made for."""
    found = [(n, k) for n in names for k in MADE_FOR.get(n, GENERAL)]
    return pytest.mark.parametrize(("name", "kind"), found)


def on_one_kind(names, general):
    """Each guide on the first kind it is made for, general ones on that named."""
    found = [(n, MADE_FOR.get(n, (general,))[0]) for n in names]
    return pytest.mark.parametrize(("name", "kind"), found)


@pytest.fixture
def case(name, kind):
    return model_of(kind), guide_of(name, kind), observation_of(kind)


# ------------------------------------------------------------------------------------ conformance


DENSITY = {"density", "log_q", "normalised"}
SILENT = {  # checks that have nothing to ask of some guides; all others have to pass
    **{n: {*DENSITY, "rows"} for n in IMPLICIT},
    **{n: {*DENSITY} for n in CIRCUITS},
    **{n: {"observation", "rows"} for n in BOUND},
    **{n: {"normalised", "rows"} for n in SPIKING},
}


@on_its_kinds(GUIDES)
def test_conformance(case, name, kind):
    """Every check of `inference.check_guide`; those of SILENT, and no others, do not apply."""
    _, guide, x = case
    found = inference.check_guide(guide, x, seed=1)
    found.require()
    silent = {f.name for f in found.findings if f.outcome == "does not apply"}
    expected = SILENT.get(name, set()) | ({"rows"} if kind == "one problem" else set())
    if not isinstance(guide, HasRsample) or not any(True for _ in guide.parameters()):
        expected |= {"gradient"}
    if name not in LEARNERS:
        expected |= {"learning"}
    assert silent == expected


@pytest.mark.parametrize("name", CIRCUITS)
def test_circuits_are_amortised_and_learn_from_simulations(name):
    assert name in IMPLICIT
    assert CLASSES[name].amortised
    assert CLASSES[name].objective is DenoisingScoreMatching
    assert CLASSES[name].objective.joint_only


@on_its_kinds(CIRCUITS)
def test_scores_belong_to_their_problem(case):
    """(..., B, D), the same for a problem alone as among others, and not the same for each x."""
    _, guide, x = case
    lat = guide.latents
    assert isinstance(guide, HasScore)
    with torch.no_grad():
        z = guide.draw(x, draws=3, chains=2, seed=5).values
        found = guide.score(z, x)
        assert found.shape == (2, 3, lat.problems(x), lat.size)
        assert torch.isfinite(found).all()
        if not lat.plated:
            return
        alone = guide.score({n: v[:, :, 1:2] for n, v in z.items()}, x[1:2])
        torch.testing.assert_close(alone, found[:, :, 1:2], rtol=1e-9, atol=1e-9)
        elsewhere = guide.score({n: v[:, :, 1:2] for n, v in z.items()}, x[2:3])
        assert not torch.allclose(elsewhere, alone, rtol=1e-3)


# ------------------------------------------------------------------------------------------ dtype


@on_one_kind(GUIDES, "factor analysis")
def test_guides_of_a_float64_model_work_as_they_are(name, kind):
    model, x = model_of(kind), observation_of(kind)
    guide = make(name, model)
    guide.bind(x)
    assert guide.draw(x, draws=2, chains=1, seed=0).values["z"].dtype == torch.float64


def in_both_precisions(name, kind, measure=None):
    """A guide in float32, then changed to float64 with its model: both measure the same."""
    model = KINDS[kind]()
    x = model.observations()[:B]
    guide = build(name, model, x)
    z = guide.draw(x, draws=4, chains=1, seed=0).values
    assert z["z"].dtype == torch.float32
    with torch.no_grad():
        before = measure and measure(guide, z, x)
        model.double()
        guide.double()
        x, z = x.double(), {n: v.double() for n, v in z.items()}
        after = measure and measure(guide, z, x)
    if measure:
        assert after.dtype == torch.float64
        torch.testing.assert_close(after, before.double(), rtol=1e-3, atol=1e-3)
    assert guide.draw(x, draws=2, chains=1, seed=0).values["z"].dtype == torch.float64


@on_one_kind(STEADY, "factor analysis")
def test_model_and_guide_can_change_to_float64_later(name, kind):
    in_both_precisions(name, kind, lambda guide, z, x: guide.log_prob(z, x))


@on_one_kind(SPIKING, "factor analysis")
def test_model_and_spiking_guide_can_change_to_float64_later(name, kind):
    in_both_precisions(name, kind)  # not that they draw the same numbers


@on_one_kind(CIRCUITS, "factor analysis")
def test_model_and_circuit_can_change_to_float64_later(name, kind):
    in_both_precisions(name, kind, lambda guide, z, x: guide.score(z, x))


# ----------------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize("name", BOUND)
def test_unamortised_guides_answer_for_their_own_observation_only(name):
    model = model_of("two sites")
    guide = guide_of(name, "two sites")
    assert not guide.amortised
    with pytest.raises(BadInput, match=r"^x: .*was fitted to; got another one\. Call fit"):
        guide.draw(WIDE + 0.1, draws=2, chains=1, seed=0)
    with pytest.raises(BadInput, match="got another one"):
        guide(WIDE.flip(0))
    with pytest.raises(BadInput, match="got another one"):
        guide.draw(WIDE[:2], draws=2, chains=1, seed=0)
    with pytest.raises(BadInput, match="has not been fitted"):
        GUIDES[name](model).draw(WIDE, draws=2, chains=1, seed=0)


@pytest.mark.parametrize("name", BOUND)
def test_binding_again_keeps_parameters_only_for_the_same_observation(name):
    guide = build(name, model_of("two sites"), WIDE)
    before = {n: v.clone() for n, v in guide.state_dict().items()}
    guide.bind(WIDE.clone())
    assert all(torch.equal(v, before[n]) for n, v in guide.state_dict().items())
    guide.bind(WIDE + 0.5)
    assert not all(torch.equal(v, before[n]) for n, v in guide.state_dict().items())
    assert guide.draw(WIDE + 0.5, draws=2, chains=1, seed=0).values["rate"].shape == (1, 2, B)


UNSUITED = {  # kind: what a guide made for others says
    "factor analysis": "got Normal latents",
    "two sites": r"one latent site.*got sites \['rate', 'shift'\]",
    "inner plate": r"one latent site.*got sites \['scale', 'z'\]",
    "one problem": "one latent site inside the plate 'data'",
    "counts": "got (Poisson latents|the discrete site 'z')",
    "nonlinear counts": "got (Poisson latents|the discrete site 'z')",
    "counts in a plate": "got (Poisson latents|the discrete site 'z')",
    "sparse coding": "got Laplace latents",
    "state space": "got (Multivariate|)Normal latents",
    "paths": r"one latent site.*got sites \['z', 'size'\]",
}
OUT_OF_TIME = "(time as the first axis|finitely many states)"
ON_BEHALF = {"sparse_laplace": "(ISTA|SparseLaplace)"}  # the circuit that reads its model


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in GUIDES if n in MADE_FOR for k in KINDS if k not in MADE_FOR[n]],
)
def test_models_that_a_guide_is_not_made_for_are_refused(name, kind):
    who = ON_BEHALF.get(name, GUIDES[name].__name__)
    says = OUT_OF_TIME if name == "temporal_recognition" else f".*{UNSUITED[kind]}"
    message = rf"^{who}( and the model)?: expected .*{says}"
    with pytest.raises(Incompatible, match=message):
        GUIDES[name](model_of(kind))


def test_bad_observations_and_counts_are_refused():
    guide, x = guide_of("flow", "factor analysis"), observation_of("factor analysis")
    with pytest.raises(BadInput, match=rf"x: expected shape \(B, {x.shape[1]}\)"):
        guide.draw(x[:, :5], draws=2, chains=1, seed=0)
    with pytest.raises(BadInput, match="x: expected finite numbers"):
        guide.draw(x / 0, draws=2, chains=1, seed=0)
    with pytest.raises(BadInput, match=r"draws: expected an integer >= 1; got 0"):
        guide.draw(x, draws=0, chains=1, seed=0)
    with pytest.raises(BadInput, match="seed: expected an integer >= 0; got -1"):
        guide.draw(x, draws=2, chains=1, seed=-1)


class Forgetful(Guide):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))


class Plain(Guide):
    """All of a guide that has to be written: it draws through the base class."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("shift", dist.Normal(x[:, :1], 1e-3).to_event(1))


def test_a_guide_that_misses_a_site_is_told_which():
    guide = Forgetful(model_of("two sites"))
    message = r"guide: .*\['rate', 'shift'\]; got none for \['shift'\]\. Add pyro\.sample"
    with pytest.raises(BadInput, match=message):
        guide.draw(WIDE, draws=2, chains=1, seed=0)


def test_draws_in_many_batches_stay_with_their_problems(monkeypatch):
    monkeypatch.setattr("inference.guide.MAX_ROWS", 7)  # two draws of three problems at a time
    values = Plain(model_of("two sites")).draw(WIDE, draws=5, chains=2, seed=0).values
    assert values["rate"].shape == (2, 5, B)
    assert values["shift"].shape == (2, 5, B, 1)
    assert ((values["shift"] - WIDE[:, :1]).abs() < 0.01).all()  # ten of its sds


def test_lookup_suggests_the_nearest_name():
    assert lookup(GUIDES, "flow", "guide") is GUIDES["flow"]
    with pytest.raises(BadInput, match=r"^guide: got 'mean_field'\. .*'mean_field_encod"):
        lookup(GUIDES, "mean_field", "guide")
    with pytest.raises(BadInput, match=r"got 'zzzz'\. See `neuroguide list`"):
        lookup(GUIDES, "zzzz", "guide")


# --------------------------------------------------------------------------- adapters to Pyro's own


@pytest.mark.parametrize("kind", GENERAL)
def test_auto_normal_is_pyros(kind):
    guide, x = guide_of("auto_normal", kind), observation_of(kind)
    lat, pyros = guide.latents, guide.auto[0]
    q = guide.distribution(x)
    for level in (0.1, 0.5, 0.8):
        u = q.base_dist.icdf(torch.full_like(q.mean, level))
        for name, theirs in pyros.quantiles([level], x).items():
            mine = lat.unpack(u)[0][name].reshape(theirs.shape)
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    with seeded(4), pyro.settings.context(module_local_params=True):
        trace = poutine.trace(pyros).get_trace(x)
    z = {s.name: trace.nodes[s.name]["value"].reshape(-1, *s.shape) for s in lat.sites}
    torch.testing.assert_close(
        guide.log_prob(z, x).sum(), trace.log_prob_sum(), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("kind", GENERAL)
def test_auto_multivariate_normal_is_pyros_for_each_problem(kind):
    guide, x = guide_of("auto_multivariate_normal", kind), observation_of(kind)
    lat, q = guide.latents, guide.distribution(x)
    assert len(guide.auto) == lat.problems(x) == len(q.loc)
    for i, pyros in enumerate(guide.auto):
        own = tuple(t[i : i + 1] for t in parts(x)) if lat.plated else parts(x)
        own = own if isinstance(x, tuple) else own[0]
        theirs = pyros.get_posterior()
        torch.testing.assert_close(q.loc[i], theirs.loc)
        torch.testing.assert_close(q.covariance_matrix[i], theirs.covariance_matrix)
        with seeded(4), pyro.settings.context(module_local_params=True):
            trace = poutine.trace(pyros).get_trace(own)
        z = {s.name: trace.nodes[s.name]["value"].reshape(-1, *s.shape) for s in lat.sites}
        z = {n: v.expand(lat.problems(x), *v.shape[1:]) for n, v in z.items()}
        log_q = guide.log_prob(z, x)[i]
        torch.testing.assert_close(log_q, trace.log_prob_sum(), rtol=1e-8, atol=1e-8)


def test_full_covariance_factor_is_marginal_sds_times_correlations(model):
    """Rows of the correlation factor have norm one: large outputs cannot make it singular."""
    guide = inference.FullCovarianceEncoder(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        x = model.observations()[:20]
        outputs = guide.encoder(x)
        tril = guide.affine(x)[1]
    sds = guide.encoder.u_scale * positive(outputs[:, 3:6])
    assert float(outputs[:, 6:].abs().max()) > 1, "too tame to show anything"
    torch.testing.assert_close(tril.square().sum(-1).sqrt(), sds)
    torch.testing.assert_close(tril.triu(1), torch.zeros(20, 3, 3))


def of_two_kinds(x):
    """A positive latent whose prior is a mixture."""
    with pyro.plate("data", len(x)):
        kinds = dist.Gamma(x.new_tensor([2.0, 6.0]), 2.0)
        z = pyro.sample(
            "z", dist.MixtureSameFamily(dist.Categorical(x.new_tensor([0.3, 0.7])), kinds)
        )
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def test_nuts_samples_priors_that_are_mixtures():
    """Whose support Pyro itself cannot transform; against quadrature."""
    model = zoo.from_pyro(of_two_kinds, torch.tensor([0.2, 2.0, 5.0], dtype=torch.float64))
    x = model.observations()
    nuts = inference.NUTS(model, warmup=100)
    tree = diagnostics.draw(model, nuts, x, draws=400, chains=1, seed=0)
    ess = diagnostics.METRICS["ess"].compute(tree, tree).value
    assert (ess > 80).all()
    z, known = tree["posterior"]["z"].values[0], zoo.Quadrature(model)
    truth = known.draw(x, draws=20_000, chains=1, seed=0).values["z"][0].numpy()
    within(z.mean(0), truth.mean(0), z.std(0) / ess**0.5)
