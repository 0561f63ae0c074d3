"""Seconds that comparison, classifiers and calibration take, against the goals of the project.

Usage: python benchmarks/diagnostics_speed.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import diagnostics
import inference
import zoo


def line(what: str, goal: float, work: Callable[[], object]) -> None:
    """Time one piece of work."""
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    print(f"{what:68} {took:7.1f} s  {'ok' if took < goal else f'over {goal:g} s'}", flush=True)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)  # threads that wait for a busy core can cost a hundred times more
    model = zoo.FactorAnalysis()
    guides = {f"guide {k}": inference.FullCovarianceEncoder(model, seed=k) for k in range(4)}
    x = model.observations()
    others = {n: m for n, m in diagnostics.METRICS.items() if n != "c2st"}
    classifiers = {"c2st": diagnostics.METRICS["c2st"]}

    def compared(metrics: dict[str, diagnostics.Metric], problems: int, draws: int) -> object:
        sizes = {"draws": draws // 4, "chains": 4, "seed": 0}
        return diagnostics.compare(model, guides, x[:problems], metrics=metrics, **sizes)

    line(
        "compare, 4 guides x 50 problems x 1,000 draws, D = 8, without C2ST",
        60,
        lambda: compared(others, 50, 1000),
    )
    line(
        "C2ST, 4 guides x 10 problems x 2,000 draws, with its floor",
        180,
        lambda: compared(classifiers, 10, 2000),
    )
    one = guides["guide 0"]
    for check in (diagnostics.sbc, diagnostics.coverage, diagnostics.tarp):
        line(
            f"{check.__name__}, 500 problems, an amortised guide",
            30,
            lambda check=check: check(model, one, problems=500, seed=0, progress=False),
        )


if __name__ == "__main__":
    main()
