"""Every model of the zoo, by the same rules; about two minutes on two cores."""

from __future__ import annotations

import inspect
import math
from contextlib import contextmanager
from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from threadpoolctl import threadpool_limits

import diagnostics
import inference
import zoo
from inference.errors import BadInput, NoExactPosterior
from inference.guide import Draws
from inference.latents import Latents
from inference.observation import check_observation, flatten, parts, size, take
from inference.seeds import seeded
from zoo.quadrature import FINE

ALPHA = 0.001  # of all quantities of a model together; the seeds are fixed


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP threads that wait for a busy core make these small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


@cache
def build(name):
    return zoo.MODELS[name]().double()


@pytest.fixture(params=list(zoo.MODELS))
def entry(request):
    return build(request.param)


@pytest.fixture
def exact(entry):
    try:
        return entry.exact()
    except NoExactPosterior:
        pytest.skip("no exact posterior")


@pytest.fixture
def any_x(exact):
    """The exact posterior, where it answers for any x."""
    if isinstance(exact, zoo.StoredDraws):
        pytest.skip("draws for stored observations only; Stein's identities test them")
    return exact


def few(exact, many):
    """A quarter of the problems where each has a grid that takes its time."""
    slow = zoo.SLCP | zoo.LogisticRegression | zoo.RecurrentGenerator
    return many // 4 if isinstance(exact.model, slow) else many


# the contract


def test_observations_are_valid(entry):
    x = entry.observations()
    check_observation(x, x)
    assert size(x) > 1
    assert Latents(entry).size > 0


def test_names_and_sources(entry):
    assert entry.title
    assert entry.paper.authors
    assert 1700 < entry.paper.year < 2100
    assert entry.paper.url.startswith("https://")
    assert str(entry.paper) == f"{entry.paper.authors} {entry.paper.year}"
    lat = Latents(entry)
    axes = {s.name: len(s.shape) for s in lat.sites}
    axes[lat.observed] = parts(lat.like)[lat.slot].dim() - int(lat.plated)
    assert {name: len(names) for name, names in entry.dims.items()} == axes


def test_docstrings_say_the_process_and_the_source(entry):
    text = inspect.getdoc(type(entry))
    for part in ("~", "Args:", "References:"):
        assert part in text, part


def test_titles_differ():
    titles = [model.title for model in zoo.MODELS.values()]
    assert len(set(titles)) == len(titles)


def test_simulate_is_reproducible(entry):
    lat = Latents(entry)
    z, x = entry.simulate(7, seed=3)
    assert {n: v.shape for n, v in z.items()} == {s.name: (7, *s.shape) for s in lat.sites}
    rows = slice(1, None) if lat.plated else slice(None)
    assert [t.shape[1:] for t in parts(x)] == [t.shape[rows] for t in parts(lat.like)]
    assert all(t.isfinite().all() for t in parts(x))
    again, other = entry.simulate(7, seed=3), entry.simulate(7, seed=4)
    assert all(torch.equal(z[n], again[0][n]) for n in z)
    assert all(map(torch.equal, parts(x), parts(again[1])))
    assert not all(torch.equal(z[n], other[0][n]) for n in z)
    with pytest.raises(BadInput, match="n: expected an integer >= 1"):
        entry.simulate(0, seed=0)


def test_forward_without_x_simulates(entry):
    lat = Latents(entry)
    with seeded(0):
        one, two = entry(), entry()
        many = [entry() for _ in range(8)]
    shape = parts(lat.like)[lat.slot].shape
    assert one.shape == two.shape == ((1, *shape[1:]) if lat.plated else shape)
    assert not all(torch.equal(one, other) for other in many)


# identities


def test_integrand_is_constant(entry, any_x):
    """log p(x, z) - log p(z given x) = log p(x), whatever z."""
    if any_x.kind == "reference":
        pytest.skip("no density of its own")
    x = take(entry.observations(), slice(0, 4))
    lat = any_x.latents
    z = any_x.draw(x, draws=20, chains=2, seed=0).values
    integrand = lat.log_joint(z, x) - any_x.log_prob(z, x)
    evidence = any_x.log_evidence(x).expand_as(integrand)
    tolerance = max(1e-9, 5 * float(any_x.error(x).get("log_evidence", torch.zeros(1)).max()))
    torch.testing.assert_close(integrand, evidence, rtol=0, atol=tolerance)


def test_log_q_of_draws_is_log_prob(entry, any_x):
    x = take(entry.observations(), slice(0, 3))
    found = any_x.draw(x, draws=5, chains=2, seed=1)
    if "log_q" not in found.stats:
        pytest.skip("no density")
    again = any_x.log_prob(found.values, x)
    torch.testing.assert_close(found.stats["log_q"], again, rtol=1e-9, atol=1e-9)


def test_the_pyro_program_has_the_law_of_the_draws(entry, any_x):
    """Traced, it scores its own values as `log_prob` does."""
    if any_x.kind == "reference":
        pytest.skip("no density of its own")
    x, lat = take(entry.observations(), slice(0, 5)), any_x.latents
    for seed in range(4):
        with seeded(seed), torch.no_grad():
            trace = any_x.trace(x)
        values = {n: trace.nodes[n]["value"] for n in lat.names}
        score = any_x.log_prob(values, x).sum()
        torch.testing.assert_close(trace.log_prob_sum(), score, rtol=1e-8, atol=1e-7)


def test_the_seed_alone_decides_the_draws(entry, exact):
    x = take(entry.observations(), slice(0, 2))
    one, two, other = (exact.draw(x, draws=20, chains=2, seed=s).values for s in (3, 3, 4))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_single_precision_agrees_with_double(request, entry, any_x):
    single = zoo.MODELS[request.node.callspec.params["entry"]]()
    exact = single.exact()
    x = take(single.observations(), slice(0, 4))
    wide = take(entry.observations(), slice(0, 4))
    z = exact.draw(x, draws=10, chains=1, seed=0).values
    assert all(v.isfinite().all() and v.dtype != torch.float64 for v in z.values())
    if not isinstance(exact, inference.HasEvidence):
        pytest.skip("no evidence")
    one, two = exact.log_evidence(x), any_x.log_evidence(wide)
    assert (one.dtype, two.dtype) == (torch.float32, torch.float64)
    slack = 5 * float(any_x.error(wide).get("log_evidence", torch.zeros(1)).max())
    torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=2e-3 + slack)


# statistics


def test_evidence_by_importance_sampling(entry, any_x):
    """Student-t proposals, a wide one and one at each of ten draws; always unbiased."""
    lat, n, b = any_x.latents, 10_000, 3
    if not lat.continuous:
        pytest.skip("tested against tables and brute force")
    if isinstance(entry, zoo.EightSchools | zoo.SLCP):
        pytest.skip("no such proposal reaches into a funnel or four curved modes: own tests")
    x = take(entry.observations(), slice(0, b))
    with seeded(5), torch.no_grad():
        z = any_x.draw(x, draws=400, chains=1, seed=0).values
        u = lat.pack(z)[0][0]
        shape = torch.stack([torch.cov(u[:, k].T).reshape(lat.size, -1) for k in range(b)])
        # kernels on draws follow bananas and modes
        at = torch.cat([u.mean(0, keepdim=True), u[:10]]).movedim(0, 1)
        scale = torch.tensor([1.3, *[0.4] * 10]).to(u)[None, :, None, None]
        tril = torch.linalg.cholesky(scale * shape[:, None])
        kernels = dist.MultivariateStudentT(torch.tensor(5.0).to(u), at, tril)
        weights = torch.tensor([0.5, *[0.05] * 10]).to(u).expand(b, -1)
        proposal = dist.MixtureSameFamily(dist.Categorical(weights), kernels)
        v = proposal.sample((n,))
        log_w = lat.log_density(v, x) - proposal.log_prob(v)
    peak = log_w.max(0).values
    w = (log_w - peak).exp()
    assert (w.sum(0) ** 2 / w.square().sum(0) > n / 50).all()  # ESS gate
    se = w.std(0) / w.mean(0) / math.sqrt(n)
    slack = any_x.error(x).get("log_evidence", torch.zeros(b))
    within(peak + w.mean(0).log(), any_x.log_evidence(x).detach(), se.hypot(slack.to(se)))


def test_draws_complete_the_joint(entry, any_x):
    """(z, x) and (z', x) with z' ~ p(z given x) have one law: paired moments agree."""
    lat = any_x.latents
    n = few(any_x, 400)
    z, x = entry.simulate(n, seed=8)
    z_new = any_x.draw(x, draws=1, chains=1, seed=9).values
    f = flatten(x, n)[:, :3].to(torch.float64)

    def moments(values):
        u = lat.pack(values)[0].reshape(n, -1)[:, :12].to(torch.float64)
        pairs = (u[:, :, None] * u[:, None]).flatten(1)
        return torch.cat([u, pairs, (u[:, :, None] * f[:, None]).flatten(1)], 1)

    gap = moments(z) - moments(z_new)
    moved = gap.std(0) > 0  # a discrete latent may be certain
    assert moved.any()
    within(gap.mean(0)[moved], 0.0, (gap.std(0) / math.sqrt(n))[moved])


def test_reference_draws_obey_steins_identities(entry, exact):
    """E d log p = 0 and E u d log p = -1 for each packed latent, whatever drew them."""
    lat = exact.latents
    if exact.kind != "reference" or not lat.continuous:
        pytest.skip("no reference draws")
    x = take(entry.observations(), slice(0, 6))
    z = exact.draw(x, draws=2000, chains=4, seed=0).values
    u = lat.pack(z)[0].flatten(0, 1).requires_grad_()
    slope = torch.autograd.grad(lat.log_density(u, x).sum(), u)[0]
    u = (u - u.mean(0)).detach()
    n = min(len(u), getattr(exact, "attrs", {}).get("ess_min", len(u)))
    for value, truth in ((slope, 0.0), (u * slope, -1.0)):
        within(value.mean(0), truth, value.std(0) / math.sqrt(n))


def test_moments_against_quadrature(entry, any_x):
    lat, n = any_x.latents, 4000
    if not lat.continuous or lat.size > 2 or isinstance(any_x, zoo.Quadrature):
        pytest.skip("quadrature is for one or two latents, or is the exact posterior itself")
    x = take(entry.observations(), slice(0, 3))
    with torch.no_grad():
        grid = zoo.Quadrature(entry).distribution(x)
        mean, sd = grid.moments(grid.log_density, grid.nodes)
        u = lat.pack(any_x.draw(x, draws=n, chains=1, seed=4).values)[0][0]
        evidence = any_x.log_evidence(x)
        stated = grid.error()
    off = 5 * stated["mean"][:, None] * sd  # of the grid, in its own words
    within(u.mean(0), mean, (sd / math.sqrt(n)).hypot(off))
    spread = (u - mean).square()
    off = 5 * stated["sd"][:, None] * sd.square()
    within(spread.mean(0), sd.square(), (spread.std(0) / math.sqrt(n)).hypot(off))
    error = 5 * (grid.error()["log_evidence"] + any_x.error(x)["log_evidence"].to(sd))
    assert ((grid.log_evidence - evidence).abs() < error + 1e-6).all()


def test_half_the_grid_moves_moments_less_than_stated(entry, any_x):
    """A guide on half the points states an error; the full grid is within it."""
    grid = getattr(any_x, "grid", any_x)
    if not isinstance(grid, zoo.Quadrature):
        pytest.skip("no grid")
    model, points = grid.model, grid.points
    if grid.latents.size > 2:
        pytest.skip("too many points; tested with the model")
    assert points == FINE[grid.latents.size]
    x = take(entry.observations(), slice(0, 4))
    with torch.no_grad():
        fine, half = (
            zoo.Quadrature(model, points=k, bounds=grid.bounds).distribution(x)
            for k in (points, (points + 1) // 2)
        )
        stated = half.error()
        (mean, sd), (mean_2, sd_2) = (q.moments(q.log_density, q.nodes) for q in (fine, half))
    assert (((mean - mean_2).abs() / sd).amax(-1) <= stated["mean"]).all()
    assert (((sd - sd_2).abs() / sd).amax(-1) <= stated["sd"]).all()
    assert ((fine.log_evidence - half.log_evidence).abs() <= stated["log_evidence"]).all()
    assert (fine.error()["edge_mass"] < 1e-6).all()


class Reweighted(inference.Guide):
    """Draws of another guide, resampled with the weights of a planted error."""

    def __init__(self, guide, weigh):
        super().__init__(guide.model)
        self.__dict__["guide"], self.__dict__["weigh"] = guide, weigh

    def draw(self, x, *, draws, chains, seed, progress=False):
        pool = self.guide.draw(x, draws=10 * draws, chains=1, seed=seed).values
        u = self.latents.pack(pool)[0][0].double()
        log_w = self.weigh(self.latents, u, {n: v[0] for n, v in pool.items()}, x)
        with seeded(seed, 7):
            pick = torch.distributions.Categorical(logits=log_w.T).sample((draws,))
        rows = torch.arange(pick.shape[1])
        return Draws({n: v[0][pick, rows][None] for n, v in pool.items()})


def over_confident(lat, u, z, x):
    """The posterior to the power 2.5."""
    return 1.5 * lat.log_joint(z, x).double()


def shifted(lat, u, z, x):
    """The first latent tilted up by 1.5 sds."""
    sd = u[..., 0].std(0)
    return 1.5 * u[..., 0] / torch.where(sd > 0, sd, torch.ones_like(sd))


def calibrated(guide, seed, exact):
    n = few(exact, 200)
    tree = diagnostics.sbc(guide.model, guide, problems=n, draws=49, seed=seed, progress=False)
    return bool(diagnostics.sbc_test(tree, alpha=ALPHA).attrs["calibrated"])


def test_sbc_accepts_the_exact_posterior(any_x):
    assert calibrated(any_x, 11, any_x)


@pytest.mark.parametrize("error", [over_confident, shifted])
def test_sbc_rejects_planted_errors(any_x, error):
    assert not calibrated(Reweighted(any_x, error), 12, any_x)


# hard inputs


def extreme(entry):
    """Observations ten prior-predictive sds from the mean, on either side; inputs as they are."""
    lat = Latents(entry)
    x = list(parts(entry.simulate(200, seed=1)[1]))
    seen = x[lat.slot]
    if set(seen.unique().tolist()) <= {0.0, 1.0}:
        pytest.skip("binary observations are never extreme")
    centre, spread = seen.median(0).values, seen.std(0)
    x = [t[:2] for t in x]
    x[lat.slot] = torch.stack([centre + 10 * spread, centre - 10 * spread])
    return tuple(x) if isinstance(lat.like, tuple) else x[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1.0, 1e-3])
@pytest.mark.filterwarnings("ignore::inference.errors.ExactWarning")  # too thin for the grid
def test_extreme_inputs_stay_finite(request, any_x, dtype, noise):
    cls = zoo.MODELS[request.node.callspec.params["entry"]]
    known = inspect.signature(cls).parameters
    if noise != 1.0 and not isinstance(getattr(known.get("noise"), "default", None), float):
        pytest.skip("no noise to turn down")
    model = cls() if noise == 1.0 else cls(noise=noise * known["noise"].default)
    model = model.to(dtype)
    guide, x = model.exact(), take(model.observations(), slice(0, 2))
    for seen in (x, extreme(model)):
        with suppress_impossible():
            z = guide.draw(seen, draws=20, chains=1, seed=0).values
            assert all(v.isfinite().all() for v in z.values())
            if isinstance(guide, inference.HasEvidence):
                assert guide.log_evidence(seen).isfinite().all()


@contextmanager
def suppress_impossible():
    """An observation that the model cannot make may be refused."""
    try:
        yield
    except BadInput as error:
        if "impossible" not in str(error):
            raise


def test_discrete_latents_are_compared(entry, any_x):
    """`compare` gives the exact copy the floor, in the metrics made for discrete latents."""
    if any_x.latents.continuous:
        pytest.skip("continuous")
    x = take(entry.observations(), slice(0, 2))
    names = ("marginal_tv", "elbo_gap", "ess")
    chosen = {m: diagnostics.METRICS[m] for m in names}
    knobs = {"draws": 250, "chains": 4, "seed": 3, "metrics": chosen}
    found = diagnostics.compare(entry, {"copy": entry.exact()}, x, **knobs)
    assert np.isfinite(found.value.sel(metric="marginal_tv")).all()
    table = diagnostics.summary(found)
    assert bool(table.at_floor.sel(guide="copy", metric="marginal_tv"))


def test_a_forgotten_to_event_is_named():
    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    for rows in (2, 5):  # two rows of two would fit, by chance
        with pytest.raises(
            BadInput, match=r"^site 'z': .*plate 'data'; got size 2\..*\.to_event\(1\)"
        ):
            zoo.from_pyro(program, torch.zeros(rows, 2))
