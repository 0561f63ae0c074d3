"""Fit: reproducible, resumable, atomic on disk, and fair to every player."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import zoo
from inference import (
    ELBO,
    AutoMultivariateNormal,
    AutoNormal,
    BadCheckpoint,
    BadInput,
    Diverged,
    Fit,
    Flow,
    ForwardKL,
    FullCovarianceEncoder,
    Guide,
    Implicit,
    Incompatible,
    MeanFieldEncoder,
    Objective,
    OutputError,
    Player,
    RandomReservoir,
    RecurrentRecognition,
    ReservoirSampler,
    Sampling,
    fit,
)
from inference.checkpoint import plain
from inference.loop import Batches
from inference.seeds import seeded

STEPS = 12
SHORT = Sampling(levels=5)
GUIDES = {
    "encoder": lambda m: MeanFieldEncoder(m, hidden=(6,)),
    "full encoder": lambda m: FullCovarianceEncoder(m, hidden=(6,)),
    "flow": lambda m: Flow(m, transforms=2, hidden=(6,), bins=4),
    "auto normal": AutoNormal,
    "auto multivariate": AutoMultivariateNormal,
    "reservoir": lambda m: ReservoirSampler(m, neurons=16, hidden=(6,), sampling=SHORT),
    "recurrent": lambda m: RecurrentRecognition(m, neurons=12, noises=4, steps=2),
}


def make(model, name="encoder", *, elsewhere=False):
    """A guide as it starts, or one whose parameters a checkpoint has to bring back."""
    guide = GUIDES[name](model)
    if elsewhere:
        with torch.no_grad():
            for p in guide.parameters():
                p.add_(0.7)
    return guide


def short(model, guide, x=None, **knobs):
    if x is None and not guide.amortised:
        x = model.observations()[:5]
    settings = {"steps": STEPS, "batch_size": 8, "seed": 3, "progress": False}
    return fit(model, guide, x, **{**settings, **knobs})


def same(a: Fit, b: Fit) -> bool:
    """Guide, model, losses and gauges agree to the last bit."""
    states = [{**r.guide.state_dict(), **r.guide.model.state_dict(prefix="m.")} for r in (a, b)]
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(t, states[1][n]) for n, t in states[0].items())
        and all(
            kept.keys() == other.keys()
            and all(np.array_equal(v, other[n]) for n, v in kept.items())
            for kept, other in ((a.losses, b.losses), (a.health, b.health))
        )
    )


# ------------------------------------------------------------------------------- reproducibility


@pytest.mark.parametrize("name", GUIDES)
def test_same_seed_same_numbers(model, name):
    with seeded(17):  # whatever the global generator holds
        one = short(model, make(model, name))
        torch.rand(5)
        two = short(model, make(model, name))
    other = short(model, make(model, name), seed=4)
    assert same(one, two)
    assert not same(one, other)
    assert one.steps == STEPS
    assert np.isfinite(one.losses["guide"]).all()
    assert all(p.grad is None for p in one.guide.parameters())


@pytest.mark.parametrize("name", GUIDES)
def test_fit_leaves_the_global_generator_alone(model, name):
    guide = make(model, name)
    before = torch.get_rng_state()
    short(model, guide, steps=2)
    after = torch.get_rng_state()
    torch.set_rng_state(before)  # for the guard of all tests, which would blame this one twice
    assert torch.equal(before, after)


def test_loss_falls_and_the_model_stays(model):
    before = [p.clone() for p in model.parameters()]
    run = short(model, make(model), steps=150, lr=0.02, batch_size=64, objective=ForwardKL())
    assert run.losses["guide"][-20:].mean() < run.losses["guide"][:5].mean() - 0.5
    assert all(map(torch.equal, before, model.parameters()))


def test_nothing_to_learn_comes_back_at_once(model):
    run = short(model, model.exact(), model.observations())
    assert (run.steps, run.losses, run.health, run.seconds) == (0, {}, {}, 0.0)
    assert run.warnings == []


# --------------------------------------------------------------------------------------- resuming


class Fragile(ELBO):
    """ELBO that is interrupted at one of its calls."""

    calls = 0
    breaks_at = -1

    def forward(self, model, guide, x, z=None):
        Fragile.calls += 1
        if Fragile.calls - 1 == Fragile.breaks_at:
            raise KeyboardInterrupt
        return super().forward(model, guide, x, z)


@pytest.fixture
def fragile(monkeypatch):
    monkeypatch.setattr(Fragile, "calls", 0)
    monkeypatch.setattr(Fragile, "breaks_at", -1)
    return Fragile


@pytest.mark.parametrize("breaks_at", [0, 1, 7, STEPS - 1])
@pytest.mark.parametrize("data", [False, True])
def test_an_interrupted_run_ends_like_an_unbroken_one(model, fragile, tmp_path, breaks_at, data):
    x = model.observations()[:20] if data else None
    whole = short(model, make(model), x, objective=fragile())
    path = tmp_path / "deep" / "run.safetensors"
    Fragile.calls, Fragile.breaks_at = 0, breaks_at
    with pytest.raises(KeyboardInterrupt):
        short(model, make(model), x, objective=fragile(), checkpoint=path)
    assert Fit.load(path, make(model)).steps == breaks_at
    Fragile.breaks_at = -1
    resumed = short(model, make(model, elsewhere=True), x, objective=fragile(), checkpoint=path)
    assert same(whole, resumed)
    Fragile.calls = 0
    finished = short(model, make(model, elsewhere=True), x, objective=fragile(), checkpoint=path)
    assert same(whole, finished)
    assert Fragile.calls == 0


@pytest.mark.parametrize("name", ["flow", "auto normal", "auto multivariate"])
def test_other_guides_resume_too(model, fragile, tmp_path, name):
    whole = short(model, make(model, name), objective=fragile(), x=model.observations()[:5])
    Fragile.calls, Fragile.breaks_at = 0, 5
    knobs = {"objective": fragile(), "x": model.observations()[:5], "checkpoint": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        short(model, make(model, name), **knobs)
    assert same(whole, short(model, make(model, name, elsewhere=True), **knobs))


def test_learned_models_resume_too(fragile, tmp_path):
    def build():
        model = zoo.FactorAnalysis(7, 3, seed=1)
        return model, make(model)

    x = build()[0].observations()
    whole = short(*build(), x, objective=fragile(), learn_model=True)
    Fragile.calls, Fragile.breaks_at = 0, 5
    knobs = {"objective": fragile(), "learn_model": True, "checkpoint": tmp_path / "run"}
    with pytest.raises(KeyboardInterrupt):
        short(*build(), x, **knobs)
    resumed = short(*build(), x, **knobs)
    assert same(whole, resumed)
    assert not torch.equal(resumed.guide.model.loadings, build()[0].loadings)


CHILD = """
import sys, time
import inference, zoo
from inference import loop
loop.SAVE_EVERY = 0.0
step = loop.Loop.step
def slow(self, k):
    time.sleep(0.02)
    step(self, k)
loop.Loop.step = slow
model = zoo.FactorAnalysis(7, 3, seed=1)
guide = inference.MeanFieldEncoder(model, hidden=(6,))
inference.fit(model, guide, steps=400, batch_size=8, seed=3, checkpoint=sys.argv[1], progress=False)
"""


def test_a_killed_run_ends_like_an_unbroken_one(model, tmp_path):
    path = tmp_path / "run.safetensors"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(path)]) as child:
        deadline = time.monotonic() + 60
        while not path.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert 0 < Fit.load(path, make(model)).steps < 400
    resumed = short(model, make(model, elsewhere=True), steps=400, checkpoint=path)
    assert same(short(model, make(model), steps=400), resumed)


def test_a_finished_checkpoint_is_written_while_running(model, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.loop.SAVE_EVERY", 0.0)
    written = []
    write = Fit._write
    monkeypatch.setattr(
        Fit, "_write", lambda run, *rest: (written.append(run.steps), write(run, *rest))
    )
    short(model, make(model), checkpoint=tmp_path / "run")
    assert written == [*range(1, STEPS + 1), STEPS]


# -------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("name", GUIDES)
def test_save_and_load(model, name, tmp_path):
    run = short(model, make(model, name))
    run.save(tmp_path / "fit.safetensors")
    again = Fit.load(tmp_path / "fit.safetensors", make(model, name, elsewhere=True))
    assert same(run, again)
    assert again.settings == plain(run.settings)
    assert (again.seconds, again.steps, again.seed) == (run.seconds, STEPS, 3)
    x = model.observations()[:5]
    draws = [r.guide.draw(x, draws=3, chains=1, seed=0).values["z"] for r in (run, again)]
    assert torch.equal(*draws)
    assert [p.name for p in tmp_path.iterdir()] == ["fit.safetensors"]


def test_save_and_load_of_a_learned_model(tmp_path):
    model, other = (zoo.FactorAnalysis(7, 3, seed=s) for s in (1, 2))
    run = short(model, make(model), model.observations(), learn_model=True)
    run.save(tmp_path / "fit")
    again = Fit.load(tmp_path / "fit", make(other))
    assert same(run, again)
    assert torch.equal(other.noise, model.noise)


@pytest.fixture
def saved(model, tmp_path):
    """An encoder's checkpoint, complete with the optimiser's state."""
    path = tmp_path / "run.safetensors"
    short(model, make(model), checkpoint=path)
    return path


DAMAGE = {
    "empty": lambda b: b"",
    "four bytes": lambda b: b[:4],
    "half a header": lambda b: b[:200],
    "cut short": lambda b: b[:-1],
    "noise": lambda b: bytes(range(256)) * 8,
    "huge header": lambda b: b"\xff" * 8 + b[8:],
    "another's": lambda b: b.replace(b"neuroguide", b"nervoguide"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(model, saved, damage):
    saved.write_bytes(DAMAGE[damage](saved.read_bytes()))
    guide = make(model)
    before = {n: t.clone() for n, t in guide.state_dict().items()}
    message = r"run\.safetensors: expected a neuroguide checkpoint; got an unreadable.*delete it"
    with pytest.raises(BadCheckpoint, match=message):
        Fit.load(saved, guide)
    with pytest.raises(BadCheckpoint, match=message):
        short(model, guide, checkpoint=saved)
    assert all(torch.equal(t, before[n]) for n, t in guide.state_dict().items())


def test_missing_checkpoints(model, tmp_path):
    with pytest.raises(BadCheckpoint, match=r"none: .*; got no such file\. Check the path"):
        Fit.load(tmp_path / "none", make(model))


def test_checkpoints_of_other_guides(model, saved):
    with pytest.raises(BadCheckpoint, match=r"guide='FullCovarianceEncoder'.*got guide='MeanField"):
        Fit.load(saved, make(model, "full encoder"))
    wider = MeanFieldEncoder(model, hidden=(9,))
    with pytest.raises(BadCheckpoint, match=r"knobs=.*\[9\].*got knobs=.*\[6\].*saved run"):
        Fit.load(saved, wider)


@pytest.mark.parametrize("name", ["encoder", "auto normal", "auto multivariate"])
def test_checkpoints_of_other_sizes(model, tmp_path, name):
    short(model, make(model, name)).save(tmp_path / "fit")
    other = make(zoo.FactorAnalysis(6, 3, seed=1), name)
    with pytest.raises(BadCheckpoint, match=r"shape.*with the sizes of the saved run"):
        Fit.load(tmp_path / "fit", other)


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 13},
        {"batch_size": 9},
        {"lr": 0.01},
        {"seed": 4},
        {"objective": ELBO(particles=2)},
        {"objective": ForwardKL()},
        {"x": torch.zeros(4, 7)},
        {"x": torch.zeros(4, 7), "learn_model": True},
    ],
    ids=str,
)
def test_checkpoints_of_other_settings(model, saved, other):
    before = saved.read_bytes()
    key = "data" if "x" in other else next(iter(other))
    with pytest.raises(BadCheckpoint, match=rf"run\.safetensors: expected .*{key}.*got .*{key}"):
        short(model, make(model), checkpoint=saved, **other)
    assert saved.read_bytes() == before


# ----------------------------------------------------------------------------------- failed writes


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "limit"])
def test_a_failed_write_leaves_the_earlier_file(model, saved, monkeypatch, call):
    before = saved.read_bytes()
    run = short(model, make(model, "full encoder"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"run\.safetensors: expected room and permission.*; got .*\. Free some space"
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=message):
        try:
            if call == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            else:
                patch.setattr(call, no_room)
            run.save(saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_full_disk_in_mid_run_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.loop.SAVE_EVERY", 0.0)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr("os.fsync", no_room)
        short(model, make(model), checkpoint=tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_a_path_below_a_file_is_refused(model, saved):
    run = short(model, make(model))
    with pytest.raises(OutputError, match="expected room and permission"):
        run.save(saved / "fit")


# -------------------------------------------------------------------------------------- divergence


class Broken(ForwardKL):
    """A loss that goes wrong, by value alone or by gradient too, after some steps."""

    def __init__(self, bad, *, by_gradient, after=0):
        super().__init__()
        self.bad, self.by_gradient, self.left = bad, by_gradient, after

    def forward(self, model, guide, x, z=None):
        loss = super().forward(model, guide, x, z)["guide"]
        self.left -= 1
        if self.left >= 0:
            return {"guide": loss}
        return {"guide": loss * self.bad if self.by_gradient else loss + self.bad}


@pytest.mark.parametrize("by_gradient", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_fit(model, bad, by_gradient):
    guide = make(model)
    before = [p.clone() for p in guide.parameters()]
    with pytest.raises(Diverged, match=r"'guide'.*expected finite numbers; got .*\. Lower lr"):
        short(model, guide, objective=Broken(bad, by_gradient=by_gradient))
    assert all(map(torch.equal, before, guide.parameters()))
    assert all(p.grad is None for p in guide.parameters())


def test_divergence_keeps_the_last_checkpoint(model, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.loop.SAVE_EVERY", 0.0)
    broken = Broken(math.nan, by_gradient=True, after=5)
    with pytest.raises(Diverged):
        short(model, make(model), objective=broken, checkpoint=tmp_path / "run")
    kept = Fit.load(tmp_path / "run", make(model))
    assert kept.steps == 5
    assert np.isfinite(kept.losses["guide"]).all()


# ----------------------------------------------------------------------------------------- players


class Dot(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


class DotGuide(Guide):
    def __init__(self, model, value=2.0):
        super().__init__(model)
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Implicit(self.value.expand(len(x), 3), event_dim=1))


class Duel(Objective):
    """Guide g descends g c; critic c descends c (g - 9) and would take g down with it, and up."""

    needs = Guide

    def __init__(self, steps=3, lr=0.1, breaks_at=-1):
        super().__init__(steps=steps, lr=lr)
        self.critic, self.seen, self.breaks_at = Dot(0.5), [], breaks_at

    def players(self, guide):
        return {
            "guide": Player(guide),
            "critic": Player(self.critic, steps=self.knobs["steps"], lr=self.knobs["lr"]),
        }

    def forward(self, model, guide, x, z=None):
        if len(self.seen) == self.breaks_at:
            raise KeyboardInterrupt
        self.seen.append(x)
        g, c = guide.value, self.critic.value
        return {"guide": g * c, "critic": c * (g - 9) + 1e-3 * c**2 * x.mean()}


def test_each_player_moves_by_its_own_loss_steps_and_rate(model):
    guide, duel = DotGuide(model), Duel()
    run = short(model, guide, objective=duel, steps=1, lr=0.01)
    # Adam's first steps have the length of the rate, which at the only step of a fit is the first
    assert guide.value.item() == pytest.approx(2.0 - 0.01, abs=1e-5)
    assert duel.critic.value.item() == pytest.approx(0.5 + 3 * 0.1, abs=1e-3)
    assert set(run.losses) == {"guide", "critic"}
    assert run.losses["guide"].shape == run.losses["critic"].shape == (1,)
    assert guide.value.grad is None
    assert duel.critic.value.grad is None


def test_every_update_sees_a_fresh_batch(model):
    duel = Duel()
    short(model, DotGuide(model), objective=duel, steps=2)
    assert len(duel.seen) == 8
    rows = torch.cat(duel.seen)
    assert len(torch.unique(rows, dim=0)) == 8 * 8
    duel, x = Duel(), model.observations()[:64]
    short(model, DotGuide(model), x, objective=duel, steps=2)
    assert len(torch.unique(torch.cat(duel.seen), dim=0)) == 64  # the first epoch


def test_players_without_a_rate_take_the_fits(model):
    duel = Duel(steps=1, lr=None)
    short(model, DotGuide(model), objective=duel, steps=1, lr=0.02)
    assert duel.critic.value.item() == pytest.approx(0.52, abs=1e-5)


@pytest.mark.parametrize("breaks_at", [8, 9, 10])  # four updates a step: before and within one
def test_an_interrupted_duel_ends_like_an_unbroken_one(model, tmp_path, breaks_at):
    whole = short(model, DotGuide(model), objective=Duel(), steps=6)
    path = tmp_path / "run"
    objective = Duel(breaks_at=breaks_at)
    with pytest.raises(KeyboardInterrupt):
        short(model, DotGuide(model), objective=objective, steps=6, checkpoint=path)
    resumed = short(model, DotGuide(model), objective=Duel(), steps=6, checkpoint=path)
    assert same(whole, resumed)


# ------------------------------------------------------------------------------------------ batches


def batches_of(model, x, size, seed=0):
    return Batches(make(model), x, size, seed)


def test_an_epoch_visits_distinct_rows(model):
    x = model.observations()[:10]
    batches = batches_of(model, x, 3)
    epochs = []
    for epoch in range(3):
        rows = torch.cat([batches(3 * epoch + k)[0] for k in range(3)])
        assert len(torch.unique(rows, dim=0)) == 9
        assert all((x == row).all(1).any() for row in rows)
        epochs.append(rows)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    assert torch.equal(batches_of(model, x, 3)(7)[0], batches(7)[0])  # whatever came before
    assert not torch.equal(batches_of(model, x, 3, seed=1)(7)[0], batches(7)[0])


def test_batches_of_all_sizes(model):
    x = model.observations()[:10]
    assert len(batches_of(model, x, 500)(0)[0]) == 10
    assert batches_of(model, x, 500)(0)[1] is None
    whole = Batches(make(model, "auto normal"), x, 3, 0)(4)[0]
    assert torch.equal(whole, x)
    with seeded(0):
        fresh, z = batches_of(model, None, 250)(0)
    assert fresh.shape == (250, 7)
    assert z["z"].shape == (250, 3)


# ----------------------------------------------------------------------- a fixed set of simulations


class Watched(ForwardKL):
    """Forward KL that keeps its batches and the progress it was told."""

    def __init__(self, breaks_at=-1):
        super().__init__()
        self.rows, self.latents, self.told, self.breaks_at = [], [], [], breaks_at

    def forward(self, model, guide, x, z=None):
        if len(self.told) == self.breaks_at:
            raise KeyboardInterrupt
        self.rows.append(x)
        self.latents.append(z["z"])
        self.told.append(self.progress)
        return super().forward(model, guide, x, z)


def test_simulations_are_used_again_and_again(model):
    watched = Watched()
    run = short(model, make(model), objective=watched, simulations=24)
    rows, latents = torch.cat(watched.rows), torch.cat(watched.latents)
    pairs = torch.unique(torch.cat([rows, latents], 1), dim=0)
    assert len(rows) == STEPS * 8
    assert len(pairs) == len(torch.unique(rows, dim=0)) == 24  # each x keeps the latents it came of
    for epoch in rows.split(24):
        assert len(torch.unique(epoch, dim=0)) == 24
    assert run.settings["data"] != "joint"
    fresh = Watched()
    short(model, make(model), objective=fresh)
    assert len(torch.unique(torch.cat(fresh.rows), dim=0)) == STEPS * 8


def test_simulations_are_draws_from_the_joint(model):
    """Latents explain their own observations, and no others."""
    watched = Watched()
    short(model, make(model), objective=watched, simulations=400, batch_size=400, steps=1)
    (x,), (z,) = watched.rows, watched.latents
    with torch.no_grad():
        miss = ((x - model.predict({"z": z})) / model.noise).square().mean()
        shuffled = ((x - model.predict({"z": z.roll(1, 0)})) / model.noise).square().mean()
    se = (2 / x.numel()) ** 0.5  # of a mean of squares of standard Normals
    assert abs(miss - 1) < 5 * se
    assert abs(shuffled - 1) > 5 * se


def test_fewer_simulations_than_a_batch_are_one_batch(model):
    watched = Watched()
    short(model, make(model), objective=watched, simulations=5)
    assert {len(x) for x in watched.rows} == {5}


def test_simulations_depend_on_the_seed_alone(model):
    runs = [short(model, make(model), simulations=16, seed=s) for s in (3, 3, 4)]
    assert same(*runs[:2])
    assert not same(*runs[1:])
    assert not same(runs[0], short(model, make(model)))
    assert len({r.settings["data"] for r in runs}) == 2


def test_interrupted_runs_on_simulations_end_like_unbroken_ones(model, tmp_path):
    knobs = {"simulations": 20, "checkpoint": tmp_path / "run"}
    whole = short(model, make(model), objective=Watched(), simulations=20)
    with pytest.raises(KeyboardInterrupt):
        short(model, make(model), objective=Watched(breaks_at=5), **knobs)
    resumed = short(model, make(model, elsewhere=True), objective=Watched(), **knobs)
    assert same(whole, resumed)
    for other in (19, 21, None):
        message = r"run: expected .*data=.*; got data=.*saved run"
        with pytest.raises(BadCheckpoint, match=message):
            short(model, make(model), objective=Watched(), **(knobs | {"simulations": other}))


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_bad_numbers_of_simulations(model, n):
    with pytest.raises(BadInput, match=rf"^simulations: expected an integer >= 1; got {n!r}"):
        short(model, make(model), objective=ForwardKL(), simulations=n)


def one_problem(x):
    """The whole data set has one latent."""
    z = pyro.sample("z", dist.Normal(x.new_tensor(1.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_simulations_are_refused_where_they_make_no_sense(model):
    message = r'^simulations: expected x=None and .*"data"; got {}\. Leave simulations out'
    with pytest.raises(BadInput, match=message.format("observations")):
        short(model, make(model), model.observations(), simulations=20)
    whole = zoo.from_pyro(one_problem, torch.tensor([0.3, 1.2, -0.4]))
    with pytest.raises(BadInput, match=message.format("a model whose data set is one problem")):
        short(whole, make(whole), objective=ForwardKL(), simulations=20)


# ---------------------------------------------------------------------------------------- progress


def test_objectives_are_told_how_far_the_fit_has_come(model, tmp_path):
    watched = Watched()
    assert watched.progress == 0.0
    short(model, make(model), objective=watched)
    assert watched.told == [k / STEPS for k in range(STEPS)]
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        short(model, make(model), objective=Watched(breaks_at=5), checkpoint=path)
    resumed = Watched()
    short(model, make(model), objective=resumed, checkpoint=path)
    assert resumed.told == [k / STEPS for k in range(5, STEPS)]


# ------------------------------------------------------------------------ guides with a closed form


def random_reservoir(model):
    return RandomReservoir(model, neurons=16, sampling=SHORT)


@pytest.fixture
def counted(monkeypatch):
    """How often random reservoirs have absorbed a batch and settled, and the progress then."""
    calls = {"absorb": [], "settle": 0}
    absorb, settle = RandomReservoir.absorb, RandomReservoir.settle

    def counted_absorb(self, objective, x, z):
        calls["absorb"].append((objective.progress, x))
        absorb(self, objective, x, z)

    def counted_settle(self):
        calls["settle"] += 1
        return settle(self)

    monkeypatch.setattr(RandomReservoir, "absorb", counted_absorb)
    monkeypatch.setattr(RandomReservoir, "settle", counted_settle)
    return calls


def test_closed_forms_settle_once(model, counted):
    guide = random_reservoir(model)
    before = guide.outward.detach().clone()
    torch_state = torch.get_rng_state()
    run = short(model, guide)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert [p for p, _ in counted["absorb"]] == [k / STEPS for k in range(STEPS)]
    assert len(torch.unique(torch.cat([x for _, x in counted["absorb"]]), dim=0)) == STEPS * 8
    assert counted["settle"] == 1
    assert run.losses["guide"].shape == (1,)
    assert run.losses["guide"].dtype == np.float32
    assert np.isfinite(run.losses["guide"]).all()
    assert not torch.equal(before, guide.outward)
    assert run.seconds > 0


def test_closed_forms_are_reproducible_and_saved(model, tmp_path):
    one, two = (short(model, random_reservoir(model)) for _ in range(2))
    assert same(one, two)
    assert not same(one, short(model, random_reservoir(model), seed=4))
    assert not same(one, short(model, random_reservoir(model), simulations=16))
    one.save(tmp_path / "fit")
    assert same(one, Fit.load(tmp_path / "fit", random_reservoir(model)))


def test_a_settled_checkpoint_is_taken_as_it_is(model, counted, tmp_path):
    path = tmp_path / "run"
    one = short(model, random_reservoir(model), checkpoint=path)
    again = short(model, random_reservoir(model), checkpoint=path)
    assert same(one, again)
    assert again.seconds == one.seconds
    assert (len(counted["absorb"]), counted["settle"]) == (STEPS, 1)
    assert Fit.load(path, random_reservoir(model)).steps == 1
    with pytest.raises(BadCheckpoint, match=r"steps=13.*got steps=12"):
        short(model, random_reservoir(model), checkpoint=path, steps=13)


def test_closed_forms_refuse_other_objectives(model):
    with pytest.raises(Incompatible, match=r"ForwardKL with RandomReservoir.*HasDensity"):
        short(model, random_reservoir(model), objective=ForwardKL())


# ----------------------------------------------------------------------------------------- refusals

BAD = [
    *(("steps", v, "an integer >= 1") for v in (0, -3, 2.5, True, "9")),
    *(("batch_size", v, "an integer >= 1") for v in (0, -1, 8.0)),
    *(("lr", v, "a positive, finite number") for v in (0.0, -1e-3, math.nan, math.inf)),
    *(("seed", v, "an integer >= 0") for v in (-1, 0.5, True, "0", None)),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_bad_settings(model, name, value, expected):
    guide = make(model)
    before = [p.clone() for p in guide.parameters()]
    with pytest.raises(BadInput, match=rf"^{name}: expected {expected}; got {value!r}\. .*{name}="):
        short(model, guide, **{name: value})
    assert all(map(torch.equal, before, guide.parameters()))


def test_a_guide_of_another_model_is_refused(model):
    guide = make(zoo.FactorAnalysis(7, 3, seed=1))
    with pytest.raises(Incompatible, match=r"^guide: .*of this model; got another's\. Build Guide"):
        short(model, guide)


def test_bad_data_are_refused(model):
    with pytest.raises(BadInput, match=r"^x: expected shape \(B, 7\)"):
        short(model, make(model), torch.zeros(4, 6))
    with pytest.raises(BadInput, match=r"^x: .*AutoNormal has parameters for each.*\. Pass x"):
        fit(model, AutoNormal(model), steps=1, progress=False)
