"""Several ranks train one guide as one process with the larger batch would. About 40 s.

The tests look at what two processes have done, this file run as a script, and do the same alone.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import within
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from typer.testing import CliRunner

import inference
import neuroguide
import zoo
from diagnostics import RunDirectory
from inference import ELBO, Diverged, ForwardKL, Incompatible, Player, fit, parallel
from inference.errors import BadCheckpoint, OutputError, UnknownName
from inference.loop import Batches, Trainer

STEPS, SEEDS, BATCH = 80, 14, 4
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
RUNS = {  # what two ranks can do beside an encoder with fresh draws
    "whole batch": (inference.AutoNormal, ELBO, True),
    "closed form": (
        lambda m: inference.RandomReservoir(m, neurons=16),
        inference.DenoisingScoreMatching,
        False,
    ),
    "game": (
        lambda m: inference.RecurrentRecognition(m, neurons=12, noises=4, steps=2),
        lambda: inference.Adversarial(hidden=(8,)),
        False,
    ),
}


def build(*, double=False):
    model = zoo.FactorAnalysis(7, 3, seed=1)
    return model.double() if double else model


def encoder(model):
    return inference.MeanFieldEncoder(model, hidden=(6,))


def short(model, guide, x=None, **knobs):
    settings = {"steps": 12, "batch_size": BATCH, "seed": 3, "device": "cpu", "progress": False}
    return fit(model, guide, x, **{**settings, **knobs})


class Steep(ForwardKL):
    """Nothing is random but the data; some gradients are cut, so that their size tells in Adam."""

    def players(self, guide):
        return {"guide": Player(guide, steepest=3.0, averaging=0.9)}


class Watched(ELBO):
    """ELBO that keeps what it was given, and its noise."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, model, guide, x, z=None):
        self.seen.append((x.clone(), torch.get_rng_state()))
        return super().forward(model, guide, x, z)


class Faulty(ELBO):
    """ELBO that does something else on one call."""

    calls, call, deed, ranks = 0, 0, None, ()

    def forward(self, model, guide, x, z=None):
        self.calls += 1
        losses = super().forward(model, guide, x, z)
        due = self.calls == self.call and parallel.rank() in self.ranks
        return {"guide": losses["guide"] * self.deed()} if due else losses


def faulty(call, deed, *ranks):
    """It does its deed on one call, on these ranks."""
    made = Faulty()
    made.call, made.deed, made.ranks = call, deed, ranks
    return made


def interrupt():
    raise KeyboardInterrupt


def die():
    os._exit(3)


# ------------------------------------------------------------------- what both sides do


def settled(batch_size):
    """Float64, the same data whatever the ranks."""
    model = build(double=True)
    run = short(
        model, encoder(model), objective=Steep(), simulations=50, steps=30, batch_size=batch_size
    )
    return state(run) | {"losses": run.losses, "health": run.health}


def errors(batch_size):
    """After training on fresh draws, one for each seed: the log of how far KL(q || p) is above
    that of the best factorised Gaussian, which is known in closed form.
    """
    model = build()
    x, exact, found = model.observations()[:100], model.exact(), []
    best = float(exact.mean_field_gap())
    for seed in range(SEEDS):
        guide = encoder(model)
        short(model, guide, steps=STEPS, batch_size=batch_size, seed=seed, lr=0.02)
        with torch.no_grad():
            q = guide.distribution(x).base_dist
            q = MultivariateNormal(q.loc, scale_tril=torch.diag_embed(q.scale))
            above = kl_divergence(q, exact.distribution(x)).mean() - best
        found.append(above.log().item())
    return np.array(found)


def watched(x=None):
    model, objective = build(), Watched()
    short(model, encoder(model), x if x is None else model.observations()[:x], objective=objective)
    return objective.seen


def state(run):
    return {"state": {n: t.clone() for n, t in run.guide.state_dict().items()}}


def caught(work):
    try:
        work()
    except (inference.NeuroguideError, KeyboardInterrupt) as error:
        return type(error), str(error)
    return None


# ------------------------------------------------------------------------- the two ranks


def work(out: Path) -> None:
    """Both ranks come here; each leaves a file with what it found."""
    torch.set_num_threads(1)
    with parallel.group("cpu", patience=60) as me:
        found = {"alike": settled(BATCH), "errors": errors(BATCH)}
        found |= {"joint": watched(), "data": watched(20), "resumed": resumed(out)}
        mean, parallel.average = parallel.average, total
        found["summed"] = settled(BATCH)
        parallel.average = mean
        found |= {name: state(one(name)) for name in RUNS}
        found |= {"slope": slope(me), "errors of ranks": refusals(out, me)}
        (out / f"{me}.pickle").write_bytes(pickle.dumps(found))
        model = build()
        lost = caught(lambda: short(model, encoder(model), objective=faulty(5, die, 1)))
        (out / "lost.pickle").write_bytes(pickle.dumps(lost))
        os._exit(0)  # the group has lost a rank


def total(tensors):
    """The planted error: sums in place of means."""
    return [2 * t for t in MEAN(tensors)]


MEAN = parallel.average


def one(name):
    guide, objective, data = RUNS[name]
    model = build()
    x = model.observations()[:5] if data else None
    # too few problems for a gauge to warn of so short a game
    return short(model, guide(model), x, objective=objective(), batch_size=3)


def resumed(out):
    """A run that is interrupted, what it has kept, and how it ends."""
    model, path = build(), out / "run.safetensors"
    fault = faulty(8, interrupt, 0, 1)
    stopped = caught(lambda: short(model, encoder(model), objective=fault, checkpoint=path))
    kept = parallel.shared(path.read_bytes)
    mine = path if parallel.rank() == 0 else out / "elsewhere"  # other machines lack the file
    other = Faulty()
    again = short(model, encoder(model), objective=other, checkpoint=mine)
    whole = short(model, encoder(model), objective=Faulty())
    return {"stopped": stopped, "kept": kept, "again": state(again), "whole": state(whole),
            "losses": (again.losses, whole.losses), "calls": other.calls}  # fmt: skip


def slope(me):
    """Rank 0 has a gradient for a, rank 1 has none; nobody has one for b."""
    a, b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    c = nn.Parameter(torch.tensor([1.0, 4.0]))
    trainer = Trainer("guide", [a, b, c], Player(nn.Module()), 0.1)
    return trainer.slope(5 * a + 0 * c.sum() if me == 0 else c.square().sum())


def refusals(out, me):
    def write():
        raise OutputError("disk", expected="room", got="none", fix="Tidy up.")

    model, broken = build(), out / "broken"
    broken.write_bytes(b"nothing")
    guide = encoder(model)
    return {
        "diverged": caught(lambda: short(model, guide, objective=faulty(4, lambda: np.nan, 1))),
        "other steps": caught(lambda: short(model, guide, steps=12 + me)),
        "other data": caught(lambda: short(model, guide, model.observations()[me : 8 + me])),
        "too few": caught(lambda: short(model, guide, model.observations()[:1])),
        "checkpoint": caught(lambda: short(model, guide, checkpoint=broken)),
        "writing": caught(lambda: parallel.shared(write)),
        "name": caught(lambda: parallel.shared(lambda: zoo.MODELS["banan"])),
    }


# ------------------------------------------------------------------------------- the tests


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What ranks 0 and 1 found, and what rank 0 said when rank 1 was gone."""
    out = tmp_path_factory.mktemp("ranks")
    port = {"MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    planted = "ignore:Encountered NaN"  # Pyro sees what makes a rank diverge
    command = [sys.executable, "-W", "error", "-W", planted, __file__, str(out)]
    children = [
        subprocess.Popen(
            command, env=ENVIRONMENT | port | {"RANK": k, "LOCAL_RANK": k},
            stderr=subprocess.PIPE, text=True,
        )
        for k in "01"
    ]  # fmt: skip
    said = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 3], "\n".join(said)
    found = [pickle.loads((out / f"{k}.pickle").read_bytes()) for k in range(2)]
    return (*found, pickle.loads((out / "lost.pickle").read_bytes()))


@pytest.fixture(scope="module")
def alone():
    """One process, with the doubled batch."""
    return {"alike": settled(2 * BATCH), "errors": errors(2 * BATCH)}


def distance(a, b):
    """Largest difference of two states' parameters, in units of the largest parameter."""
    assert a.keys() == b.keys()
    floats = [n for n, t in a.items() if t.is_floating_point()]
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1)) for n in floats)


def test_without_noise_two_ranks_are_one_process_with_the_doubled_batch(ranks, alone):
    two, one_process = ranks[0]["alike"], alone["alike"]
    assert distance(two["state"], one_process["state"]) < 1e-12
    for kind in ("losses", "health"):
        for name, values in one_process[kind].items():
            assert np.allclose(two[kind][name], values, rtol=1e-6, atol=0), name
    assert distance(ranks[0]["summed"]["state"], one_process["state"]) > 1e-4  # a planted error


def test_with_noise_they_agree_within_five_standard_errors(ranks, alone):
    """Standard errors are those of means over seeds, of two ranks and of one process."""
    two, doubled = ranks[0]["errors"], alone["errors"]
    within(two.mean(), doubled.mean(), error_of(two, doubled))


def test_ranks_with_the_same_noise_would_be_found_out(alone):
    """They would do what one process does with a batch that is not doubled."""
    planted, doubled = errors(BATCH), alone["errors"]
    with pytest.raises(AssertionError, match="standard errors from the truth"):
        within(planted.mean(), doubled.mean(), error_of(planted, doubled))


def error_of(*samples):
    return np.sqrt(sum(s.var(ddof=1) / len(s) for s in samples))


@pytest.mark.parametrize("name", ["alike", *RUNS])
def test_ranks_end_with_the_same_bits(ranks, name):
    first, second = (r[name]["state"] for r in ranks[:2])
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert all(t.isfinite().all() for t in first.values())


def test_ranks_have_their_own_noise_and_data(ranks):
    first, second = (r["joint"] for r in ranks[:2])
    assert len(first) == len(second) == 12
    for (x, noise), (other, others) in zip(first, second, strict=True):
        assert not torch.isclose(x, other).any()
        assert not torch.equal(noise, others)


def test_the_first_rank_draws_what_a_single_process_draws(ranks):
    mine = watched()
    for (x, noise), (same, again) in zip(ranks[0]["joint"], mine, strict=True):
        assert torch.equal(x, same)
        assert torch.equal(noise, again)


def test_ranks_take_their_parts_of_an_epoch(ranks):
    model = build()
    whole = Batches(encoder(model), model.observations()[:20], 2 * BATCH, 3)
    for k, parts in enumerate(zip(*(r["data"] for r in ranks[:2]), strict=True)):
        assert torch.equal(torch.cat([x for x, _ in parts]), whole(k)[0])


def test_an_interrupted_run_of_two_ranks_goes_on_with_two(ranks):
    for found in (r["resumed"] for r in ranks[:2]):
        assert found["stopped"] == (KeyboardInterrupt, "")
        assert found["calls"] == 12 - 7  # seven steps were done
        again, whole = found["again"]["state"], found["whole"]["state"]
        assert all(torch.equal(t, again[n]) for n, t in whole.items())
        assert np.array_equal(*(run["guide"] for run in found["losses"]))


def test_it_goes_on_with_one(ranks, tmp_path):
    (tmp_path / "run").write_bytes(ranks[0]["resumed"]["kept"])
    model = build()
    assert inference.Fit.load(tmp_path / "run", encoder(model)).steps == 7
    other = Faulty()
    run = short(model, encoder(model), objective=other, checkpoint=tmp_path / "run")
    assert (run.steps, other.calls) == (12, 5)
    losses = ranks[0]["resumed"]["losses"][1]["guide"]
    assert np.array_equal(run.losses["guide"][:7], losses[:7])
    assert not np.array_equal(run.losses["guide"], losses)


def test_missing_gradients_count_as_zero(ranks):
    for loss, (a, b, c) in (r["slope"] for r in ranks[:2]):
        assert loss == (10 + 17) / 2
        assert a == 5 / 2
        assert b is None
        assert torch.equal(c, torch.tensor([1.0, 4.0]))


REFUSALS = {
    "diverged": (Diverged, "gradient of player 'guide'.*Lower lr"),
    "other steps": (Incompatible, "rank 1: expected steps=12; got steps=13.*the same arguments"),
    "other data": (Incompatible, "rank 1: expected data='.*the same arguments"),
    "too few": (inference.BadInput, "x: expected a problem for each of 2 ranks; got 1"),
    "checkpoint": (BadCheckpoint, "broken: expected a neuroguide checkpoint"),
    "writing": (OutputError, "disk: expected room; got none. Tidy up."),
    "name": (UnknownName, "Did you mean 'banana'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_all_ranks_end_with_the_same_error(ranks, name):
    kind, text = REFUSALS[name]
    first, second = (r["errors of ranks"][name] for r in ranks[:2])
    assert first == second
    assert first[0] is kind
    with pytest.raises(kind, match=text):
        raise parallel._again(*first)


def test_a_rank_that_dies_does_not_leave_the_other_waiting(ranks):
    kind, text = ranks[2]
    assert kind is parallel.LostRank
    assert "rank 0: expected word from the other ranks; got " in text


def test_alone_nothing_is_sent():
    t = [torch.ones(2), torch.zeros(())]
    with parallel.group() as me:
        assert (me, parallel.rank(), parallel.world()) == (0, 0, 1)
    assert all(a is b for a, b in zip(parallel.average(t), t, strict=True))
    assert parallel.everyone(5) == [5]
    assert parallel.shared(lambda: 6) == 6


def torchrun(*options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "neuroguide", "fit", "factor_analysis", "mean_field_encoder", *options]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def test_the_command_line_speaks_with_one_voice(tmp_path):
    options = ["--batch-size", "8", "--device", "cpu", "--out", str(tmp_path / "run")]
    done = torchrun(*options, "--steps", "20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint ") == 1
    run = RunDirectory.open(tmp_path / "run")
    kept = inference.Fit.load(
        run.checkpoint("mean_field_encoder"), inference.MeanFieldEncoder(zoo.FactorAnalysis())
    )
    assert kept.steps == 20
    assert len(run.losses()["mean_field_encoder"]["guide"]) == 20
    refused = torchrun(*options, "--steps", "21")
    assert refused.returncode != 0
    assert refused.stderr.count("error out") == 1, refused.stderr
    assert "another run" in refused.stderr


def test_other_commands_refuse_to_share_their_work(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = CliRunner().invoke(neuroguide.app, ["list"])
    assert refused.exit_code == 2
    assert "torchrun: expected neuroguide fit; got neuroguide list" in refused.output


if __name__ == "__main__":
    work(Path(sys.argv[1]))
