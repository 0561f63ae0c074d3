"""The runner of the benchmarks and the page it writes, with planted benchmarks; five seconds."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import inference
import zoo

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The modules of the runner, which keep their files in a folder of their own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import results
    import run_all

    for module in (results, run_all):
        monkeypatch.setattr(module, "KEPT", tmp_path)
    yield run_all, results
    run_all.STOP.clear()
    for name in ("results", "run_all", "record"):
        sys.modules.pop(name, None)


def planted(bench, tmp_path, name, code, *, minutes=1.0, speed=False):
    """A benchmark that runs a few lines."""
    run_all, _ = bench
    path = tmp_path / f"{name}_code.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{code}")
    return run_all.Benchmark(name, str(path), minutes, speed)


def test_every_file_and_every_goal_of_the_table_exists(bench):
    run_all, results = bench
    names = [b.name for b in run_all.BENCHMARKS]
    assert len(set(names)) == len(names)
    for one in run_all.BENCHMARKS:
        first = one.command.split()[0]
        assert first == "-m" or (FOLDER.parent / first).exists(), first
    assert {goal.benchmark for goal in results.GOALS} <= set(names)
    quiet, loud = (
        sum(b.minutes for b in run_all.BENCHMARKS if b.speed is s) for s in (False, True)
    )
    assert quiet / 2 + loud <= 30


def test_numbers_reach_the_table_and_failures_are_rows(bench, tmp_path):
    run_all, results = bench
    say = "from record import record\nrecord('q', 3.0, [2.0, 4.0])\nprint('ratio 1,234.5')"
    todo = [
        planted(bench, tmp_path, "good", say),
        planted(bench, tmp_path, "broken", "print('so far'); raise SystemExit(3)"),
        planted(bench, tmp_path, "endless", "import time; time.sleep(60)", minutes=0.01),
        planted(bench, tmp_path, "fast", say, speed=True),
    ]
    run_all.carry_out(todo, 1.0, Console(stderr=True, quiet=True))
    assert [run_all.done(one) for one in todo] == [True, False, False, True]
    found = {b.name: json.loads((tmp_path / f"{b.name}.json").read_text()) for b in todo}
    goal = results.Goal
    row = results.row(goal("it", 3.5, "good", "q"), found)
    assert "| at most 3.5 | 3 | 2 to 4, n = 2 | yes |" in row
    assert "**no**" in results.row(goal("it", 3.5, "good", "q", least=True), found)
    printed = goal("it", 5.0, "fast", re.compile(r"^ratio (\S+)", re.M), least=True)
    assert "| 1.23e+03 |" in results.row(printed, found)
    assert "failed: exit code 3" in results.row(goal("it", 1.0, "broken", "seconds"), found)
    assert "failed: out of time" in results.row(goal("it", 1.0, "endless", "seconds"), found)
    assert "did not say" in results.row(goal("it", 1.0, "good", "other"), found)
    page = results.page([*(b.name for b in todo), "later"])
    assert "Not run yet: later." in page
    assert "so far" in page


def test_what_is_done_is_done_until_its_command_changes(bench, tmp_path):
    run_all, _ = bench
    one = planted(bench, tmp_path, "one", "")
    assert not run_all.done(one)
    assert run_all.run(one, 1.0)
    assert run_all.done(one)
    assert not run_all.done(run_all.Benchmark(one.name, one.command + " --more", 1.0))


@pytest.fixture
def jax():
    """JAX, whose import draws from NumPy's global generator."""
    before = np.random.get_state()
    yield pytest.importorskip("jax")
    np.random.set_state(before)


def test_log_densities_in_jax_are_those_of_the_models(monkeypatch, jax):
    monkeypatch.syspath_prepend(str(FOLDER))
    import opponents_nuts

    for name, make in opponents_nuts.POSTERIORS.items():
        model = zoo.MODELS[name]()
        x = model.observations()[:1]
        latents = inference.MeanFieldEncoder(model).latents
        z = model.simulate(20, seed=3)[0]["z"]
        ours = latents.log_joint({"z": z[:, None]}, x)[:, 0].detach().double()
        theirs = [float(make(model, x)(jax.numpy.asarray(row.numpy()))) for row in z]
        off = ours - ours.new_tensor(theirs)
        assert float(off.max() - off.min()) < 1e-5 * float(ours.abs().max())  # but for a constant
