"""Guards and fixtures for all tests."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

import zoo
from inference.case import states
from inference.seeds import seeded


@pytest.fixture(autouse=True)
def untouched_globals():
    """No test may leave a trace in the parameter store, the seeds, the dtype or the switches."""
    before = _globals()
    yield
    assert _globals() == before


def _globals():
    return states() | {"torch's threads": torch.get_num_threads()}


@pytest.fixture
def same_noise():
    """Torch's generators start from the same seed, and are put back."""
    with seeded(0):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for a busy core make small problems a hundred times slower."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def model():
    """Factor analysis with D = 3 latents and F = 7 features: off centre, correlated, asymmetric."""
    return zoo.FactorAnalysis(7, 3, seed=1)


def within(value, truth, se, *, k=5.0):
    """Assert that random numbers lie within k standard errors of the truth."""
    value, truth, se = (np.asarray(a, dtype=float) for a in (value, truth, se))
    assert np.all(se > 0), "a tolerance of zero accepts nothing"
    worst = float(np.max(np.abs(value - truth) / se))
    assert worst < k, f"{worst:.1f} standard errors from the truth"


@pytest.fixture
def browse(tmp_path):
    """Opens a page in Chromium, headless; returns what it printed."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on PATH: pages were not opened in a browser")

    def call(page, *options):
        return subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
                "--enable-logging=stderr", "--v=0", *options, page.as_uri(),
            ],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip

    return call
