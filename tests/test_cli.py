"""The command line, from names to run directories. About 60 s, most of it the two small runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import xarray
from typer.testing import CliRunner

import inference
import neuroguide
import zoo
from diagnostics import METRICS, RunDirectory
from inference import BadCheckpoint, BadInput, OutputError
from inference import checkpoint as files

runner = CliRunner()


def call(*args):
    return runner.invoke(neuroguide.app, [str(a) for a in args])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small comparison on real digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    result = call(
        "compare", "factor_analysis", "--data", "digits", "--guides", "full_covariance_encoder",
        "--quick", "--problems", 2, "--steps", 60, "--model-steps", 60, "--out", path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return path, result.output


def test_list_names_everything():
    shown = call("list").output
    names = [*zoo.MODELS, *inference.GUIDES, *inference.OBJECTIVES, *zoo.data.DATA]
    assert all(name in shown for name in names)
    assert "closed form" in shown


@pytest.mark.parametrize("command", ["list", "show", "reference", "fit", "compare", "report"])
def test_help_has_an_example(command):
    shown = call(command, "--help")
    assert shown.exit_code == 0
    assert f"Example: neuroguide {command}" in re.sub(r"\s+", " ", shown.output)


def test_show_explains_and_draws(tmp_path):
    done = call("show", "banana", "--problem", 2, "--out", tmp_path / "banana.png")
    assert done.exit_code == 0, done.output
    assert "z ~ Normal(0, I_2)" in done.output
    assert (tmp_path / "banana.png").read_bytes().startswith(b"\x89PNG")
    wrong = call("show", "banana", "--problem", 100, "--out", tmp_path / "none.png")
    assert wrong.exit_code == 2
    assert not (tmp_path / "none.png").exists()


def test_reference_keeps_draws_with_their_provenance(tmp_path, monkeypatch):
    path = tmp_path / "draws.nc"
    monkeypatch.setattr(zoo.Model, "reference", zoo.Banana.exact)
    done = call("reference", "banana", "--draws", 2000, "--chains", 2, "--out", path)
    assert done.exit_code == 0, done.output
    assert "R-hat" in done.output
    kept = zoo.StoredDraws(zoo.Banana(), path)
    assert kept.attrs["command"] == "neuroguide reference banana --draws 2000 --chains 2 --seed 0"
    x = kept.model.observations()[:2]
    assert kept.draw(x, draws=300, chains=2, seed=0).values["z"].shape == (2, 300, 2, 2)


def test_compare_writes_a_whole_run(run):
    path, shown = run
    assert {p.name for p in path.iterdir()} == {
        "config.json", "checkpoints", "losses.csv", "health.csv", "draws.nc",
        "comparison.nc", "report.html",
    }  # fmt: skip
    assert "C2ST" in shown
    assert "floor" in shown
    assert "marginal TV" not in shown  # no latent is discrete
    opened = RunDirectory.open(path)
    tree = opened.draws()
    assert set(tree.children) == {"exact", "full_covariance_encoder"}
    assert tree["exact/posterior"].sizes["factor"] == 8
    assert opened.losses()["model"]["guide"].shape == (60,)
    found = xarray.load_dataset(path / "comparison.nc", engine="h5netcdf")
    assert found.value.sizes == {"guide": 2, "metric": len(METRICS), "problem": 2}
    learned = opened.losses()["model"]["guide"]
    assert learned[-10:].mean() < learned[:10].mean()


def test_report_is_self_contained_and_shows_every_picture(run):
    path, _ = run
    page = (path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert page.count("data:image/png;base64,") == 6
    for words in (
        "<b>full covariance encoder</b>: ", "reconstructions", "Marginals", "Intervals",
        "correlations", "dreams", "Losses", "C2ST", "floor",
    ):  # fmt: skip
        assert words in page
    (path / "report.html").unlink()
    assert call("report", path).exit_code == 0
    assert (path / "report.html").read_text() == page


def test_the_same_command_reuses_its_fits_and_another_is_refused(run):
    path, _ = run
    stamp = (path / "checkpoints" / "full_covariance_encoder.safetensors").stat().st_mtime_ns
    common = ("compare", "factor_analysis", "--data", "digits", "--quick", "--problems", 2,
              "--steps", 60, "--model-steps", 60, "--out", path)  # fmt: skip
    refused = call(*common, "--guides", "mean_field_encoder")
    assert refused.exit_code == 2
    assert "mean_field_encoder" in refused.stderr
    assert "--out" in refused.stderr
    checkpoints = path / "checkpoints"
    kept = files.read(checkpoints / "full_covariance_encoder.safetensors")[0]
    assert call(*common, "--guides", "full_covariance_encoder").exit_code == 0
    again = files.read(checkpoints / "full_covariance_encoder.safetensors")[0]
    assert all((kept[n] == again[n]).all() for n in kept)
    assert stamp <= (checkpoints / "full_covariance_encoder.safetensors").stat().st_mtime_ns


def test_fit_keeps_a_checkpoint_and_a_report(tmp_path):
    done = call("fit", "factor_analysis", "mean_field_encoder", "--steps", 20, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    guide = inference.MeanFieldEncoder(zoo.FactorAnalysis())
    path = tmp_path / "checkpoints" / "mean_field_encoder.safetensors"
    assert inference.Fit.load(path, guide).steps == 20
    assert "Losses" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compare", "factor_analysi"], ["model", "factor_analysis", "Did you mean"]),
        (["compare", "factor_analysis", "--guides", "flw"], ["guide", "flow"]),
        (["compare", "factor_analysis", "--guides", ","], ["guides", "at least one"]),
        (["compare", "factor_analysis", "--guides", "exact"], ["guides", "reference row"]),
        (["compare", "factor_analysis", "--data", "digit"], ["data", "digits"]),
        (["fit", "factor_analysis", "flow", "--objective", "elb"], ["objective", "elbo"]),
        (["fit", "factor_analysis", "flow", "--seed", "-1"], ["seed", ">= 0"]),
        (["fit", "factor_analysis", "flow", "--steps", "0"], ["steps", ">= 1"]),
        (["fit", "factor_analysis", "flow", "--lr", "0"], ["lr", "positive"]),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(args, words, tmp_path):
    result = call(*args, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert all(word in result.stderr for word in words), result.stderr


def test_bad_directories(tmp_path):
    missing = call("report", tmp_path / "none")
    assert missing.exit_code == 1
    assert "config.json" in missing.stderr
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="other files"):
        RunDirectory.create(tmp_path, {"seed": 0})
    unfinished = RunDirectory.create(tmp_path / "run", {"seed": 0})
    with pytest.raises(BadCheckpoint, match="finished run"):
        unfinished.draws()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        RunDirectory.open(tmp_path / "run")


def test_a_full_disk_leaves_earlier_files_alone(tmp_path, monkeypatch):
    run = RunDirectory.create(tmp_path / "run", {"seed": 0})
    run.write_losses({})
    before = (run.path / "losses.csv").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"losses\.csv.*No space left"):
        run.write_losses({})
    assert (run.path / "losses.csv").read_bytes() == before
    assert not list(run.path.glob(".*.part"))


def test_a_killed_run_ends_with_the_numbers_of_an_unbroken_one(tmp_path):
    """SIGKILL in mid-fit, then the same command again. About 25 s."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, neuroguide\nfrom inference import loop\nloop.SAVE_EVERY = 0.2\n"
        "sys.argv[0] = 'neuroguide'\nneuroguide.main()\n"
    )
    command = [sys.executable, str(script), "fit", "factor_analysis", "mean_field_encoder",
               "--steps", "600", "--batch-size", "32", "--out"]  # fmt: skip
    name = "checkpoints/mean_field_encoder.safetensors"
    process = subprocess.Popen([*command, str(tmp_path / "a")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / name).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = len(files.read(tmp_path / "a" / name)[0]["loss/guide"])
    assert 0 < steps < 600, "killed too late to show anything"
    for which in ("a", "b"):
        subprocess.run([*command, str(tmp_path / which)], check=True, capture_output=True)
    resumed, unbroken = (files.read(tmp_path / which / name)[0] for which in ("a", "b"))
    assert resumed.keys() == unbroken.keys()
    assert all((resumed[n] == unbroken[n]).all() for n in resumed)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["steps"] == 600


def test_a_refused_run_does_not_stand_in_the_way(tmp_path):
    """A config with nothing beside it is replaced; one with results is not."""
    run = RunDirectory.create(tmp_path / "run", {"model": "banana", "steps": -3})
    run = RunDirectory.create(run.path, {"model": "banana", "steps": 200})
    assert RunDirectory.open(run.path).config["steps"] == 200
    (run.path / "checkpoints").mkdir(exist_ok=True)
    (run.path / "checkpoints" / "flow.safetensors").write_bytes(b"work")
    with pytest.raises(BadInput, match="another run, steps=200"):
        RunDirectory.create(run.path, {"model": "banana", "steps": 100})
