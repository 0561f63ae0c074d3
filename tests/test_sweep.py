"""Sweeps: what is run, what is kept, and that no death of a process loses or doubles a cell.

About 50 s on an idle machine, most of it imports of worker processes; fifty deaths take 8 minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from typer.testing import CliRunner

import neuroguide
import zoo
from diagnostics import Results, overview
from diagnostics.results import DONE, FAILED, OWN, UNFIT
from inference import BadCheckpoint, BadInput, OutputError
from neuroguide.cell import run_cell
from neuroguide.cluster import cluster
from neuroguide.crew import crew
from neuroguide.matrix import Matrix
from neuroguide.pipeline import build_guide
from neuroguide.sweep import sweep

runner = CliRunner()
TOML = """
models = ["factor_analysis", "banana"]
guides = ["full_covariance_encoder", "mean_field_encoder"]
seeds = [1]
metrics = ["mean_error", "sd_ratio"]
reports = false
device = "cpu"
[sizes]
steps = 60
batch_size = 16
problems = 2
draws = 30
chains = 2
calibration = 20
[guide.full_covariance_encoder]
knobs = { hidden = [16] }
"""
TIMES = ("fit_seconds", "cell_seconds", "draws_per_second")


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "matrix.toml"
    path.write_text(TOML)
    return path


def here(cells, folder):
    """Cells in this process, one after the other."""
    for cell in cells:
        yield run_cell(folder / cell.name, cell.name, cell.config, cell.device)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The store of an unbroken sweep."""
    path = tmp_path_factory.mktemp("truth")
    (path / "matrix.toml").write_text(TOML)
    return sweep(Matrix.read(path / "matrix.toml"), path / "store", here, progress=False)


def numbers(results):
    """All of a store that does not depend on the clock, bit for bit."""
    table = results.table().sortby("cell").drop_vars(TIMES)
    return {n: v.values.astype(str).tolist() for n, v in table.variables.items()}


def same(results, truth):
    assert numbers(results) == numbers(truth)
    assert numbers(Results.open(results.path)) == numbers(truth)
    for row in truth.rows:
        a, b = (r.draws(row["cell"]) for r in (results, truth))
        xarray.testing.assert_equal(a[row["guide"]]["posterior"], b[row["guide"]]["posterior"])


def test_a_matrix_is_every_combination(toml):
    cells = Matrix.read(toml).cells
    assert len(cells) == len({c.name for c in cells}) == 4
    first = cells[0].config
    assert (first["model"], first["seed"]) == ("factor_analysis", 1)
    assert first["knobs"] == {"hidden": [16]}
    assert "knobs" not in cells[1].config
    everything = Matrix.of({"models": "all", "guides": ["*encoder"], "objectives": ["own", "elbo"]})
    guides = {c.config["guides"][0] for c in everything.cells}
    assert guides == {"mean_field_encoder", "full_covariance_encoder", "poisson_encoder"}
    assert len(everything.cells) == len(zoo.MODELS) * 3 * 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('models = ["banan"]', ["models", "banana"]),
        ('guides = ["flw"]', ["guides", "flow"]),
        ('objectives = ["elb"]', ["objectives", "elbo"]),
        ("models = []", ["models", "list of names"]),
        ("models = 3", ["models", "3"]),
        ("seeds = -1", ["seeds", "-1"]),
        ("seeds = [0, true]", ["seeds", "integers"]),
        ("seed = 1", ["seed", "seeds"]),
        ('metrics = ["c3st"]', ["metrics", "c2st"]),
        ('data = "digit"', ["data", "digits"]),
        ("reports = 1", ["reports", "true or false"]),
        ("sizes = { step = 3 }", ["sizes.step", "steps"]),
        ('sizes = { steps = "3" }', ["sizes.steps", "'3'"]),
        ("guide = { flw = { steps = 3 } }", ["guide.flw", "flow"]),
        ("model = { banana = { knobs = 3 } }", ["model.banana.knobs", "steps"]),
    ],
)
def test_mistakes_in_a_matrix_are_named(tmp_path, line, words):
    key = line.split(" ")[0]
    base = {"models": 'models = ["banana"]', "guides": 'guides = ["flow"]'} | {key: line}
    path = tmp_path / "m.toml"
    path.write_text("\n".join(base.values()))
    with pytest.raises(BadInput) as error:
        Matrix.read(path)
    said = str(error.value).replace("Expected", "expected")
    assert all(word in said for word in [*words, "expected", "got"]), said


def test_a_matrix_that_is_no_toml_is_refused(tmp_path):
    path = tmp_path / "m.toml"
    for text in (None, "models = [", "\x00"):
        if text is not None:
            path.write_text(text)
        with pytest.raises(BadCheckpoint, match=r"expected a TOML file; got .*docs/how_to/sweep"):
            Matrix.read(path)


def test_the_store_has_a_row_and_draws_for_each_cell(truth):
    table = Results.open(truth.path).table()
    assert dict(table.sizes) == {"cell": 4, "metric": 2}
    assert set(table.status.values.tolist()) == {DONE}
    assert table.value.notnull().all()
    assert ((table.calibration_p > 0) & (table.calibration_p <= 1)).all()
    assert (table.fit_seconds > 0).all()
    assert (table.draws_per_second > 0).all()
    tree = truth.draws("banana-mean_field_encoder-own-1")
    assert set(tree.children) == {"exact", "mean_field_encoder"}
    sizes = tree["mean_field_encoder/posterior"].sizes
    assert (sizes["chain"], sizes["draw"], sizes["problem"]) == (2, 30, 2)
    speed = table.draws_per_second.sel(cell="banana-mean_field_encoder-own-1")
    np.testing.assert_allclose(speed * tree["mean_field_encoder"].attrs["seconds"], 30 * 2 * 2)
    cube = truth.matrix("sd_ratio", "value")
    assert cube.sizes == {"model": 2, "guide": 2, "objective": 1, "seed": 1}
    one = cube.sel(model="banana", guide="mean_field_encoder", objective="own", seed=1)
    assert float(one) == float(table.value.sel(cell="banana-mean_field_encoder-own-1")[1])
    with pytest.raises(BadInput, match=r"metric: expected one of mean_error, sd_ratio; got 'c2st'"):
        truth.matrix("c2st")


def test_seeds_change_the_fit_and_its_start(tmp_path, truth):
    matrix = Matrix.of(tomllib.loads(TOML) | {"seeds": [1, 2], "models": ["banana"]})
    first, other = matrix.cells[1::2]
    row = run_cell(tmp_path / other.name, other.name, other.config, other.device)
    (before,) = [r for r in truth.rows if r["cell"] == first.name]
    assert row["metrics"]["sd_ratio"]["value"] != before["metrics"]["sd_ratio"]["value"]
    starts = [build_guide("mean_field_encoder", zoo.Banana(), {}, seed) for seed in (1, 2)]
    a, b = (torch.cat([p.flatten() for p in g.parameters()]) for g in starts)
    assert (a != b).any()


def test_local_processes_find_the_same_numbers(tmp_path, truth, toml):
    found = sweep(Matrix.read(toml), tmp_path / "s", partial(crew, workers=2), progress=False)
    same(found, truth)


def killing(cells, folder):
    """A crew of which one is killed at work, when the first row is there."""
    for k, row in enumerate(crew(cells, folder, workers=2), 1):
        if k == 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        yield row


def test_a_killed_worker_costs_nothing(tmp_path, truth, toml):
    same(sweep(Matrix.read(toml), tmp_path / "s", killing, progress=False), truth)


def test_a_cell_that_kills_its_process_fails_alone(tmp_path, toml, monkeypatch):
    # each worker finds one cell that ends it, as one that is out of memory would
    monkeypatch.setenv("NEUROGUIDE_TEST_DIE", "banana-mean_field_encoder-own-1")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('NEUROGUIDE_TEST_DIE') and 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    import neuroguide.cell as c, neuroguide.crew as w\n"
        "    real = c.run_cell\n"
        "    def deadly(path, name, config, device):\n"
        "        if name == os.environ['NEUROGUIDE_TEST_DIE']: os.abort()\n"
        "        return real(path, name, config, device)\n"
        "    w.run_cell = deadly\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = sweep(Matrix.read(toml), tmp_path / "s", partial(crew, workers=2), progress=False)
    states = {row["cell"]: row["status"] for row in found.rows}
    assert states.pop("banana-mean_field_encoder-own-1") == FAILED
    assert set(states.values()) == {DONE}
    assert len(states) == 3
    (row,) = [r for r in found.rows if r["status"] == FAILED]
    assert "died 3 times" in row["error"]


def test_a_stopped_sweep_goes_on_and_may_grow(tmp_path, truth, toml):
    def some(cells, folder):
        yield from here(cells[:1], folder)
        raise KeyboardInterrupt

    out, matrix = tmp_path / "s", Matrix.read(toml)
    half = Matrix([c for c in matrix.cells if c.config["model"] == "banana"])
    with pytest.raises(KeyboardInterrupt):
        sweep(half, out, some, progress=False)
    assert len(Results.open(out).rows) == 1
    asked = []

    def counted(cells, folder):
        asked.extend(c.name for c in cells)
        yield from here(cells, folder)

    same(sweep(matrix, out, counted, progress=False), truth)
    assert len(asked) == 3
    sweep(matrix, out, counted, progress=False)
    assert len(asked) == 3


def test_failures_are_kept_and_tried_again_on_request(tmp_path, toml, monkeypatch):
    matrix = Matrix.of({
        "models": ["banana", "noisy_or"], "guides": ["mean_field_encoder"],
        "metrics": ["mean_error"], "reports": False,
        "sizes": {"steps": 5, "problems": 1, "draws": 20, "calibration": 0},
    })  # fmt: skip
    out = tmp_path / "s"
    with monkeypatch.context() as broken:
        broken.setattr(zoo.Banana, "exact", lambda self: 1 / 0)
        found = sweep(matrix, out, here, progress=False)
    banana, noisy = found.rows
    assert (banana["status"], noisy["status"]) == (FAILED, UNFIT)
    assert "ZeroDivisionError" in banana["error"]
    assert "1 / 0" in (out / "cells" / banana["cell"] / "error.txt").read_text()
    assert "discrete" in noisy["error"]
    page = overview([out], out / "matrix.html").read_text()
    assert "ZeroDivisionError" in page
    assert "discrete" in page
    assert sweep(matrix, out, here, progress=False).rows[0]["status"] == FAILED
    again = sweep(matrix, out, here, retry=True, progress=False)
    assert [r["status"] for r in again.rows] == [DONE, UNFIT]


def test_another_setting_or_another_sweep_is_refused(tmp_path, truth, toml):
    toml.write_text(TOML.replace("steps = 60", "steps = 61"))
    with pytest.raises(BadInput, match=r"steps=61; got steps=60"):
        sweep(Matrix.read(toml), truth.path, here, progress=False)
    matrix = Matrix.of({"models": ["banana"], "guides": ["flow"]})

    def again(cells, folder):
        sweep(matrix, tmp_path / "s", here, progress=False)
        yield from ()

    with pytest.raises(BadInput, match="expected a store that no other sweep is at work in"):
        sweep(matrix, tmp_path / "s", again, progress=False)


def test_stores_that_are_damaged_old_or_elsewhere_lose_nothing(tmp_path, truth, toml):
    import shutil

    out = tmp_path / "s"
    shutil.copytree(truth.path, out)
    never = partial(_never, "no cell is run again")
    for spoil in (_truncate, _older, lambda path: path.unlink()):
        spoil(out / "results.nc")
        with pytest.raises(BadCheckpoint, match=r"results\.nc: expected .* Run the sweep again"):
            Results.open(out)
        with pytest.raises(BadCheckpoint):
            overview([out], tmp_path / "page.html")
        same(sweep(Matrix.read(toml), out, never, progress=False), truth)
    row = out / "cells" / "banana-mean_field_encoder-own-1" / "row.json"
    row.write_text(json.dumps(json.loads(row.read_text()) | {"format": 0, "metrics": "other"}))
    same(sweep(Matrix.read(toml), out, never, progress=False), truth)
    row.write_text(row.read_text()[:40])
    same(sweep(Matrix.read(toml), out, here, progress=False), truth)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        sweep(Matrix.read(toml), tmp_path / "file", here, progress=False)


def _never(why, cells, folder):
    assert not cells, why
    yield from ()


def _truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def _older(path):
    table = xarray.load_dataset(path, engine="h5netcdf")
    table.attrs |= {"format": 0, "version": "0.0.1"}
    table.to_netcdf(path, engine="h5netcdf")


def test_a_full_disk_stops_the_sweep_and_keeps_what_is_done(tmp_path, truth, toml, monkeypatch):
    def full(cells, folder):
        yield from here(cells[:1], folder)
        monkeypatch.setattr(os, "replace", _no_space)
        yield from here(cells[1:], folder)

    with pytest.raises(OutputError, match="No space left"):
        sweep(Matrix.read(toml), tmp_path / "s", full, progress=False)
    monkeypatch.undo()
    same(sweep(Matrix.read(toml), tmp_path / "s", here, progress=False), truth)


def _no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.fixture
def dask_draws():
    """Dask waits for a random time before it tries a connection again, by Python's generator."""
    before = random.getstate()
    yield
    random.setstate(before)


@pytest.mark.usefixtures("dask_draws")
def test_a_dask_cluster_with_a_killed_worker_finds_the_same(tmp_path, truth, toml):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as local:

        def losing(cells, folder):
            for k, row in enumerate(cluster(cells, folder, address=local.scheduler_address), 1):
                if k == 1:
                    os.kill(next(iter(local.workers.values())).pid, signal.SIGKILL)
                yield row

        found = sweep(Matrix.read(toml), tmp_path / "s", losing, progress=False)
    assert len(found.rows) == 4
    same(found, truth)


@pytest.mark.usefixtures("dask_draws")
def test_a_scheduler_that_is_not_there_is_named(tmp_path, toml):
    with pytest.raises(BadInput, match=r"scheduler: expected .*running Dask scheduler"):
        next(cluster(Matrix.read(toml).cells, tmp_path, address="tcp://127.0.0.1:9"))


def test_the_command_writes_a_page(tmp_path, toml):
    toml.write_text(TOML.replace("reports = false", "").replace('"banana"]', "]"))
    small = ["sweep", str(toml), "--out", str(tmp_path / "s"), "--workers", "2"]
    planned = runner.invoke(neuroguide.app, [*small, "--plan"])
    assert len(planned.output.split()) == 2
    assert not (tmp_path / "s").exists()
    done = runner.invoke(neuroguide.app, small)
    assert done.exit_code == 0, done.output
    assert "2 done" in done.output
    page = (tmp_path / "s" / "matrix.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    links = set(re.findall(r'href="(cells/[^"]+)"', page))
    assert len(links) == 2
    assert all((tmp_path / "s" / link).exists() for link in links)
    report = (tmp_path / "s" / next(iter(links))).read_text()
    assert "Simulation-based calibration" in report
    wrong = runner.invoke(neuroguide.app, [*small, "--scheduler", "nowhere"])
    assert wrong.exit_code == 0  # nothing is left to run
    refused = runner.invoke(neuroguide.app, [*small, "--workers", "-1"])
    assert refused.exit_code == 2


def children(pid):
    """Worker processes of a process, without the tracker of multiprocessing."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    except OSError:  # it is gone
        return []


def killed_sweeps(toml, out, times, seed):
    """Start the command and kill it after a random time, `times` times; then let it end."""
    moments = random.Random(seed)
    command = [sys.executable, "-m", "neuroguide", "sweep", str(toml), "--out", str(out),
               "--workers", "2"]  # fmt: skip
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.5, 12.0))
        victims = [process.pid, *children(process.pid)]
        os.kill(moments.choice(victims), signal.SIGKILL)
        time.sleep(moments.uniform(0.0, 1.0))
        process.kill()
        process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Results.open(out)


def test_two_deaths_of_a_sweep_change_no_number(tmp_path, truth, toml):
    same(killed_sweeps(toml, tmp_path / "s", 2, seed=0), truth)


@pytest.mark.slow  # 7 minutes
def test_fifty_deaths_of_a_sweep_change_no_number(tmp_path, truth, toml):
    same(killed_sweeps(toml, tmp_path / "s", 50, seed=1), truth)


def test_the_table_has_nothing_where_a_cell_has_nothing(tmp_path):
    rows = [{"cell": "a", "status": FAILED, "error": "e", "model": "m", "guide": "g",
             "objective": "own", "seed": 0, "path": "cells/a"}]  # fmt: skip
    table = Results(tmp_path, rows).table()
    assert np.isnan(table.fit_seconds.values).all()
    assert table.sizes["metric"] == 0
    Results(tmp_path, rows).write()
    assert Results.open(tmp_path).rows[0]["error"] == "e"


@pytest.mark.slow
def test_a_browser_sorts_the_matrix_and_changes_what_it_shows(tmp_path, browse):
    """Clicks on a page of six cells, in Chromium. About 5 s."""
    errors = {"a": {"g": 0.3, "h": 0.1}, "b": {"g": 0.1}, "c": {"g": 0.2, "h": 0.05}}
    rows = [
        {"cell": f"{m}-{g}", "model": m, "guide": g, "objective": OWN, "seed": 0, "status": DONE,
         "verdict": "v", "path": f"cells/{m}-{g}", "fit_seconds": 10 * e, "draws_per_second": 1.0,
         "metrics": {"c2st": {"excess": e, "at_floor": e < 0.2}}}
        for m, guides in errors.items() for g, e in guides.items()
    ]  # fmt: skip
    Results(tmp_path, rows).write()
    page = overview([tmp_path], tmp_path / "matrix.html")
    script = """<script>
      const heads = [...document.querySelectorAll("#matrix thead button")];
      const all = query => [...document.querySelectorAll("#matrix " + query)];
      const order = () => all("tbody th").map(h => h.textContent).join("");
      const shown = q => getComputedStyle(q).display !== "none";
      const visible = () => all("td .q").filter(shown).map(q => q.textContent.trim()).join(" ");
      const seen = [visible()];
      for (const k of [1, 1, 2, 0, 0]) { heads[k].click(); seen.push(order()); }
      document.querySelector("input[value=fit]").click();
      seen.push(visible()); heads[1].click(); seen.push(order());
      const list = document.querySelectorAll("table")[1];
      list.querySelectorAll("thead th button")[3].click();
      seen.push([...list.tBodies[0].rows].map(r => r.cells[3].textContent).join(" "));
      document.body.dataset.seen = seen.join("|");
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    done = browse(page, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert re.search(r'data-seen="([^"]*)"', done.stdout)[1].split("|") == [
        "+0.300 +0.100 +0.100 +0.200 +0.050",
        "bca", "acb", "cab", "abc", "cba",  # b has no cell of h, and comes last
        "2.0 s 0.5 s 1.0 s 3.0 s 1.0 s", "bca",
        "+0.050 +0.100 +0.100 +0.200 +0.300",
    ]  # fmt: skip
