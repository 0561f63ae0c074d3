"""The page benchmarks/RESULTS.md: goals beside what was measured, then every benchmark's output."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["GOALS", "KEPT", "RESULTS", "Goal", "page"]

ROOT = Path(__file__).parent.parent
KEPT, RESULTS = ROOT / "build/bench", ROOT / "benchmarks/RESULTS.md"
PACKAGES = (
    "torch", "pyro-ppl", "numpy", "scikit-learn", "zuko", "jax", "numpyro", "blackjax", "sbi",
)  # fmt: skip
Found = Mapping[str, Mapping[str, Any]]  # what came of each benchmark, by its name
Quantity = Mapping[str, Any]  # value and each, as recorded


@dataclass(frozen=True)
class Goal:
    """A number the project holds itself to.

    Attributes:
        what: the quantity, in words.
        bound: the goal.
        benchmark: which measures it.
        quantity: as it is recorded, or a regular expression for what is printed: the first group.
        least: the bound is the least allowed, not the most.
        bound_from: a quantity of the same benchmark that is the bound.
    """

    what: str
    bound: float
    benchmark: str
    quantity: str | re.Pattern[str]
    least: bool = False
    bound_from: str = ""


def above_floor(posterior: str, guide: str) -> Goal:
    """One of the goals for posteriors known in closed form."""
    what = f"C2ST above its floor, {posterior}: {guide}"
    return Goal(what, 0.02, "factor_analysis", f"{posterior}: {guide}")


def simulated(task: str) -> Goal:
    """The reservoir sampler against the published NPE."""
    what = f"C2ST from 10,000 simulations, {task}: reservoir sampler; goal: published NPE"
    return Goal(
        what, 0.0, f"opponents_sbi {task}", f"{task}: reservoir", bound_from=f"{task}: published"
    )


GOALS = (
    Goal(
        "`neuroguide compare` of the demo, s (install and downloads apart)", 300, "demo", "seconds"
    ),
    Goal("import beyond torch and Pyro, s", 1.0, "import_time", "zoo, inference, diagnostics"),
    Goal("`fit` over a bare PyTorch loop, batch 256", 1.1, "loop_overhead", "fit over bare, 256"),
    Goal("`fit` over a bare PyTorch loop, batch 4096", 1.1, "loop_overhead", "fit over bare, 4096"),
    above_floor("factor analysis", "reservoir sampler"),
    above_floor("factor analysis", "flow"),
    above_floor("factor analysis", "full covariance"),
    above_floor("Gaussian mixture", "reservoir sampler"),
    above_floor("Gaussian mixture", "flow"),
    simulated("two_moons"),
    simulated("gaussian_mixture_sbi"),
    Goal(
        "iterative Poisson: R2 after few training steps (published: after 160,000)",
        0.83,
        "vafaii2024",
        "ip: R2",
        least=True,
    ),
    Goal(
        "iterative Poisson: share of zeros, the same", 0.773, "vafaii2024", "ip: zeros", least=True
    ),
    Goal(
        "iterative Poisson, training step: times faster than the published one",
        5.0,
        "vafaii_speed",
        "training",
        least=True,
    ),
    Goal(
        "iterative Poisson, 1,000 steps of inference: times faster",
        5.0,
        "vafaii_speed",
        "inference",
        least=True,
    ),
    Goal(
        "reservoir, N = 20,000, D = 300: times faster than the dense circuit",
        30.0,
        "reservoir_speed",
        re.compile(r"^outputs only +\S+ +(\S+)", re.M),
        least=True,
    ),
    Goal(
        "efficient synapses: largest error of a slope (.8, .75, .6, .5)",
        0.03,
        "malkin2024",
        "slope",
    ),
    Goal(
        "adversarial recurrent guide, explaining away D = 2: KL, nats (factorised: .922)",
        0.05,
        "adversarial_speed",
        "KL",
    ),
)


# ------------------------------------------------------------------------------------- the machine


def package(name: str) -> str:
    """Its version, if it is installed."""
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} not installed"


def processor() -> str:
    """Its model, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def commit() -> str:
    """The commit, and whether files differ from it."""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def machine(found: Found) -> str:
    """The paragraph about where and when."""
    dates = [str(one["date"]) for one in found.values()]
    others = [float(o) for one in found.values() if (o := one["cores of others"]) is not None]
    took = sum(float(one["seconds"]) for one in found.values()) / 60
    shared = (
        f"Other work took up to {max(others):.1f} of the cores meanwhile (it is stated beside each"
        " benchmark; where two ran at a time, that includes the other)."
        if others
        else ""
    )
    return (
        f"{os.cpu_count()} cores, {processor()}; {platform.system()}, Python"
        f" {platform.python_version()}, {', '.join(map(package, PACKAGES))}; commit {commit()}."
        f" One thread (OMP_NUM_THREADS=1). Run {min(dates, default='-')} to"
        f" {max(dates, default='-')} (UTC), {took:.0f} minutes of benchmarks in all. {shared}"
    )


# --------------------------------------------------------------------------------------- the goals


def looked_up(
    goal: Goal, quantity: str | re.Pattern[str], one: Mapping[str, Any]
) -> Quantity | None:
    """What a benchmark recorded, or printed."""
    if isinstance(quantity, str):
        recorded: Quantity | None = one["numbers"].get(quantity)
        return recorded
    path = KEPT / f"{goal.benchmark}.txt"
    match = quantity.search(path.read_text() if path.exists() else "")
    return {"value": float(match[1].replace(",", "")), "each": []} if match else None


def row(goal: Goal, found: Found) -> str:
    """A line of the table."""
    one = found.get(goal.benchmark)
    if one is None:
        return f"| {goal.what} | | not run yet | | | `make bench` |"
    command = f"`python {one['command']}`"
    measured = looked_up(goal, goal.quantity, one) if one["ok"] else None
    bounds = looked_up(goal, goal.bound_from, one) if goal.bound_from else {"value": goal.bound}
    if measured is None or bounds is None:
        why = one["why"] or "the benchmark did not say"
        return f"| {goal.what} | | **failed: {why}** | | | {command} |"
    value, bound, each = measured["value"], bounds["value"], measured["each"]
    held = value >= bound if goal.least else value <= bound
    spread = f"{min(each):.3g} to {max(each):.3g}, n = {len(each)}" if each else ""
    sign = "at least" if goal.least else "at most"
    return (
        f"| {goal.what} | {sign} {bound:.3g} | {value:.3g} | {spread} | "
        f"{'yes' if held else '**no**'} | {command} |"
    )


def section(name: str, one: Mapping[str, Any]) -> str:
    """What one benchmark printed."""
    path = KEPT / f"{name}.txt"
    text = path.read_text().rstrip() if path.exists() else ""
    own, others = one.get("processor seconds"), one["cores of others"]
    beside = "" if own is None else f", {own:.0f} s of a processor"
    beside += "" if others is None else f", other work on {others:.1f} cores"
    state = "" if one["ok"] else f" **Failed: {one['why']}.**"
    head = f"`python {one['command']}`, {one['seconds']:.0f} s{beside}.{state}"
    return f"### {name}\n\n{head}\n\n```\n{text}\n```\n"


def page(names: list[str]) -> str:
    """All of benchmarks/RESULTS.md, from what is in build/bench.

    Args:
        names: of the benchmarks, in the order of the page.
    """
    kept = {n: KEPT / f"{n}.json" for n in names}
    found = {n: json.loads(p.read_text()) for n, p in kept.items() if p.exists()}
    missing = [n for n in names if n not in found]
    lines = [
        "# Results of the benchmarks",
        "",
        "Written by `make bench`; every number is read from what a benchmark said in that run.",
        "",
        machine(found),
        "",
        "| what | goal | measured | range | held | command |",
        "|---|---|---|---|---|---|",
        *(row(goal, found) for goal in GOALS),
        "| `make test`, minutes on two cores; `.ci/run` | at most 8; 45 | not part of this run"
        " | | | `make test`, `.ci/run` |",
        "",
    ]
    if missing:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += ["## What each benchmark printed", "", *(section(n, one) for n, one in found.items())]
    return "\n".join(lines)
