"""Full disks, directories that take nothing, damaged files: clear errors, and nothing is lost."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import diagnostics
import neuroguide
import zoo
from diagnostics import RunDirectory
from inference import BadCheckpoint, BadInput, Fit, MeanFieldEncoder, OutputError, fit
from inference import checkpoint as files

MODEL = zoo.FactorAnalysis(7, 3, seed=1)
SEEDED = {"deadline": None, "derandomize": True, "database": None}
QUIET = {"progress": False, "batch_size": 8, "seed": 3}


def guide():
    return MeanFieldEncoder(MODEL, hidden=(6,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of a finished checkpoint, and the fit."""
    path = tmp_path_factory.mktemp("fit") / "run.safetensors"
    run = fit(MODEL, guide(), steps=12, checkpoint=path, **QUIET)
    return path.read_bytes(), run


def loads_the_same_or_not_at_all(data, run, path):
    """Other bytes are refused, or mean the same; a guide that was refused them is as it was."""
    path.write_bytes(data)
    fresh = guide()
    before = {n: t.clone() for n, t in fresh.state_dict().items()}
    try:
        found = Fit.load(path, fresh)
    except BadCheckpoint:
        assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items())
        return False
    known = run.guide.state_dict()
    assert all(torch.equal(t, known[n]) for n, t in found.guide.state_dict().items())
    assert np.array_equal(found.losses["guide"], run.losses["guide"])
    return True


@settings(max_examples=150, **SEEDED)
@given(st.data())
def test_a_flipped_bit_is_seen(whole, tmp_path_factory, data):
    content, run = whole
    place = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    loads_the_same_or_not_at_all(bytes(damaged), run, tmp_path_factory.getbasetemp() / "flipped")


@settings(max_examples=60, **SEEDED)
@given(st.data())
def test_a_truncated_file_is_refused(whole, tmp_path_factory, data):
    content, run = whole
    kept = content[: data.draw(st.integers(0, len(content) - 1))]
    path = tmp_path_factory.getbasetemp() / "cut"
    assert not loads_the_same_or_not_at_all(kept, run, path)


def test_numbers_of_another_checkpoint_are_refused(whole, tmp_path):
    """Tampered on purpose: other tensors under the old check sum."""
    (tmp_path / "run").write_bytes(whole[0])
    tensors, header = files.read(tmp_path / "run")
    kept = files.digest(tensors, header)
    moved = {n: t + 1 for n, t in tensors.items()}
    assert files.digest(moved, header) != kept
    assert files.digest(tensors, header | {"seconds": -1.0}) != kept


def test_checkpoints_without_a_check_sum_are_still_read(whole, tmp_path):
    """Those of version 0.7."""
    content, run = whole
    old = content.replace(b'"sha256"', b'"sha255"')
    assert loads_the_same_or_not_at_all(old, run, tmp_path / "old")


# ------------------------------------------------------------------------------- full disks


@contextmanager
def room_for(n):
    """No file may grow beyond n bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, whole):
    """A run directory with everything in it, what wrote each file, and its bytes."""
    run = RunDirectory.create(tmp_path_factory.mktemp("run") / "a", {"model": "factor_analysis"})
    fits, x = {"encoder": whole[1]}, MODEL.observations()[:2]
    trees = diagnostics.collect(
        MODEL, {"encoder": whole[1].guide}, x, draws=40, chains=2, seed=0, progress=False
    )
    compared = diagnostics.compare_draws(trees, ["c2st", "elbo_gap"], progress=False)
    writers = {
        "config.json": lambda: RunDirectory.create(run.path, {"model": "factor_analysis"}),
        "losses.csv": lambda: run.write_losses(fits),
        "health.csv": lambda: run.write_health(fits),
        "draws.nc": lambda: run.write_draws(trees, model="factor_analysis"),
        "comparison.nc": lambda: run.write_comparison(compared),
        "checkpoints/encoder.safetensors": lambda: whole[1].save(run.checkpoint("encoder")),
    }
    for write in writers.values():
        write()
    return run, writers


@pytest.mark.parametrize(
    "name",
    ["config.json", "losses.csv", "health.csv", "draws.nc", "comparison.nc",
     "checkpoints/encoder.safetensors"],
)  # fmt: skip
@settings(max_examples=8, **SEEDED)
@given(share=st.floats(0.0, 0.9))
def test_a_disk_that_is_full_at_any_byte_keeps_what_was_there(finished, name, share):
    run, writers = finished
    path = run.path / name
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    error = None
    with room_for(int(share * len(before[path]))):
        try:
            writers[name]()
        except OutputError as raised:
            error = raised
    assert error, f"{name} was written where there was no room"
    assert "earlier files are intact" in str(error)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_a_fit_goes_on_once_there_is_room_again(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.loop.SAVE_EVERY", 0.0)
    path, calls, sync = tmp_path / "run", [], os.fsync

    def full(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
        patch.setattr(os, "fsync", full)
        fit(MODEL, guide(), steps=12, checkpoint=path, **QUIET)
    assert Fit.load(path, guide()).steps == 5
    run = fit(MODEL, guide(), steps=12, checkpoint=path, **QUIET)
    known = whole[1].guide.state_dict()
    assert all(torch.equal(t, known[n]) for n, t in run.guide.state_dict().items())
    assert np.array_equal(run.losses["guide"], whole[1].losses["guide"])


# ------------------------------------------------------------------- directories that take nothing


@pytest.fixture(params=["/proc/none", "below a file", "read-only"])
def nowhere(request, tmp_path):
    """A path that cannot be written, by root neither."""
    if request.param.startswith("/"):
        return request.param
    if request.param == "below a file":
        (tmp_path / "file").write_text("mine")
        return tmp_path / "file" / "run"
    if not os.geteuid():
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    return tmp_path / "locked" / "run"


def test_directories_that_take_nothing(nowhere, whole, tmp_path):
    with pytest.raises(OutputError, match="expected room and permission to write it"):
        whole[1].save(f"{nowhere}/fit")
    with pytest.raises((OutputError, BadInput), match="expected"):
        RunDirectory.create(nowhere, {"model": "factor_analysis"})
    with pytest.raises(OutputError, match="expected room and permission to write it"):
        fit(MODEL, guide(), steps=2, checkpoint=f"{nowhere}/fit", **QUIET)
    words = ["fit", "factor_analysis", "flow", "--steps", "2", "--out", f"{nowhere}/run"]
    result = CliRunner().invoke(neuroguide.app, words)
    assert result.exit_code in (1, 2), result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
