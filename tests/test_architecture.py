"""The shape of the code: who imports whom, how large files and functions are, what import does."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("inference", "zoo", "diagnostics", "neuroguide")
ALLOWED = {
    "inference": {"inference"},
    "zoo": {"zoo", "inference"},
    "diagnostics": {"diagnostics", "inference"},
    "neuroguide": {"neuroguide", "inference", "zoo", "diagnostics"},
}
FILES = {p: sorted((ROOT / p).rglob("*.py")) for p in PACKAGES}
SOURCES = [f for files in FILES.values() for f in files]


def imported(path):
    """Top-level names of what a file imports, other than relatively."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_import_arrows(package):
    ours = set(PACKAGES)
    for path in FILES[package]:
        assert set(imported(path)) & ours <= ALLOWED[package], path


def test_relative_imports_stay_inside_their_package():
    for package, files in FILES.items():
        for path in files:
            depth = len(path.relative_to(ROOT / package).parts)
            for node in ast.walk(ast.parse(path.read_text())):
                assert not isinstance(node, ast.ImportFrom) or node.level <= depth, path


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False)
            yield node, node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)


def test_files_and_functions_stay_small():
    lines = {p: len(p.read_text().splitlines()) for p in SOURCES}
    assert max(lines.values()) <= 400, max(lines, key=lines.get)
    assert statistics.median(lines.values()) <= 150
    bodies = sorted(n for p in SOURCES for _, n in functions(p))
    assert bodies[-1] <= 60
    assert bodies[int(0.9 * len(bodies))] <= 25


def test_every_module_has_all_and_every_public_function_a_docstring():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        names = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets
                 if isinstance(t, ast.Name)}  # fmt: skip
        assert "__all__" in names or not tree.body, path
        classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
        for node in [n for owner in (tree, *classes) for n in owner.body]:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_import_has_no_side_effects_and_no_heavy_companions():
    code = """
import numpy as np, sys, torch, pyro
before = (torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(),
          torch.get_default_dtype(), torch.distributions.Distribution._validate_args,
          pyro.settings.get(), torch.get_num_threads())
import zoo, inference, diagnostics
after = (torch.get_rng_state().sum().item(), np.random.get_state()[1].sum(),
         torch.get_default_dtype(), torch.distributions.Distribution._validate_args,
         pyro.settings.get(), torch.get_num_threads())
assert before == after, (before, after)
assert len(pyro.get_param_store()) == 0
heavy = {"arviz_stats", "arviz_plots", "matplotlib", "sklearn", "ot", "zuko", "xarray", "pandas"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
