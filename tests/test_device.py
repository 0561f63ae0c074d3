"""Every guide and objective away from the CPU: on a pretended device, and on a GPU where there is.

Run time: 40 s on one core. All fits start from float32 models on the CPU, with x on the CPU: fit
takes model, guide and x to the device, draw takes x to the model, and results are NumPy's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from second_device import DEVICE, second_device
from test_guides import KINDS, KNOBS, MADE_FOR

import diagnostics
import zoo
from diagnostics import compare, draw, packed, sbc
from inference import GUIDES, OBJECTIVES, BadInput, Guide, MeanFieldEncoder, Sampling, fit
from inference.guides.score_circuit import ScoreCircuit
from inference.seeds import seeded

pytestmark = pytest.mark.filterwarnings("ignore::inference.errors.FitWarning")  # after two steps
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = pytest.param(torch.device("cuda:0"), marks=[pytest.mark.gpu, no_gpu], id="cuda")
KIND = {"nuts": "two sites"}  # of the others the first in MADE_FOR, or factor analysis
SHORT = KNOBS | {"nuts": {"warmup": 2}}
CHEAP = ("mean_error", "sd_ratio", "elbo_gap", "forward_ess", "khat", "ksd", "fisher_divergence")
FITS = {"steps": 2, "batch_size": 4, "seed": 0, "progress": False}
PARTNER = {  # of the objectives that are nobody's own: a guide, its knobs, and what is learned
    "noise_staircase": ("reservoir_sampler", {}),
    "exact_score": ("reservoir_sampler", {}),
    "mixed_score": ("reservoir_sampler", {}),
    "implicit_score": ("reservoir_sampler", {"activation": "squareplus"}),
    "fixed_point": ("iterative_poisson", {"learn_step": False}),
    "map_energy": ("lca", {}),
    "prior_contrastive": ("noise_mlp", {}),
    "wasserstein": ("noise_mlp", {}),
    "oscillating": ("noise_mlp", {}),
    "energy_score": ("noise_mlp", {}),
    "reweighted_wake_sleep": ("full_covariance_encoder", {}),
    "free_energy": ("iterative_gaussian", {}),
    "reliability_cost": ("single_layer_circuit", {}),
    "adversarial": ("recurrent_recognition", {}),
    "elbo": ("mean_field_encoder", {}),
    "forward_kl": ("flow", {}),
    "denoising_score_matching": ("energy_reservoir", {}),
}


@pytest.fixture(params=[pytest.param(DEVICE, id="pretended"), CUDA])
def device(request):
    if request.param != DEVICE:
        yield request.param
        return
    with second_device():
        yield DEVICE


def guide_of(name, knobs, model):
    """A guide with few steps of its circuit, where it is one."""
    cls = GUIDES[name]
    circuit = isinstance(cls, type) and issubclass(cls, ScoreCircuit)
    short = {"sampling": Sampling(levels=3)} if circuit else {}
    return cls(model, **SHORT.get(name, {}) | knobs | short)


def case(name, knobs, *, double=False):
    """A small model on the CPU, a guide of it, and two of its observations or the only one."""
    model = KINDS[KIND.get(name, MADE_FOR.get(name, ("factor analysis",))[0])]()
    if double:
        model = model.double()
    x = model.observations()
    x = tuple(t.clone() for t in x) if isinstance(x, tuple) else x[:2].clone()
    return model, guide_of(name, knobs, model), x


def learnt(name, device, *, double=False):
    """A guide after two steps, from the joint where it needs or likes that, and x on the CPU."""
    model, guide, x = case(name, {}, double=double)
    joint = guide.amortised and guide.latents.plated
    return fit(model, guide, None if joint else x, device=str(device), **FITS), x


def at(guide):
    return {t.device for t in [*guide.parameters(), *guide.buffers(), *guide.model.buffers()]}


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_with_its_own_objective(name, device):
    run, x = learnt(name, device)
    guide: Guide = run.guide
    assert at(guide) <= {device}
    assert all(np.isfinite(v).all() for v in run.losses.values())
    chain = {"draws": 2, "chains": 1} if name == "nuts" else {"draws": 6, "chains": 2}
    sizes = chain | {"seed": 0, "progress": False}
    tree = draw(guide.model, guide, x, **sizes)
    again = draw(guide.model, guide, x, **sizes)
    np.testing.assert_array_equal(packed(tree), packed(again))
    if name not in {*MADE_FOR, "nuts"}:
        compare(guide.model, {"it": guide}, x, metrics=CHEAP, **sizes)


@pytest.mark.parametrize("name", [n for n in GUIDES if n != "nuts"])  # it builds nothing
def test_a_guide_built_beside_a_model_that_has_moved_is_there(name, device):
    model = case(name, {})[0].to(device)
    guide, x = guide_of(name, {}, model), model.observations()
    x = x if isinstance(x, tuple) else x[:2]
    guide.bind(x)
    assert at(guide) == {device}
    assert all(v.device == device for v in guide.draw(x, draws=2, chains=1, seed=0).values.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_with_a_guide_that_it_takes(name, device):
    partner, knobs = PARTNER[name]
    model, guide, x = case(partner, knobs)
    goal = OBJECTIVES[name]()
    before = [p.clone() for p in model.parameters()]
    learns = {"learn_model": not goal.learns_guide}
    joint = goal.learns_guide and name != "free_energy"
    run = fit(
        model, guide, None if joint else x, objective=goal, device=str(device), **FITS, **learns
    )
    assert at(guide) | {t.device for t in goal.state_dict().values()} <= {device}
    assert all(np.isfinite(v).all() for v in run.losses.values())
    changed = [not torch.equal(p.cpu(), b) for p, b in zip(model.parameters(), before, strict=True)]
    assert any(changed) is learns["learn_model"]


@pytest.mark.parametrize("name", ["mean_field_encoder", "reservoir_sampler"])
def test_every_metric(name, device):
    """Metrics take NumPy's arrays; what they need of guides is computed where the guides are."""
    run, x = learnt(name, device)
    sizes = {"draws": 20, "chains": 2, "seed": 0, "progress": False}
    table = compare(run.guide.model, {"it": run.guide}, x, **sizes)
    assert list(table.metric.values) == list(diagnostics.METRICS)
    tree = sbc(run.guide.model, run.guide, problems=4, draws=9, seed=0, progress=False)
    assert {"log_joint", "neighbours"} <= set(tree["prior_sbc"].data_vars)


@pytest.mark.parametrize("name", ["mean_field_encoder", "reservoir_sampler", "noise_mlp"])
def test_the_pretended_device_has_the_numbers_of_the_cpu(name):
    with second_device():
        there, x = learnt(name, DEVICE, double=True)
        a = packed(draw(there.guide.model, there.guide, x, draws=5, chains=2, seed=0))
    here, x = learnt(name, torch.device("cpu"), double=True)
    b = packed(draw(here.guide.model, here.guide, x, draws=5, chains=2, seed=0))
    for player, losses in here.losses.items():
        np.testing.assert_allclose(there.losses[player], losses, rtol=1e-6)  # kept as float32
    np.testing.assert_allclose(a, b, rtol=1e-9)


def test_x_elsewhere_is_told(device):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    x = model.observations()[:2].clone()
    guide = MeanFieldEncoder(model.to(device)).to(device)
    with pytest.raises(BadInput, match=f"a tensor on {device}, where the model is; got one on cpu"):
        guide.draw(x, draws=2, chains=1, seed=0)


class Stray(MeanFieldEncoder):
    """Forgets that its noise has to be where x is."""

    def distribution(self, x):
        q = super().distribution(x).base_dist
        return torch.distributions.Independent(
            torch.distributions.Normal(q.loc + torch.zeros(len(x), 1), q.scale), 1
        )


def test_a_planted_fault_is_found(device):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    with pytest.raises(RuntimeError, match="same device"):
        fit(model, Stray(model), device=str(device), **FITS)


def refusals(device):
    """What torch says on a GPU, and must say on the pretended device."""
    a, b = torch.ones(2, 3, device=device), torch.ones(2, 3)
    places = torch.tensor([1, 0])
    return {
        "sum": lambda: a + b,
        "product": lambda: a @ b.T,
        "join": lambda: torch.cat([a, b]),
        "gather": lambda: a.index_select(0, places),
        "indices there": lambda: b[places.to(device)],
        "values": lambda: a.index_put_((places,), b),
        "integers": lambda: a.long() @ a.long().T,
        "generator": lambda: torch.randn(2, device=device, generator=torch.Generator()),
        "numpy": lambda: np.asarray(a),
    }


@pytest.mark.parametrize("what", refusals("cpu"))
def test_the_device_refuses(what, device):
    with pytest.raises((RuntimeError, TypeError)):
        refusals(device)[what]()


def test_the_device_takes(device):
    a, b = torch.ones(2, 3, device=device), torch.ones(2, 3)
    found = [a + b[0, 0], a[torch.tensor([1, 0])], a.clone().copy_(b), torch.tensor([1.0]).to(a)]
    assert all(t.device == device for t in found)
    assert b.clone().copy_(a).device == a.cpu().device == torch.device("cpu")


@pytest.mark.gpu
@no_gpu
def test_seeds_reach_the_gpu_and_leave_it_as_it_was():
    torch.cuda.manual_seed_all(5)
    before = torch.cuda.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with seeded(seed):
            drawn.append(torch.randn(8, device="cuda"))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.cuda.get_rng_state(), before)
