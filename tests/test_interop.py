"""ArviZ reads the trees of anybody's Pyro guides and chains; about 25 s, most of it ArviZ's own."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from conftest import within
from pyro.infer import MCMC, SVI, Trace_ELBO, autoguide
from pyro.infer.mcmc import NUTS
from threadpoolctl import threadpool_limits

import diagnostics
import zoo
from diagnostics.interop import from_pyro_guide, from_pyro_mcmc
from inference import BadInput, Incompatible, MeanFieldEncoder
from inference.seeds import seeded

K = 5.0
DOSE = torch.linspace(-1.0, 1.4, 16)
SEEN = 0.7 + 1.9 * DOSE + 0.6 * torch.cos(5.0 * torch.arange(16.0))
ROWS = len(DOSE)
NOISE = 0.7


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


def line(dose, y):
    """Conjugate: two global latents, a deterministic site, rows in a plate."""
    w = pyro.sample("w", dist.Normal(torch.tensor([0.5, 1.0]), 2.0).to_event(1))
    with pyro.plate("patient", len(dose)):
        mean = pyro.deterministic("mean", w[0] + w[1] * dose)
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def posterior():
    """Mean and covariance of w, and log p(y)."""
    design = torch.stack([torch.ones(ROWS), DOSE], -1).double()
    prior = torch.tensor([0.5, 1.0]).double()
    cov = torch.linalg.inv(design.T @ design / NOISE**2 + torch.eye(2) / 4)
    mean = cov @ (design.T @ SEEN.double() / NOISE**2 + prior / 4)
    total = 4 * design @ design.T + NOISE**2 * torch.eye(ROWS)
    seen = torch.distributions.MultivariateNormal(design @ prior, total)
    return mean, cov, float(seen.log_prob(SEEN.double()))


def exact_line(dose, y):
    mean, cov, _ = posterior()
    pyro.sample("w", dist.MultivariateNormal(mean.float(), cov.float()))


def spikes(x):
    """Each row a problem: Gamma and Poisson."""
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


COUNTS = torch.tensor([0.0, 3.0, 11.0])


def exact_spikes(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + x, 1.5))


@pytest.fixture(scope="module")
def tree():
    """The exact posterior as a user's plain function."""
    return from_pyro_guide(
        line, exact_line, (DOSE, SEEN), draws=400, chains=2, seed=0,
        log_likelihood=True, posterior_predictive=True,
    )  # fmt: skip


@pytest.fixture
def store():
    """Room for a user's own parameters in Pyro's global store."""
    with pyro.get_param_store().scope():
        yield pyro.get_param_store()


def test_groups_and_axes_are_idiomatic(tree):
    assert set(tree.children) == {
        "posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data",
        "constant_data",
    }  # fmt: skip
    assert tree.posterior["w"].dims == ("chain", "draw", "w_dim_0")
    assert tree.posterior["mean"].dims == ("chain", "draw", "patient")
    assert tree.log_likelihood["y"].dims == ("chain", "draw", "patient")
    assert tree.posterior_predictive["y"].dims == ("chain", "draw", "patient")
    assert tree.observed_data["y"].dims == ("patient",)
    assert tree.constant_data["input_0"].values.tolist() == DOSE.tolist()
    assert tree.sample_stats["log_q"].dims == ("chain", "draw")
    assert tree.attrs["guide"] == "exact_line"
    named = from_pyro_guide(
        line, exact_line, (DOSE, SEEN), draws=2, seed=0, dims={"w": ["coefficient"]}
    )
    assert named.posterior["w"].dims == ("chain", "draw", "coefficient")


def test_densities_are_those_of_bayes(tree):
    """log p(y, w) - log q(w) is log p(y) at every draw; float32 log-densities of some -10 nats."""
    stats = tree.sample_stats.dataset
    evidence = (stats.log_p_joint - stats.log_q).values
    np.testing.assert_allclose(evidence, posterior()[2], rtol=1e-5)
    w = tree.posterior["w"].values
    mean = w[..., :1] + w[..., 1:] * DOSE.numpy()
    np.testing.assert_allclose(tree.posterior["mean"].values, mean, rtol=1e-5, atol=1e-6)
    log_lik = dist.Normal(torch.tensor(mean), NOISE).log_prob(SEEN).numpy()
    np.testing.assert_allclose(tree.log_likelihood["y"].values, log_lik, rtol=1e-4, atol=1e-5)


def test_draws_are_those_of_the_conjugate_posterior(tree):
    mean, cov, _ = posterior()
    w = tree.posterior["w"].values.reshape(-1, 2)
    sd = cov.diagonal().sqrt().numpy()
    within(w.mean(0), mean, sd / np.sqrt(len(w)))
    within(w.std(0, ddof=1), sd, sd / np.sqrt(2 * len(w)))
    replicas = tree.posterior_predictive["y"].values.reshape(-1, ROWS)
    design = np.stack([np.ones(ROWS), DOSE.numpy()], -1)
    spread = np.sqrt(np.einsum("ij,jk,ik->i", design, cov.numpy(), design) + NOISE**2)
    within(replicas.mean(0), design @ mean.numpy(), spread / np.sqrt(len(replicas)))


def test_the_seed_is_all(tree):
    again = from_pyro_guide(line, exact_line, (DOSE, SEEN), draws=400, chains=2, seed=0)
    assert again.posterior["w"].equals(tree.posterior["w"])
    other = from_pyro_guide(line, exact_line, (DOSE, SEEN), draws=400, chains=2, seed=1)
    assert not other.posterior["w"].equals(tree.posterior["w"])


@pytest.mark.parametrize("auto", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_autoguides_trained_by_svi(auto, store):
    """They are drawn from as trained, with their density, and the store is left alone."""
    with seeded(0):
        guide = auto(line)
        svi = SVI(line, guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        for _ in range(250):
            svi.step(DOSE, SEEN)
    before = {name: value.clone() for name, value in store.items()}
    tree = from_pyro_guide(line, guide, (DOSE, SEEN), draws=150, seed=0)
    assert list(store) == list(before)
    assert all(torch.equal(store[name], value) for name, value in before.items())
    w = tree.posterior["w"].values.reshape(-1, 2)
    median = guide.median(DOSE, SEEN)["w"].detach().numpy()
    within(w.mean(0), median, w.std(0) / np.sqrt(len(w)))
    assert np.abs(median - posterior()[0].numpy()).max() < 0.3  # the fit's, not a draw's
    stats = tree.sample_stats.dataset
    gap = posterior()[2] - float((stats.log_p_joint - stats.log_q).mean())
    assert 0 < gap < 0.6  # KL(q || p): .26 nats for the best mean field


def test_an_untrained_guide_puts_nothing_in_the_store(store):
    guide = autoguide.AutoNormal(line)

    def with_param(dose, y):
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("w", dist.Normal(loc, 1.0).to_event(1))

    for each in (guide, with_param):
        with seeded(0):
            from_pyro_guide(line, each, (DOSE, SEEN), draws=3, seed=0)
        assert not list(store)


def test_rows_that_are_problems_can_be_compared():
    mine = from_pyro_guide(spikes, exact_spikes, COUNTS, draws=500, seed=0)
    assert mine.posterior["rate"].dims == ("chain", "draw", "problem")
    assert mine.sample_stats["log_q"].dims == ("chain", "draw", "problem")
    stats = mine.sample_stats.dataset
    spread = (stats.log_p_joint - stats.log_q).std(["chain", "draw"]).values
    assert (spread < 1e-4).all()  # the guide is exact, float32 is not
    theirs = zoo.from_pyro(spikes, COUNTS, exact=zoo.Quadrature)
    reference = diagnostics.draw(theirs, theirs.exact(), COUNTS, draws=500, seed=1)
    found = diagnostics.METRICS["mean_error"].compute(mine, reference)
    assert (found.value < K * found.se).all()


def test_a_guide_that_ties_problems_has_one_density(store):
    guide = autoguide.AutoMultivariateNormal(spikes)
    with seeded(0):
        tree = from_pyro_guide(spikes, guide, COUNTS, draws=20, seed=0)
    assert tree.posterior["rate"].dims == ("chain", "draw", "problem")
    # both or neither, or their difference would broadcast into wrong weights
    assert tree.sample_stats["log_q"].dims == ("chain", "draw")
    assert tree.sample_stats["log_p_joint"].dims == ("chain", "draw")


def test_guides_of_ours():
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = model.observations()[:2]
    tree = from_pyro_guide(model, model.exact(), x, draws=50, seed=3)
    same = diagnostics.draw(model, model.exact(), x, draws=50, seed=3)
    assert tree.posterior["z"].dims == same.posterior["z"].dims
    np.testing.assert_array_equal(tree.posterior["z"].values, same.posterior["z"].values)
    np.testing.assert_allclose(tree.sample_stats["log_q"], same.sample_stats["log_q"])


def test_a_guide_of_ours_for_a_data_set_that_is_one_problem():
    """No axis is added for the one problem."""

    def plain(dose, y):
        w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("patient", len(dose)):
            pyro.sample("y", dist.Normal(w[0] + w[1] * dose, NOISE), obs=y)

    model = zoo.from_pyro(plain, (DOSE, SEEN))
    guide = MeanFieldEncoder(model)
    tree = from_pyro_guide(model, guide, (DOSE, SEEN), draws=20, seed=0, posterior_predictive=True)
    assert tree.posterior["w"].dims == ("chain", "draw", "w_dim_0")
    assert tree.sample_stats["log_q"].dims == ("chain", "draw")
    assert tree.posterior_predictive["y"].dims == ("chain", "draw", "patient")


def test_no_density_where_there_is_none(store):
    """Point masses, and auxiliary variables that a density would have to integrate out."""

    def widened(dose, y):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Normal(torch.zeros(2), scale).to_event(1))

    for guide in (autoguide.AutoDelta(line), widened):
        with seeded(0):
            tree = from_pyro_guide(line, guide, (DOSE, SEEN), draws=5, seed=0)
        assert "log_q" not in tree.sample_stats
        assert "log_p_joint" in tree.sample_stats


def test_bad_guides_and_models_are_told_apart():
    with pytest.raises(BadInput, match=r"'w'.*no such site"):
        from_pyro_guide(line, lambda dose, y: None, (DOSE, SEEN), draws=2, seed=0)

    def short(dose, y):
        pyro.sample("w", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    with pytest.raises(BadInput, match=r"shape \(2,\).*got shape \(1,\)"):
        from_pyro_guide(line, short, (DOSE, SEEN), draws=2, seed=0)
    with pytest.raises(BadInput, match="draws"):
        from_pyro_guide(line, exact_line, (DOSE, SEEN), draws=0, seed=0)
    with pytest.raises(Incompatible, match="latent"):
        from_pyro_guide(exact_spikes_without_latents, exact_spikes, COUNTS, draws=2, seed=0)


def exact_spikes_without_latents(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(2.0), obs=x)


@pytest.fixture(scope="module")
def chain():
    with seeded(0), pyro.get_param_store().scope():
        mcmc = MCMC(NUTS(line), num_samples=300, warmup_steps=100, disable_progbar=True)
        mcmc.run(DOSE, SEEN)
    return mcmc


def test_mcmc_gets_back_what_pyro_drops(chain):
    bare = from_pyro_mcmc(chain)
    assert set(bare.posterior.data_vars) == {"w"}
    assert bare.sample_stats["diverging"].dtype == bool
    tree = from_pyro_mcmc(chain, model=line, x=(DOSE, SEEN), dims={"w": ["coefficient"]})
    assert tree.posterior["mean"].dims == ("chain", "draw", "patient")
    assert tree.posterior["w"].dims == ("chain", "draw", "coefficient")
    w = tree.posterior["w"].values
    np.testing.assert_allclose(
        tree.posterior["mean"].values, w[..., :1] + w[..., 1:] * DOSE.numpy(), rtol=1e-5, atol=1e-6
    )
    assert tree.log_likelihood["y"].dims == ("chain", "draw", "patient")
    prior = dist.Normal(torch.tensor([0.5, 1.0]), 2.0).log_prob(torch.tensor(w)).sum(-1)
    total = tree.log_likelihood["y"].sum("patient") + prior.numpy()
    np.testing.assert_allclose(tree.sample_stats["log_p_joint"], total, rtol=1e-5)
    import arviz_stats

    mean, cov, _ = posterior()
    size = arviz_stats.ess(tree)["w"].values
    assert size.min() > 50
    within(w[0].mean(0), mean, cov.diagonal().sqrt().numpy() / np.sqrt(size))


class Finished:
    """What is read of a finished MCMC: two chains, a divergence in the second."""

    def get_samples(self, *, group_by_chain):
        assert group_by_chain
        return {"w": torch.arange(12.0).reshape(2, 3, 2)}

    def diagnostics(self):
        return {"divergences": {"chain 0": [], "chain 1": [2]}, "acceptance rate": {}}


def test_divergences_are_put_in_their_places():
    tree = from_pyro_mcmc(Finished())
    assert tree.sample_stats["diverging"].values.tolist() == [[False] * 3, [False, False, True]]


def test_rows_that_are_problems_have_the_same_axis_in_chains():
    """`problem`, as in draws of guides, with which they can then be compared."""

    class Rates(Finished):
        def get_samples(self, *, group_by_chain):
            return {"rate": torch.rand(2, 3, len(COUNTS)) + 1}

    with seeded(0):
        tree = from_pyro_mcmc(Rates(), model=spikes, x=COUNTS)
        theirs = from_pyro_guide(spikes, exact_spikes, COUNTS, draws=3, seed=0)
    assert tree.posterior["rate"].dims == ("chain", "draw", "problem")
    for group in ("posterior", "observed_data"):
        assert {n: v.dims for n, v in tree[group].data_vars.items()} == {
            n: v.dims for n, v in theirs[group].data_vars.items()
        }


def test_a_model_that_cannot_be_vectorised_is_replayed_draw_by_draw():
    def looks(dose, y):
        w = pyro.sample("w", dist.Normal(torch.tensor([0.5, 1.0]), 2.0).to_event(1))
        with pyro.plate("patient", len(dose)):
            mean = pyro.deterministic("mean", w[0] + float(w[1]) * dose)
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)

    a, b = (
        from_pyro_guide(m, exact_line, (DOSE, SEEN), draws=5, seed=0, log_likelihood=True)
        for m in (line, looks)
    )
    np.testing.assert_allclose(a.posterior["mean"], b.posterior["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a.log_likelihood["y"], b.log_likelihood["y"], rtol=1e-4)


def test_mcmc_that_is_not_finished_or_of_another_model(chain):
    with pytest.raises(BadInput, match=r"mcmc\.run"):
        from_pyro_mcmc(MCMC(NUTS(line), num_samples=5))
    with pytest.raises(BadInput, match="'rate'"):
        from_pyro_mcmc(chain, model=spikes, x=COUNTS)


ARVIZ_STATS = {
    "summary": lambda s, t: s.summary(t, var_names=["w"]),
    "ess": lambda s, t: s.ess(t),
    "rhat": lambda s, t: s.rhat(t),
    "mcse": lambda s, t: s.mcse(t),
    "hdi": lambda s, t: s.hdi(t),
    "eti": lambda s, t: s.eti(t),
    "loo": lambda s, t: s.loo(t),
    "loo_pit": lambda s, t: s.loo_pit(t),
}
ARVIZ_PLOTS = {
    "plot_dist": {"var_names": ["w"]},
    "plot_rank": {"var_names": ["w"]},
    "plot_ess": {"var_names": ["w"]},
    "plot_forest": {},
    "plot_trace": {"var_names": ["w"]},
    "plot_ppc_dist": {"num_samples": 20},
}


@pytest.mark.parametrize("name", ARVIZ_STATS)
def test_arviz_stats(tree, name):
    import arviz_stats

    found = ARVIZ_STATS[name](arviz_stats, tree)
    if isinstance(found, xarray.DataTree | xarray.Dataset):
        data = found.dataset if isinstance(found, xarray.DataTree) else found
        assert all(np.isfinite(v.values).all() for v in data.data_vars.values())
    if name == "loo":
        assert found.n_data_points == ROWS
        assert np.isfinite(found.elpd)


@pytest.mark.parametrize("name", ARVIZ_PLOTS)
def test_arviz_plots(tree, name):
    import arviz_plots

    drawn = getattr(arviz_plots, name)(tree, backend="none", **ARVIZ_PLOTS[name])
    assert drawn.viz.children


def test_loo_of_an_approximate_posterior(tree):
    """ArviZ's function for guides agrees with its function for exact draws, where q is exact."""
    import arviz_stats

    stats = tree.sample_stats.dataset
    approximate = arviz_stats.loo_approximate_posterior(
        tree, log_p=stats.log_p_joint.values.ravel(), log_q=stats.log_q.values.ravel()
    )
    assert approximate.elpd == pytest.approx(arviz_stats.loo(tree).elpd, abs=1e-2)
