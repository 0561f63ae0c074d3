"""Circuits that come trained: cards, files and the commands that use them. About 60 s."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray
from typer.testing import CliRunner

import inference
import neuroguide
import zoo
from diagnostics import RunDirectory
from inference import BadCheckpoint, BadInput
from inference import checkpoint as files
from neuroguide import pipeline
from neuroguide import train_pretrained as training
from neuroguide.recipes import RECIPES
from zoo.pretrained import FOLDER, UNTAUGHT, digest, pretrained_on

BASELINES = {
    "mean_field_encoder", "full_covariance_encoder", "flow", "auto_normal",
    "auto_multivariate_normal",
}  # fmt: skip
SLOW = {"c2st"}  # three seconds for each problem
SEED = 7  # cards have another
K = 5.0  # standard errors
DIGITS = ("--data", "digits")
runner = CliRunner()


def call(*args):
    return runner.invoke(neuroguide.app, [str(a) for a in args])


def worst(entry, guide, names):
    """The largest distance of a number from its card, in standard errors of both."""
    card = entry.card["metrics"]
    found = training.measure(entry, guide, SEED, names)
    assert set(found) == set(names)
    error = [np.hypot(found[n]["se"], card[n]["se"]) for n in names]
    assert min(error) > 0, "a tolerance of zero accepts nothing"
    away = [abs(found[n]["value"] - card[n]["value"]) for n in names]
    return max(a / e for a, e in zip(away, error, strict=True))


def headlines(entry):
    """Those that are measured in the twinkling of an eye."""
    return [n for n in entry.card["metrics"] if n not in SLOW]


def test_every_circuit_is_there_or_has_nothing_to_learn():
    taught = {e.guide for e in zoo.PRETRAINED.values()}
    assert taught.isdisjoint(UNTAUGHT)
    assert taught | set(UNTAUGHT) | BASELINES == set(inference.GUIDES)
    assert set(zoo.PRETRAINED) == set(RECIPES)


def test_files_are_small_and_belong_to_an_entry():
    sizes = {p: p.stat().st_size for p in FOLDER.iterdir()}
    wanted = {f"{n}{end}" for n in zoo.PRETRAINED for end in (".safetensors", ".json")}
    assert {p.name for p in sizes} == wanted
    assert max(sizes.values()) < 800_000
    assert sum(sizes.values()) < 10_000_000


@pytest.mark.parametrize("name", zoo.PRETRAINED)
def test_a_card_says_where_it_comes_from(name):
    entry = zoo.PRETRAINED[name]
    card = entry.card
    assert card["settings"] == RECIPES[name].settings
    assert card["command"] == f"neuroguide train-pretrained {name}"
    assert card["licence"].startswith("Apache-2.0")
    assert {"torch", "pyro-ppl", "neuroguide"} <= set(card["versions"])
    assert list(card["metrics"]) == list(RECIPES[name].metrics)
    assert all(np.isfinite(m["value"]) for m in card["metrics"].values())
    for shown in (repr(entry), entry._repr_html_()):
        assert all(word in shown for word in ("licence", "command", "±"))


@pytest.mark.parametrize("name", zoo.PRETRAINED)
def test_a_card_tells_the_truth(name, one_thread):
    """All numbers but C2ST, with another seed."""
    entry = zoo.PRETRAINED[name]
    guide = zoo.pretrained(name)
    assert isinstance(guide.model, zoo.MODELS[entry.model])
    assert worst(entry, guide, headlines(entry)) < K


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if SLOW & set(r.metrics)])
def test_a_card_tells_the_truth_about_c2st(name, one_thread):
    """About 15 s each."""
    entry = zoo.PRETRAINED[name]
    assert worst(entry, zoo.pretrained(name), [*SLOW]) < K


@pytest.mark.parametrize(
    "name", ["reservoir_sampler", "single_layer_circuit", "stochastic_synapses", "noise_mlp"]
)
def test_a_card_of_other_weights_is_found_out(name, one_thread):
    entry, guide = zoo.PRETRAINED[name], zoo.pretrained(name)
    with torch.no_grad():
        for p in guide.parameters():
            p.mul_(1.1)
    assert worst(entry, guide, headlines(entry)) > K


@pytest.fixture
def copy(tmp_path):
    """An entry whose files may be spoilt."""
    entry = replace(zoo.PRETRAINED.poisson_encoder, folder=tmp_path)
    for end in (".safetensors", ".json"):
        shutil.copy(FOLDER / f"{entry.name}{end}", tmp_path)
    entry.load()
    return entry


def rewrite(entry, **fields):
    path = entry.path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_files_that_do_not_fit_the_code_are_refused(copy):
    def refused(words):
        with pytest.raises(BadCheckpoint, match=words) as caught:
            copy.load()
        assert "neuroguide train-pretrained poisson_encoder" in str(caught.value)

    kept = copy.path.read_bytes()
    rewrite(copy, guide_knobs={"hidden": [32, 32]})
    refused("knobs")
    rewrite(copy, guide_knobs={"no_such_knob": 1})
    refused("no_such_knob")
    rewrite(copy, guide_knobs={}, model_knobs={"latents": 4})
    refused("shape|other parameters")
    rewrite(copy, model_knobs={"noise": 0.4})
    refused("other parameters")
    rewrite(copy, model_knobs={})
    copy.path.write_bytes(kept[:-8])
    refused("check sum")
    rewrite(copy, sha256=digest(copy.path))
    refused("cut short")
    tensors, header = files.read(FOLDER / copy.path.name)
    files.write(copy.path, {n: 1.1 * t for n, t in tensors.items()}, header)
    rewrite(copy, sha256=digest(copy.path))
    copy.load()  # weights themselves are not looked at: cards are measured, above
    copy.path.unlink()
    refused("no such file")
    copy.path.with_suffix(".json").unlink()
    refused("its card")


def test_names_without_a_checkpoint_say_what_to_do():
    with pytest.raises(BadInput, match="Did you mean 'poisson_encoder'"):
        zoo.pretrained("poisson_encodr")
    with pytest.raises(BadInput, match="nothing to learn in nuts"):
        zoo.pretrained("nuts")
    with pytest.raises(BadInput, match=r"recurrent_recognition, noise_mlp.*It comes on poisson"):
        pretrained_on("poisson_encoder", "explaining_away")


def test_nothing_is_read_until_asked(tmp_path):
    entry = replace(zoo.PRETRAINED.lca, folder=tmp_path / "none")
    assert "sparse coding, learned from patches" in entry.about
    assert entry.about in repr(zoo.PRETRAINED)
    assert "neuroguide train-pretrained lca" in repr(entry)
    with pytest.raises(BadCheckpoint, match="train-pretrained lca"):
        entry.card  # noqa: B018


def test_learned_models_keep_pictures():
    guide = zoo.pretrained("iterative_gaussian")
    x = guide.model.observations()
    assert x.shape == (100, 64)
    assert guide.model.image_shape == (8, 8)
    assert torch.equal(x, zoo.data.digits().validation[:100])


def test_train_pretrained_makes_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    short = replace(RECIPES["poisson_encoder"], steps=20, problems=2, draws=200)
    monkeypatch.setitem(training.RECIPES, "poisson_encoder", short)
    done = call("train-pretrained", "poisson_encoder", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    path = tmp_path / "poisson_encoder.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poisson_encoder.json", path.name]
    first = path.stat().st_mtime_ns
    assert call("train-pretrained", "poisson_encoder", "--out", tmp_path).exit_code == 0
    assert path.stat().st_mtime_ns == first
    path.write_bytes(path.read_bytes()[:-8])
    assert call("train-pretrained", "poisson_encoder", "--out", tmp_path).exit_code == 0
    assert replace(zoo.PRETRAINED.poisson_encoder, folder=tmp_path).load().knobs["seed"] == 0
    wrong = call("train-pretrained", "poisson_encodr")
    assert wrong.exit_code == 2
    assert "Did you mean 'poisson_encoder'" in wrong.stderr


def test_draw_from_the_package_or_a_run(tmp_path):
    path = tmp_path / "draws.nc"
    few = ("--problems", 2, "--draws", 20, "--chains", 2, "--out", path)
    done = call("draw", "poisson_coding", "poisson_encoder", "--pretrained", *few)
    assert done.exit_code == 0, done.output
    tree = xarray.open_datatree(path, engine="h5netcdf").load()
    assert tree["posterior"].sizes == {"chain": 2, "draw": 20, "problem": 2, "neuron": 3}
    run = tmp_path / "run"
    fitted = call("fit", "poisson_coding", "poisson_encoder", "--steps", 20, "--out", run)
    assert fitted.exit_code == 0, fitted.output
    assert call("draw", "poisson_coding", "poisson_encoder", "--run", run, *few).exit_code == 0
    again = xarray.open_datatree(path, engine="h5netcdf").load()
    assert not again.identical(tree)
    assert call("draw", "poisson_coding", "iterative_poisson", *few).exit_code == 0  # as it comes


@pytest.mark.parametrize("command", ["draw", "train-pretrained"])
def test_help_has_an_example(command):
    shown = re.sub(r"\s+", " ", call(command, "--help").output)
    assert f"Example: neuroguide {command}" in shown


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["draw", "poisson_coding", "poisson_encoder"], ["--pretrained", "--run", "neither"]),
        (["draw", "poisson_coding", "lca", "--pretrained"], ["semi_amortised_poisson", "lca"]),
        (["draw", "banana", "flw", "--pretrained"], ["Did you mean 'flow'"]),
        (["compare", "banana", "--pretrained"], ["mean_field_encoder", "no checkpoint"]),
        (
            ["compare", "poisson_coding", "--guides", "poisson_encoder", "--pretrained", *DIGITS],
            ["data='digits'", "--pretrained"],
        ),
    ],
)
def test_bad_input_is_one_clear_line(args, words, tmp_path):
    result = call(*args, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert all(word in result.stderr for word in words), result.stderr


def test_guides_of_a_pretrained_run_are_those_of_the_package(tmp_path):
    config = {"model": "poisson_coding", "data": None, "guides": ["poisson_encoder"], "seed": 0}
    run = RunDirectory.create(tmp_path / "run", config | {"problems": 2, "pretrained": True})
    model, x, fits = pipeline.learn_model(run, "cpu")
    found = pipeline.fit_guides(run, model, x, fits, "cpu")["poisson_encoder"]
    assert found.model is model
    kept = zoo.pretrained("poisson_encoder").state_dict()
    assert all(torch.equal(kept[n], t) for n, t in found.state_dict().items())


@pytest.mark.slow
def test_compare_without_training(tmp_path):
    """A circuit from the package, beside one that has nothing to learn. About 25 s, with C2ST."""
    path = tmp_path / "run"
    done = call(
        "compare", "factor_analysis", "--guides", "recurrent_circuit,iterative_gaussian",
        "--pretrained", "--problems", 1, "--draws", 50, "--out", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not (path / "checkpoints").exists()
    found = RunDirectory.open(path).comparison()
    assert list(found.guide.values) == ["exact", "recurrent_circuit", "iterative_gaussian"]
    gap = found.value.sel(metric="elbo_gap").mean("problem")
    assert (
        float(gap.sel(guide="recurrent_circuit")) < 1 < float(gap.sel(guide="iterative_gaussian"))
    )
